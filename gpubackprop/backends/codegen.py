"""Formulas rendered to C++: a graph becomes the body of the kernel whose skeleton is kernels/elementwise.cu.

Needs the standard library alone: `python gpubackprop/backends/codegen.py gelu float16` prints without NumPy too.
"""

import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from string import Template
from textwrap import fill
from types import SimpleNamespace
from typing import Any

if __package__:
    from gpubackprop import formulas
else:  # run by path, where importing the package would ask for NumPy
    formulas = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "formulas.py")))  # type: ignore[assignment]

__all__ = ["ITEMSIZE", "Kernel", "kernels", "names", "source", "sources", "statements", "unit"]

ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
WIDTH = 120  # characters of a line
GLUE = "\N{NO-BREAK SPACE}"  # where a line must not be broken; becomes a space
LONGEST = 72  # and of an expression whose parts need no names

Graph = Mapping[str, "formulas.Expr"]


# ---- expressions ---------------------------------------------------------------------------------------------------


def statements(graph: Graph) -> list[str]:
    """C++ that assigns the graph's outputs: one `const R tN` for each shared or long node, then the outputs.

    Of several outputs each is computed before any is written, because an output may be an input too.
    """
    order = formulas.walk(graph.values())
    uses = Counter(a for node in order for a in node.args)
    kept = set(graph.values()) if len(graph) > 1 else set()
    taken = {*graph, *formulas.free_names(*graph.values())}
    fresh = (t for i in count() if (t := f"t{i}") not in taken)
    text: dict[formulas.Expr, tuple[str, int]] = {}  # the text of a node and how tightly it binds
    lines = []
    for node in order:
        text[node] = _render(node, [text[a] for a in node.args])
        shared = node.args and (uses[node] > 1 or len(text[node][0]) > LONGEST)
        if shared or (node in kept and node.op != "number"):
            local = next(fresh)
            lines.append(f"const {'bool' if _compares(node) else 'R'} {local} = {text[node][0]};")
            text[node] = local, ATOM
    return [*lines, *(f"{k} = {text[e][0]};" for k, e in graph.items())]


ATOM, NEGATION, COMPARISON, CHOICE = 9, 3, 0, -1
BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}


def _compares(node: "formulas.Expr") -> bool:
    return node.op in formulas.COMPARISONS.values()


def _render(node: "formulas.Expr", args: list[tuple[str, int]]) -> tuple[str, int]:
    def operand(i: int, least: int) -> str:
        return args[i][0] if args[i][1] >= least else f"({args[i][0]})"

    if node.op == "name":
        return str(node.value), ATOM
    if node.op == "number":
        return _literal(float(node.value)), ATOM
    if node.op == "neg":
        return "-" + operand(0, NEGATION + 1), NEGATION  # never --x
    if node.op == "where":
        return f"{operand(0, COMPARISON)} ? {operand(1, 1)} : {operand(2, 1)}", CHOICE
    if _compares(node):
        return f"{operand(0, 1)} {node.op} {operand(1, 1)}", COMPARISON
    if (level := BINDING.get(node.op)) is not None:
        return f"{operand(0, level)} {node.op} {operand(1, level + 1)}", level
    return f"{node.op}({', '.join(a for a, _ in args)})", ATOM


def _literal(value: float) -> str:
    """The float64 value rounded once to the arithmetic type, as NumPy does it; `0.1f` would round the decimal text."""
    text = repr(value)
    return f"R({text.removesuffix('.0') if value else text})"


