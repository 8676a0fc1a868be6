"""Sums over all elements with outputs in the same pass: outputs bit for bit, totals against float64."""

from functools import cache

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, assert_stored, evaluated, exact, shifted

from gpubackprop import formulas
from gpubackprop.backends import codegen
from gpubackprop.backends.codegen import Sum
from gpubackprop.backends.geometry import Geometry, sum_geometry
from gpubackprop.formulas import name, parse

COLUMNS = 3  # of an output whose rows have weights
KERNELS = {k.name: k for row in formulas.LOSSES for k in codegen.kernels(row) if isinstance(k, Sum)}
IN_PLACE = Sum("in_place", parse("x = x - t\ntotal = x * x"), "x -= t with the sum of its squares")
ONES = Sum("ones", {"total": name("x")}, "total = Σ x")
STATE = np.array([2, 0, 11, 0])  # row 2 of the table, which is step 13


@cache
def library(dtype):
    return build(codegen.unit([*KERNELS.values(), IN_PLACE, ONES], dtype))


def operands(kernel, size, dtype, offset=0):
    rng = np.random.default_rng(5)
    arrays = {k: rng.standard_normal(size) for k in dict.fromkeys((*kernel.writes, *kernel.reads))}
    arrays = {k: shifted(a.astype(dtype), offset) for k, a in arrays.items()}
    types = {k: arithmetic(dtype) if k in kernel.wide else dtype for k in kernel.single}
    of_rows = {k: np.arange(-(-size // COLUMNS)) % 4 for k in kernel.per_row}  # every fourth is 0
    arrays |= {k: shifted(a.astype(arithmetic(dtype)), offset) for k, a in of_rows.items()}
    return arrays | {k: np.array([0.25 + i]).astype(t) for i, (k, t) in enumerate(types.items())}


def launch(kernel, dtype, arrays, size, loss=None, events=None, geometry=None):
    """total, by the kernel in every order."""
    place, wide = geometry or sum_geometry(size, 16 // dtype.itemsize), arithmetic(dtype)
    total, ticket, table = np.full(1, np.nan, wide), np.zeros(1, np.uint32), np.full((4, 3), np.nan, wide)
    scalars = {f"{k}_at": 1 for k in kernel.table}
    if scalars:
        table[STATE[0], 1] = 1 / 32
        scalars |= {"table": table, "width": 3}
    if kernel.per_row:
        scalars["columns"] = COLUMNS
    library(dtype.name).run(
        kernel.name, place.grid, place.block, total=total, partials=np.full(place.partials, np.nan, wide),
        ticket=ticket, loss=loss, events=events, state=STATE, size=size, **arrays, **scalars,
    )  # fmt: skip
    assert not ticket.any()
    return total[0]


def check(kernel, size, dtype, offset=0, geometry=None):
    arrays = operands(kernel, size, dtype, offset)
    each = {k: arrays[k].repeat(COLUMNS)[:size] for k in kernel.per_row}
    expected = evaluated(kernel, arrays | each | dict.fromkeys(kernel.table, 1 / 32), (size,), dtype)
    total = launch(kernel, dtype, arrays, size, geometry=geometry)
    for key in kernel.writes:
        assert_stored(arrays[key], expected[key], exact(kernel))
    terms = expected["total"].astype(np.float64)
    bound = 4 * np.finfo(total.dtype).eps * np.sqrt(size) if exact(kernel) else 1e-5
    np.testing.assert_allclose(total, terms.sum(), rtol=0, atol=bound * np.abs(terms).sum())
    return arrays, total


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [1, 2, 37, 1024, 1027, 20_001])
@pytest.mark.parametrize("kernel", [*KERNELS.values(), IN_PLACE], ids=lambda k: k.name)
def test_every_loss_at_every_size(kernel, size, dtype):
    check(kernel, size, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [63, 4100])
@pytest.mark.parametrize("kernel", ["mse_step", "mse_step_weighted"])
def test_arrays_off_the_boundary_give_the_same_bits(kernel, size, dtype):
    """The order of adding follows from the size, not from where the arrays begin."""
    (aligned, total), (moved, same) = (check(KERNELS[kernel], size, dtype, offset) for offset in (0, 1))
    assert total == same
    np.testing.assert_array_equal(aligned["dx"], moved["dx"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weights_of_1_give_the_same_bits_as_none(dtype):
    plain, weighted = (KERNELS[f"bce_with_logits_step{w}"] for w in ("", "_weighted"))
    given = operands(weighted, 1027, dtype)
    given["w"][:] = 1
    arrays = {k: given[k].copy() for k in operands(plain, 1027, dtype)}
    assert launch(plain, dtype, arrays, 1027) == launch(weighted, dtype, given, 1027)
    np.testing.assert_array_equal(arrays["dx"], given["dx"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_row_of_weight_0_does_no_harm(dtype):
    kernel, arrays = KERNELS["mse_step_weighted"], operands(KERNELS["mse_step_weighted"], 1027, dtype)
    out = (arrays["w"] == 0).repeat(COLUMNS)[:1027]
    expected = launch(kernel, dtype, arrays, 1027)
    arrays["x"][out] = np.resize([np.nan, np.inf, -np.inf], out.sum())
    assert launch(kernel, dtype, arrays, 1027) == expected
    assert out.any() and not arrays["dx"][out].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_element_is_left_out_or_counted_twice(dtype):
    lanes = 16 // dtype.itemsize
    for grid, block in ((1, 32), (3, 64), (2, 256)):
        place = Geometry((grid, 1, 1), (block, 1, 1), grid, 1)
        for size in (1, lanes - 1, lanes, lanes * 64 + 1, 2000):
            assert launch(ONES, dtype, {"x": np.ones(size, dtype)}, size, geometry=place) == size


def test_the_tally():
    """Two parts of the loss are as exact as twice the bits; the first bad step is kept."""
    dtype, size = np.dtype(np.float32), 40
    loss, events = np.array([2.0**24, 0], dtype), np.array([0, 5])
    for _ in range(3):
        launch(ONES, dtype, {"x": np.full(size, 0.025, dtype)}, size, loss, events)
    assert loss.astype(np.float64).sum() == pytest.approx(2**24 + 3, rel=1e-7) and events.tolist() == [0, 5]
    launch(ONES, dtype, {"x": np.full(size, np.inf, dtype)}, size, loss, events)
    assert events.tolist() == [13, 5]
    events[0] = 7
    launch(ONES, dtype, {"x": np.full(size, np.nan, dtype)}, size, loss, events)
    assert events.tolist() == [7, 5]


def test_geometry():
    for size in (1, 1024, 1025, 10**6, 10**10):
        for lanes in (2, 4, 8):
            grid, block, partials, tickets = sum_geometry(size, lanes)
            assert grid[1:] == block[1:] == (1, 1) and (partials, tickets) == (grid[0], 1) and 1 <= grid[0] <= 2048
