"""What surrounds the loop: the progress bar, and Ctrl-C and SIGTERM held back until the step in flight is done."""

import signal
import sys
import threading
import time
import warnings
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


def in_notebook() -> bool:
    """Whether this runs in a notebook, whose kernel shows what is written to stderr and its widgets."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


class Bar:
    """A tqdm bar over samples with the figures, refreshed at most twice a second; only if asked for, on a terminal or
    in a notebook. At the end a line with the last epoch's figures stays."""

    def __init__(self, show: bool | None, epochs: int, rows: int, first_epoch: int) -> None:
        self._bar: Any = None
        self._next = 0.0
        self._epoch, self._rows, self._seen = first_epoch, rows, 0
        self._figures = ""  # of the last epoch
        notebook = show is not False and in_notebook()
        if show or (show is None and (notebook or (sys.stderr is not None and sys.stderr.isatty()))):
            self._bar = _tqdm(notebook)(
                total=epochs * rows, unit=" samples", unit_scale=True, dynamic_ncols=True, leave=notebook,
                bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}" if notebook else
                "{percentage:3.0f}%|{bar:10}| {elapsed}<{remaining}, {rate_fmt}{postfix}",
            )  # fmt: skip

    @property
    def shown(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    def due(self) -> bool:
        """Whether half a second has passed since the last refresh."""
        return time.perf_counter() >= self._next

    def advance(self, seen: int, loss: float) -> None:
        """Show that `seen` rows of the epoch are done, with their loss, and the epoch before."""
        self._next = time.perf_counter() + 0.5
        self._bar.update(seen - self._seen)
        self._seen = seen
        before = f"; {self._figures}" if self._figures else ""
        self._bar.set_postfix_str(f"epoch {self._epoch + 1}: loss {loss:.4g}{before}")

    def epoch(self, figures: Mapping[str, float]) -> None:
        """Show an epoch's figures."""
        self._epoch += 1
        if self.shown:
            self._bar.update(self._rows - self._seen)
            self._seen = 0
            self._figures = f"epoch {self._epoch}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
            self._bar.set_postfix_str(self._figures)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._bar.close()
            if self._figures and not self._bar.leave:
                seconds = self._bar.format_interval(self._bar.format_dict["elapsed"])
                self._bar.write(f"{self._figures} ({seconds})", file=sys.stderr)


def _tqdm(notebook: bool) -> Any:
    """tqdm's bar for the place; its own choice is for notebooks alone, because it imports asyncio."""
    if not notebook:
        from tqdm import tqdm

        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without ipywidgets it writes text, and says so
        from tqdm.auto import tqdm as chosen

    return chosen
