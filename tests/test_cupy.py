"""The CUDA driver against the real CuPy package, which needs no GPU: what it uses exists and takes those arguments."""

import ast
import ctypes
import inspect
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.cupy
if not os.environ.get("GPUBACKPROP_REQUIRE_CUPY"):
    pytest.importorskip("cupy")

import cupy  # noqa: E402
import ml_dtypes  # noqa: E402
from cupy.cuda import driver, runtime  # noqa: E402

from gpubackprop.backends import cupy as subject  # noqa: E402
from gpubackprop.backends.driver import OPTIONS, CaptureError, Gemm  # noqa: E402

MODULES = {"cupy": cupy, "driver": driver, "runtime": runtime}  # by the names that the source gives them
SOURCE = Path(subject.__file__)
KERNEL = 'extern "C" __global__ void f(float* x) { x[0] = 1; }'
without_gpu = pytest.mark.skipif(cupy.is_available(), reason="a GPU is here")


# ---- what the source names -----------------------------------------------------------------------------------------


def chain(node):
    """The names of `cupy.cuda.Stream` in order, if that is what the node is."""
    if isinstance(node, ast.Name):
        return (node.id,) if node.id in MODULES else None
    return (*first, node.attr) if isinstance(node, ast.Attribute) and (first := chain(node.value)) else None


def named():
    """Every chain of names in the driver's source that starts at one of CuPy's modules, the longest ones only."""
    tree = ast.parse(SOURCE.read_text())
    chains = {c for node in ast.walk(tree) if (c := chain(node)) and len(c) > 1}
    return sorted(c for c in chains if not any(other[: len(c)] == c and other != c for other in chains))


def calls():
    """Every call of such a chain: (chain, number of positional arguments, names of the others)."""
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Call) and (c := chain(node.func)):
            assert not any(isinstance(a, ast.Starred) for a in node.args), "the test cannot count these"
            yield c, len(node.args), tuple(k.arg for k in node.keywords)


def resolve(names):
    found = MODULES[names[0]]
    for name in names[1:]:
        found = getattr(found, name)
    return found


def signature(function):
    """Its signature; Cython writes that of a compiled function into the docstring's first line."""
    try:
        return inspect.signature(function)
    except ValueError:
        pass
    text = function.__doc__.splitlines()[0]
    [inner] = re.findall(r"^[\w.]+\((.*)\)(?: -> \w+)?$", text)
    parameters, kind = [], inspect.Parameter.POSITIONAL_OR_KEYWORD
    for part in filter(None, re.split(r",\s*(?![^()]*\))", inner)):
        declared, equals, _ = part.partition("=")
        if declared == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
        elif declared != "self":
            default = None if equals else inspect.Parameter.empty
            parameters.append(inspect.Parameter(declared.split()[-1], kind, default=default))
    return inspect.Signature(parameters)


@pytest.mark.parametrize("names", named(), ids=".".join)
def test_what_the_driver_names_exists(names):
    try:
        resolve(names)
    except ImportError as error:  # a library that a module asks for comes with the CUDA toolkit, not with CuPy
        assert names == ("cupy", "cuda", "cublas") and "libcublas" in str(error)


@pytest.mark.parametrize("names, count, keywords", sorted(set(calls())))
def test_what_the_driver_calls_takes_those_arguments(names, count, keywords):
    signature(resolve(names)).bind(*range(count), **dict.fromkeys(keywords))


@pytest.mark.parametrize(
    "owner, names",
    [
        (cupy.RawModule, ["get_function"]),
        (cupy.RawKernel, ["kernel"]),
        (cupy.cuda.Function, ["ptr"]),
        (cupy.cuda.Graph, ["graphExec"]),
        (cupy.cuda.Stream, ["begin_capture", "end_capture"]),
        (cupy.cuda.Stream.null, ["ptr"]),
        (cupy.cuda.Device, ["id", "compute_capability"]),
        (cupy.cuda.MemoryPool, ["free_bytes"]),
        (cupy.cuda.MemoryPointer, ["ptr"]),
        (cupy.ndarray, ["data", "device", "flags", "nbytes", "shape", "__dlpack__", "__cuda_array_interface__"]),
    ],
)
def test_what_the_driver_asks_of_cupys_objects_exists(owner, names):
    assert [n for n in names if not hasattr(owner, n)] == []


def test_kernels_are_modules_with_our_options():
    assert cupy.RawModule(code=KERNEL, options=OPTIONS).options == OPTIONS


def test_the_cache_is_where_the_warning_says(monkeypatch):
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    home = getattr(cupy.cuda.compiler, "_default_cache_dir", None) or cupy.cuda._compiler_cache._default_cache_dir
    assert subject._cache() == home
    assert "CUPY_CACHE_IN_MEMORY" in inspect.getsource(cupy.cuda.compiler._compile_module_with_cache)


