"""Every primitive against plain NumPy: of the reference, of compiled kernels, and of CUDA over an emulated device."""

import logging
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from emulator.driver import EmulatedDriver

from gpubackprop import backends
from gpubackprop.backends import get_backend, why_not_cuda
from gpubackprop.backends.base import (
    GROWTH_STEPS,
    LARGEST_SCALE,
    CaptureError,
    Workspace,
    arithmetic,
    use_tf32,
    use_workspace,
)
from gpubackprop.backends.cuda import CudaBackend
from gpubackprop.backends.driver import Paper
from gpubackprop.backends.numpy import NumpyBackend
from gpubackprop.backends.philox import Draws
from gpubackprop.formulas import RESULT, name, parse

bfloat16 = ml_dtypes.bfloat16
FLOATS = [np.float32, np.float64]
DTYPES = [*FLOATS, np.float16, bfloat16]
RTOL = {np.float32: 2e-6, np.float64: 1e-14, np.float16: 1e-3, bfloat16: 8e-3}


@pytest.fixture(params=["cpu:reference", "cpu", "cuda"])
def back(request):
    """Each backend; a rule of the device that was broken at any time is an error at the end."""
    with use_workspace(Workspace()):
        if request.param != "cuda":
            yield get_backend(request.param)
        else:
            driver = EmulatedDriver(order=2)
            yield CudaBackend(driver)
            driver.check()


def put(back, a, dtype=None):
    """A buffer of its own with these values."""
    return back.asarray(np.array(a, dtype))


def junk(back, shape, dtype=np.float64):
    """An output that shows where it was not written."""
    return put(back, np.full(shape, np.nan), dtype)


def wide(a):
    """The values in float64."""
    return np.asarray(a).astype(np.float64)


def close(a, b, dtype=np.float64, scale=1.0):
    np.testing.assert_allclose(wide(a), wide(b), rtol=RTOL[dtype], atol=RTOL[dtype] * scale)


def same(a, b):
    """Equal, bit for bit but for the payload of a NaN."""
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.signbit(a), np.signbit(b))


def drawn(rng, shape, dtype):
    return rng.normal(size=shape).astype(dtype)


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
def test_empty_starts_on_a_cache_line(shape, dtype, back):
    buffer = back.empty(shape, dtype)
    assert buffer.shape == shape and buffer.dtype == dtype and buffer.flags.c_contiguous
    address = buffer.ctypes.data if back.xp is np else back.driver.address(buffer)
    assert buffer.size == 0 or address % 64 == 0


def test_to_numpy_copies_and_asarray_copies_only_where_it_must(back):
    a = np.arange(6.0).reshape(2, 3)
    buffer = back.asarray(a)
    assert back.to_numpy(buffer) is not a and not np.shares_memory(back.to_numpy(buffer), a)
    assert back.asarray(buffer) is buffer and (back.device == "cuda:0" or buffer is a)
    assert back.asarray(a.T).flags.c_contiguous and back.asarray(a, np.float32).dtype == np.float32
    same(back.to_numpy(back.asarray(a.T)), a.T)
    same(back.to_numpy(buffer.T), a.T)
    same(back.to_numpy(buffer[:, 1:]), a[:, 1:])


def test_write(back):
    buffer, view = put(back, np.ones((3, 4))), slice(1, None)
    back.write(buffer[view], 2)
    back.write(buffer[0, 1:3], np.array([7, 8]))
    back.write(buffer[:0], 5)
    same(back.to_numpy(buffer), np.array([[1, 7, 8, 1.0], [2, 2, 2, 2], [2, 2, 2, 2]]))
    other = put(back, np.full((3, 4), 9.0))
    back.write(other, buffer)
    back.write(buffer, 0)
    same(back.to_numpy(other[0]), np.array([1, 7, 8, 1.0]))


# ---- gemm ----------------------------------------------------------------------------------------------------------

