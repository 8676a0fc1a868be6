"""Diagnostics: they tell what a training step does, name what is planted, and change nothing."""

import copy

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.diagnostics import gradient_at, observed
from gpubackprop.formulas import ACTIVATIONS


class Net(gb.Layer):
    """Activations in its own forward, as many write it."""

    def __init__(self):
        self.a, self.b = gb.Dense(6, 5), gb.Dense(5, 3)

    def forward(self, x):
        return self.b(gb.relu(self.a(gb.relu(x))))


class Gain(gb.Layer):
    def __init__(self, columns):
        self.gain = gb.Parameter((columns,), "ones")

    def forward(self, x):
        return gb.tanh(x * self.gain)


class Twice(gb.Layer):
    def __init__(self):
        self.cell, self.head = gb.Dense(6, 6, "tanh"), gb.Dense(6, 3)

    def forward(self, x):
        return self.head(self.cell(self.cell(x)))


class Log(gb.Layer):
    def forward(self, x):
        return gb.log(x)


class Nudge(gb.Layer):
    """What comes in, plus an array of its shape."""

    by: np.ndarray | float = 0.0

    def forward(self, x):
        return x + gb.tensor(self.by) if np.shape(self.by) == x.shape else x


def shared():
    layer = gb.Dense(6, 6, "sigmoid")
    return gb.Sequential(layer, gb.Activation("elu"), layer, gb.Dense(6, 3))


MODELS = {
    "mlp": lambda: gb.mlp([6, 5, 3], "gelu", dropout=0.3),
    "parts": lambda: gb.Sequential(
        gb.Scaler(6), gb.Dense(6, 6, bias=False), gb.BatchNorm(6), gb.Activation("relu"), gb.Dropout(0.2),
        gb.Residual(gb.LayerNorm(6), gb.Dense(6, 6, "silu")), gb.Dense(6, 3),
    ),
    "shared": shared,
    "net": Net,
    "twice": Twice,
    "gain": lambda: gb.Sequential(Gain(6), gb.Dense(6, 3)),
    "dense": lambda: gb.Dense(6, 3),
}  # fmt: skip
NAMES = {
    "mlp": ["0", "1", "2"],
    "parts": ["0", "1", "2", "3", "4", "5.0", "5.1", "6"],
    "shared": ["0", "1", "2", "3"],
    "net": ["relu", "a", "relu:2", "b"],
    "twice": ["cell", "cell:2", "head"],
    "gain": ["0", "1"],
    "dense": ["Dense"],
}
LOSSES = {
    "cross_entropy": "cross_entropy",
    "mse": "mse",
    "own": lambda output, target: gb.mse(gb.sigmoid(output), target),
}


def data(rng, loss="cross_entropy", n=24):
    x = rng.normal(size=(n, 6))
    return x, rng.integers(0, 3, n) if loss == "cross_entropy" else rng.random((n, 3))


def trainer(model, loss="cross_entropy", dtype="float64", device="cpu", **how):
    model.dtype = dtype
    return gb.Trainer(model, LOSSES[loss], device=device, seed=3, **how)


# ---- what is seen is the training step -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_the_step_seen_is_the_step_that_fit_makes(name, loss, rng):
    """The same loss with the same dropout, the same gradient, and the same update; of the second step here."""
    x, y = data(rng, loss)
    t = trainer(MODELS[name](), loss, optimizer=gb.SGD(lr=0.5))
    t.fit(x, y, epochs=1, batch_size=24)
    report, seen = gb.gradient_report(t, x, y), observed(t, x, y, "test")
    assert list(seen.sites) == [row.name for row in report.layers] == NAMES[name] + ["loss.sigmoid"] * (loss == "own")
    before = t.model.state_dict()
    assert t.fit(x, y, epochs=1, batch_size=24, shuffle=False)["loss"][-1] == pytest.approx(report.loss, rel=1e-13)
    moved = {k: before[k] - p.numpy() for k, p in t.model.named_parameters().items()}
    keys = {p: k for k, p in seen.trainer.model.named_parameters().items()}
    trained = {keys[p] for site in seen.sites.values() for p in site.parameters}
    assert trained == {k for k, p in t.model.named_parameters().items() if p.trainable}
    for row, site in zip(report.layers, seen.sites.values(), strict=True):
        own = [keys[p] for p in site.parameters]
        for key, p in zip(own, site.parameters, strict=True):
            np.testing.assert_allclose(0.5 * p.grad.numpy(), moved[key], rtol=1e-9, atol=1e-15)
        if own:
            weights, steps = (np.concatenate([a[k].ravel() for k in own]) for a in (before, moved))
            assert row.update == pytest.approx(np.linalg.norm(steps) / np.linalg.norm(weights), rel=1e-9)
            assert row.gradient == pytest.approx(2 * np.sqrt(np.mean(steps**2)), rel=1e-9)


