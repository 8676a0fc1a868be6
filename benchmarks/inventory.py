"""Every kernel in every choice of types, the sources that hold them, and what their headers and signatures declare."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from zlib import crc32

from gpubackprop.backends import codegen

from .cuda import ARCHITECTURES

__all__ = ["NARROW", "Entry", "Unit", "declared", "generated", "inventory", "representative", "stated_bytes", "units"]

# What files that convert are compiled for beside the four plain types: the dtype of T, then the others.
CONVERSIONS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "copy.cu": [
        ("float32", {"SOURCE": "uint8"}), ("float32", {"SOURCE": "int64", "OUTPUT": "int64"}),
        ("float16", {"SOURCE": "float32"}), ("float16", {"OUTPUT": "float32"}),
        ("bfloat16", {"SOURCE": "float32"}), ("bfloat16", {"OUTPUT": "float32"}),
    ],
    "feed.cu": [
        ("float32", {"SOURCE": "uint8", "TARGET": "int64"}), ("float16", {"SOURCE": "float32", "TARGET": "int64"}),
        ("bfloat16", {"SOURCE": "uint8", "TARGET": "int64"}),
    ],
    "reduce.cu": [("float16", {"OUTPUT": "float32"}), ("bfloat16", {"SOURCE": "float32"})],
}  # fmt: skip

# Hand-written kernels whose main loop has no accesses of 16 bytes, and why.
NARROW = {
    "transpose": "a warp reads and writes 32 neighbours of a tile, one a thread",
    "advance": "one thread, no loop",
    "accumulate_loss": "one thread, no loop",
}


@dataclass(frozen=True)
class Entry:
    """A kernel in one choice of types."""

    name: str
    dtype: str  # of T
    types: tuple[tuple[str, str], ...] = ()  # the dtypes of SOURCE, OUTPUT, TARGET where they are not the usual ones

    @property
    def variant(self) -> str:
        """The choice of types: `float32`, `float32 SOURCE=uint8`."""
        return " ".join([self.dtype, *(f"{key}={value}" for key, value in self.types)])

    @property
    def bytes(self) -> int:
        """Bytes moved per element, as the kernel's header has them."""
        if self.name in generated():
            return generated()[self.name].bytes(self.dtype)
        file = codegen.sources() / codegen.written()[self.name]
        return stated_bytes(file.read_text(encoding="utf-8"), self.name, self.dtype, **dict(self.types))


@dataclass(frozen=True)
class Unit:
    """A self-contained source, and those of its kernels that are looked at."""

    source: str
    entries: tuple[Entry, ...]


@cache
def generated() -> dict[str, codegen.Skeleton]:
    """The kernels made from formulas, by name."""
    return {k.name: k for row in codegen.names() for k in codegen.kernels(row)}


def inventory() -> list[Entry]:
    """Every kernel in every choice of types: float32, float64, float16, bfloat16, and where it converts more."""
    entries = [Entry(name, dtype) for dtype in codegen.ITEMSIZE for name in codegen.homes()]
    for name, file in codegen.written().items():
        entries += [Entry(name, dtype, tuple(types.items())) for dtype, types in CONVERSIONS.get(file, [])]
    return entries


def representative() -> list[tuple[Entry, str]]:
    """Every entry of float32 for one architecture, and every kernel once more, with the types and the architecture that
    the name of its row or file falls on: a choice that stays when other kernels come and go."""
    first = [(entry, "sm_90") for entry in inventory() if entry.dtype == "float32"]
    others = [(dtype, a) for a in ARCHITECTURES for dtype in codegen.ITEMSIZE if (dtype, a) != ("float32", "sm_90")]
    for name, home in codegen.homes().items():
        dtype, architecture = others[crc32(home.encode()) % len(others)]
        first.append((Entry(name, dtype), architecture))
    return first


def units(entries: Iterable[Entry]) -> list[Unit]:
    """The sources that hold these kernels: a row's, or a file's, in one choice of types.

    More in one unit would compile sooner, but a kernel's code is not quite the same in every company.
    """
    homes = codegen.homes()
    grouped: dict[Entry, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(replace(entry, name=homes[entry.name]), []).append(entry)
    made = []
    for home, group in grouped.items():
        made.append(Unit(codegen.source(home.name, home.dtype, **dict(home.types)), tuple(group)))
    return made


# ---- what is declared ----------------------------------------------------------------------------------------------


def stated_bytes(text: str, name: str, dtype: str, **types: str) -> int:
    """Of the comment `Bytes per element: dropout T + T, top1 T.` the sum after the kernel's name, in these types."""
    header = " ".join(line.removeprefix("//").strip() for line in text.partition("\n#")[0].splitlines())
    match = re.search(rf"Bytes per element: (?:[\w +,]+, )?{name} ([\w +]+)", header)
    if match is None:
        raise ValueError(f"the header of kernel {name} lacks what it moves: Bytes per element: {name} T + T.")
    itemsize = codegen.ITEMSIZE | {"uint8": 1, "int64": 8}
    sizes = {
        "T": itemsize[dtype], "R": max(4, itemsize[dtype]), "Index": 8, "Word": 4, "0": 0,
        "S": itemsize[types.get("SOURCE", dtype)], "O": itemsize[types.get("OUTPUT", dtype)],
        "Y": itemsize[types.get("TARGET", dtype)],
    }  # fmt: skip
    return sum(sizes[term.strip()] for term in match[1].split("+"))


def declared(source: str, name: str, dtype: str) -> list[str]:
    """The types that the kernel's parameters must have in PTX, by its signature in the source."""
    scalars = {"Index": "u64", "Long": "u64", "Word": "u32", "int": "u32", "R": "f64" if dtype == "float64" else "f32"}

    def of(kind: str) -> str:
        return "u64" if "*" in kind else scalars.get(kind.removeprefix("const "), "b8")  # a struct is an array of bytes

    return [of(kind) for kind, _ in codegen.signature(source, name)]
