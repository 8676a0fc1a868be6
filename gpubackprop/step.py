"""One training step as a plan: feed, gradient and update over fixed buffers, and the sums it leaves behind."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Backend, Buffer, CaptureError, Staging, StepTable, Workspace, use_tf32
from gpubackprop.backprop import backward
from gpubackprop.checks import warn
from gpubackprop.formulas import PASSES
from gpubackprop.losses import Objective
from gpubackprop.metrics import Metric
from gpubackprop.model import Layer, training
from gpubackprop.moments import Moments
from gpubackprop.penalty import Penalty
from gpubackprop.plan import Plan, run, within
from gpubackprop.precision import Precision
from gpubackprop.rerun import calls_own_code, replay_checked
from gpubackprop.spread import spread
from gpubackprop.tensor import Tensor

__all__ = ["Graphs", "Keeper", "Source", "StagedSource", "Step", "Sums", "Terms"]

Array = npt.NDArray[Any]


class Source:
    """Training data on the device, with weights w of its rows if they have any, and the order they are taken in."""

    def __init__(self, backend: Backend, x: Buffer, y: Buffer, w: Buffer | None = None) -> None:
        self.backend = backend
        self.x, self.y, self.w = x, y, w
        self.order = backend.asarray(np.arange(len(x)))

    def begin(self, order: Array | None, sizes: Array) -> Array:
        """Start an epoch in this order (None: as before) of batches of these sizes: the offset of each."""
        if order is not None:
            self.backend.write(self.order, order)
        return np.cumsum(sizes) - sizes

    def before(self, i: int) -> None:
        """Called before the i-th step of the epoch is given to the device."""

    def close(self) -> None:
        """Wait until the device has done with the data, wherever the epoch ended."""
        self.backend.synchronize()


class StagedSource(Source):
    """Training data on the host: batches are gathered into pinned memory and copied beside the step before theirs."""

    def __init__(self, backend: Backend, staging: Staging, rows: int) -> None:
        super().__init__(backend, staging.x, staging.y, staging.w)
        self.staging, self.permutation = staging, np.arange(rows)
        self.starts = self.sizes = np.zeros(0, np.int64)

    def begin(self, order: Array | None, sizes: Array) -> Array:
        """Start an epoch; batches come to lie in two places in turn."""
        if order is not None:
            self.permutation = order
        self.sizes, self.starts = sizes, np.cumsum(sizes) - sizes
        self._put(0)
        return np.arange(len(sizes)) % 2 * self.staging.rows

    def before(self, i: int) -> None:
        """Send the batch after this one on its way, and have this step wait for its own."""
        self.staging.ready(i % 2)
        if i + 1 < len(self.sizes):
            self._put(i + 1)

    def close(self) -> None:
        """Wait for the batch on its way too."""
        self.staging.wait()
        super().close()

    def _put(self, i: int) -> None:
        start = self.starts[i]
        self.staging.put(i % 2, self.permutation[start : start + self.sizes[i]])


class Sums:
    """Loss and metrics summed over the rows seen, on the device."""

    def __init__(
        self, backend: Backend, metrics: Sequence[Metric], outputs: int, dtype: npt.DTypeLike, labels: bool
    ) -> None:
        self.backend = backend
        self.tally = backend.tally(dtype)
        self.metrics = [(m, m.sums(backend, outputs, dtype, labels)) for m in metrics]
        self.counts = any(sums is None for _, sums in self.metrics)  # the rows right
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.tally.clear()
        for _, sums in self.metrics:
            if sums is not None:
                self.backend.write(sums, 0)

    def add(self, output: Tensor, target: Tensor) -> None:
        """Launch: add a batch to every metric but the rows right, which the loss counts."""
        for metric, sums in self.metrics:
            if sums is not None:
                metric.add(output, target, sums)

    @property
    def bad_step(self) -> int:
        """The first step whose loss was not finite, or 0."""
        return self.tally.read()[1]

    def spread(self, y: Array) -> Array | None:
        """The squared deviations of the targets, column by column, if a metric needs them."""
        return spread(y).squares if any(m.spread for m, _ in self.metrics) else None

    def figures(self, rows: int, squares: Array | None, weight: float) -> dict[str, float]:
        """Mean loss, by weight, and metrics over that many rows of that weight together, whose targets spread so."""
        loss, _, correct = self.tally.read()
        read = self.backend.to_numpy
        values = ((m, np.array([[correct], [0]]) if sums is None else read(sums)) for m, sums in self.metrics)
        return {"loss": loss / weight} | {m.name: m.value(v, rows, squares) for m, v in values}


@dataclass(frozen=True)
class Terms:
    """What a step is recorded by, besides the model: shared by every step of a trainer."""

    objective: Objective
    precision: Precision
    penalty: Penalty
    clip_norm: float  # infinite: no clipping
    clip_value: float
    accumulate: int  # batches to an update
    seed: int


@dataclass(eq=False)
class Step:
    """The step for batches of `rows` rows of an attached source: `run()` records what it meets for the first time, and
    replays the rest.

    With accumulated gradients an update takes several runs: the first clears the gradients, the last updates.
    """

    model: Layer
    terms: Terms
    state: Moments
    table: StepTable
    sums: Sums
    rows: int
    columns: int
    target_shape: tuple[int, ...]  # of one row: () for labels
    weighted: bool
    space: Workspace
    dry: bool = False
    plan: Plan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.backend = backend = self.model.arena.backend
        dtype = np.int64 if self.target_shape == () else self.model.dtype
        self.x = backend.empty((self.rows, self.columns), self.terms.precision.dtype)
        self.target = backend.empty((self.rows, *self.target_shape), dtype)
        self.w = backend.empty((self.rows,), self.model.dtype) if self.weighted else None
        title = f"training step of {self.rows} rows, {self.model.parameter_count:,} parameters"
        self.plan = Plan(backend, title, dry=self.dry, space=self.space)
        self._ready: dict[tuple[bool, bool], Callable[[], object]] = {}
        self._runs = 0
        self._check_at = 2 if calls_own_code(self.model, self.terms.objective) else 0  # a run; 0: never

    def attach(self, source: Source, graphs: "Graphs | None" = None) -> None:
        """Take the batches from this source; the next run binds the feed to it, and is captured after that."""
        self._source, self._graphs = source, graphs

    def detach(self) -> None:
        """Let go of the source and its data."""
        self.plan.discard("feed")
        self._ready.clear()
        del self._source, self._graphs

    def run(self, first: bool = True, last: bool = True) -> None:
        """The pass over a batch, the first or the last of those that an update takes."""
        self._runs += 1
        if (ready := self._ready.get((first, last))) is not None and self._runs != self._check_at:
            ready()
        else:
            ready = self._record(first, last)
            if self._check_at != 2:
                self._ready[first, last] = ready

    def _record(self, first: bool, last: bool) -> Callable[[], object]:
        """Run the sections that are due, recording those that are new; one call that replays them."""
        sections = self._sections(first, last)
        for section in sections:
            if section in self.plan.sections:
                self._replay(section)
            else:
                with self.plan.record(section):
                    getattr(self, f"_{section}")()
        captured = self._graphs.capture(self.plan, sections) if self._graphs and self._check_at != 2 else None
        return captured or self.plan.sequence(*sections)

    def _replay(self, section: str) -> None:
        """Replay the section. If the gradient calls code of a user's, runs 2, 4, 8, … hold it against fresh ones."""
        if section == "gradient" and 0 < self._check_at <= self._runs:
            replay_checked(self.plan, section, self._gradient, self.model)
            self._check_at = 2 * self._runs
        else:
            self.plan.replay(section)

    # ---- the sections

    def _sections(self, first: bool, last: bool) -> list[str]:
        penalized = bool(self.terms.penalty.name)
        due = {"feed": True, "before": first, "gradient": True, "penalty": last and penalized, "update": last}
        return [section for section, wanted in {**due, "pass": not last}.items() if wanted]

    def _feed(self) -> None:
        source = self._source
        run(self.x, lambda: self.backend.feed(
            source.x, source.y, source.order, self.table, self.x, self.target, 1.0))  # fmt: skip
        if source.w is not None and self.w is not None:
            given, w = (a.reshape(-1, 1) for a in (source.w, self.w))
            run(w, lambda: self.backend.feed(given, None, source.order, self.table, w, None, 1.0))

    def _before(self) -> None:
        """What moves the weights ahead of the gradient; gradients that batches add up begin at zero."""
        self._rule(before=True)
        gradients = self.model.arena.gradients
        if self.terms.accumulate > 1:
            run(gradients, lambda: self.backend.fill(gradients, 0.0))

    def _gradient(self) -> None:
        """Forward, loss, backward; every trained slice is written, by a gradient or by zeros."""
        back, arena, adds = self.backend, self.model.arena, self.terms.accumulate > 1
        gradients = arena.gradients
        with lowered(self.model, self.terms.precision.dtype), use_tf32(self.terms.precision.tf32):
            with training(self.terms.seed, self.table):
                output = self.model(Tensor(self.x, back))
                target, sums = Tensor(self.target, back), self.sums
                weights = None if self.w is None else Tensor(self.w, back)
                root, dy = self.terms.objective.seed(output, target, self.table, sums.tally, sums.counts, weights)
            self.sums.add(output, target)
            written = backward(root, dy, accumulate=adds) if root.requires_grad else set()
        for key, p in arena.parameters.items():
            if p not in written and not adds:
                dw = arena.slice(gradients, key)
                run(dw, lambda dw=dw: back.fill(dw, 0.0))  # type: ignore[misc]

    def _penalty(self) -> None:
        self.terms.penalty.record(self.model.arena, self.table, self.sums.tally)

    def _pass(self) -> None:
        """On to the next batch, without an update."""
        run(self.table.control, lambda: self.backend.advance(self.table, applies=False))

    def _update(self) -> None:
        back, g, limit = self.backend, self.model.arena.gradients, self.terms.clip_value
        if limit < math.inf:
            bound = back.asarray(np.array([[limit]], g.dtype))
            reads = {"g": g, "limit": bound, "scale": self.table.control[:1].reshape(1, 1)}
            clipped, what = PASSES["clip_value"].graph(), f"g within ±{limit:g}"
            run(g, lambda: back.elementwise("clip value", clipped, reads, {"g": g}, what=what))
        self._rule()
        self._constrain()

    def _constrain(self) -> None:
        """What layers want of their weights after an update, and of the copies that are computed with."""
        with lowered(self.model, self.terms.precision.dtype):
            for _, layer in self.model.named_layers():
                with within(layer._path):
                    for p in layer.constrain():
                        if self.terms.precision.mixed:
                            run(p.buffer, lambda p=p: self.backend.copy(p.master, p.buffer))  # type: ignore[misc]

    def _rule(self, *, before: bool = False) -> None:
        precision = self.terms.precision
        copy = self.model.arena.copy_in(precision.dtype) if precision.mixed else None
        self.state.record(self.table, self.terms.clip_norm, precision.dynamic, copy, before=before)