def test_figures_of_a_network_worked_out_by_hand(rng):
    x, t = rng.normal(size=(20, 4)), rng.normal(size=(20, 2))
    model = gb.Sequential(gb.Dense(4, 3, "tanh"), gb.Dense(3, 2), dtype="float64")
    trainer = gb.Trainer(model, "half_mse", gb.SGD(lr=0.1), seed=0)
    w, b, v, c = (p.numpy() for p in model.named_parameters().values())
    z = x @ w + b
    delta2 = (np.tanh(z) @ v + c - t) / 40
    after, before = delta2 @ v.T, delta2 @ v.T * (1 - np.tanh(z) ** 2)
    dw, db = x.T @ before, before.sum(0)
    report = gb.gradient_report(trainer, x, t)
    first, second = report.layers

    def rms(*arrays):
        return np.sqrt(np.mean(np.concatenate([a.ravel() for a in arrays]) ** 2))

    expected = {"preact": rms(z), "postact": rms(np.tanh(z)), "delta_pre": rms(before), "delta_post": rms(after),
                "gradient": rms(dw, db), "share": np.linalg.norm(before) / np.linalg.norm(delta2),
                "update": 0.1 * rms(dw, db) / rms(w, b), "saturation": np.mean(1 - np.tanh(z) ** 2 < 0.05)}  # fmt: skip
    for key, value in expected.items():
        assert getattr(first, key) == pytest.approx(value, rel=1e-12), key
    assert second.delta_pre == second.delta_post == pytest.approx(rms(delta2), rel=1e-12)
    assert (first.units, second.units, report.rows) == (3, 2, 20) and np.isnan(second.saturation)
    assert report.loss == pytest.approx(0.5 * np.mean((np.tanh(z) @ v + c - t) ** 2), rel=1e-12)


def diagnose(t, x, y):
    gb.gradient_report(t, x, y)
    gb.sensitivity(t, x, y, 0)
    gb.explain_weight(t, x, y, 0, 1, 2)
    assert gb.find_nan(t, x, y, epochs=2, batch_size=10) is None
    loss, w = gb.loss_of_weights(t, x, y)
    gb.hessian_vector_product(loss, w, w)


@pytest.mark.parametrize(
    "how", [{}, {"precision": "float16"}, {"optimizer": gb.SGD(momentum=0.9, nesterov="lookahead")}]
)
def test_nothing_changes(how, rng):
    """A trainer that was looked at between its epochs, or from a callback, ends with the bits of one that was not."""
    x, y = data(rng)
    ends = []
    for look in (None, "between", "within"):
        model = gb.Sequential(gb.Dense(6, 8, "relu"), gb.BatchNorm(8), gb.Dropout(0.2), gb.Dense(8, 3))
        t = gb.Trainer(model, seed=1, device="cpu", **how)
        state = np.random.get_state()[1].tolist()  # noqa: NPY002 (what must not move)
        for _ in range(2):
            callbacks = [lambda t: diagnose(t, x, y)] if look == "within" else []
            t.fit(x, y, epochs=1, batch_size=10, callbacks=callbacks)
            gradients = model.arena.gradients.copy()
            if look == "between":
                before = copy.deepcopy((t.history, t.epoch, t.step, t.state.host(), model.state_dict()))
                diagnose(t, x, y)
                np.testing.assert_equal((t.history, t.epoch, t.step, t.state.host(), model.state_dict()), before)
                np.testing.assert_array_equal(model.arena.gradients, gradients)
        assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
        ends.append((t.history, t.state.host(), model.state_dict()))
    np.testing.assert_equal(ends[1], ends[0])
    np.testing.assert_equal(ends[2], ends[0])


