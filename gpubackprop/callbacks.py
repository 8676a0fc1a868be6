"""What runs after each epoch: any function of the trainer; early stopping."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from gpubackprop.checks import flag, number, whole
from gpubackprop.names import explains_keywords
from gpubackprop.rates import direction, watched
from gpubackprop.step import Keeper

__all__ = ["Callback", "EarlyStopping", "around"]


# Called with the trainer after each epoch; one that returns True stops. One that has `begin` or `end` has them called
# with the trainer before the first epoch of a fit and after its last, however it ended.
Callback = Callable[[Any], object]


@contextmanager
def around(callbacks: Iterable[Callback], trainer: Any) -> Iterator[None]:
    """Call `begin` of those that have it, and afterwards `end` of all that were begun, the last first."""
    with ExitStack() as ends:
        for callback in callbacks:
            if (begin := getattr(callback, "begin", None)) is not None:
                begin(trainer)
            if (end := getattr(callback, "end", None)) is not None:
                ends.callback(end, trainer)
        yield


@explains_keywords
@dataclass
class EarlyStopping:
    """Stop when `monitor` has not improved by more than min_delta for `patience` epochs in a row; counted anew in each
    fit. monitor=None watches the validation loss, or the loss where there is none. With mode "auto" accuracy and r2
    improve upwards, the library's other figures downwards.

    Any other figure is one that a callback before this one in `callbacks` appends to its list in `trainer.history`,
    once per epoch: say "max" or "min".

    restore_best=True puts back the weights, statistics and moments of the best epoch at the end of the fit, whether
    it was stopped or not; the copy stays on the device. `.best` is the best figure and `.best_epoch` its epoch,
    counted from 1. The loss of an epoch is taken while its weights change: monitor a figure of validation to restore
    the weights that had it.
    """

    monitor: str | None = None
    patience: int = 10
    min_delta: float = 0.0
    restore_best: bool = True
    mode: str = "auto"
    best: float = field(default=math.nan, init=False)
    best_epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._sign = direction(self.monitor, self.mode, "EarlyStopping")
        self.patience = whole("EarlyStopping", "patience", self.patience)
        self.min_delta = number("EarlyStopping", "min_delta", self.min_delta, ">= 0")
        self.restore_best = flag("EarlyStopping", "restore_best", self.restore_best)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_keeper"}

    def begin(self, trainer: Any) -> None:
        """Forget what was seen."""
        self.best, self.best_epoch, self._least, self._waited = math.nan, 0, math.inf, 0
        self._had = len(trainer.history.get(self.monitor, ()))  # of a figure that a callback writes
        self._keeper = Keeper(trainer.model, trainer.state) if self.restore_best else None

    def __call__(self, trainer: Any) -> bool:
        """Whether to stop."""
        key = watched(trainer.history, self.monitor, "EarlyStopping")
        values, epochs = trainer.history[key], len(trainer.history["loss"])
        written = len(values) >= epochs or len(values) > self._had >= 0
        if not written and self._had >= 0:
            raise ValueError(f"EarlyStopping: the history has no {key!r} of this epoch yet; a callback that writes it "
                             f"comes before in callbacks")  # fmt: skip
        self._had = -1  # from here on the figures line up with the epochs
        value = values[-1] if written else math.nan
        if self._sign * value < self._least - self.min_delta:
            self._least, self._waited = self._sign * value, 0
            self.best, self.best_epoch = value, trainer.epoch
            if self._keeper is not None:
                self._keeper.keep()
        else:
            self._waited += 1
        return self._waited >= self.patience

    def end(self, trainer: Any) -> None:
        """Put the best epoch back."""
        if self._keeper is not None and self.best_epoch:
            self._keeper.restore()
        del self._keeper
