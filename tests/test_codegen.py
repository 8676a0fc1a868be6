"""The generated C++: what it says, what it computes when a host compiler builds it, and that NVRTC takes all of it."""

import ctypes
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gpubackprop import formulas
from gpubackprop.backends import chunked, codegen
from gpubackprop.backends.base import Workspace
from gpubackprop.formulas import FUNCTIONS, apply, name, number, parse, walk

KERNELS = {k.name: k for row in codegen.names() for k in codegen.kernels(row)}
DTYPES = list(codegen.ITEMSIZE)
EXACT = {"name", "number", "neg", "sqrt", "abs", "where", "maximum", "minimum", *"+-*/", *formulas.COMPARISONS.values()}


def exact(kernel):
    """Whether the kernel's values are the same bits on every backend."""
    return {node.op for node in walk(kernel.graph.values())} <= EXACT


# ---- the text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", codegen.names())
def test_every_name_renders(row, dtype):
    text = codegen.source(row, dtype)
    assert "$" not in text and codegen.GLUE not in text
    assert [k.name for k in codegen.kernels(row)] == re.findall(r"__launch_bounds__\(THREADS\) (\w+)\(", text)
    assert max(map(len, text.splitlines())) <= codegen.WIDTH
    assert text.startswith("//" if dtype == "float32" else f"#define {dtype.upper()}\n")


def test_a_name_prints_all_its_kernels():
    parts = {row: [k.name.removeprefix(f"{row}_") for k in codegen.kernels(row)] for row in codegen.names()}
    assert parts["gelu"] == parts["power"] == parts["mse"] == parts["exp"] == ["forward", "backward"]
    assert parts["nesterov"] == ["before", "update"] and parts["adam"] == ["update"]


def test_a_registered_activation_has_a_kernel(monkeypatch):
    monkeypatch.setattr(formulas, "ACTIVATIONS", dict(formulas.ACTIVATIONS))
    formulas.register_activation("bent", "(sqrt(x * x + 1) - 1) / 2 + x", "x / (2 * sqrt(x * x + 1)) + 1")
    assert "bent_backward" in codegen.source("bent")


def test_unknown_names_are_errors():
    with pytest.raises(
        ValueError, match=r"^unknown kernel 'rleu'; choose from abs, adam, adamw, add, bce_with_logits, "
    ):
        codegen.source("rleu")
    with pytest.raises(ValueError, match=r"^unknown dtype 'int8'; choose from float32, float64, float16, bfloat16$"):
        codegen.source("relu", "int8")


def test_bytes_per_element_are_the_floor():
    floor = {"relu_forward": 8, "relu_backward": 12, "sgd_update": 12, "momentum_update": 20, "adam_update": 28}
    assert {k: KERNELS[k].bytes("float32") for k in floor} == floor
    assert KERNELS["gelu_forward"].bytes("float32") == 12  # it keeps the pre-activation too
    assert KERNELS["adam_update"].bytes("float16") == 14


@pytest.mark.parametrize(
    "text, lines",
    [
        ("x + (y - 2)", ["out = x + (y - R(2));"]),
        ("x - y - 2 * (x + y)", ["out = x - y - R(2) * (x + y);"]),
        ("x / (y * 3) / 0.1", ["out = x / (y * R(3)) / R(0.1);"]),
        ("-(-x) - -y", ["out = -(-x) - -y;"]),
        ("-(x + y) * exp(-x)", ["out = -(x + y) * exp(-x);"]),
        ("1 + where(x > 0, x, -1) * 2", ["out = R(1) + (x > R(0.0) ? x : R(-1)) * R(2);"]),
        ("where(x < y, where(y < 1, x, y), 0)", ["out = x < y ? (y < R(1) ? x : y) : R(0.0);"]),
        ("e = exp(x)\ne * e + 1e-12", ["const R t0 = exp(x);", "out = t0 * t0 + R(1e-12);"]),
    ],
)
def test_statements(text, lines):
    assert codegen.statements({"out": parse(text)[formulas.RESULT]}) == lines


def test_outputs_that_are_inputs_are_written_last():
    swap = {"a": name("b"), "b": name("a")}
    assert codegen.statements(swap) == ["const R t0 = b;", "const R t1 = a;", "a = t0;", "b = t1;"]


