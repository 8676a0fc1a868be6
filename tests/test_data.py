"""The door for arrays, and the split: laws, and every error by its message."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubackprop.data import as_features, as_labels, as_targets, check_same_length, split

NAN, INF = np.nan, np.inf


class Frame:
    """What we use of a data frame: rows by position, its numbers, its length."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.shape = self.values.shape

    @property
    def iloc(self):
        return type("Rows", (), {"__getitem__": lambda _, rows: Frame(self.values[rows])})()

    def to_numpy(self):
        return self.values


class Tensor:
    """What we use of a tensor."""

    __array_ufunc__ = None

    def __init__(self, values):
        self.values = np.asarray(values)

    def numpy(self):
        return self.values


class Device:
    __cuda_array_interface__ = {}  # noqa: RUF012
    shape = (2, 2)


# ---- features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", np.float64])
@pytest.mark.parametrize(
    "x",
    [
        [[1, 2], [3, 4]],
        ((True, False), (False, True)),
        np.array([[1, 2], [3, 4]], np.uint8),
        np.array([[1, 2], [3, 4]], ">f8"),
        np.arange(16.0).reshape(4, 4)[::2, ::2],
        np.asfortranarray([[1.0, 2.0], [3.0, 4.0]]),
        np.float16([[1, 2], [3, 4]]),
        np.ma.array([[1.0, 2.0], [3.0, 4.0]]),
        Frame([[1, 2], [3, 4]]),
        Tensor([[1.0, 2.0], [3.0, 4.0]]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_features_become_contiguous_rows(x, dtype):
    out = as_features(x, dtype, columns=2)
    assert type(out) is np.ndarray and out.dtype == dtype and out.flags.c_contiguous and out.flags.aligned
    np.testing.assert_array_equal(out, np.asarray(getattr(x, "values", x), np.float64))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_of_the_right_kind_are_not_copied(dtype):
    x = np.ones((3, 2), dtype)
    x.flags.writeable = False
    assert as_features(x, dtype) is x
    assert np.shares_memory(as_features(Tensor(x), dtype), x)
    assert not np.shares_memory(as_features(x[:, :1], dtype), x)


def test_features_take_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert as_features(np.ones((2, 2), ml_dtypes.bfloat16), "float32").sum() == 4


def test_frames_may_mix_numbers_and_bools():
    mixed = np.array([[1, True], [2.5, np.bool_(False)]], object)
    assert as_features(Frame(mixed), "float32").tolist() == [[1, 1], [2.5, 0]]
    with pytest.raises(TypeError, match=r"^fit: x has dtype object"):
        as_features(Frame(np.array([[1, "2"]], object)), "float32")


class NAType:
    """As pandas.NA: neither true nor false."""

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")

    def __eq__(self, other):
        return self

    __hash__ = None

    def __str__(self):
        return "<NA>"


@pytest.mark.parametrize("missing", [None, NAType()], ids=str)
def test_missing_values_of_nullable_frames_are_named(missing):
    x = np.array([[1, 2.0], [3, 4.0], [5, missing]], object)
    for rows in (Frame(x), x, x.tolist()):
        message = rf"^fit: x has a missing value \({missing}\) at row 2, column 1; remove or fill such rows$"
        with pytest.raises(ValueError, match=message):
            as_features(rows, "float32")
    for check in (as_labels, lambda y, n: as_targets(y, "float32", 1)):
        with pytest.raises(ValueError, match=rf"^fit: y has a missing value \({missing}\) at row 2; "):
            check(Frame(x[:, 1]), 2)


def test_unaligned_features_are_aligned():
    x = np.zeros(33, np.uint8)[1:].view(np.float64).reshape(2, 2)
    assert not x.flags.aligned
    assert as_features(x, "float64").flags.aligned


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.array([[1, "a"]], object), r"^fit: x has dtype object, expected numbers; .*x\.astype\(float\)$"),
        ([["a", "b"]], "^fit: x has dtype <U1, expected numbers; encode text as numbers"),
        (
            np.array([[1j]]),
            r"^fit: x has dtype complex128, expected numbers; pass x\.real and x\.imag as columns",
        ),
        (np.array([["2020-01-01"]], "M8[D]"), r"^fit: x has dtype datetime64\[D\]"),
        (None, "^fit: x is of type NoneType, expected numbers; pass an array, a frame or lists$"),
        ({"a": 1}, "^fit: x is of type dict"),
        ((row for row in [[1]]), "^fit: x is of type generator"),
        (Device(), r"^fit: x lies on a CUDA device, expected host data; copy it with x\.get\(\)"),
        (3.0, "^fit: x is a single value, expected rows; pass an array, a frame or lists$"),
    ],
)
def test_features_that_are_no_numbers(x, message):
    with pytest.raises(TypeError, match=message):
        as_features(x, "float32")


