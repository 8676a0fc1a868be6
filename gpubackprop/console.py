"""What the commands share: options, lines of output and errors, and a look at the files before any work."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import click

from gpubackprop import datasets
from gpubackprop.checkpoint import check_writable
from gpubackprop.formulas import ACTIVATIONS, cut
from gpubackprop.names import hint
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.precision import PRECISIONS
from gpubackprop.runs import RATES, Recipe

__all__ = ["Choice", "check_outputs", "fail", "force", "options", "say", "show", "sizes", "table_options"]

Command = Callable[..., None]


class Choice(click.Choice[str]):
    """One of several names; the error about another one says which is meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            meant = hint((param and param.name) or "", value, self.choices)
            raise click.BadParameter(f"{error.message.rstrip('.')}{meant}", ctx, param) from None


# ---- options -------------------------------------------------------------------------------------------------------


def options(*names: str) -> Callable[[Command], Command]:
    """The options of those names, in order, with the recipe's defaults."""
    choose = Choice
    rates = ", ".join(f"{k} {a:g}" + f" ({b:g} for numbers)" * (a != b) for k, (a, b) in RATES.items())
    every: dict[str, tuple[Any, str]] = {
        "hidden": (str, "Units of each hidden layer, between commas; \"\" for none."),
        "activation": (choose(list(ACTIVATIONS)), "Activation of the hidden layers."),
        "dropout": (float, "Share of hidden units dropped in training.  [default: 0.5 for classes, 0 for numbers]"),
        "epochs": (int, "Passes over the training rows."),
        "batch_size": (int, "Rows per step."),
        "optimizer": (choose(list(OPTIMIZERS)), "Update rule."),
        "lr": (float, f"Learning rate.  [default: {rates}]"),
        "seed": (click.IntRange(min=0), "Keys the split, the weights, the order of rows and dropout."),
        "test": (float, "Fraction of the rows held out."),
        "dtype": (choose(["float32", "float64"]), "Type of weights and data.  [default: float32; float64 where a "
                  "column or target loses too much in it]"),
        "precision": (choose(list(PRECISIONS)), "What a step computes in, with weights in float32 or float64.  "
                      "[default: that of --dtype]"),
        "clip_norm": (float, "Scale a longer gradient down to this norm.  [default: no clipping]"),
        "cuda_graph": (bool, "Launch each step as one CUDA graph."),
        "device": (str, "auto, cpu, cuda or cuda:N."),
    }  # fmt: skip
    defaults = {f.name: f.default for f in fields(Recipe)} | {"hidden": ",".join(map(str, Recipe.hidden))}

    def add(command: Command) -> Command:
        for name in reversed(names):
            kind, text = every[name]
            default = defaults[name]
            option = click.option(f"--{name.replace('_', '-')}", type=kind, default=default, help=text,
                                  is_flag=kind is bool, show_default=default not in (None, False))  # fmt: skip
            command = option(command)
        return command

    return add


def table_options(command: Command) -> Command:
    """The options of what trains on a table: which column and how, and the recipe."""
    stack = (
        click.option("--target", metavar="NAME", help="The column of a CSV to learn."),
        click.option("--task", type=Choice(["classification", "regression"]),
                     help="What the target means.  [default: text and integers are classes, floats numbers]"),
        options("hidden", "activation", "dropout", "epochs", "batch_size", "optimizer", "lr", "seed", "test", "dtype",
                "precision", "clip_norm", "cuda_graph", "device"),
        click.option("--scale/--no-scale", default=None,
                     help="Bring columns to mean 0, variance 1 inside the model.  [default: on, but for digits]"),
    )  # fmt: skip
    for option in reversed(stack):
        command = option(command)
    return command


force = click.option("--force", is_flag=True, help="Replace files that exist.")


def sizes(text: str | None, option: str) -> tuple[int, ...]:
    """The integers between the commas of an option's text."""
    try:
        found = tuple(int(part) for part in text.split(",")) if text and text.strip() else ()
    except ValueError:
        found = (0,)
    if any(size < 1 for size in found):
        raise ValueError(f"{option}: got {text!r}, expected positive integers between commas, such as 128,64")
    return found


# ---- lines and files -----------------------------------------------------------------------------------------------


def fail(message: str, status: int) -> NoReturn:
    """End with one line on stderr, of no more than a screen."""
    with suppress(OSError):
        click.echo(f"gpubackprop: {cut(' '.join(message.split()), 2000)}", err=True)
    raise click.exceptions.Exit(status)


def show(text: str, err: bool = False) -> None:
    """Print; a stream that takes no more is an error that names it."""
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        raise  # its reader has seen enough: click ends without a word
    except OSError as error:
        raise OSError(f"{'stderr' if err else 'stdout'}: cannot be written ({error.strerror})") from None


def say(label: str, text: str, err: bool = False) -> None:
    """Print a line with its label."""
    show(f"{label:<11} {text}", err)


def check_outputs(out: str | None, force: bool, json_path: str | None, *inputs: str) -> None:
    """Raise before any work if a file cannot be written, exists without --force, or is read or printed to."""
    taken = {os.path.realpath(path): f"the input {path}" for path in inputs if path not in datasets.NAMES}
    paths = [path for path in (out, None if json_path == "-" else json_path) if path]
    for path in paths:
        real = str(check_writable(path))
        for number, stream in (1, "stdout"), (2, "stderr"):
            with suppress(OSError):
                if os.path.samestat(os.fstat(number), os.stat(real)):
                    taken[real] = f"the file that {stream} goes to"
        if real in taken:
            raise ValueError(f"{path}: is {taken[real]}, which would be lost; give another name")
        taken[real] = "the file of --out"
    if existing := [path for path in paths if Path(path).exists() and not force]:
        raise FileExistsError(f"{existing[0]}: exists; use --force to replace it, or another name")
