"""Noise adds the normal numbers of gpubackprop.backends.philox, within ulp of their formula, in every type."""

from functools import cache

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, shifted

from gpubackprop.backends import codegen
from gpubackprop.backends.geometry import Geometry, draws_geometry
from gpubackprop.backends.philox import SECOND, Draws

SEED, SITE, STEP = 0x299F31D0A4093822, 0x2FFFFFFF, 0xFEDCBA98
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 31, 1000, 1023, 2055]

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@cache
def library(dtype):
    return build(codegen.file_unit("noise.cu", dtype.name))


def launch(x, out, sigma, *, seed=SEED, site=SITE, step=STEP, state=None, place=None):
    place = place or draws_geometry(x.size, x.dtype.itemsize)
    library(x.dtype).run(
        "noise", place.grid, place.block, out=out, x=x, seed=seed, site=site, state=state, step=step, sigma=sigma,
        size=x.size,
    )  # fmt: skip
    return out


def exact(size, dtype, wider, seed=SEED, site=SITE, step=STEP):
    """The normal numbers of those uniforms, in a wider type."""
    u = Draws(size, dtype).uniform(seed, site, step)
    v = Draws(size, dtype).uniform(seed, site | SECOND, step)
    angle = (v * v.dtype.type(2 * np.pi)).astype(wider)
    return np.sqrt(-2 * np.log((1 - u).astype(wider))) * np.cos(angle)


@cache
def normals(size, wide, **key):
    """As a kernel of that arithmetic has them, bit for bit."""
    return launch(np.zeros(size, wide), np.empty(size, wide), 1.0, **key)


def expected(x, sigma, **key):
    """Product and sum rounded once each, then stored."""
    wide = arithmetic(x.dtype)
    with np.errstate(all="ignore"):
        return (x.astype(wide) + wide.type(sigma) * normals(x.size, wide, **key)).astype(x.dtype)


def draw(size, dtype):
    return np.random.default_rng(1).standard_normal(size).astype(dtype)


def same(a, b):
    np.testing.assert_array_equal(a.astype(np.float64), b.astype(np.float64))


@pytest.mark.parametrize("dtype, wider", [("float32", np.float64), ("float64", np.longdouble)])
def test_normals_are_within_4_ulp(dtype, wider):
    true = exact(40_000, dtype, wider)
    error = np.abs(normals(40_000, np.dtype(dtype)) - true) / np.spacing(np.abs(true.astype(dtype)))
    assert error.max() <= 4


@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, dtype):
    x = draw(size, dtype)
    same(launch(x, np.full(size, 7, dtype), 0.3), expected(x, 0.3))


@every_dtype
@pytest.mark.parametrize("size", [3, 8, 1023])
@pytest.mark.parametrize("x_offset, out_offset", [(1, 0), (0, 1), (3, 3)])
def test_off_the_boundary_of_16_bytes(size, x_offset, out_offset, dtype):
    x = shifted(draw(size, dtype), x_offset)
    same(launch(x, shifted(np.full(size, 7, dtype), out_offset), 0.5), expected(x, 0.5))


@every_dtype
def test_what_is_not_finite_stays(dtype):
    x = np.resize(np.array([np.inf, -np.inf, np.nan]), 203).astype(dtype)
    same(launch(x, np.empty_like(x), 0.5), x)


def test_the_draw_of_a_prefix_is_the_prefix_of_the_draw():
    np.testing.assert_array_equal(normals(1023, np.dtype("f")), normals(40_000, np.dtype("f"))[:1023])


@pytest.mark.parametrize(
    "seed, site, step", [(0, 0, 0), (1, 0, 0), (2**63, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 2**30 - 1, 2**32 - 1)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_seed_site_and_step(seed, site, step, dtype):
    true = exact(100, dtype, np.float64, seed, site, step)
    found = normals(100, np.dtype(dtype), seed=seed, site=site, step=step)
    np.testing.assert_allclose(found, true, rtol=4 * np.finfo(dtype).eps)


def test_the_step_of_training():
    """Counted from that of the first row of the table; past 2^32 it wraps."""
    x = np.ones(100, np.float32)
    for row, first in ((0, 1), (7, 100), (3, 2**32 - 2)):
        out = launch(x, np.empty_like(x), 0.5, state=np.array([row, 0, first, 0]))
        same(out, expected(x, 0.5, step=(row + first) % 2**32))


@every_dtype
def test_any_number_of_blocks(dtype):
    x = draw(1001, dtype)
    for grid, block in ((1, 32), (3, 64), (9, 96)):
        out = launch(x, np.empty_like(x), 0.5, place=Geometry((grid, 1, 1), (block, 1, 1)))
        same(out, expected(x, 0.5))
