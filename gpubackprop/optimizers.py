"""Optimizers: hyperparameters, and the rule of formulas.RULES that they are for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from gpubackprop.arena import Arena
from gpubackprop.checks import choice, number, settle
from gpubackprop.formulas import RULES, Rule
from gpubackprop.names import refuse_keywords, unknown
from gpubackprop.rates import Rate

__all__ = [
    "LBFGS", "OPTIMIZERS", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "Nadam", "Optimizer",
    "RAdam", "RMSprop",
]  # fmt: skip

Floats = npt.NDArray[np.float64]
Minimizer = Callable[[Callable[[Floats], tuple[float, Floats]], Floats], Floats]
Groups = Mapping[str, Mapping[str, Any]]
BOUNDS = {"lr": "> 0", "eps": "> 0", "weight_decay": ">= 0", "momentum_decay": ">= 0", "tolerance": ">= 0"}


@dataclass(frozen=True, repr=False)
class Optimizer:
    """Hyperparameters alone; the Trainer holds the state, so one instance may serve many trainers.

    `lr` is a number, a schedule of gb.schedules or a function of the number of updates done. `weight_decay` adds
    weight_decay · p to the gradient (AdamW and Lion: p -= lr · weight_decay · p, apart from it), of the weight matrices
    only: biases and gains do not decay. `groups` sets numbers apart for parameters whose name matches a pattern, the
    last that matches: {"0.*": {"lr": 1e-4}, "*.bias": {"weight_decay": 0.1}}; its weight_decay is that of matrices
    where a pattern matches some.
    """

    lr: Rate = 1e-3
    weight_decay: float = field(default=0.0, kw_only=True)
    groups: Groups = field(default_factory=dict, kw_only=True, hash=False)
    label: ClassVar[str] = ""

    def __new__(cls, *_: Any, **keywords: Any) -> Self:
        refuse_keywords(cls.__name__, keywords, (f.name for f in fields(cls) if f.init))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        where = type(self).__name__
        if isinstance(self.lr, type):
            raise TypeError(f"{where}: lr is the class {self.lr.__name__}; make one, such as Step(0.1, every=30)")
        if not callable(self.lr):
            object.__setattr__(self, "lr", number(where, "lr", self.lr, BOUNDS["lr"]))
        settle(self, BOUNDS, "in [0, 1)")
        self._check_groups()

    def _check_groups(self) -> None:
        where = f"{type(self).__name__}: groups"
        if not isinstance(self.groups, Mapping) or not all(isinstance(more, Mapping) for more in self.groups.values()):
            raise TypeError(f"{where} must map patterns to settings, as {{'0.*': {{'lr': 1e-4}}}}; got {self.groups!r}")
        object.__setattr__(self, "groups", {pattern: dict(more) for pattern, more in self.groups.items()})
        known = [f.name for f in fields(self) if f.type is float or f.name == "lr"]
        for pattern, more in self.groups.items():
            if not isinstance(pattern, str):
                raise TypeError(f"{where}: a pattern must be text, such as '0.*', got {pattern!r}")
            for key in more:
                if key not in known:
                    raise ValueError(unknown("setting", key, known, f"{where}[{pattern!r}]"))
            if replace(self, groups={}, **more).rule is not self.rule:
                raise ValueError(f"{where}[{pattern!r}]: {', '.join(more)} asks for another rule; all groups share one")

    def __repr__(self) -> str:
        shown = (f for f in fields(self) if not f.kw_only or getattr(self, f.name) not in (f.default, {}))
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def rule(self) -> Rule:
        """The row of RULES that steps the weights."""
        return RULES[self.label]

    @property
    def coupled(self) -> bool:
        """Whether any weight decay goes into the gradient."""
        decays = [self.weight_decay, *(more.get("weight_decay", 0.0) for more in self.groups.values())]
        return any(decays) and not self.rule.decays

    def parts(self, arena: Arena) -> list[tuple[slice, "Optimizer"]]:
        """Ranges that cover the arena, each with what steps it: this optimizer with the numbers of its group."""
        ends = [*arena.offsets.values(), arena.size][1:]
        found: list[tuple[slice, Optimizer]] = []
        for (key, p), end in zip(arena.parameters.items(), ends, strict=True):
            more: dict[str, Any] = {} if len(p.shape) >= 2 else {"weight_decay": 0.0}
            for pattern, given in self.groups.items():
                if fnmatchcase(key, pattern):
                    more |= given if len(p.shape) >= 2 else _for_vectors(given, pattern, arena)
            own = replace(self, groups={}, **more)
            start = arena.offsets[key]
            if found and found[-1][1] == own:
                start = found.pop()[0].start
            found.append((slice(start, end), own))
        return found

    def scalars(self, t: Floats, lr: Floats) -> dict[str, Any]:
        """What the rule's text names, at the updates t = 1, 2, … with these learning rates: numbers or arrays."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.type is float} | {"lr": lr}


