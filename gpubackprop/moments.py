"""What an optimizer keeps over an arena, its moments, and the launches that step the weights by its rule."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.arena import Arena, Parameter
from gpubackprop.backends.base import CONTROL, Buffer, StepTable
from gpubackprop.formulas import Expr, describe, evaluate, free_names, hoist
from gpubackprop.optimizers import Optimizer
from gpubackprop.plan import run
from gpubackprop.rates import History, rates

__all__ = ["HostMoments", "Moments", "columns_of", "values_of"]

Floats = npt.NDArray[np.float64]
HostMoments = dict[str, dict[str, npt.NDArray[Any]]]
MOST_GROUPS = 256  # a byte tells a block's group
NO_HISTORY: History = MappingProxyType({})


class Moments:
    """An optimizer's moments over an arena, and the launches that step the weights."""

    finished = False  # whether there is no further step to make
    last_lr = 0.0  # of the last update there are rows for

    def __init__(self, optimizer: Optimizer, arena: Arena) -> None:
        self.optimizer = optimizer
        self.arena = arena
        self.rule = optimizer.rule
        self.parts = [(part, own) for part, own in optimizer.parts(arena) if part.stop > part.start]
        if len(self.parts) > MOST_GROUPS:
            raise ValueError(f"{type(optimizer).__name__}: groups cut the parameters into {len(self.parts)} ranges; "
                             f"at most {MOST_GROUPS} are possible; use fewer patterns")  # fmt: skip
        self.moments = {name: arena.zeros() for name in self.rule.state}
        self.scalars = self._scalars()
        self.powers = {n[:-2] for e, _ in self.scalars.values() for n in free_names(e) if n.endswith("_t")}

    def __repr__(self) -> str:
        kept = ", ".join(self.moments) or "nothing"
        return f"{type(self).__name__}({self.optimizer!r} keeps {kept} for {self.arena!r})"

    def _scalars(self) -> dict[str, tuple[Expr, int]]:
        """The columns of the step table: for each part every expression of scalars alone, and the part's number."""
        graphs = (self.rule.graph(before=before, general=True) for before in (True, False))
        read = {describe(e): e for graph in graphs for e in columns_of(graph, ("p", "g", "factor", *self.rule.state))}
        if len(self.parts) == 1:
            return {column: (e, 0) for column, e in read.items()}
        return {f"{column} [{i}]": (e, i) for i in range(len(self.parts)) for column, e in read.items()}

    def table_rows(self, done: int, updates: int, epoch: int = 0, history: History = NO_HISTORY) -> dict[str, Floats]:
        """Each scalar at the updates that follow on `done` of them and `epoch` epochs, in float64."""
        t = np.arange(done, done + updates, dtype=np.float64)
        different = {id(o.lr): o.lr for o in (self.optimizer, *(own for _, own in self.parts))}
        lrs = {key: rates(lr, t, epoch, history) for key, lr in different.items()}
        self.last_lr = float(lrs[id(self.optimizer.lr)][-1])
        named = [own.scalars(t + 1, lrs[id(own.lr)]) for _, own in self.parts]
        for values in named:
            values |= {f"{n}_t": values[n] ** (t + 1) for n in self.powers}
        return {column: values_of(e, named[i], t) for column, (e, i) in self.scalars.items()}

    def record(
        self, table: StepTable, clip: float = math.inf, dynamic: bool = False, copy: Buffer | None = None, *,
        before: bool = False,
    ) -> None:  # fmt: skip
        """Launch the rule's update of the weights by the gradients, or what goes before the gradient.

        The gradient's norm is clipped to `clip`. With `dynamic`, the scale of the loss follows the gradients, and a
        step whose gradient is not finite changes nothing. `copy` is written too.
        """
        back, gradients = self.arena.backend, self.arena.gradients
        if not self.arena.size:
            if not before:
                run(table.control, lambda: back.advance(table))
            return
        scaled = dynamic or clip < math.inf
        if scaled and not before:
            run(table.control, lambda: back.gradient_norm(gradients, table, clip=clip, dynamic=dynamic))
        # A look-ahead is skipped after a step that was: the weights then still stand ahead.
        general = scaled or self.optimizer.coupled
        if graph := self.rule.graph(before=before, general=general, skips=dynamic):
            self._launch(graph, table, copy, before)

    def _launch(self, graph: dict[str, Expr], table: StepTable, copy: Buffer | None, before: bool) -> None:
        """One launch over the arena."""
        arena = self.arena
        arrays = {"p": arena.weights, "g": arena.gradients} | self.moments
        if copy is not None:
            graph, arrays = graph | {"q": graph["p"]}, arrays | {"q": copy}
        arrays |= {key: table.control[i : i + 1] for key, i in CONTROL.items()}
        names = dict.fromkeys((*free_names(*graph.values()), *graph))
        used: dict[str, Buffer] = {k: arrays[k].reshape(-1) for k in names if k in arrays}
        groups = [part for part, _ in self.parts] if len(self.parts) > 1 else []
        what = (self.rule.before if before else self.rule.update).strip()
        run(arena.weights, lambda: arena.backend.update(
            self.rule.name, graph, used, table, groups=groups, advance=not before, what=what))  # fmt: skip

    def host(self) -> HostMoments:
        """The moments as NumPy arrays, by moment and parameter."""
        arena, read = self.arena, self.arena.backend.to_numpy
        return {m: {k: read(arena.slice(buffer, k)) for k in arena.parameters} for m, buffer in self.moments.items()}

    def load(self, moments: HostMoments) -> None:
        """Write moments that `host` gave; parameters it did not know stay at zero."""
        arena = self.arena
        for m, values in moments.items():
            for key in values.keys() & arena.parameters.keys():
                if values[key].shape == arena.parameters[key].shape:
                    arena.backend.write(arena.slice(self.moments[m], key), values[key])

    def hold(self, edges: Mapping[Parameter, npt.NDArray[np.bool_]]) -> None:
        """Zero the moments of weights that have no edge, which would move them: a mask may be younger than these."""
        arena = self.arena
        for key, p in arena.parameters.items():
            if p in edges:
                for buffer in self.moments.values():
                    moment = arena.slice(buffer, key)
                    arena.backend.write(moment, np.where(edges[p], arena.backend.to_numpy(moment), 0))


# ---- columns of the step table -------------------------------------------------------------------------------------


def columns_of(graph: Mapping[str, Expr], arrays: tuple[str, ...]) -> list[Expr]:
    """The expressions of scalars alone that a graph over these arrays reads from the step table."""
    return list(hoist(graph, arrays)[1].values())


def values_of(e: Expr, named: Mapping[str, Any], like: Floats) -> Floats:
    """The column of an expression of scalars, each a number or a value per step, in float64."""
    value = evaluate(e, named, _NUMPY)
    return value if np.shape(value) == like.shape else np.full(like.shape, value, np.float64)


_NUMPY: dict[str, Callable[..., Any]] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "neg": np.negative, "sqrt": np.sqrt,
    "pow": np.power, "exp": np.exp, "log": np.log, "abs": np.abs, "maximum": np.maximum, "minimum": np.minimum,
}  # fmt: skip
