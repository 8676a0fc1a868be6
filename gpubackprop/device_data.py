"""Device arrays at the door: CuPy arrays and their like, checked where they are and taken without a copy."""

from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Backend, Buffer, is_on_device
from gpubackprop.data import as_features

__all__ = ["check_one_place", "on_device", "taken"]


def check_one_place(x: Any, y: Any, where: str) -> None:
    """Raise if one of x and y lies on a device and the other does not."""
    if is_on_device(x) != is_on_device(y):
        here, there = ("x", "y") if is_on_device(x) else ("y", "x")
        remedy = f"move {there} with cupy.asarray({there}), or {here} to the host with {here}.get()"
        raise TypeError(f"{where}: {here} lies on a CUDA device but {there} on the host; {remedy}")


def on_device(x: Any, backend: Backend, dtype: npt.DTypeLike, columns: int | None, where: str, name: str) -> Buffer:
    """x as finite rows (n, columns) of `dtype` on the backend's device, without a copy where it is that already."""
    if backend.device.startswith("cpu"):
        remedy = f"pass {name}.get(), or make the Trainer with device='cuda'"
        raise TypeError(f"{where}: {name} lies on a CUDA device but the model on the CPU; {remedy}")
    a = taken(x, backend, where, name)
    if a.dtype not in (np.float32, np.float64) or a.ndim != 2 or not a.flags.c_contiguous:
        host = as_features(backend.to_numpy(a), dtype, columns, where, name)  # what is rare goes by way of the host
        return backend.asarray(host)
    if columns is not None and a.shape[1] != columns:
        raise ValueError(f"{where}: {name} has {a.shape[1]} columns but the model expects {columns}")
    if not a.size:
        raise ValueError(f"{where}: {name} has shape {a.shape}, expected at least a row and a column; pass some data")
    if a.dtype != dtype:
        cast = backend.empty(a.shape, dtype)
        backend.copy(a, cast).run()
        a = cast
    if not _finite(a, backend):
        as_features(backend.to_numpy(a), dtype, columns, where, name)  # names the row
    return a


def taken(a: Any, backend: Backend, where: str, name: str) -> Buffer:
    """The device array as a buffer, without a copy; ValueError if it lies on another device."""
    try:
        return backend.asarray(a)
    except ValueError as error:
        raise ValueError(f"{where}: {name}: {error}") from None


def _finite(a: Buffer, backend: Backend) -> bool:
    """Whether all elements are finite, found on the device."""
    for kind in ("max", "min"):
        extreme = backend.empty((), a.dtype)
        backend.reduce(kind, a, (0, 1), extreme).run()
        if not np.isfinite(backend.to_numpy(extreme)):
            return False
    return True
