"""`python -m benchmarks`: the command line of the benchmark suite."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

import gpubackprop as gb

from .cases import CASES
from .measure import interleaved, median_and_spread


@click.group()
def main() -> None:
    """Benchmarks of gpubackprop: every claim of speed has its row here."""


@main.command()
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="A network; all by default.")
@click.option("--activation", default="relu", show_default=True, help="Of the hidden layers.")
@click.option(
    "--repeats", default=7, show_default=True, type=click.IntRange(min=2), help="Rounds, after one to warm up."
)
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write every figure to this file.")
def run(names: tuple[str, ...], activation: str, repeats: int, path: str | None) -> None:
    """Time a training step against its matrix products alone."""
    figures = []
    click.echo(
        f"{'network (batch)':<32} {'step, ms':>10} {'products, ms':>13} {'ratio':>6} {'spread':>7} {'GFLOP/s':>8}"
    )
    for name in names or CASES:
        case = CASES[name]
        seconds = interleaved({"step": case.fit(activation=activation), "products": case.products()}, repeats)
        (step, spread), (floor, _) = (median_and_spread([s / case.steps for s in seconds[k]]) for k in seconds)
        figures.append({"case": name, "step": step, "products": floor, "ratio": step / floor, "spread": spread})
        click.echo(f"{name:<32} {step * 1e3:10.3f} {floor * 1e3:13.3f} {step / floor:6.2f} {spread:7.1%} "
                   f"{case.gemm_flops / step / 1e9:8.1f}")  # fmt: skip
    if path:
        about = circumstances() | {"activation": activation, "repeats": repeats, "cases": figures}
        Path(path).write_text(json.dumps(about, indent=2) + "\n")


def circumstances() -> dict[str, Any]:
    """Where and with what the figures were taken: versions, commit, machine, BLAS and its threads (extra `bench`)."""
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
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "blas": blas,
        "date": datetime.now(UTC).isoformat("T", "seconds"),
    }  # fmt: skip


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