# ---- a kernel ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """Each output k = graph[k], for every element of (rows, columns) arrays; one that the graph reads changes in place.

    The other names it reads are arrays too, but for those in `per_column`, of shape (columns,) and broadcast over the
    rows; in `single`, of one element; and in `table`, columns of the step table with what they mean. Two names never
    stand for one array: an output that may share its input's memory must have its name.
    """

    name: str
    graph: Graph
    what: str
    per_column: tuple[str, ...] = ()
    single: tuple[str, ...] = ()
    table: Graph = field(default_factory=dict)

    @property
    def reads(self) -> tuple[str, ...]:
        """The arrays it reads and does not write."""
        others = {*self.graph, *self.per_column, *self.single, *self.table}
        return tuple(k for k in formulas.free_names(*self.graph.values()) if k not in others)

    @property
    def updates(self) -> tuple[str, ...]:
        """The arrays it reads and writes."""
        return tuple(k for k in self.graph if k in formulas.free_names(*self.graph.values()))

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """(C++ type, name) of the kernel's arguments, the outputs first."""
        listed = [("T* __restrict__", k) for k in self.graph]
        listed += [("const T* __restrict__", k) for k in (*self.reads, *self.per_column, *self.single)]
        if self.table:
            listed += [("const R* __restrict__", "table"), ("const int* __restrict__", "counter")]
            listed += [("const int", k) for k in ("width", *(f"{k}_at" for k in self.table))]
        return [*listed, ("const Index", "rows"), ("const Index", "columns")]

    def bytes(self, dtype: str) -> int:
        """Bytes moved per element."""
        return ITEMSIZE[dtype] * (len(self.graph) + len(self.updates) + len(self.reads))

    def source(self, dtype: str) -> str:
        """The skeleton of kernels/elementwise.cu filled in, without what it includes."""
        inputs = (*self.reads, *self.per_column, *self.single, *self.table)
        streamed = (*self.updates, *self.reads)
        text = _skeleton().substitute(
            name=self.name,
            header="\n".join(f"// {line}" for line in self._header(dtype)),
            element_parameters=_listed([*(f"R& {k}" for k in self.graph), *(f"const R {k}" for k in inputs)]),
            body=_lines(4, statements(self.graph)),
            parameters=_listed(f"{t} {k}" for t, k in self.parameters),
            arguments=_listed(k for _, k in self.parameters),
            table_reads=_lines(4, self._values()),
            column_loads=_lines(8, (f"const Vector<W> {k}_ = load<W>({k} + column);" for k in self.per_column)),
            loads=_lines(12, self._loads(streamed)),
            element_arguments=_listed(
                f"{k}_[lane]" if k in (*self.graph, *self.reads, *self.per_column) else f"{k}_"
                for k in (*self.graph, *inputs)
            ),
            stores=_lines(12, (f"store({k} + at, {k}_);" for k in self.graph)),
            misaligned=" | ".join(f"misaligned({k})" for k in (*self.graph, *self.reads, *self.per_column)),
        )
        return "".join(map(_wrapped, text.replace("{\n\n ", "{\n ").splitlines(keepends=True)))

    def _header(self, dtype: str) -> Iterator[str]:
        yield from f"{self.name}: {self.what}".splitlines()
        yield (f"{self.bytes(dtype)} bytes per element: reads {', '.join((*self.updates, *self.reads))}; "
               f"writes {', '.join(self.graph)}")  # fmt: skip

    def _values(self) -> Iterator[str]:
        """What holds for every element, read once by each thread."""
        for k in self.single:
            yield f"const R {k}_ = R({k}[0]);"
        if self.table:
            yield "const R* __restrict__ step = table + Index(*counter) * width;"
        for k, meaning in self.table.items():
            yield f"const R {k}_ = step[{k}_at];  // {formulas.describe(meaning)}"

    def _loads(self, streamed: Iterable[str]) -> Iterator[str]:
        for k in self.graph:
            if k not in self.updates:
                yield f"Vector<W> {k}_;"
        for k in streamed:
            yield f"{'' if k in self.updates else 'const '}Vector<W> {k}_ = load<W>({k} + at);"


def _lines(indent: int, lines: Iterable[str]) -> str:
    return "\n".join(" " * indent + line for line in lines)


def _listed(items: Iterable[str]) -> str:
    return ", ".join(item.replace(" ", GLUE) for item in items)


def _wrapped(line: str) -> str:
    if len(line) <= WIDTH + 1 or ";  //" in line:
        return line.replace(GLUE, " ")
    indent = "// " if line.startswith("//") else " " * (len(line) - len(line.lstrip()) + 8)
    text = fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return text.replace(GLUE, " ") + "\n"


# ---- translation units ---------------------------------------------------------------------------------------------

INCLUDE = '#include "prelude.cuh"\n'


