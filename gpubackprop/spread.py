"""Columns of numbers, measured in float64 part by part: how they spread, and what another type would lose of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["TOLERATED", "Lost", "Spread", "extremes", "lost", "spread", "unsquared"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

PART = 2**16  # elements at a time: what is made of them stays in the cache
PLAIN = (1e-140, 1e140)  # deviations whose squares float64 holds
TOLERATED = 0.01  # rounding errors, in deviations of the column
NOISE = 8 * float(np.finfo(np.float64).eps)  # of the numbers, as which a constant that was computed may spread


@dataclass(frozen=True, eq=False)
class Spread:
    """Of each column the mean and the standard deviation over all rows, which is 0 for a constant and only for one."""

    rows: int
    mean: Floats
    deviation: Floats

    @property
    def squares(self) -> Floats:
        """Σ(a − mean)²."""
        return self.rows * self.deviation * self.deviation


@dataclass(frozen=True)
class Lost:
    """What a type loses of a column: the largest error, and the row and the number where it is made."""

    column: int
    row: int
    value: float
    error: float
    deviation: float
    dtype: str

    def phrase(self, name: str = "") -> str:
        """The loss in words, of a column of that name."""
        which = f"column {name or self.column}"
        if np.isinf(self.error):
            return f"{which} has {self.value:.3g} at row {self.row}, too large for {self.dtype}"
        return (
            f"{which} has a standard deviation of {self.deviation:.3g}, but {self.dtype} rounds it by up to "
            f"{self.error:.2g}, at row {self.row}"
        )


def spread(a: Array) -> Spread:
    """Means and deviations of the columns of a (rows, columns), finite numbers of any type; nothing is copied whole."""
    low, high = extremes(a)
    if _rounds(a, low, high):
        least, above = _above(a)
        of = spread(above)
        return Spread(len(a), of.mean + least, of.deviation)
    with np.errstate(all="ignore"):
        mean, squares = _moments(a, None)
        deviation = np.where(high == low, 0, np.sqrt(squares / len(a)))
        poor = (high > low) & ~((deviation > PLAIN[0]) & (deviation < PLAIN[1]))
        if poor.any():  # squares that under- or overflow: the same in units of a power of two
            _, exponent = np.frexp(np.maximum(abs(low), abs(high)))
            unit = np.ldexp(1.0, -np.maximum(exponent, -1000))
            scaled, squares = _moments(a, unit)
            mean = np.where(poor, scaled / unit, mean)
            deviation = np.where(poor, np.sqrt(squares / len(a)) / unit, deviation)
    return Spread(len(a), mean, deviation)


def extremes(a: Array) -> tuple[Floats, Floats]:
    """The smallest and the largest number of each column; NaN where there is one."""
    low, high = np.full(a.shape[1], np.inf), np.full(a.shape[1], -np.inf)
    with np.errstate(all="ignore"):
        for part in _parts(a):
            for extreme, reduce in ((low, np.minimum), (high, np.maximum)):
                reduce(extreme, reduce.reduce(_widened(part, reduce), 0), out=extreme, casting="unsafe")
    return low, high


def lost(a: Array, dtype: npt.DTypeLike) -> Lost | None:
    """The first column of finite numbers a (rows, columns) of which the type keeps too little; None if there is none.

    That is a column with a number beyond the type, or whose rounding errors reach a hundredth of its deviation. A
    column that is constant but for the noise of float64 has nothing to lose.
    """
    dtype = np.dtype(dtype)
    if np.can_cast(a.dtype, dtype, "safe") and not _is_long(a):  # of which NumPy says that float64 holds it
        return None
    info, (low, high) = np.finfo(dtype), extremes(a)
    with np.errstate(all="ignore"):
        top, span = np.maximum(abs(low), abs(high)), high - low
        if _rounds(a, low, high):
            span = extremes(_above(a)[1])[1]
        error = np.maximum(top * float(info.eps) / 2, float(info.smallest_subnormal) / 2)
        # a deviation is at least span / sqrt(2 rows), so that most columns need no closer look
        noise = NOISE if a.dtype.kind == "f" else 0  # integers are exact
        doubtful = (span > noise * top) & (error * np.sqrt(2 * len(a)) >= TOLERATED * span)
    for column in np.flatnonzero(doubtful | (top > float(info.max))).tolist():
        values = a[:, column : column + 1]
        row, worst = _worst(values, dtype)
        deviation = float(spread(values).deviation[0])
        if worst > TOLERATED * deviation:
            return Lost(column, row, float(values[row, 0]), worst, deviation, dtype.name)
    return None


def unsquared(a: Array, dtype: npt.DTypeLike) -> str | None:
    """The first column of a whose squares, or whose squared deviations, under- or overflow the type, in words."""
    info, of = np.finfo(np.dtype(dtype)), spread(a)
    low, high = 10 * float(info.tiny) ** 0.5, (float(info.max) / len(a)) ** 0.5  # the squares of all rows are summed
    with np.errstate(all="ignore"):
        size = np.hypot(of.mean, of.deviation)
    bad = (size > high) | ((of.deviation < low) & (of.deviation > NOISE * size))
    if not bad.any():
        return None
    column = int(bad.argmax())
    what = f"numbers of about {size[column]:.3g}"
    if size[column] <= high:
        what = f"a standard deviation of {of.deviation[column]:.3g}"
    return f"column {column} has {what}, whose square {info.dtype} cannot hold"


def _worst(column: Array, dtype: np.dtype[Any]) -> tuple[int, float]:
    """The row of the largest rounding error, and the error."""
    row, worst, first = 0, -1.0, 0
    for part in _parts(column):
        values = part if _is_long(part) else part.astype(np.float64)
        with np.errstate(all="ignore"):
            cast = values.astype(dtype).astype(values.dtype)
            errors = abs((values - cast).view(np.int64) if _is_long(part) else values - cast)
        if (error := float(errors.max())) > worst:
            row, worst = first + int(errors.argmax()), error
        first += len(part)
    return row, worst


def _moments(a: Array, unit: Floats | None) -> tuple[Floats, Floats]:
    """Means and squared deviations Σ(z − mean)² of z = a · unit
    (Chan et al., "Algorithms for Computing the Sample Variance")."""
    n, mean, squares = 0, np.zeros(a.shape[1]), np.zeros(a.shape[1])
    for part in _parts(a):
        z = part.astype(np.float64, "C")  # bits that do not depend on the layout
        if unit is not None:
            z *= unit
        own, m = z.mean(0), len(z)
        z -= own
        z *= z
        shift = own - mean
        n += m
        mean += shift * (m / n)
        squares += z.sum(0) + shift * shift * (m * (n - m) / n)
    return mean, squares


def _is_long(a: Array) -> bool:
    """Whether they are integers of 64 bits, which float64 rounds beyond 2^53."""
    return a.dtype.kind in "iu" and a.dtype.itemsize == 8


def _rounds(a: Array, low: Floats, high: Floats) -> bool:
    """Whether float64 rounds integers between these."""
    return _is_long(a) and bool((np.maximum(abs(low), abs(high)) >= 2**53).any())


def _above(a: Array) -> tuple[Array, Array]:
    """The least integer of each column, and how far the others lie above it."""
    least = a.min(0)
    return least, (a - least).view(np.uint64).astype(np.float64)


def _parts(a: Array) -> Iterator[Array]:
    height = max(1, PART // max(1, a.shape[1]))
    return (a[start : start + height] for start in range(0, len(a), height))


def _widened(a: Array, reduce: np.ufunc) -> Array:
    """Rows that reduce to the same: several side by side, because NumPy is slow over rows of a few elements."""
    together = max(1, 256 // a.shape[1])
    rest = len(a) // together * together
    if together == 1 or not rest:
        return a
    wide = reduce.reduce(a[:rest].reshape(-1, together * a.shape[1]), 0).reshape(together, -1)
    return np.concatenate([wide, a[rest:]])
