"""CUDA's two seams without a GPU: what is said where CUDA cannot work, the driver over a CuPy that records, cuBLAS."""

import ctypes
import gc
import inspect
import logging
import os
import re
import sys
import threading
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from gpubackprop import backends
from gpubackprop.backends import INSTALL, cublas, get_backend, why_not_cuda
from gpubackprop.backends.driver import OPTIONS, CaptureError, DeviceMemoryError, Driver, Gemm, Paper

ROOT = Path(__file__).parent.parent


# ---- a CuPy that records -------------------------------------------------------------------------------------------


class CudaError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


class Array:
    """A device array: bytes on the host, and the index of the device they are said to lie on."""

    def __init__(self, shape=(4,), dtype="float32", device=0):
        self.host = np.zeros(shape, dtype)
        self.shape, self.nbytes, self.flags = self.host.shape, self.host.nbytes, self.host.flags
        self.device, self.data = SimpleNamespace(id=device), SimpleNamespace(ptr=self.host.ctypes.data)


class Runtime(ModuleType):
    """cupy.cuda.runtime: its functions note their arguments, unless one is to fail."""

    CUDARuntimeError = CudaError
    memcpyDefault, streamCaptureModeThreadLocal = 4, 1

    def __init__(self, **facts):
        super().__init__("cupy.cuda.runtime")
        self.calls, self.fails, self.device = [], {}, 0
        vars(self).update(facts)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def function(*arguments):
            self.calls.append((name, *arguments))
            if name in self.fails:
                raise self.fails[name]

        return function

    def getDevice(self):
        return self.device

    def setDevice(self, device):
        self.device = device
        self.calls.append(("setDevice", device))


class Stream:
    made = 0

    def __init__(self, runtime, non_blocking=False):
        Stream.made += 1
        self.ptr, self.runtime, self.non_blocking = 0x5000 + Stream.made, runtime, non_blocking

    def begin_capture(self, mode):
        self.runtime.streamBeginCapture(self.ptr, mode)

    def end_capture(self):
        self.runtime.streamEndCapture(self.ptr)
        return SimpleNamespace(graphExec=0x99)


def fake_cupy(
    version="14.2.0", cuda=13020, newest=13000, count=1, capability="90", hip=False, headers="/include", lacks=()
):
    """The parts of a CuPy that the driver uses, as modules by name."""

    def load(library, error):
        if library in lacks:
            raise error
        return ModuleType(library)

    runtime = Runtime(
        is_hip=hip, runtimeGetVersion=lambda: cuda, driverGetVersion=lambda: newest, getDeviceCount=lambda: count,
        memGetInfo=lambda: (1000, 5000),
        getDeviceProperties=lambda i: {"name": b"Fake", "major": 9, "minor": 0, "multiProcessorCount": 132},
    )  # fmt: skip
    cuda_ = ModuleType("cupy.cuda")
    vars(cuda_).update(
        runtime=runtime,
        driver=SimpleNamespace(launchKernel=None),
        is_available=lambda: count > 0,
        Device=lambda index: SimpleNamespace(compute_capability=capability),
        nvrtc=SimpleNamespace(getVersion=lambda: load("nvrtc", RuntimeError("no libnvrtc"))),
        alloc_pinned_memory=lambda nbytes: bytearray(nbytes),
        pinned_memory=SimpleNamespace(is_memory_pinned=lambda address: False),
        device=SimpleNamespace(from_pointer=lambda address: SimpleNamespace(id=1)),
        Stream=lambda **how: Stream(runtime, **how),
        Event=lambda disable_timing: SimpleNamespace(ptr=0xE),
        get_current_stream=lambda index: SimpleNamespace(ptr=7 + index),
    )
    cuda_.__getattr__ = lambda name: load(name, ImportError("no libcublas"))
    cupy = ModuleType("cupy")
    vars(cupy).update(
        __version__=version, cuda=cuda_, ndarray=Array, empty=lambda shape, dtype: Array(shape, dtype),
        get_default_memory_pool=lambda: SimpleNamespace(
            free_bytes=lambda: 234, get_limit=lambda: 0, used_bytes=lambda: 0),
        from_dlpack=lambda array: ("from_dlpack", array), asarray=lambda array: ("asarray", array),
    )  # fmt: skip
    pathfinder = SimpleNamespace(find_nvidia_header_directory=lambda part: headers)
    return {"cupy": cupy, "cupy.cuda": cuda_, "cuda": SimpleNamespace(pathfinder=pathfinder)}


