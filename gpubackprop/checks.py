"""Arguments at the door: numbers, flags and choices, with one form of error for all."""

import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Real
from typing import Any

import numpy as np

from gpubackprop.names import hint

__all__ = ["choice", "flag", "interval", "number", "settle", "warn", "whole"]

BOUNDS = {
    "> 0": lambda v: v > 0,
    ">= 0": lambda v: v >= 0,
    "in [0, 1)": lambda v: 0 <= v < 1,
    "in (0, 1)": lambda v: 0 < v < 1,
    "in (0, 1]": lambda v: 0 < v <= 1,
}


def number(where: str, key: str, value: Any, bounds: str = "") -> float:
    """The value as a float: a finite number within the bounds, a key of BOUNDS."""
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's numbers are Real
        raise TypeError(f"{where}: {key} must be a number, got {type(value).__name__} {value!r}")
    if not (math.isfinite(value) and (not bounds or BOUNDS[bounds](value))):
        raise ValueError(f"{where}: {key} must be {bounds or 'finite'}, got {float(value):g}")
    return float(value)


def whole(where: str, key: str, value: Any, least: int = 1) -> int:
    """The value as an int: an integer, and no less than that."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{where}: {key} must be an integer, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{where}: {key} must be at least {least}, got {value}")
    return int(value)


def flag(where: str, key: str, value: Any) -> bool:
    """The value as a bool, which it must be."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{where}: {key} must be True or False, got {type(value).__name__} {value!r}")
    return bool(value)


def interval(where: str, low: Any, high: Any, bounds: str = "") -> tuple[float, float]:
    """Two numbers as floats, low less than high, each within the bounds."""
    low, high = number(where, "low", low, bounds), number(where, "high", high, bounds)
    if not low < high:
        raise ValueError(f"{where}: low {low:g} must be less than high {high:g}")
    return low, high


def settle(settings: Any, bounds: Mapping[str, str], otherwise: str) -> None:
    """Check each field of a dataclass that is declared float, int or bool, and keep it as that type, frozen or not.

    A float must lie within the bounds of its name, or `otherwise`; an int is at least 1, or 0 where its bounds say so.
    """
    where = type(settings).__name__
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.type is float:
            value = number(where, f.name, value, bounds.get(f.name, otherwise))
        elif f.type is int:
            value = whole(where, f.name, value, 0 if bounds.get(f.name) == ">= 0" else 1)
        elif f.type is bool:
            value = flag(where, f.name, value)
        object.__setattr__(settings, f.name, value)


def choice(where: str, key: str, value: Any, known: Iterable[str | None]) -> None:
    """Raise unless the value is one of those known."""
    known = list(known)
    if not (value is None or isinstance(value, str)) or value not in known:
        listed = ", ".join(map(repr, known))
        raise ValueError(f"{where}: unknown {key} {value!r}; choose from {listed}{hint(key, value, known)}")


def refuse_masked(where: str, name: str, a: Any) -> None:
    """ValueError if a NumPy array has masked values, which np.asarray would unmask."""
    mask = getattr(a, "mask", None) if isinstance(a, np.ndarray) else None
    if mask is not None and np.any(mask):
        raise ValueError(f"{where}: {name} has masked values, expected none; remove such rows or use {name}.filled()")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside the library that led here, however many of its functions lie between."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == "gpubackprop":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