def test_every_device_tells_the_same(cuda, rng):
    x, y = (a[:40] for a in gb.datasets.digits())
    told = []
    for device in ("cpu", "cpu:reference", "cuda"):
        t = gb.Trainer(gb.mlp([64, 24, 10], dropout=0.2), optimizer=gb.Adam(3e-3), seed=0, device=device)
        report = gb.gradient_report(t, x, y)
        figures = [[row.preact, row.postact, row.delta_pre, row.delta_post, row.share] for row in report.layers]
        figures += [[row.gradient, row.update] for row in report.layers if row.what.startswith("Dense")]
        function, w = gb.loss_of_weights(t, x, y)  # on the CPU, where w lies
        product = gb.hessian_vector_product(function, w, w)[2]
        told.append((np.hstack(figures), gb.sensitivity(t, x, y, 0), gb.explain_weight(t, x, y, 2, 2, 1).tail, product))
        assert [row.verdict for row in report.layers] == ["healthy"] * 3
        assert gb.find_nan(t, x, y, batch_size=16) is None
        poisoned = t.model.state_dict()
        poisoned["2.bias"][2] = np.nan
        t.model.load_state_dict(poisoned)
        found = gb.find_nan(t, x, y, batch_size=16)
        assert (found.layer, found.name, found.inputs_finite, found.weights) == (
            "2",
            "bias activation",
            False,
            ("2.bias",),
        )
    for other in told[1:]:
        for a, b in zip(told[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)
    buffers = cuda.asarray(x), cuda.asarray(y)
    assert np.isnan(gb.loss_of_weights(t, *buffers)[0](*map(gb.tensor, w[:3]), gb.tensor(np.full(10, np.nan))).item())
    there = gb.sensitivity(t, *buffers, 2)
    assert not isinstance(there, np.ndarray) and np.isnan(cuda.to_numpy(there)).all()


# ---- verdicts ------------------------------------------------------------------------------------------------------


def chain(units, activation, scale, width=1, dtype="float32"):
    """Layers of that width whose weights are `scale` times a matrix that keeps norms."""
    layers = [gb.Dense(width, width, activation, init=scale * np.eye(width)) for _ in range(units)]
    return gb.Sequential(*layers, dtype=dtype)


def report(model, x, y, loss="mse", optimizer="adam"):
    return gb.gradient_report(gb.Trainer(model, loss, optimizer, seed=0, device="cpu"), x, y)


def test_gradients_that_explode_are_named(rng):
    x = rng.normal(size=(30, 4))
    told = report(chain(8, "identity", 4.0, 4), x, rng.normal(size=(30, 4)))
    assert [row.verdict for row in told.layers] == ["exploding"] * 3 + ["healthy"] * 5
    assert told[0].share == pytest.approx(4.0**7, rel=1e-5)
    assert told.verdict == "exploding" and "exploding (layers 0, 1, 2): try a smaller learning rate" in str(told)
    assert "layer 0: its gradient is 1.6e+04 times that at the output of the last trained layer" in str(told)


def test_values_that_overflow_are_named(rng):
    told = report(chain(8, "identity", 1e6, 4), rng.normal(size=(30, 4)), rng.normal(size=(30, 4)))
    assert np.isfinite([row.preact for row in told.layers]).tolist() == [True] * 6 + [False] * 2
    assert {row.verdict for row in told.layers} == {"exploding"}
    assert "layer 6: values or gradients are NaN or infinite; gb.find_nan(trainer, x, y) names the launch" in str(told)
    assert not any(row.dead for row in told.layers)


def test_a_step_longer_than_the_weights_is_named(rng):
    told = report(
        chain(1, "identity", 1.0, 4), rng.normal(size=(30, 4)), 1e4 * rng.normal(size=(30, 4)), "mse", gb.SGD(0.1)
    )
    assert told.verdict == "exploding" and told[0].update > 1
    assert f"the next step is {told[0].update:.1e} times as long as its weights" in str(told)


def test_a_step_too_small_to_matter_is_named(rng):
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    told = report(chain(2, "tanh", 1.0, 4), x, y, optimizer=gb.SGD(lr=1e-7))
    assert told.verdict == "healthy" and "raise the learning rate" in told.advice
    assert "raise the learning rate" not in report(chain(2, "tanh", 1.0, 4), x, y, optimizer=gb.SGD(lr=1e-2)).advice


def test_a_layer_that_gets_no_gradient_is_named(rng):
    model = gb.Sequential(gb.Dense(4, 8, "tanh"), gb.Dense(8, 3, init="zeros"))
    told = report(model, rng.normal(size=(30, 4)), rng.integers(0, 3, 30), "cross_entropy")
    assert [row.verdict for row in told.layers] == ["vanishing", "healthy"] and "no gradient arrives" in told[0].why


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "hard_tanh", "hard_sigmoid"])
def test_saturated_units_are_named(activation, rng):
    x, y = rng.normal(size=(200, 8)), rng.integers(0, 3, 200)
    model = gb.Sequential(gb.Dense(8, 16, activation), gb.Dense(16, 3))
    for scale, verdict in ((1, "healthy"), (100, "saturated")):
        model.layers[0].weight.init = lambda shape, g, scale=scale: scale * g.normal(size=shape) / 3
        model.initialize(0)
        told = report(model, x, y, "cross_entropy")
        assert told[0].verdict == told.verdict == verdict
    assert told[
        0
    ].saturation > 0.9 and f"{told[0].saturation:.0%} of its values lie where the activation is flat" in str(told)


