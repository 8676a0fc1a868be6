"""The scale of layers: what layer_stats measures, what LSUV sets, and every error by its message."""

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.scaling import TOLERANCE, showing


def nested(dtype="float32", activation="relu"):
    return gb.Sequential(
        gb.Dense(6, 16, activation),
        gb.Residual(gb.Dense(16, 24, activation), gb.Dropout(0.5), gb.Dense(24, 16)),
        gb.Concatenate(gb.Sequential(), gb.Sequential(gb.BatchNorm(16), gb.Dense(16, 7, "tanh", bias=False))),
        gb.Dense(23, 3),
        dtype=dtype,
    )


DENSE = ["0", "1.0", "1.2", "2.1.1", "3"]


def batch(rng, n=200, columns=6):
    return rng.normal(size=(n, columns))


def pre_activations(model, x):
    """x @ w + b of each Dense layer, by path."""
    seen = {}

    def look(layer, x, y):
        if isinstance(layer, gb.Dense):
            bias = 0 if layer.bias is None else layer.bias.numpy().astype(np.float64)
            seen[layer._path] = x.numpy().astype(np.float64) @ layer.weight.numpy() + bias

    with showing(look):
        model(x)
    return seen


# ---- looking on ----------------------------------------------------------------------------------------------------


def test_an_observer_sees_every_call_of_a_layer_and_no_other(rng):
    """Innermost first; not what is called outside, nor what a plan records or replays."""
    model, x, seen = nested().initialize(0), batch(rng), []
    with showing(lambda layer, x, y: seen.append((layer._path, layer, x.shape, y.shape))):
        y = model(x)
        inside = len(seen)
        watched = model.predict(x[:4])
    model(x)
    assert inside == len(list(model.named_layers())) == len(seen)
    np.testing.assert_array_equal(watched, nested().initialize(0).predict(x[:4]))
    layers = dict(model.named_layers())
    assert all(layers[path] is layer for path, layer, *_ in seen)
    assert [path for path, *_ in seen[:inside]] == [
        "0", "1.0", "1.1", "1.2", "1", "2.0", "2.1.0", "2.1.1", "2.1", "2", "3", "",
    ]  # fmt: skip
    assert seen[inside - 1] == ("", model, x.shape, y.shape)
    assert seen[9][2:] == ((200, 16), (200, 23))


def test_layer_stats_are_those_of_the_outputs(rng):
    model, x = nested("float64").initialize(0), batch(rng)
    stats = gb.layer_stats(model, x)
    outputs = {}
    with showing(lambda layer, x, y: outputs.update({layer._path: y.numpy()})):
        model(x)
    outputs.pop("")
    assert stats["layer"] == list(outputs) and stats["what"][0] == "Dense(6, 16, relu)"
    np.testing.assert_allclose(stats["mean"], [y.mean() for y in outputs.values()], rtol=1e-13)
    np.testing.assert_allclose(stats["variance"], [y.var() for y in outputs.values()], rtol=1e-13)
    assert str(stats).splitlines()[0].split() == ["layer", "what", "mean", "variance"]
    assert gb.layer_stats(gb.Dense(6, 2), x)["layer"] == [""]  # a model of one layer


def test_layer_stats_follow_the_mode(rng):
    model, x = gb.Sequential(gb.BatchNorm(6), gb.Dropout(0.5)).initialize(0), batch(rng) * 5
    assert gb.layer_stats(model, x)["variance"][0] == pytest.approx(25, rel=0.1)
    with gb.training():
        assert gb.layer_stats(model, x)["variance"][0] == pytest.approx(1, abs=1e-5)


# ---- LSUV ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "identity"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lsuv_gives_every_dense_layer_unit_variance(activation, dtype, rng):
    model, x = nested(dtype, activation), 3 * batch(rng)
    assert gb.lsuv(model, x, seed=4) is model
    found = pre_activations(model, x)
    assert list(found) == DENSE
    for a in found.values():
        assert abs(a.var() - 1) <= TOLERANCE
    for path, layer in model.named_layers():
        if path in DENSE:  # orthogonal, and scaled as a whole
            w = layer.weight.numpy().astype(np.float64)
            gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
            np.testing.assert_allclose(gram, gram[0, 0] * np.eye(len(gram)), atol=1e-5 * gram[0, 0])