STACKS = [((), ()), ((4,), (4,)), ((4,), ()), ((), (4,)), ((1,), (1,))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("stacks", STACKS)
def test_gemm(stacks, transposed, accumulate, dtype, back, rng):
    first, second = (t == "T" for t in transposed)
    for m, k, n in (2, 3, 5), (1, 1, 1), (3, 0, 2), (7, 64, 1):
        a = drawn(rng, stacks[0] + ((k, m) if first else (m, k)), dtype)
        b = drawn(rng, stacks[1] + ((n, k) if second else (k, n)), dtype)
        expected = (wide(a).swapaxes(-1, -2) if first else wide(a)) @ (wide(b).swapaxes(-1, -2) if second else wide(b))
        for kind in {dtype, arithmetic(dtype).type}:  # 16-bit operands, and products in float32
            out = put(back, np.ones(expected.shape), kind) if accumulate else junk(back, expected.shape, kind)
            x, y = put(back, a), put(back, b)
            launch = back.gemm(x, y, out, transpose_a=first, transpose_b=second, accumulate=accumulate)
            launch.run()
            close(back.to_numpy(out), expected + accumulate, kind, scale=8)
            assert launch.flops == 2 * m * k * n * max(1, *(s[0] for s in stacks if s), 1)
            assert launch.bytes == a.nbytes + b.nbytes + out.nbytes


def test_tf32_rounds_operands_to_10_bits(back):
    """1 + 2⁻¹¹ lies between two neighbours and goes to the even one; sums are in float32."""
    a, b = np.array([[1 + 2.0**-11, 1 + 3 * 2.0**-11, 1.0]], "f"), np.array([[1], [1], [2.0**-20]], "f")
    outs = []
    for use in (False, True):
        out = junk(back, (1, 1), "f")
        with use_tf32(use):
            launch = back.gemm(put(back, a), put(back, b), out)
        launch.run()
        outs.append(back.to_numpy(out).item())
    assert outs == [np.float32(2 + 4 * 2.0**-11 + 2.0**-20), np.float32(1 + (1 + 2 * 2.0**-10) + 2.0**-20)]
    with use_tf32(True):  # only float32 has it
        x, out = put(back, [[1 + 2.0**-20]]), junk(back, (1, 1))
        back.gemm(x, x, out).run()
    assert back.to_numpy(out).item() == (1 + 2.0**-20) ** 2


@pytest.mark.parametrize("a, b, out", [
    ((2, 3), (4, 5), (2, 5)), ((2, 3), (3, 5), (2, 4)), ((2, 3), (3, 5), (3, 5)), ((4, 2, 3), (5, 3, 2), (4, 2, 2)),
    ((4, 2, 3), (4, 3, 2), (2, 2)), ((2, 3), (3, 5), (1, 2, 5)), ((2, 2, 2, 3), (3, 5), (2, 2, 2, 5)),
    ((3,), (3, 5), (5,)), ((2, 3), (3,), (2,)), ((), (3, 3), (3, 3)),
])  # fmt: skip
def test_gemm_shapes_that_do_not_fit(a, b, out, back):
    with pytest.raises(ValueError, match="gemm: shapes do not fit"):
        back.gemm(*(put(back, np.ones(s)) for s in (a, b, out)))


def test_gemm_of_mixed_dtypes(back):
    square = np.ones((2, 2))
    with pytest.raises(TypeError, match="gemm: operands of one dtype"):
        back.gemm(put(back, square), put(back, square, "f"), put(back, square))


# ---- copy, fill, reduce, gather, scatter ---------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_broadcasts_and_takes_strided_views(dtype, accumulate, back, rng):
    big, x = put(back, np.ones((4, 6)), dtype), drawn(rng, (3, 1), dtype)
    back.copy(put(back, x), big[:3, ::2], accumulate=accumulate).run()
    expected = np.ones((4, 6), dtype)
    expected[:3, ::2] = x + dtype(accumulate)
    same(back.to_numpy(big), expected)
    y = junk(back, (3, 4), dtype)
    back.copy(big.T[:3], y).run()
    same(back.to_numpy(y), expected.T[:3])
    z = junk(back, (6, 4), dtype)
    back.copy(big[::-1, ::-1].T, z).run()
    same(back.to_numpy(z), expected[::-1, ::-1].T)
    with pytest.raises(ValueError, match=r"copy: shapes do not fit|broadcast"):
        back.copy(put(back, np.ones((2, 3))), put(back, np.ones(3)))


@pytest.mark.parametrize("from_, to", [("f", np.float16), (np.float16, "f"), ("f", bfloat16), (bfloat16, "f")])
@pytest.mark.parametrize("shape", [(), (5,), (300, 7)])
def test_copy_converts(from_, to, shape, back, rng):
    x, out = drawn(rng, shape, from_), junk(back, shape, to)
    back.copy(put(back, x), out).run()
    same(back.to_numpy(out), x.astype(to))


@pytest.mark.parametrize("shape, axes", [((2, 3, 4), (2, 0, 1)), ((2, 1, 3, 1, 2), (4, 3, 2, 1, 0)), ((9,), (0,))])
def test_copy_of_any_axes_order(shape, axes, back, rng):
    x = drawn(rng, shape, "f")
    out = junk(back, x.transpose(axes).shape, "f")
    back.copy(put(back, x).transpose(axes), out).run()
    same(back.to_numpy(out), np.ascontiguousarray(x.transpose(axes)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fill(dtype, back):
    out = junk(back, (2, 3), dtype)
    back.fill(out[1], 2.5).run()
    assert wide(back.to_numpy(out))[1].tolist() == [2.5] * 3 and np.isnan(wide(back.to_numpy(out))[0]).all()


REDUCE = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("kind", REDUCE)
@pytest.mark.parametrize("accumulate", [False, True])
def test_reduce(kind, accumulate, dtype, back, rng):
    outs = []
    for axes in (), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2):
        x = drawn(rng, (3, 4, 5), dtype)
        expected = REDUCE[kind](wide(x), axis=axes)
        for to in {dtype, arithmetic(dtype).type}:
            out = put(back, np.ones(expected.shape), to) if accumulate else junk(back, expected.shape, to)
            back.reduce(kind, put(back, x), axes, out, accumulate=accumulate).run()
            outs.append((out, expected))
    for out, expected in outs:
        close(back.to_numpy(out), expected + accumulate, dtype, scale=8)


@pytest.mark.parametrize("kind", ["sum", "max"])
@pytest.mark.parametrize("shape, axes", [
    ((40_000,), (0,)), ((3, 5_000), (1,)), ((5_000, 3), (0,)), ((2, 700, 33), (1,)), ((700, 2, 33), (0, 2)),
    ((600, 1000), (1,)), ((2000, 300), (0,)),
])  # fmt: skip
def test_reduce_of_many(shape, axes, kind, back, rng):
    x = drawn(rng, shape, "f")
    expected = REDUCE[kind](wide(x), axis=axes)
    out = junk(back, expected.shape, "f")
    back.reduce(kind, put(back, x), axes, out).run()
    np.testing.assert_allclose(back.to_numpy(out), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["max", "min"])
def test_nan_is_the_largest_and_the_smallest(kind, back):
    x = np.ones((3, 300), "f")
    x[1, 200] = np.nan
    out = junk(back, (3,), "f")
    back.reduce(kind, put(back, x), (1,), out).run()
    assert np.isnan(back.to_numpy(out)).tolist() == [False, True, False]


@pytest.mark.parametrize("kind, axes, out", [("sum", (0,), (3,)), ("sum", (0, 1), (1,)), ("prod", (0,), (4,)),
                                             ("mean", (), ())])  # fmt: skip
def test_reduce_refuses(kind, axes, out, back):
    with pytest.raises(ValueError, match=f"{kind}: "):
        back.reduce(kind, put(back, np.ones((3, 4))), axes, put(back, np.ones(out)))


def test_a_sum_of_nothing_is_zero(back):
    out = junk(back, (3,))
    back.reduce("sum", put(back, np.ones((0, 3))), (0,), out).run()
    assert back.to_numpy(out).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [[0], [2, 0, 2, 2, 1], [1] * 20])
def test_gather_and_its_transpose(index, dtype, back, rng):
    x, index = drawn(rng, (2, 3, 4), dtype), np.array(index, np.intp)
    out, dx = junk(back, (2, len(index), 4), dtype), drawn(rng, x.shape, dtype)
    places = put(back, index)
    back.gather(put(back, x), places, out).run()
    same(back.to_numpy(out), x[:, index])
    expected, dy = dx.astype(arithmetic(dtype)), drawn(rng, out.shape, dtype)
    for i, k in enumerate(index):  # in the order of i: the same bits each time
        expected[:, k] += dy[:, i].astype(arithmetic(dtype))
    to = put(back, dx)
    back.scatter_add(put(back, dy), places, to).run()
    same(back.to_numpy(to), expected.astype(dtype))
    live, other = put(back, dx), put(back, np.ones_like(index))  # values that change after binding
    launch = back.scatter_add(put(back, dy), other, live, live=True)
    back.write(other, index)
    launch.run()
    same(back.to_numpy(live), expected.astype(dtype))
    with pytest.raises(ValueError, match="gather: shapes do not fit"):
        back.gather(put(back, x), places, put(back, np.ones((2, len(index) + 1, 4)), dtype))
    with pytest.raises(ValueError, match="scatter_add: shapes do not fit"):
        back.scatter_add(put(back, dy), places, put(back, np.ones((3, 3, 4)), dtype))


# ---- elementwise ---------------------------------------------------------------------------------------------------

EXACT = "where(x > y, x / y, sqrt(abs(x - 2 * y))) + y * 0.1"  # + − * / sqrt and where: the same bits everywhere
SHAPES = [  # of the output, x, y
    ((), (), ()), ((1,), (1,), ()), ((37,), (37,), (37,)), ((5, 7), (5, 7), (7,)), ((5, 8), (1,), (5, 8)),
    ((5, 7), (5, 7), (5, 1)), ((3, 4, 5), (3, 4, 5), (3, 1, 5)), ((3, 4, 5), (4, 1), (3, 1, 5)),
    ((2, 3, 2, 5), (3, 1, 5), (2, 1, 2, 1)), ((130, 520), (130, 520), (520,)), ((5, 7), (7,), (5, 1)),
    ((4, 6), (6,), (1, 6)), ((4, 6), (6,), (6,)), ((2, 4, 6), (4, 6), (2, 4, 6)),
]  # fmt: skip


def computed(x, y, dtype, shape=()):
    """EXACT by NumPy in the arithmetic type, rounded once."""
    x, y = (a.astype(arithmetic(dtype)) for a in np.broadcast_arrays(x, y, np.empty(shape))[:2])
    two, tenth = (arithmetic(dtype).type(v) for v in (2, 0.1))
    with np.errstate(all="ignore"):
        return np.asarray(np.where(x > y, x / y, np.sqrt(np.abs(x - two * y))) + y * tenth).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_of_every_form(dtype, back, rng):
    outs = []
    for shape, of_x, of_y in SHAPES if dtype in FLOATS else SHAPES[2:9:2]:
        x, y, out = drawn(rng, of_x, dtype), drawn(rng, of_y, dtype), junk(back, shape, dtype)
        launch = back.elementwise("test", parse(EXACT), {"x": put(back, x), "y": put(back, y)}, {RESULT: out})
        launch.run()
        outs.append((out, computed(x, y, dtype, shape)))
        assert launch.bytes == x.nbytes + y.nbytes + out.nbytes and launch.flops == 9 * math.prod(shape)
    for out, expected in outs:
        same(back.to_numpy(out), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_off_the_boundary_of_a_vector(dtype, back, rng):
    x, y, out = drawn(rng, 70, dtype), drawn(rng, 70, dtype), junk(back, 70, dtype)
    a, b = put(back, x), put(back, y)
    for i, j, k, n in (1, 0, 0, 60), (0, 3, 0, 64), (0, 0, 2, 33), (1, 1, 1, 69), (8, 8, 8, 62):
        back.elementwise("test", parse(EXACT), {"x": a[i : i + n], "y": b[j : j + n]}, {RESULT: out[k : k + n]}).run()
        same(back.to_numpy(out)[k : k + n], computed(x[i : i + n], y[j : j + n], dtype))


@pytest.mark.parametrize("narrow", [np.float16, bfloat16])
def test_float32_operands_beside_16_bit_ones(narrow, back, rng):
    x, y = drawn(rng, (6, 8), narrow), drawn(rng, (6, 8), "f")
    for dtype in (narrow, np.float32):
        out = junk(back, (6, 8), dtype)
        back.elementwise("test", parse(EXACT), {"x": put(back, x), "y": put(back, y)}, {RESULT: out}).run()
        same(back.to_numpy(out), computed(x, y, np.float32).astype(dtype))


def test_elementwise_accumulates_and_works_in_place(back, rng):
    x, y = drawn(rng, (5, 6), "f"), drawn(rng, (5, 6), "f")
    a, b, out = put(back, x), put(back, y), put(back, np.ones((5, 6)), "f")
    back.elementwise("test", parse("x * y"), {"x": a, "y": b}, {RESULT: out}, accumulate=True).run()
    same(back.to_numpy(out), 1 + x * y)
    back.elementwise("test", parse("y = x * y"), {"x": a, "y": b}, {"y": b}).run()  # under its own name
    same(back.to_numpy(b), x * y)
    back.elementwise("test", parse("x * x - x"), {"x": a}, {RESULT: a}).run()  # the only write, under another
    same(back.to_numpy(a), x * x - x)
    c, d = put(back, x), put(back, y)
    back.elementwise("test", parse("x = y\ny = x + 1"), {"x": c, "y": d}, {"x": c, "y": d}).run()
    assert back.to_numpy(c).tobytes() == y.tobytes()


def test_an_array_may_be_given_under_two_names(back, rng):
    x, out = drawn(rng, 100, "f"), junk(back, 100, "f")
    a = put(back, x)
    back.elementwise("test", parse("x * y + x"), {"x": a, "y": a}, {RESULT: out}).run()
    same(back.to_numpy(out), x * x + x)


def test_elementwise_refuses(back):
    x, narrow = put(back, np.ones((2, 3))), put(back, np.ones((2, 3)), "f")
    with pytest.raises(TypeError, match=r"test: operands of one dtype expected, got float64, float64, float32"):
        back.elementwise("test", parse("x + y"), {"x": x, "y": narrow}, {RESULT: x})
    with pytest.raises(ValueError, match="test: shapes do not fit"):
        back.elementwise("test", parse("x + y"), {"x": x, "y": x}, {RESULT: put(back, np.ones(3))})


# ---- elementwise with sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (5, 7), (300, 500)])
def test_elementwise_sum(shape, dtype, back, rng):
    a, b, out = drawn(rng, shape, dtype), drawn(rng, shape, dtype), junk(back, (), arithmetic(dtype))
    launch = back.elementwise_sum("test", parse("total = a * b + 1"), {"a": put(back, a), "b": put(back, b)}, out)
    launch.run()
    terms = wide(a) * wide(b) + 1
    first = back.to_numpy(out)
    assert abs(first - terms.sum()) <= 8 * np.finfo(first.dtype).eps * max(1.0, np.abs(terms).sum())
    launch.run()
    assert back.to_numpy(out) == first


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_sum_with_outputs(dtype, back, rng):
    x, t = drawn(rng, (9, 7), dtype), drawn(rng, (9, 7), dtype)
    k, dx, total = (
        put(back, np.array(0.25), arithmetic(dtype)),
        junk(back, x.shape, dtype),
        junk(back, (), arithmetic(dtype)),
    )
    graph = parse("total = k * (x - t) * (x - t)\ndx = k * (x - t)")
    back.elementwise_sum("test", graph, {"x": put(back, x), "t": put(back, t), "k": k}, total, {"dx": dx}).run()
    difference = x.astype(arithmetic(dtype)) - t.astype(arithmetic(dtype))
    same(back.to_numpy(dx), (arithmetic(dtype).type(0.25) * difference).astype(dtype))
    close(back.to_numpy(total), 0.25 * (wide(difference) ** 2).sum(), arithmetic(dtype).type, scale=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (0, 3), (4, 5, 3), (400, 300), (3, 70, 8)])
def test_elementwise_columns(shape, dtype, back, rng):
    for accumulate in (False, True):
        x, dy = drawn(rng, shape, dtype), drawn(rng, shape, dtype)
        expected = (x.astype(arithmetic(dtype)) * dy.astype(arithmetic(dtype))).astype(dtype)
        columns = put(back, np.full(shape[:-2] + shape[-1:], 1 if accumulate else np.nan), arithmetic(dtype))
        reads = {"x": put(back, x), "dy": put(back, dy)}
        back.elementwise_columns(
            "test", parse("out = x * dy"), reads, reads["dy"], columns, accumulate=accumulate
        ).run()
        same(back.to_numpy(reads["dy"]), expected)  # the output may be an input
        close(back.to_numpy(columns), wide(expected).sum(-2) + accumulate, dtype, scale=50)


def test_elementwise_columns_of_the_buffer_itself_only_sums(back, rng):
    before = drawn(rng, (5, 3), "d")
    dy, columns = put(back, before), junk(back, 3)
    launch = back.elementwise_columns("test", {"dz": name("dy")}, {"dy": dy}, dy, columns)
    launch.run()
    same(back.to_numpy(dy), before)
    close(back.to_numpy(columns), before.sum(0))
    assert launch.writes == (columns,) and launch.bytes == before.nbytes + columns.nbytes
    dz = junk(back, (5, 3))
    back.elementwise_columns("test", {"dz": name("dy")}, {"dy": dy}, dz, columns).run()
    same(back.to_numpy(dz), before)
    with pytest.raises(ValueError, match="test: shapes do not fit: column sums"):
        back.elementwise_columns("test", {"dz": name("dy")}, {"dy": dy}, dz, junk(back, 5))


# ---- rows: softmax, top1, normalisation, dropout -------------------------------------------------------------------


def log_softmax(x):
    x = wide(x).astype(np.longdouble)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", ["ordinary", "±1e4", "equal", "one row", "one class"])
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_cross_entropy(logits, soft, dtype, back, rng):
    x = {
        "ordinary": rng.normal(size=(5, 4)) * 3, "±1e4": rng.choice([-1e4, 0, 1e4], (6, 4)),
        "equal": np.full((3, 4), 7.0), "one row": rng.normal(size=(1, 4)), "one class": rng.normal(size=(3, 1)),
    }[logits].astype(dtype)  # fmt: skip
    n, k = x.shape
    t = (rng.random((n, k)) if soft else np.eye(k)[rng.integers(0, k, n)]).astype(arithmetic(dtype))
    target = put(back, t if soft else t.argmax(1))
    residual, total = junk(back, x.shape, dtype), junk(back, (), arithmetic(dtype))
    launch = back.softmax_cross_entropy(put(back, x), target, residual, total)
    launch.run()
    log_p = log_softmax(x)
    expected = -np.sum(t * log_p), t.sum(1, keepdims=True) * np.exp(log_p) - t
    first = [back.to_numpy(a) for a in (total, residual)]
    assert all(np.isfinite(wide(a)).all() for a in first)
    close(first[0], float(expected[0]), arithmetic(dtype).type, scale=10)
    close(first[1], expected[1].astype(np.float64), dtype, scale=4)
    launch.run()
    assert [a.tobytes() for a in first] == [back.to_numpy(a).tobytes() for a in (total, residual)]


def test_softmax_cross_entropy_of_a_ruled_out_class(back):
    """A logit of −infinity is probability 0."""
    x, residual, total = put(back, [[1.0, -np.inf, 2.0]]), junk(back, (1, 3)), junk(back, ())
    back.softmax_cross_entropy(x, put(back, [2]), residual, total).run()
    close(back.to_numpy(total), np.log(1 + np.exp(-1)))
    close(back.to_numpy(residual), [[1 / (1 + np.e), 0, -1 / (1 + np.e)]])


@pytest.mark.parametrize("target, residual", [((4,), (5, 3)), ((5, 2), (5, 3)), ((5,), (5, 2)), ((5, 1), (5, 3))])
def test_softmax_cross_entropy_shapes(target, residual, back):
    with pytest.raises(ValueError, match=r"softmax_cross_entropy: shapes do not fit: logits \(5, 3\) with target"):
        back.softmax_cross_entropy(*(put(back, np.ones(s)) for s in ((5, 3), target, residual, ())))


def test_weights_of_softmax_cross_entropy_are_one_for_each_row(back):
    x, dx, total, w = (put(back, np.ones(s)) for s in ((5, 3), (5, 3), (), (3,)))
    with pytest.raises(
        ValueError, match=r"softmax_cross_entropy: shapes do not fit: logits \(5, 3\) with weights \(3,\)"
    ):
        back.softmax_cross_entropy(x, x, dx, total, w=w)


@pytest.mark.parametrize("rows, classes", [(5, 4), (50, 10), (7, 300), (3, 3000)])
@pytest.mark.parametrize("soft", [False, True])
def test_the_step_of_softmax_cross_entropy(rows, classes, soft, back, rng):
    """Scaled by the row's share and the loss scale; the loss and the rows right go to the tally."""
    x, labels = drawn(rng, (rows, classes), "f"), rng.integers(0, classes, rows)
    x[np.arange(rows), labels] += 2
    x[0, :2] = x[0].max() + 1  # a tie: the first one counts
    labels[0] = 1
    t = rng.random(x.shape).astype("f") if soft else np.eye(classes, dtype="f")[labels]
    table, tally = step_table(back, ["1 / weight"], [[1 / rows]], first=5, dtype="f"), back.tally("f")
    back.write(table.control, np.array([4, 1, 1, 0]))
    dx, total = junk(back, x.shape, "f"), junk(back, (), "f")
    launch = back.softmax_cross_entropy(
        put(back, x), put(back, t if soft else labels), dx, total, table=table, tally=tally, count=not soft
    )
    for _ in range(2):
        launch.run()
    log_p = log_softmax(x)
    loss = float(-np.sum(t * log_p))
    close(back.to_numpy(dx), (4 / rows * (t.sum(1, keepdims=True) * np.exp(log_p) - t)).astype("f"), np.float32)
    np.testing.assert_allclose(back.to_numpy(total), loss, rtol=1e-6)
    hits = 0 if soft else 2 * int(np.sum(x.argmax(1) == labels))
    assert tally.read()[1:] == (0, hits)
    np.testing.assert_allclose(tally.read()[0], 2 * loss, rtol=1e-6)


def test_top1_counts_rows_whose_largest_is_at_the_label(back, rng):
    x, labels, tally = drawn(rng, (50, 7), "d"), rng.integers(0, 7, 50), back.tally("d")
    x[3] = np.nan  # as np.argmax has it: the first NaN
    launch = back.top1(put(back, x), put(back, labels), tally)
    for times in (1, 2):
        launch.run()
        assert tally.read() == (0, 0, times * int(np.sum(x.argmax(1) == labels)))
    tally.clear()
    assert tally.read() == (0, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shift", [0, 1e3])
def test_normalize(axis, dtype, shift, back, rng):
    """Also far from 0: the variance is taken from the centred values."""
    x = (rng.normal(size=(6, 5)) + shift * (dtype in FLOATS)).astype(dtype)
    gain, bias, n = drawn(rng, 5, dtype), drawn(rng, 5, dtype), x.shape[1 - axis]
    outs = [junk(back, x.shape, dtype), *(junk(back, n, arithmetic(dtype)) for _ in range(3))]
    back.normalize(put(back, x), put(back, gain), put(back, bias), axis, 1e-5, *outs).run()
    x = wide(x)
    m, v = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
    y = (x - m) / np.sqrt(v + 1e-5) * wide(gain) + wide(bias)
    for buffer, expected in zip(outs, (y, m, v, 1 / np.sqrt(v + 1e-5)), strict=True):
        got = back.to_numpy(buffer)
        rtol = 2 * RTOL[got.dtype.type]
        np.testing.assert_allclose(wide(got), expected.reshape(got.shape), rtol=100 * rtol, atol=max(10, shift) * rtol)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("accumulate", [False, True])
def test_normalize_backward(axis, accumulate, back, rng):
    x, gain, bias, dy = (drawn(rng, s, "d") for s in ((6, 5), 5, 5, (6, 5)))
    x_, gain_, bias_, dy_ = (put(back, a) for a in (x, gain, bias, dy))
    out, n = junk(back, x.shape), x.shape[1 - axis]
    mean, variance, rstd = (junk(back, n) for _ in range(3))
    forward = back.normalize(x_, gain_, bias_, axis, 1e-5, out, mean, variance, rstd)
    forward.run()
    outs = [put(back, np.full(s, 1.0 if accumulate else np.nan)) for s in ((6, 5), 5, 5)]
    statistics = put(back, back.to_numpy(mean)), put(back, back.to_numpy(rstd))
    given = dy_, put(back, x), put(back, gain), *statistics, axis
    back.normalize_backward(*given, *outs, (accumulate,) * 3).run()
    for buffer, a, got in zip((x_, gain_, bias_), (x, gain, bias), map(back.to_numpy, outs), strict=True):
        for at in np.ndindex(a.shape):
            ends = []
            for h in (1e-5, -1e-5):
                moved = a.copy()
                moved[at] += h
                back.write(buffer, moved)
                forward.run()
                ends.append((back.to_numpy(out) * dy).sum())
            assert abs((ends[0] - ends[1]) / 2e-5 + accumulate - got[at]) < 1e-8
        back.write(buffer, a)
    alone = junk(back, 5)
    back.normalize_backward(*given, None, alone, None, (False,) * 3).run()
    close(back.to_numpy(alone), back.to_numpy(outs[1]) - accumulate)


@pytest.mark.parametrize("axis", [0, 1])
def test_normalize_backward_in_16_bits(axis, back, rng):
    """Parameters' gradients are in float32, as they are summed."""
    narrow = np.float16
    x, gain, dy = (drawn(rng, s, narrow) for s in ((6, 8), 8, (6, 8)))
    mean, rstd = wide(x).mean(axis), 1 / np.sqrt(wide(x).var(axis) + 1e-5)
    outs = [junk(back, (6, 8), narrow), junk(back, 8, "f"), junk(back, 8, "f")]
    exact = [junk(NumpyBackend(), a.shape) for a in outs]
    for b, dtype, buffers in ((back, None, outs), (NumpyBackend(), "d", exact)):
        reads = [put(b, a, dtype) for a in (dy, x, gain)]
        statistics = [put(b, a, dtype or "f") for a in (mean, rstd)]
        b.normalize_backward(*reads, *statistics, axis, *buffers, (False,) * 3).run()
    for got, expected in zip(outs, exact, strict=True):
        close(back.to_numpy(got), expected, narrow, scale=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_philox_draws(rate, dtype, back, rng):
    x = drawn(rng, (40, 25), dtype)
    out, a, real = junk(back, x.shape, dtype), put(back, x), arithmetic(dtype).type
    seed = (7 << 64) + (1 << 63) + 11  # as many bits as one likes: the lowest 64 count
    back.dropout(a, rate, seed, 5, 3, out).run()
    kept = Draws(x.size, real).bernoulli(1 - rate, seed % 2**64, 5, 3).reshape(x.shape)
    scaled = np.where(kept, x.astype(real) * real(1 / (1 - rate)), 0)
    same(back.to_numpy(out), scaled.astype(dtype))
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / x.size)
    more = put(back, np.ones(x.shape), dtype)
    back.dropout(a, rate, seed, 5, 3, more, accumulate=True).run()
    same(back.to_numpy(more), (1 + scaled).astype(dtype))
    other = junk(back, x.shape, dtype)
    back.dropout(a, rate, seed, 5, 4, other).run()
    assert ((back.to_numpy(other) == 0) != (back.to_numpy(out) == 0)).any()


def test_dropout_of_infinity_is_zero_not_nan(back):
    x, out = put(back, np.full(200, np.inf)), junk(back, 200)
    back.dropout(x, 0.5, 0, 0, 0, out).run()
    assert set(back.to_numpy(out).tolist()) == {0.0, np.inf}


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_what_philox_draws(dtype, back, rng):
    """Its normal numbers are within 4 ulp on every backend, so two of them within 8."""
    x, sigma, real = drawn(rng, (40, 25), dtype), 0.75, arithmetic(dtype).type
    out, a, seed = junk(back, x.shape, dtype), put(back, x), (7 << 64) + (1 << 63) + 11
    back.noise(a, sigma, seed, 5, 3, out).run()
    normal = Draws(x.size, real).normal(seed % 2**64, 5, 3).reshape(x.shape)
    got, expected = wide(back.to_numpy(out)), wide(x.astype(real) + real(sigma) * normal)
    slack = 8 * sigma * np.spacing(np.abs(normal)) + np.spacing(np.abs(expected).astype(real))
    narrow = 0.5001 * wide(np.spacing(np.abs(expected).astype(dtype))) * (np.dtype(dtype).itemsize == 2)
    assert (np.abs(got - expected) <= slack + narrow).all()
    other = junk(back, x.shape, dtype)
    back.noise(a, sigma, seed, 5, 4, other).run()
    assert (wide(back.to_numpy(other)) != got).mean() > 0.9


# ---- the step table and what follows it ----------------------------------------------------------------------------


def step_table(back, columns, values, offsets=None, first=1, dtype=np.float64):
    """A table of these rows."""
    made = back.step_table(columns, dtype, len(values))
    rows = np.array(values, np.float64).reshape(len(values), len(columns))
    made.load(rows, np.arange(len(values)) if offsets is None else np.array(offsets), first)
    return made


@pytest.mark.parametrize("dtype", FLOATS)
def test_launches_follow_the_row_in_force(dtype, back):
    p, steps = put(back, np.ones(3), dtype), back.step_table(["lr * k"], dtype, 4)
    update = back.elementwise("test", parse("p -= lr * k"), {"p": p}, {"p": p}, table=steps)
    steps.load(np.array([[0.1], [0.25]]), np.arange(2), 1)  # after binding: a new epoch
    advance, expected = back.advance(steps), dtype(1)
    for value in (0.1, 0.25):
        update.run()
        advance.run()
        expected -= dtype(value)  # float64, rounded once
        assert back.to_numpy(p).tolist() == [expected] * 3


def test_past_the_last_row_the_last_stays_in_force():
    steps, p = step_table(NumpyBackend(), ["lr"], [[1], [2]]), np.zeros(1)
    sequence = [NumpyBackend().elementwise("test", parse("p = lr"), {"p": p}, {"p": p}, table=steps)]
    run = NumpyBackend().sequence([*sequence, NumpyBackend().advance(steps)])
    assert [run() or p.item() for _ in range(4)] == [1, 2, 2, 2]


def test_a_table_takes_as_many_rows_as_it_has_room_for(back):
    table = back.step_table(["lr"], "f", 3)
    assert table.columns == ("lr",) and table.capacity >= 3
    if back.device.startswith("cuda"):
        with pytest.raises(ValueError, match="step table: 4 rows exceed its capacity of 3"):
            table.load(np.ones((4, 1)), np.arange(4), 1)


def test_the_table_counts_steps_over_the_whole_training(back):
    steps, x, out = step_table(back, ["lr"], [1, 1, 1], first=41), put(back, np.ones(64)), junk(back, 64)
    noisy, normal, advance, seen = junk(back, 64), Draws(64, "d").normal, back.advance(steps), []
    launches = back.dropout(x, 0.5, 1, 2, steps, out), back.noise(x, 0.5, 1, 2, steps, noisy)
    for _ in range(3):
        for launch in launches:
            launch.run()
        seen.append((back.to_numpy(out), back.to_numpy(noisy)))
        advance.run()
    for step, (dropped, noise) in zip((41, 42, 43), seen, strict=True):
        np.testing.assert_array_equal(dropped != 0, Draws(64).bernoulli(0.5, 1, 2, step))
        np.testing.assert_allclose(noise, 1 + 0.5 * normal(1, 2, step), rtol=1e-14)


ADAM = "m += a * (g - m)\nv += b * (g * g - v)\np -= lr * m / (sqrt(v) + eps)"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("groups", [(), (slice(0, 128), slice(128, 448))])
def test_update(groups, dtype, back, rng):
    """In place, the scalars those of the group and of the steps applied; what one reads another writes."""
    start = {k: np.abs(drawn(rng, 448, dtype)) for k in ("p", "g", "m", "v")}
    names = [f"{k} [{i}]" for i in range(len(groups)) for k in ("a", "b", "lr", "eps")] or ["a", "b", "lr", "eps"]
    rows = rng.uniform(0.01, 0.5, (3, len(names)))
    table, arrays = step_table(back, names, rows, dtype=dtype), {k: put(back, a) for k, a in start.items()}
    launch = back.update("adam", parse(ADAM), arrays, table, groups=groups, advance=True)
    expected, applied = {k: a.copy() for k, a in start.items()}, 0
    for ok in (1, 0, 1):  # the table moves on, but what is applied waits where a step is not ok
        back.write(table.control, np.array([1, 1, ok, 0]))
        launch.run()
        for i, part in enumerate(groups or [slice(None)]):
            a, b, lr, eps = rows[applied, 4 * i :][:4].astype(dtype)
            p, g, m, v = (expected[k][part] for k in ("p", "g", "m", "v"))
            m += a * (g - m)
            v += b * (g * g - v)
            p -= lr * m / (np.sqrt(v) + eps)
        applied += ok
        for k, buffer in arrays.items():
            same(back.to_numpy(buffer), expected[k])
    assert launch.flops == 12 * 448


def test_update_of_a_half_precision_copy(back, rng):
    p, g, control = drawn(rng, 192, "f"), drawn(rng, 192, "f"), np.array([8, 0.125, 1, 0], "f")
    table = step_table(back, ["lr"], [0.1], dtype="f")
    back.write(table.control, control)
    arrays = {"p": put(back, p), "g": put(back, g), "q": junk(back, 192, np.float16)}
    arrays |= {"factor": table.control[1:2], "ok": table.control[2:3]}
    graph = parse("p = where(ok > 0, p - lr * (g * factor), p)")
    launch = back.update("sgd", {**graph, "q": graph["p"]}, arrays, table)
    for ok in (0, 1):
        back.write(table.control[2:3], ok)
        launch.run()
        expected = p - np.float32(0.1) * (g * np.float32(0.125)) if ok else p
        same(back.to_numpy(arrays["p"]), expected)
        same(back.to_numpy(arrays["q"]), expected.astype(np.float16))


@pytest.mark.parametrize("size", [1, 100, 30_000])
@pytest.mark.parametrize("clip, dynamic", [(math.inf, True), (0.5, False), (0.5, True), (1e9, False)])
def test_gradient_norm(clip, dynamic, size, back, rng):
    table, g = back.step_table(["lr"], "f", 1), drawn(rng, size, "f")
    buffer = put(back, g)
    launch = back.gradient_norm(buffer, table, clip=clip, dynamic=dynamic)
    norm = np.sqrt((wide(g) ** 2).sum()) / 4
    for bad in (None, np.inf, np.nan):
        back.write(table.control, np.array([4, 9, 9, 5]))
        if bad is not None:
            back.write(buffer[size // 2 : size // 2 + 1], bad)
        launch.run()
        scale, factor, ok, good = back.to_numpy(table.control)
        np.testing.assert_allclose(factor, 0 if bad is not None else min(1, clip / norm) / 4, rtol=1e-5)
        assert ok == (bad is None)
        assert (scale, good) == ((4, 6) if bad is None else (2, 0)) if dynamic else (4, 5)


@pytest.mark.parametrize("before, after", [
    ((1, GROWTH_STEPS - 1), (2, 0)), ((LARGEST_SCALE, GROWTH_STEPS - 1), (LARGEST_SCALE, 0)), ((8, 7), (8, 8)),
])  # fmt: skip
def test_the_loss_scale_doubles_after_many_good_steps(before, after, back):
    table = back.step_table(["lr"], "f", 1)
    back.write(table.control, np.array([before[0], 1, 1, before[1]]))
    back.gradient_norm(put(back, np.zeros(5), "f"), table, clip=math.inf, dynamic=True).run()
    scale, factor, ok, good = back.to_numpy(table.control)
    assert (scale, factor, ok, good) == (after[0], 1 / before[0], 1, after[1])


@pytest.mark.parametrize("columns", [1, 3, 16])
@pytest.mark.parametrize("dtype, compute, soft", [
    (np.float32, np.float32, False), (np.float32, np.float32, True), (np.float64, np.float64, False),
    (np.float32, np.float16, False), (np.float32, bfloat16, True), (np.uint8, np.float32, False),
])  # fmt: skip
def test_feed_takes_this_steps_rows_of_the_permutation(dtype, compute, soft, columns, back, rng):
    scale = 1 / 255 if dtype is np.uint8 else 1.0
    source = rng.integers(0, 100, (10, columns)).astype(dtype)
    target = rng.normal(size=(10, 2)).astype(arithmetic(compute)) if soft else rng.integers(0, 9, 10)
    order = rng.permutation(10)
    given = [put(back, a) for a in (source, target, order)]
    x, y = junk(back, (4, columns), compute), put(back, np.zeros((4, *target.shape[1:]), target.dtype))
    steps = step_table(back, ["lr"], [1, 1], offsets=[0, 4])
    feed, advance = back.feed(*given, steps, x, y, scale), back.advance(steps)

    def check(rows):
        expected = source[rows].astype(compute) if scale == 1 else source[rows].astype("f") * np.float32(scale)
        same(back.to_numpy(x), expected)
        same(back.to_numpy(y), target[rows])

    for start in (0, 4):
        feed.run()
        check(order[start : start + 4])
        advance.run()
    back.write(given[2], order[::-1])  # a new epoch's order, in place
    steps.load(np.ones((1, 1)), np.array([6]), 3)
    feed.run()
    check(order[::-1][6:])
    with pytest.raises(ValueError, match="feed: shapes do not fit"):
        back.feed(*given, steps, junk(back, (4, columns + 1), compute), y, scale)
    with pytest.raises(ValueError, match="feed: shapes do not fit"):
        back.feed(*given, steps, x, y[:3], scale)


@pytest.mark.parametrize("of", ["total", "sum"])
def test_the_loss_is_added_up_and_the_first_bad_step_noted(of, back):
    """By a launch of its own, and by the sum that computes it."""
    steps, x, total, tally = (
        step_table(back, ["lr"], [1] * 5, first=7, dtype="f"),
        junk(back, 1, "f"),
        junk(back, (), "f"),
        back.tally("f"),
    )
    if of == "total":
        add = [back.copy(x.reshape(()), total), back.accumulate_loss(total, steps, tally)]
    else:
        add = [back.elementwise_sum("test", parse("total = x"), {"x": x}, total, table=steps, tally=tally)]
    run = back.sequence([*add, back.advance(steps)])
    for value, loss, bad in ((1.5, 1.5, 0), (2.0, 3.5, 0), (np.inf, np.inf, 9), (1.0, None, 9), (np.nan, None, 9)):
        back.write(x, value)
        run()
        assert tally.read()[1:] == (bad, 0)
        assert loss is None or tally.read()[0] == loss
    tally.clear()
    assert tally.read() == (0, 0, 0)


def test_the_loss_is_added_up_as_if_in_float64(back):
    total, steps, tally = put(back, np.array(0.1), "f"), step_table(back, ["lr"], [1], dtype="f"), back.tally("f")
    run = back.sequence([back.accumulate_loss(total, steps, tally)] * 3000)
    run()
    assert abs(tally.read()[0] / (3000 * float(np.float32(0.1))) - 1) < 1e-10


def test_peek_shows_the_loss_of_a_moment_ago(back):
    total, steps, tally = put(back, np.array(2.0)), step_table(back, ["lr"], [1]), back.tally("d")
    add = back.accumulate_loss(total, steps, tally)
    add.run()
    seen = []
    for _ in range(2):
        seen.append(tally.peek())
        back.synchronize()
    assert seen[0] in (0, 2) and seen[1] == 2


def test_a_table_or_a_tally_of_another_backend(back):
    x = put(back, np.ones(3))
    with pytest.raises(TypeError, match="step table of another backend: object"):
        back.elementwise("test", parse("x * k"), {"x": x}, {RESULT: x}, table=object())
    with pytest.raises(TypeError, match="tally of another backend: object"):
        back.top1(put(back, np.ones((3, 2))), put(back, [0, 1, 0]), object())
    with pytest.raises(TypeError, match="step table of another backend: NoneType"):  # the tally asks for the step
        back.elementwise_sum("test", parse("total = x"), {"x": x}, junk(back, ()), tally=back.tally("d"))


# ---- launches ------------------------------------------------------------------------------------------------------


def launches(back, rng):
    """One of each primitive over float32 buffers of 128 kB, so that an allocation shows."""

    def of(*shape):
        return put(back, drawn(rng, shape, "f"))

    x, w, y, gain, tally = of(500, 64), of(64, 64), of(500, 64), of(64), back.tally("f")
    total, labels = put(back, np.ones(()), "f"), put(back, rng.integers(0, 64, 500))
    steps = step_table(back, ["k", "1 / weight"], [[2.0, 0.1]] * 9, dtype="f")
    column, rows = [of(64) for _ in range(3)], [of(500) for _ in range(3)]
    arrays = {k: of(500 * 64) for k in "pg"}
    return {
        "elementwise": back.elementwise("e", parse("x * k"), {"x": x}, {RESULT: y}, table=steps),
        "elementwise per column": back.elementwise("e", parse("x * b"), {"x": x, "b": gain}, {RESULT: y}),
        "elementwise broadcast": back.elementwise("e", parse("x * b"), {"x": x, "b": of(500, 1)}, {RESULT: y}),
        "elementwise_sum": back.elementwise_sum("s", parse("total = x * x"), {"x": x}, total, table=steps, tally=tally),
        "elementwise_sum per row": back.elementwise_sum(
            "s", parse("total = w * x\ny = w * x"), {"x": x, "w": of(500, 1)}, total, {"y": y}),
        "elementwise_columns": back.elementwise_columns("c", parse("x * x"), {"x": x}, y, column[0]),
        "update": back.update("u", parse("p -= k * g"), arrays, steps, advance=True),
        "gradient_norm": back.gradient_norm(y, steps, clip=1.0, dynamic=True),
        "gemm": back.gemm(x, w, y, accumulate=True),
        "copy": back.copy(x.T, of(64, 500)),
        "fill": back.fill(y, 1.0),
        "reduce": back.reduce("mean", x, (0,), column[0], accumulate=True),
        "gather": back.gather(x.reshape(1, 500, 64), put(back, rng.integers(0, 500, 400)), of(1, 400, 64)),
        "scatter_add": back.scatter_add(of(1, 80, 64), put(back, rng.integers(0, 64, 80)), of(1, 64, 64)),
        "scatter_add live": back.scatter_add(
            of(1, 80, 64), put(back, rng.integers(0, 64, 80)), of(1, 64, 64), live=True),
        "feed": back.feed(x, labels, put(back, np.arange(500)), steps, of(400, 64), put(back, np.zeros(400, int)), 1.0),
        "feed of weights": back.feed(of(500, 1), None, put(back, np.arange(500)), steps, of(400, 1), None, 1.0),
        "softmax_cross_entropy": back.softmax_cross_entropy(
            x, labels, y, total, table=steps, tally=tally, count=True),
        "softmax_cross_entropy rows": back.softmax_cross_entropy(x, of(500, 64), y, total),
        "softmax_cross_entropy weighted": back.softmax_cross_entropy(x, labels, y, total, w=of(500)),
        "top1": back.top1(x, labels, tally),
        "normalize": back.normalize(x, gain, gain, 1, 1e-5, y, *rows),
        "normalize_backward": back.normalize_backward(
            x, y, gain, column[0], of(64), 0, of(500, 64), column[1], column[2], (True,) * 3),
        "dropout": back.dropout(x, 0.5, 1, 2, steps, y, accumulate=True),
        "noise": back.noise(x, 0.5, 1, 2, steps, y),
        "accumulate_loss": back.accumulate_loss(total, steps, tally),
        "advance": back.advance(steps),
    }  # fmt: skip


def test_a_replayed_launch_allocates_nothing(rng):
    """Under 64 kB: NumPy takes 32 kB of its own where an operand broadcasts (np.getbufsize() elements)."""
    peaks = {}
    for key, launch in launches(NumpyBackend(), rng).items():
        launch.run()
        tracemalloc.start()
        try:
            for _ in range(3):
                launch.run()
            peaks[key] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert {k: v for k, v in peaks.items() if v > 65_536} == {}


def test_a_launch_on_the_device_only_launches(rng):
    """No allocation, copy, compilation or wait, from the first run on; and the same bits in any order of threads."""
    results = []
    for order in (0, 1, 4):
        driver = EmulatedDriver(order=order)
        back = CudaBackend(driver)
        bound, results_here = launches(back, np.random.default_rng(0)), {}
        for key, launch in bound.items():
            before = driver.counts.copy()
            launch.run()
            assert driver.counts - before == {"products" if key == "gemm" else "launches": 1}, key
            results_here[key] = [back.to_numpy(a).tobytes() for a in launch.writes]
        results.append(results_here)
        driver.check()
    assert results[0] == results[1] == results[2]


def test_every_launch_can_be_planned_without_a_device(rng):
    """The same names, equations, bytes and flops as on a device; running one is an error."""
    on_paper, on_device = launches(CudaBackend(Paper()), rng), launches(CudaBackend(EmulatedDriver()), rng)
    for key, launch in on_paper.items():
        other = on_device[key]
        assert (launch.name, launch.what, launch.flops, launch.bytes) == (
            other.name, other.what, other.flops, other.bytes)  # fmt: skip
        with pytest.raises(RuntimeError, match="device 'cuda:plan' only plans; use device='cuda'"):
            launch.run()


def test_a_sequence_is_its_launches_in_order(back):
    x, y = put(back, np.zeros(3)), put(back, np.zeros(3))
    steps = [back.fill(x, 2.0), back.elementwise("e", parse("x * x + 1"), {"x": x}, {RESULT: y}), back.fill(x, 5.0)]
    back.sequence(steps)()
    assert (back.to_numpy(x).tolist(), back.to_numpy(y).tolist()) == ([5] * 3, [5] * 3)


def test_a_launch_says_what_it_is(back):
    x, y = put(back, np.ones((4, 3)), "f"), put(back, np.ones((4, 3)), "f")
    launch = back.elementwise("twice", parse("x * 2 + 1"), {"x": x}, {RESULT: y})
    assert (launch.name, launch.what) == ("twice", "result = x * 2 + 1")
    assert (launch.flops, launch.bytes) == (2 * 12, 2 * 48)
    assert launch.reads[0] is x and launch.writes[0] is y


def test_a_capture_is_an_error_on_the_cpu():
    with pytest.raises(CaptureError, match="the CPU has no CUDA graphs"):
        NumpyBackend().capture([])
