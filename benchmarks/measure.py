"""Medians of interleaved repeats: what is compared runs in turn, so that a slow minute slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["forget_peak", "interleaved", "median_and_spread", "peak_memory", "timed"]


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
