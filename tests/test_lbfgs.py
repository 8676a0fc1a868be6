"""LBFGS: known minima in few steps, the strong Wolfe conditions, and what it cannot do."""

import copy

import numpy as np
import pytest
from scipy.optimize import minimize

import gpubackprop as gb
from gpubackprop.lbfgs import CURVATURE, DECREASE, Point, strong_wolfe


def line(dtype="float64"):
    x, y = gb.datasets.regression7()
    model = gb.Sequential(gb.Dense(1, 1, init=0.0), dtype=dtype)
    return x, y, model


@pytest.mark.parametrize("device", ["cpu", "cpu:reference", "cuda"])
def test_seed_31_the_line_through_seven_points(device, request):
    if device == "cuda":
        request.getfixturevalue("cuda")
    x, y, model = line()
    trainer = gb.Trainer(model, "mse", gb.LBFGS(), metrics=["mse"], device=device, seed=0)
    history = trainer.fit(x, y, epochs=50, batch_size=2)  # the batch size means nothing to it
    assert len(history["loss"]) <= 8  # SciPy's takes 5 iterations; one more finds that there is nothing left to gain
    state = model.state_dict()
    assert state["0.weight"].item() == pytest.approx(0.335593220339, abs=1e-6)
    assert state["0.bias"].item() == pytest.approx(0.804721549637, abs=1e-6)
    assert history["loss"][-1] == pytest.approx(0.018051885161, abs=1e-12)
    assert history["mse"] == pytest.approx(history["loss"], rel=1e-12)
    assert history["loss"] == sorted(history["loss"], reverse=True)


def test_a_quadratic_of_many_dimensions(rng):
    """Least squares: the normal equations' solution."""
    x, t = rng.normal(size=(60, 12)) * np.linspace(0.3, 3, 12), rng.normal(size=(60, 2))
    model = gb.Sequential(gb.Dense(12, 2, bias=False), dtype="float64")
    history = gb.Trainer(model, "mse", gb.LBFGS(history=20), seed=0).fit(x, t, epochs=100)
    exact = np.linalg.lstsq(x, t, rcond=None)[0]
    np.testing.assert_allclose(model.state_dict()["0.weight"], exact, atol=1e-6)
    assert len(history["loss"]) < 40


