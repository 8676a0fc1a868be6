"""The kernels of each row of formulas, rendered to C++.

Needs the standard library alone: `python gpubackprop/backends/codegen.py gelu float16` prints without NumPy too.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

if not __package__:  # run by path, where importing the package would ask for NumPy
    for package, folder in (
        ("gpubackprop", Path(__file__).parents[1]),
        ("gpubackprop.backends", Path(__file__).parent),
    ):
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]

from gpubackprop import formulas
from gpubackprop.backends.cpp import C_TYPES, ITEMSIZE, file_unit, signature, sources, statements, written
from gpubackprop.backends.skeletons import Broadcast, Columns, Kernel, Skeleton, Sum, unit

__all__ = [
    "C_TYPES", "ITEMSIZE", "Broadcast", "Columns", "Kernel", "Skeleton", "Sum", "file_unit", "homes", "kernels",
    "names", "signature", "source", "sources", "statements", "unit", "written",
]  # fmt: skip


def names() -> list[str]:
    """The activations, functions, losses, passes over gradients, penalties and update rules."""
    return sorted({key for table, _ in _makers() for key in table})


def homes() -> dict[str, str]:
    """Every kernel: the row it is made from, or the file of kernels/ it is written in."""
    return {k.name: row for row in names() for k in kernels(row)} | written()


def source(name: str, dtype: str = "float32", **types: str) -> str:
    """All that a row is rendered to, or a file of kernels/, or what holds the kernel of that name: with what it
    includes, ready to compile. `types` names the dtypes of SOURCE, OUTPUT, TARGET in a file that converts.

    ValueError listing the names if there is none such."""
    home = homes().get(name, name)
    return file_unit(home, dtype, **types) if home in written().values() else unit(kernels(home), dtype)


def kernels(name: str) -> list[Skeleton]:
    """The kernels of the row of that name; ValueError listing the names if there is none."""
    for table, make in _makers():
        if name in table:
            return make(table[name])
    raise ValueError(f"unknown kernel {name!r}; choose from {', '.join([*names(), *written()])}")


def _makers() -> list[tuple[Mapping[str, Any], Callable[[Any], list[Skeleton]]]]:
    return [
        (formulas.ACTIVATIONS, _activation),
        (formulas.UNARY, _unary),
        (formulas.BINARY, _binary),
        (formulas.LOSSES, _loss),
        (formulas.PASSES, _pass),
        (formulas.PENALTIES, _penalty),
        (formulas.CONSTRAINTS, _constraint),
        (formulas.RULES, _rule),
    ]


def _derivative(row: formulas.Activation) -> Kernel:
    formula = "; ".join(row.derivative.splitlines())
    what = f"dx = dy * {row.name}', the derivative and its product with dy fused; {row.name}' = {formula}"
    return Kernel(f"{row.name}_backward", {"dx": row.backward_graph()}, what)


def _activation(row: formulas.Activation) -> list[Skeleton]:
    """Bias and activation, whose pre-activation is kept in x only if the derivative is written in it; the derivative,
    without and with the gradient of the bias."""
    x = formulas.apply("+", formulas.name("x"), formulas.name("b"))
    graph = {"y": row.forward_graph(x)} | ({"x": x} if "x" in row.needs else {})
    equation = f"x += b, y = {row.name}(x)" if "x" in graph else f"y = {row.name}(x + b)"
    what = f"{equation}, bias and activation fused; {row.name}(x) = {row.forward}"
    dx = row.backward_graph()
    key = "dy" if dx == formulas.name("dy") else "dx"
    return [
        Kernel(f"{row.name}_forward", graph, what, per_column=("b",)),
        _derivative(row),
        Columns(f"{row.name}_backward_bias", {key: dx}, f"the same with the gradient of the bias, sums = Σ_rows {key}"),
    ]


def _unary(row: formulas.Activation) -> list[Skeleton]:
    return [Kernel(f"{row.name}_forward", {"y": row.forward_graph()}, f"y = {row.forward}"), _derivative(row)]


def _binary(row: formulas.Binary) -> list[Skeleton]:
    forward, da, db = (formulas.parse(text)[formulas.RESULT] for text in (row.forward, row.da, row.db))
    return [
        Kernel(f"{row.name}_forward", {"y": forward}, f"y = {row.forward}"),
        Kernel(f"{row.name}_backward", {"da": da, "db": db}, f"da = {row.da}, db = {row.db}, fused"),
        Broadcast(f"{row.name}_broadcast", {"y": forward}, f"y = {row.forward}, the smaller operand repeated"),
    ]


def _loss(row: formulas.Loss) -> list[Skeleton]:
    """Its sum, its derivative, and both in one pass as a training step has them, without and with a weight w for each
    row; k is the share of one element."""
    plain = row.graph(formulas.name("dy"))
    scale, table = formulas.value("scale * s0"), {"s0": formulas.value("1 / weight")}
    dx = f"dx = scale / weight * k * ({row.derivative})"
    return [
        Sum(f"{row.name}_forward", {"total": plain["total"]}, f"total = Σ k * ({row.forward})", single=("k",)),
        Kernel(f"{row.name}_backward", {"dx": plain["dx"]}, f"dx = dy * k * ({row.derivative})", single=("dy", "k")),
        Sum(
            f"{row.name}_step", row.graph(scale), f"total = Σ k * ({row.forward}), {dx}, fused",
            single=("k", "scale"), table=table, wide=("scale",),
        ),
        Sum(
            f"{row.name}_step_weighted", row.graph(scale, weighted=True),
            f"the same, both times w of the row: total = Σ w * k * ({row.forward})",
            single=("k", "scale"), table=table, wide=("scale", "w"), per_row=("w",),
        ),
    ]  # fmt: skip


def _pass(row: formulas.Pass) -> list[Skeleton]:
    return [Kernel(f"{row.name}_gradient", row.graph(), f"g = {row.text}", single=row.single)]


def _penalty(row: formulas.Penalty) -> list[Skeleton]:
    graph, scalars = formulas.hoist(row.graph(), ("p", "g", "scale"))
    what = f"total = Σ weight * ({row.value}), g += scale * ({row.derivative}), fused"
    return [Sum(f"{row.name}_penalty", graph, what, single=("scale",), table=scalars)]


def _constraint(row: formulas.Constraint) -> list[Skeleton]:
    measure, value = (formulas.parse(text)[formulas.RESULT] for text in (row.measure, row.value))
    return [
        Columns(f"{row.name}_columns", {"each": measure}, f"each = {row.measure}, sums = Σ_rows each"),
        Kernel(row.name, {"w": value}, f"w = {row.value}", per_column=("n",), single=("c",)),
    ]


def _rule(row: formulas.Rule) -> list[Skeleton]:
    """`before` and `update`, whose scalars the host evaluates once per step into a table; then as they run in mixed
    precision, with a copy of the weights in half of it."""
    arrays = ("p", "g", *row.state)
    made: list[Skeleton] = []
    for part, text in (("before", row.before), ("update", row.update)):
        if text:
            graph, scalars = formulas.hoist(row.graph(before=part == "before"), arrays)
            what = "\n".join(["these lines in one pass", *(f"    {line}" for line in text.splitlines() if line)])
            half = "the same by groups, with q = p in half precision"
            made += [
                Kernel(f"{row.name}_{part}", graph, what, table=scalars, row=1),
                Kernel(
                    f"{row.name}_{part}_half", graph | {"q": graph["p"]}, half, table=scalars, wide=arrays, row=1,
                    groups=True, advance=part == "update",
                ),
            ]  # fmt: skip
    return made


if __name__ == "__main__":
    print(source(*sys.argv[1:]), end="")
