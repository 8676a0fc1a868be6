"""The ledger: what every kernel compiles to for every architecture, what must not get worse, and what may never be.

kernels/ledger.csv has a line for each kernel and choice of types; a cell is one value, or one for each architecture
where they differ. It names the compiler and disassembler it was written with: with others only the absolute rules hold.
What a kernel compiles to follows from its source, the compiler's options and how it is looked at; a line has the digest
of these, and no line is written that is against the rules, so that only lines of another digest need be compiled again.
"""

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from gpubackprop.backends import codegen
from gpubackprop.backends.driver import OPTIONS

from .audit import Accesses, Facts, measure
from .cuda import ARCHITECTURES, Compiled, CompileError, compile_cuda, disassemble, version_in
from .inventory import NARROW, Entry, Unit, declared, generated, units

__all__ = [
    "ALLOWANCE", "COLUMNS", "PATH", "Ledger", "Measured", "compiled", "made_of", "measured", "tools", "value_for",
    "violations",
]  # fmt: skip

PATH = codegen.sources() / "ledger.csv"
ALLOWANCE = 2  # more registers than in the ledger that are no regression yet; occupancy may not fall at all
TOGETHER = 24  # units disassembled at once
LOOKED_AT_BY = ("audit.py", "cuda.py", "inventory.py", "ledger.py", "occupancy.py")


@dataclass(frozen=True)
class Measured:
    """A kernel as compiled for one architecture, with which compiler and disassembler."""

    entry: Entry
    architecture: str
    block: int  # the most threads
    facts: Facts
    tools: str
    made_of: str  # a digest
    mismatch: str = ""  # between the parameters in the PTX and the signature

    def __str__(self) -> str:
        return f"{self.entry.name} {self.entry.variant} {self.architecture}"


# ---- compiling -----------------------------------------------------------------------------------------------------


def measured(jobs: Iterable[tuple[Entry, str]]) -> Iterator[Measured]:
    """Each entry compiled for its architecture, on every core; CompileError if the compiler has a word to say."""
    wanted: dict[str, list[Entry]] = {}
    for entry, architecture in jobs:
        wanted.setdefault(architecture, []).append(entry)
    said = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads will do: the work is NVRTC's and nvdisasm's
        for future in [pool.submit(compiled, *job) for job in _batches(wanted)]:
            try:
                yield from future.result()
            except CompileError as error:
                said.append(str(error))
    if said:
        raise CompileError("\n".join(said))


def _batches(wanted: Mapping[str, list[Entry]]) -> Iterator[tuple[list[Unit], str]]:
    """Units that are disassembled together; each batch has long ones and short ones."""
    for architecture, entries in wanted.items():
        parts = sorted(units(entries), key=lambda unit: len(unit.source))
        count = -(-len(parts) // TOGETHER)
        for i in range(count):
            yield parts[i::count], architecture


def compiled(parts: Sequence[Unit], architecture: str) -> list[Measured]:
    """What is measured of the units' entries."""
    codes = [_compiled(unit, architecture) for unit in parts]
    made = []
    for unit, code, functions in zip(parts, codes, disassemble([c.cubin for c in codes], architecture), strict=True):
        heads = dict(re.findall(r"\.entry (\w+)(.*?)\{", code.ptx, re.DOTALL))
        for entry in unit.entries:
            function, head = functions[entry.name], heads[entry.name]
            parameters = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)", head)
            expected = declared(unit.source, entry.name, entry.dtype)
            mismatch = "" if parameters == expected else f"{', '.join(parameters)} for {', '.join(expected)}"
            limit = re.search(r"\.maxntid (\d+)", head)
            block = int(limit[1]) if limit else 1024
            tools = f"NVRTC {version_in(code.ptx)}, nvdisasm {function.disassembler}"
            facts = measure(function, architecture, block)
            made.append(Measured(entry, architecture, block, facts, tools, made_of(unit), mismatch))
    return made


