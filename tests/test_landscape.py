"""Landscapes: descent is the trainer's own, surfaces are exact at their points, planes go through the weights."""

import copy

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.landscape import Plane, descend, line_loss, plane, race, racers, saddle, steps_until, surface, valley
from gpubackprop.optimizers import OPTIMIZERS


def escaped(point):
    return abs(point[1]) > 1


# ---- descent -------------------------------------------------------------------------------------------------------


def test_seed_29_steps_to_leave_the_saddle():
    paths = race(saddle, (-1.0, 1e-6), steps=700)
    left = {name: steps_until(path, escaped) for name, path in paths.items()}
    assert {name: left[name] for name in ("SGD", "momentum", "RMSprop", "Adam")} == {
        "SGD": 698, "momentum": 140, "RMSprop": 72, "Adam": 77}  # fmt: skip
    assert {path.shape for path in paths.values()} == {(701, 2)}


def test_seed_29_plain_descent_never_leaves_the_ridge():
    path = descend(saddle, (-1.0, 0.0), gb.SGD(0.01), 1000)
    assert (path[:, 1] == 0).all() and abs(path[-1, 0]) < 1e-8


def test_descent_is_the_recurrence():
    """p ← p − lr ∇f(p), bit by bit where the gradient is one product."""
    path = descend(saddle, (1.0, 0.5), gb.SGD(0.01), 50)
    x, y = 1.0, 0.5
    for point in path:
        assert point.tolist() == [x, y]
        x, y = x - 0.01 * (2 * x), y - 0.01 * (-2 * y)
    assert path.dtype == np.float64


