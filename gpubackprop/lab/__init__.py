"""Gradient engines side by side: every way to a gradient that the lecture notes describe, run and its work counted.

`gradients` takes a small network or a `Graph` and one of `ENGINES`; `compare` runs them all and prints a table. All of
them work in float64 on the CPU. What the plan does in one pass forward and one back, the others do as it is taught:

- finite_difference, central: one weight at a time, (L(w + eps) − L(w)) / eps and (L(w + eps) − L(w − eps)) / 2 eps
- paths: Σ over all paths from w to L of the product of the local derivatives z(i, j) along it, the Pathwise Aggregation
  Lemma; their number grows exponentially with depth
- dynamic_programming: S(i) = Σ over edges (i, j) of z(i, j) · S(j), each edge visited once, from L backwards
- post_activation: the same over post-activations h alone, z = w · Φ′(a) of the head; S is then Δ = ∂L/∂h
- pre_activation: the same over pre-activations a alone, z = Φ′(a) of the tail · w; S is then δ = ∂L/∂a
- matrix: δ(r) = (δ(r+1) W(r+1)ᵀ) ⊙ Φ′(A(r)), dW(r) = H(r−1)ᵀ δ(r), a batch at a time in NumPy
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpubackprop.checks import choice, number, whole
from gpubackprop.columns import Grid, Shown, brief, table
from gpubackprop.lab.engines import ENGINES, OF_NETWORKS, Gradient, Settings
from gpubackprop.lab.subjects import Graph, GraphAt, NetworkAt, Subject, product_graph
from gpubackprop.model import Layer
from gpubackprop.tensor import Tensor
from gpubackprop.trainer import Trainer

__all__ = ["ENGINES", "Comparison", "Gradient", "Graph", "compare", "gradients", "product_graph"]


def gradients(
    model_or_graph: Layer | Trainer | Graph, x: Any, y: Any = None, engine: str = "plan", *,
    loss: str | Callable[..., Tensor] | None = None, eps: float = 1e-6, cap: int = 1_000_000,
    cotangent: float = 1.0,
) -> Gradient:  # fmt: skip
    """cotangent · ∂L/∂w by the engine, of the mean loss L of a network over rows x with targets y, or of the output of
    a `Graph` at the values x of its inputs, in order or by name. The loss is that of a Trainer given in place of its
    model; for a model None means cross_entropy.

    A network infers: dropout passes on, batch norm takes its running statistics. `eps` is the step of the differences.
    Where there are more paths than `cap`, "paths" refuses and says how many. What unrolls a network, from "paths" to
    "matrix", takes Dense layers alone; the last three take no graph. The model is not changed.
    """
    return _run(_at(model_or_graph, x, y, loss), engine, _settings(eps, cap, cotangent))


def _settings(eps: float, cap: int, cotangent: float = 1.0) -> Settings:
    where = "gradients"
    return Settings(number(where, "eps", eps, "> 0"), whole(where, "cap", cap), number(where, "cotangent", cotangent))


def _at(model_or_graph: Any, x: Any, y: Any, loss: Any) -> Subject:
    if not isinstance(model_or_graph, Graph):
        return NetworkAt(model_or_graph, x, y, loss)
    if y is not None:
        remedy = "leave y out, and name the engine as engine=…"
        raise TypeError(f"gradients: got targets y, but the last node of a graph is what is differentiated; {remedy}")
    return GraphAt(model_or_graph, x)


def _applying(at: Subject) -> list[str]:
    return [k for k in ENGINES if isinstance(at, NetworkAt) or k not in OF_NETWORKS]


def _run(at: Subject, engine: str, settings: Settings) -> Gradient:
    choice("gradients", "engine", engine, ENGINES)
    if engine not in (known := _applying(at)):
        raise ValueError(f"gradients: engine {engine!r} is for networks; of a graph choose from {', '.join(known)}")
    return replace(ENGINES[engine](at, settings), engine=engine)


@dataclass(eq=False, repr=False)
class Comparison(Shown):
    """What each engine found, or why it refused; `print` it."""

    found: list[Gradient]
    refused: dict[str, str]

    def __getitem__(self, engine: str) -> Gradient:
        return {g.engine: g for g in self.found}[engine]

    def parts(self) -> Iterable[str | Grid]:
        first = self.found[0]
        rows = [("engine", "work", "gradient", "error", "time")]
        rows += [(g.engine, *g.in_words(), f"{g.error(first):.1e}", brief(g.seconds, "s")) for g in self.found]
        rows += [(engine, "refused", "", "", "") for engine in self.refused]
        norms = f", {first.flat.size:,} numbers, by their norm" if first.flat.size > 1 else ""
        title = f"value {first.value:.12g}; its gradient{norms}; error: max |g − g of {first.engine}| / max |g|"
        reasons = (f"{engine}: {why.removeprefix('gradients: ')}" for engine, why in self.refused.items())
        return [title, table(rows, 3), *reasons]


def compare(
    model_or_graph: Layer | Trainer | Graph, x: Any, y: Any = None, engines: Sequence[str] | None = None, *,
    loss: str | Callable[..., Tensor] | None = None, eps: float = 1e-6, cap: int = 1_000_000,
) -> Comparison:  # fmt: skip
    """`gradients` by each engine (None: all that apply), with errors against the plan's; `print` it for one table of
    values, errors, work and time. Where edges are visited, the time is that of the visits: their local derivatives are
    taken beforehand. An engine that refuses is listed with its reason."""
    at, asked = _at(model_or_graph, x, y, loss), _settings(eps, cap)
    found, refused = list[Gradient](), dict[str, str]()
    for engine in dict.fromkeys(["plan", *(_applying(at) if engines is None else engines)]):
        choice("compare", "engine", engine, ENGINES)
        try:
            found.append(_run(at, engine, asked))
        except (ValueError, RuntimeError) as error:
            refused[engine] = str(error)
    if not found:
        raise ValueError(f"compare: no engine gives a gradient; {refused['plan']}")
    return Comparison(found, refused)