def test_locals_avoid_the_names_of_operands():
    square = apply("+", name("t0"), number(1))
    assert codegen.statements({"t1": apply("*", square, square)}) == ["const R t2 = t0 + R(1);", "t1 = t2 * t2;"]


def test_long_expressions_are_broken_up():
    total = name("x")
    for i in range(200):
        total = apply("+", apply("*", total, name("x")), number(i + 0.123456789))
    assert max(map(len, codegen.statements({"y": total}))) <= codegen.WIDTH


def test_runs_by_path_with_the_standard_library_alone():
    command = [sys.executable, "-I", "-S", codegen.__file__, "gelu", "bfloat16"]
    printed = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
    assert printed.stdout == codegen.source("gelu", "bfloat16") and not printed.stderr


# ---- what it computes ----------------------------------------------------------------------------------------------

COMPILER = shutil.which("g++") or shutil.which("clang++")
OPTIONS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wconversion", "-Wdouble-promotion"]
OPTIONS += ["-Werror", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a vector off its boundary traps
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++ or clang++ on the path")

# Enough of CUDA to run a kernel without barriers on the host: its threads one after another.
HOST = """
#define __global__
#define __launch_bounds__(n)
struct Dim { unsigned x, y; };
static Dim gridDim, blockDim, blockIdx, threadIdx;
"""
RUN = """
extern "C" void run_{name}(Dim grid, Dim block, {parameters}) {{
    gridDim = grid, blockDim = block;
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x)
    for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y) {name}({arguments});
}}
"""
PHILOX = """
extern "C" void run_philox(Long seed, Word site, Word step, Long block, Block* out) {
    *out = draw(seed, site, step, block);
}
"""

# The functions that round differently from one library to the next, each as a kernel, and outputs that are inputs.
EXTRA = {
    f: codegen.Kernel(f"only_{f}", {"y": apply(f, *map(name, "xz"[:arguments]))}, f)
    for f, arguments in FUNCTIONS.items()
    if f not in EXACT
} | {"swap": codegen.Kernel("swap", {"a": name("b"), "b": name("a")}, "swap")}


class Dim(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint))


@pytest.fixture(scope="module", params=["float32", "float64"])
def host(request, tmp_path_factory):
    """The kernels of one dtype as host functions."""
    folder = tmp_path_factory.mktemp("host")
    kernels = [*KERNELS.values(), *EXTRA.values()]
    drivers = [
        RUN.format(name=k.name, parameters=", ".join(f"{t} {p}" for t, p in k.parameters),
                   arguments=", ".join(p for _, p in k.parameters))
        for k in kernels
    ]  # fmt: skip
    text = HOST + codegen.unit(kernels, request.param)
    (folder / "unit.cpp").write_text("\n".join([text, "namespace gpubackprop {", PHILOX, *drivers, "}"]), "utf-8")
    command = [COMPILER, *OPTIONS, "-shared", "-fPIC", "unit.cpp", "-o", "unit.so"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(folder / "unit.so")), np.dtype(request.param)


def launch(host, kernel, arrays, scalars, shape, grid=(3, 2), block=(4, 2)):
    """Run a kernel over arrays by name; `scalars` go through a step table whose second row is in force."""
    library, dtype = host
    table = np.full((3, len(scalars) + 1), np.nan, dtype)
    counter = np.array(1, np.int32)
    table[1, 1:] = list(scalars.values())
    values = {"table": table, "counter": counter, "width": table.shape[1], "rows": shape[0], "columns": shape[1]}
    values |= {f"{k}_at": i + 1 for i, k in enumerate(scalars)} | arrays
    kinds = {"const int": ctypes.c_int, "const Index": ctypes.c_longlong}
    call = getattr(library, f"run_{kernel.name}")
    call.argtypes = [Dim, Dim, *(kinds.get(t, ctypes.c_void_p) for t, _ in kernel.parameters)]
    call.restype = None
    given = [values[k] for _, k in kernel.parameters]
    call(Dim(*grid), Dim(*block), *(v.ctypes.data if isinstance(v, np.ndarray) else v for v in given))


