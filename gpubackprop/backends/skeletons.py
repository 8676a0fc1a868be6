"""Kernels made from the skeletons of kernels/: graphs of formulas rendered into them.

Needs the standard library alone. A skeleton is a .cu file with $placeholders; what follows its marker is repeated for
each kernel of a unit, what comes before it stands once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from string import Template
from textwrap import fill
from typing import ClassVar

from gpubackprop import formulas
from gpubackprop.backends.cpp import ITEMSIZE, Graph, defines, inlined, sources, statements

__all__ = ["Broadcast", "Columns", "Kernel", "Skeleton", "Sum", "filled", "skeleton", "unit"]

WIDTH = 120  # characters of a line
GLUE = "\N{NO-BREAK SPACE}"  # where a line must not be broken; becomes a space
MARKER = "// ---- for each kernel "

Parameters = list[tuple[str, str]]


# ---- kernels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skeleton:
    """What the kernels of every skeleton share: graph[k] for every element of the arrays that the graph reads.

    Names in `single` are arrays of one element, those in `table` columns of the step table with what they mean; arrays
    in `wide` are stored as they are computed with (R), whatever the type of the others. An array that is read and
    written has one name, and no two names stand for one array.
    """

    name: str
    graph: Graph
    what: str
    single: tuple[str, ...] = ()
    table: Graph = field(default_factory=dict)
    wide: tuple[str, ...] = ()

    file: ClassVar[str]
    most: ClassVar[str] = ""  # before the number of bytes

    @property
    def writes(self) -> tuple[str, ...]:
        """The arrays it writes."""
        return tuple(self.graph)

    @property
    def reads(self) -> tuple[str, ...]:
        """The arrays it reads and does not write."""
        others = {*self.writes, *self._repeated, *self.single, *self.table}
        return tuple(k for k in formulas.free_names(*self.graph.values()) if k not in others)

    @property
    def updates(self) -> tuple[str, ...]:
        """The arrays it reads and writes."""
        names = formulas.free_names(*self.graph.values())
        return tuple(k for k in self.writes if k in names)

    @property
    def parameters(self) -> Parameters:
        """(C++ type, name) of the kernel's arguments, the outputs first."""
        inputs = (*self.reads, *self._repeated, *self.single)
        return [
            *((f"{self._stored(k)}* __restrict__", k) for k in self.writes),
            *self._results(),
            *((f"const {self._stored(k)}* __restrict__", k) for k in inputs),
            *([("const R* __restrict__", "table")] if self.table else []),
            *self._state(),
            *(("const int", k) for k in self._places()),
            *self._extents(),
        ]

    @property
    def includes(self) -> tuple[str, ...]:
        """What it needs beside what its skeleton includes."""
        angles = any(node.op in ("sin", "cos") for node in formulas.walk(self.graph.values()))
        return ("trigonometry.cuh",) if angles else ()

    def bytes(self, dtype: str) -> int:
        """Bytes moved per element; at most, where operands broadcast."""
        wide = 4 if ITEMSIZE[dtype] == 2 else ITEMSIZE[dtype]
        return sum(wide if k in self.wide else ITEMSIZE[dtype] for k in (*self.writes, *self.updates, *self.reads))

    def source(self, dtype: str) -> str:
        """The skeleton filled in, without what stands once in a unit."""
        by_reference = {"layout"}  # a copy of it would lie in local memory
        inner = [(f"{t}&" if k in by_reference else t, k) for t, k in self.parameters if k not in self._outside]
        words = {
            "name": self.name,
            "key": next(iter(self.graph)),
            "parameters": _listed(f"{t} {k}" for t, k in self.parameters),
            "inner_parameters": _listed(f"{t} {k}" for t, k in inner),
            "inner_arguments": _listed(k for _, k in inner),
            "misaligned": " | ".join(self._misaligned()),
        }
        return filled(skeleton(self.file)[1], words, {k: list(v) for k, v in self._blocks(dtype).items()})

    # ---- what differs from skeleton to skeleton

    @property
    def _repeated(self) -> tuple[str, ...]:
        """The arrays that are broadcast over the rows, or over the columns."""
        return ()

    @property
    def _outside(self) -> tuple[str, ...]:
        """The parameters that only the __global__ function reads."""
        return ()

    def _results(self) -> Parameters:
        """Results and scratch, after the arrays that are written."""
        return []

    def _state(self) -> Parameters:
        return [("const Index* __restrict__", "state")] if self.table else []

    def _places(self) -> list[str]:
        """Where the columns of the table are."""
        return ["width", *(f"{k}_at" for k in self.table)] if self.table else []

    def _extents(self) -> Parameters:
        """What says how large the arrays are."""
        raise NotImplementedError

    def _blocks(self, dtype: str) -> dict[str, Iterable[str]]:
        """The lines for each placeholder that has a line of its own."""
        return {
            "header": (f"// {line}" for line in self._header(dtype)),
            "element": self._element(),
            "values": self._values(),
            "loads": self._loads(),
            "compute": self._compute(),
            "stores": (f"store({k} + at, {k}_);" for k in self.writes),
        }

    # ---- pieces of text

    def _stored(self, key: str) -> str:
        return "R" if key in self.wide else "T"

    def _header(self, dtype: str) -> Iterator[str]:
        yield from f"{self.name}: {self.what}".splitlines()
        moved = f"reads {', '.join((*self.updates, *self.reads))}"
        moved += f"; writes {', '.join(self.writes)}" if self.writes else ""
        yield f"{self.most}{self.bytes(dtype)} bytes per element: {moved}"

    def _inputs(self) -> tuple[str, ...]:
        return *self.reads, *self._repeated, *self.single, *self.table

    def _element(self) -> Iterator[str]:
        """The function that computes one element."""
        parameters = _listed([*(f"R& {k}" for k in self.graph), *(f"const R {k}" for k in self._inputs())])
        yield f"DEVICE void {self.name}_element({parameters}) {{"
        yield from (f"    {line}" for line in statements(self.graph))
        yield "}"

    def _compute(self) -> Iterator[str]:
        """The call of that function for each lane of a vector."""
        lanes = {*self.graph, *self.reads, *self._repeated}
        arguments = (f"{k}_[lane]" if k in lanes else f"{k}_" for k in (*self.graph, *self._inputs()))
        yield "UNROLL for (int lane = 0; lane < W; ++lane) {"
        yield f"    {self.name}_element({_listed(arguments)});"
        yield "}"

    def _values(self, step: str = "table + state[0] * width") -> Iterator[str]:
        """What holds for every element."""
        for k in self.single:
            yield f"const R {k}_ = R({k}[0]);"
        if self.table:
            yield f"const R* __restrict__ step = {step};"
        for k, meaning in self.table.items():
            yield f"const R {k}_ = step[{k}_at];  // {formulas.describe(meaning)}"

    def _loads(self) -> Iterator[str]:
        for k in self.graph:
            if k not in (*self.updates, *self.reads):
                yield f"Vector<W> {k}_;"
        for k in (*self.updates, *self.reads):
            yield f"{'' if k in self.updates else 'const '}Vector<W> {k}_ = {self._load(k)};"

    def _load(self, key: str) -> str:
        return f"load<W>({key} + at)"

    def _misaligned(self) -> Iterator[str]:
        """What is not 0 where an array does not fit vectors."""
        yield from (f"misaligned({k})" for k in (*self.writes, *self.reads, *self._repeated))


