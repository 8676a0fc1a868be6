"""`python -m benchmarks`: the command line of the benchmark suite."""

import difflib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

import gpubackprop as gb

from .cases import CASES
from .cuda import ARCHITECTURES, CompileError
from .inventory import inventory
from .ledger import PATH, Ledger, Measured, measured, value_for, violations
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


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--arch", type=click.Choice(ARCHITECTURES), help="One architecture; else ranges over all.")
@click.option("--dtype", help="One choice of types, such as float32.")
@click.option("--update", is_flag=True, help="Compile everything and write the ledger anew (minutes; no GPU needed).")
def kernels(names: tuple[str, ...], arch: str | None, dtype: str | None, update: bool) -> None:
    """Print what every kernel compiles to: kernels/ledger.csv."""
    broken = _update() if update else []
    try:
        ledger = Ledger.read(PATH)
    except FileNotFoundError as error:
        raise click.ClickException(f"{PATH} is not there; --update writes it") from error
    click.echo(f"{ledger.tools}; {arch or ', '.join(ARCHITECTURES)}\n")
    for line in _table(ledger, names, arch, dtype):
        click.echo(line)
    if broken:
        raise click.ClickException("\n".join(["against the rules:", *broken]))


def _update() -> list[str]:
    """Write the ledger; what in it is against the rules."""
    jobs = [(entry, architecture) for entry in inventory() for architecture in ARCHITECTURES]
    results: list[Measured] = []
    with click.progressbar(measured(jobs), len(jobs), "compiling", file=sys.stderr) as progress:
        try:
            results.extend(progress)
        except CompileError as error:
            raise click.ClickException(str(error)) from error
    Ledger.of(results).write(PATH)
    return [what for result in results for what in violations(result)]


def _table(ledger: Ledger, names: Collection[str], arch: str | None, dtype: str | None) -> Iterator[str]:
    """The chosen lines in columns as wide as they need; a heading's words stand one below another."""
    if not any(dtype in (None, key[1]) for key in ledger.lines):
        types = ", ".join(dict.fromkeys(key[1] for key in ledger.lines))
        raise click.ClickException(f"no types {dtype!r} in the ledger; choose from {types}")
    known = dict.fromkeys(name for name, _ in ledger.lines)
    if unknown := [name for name in names if name not in known]:
        raise click.ClickException("\n".join(_no_kernel(name, known) for name in unknown))
    rows = [
        [*key, *(value_for(arch, cell) if arch else _range(cell) for cell in line.values())]
        for key, line in ledger.lines.items()
        if (not names or key[0] in names) and (not dtype or key[1] == dtype)
    ]
    if not rows:
        raise click.ClickException(f"{', '.join(names)}: not with types {dtype!r}")
    heads = [head.split() for head in ["kernel", "types", *next(iter(ledger.lines.values()))]]
    upper, lower = [h[0] if len(h) > 1 else "" for h in heads], [h[-1] for h in heads]
    rows = [upper, lower, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for row in rows:
        cells = (cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(cells).rstrip()


def _no_kernel(name: str, known: Iterable[str]) -> str:
    near = ", ".join(difflib.get_close_matches(name, list(known)))
    return f"no kernel {name!r} in the ledger; {f'near: {near}' if near else 'all: python -m benchmarks kernels'}"


def _range(cell: str) -> str:
    """`32-48` for `32|40|48`; other values that differ as they are."""
    values = dict.fromkeys(cell.split("|"))
    numbers = sorted(map(int, values)) if all(v.isdigit() for v in values) and len(values) > 1 else []
    return f"{numbers[0]}-{numbers[-1]}" if numbers else "|".join(values)


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
