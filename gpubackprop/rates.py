"""The learning rate of each update, whatever stands in an optimizer's `lr`; which way a history's figures improve."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import numpy.typing as npt

from gpubackprop.checks import choice

if TYPE_CHECKING:
    from gpubackprop.schedules import Schedule  # whose classes take 10 ms to import: only those who ask have them

__all__ = ["History", "Rate", "check_measured", "direction", "measures", "rates", "watched"]

Floats = npt.NDArray[np.float64]
History = Mapping[str, Sequence[float]]
Rate = Union[float, "Schedule", Callable[[int], float]]
RISING = ("accuracy", "r2")  # figures that are better the larger they are
FALLING = ("gap", "loss", "lr", "mae", "mse")
MODES = ("auto", "max", "min")


def measures(key: str) -> bool:
    """Whether a figure of that name is the library's own; others are what callbacks write."""
    return key.removeprefix("val_") in (*RISING, *FALLING)


def direction(monitor: str | None, mode: str, where: str) -> int:
    """1 if the figure is better the smaller it is, −1 if the larger; mode "auto" knows the library's own."""
    if not isinstance(monitor, str | None):
        got = f"{type(monitor).__name__} {monitor!r}"
        raise TypeError(f"{where}: monitor must be the name of a figure, such as 'val_loss', got {got}")
    choice(where, "mode", mode, MODES)
    name = (monitor or "loss").removeprefix("val_")
    if mode == "auto" and not measures(name):
        known = ", ".join(sorted((*RISING, *FALLING)))
        raise ValueError(f"{where}: {monitor!r} is no figure of the library's own ({known}, val_…); say which way it "
                         f"improves: mode='max' or mode='min'")  # fmt: skip
    return -1 if mode == "max" or (mode == "auto" and name in RISING) else 1


def watched(history: History, monitor: str | None, where: str) -> str:
    """The figure's name; monitor=None means the validation loss if the last epoch has one, else the loss."""
    validated = not math.isnan(history.get("val_loss", [math.nan])[-1])
    key = monitor or ("val_loss" if validated else "loss")
    if key not in history:
        raise ValueError(f"{where}: unknown figure {key!r}; the history has {', '.join(history)}; a callback that "
                         f"writes it comes before in callbacks")  # fmt: skip
    return key


def check_measured(monitor: str | None, measured: Collection[str], where: str) -> None:
    """Raise if the figure is one of the library's own that a fit does not measure."""
    if monitor is not None and measures(monitor) and monitor not in measured:
        validated = "val_loss" in measured or not (monitor.startswith("val_") or monitor == "gap")
        remedy = "choose one of these, or name its metric" if validated else "pass validation_data"
        raise ValueError(f"{where}: {monitor!r} is not measured in this fit, which has {', '.join(measured)}; {remedy}")


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
