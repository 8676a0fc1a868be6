"""Philox against Random123's vectors; draws against the plain algorithm, their moments and splits."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from gpubackprop.backends.philox import CHUNK, MASK, SECOND, Draws, philox4x32

SEED = 0x299F31D0A4093822
N = 1_000_003

# Random123, tests/kat_vectors, philox4x32 10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    block = np.array(words(counter), np.uint32)[:, None]
    assert philox4x32(block, tuple(words(key)))[:, 0].tolist() == words(result)


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_known_answers_as_draws(counter, key, result):
    low, high, step, site = words(counter)
    seed = words(key)[1] << 32 | words(key)[0]
    assert Draws(4, start=4 * (high << 32 | low)).bits(seed, site, step).tolist() == words(result)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 4 * CHUNK, 4 * CHUNK + 1, 8 * CHUNK + 7])
@pytest.mark.parametrize("start", [0, 3, 2**34 - 6])  # the last one carries into the counter's high word
def test_bits_are_the_plain_algorithm(n, start):
    element = np.arange(n, dtype=np.uint64) + np.uint64(start)
    block, word = element // 4, (element % 4).astype(int)
    counter = np.stack([block & MASK, block >> 32, np.full_like(block, 7), np.full_like(block, 5)])
    expected = philox4x32(counter.astype(np.uint32), (SEED & MASK, SEED >> 32))[word, np.arange(n)]
    bits = Draws(n, start=start).bits(SEED, site=5, step=7)
    assert bits.dtype == np.uint32 and bits.shape == (n,)
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", ["bits", "uniform", "normal"])
def test_any_split_draws_the_same(method, dtype):
    whole = getattr(Draws(1000, dtype), method)(SEED, 1, 2)
    cuts = [0, 1, 2, 130, 516, 999, 1000]
    parts = [getattr(Draws(b - a, dtype, start=a), method)(SEED, 1, 2) for a, b in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_small_draws(n, dtype):
    draws = Draws(n, dtype)
    for values in draws.uniform(1, 2, 3), draws.normal(1, 2, 3):
        assert values.shape == (n,) and values.dtype == dtype
    mask = draws.bernoulli(0.5, 1, 2, 3)
    assert mask.shape == (n,) and mask.dtype == bool


def test_seed_site_and_step_each_change_the_stream():
    draws = Draws(1000)
    keys = [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1)]
    streams = [draws.bits(*key).copy() for key in keys]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert np.mean(a == b) < 0.01
    np.testing.assert_array_equal(draws.bits(*keys[0]), streams[0])


@pytest.mark.parametrize("dtype, unit", [("float32", 2.0**-24), ("float64", 2.0**-53)])
def test_uniform(dtype, unit):
    u = Draws(N, dtype).uniform(SEED, 0, 0)
    assert u.min() >= 0 and u.max() < 1
    assert np.all(u / unit == np.floor(u / unit)) and np.any(u / unit % 2 == 1)
    u = u.astype(np.float64)
    assert abs(u.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / N)
    assert abs(u.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / N)
    lagged = np.mean((u[1:] - 1 / 2) * (u[:-1] - 1 / 2))
    assert abs(lagged) < 4 / 12 / np.sqrt(N)


def test_float32_uniforms_are_the_float64_ones_cut_short():
    short, long = Draws(1000, "float32").uniform(SEED, 3, 4), Draws(1000, "float64").uniform(SEED, 3, 4)
    np.testing.assert_array_equal(short, np.floor(long * 2**24) / 2**24)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normal(dtype):
    z = Draws(N, dtype).normal(SEED, 0, 0).astype(np.float64)
    assert np.isfinite(z).all()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(np.mean(z**power) - moment) < 4 * np.sqrt(variance / N)
    assert abs(np.mean(z[1:] * z[:-1])) < 4 / np.sqrt(N)


@pytest.mark.parametrize("dtype, wider", [("float32", np.float64), ("float64", np.longdouble)])
def test_normals_are_within_4_ulp(dtype, wider):
    draws = Draws(50_000, dtype)
    u, v = (draws.uniform(SEED, site, 0).astype(wider) for site in (3, 3 | SECOND))
    angle = (v.astype(dtype) * np.dtype(dtype).type(2 * np.pi)).astype(wider)
    true = np.sqrt(-2 * np.log(1 - u)) * np.cos(angle)
    error = np.abs(draws.normal(SEED, 3, 0) - true) / np.spacing(np.abs(true.astype(dtype)))
    assert error.max() <= 4


def test_normal_is_finite_at_both_ends_of_the_uniform(monkeypatch):
    for word in (0, MASK):
        for dtype in ("float32", "float64"):
            draws = Draws(5, dtype)
            monkeypatch.setattr(draws, "bits", lambda *key, d=draws, w=word: d._bits.fill(w) or d._bits)
            assert np.isfinite(draws.normal(0, 0, 0)).all()


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_bernoulli(p):
    mask = Draws(N).bernoulli(p, SEED, 0, 0)
    assert abs(mask.mean() - p) <= 4 * np.sqrt(p * (1 - p) / N)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", ["bits", "uniform", "normal", "bernoulli", "certain"])
def test_a_draw_allocates_nothing(method, dtype):
    draws = Draws(300_000, dtype)
    probability = {"bernoulli": [0.5], "certain": [1.0]}.get(method, [])
    draw = getattr(draws, "bernoulli" if probability else method)
    draw(*probability, SEED, 1, 2)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        draw(*probability, SEED, 1, 2)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 8192


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="float16, expected float32 or float64"):
        Draws(4, "float16")
