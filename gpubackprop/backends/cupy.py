"""The CUDA driver on CuPy 14 or newer: all that this library asks of CuPy, which no other module imports."""

import ctypes
import gc
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import INSTALL, cublas
from gpubackprop.backends.driver import OPTIONS, Buffer, Call, CaptureError, DeviceMemoryError, Gemm, Properties, Stream

__all__ = ["CupyDriver", "current_device", "obstacle"]


# ---- the kernel cache ----------------------------------------------------------------------------------------------


def _cache() -> str:
    return os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))


def _compile_in_memory(error: OSError) -> None:
    """Tell CuPy to leave its cache folder alone, which it would otherwise stop at (it asks before each compilation)."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY") != "1":
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
        warnings.warn(
            f"CuPy's kernel cache {_cache()} cannot be written ({error.strerror or error}), so every process compiles "
            "its kernels anew; set CUPY_CACHE_DIR to a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )


@contextmanager
def _cache_folder() -> Iterator[None]:
    """Inside, CuPy can be imported: from 14.1 on that makes the cache folder and fails where it cannot be made."""
    before = os.environ.get("CUPY_CACHE_DIR")
    try:
        os.makedirs(_cache(), exist_ok=True)
    except OSError as error:
        _compile_in_memory(error)
        os.environ["CUPY_CACHE_DIR"] = tempfile.gettempdir()  # exists; nothing is written there
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUPY_CACHE_DIR"] = before
        else:
            os.environ.pop("CUPY_CACHE_DIR", None)


with _cache_folder():
    import cupy
    from cupy.cuda import driver, runtime


# ---- whether it works ----------------------------------------------------------------------------------------------

FIRST_DRIVER = {12: 525, 13: 580}  # the first NVIDIA driver of each CUDA version


def current_device() -> int:
    """The index of the caller's current device."""
    index: int = runtime.getDevice()
    return index


def obstacle(index: int) -> tuple[str, str] | None:
    """Why this CuPy cannot use the device, as a phrase, and what to do about it; None if it can."""
    if int(cupy.__version__.partition(".")[0]) < 14:
        return f"CuPy {cupy.__version__} is too old, 14 is the first that will do", f"uninstall it, then {INSTALL}"
    if runtime.is_hip:
        return "this CuPy is built for ROCm, not for CUDA", f"uninstall it, then {INSTALL}"
    cuda = runtime.runtimeGetVersion() // 1000
    if not cupy.cuda.is_available():
        return _no_device(cuda)
    if index >= (count := runtime.getDeviceCount()):
        return f"there is no device {index}", f"choose from {', '.join(f'cuda:{i}' for i in range(count))}"
    capability = cupy.cuda.Device(index).compute_capability  # "75"
    if cuda >= 13 and int(capability) < 75:
        reason = f"CUDA {cuda} has dropped GPUs of compute capability {capability[:-1]}.{capability[-1]}"
        return reason, _instead_of(cuda, 12)
    if missing := _missing():
        return f"CuPy does not find {', '.join(missing)}", f'pip install "cupy-cuda{cuda}x[ctk]"'
    return None