@pytest.fixture
def install(monkeypatch, tmp_path):
    """A function that puts a CuPy, or an error on importing one, in place of what is installed."""
    own, before = "gpubackprop.backends.cupy", vars(backends).get("cupy")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "0")
    monkeypatch.setattr(backends, "_backends", {})

    def into_place(modules):
        for name in (own, *(n for n in sys.modules if n.partition(".")[0] == "cupy")):
            monkeypatch.delitem(sys.modules, name, raising=False)
        vars(backends).pop("cupy", None)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        backends._auto.cache_clear()

    yield into_place
    sys.modules.pop(own, None)
    vars(backends).pop("cupy", None)
    if before is not None:
        backends.cupy = before
    backends._auto.cache_clear()


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A function that puts a CuPy whose import runs this code first on the path."""

    def write(code):
        (tmp_path / "cupy").mkdir()
        (tmp_path / "cupy" / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)

    return write


# ---- where CUDA cannot work ----------------------------------------------------------------------------------------

OTHER_CUDA = 'pip uninstall cupy-cuda13x, then pip install "gpubackprop[cuda12]"'
SITUATIONS = {  # what such a CuPy is like, and what is said
    "too old": (
        {"version": "13.6.0"},
        "CuPy 13.6.0 is too old, 14 is the first that will do; uninstall it, then pip install",
    ),
    "ROCm": ({"hip": True}, "this CuPy is built for ROCm, not for CUDA; uninstall it, then pip install"),
    "no driver": ({"count": 0, "newest": 0}, "there is no NVIDIA driver; install it; nvidia-smi must list the GPU"),
    "driver too old": (
        {"count": 0, "newest": 12040},
        "the NVIDIA driver runs CUDA 12.4, but this CuPy needs 13; update the driver to 580 or newer, or "
        f"{OTHER_CUDA}; use device='cpu'",
    ),
    "driver far too old": (
        {"count": 0, "newest": 11080, "cuda": 12090},
        "the NVIDIA driver runs CUDA 11.8, but this CuPy needs 12; update the driver to 525 or newer; use device='cpu'",
    ),
    "no GPU": (
        {"count": 0},
        "the NVIDIA driver reports no GPU; see what nvidia-smi lists and whether CUDA_VISIBLE_DEVICES hides it",
    ),
    "old GPU": (
        {"capability": "70"},
        f"CUDA 13 has dropped GPUs of compute capability 7.0; {OTHER_CUDA}; use device='cpu'",
    ),
    "no headers": ({"headers": None}, 'CuPy does not find the CUDA headers; pip install "cupy-cuda13x[ctk]"'),
    "no toolkit": (
        {"headers": None, "lacks": ("nvrtc", "cublas"), "cuda": 12090},
        'CuPy does not find the CUDA headers, libnvrtc, libcublas; pip install "cupy-cuda12x[ctk]"',
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_an_explicit_cuda_that_cannot_work_says_why_and_what_to_do(install, situation):
    facts, message = SITUATIONS[situation]
    install(fake_cupy(**facts))
    with pytest.raises(RuntimeError, match=re.escape(f"device 'cuda': {message}")) as error:
        get_backend("cuda")
    assert why_not_cuda() in str(error.value)
    assert str(error.value).endswith("; use device='cpu' to do without")


def test_the_device_index_is_checked(install):
    install(fake_cupy(count=2))
    with pytest.raises(RuntimeError, match="device 'cuda:2': there is no device 2; choose from cuda:0, cuda:1; use"):
        get_backend("cuda:2")
    assert why_not_cuda(2) == "there is no device 2" and why_not_cuda(1) is None


def test_cupy_is_not_installed(install, monkeypatch):
    install({})
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(RuntimeError, match=re.escape(f"device 'cuda:0': CuPy is not installed; {INSTALL}; use")):
        get_backend("cuda:0")


class Absent:
    """A finder for which CuPy does not exist, wherever it may be installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "cupy":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    "code, reason",
    [
        ("import a_part_of_cupy", "No module named 'a_part_of_cupy'"),
        ("raise AttributeError('np.float_ was removed')", "AttributeError: np.float_ was removed"),
        (
            "try: raise OSError('libx.so:\\n not found')\n"
            "except OSError as error: raise ImportError('=' * 60 + ' long advice') from error",
            "OSError: libx.so: not found",
        ),
    ],
)
def test_a_broken_cupy(install, broken, code, reason):
    install({})
    broken(code)
    message = f"device 'cuda': CuPy cannot be imported ({reason}); reinstall it: {INSTALL}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        get_backend("cuda")
    assert why_not_cuda() == f"CuPy cannot be imported ({reason})"


def test_auto_says_once_why_it_is_the_cpu(install, caplog):
    install(fake_cupy(count=0, newest=0))
    with caplog.at_level(logging.INFO, logger="gpubackprop"):
        assert get_backend("auto") is get_backend("auto") is get_backend("cpu")
    assert [r.getMessage() for r in caplog.records] == ["device 'auto' is the CPU: there is no NVIDIA driver"]


def test_every_extra_that_a_message_names_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"gpubackprop\[(\w+)\]", INSTALL)) == {"cuda12", "cuda13"} <= extras.keys()
    for cuda in "12", "13":
        [requirement] = [r for r in extras[f"cuda{cuda}"] if r.startswith("cupy")]
        assert requirement.startswith(f"cupy-cuda{cuda}x[ctk]>=14")


# ---- where it works ------------------------------------------------------------------------------------------------


@pytest.fixture
def chosen(install, monkeypatch):
    """get_backend with backends that are only named after their driver's device."""
    module = ModuleType("gpubackprop.backends.cuda")
    module.CudaBackend = lambda driver: SimpleNamespace(device=driver.device, driver=driver)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    modules = fake_cupy(count=2)
    install(modules)
    return modules["cupy"].cuda.runtime


