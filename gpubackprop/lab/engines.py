"""The engines: each takes a subject and gives its gradient, counting the work that it does."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import get_backend
from gpubackprop.columns import Shown, brief
from gpubackprop.lab.subjects import Edge, NetworkAt, Node, Subject
from gpubackprop.plan import Plan

__all__ = ["ENGINES", "OF_NETWORKS", "Gradient", "Settings"]

Floats = npt.NDArray[np.float64]
Work = dict[str, int]
Found = TypeVar("Found")
REPEATS, ENOUGH = 20, 0.05  # runs that are timed, at most, and seconds after which no other begins


@dataclass(eq=False, repr=False)
class Gradient(Shown):
    """What an engine found: the gradient by the name of each leaf, with the work that it took.

    Engines that go from unit to unit also give delta_pre = ∂L/∂a and delta_post = ∂L/∂h, (rows, units) by layer.
    """

    value: float  # of the output or loss
    gradients: dict[str, Floats]
    work: Work
    seconds: float = math.nan  # of one gradient, at best, without the recording of a plan and the derivatives of edges
    delta_pre: dict[str, Floats] = field(default_factory=dict)
    delta_post: dict[str, Floats] = field(default_factory=dict)
    engine: str = ""

    @property
    def flat(self) -> Floats:
        """All of the gradient, one after another."""
        return np.concatenate([g.ravel() for g in self.gradients.values()])

    def error(self, other: "Gradient") -> float:
        """max |g − other g| / max |other g|."""
        with np.errstate(invalid="ignore"):  # infinite ones
            largest = float(np.abs(other.flat).max())
            return float(np.abs(self.flat - other.flat).max()) / (largest or 1.0)

    def in_words(self) -> tuple[str, str]:
        """The work, and the gradient: itself if it is one number, else its norm."""
        work = ", ".join(f"{n:,} {_ONE.get(what, what) if n == 1 else what}" for what, n in self.work.items())
        return work, f"{self.flat[0] if self.flat.size == 1 else np.linalg.norm(self.flat):.12g}"

    def parts(self) -> list[str]:
        work, size = self.in_words()
        return [f"{self.engine}: {size} by {work} in {brief(self.seconds, 's')}"]


_ONE = {"paths": "path", "products": "product", "edge visits": "edge visit", "launches": "launch", "flops": "flop"}


@dataclass(frozen=True)
class Settings:
    """What is asked of an engine."""

    eps: float
    cap: int
    cotangent: float


def _best(run: Callable[[], Found]) -> tuple[Found, float]:
    """What a call returns, and the seconds of the fastest of several."""
    best, until = math.inf, time.perf_counter() + ENOUGH
    for _ in range(REPEATS):
        start = time.perf_counter()
        found = run()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > until:
            break
    return found, best


def _plan(at: Subject, settings: Settings) -> Gradient:
    plan = Plan(get_backend("cpu"))
    with plan.record("forward"):
        y = at.output()
    with plan.record("backward"):
        if y.requires_grad:
            y.backward(np.full(y.shape, settings.cotangent))
    _, seconds = _best(plan.sequence("forward", "backward"))
    found = {k: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for k, p in at.leaves.items()}
    work = {"forward": 1, "backward": 1, "launches": len(plan.launches), "flops": plan.flops}
    return Gradient(y.item(), found, work, seconds)


def _differences(at: Subject, settings: Settings, *, central: bool) -> Gradient:
    """(L(w + eps) − L(w)) / eps, or centred on w, by replaying the forward pass with one weight moved."""
    plan = Plan(get_backend("cpu"))
    with plan.record("forward"):
        y = at.output()
    replay, eps, value, places = plan.sequence("forward"), settings.eps, y.item(), at.movable()

    def slopes() -> tuple[dict[str, Floats], int]:
        calls = count()

        def loss() -> float:
            next(calls)
            replay()
            return float(y.buffer.reshape(()))

        found = {name: np.zeros(p.shape) for name, p in at.leaves.items()}
        here = 0.0 if central else loss()  # once for all weights
        for name, p in at.leaves.items():
            w, slope = p.buffer.reshape(-1), found[name].reshape(-1)
            for k in places[name]:
                kept = w[k]
                w[k] = kept + eps
                above = loss()
                w[k] = kept - eps
                slope[k] = (above - loss()) / (2 * eps) if central else (above - here) / eps
                w[k] = kept
        return {name: settings.cotangent * slope for name, slope in found.items()}, next(calls)

    (found, calls), seconds = _best(slopes)
    return Gradient(value, found, {"loss calls": calls}, seconds)


def _unrolled(at: Subject, settings: Settings, *, variables: str, sums: "Sums") -> Gradient:
    """S = ∂L/∂node of every source, and of the units as far as `sums` gives them."""
    sources, edges = list(at.sources()), list(at.edges(variables))
    (s, work), seconds = _best(lambda: sums(edges, [node for _, _, node in sources], settings))
    found = {name: np.zeros(p.shape) for name, p in at.leaves.items()}
    for name, k, node in sources:
        found[name].reshape(-1)[k] = s.get(node, 0.0)
    result = Gradient(at.output().item(), found, work, seconds)
    for layer in at.layers:
        for kind, deltas in (("pre", result.delta_pre), ("post", result.delta_post)):
            units = [s[kind, layer.path, *unit] for unit in np.ndindex(layer.h.shape) if (kind, layer.path, *unit) in s]
            if units:
                deltas[layer.path] = np.array(units).reshape(layer.h.shape)
    return result


def _swept(edges: list[Edge], sources: list[Node], settings: Settings) -> tuple[dict[Node, float], Work]:
    """S(i) = Σ over (i, j) of z(i, j) · S(j), from the output backwards, each edge once."""
    s = defaultdict[Node, float](float, {edges[-1][1]: settings.cotangent})
    for tail, head, z in reversed(edges):
        s[tail] += s[head] * z
    return s, {"edge visits": len(edges)}


def _along_paths(edges: list[Edge], sources: list[Node], settings: Settings) -> tuple[dict[Node, float], Work]:
    """S(w) = Σ over the paths P from w to the output of Π over the edges of P of z, each path by itself."""
    output = edges[-1][1]
    paths, ahead = defaultdict[Node, int](int, {output: 1}), defaultdict[Node, list[tuple[Node, float]]](list)
    for tail, head, z in reversed(edges):
        paths[tail] += paths[head]
        ahead[tail].append((head, z))
    if (total := sum(paths[node] for node in sources)) > settings.cap:
        many = f"{total:,}" if total < 10**30 else f"about 1e{math.log10(total):.0f}"
        raise ValueError(f"gradients: there are {many} paths, more than cap={settings.cap:,}; "
                         f"engine='dynamic_programming' visits {len(edges):,} edges instead")  # fmt: skip
    s, products = dict[Node, float](), 0
    for source in sources:
        s[source] = 0.0
        unfinished: list[tuple[Node, tuple[float, ...]]] = [(source, ())]
        while unfinished:
            node, factors = unfinished.pop()
            if node == output:
                s[source] += math.prod(factors, start=settings.cotangent)
                products += len(factors)
            else:
                unfinished += [(head, (*factors, z)) for head, z in ahead[node] if paths[head]]  # no dead ends
    return s, {"paths": total, "products": products}


def _matrix(at: Subject, settings: Settings) -> Gradient:
    """δ = Φ′(A) ⊙ Δ, dW = Hᵀ δ, db the sums of δ over the rows, Δ of the layer before = δ Wᵀ."""
    assert isinstance(at, NetworkAt)
    result, seconds = _best(lambda: _in_matrices(at, settings.cotangent))
    return replace(result, seconds=seconds)


def _in_matrices(at: NetworkAt, cotangent: float) -> Gradient:
    layers, found, deltas, dhs = at.layers, dict[object, Floats](), dict[str, Floats](), dict[str, Floats]()
    products = len(layers)  # forward
    dh = cotangent * at.output_gradient(layers[-1].h)
    for layer in reversed(layers):
        dhs[layer.path], deltas[layer.path] = dh, (delta := layer.slope * dh)
        for p, gradient in ((layer.weight, (layer.x.T @ delta) * layer.edges), (layer.bias, delta.sum(0))):
            found[p] = found.get(p, 0.0) + gradient  # a layer that stands in several places
        products += 1
        if layer is not layers[0]:  # nobody asks for the gradient of the data
            dh = delta @ layer.w.T
            products += 1
    work = {"forward": 1, "backward": 1, "matrix products": products}
    gradients = {name: found[p] for name, p in at.leaves.items()}
    return Gradient(at.output().item(), gradients, work, delta_pre=deltas, delta_post=dhs)


Sums = Callable[[list[Edge], list[Node], Settings], tuple[dict[Node, float], Work]]
ENGINES: dict[str, Callable[[Subject, Settings], Gradient]] = {
    "plan": _plan,
    "finite_difference": partial(_differences, central=False),
    "central": partial(_differences, central=True),
    "paths": partial(_unrolled, variables="mixed", sums=_along_paths),
    "dynamic_programming": partial(_unrolled, variables="mixed", sums=_swept),
    "post_activation": partial(_unrolled, variables="post", sums=_swept),
    "pre_activation": partial(_unrolled, variables="pre", sums=_swept),
    "matrix": _matrix,
}
OF_NETWORKS = ("post_activation", "pre_activation", "matrix")  # what has units
