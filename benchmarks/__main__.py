"""`python -m benchmarks`: the command line of the benchmark suite."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path

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
        about = {
            "gpubackprop": gb.__version__, "numpy": np.__version__, "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(), "date": datetime.now(UTC).isoformat("T", "seconds"),
            "activation": activation, "repeats": repeats, "cases": figures,
        }  # fmt: skip
        Path(path).write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