def reference(kernel, arrays, scalars, shape, dtype):
    """The same by the NumPy rendering, in new arrays."""
    writes = {k: arrays[k].copy() for k in kernel.graph}
    reads = {k: a if a.shape == shape or k in kernel.per_column else a.reshape(()) for k, a in arrays.items()}
    reads |= {k: np.array(v, dtype) for k, v in scalars.items()} | {k: writes[k] for k in kernel.updates}
    names = formulas.free_names(*kernel.graph.values())
    with np.errstate(all="ignore"):
        for call in chunked.bind(kernel.graph, {k: reads[k] for k in names}, writes, shape, dtype, Workspace()):
            call()
    return writes


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-3, -1e-3, 6.0, 20.0, -20.0, 1e4, -1e4, np.inf, -np.inf, np.nan]


def operands(kernel, shape, dtype):
    """Arrays for every name: ordinary numbers, with the special ones against each other in front."""
    rng = np.random.default_rng(7)
    special = np.array(np.meshgrid(SPECIAL, SPECIAL)).reshape(2, -1)

    def draw(k, i):
        size = (shape[1],) if k in kernel.per_column else (1,) if k in kernel.single else shape
        a = 3 * rng.standard_normal(size)
        if size == shape and shape[0] * shape[1] > special.shape[1]:
            a.reshape(-1)[: special.shape[1]] = special[i % 2]
        return a.astype(dtype)

    used = dict.fromkeys((*kernel.graph, *kernel.reads, *kernel.per_column, *kernel.single))
    return {k: draw(k, i) for i, k in enumerate(used)}, {k: 0.1 * (i + 1) for i, k in enumerate(kernel.table)}


def by_host_functions(host, kernel, arrays, scalars, shape):
    """The same by formulas.evaluate, with exp and the like as the host compiler has them."""
    values = {k: np.broadcast_to(v, shape).astype(host[1]) for k, v in {**arrays, **scalars}.items()}

    def function(f):
        def call(*args):
            given = {k: np.ascontiguousarray(np.broadcast_to(a, shape)) for k, a in zip("xz", args, strict=False)}
            y = np.empty(shape, host[1])
            launch(host, EXTRA[f], given | {"y": y}, {}, shape)
            return y

        return call

    table = chunked.UFUNCS | {f: function(f) for f in EXTRA if f != "swap"}
    table["where"] = lambda c, a, b: np.where(c, a, b).astype(host[1])
    with np.errstate(all="ignore"):
        return {k: formulas.evaluate(e, values, table) for k, e in kernel.graph.items()}


def check(host, kernel, shape):
    """Equal bits but for the functions; with NumPy's, a difference of an ulp may grow where a formula cancels."""
    arrays, scalars = operands(kernel, shape, host[1])
    numpy = reference(kernel, arrays, scalars, shape, host[1])
    evaluated = by_host_functions(host, kernel, arrays, scalars, shape)
    launch(host, kernel, arrays, scalars, shape)
    bound = 0 if exact(kernel) else 128 * np.finfo(host[1]).eps
    for k in kernel.graph:
        np.testing.assert_array_equal(arrays[k], evaluated[k])
        np.testing.assert_allclose(arrays[k], numpy[k], rtol=bound, atol=bound)


@needs_compiler
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda k: k.name)
def test_kernels_compute_what_numpy_computes(host, kernel):
    check(host, kernel, (41, 24) if kernel.per_column else (1, 1003))


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (1, 4096), (5, 8), (5, 7), (300, 1)])
@pytest.mark.parametrize("kernel", ["relu_forward", "relu_backward", "adam_update", "half_mse_backward"])
def test_every_element_of_every_shape(host, kernel, shape):
    check(host, KERNELS[kernel], shape)


@needs_compiler
def test_outputs_may_be_each_others_inputs(host):
    a, b = np.arange(9, dtype=host[1]), np.ones(9, host[1])
    launch(host, EXTRA["swap"], {"a": a, "b": b}, {}, (1, 9))
    np.testing.assert_array_equal([a, b], [np.ones(9), np.arange(9)])


@needs_compiler
def test_arrays_off_the_boundary_of_16_bytes(host):
    x, b, y = np.arange(65, dtype=host[1])[1:], np.arange(-40, 24, dtype=host[1]), np.full(66, 7, host[1])
    launch(host, KERNELS["relu_forward"], {"x": x, "b": b, "y": y[1:65]}, {}, (1, 64))
    np.testing.assert_array_equal(y, [7, *np.maximum(x + b, 0), 7])


