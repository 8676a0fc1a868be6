"""Copies, transposes and fills: bit for bit, converted, strided, accumulated."""

import ctypes
from functools import cache

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, shifted

from gpubackprop.backends import codegen
from gpubackprop.backends.geometry import collapse, flat_geometry, slices_geometry, transpose_geometry

TYPES = DTYPES | {"uint8": np.dtype(np.uint8), "int64": np.dtype(np.int64)}
CONVERSIONS = [
    ("float16", "float16", "float32"), ("bfloat16", "float32", "bfloat16"), ("float32", "uint8", "float32"),
    ("float32", "float64", "float32"), ("float64", "float32", "float64"), ("float16", "uint8", "float16"),
]  # fmt: skip
STRIDED = {
    "one": ((), ()),
    "flat": ((40,), (40,)),
    "row": ((6, 16), (16,)),
    "column": ((6, 16), (6, 1)),
    "single": ((6, 16), (1, 1)),
    "odd row": ((6, 7), (7,)),
    "middle": ((3, 4, 24), (3, 1, 24)),
    "outside": ((3, 5, 2, 8), (5, 1, 8)),
}


class Layout(ctypes.Structure):
    _fields_ = (("dims", ctypes.c_longlong), *((k, ctypes.c_longlong * 8) for k in ("shape", "out", "x")))


@cache
def library(dtype, source, output):
    return build(codegen.file_unit("copy.cu", dtype, SOURCE=source, OUTPUT=output))


def of(dtype, x, out):
    return library(dtype, x.dtype.name, out.dtype.name)


def steps(array, shape):
    view = np.broadcast_to(array, shape)
    return [s // array.itemsize for s in view.strides]


def copy(x, out, dtype, accumulate=0, at=None):
    """out = x broadcast, both strided, by the general kernel in every order."""
    sizes, (to, step) = collapse(out.shape, [steps(out, out.shape), steps(x, out.shape)])
    sizes, to, step = sizes or [1], to or [1], step or [1]
    layout = Layout(len(sizes))
    for field, values in (("shape", sizes), ("out", to), ("x", step)):
        getattr(layout, field)[: len(sizes)] = values
    at = at or slices_geometry(int(np.prod(sizes[:-1])), sizes[-1], max(x.itemsize, out.itemsize))
    of(dtype, x, out).run("copy", at.grid, at.block, out=out, x=x, layout=layout, accumulate=accumulate)


def values(shape, dtype):
    rng = np.random.default_rng(list(shape))
    return rng.integers(0, 250, shape).astype(dtype) if dtype.kind in "iu" else rng.normal(size=shape).astype(dtype)


def assert_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes()


# ---- strided -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape, part", STRIDED.values(), ids=STRIDED)
def test_broadcasting(shape, part, dtype):
    x, out = values(part, TYPES[dtype]), np.zeros(shape, TYPES[dtype])
    copy(x, out, dtype if dtype in DTYPES else "float32")
    assert_bits(out, np.broadcast_to(x, shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", [
    np.s_[:, 2:9], np.s_[::2, ::3], np.s_[::-1], np.s_[:, ::-1], np.s_[1:, 8:16], np.s_[:, 3:4], np.s_[2:3, :],
])  # fmt: skip
def test_views_in_and_out(key, dtype):
    whole, other = values((9, 24), DTYPES[dtype]), np.full((9, 24), 7, DTYPES[dtype])
    taken = np.full(whole[key].shape, 7, DTYPES[dtype])
    copy(whole[key], taken, dtype)
    assert_bits(taken, whole[key])
    expected = other.copy()
    expected[key] = taken
    copy(taken, other[key], dtype)
    assert_bits(other, expected)


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)])
def test_permuted_dimensions(axes):
    x = values((5, 8, 12), DTYPES["float32"]).transpose(axes)
    out = np.zeros(x.shape, np.float32)
    copy(x, out, "float32")
    assert_bits(out, x)


