"""Where tensors live: `get_backend(device)` gives the backend of a device string."""

import re
from functools import cache

from gpubackprop.backends.base import Backend, Launch

__all__ = ["Backend", "Launch", "get_backend", "why_not_cuda"]


def get_backend(device: str = "auto") -> Backend:
    """The backend of "auto", "cpu", "cuda" or "cuda:N": one object per device.

    "auto" is CUDA where it works, else NumPy, and says once in the log why. An explicit "cuda" that cannot work is a
    RuntimeError with the reason and the remedy, never a silent CPU run.
    """
    if not isinstance(device, str):
        raise TypeError(
            f"device: expected a string, got {type(device).__name__}; use 'auto', 'cpu', 'cuda' or 'cuda:N'"
        )
    if device == "cpu":
        return _numpy()
    if device == "auto":
        return _auto()
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"unknown device {device!r}; choose from auto, cpu, cuda, cuda:N")
    raise RuntimeError(f"device {device!r}: {why_not_cuda()}; use device='cpu' (or 'auto')")


def why_not_cuda() -> str:
    """The reason CUDA is not in use."""
    return "this version has no CUDA backend yet"


@cache
def _numpy() -> Backend:
    from gpubackprop.backends.numpy import NumpyBackend

    return NumpyBackend()


@cache
def _auto() -> Backend:
    import logging

    logging.getLogger("gpubackprop").info("device 'auto' is the CPU: %s", why_not_cuda())
    return _numpy()
