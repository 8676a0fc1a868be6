"""The commands `gpubackprop plot …`: each draws one picture into a file."""

from types import ModuleType
from typing import Any

import click
import numpy as np

from gpubackprop import runs
from gpubackprop.console import Choice, check_outputs, force, options, say, show, sizes, table_options
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.plan import Plan
from gpubackprop.runs import Recipe, Run
from gpubackprop.tables import Table
from gpubackprop.trainer import Trainer

__all__ = ["drawing", "pictures", "save_plan"]

LINE = ((-2.0, 4.0), (-6.0, 8.0))  # where the line's loss is drawn: m and b
RATE = 0.06  # which descends the line in visible zigzags; beyond 0.068 it diverges
GROUNDS: dict[str, Any] = {  # start, grid, rates of racers at which none diverges, steps in which something happens
    "saddle": ((-1.0, 1e-6), ((-1.5, 1.5), (-1.5, 1.5)), (0.01, 0.01), 750),
    "valley": ((-1.2, 1.0), ((-2.0, 2.0), (-1.0, 3.0)), (0.001, 0.05), 1000),
}
ROWS = 1000  # that gradients are looked at with


@click.group("plot")
def pictures() -> None:
    """Draw a picture into an .svg, .png or .pdf file.

    It takes matplotlib: pip install "gpubackprop[plot]". The same command draws the same bytes again.

    \b
    Start with:
      gpubackprop plot surface --out surface.svg
      gpubackprop plot curves digits --out curves.svg
    """


_out = click.option("--out", required=True, metavar="FILE", help="The picture: an .svg, .png or .pdf file.")


def drawing(out: str, replace: bool, *inputs: str) -> ModuleType:
    """The module that draws; an error before any work if the file cannot be written, or matplotlib is not there."""
    from gpubackprop import plot
    from gpubackprop.plot.figures import check_kind, pyplot

    check_kind(out)
    check_outputs(out, replace, None, *inputs)
    pyplot().switch_backend("Agg")  # no windows, whatever display there is
    return plot


def _save(axes: Any, out: str, replace: bool) -> None:
    """Write the picture, and say so."""
    from gpubackprop.plot.figures import pyplot, save

    save(axes, out, replace=replace)
    pyplot().close(axes.get_figure())
    say("saved", out)


def save_plan(plan: Plan, gpu: str | None, precision: str, out: str, replace: bool) -> None:
    """Write the picture of a plan, with its roofline if there is a GPU to model."""
    from gpubackprop.plot import plans

    _save(plans.plan(plan) if gpu is None else plans.with_roofline(plan, gpu, precision), out, replace)


# ---- functions -----------------------------------------------------------------------------------------------------


@pictures.command()
@click.option("--optimizer", type=Choice(list(OPTIMIZERS)), default="sgd", show_default=True, help="Update rule.")
@click.option("--lr", type=float, help=f"Learning rate.  [default: {RATE}; of adadelta and lbfgs 1]")
@click.option("--steps", type=int, default=500, show_default=True, help="Steps of the descent.")
@click.option("--start", metavar="M,B", default="0,6", show_default=True, help="Where it begins.")
@_out
@force
def surface(optimizer: str, lr: float | None, steps: int, start: str, out: str, force: bool) -> None:
    """Draw the loss of a line, and a descent on it.

    The loss is the mean squared error of m x + b over seven points, the bundled set regression7, for m from -2 to 4 and
    b from -6 to 8.

    \b
    Examples:
      gpubackprop plot surface --out surface.svg
      gpubackprop plot surface --optimizer adam --lr 0.2 --start -1,-4 --out adam.png
    """
    from gpubackprop.landscape import descend, line_loss
    from gpubackprop.landscape import surface as values_of

    begin = _start(start)
    plot = drawing(out, force)
    rate = lr if lr is not None else RATE if optimizer not in ("adadelta", "lbfgs") else 1.0
    path = descend(line_loss, begin, OPTIMIZERS[optimizer](lr=rate), steps)
    m, b = path[-1]
    say("end", f"m {m:.6g}, b {b:.6g}, loss {line_loss(m, b):.6g} after {len(path) - 1} steps")
    _save(plot.surface(values_of(line_loss, *LINE, step=0.01), path=path), out, force)


def _start(text: str) -> list[float]:
    try:
        start = [float(part) for part in text.split(",")]
    except ValueError:
        start = []
    if len(start) != 2 or not all(low <= a <= high for a, (low, high) in zip(start, LINE, strict=True)):
        expected = "two numbers between commas, the first from -2 to 4, the second from -6 to 8, such as 0,6"
        raise ValueError(f"--start: got {text!r}, expected {expected}")
    return start


@pictures.command()
@click.option("--on", "ground", type=Choice(list(GROUNDS)), default="saddle", show_default=True,
              help="x² - y², or Rosenbrock's curved valley.")  # fmt: skip
