"""The learning rate of each update, whatever stands in an optimizer's `lr`; a history's figures, made comparable."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gpubackprop.schedules import Schedule  # whose classes take 10 ms to import: only those who ask have them

__all__ = ["History", "Rate", "rates", "watched"]

Floats = npt.NDArray[np.float64]
History = Mapping[str, Sequence[float]]
Rate = Union[float, "Schedule", Callable[[int], float]]
RISING = ("accuracy", "r2")  # figures that are better the larger they are


def watched(history: History, monitor: str | None, where: str) -> tuple[str, list[float]]:
    """The figure's name, and its value after each epoch, negative where larger is better; NaN where it was not taken.

    monitor=None means the validation loss if the last epoch has one, else the loss.
    """
    validated = not math.isnan(history.get("val_loss", [math.nan])[-1])
    key = monitor or ("val_loss" if validated else "loss")
    if key not in history:
        raise ValueError(f"{where}: unknown figure {key!r}; the history has {', '.join(history)}")
    sign = -1 if key.removeprefix("val_") in RISING else 1
    return key, [sign * v for v in history[key]]


def rates(lr: Rate, updates: Floats, epoch: int, history: History) -> Floats:
    """The learning rate of each of an epoch's updates, whose numbers count from 0: finite and not negative."""
    if callable(own := getattr(lr, "rates", None)):
        values: Floats = own(updates, epoch, history)
    elif callable(lr):
        values = np.array([_number(lr(int(t)), int(t)) for t in updates])
    else:
        return np.full(updates.shape, lr)
    if not (good := (values >= 0) & (values < math.inf)).all():
        at = int(np.argmin(good))
        raise ValueError(f"learning rate: the schedule gives {values[at]} at update {int(updates[at])}; "
                         f"expected a finite number >= 0")  # fmt: skip
    return values


def _number(value: Any, t: int) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        got = f"{type(value).__name__} {value!r}"
        raise TypeError(f"learning rate: the schedule gives {got} at update {t}; expected a number") from None
