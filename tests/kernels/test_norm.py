"""The gradient's norm against float64; clipping, skipping and the loss scale over a sequence of steps."""

from functools import cache
from math import inf, isfinite, nan, sqrt

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, shifted

from gpubackprop.backends import codegen
from gpubackprop.backends.geometry import Geometry, norm_geometry

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
wide_dtype = pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)], ids=lambda d: d.name)


@cache
def library(dtype):
    return build(codegen.file_unit("norm.cu", dtype.name))


def launch(g, control, dtype, *, clip=inf, dynamic=False, growth=2000, place=None, every_order=False):
    """control afterwards."""
    place = place or norm_geometry(g.size, g.itemsize)
    ticket, control = np.zeros(1, np.uint32), np.array(control, arithmetic(dtype))
    run = library(dtype).run if every_order else library(dtype).launch
    run(
        "gradient_norm", place.grid, place.block, control=control, partials=np.full(place.partials, nan, g.dtype),
        ticket=ticket, g=g, clip=clip, dynamic=dynamic, growth=growth, size=g.size,
    )  # fmt: skip
    assert not ticket.any()
    return control.tolist()


def follow(control, norm, clip, growth):
    """The rule in plain words: what becomes of (scale, factor, ok, good) after a gradient of this norm, unscaled."""
    scale, _, _, good = control
    if not isfinite(norm):
        return [max(scale / 2, 1), 0, 0, 0]
    factor = min(1, clip / norm) / scale
    return [min(scale * 2, 2.0**24), factor, 1, 0] if good + 1 >= growth else [scale, factor, 1, good + 1]


def draw(size, dtype):
    return np.random.default_rng(6).standard_normal(size).astype(arithmetic(dtype))


@every_dtype
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1023, 1024, 1027, 5000])
def test_every_size(size, dtype):
    g = draw(size, dtype)
    _, factor, ok, _ = launch(g, [1, 0, 0, 0], dtype, clip=1e-3, every_order=True)
    bound = 8 * float(np.finfo(g.dtype).eps)
    assert ok == 1 and factor == pytest.approx(1e-3 / sqrt(np.square(g.astype(np.float64)).sum()), rel=bound)


@wide_dtype
@pytest.mark.parametrize("size", [1, 7, 2050])
def test_off_the_boundary_of_16_bytes_the_bits_are_the_same(size, dtype):
    g = draw(size, dtype)
    assert launch(shifted(g, 1), [1, 0, 0, 0], dtype, clip=1e-3) == launch(g, [1, 0, 0, 0], dtype, clip=1e-3)


@wide_dtype
def test_no_element_is_left_out_or_counted_twice(dtype):
    for grid, block in ((1, 32), (3, 64), (2, 256)):
        place = Geometry((grid, 1, 1), (block, 1, 1), grid, 1)
        for size in (1, 4, 257, 2048, 3001):
            _, factor, _, _ = launch(
                np.ones(size, dtype), [1, 0, 0, 0], dtype, clip=1 / 64, place=place, every_order=True
            )
            assert factor == dtype.type(1 / 64) / np.sqrt(dtype.type(size))


@wide_dtype
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("clip", [inf, 5.0, 4.9, 5.1, 0.5, 0.0])
def test_clipping(clip, scale, dtype):
    """‖(3, 4)‖ = 5: a gradient is scaled down to the limit, never up, and freed of the loss scale."""
    g = (np.array([3, 0, 4]) * scale).astype(dtype)
    _, factor, ok, _ = launch(g, [scale, nan, nan, 0], dtype, clip=clip)
    assert ok == 1 and factor == pytest.approx(min(1, clip / 5) / scale, rel=2 * float(np.finfo(dtype).eps))


@wide_dtype
@pytest.mark.parametrize("clip", [inf, 1.0])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("at", [0, 5, 1500, 2002])
def test_a_gradient_that_is_not_finite_is_skipped(at, bad, clip, dtype):
    g, place = np.ones(2003, dtype), Geometry((2, 1, 1), (64, 1, 1), 2, 1)
    g[at] = bad
    assert launch(g, [8, nan, nan, 3], dtype, clip=clip, place=place) == [8, 0, 0, 3]
    assert launch(g, [8, nan, nan, 3], dtype, clip=clip, place=place, dynamic=True) == [4, 0, 0, 0]


def test_squares_that_overflow_are_not_finite():
    g = np.full(3, 1e30, np.float32)
    assert launch(g, [1, 1, 1, 0], np.dtype(np.float32))[1:3] == [0, 0]
    assert launch(np.zeros(3, np.float32), [2, nan, 0, 0], np.dtype(np.float32), clip=1.0)[1:3] == [0.5, 1]


@every_dtype
def test_the_loss_scale_over_a_sequence(dtype):
    """Halved after each bad step, doubled after three good ones in a row, within [1, 2^24]; the factor belongs to the
    scale that the step's gradient was made with.
    """
    good, bad = 1.0, nan
    for norms, start in (
        ([good] * 7 + [bad] * 2 + [good] * 2 + [bad] + [good] * 3, 2.0**10),
        ([bad] * 5 + [good] * 4, 4.0),
        ([good] * 7, 2.0**23),
    ):
        control = model = [start, 1, 1, 0]
        for norm in norms:
            g = np.array([norm * control[0], 0], arithmetic(dtype))
            control, model = launch(g, control, dtype, clip=0.5, dynamic=True, growth=3), follow(model, norm, 0.5, 3)
            assert control == model


@every_dtype
def test_without_dynamic_the_loss_scale_stays(dtype):
    control = [16, 1, 1, 5]
    for norm in (1, nan, 2, 2):
        control = launch(np.array([norm], arithmetic(dtype)), control, dtype, growth=1)
        assert control == [16, 1 / 16 if isfinite(norm) else 0, isfinite(norm), 5]


def test_geometry():
    for itemsize in (4, 8):
        for size in (1, 4096, 10**6, 10**10):
            grid, block, partials, tickets = norm_geometry(size, itemsize)
            assert block == (256, 1, 1) and (partials, tickets) == (grid[0], 1) and grid[0] <= 1024
            assert grid[0] == 1024 or 4096 // itemsize * (grid[0] - 1) < size <= 4096 // itemsize * grid[0]
