"""Reductions: sums and means against float64, extremes to the bit, over every geometry."""

from functools import cache
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, shifted

from gpubackprop.backends import codegen
from gpubackprop.backends.geometry import THREADS, reduce_geometry, reduction_steps

NUMPY = {"sum": np.add.reduce, "mean": np.mean, "max": np.maximum.reduce, "min": np.minimum.reduce}
LINES = [(1, 1, 1), (7, 1, 1), (1, 37, 1), (3, 10, 1), (300, 8, 1), (70, 100, 1), (3, 515, 1), (5, 4096, 1)]
SPLIT = [(1, 40_003, 1), (3, 9000, 1), (2, 1000, 5), (1, 3000, 8), (1, 700, 130)]
ROWS = [(1, 1, 9), (2, 3, 4), (300, 2, 3), (5, 9, 130), (4, 40, 33), (130, 40, 2), (1, 100, 512), (9, 5, 5000)]


@cache
def library(dtype, source, output):
    return build(codegen.file_unit("reduce.cu", dtype, SOURCE=source, OUTPUT=output))


def launch(kind, x, shape, dtype, out=None, accumulate=0, output=None, offset=0):
    """out (outer, inner), by the kernel in every order; the scratch as it must be left."""
    outer, length, inner = shape
    wide = arithmetic(dtype)
    at = reduce_geometry(*shape, x.dtype.itemsize)
    out = shifted(np.full((outer, inner), 9, output or dtype), offset) if out is None else out
    tickets = np.zeros(at.tickets, np.uint32) if at.tickets else None
    partials = np.full(at.partials, np.nan, wide) if at.partials else None
    library(dtype.name, x.dtype.name, out.dtype.name).run(
        f"reduce_{kind}", at.grid, at.block, out=out, partials=partials, tickets=tickets, x=x, accumulate=accumulate,
        outer=outer, length=length, inner=inner,
    )  # fmt: skip
    assert tickets is None or not tickets.any()
    return out


def check(kind, shape, dtype, offset=0):
    x = shifted(np.random.default_rng(shape).normal(size=shape).astype(dtype), offset)
    out = launch(kind, x, shape, dtype, offset=offset)
    wanted = NUMPY[kind](x.astype(np.float64), axis=1)
    if kind in ("max", "min"):
        np.testing.assert_array_equal(out.astype(np.float64), wanted)
        return out
    magnitude = np.abs(x.astype(np.float64)).sum(1) / (shape[1] if kind == "mean" else 1)
    bound = 4 * np.finfo(arithmetic(dtype)).eps * (1 + np.log2(shape[1])) * magnitude
    bound += float(ml_dtypes.finfo(dtype).eps) * np.abs(wanted)
    assert np.all(np.abs(out.astype(np.float64) - wanted) <= bound)
    return out


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [*LINES, *SPLIT, *ROWS], ids=str)
def test_sums(shape, dtype):
    check("sum", shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [LINES[2], LINES[5], SPLIT[1], SPLIT[2], ROWS[4]], ids=str)
@pytest.mark.parametrize("kind", ["mean", "max", "min"])
def test_means_and_extremes(kind, shape, dtype):
    check(kind, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(3, 40, 1), (1, 20_003, 1), (2, 30, 24), (1, 1000, 16)], ids=str)
def test_arrays_off_the_boundary_give_the_same_bits(shape, dtype):
    aligned, moved = check("sum", shape, dtype), check("sum", shape, dtype, offset=1)
    np.testing.assert_array_equal(aligned, moved)