def test_activations_that_flatten_on_one_side_do_not_saturate(rng):
    for activation in ACTIVATIONS:
        flat = activation in ("tanh", "sigmoid", "hard_tanh", "hard_sigmoid")
        model = gb.Sequential(gb.Dense(8, 4, activation), gb.Dense(4, 3))
        assert np.isnan(report(model, *data_of(rng), "cross_entropy")[0].saturation) == (not flat), activation


def data_of(rng):
    return rng.normal(size=(30, 8)), rng.integers(0, 3, 30)


def test_a_layer_of_dead_units_is_named(rng):
    x, y = data_of(rng)
    model = gb.Sequential(gb.Dense(8, 8, "relu"), gb.Dense(8, 8, "relu", bias_init=-100), gb.Dense(8, 3))
    told = report(model, x, y, "cross_entropy")
    assert [row.verdict for row in told.layers] == ["vanishing", "dead", "healthy"] and told.verdict == "dead"
    assert told[1].dead == tuple(range(8)) and "dead (layer 1): try a smaller learning rate, leaky_relu" in told.advice
    assert "layer 1: 8 of 8 units are dead, passing no gradient in any row: 0, 1, 2, 3, 4, 5, 6, 7" in str(told)
    few = report(model, x[:4], y[:4], "cross_entropy")
    assert few[1].dead == told[1].dead and few[1].verdict == "vanishing" and "too few rows to tell" in str(few)


def test_a_saturated_sigmoid_in_a_loss_of_ones_own_is_named(rng):
    """Squared errors behind a sigmoid do not learn where it is flat (row 09): activations in a loss are rows too."""
    model = gb.Dense(4, 1, init=50.0)
    told = report(
        model, rng.choice([-1.0, 1.0], (40, 4)) + 4, np.zeros((40, 1)), lambda z, t: gb.half_mse(gb.sigmoid(z), t)
    )
    assert told["loss.sigmoid"].verdict == "dead" and told["loss.sigmoid"].dead == (0,)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_healthy_networks_are_not_suspected(activation):
    """On the digits, before and in training; single units of relu are dead there, and are named, but no verdict."""
    x, y = gb.datasets.digits()
    for seed, epochs in ((0, 0), (1, 0), (2, 0), (3, 4)):
        t = gb.Trainer(gb.mlp([64, 32, 32, 10], activation), optimizer=gb.Adam(lr=1e-2), seed=seed, device="cpu")
        if epochs:
            assert t.fit(x, y, epochs=epochs, batch_size=64)["accuracy"][-1] > 0.8
        told = gb.gradient_report(t, x[:256], y[:256])
        assert {row.verdict for row in told.layers} == {"healthy"}, str(told)
        assert activation in ("relu", "hard_tanh", "hard_sigmoid") or not any(row.dead for row in told.layers)


@pytest.mark.parametrize("optimizer", [gb.SGD(lr=0.1, momentum=0.9), gb.AdamW()])
def test_healthy_networks_of_many_parts_are_not_suspected(optimizer):
    x, y = gb.datasets.digits()
    body = [gb.Residual(gb.BatchNorm(32), gb.Activation("relu"), gb.Dense(32, 32)) for _ in range(6)]
    model = gb.Sequential(
        gb.Scaler(64).fit(x), gb.Dense(64, 32), *body, gb.LayerNorm(32), gb.Dropout(0.2), gb.Dense(32, 10)
    )
    t = gb.Trainer(model, optimizer=optimizer, seed=0, device="cpu")
    for _ in range(2):
        assert gb.gradient_report(t, x[:256], y[:256]).verdict == "healthy"
        t.fit(x, y, epochs=3, batch_size=64)


