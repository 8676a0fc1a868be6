"""Figures as tables, and as a file with where and when they were taken."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop.backends.native import library, why_not_native
from gpubackprop.backends.threads import get_threads
from gpubackprop.checkpoint import write_file
from gpubackprop.installation import nvidia_driver

from .cases import CASES, Busy, Scaling
from .measure import Limits, median_and_spread
from .peers.gpubackprop import resident
from .rounds import Figures

__all__ = [
    "along", "circumstances", "columns_of", "compared", "duration", "hardware", "read", "scaling", "shares", "table",
    "write",
]  # fmt: skip


AXES = {"batch": ("row", 1), "width": ("unit²", 2), "depth": ("layer", 1), "samples": ("sample", 1)}


def duration(seconds: float) -> str:
    """Three digits and a unit: 26.4 µs."""
    units = (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
    unit, factor = next(((u, f) for u, f in units if abs(seconds) * f >= 1), ("ns", 1e9))
    value = seconds * factor
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(max(abs(value), 1e-3)))))}f} {unit}"


def table(found: Sequence[Figures], most: Limits | None = None) -> Iterator[str]:
    """A case's figures in columns: the time of a unit, how it compares, and how near it comes to what is possible."""
    taken = [f for f in found if f.seconds]
    if not taken:
        yield f"{found[0].case}: nothing was measured" if found else "nothing"
        return
    base = taken[0]
    floor = next((f for f in taken if f.contender.startswith("products")), None)
    columns: dict[str, Callable[[Figures], str]] = {
        f"a {base.unit}": lambda f: duration(f.median),
        "on the device": lambda f: duration(median_and_spread(f.device_seconds)[0]) if f.device_seconds else "",
        "spread": lambda f: f"{f.spread:.1%}",
        f"× {base.contender}": lambda f: f"{f.median / base.median:.2f}",
        "× products": lambda f: f"{f.median / floor.median:.2f}" if floor else "",
        "GFLOP/s": lambda f: f"{f.flops / f.median / 1e9:.1f}" if f.flops else "",
        "GB/s": lambda f: f"{f.bytes / f.median / 1e9:.1f}" if f.bytes else "",
        "of the limit": lambda f: f"{share:.0%}" if most and (share := most.share(f.flops, f.bytes, f.median)) else "",
        "memory": lambda f: f"{f.memory / 1e6:.0f} MB" if f.memory else "",
    }
    filled = {head: cells for head, of in columns.items() if any(cells := [of(f) for f in taken])}
    rows = [[base.case, *filled], *([f.contender, *cells] for f, *cells in zip(taken, *filled.values(), strict=True))]
    yield from columns_of(rows)
    yield from (f"{f.contender}: {f.absent}" for f in found if f.absent)


def along(found: Iterable[Figures]) -> Iterator[tuple[Scaling, Figures]]:
    """The measured figures of the scaling cases, with the cases."""
    for f in found:
        if f.seconds and isinstance(case := CASES.get(f.case), Scaling):
            yield case, f


def scaling(found: Sequence[Figures], device: str) -> Iterator[str]:
    """For each axis: what an epoch takes, how much of it each added row, layer, … took, and what the plan holds."""
    cases = list(along(found))
    first = cases[0][1].contender if cases else ""
    for axis, (unit, power) in AXES.items():
        own = [(case, f) for case, f in cases if case.axis == axis and f.contender == first]
        if not own:
            continue
        rows = [[axis, "a step", f"each {unit} more", "resident"]]
        before: tuple[float, float] | None = None
        for case, f in own:
            # an epoch for the samples, else a step
            cost, amount = f.median * (case.steps if axis == "samples" else 1), float(case.value) ** power
            more = "" if before is None else duration((cost - before[0]) / (amount - before[1]))
            rows.append([str(case.value), duration(f.median), more, f"{resident(case, device) / 1e6:.2f} MB"])
            before = cost, amount
        yield from columns_of(rows)
        yield ""


def shares(found: Iterable[Figures]) -> Iterator[str]:
    """What each step beside others took, in units of what it takes alone, and of a fair share of the cores."""
    cases = [(case, f) for f in found if f.seconds and isinstance(case := CASES.get(f.case), Busy)]
    alone = {(case.name, f.contender): f for case, f in cases}
    cores = os.cpu_count() or 1
    rows = [["case", "contender", "a step", "× alone", "a fair share"]]
    for case, f in cases:
        if (quiet := alone.get((case.alone, f.contender))) is None or quiet is f:
            continue
        fair = max(1.0, (case.beside + cores * case.at_once) / cores)  # for a fit on as many threads as cores
        rows.append([case.name, f.contender, duration(f.median), f"{f.median / quiet.median:.2f}", f"{fair:.2f}"])
    if len(rows) > 1:
        yield from columns_of(rows, left=2)


def compared(before: Sequence[Figures], after: Sequence[Figures], *, alike: bool = True) -> Iterator[str]:
    """What both took, with the ratio of medians: "faster" or "slower" where it is more than both spreads together,
    there are rounds enough to tell, and the machines are alike."""
    old = {(f.case, f.contender): f for f in before if f.seconds}
    rows = [["case", "contender", "A", "B", "B / A", ""]]
    for new in after:
        if not new.seconds or (was := old.get((new.case, new.contender))) is None:
            continue
        ratio = new.median / was.median
        enough = alike and min(len(was.seconds), len(new.seconds)) >= 3
        sure = enough and abs(ratio - 1) > was.spread + new.spread
        verdict = ("slower" if ratio > 1 else "faster") if sure else ""
        rows.append([new.case, new.contender, duration(was.median), duration(new.median), f"{ratio:.2f}", verdict])
    if len(rows) > 1:
        yield from columns_of(rows, left=2)


def columns_of(rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Columns as wide as they need, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(cells).rstrip()


def circumstances() -> dict[str, Any]:
    """Where and with what figures are taken: versions, commit, machine, BLAS and its threads (extra `bench`)."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    try:
        from threadpoolctl import threadpool_info

        blas = [{k: pool.get(k) for k in ("internal_api", "version", "num_threads")} for pool in threadpool_info()]
    except ImportError:
        blas = None
    return {
        "gpubackprop": gb.__version__, "commit": commit, "numpy": np.__version__, "python": platform.python_version(),
        "cpu kernels": why_not_native() or f"{library().instructions}, {get_threads()} threads",
        "machine": f"{_processor()}, {os.cpu_count()} cores", "gpu": str(nvidia_driver() or "no NVIDIA driver"),
        "blas": blas,
        "date": datetime.now(UTC).isoformat("T", "seconds"),
    }  # fmt: skip


def hardware(about: dict[str, Any]) -> str:
    """What figures were taken on, in a line to stand over their tables."""
    return f"{about['machine']}; {about['gpu']}; CPU kernels: {about['cpu kernels']}; NumPy {about['numpy']}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(path: str, found: Sequence[Figures]) -> None:
    """All figures, in a file."""
    records = [f.record() for f in found]
    write_file(path, (json.dumps(circumstances() | {"figures": records}, indent=2) + "\n").encode())


def read(path: str) -> tuple[dict[str, Any], list[Figures]]:
    """Circumstances and figures from such a file; ValueError if it is none."""
    try:
        about = json.loads(Path(path).read_text())
        found = [Figures.of(record) for record in about.pop("figures")]
        if all(isinstance(about[key], str) for key in ("machine", "gpubackprop", "numpy", "date")):
            return about, found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: not figures of `python -m benchmarks run --json`") from error
    raise ValueError(f"{path}: does not say what machine and versions its figures are of")
