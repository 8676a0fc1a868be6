"""The learning-rate range test: how the loss of a copy of a trainer goes while its learning rate rises."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.checks import interval, whole
from gpubackprop.columns import Columns, Grid, Shown
from gpubackprop.data import check_same_length
from gpubackprop.diagnostics import copied
from gpubackprop.holdout import take
from gpubackprop.optimizers import LBFGS, Optimizer
from gpubackprop.trainer import Trainer, TrainingDiverged

__all__ = ["RangeTest", "lr_range_test"]

Floats = npt.NDArray[np.float64]
MEMORY = 0.9  # of the running mean that smooths the losses
BLOWN_UP = 4.0  # times the least smoothed loss


@dataclass(frozen=True, repr=False)
class RangeTest(Shown):
    """Learning rates, the loss of a batch before the update with each, and the loss smoothed."""

    lr: Floats
    loss: Floats
    smoothed: Floats

    @property
    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls fastest."""
        if len(self.lr) < 3:
            return float(self.lr[0])
        fall = np.gradient(self.smoothed, np.log(self.lr))
        return float(self.lr[: int(self.smoothed.argmin()) + 1][fall[: int(self.smoothed.argmin()) + 1].argmin()])

    def parts(self) -> Iterable[str | Grid]:
        table = Columns({f.name: getattr(self, f.name).tolist() for f in fields(self)})
        return [*table.parts(), f"the loss falls fastest at lr = {self.suggestion:.2g}"]


def lr_range_test(
    trainer: Trainer, x: Any, y: Any, low: float = 1e-6, high: float = 10.0, updates: int = 100, batch_size: int = 128
) -> RangeTest:
    """Train a copy of the trainer with a rate that rises from low to high by a constant factor for each update, one
    batch each, until the loss has blown up (Smith, "Cyclical Learning Rates for Training Neural Networks"). The rates
    of groups keep their ratio to the others'. The trainer stays as it is.
    """
    where = "lr_range_test"
    twin = copied(trainer, where)
    if isinstance(trainer.optimizer, LBFGS):
        raise ValueError(f"{where}: LBFGS searches for the length of its steps; there is no rate to test")
    check_same_length(x, y, where)
    twin._data(x, y, "fit")  # says what is wrong with them, by their own rows and once
    low, high = interval(where, low, high, "> 0")
    updates, batch_size = whole(where, "updates", updates, 2), whole(where, "batch_size", batch_size)
    rates = low * (high / low) ** (np.arange(updates) / (updates - 1))
    twin.use(_rising(trainer.optimizer, rates, trainer.updates))
    generator = np.random.Generator(np.random.PCG64([trainer.seed, updates]))
    rows = generator.permutation(n := len(x))
    losses: list[float] = []
    means: list[float] = []
    quietly: dict[str, Any] = {"shuffle": False, "progress": False}
    for i in range(updates):
        batch = rows[np.arange(i * batch_size, (i + 1) * batch_size) % n] if batch_size < n else rows
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                history = twin.fit(take(x, batch, where), take(y, batch, where), 1, batch_size, **quietly)
        except TrainingDiverged:
            break
        losses.append(history["loss"][-1])
        mean = losses[-1] if not means else MEMORY * means[-1] + (1 - MEMORY) * losses[-1]
        means.append(mean)
        if not math.isfinite(mean) or losses[-1] > BLOWN_UP * min(means):
            break
    if not losses:
        raise ValueError(
            f"{where}: the loss is not finite at the lowest rate {low:g}; try a lower one or scaled inputs"
        )
    return RangeTest(rates[: len(losses)], np.array(losses), np.array(means))


def _rising(optimizer: Optimizer, rates: Floats, begun: int) -> Optimizer:
    """The optimizer at these rates from its update `begun` on."""

    def scaled(ratio: float) -> Callable[[int], float]:
        return lambda k: float(ratio * rates[min(k - begun, len(rates) - 1)])

    groups: dict[str, dict[str, Any]] = {}
    for pattern, more in optimizer.groups.items():
        own, base = more.get("lr"), optimizer.lr
        ratio = own / base if isinstance(own, float | int) and isinstance(base, float) else 1.0
        groups[pattern] = dict(more) | ({} if own is None else {"lr": scaled(ratio)})
    return replace(optimizer, lr=scaled(1.0), groups=groups)
