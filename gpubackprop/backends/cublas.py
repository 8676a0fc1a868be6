"""Matrix products by cuBLAS: a small typed binding to the libcublas that CuPy has loaded.

CuPy's own way is `a.dot(b, out)`, one cublasGemmEx for contiguous matrices. This binding exists for what that lacks:
beta (add to the output), TF32 and 16-bit inputs with a float32 output chosen per product, batches without copies, and
products inside a CUDA graph, which CuPy refuses (cupy issue 6290). For the same product the two give cuBLAS the same
arguments, so `dot` remains the yardstick to check it against on a GPU.

A handle may serve one thread at a time and remembers one stream, and its scratch must not serve two streams at once: so
there is a handle for each thread and device, with 32 MiB for each stream. Then products allocate nothing, also under
capture, and are deterministic.
"""

import ctypes
import os
import sys
import threading
import weakref
from typing import Any

from gpubackprop.backends.driver import Call, Driver, Gemm, Stream

__all__ = ["PROTOTYPES", "WORKSPACE", "Cublas", "loaded"]

WORKSPACE = 32 << 20  # bytes; what NVIDIA advises for Hopper, more than older devices use
DEFAULT_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT
SUM_IN_COMPUTE_TYPE = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: partial sums not rounded to 16 bits

Value = Any  # an instance of one of ctypes' types
_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
_a_b_c = [_pointer, _int, _int]  # address, data type, leading dimension
_sizes = [_pointer, _int, _int, _int, _int, _int]  # handle, two operations, m, n, k

# cublas_api.h; enumerations are ints, every function returns one. A test has the C declarations beside these.
PROTOTYPES: dict[str, list[Any]] = {
    "cublasCreate_v2": [ctypes.POINTER(_pointer)],
    "cublasDestroy_v2": [_pointer],
    "cublasSetStream_v2": [_pointer, _pointer],
    "cublasSetWorkspace_v2": [_pointer, _pointer, ctypes.c_size_t],
    "cublasSetMathMode": [_pointer, _int],
    "cublasGemmEx": [*_sizes, _pointer, *_a_b_c, *_a_b_c, _pointer, *_a_b_c, _int, _int],
    "cublasGemmStridedBatchedEx": [
        *_sizes, _pointer, *_a_b_c, _long, *_a_b_c, _long, _pointer, *_a_b_c, _long, _int, _int, _int,
    ],
}  # fmt: skip

STATUS = {
    1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH", 11: "MAPPING_ERROR",
    13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED", 16: "LICENSE_ERROR",
}  # fmt: skip
TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # CUDA_R_32F, _64F, _16F, _16BF
COMPUTE: dict[str, tuple[int, Any]] = {  # cublasComputeType_t and the type of alpha and beta
    "float32": (68, ctypes.c_float),  # CUBLAS_COMPUTE_32F
    "tf32": (77, ctypes.c_float),  # CUBLAS_COMPUTE_32F_FAST_TF32
    "float64": (70, ctypes.c_double),  # CUBLAS_COMPUTE_64F
}
# What cuBLAS multiplies: (type of A and B, type of C, compute).
SUPPORTED = {
    ("float32", "float32", "float32"), ("float32", "float32", "tf32"), ("float64", "float64", "float64"),
    ("float16", "float16", "float32"), ("float16", "float32", "float32"),
    ("bfloat16", "bfloat16", "float32"), ("bfloat16", "float32", "float32"),
}  # fmt: skip


def loaded(major: int) -> ctypes.CDLL:
    """The libcublas of that CUDA version that this process has loaded; RuntimeError if it has not."""
    name = f"cublas64_{major}.dll" if sys.platform == "win32" else f"libcublas.so.{major}"
    try:
        # by soname and only if it is there already: a search might find another copy (Windows does the same by itself)
        return ctypes.CDLL(name, mode=getattr(os, "RTLD_NOLOAD", 0))
    except OSError as error:
        raise RuntimeError(f"gemm: {name} is not loaded ({error})") from error


def typed(library: Any) -> Any:
    """The library with the argument types of the functions used here declared."""
    for name, arguments in PROTOTYPES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _int
    return library