def test_the_null_stream_cannot_be_captured():
    with pytest.raises(RuntimeError, match="cannot capture on the default"):
        cupy.cuda.Stream.null.begin_capture(runtime.streamCaptureModeThreadLocal)


def test_the_search_for_the_toolkit_works():
    assert set(subject._missing()) <= {"the CUDA headers", "libnvrtc", "libcublas"}


# ---- without a GPU -------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    """A driver that goes on where selecting the device fails."""
    made = subject.CupyDriver(0)
    monkeypatch.setattr(made, "scope", nullcontext)
    return made


FOUR = np.zeros(4, np.float32)
FAILING = {
    "properties": lambda d: d.properties(),
    "memory": lambda d: d.memory(),
    "empty": lambda d: d.empty((2, 3), "float32"),
    "empty, bfloat16": lambda d: d.empty((2, 3), ml_dtypes.bfloat16),
    "empty, pinned": lambda d: d.empty((2, 3), np.int64, pinned=True),
    "copy": lambda d: d.copy(FOUR, FOUR.copy(), 0),
    "is it pinned": lambda d: d._pinned(FOUR),
    "stream": lambda d: d.stream(),
    "current": lambda d: d.current(),
    "order": lambda d: d.order(1, 2),
    "synchronize": lambda d: d.synchronize(0),
    "wrap": lambda d: d.wrap(SimpleNamespace(__cuda_array_interface__={"data": (64, False)})),
    "scope": lambda d: subject.CupyDriver(0).scope().__enter__(),
    "current_device": lambda d: subject.current_device(),
}


@without_gpu
@pytest.mark.filterwarnings("ignore:Exception ignored in. .*Stream.__del__")  # CuPy's, of a stream half made
@pytest.mark.parametrize("call", FAILING)
def test_calls_fail_for_want_of_a_driver_alone(device, call):
    with pytest.raises(runtime.CUDARuntimeError, match=r"cudaError(InsufficientDriver|NoDevice)"):
        FAILING[call](device)


@without_gpu
def test_kernels_launches_and_products_fail_for_want_of_a_driver_alone(device):
    with pytest.raises(RuntimeError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
        device.function(KERNEL, "f")
    launch = device.launch(SimpleNamespace(ptr=0), (1, 1, 1), (32, 1, 1), [ctypes.c_void_p(0), ctypes.c_longlong(4)])
    with pytest.raises(RuntimeError, match=r"libcuda|nvcuda|CUDA_ERROR"):
        launch(0)
    with pytest.raises(CaptureError, match="only a stream of the driver's own"):
        device.capture(0, lambda: None)
    one = Gemm(False, False, *[1] * 3, *[1, "float32", 1, 1] * 2, 0.0, 1, "float32", 1, 1, 1, "float32")
    with pytest.raises(RuntimeError, match=r"gemm: .* is not loaded|cublasCreate_v2: CUBLAS_STATUS_NOT_INITIALIZED"):
        device.gemm(one)(0)


@without_gpu
def test_cupy_refuses_a_type_before_it_asks_for_a_device(device):
    with pytest.raises(ValueError, match="Unsupported dtype"):  # so bfloat16, above, is supported
        device.empty((2,), object)


def run(code, **environment):
    """(output, errors) of Python in a process of its own, in which every warning is an error."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@without_gpu
def test_auto_is_the_cpu_and_an_explicit_cuda_says_why():
    code = "import gpubackprop as gb\nprint(gb.get_backend('auto').device)\ntry: gb.get_backend('cuda')\n"
    out, _ = run(code + "except RuntimeError as error: print(error)")
    if runtime.driverGetVersion() == 0:
        assert out.startswith("cpu\ndevice 'cuda': there is no NVIDIA driver; install it; nvidia-smi must list the GPU")
    assert out.startswith("cpu\ndevice 'cuda': ") and out.endswith("; use device='cpu' to do without")


def test_importing_the_library_leaves_cupy_alone():
    code = "import sys, gpubackprop as gb\ngb.get_backend('cpu')\nprint([m for m in sys.modules if 'cupy' in m])"
    assert run(code)[0] == "[]"


def test_a_cache_that_cannot_be_made_does_not_stop_the_import(tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "cache")
    code = """
import os, warnings
with warnings.catch_warnings(record=True, action="always") as caught:
    from gpubackprop.backends import cupy
print([str(w.message) for w in caught], os.environ["CUPY_CACHE_IN_MEMORY"], os.environ["CUPY_CACHE_DIR"])
"""
    out, _ = run(code, CUPY_CACHE_DIR=folder)
    assert out.startswith(f"[\"CuPy's kernel cache {folder} cannot be written (Not a directory), so every process")
    assert out.endswith(f'set CUPY_CACHE_DIR to a folder that can be written"] 1 {folder}')
