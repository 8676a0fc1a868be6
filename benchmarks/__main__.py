"""`python -m benchmarks`: the command line of the benchmark suite."""

import difflib
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from gpubackprop.backends import get_backend, why_not_cuda
from gpubackprop.checkpoint import check_writable
from gpubackprop.formulas import cut
from gpubackprop.precision import PRECISIONS
from gpubackprop.roofline import GPUS

from .breakeven import GRAPH_LAUNCH, LAUNCH, cells
from .cases import chosen
from .cuda import ARCHITECTURES, CompileError
from .inventory import inventory
from .ledger import COLUMNS, PATH, Ledger, Measured, measured, tools, value_for, violations
from .measure import limits
from .plot import plot as pictures
from .report import circumstances, columns_of, compared, duration, hardware, read, scaling, shares, table, write
from .rounds import Figures, contenders, disagreement, measure


@click.group()
def main() -> None:
    """Benchmarks of gpubackprop: every claim of speed has its row here."""


@main.command()
@click.option("--case", "patterns", multiple=True, metavar="CASE", help="A case, a group of them, or a pattern with *.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    default=("cpu",),
    show_default=True,
    metavar="DEVICE",
    help="cpu, cpu:reference, cuda, …; the first is what others are compared to.",
)
@click.option(
    "--peers",
    default="torch,jax,sklearn,onnxruntime",
    show_default=True,
    metavar="NAMES",
    help="Other libraries, as torch or torch:eager; none for this one alone.",
)
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(min=2), help="Rounds.")
@click.option("--smoke", is_flag=True, help="At tiny sizes: whether it runs, not how fast.")
@click.option("--json", "path", type=click.Path(dir_okay=False, writable=True), help="Write every figure to this file.")
def run(
    patterns: tuple[str, ...], backends: tuple[str, ...], peers: str, repeats: int, smoke: bool, path: str | None
) -> None:
    """Time cases on this library and on others, each in a process of its own, in turn.

    What all compute is compared first. A case is one of the groups train, predict, update, kernel, import, shell,
    busy and scaling, or a name in them, as "train 784-128-10 (64)"; all but busy and scaling if none is given.
    """
    try:
        cases = chosen(patterns)
        wanted = [name for p in peers.split(",") if (name := p.strip()) not in ("", "none")]
        among = contenders(wanted, backends)
        for device in backends:
            get_backend(device)
        if path:
            Path(path).touch()
            check_writable(path)
    except (ValueError, RuntimeError, OSError) as error:
        raise click.UsageError(str(error)) from None
    figures: list[Figures] = []
    wrong: list[str] = []
    most = limits()
    click.echo(f"{hardware(circumstances())}; {most}\n")
    try:
        for case in cases:
            found = measure(case, among, repeats, smoke=smoke)
            figures += found
            wrong += disagreement(case, found)
            click.echo("\n".join([*table(found, most), ""]))
        for line in (*scaling(figures, backends[0]), *shares(figures)):
            click.echo(line)
    finally:  # after Ctrl-C too: the cases that are done
        if path and figures:
            write(path, figures)
    failed = [f"{f.case}: {f.contender} {f.absent}" for f in figures if f.absent.startswith("failed")]
    if wrong or failed:
        raise click.ClickException("\n".join([*wrong, *failed]))


@main.command()
@click.argument("paths", nargs=2, metavar="A.json B.json", type=click.Path(exists=True, dir_okay=False))
def compare(paths: tuple[str, str]) -> None:
    """Set the figures of two files beside each other: B over A, and whether that is more than their spreads."""
    (about_a, a), (about_b, b) = map(_read, paths)
    differ = [key for key in about_a if key not in ("date", "blas") and about_a[key] != about_b.get(key)]
    for key in differ:
        click.echo(f"{key}: {about_a[key]} and {about_b.get(key)}")
    lines = list(compared(a, b, alike="machine" not in differ))
    if not lines:
        raise click.ClickException("the files have no measured case in common")
    click.echo("\n".join(lines))


@main.command()
@click.argument("path", metavar="FIGURES.json", type=click.Path(exists=True, dir_okay=False))
@click.option("--out", default="figures", show_default=True, type=click.Path(file_okay=False, path_type=Path))
def plot(path: str, out: Path) -> None:
    """Draw the figures of a file: bars of ratios, and curves over batch, width, depth and samples (extra `plot`)."""
    about, figures = _read(path)
    try:
        written = pictures(figures, about, out)
    except ImportError as error:
        raise click.ClickException(f"{error}; pip install matplotlib") from error
    except OSError as error:
        raise click.ClickException(str(error)) from error
    except ValueError as error:  # of names that are no text to draw
        raise click.ClickException(f"{path}: cannot be drawn ({cut(' '.join(str(error).split()))})") from error
    click.echo("\n".join(map(str, written)) or "nothing was measured")