def test_sparse_features_name_toarray():
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"^fit: x is of type csr_matrix, expected numbers; use x\.toarray\(\)$"):
        as_features(sparse.csr_matrix(np.eye(2)), "float32")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            [[1, 2], [3, 4], [5]],
            "^fit: x is ragged: 1 values in row 2 but 2 in row 0, expected equal lengths",
        ),
        ([[[1], [2, 3]]], "^fit: x is ragged: nested unevenly"),
        (
            np.ones(5),
            r"^fit: x has shape \(5,\), .*; use x\.reshape\(-1, 1\) for one column or x\[None\] for one",
        ),
        (
            np.ones((5, 8, 8)),
            r"^fit: x has shape \(5, 8, 8\), expected rows and columns; use x\.reshape\(5, 64\)$",
        ),
        ([], "^fit: x has 0 rows, expected at least 1; pass some data$"),
        (np.ones((0, 3)), "^fit: x has 0 rows"),
        (np.ones((3, 0)), "^fit: x has 0 columns"),
        (
            np.ma.array([[1.0, 2.0]], mask=[[0, 1]]),
            r"^fit: x has masked values, expected none; .*x\.filled\(\)$",
        ),
    ],
)
def test_features_of_the_wrong_shape(x, message):
    with pytest.raises(ValueError, match=message):
        as_features(x, "float32")


def test_features_of_another_width():
    with pytest.raises(ValueError, match=r"^predict: x has 63 columns but the model expects 64$"):
        as_features(np.ones((5, 63)), "float32", 64, "predict")


@pytest.mark.parametrize(("value", "words"), [(NAN, "a NaN"), (INF, "an infinity"), (-INF, "an infinity")], ids=str)
def test_features_name_the_first_bad_cell(value, words):
    x = np.ones((40, 5))
    x[17, 3] = value
    x[18, 1] = NAN
    for dtype in ("float32", "float64"):
        with pytest.raises(ValueError, match=f"^fit: x has {words} at row 17, column 3; remove or fill such rows$"):
            as_features(x, dtype)


def test_opposite_infinities_do_not_cancel():
    with pytest.raises(ValueError, match="row 0, column 1"):
        as_features([[1.0, INF, -INF]], "float32")


def test_a_cast_that_overflows_says_so():
    message = r'^fit: x has 1e\+300 at row 1, column 0, too large for float32; scale x or use dtype="float64"$'
    with pytest.raises(ValueError, match=message):
        as_features([[1.0, 2.0], [1e300, 3.0]], "float32")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_finite_values_may_overflow_their_sum(dtype):
    x = np.full((100, 3), np.finfo(dtype).max, dtype)
    assert as_features(x, dtype) is x


# ---- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "y",
    [
        [0, 2, 1],
        [0.0, 2.0, 1.0],
        np.uint8([0, 2, 1]),
        np.float16([0, 2, 1]),
        Frame([0, 2, 1]),
        Tensor([0, 2, 1]),
    ],
    ids=lambda y: type(y).__name__,
)
def test_labels_become_int64(y):
    labels = as_labels(y, 3)
    assert labels.dtype == np.int64 and labels.tolist() == [0, 2, 1]