def test_descent_on_the_line_trains_the_line():
    """The same points as a network of one weight and one bias has after every step."""
    model = gb.Sequential(gb.Dense(1, 1, init="zeros"), dtype="float64")
    trainer = gb.Trainer(model, "mse", gb.Adam(0.05), metrics=[], seed=0, device="cpu")
    points = [[0.0, 0.0]]

    def note(t):
        points.append([p.item() for p in t.model.named_parameters().values()])

    x, y = gb.datasets.regression7()
    trainer.fit(x, y, epochs=40, batch_size=7, shuffle=False, callbacks=[note], progress=False)
    np.testing.assert_allclose(descend(line_loss, (0, 0), gb.Adam(0.05), 40), points, rtol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_down(name):
    path = descend(line_loss, (-0.5, 1.0), name, 200)
    assert path.shape == (201, 2) or name == "lbfgs"
    assert path[0].tolist() == [-0.5, 1.0] and line_loss(*path[-1]) < line_loss(*path[0])
    assert np.array_equal(path, descend(line_loss, np.array([-0.5, 1.0]), OPTIMIZERS[name](), 200))


def test_lbfgs_ends_where_it_stands():
    path = descend(valley, (-1.2, 1.0), "lbfgs", 200)
    assert len(path) < 60 and np.abs(path[-1] - 1).max() < 1e-6


def test_schedules_go_by_steps_and_by_epochs():
    for per in ("updates", "epochs"):
        x = descend(lambda x: x * x, [1.0], gb.SGD(gb.schedules.Exponential(0.1, 0.5, per=per)), 3)[:, 0]
        np.testing.assert_allclose(x[1:] / x[:-1], [0.8, 0.9, 0.95])
    x = descend(lambda x: x * x, [1.0], gb.SGD(lambda t: 0.1 if t < 2 else 0.25), 3)[:, 0]
    np.testing.assert_allclose(x[1:] / x[:-1], [0.8, 0.8, 0.5])


def test_one_argument_or_several():
    assert descend(lambda x: (x - 3) ** 2, [0.0], gb.SGD(0.5), 1).tolist() == [[0.0], [3.0]]
    path = descend(lambda a, b, c: a * a + 2 * b, (1.0, 1.0, 1.0), gb.SGD(0.25), 2)
    assert path.tolist() == [[1, 1, 1], [0.5, 0.5, 1], [0.25, 0, 1]]  # what does not matter stays


@pytest.mark.parametrize("optimizer", [gb.SGD(0.01), gb.SGD(0.01, momentum=0.9), "lbfgs"])
def test_a_diverging_path_ends_and_says_so(optimizer):
    function, start = (saddle, (1.0, 1e-6)) if optimizer == "lbfgs" else (valley, (-1.2, 1.0))
    with pytest.warns(RuntimeWarning, match=r"descend: step \d+ of (SGD|LBFGS)\(.*NaN or infinite; the path ends") as w:
        path = descend(function, start, optimizer, 300)
    assert len(w) == 1 and w[0].filename == __file__
    assert 1 < len(path) < 301 and np.isfinite(path).all()
    assert f"step {len(path)} of" in str(w[0].message)


def test_a_start_that_is_not_finite_there():
    with pytest.warns(RuntimeWarning, match="step 1 of"):
        assert descend(lambda x: gb.log(x), [-1.0], "sgd", 5).tolist() == [[-1.0]]


@pytest.mark.parametrize("arguments, error, message", [
    ((saddle, 1.0), TypeError, "descend: start is 1.0; expected a number for each argument"),
    ((saddle, "12"), TypeError, "descend: start is '12'"),
    ((saddle, ()), TypeError, r"descend: start is \(\)"),
    ((saddle, (1, "2")), TypeError, r"descend: start\[1\] must be a number, got str '2'"),
    ((saddle, (1, np.inf)), ValueError, r"descend: start\[1\] must be finite, got inf"),
    ((saddle, np.ones((1, 2))), TypeError, r"descend: start\[0\] must be a number"),
    ((saddle, (1, 2), "adm"), ValueError, "unknown optimizer 'adm'; choose from"),
    ((saddle, (1, 2), "sgd", 0), ValueError, "descend: steps must be at least 1, got 0"),
    ((3, (1, 2)), TypeError, "descend: function is int; expected one of tensors"),
    ((lambda x: 1.0, [1]), TypeError, "descend: the function returned float; expected a tensor of one element"),
    ((lambda x: gb.stack([x, x]), [1]), TypeError, r"descend: the function returned shape \(2,\)"),
    ((lambda x: x if x > 0 else -x, [1]), RuntimeError, "use gb.where"),
])  # fmt: skip
def test_descend_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        descend(*arguments)


def test_races_have_the_optimizers_that_are_given():
    paths = race(saddle, (1, 1), {"a": gb.SGD(0.1), "b": "adam"}, steps=3)
    assert list(paths) == ["a", "b"] and np.array_equal(paths["b"], descend(saddle, (1, 1), gb.Adam(), 3))
    assert list(race(saddle, (1, 1), steps=1)) == list(racers())
    assert {o.lr for name, o in racers(0.3).items() if name != "Adadelta"} == {0.3}
    for wrong in ({}, ["adam"]):
        with pytest.raises(TypeError, match=r"race: optimizers is .*; expected them by name"):
            race(saddle, (1, 1), wrong)


def test_steps_until():
    path = np.array([[0.0], [1.0], [2.0], [1.0]])
    assert [steps_until(path, lambda p, least=least: p[0] >= least) for least in (0, 1, 2, 3)] == [0, 1, 2, None]


# ---- surfaces ------------------------------------------------------------------------------------------------------


def test_seed_25_the_grid_of_the_line():
    found = surface(line_loss, (-2, 4), (-6, 8), step=0.01)
    assert found.values.shape == (1401, 601) and found.names == ("m", "b")
    m, b, value = found.lowest
    assert (m, b) == (0.34, 0.79) and value == pytest.approx(0.0180663, abs=5e-8)
    for axis, low, high in ((found.first, -2, 4), (found.second, -6, 8)):
        assert (axis[0], axis[-1]) == (low, high)
        assert axis.tolist() == [float(f"{low + k / 100:.2f}") for k in range(len(axis))]  # not 0.33999999999999986


def test_rows_are_the_second_axis():
    found = surface(lambda x, y: x + 10 * y, (0, 2), (0, 1), step=1)
    assert found.values.tolist() == [[0, 1, 2], [10, 11, 12]] and found.names == ("x", "y")
    assert surface(saddle, (-1, 1), (0, 3), points=5).values.shape == (5, 5)
    assert surface(lambda *point: saddle(*point), (0, 1), (0, 1)).names == ("x", "y")
    assert surface(lambda x, y: x, (0, 1), (0, 1), step=0.1).values.shape == (11, 11)


def test_the_function_is_called_once_with_tensors():
    calls = []

    def noted(a, b):
        calls.append((a.shape, b.shape, a.dtype))
        return a * b

    surface(noted, (0, 1), (0, 2), step=0.5)
    assert calls == [((5, 3), (5, 3), np.float64)]


def test_the_lowest_point_is_finite():
    found = surface(lambda x, y: gb.log(x) + 0 * y, (-1, 1), (0, 1), step=0.5)
    assert found.lowest == (0.5, 0.0, np.log(0.5))


@pytest.mark.parametrize("arguments, options, error, message", [
    ((lambda x, y: x.sum(), (0, 1), (0, 1)), {"points": 3}, TypeError,
     r"surface: the function returned a tensor of shape \(\), expected a tensor of shape \(3, 3\); .*elementwise"),
    ((lambda x, y: 1.0, (0, 1), (0, 1)), {}, TypeError, "surface: the function returned float, expected a tensor"),
    ((saddle, (0, 1), (0, 0.25)), {"step": 0.1}, ValueError,
     "surface: second: from 0 to 0.25 are 2.5 steps of 0.1, expected a whole number; try step=0.125, or points"),
    ((saddle, (0, 1), (0, 1)), {"step": 3}, ValueError, "surface: first: from 0 to 1 are 0.333333 steps of 3"),
    ((saddle, (0, 1), (0, 1)), {"step": -0.1}, ValueError, "surface: step must be > 0, got -0.1"),
    ((saddle, (0, 1), (0, 1)), {"points": 1}, ValueError, "surface: points must be at least 2, got 1"),
    ((saddle, (1, 1), (0, 1)), {}, ValueError, "surface: first: low 1 must be less than high 1"),
    ((saddle, (0, 1), 3), {}, TypeError, "surface: second is 3; expected a pair of numbers"),
    ((lambda x, y: gb.log(x) + y, (-2, -1), (0, 1)), {}, ValueError, "surface: no value is finite"),
])  # fmt: skip
def test_surface_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        surface(*arguments, **options)


@pytest.mark.parametrize("function", [line_loss, saddle, valley])
def test_named_functions(function, rng):
    """Of numbers, arrays and tensors alike, and their gradients are right."""
    a, b = rng.normal(size=(2, 4, 3))
    of_arrays = function(a, b)
    np.testing.assert_allclose(function(gb.tensor(a), gb.tensor(b)).numpy(), of_arrays, rtol=1e-12)
    assert function(a[0, 0], b[0, 0]) == pytest.approx(of_arrays[0, 0], rel=1e-12)
    gb.gradcheck(function, (np.array(0.3), np.array(-0.7)))
    least = {line_loss: (0.335593220339, 0.804721549637, 0.018051885161), saddle: (0, 0, 0), valley: (1, 1, 0)}
    *at, value = least[function]
    assert function(*at) == pytest.approx(value, abs=1e-12)
    assert valley(0.0, 0.0) == 1 and valley(0.0, 1.0) == 101 and saddle(2.0, 1.0) == 3


# ---- planes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    """A trainer after some epochs, its rows, and its states after each."""
    x, y = gb.datasets.digits()
    x, y = x[:200], y[:200]
    trainer = gb.Trainer(gb.mlp([64, 16, 10], dropout=0.2), optimizer=gb.Adam(0.01), l2=1e-3, seed=0, device="cpu")
    states = [trainer.model.state_dict()]
    trainer.fit(x, y, 6, 50, progress=False, callbacks=[lambda t: states.append(t.model.state_dict()) or None])
    return trainer, x, y, states


def test_a_plane_goes_through_the_weights(trained):
    trainer, x, y, _ = trained
    before = copy.deepcopy(trainer.model.state_dict())
    found = plane(trainer, x, y)
    assert isinstance(found, Plane) and found.path is found.share is None
    assert found(0, 0).item() == trainer.evaluate(x, y)["loss"]
    moved = copy.deepcopy(trainer)
    moved.model.load_state_dict({k: w + 0.5 * found.u[k] - 0.25 * found.v[k] for k, w in found.origin.items()})
    assert found(0.5, -0.25).item() == pytest.approx(moved.evaluate(x, y)["loss"], rel=1e-6)
    assert all(np.array_equal(w, before[k]) for k, w in trainer.model.state_dict().items())


def test_directions_are_as_long_as_each_units_weights(trained):
    trainer, x, y, _ = trained
    found, again, other = plane(trainer, x, y), plane(trainer, x, y), plane(trainer, x, y, seed=1)
    for d in (found.u, found.v):
        for k, w in found.origin.items():
            axis = 0 if w.ndim == 2 else None
            np.testing.assert_allclose(np.linalg.norm(d[k], axis=axis), np.linalg.norm(w, axis=axis), rtol=1e-12)
    for k in found.u:
        assert np.array_equal(found.u[k], again.u[k]) and not np.allclose(found.u[k], other.u[k])
        assert not np.allclose(found.u[k], found.v[k])


def test_the_plane_of_a_path_holds_it(trained):
    """The last state is the trainer's, at (0, 0); near the plane the loss is that of the states."""
    trainer, x, y, states = trained
    found = plane(trainer, x, y, states)
    u, v = (np.concatenate([d[k].ravel() for k in found.origin]) for d in (found.u, found.v))
    np.testing.assert_allclose([u @ u, v @ v, u @ v], [1, 1, 0], atol=1e-12)
    assert found.path.shape == (7, 2) and np.abs(found.path[-1]).max() < 1e-6
    assert 0.9 < found.share <= 1
    assert plane(trainer, x, y, states[:3]).share == pytest.approx(1)  # three points span their plane, wherever it is
    middle = plane(trainer, x, y, states[-3:])
    assert middle.share == pytest.approx(1)
    for state, at in zip(states[-3:], middle.path, strict=True):
        there = copy.deepcopy(trainer)
        there.model.load_state_dict(state)
        assert middle(*at).item() == pytest.approx(there.evaluate(x, y)["loss"], rel=1e-5)


def test_a_plane_is_a_function_for_surface(trained):
    trainer, x, y, _ = trained
    found = surface(plane(trainer, x, y), (-1, 1), (-1, 1), points=5)
    assert found.names == ("a", "b") and found.values.shape == (5, 5)
    assert found.values[2, 2] == trainer.evaluate(x, y)["loss"] == found.lowest[2]


def test_what_is_frozen_stays(trained):
    trainer, x, y, _ = trained
    trainer.model.layers[0].weight.requires_grad = False
    assert "0.weight" not in plane(trainer, x, y).u


@pytest.mark.parametrize("path, message", [
    ([], "plane: the 0 states of path lie on a line"),
    ([0, 1], "plane: the 2 states of path lie on a line, which spans no plane; expected three or more"),
    ([1, 1, 1, 1], "plane: the 4 states of path lie on a line"),
    ([0, 1, {}], r"plane: path\[2\] is not a state of this model; expected what model.state_dict\(\) returns"),
    ([0, 1, 7], r"plane: path\[2\] is not a state"),
])  # fmt: skip
def test_plane_refuses(path, message, trained):
    trainer, x, y, states = trained
    with pytest.raises(ValueError, match=message):
        plane(trainer, x, y, [states[k] if k in (0, 1) and isinstance(k, int) else k for k in path])


def test_plane_takes_trainers():
    with pytest.raises(TypeError, match="plane: trainer is Sequential; expected a Trainer"):
        plane(gb.mlp([2, 2]), [[1, 2]], [0])


def test_a_plane_is_measured_and_cannot_be_descended(rng):
    trainer = gb.Trainer(gb.mlp([3, 4, 2]), seed=0)
    plane = gb.landscape.plane(trainer, rng.normal(size=(9, 3)), rng.integers(0, 2, 9))
    with pytest.raises(RuntimeError, match=r"plane: the loss over a plane is measured, not differentiated; .* as path"):
        gb.descend(plane, (1.0, 1.0), gb.Adam(0.05), 3)


def test_racers_may_have_a_rate_of_their_own_for_adaptive_ones():
    rates = {name: optimizer.lr for name, optimizer in gb.landscape.racers(0.1, 0.5).items()}
    assert rates == {"SGD": 0.1, "momentum": 0.1, "Nesterov": 0.1, "Adagrad": 0.5, "Adadelta": 1.0, "RMSprop": 0.5,
                     "Adam": 0.5}  # fmt: skip
