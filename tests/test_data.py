"""The door for arrays: laws, and every error by its message."""

import numpy as np
import pytest

from gpubackprop.data import as_features, as_labels, as_targets, check_same_length

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
        (
            np.array([[1, "a"]], object),
            r"^fit: x has dtype object, expected numbers; encode text as numbers \('a' at row 0, column 1\)$",
        ),
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
        ([[0], [1]], r"^fit: y has shape \(2, 1\), expected \(2,\), one label each; use np\.ravel\(y\)$"),
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
        (
            ["a"],
            1,
            r"^fit: y has dtype <U1, expected numbers; number the classes with np\.unique",
        ),
        (["1"], 1, r"^fit: y has dtype <U1, expected numbers; convert with y\.astype\(float\)$"),
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