def checked(function: str, status: int) -> None:
    """RuntimeError with the function and the name of its status, unless that is success."""
    if status:
        raise RuntimeError(f"{function}: CUBLAS_STATUS_{STATUS.get(status, 'UNKNOWN')} ({status})")


class Handle:
    """One thread's handle on one device, and the scratch of each stream it has worked on."""

    def __init__(self, library: Any, driver: Driver) -> None:
        self.library, self.driver = library, driver
        self.workspaces: dict[Stream, Any] = {}
        self.stream: Stream | None = None
        self.pointer = _pointer()
        with driver.scope():
            checked("cublasCreate_v2", library.cublasCreate_v2(ctypes.byref(self.pointer)))
        # with the thread's end; destroying waits for the device, so that the scratch may go after it
        weakref.finalize(self, library.cublasDestroy_v2, self.pointer).atexit = False
        checked("cublasSetMathMode", library.cublasSetMathMode(self.pointer, SUM_IN_COMPUTE_TYPE))

    def use(self, stream: Stream) -> None:
        """Work on the stream from here on; setting the stream resets the scratch, which is set after it."""
        if stream not in self.workspaces:
            self.workspaces[stream] = self.driver.empty((WORKSPACE,), "uint8")
        scratch = self.driver.address(self.workspaces[stream])
        self.stream = None  # unknown, should one of these fail
        checked("cublasSetStream_v2", self.library.cublasSetStream_v2(self.pointer, stream))
        checked("cublasSetWorkspace_v2", self.library.cublasSetWorkspace_v2(self.pointer, scratch, WORKSPACE))
        self.stream = stream


class Cublas:
    """cuBLAS on one device."""

    def __init__(self, library: Any, driver: Driver) -> None:
        self.library, self.driver = typed(library), driver
        self._local = threading.local()

    def on(self, stream: Stream) -> Handle:
        """This thread's handle, made at the thread's first product, working on the stream."""
        handle: Handle | None = getattr(self._local, "handle", None)
        if handle is None:
            handle = self._local.handle = Handle(self.library, self.driver)
        if handle.stream != stream:
            handle.use(stream)
        return handle

    def bind(self, g: Gemm) -> Call:
        """C = op(A) op(B) + beta C, every argument but the handle converted now."""
        name = "cublasGemmEx" if g.batch == 1 else "cublasGemmStridedBatchedEx"
        gemm, arguments = getattr(self.library, name), _arguments(g)

        def run(stream: Stream) -> None:
            if status := gemm(self.on(stream).pointer, *arguments):
                checked(name, status)

        return run


def _arguments(g: Gemm) -> tuple[Value, ...]:
    """What follows the handle in cublasGemmEx, or in cublasGemmStridedBatchedEx for more than one matrix."""
    if g.a_type != g.b_type or (g.a_type, g.c_type, g.compute) not in SUPPORTED:
        raise ValueError(f"gemm: cuBLAS has no {g.a_type} × {g.b_type} -> {g.c_type} computed in {g.compute}")
    if (largest := max(g.m, g.n, g.k, g.lda, g.ldb, g.ldc, g.batch)) >= 1 << 31:
        raise ValueError(f"gemm: a size of {largest:,} does not fit cuBLAS's 32-bit integers; use smaller matrices")
    compute, scalar = COMPUTE[g.compute]
    alpha, beta = scalar(1), scalar(g.beta)

    def matrix(address: int, dtype: str, leading: int, stride: int) -> list[Value]:
        strided = [_pointer(address), _int(TYPES[dtype]), _int(leading), _long(stride)]
        return strided[:3] if g.batch == 1 else strided

    return (
        *map(_int, (g.transpose_a, g.transpose_b, g.m, g.n, g.k)),
        ctypes.byref(alpha),  # keeps it alive
        *matrix(g.a, g.a_type, g.lda, g.stride_a),
        *matrix(g.b, g.b_type, g.ldb, g.stride_b),
        ctypes.byref(beta),
        *matrix(g.c, g.c_type, g.ldc, g.stride_c),
        *([] if g.batch == 1 else [_int(g.batch)]),
        _int(compute),
        _int(DEFAULT_ALGORITHM),
    )
