"""The batch's rows and targets: converted and scaled as NumPy does it, targets bit for bit."""

from functools import cache

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, shifted

from gpubackprop.backends import codegen
from gpubackprop.backends.geometry import Geometry, feed_geometry

ROWS_OF_DATA = 29
STATE = np.array([2, 0, 11, 0])
OFFSETS = np.array([-1000, -1000, 3, -1000])  # of the steps; it is the step of row 2
CASES = [  # dtypes of x and of the data
    ("float32", "float32"), ("float32", "uint8"), ("float32", "float64"), ("float64", "float64"), ("float64", "uint8"),
    ("float16", "float16"), ("float16", "float32"), ("float16", "uint8"),
    ("bfloat16", "float32"), ("bfloat16", "uint8"),
]  # fmt: skip

every_case = pytest.mark.parametrize("dtype, source", CASES, ids=lambda d: d)


@cache
def library(dtype, source, target):
    return build(codegen.file_unit("feed.cu", dtype, SOURCE=source, OUTPUT=dtype, TARGET=target))


def draw(shape, dtype):
    rng = np.random.default_rng(4)
    if np.issubdtype(dtype, np.integer):
        low, high = (0, 256) if dtype == np.uint8 else (-(2**62), 2**62)
        return rng.integers(low, high, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def check(dtype, source, columns, n, *, scale=1.0, target="int64", columns_y=1, offset=0, place=None):
    out, source, target = (np.dtype(DTYPES.get(d, d)) for d in (dtype, source, target))
    data, labels = shifted(draw((ROWS_OF_DATA, columns), source), offset), draw((ROWS_OF_DATA, columns_y), target)
    permutation = np.random.default_rng(5).permutation(ROWS_OF_DATA)
    x, y = shifted(np.zeros((n, columns), out), offset), np.zeros((n, columns_y), target)
    place = place or feed_geometry(n, columns, out.itemsize)
    library(out.name, source.name, target.name).run(
        "feed", place.grid, place.block, x=x, y=y, source_x=data, source_y=labels, permutation=permutation,
        offsets=OFFSETS, state=STATE, scale=scale, rows=n, columns_x=columns, columns_y=columns_y,
    )  # fmt: skip
    batch, wide = permutation[3 : 3 + n], arithmetic(out)
    expected = (data[batch].astype(wide) * wide.type(scale)).astype(out)
    np.testing.assert_array_equal(x.view(np.uint8), expected.view(np.uint8))
    np.testing.assert_array_equal(y.view(np.uint8), labels[batch].view(np.uint8))


@every_case
@pytest.mark.parametrize("columns", [1, 3, 4, 8, 30, 64, 1100])
def test_every_width(columns, dtype, source):
    check(dtype, source, columns, 5, scale=1 / 255 if source == "uint8" else 1.0)


@every_case
@pytest.mark.parametrize("columns", [8, 64])
@pytest.mark.parametrize("offset", [1, 4])
def test_off_the_boundary_of_a_vector(columns, offset, dtype, source):
    check(dtype, source, columns, 3, scale=0.5, offset=offset)


@pytest.mark.parametrize("n", [1, 2, 26])
def test_every_number_of_rows(n):
    check("float32", "float32", 6, n)


@pytest.mark.parametrize("target", ["float32", "float64", "int64"])
@pytest.mark.parametrize("columns_y", [1, 3, 8, 600])
def test_targets_of_any_type(columns_y, target):
    """Vectors of rows that are as long as those of x, longer, or shorter."""
    check("float32", "uint8", 64, 5, target=target, columns_y=columns_y)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_targets_of_16_bits(dtype):
    check(dtype, dtype, 16, 5, target=dtype, columns_y=16)


def test_bits_of_targets_are_kept():
    """Not a number's own bits, −0, and labels that no float holds."""
    special = np.array([0x7FF4DEADBEEF0001, -(2**63), 2**53 + 1, -1, 0])
    for target in (special, special.view(np.float64)):
        y, x = np.zeros_like(target), np.zeros((5, 2), np.float32)
        library("float32", "float32", target.dtype.name).run(
            "feed", 1, 32, x=x, y=y, source_x=np.ones((5, 2), np.float32), source_y=target, permutation=np.arange(5),
            offsets=np.zeros(1, np.int64), state=np.zeros(4, np.int64), scale=1.0, rows=5, columns_x=2, columns_y=1,
        )  # fmt: skip
        np.testing.assert_array_equal(y.view(np.uint64), target.view(np.uint64))


def test_no_targets():
    x, data = np.zeros((2, 4), np.float32), draw((3, 4), np.float32)
    library("float32", "float32", "int64").run(
        "feed", 1, 32, x=x, y=None, source_x=data, source_y=None, permutation=np.array([2, 0, 1]),
        offsets=np.array([1]), state=np.zeros(4, np.int64), scale=2.0, rows=2, columns_x=4, columns_y=1,
    )  # fmt: skip
    np.testing.assert_array_equal(x, 2 * data[:2])


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 1), (3, 40, 1)])
@pytest.mark.parametrize("block", [(1, 1, 1), (4, 8, 1), (64, 1, 1)])
def test_any_geometry(grid, block):
    check("float32", "float32", 100, 13, columns_y=10, place=Geometry(grid, block))


def test_geometry():
    assert feed_geometry(128, 784, 4) == ((1, 128, 1), (256, 1, 1), 0, 0)
    assert feed_geometry(128, 64, 4) == ((1, 8, 1), (16, 16, 1), 0, 0)
    assert feed_geometry(10**6, 1, 4) == ((1, 3907, 1), (1, 256, 1), 0, 0)
    assert feed_geometry(10**6, 3000, 4) == ((3, 65535, 1), (256, 1, 1), 0, 0)
