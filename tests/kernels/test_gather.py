"""gather bit for bit, scatter_add and scatter_add_live bit for bit with numpy.add.at."""

from functools import cache

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, shifted

from gpubackprop.backends import codegen
from gpubackprop.backends.geometry import Geometry, slices_geometry

SHAPES = [(1, 1, 1, 1), (1, 9, 40, 1), (1, 10, 7, 24), (3, 5, 11, 8), (2, 4, 9, 7), (2, 3, 4, 2100), (4, 6, 300, 3)]


@cache
def library(dtype):
    return build(codegen.file_unit("gather.cu", dtype.name))


def operands(shape, dtype, offset=0):
    outer, length, count, inner = shape
    rng = np.random.default_rng(shape)
    x = shifted(rng.normal(size=(outer, length, inner)).astype(dtype), offset)
    dy = shifted(rng.normal(size=(outer, count, inner)).astype(dtype), offset)
    return x, dy, rng.integers(0, length, count)


def gather(x, index, out, at=None):
    (outer, length, inner), count = x.shape, index.size
    at = at or slices_geometry(outer * count, inner, x.itemsize)
    library(x.dtype).run(
        "gather", at.grid, at.block, out=out, x=x, index=index, outer=outer, length=length, count=count, inner=inner
    )
    return out


def scatter_add(dy, index, out, at=None):
    (outer, length, inner), count = out.shape, index.size
    permutation = np.argsort(index, kind="stable")
    targets, starts = np.unique(index[permutation], return_index=True)
    at = at or slices_geometry(outer * targets.size, inner, dy.itemsize)
    library(dy.dtype).run(
        "scatter_add", at.grid, at.block, out=out, dy=dy, permutation=permutation, starts=np.append(starts, count),
        targets=targets, segments=targets.size, outer=outer, length=length, count=count, inner=inner,
    )  # fmt: skip
    return out


def scatter_add_live(dy, index, out, at=None):
    (outer, length, inner), count = out.shape, index.size
    at = at or slices_geometry(outer * count, inner, dy.itemsize)
    library(dy.dtype).run(
        "scatter_add_live", at.grid, at.block, out=out, dy=dy, index=index, outer=outer, length=length, count=count,
        inner=inner,
    )  # fmt: skip
    return out


SCATTERS = [scatter_add, scatter_add_live]


def assert_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather(shape, offset, dtype):
    x, dy, index = operands(shape, dtype, offset)
    bits = x.view(np.uint8)  # any, NaNs among them
    bits[...] = np.random.default_rng(0).integers(0, 256, bits.shape)
    assert_bits(gather(x, index, shifted(np.zeros_like(dy), offset)), np.take(x, index, 1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scatter", SCATTERS)
def test_scatter_add(scatter, shape, offset, dtype):
    """In R, one after the other, stored once: at float32 and float64 the bits of numpy.add.at."""
    x, dy, index = operands(shape, dtype, offset)
    expected = x.astype(arithmetic(dtype))
    np.add.at(expected, (slice(None), index), dy.astype(expected.dtype))
    assert_bits(scatter(dy, index, x), expected.astype(dtype))


@pytest.mark.parametrize("grid, block", [((1, 1, 1), (32, 1, 1)), ((3, 2, 1), (4, 8, 1)), ((50, 3, 1), (1, 32, 1))])
def test_any_grid(grid, block):
    x, dy, index = operands((3, 5, 17, 20), DTYPES["float32"])
    at, expected = Geometry(grid, block), x.copy()
    assert_bits(gather(x, index, np.zeros_like(dy), at), np.take(x, index, 1))
    np.add.at(expected, (slice(None), index), dy)
    for scatter in SCATTERS:
        assert_bits(scatter(dy, index, x.copy(), at), expected)


def test_geometry():
    for slices, elements, itemsize in ((1, 1, 4), (10**6, 1, 2), (128, 512, 4), (3, 10**9, 8), (5000, 100, 2)):
        (down, across, _), (x, y, _), *_ = slices_geometry(slices, elements, itemsize)
        assert x * y == 256 and down * y >= slices and down < 2**31 and 1 <= across <= 65_535
