"""Learning rates that change: functions of the number of updates or epochs done, evaluated on the host once per epoch.

A schedule stands in an optimizer's `lr`, as does any function of one number. The rates of an epoch go into the step
table, so that recorded steps and CUDA graphs are replayed as ever.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.checks import choice, settle
from gpubackprop.rates import History, direction, watched

__all__ = ["Constant", "Cosine", "Exponential", "OneCycle", "Plateau", "Polynomial", "Schedule", "Step"]

Floats = npt.NDArray[np.float64]
UNITS = ("updates", "epochs")


@dataclass(frozen=True)
class Schedule:
    """`schedule(t)` is the learning rate after t updates; with per="epochs", after t epochs, the same throughout one.

    Lengths are in that unit. A subclass writes `factor(t)`, which the first learning rate `lr` is multiplied by.
    """

    lr: float
    per: str = field(default="updates", kw_only=True)

    def __post_init__(self) -> None:
        settle(self, _BOUNDS, "> 0")
        choice(type(self).__name__, "per", self.per, UNITS)

    def factor(self, t: Any) -> Any:
        """What lr is multiplied by at t = 0, 1, …, a number or an array."""
        raise TypeError(f"{type(self).__name__} has no factor(t); write one that returns what lr is multiplied by")

    def __call__(self, t: Any) -> Any:
        """The learning rate at t = 0, 1, …, a number or an array."""
        return self.lr * self.factor(np.asarray(t, np.float64))

    def rates(self, updates: Floats, epoch: int, history: History) -> Floats:
        """The rate of each of an epoch's updates, whose numbers count from 0, after `epoch` epochs of that history."""
        return np.broadcast_to(self(updates if self.per == "updates" else float(epoch)), updates.shape)


_BOUNDS = {"end": ">= 0", "min_delta": ">= 0", "start": ">= 0", "warmup": ">= 0", "decay": "in (0, 1]",
           "rise": "in (0, 1)"}  # fmt: skip


@dataclass(frozen=True)
class Constant(Schedule):
    """lr."""

    def factor(self, t: Any) -> Any:
        return np.ones_like(t)


@dataclass(frozen=True)
class Step(Schedule):
    """lr · decay^⌊t / every⌋."""

    every: int
    decay: float = 0.1

    def factor(self, t: Any) -> Any:
        return self.decay ** (t // self.every)


@dataclass(frozen=True)
class Exponential(Schedule):
    """lr · decay^t."""

    decay: float

    def factor(self, t: Any) -> Any:
        return self.decay**t


@dataclass(frozen=True)
class Polynomial(Schedule):
    """(lr − end) · (1 − t / length)^power + end; end from t = length on."""

    length: int
    power: float = 1.0
    end: float = 0.0

    def factor(self, t: Any) -> Any:
        share = 1 - np.minimum(t, self.length) / self.length
        return share**self.power + self.end / self.lr * (1 - share**self.power)


@dataclass(frozen=True)
class Cosine(Schedule):
    """lr · (t + 1) / (warmup + 1) while t < warmup, then end + (lr − end) · (1 + cos(π u)) / 2, where u goes from 0 at
    t = warmup to 1 at t = length (Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts")."""

    length: int
    warmup: int = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= self.length:
            raise ValueError(f"Cosine: warmup {self.warmup} must be less than length {self.length}")

    def factor(self, t: Any) -> Any:
        u = np.clip((t - self.warmup) / (self.length - self.warmup), 0, 1)
        least = self.end / self.lr
        return np.where(t < self.warmup, (t + 1) / (self.warmup + 1), least + (1 - least) * (1 + np.cos(np.pi * u)) / 2)


@dataclass(frozen=True)
class OneCycle(Schedule):
    """From start up to lr at t = rise · length, then down to end at t = length, by half cosines (Smith & Topin,
    "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates")."""

    length: int
    rise: float = 0.3
    start: float = 0.0
    end: float = 0.0

    def factor(self, t: Any) -> Any:
        top = self.rise * self.length
        up, down = np.clip(t / top, 0, 1), np.clip((t - top) / (self.length - top), 0, 1)
        start, end = self.start / self.lr, self.end / self.lr
        rising = start + (1 - start) * (1 - np.cos(np.pi * up)) / 2
        return np.where(t < top, rising, end + (1 - end) * (1 + np.cos(np.pi * down)) / 2)


@dataclass(frozen=True)
class Plateau(Schedule):
    """lr · decay^k, after the figure `monitor` failed k times to improve by more than min_delta for `patience` epochs
    in a row, but no less than `end`. With mode "auto" accuracy and r2 improve upwards, the library's other figures
    downwards; of a figure that a callback writes into the history, say "max" or "min".

    monitor=None watches the validation loss, or the loss where there is none.
    """

    patience: int = 10
    decay: float = 0.1
    min_delta: float = 0.0
    end: float = 0.0
    monitor: str | None = None
    mode: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        direction(self.monitor, self.mode, "Plateau")

    def rates(self, updates: Floats, epoch: int, history: History) -> Floats:
        """The rate, as the whole history has it."""
        failures = self._failures(history[watched(history, self.monitor, "Plateau")]) if epoch else 0
        return np.full(updates.shape, max(self.lr * self.decay**failures, min(self.end, self.lr)))

    def _failures(self, values: Sequence[float]) -> int:
        """How often the figure failed to improve, counted on from where the last epoch of this history left off."""
        seen, sign = vars(self).get("_seen"), direction(self.monitor, self.mode, "Plateau")
        if seen is None or seen[0] is not values or seen[1] > len(values):
            seen = values, 0, math.inf, 0, 0
        _, count, best, waited, failures = seen
        for i in range(count, len(values)):
            value = sign * values[i]
            if value < best - self.min_delta:
                best, waited = value, 0
            elif not math.isnan(value):  # an epoch without the figure counts for nothing
                waited += 1
            if waited >= self.patience:
                failures, waited = failures + 1, 0
        object.__setattr__(self, "_seen", (values, len(values), best, waited, failures))
        return failures

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_seen"}

    def __call__(self, t: Any) -> Any:
        raise TypeError("Plateau: the rate depends on the history; it has no value at a number of updates")