@main.command()
@click.option("--gpu", type=click.Choice(list(GPUS)), help="Model this GPU. Without, the GPU of this machine is timed.")
@click.option(
    "--precision",
    default="float32",
    show_default=True,
    type=click.Choice(list(PRECISIONS)),
    help="Of the GPU's products.",
)
@click.option("--graph", is_flag=True, help="One CUDA graph a step.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=2), help="Rounds.")
def breakeven(gpu: str | None, precision: str, graph: bool, repeats: int) -> None:
    """From which width and batch a GPU pays, against this machine's CPU."""
    if gpu:
        cost = GRAPH_LAUNCH if graph else LAUNCH
        click.echo(f"MODEL of one {GPUS[gpu].name}, not a measurement: published peaks, and {cost * 1e6:g} µs assumed "
                   "for each launch. The CPU is measured.")  # fmt: skip
    elif (reason := why_not_cuda()) is not None:
        raise click.UsageError(f"no GPU here ({reason}); --gpu models one of {', '.join(GPUS)}")
    click.echo(f"{'network':<20} {'batch':>6} {'CPU':>10} {'GPU':>10} {'GPU is':>8}")
    for cell in cells(gpu, precision, repeats, graph):
        network = "-".join([*[str(cell.width)] * 3, "10"])
        gain = f"{cell.gain:.2g} ×" + " pays" * (cell.gain > 1)
        click.echo(f"{network:<20} {cell.batch:>6} {duration(cell.cpu):>10} {duration(cell.gpu):>10} {gain:>8}")


def _read(path: str) -> tuple[dict[str, Any], list[Figures]]:
    try:
        return read(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--arch", type=click.Choice(ARCHITECTURES), help="One architecture; else ranges over all.")
@click.option("--dtype", help="One choice of types, such as float32.")
@click.option(
    "--update", is_flag=True, help="Compile what the ledger is not up to date with, and write it (no GPU needed)."
)
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
    """Bring the ledger up to date; what is left out of it, being against the rules."""
    here, entries = tools(), inventory()
    ledger = Ledger.read(PATH) if PATH.exists() else Ledger(here)
    outdated = ledger.outdated(entries, here)
    kept = {(e.name, e.variant) for e in {*entries}.difference(outdated)}
    jobs = [(entry, architecture) for entry in outdated for architecture in ARCHITECTURES]
    results: list[Measured] = []
    with click.progressbar(measured(jobs), len(jobs), "compiling", file=sys.stderr) as progress:
        try:
            results.extend(progress)
        except CompileError as error:
            raise click.ClickException(str(error)) from error
    lines = {key: line for key, line in ledger.lines.items() if key in kept} | Ledger.of(results).lines
    Ledger(here, dict(sorted(lines.items()))).write(PATH)
    return [what for result in results for what in violations(result)]


def _table(ledger: Ledger, names: Collection[str], arch: str | None, dtype: str | None) -> Iterator[str]:
    """The chosen lines in columns as wide as they need; a heading's words stand one below another."""
    if not any(dtype in (None, key[1]) for key in ledger.lines):
        types = ", ".join(dict.fromkeys(key[1] for key in ledger.lines))
        raise click.ClickException(f"no types {dtype!r} in the ledger; choose from {types}")
    known = dict.fromkeys(name for name, _ in ledger.lines)
    if unknown := [name for name in names if name not in known]:
        raise click.ClickException("\n".join(_no_kernel(name, known) for name in unknown))
    shown = [column for column in COLUMNS if column != "made of"]
    rows = [
        [*key, *(value_for(arch, line[c]) if arch else _range(line[c]) for c in shown)]
        for key, line in ledger.lines.items()
        if (not names or key[0] in names) and (not dtype or key[1] == dtype)
    ]
    if not rows:
        raise click.ClickException(f"{', '.join(names)}: not with types {dtype!r}")
    heads = [head.split() for head in ["kernel", "types", *shown]]
    upper, lower = [h[0] if len(h) > 1 else "" for h in heads], [h[-1] for h in heads]
    yield from columns_of([upper, lower, *rows], left=2)


def _no_kernel(name: str, known: Iterable[str]) -> str:
    near = ", ".join(difflib.get_close_matches(name, list(known)))
    return f"no kernel {name!r} in the ledger; {f'near: {near}' if near else 'all: python -m benchmarks kernels'}"


def _range(cell: str) -> str:
    """`32-48` for `32|40|48`; other values that differ as they are."""
    values = dict.fromkeys(cell.split("|"))
    numbers = sorted(map(int, values)) if all(v.isdigit() for v in values) and len(values) > 1 else []
    return f"{numbers[0]}-{numbers[-1]}" if numbers else "|".join(values)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
