"""The command `gpubackprop`: options, what is printed, and errors as one line.

Exit status: 0; 2 for bad input (options, data, model files, paths); 1 when something else fails (training diverges, a
device does not work, the disk is full, stdout is closed, a check of `doctor`); 3 from a `doctor` that found neither a
fault nor a GPU; 130 after Ctrl-C, 143 after SIGTERM. Files are written before anything is printed of them, so that a
stdout that takes no more costs no work, and a file that cannot be written no figure; `doctor` alone prints as it goes.
"""

import io
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from gpubackprop import __version__, cli_plot, console, roofline, runs
from gpubackprop.backends import why_not_cuda
from gpubackprop.checkpoint import check_suffix, encode_model, load_model, write_file
from gpubackprop.layers import Layer, mlp
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.progress import Interrupts, Terminated, terminable
from gpubackprop.runs import Recipe, Run
from gpubackprop.trainer import Trainer, TrainingDiverged

__all__ = ["main"]

BAD_INPUT = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
             PermissionError)  # fmt: skip
INTERRUPTED, TERMINATED = 130, 143  # as a shell reports a process that SIGINT or SIGTERM ended


# ---- the group and its errors --------------------------------------------------------------------------------------


class Commands(click.Group):
    """Commands whose library errors end as one line and an exit status."""

    def main(self, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a × that its encoding lacks is no reason to fail
        try:
            return super().main(*arguments, **keywords)
        except OSError as error:  # of the help or the version: the rest is caught below
            with suppress(OSError):
                click.echo(f"gpubackprop: stdout: cannot be written ({error.strerror})", err=True)
            sys.exit(1)
        finally:
            try:
                if sys.stdout is not None:  # closed from the start
                    sys.stdout.flush()
            except OSError:  # Python would try once more as it exits, and then say so in lines of its own
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings(), terminable():
                warnings.showwarning = _warn  # type: ignore[assignment]
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own ways to end
        except BAD_INPUT as error:
            console.fail(str(error), 2)
        except TrainingDiverged as error:
            console.fail(f"{error}; nothing was saved", 1)
        except (RuntimeError, OSError, MemoryError, ImportError) as error:
            console.fail(str(error) or type(error).__name__, 1)
        except KeyboardInterrupt:
            console.fail("interrupted; no file is left half written", INTERRUPTED)
        except Terminated:
            console.fail("terminated; no file is left half written", TERMINATED)


def _warn(message: Warning | str, *about: Any) -> None:
    """A warning as one line on stderr."""
    with suppress(OSError):
        click.echo(f"gpubackprop: warning: {' '.join(str(message).split())}", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="gpubackprop", message="%(prog)s %(version)s")
def main() -> None:
    """Train dense networks on tables and look into every step of it.

    \b
    Start with:
      gpubackprop train digits --out digits.safetensors
      gpubackprop evaluate digits.safetensors digits
      gpubackprop explain digits.safetensors
    """


_json = click.option("--json", "json_path", metavar="FILE",
                     help="Write the figures to this file; - for stdout, with the lines on stderr.")  # fmt: skip


main.add_command(cli_plot.pictures)


# ---- train, evaluate, predict --------------------------------------------------------------------------------------


@main.command()
@click.argument("data")
@console.table_options
@click.option("--out", metavar="FILE", help="Save the model here (safetensors).")
@console.force
@_json
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def train(
    data: str, target: str | None, task: Any, hidden: str, out: str | None, force: bool, json_path: str | None,
    quiet: bool, **settings: Any,
) -> None:  # fmt: skip
    """Train a network on DATA and measure it on rows held out.

    DATA is a bundled set (digits, regression7), an .npz with arrays x and y, or a .csv with a header and --target. The
    same command prints the same figures again: everything random follows --seed.

    \b
    Examples:
      gpubackprop train digits
      gpubackprop train iris.csv --target species --hidden 32,32 --out iris.safetensors
    """
    recipe = Recipe(hidden=console.sizes(hidden, "--hidden"), **settings)
    console.check_outputs(out, force, json_path, data)
    check_suffix(out or "")
    run = Run(data, runs.read(data, target, task), recipe)
    if (count := runs.doubtful_classes(run.table)) and task is None and not quiet:
        with suppress(OSError):
            click.echo(f"gpubackprop: warning: the target's integers are taken as {count:,} classes of "
                       f"{len(run.table.x):,} rows; if they are amounts, use --task regression", err=True)  # fmt: skip

    def say(label: str, text: str) -> None:
        if not quiet:
            console.say(label, text, err=json_path == "-")

    for label, text in run.lines():
        with suppress(OSError):  # the run is worth more than its lines
            say(label, text)
    try:
        run.fit(False if quiet else None)
    except KeyboardInterrupt:
        console.fail(_keep(run, out, force), INTERRUPTED)
    except Terminated:
        console.fail(_keep(run, out, force, "terminated"), TERMINATED)
    failed: list[OSError] = []
    with _noted(failed), Interrupts():  # what comes now waits until the model is saved
        _save(run, out, force)
    measured = run.figures()
    with _noted(failed):
        _write_json(json_path, {**run.report(), **measured, "out": out}, force)
    for part, values in measured.items():
        say(part.replace("_", " "), _figures(values))
    say("time", f"{run.seconds:.1f} s")
    if failed:
        raise failed[0]
    if out:
        say("saved", out)


@main.command()
@click.argument("model")
@click.argument("data")
@click.option("--all", "every", is_flag=True, help="Every row of a bundled set, also those trained on.")
@console.options("device")
@_json
@console.force
def evaluate(model: str, data: str, every: bool, device: str, json_path: str | None, force: bool) -> None:
    """Measure a saved MODEL on DATA.

    On the bundled set that the model was trained on these are the rows held out then, so that the line is train's. Of a
    file it is every row; a .csv needs the columns of the training file by name, an .npz the arrays x and y.

    \b
    Example:
      gpubackprop evaluate digits.safetensors digits
    """
    console.check_outputs(None, force, json_path, data, model)
    network, extra = runs.load(model, device)
    table = runs.read_for(network, data, extra)
    if table.y is None:
        raise ValueError(f"{data}: has no target to compare with; add the column or array, or use predict")
    part = None if every else runs.held_out(data, table, extra)
    x, y = (table.x, table.y) if part is None else part
    values = runs.figures(network, x, y, device)
    label = "all rows" if part is None else "held out"
    _write_json(json_path, {"model": model, "data": data, "rows": len(x), "part": label.replace(" ", "_"), **values},
                force)  # fmt: skip
    console.say(label, _figures(values), err=json_path == "-")


@main.command()
@click.argument("model")
@click.argument("data")
@click.option("--out", required=True, metavar="FILE", help="A .csv, .npz or .npy file for the predictions.")
@console.force
@console.options("device")
def predict(model: str, data: str, out: str, force: bool, device: str) -> None:
    """Write a saved MODEL's predictions for DATA.

    Every row of DATA has one; its target is ignored and may be absent. A .csv has one line per row: the prediction, and
    for classes the probability of each. An .npz has the arrays prediction, probability and classes; an .npy the
    predictions alone.

    \b
    Example:
      gpubackprop predict iris.safetensors new.csv --out predictions.csv
    """
    kind = runs.kind_of(out)
    console.check_outputs(out, force, None, data, model)
    network, extra = runs.load(model, device)
    table = runs.read_for(network, data, extra, labelled=False)
    write_file(out, runs.predict(network, table.x, extra.get("classes")).encode(kind), replace=force)
    console.say("saved", f"{out}: {len(table.x):,} predictions")


# ---- explain, kernels, info, doctor --------------------------------------------------------------------------------


@main.command()
@click.argument("model", required=False)
@click.option("--sizes", help="Instead of a MODEL: columns, hidden units and outputs of a new network, between commas.")
@console.options("activation", "dropout", "optimizer", "batch_size", "dtype", "precision", "clip_norm", "device")
@click.option("--gpu", type=console.Choice(list(roofline.GPUS)), help="Add a roofline model of this GPU.")
@click.option("--wide", is_flag=True, help="A line for each launch, however long.")
@click.option("--out", metavar="FILE", help="Draw the step too: an .svg, .png or .pdf file.")
@console.force
def explain(
    model: str | None, sizes: str | None, batch_size: int, device: str, gpu: str | None, wide: bool, out: str | None,
    force: bool, **settings: Any,
) -> None:  # fmt: skip
    """Print a training step as the table of its launches, and draw it.

    Each has its equation, the shapes it reads and writes, its flops and bytes; nothing is trained. The table fits the
    terminal; with --wide, or into a file or a pipe, a launch has one line. Without MODEL and --sizes it is the step of
    `gpubackprop train digits`. --activation, --dropout and --dtype describe a new network; a
    saved one has its own. A step for CUDA is planned without a GPU too; beneath it stand its launches, and its bytes
    beside the least that they could be.

    The picture of --out has the launches in their order, down to the loss on the left and back up on the right, with
    lines to where results are used again; with --gpu also the roofline, which is a model and no measurement.

    \b
    Examples:
      gpubackprop explain
      gpubackprop explain --sizes 64,128,10 --activation gelu --batch-size 256
      gpubackprop explain digits.safetensors --out step.svg
      gpubackprop explain --device cuda --precision tf32 --clip-norm 1
      gpubackprop explain --sizes 4096,4096,4096 --batch-size 4096 --gpu h100
    """
    recipe = Recipe(**settings)
    if model and sizes:
        raise ValueError("explain: got a MODEL and --sizes, expected one of them; leave one out")
    if out:
        cli_plot.drawing(out, force, *filter(None, [model]))
    place, reason = _planned(device, gpu)
    if model:
        network: Layer = load_model(model, place)
        loss = runs.trained_loss(network)
    else:
        layout = list(console.sizes(sizes, "--sizes")) or [64, *Recipe.hidden, 10]
        rate = recipe.dropout_for("classification")
        network, loss = mlp(layout, recipe.activation, dropout=rate, dtype=recipe.weights), "cross_entropy"
    trainer = Trainer(network, loss, OPTIMIZERS[recipe.optimizer](), device=place, seed=0, precision=recipe.precision,
                      clip_norm=recipe.clip_norm)  # fmt: skip
    plan = trainer.plan(batch_size)
    if reason:
        plan.title = f"planned without a GPU ({reason}): {plan.title}"
    if out:
        cli_plot.save_plan(plan, gpu, trainer.precision.name, out, force)
    console.show(plan.table(wide=wide))
    if plan.backend.device.startswith("cuda"):
        console.show(f"launches eager: {roofline.launches(plan)}; with a CUDA graph: 1")
        for part, moved in roofline.traffic(plan).items():
            console.show(f"{part}: {moved}")
    if gpu:
        console.show("\n" + roofline.roofline(plan, roofline.GPUS[gpu], trainer.precision.name))


def _planned(device: str, gpu: str | None) -> tuple[str, str | None]:
    """The device to plan for, and why that is not a GPU if it was to be one."""
    if gpu and device == "cpu":
        raise ValueError("explain: --gpu models a step on CUDA, but --device is cpu; leave one out")
    if device != "cuda" and not (gpu and device == "auto"):
        return device, None
    reason = why_not_cuda()
    return ("cuda:plan" if reason else "cuda"), reason


@main.command()
@click.argument("name", required=False)
@click.option("--dtype", default="float32", show_default=True, help="float32, float64, float16 or bfloat16.")
def kernels(name: str | None, dtype: str) -> None:
    """Print the CUDA source that holds kernel NAME, or all that a formula's NAME is rendered to; without, all names.

    \b
    Examples:
      gpubackprop kernels
      gpubackprop kernels gelu --dtype float16
      gpubackprop kernels softmax_cross_entropy_labels
    """
    from gpubackprop.backends import codegen

    if name is not None:
        console.show(codegen.source(name, dtype))
        return
    homes = codegen.homes()
    width = max(map(len, homes))
    console.show("\n".join(f"{kernel:<{width}}  {home}" for kernel, home in homes.items()))


@main.command()
def info() -> None:
    """Print versions and devices, for a bug report: also which pieces of CUDA are here, and why it is not in use.

    \b
    Example:
      gpubackprop info
    """
    from gpubackprop.installation import versions

    for label, text in versions():
        console.say(label, text)


@main.command("doctor")
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N.")
@click.option("--quick", is_flag=True, help="float32 kernels alone, and fewer repeats.")
@_json
@console.force
def examine(device: str, quick: bool, json_path: str | None, force: bool) -> None:
    """Check this machine's GPU: that every kernel gives NumPy's results, and how fast.

    First what is installed, with the command that installs what is missing; then every kernel in every type against
    NumPy, matrix products against CuPy's own, a captured step against one launched piece by piece, and a network
    trained on the digits; last, bytes per second and the cost of launching, measured. Status 0 if all agree, 1 if
    something does not, 3 without a GPU: then it checks what it can. The first run compiles every kernel.

    \b
    Examples:
      gpubackprop doctor
      gpubackprop doctor --quick --json doctor.json
    """
    from gpubackprop import doctor

    console.check_outputs(None, force, json_path)
    err, results = json_path == "-", list[doctor.Result]()
    for result in doctor.examine(device, doctor.QUICK if quick else doctor.FULL):
        if not results or results[-1].group != result.group:
            console.show(result.group, err)
        results.append(result)
        console.show(f"  {result.verdict:<8} {result.name:<34} {result.detail}".rstrip(), err)
    _write_json(json_path, doctor.report(results), force)
    console.say("verdict", doctor.verdict(results), err)
    raise click.exceptions.Exit(doctor.status(results))


# ---- printing and files --------------------------------------------------------------------------------------------


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:{'.4f' if name == 'accuracy' else '.6g'}}" for name, value in values.items())