def test_a_regression_behind_a_scaler_is_not_suspected(rng):
    """What counts is the gradient at the last trained layer: the scaler behind it multiplies it by a million."""
    x = rng.normal(size=(60, 4))
    y = 1e6 * (x.sum(1, keepdims=True) + 5)
    model = gb.Sequential(gb.Dense(4, 16, "tanh"), gb.Dense(16, 1), gb.Scaler(1, inverse=True).fit(y))
    told = report(model, x, y)
    assert [row.verdict for row in told.layers] == ["healthy"] * 3 and np.isnan(told[2].share)


def test_a_report_prints_as_a_table(rng):
    x, y = data_of(rng)
    lines = str(report(gb.mlp([8, 4, 3], "tanh"), x, y, "cross_entropy")).splitlines()
    assert lines[0].startswith("loss ") and "over 30 rows" in lines[0]
    columns = "layer verdict preact postact delta_pre delta_post share gradient update saturated dead"
    assert lines[1].split() == columns.split()
    assert lines[3].startswith("0      Dense(8, 4, activation=tanh)") and len(lines) == 7
    assert lines[5].startswith(
        "exploding: share > 1000, update > 1 or loss > 10 guesses; vanishing: share < 0.001; sat"
    )
    assert lines[6].startswith("healthy: gradients of a sound size reach every layer; if it does not learn")


def test_half_precision_is_diagnosed_in_the_type_of_the_weights(rng):
    x, y = data_of(rng)
    t = gb.Trainer(gb.mlp([8, 4, 3], "tanh"), seed=0, device="cpu", precision="float16")
    told, full = (gb.gradient_report(a, x, y) for a in (t, gb.Trainer(gb.mlp([8, 4, 3], "tanh"), seed=0, device="cpu")))
    assert told.loss == full.loss and told[0].delta_pre == full[0].delta_pre
    assert gb.find_nan(t, x, y) is None


def test_names_that_do_not_exist_are_errors(rng):
    x, y = data(rng)
    t = trainer(MODELS["parts"]())
    for call in (lambda: gb.sensitivity(t, x, y, "5"), lambda: gb.explain_weight(t, x, y, "5", 0, 0)):
        with pytest.raises(ValueError, match=r"unknown layer '5'; choose from 0, 1, 2, 3, 4, 5\.0, 5\.1, 6"):
            call()
    with pytest.raises(KeyError, match="unknown layer 'x'; choose from 0, 1"):
        gb.gradient_report(t, x, y)["x"]
    for function in (gb.gradient_report, gb.find_nan, gb.loss_of_weights):
        with pytest.raises(TypeError, match=f"{function.__name__}: trainer is Sequential; expected a Trainer"):
            function(t.model, x, y)
    with pytest.raises(ValueError, match="gradient_report: x has 5 columns but the model expects 6"):
        gb.gradient_report(t, x[:, :5], y)


# ---- one weight, one pre-activation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, layer", [("mlp", 2), ("parts", 1), ("parts", "5.1"), ("net", "b"), ("dense", "Dense")])
def test_a_weights_gradient_is_the_sum_of_its_rows(name, layer, rng):
    x, y = data(rng)
    t = trainer(MODELS[name]())
    told = gb.explain_weight(t, x, y, layer, 1, 2)
    assert told.products.shape == (24,) and abs(told.products.sum() - told.gradient) <= 1e-12
    assert str(told).startswith(f"∂L/∂{told.name}[1, 2] = Σ a[1] · δ[2] over 24 rows = {told.gradient:.6g}")
    row = int(np.abs(told.products).argmax())
    assert f"row {row}: {told.tail[row]:.6g} · {told.head[row]:.6g} = {told.products[row]:.6g}" in str(told)
    assert "other uses" not in str(told)


@pytest.mark.parametrize("name, layers", [("shared", ("0", "2")), ("twice", ("cell", "cell:2"))])
def test_a_shared_weights_gradient_has_the_rows_of_every_use(name, layers, rng):
    x, y = data(rng)
    t = trainer(MODELS[name]())
    both = [gb.explain_weight(t, x, y, layer, 1, 2) for layer in layers]
    for told in both:
        assert told.products.shape == (48,) and abs(told.products.sum() - told.gradient) <= 1e-12
    np.testing.assert_array_equal(both[0].tail[:24], x[:, 1])


