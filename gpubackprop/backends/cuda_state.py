"""What a training step reads from the device and leaves there: the step table and the tally."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Buffer, arithmetic
from gpubackprop.backends.driver import Driver, Stream

if TYPE_CHECKING:
    from gpubackprop.backends.cuda import CudaBackend

__all__ = ["CudaStaging", "CudaStepTable", "CudaTally", "Lent", "Streams"]


class CudaStepTable:
    """The step table in device memory: `table` (capacity, columns), `offsets` (capacity,), `state` and `control`.

    state = (row of this step, row of the steps applied, number of the first step, last row): updates advance both rows,
    as far as the last.
    """

    def __init__(self, backend: "CudaBackend", columns: Sequence[str], dtype: npt.DTypeLike, steps: int) -> None:
        self.backend = backend
        self.columns = tuple(columns)
        self.capacity = steps
        self.dtype = arithmetic(dtype)
        self.table = backend.empty((steps, max(1, len(self.columns))), self.dtype)
        self.offsets = backend.empty((steps,), np.int64)
        self.state = backend.empty((4,), np.int64)
        self.control = backend.asarray(np.array([1, 1, 1, 0], self.dtype))
        self.load(np.zeros((1, len(self.columns))), np.zeros(1, np.int64), 1)

    @property
    def width(self) -> int:
        """Elements from one row to the next."""
        width: int = self.table.shape[1]
        return width

    def load(self, rows: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64], first: int) -> None:
        """Take the rows of the coming steps; see StepTable."""
        if len(rows) > self.capacity:
            raise ValueError(f"step table: {len(rows)} rows exceed its capacity of {self.capacity}")
        write = self.backend.write
        with np.errstate(over="ignore"):  # a learning rate beyond float32 diverges, and is reported as that
            values = rows.astype(self.dtype)
        if values.size:
            write(self.table[: len(rows)], values)
        write(self.offsets[: len(rows)], offsets)
        write(self.state, np.array([0, 0, first, len(rows) - 1]))

    def applied(self) -> bool:
        """Whether any step was applied; see StepTable."""
        read = self.backend.to_numpy
        return bool(read(self.control)[2] or read(self.state)[1])


class CudaTally:
    """What an epoch adds up in device memory: `loss`, a high and a low part, `events`: (first bad step, rows right)."""

    def __init__(self, backend: "CudaBackend", dtype: npt.DTypeLike) -> None:
        self.backend = backend
        self.loss = backend.empty((2,), arithmetic(dtype))
        self.events = backend.empty((2,), np.int64)
        self._seen = backend.driver.empty((2,), arithmetic(dtype), pinned=True)
        self.clear()

    @property
    def buffers(self) -> dict[str, Buffer]:
        """What the launches of a step add to."""
        return {"loss": self.loss, "events": self.events}

    def clear(self) -> None:
        """Start anew."""
        self.backend.write(self.loss, 0)
        self.backend.write(self.events, np.zeros(2, np.int64))
        self._seen[...] = 0

    def read(self) -> tuple[float, int, int]:
        """(loss, first bad step, rows right); see Tally."""
        bad_step, correct = self.backend.to_numpy(self.events).tolist()
        return _added(self.backend.to_numpy(self.loss)), bad_step, correct

    def peek(self) -> float:
        """The loss as the last peek found it; this one's copy runs behind."""
        seen = _added(self._seen)
        driver = self.backend.driver
        with driver.scope():
            driver.copy(self.loss, self._seen, driver.current())
        return seen


def _added(parts: npt.NDArray[Any]) -> float:
    """The sum of a high and a low part; the low one of infinity is not a number."""
    high, low = parts.tolist()
    return float(high + low if math.isfinite(high) else high)


class CudaStaging:
    """Batches on their way from the host: pinned memory and device memory for two, and a stream that copies.

    A slot's mark is a stream that waits for the slot's last copy and does nothing else. No memory may go while a batch
    is on its way: whoever lets go of a staging waits first.
    """

    def __init__(
        self, backend: "CudaBackend", x: npt.NDArray[Any], y: npt.NDArray[Any], w: npt.NDArray[Any] | None, rows: int
    ) -> None:
        self.driver = driver = backend.driver
        self.rows, self.sources = rows, (x, y) if w is None else (x, y, w)
        shapes = [(2 * rows, *a.shape[1:]) for a in self.sources]
        self._buffers = [backend.empty(s, a.dtype) for s, a in zip(shapes, self.sources, strict=True)]
        self.x, self.y, self.w = (*self._buffers, None)[:3]
        with driver.scope():
            self._pinned = [driver.empty(s, a.dtype, pinned=True) for s, a in zip(shapes, self.sources, strict=True)]
        self._lent = [backend.streams.lend() for _ in range(3)]
        self._copying, *self._marks = (lent.stream for lent in self._lent)

    def put(self, slot: int, index: npt.NDArray[np.intp]) -> None:
        """Gather these rows and send them to the slot; see Staging."""
        driver, start = self.driver, slot * self.rows
        part = slice(start, start + len(index))
        with driver.scope():
            driver.synchronize(self._marks[slot])  # the slot's last batch has left the pinned memory
            driver.order(driver.current(), self._copying)
            for source, pinned, buffer in zip(self.sources, self._pinned, self._buffers, strict=True):
                np.take(source, index, 0, out=pinned[part], mode="clip")
                driver.copy(pinned[part], buffer[part], self._copying)
            driver.order(self._copying, self._marks[slot])

    def ready(self, slot: int) -> None:
        """Have the current stream wait for the slot's batch."""
        with self.driver.scope():
            self.driver.order(self._marks[slot], self.driver.current())

    def wait(self) -> None:
        """Wait until nothing is on its way; see Staging."""
        with self.driver.scope():
            self.driver.synchronize(self._copying)  # itself, not the marks: a put may have been cut short


class Streams:
    """A driver's streams, lent: it makes them for good, so one whose borrower is gone is lent again."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._idle: list[Stream] = []

    def lend(self) -> "Lent":
        """A stream that nobody else has, as long as the object lives; work of one before may still be under way."""
        try:
            stream = self._idle.pop()
        except IndexError:
            with self._driver.scope():
                stream = self._driver.stream()
        lent = Lent(stream)
        weakref.finalize(lent, self._idle.append, stream).atexit = False
        return lent


@dataclass(frozen=True, eq=False)
class Lent:
    """A stream while it is lent."""

    stream: Stream
