"""What surrounds the loop: the progress bar, and Ctrl-C held back until the step in flight is done."""

import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Bar", "Interrupts"]


class Interrupts:
    """Inside the block SIGINT is noted, not raised; `deliver()` and the block's end hand it to the handler before ours.

    A second Ctrl-C goes through at once. Off the main thread, where Python delivers no signals, it does nothing.
    """

    pending = False

    def __enter__(self) -> "Interrupts":
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            self._before(number, frame)
        self.pending = True

    def deliver(self) -> None:
        """Call the handler that a pending interrupt was held back from."""
        if self.pending:
            self.pending = False
            self._before(signal.SIGINT, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if kind is None:
                self.deliver()


class Bar:
    """A tqdm bar over samples with the loss, refreshed at most twice a second; only if asked for or on a terminal."""

    def __init__(self, show: bool | None, epochs: int, rows: int, first_epoch: int) -> None:
        self._bar: Any = None
        self._next = 0.0
        self._epoch, self._rows, self._seen = first_epoch, rows, 0
        if show or (show is None and sys.stderr is not None and sys.stderr.isatty()):
            from tqdm import tqdm

            self._bar = tqdm(total=epochs * rows, unit=" samples", unit_scale=True, dynamic_ncols=True, leave=False)

    @property
    def shown(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    def due(self) -> bool:
        """Whether half a second has passed since the last refresh."""
        return time.perf_counter() >= self._next

    def advance(self, seen: int, loss: float) -> None:
        """Show that `seen` rows of the epoch are done."""
        self._next = time.perf_counter() + 0.5
        self._bar.update(seen - self._seen)
        self._seen = seen
        self._bar.set_postfix_str(f"epoch {self._epoch + 1}, loss {loss:.4g}")

    def epoch(self, figures: Mapping[str, float]) -> None:
        """Show an epoch's figures."""
        self._epoch += 1
        if self.shown:
            self._bar.update(self._rows - self._seen)
            self._seen = 0
            self._bar.set_postfix_str(f"epoch {self._epoch}, " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._bar.close()