def test_a_weight_with_other_uses_says_so(rng):
    class Tied(gb.Layer):
        def __init__(self):
            self.a = gb.Dense(6, 3)

        def forward(self, x):
            return self.a(x) + x @ self.a.weight

    told = gb.explain_weight(trainer(Tied()), *data(rng), "a", 0, 0)
    assert told.gradient == pytest.approx(2 * told.products.sum(), rel=1e-12) and "has other uses" in str(told)


def test_zero_factors_are_counted(rng):
    x, y = data(rng)
    x[:7, 1] = 0
    told = str(gb.explain_weight(trainer(gb.Dense(6, 3)), x, y, "Dense", 1, 2))
    assert "a[1] is 0 in 7 rows and δ[2] in 0: these rows add nothing" in told


def test_what_has_no_such_weight_is_an_error(rng):
    x, y = data(rng)
    t = trainer(MODELS["parts"]())
    with pytest.raises(ValueError, match=r"layer 2 is BatchNorm\(6\); choose a Dense layer from 1, 5.1, 6"):
        gb.explain_weight(t, x, y, 2, 0, 0)
    with pytest.raises(ValueError, match=r"the weight of layer 6 has shape \(6, 3\); there is no \[0, 3\]"):
        gb.explain_weight(t, x, y, 6, 0, 3)
    t.model.layers[1].weight.requires_grad = False
    with pytest.raises(ValueError, match="layer 1 is frozen"):
        gb.explain_weight(t, x, y, 1, 0, 0)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_sensitivity_is_what_a_nudge_does(at, rng):
    """∂L/∂z equals central differences of the loss, in training mode, with dropout, batch statistics and a shortcut."""
    nudge = Nudge()
    layers = [gb.Dense(6, 6), gb.Activation("tanh"), gb.BatchNorm(6), gb.Dense(6, 6), gb.Dropout(0.3),
              gb.Residual(gb.Dense(6, 6, "sigmoid")), gb.Dense(6, 3)]  # fmt: skip
    layers.insert(at + (at != 1), nudge)  # before the activation, else behind the layer
    x, y = data(rng, n=7)
    t = trainer(gb.Sequential(*layers))

    def loss(by):
        nudge.by = by
        return observed(t, x, y, "test").loss

    name = str(next(i for i, layer in enumerate(layers) if layer is nudge) + (1 if at == 1 else -1))
    delta = gb.sensitivity(t, x, y, name)
    assert delta.shape == (7, 6 if at != 6 else 3) and delta.dtype == np.float64
    for row, unit in ((0, 0), (3, 2), (6, 1)):
        one = np.zeros(delta.shape)
        one[row, unit] = 1e-5
        assert delta[row, unit] == pytest.approx((loss(one) - loss(-one)) / 2e-5, rel=1e-6, abs=1e-10)


def test_a_pre_activation_is_seen_apart_from_other_users_of_its_value(rng):
    """x + tanh(x): the sensitivity at tanh's input is that of the branch alone; of the layer before it, of both."""
    x, y = data(rng)
    t = trainer(gb.Sequential(gb.Dense(6, 3), gb.Residual(gb.Activation("tanh"))))
    z = x @ t.model.layers[0].weight.numpy()
    after = gradient_at(observed(t, x, y, "test").sites["1.0"].postact)
    branch = after * (1 - np.tanh(z) ** 2)
    np.testing.assert_allclose(gb.sensitivity(t, x, y, "1.0"), branch, rtol=1e-12)
    np.testing.assert_allclose(gb.sensitivity(t, x, y, "0"), after + branch, rtol=1e-12)


# ---- second derivatives --------------------------------------------------------------------------------------------


def test_hessian_vector_products_of_known_functions(rng):
    a = rng.normal(size=(5, 5))
    x, v = rng.normal(size=(2, 5))
    quadratic = gb.hessian_vector_product(lambda x: (x * (gb.tensor(a) @ x)).sum(), x, v)
    np.testing.assert_allclose(quadratic, (a + a.T) @ v, rtol=1e-10)
    p, q = rng.uniform(0.5, 2, (2, 3))
    u, w = rng.normal(size=(2, 3))
    hp, hq = gb.hessian_vector_product(lambda p, q: (gb.sin(p) * gb.exp(q)).sum(), (p, q), (u, w))
    np.testing.assert_allclose(hp, np.exp(q) * (np.cos(p) * w - np.sin(p) * u), rtol=1e-10)
    np.testing.assert_allclose(hq, np.exp(q) * (np.cos(p) * u + np.sin(p) * w), rtol=1e-10)