def tools() -> str:
    """The compiler and the disassembler that are here."""
    [unit] = units([Entry("advance", "float32")])
    return compiled([unit], ARCHITECTURES[0])[0].tools


def made_of(unit: Unit) -> str:
    """The digest of all that decides what is measured of a unit's entries, but for the tools."""
    return hashlib.sha256(b"\0".join([unit.source.encode(), *_looked_at_by()])).hexdigest()[:12]


@cache
def _looked_at_by() -> list[bytes]:
    here = Path(__file__).parent
    return [*(option.encode() for option in OPTIONS), *((here / name).read_bytes() for name in LOOKED_AT_BY)]


def _compiled(unit: Unit, architecture: str) -> Compiled:
    try:
        return compile_cuda(unit.source, architecture)
    except CompileError as error:
        first = unit.entries[0]
        raise CompileError(f"{first.name} {first.variant} {architecture} and its unit:\n{error}") from None


# ---- absolute rules ------------------------------------------------------------------------------------------------


def violations(m: Measured) -> list[str]:
    """What no kernel may have, whatever the compiler."""
    f = m.facts
    broken = {
        f"spills: {f.spills[0]} stores, {f.spills[1]} loads": any(f.spills),
        f"{f.local} bytes of local memory a thread": f.local,
        f"{f.double} instructions of 64-bit arithmetic": f.double and m.entry.dtype != "float64",
        f"{f.float_atomics} atomics of floats": f.float_atomics,
        f"no fence between {f.unfenced[0]} stores and a ticket, a ticket and {f.unfenced[1]} loads": any(f.unfenced),
        f"a scalar main loop: loads {f.loop_loads}, stores {f.loop_stores}": not _vectors(m.entry, f),
        f"{f.split} accesses of the main loop side by side, which could be vectors": f.split,
        f"parameters {m.mismatch}": m.mismatch,
    }
    return [f"{m}: {what}" for what, is_so in broken.items() if is_so]


def _vectors(entry: Entry, f: Facts) -> bool:
    """Whether the main loop has accesses of 16 bytes. Generated kernels have no others there, but of operands that
    broadcast, and move the bytes per element that their headers state."""
    widths = f.loop_loads + f.loop_stores
    kernel = generated().get(entry.name)
    if kernel is None:
        return entry.name in NARROW or max(widths, default=0) >= 128
    if isinstance(kernel, codegen.Broadcast):
        return min(f.loop_stores, default=0) >= 128
    if isinstance(kernel, codegen.Sum) and kernel.per_row:
        widths = tuple(width for width in widths if width >= 128)
    lanes = 16 // codegen.ITEMSIZE[entry.dtype]
    return min(widths, default=0) >= 128 and sum(widths) // 8 % (lanes * entry.bytes) == 0


# ---- the file ------------------------------------------------------------------------------------------------------


def _widths(accesses: Accesses) -> str:
    return " ".join(str(width) for width in dict.fromkeys(accesses)) or "-"


COLUMNS: dict[str, Callable[[Measured], str]] = {
    "bytes": lambda m: str(m.entry.bytes),
    "block": lambda m: str(m.block),
    "registers": lambda m: str(m.facts.registers),
    "occupancy %": lambda m: str(m.facts.occupancy),
    "shared": lambda m: str(m.facts.shared),
    "local": lambda m: str(m.facts.local),
    "spill stores": lambda m: str(m.facts.spills[0]),
    "spill loads": lambda m: str(m.facts.spills[1]),
    "fp64": lambda m: str(m.facts.double),
    "float atomics": lambda m: str(m.facts.float_atomics),
    "integer atomics": lambda m: str(m.facts.integer_atomics),
    "loop loads": lambda m: _widths(m.facts.loop_loads),
    "loop stores": lambda m: _widths(m.facts.loop_stores),
    "loads": lambda m: _widths(m.facts.loads),
    "stores": lambda m: _widths(m.facts.stores),
    "made of": lambda m: m.made_of,
}


