"""The seam between the CUDA backend and a device: fifteen calls, and the driver that plans without a device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import CaptureError

__all__ = ["OPTIONS", "CaptureError", "DeviceMemoryError", "Driver", "Gemm", "Paper", "Properties", "Stream"]

Buffer = Any
Stream = int  # the handle of a CUDA stream
Call = Callable[[Stream], None]  # something bound that runs on a stream, without checks, inside the driver's scope

# No contraction: + - * / sqrt give the same bits on every backend; these kernels are bound by memory.
OPTIONS = ("--std=c++17", "--fmad=false")


class DeviceMemoryError(MemoryError):
    """The device has no room for a buffer; `.nbytes` were asked for, `.free` and `.total` are the device's."""

    def __init__(self, nbytes: int, free: int, total: int, text: str = "") -> None:
        super().__init__(nbytes, free, total, text)
        self.nbytes, self.free, self.total = nbytes, free, total
        self.text = text or f"device memory: {nbytes:,} bytes do not fit into {free:,} free of {total:,}"

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Properties:
    """What a device is: name, compute capability such as "9.0", multiprocessors."""

    name: str
    capability: str
    multiprocessors: int


@dataclass(frozen=True)
class Gemm:
    """cuBLAS's arguments of C = op(A) op(B) + beta C, column-major as Fortran's BLAS, for `batch` matrices.

    Addresses and strides (in elements) are those of the first matrix and between matrices. Types are dtype names;
    `compute` is "float32", "tf32" or "float64".
    """

    transpose_a: bool
    transpose_b: bool
    m: int
    n: int
    k: int
    a: int
    a_type: str
    lda: int
    stride_a: int
    b: int
    b_type: str
    ldb: int
    stride_b: int
    beta: float
    c: int
    c_type: str
    ldc: int
    stride_c: int
    batch: int
    compute: str


class Driver(Protocol):
    """What the CUDA backend asks of a device. Nothing here waits for it unless it says so."""

    device: str  # "cuda:0"
    xp: Any  # the array module of its buffers

    # ---- facts
    def properties(self) -> Properties: ...
    def memory(self) -> tuple[int, int]:
        """(free, total) bytes, memory that its pool holds unused counted as free."""

    def scope(self) -> AbstractContextManager[Any]:
        """Inside, this device is the current one, for any thread; what was current before comes back."""

    # ---- memory
    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, *, pinned: bool = False) -> Buffer:
        """An uninitialised C-contiguous device buffer; pinned=True: a page-locked NumPy array. DeviceMemoryError."""

    def wrap(self, array: Any) -> Buffer:
        """A view, without a copy, of an array of this device that offers __cuda_array_interface__ or DLPack.

        ValueError if it lies on another device. Work on it is ordered after what its own stream was given, for which
        this may wait.
        """

    def address(self, buffer: Buffer) -> int:
        """Where the buffer's first element lies."""

    def copy(self, source: Buffer, destination: Buffer, stream: Stream) -> None:
        """Copy equal numbers of bytes between contiguous buffers, either of them a NumPy array or on the device.

        Asynchronous between device buffers and with pinned arrays; of a pageable array the stream's end is awaited.
        """

    # ---- work
    def function(self, source: str, name: str) -> Any:
        """The kernel of that name in a self-contained source, compiled with OPTIONS for the device, or from a cache."""

    def launch(
        self, function: Any, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Sequence[Any]
    ) -> Call:
        """The launch bound to its arguments: ctypes values in the order of the kernel's parameters."""

    def gemm(self, arguments: Gemm) -> Call:
        """The matrix product bound to its arguments."""

    # ---- order
    def stream(self) -> Stream:
        """A new stream that does not wait for the null stream; it lives as long as the driver."""

    def current(self) -> Stream:
        """The caller's current stream on this device."""

    def order(self, before: Stream, after: Stream) -> None:
        """What `after` is given from here on waits for what `before` has been given so far."""

    def synchronize(self, stream: Stream) -> None:
        """Wait until the stream has done what it was given."""

    def capture(self, stream: Stream, body: Callable[[], object]) -> Call:
        """body()'s work on the stream, which must not be the null stream, as one graph; CaptureError if that fails."""


class Paper:
    """A driver without a device: launches can be bound, printed and costed, and running one is an error.

    Its buffers are NumPy arrays whose memory the operating system commits only where it is written.
    """

    device = "cuda:plan"
    xp: Any = np

    def properties(self) -> Properties:
        return Properties("no device: plans only", "0.0", 1)

    def memory(self) -> tuple[int, int]:
        return 0, 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Nothing to select."""
        yield

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, *, pinned: bool = False) -> Buffer:
        return np.empty(tuple(shape), dtype)

    def wrap(self, array: Any) -> Buffer:
        raise ValueError("device 'cuda:plan' holds no data; use device='cuda'")

    def address(self, buffer: Buffer) -> int:
        address: int = buffer.ctypes.data
        return address

    def copy(self, source: Buffer, destination: Buffer, stream: Stream) -> None:
        destination.reshape(-1).view(np.uint8)[:] = source.reshape(-1).view(np.uint8)

    def function(self, source: str, name: str) -> Any:
        return name

    def launch(
        self, function: Any, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Sequence[Any]
    ) -> Call:
        return _not_run

    def gemm(self, arguments: Gemm) -> Call:
        return _not_run

    def stream(self) -> Stream:
        return 1

    def current(self) -> Stream:
        return 1

    def order(self, before: Stream, after: Stream) -> None:
        pass

    def synchronize(self, stream: Stream) -> None:
        pass

    def capture(self, stream: Stream, body: Callable[[], object]) -> Call:
        raise CaptureError("there is no device")


def _not_run(stream: Stream) -> None:
    raise RuntimeError("device 'cuda:plan' only plans; use device='cuda' on a machine with a GPU")
