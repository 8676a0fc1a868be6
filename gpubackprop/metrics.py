"""Metrics: figures that accumulate on the device, batch by batch, and are read once per epoch."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Backend, Buffer, Graph
from gpubackprop.formulas import parse
from gpubackprop.names import unknown
from gpubackprop.plan import empty, release, run
from gpubackprop.tensor import Tensor

__all__ = ["METRICS", "Metric", "metric"]

Array = npt.NDArray[Any]


class Metric:
    """Column sums of an elementwise figure of output x and target t, and what the sums over all rows amount to.

    Targets that are labels (n,) are counted by the largest output instead.
    """

    def __init__(self, name: str, text: str, value: Callable[[Array, int, Array], float]) -> None:
        self.name = name
        self.graph: Graph = {"e": parse(text)["result"]}
        self._value = value

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}  # of METRICS: the graph is interned

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(METRICS[state["name"]]))

    def sums(self, backend: Backend, columns: int, dtype: npt.DTypeLike, labels: bool) -> Buffer | None:
        """A zeroed accumulator; None for labels, which the tally counts."""
        if labels and self.name != "accuracy":
            raise ValueError(f"metric {self.name!r} needs targets like the outputs, but y holds labels; use 'accuracy'")
        if labels:
            return None
        buffer = backend.empty((columns,), dtype)
        backend.write(buffer, 0)
        return buffer

    def add(self, output: Tensor, target: Tensor, sums: Buffer) -> None:
        """Launch: sums += this batch's."""
        back, each = output.backend, empty(output.backend, output.shape, sums.dtype)
        reads = {"x": output.buffer, "t": target.buffer}
        run(each, lambda: back.elementwise_columns(self.name, self.graph, reads, each, sums, accumulate=True))
        release(each)

    def value(self, sums: Array, rows: int, target: Array) -> float:
        """The figure over all rows."""
        return float(self._value(np.asarray(sums, np.float64), rows, target))


def _r2(squares: Array, rows: int, target: Array) -> float:
    """1 − Σ(t − x)² / Σ(t − t̄)² per output, averaged; for a constant target 1 if it is met exactly, else 0. Of one row
    it is NaN."""
    if rows < 2:
        return math.nan
    spread = target.astype(np.float64).var(0) * rows
    constant = spread == 0
    each = 1 - squares / np.where(constant, 1, spread)
    return float(np.where(constant, squares == 0, each).mean())


def _mean(sums: Array, rows: int, target: Array) -> float:
    return float(sums.mean()) / rows


METRICS = {
    m.name: m
    for m in (
        Metric("accuracy", "where(x > 0, where(t > 0.5, 1, 0), where(t > 0.5, 0, 1))", _mean),
        Metric("r2", "(x - t) * (x - t)", _r2),
        Metric("mse", "(x - t) * (x - t)", _mean),
        Metric("mae", "abs(x - t)", _mean),
    )
}


def metric(name: str) -> Metric:
    """The metric of that name."""
    if name not in METRICS:
        raise ValueError(unknown("metric", name, sorted(METRICS)))
    return METRICS[name]