def test_penalties_are_part_of_what_it_minimises(rng):
    """Ridge regression: (xᵀx · 2/n + λ) w = 2/n xᵀt."""
    x, t = rng.normal(size=(30, 5)), rng.normal(size=(30, 1))
    model = gb.Sequential(gb.Dense(5, 1, bias=False), dtype="float64")
    gb.Trainer(model, "mse", gb.LBFGS(), seed=0, l2=0.5).fit(x, t, epochs=60)
    exact = np.linalg.solve(2 / 30 * x.T @ x + 0.5 * np.eye(5), 2 / 30 * x.T @ t)
    np.testing.assert_allclose(model.state_dict()["0.weight"], exact, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_learns_the_digits_and_every_step_descends(dtype):
    x, y = gb.datasets.digits()
    trainer = gb.Trainer(gb.mlp([64, 32, 10], "tanh", dtype=dtype), optimizer=gb.LBFGS(), l2=1e-3, seed=0)
    losses = trainer.fit(x[:300], y[:300], epochs=40)["loss"]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.2
    assert trainer.evaluate(x[:300], y[:300])["loss"] == pytest.approx(losses[-1], rel=1e-5)
    first = len(losses)
    trainer.fit(x[:300], y[:300], epochs=5)
    assert (
        trainer.history["loss"] == sorted(trainer.history["loss"], reverse=True)
        and len(trainer.history["loss"]) > first
    )


def test_it_stops_where_the_gradient_vanishes():
    x, y, model = line()
    trainer = gb.Trainer(model, "mse", gb.LBFGS(tolerance=1e-3), seed=0)
    trainer.fit(x, y, epochs=50)
    done = trainer.epoch
    assert done < 10
    trainer.fit(x, y, epochs=50)
    assert trainer.epoch == done + 1


@pytest.mark.parametrize(
    "f, df, length",
    [
        (lambda a: (a - 3) ** 2, lambda a: 2 * (a - 3), 0.01),  # far too short
        (lambda a: (a - 3) ** 2, lambda a: 2 * (a - 3), 100.0),  # far too long
        (lambda a: np.cos(a) - 0.1 * a, lambda a: -np.sin(a) - 0.1, 5.0),  # over a hill
        (lambda a: np.exp(a) - 4 * a, lambda a: np.exp(a) - 4, 800.0),  # beyond what float64 holds
        (lambda a: -a / (a * a + 2), lambda a: (a * a - 2) / (a * a + 2) ** 2, 30.0),  # Moré & Thuente, function 1
    ],
)
def test_the_line_search_ends_with_strong_wolfe(f, df, length):
    seen = []

    def at(a):
        with np.errstate(over="ignore"):
            seen.append(Point(a, float(f(a)), float(df(a)), np.array([a]), np.array([df(a)])))
        return seen[-1]

    start = at(0.0)
    found = strong_wolfe(at, start, length, 25)
    assert found.loss <= start.loss + DECREASE * found.length * start.slope
    assert abs(found.slope) <= CURVATURE * abs(start.slope) and len(seen) <= 15


def test_a_start_that_is_not_finite_is_told():
    x, y, model = line()
    trainer = gb.Trainer(model, "mse", gb.LBFGS(), seed=0)
    state = model.state_dict()
    model.load_state_dict(state | {"0.bias": np.array([np.inf])})
    with pytest.raises(gb.TrainingDiverged):
        trainer.fit(x, y, epochs=3)


@pytest.mark.parametrize("more", [{"clip_norm": 1.0}, {"clip_value": 1.0}, {"accumulate": 2}, {"precision": "float16"}])
def test_what_it_cannot_do_is_an_error(more):
    with pytest.raises(ValueError, match="Trainer: LBFGS searches along gradients of all rows"):
        gb.Trainer(gb.mlp([2, 2]), optimizer=gb.LBFGS(), **more)


@pytest.mark.parametrize("bad, kind, message", [
    ({"weight_decay": 0.1}, ValueError, r"LBFGS: it minimises the loss alone, .* use Trainer\(l2=…\)"),
    ({"lr": gb.schedules.Step(1.0, every=1)}, TypeError, "LBFGS: lr must be a number"),
    ({"history": 0}, ValueError, "LBFGS: history must be at least 1, got 0"),
])  # fmt: skip
def test_bad_settings(bad, kind, message):
    with pytest.raises(kind, match=message):
        gb.LBFGS(**bad)


def test_a_minimizer_makes_the_step_instead():
    """SciPy's, over loss and gradient with the penalty: it ends where LBFGS does, in one epoch."""
    x, y, model = line()
    found = []

    def search(function, weights):
        found.append(minimize(function, weights, method="L-BFGS-B", jac=True))
        return found[-1].x

    trainer = gb.Trainer(model, "mse", gb.LBFGS(minimizer=search), metrics=["mse"], l2=0.1, seed=0)
    history = trainer.fit(x, y, epochs=50)
    assert len(found) == len(history["loss"]) == 2  # the second changes nothing, which ends training
    assert history["loss"] == pytest.approx([found[0].fun] * 2, rel=1e-12)
    ours = line()[2]
    gb.Trainer(ours, "mse", gb.LBFGS(), l2=0.1, seed=0).fit(x, y, epochs=50)
    assert trainer.evaluate(x, y)["loss"] == pytest.approx(
        gb.Trainer(ours, "mse", l2=0.1).evaluate(x, y)["loss"], abs=1e-12
    )


def test_a_plan_is_bound_and_searches_nothing():
    *_, model = line()
    trainer = gb.Trainer(model, "mse", gb.LBFGS(), seed=0)
    before = model.state_dict()
    assert "gemm" in str(trainer.plan(7)) and trainer.plan(7).launches
    assert all((value == before[key]).all() for key, value in model.state_dict().items())


def test_a_copy_goes_on_as_the_trainer_does():
    x, y = gb.datasets.digits()
    trainer = gb.Trainer(gb.mlp([64, 8, 10], "tanh", dtype="float64"), optimizer=gb.LBFGS(), l2=1e-3, seed=0)
    trainer.fit(x[:200], y[:200], epochs=4)
    twin = copy.deepcopy(trainer)
    for t in (trainer, twin):
        t.fit(x[:200], y[:200], epochs=3)
    for key, value in trainer.model.state_dict().items():
        np.testing.assert_array_equal(value, twin.model.state_dict()[key])


def test_what_was_learnt_of_other_shapes_is_forgotten():
    """A layer made wider: the next step is that of a new trainer, down the gradient."""

    class Net(gb.Layer):
        def __init__(self):
            self.hidden, self.out = gb.Dense(64, 8, "tanh"), gb.Dense(8, 10)

        def forward(self, x):
            return self.out(self.hidden(x))

    x, y = gb.datasets.digits()
    model = Net()
    trainer = gb.Trainer(model, optimizer=gb.LBFGS(), precision="float64", seed=0)
    trainer.fit(x[:200], y[:200], epochs=4)
    model.hidden, model.out = gb.Dense(64, 16, "tanh"), gb.Dense(16, 10)
    model.initialize(1)
    fresh = gb.Trainer(copy.deepcopy(model), optimizer=gb.LBFGS(), precision="float64", seed=0)
    for t in (trainer, fresh):
        t.fit(x[:200], y[:200], epochs=2, shuffle=False)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, fresh.model.state_dict()[key])


@pytest.mark.parametrize("layer", [gb.Dropout(0.5), gb.InputNoise(0.1)], ids=repr)
def test_losses_that_are_drawn_anew_cannot_be_compared(layer):
    x, y, _ = line()
    trainer = gb.Trainer(gb.Sequential(layer, gb.Dense(1, 1)), "mse", gb.LBFGS(), seed=0)
    with pytest.raises(
        ValueError, match="LBFGS compares the losses of one step and the next, but layer '0' draws anew"
    ):
        trainer.fit(x, y, epochs=1)
