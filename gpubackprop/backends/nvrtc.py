"""NVRTC, CUDA's compiler, bound by ctypes: it needs neither a GPU nor a driver, only the wheels or a toolkit."""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from gpubackprop.backends.driver import OPTIONS

__all__ = ["CompileError", "compile_cuda", "version"]

LIBRARIES = ("lib/libnvrtc.so.[0-9]*", "bin/x86_64/nvrtc64_*_0.dll", "bin/nvrtc64_*_0.dll")
HEADERS = ("include/cuda_bf16.h",)


class CompileError(Exception):
    """What the compiler said."""


@cache
def _nvrtc() -> ctypes.CDLL:
    """The library; ImportError if it or the headers are missing."""
    library, _ = _found()
    return ctypes.CDLL(library)


@cache
def _found() -> tuple[str, str]:
    """The library and the folder of the headers: where CuPy would find them, else in NVIDIA's wheels."""
    try:
        from cuda import pathfinder  # comes with CuPy

        if headers := pathfinder.find_nvidia_header_directory("cudart"):
            return str(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path), str(headers)
    except (ImportError, RuntimeError):
        pass
    spec = find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    library, header = (
        next((p for folder in folders for pattern in patterns for p in sorted(folder.glob(f"*/{pattern}"))), None)
        for patterns in (LIBRARIES, HEADERS)
    )
    if library is None or header is None:
        raise ImportError("NVRTC and the CUDA headers are not installed")
    return str(library), str(header.parent)


def version() -> str:
    """The compiler's version, such as 13.5; ImportError if there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_cuda(source: str, architecture: str) -> str:
    """Compile a self-contained source as the library does, for sm_NN: the compiler's warnings; CompileError."""
    nvrtc, (_, headers) = _nvrtc(), _found()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    given = [f"--gpu-architecture={architecture}", *OPTIONS, f"-I{headers}"]
    options = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"unit.cu", 0, None, None):
        raise CompileError("nvrtcCreateProgram failed")
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(given), options)
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        if status:
            raise CompileError(log.value.decode().strip() or f"nvrtcCompileProgram returned {status}")
        return log.value.decode().strip()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