@dataclass
class Ledger:
    """The lines, by kernel and choice of types; a line maps each column to its cell."""

    tools: str
    lines: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Iterable[Measured]) -> "Ledger":
        """The ledger of entries compiled for every architecture, but for those that are against the rules."""
        found, grouped = "", dict[tuple[str, str], dict[str, Measured]]()
        for m in results:
            grouped.setdefault((m.entry.name, m.entry.variant), {})[m.architecture] = m
            found = m.tools
        lines = {
            key: {column: _cell([text(line[a]) for a in ARCHITECTURES]) for column, text in COLUMNS.items()}
            for key, line in sorted(grouped.items())
            if not any(violations(m) for m in line.values())
        }
        return cls(found, lines)

    @classmethod
    def read(cls, path: Path = PATH) -> "Ledger":
        """What `write` has written."""
        with path.open(encoding="utf-8", newline="") as file:
            tools = next(file).removeprefix("# ").partition(";")[0]
            lines = {(line.pop("kernel"), line.pop("types")): line for line in csv.DictReader(file)}
        return cls(tools, lines)

    def write(self, path: Path = PATH) -> None:
        """One line for each kernel and choice of types."""
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(
                f"# {self.tools}; {'|'.join(ARCHITECTURES)}; written by: python -m benchmarks kernels --update\n"
            )
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["kernel", "types", *COLUMNS])
            writer.writerows([*key, *line.values()] for key, line in self.lines.items())

    def outdated(self, entries: Iterable[Entry], tools: str) -> list[Entry]:
        """The entries whose lines are missing, or of other sources, options, rules or tools."""
        current = {entry: made_of(unit) for unit in units(entries) for entry in unit.entries}
        if tools != self.tools:
            return list(current)
        nothing: dict[str, str] = {}
        return [e for e, digest in current.items()
                if self.lines.get((e.name, e.variant), nothing).get("made of") != digest]  # fmt: skip

    def regressions(self, m: Measured) -> list[str]:
        """What is worse than the ledger has it; nothing under other tools, whose code is theirs."""
        if m.tools != self.tools:
            return []
        line = self.lines.get((m.entry.name, m.entry.variant))
        if line is None:
            return [f"{m}: is not in the ledger"]
        old = {column: value_for(m.architecture, cell) for column, cell in line.items()}
        new = {column: text(m) for column, text in COLUMNS.items()}
        worse = [column for column, is_worse in WORSE.items() if is_worse(old[column], new[column])]
        return [f"{m}: {column} {new[column]}, in the ledger {old[column]}" for column in worse]


def _cell(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else "|".join(values)


def value_for(architecture: str, cell: str) -> str:
    """What a cell has for one architecture."""
    values = cell.split("|")
    return values[ARCHITECTURES.index(architecture)] if len(values) > 1 else cell


def _more(allowed: int = 0) -> Callable[[str, str], bool]:
    return lambda old, new: int(new) > int(old) + allowed


def _narrower(old: str, new: str) -> bool:
    """Whether the widest or the narrowest access is narrower, or there is none any more."""
    was, now = ([int(width) for width in text.split()] if text != "-" else [0] for text in (old, new))
    return max(now) < max(was) or min(now) < min(was)


WORSE: Mapping[str, Callable[[str, str], bool]] = {
    "bytes": _more(),
    "registers": _more(ALLOWANCE),
    "occupancy %": lambda old, new: int(new) < int(old),
    "shared": _more(),
    "local": _more(),
    "spill stores": _more(),
    "spill loads": _more(),
    "fp64": _more(),
    "float atomics": _more(),
    "integer atomics": _more(),
    "loop loads": _narrower,
    "loop stores": _narrower,
    "loads": _narrower,
    "stores": _narrower,
}
