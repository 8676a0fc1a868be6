"""Layers: values, gradients, names, the arena, drawing, copies and inference."""

import copy
import gc
import inspect
import math
import os
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import initializers
from gpubackprop.arena import ALIGNMENT
from gpubackprop.checkpoint import BUILTIN
from gpubackprop.layers import Layer
from gpubackprop.optimizers import OPTIMIZERS as KINDS

erf = np.vectorize(math.erf)


def softplus(x):
    return np.logaddexp(0, x)


def selu(x):
    return 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "selu": selu,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "softplus": softplus,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": gelu_tanh,
    "mish": lambda x: x * np.tanh(softplus(x)),
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard_tanh": lambda x: np.clip(x, -1, 1),
}


class Gain(Layer):
    """A user's layer with parameters of its own."""

    def __init__(self, columns):
        self.gain = gb.Parameter((columns,), "ones")
        self.mixing = gb.Parameter((columns, columns), "glorot_normal")

    def forward(self, x):
        return gb.tanh(x @ self.mixing) * self.gain + x


class Branches(Layer):
    """A user's layer with its sublayers in a list, a tuple and an attribute."""

    def __init__(self):
        self.branches = [gb.Dense(3, 2, "tanh"), gb.Dense(3, 2, "sigmoid")]
        self.pair = (gb.Dense(2, 2), Gain(2))
        self.last = gb.Dense(2, 2)

    def forward(self, x):
        y = self.branches[0](x) * self.branches[1](x)
        return self.last(self.pair[1](self.pair[0](y)))


def shared():
    dense = gb.Dense(3, 3, "tanh")
    return gb.Sequential(dense, gb.Dense(3, 3), dense, dtype="float64")


def fitted(inverse=False):
    scaler = gb.Scaler(3, inverse=inverse)
    return scaler.fit(np.random.default_rng(5).normal(3, 2, (20, 3)))


def wide(*layers):
    return gb.Sequential(*layers, dtype="float64")


MODELS = {
    **{f"dense-{a}": lambda a=a: wide(gb.Dense(3, 4, a)) for a in ACTIVATIONS},
    **{f"activation-{a}": lambda a=a: wide(gb.Dense(3, 4), gb.Activation(a)) for a in ACTIVATIONS},
    "dense without bias": lambda: wide(gb.Dense(3, 4, "tanh", bias=False)),
    "dropout": lambda: wide(gb.Dense(3, 4), gb.Dropout(0.4), gb.Dense(4, 2)),
    "noise": lambda: wide(gb.InputNoise(0.4), gb.Dense(3, 4), gb.InputNoise(0.2)),
    "layer norm": lambda: wide(gb.LayerNorm(3), gb.Dense(3, 2)),
    "batch norm": lambda: wide(gb.Dense(3, 4), gb.BatchNorm(4), gb.Activation("tanh")),
    "residual": lambda: wide(gb.Residual(gb.Dense(3, 5, "tanh"), gb.Dense(5, 3))),
    "scaler": lambda: wide(fitted(), gb.Dense(3, 3, "tanh"), fitted(inverse=True)),
    "concatenate": lambda: wide(
        gb.Concatenate(gb.Dense(3, 4, "tanh"), gb.Sequential(), gb.Sequential(gb.Dense(3, 2), gb.Dropout(0.3))),
        gb.Dense(9, 2),
    ),
    "nested": lambda: wide(gb.Sequential(gb.Dense(3, 4, "tanh"), gb.Sequential(gb.Dense(4, 4))), gb.Dense(4, 2)),
    "user": lambda: wide(Gain(3)),
    "user with sublayers": lambda: wide(Branches()),
    "shared": shared,
}


def settle(model, seed=3):
    """The model with every trained parameter drawn from a normal, so that no gradient vanishes by symmetry."""
    rng = np.random.default_rng(seed)
    state = model.initialize(seed).state_dict()
    trained = {k for k, p in model.named_parameters().items() if p.trainable}
    model.load_state_dict({k: rng.normal(0.3, 0.7, a.shape) if k in trained else a for k, a in state.items()})
    return model


# ---- values --------------------------------------------------------------------------------------------------------


def test_the_reference_covers_every_activation():
    assert set(ACTIVATIONS) == BUILTIN


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dense_and_activation_values(name, rng):
    x, w, b = rng.normal(size=(5, 3)) * 2, rng.normal(size=(3, 4)), rng.normal(size=4)
    dense, after = wide(gb.Dense(3, 4, name)), wide(gb.Dense(3, 4), gb.Activation(name))
    expected = ACTIVATIONS[name](x @ w + b)
    for model in (dense, after):
        model.load_state_dict({"0.weight": w, "0.bias": b})
        np.testing.assert_allclose(model(x).numpy(), expected, rtol=1e-13, atol=1e-14)


def test_dense_value_by_hand():
    model = gb.Sequential(gb.Dense(2, 2, "relu"))
    model.load_state_dict({"0.weight": [[1, -2], [3, 4]], "0.bias": [0.5, 1]})
    assert model([[1, 2], [1, -1]]).numpy().tolist() == [[7.5, 7.0], [0.0, 0.0]]


def test_layer_norm_values(rng):
    x, gain, bias = rng.normal(2, 3, (4, 6)), rng.normal(size=6), rng.normal(size=6)
    model = wide(gb.LayerNorm(6, eps=1e-3))
    model.load_state_dict({"0.gain": gain, "0.bias": bias})
    centred = x - x.mean(1, keepdims=True)
    expected = gain * centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-3) + bias
    np.testing.assert_allclose(model(x).numpy(), expected, rtol=1e-13)


def test_batch_norm_values_in_training_and_inference(rng):
    x = rng.normal(2, 3, (8, 3))
    gain, bias, mean, variance = rng.normal(size=3), rng.normal(size=3), rng.normal(size=3), rng.uniform(1, 2, 3)
    model = wide(gb.BatchNorm(3, eps=1e-3))
    model.load_state_dict({"0.gain": gain, "0.bias": bias, "0.mean": mean, "0.variance": variance})
    np.testing.assert_allclose(
        model(x).numpy(), gain * (x - mean) / np.sqrt(variance + 1e-3) + bias, rtol=1e-12, atol=1e-13
    )
    with gb.training():
        y = model(x).numpy()
    np.testing.assert_allclose(y, gain * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) + bias, rtol=1e-12, atol=1e-13)


def test_batch_norm_running_statistics_follow_the_hand_computation(rng):
    x, y = rng.normal(2, 3, (10, 3)), rng.normal(size=(10, 1))
    model = wide(gb.BatchNorm(3, momentum=0.3), gb.Dense(3, 1))
    gb.Trainer(model, "mse", seed=0).fit(x, y, epochs=2, batch_size=6, shuffle=False)
    mean, variance = np.zeros(3), np.ones(3)
    for batch in (x[:6], x[6:]) * 2:
        mean += 0.3 * (batch.mean(0) - mean)
        variance += 0.3 * (batch.var(0, ddof=1) - variance)
    state = model.state_dict()
    np.testing.assert_allclose(state["0.mean"], mean, rtol=1e-13)
    np.testing.assert_allclose(state["0.variance"], variance, rtol=1e-13)