def _no_device(cuda: int) -> tuple[str, str]:
    newest = runtime.driverGetVersion()  # that the driver can run, such as 12040; 0 without a driver
    if newest == 0:
        return "there is no NVIDIA driver", "install it; nvidia-smi must list the GPU (a container needs --gpus all)"
    if (found := newest // 1000) < cuda:
        reason = f"the NVIDIA driver runs CUDA {found}.{newest % 1000 // 10}, but this CuPy needs {cuda}"
        newer = f" to {FIRST_DRIVER[cuda]} or newer" if cuda in FIRST_DRIVER else ""
        older = f", or {_instead_of(cuda, found)}" if found in FIRST_DRIVER else ""
        return reason, f"update the driver{newer}{older}"
    return "the NVIDIA driver reports no GPU", "see what nvidia-smi lists and whether CUDA_VISIBLE_DEVICES hides it"


def _instead_of(cuda: int, other: int) -> str:
    return f'pip uninstall cupy-cuda{cuda}x, then pip install "gpubackprop[cuda{other}]"'


def _missing() -> list[str]:
    """The parts of the CUDA toolkit that CuPy does not find; its wheels bring none of it without [ctk]."""
    from cuda import pathfinder  # comes with CuPy, which searches by it too

    missing = [] if pathfinder.find_nvidia_header_directory("cudart") else ["the CUDA headers"]
    libraries: dict[str, Callable[[], object]] = {
        "libnvrtc": lambda: cupy.cuda.nvrtc.getVersion(),
        "libcublas": lambda: cupy.cuda.cublas,  # a module that is imported, and the library with it, when asked for
    }
    for library, load in libraries.items():
        try:
            load()
        except (ImportError, RuntimeError):
            missing.append(library)
    return missing


# ---- the driver ----------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
DLPACK_CUDA, DLPACK_MANAGED = 2, 13  # kDLCUDA, kDLCUDAManaged


class CupyDriver:
    """One device through CuPy; see Driver. It works whichever device is current, from any thread.

    Memory comes from CuPy's pool, in the share of the caller's current stream: a buffer that another stream uses must
    live until that stream has been ordered before the current one.
    """

    xp: Any = cupy

    def __init__(self, index: int) -> None:
        self.index = index
        self.device = f"cuda:{index}"
        self._streams: dict[Stream, Any] = {}  # our own, kept alive
        self._cublas: cublas.Cublas | None = None

    # ---- facts

    def properties(self) -> Properties:
        """Name, compute capability and multiprocessors; see Driver."""
        found = runtime.getDeviceProperties(self.index)
        return Properties(found["name"].decode(), f"{found['major']}.{found['minor']}", found["multiProcessorCount"])

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; see Driver."""
        with self.scope():
            (free, total), pool = runtime.memGetInfo(), cupy.get_default_memory_pool()
            free += pool.free_bytes()
            if limit := pool.get_limit():  # 0: none
                free = min(free, limit - pool.used_bytes())
            return free, total

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Inside, this device is the current one; see Driver."""
        before = runtime.getDevice()
        runtime.setDevice(self.index)  # in any case: this gives a new thread the context that launches need
        try:
            yield
        finally:
            if before != self.index:
                runtime.setDevice(before)

    # ---- memory

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, *, pinned: bool = False) -> Buffer:
        """An uninitialised buffer; see Driver. bfloat16 is that of ml_dtypes, which CuPy takes with NumPy 2.1.2."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        with self.scope():
            try:
                if not pinned:
                    return cupy.empty(tuple(shape), dtype)
                memory = cupy.cuda.alloc_pinned_memory(nbytes) if nbytes else None
                return np.ndarray(tuple(shape), dtype, memory)
            except (MemoryError, runtime.CUDARuntimeError) as error:
                if getattr(error, "status", OUT_OF_MEMORY) != OUT_OF_MEMORY:
                    raise
                if pinned:
                    raise MemoryError(f"page-locked host memory: there are no {nbytes:,} bytes of it") from error
                raise DeviceMemoryError(nbytes, *self.memory()) from error

    def wrap(self, array: Any) -> Buffer:
        """A view, without a copy, of another library's array on this device; see Driver.

        DLPack has the producer's stream wait on the device; __cuda_array_interface__ has CuPy wait for it here.
        """
        if (home := self._home(array)) != self.device:
            raise ValueError(f"the array lies on {home!r} but {self.device!r} is in use; copy it there")
        if isinstance(array, cupy.ndarray):
            return array
        with self.scope():
            return cupy.from_dlpack(array) if hasattr(array, "__dlpack_device__") else cupy.asarray(array)

    def _home(self, array: Any) -> str:
        if isinstance(array, cupy.ndarray):
            return f"cuda:{array.device.id}"
        if hasattr(array, "__dlpack_device__"):
            kind, index = array.__dlpack_device__()
            return f"cuda:{index}" if kind in (DLPACK_CUDA, DLPACK_MANAGED) else "cpu"
        if hasattr(array, "__cuda_array_interface__"):
            address, _ = array.__cuda_array_interface__["data"]
            return f"cuda:{cupy.cuda.device.from_pointer(address).id}" if address else self.device
        raise TypeError(f"{type(array).__name__} offers neither DLPack nor __cuda_array_interface__")

    def address(self, buffer: Buffer) -> int:
        """Where the buffer's first element lies; see Driver."""
        address: int = buffer.ctypes.data if isinstance(buffer, np.ndarray) else buffer.data.ptr
        return address

    def copy(self, source: Buffer, destination: Buffer, stream: Stream) -> None:
        """Copy between contiguous buffers on either side; see Driver."""
        if source.nbytes != destination.nbytes or not (source.flags.c_contiguous and destination.flags.c_contiguous):
            raise ValueError(f"copy: {source.shape} into {destination.shape}: expected equal bytes, contiguous")
        if source.nbytes == 0:
            return
        with self.scope():
            runtime.memcpyAsync(
                self.address(destination), self.address(source), source.nbytes, runtime.memcpyDefault, stream
            )
            if any(isinstance(b, np.ndarray) and not self._pinned(b) for b in (source, destination)):
                runtime.streamSynchronize(stream)  # where the device reads pageable memory, CUDA may not have waited

    def _pinned(self, array: npt.NDArray[Any]) -> bool:
        return bool(cupy.cuda.pinned_memory.is_memory_pinned(array.ctypes.data))

    # ---- work

    def function(self, source: str, name: str) -> Any:
        """The kernel of that name; see Driver. CuPy compiles a source once per process and device."""
        module = cupy.RawModule(code=source, options=OPTIONS)
        with self.scope():
            try:
                return module.get_function(name).kernel
            except OSError as error:  # CuPy's cache folder cannot be written
                _compile_in_memory(error)
                return module.get_function(name).kernel

    def launch(
        self, function: Any, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Sequence[Any]
    ) -> Call:
        """The launch bound to its arguments; see Driver."""
        values = tuple(arguments)
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        launch, kernel, packed = driver.launchKernel, function.ptr, ctypes.addressof(pointers)
        (x, y, z), (i, j, k) = grid, block

        def run(stream: Stream, kept: object = (function, values, pointers)) -> None:
            launch(kernel, x, y, z, i, j, k, 0, stream, packed, 0)

        return run

    def gemm(self, arguments: Gemm) -> Call:
        """The matrix product bound to its arguments; see Driver."""
        if self._cublas is None:
            self._cublas = cublas.Cublas(cublas.loaded(runtime.runtimeGetVersion() // 1000), self)
        return self._cublas.bind(arguments)

    # ---- order

    def stream(self) -> Stream:
        """A new non-blocking stream; see Driver."""
        with self.scope():
            made = cupy.cuda.Stream(non_blocking=True)
        self._streams[made.ptr] = made
        handle: Stream = made.ptr
        return handle

    def current(self) -> Stream:
        """CuPy's current stream on this device; see Driver."""
        handle: Stream = cupy.cuda.get_current_stream(self.index).ptr
        return handle

    def order(self, before: Stream, after: Stream) -> None:
        """What `after` is given waits for `before`; see Driver."""
        if before != after:
            with self.scope():
                event = cupy.cuda.Event(disable_timing=True)
                runtime.eventRecord(event.ptr, before)
                runtime.streamWaitEvent(after, event.ptr)

    def synchronize(self, stream: Stream) -> None:
        """Wait until the stream has done what it was given; see Driver."""
        with self.scope():
            runtime.streamSynchronize(stream)

    def capture(self, stream: Stream, body: Callable[[], object]) -> Call:
        """body()'s work on one of this driver's streams as one graph; see Driver.

        Allocating inside ends the capture, as a graph would not own that memory; other threads may do as they please.
        """
        if (own := self._streams.get(stream)) is None:
            raise CaptureError("only a stream of the driver's own can be captured, the null stream never")
        with self.scope():
            try:
                # its scratch is made here, as nothing may be inside, and kept with the graph, which uses it
                handle = None if self._cublas is None else self._cublas.on(stream)
                graph = _captured(own, body)
            except Exception as error:
                raise CaptureError(f"{type(error).__name__}: {error}") from error
        launch, executable = runtime.graphLaunch, graph.graphExec

        def run(stream: Stream, kept: object = (graph, handle)) -> None:
            with self.scope():
                launch(executable, stream)

        return run


def _captured(stream: Any, body: Callable[[], object]) -> Any:
    """body()'s work on the stream as a cupy.cuda.Graph; the capture has ended, whatever happens."""
    collecting = gc.isenabled()
    gc.disable()  # it might free what may not be freed during a capture, such as a kernel's module
    try:
        stream.begin_capture(runtime.streamCaptureModeThreadLocal)
        try:
            body()
        except BaseException:
            with suppress(RuntimeError):  # an error that invalidated the capture is reported again as it ends
                stream.end_capture()
            raise
        return stream.end_capture()
    finally:
        if collecting:
            gc.enable()
