"""What is installed: versions, the NVIDIA driver and its GPUs, and the pieces that CUDA takes."""

import ctypes
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from gpubackprop import __version__
from gpubackprop.backends import blas, native, nvrtc, why_not_cuda
from gpubackprop.backends.threads import get_threads

__all__ = ["NvidiaDriver", "installed", "nvidia_driver", "versions"]

CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")  # the names that CuPy is installed under
NAME_LENGTH, MAJOR, MINOR = 128, 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


def installed(*packages: str) -> str:
    """The first of the packages that is installed, with its version, or "not installed"."""
    for package in packages:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "not installed"


@dataclass(frozen=True)
class NvidiaDriver:
    """The newest CUDA version it runs, and its GPUs with their compute capabilities."""

    cuda: str
    gpus: tuple[str, ...]

    def __str__(self) -> str:
        return f"runs CUDA {self.cuda}; {', '.join(self.gpus) or 'no GPU'}"


def nvidia_driver() -> NvidiaDriver | None:
    """The NVIDIA driver, asked without CuPy; None where there is none."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()

    def read(function: str, *arguments: Any) -> int:
        return number.value if getattr(cuda, function)(ctypes.byref(number), *arguments) == 0 else 0

    newest, gpus = read("cuDriverGetVersion"), []
    for i in range(read("cuDeviceGetCount") if cuda.cuInit(0) == 0 else 0):
        name = ctypes.create_string_buffer(NAME_LENGTH)
        cuda.cuDeviceGetName(name, NAME_LENGTH, i)
        capability = ".".join(str(read("cuDeviceGetAttribute", attribute, i)) for attribute in (MAJOR, MINOR))
        gpus.append(f"{name.value.decode()} ({capability})")
    return NvidiaDriver(f"{newest // 1000}.{newest % 1000 // 10}", tuple(gpus))


def _products() -> str:
    """Who computes products of matrices on the CPU, in how many threads."""
    own = None if native.why_not_native() else blas.blas()
    if own is None or own.routine("gemm", np.dtype(np.float32)) is None:
        return "NumPy, in as many threads as its BLAS takes"
    name = own.name or "NumPy's BLAS"
    return f"{name}, {'a block in a thread of ours' if own.threads else 'in as many threads as it takes'}"


def versions() -> list[tuple[str, str]]:
    """Versions and devices, in labelled lines."""
    built: Any = np.show_config(mode="dicts") or {}
    linked = built.get("Build Dependencies", {}).get("blas", {})
    try:
        compiler = f"NVRTC {nvrtc.version()}"
    except (ImportError, OSError):
        compiler = "not installed"
    reason, missing = why_not_cuda(), native.why_not_native()
    kernels = f"not in use: {missing}" if missing else f"{native.library().instructions}, {get_threads()} threads"
    return [
        ("gpubackprop", f"{__version__}, {Path(__file__).parent}"),
        ("Python", f"{platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPU cores"),
        ("NumPy", f"{np.__version__}, BLAS: {linked.get('name', 'unknown')} {linked.get('version', '')}".rstrip()),
        ("CPU kernels", kernels),
        ("CPU products", _products()),
        *((package, installed(package).removeprefix(f"{package} ")) for package in ("click", "tqdm", "safetensors")),
        ("driver", str(nvidia_driver() or "no NVIDIA driver")),
        ("CuPy", installed(*CUPY)),
        ("bfloat16", installed("ml_dtypes")),
        ("compiler", compiler),
        ("devices", "cpu" if reason else "cpu, cuda"),
        *([("not CUDA", reason)] if reason else []),
    ]
