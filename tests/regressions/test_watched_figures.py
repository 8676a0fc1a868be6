"""Figures that are watched improve in a known direction, and stand in the history once per epoch."""

import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpubackprop as gb
from gpubackprop.metrics import METRICS
from gpubackprop.rates import FALLING, RISING
from gpubackprop.schedules import Plateau

nan = math.nan


class Writes:
    """A callback that appends these to a figure; None: not in that epoch."""

    def __init__(self, key, values):
        self.key, self.values = key, iter(values)

    def __call__(self, trainer):
        value = next(self.values)
        if value is not None:
            trainer.history.setdefault(self.key, []).append(value)


def trainer(**how):
    return gb.Trainer(gb.mlp([2, 1]), "mse", gb.SGD(0.01), seed=0, **how)


X = np.random.default_rng(0).normal(size=(8, 2))
Y = X.sum(1)


def weights(t):
    return t.model.state_dict()["0.weight"].copy()


def test_every_metric_of_the_library_has_a_direction():
    assert set(METRICS) <= {*RISING, *FALLING}
    assert not {*RISING} & {*FALLING}


@pytest.mark.parametrize("mode, best", [("max", 3), ("min", 1)])
def test_a_figure_of_a_callbacks_own_improves_as_mode_says(mode, best):
    values, kept = [0.1, 0.5, 0.89, 0.4, 0.3], {}
    stop = gb.EarlyStopping("val_f1", patience=9, mode=mode)
    t = trainer()
    t.fit(X, Y, epochs=5, callbacks=[Writes("val_f1", values), stop, lambda t: kept.update({t.epoch: weights(t)})])
    assert (stop.best_epoch, stop.best) == (best, values[best - 1])
    np.testing.assert_array_equal(weights(t), kept[best])
    assert t.history["val_f1"] == values


@pytest.mark.parametrize("mode, values, stops", [("max", [1, 1.4, 1.6, 1.9], 4), ("min", [-1, -1.4, -1.6, -1.9], 4)])
def test_min_delta_goes_the_same_way(mode, values, stops):
    stop = gb.EarlyStopping("mine", patience=9, min_delta=0.5, mode=mode)
    t = trainer()
    t.fit(X, Y, epochs=4, callbacks=[Writes("mine", values), stop])
    assert (t.epoch, stop.best_epoch) == (stops, 3)


@pytest.mark.parametrize("make", [gb.EarlyStopping, lambda *a, **k: Plateau(0.1, monitor=a[0] if a else None, **k)])
def test_an_unknown_figure_needs_a_mode_and_known_ones_do_not(make):
    for name in ("val_f1", "auc", "val_los"):
        with pytest.raises(ValueError, match=f"'{name}' is no figure of the library's own .*mode='max' or mode='min'"):
            make(name)
        make(name, mode="max")
    for name in (*RISING, *FALLING):
        make(name), make(f"val_{name}"), make(name, mode="min")
    make()
    with pytest.raises(ValueError, match="unknown mode 'up'; choose from 'auto', 'max', 'min'"):
        make("loss", mode="up")
    with pytest.raises(TypeError, match="monitor must be the name of a figure"):
        make(3)


def test_a_mode_overrides_what_is_known():
    x, y = gb.datasets.digits()
    stop = gb.EarlyStopping("accuracy", patience=9, mode="min")
    t = gb.Trainer(gb.mlp([64, 16, 10]), seed=0)
    values = t.fit(x[:300], y[:300], epochs=6, callbacks=[stop])["accuracy"]
    assert stop.best == min(values) == values[stop.best_epoch - 1] < max(values)


def test_plateau_follows_the_mode():
    history = {"f1": [0.1, 0.2, 0.3, 0.3, 0.3]}
    up, down = (Plateau(1.0, patience=2, monitor="f1", mode=mode) for mode in ("max", "min"))
    assert [p.rates(np.zeros(1), 5, history)[0] for p in (up, down)] == pytest.approx([0.1, 0.01])


# ---- one value per epoch -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=4))
def test_what_callbacks_append_lines_up_with_the_epochs(fits):
    """However fits with and without the callback follow on each other, and in whichever epochs it writes."""
    t, expected = trainer(), []
    for i, values in enumerate(fits):
        t.fit(X, Y, epochs=len(values), callbacks=[Writes("mine", values)] if i % 2 == 0 else [])
        expected += values if i % 2 == 0 else [None] * len(values)
    if any(v is not None for v in expected):
        np.testing.assert_array_equal(t.history["mine"], [nan if v is None else v for v in expected])
    assert {len(v) for v in t.history.values()} == {len(expected)}


def test_a_callback_sees_its_own_figure_without_gaps():
    seen = []

    def write(t):
        t.history.setdefault("mine", []).append(float(t.epoch))
        seen.append(list(t.history["mine"]))

    trainer().fit(X, Y, epochs=3, callbacks=[write])
    assert seen == [[1], [1, 2], [1, 2, 3]]


def test_of_several_values_in_an_epoch_the_last_stands():
    t = trainer()
    t.fit(X, Y, epochs=3, callbacks=[Writes("mine", [1, 2, 3]), Writes("mine", [4, 5, 6])])
    assert t.history["mine"] == [4, 5, 6]


def test_a_callback_that_fails_leaves_a_history_in_step():
    t = trainer()
    with pytest.raises(StopIteration):
        t.fit(X, Y, epochs=5, callbacks=[Writes("mine", [1, 2])])
    np.testing.assert_array_equal(t.history["mine"], [1, 2, nan])


