"""gradient_report judges the loss by that of a constant guess, and every layer by one rule whose limits it states."""

import math

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.report import EXPLODING, LARGE_LOSS, VANISHING

x, y = (a[:256] for a in gb.datasets.digits())


def scaled(sizes, factor, activation="relu"):
    model = gb.mlp(sizes, activation).initialize(0)
    model.load_state_dict({k: v * factor for k, v in model.state_dict().items()})
    return model


@pytest.mark.parametrize("device", ["cpu", "cpu:reference", "cuda"])
def test_weights_that_are_thirty_times_too_large_are_not_healthy(device, cuda):
    report = gb.gradient_report(gb.Trainer(scaled([64, 16, 16, 10], 30), seed=0, device=device), x, y)
    assert report.loss > 10_000 and report.guess == pytest.approx(math.log(10))
    assert report.verdict == "exploding" and report.loss_is_large
    assert "exploding (the loss 16976.7 is more than 10 times that of a constant guess): try" in report.advice
    assert "healthy:" not in report.advice


@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
def test_the_verdict_goes_by_the_loss_at_any_scale(activation):
    for factor in (0.5, 1, 3, 5, 30, 1e3):
        report = gb.gradient_report(gb.Trainer(scaled([64, 16, 16, 10], factor, activation), seed=0), x, y)
        assert report.loss_is_large == (report.loss > LARGE_LOSS * math.log(10))
        assert report.verdict == "exploding" if report.loss_is_large else report.verdict != "exploding"
    assert report.loss_is_large


rows = np.random.default_rng(0).normal(size=(60, 4))
numbers = np.c_[3 + 2 * rows[:, 0], rows[:, 1]]
GUESSES = {
    "cross_entropy": (3, np.arange(60) % 3, lambda t: math.log(3)),
    "bce": (1, np.arange(60) % 2, lambda t: math.log(2)),
    "bce_sum": (2, (numbers > 0).astype(float), lambda t: 2 * math.log(2)),
    "mse": (2, numbers, lambda t: t.var(0).mean()),
    "half_mse": (2, numbers, lambda t: t.var(0).mean() / 2),
    "sse": (2, numbers, lambda t: t.var(0).sum()),
    "half_sse": (2, numbers, lambda t: t.var(0).sum() / 2),
    "poisson": (2, numbers**2, lambda t: (t * np.log(t / t.mean(0))).mean()),
    "poisson_sum": (2, numbers**2, lambda t: (t * np.log(t / t.mean(0))).mean(0).sum()),
}


@pytest.mark.parametrize("loss", GUESSES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_guess_of_every_loss(loss, dtype):
    outputs, targets, expected = GUESSES[loss]
    trainer = gb.Trainer(gb.mlp([4, 8, outputs], "tanh", dtype=dtype), loss, seed=0)
    report = gb.gradient_report(trainer, rows, targets)
    assert report.guess == pytest.approx(expected(targets), rel=1e-6)
    assert not report.loss_is_large and report.verdict == "healthy"
    assert f"(a constant guess: {report.guess:.6g})" in str(report).splitlines()[0]


def test_every_named_loss_has_a_guess():
    assert GUESSES.keys() == gb.losses.LOSSES.keys()


def test_smoothed_and_soft_labels_have_the_guess_of_labels():
    soft = np.full((60, 3), 1 / 3)
    for targets, options in (
        (np.arange(60) % 3, {"label_smoothing": 0.1}),
        (soft, {}),
        (soft, {"label_smoothing": 0.1}),
    ):
        report = gb.gradient_report(gb.Trainer(gb.mlp([4, 8, 3]), seed=0, **options), rows, targets)
        assert report.guess == pytest.approx(math.log(3))


def test_where_there_is_no_guess_layers_alone_are_judged():
    own = gb.Trainer(gb.mlp([4, 8, 1], "tanh"), lambda o, t: (1e6 * (o - t) ** 2).mean(), gb.SGD(1e-9), seed=0)
    report = gb.gradient_report(own, rows, rows[:, :1])
    assert math.isnan(report.guess) and report.verdict == "healthy" and "guess:" not in str(report)
    constant = gb.gradient_report(gb.Trainer(gb.mlp([4, 8, 1], "tanh"), "mse", seed=0), rows, np.ones((60, 1)))
    assert constant.guess == 0 and constant.verdict == "healthy"


def test_targets_far_from_zero_are_told():
    report = gb.gradient_report(gb.Trainer(gb.mlp([4, 8, 1], "tanh"), "mse", seed=0), rows, 2000 + rows[:, :1])
    assert report.verdict == "exploding" and "gb.Scaler" in report.advice
    scaler = gb.Scaler(1, inverse=True).fit(2000 + rows[:, :1])
    model = gb.Sequential(gb.Dense(4, 8, "tanh"), gb.Dense(8, 1), scaler)
    assert gb.gradient_report(gb.Trainer(model, "mse", seed=0), rows, 2000 + rows[:, :1]).verdict == "healthy"


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "identity"])
@pytest.mark.parametrize("factor", [0.3, 1, 4])
def test_one_rule_over_the_layers_of_a_chain(activation, factor):
    trainer = gb.Trainer(scaled([64, *[16] * 8, 10], factor, activation), seed=0)
    report = gb.gradient_report(trainer, x, y)
    for layer in report.layers:
        assert (layer.verdict == "vanishing") == (layer.share < VANISHING)
        assert (layer.share > EXPLODING) <= (layer.verdict == "exploding")
    table = str(report)
    assert f"exploding: share > {EXPLODING:g}" in table and f"vanishing: share < {VANISHING:g}" in table
    assert all(f"{layer.share:.1e}" in table for layer in report.layers)


def test_the_docstring_states_the_thresholds():
    text = " ".join(gb.gradient_report.__doc__.split())
    for stated in ("more than 1000 times", "longer than the weights", "10 times that of a constant guess",
                   "more than a quarter of the units", "20 rows", "less than 0.001", "more than 80 %"):  # fmt: skip
        assert stated in text
