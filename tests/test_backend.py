"""The reference backend, primitive by primitive, against plain NumPy."""

import logging
import tracemalloc

import numpy as np
import pytest

from gpubackprop import backends
from gpubackprop.backends import get_backend, why_not_cuda
from gpubackprop.backends.philox import Draws
from gpubackprop.formulas import RESULT, name, parse

BACK = get_backend("cpu")
DTYPES = [np.float32, np.float64]
RTOL = {np.float32: 2e-6, np.float64: 1e-14}


def close(a, b, dtype=np.float64, scale=1.0):
    np.testing.assert_allclose(a, b, rtol=RTOL[dtype], atol=RTOL[dtype] * scale)


def junk(shape, dtype=np.float64):
    """An output that shows where it was not written."""
    return np.full(shape, np.nan, dtype)


# ---- devices -------------------------------------------------------------------------------------------------------


def works(device):
    try:
        return bool(get_backend(device))
    except RuntimeError:
        return False


@pytest.mark.parametrize("device", ["gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda:0 ", "cpu:0", "", "mps"])
def test_unknown_devices(device):
    with pytest.raises(ValueError, match=f"unknown device '{device}'; choose from auto, cpu, cuda, cuda:N"):
        get_backend(device)


@pytest.mark.parametrize("device", [None, 0, np, b"cpu"])
def test_a_device_is_a_string(device):
    with pytest.raises(TypeError, match=r"device: expected a string, got .*; use 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        get_backend(device)


@pytest.mark.skipif(works("cuda"), reason="CUDA works here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_an_explicit_cuda_that_cannot_work_is_an_error(device):
    with pytest.raises(RuntimeError, match=f"device '{device}': .*; use device='cpu'") as error:
        get_backend(device)
    assert why_not_cuda() in str(error.value)


@pytest.mark.skipif(works("cuda"), reason="CUDA works here")
def test_auto_is_the_cpu_without_cuda_and_says_so_once(caplog):
    backends._auto.cache_clear()
    with caplog.at_level(logging.INFO, "gpubackprop"):
        assert get_backend("auto") is get_backend("auto") is get_backend("cpu")
    assert [why_not_cuda() in r.getMessage() for r in caplog.records] == [True]


def test_one_object_per_device():
    assert get_backend("cpu") is get_backend("cpu")
    assert get_backend("cpu").device == "cpu" and get_backend("cpu").xp is np


# ---- buffers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, np.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 5, 6)])
def test_empty_starts_on_a_cache_line(shape, dtype):
    buffer = BACK.empty(shape, dtype)
    assert buffer.shape == shape and buffer.dtype == dtype and buffer.flags.c_contiguous
    assert buffer.size == 0 or buffer.ctypes.data % 64 == 0


def test_to_numpy_copies_and_asarray_copies_only_where_it_must():
    a = np.arange(6.0).reshape(2, 3)
    assert BACK.to_numpy(a) is not a and not np.shares_memory(BACK.to_numpy(a), a)
    assert BACK.asarray(a) is a
    assert BACK.asarray(a.T).flags.c_contiguous and BACK.asarray(a, np.float32).dtype == np.float32


# ---- gemm ----------------------------------------------------------------------------------------------------------

STACKS = [((), ()), ((4,), (4,)), ((4,), ()), ((), (4,)), ((1,), (1,))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("stacks", STACKS)
@pytest.mark.parametrize("sizes", [(2, 3, 5), (1, 1, 1), (3, 0, 2), (7, 64, 1)])
def test_gemm(sizes, stacks, transpose_a, transpose_b, accumulate, dtype, rng):
    m, k, n = sizes
    a = rng.normal(size=stacks[0] + ((k, m) if transpose_a else (m, k))).astype(dtype)
    b = rng.normal(size=stacks[1] + ((n, k) if transpose_b else (k, n))).astype(dtype)
    expected = (a.swapaxes(-1, -2) if transpose_a else a) @ (b.swapaxes(-1, -2) if transpose_b else b)
    out = np.ones(expected.shape, dtype) if accumulate else junk(expected.shape, dtype)
    launch = BACK.gemm(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b, accumulate=accumulate)
    launch.run()
    close(out, expected + accumulate, dtype, scale=8)
    assert launch.flops == 2 * m * k * n * max(1, *(s[0] for s in stacks if s), 1)
    assert launch.bytes == a.nbytes + b.nbytes + out.nbytes


@pytest.mark.parametrize("a, b, out", [
    ((2, 3), (4, 5), (2, 5)), ((2, 3), (3, 5), (2, 4)), ((2, 3), (3, 5), (3, 5)), ((4, 2, 3), (5, 3, 2), (4, 2, 2)),
    ((4, 2, 3), (4, 3, 2), (2, 2)), ((2, 3), (3, 5), (1, 2, 5)), ((2, 2, 2, 3), (3, 5), (2, 2, 2, 5)),
    ((3,), (3, 5), (5,)), ((2, 3), (3,), (2,)), ((), (3, 3), (3, 3)),
])  # fmt: skip
def test_gemm_shapes_that_do_not_fit(a, b, out):
    with pytest.raises(ValueError, match="gemm: shapes do not fit"):
        BACK.gemm(np.ones(a), np.ones(b), np.ones(out))


def test_gemm_of_mixed_dtypes():
    with pytest.raises(TypeError, match="gemm: operands of one dtype"):
        BACK.gemm(np.ones((2, 2)), np.ones((2, 2), np.float32), np.ones((2, 2)))


# ---- copy, fill, reduce, gather, scatter ---------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [False, True])
def test_copy_broadcasts_and_takes_strided_views(accumulate, rng):
    big, x = np.ones((4, 6)), rng.normal(size=(3, 1))
    BACK.copy(x, big[:3, ::2], accumulate=accumulate).run()
    expected = np.ones((4, 6))
    expected[:3, ::2] = x + accumulate
    np.testing.assert_array_equal(big, expected)
    y = junk((3, 4))
    BACK.copy(big.T[:3], y).run()
    np.testing.assert_array_equal(y, expected.T[:3])
    with pytest.raises(ValueError, match=r"copy: shapes do not fit|broadcast"):
        BACK.copy(np.ones((2, 3)), np.ones(3))


def test_fill():
    out = junk((2, 3))
    BACK.fill(out[:, 1:], 2.5).run()
    assert np.isnan(out[:, 0]).all() and (out[:, 1:] == 2.5).all()


REDUCE = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", REDUCE)
@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_reduce(kind, axes, accumulate, dtype, rng):
    x = rng.normal(size=(3, 4, 5)).astype(dtype)
    expected = REDUCE[kind](x.astype(np.float64), axis=axes)
    out = np.ones(expected.shape, dtype) if accumulate else junk(expected.shape, dtype)
    BACK.reduce(kind, x, axes, out, accumulate=accumulate).run()
    close(out, expected + accumulate, dtype, scale=8)


@pytest.mark.parametrize("kind, axes, out", [("sum", (0,), (3,)), ("sum", (0, 1), (1,)), ("prod", (0,), (4,)),
                                             ("mean", (), ())])  # fmt: skip
def test_reduce_refuses(kind, axes, out):
    with pytest.raises(ValueError, match=f"{kind}: "):
        BACK.reduce(kind, np.ones((3, 4)), axes, np.ones(out))


def test_a_sum_of_nothing_is_zero():
    out = junk((3,))
    BACK.reduce("sum", np.ones((0, 3)), (0,), out).run()
    assert out.tolist() == [0, 0, 0]


@pytest.mark.parametrize("index", [[0], [2, 0, 2, 2, 1], [], [1] * 20])
def test_gather_and_its_transpose(index, rng):
    x, index = rng.normal(size=(2, 3, 4)), np.array(index, np.intp)
    out, dx = junk((2, len(index), 4)), rng.normal(size=x.shape)
    BACK.gather(x, index, out).run()
    np.testing.assert_array_equal(out, x[:, index])
    expected, dy = dx.copy(), rng.normal(size=out.shape)
    for i, k in enumerate(index):  # in the order of i: the same bits each time
        expected[:, k] += dy[:, i]
    BACK.scatter_add(dy, index, dx).run()
    np.testing.assert_array_equal(dx, expected)
    with pytest.raises(ValueError, match="gather: shapes do not fit"):
        BACK.gather(x, index, np.ones((2, len(index) + 1, 4)))
    with pytest.raises(ValueError, match="scatter_add: shapes do not fit"):
        BACK.scatter_add(dy, index, np.ones((3, 3, 4)))


# ---- elementwise with sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (5, 7), (300, 500)])
def test_elementwise_sum(shape, dtype, rng):
    a, b, out = rng.normal(size=shape).astype(dtype), rng.normal(size=shape).astype(dtype), junk((), dtype)
    BACK.elementwise_sum("test", parse("a * b + 1"), {"a": a, "b": b}, out).run()
    exact = np.sum(a.astype(np.float64) * b + 1)
    assert abs(out - exact) <= 4 * np.finfo(dtype).eps * max(1.0, float(np.abs(a * b + 1).sum()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (0, 3), (4, 5, 3), (400, 300)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_elementwise_columns(shape, accumulate, dtype, rng):
    x, dy = rng.normal(size=shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    expected, columns = x * dy, np.full(shape[:-2] + shape[-1:], 1 if accumulate else np.nan, dtype)
    BACK.elementwise_columns(
        "test", parse("out = x * dy"), {"x": x, "dy": dy}, dy, columns, accumulate=accumulate
    ).run()
    np.testing.assert_array_equal(dy, expected)  # the output may be an input
    close(columns, expected.astype(np.float64).sum(-2) + accumulate, dtype, scale=50)


def test_elementwise_columns_of_the_buffer_itself_only_sums(rng):
    dy, columns = rng.normal(size=(5, 3)), junk(3)
    before = dy.copy()
    BACK.elementwise_columns("test", {"dz": name("dy")}, {"dy": dy}, dy, columns).run()
    np.testing.assert_array_equal(dy, before)
    close(columns, before.sum(0))
    dz = junk((5, 3))
    BACK.elementwise_columns("test", {"dz": name("dy")}, {"dy": dy}, dz, columns).run()
    np.testing.assert_array_equal(dz, before)
    with pytest.raises(ValueError, match="test: shapes do not fit: column sums"):
        BACK.elementwise_columns("test", {"dz": name("dy")}, {"dy": dy}, dz, np.ones(5))


# ---- rows: softmax, top1, normalisation, dropout -------------------------------------------------------------------


def log_softmax(x):
    x = x.astype(np.longdouble)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", ["ordinary", "±1e4", "equal", "one row", "one class"])
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_cross_entropy(logits, soft, dtype, rng):
    x = {
        "ordinary": rng.normal(size=(5, 4)) * 3, "±1e4": rng.choice([-1e4, 0, 1e4], (6, 4)),
        "equal": np.full((3, 4), 7.0), "one row": rng.normal(size=(1, 4)), "one class": rng.normal(size=(3, 1)),
    }[logits].astype(dtype)  # fmt: skip
    n, k = x.shape
    t = rng.random((n, k)).astype(dtype) if soft else np.eye(k, dtype=dtype)[rng.integers(0, k, n)]
    target = t if soft else t.argmax(1)
    residual, total = junk(x.shape, dtype), junk((), dtype)
    launch = BACK.softmax_cross_entropy(x, target, residual, total)
    launch.run()
    log_p = log_softmax(x)
    expected = -np.sum(t * log_p), t.sum(1, keepdims=True) * np.exp(log_p) - t
    assert np.isfinite(total) and np.isfinite(residual).all()
    close(float(total), float(expected[0]), dtype, scale=10)
    close(residual, expected[1].astype(np.float64), dtype, scale=4)
    first = total.copy(), residual.copy()
    launch.run()
    assert (first[0], first[1].tobytes()) == (total, residual.tobytes())


def test_softmax_cross_entropy_of_a_ruled_out_class():
    """A logit of −infinity is probability 0."""
    x, residual, total = np.array([[1.0, -np.inf, 2.0]]), junk((1, 3)), junk(())
    BACK.softmax_cross_entropy(x, np.array([2]), residual, total).run()
    close(total, np.log(1 + np.exp(-1)))
    close(residual, [[1 / (1 + np.e), 0, -1 / (1 + np.e)]])


@pytest.mark.parametrize("target, residual", [((4,), (5, 3)), ((5, 2), (5, 3)), ((5,), (5, 2)), ((5, 1), (5, 3))])
def test_softmax_cross_entropy_shapes(target, residual):
    with pytest.raises(ValueError, match=r"softmax_cross_entropy: shapes do not fit: logits \(5, 3\) with target"):
        BACK.softmax_cross_entropy(np.ones((5, 3)), np.ones(target), np.ones(residual), np.ones(()))


def test_top1_counts_rows_whose_largest_is_at_the_label(rng):
    x, labels, count = rng.normal(size=(50, 7)), rng.integers(0, 7, 50), np.array(3)
    launch = BACK.top1(x, labels, count)
    launch.run()
    hits = int(np.sum(x.argmax(1) == labels))
    assert count == 3 + hits
    launch.run()
    assert count == 3 + 2 * hits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shift", [0, 1e3])
def test_normalize(axis, dtype, shift, rng):
    """Also far from 0: the variance is taken from the centred values."""
    x = (rng.normal(size=(6, 5)) + shift).astype(dtype)
    gain, bias = rng.normal(size=5).astype(dtype), rng.normal(size=5).astype(dtype)
    out, xhat, n = junk(x.shape, dtype), junk(x.shape, dtype), x.shape[1 - axis]
    mean, variance, rstd = (junk(n, dtype) for _ in range(3))
    BACK.normalize(x, gain, bias, axis, 1e-5, out, xhat, mean, variance, rstd).run()
    x = x.astype(np.float64)
    m, v = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
    tolerance = {"rtol": 200 * RTOL[dtype], "atol": max(10, shift) * 2 * RTOL[dtype]}
    for got, expected in ((mean, m), (variance, v), (rstd, 1 / np.sqrt(v + 1e-5)), (xhat, (x - m) / np.sqrt(v + 1e-5)),
                          (out, (x - m) / np.sqrt(v + 1e-5) * gain + bias)):  # fmt: skip
        np.testing.assert_allclose(got, expected.reshape(got.shape), **tolerance)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("accumulate", [False, True])
def test_normalize_backward(axis, accumulate, rng):
    x, gain, bias, dy = (rng.normal(size=s) for s in ((6, 5), 5, 5, (6, 5)))
    out, xhat, n = junk(x.shape), junk(x.shape), x.shape[1 - axis]
    mean, variance, rstd = (junk(n) for _ in range(3))
    forward = BACK.normalize(x, gain, bias, axis, 1e-5, out, xhat, mean, variance, rstd)
    forward.run()
    outs = [np.full(s, 1.0 if accumulate else np.nan) for s in ((6, 5), 5, 5)]
    kept, scale = xhat.copy(), rstd.copy()
    BACK.normalize_backward(dy, kept, gain, scale, axis, *outs, (accumulate,) * 3).run()
    for buffer, got in zip((x, gain, bias), outs, strict=True):
        for at in np.ndindex(buffer.shape):
            ends = []
            for h in (1e-5, -2e-5):
                buffer[at] += h
                forward.run()
                ends.append((out * dy).sum())
            buffer[at] += 1e-5
            assert abs((ends[0] - ends[1]) / 2e-5 + accumulate - got[at]) < 1e-8
    alone = junk(5)
    BACK.normalize_backward(dy, kept, gain, scale, axis, None, alone, None, (False,) * 3).run()
    close(alone, outs[1] - accumulate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_philox_draws(rate, dtype, rng):
    x = rng.normal(size=(40, 25)).astype(dtype)
    out = junk(x.shape, dtype)
    BACK.dropout(x, rate, 11, 5, 3, out).run()
    kept = Draws(x.size, dtype).bernoulli(1 - rate, 11, 5, 3).reshape(x.shape)
    np.testing.assert_array_equal(out, np.where(kept, x * dtype(1 / (1 - rate)), 0))
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / x.size)
    more = np.ones_like(x)
    BACK.dropout(x, rate, 11, 5, 3, more, accumulate=True).run()
    np.testing.assert_array_equal(more, out + 1)
    other = junk(x.shape, dtype)
    BACK.dropout(x, rate, 11, 5, 4, other).run()
    assert ((other == 0) != (out == 0)).any()


def test_dropout_of_infinity_is_zero_not_nan():
    x, out = np.full(200, np.inf), junk(200)
    BACK.dropout(x, 0.5, 0, 0, 0, out).run()
    assert set(out.tolist()) == {0.0, np.inf}


# ---- the step table and what follows it ----------------------------------------------------------------------------


def step_table(column, values, offsets=None, first=1, dtype=np.float64):
    made = BACK.step_table([column], dtype)
    made.load(
        np.array(values, np.float64)[:, None], np.arange(len(values)) if offsets is None else np.array(offsets), first
    )
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_launches_follow_the_row_in_force(dtype):
    p, steps = np.ones(3, dtype), step_table("lr * k", [9.0], dtype=dtype)
    update = BACK.elementwise("update", parse("p -= lr * k"), {"p": p}, {"p": p}, table=steps)
    steps.load(np.array([[0.1], [0.25]]), np.arange(2), 1)  # after binding: a new epoch
    advance, expected = BACK.advance(steps), dtype(1)
    for value in (0.1, 0.25, 0.25):  # past the last row it stays in force
        update.run()
        advance.run()
        expected -= dtype(value)  # float64, rounded once
        assert p.tolist() == [expected] * 3


def test_the_table_counts_steps_over_the_whole_training():
    steps, x, out = step_table("lr", [1, 1, 1], first=41), np.ones(64), junk(64)
    launch, seen = BACK.dropout(x, 0.5, 1, 2, steps, out), []
    for _ in range(3):
        launch.run()
        seen.append(out.copy())
        BACK.advance(steps).run()
    for step, value in zip((41, 42, 43), seen, strict=True):
        np.testing.assert_array_equal(value != 0, Draws(64).bernoulli(0.5, 1, 2, step))


@pytest.mark.parametrize("dtype", [*DTYPES, np.int64])
@pytest.mark.parametrize("row", [(), (3,)])
def test_feed_takes_this_steps_rows_of_the_permutation(row, dtype, rng):
    source = rng.integers(0, 100, (10, *row)).astype(dtype)
    order, out = rng.permutation(10).astype(np.intp), np.zeros((4, *row), dtype)
    steps = step_table("lr", [1, 1], offsets=[0, 4])
    feed = BACK.feed(source, order, steps, out)
    for start in (0, 4):
        feed.run()
        np.testing.assert_array_equal(out, source[order[start : start + 4]])
        BACK.advance(steps).run()
    order[:] = order[::-1].copy()  # a new epoch's order, in place
    steps.load(np.ones((1, 1)), np.array([6]), 3)
    feed.run()
    np.testing.assert_array_equal(out, source[order[6:]])
    with pytest.raises(ValueError, match="feed: shapes do not fit"):
        BACK.feed(source, order, steps, np.zeros((4, 2, 2), dtype))


def test_the_loss_is_added_up_and_the_first_bad_step_noted():
    steps, total, loss, bad = step_table("lr", [1] * 5, first=7), junk((), np.float32), np.array(0.0), np.array(0)
    add = BACK.accumulate_loss(total, steps, loss, bad)
    for value, expected in ((1.5, 0), (2.0, 0), (np.inf, 9), (1.0, 9), (np.nan, 9)):
        if bad == 0 and np.isfinite(value):
            assert loss == {1.5: 0, 2.0: 1.5}[value]
        total[...] = value
        add.run()
        BACK.advance(steps).run()
        assert bad == expected


def test_a_table_of_another_backend():
    x = np.ones(3)
    with pytest.raises(TypeError, match="step table of another backend: object"):
        BACK.elementwise("test", parse("x * k"), {"x": x}, {RESULT: x}, table=object())


# ---- launches ------------------------------------------------------------------------------------------------------


def launches(rng):
    """One of each primitive over float32 buffers of 128 kB, so that an allocation shows."""
    x, w, y = rng.normal(size=(500, 64)).astype("f"), rng.normal(size=(64, 64)).astype("f"), junk((500, 64), "f")
    column, rows, total, count = junk(64, "f"), junk(500, "f"), junk((), "f"), np.array(0)
    labels, index, steps = rng.integers(0, 64, 500), rng.integers(0, 64, 80), step_table("k", [2.0], dtype="f")
    gain, xhat = np.ones(64, "f"), rng.normal(size=x.shape).astype("f")
    return {
        "elementwise": BACK.elementwise("e", parse("x * k"), {"x": x}, {RESULT: y}, table=steps),
        "elementwise broadcast": BACK.elementwise("e", parse("x * b"), {"x": x, "b": gain}, {RESULT: y}),
        "elementwise_sum": BACK.elementwise_sum("s", parse("x * x"), {"x": x}, total),
        "elementwise_columns": BACK.elementwise_columns("c", parse("x * x"), {"x": x}, y, column),
        "gemm": BACK.gemm(x, w, y, accumulate=True),
        "copy": BACK.copy(x.T, junk((64, 500), "f")),
        "fill": BACK.fill(y, 1.0),
        "reduce": BACK.reduce("mean", x, (0,), column, accumulate=True),
        "gather": BACK.gather(x[None], rng.integers(0, 500, 400), junk((1, 400, 64), "f")),
        "scatter_add": BACK.scatter_add(xhat[None, :80], index, np.zeros((1, 64, 64), "f")),
        "feed": BACK.feed(x, np.arange(500), steps, junk((400, 64), "f")),
        "softmax_cross_entropy": BACK.softmax_cross_entropy(x, labels, y, total),
        "softmax_cross_entropy rows": BACK.softmax_cross_entropy(x, np.abs(x), y, total),
        "top1": BACK.top1(x, labels, count),
        "normalize": BACK.normalize(x, gain, gain, 1, 1e-5, y, xhat, rows, rows.copy(), rows.copy()),
        "normalize_backward": BACK.normalize_backward(x, xhat, gain, gain, 0, y, column, column.copy(), (True,) * 3),
        "dropout": BACK.dropout(x, 0.5, 1, 2, steps, y, accumulate=True),
        "accumulate_loss": BACK.accumulate_loss(np.ones((), "f"), steps, total, count),
        "advance": BACK.advance(steps),
    }


def test_a_replayed_launch_allocates_nothing(rng):
    """Under 64 kB: NumPy takes 32 kB of its own where an operand broadcasts (np.getbufsize() elements)."""
    peaks = {}
    for key, launch in launches(rng).items():
        launch.run()
        tracemalloc.start()
        try:
            for _ in range(3):
                launch.run()
            peaks[key] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert {k: v for k, v in peaks.items() if v > 65_536} == {}


def test_a_sequence_is_its_launches_in_order(rng):
    x, y = np.zeros(3), np.zeros(3)
    steps = [BACK.fill(x, 2.0), BACK.elementwise("e", parse("x * x + 1"), {"x": x}, {RESULT: y}), BACK.fill(x, 5.0)]
    BACK.sequence(steps)()
    assert (x.tolist(), y.tolist()) == ([5] * 3, [5] * 3)


def test_a_launch_says_what_it_is():
    x, y = np.ones((4, 3), np.float32), np.ones((4, 3), np.float32)
    launch = BACK.elementwise("twice", parse("x * 2 + 1"), {"x": x}, {RESULT: y})
    assert (launch.name, launch.what) == ("twice", "result = x * 2 + 1")
    assert (launch.flops, launch.bytes) == (2 * 12, 2 * 48)
    assert launch.reads[0] is x and launch.writes[0] is y