def test_the_librarys_figures_are_there_when_callbacks_run():
    t, seen = trainer(), []
    t.fit(X, Y, epochs=1, validation_data=(X, Y))
    t.fit(X, Y, epochs=1, callbacks=[lambda t: seen.append(t.history["val_loss"][-1])])
    assert math.isnan(seen[0])


@pytest.mark.parametrize("fits", [1, 2])
def test_the_callback_that_writes_comes_first(fits):
    t, stop = trainer(), gb.EarlyStopping("mine", mode="max")
    if fits == 2:
        t.fit(X, Y, epochs=2, callbacks=[Writes("mine", [1, 2]), stop])
    with pytest.raises(ValueError, match=r"EarlyStopping: .*'mine'.*a callback that writes it comes before"):
        t.fit(X, Y, epochs=3, callbacks=[stop, Writes("mine", [1, 2, 3])])


# ---- figures that a fit does not measure ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val_loss", "val_r2", "gap", "mae", "accuracy", "lr"])
@pytest.mark.parametrize("by", ["callback", "schedule"])
def test_a_figure_that_is_not_measured_is_refused_before_training(name, by):
    how = {"optimizer": gb.SGD(Plateau(0.1, monitor=name))} if by == "schedule" and name != "lr" else {}
    t = gb.Trainer(gb.mlp([2, 1]), "mse", seed=0, **how)
    t.fit(X, Y, epochs=1, validation_data=(X, Y)) if not how else None
    before, history = weights(t), copy.deepcopy(t.history)
    callbacks = [] if how else [gb.EarlyStopping(name)]
    with pytest.raises(
        ValueError, match=f"(EarlyStopping|Plateau): '{name}' is not measured in this fit, which has loss"
    ):
        t.fit(X, Y, epochs=3, callbacks=callbacks)
    np.testing.assert_array_equal(weights(t), before)
    assert t.history == history


@pytest.mark.parametrize("name", ["loss", "r2", "val_loss", "val_r2", "gap", "lr"])
def test_what_is_measured_can_be_watched(name):
    t = gb.Trainer(gb.mlp([2, 1]), "mse", gb.SGD(Plateau(0.1)), seed=0)
    t.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[gb.EarlyStopping(name)])
    assert t.epoch == 2


# ---- cost ----------------------------------------------------------------------------------------------------------


class Counted(list):
    """A list that counts the elements read from it."""

    reads = 0

    def __getitem__(self, i):
        Counted.reads += len(range(*i.indices(len(self)))) if isinstance(i, slice) else 1
        return super().__getitem__(i)

    def __iter__(self):
        Counted.reads += len(self)
        return super().__iter__()


def test_an_epoch_costs_the_same_however_many_there_were():
    Counted.reads = 0
    plateau, stop = Plateau(0.01, patience=3), gb.EarlyStopping(patience=10**6)
    t = gb.Trainer(gb.mlp([2, 1]), "mse", gb.SGD(plateau), seed=0)
    t.history = {key: Counted([1.0] * 1000) for key in ("loss", "r2", "lr")}
    t.epoch = 1000
    t.fit(X, Y, epochs=1, callbacks=[stop])
    Counted.reads = 0
    t.fit(X, Y, epochs=10, callbacks=[stop])
    assert Counted.reads < 100


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, nan]), min_size=1, max_size=12), st.data())
def test_plateau_counted_on_is_plateau_counted_anew(losses, data):
    """Also where histories alternate, are cut or replaced, and after a copy or a pickle."""
    plateau, history, other = Plateau(1.0, patience=2), {"loss": []}, {"loss": []}

    def anew(h):
        return Plateau(1.0, patience=2).rates(np.zeros(1), 1, {"loss": list(h["loss"])})[0]

    for loss in losses:
        history["loss"].append(loss)
        match data.draw(st.sampled_from(["go on", "other", "cut", "replace", "copy", "pickle"])):
            case "other":
                other["loss"].append(loss)
                assert plateau.rates(np.zeros(1), 1, other)[0] == anew(other)
            case "cut":
                del history["loss"][len(history["loss"]) // 2 + 1 :]
            case "replace":
                history["loss"] = history["loss"][1:] or [loss]
            case "copy":
                plateau, history = copy.deepcopy((plateau, history))
            case "pickle":
                plateau = pickle.loads(pickle.dumps(plateau))
        assert plateau.rates(np.zeros(1), 1, history)[0] == anew(history)
    assert plateau == Plateau(1.0, patience=2)


def test_a_callbacks_figure_may_begin_in_a_later_fit(rng):
    x, y = rng.normal(size=(20, 3)), rng.normal(size=20)
    trainer = gb.Trainer(gb.mlp([3, 1]), "mse", seed=0)
    trainer.fit(x, y, epochs=2)
    found = iter([0.1, 0.9, 0.5, 0.4, 0.3])
    stop = gb.EarlyStopping("auc", patience=2, mode="max")
    auc = lambda t: t.history.setdefault("auc", []).append(next(found))  # noqa: E731
    trainer.fit(x, y, epochs=5, callbacks=[auc, stop])
    assert (stop.best, stop.best_epoch, trainer.epoch) == (0.9, 4, 6)
    assert np.isnan(trainer.history["auc"][:2]).all() and trainer.history["auc"][2:] == [0.1, 0.9, 0.5, 0.4]