def test_eight_dimensions():
    x = values((2, 1, 3, 1, 2, 1, 2, 1), DTYPES["float32"])
    out = np.zeros((2, 2, 3, 2, 2, 2, 2, 2), np.float32)
    copy(x, out, "float32")
    assert_bits(out, np.broadcast_to(x, out.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, part", STRIDED.values(), ids=STRIDED)
def test_a_strided_copy_may_accumulate(shape, part, dtype):
    wide, x = arithmetic(DTYPES[dtype]), values(part, DTYPES[dtype])
    out = values((*shape, 1), DTYPES[dtype]).reshape(shape)
    expected = (out.astype(wide) + x.astype(wide)).astype(out.dtype)
    copy(x, out, dtype, accumulate=1)
    assert_bits(out, expected)


def test_any_grid():
    x, out = values((13, 40), DTYPES["float32"]), np.zeros((5, 13, 40), np.float32)
    for grid, block in (((1, 1, 1), (32, 1, 1)), ((3, 2, 1), (4, 8, 1)), ((40, 3, 1), (2, 16, 1))):
        copy(x, out, "float32", at=slices_geometry(1, 1, 4)._replace(grid=grid, block=block))
        assert_bits(out, np.broadcast_to(x, out.shape))


# ---- contiguous ----------------------------------------------------------------------------------------------------


def flat(x, out, dtype, accumulate=0):
    at = flat_geometry(x.size, max(x.itemsize, out.itemsize))
    of(dtype, x, out).run("copy_flat", at.grid, at.block, out=out, x=x, accumulate=accumulate, size=x.size)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("size", [1, 15, 16, 1000, 5003])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_type_keeps_its_bits(dtype, size, offset):
    bits = np.random.default_rng(size).integers(0, 256, size * TYPES[dtype].itemsize, np.uint8)
    x = shifted(bits.view(TYPES[dtype]), offset)
    out = shifted(np.zeros_like(x), 0)
    flat(x, out, dtype if dtype in DTYPES else "float32")
    assert_bits(out, x)


@pytest.mark.parametrize("dtype, source, output", CONVERSIONS)
@pytest.mark.parametrize("accumulate", [0, 1])
def test_conversions(dtype, source, output, accumulate):
    wide, x = arithmetic(DTYPES[dtype]), values((501,), TYPES[source])
    out = np.full(501, 3, TYPES[output])
    expected = (x.astype(wide) + wide.type(3 * accumulate)).astype(out.dtype)
    for run in (flat, copy):
        run(x, out := np.full_like(out, 3), dtype, accumulate)
        assert_bits(out, expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_fill(dtype):
    wide = arithmetic(DTYPES.get(dtype, DTYPES["float32"]))
    for size, offset, value in ((1, 0, 2.5), (37, 0, 0.1), (1030, 1, 3.0)):
        out = shifted(np.zeros(size, TYPES[dtype]), offset)
        at = flat_geometry(size, out.itemsize)
        source = dtype if dtype in DTYPES else "float32"
        of(source, out, out).run("fill", at.grid, at.block, out=out, value=value, size=size)
        assert_bits(out, np.full(size, wide.type(value)).astype(out.dtype))


# ---- transposes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, source, output", [(d, d, d) for d in DTYPES] + CONVERSIONS[:1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (32, 32), (33, 70), (100, 31)], ids=str)
@pytest.mark.parametrize("accumulate", [0, 1])
def test_transpose(shape, dtype, source, output, accumulate):
    wide, x = arithmetic(DTYPES[dtype]), values(shape, TYPES[source])
    out = np.full(shape[::-1], 2, TYPES[output])
    expected = (x.T.astype(wide) + wide.type(2)).astype(out.dtype) if accumulate else x.T.astype(out.dtype)
    at = transpose_geometry(*shape)
    for grid in {at.grid, (min(2, at.grid[0]), 1, 1)}:
        out[...] = 2
        of(dtype, x, out).run(
            "transpose", grid, at.block, out=out, x=x, accumulate=accumulate, rows=shape[0], columns=shape[1]
        )
        assert_bits(out, expected)