@contextmanager
def _noted(failed: list[OSError]) -> Iterator[None]:
    """Keep the error of a file that cannot be written until all else is done."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        failed.append(error)


def _save(run: Run, out: str | None, force: bool) -> None:
    """Write the model; if it cannot be where it should, an OSError that says where it is."""
    if out is None:
        return
    data = encode_model(run.model, run.extra)
    try:
        write_file(out, data, replace=force)
    except OSError as error:
        raise type(error)(f"{error}; {_rescued(data, Path(out).name)}") from None


def _rescued(data: bytes, name: str) -> str:
    """Write the model into a new folder for temporary files; where it is, in words."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="gpubackprop-"))
        try:
            write_file(folder / name, data)
        except OSError:
            folder.rmdir()
            raise
    except OSError:
        return "the model is not saved: train it again with --out where there is room"
    return f"the model was saved to {folder / name}"


def _keep(run: Run, out: str | None, force: bool, how: str = "interrupted") -> str:
    """Save what a run that was cut short has learnt; the line that says so."""
    done = run.trainer.epoch
    if not done:
        return f"{how} in the first epoch; nothing was saved"
    progress = f"{how} after {done} of {run.recipe.epochs} epochs"
    if out is None:
        return f"{progress}; nothing was saved (there is no --out)"
    try:
        _save(run, out, force)
    except OSError as error:
        return f"{progress}; {error}"
    return f"{progress}; the model as it stands was saved to {out}"


def _write_json(path: str | None, report: Mapping[str, Any], force: bool) -> None:
    """The figures as JSON, to a file or, for "-", to stdout."""
    text = json.dumps(_strict(report), indent=1, allow_nan=False)
    if path == "-":
        console.show(text)
    elif path:
        write_file(path, (text + "\n").encode(), replace=force)


def _strict(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _strict(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