@needs_compiler
@pytest.mark.parametrize("function", sorted(EXTRA.keys() - {"swap", "pow"}))
def test_functions_are_within_2_ulp(host, function):
    if np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("needs an extended type as the oracle")
    x = np.linspace(-30, 30, 20001).astype(host[1])
    x = np.exp(x) if function in ("log", "log1p") else x
    y = np.empty_like(x)
    launch(host, EXTRA[function], {"x": x, "y": y}, {}, (1, x.size))
    expected = chunked.UFUNCS[function](x.astype(np.longdouble))
    assert np.max(np.abs(y - expected) / np.spacing(np.abs(expected).astype(host[1]))) <= 2


@needs_compiler
def test_philox_is_random123s(host):
    out = np.empty(4, np.uint32)
    call = host[0].run_philox
    call.argtypes = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p]
    call(0x299F31D0A4093822, 0x03707344, 0x13198A2E, 0x85A308D3243F6A88, out.ctypes.data)
    assert [f"{word:08x}" for word in out] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


# ---- NVRTC ---------------------------------------------------------------------------------------------------------


def nvidia_folder():
    """Where the wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime put library and headers, if both are there."""
    try:
        places = find_spec("nvidia.cu13").submodule_search_locations
    except (AttributeError, ModuleNotFoundError):
        return None
    has = ("lib/libnvrtc.so.13", "include/cuda_bf16.h")
    return next((Path(p) for p in places if all((Path(p) / f).exists() for f in has)), None)


NVIDIA = nvidia_folder()
needs_nvrtc = pytest.mark.skipif(NVIDIA is None, reason="needs the wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime")


def compile_cuda(text, architecture, *options, headers=True):
    """PTX for compute_NN, a cubin for sm_NN; any word from the compiler is an error."""
    nvrtc = ctypes.CDLL(str(NVIDIA / "lib/libnvrtc.so.13"))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def read(what):
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    options = [
        f"--gpu-architecture={architecture}",
        "--fmad=false",
        "--split-compile=0",
        *options,
        *[f"-I{NVIDIA}/include"] * headers,
    ]
    arguments = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"unit.cu", 0, None, None) == 0
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
        log = read("ProgramLog").rstrip(b"\0").decode()
        assert status == 0 and not log, log
        return read("CUBIN" if architecture.startswith("sm_") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["compute_75", "sm_90", "compute_120"])
def test_all_kernels_compile(architecture, dtype):
    """In one unit a dtype, with the compiler's quick optimiser: the time goes into optimising."""
    compiled = compile_cuda(codegen.unit(KERNELS.values(), dtype), architecture, "--Ofast-compile=max")
    assert all(k.encode() in compiled for k in KERNELS)


@needs_nvrtc
@pytest.mark.parametrize(
    "dtype, kernels", [("float32", list(KERNELS)), ("float16", list(KERNELS)[::4])], ids=["all-float32", "some-float16"]
)
def test_kernels_as_optimised(dtype, kernels):
    """Vectors of 16 bytes, no double arithmetic, no contraction, no atomics, and the declared parameters."""
    text = codegen.unit([KERNELS[k] for k in kernels], dtype)
    ptx = compile_cuda(text, "compute_75", headers=dtype != "float32").decode()
    entries = {part.split("(")[0]: part for part in ptx.split(".visible .entry ")[1:]}
    assert list(entries) == kernels
    vector = r"v4\.[fu]32"
    for kernel, code in ((KERNELS[k], entries[k]) for k in kernels):
        streams = len({*kernel.reads, *kernel.updates, *kernel.per_column})
        assert len(re.findall(rf"ld\.global\.(?:nc\.)?{vector}", code)) >= streams, kernel.name
        assert len(re.findall(rf"st\.global\.{vector}", code)) == len(kernel.graph), kernel.name
        assert not re.search(r"\b(atom|red)\.", code), kernel.name
        assert not (exact(kernel) and "fma." in code), kernel.name
        if not kernel.name.startswith(("sin_", "cos_")):  # CUDA's own reduce a large argument in double
            assert ".f64" not in code and ".local" not in code, kernel.name
        declared = [".u64" if t.endswith(("__restrict__", "Index")) else ".u32" for t, _ in kernel.parameters]
        assert re.findall(r"\.param (?:\.align \d+ )?(\.u\d+)", code.split(")")[0]) == declared, kernel.name
