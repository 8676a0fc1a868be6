"""What surrounds the loop: the progress bar, and Ctrl-C and SIGTERM held back until the step in flight is done."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Bar", "Interrupts", "Terminated", "terminable"]


class Terminated(SystemExit):
    """SIGTERM came: the process is to end, with the status that a shell gives to one that the signal ended."""


def terminate(number: int, frame: FrameType | None) -> None:
    """A handler of SIGTERM: raise Terminated."""
    raise Terminated(128 + number)  # 143


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated, unless someone else handles it; off the main thread, nothing changes."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Interrupts:
    """Inside the block SIGINT and SIGTERM are noted, not raised; `deliver()` and the block's end hand them on.

    SIGINT goes to the handler before ours, SIGTERM becomes Terminated; one that someone else handles is left to that
    handler. A second signal goes through at once. Off the main thread, where Python delivers none, it does nothing.
    """

    pending = 0  # the number of the signal that is held back

    def __enter__(self) -> "Interrupts":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            if callable(before := signal.getsignal(signal.SIGINT)):
                self._before[signal.SIGINT] = before
            if (before := signal.getsignal(signal.SIGTERM)) in (signal.SIG_DFL, terminate):
                self._before[signal.SIGTERM] = before
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            self._hand_on(number, frame)
        self.pending = number

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        (terminate if number == signal.SIGTERM else self._before[number])(number, frame)

    def deliver(self) -> None:
        """Call the handler that a pending signal was held back from."""
        if number := self.pending:
            self.pending = 0
            self._hand_on(number, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._before and kind is None:
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
