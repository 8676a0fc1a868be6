"""A frame's columns are taken by name wherever a model knows their names, and never silently in another order."""

import copy
import pickle
from itertools import permutations

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.data import by_name, column_names

NAMES = ("a", "b", "c")
RNG = np.random.default_rng(2)
VALUES = RNG.normal([1, 100, -5], [1, 30, 0.1], size=(60, 3))
LABELS = (VALUES[:, 0] + VALUES[:, 1] / 30 > 4).astype(int)
NUMBERS = np.stack([VALUES[:, 0], VALUES[:, 1] / 30], 1)


class Polars:
    """As much of a polars frame as there need be: text names in a list, select, to_numpy, no iloc."""

    def __init__(self, values, columns):
        self.values, self.columns, self.shape = np.asarray(values), list(columns), np.shape(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        return Polars(self.values[rows], self.columns)

    def select(self, names):
        return Polars(self.values[:, [self.columns.index(n) for n in names]], names)

    def to_numpy(self):
        return self.values


class Bare:
    """Anything with names and values."""

    def __init__(self, values, columns):
        self.values, self.columns, self.shape = np.asarray(values), tuple(columns), np.shape(values)

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return self.values.astype(dtype or self.values.dtype)


def pandas(values, columns):
    return pytest.importorskip("pandas").DataFrame(np.asarray(values), columns=list(columns))


KINDS = pytest.mark.parametrize("frame", [pandas, Polars, Bare], ids=["pandas", "polars", "bare"])
ORDERS = pytest.mark.parametrize("order", [p for p in permutations(range(3)) if p != (0, 1, 2)], ids=str)


def turned(frame, order, values=VALUES, names=NAMES):
    return frame(values[:, list(order)], [names[i] for i in order])


def trainer(frame=None, epochs=3):
    model = gb.Sequential(gb.Scaler(3).fit(VALUES), gb.Dense(3, 8, "tanh"), gb.Dense(8, 2))
    t = gb.Trainer(model, optimizer=gb.Adam(0.01), seed=0)
    if frame:
        t.fit(frame(VALUES, NAMES), LABELS, epochs=epochs, batch_size=20)
    return t


@KINDS
@ORDERS
def test_everything_that_reads_rows_takes_them_by_name(frame, order):
    t, x = trainer(frame), turned(frame, order)
    expected = trainer()
    expected.fit(VALUES, LABELS, epochs=3, batch_size=20)
    assert t.model.feature_names == NAMES and expected.model.feature_names is None
    np.testing.assert_array_equal(t.predict(x), expected.predict(VALUES))
    np.testing.assert_array_equal(t.model.predict_proba(x), expected.model.predict_proba(VALUES))
    np.testing.assert_array_equal(t.model.predict_classes(x), expected.model.predict_classes(VALUES))
    np.testing.assert_array_equal(t.model(x).numpy(), expected.model(VALUES).numpy())
    assert t.evaluate(x, LABELS) == expected.evaluate(VALUES, LABELS)
    np.testing.assert_array_equal(gb.sensitivity(t, x, LABELS, 1), gb.sensitivity(expected, VALUES, LABELS, 1))
    assert str(gb.gradient_report(t, x, LABELS)) == str(gb.gradient_report(expected, VALUES, LABELS))
    assert gb.shrink(t.model, x).parameter_count == gb.shrink(expected.model, VALUES).parameter_count
    for one, rows in ((t, x), (expected, VALUES)):
        one.fit(rows, LABELS, epochs=2, batch_size=20, validation_data=(rows, LABELS))
    for key, values in expected.history.items():
        np.testing.assert_array_equal(t.history[key], values)


@KINDS
def test_validation_rows_of_the_first_fit_go_by_its_names(frame):
    t, expected = trainer(), trainer()
    t.fit(frame(VALUES, NAMES), LABELS, epochs=2, validation_data=(turned(frame, (2, 0, 1)), LABELS))
    expected.fit(VALUES, LABELS, epochs=2, validation_data=(VALUES, LABELS))
    assert t.history == expected.history


@KINDS
def test_a_scaler_knows_the_names_it_was_fitted_on(frame):
    scaler = gb.Scaler(3).fit(frame(VALUES, NAMES))
    plain = gb.Scaler(3).fit(VALUES)
    np.testing.assert_array_equal(scaler.predict(turned(frame, (1, 2, 0))), plain.predict(VALUES))
    model = gb.Sequential(scaler, gb.Dense(3, 2))
    t = gb.Trainer(model, seed=0)
    t.fit(VALUES, LABELS, epochs=1)
    np.testing.assert_array_equal(t.predict(turned(frame, (1, 2, 0))), t.predict(VALUES))
    t.fit(turned(frame, (2, 1, 0)), LABELS, epochs=1)
    assert model.feature_names == NAMES
    mean = scaler.mean.numpy()
    scaler.fit(turned(frame, (2, 1, 0)))  # the same columns: their order stays that of the weights behind it
    np.testing.assert_array_equal(scaler.mean.numpy(), mean)
    scaler.fit(frame(VALUES, "xyz"))
    assert scaler.feature_names == ("x", "y", "z")


def test_a_scaler_of_targets_does_not_name_the_inputs():
    pd = pytest.importorskip("pandas")
    y = pd.DataFrame(NUMBERS, columns=["u", "v"])
    model = gb.Sequential(gb.Dense(3, 2), gb.Scaler(2, inverse=True).fit(y))
    assert model.feature_names is None
    gb.Trainer(model, "mse", seed=0).fit(pandas(VALUES, NAMES), y, epochs=1)
    assert model.feature_names == NAMES and model.target_names == ("u", "v")


@KINDS
def test_targets_of_several_columns_go_by_name_too(frame):
    def fitted(*y):
        t = gb.Trainer(gb.mlp([3, 2]), "mse", gb.SGD(1e-5), seed=0)
        for each in y:
            t.fit(VALUES, each, epochs=1, validation_data=(VALUES, y[-1]))
        return t

    straight, swapped = frame(NUMBERS, "uv"), frame(NUMBERS[:, ::-1], "vu")
    a, b = fitted(straight, swapped), fitted(NUMBERS, NUMBERS)
    assert a.history == b.history
    assert a.evaluate(VALUES, swapped) == b.evaluate(VALUES, NUMBERS)
    with pytest.raises(ValueError, match=r"^evaluate: y lacks 'v' and has 'w', which is new; .*target_names = None"):
        a.evaluate(VALUES, frame(NUMBERS, "uw"))
    one = gb.Trainer(gb.mlp([3, 1]), "mse", seed=0)
    one.fit(VALUES, frame(NUMBERS[:, :1], "u"), epochs=1)
    one.evaluate(VALUES, frame(NUMBERS[:, :1], "w"))  # one column goes by any name


@KINDS
def test_other_names_are_an_error_that_lists_them(frame):
    t = trainer(frame)
    before = t.model.state_dict()
    calls = {
        "predict": t.predict, "fit": lambda x: t.fit(x, LABELS[: len(x)], epochs=1),
        "evaluate": lambda x: t.evaluate(x, LABELS[: len(x)]),
        "fit: validation_data": lambda x: t.fit(VALUES, LABELS, validation_data=(x, LABELS)),
    }  # fmt: skip
    for where, call in calls.items():
        message = (
            r"x lacks 'c' and has 'd', which is new; the model knows the columns 'a', 'b', 'c'; pass these, in any "
        )
        with pytest.raises(ValueError, match=rf"^{where}: {message}order \(model\.feature_names = None"):
            call(frame(VALUES, "abd"))
        with pytest.raises(ValueError, match=f"^{where}: x has 'd', which is new"):
            call(frame(np.hstack([VALUES, VALUES[:, :1]]), "abcd"))
        with pytest.raises(ValueError, match=f"^{where}: x lacks 'b', 'c';"):
            call(frame(VALUES[:, :1], "a"))
    assert all((t.model.state_dict()[k] == v).all() for k, v in before.items())
    assert t.model.feature_names == NAMES
    t.model.feature_names = None
    np.testing.assert_array_equal(t.predict(frame(VALUES, "abd")), t.predict(VALUES))


@KINDS
def test_what_has_no_text_names_goes_by_position(frame):
    t = trainer(frame)
    for x in (VALUES, VALUES.tolist(), frame(VALUES, (0, 1, 2))):
        np.testing.assert_array_equal(t.predict(x), t.predict(VALUES))
    t = trainer()
    t.fit(frame(VALUES, (0, 1, 2)), LABELS, epochs=1)
    assert t.model.feature_names is None


def test_a_refused_fit_names_nothing():
    t = trainer()
    with pytest.raises(ValueError, match="out of range"):
        t.fit(pandas(VALUES, NAMES), LABELS + 5, epochs=1)
    with pytest.raises(ValueError, match="not measured"):
        t.fit(pandas(VALUES, NAMES), LABELS, epochs=1, callbacks=[gb.EarlyStopping("val_loss")])
    assert t.model.feature_names is None


def test_a_name_that_stands_twice_goes_by_position_alone():
    t = trainer()
    t.fit(Bare(VALUES, "aab"), LABELS, epochs=1)
    np.testing.assert_array_equal(t.predict(Bare(VALUES, "aab")), t.predict(VALUES))
    with pytest.raises(ValueError, match="columns of one name in another order"):
        t.predict(Bare(VALUES, "aba"))


@pytest.mark.parametrize("through", ["pickle", "deepcopy", "file", "trainer"])
def test_the_names_go_where_the_model_goes(through, tmp_path):
    t = trainer(pandas)
    x = turned(pandas, (1, 2, 0))
    if through == "file":
        gb.save_model(t.model, tmp_path / "m.safetensors")
        other = gb.load_model(tmp_path / "m.safetensors", "cpu")
    else:
        other = {"pickle": lambda m: pickle.loads(pickle.dumps(m)), "deepcopy": copy.deepcopy,
                 "trainer": lambda m: pickle.loads(pickle.dumps(t)).model}[through](t.model)  # fmt: skip
    assert other.feature_names == NAMES
    np.testing.assert_array_equal(other.predict(x), t.predict(VALUES))


def test_parts_of_a_frame_keep_their_names():
    x, x_test, y, y_test = gb.split(turned(pandas, (2, 1, 0)), LABELS, test=0.25)
    t = trainer(pandas)
    assert t.evaluate(x_test, y_test) == t.evaluate(x_test[list(NAMES)].to_numpy(), y_test)
    assert t.evaluate(x, y) == t.evaluate(x[list(NAMES)].to_numpy(), y)
    for rows, _ in gb.KFold(3).split(x, y):
        t.fit(x.iloc[rows], y[rows], epochs=1)
    assert t.model.feature_names == NAMES


def test_names_may_be_given():
    model = gb.mlp([3, 2]).initialize(0)
    model.feature_names = ["a", "b", "c"]
    np.testing.assert_array_equal(model.predict(turned(pandas, (2, 0, 1))), model.predict(VALUES))
    with pytest.raises(TypeError, match="feature_names: a list of the columns' names expected"):
        model.feature_names = "abc"


@pytest.mark.parametrize("labels", [
    (0, 1, 2), (0, "0", "b"), (2020, 2021, 2022), (0.5, 1.5, 2.5), ("a", "b", None), (("a", 1), ("a", 2), ("b", 1)),
])  # fmt: skip
def test_labels_of_any_kind_name_columns(labels):
    def columns(order):
        return Bare(VALUES[:, order], [labels[i] for i in order])

    t = trainer()
    t.fit(columns([0, 1, 2]), LABELS, epochs=1)
    np.testing.assert_array_equal(t.predict(columns([2, 0, 1])), t.predict(VALUES))
    if labels != (0, 1, 2):
        with pytest.raises(ValueError, match="lacks"):
            t.predict(Bare(VALUES, "xyz"))


def test_rearranging_keeps_a_frame_a_frame():
    for frame in (pandas, Polars):
        assert column_names(by_name(turned(frame, (2, 0, 1)), NAMES, "here")) == NAMES
    same = pandas(VALUES, NAMES)
    assert by_name(same, NAMES, "here") is same


def test_a_file_keeps_numbers_and_says_which_labels_it_cannot(tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 3)), columns=[10, 2.5, "c"])
    trainer = gb.Trainer(gb.mlp([3, 1]), "mse", seed=0)
    trainer.fit(frame, frame["c"], epochs=1)
    gb.save_model(trainer.model, tmp_path / "m.safetensors")
    again = gb.load_model(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(again.predict(frame[["c", 10, 2.5]]), trainer.predict(frame))
    trainer.model.feature_names = pd.date_range("2020", periods=3)
    with pytest.warns(RuntimeWarning, match="feature_names has Timestamp.*; a file keeps text and numbers"):
        gb.save_model(trainer.model, tmp_path / "m.safetensors")
    assert gb.load_model(tmp_path / "m.safetensors").feature_names is None
