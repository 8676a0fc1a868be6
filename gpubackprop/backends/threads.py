"""How many threads share the work of the CPU's kernels and products."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gpubackprop.checks import whole
from gpubackprop.formulas import cut

if TYPE_CHECKING:
    from gpubackprop.backends.native import Library

__all__ = [
    "available_cores", "default_threads", "get_threads", "most_threads", "one_blas_thread", "set_threads", "threads",
]  # fmt: skip


def get_threads() -> int:
    """The number of threads that share the work of this one on the CPU; 1 without the native library, whose they are.

    By default as many as there are cores that the process may use (affinity, a container's quota), or as the variables
    GPUBACKPROP_THREADS or OMP_NUM_THREADS say. Where threadpoolctl has lowered the number of NumPy's BLAS, no more
    than that.
    """
    return 1 if (own := _library()) is None else own.get_threads()


def set_threads(number: int) -> None:
    """From now on so many threads share work on the CPU, in the whole process; results are the same bits."""
    number = _number("set_threads", number)
    if (own := _library()) is not None:
        own.set_threads(number)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Inside, so many threads share the work of this one; other threads of Python keep theirs."""
    number = _number("threads", number)
    if (own := _library()) is None:
        yield
        return
    former = own.set_threads_here(number)
    try:
        yield
    finally:
        own.set_threads_here(former)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside, NumPy's products are computed by the thread that asks: the same bits however many BLAS has."""
    with nullcontext() if (own := _library()) is None else own.one_blas_thread():
        yield


def _library() -> "Library | None":
    """The native library, if it is in use."""
    from gpubackprop.backends.native import library, why_not_native

    return None if why_not_native() else library()


def _number(where: str, number: int) -> int:
    number = whole(where, "number", number)
    if number > most_threads():
        raise ValueError(
            f"{where}: number is {number}, expected at most {most_threads()}, four times the machine's cores"
        )
    return number


# ---- what the machine and its user say -------------------------------------------------------------------------------


def most_threads() -> int:
    """Four times the machine's cores."""
    return 4 * (os.cpu_count() or 1)


def default_threads() -> int:
    """GPUBACKPROP_THREADS, if it is set, else OMP_NUM_THREADS, but no more than the cores that may be used."""
    found = available_cores()
    if not (wish := os.environ.get("GPUBACKPROP_THREADS", "").strip()):
        others = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # one number for each level
        return min(found, max(1, int(others))) if others.isdecimal() and len(others) < 10 else found
    most, number = most_threads(), wish.isdecimal()
    if number and len(wish) < 10 and int(wish) <= most:
        return max(1, int(wish))
    used = most if number else found
    expected = f"an integer from 1 to {most}, four times the number of cores"
    message = f"GPUBACKPROP_THREADS is {cut(repr(wish), 40)}, expected {expected}; {used} threads are used"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return used


def available_cores() -> int:
    """Cores that the process may use: those of its affinity, or what the quota of its control group comes to."""
    found = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(found, quota) if (quota := _quota()) else found


def _quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Cores, rounded up, that the tightest quota on the process's control group or one above it allows; None: any."""
    shares = []
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "cpu", "cpu,cpuacct"):
                continue
            base = root / controllers
            for folder in (base / path.lstrip("/"), *(base / path.lstrip("/")).parents):
                with suppress(OSError, ValueError):
                    quota, period = _read_quota(folder)
                    if quota > 0:
                        shares.append(-(-quota // period))
    return max(1, min(shares)) if shares else None


def _read_quota(folder: Path) -> tuple[int, int]:
    """(quota, period) in µs, of either version of control groups; a quota of −1 or "max" is none."""
    if (file := folder / "cpu.max").exists():
        quota, period = file.read_text().split()
        return (-1 if quota == "max" else int(quota)), int(period)
    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return int(quota), int(period)