def test_lsuv_keeps_the_scale_where_a_plain_start_loses_it(rng):
    """30 layers of ReLU, drawn by Glorot for tanh: the signal dies; with LSUV it comes through."""
    x = batch(rng, columns=20)
    model = gb.Sequential(*(gb.Dense(20, 20, "relu", init="glorot_uniform") for _ in range(30))).initialize(0)
    assert gb.layer_stats(model, x)["variance"][-1] < 1e-6
    gb.lsuv(model, x, seed=0)
    assert 0.1 < gb.layer_stats(model, x)["variance"][-1] < 1


def test_lsuv_with_biases_takes_a_few_trials(rng):
    def make(spread):
        return gb.Sequential(gb.Dense(6, 30, bias_init=np.linspace(-spread, spread, 30)), gb.Dense(30, 2))

    model, x = make(1.0), 4 * batch(rng)
    a = pre_activations(gb.lsuv(model, x, seed=0), x)["0"]
    assert abs(a.var() - 1) <= TOLERANCE
    np.testing.assert_array_equal(model.state_dict()["0.bias"], np.linspace(-1, 1, 30, dtype="f"))
    message = (
        r"^lsuv: layer '0': x @ w \+ b has variance 1\.\d+ after 10 trials, expected 1; give it bias_init='zeros'$"
    )
    with pytest.raises(ValueError, match=message):
        gb.lsuv(make(2.0), x, seed=0)


def test_lsuv_is_determined_by_its_seed_and_kept_by_a_trainer(rng):
    x, y = batch(rng), rng.integers(0, 3, 200)
    one, two, other = (gb.lsuv(nested(), x, seed).state_dict() for seed in (1, 1, 2))
    assert all(np.array_equal(one[k], two[k]) for k in one) and not np.array_equal(one["0.weight"], other["0.weight"])
    model = gb.lsuv(nested(), x, 1)
    trainer = gb.Trainer(model, seed=9)
    assert model.seed == 1 and all(np.array_equal(a, one[k]) for k, a in model.state_dict().items())
    assert trainer.fit(x, y, epochs=1)["loss"][0] < 2
    assert gb.lsuv(nested(), x).seed != gb.lsuv(nested(), x).seed


def test_lsuv_leaves_what_was_set_and_what_is_frozen(rng):
    x = 10 + 5 * batch(rng)
    frozen = gb.Dense(16, 3)
    frozen.weight.requires_grad = False
    model = gb.Sequential(gb.Scaler(6).fit(x), gb.Dense(6, 16), gb.BatchNorm(16), frozen).initialize(0)
    state = model.state_dict()
    state["2.mean"], state["3.weight"] = np.full(16, 0.5), np.full((16, 3), 0.25)
    model.load_state_dict(state)
    after = gb.lsuv(model, x, 1).state_dict()
    changed = {k for k in after if not np.array_equal(after[k], state[k])}
    assert changed == {"1.weight"}
    assert abs(pre_activations(model, x)["1"].var() - 1) < 1e-5


def test_lsuv_scales_a_shared_layer_where_it_is_first_called(rng):
    shared, x = gb.Dense(6, 6, "relu"), batch(rng)
    model = gb.lsuv(gb.Sequential(shared, gb.Dense(6, 6, "relu"), shared), x, 0)
    a = x.astype("f") @ shared.weight.numpy()
    assert abs(a.var() - 1) < 1e-5
    assert abs((np.maximum(a, 0) @ model.layers[1].weight.numpy()).var() - 1) < 1e-5


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            np.ones((20, 6)),
            r"^lsuv: layer '0': x @ w \+ b is the same for all 20 rows of x; pass rows that differ",
        ),
        (np.ones((1, 6)), r"^lsuv: layer '0': x @ w \+ b is the same for all 1 rows of x"),
        (
            np.full((3, 6), 3e38) * [[1], [-1], [1]],
            r"^lsuv: layer '0': x @ w \+ b is not finite; scale x first",
        ),
        (np.ones((20, 5)), "x has 5 columns but the model expects 6$"),
    ],
)
def test_lsuv_names_the_layer_that_cannot_be_scaled(x, message):
    with pytest.raises(ValueError, match=message):
        gb.lsuv(nested(), x, 0)


def test_a_layer_behind_dead_units_is_named(rng):
    """Biases far below zero, which no input lifts."""
    model = gb.Sequential(gb.Dense(6, 8, "relu", bias_init=-50.0), gb.Dense(8, 2))
    with pytest.raises(ValueError, match=r"^lsuv: layer '1': x @ w \+ b is the same for all 200 rows of x"):
        gb.lsuv(model, batch(rng), 0)
