"""The reference's step table and tally in host memory, and 16-bit storage computed with as float32."""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NumpyStepTable", "NumpyTally", "Wide"]

Array = npt.NDArray[Any]
Call = Callable[[], object]


class NumpyStepTable:
    """The step table in host memory; launches read the rows in force through 0-d views of two buffers."""

    capacity = sys.maxsize

    def __init__(self, columns: Sequence[str], dtype: npt.DTypeLike) -> None:
        self.columns = tuple(columns)
        self.row, self.applied_row = np.zeros((2, len(self.columns)), dtype)  # of this step; of the steps applied
        self.control = np.array([1, 1, 1, 0], dtype)
        self.counters = np.zeros(2, np.int64)
        self.load(np.zeros((1, len(self.columns))), np.zeros(1, np.int64), 1)

    def load(self, rows: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64], first: int) -> None:
        """Take the rows of the coming steps; see StepTable."""
        with np.errstate(over="ignore"):  # a learning rate beyond float32 diverges, and is reported as that
            self.rows, self.offsets, self.first = rows.astype(self.row.dtype), offsets, first
        self.counters[:] = 0
        self._read()

    def applied(self) -> bool:
        """Whether any step was applied; see StepTable."""
        return bool(self.control[2] or self.counters[1])

    def advance(self, applies: bool = True) -> None:
        """Move on to the next row, as far as the last; see Backend.advance."""
        last = len(self.rows) - 1
        self.counters[0] += self.counters[0] < last
        self.counters[1] += applies and self.control[2] != 0 and self.counters[1] < last
        self._read()

    def _read(self) -> None:
        step, applied = self.counters.tolist()
        self.row[...] = self.rows[step]
        self.applied_row[...] = self.rows[applied]

    def step(self) -> int:
        """The number of the step in force, counted over the whole training from 1."""
        return self.first + int(self.counters[0])

    def offset(self) -> int:
        """The first row of the batch in force."""
        return int(self.offsets[self.counters[0]])

    def scalar(self, column: str, *, applied: bool = False) -> Array:
        """The column's value in force, as a 0-d view that follows it."""
        i = self.columns.index(column)
        return (self.applied_row if applied else self.row)[i : i + 1].reshape(())


class NumpyTally:
    """What an epoch adds up, in host memory."""

    def __init__(self) -> None:
        self.loss = np.zeros(())  # in float64
        self.bad_step, self.correct = np.zeros((2, 1), np.int64)

    @property
    def buffers(self) -> dict[str, Array]:
        """What the launches of a step add to."""
        return {"loss": self.loss, "bad_step": self.bad_step, "correct": self.correct}

    def clear(self) -> None:
        """Start anew."""
        for buffer in self.buffers.values():
            buffer[...] = 0

    def read(self) -> tuple[float, int, int]:
        """(loss, first bad step, rows right); see Tally."""
        return float(self.loss), int(self.bad_step[0]), int(self.correct[0])

    def peek(self) -> float:
        """The loss so far."""
        return float(self.loss)

    def adding(self, total: Array, steps: NumpyStepTable) -> Call:
        """The call that adds a step's total."""

        def add() -> None:
            value = float(total)
            self.loss[...] += value
            if not math.isfinite(value) and not self.bad_step[0]:
                self.bad_step[0] = steps.step()

        return add

    def counting(self, x: Array, labels: Array) -> Call:
        """The call that counts the rows whose largest element stands at the label."""
        best, hit = np.empty(len(x), np.intp), np.empty(len(x), bool)

        def add() -> None:
            x.argmax(1, best)
            np.equal(best, labels, hit)
            self.correct[0] += np.count_nonzero(hit)

        return add


class Wide:
    """Arrays as they are computed with: 16-bit ones as float32 copies, loaded before and stored after the calls."""

    def __init__(self) -> None:
        self._loads: list[Call] = []
        self._stores: list[Call] = []
        self._copies: dict[Any, Array] = {}

    def read(self, a: Array) -> Array:
        """The array, or its float32 copy."""
        if a.dtype.itemsize > 2 or a.dtype.kind in "iub":
            return a
        copy = self._copy(a)
        self._loads.append(partial(np.copyto, copy, a, "unsafe"))
        return copy

    def write(self, a: Array, keep: bool = False) -> Array:
        """The same of an array that the calls write; keep=True: they read it too."""
        if a.dtype.itemsize > 2 or a.dtype.kind in "iub":
            return a
        copy = self.read(a) if keep else self._copy(a)
        self._stores.append(partial(np.copyto, a, copy, "unsafe"))
        return copy

    def _copy(self, a: Array) -> Array:
        key = (a.ctypes.data, a.shape, a.strides)
        return self._copies.setdefault(key, np.empty(a.shape, np.float32))

    def around(self, calls: Sequence[Call]) -> list[Call]:
        """The calls with the loads before and the stores after them."""
        return [*self._loads, *calls, *self._stores]
