"""Optimizers: a rule of formulas.RULES, its hyperparameters, and its state over the arena."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gpubackprop.arena import Arena
from gpubackprop.backends.base import Buffer, StepTable
from gpubackprop.formulas import RULES, Expr, Rule, describe, evaluate, free_names, hoist, parse
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

    def rules(self, arena: Arena) -> Iterator[tuple[Rule, slice]]:
        """The update rule of each range of the arena."""
        yield RULES[self.label], slice(0, arena.size)

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

    def rules(self, arena: Arena) -> Iterator[tuple[Rule, slice]]:
        yield RULES["nesterov" if self.nesterov else "momentum" if self.momentum else "sgd"], slice(0, arena.size)


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

    def rules(self, arena: Arena) -> Iterator[tuple[Rule, slice]]:
        yield RULES["adamw"], slice(0, arena.matrices)
        yield RULES["adam"], slice(arena.matrices, arena.size)


OPTIMIZERS: dict[str, type[Optimizer]] = {c.label: c for c in (SGD, Adam, AdamW)}


class State:
    """An optimizer's moments over an arena, and the launches that step the weights."""

    def __init__(self, optimizer: Optimizer, arena: Arena) -> None:
        self.optimizer = optimizer
        self.arena = arena
        self.rules = [(rule, part) for rule, part in optimizer.rules(arena) if part.stop > part.start]
        self.moments = {name: arena.zeros() for rule, _ in self.rules for name in rule.state}
        self.scalars = self._scalars()

    def _scalars(self) -> dict[str, Expr]:
        """Every expression of scalars alone in the rules: what the step table holds, by its text."""
        found: dict[str, Expr] = {}
        for rule, _ in self.rules:
            for text in filter(None, (rule.before, rule.update)):
                scalars = hoist(parse(text), ("p", "g", *rule.state))[1]
                found |= {describe(e): e for e in scalars.values()}
        return found

    def table_rows(self, first: int, steps: int) -> dict[str, Floats]:
        """Each scalar at the steps first, first + 1, … (counted from 1), in float64."""
        t = np.arange(first, first + steps, dtype=np.float64)
        values: dict[str, Any] = dict(self.optimizer.constants)
        values |= {n: values[n[:-2]] ** t for n in free_names(*self.scalars.values()) if n.endswith("_t")}
        return {k: np.broadcast_to(evaluate(e, values, _NUMPY), t.shape) for k, e in self.scalars.items()}

    def record(self, table: StepTable, *, before: bool = False) -> None:
        """Launch the rules' update of the weights by the gradients, or what goes before the gradient."""
        for rule, part in self.rules:
            if text := rule.before if before else rule.update:
                self._launch(rule, text, part, table)

    def _launch(self, rule: Rule, text: str, part: slice, table: StepTable) -> None:
        arrays = {"p": self.arena.weights, "g": self.arena.gradients} | {k: self.moments[k] for k in rule.state}
        graph = parse(text)
        parts: dict[str, Buffer] = {k: a[0, part] for k, a in arrays.items()}
        reads = {k: parts[k] for k in free_names(*graph.values()) if k in parts}
        writes = {k: parts[k] for k in graph}
        what = text.strip()
        run(
            writes["p"], lambda: self.arena.backend.elementwise(rule.name, graph, reads, writes, table=table, what=what)
        )

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
                    arena.slice(self.moments[m], key)[...] = arena.backend.asarray(values[key], arena.dtype)


_NUMPY: dict[str, Any] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "neg": np.negative, "sqrt": np.sqrt,
    "pow": np.power, "exp": np.exp, "log": np.log, "abs": np.abs, "maximum": np.maximum, "minimum": np.minimum,
}  # fmt: skip