class Graphs:
    """Steps captured as CUDA graphs, until one cannot be: then none is, and a warning says why."""

    def __init__(self) -> None:
        self.wanted = True

    def capture(self, plan: Plan, sections: Sequence[str]) -> Callable[[], object] | None:
        """These sections of the plan as one launch, or None."""
        if not self.wanted:
            return None
        try:
            return plan.backend.capture([launch for section in sections for launch in plan.sections[section]])
        except CaptureError as error:
            self.wanted = False
            warn(f"cuda_graph: {error}; steps are launched one by one", RuntimeWarning)
            return None


@contextmanager
def lowered(model: Layer, dtype: npt.DTypeLike) -> Iterator[None]:
    """Inside, the model computes with its parameters in this type."""
    with model.arena.lowered(dtype), model.statistics.lowered(dtype):
        yield


class Keeper:
    """A copy of weights, statistics and moments after the last good epoch, and launches that take and restore it."""

    def __init__(self, model: Layer, state: Moments) -> None:
        back = model.arena.backend
        live = [b for b in (model.arena.weights, model.statistics.weights, *state.moments.values()) if b.size]
        copies = [back.empty(b.shape, b.dtype) for b in live]
        self.nbytes = sum(int(b.nbytes) for b in copies)
        self._statistics = model.statistics
        self._kept = dict(zip(map(id, live), copies, strict=True))
        self._extremes: list[list[Buffer]] = []  # of the weights, and of the statistics if there are any
        self.plan = Plan(back, "keeping the last good epoch", dry=True)
        with self.plan.record("range"):
            for x in (b for b in (model.arena.weights, model.statistics.weights) if b.size):
                self._extremes.append([back.empty((), model.dtype) for _ in range(2)])
                for kind, out in zip(("max", "min"), self._extremes[-1], strict=True):
                    run(out, lambda kind=kind, x=x, out=out: back.reduce(kind, x, (0, 1), out))  # type: ignore[misc]
        for section, pairs in (("keep", zip(live, copies, strict=True)), ("restore", zip(copies, live, strict=True))):
            with self.plan.record(section):
                for x, out in pairs:
                    run(out, lambda x=x, out=out: back.copy(x, out))  # type: ignore[misc]

    def damage(self) -> str:
        """What of the model is not finite, for people; empty if nothing is."""
        self.plan.replay("range")
        read = self.plan.backend.to_numpy
        weights, *statistics = (all(bool(np.isfinite(read(e))) for e in extremes) for extremes in self._extremes)
        if not weights:
            return "a weight"
        return "" if all(statistics) else self._lost()

    def _lost(self) -> str:
        """The first statistic that was finite when the copy was taken and is not now: a layer may hold others."""
        held, read = self._statistics, self.plan.backend.to_numpy
        lost = ~np.isfinite(read(held.weights)) & np.isfinite(read(self._kept[id(held.weights)]))
        return next((f"the running statistic {key!r}" for key in held.parameters if held.slice(lost, key).any()), "")

    def keep(self) -> None:
        """Take the copy."""
        self.plan.replay("keep")

    def restore(self) -> None:
        """Put it back."""
        self.plan.replay("restore")