def test_hessian_vector_products_are_linear_and_symmetric(rng):
    x, y = data(rng)
    loss, w = gb.loss_of_weights(trainer(MODELS["twice"]()), x, y)
    u, v = (tuple(rng.normal(size=a.shape) for a in w) for _ in "uv")

    def product(v):
        return gb.hessian_vector_product(loss, w, v)

    def dot(a, b):
        return sum(float((p * q).sum()) for p, q in zip(a, b, strict=True))

    hu, hv = product(u), product(v)
    assert dot(u, hv) == pytest.approx(dot(v, hu), rel=1e-9)
    for a, b in zip(product(tuple(-1e6 * p for p in u)), hu, strict=True):
        np.testing.assert_allclose(a, -1e6 * b, rtol=1e-9, atol=1e-4)
    assert not any(p.any() for p in product(tuple(0 * p for p in u)))
    with pytest.raises(ValueError, match=r"v has shapes \(2,\) but the inputs \(3,\); they must be equal"):
        gb.hessian_vector_product(lambda x: (x * x).sum(), np.ones(3), np.ones(2))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_weights_is_the_training_loss(name, loss, rng):
    x, y = data(rng, loss)
    t = trainer(MODELS[name](), loss, dtype="float32")
    function, w = gb.loss_of_weights(t, x, y)
    named = {k: p for k, p in t.model.named_parameters().items() if p.trainable}
    assert all(a.dtype == np.float64 and (a == p.numpy()).all() for a, p in zip(w, named.values(), strict=True))
    value, grads = gb.value_and_grad(function)(*w)
    wide = trainer(MODELS[name](), loss)
    wide.model.load_state_dict(t.model.state_dict())
    seen = observed(wide, x, y, "test")
    assert value == pytest.approx(seen.loss, rel=1e-13)
    for a, p in zip(grads, (p for p in seen.trainer.model.named_parameters().values() if p.trainable), strict=True):
        np.testing.assert_allclose(a, p.grad.numpy(), rtol=1e-10, atol=1e-15)


def test_the_loss_of_weights_can_be_doubted(rng):
    """A gradient check of a whole network in training mode, of the float32 trainer that someone has at hand."""
    model = gb.Sequential(gb.Dense(3, 3, "tanh"), gb.BatchNorm(3), gb.Dropout(0.4), gb.Dense(3, 2))
    t = gb.Trainer(model, seed=0, device="cpu")
    x, y = rng.normal(size=(6, 3)), rng.integers(0, 2, 6)
    function, w = gb.loss_of_weights(t, x, y)
    assert gb.gradcheck(function, w) <= 1e-8
    value = function(*map(gb.tensor, w)).item()
    x[:], y[:] = 0, 0  # the function keeps its own
    assert function(*map(gb.tensor, w)).item() == value
    with pytest.raises(ValueError, match=r"loss_of_weights: tensors of shapes \(3, 3\), .* expected, got \(3, 3\)"):
        function(gb.tensor(w[0]))


def test_frozen_weights_are_no_arguments_of_the_loss(rng):
    model = gb.mlp([6, 4, 3])
    model.layers[0].weight.requires_grad = False
    function, w = gb.loss_of_weights(gb.Trainer(model, seed=0, device="cpu"), *data(rng))
    assert [a.shape for a in w] == [(4,), (4, 3), (3,)] and np.isfinite(function(*map(gb.tensor, w)).item())


# ---- the first NaN -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_planted_weight_is_named(value, rng):
    x, y = data(rng)
    t = trainer(gb.mlp([6, 5, 4, 3]))
    state = t.model.state_dict()
    state["1.weight"][2, 1] = value
    t.model.load_state_dict(state)
    found = gb.find_nan(t, x, y)
    assert (found.epoch, found.step, found.layer, found.name, found.what) == (1, 1, "1", "gemm", "a = x @ w")
    assert not found.inputs_finite and found.weights == ("1.weight",)
    assert "epoch 1, step 1: gemm of layer '1' (a = x @ w) wrote" in str(found) and "such as 1.weight" in str(found)


def test_a_logarithm_of_zero_is_named(rng):
    x, y = data(rng)
    x[17, 3] = 0
    model = gb.Sequential(gb.Residual(Log()), gb.Dense(6, 3))
    x = np.abs(x)
    t = trainer(model)
    found = gb.find_nan(t, x, y, batch_size=8, shuffle=False)
    assert (found.step, found.layer, found.name, found.nans, found.infinities) == (3, "0.0", "log", 0, 1)
    assert found.inputs_finite and not found.weights and "what it read was finite" in str(found)
    x[17, 3] = 1
    assert gb.find_nan(t, x, y, batch_size=8) is None


