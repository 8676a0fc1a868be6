"""Figures are what float64 makes of the outputs and of the targets as they were given, for any number of rows."""

import pickle
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    log_loss,
    mean_absolute_error,
    mean_poisson_deviance,
    mean_squared_error,
    r2_score,
)

import gpubackprop as gb
from gpubackprop.metrics import metric
from gpubackprop.plan import Plan

N, OUTPUTS = 3000, 3  # more rows than are predicted at a time
DEVICES = ["cpu", "cpu:reference"]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def bce(t, z, w):
    return np.mean([log_loss(t[:, i], sigmoid(z[:, i]), sample_weight=w) for i in range(t.shape[1])])


def poisson(t, z, w):
    return np.mean([mean_poisson_deviance(t[:, i], np.exp(z[:, i]), sample_weight=w) / 2 for i in range(t.shape[1])])


def mse(t, z, w):
    return mean_squared_error(t, z, sample_weight=w)


NUMBERS = {"r2": r2_score, "mse": mean_squared_error, "mae": mean_absolute_error}
# loss: what the targets are, the loss by scikit-learn, the predicted mean
LOSSES = {
    "mse": ("numbers", mse, lambda z: z),
    "half_mse": ("numbers", lambda *a: mse(*a) / 2, lambda z: z),
    "sse": ("numbers", lambda *a: mse(*a) * OUTPUTS, lambda z: z),
    "half_sse": ("numbers", lambda *a: mse(*a) * OUTPUTS / 2, lambda z: z),
    "bce": ("bits", bce, sigmoid),
    "bce_sum": ("bits", lambda *a: bce(*a) * OUTPUTS, sigmoid),
    "poisson": ("counts", poisson, np.exp),
    "poisson_sum": ("counts", lambda *a: poisson(*a) * OUTPUTS, np.exp),
    "cross_entropy": ("shares", lambda t, z, w: np.average(-(t * np.log(softmax(z))).sum(1), weights=w), softmax),
}


def data(rng, kind, n=N):
    z = rng.normal(size=(n, OUTPUTS))
    t = {"numbers": z, "bits": z > 0, "counts": rng.poisson(np.exp(z)), "shares": softmax(z)}[kind]
    return rng.normal(size=(n, 4)).astype("f"), t


def same(figures, expected, rtol=1e-9):
    assert figures.keys() >= expected.keys()
    np.testing.assert_allclose([figures[k] for k in expected], list(expected.values()), rtol=rtol, atol=1e-300)