@click.option("--steps", type=int, help="Steps of each.  [default: 750 on the saddle, 1000 in the valley]")
@click.option(
    "--lr",
    type=float,
    help="Learning rate of all.  [default: 0.01 on the saddle; in the valley 0.001, 0.05 of Adagrad, RMSprop and Adam]",
)
@_out
@force
def race(ground: str, steps: int | None, lr: float | None, out: str, force: bool) -> None:
    """Draw seven optimizers in a race: their paths, and the function's value after each step.

    They are SGD, with momentum, with Nesterov's, Adagrad, Adadelta (which has no learning rate), RMSprop and Adam. On
    the saddle they start beside the ridge, at (-1, 1e-6), in the valley at (-1.2, 1).

    \b
    Examples:
      gpubackprop plot race --out race.svg
      gpubackprop plot race --on valley --steps 3000 --out valley.pdf
    """
    from gpubackprop import landscape
    from gpubackprop.plot.figures import new_axes

    plot = drawing(out, force)
    start, grid, rates, count = GROUNDS[ground]
    function = getattr(landscape, ground)
    lr, adaptive = rates if lr is None else (lr, lr)
    paths = landscape.race(function, start, landscape.racers(lr, adaptive), count if steps is None else steps)
    for name, path in paths.items():
        x, y = path[-1]
        left = landscape.steps_until(path, lambda point: abs(point[1]) > 1) if ground == "saddle" else None
        until = f"; |y| > 1 after {left} steps" if left else ""
        say(name, f"x {x:.4g}, y {y:.4g} after {len(path) - 1} steps{until}")
    left_axes, right_axes = new_axes(13, 4.8, columns=2)
    plot.race(landscape.surface(function, *grid, points=201), paths, left_axes)
    left_axes.get_legend().remove()  # the other one has the same lines
    right_axes.set_title(f"learning rate {lr:g}" + f", {adaptive:g} of Adagrad, RMSprop and Adam" * (lr != adaptive))
    _save(plot.progress(function, paths, right_axes), out, force)


# ---- training ------------------------------------------------------------------------------------------------------


@pictures.command()
@click.argument("data")
@table_options
@click.option("--figure", default="loss", show_default=True, help="loss, accuracy or r2.")
@_out
@force
def curves(
    data: str, target: str | None, task: Any, hidden: str, figure: str, out: str, force: bool, **settings: Any
) -> None:
    """Train as `gpubackprop train` does, and draw the loss after every epoch and the gap to the rows held out.

    The loss of the rows trained on is taken while training, under dropout: at first the gap may be negative. Numbers
    are learnt in units of their spread, and so is their loss.

    \b
    Examples:
      gpubackprop plot curves digits --out curves.svg
      gpubackprop plot curves iris.csv --target species --dropout 0 --figure accuracy --out accuracy.png
    """
    recipe = Recipe(hidden=sizes(hidden, "--hidden"), **settings)
    plot = drawing(out, force, data)
    run = Run(data, runs.read(data, target, task), recipe)
    known = ["loss", *run.trainer.objective.metrics]
    if figure not in known:
        raise ValueError(f"--figure: got {figure!r}, expected one of {', '.join(known)}")
    for label, text in run.lines():
        say(label, text)
    run.fit(validate=True)
    history = run.trainer.history
    say("train", f"{figure} {history[figure][-1]:.6g}")
    say("held out", f"{figure} {history[f'val_{figure}'][-1]:.6g}")
    _save(plot.curves(history, figure), out, force)


@pictures.command()
@click.argument("model")
@click.argument("data")
@options("device")
@_out
@force
def gradients(model: str, data: str, device: str, out: str, force: bool) -> None:
    """Draw what gradient reaches each layer of a saved MODEL, with a verdict on each and what to try.

    It is that of up to 1,000 rows of DATA, in a step of training.

    \b
    Example:
      gpubackprop plot gradients digits.safetensors digits --out gradients.svg
    """
    from gpubackprop.report import gradient_report

    plot = drawing(out, force, model, data)
    network, _, table = _read(model, data, device)
    rows = np.random.default_rng(0).permutation(len(table.x))[:ROWS]
    trainer = Trainer(network, runs.trained_loss(network), device=device, seed=0)
    report = gradient_report(trainer, table.x[rows], np.asarray(table.y)[rows])
    show(report.advice)
    _save(plot.gradient_flow(report), out, force)


@pictures.command()
@click.argument("model")
@click.argument("data")
@click.option("--columns", metavar="A,B", help="Two columns of DATA, by name or number from 0; others are held at "
              "their mean.  [default: the two there are]")  # fmt: skip
@options("device")
@_out
@force
def regions(model: str, data: str, columns: str | None, device: str, out: str, force: bool) -> None:
    """Draw which class a saved MODEL predicts where, over two columns, and the rows of DATA as points.

    \b
    Example:
      gpubackprop plot regions iris.safetensors iris.csv --columns length,width --out regions.svg
    """
    plot = drawing(out, force, model, data)
    network, extra, table = _read(model, data, device)
    chosen = None if columns is None else _columns(columns, table)
    if chosen is None and table.x.shape[1] != 2:
        raise ValueError(
            f"{data}: has {table.x.shape[1]} columns, expected two to draw; choose them with --columns A,B"
        )
    axes = plot.decision_regions(
        network, table.x, table.y, columns=chosen, classes=extra.get("classes"), names=table.columns
    )
    _save(axes, out, force)


def _read(model: str, data: str, device: str) -> tuple[Any, dict[str, Any], Table]:
    """The model, what its file says of the run, and the table with its target."""
    network, extra = runs.load(model, device)
    table = runs.read_for(network, data, extra)
    if table.y is None:
        raise ValueError(f"{data}: has no target; add the column or array")
    return network, extra, table


def _columns(text: str, table: Table) -> tuple[int, int]:
    """The numbers of two columns that are given by name or number."""
    names = table.columns or []
    found = [names.index(part) if part in names else int(part) if part.isdecimal() else -1
             for part in map(str.strip, text.split(","))]  # fmt: skip
    if len(set(found)) != 2 or len(found) != 2 or not all(0 <= i < table.x.shape[1] for i in found):
        known = f"of {', '.join(names)}" if names else f"by numbers from 0 to {table.x.shape[1] - 1}"
        raise ValueError(f"--columns: got {text!r}, expected two {known}, between a comma")
    return found[0], found[1]
