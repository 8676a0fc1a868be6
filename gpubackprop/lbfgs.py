"""LBFGS: a step whose direction and length are found on the host, from whole-batch losses and gradients."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.arena import Arena, Parameter
from gpubackprop.backends.threads import one_blas_thread
from gpubackprop.moments import HostMoments, Moments
from gpubackprop.optimizers import LBFGS
from gpubackprop.plan import Plan
from gpubackprop.step import Step

__all__ = ["Curvature", "SearchStep"]

Vector = npt.NDArray[np.float64]
DECREASE, CURVATURE = 1e-4, 0.9  # c₁ and c₂ of the strong Wolfe conditions
GROWTH = 10.0  # of a trial step, at most
DRAWS = ("dropout", "noise")  # launches
MARGIN = 0.1  # of an interval, that a trial step in it stays away from the ends


class Curvature(Moments):
    """The last changes of weights and gradients, from which the inverse Hessian is estimated; no launches."""

    def __init__(self, optimizer: LBFGS, arena: Arena) -> None:
        super().__init__(optimizer, arena)
        self.search = optimizer
        self.pairs: list[tuple[Vector, Vector]] = []

    def direction(self, g: Vector) -> Vector:
        """−H g, by two loops over the pairs (Nocedal & Wright, "Numerical Optimization", Algorithm 7.4)."""
        q, shares = -g, []
        for s, y in reversed(self.pairs):
            share = (s @ q) / (y @ s)
            shares.append(share)
            q -= share * y
        if self.pairs:
            s, y = self.pairs[-1]
            q *= (s @ y) / (y @ y)
        for (s, y), share in zip(self.pairs, reversed(shares), strict=True):
            q += (share - (y @ q) / (y @ s)) * s
        return q

    def host(self) -> HostMoments:
        pairs = enumerate(self.pairs)
        return {f"{what}{i}": self._named(v) for i, pair in pairs for what, v in zip("sy", pair, strict=True)}

    def load(self, moments: HostMoments) -> None:
        shapes = {key: p.shape for key, p in self.arena.parameters.items()}
        if all({key: v.shape for key, v in values.items()} == shapes for values in moments.values()):
            found = {name: self._vector(values) for name, values in moments.items()}
            self.pairs = [(found[f"s{i}"], found[f"y{i}"]) for i in range(len(found) // 2)]

    def hold(self, edges: Mapping[Parameter, npt.NDArray[np.bool_]]) -> None:
        """Forget the pairs if a weight that moved has no edge now: what is left of one may have negative curvature."""
        for key, p in self.arena.parameters.items():
            if p in edges and any(self._named(v)[key][~edges[p]].any() for pair in self.pairs for v in pair):
                self.pairs = []

    def _named(self, vector: Vector) -> dict[str, Vector]:
        return {key: self.arena.slice(vector[None], key) for key in self.arena.parameters}

    def _vector(self, values: dict[str, npt.NDArray[Any]]) -> Vector:
        vector = np.zeros(self.arena.size)
        for key, value in values.items():
            self.arena.slice(vector[None], key)[:] = value
        return vector

    def learn(self, s: Vector, y: Vector) -> None:
        """Take a change of weights and of gradients, if the curvature along it is positive."""
        if s @ y > np.finfo(np.float64).eps * (y @ y):
            self.pairs = [*self.pairs, (s, y)][-self.search.history :]


@dataclass(frozen=True)
class Point:
    """Where a line was looked at: the step's length, loss, slope along the line, weights, gradient."""

    length: float
    loss: float
    slope: float
    weights: Vector
    gradient: Vector


