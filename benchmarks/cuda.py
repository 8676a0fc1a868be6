"""CUDA sources compiled and read back without a GPU: NVRTC, cuobjdump and nvdisasm from their wheels (extra `test`)."""

import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from gpubackprop.backends import nvrtc
from gpubackprop.backends.nvrtc import Compiled, CompileError

__all__ = [
    "ARCHITECTURES",
    "CompileError",
    "Compiled",
    "Function",
    "Instruction",
    "compile_cuda",
    "disassemble",
    "version_in",
]

# Turing, A100, RTX 30, RTX 40, H100, B100/B200, RTX 50.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
INSTRUCTION = 16  # bytes
NEEDED = ("lib/libnvrtc.so.13", "include/cuda_bf16.h", "bin/cuobjdump", "bin/nvdisasm")


class Instruction(NamedTuple):
    """One of SASS, as `@P0`, `LDG.E.128`, `R8,[R28.64]`; a branch's target is its place in the kernel."""

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
    """As the library's own, by the pinned compiler; any word from it is a CompileError."""
    place = toolkit()
    include = str(place / "include") if headers else None
    made = nvrtc.compile_cuda(source, architecture, *options, library=str(place / NEEDED[0]), headers=include)
    if made.log:
        raise CompileError(made.log)
    return made


def disassemble(cubins: Sequence[bytes], architecture: str) -> list[dict[str, Function]]:
    """The kernels of each cubin, by name; of many at once, because the disassembler takes half a second to start."""
    texts = [_texts(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        file.write_bytes(b"".join(code for text in texts for code in text.values()))
        about, [listing] = json.loads(
            _tool("nvdisasm", "--emit-json", "--binary", architecture.upper().replace("_", ""), file)
        )
        usages = []
        for cubin in cubins:
            file.write_bytes(cubin)
            usages.append(dict(re.findall(r"Function (\S+):\n(.*)", _tool("cuobjdump", "--dump-resource-usage", file))))
    instructions, disassembler = listing["sass-instructions"], version_in(about["Producer"])
    reserved = 1024 if about["SM"]["version"]["major"] >= 9 else 0  # the driver's, which these count as the kernel's
    start, found = 0, []
    for text, usage in zip(texts, usages, strict=True):
        found.append(functions := dict[str, Function]())
        for name, code in text.items():
            end = start + len(code) // INSTRUCTION
            listed = tuple(_instruction(i, start) for i in instructions[start:end])
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage[name])}
            shared = max(0, used["SHARED"] - reserved)
            functions[name] = Function(listed, used["REG"], used["STACK"] + used["LOCAL"], shared, disassembler)
            start = end
    return found


def _texts(elf: bytes) -> dict[str, bytes]:
    """The code of each kernel of a cubin, its sections .text.NAME (ELF-64)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    texts = {}
    for name_at, _, _, _, start, length in sections:
        name = elf[sections[names][4] + name_at :].partition(b"\0")[0].decode()
        if name.startswith(".text."):
            texts[name.removeprefix(".text.")] = elf[start : start + length]
    return texts


def _instruction(listed: dict[str, Any], start: int) -> Instruction:
    """One as listed; the target of a branch becomes its place in the kernel that starts at `start`."""
    opcode, operands = listed["opcode"], listed.get("operands", "")
    if opcode.startswith(("BRA", "JMP")):
        operands = re.sub(r"0x[0-9a-f]+$", lambda target: str(int(target[0], 16) // INSTRUCTION - start), operands)
    return Instruction(listed.get("predicate", ""), opcode, operands)


def _tool(name: str, *arguments: str | Path) -> str:
    command = [toolkit() / "bin" / name, *arguments]
    return subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout


def version_in(text: str) -> str:
    """The first V13.5.37 in a text."""
    match = re.search(r"\bV\d+\.\d+\.\d+", text)
    return match[0] if match else "unknown"