def test_bools_are_labels():
    assert as_labels([True, False], 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([[0], [1]], r"^fit: y has shape \(2, 1\), expected \(2,\), one label each; use y\.ravel\(\)$"),
        (np.eye(3), r"^fit: y has shape \(3, 3\), expected \(3,\), one label each; use y\.argmax\(axis=1\)"),
        ([0, 3, 9], r"^fit: label 3 at row 1 is out of range, expected 0 to 2; number the classes with"),
        ([0, -1], "^fit: label -1 at row 1 is out of range, expected 0 to 2"),
        (np.array([2**64 - 1], np.uint64), "^fit: label 18446744073709551615 at row 0 is out of range"),
        ([1e30], r"^fit: label 1e\+30 at row 0 is out of range"),
        ([0, 1.5], "^fit: label 1.5 at row 1 is fractional, expected an integer 0 to 2; .* the loss 'mse'$"),
        ([0, NAN], "^fit: y has a NaN at row 1; remove or fill such rows$"),
        ([0, INF], "^fit: y has an infinity at row 1"),
        ([], "^fit: y has 0 rows, expected at least 1"),
        (["a", "b"], r"^fit: y has dtype <U1, .*; number .* with np\.unique\(y, return_inverse=True\)$"),
        (np.array(["a", 1], object), "^fit: y has dtype object, .*np.unique"),
        (1, "^fit: y is a single value, expected rows"),
    ],
)  # fmt: skip
def test_labels_that_are_none(y, message):
    with pytest.raises((ValueError, TypeError), match=message):
        as_labels(y, 3)


# ---- targets -----------------------------------------------------------------------------------------------


def test_targets_of_one_output_may_be_flat():
    np.testing.assert_array_equal(as_targets([1, 2, 3], "float32", 1), np.float32([[1], [2], [3]]))
    np.testing.assert_array_equal(as_targets([[1], [2]], "float64", 1), [[1.0], [2.0]])
    y = np.ones((4, 3), np.float32)
    assert np.shares_memory(as_targets(y, "float32", 3), y)


@pytest.mark.parametrize(
    ("y", "outputs", "message"),
    [
        (
            np.ones(5),
            3,
            r"^fit: y has shape \(5,\) but the model has 3 outputs; pass targets of shape \(5, 3\)$",
        ),
        (np.ones((5, 2)), 3, "^fit: y has 2 columns but the model has 3 outputs"),
        (
            np.ones((5, 2)),
            1,
            r"^fit: y has 2 columns but the model has 1 output; pass targets of shape \(5, 1\)$",
        ),
        (np.ones((1, 5)), 1, "^fit: y has 5 columns but the model has 1 output"),
        (np.ones((5, 1, 1)), 1, r"^fit: y has shape \(5, 1, 1\) but the model has 1 output"),
        ([], 1, "^fit: y has 0 rows"),
        (["a"], 1, r"^fit: y has dtype <U1, expected numbers; convert with y\.astype\(float\)$"),
        ([1.0, NAN], 1, "^fit: y has a NaN at row 1; remove or fill such rows$"),
        (
            [[1.0, 2.0], [1.0, -1e200]],
            2,
            r"^fit: y has -1e\+200 at row 1, column 1, too large for float32; scale y",
        ),
    ],
)
def test_targets_that_do_not_fit(y, outputs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        as_targets(y, "float32", outputs)


def test_lengths_must_agree():
    check_same_length([[1], [2]], np.ones(2), "fit")
    with pytest.raises(ValueError, match=r"^fit: x has 10 rows but y has 9; pass one y per row of x$"):
        check_same_length(np.ones((10, 2)), [0] * 9)


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