class SearchStep(Step):
    """A step by line search: `run()` evaluates loss and gradient, penalties included, as often as that takes.

    It leaves the loss and the metrics of the weights it ends with.
    """

    state: Curvature
    _here: Point | None = None  # where the last step ended
    _last: Point | None = None  # where the loss was last evaluated, in this one

    @one_blas_thread()
    def run(self, first: bool = True, last: bool = True) -> None:
        if not self._ready:
            self._runs += 1
            ready = self._record(True, True)
            self._refuse()
            self._ready[True, True] = ready
            self._weight = self.rows if self.w is None else float(self.backend.to_numpy(self.w).sum(dtype=np.float64))
            self._here = None
        if self.dry:
            return
        weights, self._last = self._read(self.model.arena.weights), None
        here = self._here
        if here is None or (here.weights != weights).any():
            here = self._evaluate(weights)
        if (minimizer := self.state.search.minimizer) is not None:
            self._end(here, self._evaluate(minimizer(self._loss, weights)))
            return
        if not math.isfinite(here.loss) or np.abs(here.gradient).max(initial=0) <= self.state.search.tolerance:
            self._end(here, here)
            return
        d = self.state.direction(here.gradient)
        if (slope := float(here.gradient @ d)) >= 0:
            self.state.pairs, d = [], -here.gradient
            slope = float(here.gradient @ d)
        first_length = 1.0 if self.state.pairs else min(1.0, 1 / float(np.abs(here.gradient).sum()))
        start = Point(0.0, here.loss, slope, here.weights, here.gradient)

        def at(length: float) -> Point:
            return self._evaluate(weights + length * d, length, d)

        found = strong_wolfe(at, start, self.state.search.lr * first_length, self.state.search.evaluations)
        self.state.learn(found.weights - here.weights, found.gradient - here.gradient)
        self._end(here, found)

    def _refuse(self) -> None:
        """Raise where a search would go wrong: under bounds of the weights, or draws that differ from step to step."""
        asked = Plan(self.backend, dry=True)
        with asked.record("update"):
            self._constrain()
        if asked.launches:
            raise ValueError(f"Trainer: LBFGS searches without bounds, but layer {asked.launches[0].layer!r} has them; "
                             "leave out max_norm, or choose another optimizer")  # fmt: skip
        if drawn := [launch for launch in self.plan.sections["gradient"] if launch.name in DRAWS]:
            remedy = f"leave out {drawn[0].name}, or choose another optimizer"
            raise ValueError(f"Trainer: LBFGS compares the losses of one step and the next, but layer "
                             f"{drawn[0].layer!r} draws anew in each; {remedy}")  # fmt: skip

    def _end(self, begun: Point, found: Point) -> None:
        """Stand at the point; the search is over where it is where it began."""
        self._here = found if found is self._last else self._evaluate(found.weights)
        self.state.finished = bool((found.weights == begun.weights).all())

    def _loss(self, weights: Vector) -> tuple[float, Vector]:
        point = self._evaluate(weights)
        return point.loss, point.gradient

    def _evaluate(self, weights: Vector, length: float = 0.0, d: Vector | None = None) -> Point:
        back, arena = self.backend, self.model.arena
        back.write(arena.weights, weights.astype(arena.dtype)[None])
        self.sums.clear()
        self._runs += 1
        for section in ("gradient", "penalty"):
            if section in self.plan.sections:
                self._replay(section)
        loss, gradient = self.sums.tally.read()[0] / self._weight, self._read(arena.gradients)
        slope = 0.0 if d is None else float(gradient @ d)
        self._last = point = Point(length, loss, slope, self._read(arena.weights), gradient)  # the weights as rounded
        return point

    def _read(self, buffer: Any) -> Vector:
        row: Vector = self.backend.to_numpy(buffer)[0].astype(np.float64)
        return row


def strong_wolfe(at: Callable[[float], Point], start: Point, length: float, evaluations: int) -> Point:
    """A point of sufficient decrease and small slope; failing that the best seen, which may be the start
    (Nocedal & Wright, "Numerical Optimization", Algorithms 3.5 and 3.6)."""
    before, best = start, start
    low: Point | None = None
    high = start
    for _ in range(evaluations):
        point = at(length)
        best = point if point.loss < best.loss else best
        rises = not point.loss <= start.loss + DECREASE * point.length * start.slope
        if not rises and abs(point.slope) <= -CURVATURE * start.slope:
            return point
        if low is None:  # no interval yet that holds such a point
            if rises or (before is not start and point.loss >= before.loss):
                low, high = before, point
            elif point.slope >= 0:
                low, high = point, before
            else:
                before, length = point, _beyond(before, point)
                continue
        elif rises or point.loss >= low.loss:
            high = point
        else:
            high = low if point.slope * (high.length - low.length) >= 0 else high
            low = point
        length = _between(low, high)
        if length in (low.length, high.length) or abs(high.length - low.length) * np.abs(start.slope) < 1e-300:
            break
    return best


def _cubic(a: Point, b: Point) -> float:
    """The minimum of the cubic with these losses and slopes; NaN if it has none (Nocedal & Wright, equation 3.59)."""
    with np.errstate(all="ignore"):
        d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.length - b.length)
        square = d1 * d1 - a.slope * b.slope
        if not square >= 0:
            return math.nan
        d2 = math.copysign(math.sqrt(square), b.length - a.length)
        return float(b.length - (b.length - a.length) * np.divide(b.slope + d2 - d1, b.slope - a.slope + 2 * d2))


def _between(a: Point, b: Point) -> float:
    """A trial step inside the interval, by the cubic, but away from its ends."""
    margin = MARGIN * abs(b.length - a.length)
    least, most = sorted((a.length, b.length))
    found = _cubic(a, b)
    return min(max(found, least + margin), most - margin) if math.isfinite(found) else (a.length + b.length) / 2


def _beyond(a: Point, b: Point) -> float:
    """A longer trial step, by the cubic through the last two."""
    found, most = _cubic(a, b), GROWTH * b.length
    return min(max(found, b.length + 0.01 * (b.length - a.length)), most) if math.isfinite(found) else most
