"""Metrics: figures that accumulate on the device, batch by batch, and are read once per epoch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop import ops
from gpubackprop.backends.base import Backend, Buffer, Graph
from gpubackprop.formulas import RESULT, TWO_SUM, parse, value
from gpubackprop.names import unknown
from gpubackprop.operands import graph
from gpubackprop.plan import empty, release, run
from gpubackprop.tensor import Tensor

__all__ = ["METRICS", "Metric", "metric"]

Array = npt.NDArray[Any]
MEANS = {"exp": "exp(x)", "sigmoid": "sigmoid(x)"}  # the mean that an output x predicts, by the loss's head


@dataclass(frozen=True)
class Metric:
    """Column sums of an elementwise figure of prediction x and target t, and the metric of the sums over all rows.

    x is the mean that the output predicts under the loss's head, or with raw=True the output itself. Targets that are
    labels (n,) are counted by the largest output instead.
    """

    name: str
    text: str
    figure: Callable[[Array, int, Array | None], float]  # of the sums, the rows and the targets' squared deviations
    raw: bool = False
    spread: bool = False  # whether it needs those
    squares: bool = False  # whether it adds up squares
    head: str | None = None

    def sums(self, backend: Backend, columns: int, dtype: npt.DTypeLike, labels: bool) -> Buffer | None:
        """A zeroed accumulator, high and low parts (2, columns); None for labels, which the tally counts."""
        if labels and self.name != "accuracy":
            raise ValueError(f"metric {self.name!r} needs targets like the outputs, but y holds labels; use 'accuracy'")
        if labels:
            return None
        buffer = backend.empty((2, columns), dtype)
        backend.write(buffer, 0)
        return buffer

    def add(self, output: Tensor, target: Tensor, sums: Buffer) -> None:
        """Launch: sums += this batch's, which are added up in the buffer's type and carried over in twice its bits."""
        back, dtype = output.backend, sums.dtype
        if self.head == "softmax" and not self.raw:
            output = ops.softmax(output.detach())
        each, part = empty(back, output.shape, dtype), empty(back, output.shape[1:], dtype)
        reads, sum_of = {"x": output.buffer, "t": target.buffer}, _graph(self.text, None if self.raw else self.head)
        run(each, lambda: back.elementwise_columns(self.name, sum_of, reads, each, part))
        parts = {"high": sums[0], "low": sums[1]}
        what = "sums += the batch's, in high and low parts"
        run(part, lambda: back.elementwise(
            f"{self.name} sums", _two_sum(), parts | {"part": part}, parts, what=what))  # fmt: skip
        release(each)
        release(part)

    def value(self, sums: Array, rows: int, spread: Array | None) -> float:
        """The metric over all rows."""
        high, low = np.asarray(sums, np.float64)
        return float(self.figure(np.where(np.isfinite(high), high + low, high), rows, spread))


@cache
def _graph(text: str, head: str | None) -> Graph:
    return {"e": parse(text, given={"x": value(MEANS.get(str(head), "x"))})[RESULT]}


@cache
def _two_sum() -> Graph:
    lines = graph(TWO_SUM)
    return {k: lines[k] for k in ("high", "low")}


def _r2(squares: Array, rows: int, spread: Array | None) -> float:
    """1 − Σ(t − x)² / Σ(t − t̄)² per output, averaged; for a constant target 1 if it is met exactly, else 0. Of one row
    it is NaN."""
    if rows < 2 or spread is None:
        return math.nan
    constant = spread == 0
    each = 1 - squares / np.where(constant, 1, spread)
    return float(np.where(constant, squares == 0, each).mean())


def _mean(sums: Array, rows: int, _: Array | None) -> float:
    return float(sums.mean()) / rows


METRICS = {
    m.name: m
    for m in (
        Metric("accuracy", "where(x > 0, where(t > 0.5, 1, 0), where(t > 0.5, 0, 1))", _mean, raw=True),
        Metric("r2", "(x - t) * (x - t)", _r2, spread=True, squares=True),
        Metric("mse", "(x - t) * (x - t)", _mean, squares=True),
        Metric("mae", "abs(x - t)", _mean),
    )
}


def metric(name: str, head: str | None = None) -> Metric:
    """The metric of that name, of outputs that predict means as the head says."""
    if name not in METRICS:
        raise ValueError(unknown("metric", name, sorted(METRICS)))
    return replace(METRICS[name], head=head)
