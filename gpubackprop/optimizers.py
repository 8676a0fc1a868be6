"""Optimizers: a rule of formulas.RULES, its hyperparameters, and its state over the arena."""

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gpubackprop.arena import Arena
from gpubackprop.backends.base import CONTROL, Buffer, StepTable
from gpubackprop.formulas import RULES, Expr, Rule, describe, evaluate, free_names, hoist
from gpubackprop.plan import run

__all__ = ["OPTIMIZERS", "SGD", "Adam", "AdamW", "HostMoments", "Optimizer", "State"]

Floats = npt.NDArray[np.float64]
HostMoments = dict[str, dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Optimizer:
    """Hyperparameters alone; the Trainer holds the state, so one instance may serve many trainers."""

    lr: float = 1e-3
    label: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is float:
                value = getattr(self, field.name)
                if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's numbers are Real
                    got = f"{type(value).__name__} {value!r}"
                    raise TypeError(f"{type(self).__name__}: {field.name} must be a number, got {got}")
                object.__setattr__(self, field.name, float(value))
                self._check(field.name, float(value))

    def _check(self, key: str, value: float) -> None:
        bounds = {"lr": "> 0", "eps": "> 0", "weight_decay": ">= 0"}.get(key, "in [0, 1)")
        holds = {"> 0": value > 0, ">= 0": value >= 0, "in [0, 1)": 0 <= value < 1}[bounds]
        if not (holds and math.isfinite(value)):
            raise ValueError(f"{type(self).__name__}: {key} must be {bounds}, got {value:g}")

    @property
    def rule(self) -> Rule:
        """The row of RULES that steps the weights."""
        return RULES[self.label]

    def groups(self, arena: Arena) -> list[tuple[slice, dict[str, float]]]:
        """Ranges of the arena, and the constants in which each differs; together they cover it."""
        return [(slice(0, arena.size), {})]

    @property
    def constants(self) -> dict[str, float]:
        """The numbers that the rules' texts name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), float)}


@dataclass(frozen=True)
class SGD(Optimizer):
    """p -= lr · z, z = momentum · z + g; plain gradient descent for momentum=0.

    nesterov="lookahead" takes the gradient at p − lr · momentum · z, ahead of the step (Nesterov, "A method of solving
    a convex programming problem with convergence rate O(1/k²)").
    """

    lr: float = 1e-2
    momentum: float = 0.0
    nesterov: str | None = None
    label: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov not in (None, "lookahead"):
            raise ValueError(f"SGD: unknown nesterov {self.nesterov!r}; choose from None, 'lookahead'")
        if self.nesterov and not self.momentum:
            raise ValueError("SGD: nesterov needs a momentum > 0")

    @property
    def rule(self) -> Rule:
        return RULES["nesterov" if self.nesterov else "momentum" if self.momentum else "sgd"]


@dataclass(frozen=True)
class Adam(Optimizer):
    """p -= lr · m̂ / (√v̂ + eps)  (Kingma & Ba, "Adam: A Method for Stochastic Optimization", Algorithm 1)."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    label: ClassVar[str] = "adam"


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam after p -= lr · weight_decay · p on the weight matrices; biases and gains do not decay
    (Loshchilov & Hutter, "Decoupled Weight Decay Regularization")."""

    weight_decay: float = 1e-2
    label: ClassVar[str] = "adamw"

    def groups(self, arena: Arena) -> list[tuple[slice, dict[str, float]]]:
        return [(slice(0, arena.matrices), {}), (slice(arena.matrices, arena.size), {"weight_decay": 0.0})]


OPTIMIZERS: dict[str, type[Optimizer]] = {c.label: c for c in (SGD, Adam, AdamW)}


class State:
    """An optimizer's moments over an arena, and the launches that step the weights."""

    def __init__(self, optimizer: Optimizer, arena: Arena) -> None:
        self.optimizer = optimizer
        self.arena = arena
        self.rule = optimizer.rule
        self.groups = [(part, more) for part, more in optimizer.groups(arena) if part.stop > part.start]
        self.moments = {name: arena.zeros() for name in self.rule.state}
        self.scalars = self._scalars()

    def _scalars(self) -> dict[str, tuple[Expr, dict[str, float]]]:
        """The columns of the step table: for each group every expression of scalars alone, and its constants."""
        found: dict[str, tuple[Expr, dict[str, float]]] = {}
        for i, (_, more) in enumerate(self.groups):
            for before in (True, False):
                for e in hoist(self.rule.graph(before=before), ("p", "g", *self.rule.state))[1].values():
                    column = f"{describe(e)} [{i}]" if len(self.groups) > 1 else describe(e)
                    found[column] = e, self.optimizer.constants | more
        return found

    def table_rows(self, first: int, steps: int) -> dict[str, Floats]:
        """Each scalar at the steps first, first + 1, … (counted from 1), in float64."""
        t = np.arange(first, first + steps, dtype=np.float64)
        rows = {}
        for column, (e, constants) in self.scalars.items():
            powers = {n: constants[n[:-2]] ** t for n in free_names(e) if n.endswith("_t")}
            rows[column] = np.broadcast_to(evaluate(e, {**constants, **powers}, _NUMPY), t.shape)
        return rows

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
        if graph := self.rule.graph(before=before, scaled=scaled, skips=dynamic):
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
        groups = [part for part, _ in self.groups] if len(self.groups) > 1 else []
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


_NUMPY: dict[str, Any] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "neg": np.negative, "sqrt": np.sqrt,
    "pow": np.power, "exp": np.exp, "log": np.log, "abs": np.abs, "maximum": np.maximum, "minimum": np.minimum,
}  # fmt: skip
