"""Where tensors live: `get_backend(device)` gives the backend of a device string."""

import os
import re
import threading
from functools import cache

from gpubackprop.backends.base import Backend, Launch
from gpubackprop.names import unknown

__all__ = ["INSTALL", "Backend", "Launch", "get_backend", "why_not_cuda"]

INSTALL = (
    'pip install "gpubackprop[cuda13]", or "gpubackprop[cuda12]" with an NVIDIA driver older than 580 '
    "or a GPU older than Turing"
)
_backends: dict[str, Backend] = {}
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child must not find it held by a thread that it does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def get_backend(device: str = "auto") -> Backend:
    """The backend of "auto", "cpu", "cuda" (the current device) or "cuda:N": one object per device.

    "auto" is CUDA where it works, else NumPy, and says once in the log why. An explicit "cuda" that cannot work is a
    RuntimeError with the reason and the remedy, never a silent CPU run. "cuda:plan" plans for CUDA without a device.
    "cpu" is NumPy with the native library's kernels, if that was built; "cpu:reference" is NumPy alone.
    """
    if not isinstance(device, str):
        raise TypeError(
            f"device: expected a string, got {type(device).__name__}; use 'auto', 'cpu', 'cuda' or 'cuda:N'"
        )
    name = _auto() if device == "auto" else device
    if (cuda := re.fullmatch(r"cuda(:\d+)?", name)) is not None:
        name = f"cuda:{_index(name, cuda[1])}"
    elif name not in ("cpu", "cpu:reference", "cuda:plan"):
        raise ValueError(unknown("device", device, ("auto", "cpu", "cuda", "cuda:N", "cuda:plan", "cpu:reference")))
    with _lock:
        if name not in _backends:
            _backends[name] = _make(name)
        return _backends[name]


def why_not_cuda(index: int = 0) -> str | None:
    """The reason why that CUDA device is not in use, as a phrase; None if it can be."""
    return found[0] if (found := _obstacle(index)) else None


def _index(device: str, number: str | None) -> int:
    """The index of a CUDA device that works; RuntimeError with the reason and the remedy."""
    index = int(number[1:]) if number else 0
    if (found := _obstacle(index)) is not None:
        reason, remedy = found
        raise RuntimeError(f"device {device!r}: {reason}; {remedy}; use device='cpu' to do without")
    if number is None:
        from gpubackprop.backends.cupy import current_device

        index = current_device()
    return index


def _obstacle(index: int) -> tuple[str, str] | None:
    """Why the device cannot be used and what to do about it; None if it can."""
    try:
        from gpubackprop.backends import cupy
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return "CuPy is not installed", INSTALL
        return f"CuPy cannot be imported ({error})", f"reinstall it: {INSTALL}"
    except Exception as error:  # a broken installation fails in its own way, and says so at length
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        return f"CuPy cannot be imported ({reason})", f"reinstall it: {INSTALL}"
    return cupy.obstacle(index)


def _make(name: str) -> Backend:
    if name.startswith("cpu"):
        return _make_cpu(name)
    from gpubackprop.backends.cuda import CudaBackend

    if name == "cuda:plan":
        from gpubackprop.backends.driver import Paper

        return CudaBackend(Paper())
    from gpubackprop.backends.cupy import CupyDriver

    return CudaBackend(CupyDriver(int(name.removeprefix("cuda:"))))


def _make_cpu(name: str) -> Backend:
    from gpubackprop.backends.native import NativeBackend, library, why_not_native
    from gpubackprop.backends.numpy import NumpyBackend

    if name == "cpu:reference":
        return NumpyBackend()
    if (reason := why_not_native()) is None:
        return NativeBackend(library())
    if os.environ.get("GPUBACKPROP_REQUIRE_NATIVE") == "1":
        raise RuntimeError(f"device 'cpu': the native library is not in use: {reason}")
    import logging

    logging.getLogger("gpubackprop").info("device 'cpu' is NumPy alone: %s", reason)
    return NumpyBackend("cpu")


@cache
def _auto() -> str:
    """The device of "auto"."""
    if (reason := why_not_cuda()) is None:
        return "cuda"
    import logging

    logging.getLogger("gpubackprop").info("device 'auto' is the CPU: %s", reason)
    return "cpu"
