"""CUDA sources compiled and read back without a GPU: NVRTC, cuobjdump and nvdisasm from their wheels (extra `test`)."""

import ctypes
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gpubackprop.backends.driver import OPTIONS

__all__ = ["ARCHITECTURES", "CompileError", "Compiled", "Function", "Instruction", "compile_cuda", "disassemble"]

# Turing, A100, RTX 30, RTX 40, H100, B100/B200, RTX 50.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
NEEDED = ("lib/libnvrtc.so.13", "include/cuda_bf16.h", "bin/cuobjdump", "bin/nvdisasm")


class CompileError(Exception):
    """The compiler said something, a warning or an error; the message is what it said."""


@dataclass(frozen=True)
class Compiled:
    """What NVRTC makes of a source; the cubin is empty for a virtual architecture."""

    ptx: str
    cubin: bytes

    @property
    def version(self) -> str:
        """The compiler's, as V13.5.37."""
        return _version(self.ptx)


class Instruction(NamedTuple):
    """One of SASS, as `@P0`, `LDG.E.128`, `R8,[R28.64]`."""

    predicate: str
    opcode: str
    operands: str


@dataclass(frozen=True)
class Function:
    """A kernel in a cubin: code, registers and bytes of local memory of a thread, bytes of shared memory of a block."""

    code: tuple[Instruction, ...]
    registers: int
    local: int
    shared: int
    disassembler: str


@cache
def toolkit() -> Path:
    """The folder of the wheels' library, headers and tools; ImportError if some are missing."""
    try:
        spec = find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        spec = None
    for place in (spec.submodule_search_locations or []) if spec else []:
        if all((Path(place) / file).exists() for file in NEEDED):
            return Path(place)
    raise ImportError("the CUDA compiler and disassembler are not installed: pip install 'gpubackprop[test]' (Linux)")


def compile_cuda(source: str, architecture: str, *options: str, headers: bool = True) -> Compiled:
    """PTX and, for sm_NN, the cubin of a self-contained source; CompileError with any word from the compiler.

    The options are those the library compiles with, and the given ones.
    """
    nvrtc = ctypes.CDLL(str(toolkit() / "lib/libnvrtc.so.13"))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def read(what: str) -> bytes:
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    given = [f"--gpu-architecture={architecture}", *OPTIONS, *options, *[f"-I{toolkit()}/include"] * headers]
    arguments = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"unit.cu", 0, None, None) != 0:
        raise CompileError("nvrtcCreateProgram failed")
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(given), arguments)
        if (log := read("ProgramLog").rstrip(b"\0").decode().strip()) or status != 0:
            raise CompileError(log or f"nvrtcCompileProgram returned {status}")
        return Compiled(read("PTX").rstrip(b"\0").decode(), read("CUBIN") if architecture.startswith("sm_") else b"")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def disassemble(cubin: bytes) -> dict[str, Function]:
    """Each kernel of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "unit.cubin"
        file.write_bytes(cubin)
        about, functions = json.loads(_tool("nvdisasm", "--emit-json", file))
        usage = dict(re.findall(r"Function (\S+):\n(.*)", _tool("cuobjdump", "--dump-resource-usage", file)))
    reserved = 1024 if about["SM"]["version"]["major"] >= 9 else 0  # the driver's, which these count as the kernel's
    made = {}
    for function in functions:
        name = function["function-name"]
        code = tuple(
            Instruction(i.get("predicate", ""), i["opcode"], i.get("operands", ""))
            for i in function["sass-instructions"]
        )
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage[name])}
        shared = max(0, used["SHARED"] - reserved)
        made[name] = Function(code, used["REG"], used["STACK"] + used["LOCAL"], shared, _version(about["Producer"]))
    return made


def _tool(name: str, *arguments: str | Path) -> str:
    command = [toolkit() / "bin" / name, *arguments]
    return subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout


def _version(text: str) -> str:
    """The first V13.5.37 in a text."""
    match = re.search(r"\bV\d+\.\d+\.\d+", text)
    return match[0] if match else "unknown"