def test_batch_norm_refuses_a_training_batch_of_one_row(rng):
    model = gb.Sequential(gb.BatchNorm(3), gb.Dense(3, 1)).initialize(0)
    before = model.state_dict()
    with gb.training(), pytest.raises(ValueError, match="1 rows has no variance; use 2 rows or more"):
        model(np.ones((1, 3)))
    with pytest.raises(ValueError, match="1 rows has no variance; use 2 rows or more"):
        gb.Trainer(model, "mse", seed=0).fit(rng.normal(size=(9, 3)), np.zeros(9), batch_size=4)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
    assert model(np.ones((1, 3))).shape == (1, 1)  # inference has no such need


def test_residual_and_scaler_values(rng):
    x = rng.normal(3, 2, (20, 3))
    scaler = gb.Scaler(3).fit(x)
    model, back = wide(scaler), wide(gb.Scaler(3, inverse=True).fit(x))
    z = model(x).numpy()
    np.testing.assert_allclose(z, (x - x.mean(0)) / x.std(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back(z).numpy(), x, rtol=1e-6)
    dense = gb.Dense(3, 3, "tanh")
    residual = wide(gb.Residual(dense)).initialize(1)
    np.testing.assert_array_equal(residual(x).numpy(), x + dense(gb.tensor(x)).numpy())


def test_residual_names_the_shapes_that_differ():
    with pytest.raises(ValueError, match=r"layer '1': x has shape \(2, 4\) but its branch returns \(2, 3\)"):
        gb.Sequential(gb.Dense(3, 4), gb.Residual(gb.Dense(4, 3)))(np.ones((2, 3)))


def test_concatenate_values(rng):
    """The branches' outputs of one x, in their order."""
    x, dense = rng.normal(size=(5, 3)), gb.Dense(3, 4, "tanh")
    model = wide(gb.Concatenate(dense, gb.Sequential(), gb.Concatenate(gb.Activation("relu")))).initialize(1)
    expected = np.hstack([dense(gb.tensor(x)).numpy(), x, np.maximum(x, 0)])
    np.testing.assert_array_equal(model(x).numpy(), expected)
    assert model.inputs == 3 and model.predict(x).shape == (5, 10)


class Pairs(Layer):
    """A user's layer that returns half the rows."""

    def forward(self, x):
        return x[: x.shape[0] // 2]


def test_concatenate_names_the_shapes_that_differ():
    model = gb.Sequential(gb.Dense(3, 4), gb.Concatenate(gb.Dense(4, 2), Pairs()))
    message = r"^layer '1': its branches return \(4, 2\), \(2, 4\); expected \(rows, columns\) of as many rows each$"
    with pytest.raises(ValueError, match=message):
        model(np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"layer '1\.1': x has 4 columns but Dense\(5, 2\) expects 5 columns"):
        gb.Sequential(gb.Dense(3, 4), gb.Concatenate(gb.Dense(4, 2), gb.Dense(5, 2)))(np.ones((4, 3)))


def test_a_network_with_branches_learns_what_neither_branch_can(rng):
    """y = x₀ + x₁², from a linear branch beside a squared one."""

    class Square(Layer):
        def __init__(self, columns):
            self.inputs = columns

        def forward(self, x):
            return x * x

    x = rng.normal(size=(200, 2))
    model = wide(gb.Concatenate(gb.Sequential(), Square(2)), gb.Dense(4, 1))
    trainer = gb.Trainer(model, "mse", gb.Adam(0.1), seed=0)
    trainer.fit(x, x[:, 0] + x[:, 1] ** 2, epochs=100, batch_size=50)
    np.testing.assert_allclose(model.state_dict()["1.weight"].ravel(), [1, 0, 0, 1], atol=1e-3)


@pytest.mark.parametrize("n", [3, 7, 10, 1000])
def test_a_constant_column_is_not_divided_by_its_rounding_error(n):
    scale = gb.Scaler(2).fit(np.column_stack([np.full(n, 0.1), np.arange(n)])).state_dict()["scale"]
    assert scale[0] == 1
    assert scale[1] == np.float32(np.arange(n).std())


def test_sequential_of_nothing_is_the_identity():
    assert gb.Sequential()([[1.5, 2]]).numpy().tolist() == [[1.5, 2.0]]


# ---- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_dropout_rate_and_scale(rate, rng):
    x = rng.normal(1, 0.1, (200, 500)).astype(np.float32)
    layer = gb.Sequential(gb.Dropout(rate))
    with gb.training(seed=4, step=2):
        y = layer(x).numpy()
    dropped = y == 0
    sigma = math.sqrt(rate * (1 - rate) / x.size)
    assert abs(dropped.mean() - rate) < 4 * sigma
    np.testing.assert_allclose(y[~dropped], x[~dropped] / (1 - rate), rtol=1e-6)
    np.testing.assert_array_equal(layer(x).numpy(), x)  # inference is the identity
    np.testing.assert_array_equal(layer.predict(x), x)


def test_dropout_draws_are_keyed_by_seed_step_and_place():
    x = np.ones((20, 50), np.float32)
    model = gb.Sequential(gb.Dropout(0.5), gb.Residual(gb.Dropout(0.5)))

    def draws(layer, seed, step):
        with gb.training(seed, step):
            return layer(gb.tensor(x)).numpy() > 0

    model(x)
    first, second = model.layers[0], model.layers[1].layers[0]
    drawn = [draws(first, 1, 1), draws(first, 1, 2), draws(first, 2, 1), draws(second, 1, 1)]
    np.testing.assert_array_equal(drawn[0], draws(first, 1, 1))
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert 0.4 < (a == b).mean() < 0.6


@pytest.mark.parametrize("sigma", [0.1, 2])
def test_input_noise(sigma, rng):
    x = rng.normal(1, 0.1, (200, 500))
    model = gb.Sequential(gb.InputNoise(sigma), gb.InputNoise(sigma), dtype="float64")
    np.testing.assert_array_equal(model(x).numpy(), x)  # inference is the identity
    np.testing.assert_array_equal(model.predict(x), x)
    with gb.training(seed=4, step=2):
        first = model.layers[0](gb.tensor(x)).numpy() - x
        both = model(x).numpy() - x
    second = both - first
    for noise in (first, second):
        assert abs(noise.mean()) < 4 * sigma / math.sqrt(x.size)
        assert abs(noise.var() / sigma**2 - 1) < 4 * math.sqrt(2 / x.size)
    assert abs((first * second).mean()) < 4 * sigma**2 / math.sqrt(x.size)  # each layer has draws of its own


# ---- gradients -----------------------------------------------------------------------------------------------------


def parameter_error(model, x, eps=6e-6):
    """|analytic − numeric| over the largest gradient (or 1) of every trained parameter, by central differences."""
    state = model.state_dict()
    weights = np.random.default_rng(0).uniform(0.5, 1.5, model(x).shape)
    model(x).backward(weights)
    trained = {k: p for k, p in model.named_parameters().items() if p.trainable}
    analytic = {k: p.grad.numpy() for k, p in trained.items()}
    numeric = {k: np.zeros(p.shape) for k, p in trained.items()}
    for key, out in numeric.items():
        for at in np.ndindex(out.shape):
            values = []
            for sign in (1, -1):
                moved = state | {key: state[key].copy()}
                moved[key][at] += sign * eps
                model.load_state_dict(moved)
                values.append(model(x).numpy())
            out[at] = ((values[0] - values[1]) * weights).sum() / (2 * eps)
    model.load_state_dict(state)
    largest = max([1.0, *(np.abs(n).max() for n in numeric.values())])
    return max(np.abs(analytic[k] - numeric[k]).max() for k in trained) / largest


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_match_central_differences(name, training, rng):
    model, x = settle(MODELS[name]()), rng.normal(size=(5, 3))
    with gb.training(seed=7, step=3) if training else nullcontext():
        gb.gradcheck(model, x, tolerance=1e-8)
        assert parameter_error(model, x) <= 1e-8


def test_a_shared_layer_gets_the_summed_gradient(rng):
    model, x = settle(shared()), rng.normal(size=(5, 3))
    model(x).sum().backward()
    state = model.state_dict()
    (w0, b0), (w1, b1), (w2, b2) = [[gb.tensor(state[f"{i}.{k}"], requires_grad=True) for k in ("weight", "bias")]
                                    for i in (0, 1, 0)]  # fmt: skip
    y = gb.tanh((gb.tanh(gb.tensor(x) @ w0 + b0) @ w1 + b1) @ w2 + b2)
    y.sum().backward()
    got = {k: p.grad.numpy() for k, p in model.named_parameters().items()}
    np.testing.assert_allclose(got["0.weight"], w0.grad.numpy() + w2.grad.numpy(), rtol=1e-12)
    np.testing.assert_allclose(got["0.bias"], b0.grad.numpy() + b2.grad.numpy(), rtol=1e-12)
    np.testing.assert_allclose(got["1.weight"], w1.grad.numpy(), rtol=1e-12)


def test_a_shared_layer_is_trained_by_the_summed_gradient(rng):
    model, x = settle(shared()), rng.normal(size=(6, 3))
    before = model.state_dict()
    gb.Trainer(model, lambda output, target: output.sum(), gb.SGD(1.0), seed=0).fit(x, np.zeros(6), epochs=1)
    after = model.state_dict()
    model.load_state_dict(before)
    model(x).sum().backward()
    for key, p in model.named_parameters().items():
        np.testing.assert_allclose(before[key] - after[key], p.grad.numpy(), rtol=1e-9, atol=1e-12)


# ---- names and the arena -------------------------------------------------------------------------------------------

DENSE = ["weight", "bias"]
NAMES = {
    "mlp": (lambda: gb.mlp([4, 5, 3], dropout=0.1), ["0.weight", "0.bias", "2.weight", "2.bias"], 43),
    "one layer": (lambda: gb.Dense(2, 3), DENSE, 9),
    "no bias": (lambda: gb.Sequential(gb.Dense(2, 3, bias=False)), ["0.weight"], 6),
    "norms": (
        lambda: gb.Sequential(gb.BatchNorm(4), gb.LayerNorm(4)),
        ["0.gain", "0.bias", "0.mean", "0.variance", "1.gain", "1.bias"],
        16,
    ),
    "scaler": (lambda: gb.Sequential(gb.Scaler(3), gb.Dense(3, 1)), ["0.mean", "0.scale", "1.weight", "1.bias"], 4),
    "residual": (lambda: gb.Sequential(gb.Residual(gb.Dense(3, 3))), ["0.0.weight", "0.0.bias"], 12),
    "concatenate": (
        lambda: gb.Concatenate(gb.Dense(2, 3), gb.Dense(2, 1)), ["0.weight", "0.bias", "1.weight", "1.bias"], 12,
    ),
    "user": (lambda: Gain(3), ["gain", "mixing"], 12),
    "lists": (
        Branches,
        ["branches.0.weight", "branches.0.bias", "branches.1.weight", "branches.1.bias", "pair.0.weight",
         "pair.0.bias", "pair.1.gain", "pair.1.mixing", "last.weight", "last.bias"],
        16 + 6 + 6 + 6,
    ),
    "shared": (shared, ["0.weight", "0.bias", "1.weight", "1.bias"], 24),
    "784-15-10": (lambda: gb.mlp([784, 15, 10]), ["0.weight", "0.bias", "1.weight", "1.bias"], 11_935),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_counts(name):
    make, names, count = NAMES[name]
    model = make()
    assert model.parameter_count == count  # before anything is drawn
    assert list(model.state_dict()) == names
    assert {k: a.shape for k, a in model.state_dict().items()} == {
        k: p.shape for k, p in model.named_parameters().items()
    }
    assert model.parameter_count == count


OPTIMIZERS = {
    "sgd": gb.SGD(0.01),
    "momentum": gb.SGD(0.01, momentum=0.9),
    "lookahead": gb.SGD(0.01, momentum=0.9, nesterov="lookahead"),
    "adam": gb.Adam(0.01),
    "adamw": gb.AdamW(0.01, weight_decay=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_arena_layout_and_padding_after_fifty_steps(optimizer, rng):
    model = gb.Sequential(gb.LayerNorm(5), gb.Dense(5, 13, "relu"), Gain(13), gb.BatchNorm(13), gb.Dense(13, 3))
    trainer = gb.Trainer(model, optimizer=OPTIMIZERS[optimizer], seed=0)
    trainer.fit(rng.normal(size=(50, 5)), rng.integers(0, 3, 50), epochs=10, batch_size=10)
    arena, named = model.arena, model.named_parameters()
    assert sorted(arena.offsets) == sorted(k for k, p in named.items() if p.trainable)
    assert arena.weights.shape == arena.gradients.shape == (1, arena.size) and arena.size % ALIGNMENT == 0
    padding, taken = np.ones(arena.size, bool), 0
    for key, start in arena.offsets.items():
        end = start + math.prod(named[key].shape)
        assert ALIGNMENT == 64 and start % 64 == 0
        assert padding[start:end].all()  # no two overlap
        padding[start:end] = False
        taken += end - start
        assert (len(named[key].shape) >= 2) == (start < arena.matrices)
        assert np.shares_memory(named[key].data, arena.weights)
    assert taken == model.parameter_count and padding.sum() == arena.size - taken > 0
    for buffer in (arena.weights, arena.gradients, *trainer.state.moments.values()):
        assert not buffer[0, padding].any()
        assert np.isfinite(buffer).all()


# ---- drawing -------------------------------------------------------------------------------------------------------


def equal(a, b):
    return list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_seed_gives_the_same_bits_and_another_seed_others():
    a, b, c = (gb.mlp([6, 7, 3]).initialize(seed).state_dict() for seed in (1, 1, 2))
    assert equal(a, b)
    for key in ("0.weight", "1.weight"):
        assert not np.isin(a[key], c[key]).any()
        assert not np.isin(a["0.weight"], a["1.weight"]).any()


def test_draws_are_keyed_by_name_not_by_order():
    small = gb.Sequential(gb.Dense(4, 5, "relu"), gb.Dense(5, 3)).initialize(8).state_dict()
    large = gb.Sequential(gb.Dense(4, 5, "relu"), gb.Dense(5, 3), gb.LayerNorm(3), gb.Dense(3, 3)).initialize(8)
    assert equal(small, {k: v for k, v in large.state_dict().items() if k in small})


def test_both_dtypes_draw_the_same_values():
    single, double = (gb.mlp([6, 7, 3], dtype=d).initialize(1).state_dict() for d in ("float32", "float64"))
    assert {a.dtype for a in single.values()} == {np.dtype(np.float32)}
    assert {a.dtype for a in double.values()} == {np.dtype(np.float64)}
    assert equal(single, {k: a.astype(np.float32) for k, a in double.items()})


#            name              of (300, 500): mean 0 and this variance
INITS = {
    "glorot_uniform": 2 / 800, "glorot_normal": 2 / 800, "he_uniform": 2 / 300, "he_normal": 2 / 300,
    "lecun_uniform": 1 / 300, "lecun_normal": 1 / 300,
}  # fmt: skip


@pytest.mark.parametrize("name", INITS)
def test_initializers_have_their_variance(name):
    w = gb.Dense(300, 500, init=name).initialize(0).state_dict()["weight"].astype(np.float64)
    kurtosis = 1.8 if "uniform" in name else 3.0  # E[x⁴] / σ⁴, which bounds how far a sample variance strays
    assert abs(w.mean()) < 4 * math.sqrt(INITS[name] / w.size)
    assert abs(w.var() / INITS[name] - 1) < 4 * math.sqrt((kurtosis - 1) / w.size)
    if "uniform" in name:
        assert np.abs(w).max() <= math.sqrt(3 * INITS[name])


@pytest.mark.parametrize(
    "activation, expected",
    [("relu", 2 / 300), ("gelu", 2 / 300), ("identity", 2 / 800), ("tanh", 2 / 800), ("selu", 1 / 300)],
)
def test_dense_picks_its_initializer_by_the_activation(activation, expected):
    w = gb.Dense(300, 500, activation).initialize(0).state_dict()["weight"]
    assert w.var() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (3, 5, 2)])
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_orthogonal_weights_are_orthogonal(shape, gain):
    """As many orthogonal rows or columns of length gain as there can be; for each member where there are several."""
    init = "orthogonal" if gain == 1 else gb.initializers.Orthogonal(gain)
    w = initializers.draw(init, shape, 3, "w")
    long = w if shape[-2] <= shape[-1] else np.swapaxes(w, -1, -2)
    eye = np.broadcast_to(np.eye(min(shape[-2:])), (*shape[:-2], *2 * [min(shape[-2:])]))
    np.testing.assert_allclose(long @ np.swapaxes(long, -1, -2), gain**2 * eye, atol=1e-14)


def test_orthogonal_weights_prefer_no_direction():
    """LAPACK's own signs would make the first element negative, always; and determinants would be of one sign."""
    drawn = np.stack([initializers.draw("orthogonal", (3, 3), seed, "w") for seed in range(400)])
    assert (np.abs((drawn > 0).mean(0) - 0.5) < 4 * 0.5 / 20).all()
    assert abs((np.linalg.det(drawn) > 0).mean() - 0.5) < 4 * 0.5 / 20
    np.testing.assert_allclose(drawn.var(0), 1 / 3, rtol=0.25)


def test_initializers_with_arguments_print_and_pickle():
    gain, bias = gb.initializers.Orthogonal(gain=1.5), gb.initializers.Constant(0.25)
    model = gb.Sequential(gb.Dense(4, 3, init=gain, bias_init=bias))
    assert "Dense(4, 3, init=Orthogonal(gain=1.5), bias_init=Constant(value=0.25))" in str(model)
    state = pickle.loads(pickle.dumps(model)).initialize(2).state_dict()
    assert equal(state, model.initialize(2).state_dict()) and state["0.bias"].tolist() == [0.25] * 3


def test_init_takes_numbers_arrays_and_callables():
    values = np.arange(6.0).reshape(2, 3)
    for init, expected in ((0.25, np.full((2, 3), 0.25)), (values, values), (lambda shape, rng: values, values)):
        state = gb.Dense(2, 3, init=init, bias_init=1.5).initialize(0).state_dict()
        np.testing.assert_array_equal(state["weight"], expected)
        np.testing.assert_array_equal(state["bias"], [1.5] * 3)


def trained(model, rng):
    gb.Trainer(model, seed=3).fit(rng.normal(size=(8, 4)), rng.integers(0, 3, 8), epochs=1)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda m, rng: m.initialize(7),
        lambda m, rng: m.load_state_dict({k: a + 1 for k, a in m.state_dict().items()}),
        trained,
    ],
    ids=["initialize", "load_state_dict", "training"],
)
def test_trainer_keeps_weights_that_were_set(prepare, rng):
    model = gb.mlp([4, 5, 3])
    prepare(model, rng)
    before = model.state_dict()
    gb.Trainer(model, seed=1)
    assert equal(model.state_dict(), before)


def test_trainer_draws_weights_that_nobody_set():
    expected = gb.mlp([4, 5, 3]).initialize(1).state_dict()
    fresh, called = gb.mlp([4, 5, 3]), gb.mlp([4, 5, 3])
    called(np.ones((1, 4)))  # draws, but nobody asked for that seed
    for model in (fresh, called):
        gb.Trainer(model, seed=1)
        assert equal(model.state_dict(), expected)
        assert model.seed == 1


def test_initialize_without_a_seed_records_a_fresh_one():
    a, b = gb.mlp([4, 5, 3]).initialize(), gb.mlp([4, 5, 3]).initialize()
    assert a.seed != b.seed
    assert equal(gb.mlp([4, 5, 3]).initialize(a.seed).state_dict(), a.state_dict())


# ---- loading -------------------------------------------------------------------------------------------------------


def test_load_state_dict_writes_in_place_and_survives_a_recorded_plan(rng):
    model, x = gb.mlp([4, 5, 3]), rng.normal(size=(6, 4))
    trainer = gb.Trainer(model, seed=0)
    trainer.fit(x, rng.integers(0, 3, 6), epochs=1)
    model.predict(x)
    buffer, other = model.arena.weights, gb.mlp([4, 5, 3]).initialize(9)
    model.load_state_dict(other.state_dict())
    assert model.arena.weights is buffer
    np.testing.assert_array_equal(model.predict(x), other.predict(x))
    trainer.fit(x, rng.integers(0, 3, 6), epochs=1)
    assert all((a != b).any() for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_state_dict_is_a_copy():
    model = gb.mlp([4, 3]).initialize(0)
    before = model.state_dict()
    model.state_dict()["0.weight"][...] = 99
    assert equal(model.state_dict(), before)


BAD_STATES = {
    "missing": (lambda s: s.pop("1.bias"), ValueError, r"'1\.bias' is missing; the model has 0\.weight, 0\.bias, 1"),
    "extra": (lambda s: s.update({"2.bias": 1}), ValueError, r"the model has no '2\.bias'; it has 0\.weight"),
    "shape": (
        lambda s: s.update({"1.weight": np.ones((3, 5))}),
        ValueError,
        r"'1\.weight' has shape \(3, 5\) but the model's is \(5, 3\)",
    ),
    "broadcast": (lambda s: s.update({"1.bias": 0.0}), ValueError, r"'1\.bias' has shape \(\) but .* is \(3,\)"),
    "complex": (lambda s: s.update({"1.bias": np.ones(3, complex)}), TypeError, r"'1\.bias' has dtype complex128"),
    "text": (lambda s: s.update({"1.bias": ["a", "b", "c"]}), TypeError, r"'1\.bias' has dtype <U1"),
    "too large": (lambda s: s.update({"1.bias": [0, 1e300, 0]}), ValueError, r"'1\.bias'"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_load_state_dict_is_all_or_nothing(case):
    spoil, kind, message = BAD_STATES[case]
    model = gb.mlp([4, 5, 3]).initialize(0)
    before, state = model.state_dict(), gb.mlp([4, 5, 3]).initialize(1).state_dict()
    spoil(state)
    with pytest.raises(kind, match=f"load_state_dict: .*{message}"):
        model.load_state_dict(state)
    assert equal(model.state_dict(), before)


# ---- printing ------------------------------------------------------------------------------------------------------


def test_print_shows_every_layer_and_the_total():
    text = str(gb.Sequential(gb.Dense(64, 128, activation="relu"), gb.Dropout(0.1), gb.Dense(128, 10)))
    head, columns, *rows = text.splitlines()
    assert head == "Sequential: 9,610 parameters, float32"
    assert columns.split() == ["layer", "parameters", "shapes"]
    assert [r.split()[0] for r in rows] == ["0", "1", "2"]
    assert "Dense(64, 128, activation=relu)" in rows[0] and rows[0].endswith("8,320  64×128 128")
    assert "Dropout(0.1)" in rows[1] and rows[1].endswith(" 0")


@pytest.mark.parametrize(
    "make",
    [
        lambda: gb.mlp([4, 5, 3]),
        lambda: gb.Sequential(gb.BatchNorm(4), gb.Residual(gb.Dense(4, 4)), Gain(4)),
        Branches,
        lambda: WithOwn(),
    ],
    ids=["mlp", "norms", "lists", "own parameters at the root"],
)
def test_printed_parameters_add_up_to_the_total(make):
    model = make()
    head, columns, *rows = str(model).splitlines()
    start, end = columns.index("parameters"), columns.index("parameters") + len("parameters")
    counts = [int(r[start:end].replace(",", "")) for r in rows]
    assert sum(counts) == model.parameter_count == int(head.split()[1].replace(",", ""))


def test_an_array_as_initializer_does_not_break_the_printed_table():
    text = str(gb.Sequential(gb.Dense(4, 3, init=np.ones((4, 3))), gb.Dense(3, 3)))
    assert len(text.splitlines()) == 4


class WithOwn(Layer):
    """A user's model with a parameter beside its sublayer."""

    def __init__(self):
        self.scale = gb.Parameter((3,), "ones")
        self.dense = gb.Dense(3, 3)

    def forward(self, x):
        return self.dense(x) * self.scale


def test_a_parameter_without_a_value_can_be_printed_and_says_so_when_read():
    weight = gb.Dense(2, 3).weight
    assert "(2, 3)" in repr(weight)
    with pytest.raises(RuntimeError, match=r"no value yet.*initialize"):
        weight.numpy()


# ---- users' layers -------------------------------------------------------------------------------------------------


class NamedFreely(Layer):
    """A user's model whose sublayers carry names that the library uses too."""

    def __init__(self, name):
        self.body = gb.Dense(4, 5, "tanh")
        setattr(self, name, gb.Dense(5, 3))
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(self.body(x))


@pytest.mark.parametrize("name", ["output", "head"])
def test_a_users_sublayer_may_be_called(name, rng):
    model, x, y = NamedFreely(name), rng.normal(size=(8, 4)), rng.integers(0, 3, 8)
    trainer = gb.Trainer(model, optimizer=gb.Adam(0.05), seed=0)
    loss = trainer.fit(x, y, epochs=20)["loss"]
    assert loss[-1] < 0.8 * loss[0]
    assert sorted(model.state_dict()) == sorted(["body.weight", "body.bias", f"{name}.weight", f"{name}.bias"])


def test_a_layer_without_forward_says_so():
    class Empty(Layer):
        pass

    with pytest.raises(TypeError, match=r"Empty has no forward\(x\)"):
        Empty()(np.ones((1, 2)))


BAD_LAYERS = {
    "class": (lambda: gb.Sequential(gb.Dense(2, 2), gb.Dropout), TypeError, "item 1 is the class Dropout; call it"),
    "list": (lambda: gb.Sequential([gb.Dense(2, 2)]), TypeError, "item 0 is list; expected a layer"),
    "activation": (lambda: gb.Dense(2, 2, "rleu"), ValueError, "unknown activation 'rleu'; choose from .*relu"),
    "mlp activation": (lambda: gb.mlp([2, 2], activation="rleu"), ValueError, "unknown activation 'rleu'"),
    "mlp sizes": (lambda: gb.mlp([2]), ValueError, r"at least the input and output size expected, got \[2\]"),
    "zero": (lambda: gb.Dense(2, 0), ValueError, r"shape \(2, 0\) is not one of positive integers"),
    "fraction": (lambda: gb.Dense(2.5, 1), ValueError, r"shape \(2\.5, 1\) is not one of positive integers"),
    "rate": (lambda: gb.Dropout(1.0), ValueError, r"rate 1\.0 is not in \[0, 1\)"),
    "nan rate": (lambda: gb.Dropout(float("nan")), ValueError, r"rate nan is not in \[0, 1\)"),
    "sigma": (lambda: gb.InputNoise(-1), ValueError, r"InputNoise: sigma -1 is not in \[0, inf\)"),
    "infinite sigma": (lambda: gb.InputNoise(math.inf), ValueError, r"InputNoise: sigma inf is not in \[0, inf\)"),
    "max_norm": (lambda: gb.Dense(2, 2, max_norm=0), ValueError, r"Dense: max_norm 0 is not in \(0, inf\)"),
    "momentum": (lambda: gb.BatchNorm(2, momentum=0), ValueError, r"momentum 0 is not in \(0, 1\]"),
    "init": (lambda: gb.Dense(2, 2, init="glorot").initialize(0), ValueError, "unknown initializer 'glorot'.*he_norm"),
    "init shape": (
        lambda: gb.Dense(2, 3, init=lambda shape, rng: np.ones(2)).initialize(0),
        ValueError,
        r"initializer of weight: returned shape \(2,\), expected \(2, 3\)",
    ),
    "orthogonal vector": (
        lambda: gb.Dense(2, 2, bias_init="orthogonal").initialize(0),
        ValueError,
        r"orthogonal: shape \(2,\) is not a matrix's; draw a vector from another initializer",
    ),
    "no branches": (gb.Concatenate, ValueError, "Concatenate: at least one branch expected, got none"),
    "branch": (lambda: gb.Concatenate(gb.Dense(2, 2), 3), TypeError, "Concatenate: item 1 is int; expected a layer"),
    "dtype": (lambda: gb.mlp([2, 2], dtype="float16")([[1, 2]]), TypeError, "float16 is not supported; choose from"),
    "columns": (lambda: gb.mlp([3, 2])([[1, 2]]), ValueError, "x has 2 columns but the model expects 3"),
    "inner columns": (
        lambda: gb.Sequential(gb.Dense(3, 4), gb.Residual(gb.Dense(5, 5)))(np.ones((1, 3))),
        ValueError,
        r"layer '1\.0': x has 4 columns but Dense\(5, .* expects 5 columns",
    ),
    "one row": (lambda: gb.mlp([3, 2])([1, 2, 3]), ValueError, r"x has shape \(3,\), expected rows and columns"),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_bad_layers_say_what_is_wrong(case):
    call, kind, message = BAD_LAYERS[case]
    with pytest.raises(kind, match=message):
        call()


# ---- copies --------------------------------------------------------------------------------------------------------

COPIES = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
    "twice": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(m))),
}
STATES = {
    "undrawn": lambda: gb.mlp([3, 5, 2]),
    "drawn": lambda: gb.mlp([3, 5, 2], dropout=0.2).initialize(4),
    "scaler": lambda: gb.Sequential(fitted(), gb.Dense(3, 2)),
    "scaler inside a drawn model": lambda: gb.Sequential(fitted(), gb.Dense(3, 2)).initialize(4),
    "used": lambda: used(gb.Sequential(gb.BatchNorm(3), Gain(3), gb.Dense(3, 2))),
    "shared": shared,
    "float64": lambda: gb.mlp([3, 2], dtype="float64").initialize(1),
}


def used(model):
    rng = np.random.default_rng(2)
    gb.Trainer(model, seed=2).fit(rng.normal(size=(12, 3)), rng.integers(0, 2, 12), epochs=2)
    model.predict(np.ones((2, 3)))
    return model


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", COPIES)
def test_copies_give_the_same_outputs(how, state, rng):
    model, x = STATES[state](), rng.normal(size=(7, 3))
    twin = COPIES[how](model)
    np.testing.assert_array_equal(twin.predict(x), model.predict(x))
    np.testing.assert_array_equal(twin(x).numpy(), model(x).numpy())
    assert equal(twin.state_dict(), model.state_dict())
    assert str(twin) == str(model) and (twin.seed, twin.dtype) == (model.seed, model.dtype)
    before = model.state_dict()
    twin.load_state_dict({k: a + 1 for k, a in twin.state_dict().items()})
    assert equal(model.state_dict(), before)  # nothing is shared


def test_a_copy_of_a_drawn_model_counts_as_drawn():
    model = gb.mlp([3, 2]).initialize(4)
    for how in COPIES.values():
        twin = how(model)
        gb.Trainer(twin, seed=9)
        assert equal(twin.state_dict(), model.state_dict())
        undrawn = how(gb.mlp([3, 2]))
        gb.Trainer(undrawn, seed=9)
        assert equal(undrawn.state_dict(), gb.mlp([3, 2]).initialize(9).state_dict())


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_keeps_what_its_outputs_mean(how, rng):
    (several, x), (bce, _), (regression, _) = (trained_for(k, 2, rng) for k in ("cross_entropy", "bce", "mse"))
    for model in (several, bce):
        np.testing.assert_array_equal(COPIES[how](model).predict_proba(x), model.predict_proba(x))
    with pytest.raises(ValueError, match="trained for regression"):
        COPIES[how](regression).predict_proba(x)


# ---- inference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 1023, 1024, 1025, 5000])
def test_predict_agrees_with_the_model_called(rows, rng):
    model = gb.mlp([20, 30, 4], "tanh", dropout=0.5).initialize(0)
    x = rng.normal(size=(rows, 20)).astype(np.float32)
    expected = model(x).numpy()
    y = model.predict(x)
    assert y.shape == (rows, 4) and y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_predict_of_several_sizes_in_turn(rng):
    model = gb.mlp([6, 9, 2]).initialize(0)
    x = rng.normal(size=(3000, 6)).astype(np.float32)
    expected = model(x).numpy()
    for rows in (3, 2000, 1, 1024, 3, 3000, 2):
        y = model.predict(x[-rows:])
        np.testing.assert_allclose(y, expected[-rows:], rtol=0, atol=1e-5)
        y[...] = np.nan  # what is returned belongs to the caller
    np.testing.assert_allclose(model.predict(x[:2]), expected[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [5, 1500])
def test_rows_do_not_depend_on_their_neighbours(rows, rng):
    model = gb.Sequential(gb.BatchNorm(6), gb.Dense(6, 40, "tanh"), gb.LayerNorm(40), gb.Dense(40, 3)).initialize(0)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    y = model.predict(x)
    for row in (0, rows // 2, rows - 1):
        other = rng.normal(0, 100, x.shape).astype(np.float32)
        other[row] = x[row]
        np.testing.assert_array_equal(model.predict(other)[row], y[row])


def test_predict_follows_the_weights_and_leaves_x_alone(rng):
    model, x = gb.mlp([4, 3]).initialize(0), rng.normal(size=(5, 4)).astype(np.float32)
    kept, first = x.copy(), model.predict(x)
    model.initialize(1)
    assert (model.predict(x) != first).all()
    np.testing.assert_array_equal(x, kept)


def test_predict_infers_also_inside_training_mode(rng):
    model = gb.Sequential(gb.BatchNorm(4), gb.Dense(4, 50), gb.Dropout(0.5)).initialize(0)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    expected, before = copy.deepcopy(model).predict(x), model.state_dict()
    with gb.training():
        np.testing.assert_array_equal(model.predict(x), expected)
    np.testing.assert_array_equal(model.predict(x), expected)
    assert equal(model.state_dict(), before)


def test_predict_names_its_inputs_fault():
    model = gb.mlp([4, 3]).initialize(0)
    for x, message in (([[1, 2, 3]], "3 columns but the model expects 4"), (np.ones((0, 4)), "0 rows"),
                       ([[1, 2, 3, np.nan]], "a NaN at row 0"), ([["a"] * 4], "dtype <U1")):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=f"predict: x has .*{message}"):
            model.predict(x)


def trained_for(loss, outputs, rng):
    model = gb.mlp([4, outputs])
    gb.Trainer(model, loss, seed=0)
    return model, rng.normal(size=(9, 4)).astype(np.float32)


def test_probabilities_and_classes_of_several_outputs(rng):
    model, x = trained_for("cross_entropy", 3, rng)
    z = model.predict(x).astype(np.float64)
    e = np.exp(z - z.max(1, keepdims=True))
    np.testing.assert_allclose(model.predict_proba(x), e / e.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1, rtol=1e-6)
    assert model.predict_classes(x).tolist() == z.argmax(1).tolist()
    assert model.predict_classes(x).dtype == np.int64


@pytest.mark.parametrize("outputs", [1, 3])
def test_probabilities_and_classes_of_bce(outputs, rng):
    model, x = trained_for("bce", outputs, rng)
    z = model.predict(x).astype(np.float64)
    np.testing.assert_allclose(model.predict_proba(x), 1 / (1 + np.exp(-z)), rtol=1e-5)
    classes = (z > 0).astype(int)
    assert model.predict_classes(x).tolist() == (classes.ravel() if outputs == 1 else classes).tolist()


def test_one_output_without_a_trainer_means_a_probability(rng):
    model, x = gb.mlp([4, 1]).initialize(0), rng.normal(size=(9, 4)).astype(np.float32)
    assert model.predict_proba(x).shape == (9, 1)
    assert model.predict_classes(x).tolist() == (model.predict(x)[:, 0] > 0).astype(int).tolist()


@pytest.mark.parametrize("method", ["predict_proba", "predict_classes"])
def test_a_regression_has_no_classes(method, rng):
    model, x = trained_for("mse", 2, rng)
    with pytest.raises(ValueError, match=f"^{method}: the model was trained for regression; use predict"):
        getattr(model, method)(x)


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "undrawn"])
def test_threads_may_predict_at_once(drawn, rng):
    make = gb.mlp([6, 200, 3], "tanh")
    if drawn:
        make.initialize(0)
    inputs = [rng.normal(size=(n, 6)).astype(np.float32) for n in (1, 5, 1024, 1500) * 2]
    expected = [copy.deepcopy(make).predict(x) for x in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        for _ in range(10):
            model, start = copy.deepcopy(make), threading.Barrier(len(inputs))

            def predict(x, model=model, start=start):
                start.wait()
                return [model.predict(x) for _ in range(2)]

            for several, y in zip(pool.map(predict, inputs), expected, strict=True):
                for got in several:
                    np.testing.assert_allclose(got, y, rtol=0, atol=1e-5)


# ---- found by trying to break it -----------------------------------------------------------------------------------


class Nested(gb.Layer):
    def __init__(self):
        self.first, self.blocks = gb.Dense(4, 3), [[gb.Dense(3, 3)], {"last": gb.Dense(3, 2)}]

    def forward(self, x):
        return self.blocks[1]["last"](self.blocks[0][0](self.first(x)))


def test_layers_in_nested_containers_are_found():
    names = ["first", "blocks.0.0", "blocks.1.last"]
    assert list(Nested().state_dict()) == [f"{n}.{k}" for n in names for k in ("weight", "bias")]


class Passing(gb.Layer):
    """Its width is not known when a model is built."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("layer", [gb.LayerNorm, gb.BatchNorm, gb.Scaler])
@pytest.mark.parametrize("columns", [1, 16])
def test_a_layer_of_another_width_is_named_and_does_not_broadcast(layer, columns):
    model = gb.Sequential(gb.Dense(8, 32), Passing(), layer(columns))
    message = rf"layer '2': x has 32 columns but {layer.__name__}\({columns}\) expects {columns} columns"
    for use in (model, model.predict, lambda x: gb.Trainer(model, "mse", seed=0).fit(x, np.zeros((4, 32)))):
        with pytest.raises(ValueError, match=message):
            use(np.zeros((4, 8)))


def test_a_dropped_model_is_freed_without_the_collector():
    model = gb.mlp([4, 3, 2]).initialize(0)
    model.predict(np.ones((3, 4)))
    gone = weakref.ref(model.arena)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("make, message", [
    (lambda: gb.BatchNorm(3, eps=-1), "BatchNorm: eps -1 is not positive"),
    (lambda: gb.LayerNorm(3, eps=0), "LayerNorm: eps 0 is not positive"),
    (lambda: gb.Dropout("a"), "Dropout: rate must be a number, got str 'a'"),
    (lambda: gb.Dense(2, 2, max_norm="a"), "Dense: max_norm must be a number, got str 'a'"),
    (lambda: gb.InputNoise(True), "InputNoise: sigma must be a number, got bool True"),
    (lambda: gb.mlp([3, 4], dtype="float16"), "Sequential: dtype float16 is not supported; choose from float32"),
    (lambda: gb.mlp([3, 4], dtype="foo"), "Sequential: dtype foo is not supported"),
    (lambda: gb.mlp([3, 4], dropout=5), "mlp: dropout 5 is not in"),
    (lambda: gb.mlp(64), "mlp: a list of at least the input and output size expected, got 64"),
    (lambda: gb.mlp("64"), "mlp: a list .* expected, got '64'"),
    (lambda: gb.Dense(2, 3, init="x"), "unknown initializer 'x'; choose from constant|unknown initializer 'x'"),
    (lambda: gb.Dense(2, 3, ["relu"]), "unknown activation"),
    (lambda: gb.Dense(True, 3), "not one of positive integers"),
    (lambda: gb.Dense(2, 3).load_state_dict(None), "load_state_dict: a dict of arrays expected, got NoneType"),
])  # fmt: skip
def test_faulty_arguments_are_refused_where_they_are_given(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_part_outlives_the_model_it_was_trained_in():
    part, x = gb.Dense(4, 3), np.ones((2, 4))
    whole = gb.Sequential(part, gb.Dense(3, 2)).initialize(1)
    expected = part(x).numpy()
    old = weakref.ref(whole.arena)
    del whole
    gc.collect()
    assert old() is None
    np.testing.assert_array_equal(part(x).numpy(), expected)
    np.testing.assert_allclose(part.predict(x), expected, rtol=1e-6)


def test_predict_notices_every_change_of_a_layer():
    """Another sublayer at the address of the one before, or another setting of the same."""

    class Own(gb.Layer):
        def __init__(self):
            self.dense, self.act, self.k = gb.Dense(4, 4), gb.Activation("relu"), 1.0

        def forward(self, x):
            return self.act(self.dense(x)) * self.k

    x, model = np.random.default_rng(0).normal(size=(3, 4)).astype("f"), Own()
    model.initialize(0)

    def holds():
        np.testing.assert_allclose(model.predict(x), model(x).numpy(), rtol=1e-6)

    for _ in range(20):
        for name in ("tanh", "sigmoid", "elu"):
            model.act = None
            model.act = gb.Activation(name)
            holds()
    model.k = 9.0
    holds()
    model.dense.activation = "tanh"
    holds()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_while_another_thread_uses_a_model_can_use_it():
    code = """
import os, threading, gpubackprop as gb
from gpubackprop import claims
held, model = threading.Event(), gb.mlp([2, 3])
def hold():
    with claims.using("fit", model.shared(), training=True), claims._changed:
        held.set()
        threading.Event().wait(5)
threading.Thread(target=hold, daemon=True).start()
held.wait()
if not (pid := os.fork()):
    model.predict([[1.0, 2.0]])
    os._exit(0)
for _ in range(100):
    if os.waitpid(pid, os.WNOHANG)[0]:
        os._exit(0)
    __import__("time").sleep(0.05)
os.kill(pid, 9)
os._exit(1)
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60).returncode == 0


# ---- masks ---------------------------------------------------------------------------------------------------------

EDGES = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize("name", KINDS)
def test_seed_04_missing_edges_stay_exactly_zero_under_every_optimizer(name, rng):
    x, t = rng.normal(size=(30, 4)), rng.normal(size=(30, 2))
    model = gb.Sequential(gb.Dense(4, 3, "tanh", mask=EDGES), gb.Dense(3, 2), dtype="float64").initialize(0)
    before = model.state_dict()["0.weight"]
    assert ((before != 0) == EDGES).all()
    kind = KINDS[name]
    decays = {} if kind is gb.LBFGS else {"weight_decay": 0.01}
    gb.Trainer(model, "mse", kind(**decays), seed=0).fit(x, t, epochs=25, batch_size=8)  # a hundred updates
    after = model.state_dict()["0.weight"]
    assert ((after != 0) == EDGES).all() and (after != before)[EDGES == 1].all()


def test_seed_04_padding_to_equal_width_is_exact_only_where_nothing_leaves_the_padding(rng):
    """Units with no edges in give σ(0) = ½, not 0: the edges out have to be missing too."""
    x, t = rng.normal(size=(20, 4)), rng.normal(size=(20, 2))
    narrow = gb.mlp([4, 3, 2], "sigmoid", dtype="float64").initialize(1)
    state = narrow.state_dict()
    into, out = np.zeros((4, 5)), np.zeros((5, 2))
    into[:, :3] = out[:3] = 1

    def padded(*masks):
        first, second = (gb.Dense(*shape, mask=mask, activation=a) for shape, mask, a in
                         zip(((4, 5), (5, 2)), masks, ("sigmoid", "identity"), strict=True))  # fmt: skip
        model = gb.Sequential(first, second, dtype="float64").initialize(2)
        wide = model.state_dict()
        for key, value in state.items():
            wide[key][tuple(slice(0, n) for n in value.shape)] = value
        model.load_state_dict(wide | {"0.bias": np.pad(state["0.bias"], (0, 2)), "1.bias": state["1.bias"]})
        return model

    both, one = padded(into, out), padded(into, None)
    np.testing.assert_allclose(both.predict(x), narrow.predict(x), rtol=0, atol=1e-15)
    assert np.abs(one.predict(x) - narrow.predict(x)).max() > 1e-3
    for model in (narrow, both):
        gb.Trainer(model, "mse", gb.Adam(0.01, weight_decay=0.01), seed=0).fit(x, t, epochs=100, batch_size=20)
    np.testing.assert_allclose(both.predict(x), narrow.predict(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "cpu:reference", "cuda"])
def test_a_masked_gradient_is_zero_there_and_unchanged_elsewhere(device, rng, request):
    if device == "cuda":
        request.getfixturevalue("cuda")
    x, weights = rng.normal(size=(7, 4)).astype("f"), []
    for mask in (None, EDGES):
        layer = gb.Dense(4, 3, mask=mask).initialize(3).to(device)
        layer.load_state_dict(layer.state_dict() | {"weight": np.ones((4, 3)) * EDGES})
        (layer(x) ** 2).sum().backward()
        weights.append(layer.weight.grad.numpy())
    np.testing.assert_array_equal(weights[1], weights[0] * EDGES)


def test_a_mask_holds_for_what_is_loaded_and_travels_with_the_model(rng, tmp_path):
    model = gb.Sequential(gb.Dense(4, 3, mask=EDGES.astype(bool)), gb.Dense(3, 1))
    model.load_state_dict({k: np.ones_like(v) for k, v in model.state_dict().items()} | {"0.mask": EDGES})
    np.testing.assert_array_equal(model.state_dict()["0.weight"], EDGES)
    gb.save_model(model, tmp_path / "m.safetensors")
    back = gb.load_model(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(back.state_dict()["0.mask"], EDGES)
    gb.Trainer(back, "mse", seed=0).fit(rng.normal(size=(9, 4)), np.ones(9), epochs=2)
    assert ((back.state_dict()["0.weight"] != 0) == EDGES).all()


@pytest.mark.parametrize("mask, message", [
    (np.ones((3, 4)), r"Dense: mask has shape \(3, 4\), expected \(4, 3\), one element for each weight"),
    (np.full((4, 3), 0.5), "Dense: mask has other values than 0 and 1; pass bools"),
])  # fmt: skip
def test_bad_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        gb.Dense(4, 3, mask=mask)


def test_help_shows_what_a_layer_takes():
    """Not the catch-all of `__new__`."""
    assert list(inspect.signature(gb.Dense).parameters)[:3] == ["inputs", "units", "activation"]
    assert list(inspect.signature(gb.BatchNorm).parameters) == ["columns", "momentum", "eps"]

    class Own(gb.Layer):
        def __init__(self, width, *more):
            pass

    assert str(inspect.signature(Own)) == "(width, *more)"


def test_printing_names_functions_and_arrays_by_what_they_are():
    def own(shape, generator):
        return np.zeros(shape)

    assert gb.Dense(2, 1, init=own, mask=np.ones((2, 1))).describe() == "Dense(2, 1, init=own, mask=array(2, 1))"
