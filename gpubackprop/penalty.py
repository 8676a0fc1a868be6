"""L1 and L2 in the loss: what the weight matrices add to it and to the gradient, in one launch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop import ops
from gpubackprop.arena import Arena
from gpubackprop.backends.base import StepTable, Tally
from gpubackprop.checks import number
from gpubackprop.formulas import PENALTIES, RESULT, Expr, describe, free_names, parse
from gpubackprop.moments import columns_of, values_of
from gpubackprop.plan import empty, run
from gpubackprop.tensor import Tensor

__all__ = ["Penalty", "Strength"]

Floats = npt.NDArray[np.float64]
Strength = float | Callable[[float], float]


@dataclass(frozen=True)
class Penalty:
    """l1 · Σ|w| + ½ · l2 · Σw², added to a batch's mean loss: numbers, or functions of how many rows the batch has,
    by weight where rows have weights."""

    l1: Strength = 0.0
    l2: Strength = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            if not callable(value := getattr(self, f.name)):
                object.__setattr__(self, f.name, number("Trainer", f.name, value, ">= 0"))

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # without the graphs, which are interned

    @cached_property
    def name(self) -> str:
        """The row of PENALTIES; empty if there is none."""
        return {(True, False): "l1", (False, True): "l2", (True, True): "elastic_net"}.get(
            (bool(self.l1), bool(self.l2)), ""
        )

    @cached_property
    def _scalars(self) -> dict[str, Expr]:
        """The columns of the step table that its launch reads, and what they mean."""
        graph = PENALTIES[self.name].graph() if self.name else {}
        return {describe(e): e for e in columns_of(graph, ("p", "g", "scale"))}

    @property
    def columns(self) -> list[str]:
        """The columns of the step table that its launch reads."""
        return list(self._scalars)

    def table_rows(self, weight: Floats) -> dict[str, Floats]:
        """Each column at steps whose batches weigh so much: without weights, as many as their rows."""
        if not self._scalars:
            return {}
        each = {w: self._strengths(w) for w in set(weight.tolist())}
        named = {key: np.array([each[w][key] for w in weight.tolist()]) for key in ("l1", "l2")}
        return {column: values_of(e, named | {"weight": weight}, weight) for column, e in self._scalars.items()}

    def record(self, arena: Arena, table: StepTable, tally: Tally) -> None:
        """Launch: the penalty, times the batch's weight, to the tally, and its gradient to the arena's."""
        if not (self.name and arena.matrices):
            return
        back, row = arena.backend, PENALTIES[self.name]
        p, g = (buffer[0, : arena.matrices] for buffer in (arena.weights, arena.gradients))
        total = empty(back, (), table.control.dtype)
        reads = {"p": p, "g": g, "scale": table.control[:1]}
        what = f"total = Σ weight · ({row.value}); g += {row.derivative}"
        label, graph = f"{row.name} penalty", row.graph()
        run(total, lambda: back.elementwise_sum(
            label, graph, reads, total, {"g": g}, table=table, tally=tally, what=what))  # fmt: skip

    def value(self, arena: Arena, weight: float) -> float:
        """What it adds to the mean loss of rows that weigh so much, as the model's weights are."""
        if not (self.name and arena.matrices):
            return 0.0
        back, total = arena.backend, arena.backend.empty((), arena.dtype)
        strengths = {k: back.asarray(np.array([v], arena.dtype)) for k, v in self._strengths(weight).items()}
        graph = {"total": parse(PENALTIES[self.name].value)[RESULT]}
        reads = {"p": arena.weights[0, : arena.matrices]} | {
            k: strengths[k] for k in free_names(*graph.values()) if k != "p"
        }
        back.elementwise_sum(f"{self.name} value", graph, reads, total).run()
        return float(back.to_numpy(total))

    def added(self, total: Tensor, weights: Iterable[Tensor], rows: float) -> Tensor:
        """A mean loss of so many rows with the penalty of these weights."""
        strength = self._strengths(rows)
        for w in weights:
            if w.ndim >= 2 and self.name:
                total = total + strength["l1"] * ops.abs(w).sum() + 0.5 * strength["l2"] * (w * w).sum()
        return total

    def _strengths(self, weight: float) -> dict[str, float]:
        """l1 and l2 for a batch that weighs so much; a function is not asked about one that weighs nothing."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            k: number("Trainer", f"{k}({weight:g})", v(weight) if weight else 0.0, ">= 0") if callable(v) else v
            for k, v in found.items()
        }