def test_one_backend_for_each_device(chosen):
    assert get_backend("cuda:1") is get_backend("cuda:01") and get_backend("cuda:1").device == "cuda:1"
    assert get_backend("cuda:0") is not get_backend("cuda:1")
    made = []
    threads = [threading.Thread(target=lambda: made.append(get_backend("cuda:0"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {id(b) for b in made} == {id(get_backend("cuda:0"))} and len(made) == 8


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_cuda_without_a_number_is_the_current_device(chosen, device):
    assert get_backend(device) is get_backend("cuda:0")
    chosen.device = 1
    assert get_backend(device) is get_backend("cuda:1")


def test_a_plan_needs_no_device(install):
    install(fake_cupy(count=0, newest=0))
    backend = get_backend("cuda:plan")
    assert backend.device == "cuda:plan" and backend is get_backend("cuda:plan")


# ---- the driver ----------------------------------------------------------------------------------------------------


@pytest.fixture
def subject(install):
    """(driver of device 0, runtime): the driver over a CuPy that records."""
    modules = fake_cupy()
    install(modules)
    from gpubackprop.backends.cupy import CupyDriver

    return CupyDriver(0), modules["cupy"].cuda.runtime


def work(runtime):
    """What the runtime was asked, without the selections of a device."""
    return [c for c in runtime.calls if c[0] != "setDevice"]


def test_drivers_have_the_fifteen_calls_and_their_arguments(subject):
    driver, _ = subject
    calls = {k: v for k, v in vars(Driver).items() if not k.startswith("_") and callable(v)}
    assert len(calls) == 15
    for kind in type(driver), Paper:
        for name, call in calls.items():
            own = inspect.signature(inspect.unwrap(getattr(kind, name))).parameters.values()
            assert [(p.name, p.default) for p in own] == [
                (p.name, p.default) for p in inspect.signature(call).parameters.values()
            ]


def test_facts(subject):
    driver, _ = subject
    assert driver.device == "cuda:0" and driver.properties().multiprocessors == 132
    assert (driver.properties().name, driver.properties().capability) == ("Fake", "9.0")
    assert driver.memory() == (1234, 5000)  # what the pool holds unused is free
    assert driver.current() == 7


def test_the_scope_selects_the_device_and_gives_back_what_was_current(subject):
    driver, runtime = subject
    runtime.device = 3
    with pytest.raises(KeyError), driver.scope():
        assert runtime.device == 0
        with driver.scope():
            pass
        assert runtime.device == 0
        raise KeyError
    assert runtime.device == 3
    runtime.device = 0
    runtime.calls.clear()
    with driver.scope():
        pass
    assert runtime.calls == [("setDevice", 0)]  # once even where it is current: it gives a thread its context


def test_a_launch_is_packed_once_and_keeps_its_arguments(subject):
    driver, _ = subject
    seen = []

    def launch_kernel(*arguments):
        assert all(type(a) is int for a in arguments) and len(arguments) == 11
        pointers = ctypes.cast(arguments[9], ctypes.POINTER(ctypes.c_void_p))
        kinds = (ctypes.c_void_p, ctypes.c_longlong, ctypes.c_float, Layout)
        values = [ctypes.cast(pointers[i], ctypes.POINTER(k)).contents for i, k in enumerate(kinds)]
        seen.append((arguments[:9], arguments[10], *(v.value for v in values[:3]), values[3].shape[1]))

    class Layout(ctypes.Structure):
        _fields_ = (("dims", ctypes.c_longlong), ("shape", ctypes.c_longlong * 8))

    sys.modules["cupy"].cuda.driver.launchKernel = launch_kernel
    arguments = [ctypes.c_void_p(64), ctypes.c_longlong(-5), ctypes.c_float(2.5), Layout(2, (3, 4))]
    call = driver.launch(SimpleNamespace(ptr=0xF), (1, 2, 3), (256, 1, 1), arguments)
    arguments.clear()
    noise = [ctypes.c_longlong(-1) for _ in range(1000)]  # would lie in the memory of what was not kept
    for stream in range(0x77, 0x79):
        call(stream)
    assert len(noise) == 1000
    expected = 0, 64, -5, 2.5, 4
    assert seen == [((0xF, 1, 2, 3, 256, 1, 1, 0, 0x77), *expected), ((0xF, 1, 2, 3, 256, 1, 1, 0, 0x78), *expected)]
    with pytest.raises(TypeError):
        driver.launch(SimpleNamespace(ptr=0xF), (1, 1, 1), (1, 1, 1), [5])  # not a ctypes value


def test_buffers(subject):
    driver, _ = subject
    buffer = driver.empty((2, 3), "float32")
    assert isinstance(buffer, Array) and driver.address(buffer) == buffer.data.ptr
    pinned = driver.empty([2, 3], np.int64, pinned=True)
    assert type(pinned) is np.ndarray and pinned.shape == (2, 3) and pinned.dtype == np.int64
    assert driver.address(pinned) == pinned.ctypes.data
    assert driver.empty((0, 3), np.int64, pinned=True).shape == (0, 3)


@pytest.mark.parametrize("error", [MemoryError("Out of memory allocating 96 bytes"), CudaError(2)])
def test_exhausted_memory(subject, error):
    driver, _ = subject

    def fail(*arguments):
        raise error

    sys.modules["cupy"].empty = sys.modules["cupy"].cuda.alloc_pinned_memory = fail
    with pytest.raises(DeviceMemoryError, match="96 bytes do not fit into 1,234 free of 5,000") as caught:
        driver.empty((3, 4), "float64")
    assert (caught.value.nbytes, caught.value.free, caught.value.total) == (96, 1234, 5000)
    with pytest.raises(MemoryError, match="page-locked host memory: there are no 96 bytes of it"):
        driver.empty((3, 4), "float64", pinned=True)


def test_other_errors_of_an_allocation_stay_what_they_are(subject):
    driver, _ = subject

    def fail(*arguments):
        raise CudaError(700)

    sys.modules["cupy"].empty = fail
    with pytest.raises(CudaError, match="700"):
        driver.empty((3, 4), "float64")


def interface(address):
    return SimpleNamespace(__cuda_array_interface__={"data": (address, False)})


def dlpack(kind, index):
    return SimpleNamespace(__dlpack_device__=lambda: (kind, index))


def test_arrays_of_this_device_are_wrapped(subject):
    driver, _ = subject
    own, tensor, managed, empty = Array(), dlpack(2, 0), dlpack(13, 0), interface(0)
    assert driver.wrap(own) is own
    assert driver.wrap(tensor) == ("from_dlpack", tensor) and driver.wrap(managed) == ("from_dlpack", managed)
    assert driver.wrap(empty) == ("asarray", empty)


@pytest.mark.parametrize(
    "array, home",
    [(Array(device=1), "cuda:1"), (dlpack(2, 3), "cuda:3"), (dlpack(1, 0), "cpu"), (np.zeros(2), "cpu"),
     (interface(64), "cuda:1")],
)  # fmt: skip
def test_arrays_of_another_device_are_refused(subject, array, home):
    driver, _ = subject
    with pytest.raises(ValueError, match=f"the array lies on '{home}' but 'cuda:0' is in use; copy it there"):
        driver.wrap(array)


def test_what_is_no_array_is_not_wrapped(subject):
    driver, _ = subject
    with pytest.raises(TypeError, match="list offers neither DLPack nor __cuda_array_interface__"):
        driver.wrap([1.0])


def test_copies_wait_for_pageable_memory_alone(subject):
    driver, runtime = subject
    a, b, host = Array(), Array(), np.zeros(4, np.float32)
    memory = sys.modules["cupy"].cuda.pinned_memory
    copied = "memcpyAsync", driver.address(b), driver.address(a), 16, 4, 0x77
    driver.copy(a, b, 0x77)
    assert work(runtime) == [copied]
    for source, destination in ((a, host), (host, a)):
        for pinned in False, True:
            memory.is_memory_pinned = lambda address, pinned=pinned: pinned
            runtime.calls.clear()
            driver.copy(source, destination, 0x77)
            assert [c[0] for c in work(runtime)] == ["memcpyAsync", "streamSynchronize"][: 2 - pinned]


def test_copies_take_equal_contiguous_bytes(subject):
    driver, runtime = subject
    with pytest.raises(ValueError, match="expected equal bytes, contiguous"):
        driver.copy(Array((4,)), Array((5,)), 0)
    with pytest.raises(ValueError, match="expected equal bytes, contiguous"):
        driver.copy(np.zeros((4, 2), np.float32)[:, 0], Array((4,)), 0)
    driver.copy(Array((0,)), Array((0, 3)), 0)
    assert work(runtime) == []


def test_streams_and_their_order(subject):
    driver, runtime = subject
    stream, other = driver.stream(), driver.stream()
    assert stream != other and driver._streams[stream].non_blocking
    driver.order(stream, stream)
    assert work(runtime) == []
    driver.order(stream, 0)
    driver.synchronize(other)
    assert work(runtime) == [("eventRecord", 0xE, stream), ("streamWaitEvent", 0, 0xE), ("streamSynchronize", other)]


# ---- kernels and their cache ---------------------------------------------------------------------------------------


class Module:
    """cupy.RawModule, which finds its cache unwritable until it is told to compile in memory."""

    def __init__(self, *, code, options):
        assert (code, options) == ("source", OPTIONS)

    def get_function(self, name):
        if os.environ["CUPY_CACHE_IN_MEMORY"] != "1":
            raise PermissionError(13, "Permission denied", "/cache/tmp")
        return SimpleNamespace(kernel=f"the kernel {name}")


def test_a_cache_that_cannot_be_written_does_not_stop_work(subject, tmp_path):
    driver, _ = subject
    sys.modules["cupy"].RawModule = Module
    message = (
        f"CuPy's kernel cache {tmp_path / 'cache'} cannot be written (Permission denied), so every process compiles "
        "its kernels anew; set CUPY_CACHE_DIR to a folder that can be written"
    )
    with pytest.warns(RuntimeWarning, match=re.escape(message)) as warned:
        assert driver.function("source", "relu") == "the kernel relu"
    assert len(warned) == 1
    assert driver.function("source", "gelu") == "the kernel gelu"  # and no second warning, which would be an error


def test_a_cache_that_cannot_be_made_does_not_stop_the_import(install, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", folder := str(tmp_path / "file" / "cache"))
    install(fake_cupy())
    with pytest.warns(RuntimeWarning, match=f"CuPy's kernel cache {folder} cannot be written"):
        assert why_not_cuda() is None
    assert os.environ["CUPY_CACHE_IN_MEMORY"] == "1" and os.environ["CUPY_CACHE_DIR"] == folder


# ---- graphs --------------------------------------------------------------------------------------------------------


def test_a_capture_becomes_one_launch(subject):
    driver, runtime = subject
    stream = driver.stream()
    collecting = []
    replay = driver.capture(stream, lambda: collecting.append(gc.isenabled()))
    assert work(runtime) == [("streamBeginCapture", stream, 1), ("streamEndCapture", stream)]
    assert collecting == [False] and gc.isenabled()
    runtime.calls.clear()
    replay(0x77)
    assert work(runtime) == [("graphLaunch", 0x99, 0x77)]


@pytest.mark.parametrize("error", [ValueError("a step went wrong"), CudaError(900)])
def test_an_error_in_a_capture_ends_it(subject, error):
    driver, runtime = subject
    stream = driver.stream()
    runtime.fails = {"streamEndCapture": CudaError(901)} if isinstance(error, CudaError) else {}  # invalidated

    def body():
        raise error

    with pytest.raises(CaptureError, match=f"{type(error).__name__}: {error}") as caught:
        driver.capture(stream, body)
    assert caught.value.__cause__ is error
    assert work(runtime)[-1] == ("streamEndCapture", stream) and gc.isenabled()


@pytest.mark.parametrize("call", ["streamBeginCapture", "streamEndCapture"])
def test_a_capture_that_cuda_refuses(subject, call):
    driver, runtime = subject
    stream = driver.stream()
    runtime.fails = {call: CudaError(901)}
    with pytest.raises(CaptureError, match="CudaError: status 901"):
        driver.capture(stream, lambda: None)
    assert work(runtime)[-1][0] == call and gc.isenabled()


def test_interrupting_a_capture_ends_it_and_stays_an_interrupt(subject):
    driver, runtime = subject

    def body():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver.capture(driver.stream(), body)
    assert work(runtime)[-1][0] == "streamEndCapture"


def test_only_own_streams_are_captured(subject):
    driver, runtime = subject
    for stream in 0, 1, 2, 0x1234:
        with pytest.raises(CaptureError, match="only a stream of the driver's own can be captured, the null stream"):
            driver.capture(stream, lambda: None)
    assert work(runtime) == []


# ---- cuBLAS --------------------------------------------------------------------------------------------------------

# "cuBLAS", NVIDIA's reference: chapters 2.4 and 2.8
DECLARATIONS = """
cublasStatus_t cublasCreate_v2(cublasHandle_t* handle);
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle);
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t streamId);
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t workspaceSizeInBytes);
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode);
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
    int m, int n, int k, const void* alpha, const void* A, cudaDataType Atype, int lda,
    const void* B, cudaDataType Btype, int ldb, const void* beta, void* C, cudaDataType Ctype, int ldc,
    cublasComputeType_t computeType, cublasGemmAlgo_t algo);
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
    int m, int n, int k, const void* alpha, const void* A, cudaDataType Atype, int lda, long long int strideA,
    const void* B, cudaDataType Btype, int ldb, long long int strideB, const void* beta, void* C, cudaDataType Ctype,
    int ldc, long long int strideC, int batchCount, cublasComputeType_t computeType, cublasGemmAlgo_t algo);
"""
C_TYPES = {
    "int": ctypes.c_int, "size_t": ctypes.c_size_t, "long long int": ctypes.c_longlong,
    "void*": ctypes.c_void_p, "const void*": ctypes.c_void_p, "cudaStream_t": ctypes.c_void_p,
    "cublasHandle_t": ctypes.c_void_p, "cublasHandle_t*": ctypes.POINTER(ctypes.c_void_p),
    "cublasOperation_t": ctypes.c_int, "cudaDataType": ctypes.c_int, "cublasComputeType_t": ctypes.c_int,
    "cublasGemmAlgo_t": ctypes.c_int, "cublasMath_t": ctypes.c_int,
}  # fmt: skip
DTYPES = {0: np.float32, 1: np.float64, 2: np.float16}


def test_enumerations_have_the_documented_values():
    assert cublas.TYPES == {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # library_types.h
    assert (cublas.DEFAULT_ALGORITHM, cublas.SUM_IN_COMPUTE_TYPE) == (-1, 16)  # cublas_api.h
    assert {k: number for k, (number, _) in cublas.COMPUTE.items()} == {"float32": 68, "tf32": 77, "float64": 70}
    assert all({kind, out} <= cublas.TYPES.keys() and c in cublas.COMPUTE for kind, out, c in cublas.SUPPORTED)


def test_every_symbol_has_the_documented_types():
    declared = {
        name: [C_TYPES[" ".join(part.split()).rpartition(" ")[0]] for part in parameters.split(",")]
        for name, parameters in re.findall(r"cublasStatus_t (\w+)\(([^)]*)\)", DECLARATIONS)
    }
    assert declared == cublas.PROTOTYPES


class Library:
    """cuBLAS's functions as ctypes functions over Python ones, with the declared types; products are computed."""

    def __init__(self):
        self.calls, self.fails, self.handles = [], {}, 0
        for name, types in cublas.PROTOTYPES.items():
            made = ctypes.CFUNCTYPE(ctypes.c_int, *types)(lambda *a, name=name: self.called(name, *a))
            setattr(self, name, made)

    def called(self, name, *arguments):
        self.calls.append((name, *arguments) if name != "cublasCreate_v2" else (name,))
        if name == "cublasCreate_v2":
            self.handles += 1
            arguments[0][0] = 0x1000 * self.handles
        if name in ("cublasGemmEx", "cublasGemmStridedBatchedEx") and name not in self.fails:
            self.multiply(*arguments[1:])
        return self.fails.get(name, 0)

    def multiply(self, op_a, op_b, m, n, k, alpha, *rest):
        """C = alpha op(A) op(B) + beta C, read as cuBLAS's documentation says."""
        batched = len(rest) > 12
        (a, a_type, lda, *sa), rest = rest[: 3 + batched], rest[3 + batched :]
        (b, b_type, ldb, *sb), rest = rest[: 3 + batched], rest[3 + batched :]
        (beta, *rest) = rest
        (c, c_type, ldc, *sc), rest = rest[: 3 + batched], rest[3 + batched :]
        count, compute, algorithm = rest if batched else (1, *rest)
        assert algorithm == -1 and compute in (68, 77, 70)
        scalar = ctypes.c_double if compute == 70 else ctypes.c_float
        alpha, beta = (ctypes.cast(p, ctypes.POINTER(scalar))[0] for p in (alpha, beta))
        for i in range(count):
            x = column_major(a, DTYPES[a_type], (k, m) if op_a else (m, k), lda, i * sum(sa))
            y = column_major(b, DTYPES[b_type], (n, k) if op_b else (k, n), ldb, i * sum(sb))
            z = column_major(c, DTYPES[c_type], (m, n), ldc, i * sum(sc))
            product = (x.T if op_a else x).astype(np.float64) @ (y.T if op_b else y)
            z[...] = alpha * product + (beta * z if beta else 0)


def column_major(address, dtype, shape, leading, offset):
    """The matrix at an address as cuBLAS sees it."""
    itemsize = np.dtype(dtype).itemsize
    assert leading >= shape[0]
    memory = (ctypes.c_char * (leading * shape[1] * itemsize)).from_address(address + offset * itemsize)
    return np.ndarray(shape, dtype, memory, strides=(itemsize, leading * itemsize))


class Bench(Paper):
    """A device that notes what is allocated on it."""

    def __init__(self):
        self.allocated = []

    def scope(self):
        return nullcontext()

    def empty(self, shape, dtype, *, pinned=False):
        self.allocated.append((shape, np.dtype(dtype)))
        return np.zeros(shape, dtype)


@pytest.fixture
def blas():
    return cublas.Cublas(Library(), Bench())


def product(a, b, c, *, beta=0.0, ta=False, tb=False, compute="float32", batch=1):
    """The arguments for row-major c = op(a) @ op(b) + beta c, which is column-major cᵀ = op(b)ᵀ op(a)ᵀ."""
    (m, n), k = c.shape[-2:], a.shape[-2 if ta else -1]
    kinds = [x.dtype.name for x in (b, a, c)]
    strides = [x.strides[0] // x.itemsize if x.ndim == 3 else 0 for x in (b, a, c)]
    (pb, pa, pc), (lb, la, lc) = (x.ctypes.data for x in (b, a, c)), (x.shape[-1] for x in (b, a, c))
    return Gemm(
        tb, ta, n, m, k, pb, kinds[0], lb, strides[0], pa, kinds[1], la, strides[1], beta, pc, kinds[2], lc,
        strides[2], batch, compute,
    )  # fmt: skip


@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "kind, out, compute",
    [("float32", "float32", "float32"), ("float32", "float32", "tf32"), ("float64", "float64", "float64"),
     ("float16", "float16", "float32"), ("float16", "float32", "float32")],
)  # fmt: skip
def test_products(blas, rng, ta, tb, batch, kind, out, compute):
    stack = () if batch == 1 else (batch,)
    a = rng.integers(-4, 5, (*stack, *((5, 3) if ta else (3, 5)))).astype(kind)
    b = rng.integers(-4, 5, (*stack, *((2, 5) if tb else (5, 2)))).astype(kind)
    c, d = np.full((*stack, 3, 2), np.nan, out), np.ones((*stack, 3, 2), out)
    expected = (np.swapaxes(a, -1, -2) if ta else a) @ (np.swapaxes(b, -1, -2) if tb else b)
    blas.bind(product(a, b, c, ta=ta, tb=tb, compute=compute, batch=batch))(0)
    blas.bind(product(a, b, d, ta=ta, tb=tb, compute=compute, batch=batch, beta=0.5))(0)
    np.testing.assert_array_equal(c, expected)  # beta = 0 overwrites, whatever lay there
    np.testing.assert_array_equal(d, expected + 0.5)
    assert blas.library.calls[-1][0] == ("cublasGemmEx" if batch == 1 else "cublasGemmStridedBatchedEx")


def test_an_operand_may_serve_the_whole_batch(blas, rng):
    a, b, c = rng.normal(size=(3, 4)), rng.normal(size=(2, 4, 5)), np.empty((2, 3, 5))
    blas.bind(product(a, b, c, compute="float64", batch=2))(0)
    np.testing.assert_allclose(c, a @ b, rtol=1e-15)


def test_scratch_is_set_after_the_stream_and_only_when_that_changes(blas):
    a = np.ones((2, 2), np.float32)
    call = blas.bind(product(a, a, np.empty_like(a)))
    assert blas.library.calls == blas.driver.allocated == []  # binding touches no device
    for stream in 7, 7, 8, 7:
        call(stream)
    names = [c[0].removeprefix("cublas").removesuffix("_v2") for c in blas.library.calls]
    to = ["SetStream", "SetWorkspace", "GemmEx"]
    assert names == ["Create", "SetMathMode", *to, "GemmEx", *to, *to]
    assert [c[2] for c in blas.library.calls if c[0] == "cublasSetStream_v2"] == [7, 8, 7]
    scratch = [c[2:] for c in blas.library.calls if c[0] == "cublasSetWorkspace_v2"]
    assert scratch[0] == scratch[2] != scratch[1] and {s[1] for s in scratch} == {32 << 20}  # one for each stream
    assert blas.driver.allocated == [((32 << 20,), np.uint8)] * 2
    assert {c[1] for c in blas.library.calls[1:]} == {0x1000}


def test_each_thread_has_a_handle_which_ends_with_it(blas):
    a = np.ones((2, 2), np.float32)
    call = blas.bind(product(a, a, np.empty_like(a)))
    call(7)
    thread = threading.Thread(target=call, args=(7,))
    thread.start()
    thread.join()
    call(7)
    used = [c[1] for c in blas.library.calls if c[0] == "cublasGemmEx"]
    assert used == [0x1000, 0x2000, 0x1000]
    gc.collect()
    assert [c[1] for c in blas.library.calls if c[0] == "cublasDestroy_v2"] == [0x2000]
    assert len(blas.driver.allocated) == 2


def test_a_capture_finds_handle_and_scratch_ready(subject, monkeypatch):
    driver, runtime = subject
    library = Library()
    monkeypatch.setattr(cublas, "loaded", lambda major: library if major == 13 else None)
    a = np.ones((2, 2), np.float32)
    c, stream = np.empty_like(a), driver.stream()
    driver.gemm(product(a, a, c))
    for name in cublas.PROTOTYPES:
        monkeypatch.setattr(library, name, noting(runtime.calls, name, getattr(library, name)))
    call = driver.gemm(product(a, a, c))
    driver.capture(stream, lambda: call(stream))
    assert [c[0] for c in work(runtime)] == [
        "cublasCreate_v2", "cublasSetMathMode", "cublasSetStream_v2", "cublasSetWorkspace_v2",
        "streamBeginCapture", "cublasGemmEx", "streamEndCapture",
    ]  # fmt: skip
    assert (c == 2).all()


def noting(order, name, function):
    """The function, which also notes its name."""
    return lambda *arguments: order.append((name,)) or function(*arguments)


@pytest.mark.parametrize("name", ["cublasCreate_v2", "cublasSetMathMode", "cublasSetStream_v2", "cublasSetWorkspace_v2",
                                  "cublasGemmEx"])  # fmt: skip
def test_a_status_is_an_error_that_names_both(blas, name):
    a = np.ones((2, 2), np.float32)
    call = blas.bind(product(a, a, np.empty_like(a)))
    blas.library.fails[name] = 13
    for _ in range(2):  # and nothing is taken for done
        with pytest.raises(RuntimeError, match=rf"^{name}: CUBLAS_STATUS_EXECUTION_FAILED \(13\)$"):
            call(7)
    blas.library.fails[name] = 99
    with pytest.raises(RuntimeError, match=rf"^{name}: CUBLAS_STATUS_UNKNOWN \(99\)$"):
        call(7)


def test_products_that_cublas_lacks_are_refused_when_bound(blas):
    single, double = np.ones((2, 2), np.float32), np.ones((2, 2))
    with pytest.raises(ValueError, match="gemm: cuBLAS has no float64 × float32 -> float32 computed in float32"):
        blas.bind(product(single, double, single))
    with pytest.raises(ValueError, match="gemm: cuBLAS has no float64 × float64 -> float64 computed in tf32"):
        blas.bind(product(double, double, double, compute="tf32"))
    large = Gemm(**{**vars(product(single, single, single)), "ldc": 1 << 31})
    with pytest.raises(ValueError, match=r"gemm: a size of 2,147,483,648 does not fit cuBLAS's 32-bit integers"):
        blas.bind(large)


def test_a_library_that_is_not_loaded_is_an_error():
    with pytest.raises(RuntimeError, match=r"gemm: libcublas.so.99 is not loaded|gemm: cublas64_99.dll is not loaded"):
        cublas.loaded(99)


# ---- on a GPU ------------------------------------------------------------------------------------------------------

SCALE = """extern "C" __global__ void scale(float* y, const float* x, float a, long long n) {
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) y[i] = a * x[i];
}"""


@pytest.fixture
def gpu():
    """The driver of the first GPU."""
    from gpubackprop.backends.cupy import CupyDriver

    return CupyDriver(0)


def scaled(driver, y, x, a):
    """The launch y = a x."""
    arguments = [ctypes.c_void_p(driver.address(y)), ctypes.c_void_p(driver.address(x)), ctypes.c_float(a)]
    return driver.launch(
        driver.function(SCALE, "scale"), (3, 1, 1), (256, 1, 1), [*arguments, ctypes.c_longlong(x.size)]
    )


def device_product(driver, a, b, c, beta=0.0):
    """The arguments for row-major c = a @ b + beta c in float32."""
    (m, n), k = c.shape, b.shape[0]
    pb, pa, pc = map(driver.address, (b, a, c))
    kind = "float32"
    return Gemm(False, False, n, m, k, pb, kind, n, 0, pa, kind, k, 0, beta, pc, kind, n, 0, 1, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_gpu_copies_launches_and_order(gpu, elsewhere, pinned):
    host, back = gpu.empty((10_000,), "float32", pinned=pinned), gpu.empty((10_000,), "float32", pinned=pinned)
    x, y, first, second = gpu.empty((10_000,), "float32"), gpu.empty((10_000,), "float32"), gpu.stream(), gpu.stream()
    host[:] = np.arange(10_000)
    call = scaled(gpu, y, x, 0.5)

    def work():
        with gpu.scope():
            gpu.copy(host, x, first)
            call(first)
            gpu.order(first, second)
            gpu.copy(y, back, second)
            gpu.synchronize(second)

    thread = threading.Thread(target=work)  # one that has not used CUDA
    if elsewhere:
        thread.start()
        thread.join()
    else:
        work()
    np.testing.assert_array_equal(back, host / 2)


@pytest.mark.gpu
def test_gpu_products_equal_cupys_dot(gpu, rng):
    a, b = (gpu.xp.asarray(rng.normal(size=shape), "float32") for shape in ((70, 50), (50, 30)))
    c, stream = gpu.xp.ones((70, 30), "float32"), gpu.current()
    with gpu.scope():
        gpu.gemm(device_product(gpu, a, b, c, beta=1.0))(stream)
    np.testing.assert_allclose(gpu.xp.asnumpy(c), gpu.xp.asnumpy(a.dot(b)) + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_gpu_graphs_replay_launches_and_products(gpu, rng):
    a, b = (gpu.xp.asarray(rng.normal(size=(64, 64)), "float32") for _ in range(2))
    half, c, stream = gpu.xp.empty_like(a), gpu.xp.empty_like(a), gpu.stream()
    calls = [scaled(gpu, half, a, 0.5), gpu.gemm(device_product(gpu, half, b, c))]

    def step():
        for call in calls:
            call(stream)

    gpu.order(gpu.current(), stream)
    with gpu.scope():
        step()
        gpu.synchronize(stream)
        eager = gpu.xp.asnumpy(c)
        with pytest.raises(CaptureError):
            gpu.capture(stream, lambda: gpu.synchronize(stream))
        graph = gpu.capture(stream, step)  # a capture that failed leaves the stream as it was
        c.fill(0)
        gpu.order(gpu.current(), stream)
        graph(stream)
        gpu.synchronize(stream)
    np.testing.assert_array_equal(gpu.xp.asnumpy(c), eager)


@pytest.mark.gpu
def test_gpu_memory(gpu):
    free, total = gpu.memory()
    assert 0 < free <= total
    with pytest.raises(DeviceMemoryError, match=f"{1 << 50:,} bytes do not fit into") as error:
        gpu.empty((1 << 50,), "uint8")
    assert 0 < error.value.free <= error.value.total == total


@pytest.mark.gpu
def test_gpu_arrays_of_other_libraries_are_views(gpu):
    array = gpu.xp.arange(6, dtype="float32").reshape(2, 3)
    foreign = [SimpleNamespace(__cuda_array_interface__=array.__cuda_array_interface__, keep=array),
               SimpleNamespace(__dlpack__=array.__dlpack__, __dlpack_device__=array.__dlpack_device__)]  # fmt: skip
    for view in map(gpu.wrap, [array, *foreign]):
        assert gpu.address(view) == gpu.address(array) and view.shape == (2, 3)
    with pytest.raises(ValueError, match="the array lies on 'cpu' but 'cuda:0' is in use"):
        gpu.wrap(np.zeros(2))


@pytest.mark.gpu
def test_gpu_buffers_of_bfloat16(gpu):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    host, back = np.arange(8).astype(bfloat16), np.empty(8, bfloat16)
    buffer = gpu.empty((8,), bfloat16)
    gpu.copy(host, buffer, gpu.current())
    gpu.copy(buffer, back, gpu.current())
    np.testing.assert_array_equal(back, host)
