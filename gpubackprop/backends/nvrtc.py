"""NVRTC, CUDA's compiler, bound by ctypes: it needs neither a GPU nor a driver, only the wheels or a toolkit."""

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from gpubackprop.backends.driver import OPTIONS

__all__ = ["CompileError", "Compiled", "compile_cuda", "version"]

LIBRARIES = ("lib/libnvrtc.so.[0-9]*", "bin/x86_64/nvrtc64_*_0.dll", "bin/nvrtc64_*_0.dll")
HEADERS = ("include/cuda_bf16.h",)


class CompileError(Exception):
    """What the compiler said."""


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


@cache
def _opened(library: str) -> ctypes.CDLL:
    return ctypes.CDLL(library)


def version() -> str:
    """The compiler's version, such as 13.5; ImportError if there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _opened(_found()[0]).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@dataclass(frozen=True)
class Compiled:
    """What NVRTC makes of a source, and what it said of it; the cubin is empty for a virtual architecture."""

    ptx: str
    cubin: bytes
    log: str


def compile_cuda(
    source: str, architecture: str, *options: str, library: str | None = None, headers: str | None = None
) -> Compiled:
    """PTX and, for sm_NN, the cubin of a self-contained source, with the library's OPTIONS and these; CompileError.

    `library` is the compiler to use, with the folder `headers` if the source needs it: else those that are found.
    """
    if library is None:
        library, headers = _found()
    nvrtc, program, size = _opened(library), ctypes.c_void_p(), ctypes.c_size_t()

    def read(what: str) -> bytes:
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    given = [f"--gpu-architecture={architecture}", *OPTIONS, *options, *([f"-I{headers}"] if headers else [])]
    arguments = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"unit.cu", 0, None, None):
        raise CompileError("nvrtcCreateProgram failed")
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(given), arguments)
        log = read("ProgramLog").rstrip(b"\0").decode().strip()
        if status:
            raise CompileError(log or f"nvrtcCompileProgram returned {status}")
        cubin = read("CUBIN") if architecture.startswith("sm_") else b""
        return Compiled(read("PTX").rstrip(b"\0").decode(), cubin, log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
