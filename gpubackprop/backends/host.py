"""Formulas as loops for the CPU: what the package's build compiles into the native library.

Needs the standard library alone, because the build runs it. A loop is found again by its text: the library exports each
under a name made of the graph, however its arrays were called, so that nothing has to say which rows there are.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path

from gpubackprop import formulas
from gpubackprop.backends.codegen import Columns, Kernel, Skeleton, Sum, kernels, names
from gpubackprop.backends.cpp import sources, statements
from gpubackprop.backends.skeletons import filled, skeleton

__all__ = ["DTYPES", "INSTRUCTION_SETS", "Loop", "digest", "instruction_sets", "loop", "loops", "unit"]

DTYPES = ("float32", "float64")
# kernels/host has these written by hand
WRITTEN = ("gemm.cpp", "limits.cpp", "normalize.cpp", "softmax_cross_entropy.cpp", "step.cpp")

SLOW = {"exp", "expm1", "log", "log1p", "tanh", "sin", "cos", "pow"}  # functions of tens of operations

TUNING = "-mprefer-vector-width=512"
# x86-64: name -> what the compiler is told beside the baseline; the best that the machine has is loaded
INSTRUCTION_SETS = {
    "avx2": ["-mavx2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", TUNING],
}


def instruction_sets(features: Iterable[str]) -> list[str]:
    """Those that a machine with these features has, the best last: "avx2", "AVX512F", … as the system or NumPy say."""
    has = {f"-m{feature.lower()}" for feature in features}
    return ["base", *(name for name, options in INSTRUCTION_SETS.items() if has >= {*options} - {TUNING})]


@dataclass(frozen=True)
class Loop:
    """A graph over arrays and scalars, in the order of its job: outputs y0 …, inputs a0 …, scalars s0 …

    Names in `columnwise` are broadcast over the rows, that in `rowwise`, of which a sum takes one, over the columns;
    those in `single` are arrays of one element.
    """

    skeleton: str  # map, columns or sum
    graph: tuple[tuple[str, formulas.Expr], ...]
    columnwise: tuple[str, ...]
    rowwise: tuple[str, ...]
    single: tuple[str, ...]
    # what the caller calls them
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    scalars: tuple[formulas.Expr, ...]

    @property
    def what(self) -> str:
        """The equations; for each input how it is broadcast."""
        kinds = (f"; {k} {kind}" for kind in ("columnwise", "rowwise", "single") for k in getattr(self, kind))
        return f"{self.skeleton}: " + "; ".join(f"{k} = {formulas.describe(e)}" for k, e in self.graph) + "".join(kinds)

    @cached_property
    def symbol(self) -> str:
        """The name it is exported under, but for the type."""
        return f"{self.skeleton}_{hashlib.sha256(self.what.encode()).hexdigest()[:16]}"

    @property
    def written(self) -> list[str]:
        """The outputs that are stored."""
        unwritten = {"map": (), "sum": ("y0",), "columns": ("y0",) if self.graph[0][1].op == "name" else ()}
        return [k for k, _ in self.graph if k not in unwritten[self.skeleton]]

    @property
    def cost(self) -> int:
        """What an element takes, in about 0.1 ns: its arrays, a quarter of its operations, eight for a function."""
        nodes = [n.op for n in formulas.walk(e for _, e in self.graph) if n.args]
        arrays = len(self.written) + len(self.inputs) - len((*self.single, *self.columnwise, *self.rowwise))
        return arrays + len(nodes) // 4 + 8 * sum(op in SLOW for op in nodes)

    def source(self) -> str:
        """The skeleton filled in."""
        inputs = [f"a{i}" for i in range(len(self.inputs))]
        ones = [*self.single, *(f"s{i}" for i in range(len(self.scalars)))]
        arrays = [*self.written, *(k for k in inputs if k not in (*self.single, *self.rowwise))]
        places = {k: i for i, k in enumerate((*self.written, *inputs, *ones[len(self.single) :]))}

        def pointers() -> Iterator[str]:
            for k in arrays:
                const, start = "const " * (k not in self.written), "column" if k in self.columnwise else "at"
                yield f"{const}R* const {k}_ = pointer<{const}R>(job[{places[k]}]) + {start};"
            for k in self.rowwise:
                yield f"const R* const {k}_ = pointer<const R>(job[{places[k]}]);"
            for k in ones:
                yield f"const R {k} = *pointer<const R>(job[{places[k]}]);"

        blocks = {
            "pointers": pointers(),
            "loads": (f"const R {k} = {k}_[i];" for k in arrays if k not in self.written),
            "compute": [f"R {', '.join(k for k, _ in self.graph)};", *statements(dict(self.graph))],
            "stores": (f"{k}_[i] = {k};" for k in self.written),
        }
        words = {"name": self.symbol, "arguments": str(len(places)), "cost": str(self.cost), "what": self.what}
        words["sum_up"] = "sum_each(count, [=](const Index i)"
        for k in self.rowwise:
            words["sum_up"] = f"sum_rows({k}_, job[{len(places) + 6}], at, count, [=](const Index i, const R {k})"
        return filled(skeleton(f"host/{self.skeleton}.cpp")[1], words, {k: list(v) for k, v in blocks.items()})


@lru_cache(maxsize=formulas.KEPT)  # eager code binds the same again and again
def loop(
    skeleton: str, graph: tuple[tuple[str, formulas.Expr], ...], arrays: tuple[str, ...],
    columnwise: tuple[str, ...] = (), rowwise: tuple[str, ...] = (), single: tuple[str, ...] = (),
) -> Loop:  # fmt: skip
    """The loop of a graph whose names in `arrays` are arrays, and whose others are scalars of the step table."""
    inner, scalars = formulas.hoist(dict(graph), arrays)
    inputs = tuple(k for k in formulas.free_names(*inner.values()) if k in arrays)
    new = {k: f"a{i}" for i, k in enumerate(inputs)}
    values = formulas.renamed(inner, new).values()
    by_column, by_row, ones = (tuple(new[k] for k in inputs if k in kind) for kind in (columnwise, rowwise, single))
    outputs = tuple((f"y{i}", e) for i, e in enumerate(values))
    return Loop(skeleton, outputs, by_column, by_row, ones, tuple(inner), inputs, tuple(scalars.values()))


# ---- what is compiled ----------------------------------------------------------------------------------------------


def loops() -> list[Loop]:
    """What the operations, losses and optimizers bind, in arrays of one type."""
    found = [made for row in names() for kernel in kernels(row) if not {*kernel.wide} & {*kernel.graph}
             for made in _of(kernel)]  # fmt: skip
    for row in formulas.ACTIVATIONS.values():
        found.append(loop("map", (("y", row.forward_graph()),), ("x",)))
    for rule in formulas.RULES.values():
        for before, general in product((False, True), repeat=2):
            if graph := rule.graph(before=before, general=general):
                found.append(loop("map", tuple(graph.items()), ("p", "g", *rule.state, "factor"), single=("factor",)))
    running = {"r": formulas.parse(formulas.RUNNING)["r"]}
    numbers = ("half", "factor", "top")
    found.append(loop("map", tuple(running.items()), ("r", "batch", *numbers), single=numbers))
    added = formulas.parse(formulas.TWO_SUM)
    found.append(loop("map", tuple((k, added[k]) for k in ("high", "low")), ("high", "low", "part")))
    return list({made.symbol: made for made in found}.values())


def _of(kernel: Skeleton) -> Iterator[Loop]:
    """Its loop; two, if it takes an array per row: rows may have one column."""
    arrays = tuple(k for k in formulas.free_names(*kernel.graph.values()) if k not in kernel.table)
    columnwise = kernel.per_column if isinstance(kernel, Kernel) else ()
    rowwise = kernel.per_row if isinstance(kernel, Sum) else ()
    kind = {Columns: "columns", Sum: "sum"}.get(type(kernel), "map")
    for per_row in dict.fromkeys(((), rowwise)):
        yield loop(kind, tuple(kernel.graph.items()), arrays, columnwise, per_row, kernel.single)


def unit(dtype: str) -> str:
    """All kernels in one type, as a source for a compiler that knows the folders of kernels/."""
    made = loops()
    heads = dict.fromkeys(skeleton(f"host/{made_.skeleton}.cpp")[0] for made_ in made)
    defines = "#define FLOAT64\n" if dtype == "float64" else ""
    includes = "".join(f'#include "{file}"\n' for file in WRITTEN)
    body = "\n".join(made_.source() for made_ in made)
    return defines + "".join(heads) + includes + f"\nnamespace gpubackprop {{\n\n{body}\n}}  // namespace gpubackprop\n"


def digest() -> str:
    """What tells this version of formulas and sources from others."""
    here = Path(__file__).parent
    files = [Path(formulas.__file__), *(here / f"{name}.py" for name in ("host", "codegen", "skeletons", "cpp"))]
    files += [sources() / "prelude.cuh", sources() / "control.cuh", *sorted((sources() / "host").iterdir())]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:32]


if __name__ == "__main__":
    import sys

    print(unit(*sys.argv[1:] or ["float32"]), end="")
