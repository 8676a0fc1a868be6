"""The harness that runs CUDA kernels on the CPU, faults planted to be caught, and the kernel tests under sanitizers."""

import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulator import ORDERS, EmulationError, build, sanitizer_environment

from gpubackprop.backends import codegen

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose loader finds the shared memory")
SMALL = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def kernel(text, dtype="float32"):
    """A source with reduce.cuh and one more kernel, or several."""
    body = re.sub(r"kernel (\w+)\(", r'extern "C" __global__ void __launch_bounds__(THREADS) \1(', text)
    return codegen.file_unit("reduce.cuh", dtype) + f"\nnamespace gpubackprop {{\n{body}\n}}\n"


@pytest.mark.parametrize("test", ["test_emulator.py::test_votes", "kernels/test_sum.py::test_the_tally"])
def test_without_a_compiler_tests_fail_and_say_what_to_install(test):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / test)]
    done = subprocess.run(command, cwd=HERE.parent, env=os.environ | {"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and "g++, which is not installed: apt install g++" in done.stdout, done.stdout


# ---- types -----------------------------------------------------------------------------------------------------------

CONVERT = """
kernel widen(R* __restrict__ y, const T* __restrict__ x, const Index size) {
    for (Index i = threadIdx.x; i < size; i += blockDim.x) y[i] = R(x[i]);
}
kernel narrow(T* __restrict__ y, const R* __restrict__ x, const Index size) {
    for (Index i = threadIdx.x; i < size; i += blockDim.x) y[i] = T(x[i]);
}
"""


@pytest.mark.parametrize("dtype", SMALL)
def test_every_16_bit_number_is_the_same_float(dtype):
    x = np.arange(1 << 16, dtype=np.uint16).view(SMALL[dtype])
    y = np.empty(x.size, np.float32)
    build(kernel(CONVERT, dtype)).launch("widen", 1, 32, y=y, x=x, size=x.size)
    np.testing.assert_array_equal(y, x.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(y), np.signbit(x))


@pytest.mark.parametrize("dtype", SMALL)
def test_floats_round_to_the_nearest_of_16_bits_and_to_even(dtype, rng):
    every = np.arange(1 << 16, dtype=np.uint16).view(SMALL[dtype]).astype(np.float32)
    steps = every[np.isfinite(every)].view(np.uint32)
    half = {"float16": 1 << 12, "bfloat16": 1 << 15}[dtype]  # from a number to the middle between it and the next
    near = [steps + np.uint32(half + i) for i in (-1, 0, 1)]
    x = np.concatenate([*near, rng.integers(1 << 32, size=1 << 18, dtype=np.uint32)]).view(np.float32)
    y = np.empty(x.size, SMALL[dtype])
    build(kernel(CONVERT, dtype)).launch("narrow", 1, 32, y=y, x=x, size=x.size)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(SMALL[dtype])
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(y[numbers].view(np.uint16), expected[numbers].view(np.uint16))
    assert np.isnan(y[~numbers].astype(np.float32)).all()


# ---- warps, atomics, orders ------------------------------------------------------------------------------------------

SHUFFLES = """
kernel shuffles(V* __restrict__ y, const V* __restrict__ x, const int by, const int width) {
    const V v = x[threadIdx.x];
    V* const out = y + 4 * threadIdx.x;
    out[0] = __shfl_sync(ALL, v, by, width);
    out[1] = __shfl_up_sync(ALL, v, unsigned(by), width);
    out[2] = __shfl_down_sync(ALL, v, unsigned(by), width);
    out[3] = __shfl_xor_sync(ALL, v, by, width);
}
"""


@pytest.mark.parametrize("type_", ["int", "unsigned", "float", "double", "long long"])
def test_shuffles_move_values_between_lanes(type_, rng):
    library = build(kernel(SHUFFLES.replace("V*", f"{type_}*").replace("V v", f"{type_} v")))
    dtype = library.parameters["shuffles"][0].dtype
    x, lane = rng.integers(100, size=64).astype(dtype), np.arange(64)
    for by in (1, 2, 5, 16):
        for width in (32, 8):
            y, first = np.empty((64, 4), dtype), lane // width * width
            library.run("shuffles", 1, 64, y=y, x=x, by=by, width=width)
            up, down, other = lane - by, lane + by, lane ^ by
            source = [
                first + by % width, np.where(up >= first, up, lane), np.where(down < first + width, down, lane),
                np.where(other < first + width, other, lane),
            ]  # fmt: skip
            np.testing.assert_array_equal(y, np.stack([x[s] for s in source], 1))


PAIRS = """
kernel pairs(int* __restrict__ y) {
    const int i = int(threadIdx.x);
    y[i] = i < 8 ? __shfl_xor_sync(0xffu, i, 4) : __shfl_xor_sync(0xffffff00u, i, 1);
}
"""


def test_shuffles_within_part_of_a_warp():
    library = build(kernel(PAIRS))
    y = np.empty(32, np.int32)
    library.run("pairs", 1, 32, y=y)
    np.testing.assert_array_equal(y, [i ^ 4 if i < 8 else i ^ 1 for i in range(32)])


VOTES = """
kernel votes(Word* __restrict__ y, const int* __restrict__ x) {
    const int v = x[threadIdx.x];
    y[3 * threadIdx.x] = __ballot_sync(ALL, v);
    y[3 * threadIdx.x + 1] = Word(__any_sync(ALL, v));
    y[3 * threadIdx.x + 2] = Word(__all_sync(ALL, v));
}
"""


def test_votes():
    library = build(kernel(VOTES))
    x = np.zeros((3, 32), np.int32)
    x[1, [0, 5, 31]], x[2] = 7, -1
    y = np.empty((3, 32, 3), np.uint32)
    library.run("votes", 1, 96, y=y, x=x)
    np.testing.assert_array_equal(
        y, np.repeat([[0, 0, 0], [1 << 31 | 1 << 5 | 1, 1, 0], [2**32 - 1, 1, 1]], 32, 0).reshape(y.shape)
    )


ATOMICS = """
kernel atomics(Word* __restrict__ y, Index* __restrict__ z) {
    atomicInc(y, 99);
    atomicAdd(y + 1, 2);
    atomicMax(y + 2, threadIdx.x + blockIdx.x);
    atomicOr(y + 3, 1u << threadIdx.x % 16);
    atomicCAS(y + 4, 0, 1);
    atomicMin(z, Index(-3) * Index(threadIdx.x));
}
"""


def test_atomics_count_every_thread():
    library = build(kernel(ATOMICS))
    y, z = np.zeros(5, np.uint32), np.zeros(1, np.int64)
    library.run("atomics", 4, 64, y=y, z=z)
    assert y.tolist() == [256 % 100, 512, 66, 0xFFFF, 1] and z == -189


def test_no_atomics_of_floats():
    with pytest.raises(RuntimeError, match="atomics of integers only"):
        build(kernel("kernel adds(R* __restrict__ y) { atomicAdd(y, R(1)); }"))


WHO = """
kernel who(Word* __restrict__ count, Word* __restrict__ y) {
    y[count[0]] = Word(blockIdx.x * Index(blockDim.x) + threadIdx.x);
    count[0] += 1;
}
"""


def test_the_order_of_threads_and_blocks_is_a_permutation():
    seen = []
    for order in ORDERS:
        count, y = np.zeros(1, np.uint32), np.full(5 * 64, 9999, np.uint32)
        build(kernel(WHO)).launch("who", 5, 64, order, count=count, y=y)
        np.testing.assert_array_equal(np.sort(y), np.arange(5 * 64))
        seen.append(y)
    np.testing.assert_array_equal(seen[0], np.arange(5 * 64))
    assert len({y.tobytes() for y in seen}) == len(ORDERS)
    assert len(set(seen[1][:32] // 32)) == 1 and len(set(seen[2][:32] // 64)) > 1  # warp by warp; blocks mixed


def test_results_that_depend_on_the_order_are_an_error():
    with pytest.raises(EmulationError, match=r"^who: y depends on the order of threads and blocks \(seed 1\)$"):
        build(kernel(WHO)).run("who", 5, 64, count=np.zeros(1, np.uint32), y=np.zeros(320, np.uint32))


PLACES = """
kernel where(Word* __restrict__ y) {
    const Index block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * Index(blockIdx.z));
    y[block * blockDim.x * blockDim.y * blockDim.z + thread()] += 1 + threadIdx.z;
}
"""


def test_indices_of_three_dimensions():
    library = build(kernel(PLACES))
    y = np.zeros((24, 4, 6), np.uint32)
    library.run("where", (2, 3, 4), (3, 2, 4), y=y)
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(1, 5)[:, None], y.shape))


UNSET = """
kernel reads(R* __restrict__ y) {
    __shared__ R kept[2];
    y[blockIdx.x] = kept[1];
    kept[1] = 1;
}
"""


def test_shared_memory_starts_as_garbage_in_every_block():
    library = build(kernel(UNSET))
    y = np.zeros(5, np.float32)
    library.run("reads", 5, 1, y=y)
    assert np.isnan(y).all()


REVERSE = """
kernel reverse(R* __restrict__ y, const R* __restrict__ x) {
    __shared__ R kept[THREADS];
    const unsigned i = threadIdx.x;
    kept[i] = x[blockIdx.x * Index(blockDim.x) + i];
    __syncthreads();
    y[blockIdx.x * Index(blockDim.x) + i] = kept[blockDim.x - 1 - i];
}
"""


@pytest.mark.parametrize("options", [(), ("-DPORTABLE",)], ids=["fast", "portable"])
def test_blocks_have_shared_memory_of_their_own(options):
    x = np.arange(7 * 96, dtype=np.float32)
    y = np.empty_like(x)
    build(kernel(REVERSE), options=options).run("reverse", 7, 96, y=y, x=x)
    np.testing.assert_array_equal(y.reshape(7, 96), x.reshape(7, 96)[:, ::-1])


def test_any_thread_of_the_system_may_launch():
    library, x = build(kernel(REVERSE)), np.arange(7 * 96, dtype=np.float32)
    with ThreadPoolExecutor(4) as pool:
        outputs = [np.empty_like(x) for _ in range(8)]
        list(pool.map(lambda y: library.run("reverse", 7, 96, y=y, x=x), outputs))
    assert all((y == x.reshape(7, 96)[:, ::-1].ravel()).all() for y in outputs)


# ---- barriers that cannot be passed ----------------------------------------------------------------------------------

STUCK = {
    "returned": ("if (threadIdx.x < 40) __syncthreads();", "0-39 at __syncthreads() in stuck, line N; 40-63 returned"),
    "apart": (
        "if (threadIdx.x % 2 == 0) __syncthreads();\nelse __syncthreads();",
        "0, 2, 4, .* at __syncthreads() in stuck, line N; 1, 3, .* at __syncthreads() in stuck, line N",
    ),
    "lane returned": (
        "if (threadIdx.x < 32 && threadIdx.x != 3) across(R(1), Add{});",
        "0-2, 4-31 at __shfl_xor_sync(0xffffffff) in across<gpubackprop::Add>, line N; 3, 32-63 returned",
    ),
    "another mask": (
        "__syncwarp(threadIdx.x == 0 ? 0xffffffffu : 0xfffffffeu);",
        "0 at __syncwarp(0xffffffff) in stuck, line N; 1-31, 33-63 returned; 32 at __syncwarp(0xfffffffe)",
    ),
    "not in its mask": ("if (threadIdx.x == 1) __syncwarp(1);", "0, 2-63 returned; 1 at __syncwarp(0x00000001)"),
    "barrier and shuffle": (
        "if (threadIdx.x < 32) __syncthreads();\nelse if (threadIdx.x != 63) __syncwarp();",
        "0-31 at __syncthreads() in stuck, line N; 32-62 at __syncwarp(0xffffffff) in stuck, line N; 63 returned",
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", STUCK)
def test_threads_that_wait_for_each_other_are_named(fault, order):
    body, which = STUCK[fault]
    library = build(kernel(f"kernel stuck() {{\n{body}\n}}\nkernel fine() {{ __syncthreads(); }}"))
    pattern = re.escape(which).replace("N", r"\d+").replace(r"\.\*", ".*")
    with pytest.raises(
        EmulationError, match=r"^stuck: the threads of block \(\d, 0, 0\) wait for each other: .*" + pattern
    ):
        library.launch("stuck", 3, 64, order)
    library.launch("fine", 3, 64, order)


def test_reading_a_lane_outside_the_mask_is_an_error():
    library = build(kernel("kernel reads() { if (threadIdx.x < 8) __shfl_down_sync(0xffu, 1, 4); }"))
    with pytest.raises(
        EmulationError, match=r"^reads: __shfl_down_sync in reads, line \d+, reads lane 8, which its mask"
    ):
        library.launch("reads", 1, 32)


# ---- places beyond 32 bits -------------------------------------------------------------------------------------------

PRODUCTS = ["blockIdx.x * blockDim.x", "gridDim.x * gridDim.y", "4u * blockIdx.x", "blockIdx.x / 2u * int(columns)"]
KEY = re.compile(r"(blockIdx|gridDim)\.\w")


@pytest.mark.parametrize("place", PRODUCTS)
def test_numbers_of_blocks_are_multiplied_in_64_bits(place):
    """What an array of a test would not show: a place beyond 2³¹ elements that wraps."""
    text = "kernel places(Index* __restrict__ y, const Index columns) {{ y[0] = Index({}) + columns; }}".format
    with pytest.raises(RuntimeError, match=r"may not fit 32 bits; make a factor an Index|deleted function"):
        build(kernel(text(place)))
    build(kernel(text(KEY.sub(r"Index(\g<0>)", place, count=1))))


def test_places_of_a_kernel_are_made_in_64_bits():
    source = planted(codegen.source("mse"), "blockIdx.x * Index(blockDim.x) + threadIdx.x", "blockIdx.x * blockDim.x")
    with pytest.raises(RuntimeError, match="may not fit 32 bits; make a factor an Index"):
        build(source)


# ---- arguments -------------------------------------------------------------------------------------------------------

TAKES = """
struct Layout { Index dims, shape[2]; };
kernel takes(R* __restrict__ y, const T* __restrict__ x, const int n, const Word w, const R r, const Layout layout) {
    y[0] = x ? R(x[0]) : R(-1);
    y[1] = R(n) + R(w) + r + R(layout.shape[1]);
}
"""


def test_arguments_of_every_kind():
    library, layout = build(kernel(TAKES, "bfloat16")), np.array([2, 3, 4])
    y, x = np.zeros(2, np.float32), np.array([0.5], ml_dtypes.bfloat16)
    library.launch("takes", 1, 1, y=y, x=x, n=-2, w=np.uint32(7), r=0.25, layout=layout)
    assert y.tolist() == [0.5, 9.25]
    library.launch("takes", 1, 1, y=y, x=None, n=-2, w=7, r=0.25, layout=layout)
    assert y[0] == -1
    call = library.bind("takes", 1, (1, 1, 1), [y.ctypes.data, x.ctypes.data, 1, 2, 3.0, layout])
    call()
    assert y.tolist() == [0.5, 10]


GOOD = dict(zip("yx", np.zeros((2, 2), np.float32), strict=True)) | dict.fromkeys("nwr", 1) | {"layout": [0, 0, 0]}
MOST = "a block has at most 256 threads"
BAD_ARGUMENTS = {
    "dtype": ({"x": np.zeros(1)}, TypeError, "takes: x is float64, the kernel's type is float32"),
    "no array": ({"x": [1.0]}, TypeError, "takes: x takes an array, got list"),
    "read-only": ({"y": np.broadcast_to(np.float32(1), 2)}, ValueError, "takes: y is written, but read-only"),
    "fraction": ({"n": 0.5}, TypeError, "'float' object cannot be interpreted as an integer"),
    "large": ({"n": 1 << 31}, OverflowError, "n=2147483648 does not fit into int32"),
    "negative": ({"w": -1}, OverflowError, "w=-1 does not fit into uint32"),
    "structure": ({"layout": np.zeros(4, np.int64)}, TypeError, "layout takes a structure of 24 bytes, got 32"),
    "unknown": ({"z": 1}, TypeError, "takes has no parameter z; it has y, x, n, w, r, layout"),
    "grid": ({"grid": (1, 1 << 16)}, ValueError, f"takes: grid (1, 65536, 1), blocks (1, 1, 1); {MOST}"),
    "block": ({"block": 257}, ValueError, f"takes: grid (1, 1, 1), blocks (257, 1, 1); {MOST}"),
    "kernel": ({"name": "took"}, ValueError, "no kernel 'took'; the source has takes"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_ARGUMENTS)
def test_bad_arguments_are_errors(fault):
    wrong, kind, message = BAD_ARGUMENTS[fault]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        build(kernel(TAKES)).launch(**{"name": "takes", "grid": 1, "block": 1} | GOOD | wrong)


def test_missing_strided_and_overlapping_arguments_are_errors():
    library, x = build(kernel(REVERSE)), np.zeros(8, np.float32)
    with pytest.raises(TypeError, match=r"^reverse needs x$"):
        library.launch("reverse", 1, 4, y=x)
    with pytest.raises(ValueError, match=r"^reverse: x is not C-contiguous$"):
        library.launch("reverse", 1, 4, y=np.zeros(4, np.float32), x=x[::2])
    with pytest.raises(ValueError, match=r"^x overlaps y without being the same array$"):
        library.launch("reverse", 1, 4, y=x[:4], x=x[1:5])


ADDRESSES = """
kernel addresses(Index* __restrict__ y, const R* __restrict__ a, const R* __restrict__ b) {
    y[0] = Index(misaligned(a));
    y[1] = Index(misaligned(b));
    y[2] = a == b;
}
"""


def test_arrays_keep_their_alignment_and_identity():
    library = build(kernel(ADDRESSES))
    y, x = np.zeros(3, np.int64), np.zeros(8, np.float32)
    library.launch("addresses", 1, 1, y=y, a=x[1:], b=x[1:])
    assert y.tolist() == [4, 4, 1]


def test_writes_outside_an_array_are_errors():
    library = build(kernel("kernel writes(R* __restrict__ y, const int at) { y[at] = 1; }"))
    y = np.zeros(6, np.float32)[1:4]
    with pytest.raises(EmulationError, match=r"^writes wrote past the end of y$"):
        library.launch("writes", 1, 1, y=y, at=3)
    with pytest.raises(EmulationError, match=r"^writes wrote before y$"):
        library.launch("writes", 1, 1, y=y, at=-1)


def test_strided_arrays_are_for_kernels_that_take_a_layout():
    x, y = np.arange(8, dtype=np.float32), np.full(4, 9, np.float32)
    build(kernel(TAKES)).launch("takes", 1, 1, y=y[:3:2], x=x[6:1:-2], n=0, w=0, r=0, layout=[1, 4, 2])
    assert y.tolist() == [6, 2, 9, 9]  # the kernel takes no notice of the strides


# ---- planted faults --------------------------------------------------------------------------------------------------
# A check replaces a text of a source by another one. All sources but TOTALS are kernels of the library.


def planted(source, old, new):
    assert old in source, f"nothing to plant a fault in: {old!r}"
    return source.replace(old, new)


TOTALS = """
kernel totals(R* __restrict__ y, R* partials, Word* ticket, const T* __restrict__ x, const Index size) {
    const Index first = blockIdx.x * Index(blockDim.x) + thread(), threads = gridDim.x * Index(blockDim.x);
    R sum = 0, squares = 0;
    for (Index i = first; i < size; i += threads) sum += R(x[i]);
    partials[first] = sum;
    if (!last_block(ticket, gridDim.x)) return;
    sum = 0;
    for (Index i = thread(); i < threads; i += blockDim.x) {
        sum += partials[i];
        squares += partials[i] * partials[i];
    }
    sum = across_block(sum, Add(), R(0));
    squares = across_block(squares, Add(), R(0));
    if (thread() == 0) {
        y[0] = sum;
        y[1] = squares;
    }
}
"""


def check_totals(old="", new=""):
    """Two sums of every block's partial sums; of small integers, whose order does not matter."""
    x = np.random.default_rng(0).integers(9, size=3000).astype(np.float32)
    y, partials, ticket = np.zeros(2, np.float32), np.full(5 * 128, np.nan, np.float32), np.zeros(1, np.uint32)
    build(planted(kernel(TOTALS), old, new)).run(
        "totals", 5, 128, y=y, partials=partials, ticket=ticket, x=x, size=x.size
    )
    expected = np.pad(x, (0, 200)).reshape(5, 640).sum(0)
    np.testing.assert_array_equal(partials, expected)
    np.testing.assert_array_equal(y, [expected.sum(), (expected**2).sum()])
    assert ticket == 0


def check_forward(old="", new=""):
    """y = relu(x + b), once with all arrays off the boundary of 16 bytes."""
    library = build(planted(codegen.source("relu"), old, new))
    x, b = (np.random.default_rng(seed).standard_normal(129).astype(np.float32) for seed in range(2))
    for part in (slice(128), slice(1, 129)):
        y = np.zeros(129, np.float32)
        given = {"y": y[part], "x": x[part], "b": b[part], "rows": 1, "columns": 128, "members": 1}
        library.run("relu_forward", 2, 8, **given)
        np.testing.assert_array_equal(y[part], np.maximum(x + b, 0)[part])


def check_columns(old="", new=""):
    """dx = dy * tanh' and its sums over the rows, by five blocks; of small integers."""
    dy, y = np.random.default_rng(0).integers(-3, 4, size=(2, 70, 64)).astype(np.float32)
    dx, sums = np.zeros_like(dy), np.zeros(64, np.float32)
    build(planted(codegen.source("tanh"), old, new)).run(
        "tanh_backward_bias", (1, 5), (16, 4), dx=dx, sums=sums, partials=np.full(320, np.nan, np.float32),
        tickets=np.zeros(1, np.uint32), dy=dy, y=y, accumulate=0, rows=70, columns=64, members=1,
    )  # fmt: skip
    np.testing.assert_array_equal(dx, dy * (1 - y * y))
    np.testing.assert_array_equal(sums, dx.sum(0))


def check_sum(old="", new=""):
    """total = Σ k (x − t)² of small integers, by three blocks."""
    x, t = np.random.default_rng(0).integers(9, size=(2, 3001)).astype(np.float32)
    total, k = np.zeros(1, np.float32), np.full(1, 2, np.float32)
    build(planted(codegen.source("mse"), old, new)).run(
        "mse_forward", 3, 128, total=total, partials=np.full(3, np.nan, np.float32), ticket=np.zeros(1, np.uint32),
        loss=None, events=None, state=None, x=x, t=t, k=k, size=x.size,
    )  # fmt: skip
    np.testing.assert_array_equal(total, 2 * ((x - t) ** 2).sum())


CHECKS = [check_totals, check_forward, check_columns, check_sum]
TICKET = "__threadfence();\n    __syncthreads();\n", "__threadfence();\n"
SHIFT = "load<W>(x + at)", "load<W>(x + at + 1)"
ONE_MORE = "column + W <= columns", "column + W <= columns + 1"

# What is wrong, in which check, and what is then said.
CAUGHT = {
    "no barrier before across_block writes": (
        check_totals, ("    __syncthreads();  // an earlier call's values have been read\n", ""),
        r"totals: y depends on the order of threads and blocks \(seed \d\)",
    ),
    "no barrier before across_block reads": (
        check_totals, ("= v;\n    __syncthreads();\n", "= v;\n"), "totals: y depends on the order",
    ),
    "no barrier before last_block takes a ticket": (check_totals, TICKET, "totals: y depends on the order"),
    "no barrier before columns takes a ticket": (check_columns, TICKET, "sums depends on the order"),
    "no barrier before last_block tells": (
        check_totals, ("== blocks - 1;\n    __syncthreads();\n", "== blocks - 1;\n"),
        r"totals: the threads of block .* wait for each other: .* at __syncthreads\(\) in across_block",
    ),
    "no barrier in add_rows": (
        check_columns, ("half /= 2) {\n        __syncthreads();", "half /= 2) {"), "s depends on the order",
    ),
    "a barrier that some skip": (
        check_columns, ("half /= 2) {\n", "half /= 2) {\n if (thread() < 32)"),
        r"wait for each other: 0-31 at __syncthreads\(\) in add_rows, line \d+; 32-63 at __syncthreads\(\) in add_rows",
    ),
    "a partial sum of a block missing": (check_columns, ("split < splits;", "split < splits - 1;"), "not equal"),
    "a partial sum of a warp missing": (check_sum, ("lane < warps ?", "lane < warps - 1 ?"), "not equal"),
    "a wrong sign in a derivative": (check_columns, ("(R(1) - y * y)", "(R(1) + y * y)"), "not equal"),
    "a vector shifted by 4 bytes": (check_forward, SHIFT, "not equal"),
    "an element more than there is": (check_forward, ONE_MORE, "relu_forward wrote past the end of y"),
}  # fmt: skip

# The same under sanitizers, which name the access.
SANITIZED = {
    "an element more than there is": (check_forward, ONE_MORE, "AddressSanitizer: heap-buffer-overflow"),
    "a partial sum more than there is": (
        check_sum, ("i < int(gridDim.x)", "i <= int(gridDim.x)"), "AddressSanitizer: heap-buffer-overflow",
    ),
    "a shared value more than there is": (
        check_totals, ("of_warp[thread() / WARP] = v", "of_warp[thread() / WARP + 29] = v"), "index 32 out of bounds",
    ),
    "a vector shifted by 4 bytes": (check_forward, SHIFT, "misaligned address .* requires 16 byte alignment"),
    "vectors whatever the address": (
        check_forward, ("reinterpret_cast<size_t>(x) % 16", "reinterpret_cast<size_t>(x) % 4"),
        "misaligned address .* requires 16 byte alignment",
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_fault_the_checks_pass(check):
    check()


@pytest.mark.parametrize("fault", CAUGHT)
def test_planted_faults_are_caught(fault):
    check, texts, message = CAUGHT[fault]
    with pytest.raises((AssertionError, EmulationError), match=message):
        check(*texts)


def under_sanitizers(*arguments, **variables):
    """A Python process started with the arguments, whose kernels are sanitized."""
    environment = sanitizer_environment() | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=HERE.parent, env=environment, **pipes)


@pytest.mark.parametrize("fault", SANITIZED)
def test_planted_faults_are_caught_by_a_sanitizer(fault):
    check, texts, message = SANITIZED[fault]
    process = under_sanitizers("-c", f"import test_emulator as t; t.{check.__name__}(*{texts!r})")
    output, _ = process.communicate()
    assert process.returncode != 0 and re.search(message, output), output


def test_without_a_fault_the_sanitizers_are_silent():
    process = under_sanitizers("-c", "import test_emulator as t; [check() for check in t.CHECKS]")
    output, _ = process.communicate()
    assert process.returncode == 0 and not output, output


def test_a_sanitized_library_needs_a_process_of_its_own():
    with pytest.raises(
        RuntimeError, match=r"^a sanitized library needs a process started with sanitizer_environment\(\)$"
    ):
        build(kernel(WHO), sanitize=True)


# ---- the kernels -----------------------------------------------------------------------------------------------------


def run_tests(files, part):
    """How many tests of each file passed; none may fail or be skipped."""
    process = under_sanitizers("-m", "pytest", "-p", "no:cacheprovider", "-rp", *files, GPUBACKPROP_KERNELS_PART=part)
    output, _ = process.communicate()
    summary = re.fullmatch(r"(\d+) passed(?:, \d+ deselected)? in .*", output.rstrip().rpartition("\n")[2])
    assert process.returncode == 0 and summary, output
    return Counter(re.findall(r"^PASSED \S*?(test_\w+\.py)::", output, re.MULTILINE))


@pytest.mark.parametrize("part", ["eighth", pytest.param("rest", marks=pytest.mark.matrix)])
def test_kernels_under_sanitizers(part):
    """The files of tests/kernels in four processes, two at a time: each takes two seconds to start."""
    files = sorted((HERE / "kernels").glob("test_*.py"), key=lambda p: -p.stat().st_size)
    with ThreadPoolExecutor(2) as pool:
        passed = sum(pool.map(lambda i: run_tests(files[i::4], part), range(4)), Counter())
    assert {*passed} == {p.name for p in files}
    elementwise = sum(isinstance(k, codegen.Kernel) for row in codegen.names() for k in codegen.kernels(row))
    assert passed["test_elementwise.py"] >= 0.08 * len(codegen.ITEMSIZE) * elementwise
