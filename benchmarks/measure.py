"""Medians of interleaved repeats: what is compared runs in turn, so that a slow minute slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpubackprop.backends import get_backend
from gpubackprop.backends.native import Job, NativeBackend
from gpubackprop.backends.threads import get_threads

__all__ = ["Limits", "forget_peak", "interleaved", "limits", "median_and_spread", "peak_memory", "timed"]


def timed(call: Callable[[], object], device: str = "cpu") -> dict[str, float]:
    """Seconds of one call; on a CUDA device, which it must leave idle, also the seconds between events around it."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - start}
    import cupy

    first, last = (cupy.cuda.Event() for _ in range(2))
    first.record()
    seconds = timed(call)
    last.record()
    last.synchronize()
    return seconds | {"device_seconds": cupy.cuda.get_elapsed_time(first, last) / 1e3}


def interleaved(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call in each of `repeats` rounds, after one round to warm up; every round runs all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repeats + 1):
        for name, call in contenders.items():
            taken = timed(call)["seconds"]
            if round_:
                seconds[name].append(taken)
    return seconds


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Median, and half the distance between the quartiles over the median."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [*seconds] * 3
    return middle, (high - low) / 2 / middle


@dataclass(frozen=True)
class Limits:
    """What this machine's CPU did at most, in all threads: multiply-adds of float32 in registers, and copying."""

    flops: float  # in a second; 0: not known
    bytes: float  # read and written in a second

    def __str__(self) -> str:
        peak = f"{self.flops / 1e9:.0f} GFLOP/s in registers, " if self.flops else ""
        return f"{peak}{self.bytes / 1e9:.1f} GB/s copied"

    def share(self, flops: int, bytes_: int, seconds: float) -> float:
        """Of the limit that is the nearer one; 0 where none is known."""
        return max(flops / self.flops if self.flops else 0.0, bytes_ / self.bytes) / seconds


def limits(rounds: int = 7) -> Limits:
    """The best of some rounds."""
    back = get_backend("cpu")
    x = np.ones(2**24, np.float32)
    y = np.zeros_like(x)
    copied = min(timed(lambda: back.write(y, x))["seconds"] for _ in range(rounds))
    if not isinstance(back, NativeBackend):
        return Limits(0.0, 2 * x.nbytes / copied)
    pieces, steps, each = 4 * get_threads(), 100_000, np.zeros(1, np.int64)
    totals = np.zeros(pieces, np.float32)
    job = Job.of(back.library.kernel("limits", np.dtype(np.float32)), totals, pieces, steps, each)
    taken = min(timed(job)["seconds"] for _ in range(rounds))
    return Limits(pieces * steps * float(each[0]) / taken, 2 * x.nbytes / copied)


def peak_memory() -> int:
    """The most bytes that this process has held, since `forget_peak` if that was called; 0 where no one can tell."""
    try:
        status = Path("/proc/self/status").read_text()  # ru_maxrss would have the parent's in it
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def forget_peak() -> None:
    """Count the peak from what the process holds now, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
