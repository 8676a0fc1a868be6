"""One training step as a plan: feed, before, gradient and update over fixed buffers, and the sums it leaves behind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Backend, Buffer, StepTable, Workspace
from gpubackprop.backprop import backward
from gpubackprop.formulas import name
from gpubackprop.losses import Objective
from gpubackprop.metrics import Metric
from gpubackprop.model import Layer, training
from gpubackprop.optimizers import State
from gpubackprop.plan import Plan, run
from gpubackprop.tensor import Tensor

__all__ = ["SECTIONS", "Keeper", "Source", "Step", "Sums"]

Array = npt.NDArray[Any]
SECTIONS = ("feed", "before", "gradient", "update")


@dataclass(frozen=True)
class Source:
    """Training data on the device and the order its rows are taken in."""

    x: Buffer
    y: Buffer
    order: Buffer


class Sums:
    """Loss and metrics summed over the rows seen, on the device."""

    def __init__(
        self, backend: Backend, metrics: Sequence[Metric], outputs: int, dtype: npt.DTypeLike, labels: bool
    ) -> None:
        self.backend = backend
        self.loss = backend.empty((), np.float64)
        self.bad_step = backend.empty((), np.int64)
        self.metrics = [(m, m.sums(backend, outputs, dtype, labels)) for m in metrics]
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        for buffer in (self.loss, self.bad_step, *(s for _, s in self.metrics)):
            buffer[...] = 0

    def mean_loss(self, rows: int) -> float:
        """The mean loss over that many rows."""
        return float(self.backend.to_numpy(self.loss)) / rows

    def figures(self, rows: int, y: Array) -> dict[str, float]:
        """Mean loss and metrics over that many rows, whose targets are y."""
        read = self.backend.to_numpy
        return {"loss": self.mean_loss(rows)} | {m.name: m.value(read(s), rows, y) for m, s in self.metrics}


@dataclass(eq=False)
class Step:
    """The step for batches of `rows` rows of an attached source: `run()` records it the first time, then replays it."""

    model: Layer
    objective: Objective
    state: State
    table: StepTable
    sums: Sums
    seed: int
    rows: int
    columns: int
    target_shape: tuple[int, ...]  # of one row: () for labels
    space: Workspace
    dry: bool = False
    run: Callable[[], object] = field(init=False)

    def __post_init__(self) -> None:
        self.backend = backend = self.model.arena.backend
        dtype = np.int64 if self.target_shape == () else self.model.dtype
        self.x = backend.empty((self.rows, self.columns), self.model.dtype)
        self.target = backend.empty((self.rows, *self.target_shape), dtype)
        self.root = backend.empty((), self.model.dtype)
        title = f"training step of {self.rows} rows, {self.model.parameter_count:,} parameters"
        self.plan = Plan(backend, title, dry=self.dry, space=self.space)

    def attach(self, source: Source) -> None:
        """Take the batches from this source; the next run binds the feed to it."""
        self.run = partial(self._first, source)

    def detach(self) -> None:
        """Let go of the source and its data."""
        self.plan.discard("feed")
        del self.run

    def _first(self, source: Source) -> None:
        plan, table = self.plan, self.table
        with plan.record("feed"):
            run(self.x, lambda: self.backend.feed(source.x, source.order, table, self.x))
            run(self.target, lambda: self.backend.feed(source.y, source.order, table, self.target))
        if "gradient" in plan.sections:
            plan.replay(*SECTIONS[1:])
        else:
            for section in SECTIONS[1:]:
                plan.discard(section)  # what an error cut short
            with plan.record("before"):
                self.state.record(table, before=True)
            with plan.record("gradient"):
                self._gradient()
            with plan.record("update"):
                self.state.record(table)
                run(self.x, lambda: self.backend.advance(table))
        self.run = plan.sequence(*SECTIONS)

    def _gradient(self) -> None:
        """Forward, loss, backward; every trained slice is written, by a gradient or by zeros."""
        back, sums = self.backend, self.sums
        gradients = self.model.arena.gradients
        with training(self.seed, self.table):
            output = self.model(Tensor(self.x, back))
            target = Tensor(self.target, back)
            total = self.objective.total(output, target)
        run(total.data, lambda: back.accumulate_loss(total.data, self.table, sums.loss, sums.bad_step))
        for metric, sums_ in sums.metrics:
            metric.add(output, target, sums_)
        share = {"dL": name("1 / rows")}
        run(self.root, lambda: back.elementwise("seed", share, {}, {"dL": self.root}, table=self.table))
        written = backward(total, self.root.reshape(total.shape)) if total.requires_grad else set()
        for key, p in self.model.arena.parameters.items():
            if p not in written:
                dw = self.model.arena.slice(gradients, key)
                run(dw, lambda dw=dw: back.fill(dw, 0.0))  # type: ignore[misc]


class Keeper:
    """A copy of weights, statistics and moments after the last good epoch, and launches that take and restore it."""

    def __init__(self, model: Layer, state: State) -> None:
        back = model.arena.backend
        live = [b for b in (model.arena.weights, model.statistics.weights, *state.moments.values()) if b.size]
        copies = [back.empty(b.shape, b.dtype) for b in live]
        extremes = [back.empty((), model.dtype) for _ in range(2)]
        self._extremes = extremes
        self.plan = Plan(back, "keeping the last good epoch", dry=True)
        weights = model.arena.weights
        with self.plan.record("range"):
            for kind, out in zip(("max", "min"), extremes, strict=True):
                run(weights, lambda kind=kind, out=out: back.reduce(kind, weights, (0, 1), out))  # type: ignore[misc]
        for section, pairs in (("keep", zip(live, copies, strict=True)), ("restore", zip(copies, live, strict=True))):
            with self.plan.record(section):
                for x, out in pairs:
                    run(out, lambda x=x, out=out: back.copy(x, out))  # type: ignore[misc]

    def finite(self) -> bool:
        """Whether every weight is finite."""
        self.plan.replay("range")
        return all(bool(np.isfinite(self.plan.backend.to_numpy(e))) for e in self._extremes)

    def keep(self) -> None:
        """Take the copy."""
        self.plan.replay("keep")

    def restore(self) -> None:
        """Put it back."""
        self.plan.replay("restore")
