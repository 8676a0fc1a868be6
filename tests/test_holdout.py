"""Rows held out: the laws of split, folds and learning curves, and every error by its message."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import NAN, Frame

import gpubackprop as gb
from gpubackprop.columns import Columns
from gpubackprop.holdout import split

# ---- split -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=8),
    test=st.one_of(st.floats(0.01, 0.99), st.integers(1, 8)),
    seed=st.integers(0, 2**32),
)
def test_split_is_exact_disjoint_complete_and_stratified(sizes, test, seed):
    y = np.repeat(np.arange(len(sizes)), sizes)
    n = len(y)
    if isinstance(test, int) and test >= n:
        test = n - 1
    x = np.arange(n)[:, None]
    x_fit, x_test, y_fit, y_test, z_fit, z_test = split(x, y, x.ravel().tolist(), test=test, seed=seed)

    count = test if isinstance(test, int) else min(max(round(test * n), 1), n - 1)
    assert len(x_test) == len(y_test) == count and len(x_fit) == len(y_fit) == n - count
    assert sorted([*x_fit.ravel(), *x_test.ravel()]) == list(range(n))
    np.testing.assert_array_equal(y_fit, y[x_fit.ravel()])
    np.testing.assert_array_equal(y_test, y[x_test.ravel()])
    np.testing.assert_array_equal(np.append(z_fit, z_test), np.append(x_fit, x_test))

    shares = np.bincount(y_test, minlength=len(sizes))
    quota = np.array(sizes) * count / n
    if count >= len(sizes):
        assert shares.min() >= 1
    if n - count >= len(sizes):
        assert (shares < sizes).all()
    if quota.min() >= 1 and (sizes - quota).min() >= 1:  # no class needs a row beyond its proportion
        assert (abs(shares - quota) < 1).all()


@pytest.mark.parametrize(
    ("kwargs", "held", "rest"),
    [
        ({}, [18, 4, 20, 10, 21], 1392139641),
        ({"test": 7, "seed": 5}, [18, 22, 11, 3, 9, 7, 17], 1858638106),
        ({"stratify": False}, [18, 4, 20, 10, 11], 1689478313),
    ],
)
def test_split_draws_what_it_always_drew(kwargs, held, rest):
    """Published results name a seed."""
    x, x_test, *_ = split(np.arange(23)[:, None], np.arange(23) % 3, **kwargs)
    assert x_test.ravel().tolist() == held and zlib.crc32(x.astype("<i8").tobytes()) == rest


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(2, 30), min_size=2, max_size=8),
    test=st.floats(0.01, 0.49),
    validation=st.one_of(st.floats(0.01, 0.49), st.integers(1, 2)),
    seed=st.integers(0, 2**32),
)
def test_three_parts_are_exact_disjoint_complete_and_stratified(sizes, test, validation, seed):
    y = np.repeat(np.arange(len(sizes)), sizes)
    n, x = len(y), np.arange(len(y))[:, None]
    if n == 4:
        validation = 1
    parts = split(x, y, x.ravel().tolist(), test=test, validation=validation, seed=seed)
    xs, ys, zs = parts[:3], parts[3:6], parts[6:]

    count = min(max(round(test * n), 1), n - 2)
    wanted = validation if isinstance(validation, int) else min(max(round(validation * n), 1), n - count - 1)
    assert [len(a) for a in xs] == [n - count - wanted, wanted, count]
    assert sorted(np.concatenate(xs).ravel()) == list(range(n))
    for a, b, c in zip(xs, ys, zs, strict=True):
        np.testing.assert_array_equal(b, y[a.ravel()])
        np.testing.assert_array_equal(c, a.ravel())
    if count == min(max(round(test * n), 1), n - 1):
        np.testing.assert_array_equal(xs[2], split(x, y, test=test, seed=seed)[1])  # kept away, whatever else is tried

    left = sizes - np.bincount(ys[2], minlength=len(sizes))
    shares, quota = np.bincount(ys[1], minlength=len(sizes)), left * wanted / (n - count)
    if quota.min() >= 1 and (left - quota).min() >= 1:
        assert (abs(shares - quota) < 1).all()


def test_a_class_of_two_rows_has_none_left_to_validate():
    y = np.repeat([0, 1, 2], [2, 6, 12])
    _, _, _, y, y_val, y_test = split(y[:, None], y, test=5, validation=5)
    assert np.bincount(y_test).tolist() == [1, 1, 3] and np.bincount(y).min() >= 1 and len(y_val) == 5


def test_split_is_determined_by_its_seed():
    x, y = np.arange(100)[:, None], np.arange(100) % 7
    one, two, other = split(x, y, seed=3), split(x, y, seed=3), split(x, y, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[1], other[1])


def test_split_breaks_ties_without_favour():
    y = np.repeat(np.arange(10), 10)
    held = {tuple(np.unique(split(y[:, None], y, test=5, seed=seed)[3])) for seed in range(20)}
    assert len(held) > 10 and {label for labels in held for label in labels} == set(range(10))


def test_split_shuffles():
    x, x_test, *_ = split(np.arange(50)[:, None], np.zeros(50, int))
    assert (np.diff(x.ravel()) < 0).any() and (np.diff(x_test.ravel()) < 0).any()


@pytest.mark.parametrize(
    "y", [np.tile(["a", "b"], 50), np.tile([True, False], 50), ["a", "b"] * 50], ids=["U", "b", "list"]
)
def test_split_stratifies_text_and_bools(y):
    *_, y_test = split(np.ones((100, 1)), y, test=10)
    assert np.unique(y_test, return_counts=True)[1].tolist() == [5, 5]


def test_split_stratifies_objects_of_text():
    *_, y_test = split(np.ones((100, 1)), np.array(["a", "b"] * 50, object), test=10)
    assert np.unique(y_test, return_counts=True)[1].tolist() == [5, 5]


def test_split_is_plain_for_floats_lone_classes_and_on_request():
    x = np.arange(1000)[:, None]
    parts = [split(x, y) for y in (np.zeros(1000), np.arange(1000), np.ones((1000, 2), int))]
    parts.append(split(x, np.arange(1000) % 2, stratify=False))
    for part in parts:
        np.testing.assert_array_equal(part[1], parts[0][1])


def test_split_keeps_the_type_and_the_dtype():
    frame, frame_test, y, y_test = split(Frame(np.arange(10).reshape(5, 2)), [1.0, 2.0, 3.0, 4.0, 5.0])
    assert type(frame) is type(frame_test) is Frame and type(y) is np.ndarray
    np.testing.assert_array_equal(frame.values[:, 0] / 2 + 1, y)
    x, *_ = split(np.ones((5, 2), np.float32), y_test.repeat(5))
    assert x.dtype == np.float32 and x.flags.owndata


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"test": 0}, r"^split: test is 0, expected a fraction between 0 and 1 or a count from 1 to 9"),
        ({"test": 10}, "^split: test is 10, expected"),
        ({"test": 1.0}, "^split: test is 1.0, expected"),
        ({"test": -0.1}, "^split: test is -0.1"),
        ({"test": NAN}, "^split: test is nan"),
        ({"test": True}, "^split: test is True"),
        ({"test": "0.2"}, "^split: test is '0.2'"),
        ({"seed": -1}, "^split: seed must be at least 0, got -1$"),
        ({"seed": 1.0}, r"^split: seed must be an integer or None, got float 1\.0$"),
        ({"seed": True}, "^split: seed must be an integer or None, got bool True$"),
        ({"y": np.ones(9)}, "^split: x has 10 rows but y has 9; pass one row of each per sample$"),
        ({"stratify": np.ones(10)}, "^split: stratify is of type ndarray, expected True, False or None"),
        ({"y": np.ones(10), "stratify": True}, r"^split: y has shape \(10,\), dtype float64, expected"),
        ({"y": np.arange(10), "stratify": True}, "^split: class 0 has 1 row, expected at least 2; drop it"),
        ({"x": np.ones((0, 2))}, "^split: x has 0 rows, expected at least 1"),
        ({"x": np.ones((1, 2)), "y": [1]}, "^split: x has 1 row, expected at least 2, one for each part"),
        ({"validation": 0}, r"^split: validation is 0, expected a fraction between 0 and 1 or a count from 1 to 7"),
        ({"validation": 8}, "^split: validation is 8, expected"),
        ({"validation": True}, "^split: validation is True, expected"),
        ({"test": 9, "validation": 1}, "^split: test is 9, expected a fraction between 0 and 1 or a count from 1 to 8"),
        (
            {"test": 0.5, "validation": 0.5},
            r"^split: test 0\.5 and validation 0\.5 of 10 rows leave none to train on; both are parts of all rows",
        ),
        ({"test": 5, "validation": 0.5}, r"^split: test 5 and validation 0\.5 of 10 rows leave none"),
        (
            {"x": np.ones((2, 2)), "y": [0, 1], "validation": 1},
            "^split: x has 2 rows, expected at least 3, one for each part; pass more data$",
        ),
        ({"x": 3}, "^split: x is of type int, expected rows"),
        ({"x": np.float64(3)}, "^split: x is a single value, expected rows"),
    ],
)  # fmt: skip
def test_split_errors(kwargs, message):
    kwargs = {"x": np.ones((10, 2)), "y": np.arange(10) % 2} | kwargs
    with pytest.raises((ValueError, TypeError), match=message):
        split(kwargs.pop("x"), kwargs.pop("y"), **kwargs)


def test_split_names_a_further_array():
    with pytest.raises(ValueError, match=r"^split: x has 4 rows but array 4 has 5;"):
        split(np.ones((4, 1)), np.ones(4), np.ones(4), np.ones(5))


# ---- folds -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(2, 20), min_size=1, max_size=6), k=st.integers(2, 12), seed=st.integers(0, 2**32),
    plain=st.booleans(),
)  # fmt: skip
def test_folds_test_every_row_once_with_the_classes_in_proportion(sizes, k, seed, plain):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(y)
    k = min(k, n)
    folds = gb.KFold(k, seed=seed, stratify=False if plain else None)
    tests = []
    for train, test in folds.split(np.ones((n, 2)), y):
        assert sorted([*train, *test]) == list(range(n))
        assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()
        tests.append(test)
    assert len(tests) == k == folds.get_n_splits()
    assert sorted(np.concatenate(tests)) == list(range(n))
    assert {len(test) for test in tests} <= {n // k, -(-n // k)}
    if not plain:
        counts = np.array([np.bincount(y[test], minlength=len(sizes)) for test in tests])
        assert (np.ptp(counts, axis=0) <= 1).all()


def test_folds_are_determined_by_their_seed():
    x, y = np.arange(60)[:, None], np.arange(60) % 3

    def tests(seed, y=y):
        return [test.tolist() for _, test in gb.KFold(4, seed=seed).split(x, y)]

    assert tests(1) == tests(1) != tests(2)
    assert tests(1, y=None) != [list(range(15 * i, 15 * i + 15)) for i in range(4)]  # shuffled
    assert repr(gb.KFold(4, seed=1)) == "KFold(n_splits=4, stratify=None, seed=1)"


def test_scikit_learn_takes_folds_as_cv():
    selection = pytest.importorskip("sklearn.model_selection")
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = gb.datasets.digits()
    x, y, folds = x[:300], y[:300], gb.KFold(3, seed=1)
    scores = selection.cross_val_score(neighbors.KNeighborsClassifier(3), x, y, cv=folds)
    by_hand = [neighbors.KNeighborsClassifier(3).fit(x[a], y[a]).score(x[b], y[b]) for a, b in folds.split(x, y)]
    assert scores.tolist() == by_hand and min(by_hand) > 0.8
    search = selection.GridSearchCV(neighbors.KNeighborsClassifier(), {"n_neighbors": [1, 50]}, cv=folds).fit(x, y)
    assert search.best_params_ == {"n_neighbors": 1} and search.n_splits_ == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gb.KFold(1), "^KFold: n_splits must be at least 2, got 1$"),
        (lambda: gb.KFold(2.0), r"^KFold: n_splits must be an integer, got float 2\.0$"),
        (lambda: gb.KFold(seed=-1), "^KFold: seed must be at least 0, got -1$"),
        (lambda: gb.KFold(5).split(np.ones((4, 1))), "^KFold: x has 4 rows, expected at least 5, one for each fold"),
        (lambda: gb.KFold(2).split(np.ones((4, 1)), np.ones(3)), "^KFold: x has 4 rows but y has 3"),
        (lambda: gb.KFold(2, stratify=True).split(np.ones((4, 1))), "^KFold: stratify=True needs the classes; pass y$"),
        (
            lambda: gb.KFold(2, stratify=True).split(np.ones((4, 1)), np.ones(4)),
            r"^KFold: y has shape \(4,\), dtype float64, expected",
        ),
        (lambda: gb.KFold(2, stratify=1).split(np.ones((4, 1)), [0, 0, 1, 1]), "^KFold: stratify is of type int"),
        (lambda: gb.KFold(2).split(np.ones((4, 1)), groups=[1, 1, 2, 2]), "^KFold: groups are not kept together; use"),
    ],
)
def test_errors_of_folds(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# ---- learning curves ---------------------------------------------------------------------------------------


def small(outputs=10):
    return gb.Trainer(gb.mlp([64, 16, outputs], dropout=0.1), seed=0)


ONE = small()


def test_a_learning_curve_measures_each_size_as_by_hand(monkeypatch):
    """Parts nest, with the classes in proportion; the test rows are those of split; all is measured after training."""
    x, y = gb.datasets.digits()
    x, y = x[:500], y[:500]
    seen = []

    def watched():
        trainer = small()
        fit = trainer.fit
        monkeypatch.setattr(trainer, "fit", lambda *data, **how: (seen.append((trainer, data)), fit(*data, **how))[1])
        return trainer

    curve = gb.learning_curve(watched, x, y, (0.25, 400, 0.5), test=100, epochs=3, batch_size=32, seed=4)
    own, held_out, y_own, y_held_out = split(x, y, test=100, seed=4)
    assert curve["rows"] == [100, 200, 400]
    assert list(curve) == ["rows", "loss", "accuracy", "val_loss", "val_accuracy", "gap"]
    rows = [{row.tobytes() for row in part} for _, (part, _) in seen]
    assert rows[0] < rows[1] < rows[2] == {row.tobytes() for row in own}
    for i, (trainer, (part, labels)) in enumerate(seen):
        quota = np.bincount(y_own) * len(part) / 400
        assert (abs(np.bincount(labels, minlength=10) - quota) < 2).all()
        figures, others = trainer.evaluate(part, labels), trainer.evaluate(held_out, y_held_out)
        assert (curve["loss"][i], curve["accuracy"][i]) == tuple(figures.values())
        assert (curve["val_loss"][i], curve["val_accuracy"][i]) == tuple(others.values())
        assert curve["gap"][i] == others["loss"] - figures["loss"]
        assert trainer.epoch == 3
    again = small()
    again.fit(*seen[0][1], epochs=3, batch_size=32)
    assert again.evaluate(*seen[0][1])["loss"] == curve["loss"][0]
    assert len(str(curve).splitlines()) == 4


def test_a_learning_curve_of_a_regression(rng):
    x = rng.normal(size=(60, 3))
    y = x @ [1, -2, 3.0]
    curve = gb.learning_curve(lambda: gb.Trainer(gb.mlp([3, 1]), "mse", gb.Adam(0.1), seed=0), x, y, [1.0], epochs=60)
    assert curve["rows"] == [48] and curve["val_r2"][0] > 0.9


@pytest.mark.parametrize(
    ("make", "rows", "sizes", "message"),
    [
        (ONE, 50, [10], "^learning_curve: make_trainer is of type Trainer, expected a function that makes one, "),
        (
            lambda: ONE,
            50,
            [10, 20],
            "^learning_curve: make_trainer gave the same model twice; make the model in",
        ),
        (small, 49, [10], "^learning_curve: x has 50 rows but y has 49; pass one y per row of x$"),
        (
            small,
            50,
            [0.5, 1.5],
            r"^learning_curve: a size is 1\.5, expected a fraction between 0 and 1 or a count from 1 to 40 of the 40 "
            r"rows; try sizes=\[0\.1, 0\.5, 1\.0\]$",
        ),
    ],
)
def test_errors_of_learning_curves(make, rows, sizes, message):
    x, y = gb.datasets.digits()
    with pytest.raises((TypeError, ValueError), match=message):
        gb.learning_curve(make, x[:50], y[:rows], sizes, epochs=1)


# ---- columns -----------------------------------------------------------------------------------------------


def test_columns_print_text_to_the_left_and_numbers_to_the_right():
    columns = Columns()
    columns.add(layer="0", rows=12345, loss=0.5)
    columns.add(layer="1.weight", rows=7, loss=1 / 3)
    assert columns == {"layer": ["0", "1.weight"], "rows": [12345, 7], "loss": [0.5, 1 / 3]}
    assert str(columns).splitlines() == [
        "layer       rows    loss",
        "0         12,345     0.5",
        "1.weight       7  0.3333",
    ]