@dataclass(frozen=True)
class Kernel(Skeleton):
    """Each output k = graph[k], for every element of (members, rows, columns) arrays.

    Names in `per_column` are arrays of shape (members, columns), broadcast over the rows. The table is read at row
    state[row]. With `groups`, a byte for every 64 columns says how often `stride` is added to a scalar's place in the
    row. With `advance`, the last block moves the state on to the next step, up to state[3]: the steps by one, and the
    steps applied too unless control[2] is 0.
    """

    per_column: tuple[str, ...] = ()
    row: int = 0
    groups: bool = False
    advance: bool = False

    file: ClassVar[str] = "elementwise.cu"

    @property
    def _repeated(self) -> tuple[str, ...]:
        return self.per_column

    @property
    def _outside(self) -> tuple[str, ...]:
        return "members", "ticket", "control", *(() if self.table else ("state",))

    @property
    def includes(self) -> tuple[str, ...]:
        return *super().includes, *(("reduce.cuh",) if self.advance else ())

    def _results(self) -> Parameters:
        return [("Index* __restrict__", "state"), ("Word*", "ticket")] if self.advance else []

    def _state(self) -> Parameters:
        return [
            *([("const R* __restrict__", "control")] if self.advance else super()._state()),
            *([("const unsigned char* __restrict__", "groups")] if self.groups else []),
        ]

    def _places(self) -> list[str]:
        return [*super()._places(), *(["stride"] if self.groups else [])]

    def _extents(self) -> Parameters:
        return [("const Index", k) for k in ("rows", "columns", "members")]

    def _blocks(self, dtype: str) -> dict[str, Iterable[str]]:
        step = f"table + state[{self.row}] * width"
        values = list(self._values(step + " + groups[column / 64] * stride" if self.groups else step))
        loads = (f"const Vector<W> {k}_ = load<W>({k} + member * columns + column);" for k in self.per_column)
        return super()._blocks(dtype) | {
            "values": [] if self.groups else values,
            "column_values": [*(values if self.groups else []), *loads],
            "advance": ADVANCE.splitlines() if self.advance else [],
        }


ADVANCE = """\
if (last_block(ticket, Word(gridDim.x * Index(gridDim.y) * gridDim.z)) && thread() == 0) {
    const bool applied = control == nullptr || control[2] != 0;
    if (state[0] < state[3]) state[0] += 1;
    if (applied && state[1] < state[3]) state[1] += 1;
}"""