def evaluated(rng, loss, device, dtype="float32", weighted=False):
    kind, reference, mean = LOSSES[loss]
    x, t = data(rng, kind)
    w = rng.random(N) * (rng.random(N) > 0.1) if weighted else None
    model = gb.mlp([4, 8, OUTPUTS], dtype=dtype).initialize(0)
    trainer = gb.Trainer(model, loss, metrics=list(NUMBERS), device=device, seed=0)
    z = trainer.predict(x).astype(np.float64)
    t64 = t.astype(np.float64)
    expected = {"loss": reference(t64, z, w)} | {k: f(t64, mean(z)) for k, f in NUMBERS.items()}
    same(trainer.evaluate(x, t, w), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_metrics_are_those_of_scikit_learn(loss, weighted, device, rng):
    evaluated(rng, loss, device, weighted=weighted)


@pytest.mark.parametrize("loss", LOSSES)
def test_of_a_float64_model(loss, rng):
    evaluated(rng, loss, "cpu", "float64", weighted=True)


@pytest.mark.parametrize("loss", ["poisson", "cross_entropy"])
def test_on_cuda(cuda, loss, rng):
    evaluated(rng, loss, "cuda", weighted=True)


@pytest.mark.parametrize("device", DEVICES)
def test_labels(device, rng):
    x, labels, w = rng.normal(size=(N, 4)), rng.integers(0, OUTPUTS, N), rng.random(N)
    trainer = gb.Trainer(gb.mlp([4, 8, OUTPUTS]), device=device, seed=0)
    z = trainer.predict(x).astype(np.float64)
    expected = {"loss": log_loss(labels, softmax(z), sample_weight=w), "accuracy": accuracy_score(labels, z.argmax(1))}
    same(trainer.evaluate(x, labels, w), expected)


@pytest.mark.parametrize("device", [*DEVICES, "cuda"])
@pytest.mark.parametrize("loss", ["poisson", "bce", "cross_entropy", "mse"])
def test_the_history_has_metrics_of_the_predicted_mean_as_evaluate_has(loss, device, request, rng):
    if device == "cuda":
        request.getfixturevalue("cuda")
    x, t = data(rng, LOSSES[loss][0], 300)
    trainer = gb.Trainer(gb.mlp([4, 8, OUTPUTS]), loss, gb.SGD(1e-30), list(NUMBERS), device=device, seed=0)
    before = trainer.evaluate(x, t)
    history = trainer.fit(x, t, epochs=1, batch_size=32, validation_data=(x, t), progress=False)
    same({k: v[-1] for k, v in history.items()}, before, rtol=1e-5)
    same({k: history[f"val_{k}"][-1] for k in before}, before)


def test_metrics_are_of_the_predicted_mean_after_pickling_too(rng):
    x, t = data(rng, "counts", 100)
    trainer = gb.Trainer(gb.mlp([4, OUTPUTS]), "poisson", metrics=list(NUMBERS), seed=0)
    assert pickle.loads(pickle.dumps(trainer)).evaluate(x, t) == trainer.evaluate(x, t)


def test_the_mean_of_half_precision_logits(rng):
    x, t = data(rng, "shares", 256)
    trainer = gb.Trainer(gb.mlp([4, OUTPUTS]), optimizer=gb.SGD(1e-30), metrics=["mse"], seed=0, precision="float16")
    same({k: v[-1] for k, v in trainer.fit(x, t, epochs=1).items()}, trainer.evaluate(x, t), rtol=1e-2)


def test_accuracy_is_no_metric_of_counts(rng):
    x, t = data(rng, "counts", 20)
    with pytest.raises(ValueError, match="metric 'accuracy' counts classes, but the loss is poisson"):
        gb.Trainer(gb.mlp([4, OUTPUTS]), "poisson", metrics=["accuracy"]).evaluate(x, t)


# ---- numbers that float32 does not hold ----


def constant(value, **keywords):
    """A trainer whose model always says the value."""
    trainer = gb.Trainer(gb.mlp([1, 1]), "mse", metrics=list(NUMBERS), seed=0, **keywords)
    trainer.model.load_state_dict({"0.weight": np.zeros((1, 1)), "0.bias": np.array([value])})
    return trainer


@pytest.mark.parametrize("device", [*DEVICES, "cuda"])
@pytest.mark.parametrize("value, scale", [(1e8, 1), (0, 1e-25), (0, 1e25), (2.0**30, 0.1), (-3e7, 1e-3), (0, 1e-60)])
def test_targets_that_float32_rounds_or_cannot_square(value, scale, device, request, rng):
    if device == "cuda":
        request.getfixturevalue("cuda")
    y = value + scale * rng.normal(size=400)
    expected = {k: f(y, np.full(400, value)) for k, f in NUMBERS.items()}
    same(constant(value, device=device).evaluate(np.ones((400, 1)), y), expected, rtol=1e-6)


def test_integer_targets_beyond_two_to_the_24(rng):
    y = 2**40 + rng.integers(0, 5, 100)
    same(constant(2.0**40).evaluate(np.ones((100, 1)), y), {"mse": mean_squared_error(y, np.full(100, 2**40))})


def test_a_constant_target_is_met_or_not():
    x = np.ones((7, 1))
    assert constant(0.1).evaluate(x, np.full(7, np.float32(0.1)))["r2"] == 1
    assert constant(0.1).evaluate(x, np.full(7, 0.1))["r2"] == 0  # which is no float32
    assert np.isnan(constant(0.1).evaluate(x[:1], [0.1])["r2"])


def test_early_stopping_watches_true_figures(rng):
    y = 1e8 + rng.normal(size=64)
    trainer = constant(1e8)
    with pytest.warns(RuntimeWarning, match="fit: y column 0 has a standard deviation of"):
        history = trainer.fit(np.ones((64, 1)), y, epochs=1, validation_data=(np.ones((64, 1)), y), progress=False)
    output = trainer.predict(np.ones((64, 1))).astype(np.float64)
    assert history["val_r2"][-1] == pytest.approx(r2_score(y, output), rel=1e-6)


# ---- many rows ----


def test_figures_of_millions_of_rows():
    n = 4_000_000
    x = np.ones((n, 1), np.float32)
    trainer = gb.Trainer(gb.mlp([1, 2]), seed=0)
    trainer.model.load_state_dict({"0.weight": np.zeros((1, 2)), "0.bias": np.zeros(2)})
    assert trainer.evaluate(x, np.zeros(n, int)) == {"loss": pytest.approx(np.log(2), rel=1e-9), "accuracy": 1.0}


@pytest.mark.parametrize("device", [*DEVICES, "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_over_many_batches_lose_nothing(device, dtype, request, rng):
    """The batch's own sum is as exact as its type; what is added up over an epoch is as exact as twice that."""
    if device == "cuda":
        request.getfixturevalue("cuda")
    back, found = gb.get_backend(device), metric("mse")
    tensors = [gb.tensor(rng.random((2, 5)).astype(dtype), device=device) for _ in range(2)]
    sums = found.sums(back, 5, dtype, labels=False)
    plan = Plan(back)
    with plan.record("add"):
        found.add(*tensors, sums)
    once = back.to_numpy(sums).astype(np.float64).sum(0)
    batches = 300 if device == "cuda" else 20_000
    for _ in range(batches - 1):
        plan.replay("add")
    rtol = 1e-11 if dtype == "float32" else 1e-15
    np.testing.assert_allclose(back.to_numpy(sums).astype(np.float64).sum(0), batches * once, rtol=rtol)


def test_rows_times_classes_are_never_there_at_once():
    rows, classes = 6000, 1500  # 36 MB of outputs in float32
    trainer = gb.Trainer(gb.mlp([2, classes]), seed=0)
    x, y = np.ones((rows, 2), np.float32), np.zeros(rows, int)
    trainer.evaluate(x[:2000], y[:2000])
    tracemalloc.start()
    trainer.evaluate(x, y)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 18e6


# ---- a user's own loss ----


@pytest.mark.parametrize("one, dtype", [(1.0, np.float64), (gb.tensor(np.ones(1, "f")), np.float32)])
def test_a_loss_of_ones_own_sees_all_rows_in_float64_if_it_can(one, dtype, rng):
    seen = []

    def spread_of_errors(output, target):
        e = (output - target) * one
        seen.append((output.shape, output.dtype, target.dtype))
        return (e * e).mean() - e.mean() * e.mean()

    x, y = rng.normal(size=(N, 4)), rng.normal(size=(N, 2))
    trainer = gb.Trainer(gb.mlp([4, 2]), spread_of_errors, metrics=["mae"], seed=0)
    errors = trainer.predict(x) - y
    seen.clear()
    figures = trainer.evaluate(x, y)
    assert seen[-1] == ((N, 2), dtype, dtype)
    same(figures, {"loss": errors.var()}, rtol=1e-12 if dtype is np.float64 else 1e-5)
    same(figures, {"mae": abs(errors).mean()}, rtol=1e-7)


@pytest.mark.parametrize("device", [*DEVICES, "cuda"])
@pytest.mark.parametrize("value, scale", [(1e8, 1), (0, 1e-25), (0, 1e25)])
def test_a_loss_of_ones_own_is_as_exact_as_the_librarys(value, scale, device, request, rng):
    if device == "cuda":
        request.getfixturevalue("cuda")
    y, losses = value + scale * rng.normal(size=400), []
    for loss in ("mse", lambda o, t: ((o - t) ** 2).mean()):
        trainer = gb.Trainer(gb.mlp([1, 1]), loss, seed=0, device=device)
        trainer.model.load_state_dict({"0.weight": np.zeros((1, 1)), "0.bias": np.array([value])})
        losses.append(trainer.evaluate(np.ones((400, 1)), y)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
