"""L1 and L2 in the loss: what the weight matrices add to it and to the gradient, in one launch."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.arena import Arena
from gpubackprop.backends.base import Graph, StepTable, Tally
from gpubackprop.checks import number
from gpubackprop.formulas import PENALTIES, describe
from gpubackprop.moments import columns_of, values_of
from gpubackprop.plan import empty, release, run

__all__ = ["Penalty", "Strength"]

Strength = float | Callable[[float], float]


@dataclass(frozen=True)
class Penalty:
    """l1 · Σ|w| + ½ · l2 · Σw², added to a batch's mean loss: numbers, or functions of the batch's rows."""

    l1: Strength = 0.0
    l2: Strength = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            if not callable(value := getattr(self, f.name)):
                object.__setattr__(self, f.name, number("Trainer", f.name, value, ">= 0"))

    @cached_property
    def name(self) -> str:
        """The row of PENALTIES; empty if there is none."""
        return {(True, False): "l1", (False, True): "l2", (True, True): "elastic_net"}.get(
            (bool(self.l1), bool(self.l2)), ""
        )

    @cached_property
    def _graph(self) -> Graph:
        return PENALTIES[self.name].graph() if self.name else {}

    @cached_property
    def columns(self) -> list[str]:
        """The columns of the step table that its launch reads."""
        return [describe(e) for e in columns_of(self._graph, ("p", "g", "scale"))]

    def table_rows(self, rows: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """Each column at steps whose batches have so many rows."""
        named: dict[str, Any] = {"rows": rows}
        for f in fields(self):
            value = getattr(self, f.name)
            each = (
                {n: number("Trainer", f"{f.name}({n:g})", value(n), ">= 0") for n in set(rows)}
                if callable(value)
                else {}
            )
            named[f.name] = np.array([each[n] for n in rows]) if each else value
        return {describe(e): values_of(e, named, rows) for e in columns_of(self._graph, ("p", "g", "scale"))}

    def record(self, arena: Arena, table: StepTable, tally: Tally, *, gradient: bool = True) -> None:
        """Launch: the penalty, times the batch's rows, to the tally, and its gradient to the arena's."""
        if not (self.name and arena.matrices):
            return
        back, end = arena.backend, arena.matrices
        p, g = arena.weights[0, :end], arena.gradients[0, :end] if gradient else None
        total, row = empty(back, (), table.control.dtype), PENALTIES[self.name]
        reads = {"p": p} | ({"g": g, "scale": table.control[:1]} if gradient else {})
        graph = {k: e for k, e in self._graph.items() if gradient or k == "total"}
        what = f"total = Σ rows · ({row.value}); g += {row.derivative}" if gradient else f"total = Σ ({row.value})"
        run(total, lambda: back.elementwise_sum(
            f"{self.name} penalty", graph, reads, total, {"g": g} if gradient else {}, table=table, tally=tally,
            what=what))  # fmt: skip
        release(total)
