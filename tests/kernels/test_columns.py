"""Elementwise kernels that add up their columns: outputs bit for bit, sums against float64."""

from functools import cache

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, assert_stored, evaluated, exact, shifted

from gpubackprop import formulas
from gpubackprop.backends import codegen
from gpubackprop.backends.codegen import Columns
from gpubackprop.backends.geometry import Geometry, columns_geometry
from gpubackprop.formulas import chain, name, parse

KERNELS = {k.name: k for row in codegen.names() for k in codegen.kernels(row) if isinstance(k, Columns)}
GRADIENT = chain(name("dy"), parse("where(y > 0, 1, 0)")[formulas.RESULT])
IN_PLACE = Columns("in_place", {"dy": GRADIENT}, "relu', in place")
SCALED = Columns("scaled", {"dx": parse("k * dy")[formulas.RESULT]}, "dx = k * dy", single=("k",))


@cache
def library(dtype):
    return build(codegen.unit([*KERNELS.values(), IN_PLACE, SCALED], dtype))


def operands(kernel, shape, dtype, offset=0):
    """An array for each name and the sums, which are not zero before."""
    rng = np.random.default_rng(5)
    arrays = {k: rng.standard_normal(shape) for k in dict.fromkeys((*kernel.writes, *kernel.reads))}
    arrays |= {k: rng.standard_normal(1) for k in kernel.single}
    arrays = {k: shifted(a.astype(dtype), offset) for k, a in arrays.items()}
    return arrays, rng.standard_normal((shape[0], shape[2])).astype(arithmetic(dtype))


def launch(kernel, arrays, sums, accumulate=False, geometry=None):
    """Run the kernel in every order; what its scratch must look like before and after is checked."""
    dtype = next(iter(arrays.values())).dtype
    members, rows, columns = max((a.shape for a in arrays.values()), key=len)
    place = geometry or columns_geometry(rows, columns, members, 16 // dtype.itemsize)
    tickets = np.zeros(place.tickets, np.uint32) if place.tickets else None
    library(dtype.name).run(
        kernel.name, place.grid, place.block, sums=sums, partials=np.full(place.partials, np.nan, sums.dtype),
        tickets=tickets, accumulate=accumulate, rows=rows, columns=columns, members=members, **arrays,
    )  # fmt: skip
    assert tickets is None or not tickets.any()


def check(kernel, shape, dtype, offset=0, accumulate=False, geometry=None):
    arrays, sums = operands(kernel, shape, dtype, offset)
    before = sums.copy()
    [value] = evaluated(kernel, arrays, shape, dtype).values()
    launch(kernel, arrays, sums, accumulate, geometry)
    for key in kernel.writes:
        assert_stored(arrays[key], value, exact(kernel))
    expected = value.sum(1, dtype=np.float64) + accumulate * before
    bound = 4 * np.finfo(sums.dtype).eps * np.sqrt(shape[1]) if exact(kernel) else 1e-5
    np.testing.assert_allclose(sums, expected, rtol=bound, atol=bound * np.abs(value).sum(1).max())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_every_row(kernel, dtype):
    check(kernel, (1, 37, 24), dtype)


SHAPES = {
    "one element": (1, 1, 1),
    "one row": (1, 1, 130),
    "one column": (1, 3000, 1),
    "a few columns": (1, 1200, 10),
    "a tail": (1, 70, 131),
    "many tiles": (1, 40, 1040),
    "many splits": (1, 700, 128),
    "members": (3, 50, 40),
    "members with splits": (2, 300, 7),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(shape, dtype):
    check(KERNELS["relu_backward_bias"], shape, dtype)


@pytest.mark.parametrize("kernel", [*KERNELS.values(), IN_PLACE, SCALED], ids=lambda k: k.name)
def test_adding_to_the_sums(kernel):
    check(kernel, (2, 9, 16), np.dtype(np.float32), accumulate=True)


@pytest.mark.parametrize("block", [(64, 1, 1), (1, 32, 1), (8, 4, 1), (32, 8, 1)], ids=str)
def test_every_block(block):
    tiles = -(-132 // (4 * block[0]))
    place = Geometry((2 * tiles, 3, 1), block, 2 * 3 * 132, 2 * tiles)
    check(KERNELS["relu_backward_bias"], (2, 50, 132), np.dtype(np.float32), geometry=place)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_arrays_off_the_boundary_give_the_same_bits(dtype):
    results = []
    for offset in (0, 1):
        arrays, sums = operands(IN_PLACE, (1, 100, 64), dtype, offset)
        launch(IN_PLACE, arrays, sums)
        results.append((arrays["dy"].tobytes(), sums.tobytes()))
    assert results[0] == results[1]


def test_what_must_not_be_touched_is_not():
    """Neither the identity's gradient nor, with one split, the scratch."""
    identity = KERNELS["identity_backward_bias"]
    assert identity.writes == () and ("const T* __restrict__", "dy") in identity.parameters
    arrays, sums = operands(identity, (1, 8, 12), np.dtype(np.float32))
    before = arrays["dy"].copy()
    place = columns_geometry(8, 12, 1, 4)
    assert place.grid[1] == 1 and (place.partials, place.tickets) == (0, 0)
    launch(identity, arrays, sums, geometry=place)
    np.testing.assert_array_equal(arrays["dy"], before)
    np.testing.assert_allclose(sums, before.sum(1), rtol=1e-6)


def test_a_gradient_that_is_not_finite_spoils_only_its_column():
    """relu' selects: 0 times infinity does not appear."""
    kernel = KERNELS["relu_backward_bias"]
    arrays, sums = operands(kernel, (1, 40, 8), np.dtype(np.float32))
    arrays["dy"][0, 3, 2], arrays["y"][0, 3, 2] = np.inf, 0
    arrays["dy"][0, 4, 5], arrays["y"][0, 4, 5] = np.nan, 1
    launch(kernel, arrays, sums)
    assert np.isnan(sums).tolist() == [[False] * 5 + [True] + [False] * 2] and arrays["dx"][0, 3, 2] == 0


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 128, 512), (1, 4096, 4096), (1, 10**6, 10), (64, 128, 512)])
def test_geometry_fits_the_device_and_the_scratch_is_small(shape):
    members, rows, columns = shape
    for lanes in (2, 4, 8):
        grid, block, partials, tickets = columns_geometry(rows, columns, members, lanes)
        assert block[0] * block[1] == 256 and grid[0] == members * -(-columns // (block[0] * lanes))
        assert (partials, tickets) == ((members * grid[1] * columns, grid[0]) if grid[1] > 1 else (0, 0))
        assert 16 * partials <= members * rows * columns