@pytest.mark.parametrize("shape", [(1, 5000, 1), (3, 70, 1), (2, 9, 5), (1, 2000, 4)], ids=str)
@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nan_and_infinity(kind, shape, dtype):
    """NaN wins wherever it stands; of infinities alone the result is one."""
    x = np.random.default_rng(1).normal(size=shape).astype(dtype)
    worst = np.inf if kind == "min" else -np.inf
    for place in (0, shape[1] // 2, shape[1] - 1):
        spoilt = x.copy()
        spoilt[-1, :, -1] = worst
        spoilt[0, place, 0] = np.nan
        out, wanted = launch(kind, spoilt, shape, dtype), NUMPY[kind](spoilt.astype(np.float64), axis=1)
        np.testing.assert_array_equal(out.astype(np.float64), wanted)


@pytest.mark.parametrize("shape", [(5, 70, 1), (1, 9000, 1), (2, 30, 12), (1, 1000, 9)], ids=str)
@pytest.mark.parametrize("kind", NUMPY)
@pytest.mark.parametrize("dtype", [DTYPES["float32"], DTYPES["bfloat16"]], ids=str)
def test_accumulate(kind, shape, dtype):
    x = np.random.default_rng(2).normal(size=shape).astype(dtype)
    fresh = launch(kind, x, shape, dtype, output=arithmetic(dtype)).astype(np.float64)
    out = launch(kind, x, shape, dtype, out=np.full((shape[0], shape[2]), 3, dtype), accumulate=1)
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(out.astype(np.float64), fresh + 3, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype, source, output", [
    ("float16", "float16", "float32"), ("bfloat16", "float32", "bfloat16"), ("float32", "uint8", "float32"),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(4, 33, 1), (1, 30_001, 1), (2, 60, 16), (3, 50, 7)], ids=str)
def test_other_types_in_and_out(shape, dtype, source, output):
    x = np.random.default_rng(3).integers(0, 200, shape).astype(DTYPES.get(source, source))
    out = launch("mean", x, shape, DTYPES[dtype], output=DTYPES[output])
    assert out.dtype == DTYPES[output]
    rtol = 4 * float(ml_dtypes.finfo(out.dtype).eps)
    np.testing.assert_allclose(out.astype(np.float64), x.astype(np.float64).mean(1), rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_element_is_left_out_or_counted_twice(dtype):
    lanes = 16 // dtype.itemsize
    block = THREADS * lanes
    for length in (1, lanes - 1, lanes, 33 * lanes + 1, 4 * block, 4 * block + 1, 9 * block + 3):
        x = np.ones((1, length, 1), dtype)
        assert launch("sum", x, x.shape, dtype, output=arithmetic(dtype)) == length


@pytest.mark.parametrize("shape, axes", [
    ((2, 3, 4, 5), (0, 2, 3)), ((2, 3, 4, 5), (1,)), ((5, 1, 4), (0, 2)), ((3, 4), ()), ((), ()),
    ((4, 1, 6, 2, 3), (0, 2, 4)),
])  # fmt: skip
def test_several_axes_are_several_reductions(shape, axes):
    x = np.random.default_rng(4).normal(size=shape)
    source = x.reshape(-1)
    for step in reduction_steps(shape, axes):
        source = NUMPY["max"](source.reshape(step), axis=1)
    np.testing.assert_array_equal(source.reshape(-1), x.max(axes).reshape(-1))
    assert len(reduction_steps((5, 1, 4), (0, 2))) == 1


def test_geometry():
    """Whole warps, limits of the device, and splits that leave each block some rows."""
    sizes = [1, 2, 9, 100, 5000, 10**6]
    for outer, length, inner, itemsize in product(sizes, sizes, sizes, (1, 2, 4, 8)):
        if outer * length * inner > 10**12:
            continue
        grid, block, partials, tickets = reduce_geometry(outer, length, inner, itemsize)
        across, down, lines = block
        assert (across * down * lines) % 32 == 0 and across * down * lines <= THREADS and lines <= 64
        assert across <= 32 or (inner, across) == (1, THREADS)
        assert lines == 1 or across * down <= 32
        assert grid[0] < 2**31 and 1 <= grid[1] <= 512 and grid[2] == 1
        assert (partials, tickets) == ((outer * inner * grid[1], grid[0]) if grid[1] > 1 else (0, 0))
        if inner == 1:
            assert grid[0] * down >= outer
        else:
            assert grid[0] == -(-inner // (across * 16 // itemsize)) * -(-outer // lines)