def _for_vectors(given: Mapping[str, Any], pattern: str, arena: Arena) -> dict[str, Any]:
    """What a group says of its vectors: of decay nothing, unless it holds vectors alone."""
    matrices = any(len(p.shape) >= 2 and fnmatchcase(key, pattern) for key, p in arena.parameters.items())
    return {k: v for k, v in given.items() if not (matrices and k == "weight_decay")}


@dataclass(frozen=True, repr=False)
class SGD(Optimizer):
    """p -= lr · z, z = momentum · z + g; plain gradient descent for momentum=0.

    nesterov="lookahead" takes the gradient at p − lr · momentum · z, ahead of the step (Nesterov, "A method of solving
    a convex programming problem with convergence rate O(1/k²)"). "torch" takes it at p and steps by g + momentum · z,
    as PyTorch and scikit-learn do. "seed" takes it at p − momentum · z, as some lecture notes have it, without the
    learning rate: it diverges where the curvature exceeds 1 + 1 / momentum, however small lr is.

    velocity=True adds up steps in place of gradients, z = momentum · z + lr · g and p -= z (Sutskever et al., "On the
    importance of initialization and momentum in deep learning"; scikit-learn): the same while lr is constant, but when
    it falls, what momentum carries on does not shrink with it.
    """

    lr: Rate = 1e-2
    momentum: float = 0.0
    nesterov: str | bool | None = None
    velocity: bool = field(default=False, kw_only=True)
    label: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov is True:
            raise ValueError("SGD: nesterov must say which: 'torch' is what other libraries do, 'lookahead' Nesterov's")
        if self.nesterov is False:
            object.__setattr__(self, "nesterov", None)
        choice("SGD", "nesterov", self.nesterov, (None, "lookahead", "torch", "seed"))
        if self.nesterov and not self.momentum:
            raise ValueError("SGD: nesterov needs a momentum > 0")
        if self.velocity and self.nesterov not in (None, "torch"):
            raise ValueError(f"SGD: velocity=True goes with nesterov None or 'torch', got {self.nesterov!r}")

    @property
    def rule(self) -> Rule:
        if not self.momentum:
            return RULES["sgd"]
        if self.velocity:
            return RULES["velocity_torch" if self.nesterov else "velocity"]
        form = self.nesterov or None
        return RULES["momentum" if form is None else "nesterov" if form == "lookahead" else f"nesterov_{form}"]


class _Placed(Optimizer):
    """An optimizer that divides by √(v + inside) + outside, of which one is eps, by `eps_at`."""

    eps: float
    eps_at: str

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(type(self).__name__, "eps_at", self.eps_at, ("outside", "inside"))

    def scalars(self, t: Floats, lr: Floats) -> dict[str, Any]:
        places = {"inside": 0.0, "outside": 0.0, self.eps_at: self.eps}
        return super().scalars(t, lr) | places


@dataclass(frozen=True, repr=False)
class Adagrad(_Placed):
    """p -= lr · g / (√v + eps), v the sum of all g² so far; eps_at="inside": √(v + eps)
    (Duchi et al., "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization")."""

    lr: Rate = 1e-2
    eps: float = 1e-10
    eps_at: str = field(default="outside", kw_only=True)
    label: ClassVar[str] = "adagrad"


@dataclass(frozen=True, repr=False)
class Adadelta(Optimizer):
    """p -= lr · Δ, Δ = √(u + eps) / √(v + eps) · g, with v and u the running means of g² and Δ²
    (Zeiler, "ADADELTA: An Adaptive Learning Rate Method")."""

    lr: Rate = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    label: ClassVar[str] = "adadelta"


@dataclass(frozen=True, repr=False)
class RMSprop(_Placed):
    """p -= lr · g / (√v + eps), v the running mean of g²; eps_at="inside": √(v + eps)
    (Hinton, "Neural Networks for Machine Learning", lecture 6e).

    centered=True takes the running variance, v − m² with m the running mean of g, in place of v (Graves, "Generating
    Sequences With Recurrent Neural Networks"). With momentum the quotient is added to z = momentum · z and p -= lr · z.
    """

    lr: Rate = 1e-2
    rho: float = 0.99
    momentum: float = 0.0
    centered: bool = False
    eps: float = 1e-8
    eps_at: str = field(default="outside", kw_only=True)
    label: ClassVar[str] = "rmsprop"

    @property
    def rule(self) -> Rule:
        return RULES["rmsprop" + "_centered" * self.centered + "_momentum" * bool(self.momentum)]


