"""Elementwise kernels over broadcasting operands, bit for bit as NumPy broadcasts."""

from functools import cache
from math import prod

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, assert_stored, evaluated, exact, shifted

from gpubackprop import formulas
from gpubackprop.backends import codegen
from gpubackprop.backends.codegen import Broadcast
from gpubackprop.backends.geometry import Geometry, broadcast_geometry, collapse, layout
from gpubackprop.formulas import apply, name, parse

KERNELS = {k.name: k for row in formulas.BINARY for k in codegen.kernels(row) if isinstance(k, Broadcast)}
THREE = parse("where(a < b, a * b, c / 3)")[formulas.RESULT]
CHOICE = Broadcast("choice", {"y": THREE, "z": apply("-", name("a"), name("c"))}, "two outputs of three operands")
ADDING = Broadcast("adding", {"y": apply("+", name("y"), name("a"))}, "y += a")
SCALED = Broadcast("scaled", parse("y = k * s0 * a"), "y = k · s0 · a", single=("k",), table={"s0": name("lr")})
EXTRA = {k.name: k for k in (CHOICE, ADDING, SCALED)}


@cache
def library(dtype):
    return build(codegen.unit([*KERNELS.values(), *EXTRA.values()], dtype))


def strides(array, shape):
    """The steps of an operand over the whole shape, in elements."""
    return [s // array.itemsize for s in np.broadcast_to(array, shape).strides]


def launch(kernel, arrays, shape, geometry=None, **more):
    dtype = arrays[kernel.reads[0]].dtype
    contiguous = [prod(shape[i + 1 :]) for i in range(len(shape))]
    sizes, (_, *steps) = collapse(shape, [contiguous, *(strides(arrays[k], shape) for k in kernel.reads)])
    rows, columns = prod(sizes[:-1]), sizes[-1] if sizes else 1
    place = geometry or broadcast_geometry(rows, columns, 16 // dtype.itemsize)
    library(dtype.name).run(
        kernel.name, place.grid, place.block, layout=np.array(layout(sizes, steps)), rows=rows, **arrays, **more
    )


def check(kernel, shapes, dtype, offset=0, geometry=None):
    rng = np.random.default_rng(3)
    arrays = {k: rng.standard_normal(s) for k, s in zip(kernel.reads, shapes, strict=False)}
    shape = np.broadcast_shapes(*shapes)
    arrays |= {k: rng.standard_normal(shape) for k in kernel.writes}
    arrays = {k: shifted(a.astype(dtype), offset) for k, a in arrays.items()}
    expected = evaluated(kernel, arrays, shape, dtype)
    launch(kernel, arrays, shape, geometry)
    for key in kernel.writes:
        assert_stored(arrays[key], expected[key], exact(kernel))


SHAPES = {
    "a column and a matrix": ((9, 1), (9, 24)),
    "a row and a column": ((24,), (9, 1)),
    "members": ((3, 1, 16), (3, 5, 16)),
    "both repeated": ((3, 1, 16), (1, 5, 16)),
    "an outer product": ((1, 40), (40, 1)),
    "a tail": ((7, 13), (7, 1)),
    "in the middle": ((4, 1, 3, 8), (4, 5, 1, 8)),
    "one element": ((1, 1), (1, 1)),
    "a scalar": ((), (70, 9)),
    "many blocks": ((300, 1), (1, 300)),
    "eight dimensions": ((2, 1, 2, 1, 2, 1, 2, 1), (1, 2, 1, 2, 1, 2, 1, 8)),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_every_shape(shapes, dtype):
    check(KERNELS["subtract_broadcast"], shapes, dtype)
    check(ADDING, (np.broadcast_shapes(*shapes),), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_every_operation(kernel, dtype):
    check(kernel, ((3, 1, 16), (1, 5, 16)), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_several_operands_and_outputs(dtype):
    for shapes in (((5, 1, 8), (1, 6, 1), (5, 6, 8)), ((2, 3, 4, 5), (5,), (3, 1, 1))):
        check(CHOICE, shapes, dtype)


@pytest.mark.parametrize("grid, block", [((1, 1), (1, 1)), ((3, 2), (4, 8)), ((1, 5), (32, 1))])
def test_any_grid(grid, block):
    place = Geometry((*grid, 1), (*block, 1))
    check(KERNELS["add_broadcast"], ((6, 1, 24), (1, 5, 24)), np.dtype(np.float32), geometry=place)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_arrays_off_the_boundary(dtype):
    check(KERNELS["add_broadcast"], ((6, 1, 32), (1, 5, 32)), dtype, offset=1)


def test_rows_that_begin_off_the_boundary():
    """Strides that are not whole vectors, though the rows are."""
    rng = np.random.default_rng(3)
    a, b, y = rng.standard_normal((6, 9))[:, :8], rng.standard_normal((6, 1)), np.empty((6, 8))
    launch(KERNELS["add_broadcast"], {"a": a, "b": b, "y": y}, y.shape)
    np.testing.assert_array_equal(y, a + b)


@pytest.mark.parametrize("view", [np.s_[:, ::2], np.s_[::-1, ::-1], np.s_[::3, ::-2]], ids=str)
def test_strided_operands(view):
    """Steps along the rows that are neither 0 nor 1, either way."""
    a = np.arange(20 * 32, dtype=np.float32).reshape(20, 32)[view]
    b, y = np.ones((1, a.shape[1]), np.float32), np.empty(a.shape, np.float32)
    launch(KERNELS["add_broadcast"], {"a": a, "b": b, "y": y}, y.shape)
    np.testing.assert_array_equal(y, a + 1)


def test_scalars():
    table, a, y = np.full((3, 2), np.nan, np.float32), np.arange(4, dtype=np.float32).reshape(4, 1), np.empty((4, 8))
    table[1, 1], y = 0.5, y.astype(np.float32)
    scalars = {"k": np.array([3], np.float32), "table": table, "state": np.array([1, 0, 1, 0]), "width": 2, "s0_at": 1}
    launch(SCALED, {"a": a, "y": y}, y.shape, **scalars)
    np.testing.assert_array_equal(y, np.broadcast_to(1.5 * a, y.shape))


def test_collapse():
    assert collapse((5, 1, 4, 6), [(24, 24, 6, 1), (1, 1, 0, 0)]) == ([5, 24], [[24, 1], [1, 0]])
    assert collapse((2, 3, 4), [(12, 4, 1), (0, 0, 0)]) == ([24], [[1], [0]])
    assert collapse((2, 3, 4), [(12, 4, 1), (0, 4, 1)]) == ([2, 12], [[12, 1], [0, 1]])
    assert collapse((1, 1), [(0, 0)]) == ([], [[]])


def test_layout():
    assert layout([2, 3], [[3, 1], [0, 1]]) == [*[1] * 6, 2, 3, *[0] * 6, 3, 1, *[0] * 7, 1]
    with pytest.raises(ValueError, match=r"^layout: 9 dimensions that do not collapse, of at most 8; copy an operand"):
        layout([2] * 9, [[0] * 9])