@dataclass(frozen=True)
class Columns(Skeleton):
    """The one output k = graph[k] of (members, rows, columns) arrays, and sums (+)= Σ_rows k, of (members, columns).

    A graph whose root is the array k itself only adds up.
    """

    file: ClassVar[str] = "columns.cu"

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(k for k, e in self.graph.items() if e != formulas.name(k))

    @property
    def _outside(self) -> tuple[str, ...]:
        return "sums", "partials", "tickets", "accumulate"

    def _results(self) -> Parameters:
        return [("R*", "sums"), ("R*", "partials"), ("Word*", "tickets")]

    def _extents(self) -> Parameters:
        kinds = {"accumulate": "int", "rows": "Index", "columns": "Index", "members": "Word"}
        return [(f"const {kind}", k) for k, kind in kinds.items()]

    def _element(self) -> Iterator[str]:
        yield from super()._element() if self.writes else ()

    def _compute(self) -> Iterator[str]:
        yield from super()._compute() if self.writes else ()


@dataclass(frozen=True)
class Sum(Skeleton):
    """total = Σ graph["total"] over all elements, in R, and each other output k = graph[k].

    Names in `per_row` are arrays of one element for each row of (rows, columns).
    """

    per_row: tuple[str, ...] = ()

    file: ClassVar[str] = "sum.cu"

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(k for k in self.graph if k != "total")

    @property
    def _repeated(self) -> tuple[str, ...]:
        return self.per_row

    @property
    def _outside(self) -> tuple[str, ...]:
        return "total", "partials", "ticket", "loss", "events", *(() if self.table else ("state",))

    def _results(self) -> Parameters:
        return [("R*", "total"), ("R*", "partials"), ("Word*", "ticket"), ("R*", "loss"), ("Index*", "events")]

    def _state(self) -> Parameters:
        return [("const Index* __restrict__", "state")]

    def _extents(self) -> Parameters:
        return [("const Index", k) for k in ("size", *(["columns"] if self.per_row else []))]

    def _loads(self) -> Iterator[str]:
        yield from super()._loads()
        yield from (f"const Vector<W> {k}_ = of_rows<W>({k}, at, columns);" for k in self.per_row)


@dataclass(frozen=True)
class Broadcast(Skeleton):
    """Each output k = graph[k] over up to 8 dimensions; the other operands broadcast, by the strides of a layout."""

    file: ClassVar[str] = "broadcast.cu"
    most: ClassVar[str] = "at most "

    def _extents(self) -> Parameters:
        return [(f"const Layout<{len(self.reads)}>", "layout"), ("const Index", "rows")]

    def _blocks(self, dtype: str) -> dict[str, Iterable[str]]:
        offsets = [
            *(f"const {self._stored(k)}* {k}_row = {k};" for k in self.reads),
            "Index rest = row;",
            "for (int d = 6; rest > 0; --d) {",
            "    const Index place = rest % layout.shape[d];",
            *(f"    {k}_row += place * layout.strides[{i}][d];" for i, k in enumerate(self.reads)),
            "    rest /= layout.shape[d];",
            "}",
        ]
        return super()._blocks(dtype) | {"row_offsets": offsets}

    def _load(self, key: str) -> str:
        if key not in self.reads:
            return super()._load(key)
        stride = f"layout.strides[{self.reads.index(key)}][7]"
        return f"spread<W>({key}_row + column * {stride}, {stride})"

    def _misaligned(self) -> Iterator[str]:
        yield from (f"misaligned({k})" for k in self.writes)
        yield from (f"unfit({k}, layout.strides[{i}])" for i, k in enumerate(self.reads))


# ---- text ----------------------------------------------------------------------------------------------------------


def unit(parts: Iterable[Skeleton], dtype: str = "float32") -> str:
    """Kernels and what they include as one self-contained source."""
    parts = list(parts)
    heads = [skeleton(k.file)[0] for k in parts]
    heads += [f'#include "{file}"\n' for k in parts for file in k.includes]
    return "\n".join([defines(dtype) + inlined("\n".join(dict.fromkeys(heads))), *(k.source(dtype) for k in parts)])


@cache
def skeleton(file: str) -> tuple[str, str]:
    """What of a skeleton stands once in a unit, from its include on, and what is repeated for each kernel."""
    head, _, rest = (sources() / file).read_text(encoding="utf-8").partition(MARKER)
    return "#include" + head.partition("#include")[2].rstrip() + "\n", rest.partition("\n")[2].lstrip("\n")


def filled(text: str, words: Mapping[str, str], blocks: Mapping[str, Sequence[str]]) -> str:
    """The text with words in the place of $words, and lines in the place of lines that are a $word alone."""
    lines: list[str] = []
    for line in text.splitlines():
        bare = line.lstrip()
        if bare.removeprefix("$") in blocks:
            lines += (line.removesuffix(bare) + part for part in blocks[bare.removeprefix("$")])
        else:
            lines.append(Template(line).substitute(words))
    return "".join(map(_wrapped, lines))


def _listed(items: Iterable[str]) -> str:
    return ", ".join(item.replace(" ", GLUE) for item in items)


def _wrapped(line: str) -> str:
    if len(line) <= WIDTH or ";  //" in line:
        return line.replace(GLUE, " ") + "\n"
    indent = "// " if line.startswith("//") else " " * (len(line) - len(line.lstrip()) + 8)
    text = fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return text.replace(GLUE, " ") + "\n"