@dataclass(frozen=True, repr=False)
class Adam(Optimizer):
    """p -= lr · m̂ / (√v̂ + eps)  (Kingma & Ba, "Adam: A Method for Stochastic Optimization", Algorithm 1).

    eps_at="hat" adds eps to the root of the uncorrected v: p -= lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + eps), the
    paper's ε̂, as in TensorFlow and scikit-learn.
    """

    lr: Rate = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_at: str = field(default="outside", kw_only=True)
    label: ClassVar[str] = "adam"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(type(self).__name__, "eps_at", self.eps_at, ("outside", "hat"))

    def scalars(self, t: Floats, lr: Floats) -> dict[str, Any]:
        found = super().scalars(t, lr)
        return found if self.eps_at == "outside" else found | {"eps": self.eps / np.sqrt(1 - self.beta2**t)}


@dataclass(frozen=True, repr=False)
class AdamW(Adam):
    """Adam after p -= lr · weight_decay · p on the weight matrices; biases and gains do not decay
    (Loshchilov & Hutter, "Decoupled Weight Decay Regularization")."""

    weight_decay: float = field(default=1e-2, kw_only=True)
    label: ClassVar[str] = "adamw"


@dataclass(frozen=True, repr=False)
class Nadam(Optimizer):
    """p -= (lr · (1 − μₜ) / (1 − Πμ) · g + lr · μₜ₊₁ / (1 − Πμ · μₜ₊₁) · m) / (√v̂ + eps), the momentum being
    μₜ = β₁ (1 − ½ · 0.96^(t · momentum_decay))  (Dozat, "Incorporating Nesterov Momentum into Adam")."""

    lr: Rate = 2e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum_decay: float = 4e-3
    label: ClassVar[str] = "nadam"

    def scalars(self, t: Floats, lr: Floats) -> dict[str, Any]:
        ahead = np.arange(1, t[-1] + 2)
        mu = self.beta1 * (1 - 0.5 * 0.96 ** (ahead * self.momentum_decay))
        now = t.astype(np.intp) - 1
        return super().scalars(t, lr) | {"mu": mu[now], "mu_next": mu[now + 1], "mu_product": np.cumprod(mu)[now]}


@dataclass(frozen=True, repr=False)
class Adamax(Optimizer):
    """p -= lr / (1 − β₁ᵗ) · m / u, u = max(β₂ · u, |g| + eps)  (Kingma & Ba, "Adam", Algorithm 2, which has no eps)."""

    lr: Rate = 2e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    label: ClassVar[str] = "adamax"


@dataclass(frozen=True, repr=False)
class RAdam(Optimizer):
    """p -= lr · m̂ · r · √(1 − β₂ᵗ) / (√v + eps) once ρₜ > 5, p -= lr · m̂ before, with
    r² = (ρₜ − 4)(ρₜ − 2)ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)ρₜ), ρ∞ = 2 / (1 − β₂) − 1 and ρₜ = ρ∞ − 2tβ₂ᵗ / (1 − β₂ᵗ)
    (Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond")."""

    lr: Rate = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    label: ClassVar[str] = "radam"

    def scalars(self, t: Floats, lr: Floats) -> dict[str, Any]:
        last = 2 / (1 - self.beta2) - 1
        power = self.beta2**t
        rho = last - 2 * t * power / (1 - power)
        squares = (rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho) if last > 5 else np.zeros_like(rho)
        return super().scalars(t, lr) | {"r": np.sqrt(np.where(rho > 5, squares, 0))}


@dataclass(frozen=True, repr=False)
class Lion(Optimizer):
    """p -= lr · (sign(β₁ · m + (1 − β₁) · g) + weight_decay · p), m = β₂ · m + (1 − β₂) · g
    (Chen et al., "Symbolic Discovery of Optimization Algorithms")."""

    lr: Rate = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    label: ClassVar[str] = "lion"


@dataclass(frozen=True, repr=False)
class LBFGS(Optimizer):
    """p += α · d, d = −H g with H from the last `history` changes of p and g, α by a strong-Wolfe line search from lr
    (Liu & Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization").

    For small data: every step takes all rows, whatever the batch size, evaluates the loss up to `evaluations` times,
    and its vectors lie on the host in float64. An epoch is one such step; training ends where no element of the
    gradient exceeds `tolerance`, or no further decrease is found.

    `minimizer(function, weights)`, one of SciPy's perhaps, makes the step instead: it goes from these weights, all in
    one vector, to those it returns; function(weights) is the loss and its gradient.
    """

    lr: float = 1.0
    history: int = 10
    evaluations: int = 25
    tolerance: float = 1e-7
    minimizer: Minimizer | None = field(default=None, kw_only=True)
    label: ClassVar[str] = "lbfgs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay or self.groups:
            raise ValueError("LBFGS: it minimises the loss alone, without weight_decay or groups; use Trainer(l2=…)")

    @property
    def rule(self) -> Rule:
        """None: what steps the weights is a search."""
        return Rule("lbfgs", (), "")


OPTIMIZERS: dict[str, type[Optimizer]] = {
    c.label: c for c in (SGD, Adagrad, Adadelta, RMSprop, Adam, AdamW, Nadam, Adamax, RAdam, Lion, LBFGS)
}
