"""Dropout keeps the elements that gpubackprop.backends.philox keeps, in every type, bit for bit."""

from functools import cache

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, shifted

from gpubackprop.backends import codegen
from gpubackprop.backends.geometry import Geometry, draws_geometry
from gpubackprop.backends.philox import Draws

SEED, SITE, STEP = 0x299F31D0A4093822, 0x2FFFFFFF, 0xFEDCBA98
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 31, 1000, 1023, 2055]

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@cache
def library(dtype):
    return build(codegen.file_unit("dropout.cu", dtype.name))


def launch(x, out, rate, *, seed=SEED, site=SITE, step=STEP, state=None, accumulate=False, place=None):
    place = place or draws_geometry(x.size, x.dtype.itemsize)
    library(x.dtype).run(
        "dropout", place.grid, place.block, out=out, x=x, seed=seed, site=site, state=state, step=step,
        threshold=round((1 - rate) * 2**32), scale=1 / (1 - rate), accumulate=accumulate, size=x.size,
    )  # fmt: skip
    return out


def expected(x, rate, seed=SEED, site=SITE, step=STEP, before=None):
    """The reference: selected, never multiplied by 0; stored once."""
    wide = arithmetic(x.dtype)
    kept = Draws(x.size).bernoulli(1 - rate, seed, site, step)
    with np.errstate(all="ignore"):
        y = np.where(kept, x.astype(wide) * wide.type(1 / (1 - rate)), wide.type(0))
        return (y if before is None else before.astype(wide) + y).astype(x.dtype)


def assert_same_bits(a, b):
    """NaN for NaN, and zeros of the same sign."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.signbit(a[~np.isnan(a)]), np.signbit(b[~np.isnan(b)]))


def draw(size, dtype, seed=1):
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, dtype):
    x = draw(size, dtype)
    assert_same_bits(launch(x, np.full(size, 7, dtype), 0.3), expected(x, 0.3))


@every_dtype
@pytest.mark.parametrize("size", [3, 8, 1023])
@pytest.mark.parametrize("x_offset, out_offset", [(1, 0), (0, 1), (3, 3)])
def test_off_the_boundary_of_16_bytes(size, x_offset, out_offset, dtype):
    x = shifted(draw(size, dtype), x_offset)
    assert_same_bits(launch(x, shifted(np.full(size, 7, dtype), out_offset), 0.5), expected(x, 0.5))


@every_dtype
@pytest.mark.parametrize("size", [5, 64, 1023])
@pytest.mark.parametrize("offset", [0, 1])
def test_accumulate(size, offset, dtype):
    x, before = draw(size, dtype), draw(size, dtype, seed=2)
    before[::5] = -0.0  # where the element is dropped too, −0 + 0 is 0
    out = launch(x, shifted(before, offset), 0.5, accumulate=True)
    assert_same_bits(out, expected(x, 0.5, before=before))


@every_dtype
def test_what_is_dropped_is_zero_whatever_it_was(dtype):
    x = np.resize(np.array([np.inf, -np.inf, np.nan, -1.0, -0.0, 1e-6, 3e38], np.float64), 203)
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    out = launch(x, np.empty_like(x), 0.5)
    assert_same_bits(out, expected(x, 0.5))
    assert 50 < np.count_nonzero(out.astype(np.float64) == 0) < 180


@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.1, 0.9, 1 - 2.0**-32])
def test_rates(rate):
    """A rate of 0 keeps all: the threshold is above every word."""
    x = np.ones(1000, np.float32)
    assert_same_bits(launch(x, np.empty_like(x), rate), expected(x, rate))


def test_a_word_at_the_threshold_is_dropped():
    x, words = np.ones(8, np.float32), Draws(8).bits(SEED, SITE, STEP)
    for i, word in enumerate(words.tolist()):
        for threshold in (word, word + 1):
            out = launch(x, np.empty_like(x), 1 - threshold / 2**32)
            assert (out[i] > 0) == (word < threshold)


@pytest.mark.parametrize(
    "seed, site, step", [(0, 0, 0), (1, 0, 0), (2**63, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 2**30 - 1, 2**32 - 1)]
)
def test_seed_site_and_step(seed, site, step):
    x = np.ones(100, np.float32)
    out = launch(x, np.empty_like(x), 0.5, seed=seed, site=site, step=step)
    assert_same_bits(out, expected(x, 0.5, seed, site, step))


def test_the_step_of_training():
    """Counted from that of the first row of the table; past 2^32 it wraps."""
    x = np.ones(100, np.float32)
    for row, first in ((0, 1), (7, 100), (3, 2**32 - 2)):
        out = launch(x, np.empty_like(x), 0.5, state=np.array([row, 0, first, 0]))
        assert_same_bits(out, expected(x, 0.5, step=(row + first) % 2**32))


@every_dtype
def test_any_number_of_blocks(dtype):
    x = draw(1001, dtype)
    for grid, block in ((1, 32), (3, 64), (9, 96)):
        out = launch(x, np.empty_like(x), 0.5, place=Geometry((grid, 1, 1), (block, 1, 1)))
        assert_same_bits(out, expected(x, 0.5))


def test_geometry():
    for itemsize, share in ((2, 8), (4, 4), (8, 4)):
        for size in (1, 256 * share, 256 * share + 1, 2**33):
            grid, block, *scratch = draws_geometry(size, itemsize)
            assert block == (256, 1, 1) and scratch == [0, 0]
            assert 256 * share * (grid[0] - 1) < size <= 256 * share * grid[0]