def sources() -> Path:
    """The folder of the CUDA sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return packaged if (packaged := package / "_kernels").is_dir() else package.parent / "kernels"


def _skeleton() -> Template:
    _, _, kernel = (sources() / "elementwise.cu").read_text(encoding="utf-8").partition(INCLUDE)
    return Template(kernel.lstrip("\n"))


def unit(parts: Iterable[Kernel], dtype: str = "float32") -> str:
    """Kernels and the prelude as one self-contained source."""
    if dtype not in ITEMSIZE:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(ITEMSIZE)}")
    chosen = "" if dtype == "float32" else f"#define {dtype.upper()}\n"
    prelude = (sources() / "prelude.cuh").read_text(encoding="utf-8")
    return "\n".join([chosen + prelude, *(k.source(dtype) for k in parts)])


# ---- the kernels of each row ---------------------------------------------------------------------------------------


def names() -> list[str]:
    """Everything that `source` prints."""
    return sorted({key for table, _ in _makers() for key in table})


def source(name: str, dtype: str = "float32") -> str:
    """The kernels of an activation, function, loss or update rule with the prelude, ready to compile."""
    return unit(kernels(name), dtype)


def kernels(name: str) -> list[Kernel]:
    """The kernels of the row of that name; ValueError listing the names if there is none."""
    for table, make in _makers():
        if name in table:
            return make(table[name])
    raise ValueError(f"unknown kernel {name!r}; choose from {', '.join(names())}")


def _makers() -> list[tuple[Mapping[str, Any], Callable[[Any], list[Kernel]]]]:
    return [
        (formulas.ACTIVATIONS, _activation),
        (formulas.UNARY, _unary),
        (formulas.BINARY, _binary),
        (formulas.LOSSES, _loss),
        (formulas.RULES, _rule),
    ]


def _derivative(row: "formulas.Activation") -> Kernel:
    formula = "; ".join(row.derivative.splitlines())
    what = f"dx = dy * {row.name}', the derivative and its product with dy fused; {row.name}' = {formula}"
    return Kernel(f"{row.name}_backward", {"dx": row.backward_graph()}, what)


def _activation(row: "formulas.Activation") -> list[Kernel]:
    """Bias and activation; the pre-activation is kept in x only if the derivative is written in it."""
    x = formulas.apply("+", formulas.name("x"), formulas.name("b"))
    graph = {"y": row.forward_graph(x)} | ({"x": x} if "x" in row.needs else {})
    equation = f"x += b, y = {row.name}(x)" if "x" in graph else f"y = {row.name}(x + b)"
    what = f"{equation}, bias and activation fused; {row.name}(x) = {row.forward}"
    return [Kernel(f"{row.name}_forward", graph, what, per_column=("b",)), _derivative(row)]


def _unary(row: "formulas.Activation") -> list[Kernel]:
    return [Kernel(f"{row.name}_forward", {"y": row.forward_graph()}, f"y = {row.forward}"), _derivative(row)]


def _binary(row: "formulas.Binary") -> list[Kernel]:
    forward, da, db = (formulas.parse(text)[formulas.RESULT] for text in (row.forward, row.da, row.db))
    return [
        Kernel(f"{row.name}_forward", {"y": forward}, f"y = {row.forward}"),
        Kernel(f"{row.name}_backward", {"da": da, "db": db}, f"da = {row.da}, db = {row.db}, fused"),
    ]


def _loss(row: "formulas.Loss") -> list[Kernel]:
    """k is the share of one element in the loss."""
    forward, derivative = (formulas.parse(text)[formulas.RESULT] for text in (row.forward, row.derivative))
    k, dy = formulas.name("k"), formulas.name("dy")
    back = formulas.chain(formulas.apply("*", dy, k), derivative)
    return [
        Kernel(
            f"{row.name}_forward", {"y": formulas.apply("*", k, forward)}, f"y = k * ({row.forward})", single=("k",)
        ),
        Kernel(f"{row.name}_backward", {"dx": back}, f"dx = dy * k * ({row.derivative})", single=("dy", "k")),
    ]


def _rule(row: "formulas.Rule") -> list[Kernel]:
    """`before` and `update`, whose scalars the host evaluates once per step into a table."""
    made = []
    for part, text in (("before", row.before), ("update", row.update)):
        if text:
            graph, scalars = formulas.hoist(formulas.parse(text), ("p", "g", *row.state))
            what = "\n".join(["these lines in one pass", *(f"    {line}" for line in text.splitlines() if line)])
            made.append(Kernel(f"{row.name}_{part}", graph, what, table=scalars))
    return made


if __name__ == "__main__":
    print(source(*sys.argv[1:]), end="")