def test_steps_are_counted_in_batches_where_several_make_an_update(rng):
    """Dropout draws anew for every batch, and TrainingDiverged names the batch: so do those that look at a step."""
    x, y = data(rng)
    model = gb.mlp([6, 64, 3], dropout=0.5, dtype="float64")
    t = gb.Trainer(model, "cross_entropy", gb.SGD(lr=0.1), seed=0, device="cpu", accumulate=3)
    t.fit(x, y, epochs=1, batch_size=6)
    assert t.step == 2
    report, (loss, weights) = gb.gradient_report(t, x, y), gb.loss_of_weights(t, x, y)
    at = loss(*map(gb.tensor, weights)).item()
    assert t.fit(x, y, epochs=1, batch_size=24, shuffle=False)["loss"][-1] == pytest.approx(report.loss, rel=1e-13)
    assert at == pytest.approx(report.loss, rel=1e-13)
    x = np.abs(x)
    x[17, 3] = -1
    t = gb.Trainer(gb.Sequential(Log(), gb.Dense(6, 3)), seed=0, device="cpu", accumulate=2)
    with np.errstate(invalid="ignore"), pytest.raises(gb.TrainingDiverged) as caught:
        t.fit(x, y, epochs=1, batch_size=8, shuffle=False)
    assert gb.find_nan(t, x, y, batch_size=8, shuffle=False).step == caught.value.step == 3


@pytest.mark.parametrize("loss", LOSSES)
def test_a_fit_that_diverged_is_repeated_up_to_its_first_bad_launch(loss, rng):
    x, y = data(rng, loss)
    t = trainer(gb.mlp([6, 5, 3]), loss, optimizer=gb.SGD(lr=1e-2))
    t.fit(x, y, epochs=2, batch_size=8)
    diverging = copy.deepcopy(t)
    diverging._optimizer = gb.SGD(lr=1e160)
    diverging = copy.deepcopy(diverging)
    if loss == "own":  # behind a sigmoid the loss stays finite
        assert gb.find_nan(t, x, y) is None
        return
    with pytest.raises(gb.TrainingDiverged, match=r"gb\.find_nan names the launch it began with") as caught:
        diverging.fit(x, y, epochs=1, batch_size=8)
    found = gb.find_nan(diverging, x, y, batch_size=8)
    assert found.epoch == caught.value.epoch == 3 and 1 < found.step <= caught.value.step
    assert found.inputs_finite and not found.weights and found.infinities
    assert gb.find_nan(t, x, y, batch_size=8) is None


def test_a_loss_that_is_not_finite_is_named(rng):
    x, y = data(rng, "own")
    t = gb.Trainer(
        gb.Dense(6, 3), loss=lambda output, target: gb.sqrt(output - output - 1).mean(), metrics=[], device="cpu"
    )
    found = gb.find_nan(t, x, y)
    assert (found.layer, found.name, found.inputs_finite, found.nans) == ("", "sqrt", True, 72)


def test_in_float16_only_a_fit_that_diverges_has_a_launch_to_name(rng):
    """Gradients that overflow at the first scales of the loss are no fault, those that do at every scale are."""
    x, t = rng.normal(size=(24, 6)), rng.normal(size=(24, 3))
    model = gb.mlp([6, 5, 3])
    trainer = gb.Trainer(model, "mse", seed=0, device="cpu", precision="float16")
    assert gb.find_nan(trainer, x, 100 * t, epochs=8, batch_size=8) is None
    found = gb.find_nan(trainer, x, 1e8 * t, epochs=8, batch_size=8)
    assert found.infinities and found.inputs_finite and found.name == "mse"


def test_the_loss_of_weights_is_the_loss_that_is_trained(rng):
    """Label smoothing and penalties are part of it."""
    x, y = rng.normal(size=(20, 3)), rng.integers(0, 4, 20)
    more = {"label_smoothing": 0.3, "l1": 0.1, "l2": lambda rows: 2.0 / rows}
    trainer = gb.Trainer(gb.mlp([3, 5, 4], "tanh", dtype="float64"), seed=0, **more)
    loss, w = gb.loss_of_weights(trainer, x, y)
    assert gb.value_and_grad(loss)(*w)[0] == pytest.approx(trainer.evaluate(x, y)["loss"], rel=1e-13)
