"""Pictures: surfaces and descents, curves of a history, the flow of gradients, regions of decision (extra `plot`).

Each draws on the Axes it is given, or on those of a new figure, and returns them. What colour tells, a line's dashes, a
marker or text tell too.
"""

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.checkpoint import write_file
from gpubackprop.checks import whole
from gpubackprop.data import as_features, as_labels, check_same_length
from gpubackprop.landscape import Surface, values_at
from gpubackprop.model import Layer, check_model
from gpubackprop.rates import watched
from gpubackprop.report import GradientReport
from gpubackprop.trainer import Trainer

__all__ = [
    "KINDS", "check_kind", "curves", "decision_regions", "gradient_flow", "new_axes", "path", "progress", "pyplot",
    "race", "save", "surface",
]  # fmt: skip

Axes = Any
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

# Okabe & Ito, "Color Universal Design", without the yellow, which is too light for lines on white.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")  # fmt: skip
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")  # as many as have no factor with the colours
SHADES = "cividis"
KINDS = (".svg", ".png", ".pdf")
LEVELS = 14  # of contours, at most about
MARKS = 7  # on a path
GRID = 201  # points along each side that a picture is drawn from, at most: a file has room for them


# ---- figures and files ---------------------------------------------------------------------------------------------


def pyplot() -> Any:
    """matplotlib's pyplot; without matplotlib an error that says what to install."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('plot: matplotlib is not installed; pip install "gpubackprop[plot]"') from error
    return pyplot


def new_axes(width: float = 6.4, height: float = 4.8, columns: int = 1) -> Any:
    """The Axes of a new figure of so many inches, or an array of them side by side."""
    return pyplot().subplots(1, columns, figsize=(width, height), layout="constrained")[1]


def save(axes: Axes, path: str | os.PathLike[str]) -> None:
    """Write the figure of these Axes as .svg, .png or .pdf, whole or not at all: the same picture in the same bytes."""
    from matplotlib import rc_context

    kind, file = check_kind(path), io.BytesIO()
    dates: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "gpubackprop"}):
        axes.get_figure().savefig(file, format=kind[1:], dpi=200, metadata=dates.get(kind))
    write_file(path, file.getvalue())


def check_kind(path: str | os.PathLike[str]) -> str:
    """The suffix of a picture's file, which must be one of KINDS."""
    if (kind := Path(path).suffix.lower()) not in KINDS:
        raise ValueError(f"{os.fspath(path)}: is of unknown kind {kind!r}; choose from {', '.join(KINDS)}")
    return kind


# ---- surfaces and descents -----------------------------------------------------------------------------------------


def surface(surface: Surface, axes: Axes = None, path: Any = None) -> Axes:
    """Contours of a `gb.surface` with its lowest point, and a path of `gb.descend` over it.

    Where the lowest point lies inside, the levels are 1, 2, 5, 10, … above it, as far as there are values; where it
    lies on the border, as of a saddle, they are evenly spaced.
    """
    _check_surface(surface, "surface")
    points = None if path is None else _points(path, "path")
    axes = new_axes() if axes is None else axes
    filled, inside = _contours(surface, axes, filled=True), _inside(surface)
    *lowest, value = surface.lowest
    above = f" above the lowest, {_text(value)}" if inside else ""
    bar = axes.get_figure().colorbar(filled, ax=axes, label=f"value{above}", ticks=filled.levels)
    bar.ax.set_yticklabels(map(_text, filled.levels))
    where = ", ".join(f"{n} = {_text(a)}" for n, a in zip(surface.names, lowest, strict=True))
    axes.plot(*lowest, "*", color=ORANGE, markeredgecolor="black", markersize=14, linestyle="none", clip_on=False,
              label=f"lowest{'' if inside else ' on the grid'}, {where}")  # fmt: skip
    if points is not None:
        _path(points, axes, "descent from ○ to ✕", color="white", linewidth=2)
    _legend_above(axes, columns=1)
    return axes


def path(path: Any, axes: Axes, label: str | None = None, **line: Any) -> Axes:
    """A path (steps + 1, 2) as a line, its start a circle, its end a cross; `line` goes to matplotlib's `plot`."""
    return _path(path, axes, label, **line)


def _path(path: Any, axes: Axes, label: str | None = None, **line: Any) -> Axes:
    from matplotlib import patheffects

    points = _points(path, "path")
    [drawn] = axes.plot(*points.T, label=label, **{"color": BLUE, "linewidth": 1.5} | line)
    edge = "black" if drawn.get_color() == "white" else "white"
    drawn.set_path_effects([patheffects.withStroke(linewidth=drawn.get_linewidth() + 2, foreground=edge)])
    for point, marker in (points[0], "o"), (points[-1], "X"):
        axes.plot(*point, marker, color=drawn.get_color(), markeredgecolor=edge, markersize=9,
                  zorder=drawn.get_zorder() + 1)  # fmt: skip
    return axes


def race(surface: Surface, paths: Mapping[str, Any], axes: Axes = None) -> Axes:
    """The contours of a `gb.surface` and the paths of a `gb.race` over them, marked at even distances.

    Where paths coincide the first are the widest and seen through the dashes of the others. Of one that leaves the grid
    for good the legend says at which step; how fast each descends shows in `progress`.
    """
    _check_surface(surface, "race")
    checked = _paths(paths, "race")
    axes = new_axes(8.4, 4.8) if axes is None else axes
    _contours(surface, axes, filled=False)
    low, high = (np.array([surface.first[i], surface.second[i]]) for i in (0, -1))
    for i, (name, points) in enumerate(checked.items()):
        inside = ((points >= low) & (points <= high)).all(1)
        out = int(np.flatnonzero(inside)[-1]) + 1 if inside.any() else 0
        label = name if out == len(points) else f"{name}, out after {out} steps"
        width = 1.4 + 0.45 * (len(checked) - 1 - i)
        marks = _spread((points[: max(out, 1)] - low) / (high - low), i / len(checked))
        axes.plot(*points.T, **_style(i), linewidth=width, markevery=marks, label=label)
    for start in {tuple(points[0].tolist()) for points in checked.values()}:
        axes.plot(*start, "o", color="black", markerfacecolor="white", markersize=10, markeredgewidth=2, zorder=9)
    _legend_beside(axes)
    return axes


def _spread(points: Floats, offset: float) -> list[int]:
    """Which of the points to mark: about seven at even distances along the path, from a part of such a distance on."""
    along = np.concatenate([[0.0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
    wanted = (np.arange(MARKS) + 0.3 + 0.7 * offset) / MARKS * along[-1]
    return sorted({int(k) for k in along.searchsorted(wanted)})


def progress(function: Callable[..., Any], paths: Mapping[str, Any], axes: Axes = None) -> Axes:
    """The function's value after every step of the paths of a `gb.race`, over the number of steps.

    Values that are all positive are shown on a logarithmic axis, others down to as far below 0 as the highest start
    lies above it.
    """
    checked = _paths(paths, "progress")
    with np.errstate(over="ignore", invalid="ignore"):  # a path may end far out
        values = {name: values_at(function, *points.T, where="progress") for name, points in checked.items()}
    axes = new_axes(8.4, 4.8) if axes is None else axes
    longest = max(map(len, values.values()))
    every = _round(longest / 12)
    for i, (name, value) in enumerate(values.items()):
        label = name if len(value) == longest else f"{name}, ends after {len(value) - 1} steps"
        axes.plot(value, **_style(i), linewidth=1.6, markevery=every, label=label)
    shown = np.concatenate(list(values.values()))
    shown, start = shown[np.isfinite(shown)], max(abs(float(value[0])) for value in values.values()) or 1.0
    if (shown > 0).all():
        axes.set_yscale("log")
        axes.set_ylim(shown.min() / 2, 10 * start)
    else:
        axes.set_ylim(-1.1 * start, 1.1 * start)
    axes.set_xlabel("steps")
    axes.set_ylabel("value")
    _legend_beside(axes)
    return axes


def _check_surface(surface: Any, where: str) -> None:
    if not isinstance(surface, Surface):
        remedy = "expected a Surface: gb.surface(function, (-1, 1), (-1, 1))"
        raise TypeError(f"{where}: surface is {type(surface).__name__}; {remedy}")


def _paths(paths: Any, where: str) -> dict[str, Floats]:
    if not isinstance(paths, Mapping) or not paths:
        raise TypeError(f"{where}: paths is {type(paths).__name__}, expected paths by name, as gb.race returns them")
    return {str(name): _points(path, where) for name, path in paths.items()}


def _points(path: Any, where: str) -> Floats:
    points = np.asarray(path, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"{where}: a path has shape {points.shape}, expected (steps + 1, 2), as gb.descend returns "
                         "for functions of two numbers")  # fmt: skip
    return points


def _inside(surface: Surface) -> bool:
    """Whether the lowest point lies inside the grid."""
    first, second, _ = surface.lowest
    return first not in surface.first[[0, -1]] and second not in surface.second[[0, -1]]


def _contours(surface: Surface, axes: Axes, filled: bool) -> Any:
    """Draw contours of the value, above the lowest if that lies inside; set limits and the axes' names."""
    from matplotlib.colors import BoundaryNorm

    inside = _inside(surface)
    height = np.ma.masked_invalid(surface.values - surface.lowest[2] if inside else surface.values)
    levels = _log_levels(height.compressed()) if inside else _even_levels(height.compressed())
    rows, columns = (np.unique(np.linspace(0, n - 1, GRID).round().astype(int)) for n in height.shape)
    grid = surface.first[columns], surface.second[rows], height[np.ix_(rows, columns)]
    if filled:
        drawn = axes.contourf(*grid, levels, cmap=SHADES, norm=BoundaryNorm(levels, 256))
    else:
        drawn = axes.contour(*grid, levels, colors="0.75", linewidths=0.8)
        axes.clabel(drawn, fontsize=7, colors="0.45", fmt=_text)
    axes.set_xlim(surface.first[0], surface.first[-1])  # and paths do not widen them
    axes.set_ylim(surface.second[0], surface.second[-1])
    axes.set_xlabel(surface.names[0])
    axes.set_ylabel(surface.names[1])
    return drawn


def _log_levels(height: Floats) -> list[float]:
    """0 and round numbers, in equal ratios or nearly, from what one value in 200 lies below to beyond the greatest."""
    positive = height[height > 0]
    if not positive.size:
        return [0.0, 1.0]
    low, high = math.log10(np.quantile(positive, 0.005)), math.log10(positive.max())
    digits = next((d for d in ((1, 2, 5), (1, 3)) if len(d) * (high - low) <= LEVELS), (1,))
    every = max(1, round((high - low) / LEVELS))  # decades
    decades = range(math.floor(low), math.ceil(high) + every + 1, every)
    numbers = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    below = [n for n in numbers if n >= positive.max()][:1]
    return [0.0, *(n for n in numbers if 10**low <= n < positive.max()), *below]


def _even_levels(height: Floats) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(level) for level in MaxNLocator(LEVELS).tick_values(height.min(), height.max())]


def _round(number: float) -> int:
    """The nearest 1, 2 or 5 times a power of ten."""
    if number <= 1:
        return 1
    power: int = 10 ** math.floor(math.log10(number))
    return min((power, 2 * power, 5 * power, 10 * power), key=lambda n: abs(math.log(n / number)))


def _style(i: int) -> dict[str, Any]:
    """Of the i-th of several lines."""
    return {
        "color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)],
        "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6,
    }  # fmt: skip


def _text(number: float) -> str:
    return f"{number:.4g}".replace("-", "−")


def _legend_beside(axes: Axes, title: str = "", length: float = 3.5) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, title=title,
                handlelength=length, alignment="left")  # fmt: skip


def _legend_above(axes: Axes, columns: int = 2) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0, frameon=False, ncols=columns)


# ---- training ------------------------------------------------------------------------------------------------------


def curves(history: Any, figure: str = "loss", axes: Axes = None) -> Axes:
    """A figure of a history, or of a trainer's, after every epoch: of the rows trained on and of the validation rows,
    with the gap between them shaded and the best epoch marked."""
    found = history.history if isinstance(history, Trainer) else history
    if not isinstance(found, Mapping):
        raise TypeError(f"curves: history is {type(history).__name__}; expected what fit returns, or a trainer")
    if not found:
        raise ValueError("curves: the history is empty; train first")
    own = _curve(found, figure)
    held = _curve(found, f"val_{figure}") if f"val_{figure}" in found else None
    key, signed = watched(found, figure if held is None else f"val_{figure}", "curves")
    axes = new_axes() if axes is None else axes
    epochs = np.arange(1, len(own) + 1)
    few = "o" if len(own) == 1 else None
    axes.plot(epochs, own, color=BLUE, marker=few, label=f"{figure}, training")
    if held is not None:
        axes.plot(epochs, held, color=VERMILLION, linestyle="--", marker=few or "", label=f"{figure}, validation")
        gap = f"gap, {_text(held[-1] - own[-1])} at the end"
        axes.fill_between(epochs, own, held, color="0.85", linewidth=0, label=gap)
    if np.isfinite(signed).any():
        at = int(np.nanargmin(np.where(np.isfinite(signed), signed, np.nan)))
        best = f"best, {_text(found[key][at])} after epoch {at + 1}"
        axes.axvline(at + 1, color="0.4", linestyle=":", linewidth=1)
        axes.plot(at + 1, found[key][at], "*", color="white", markeredgecolor="black", markersize=13, zorder=5,
                  linestyle="none", label=best)  # fmt: skip
    shown = np.concatenate([own, own if held is None else held])
    shown = shown[np.isfinite(shown)]
    if shown.size and shown.max() > 50 * shown.min() > 0:
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel(figure)
    axes.set_xlim(1 - 0.03 * len(own), len(own) * 1.03)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False)
    return axes


def _curve(history: Mapping[str, Sequence[float]], key: str) -> Floats:
    if key not in history:
        raise ValueError(f"curves: unknown figure {key!r}; the history has {', '.join(history)}")
    return np.asarray(history[key], np.float64)


def gradient_flow(report: GradientReport, axes: Axes = None) -> Axes:
    """What gradient reaches each layer, on a logarithmic axis, from `gb.gradient_report`: the root mean squares of
    ∂L/∂preact and of ∂L/∂parameters, with the layer's verdict beside it.

    What such an axis cannot hold stands at its ends: 0 at the left, infinity at the right, NaN in the middle, in text.
    """
    if not isinstance(report, GradientReport):
        remedy = "expected what gb.gradient_report(trainer, x, y) returns"
        raise TypeError(f"gradient_flow: report is {type(report).__name__}; {remedy}")
    layers = report.layers
    axes = new_axes(8, 1.6 + 0.42 * len(layers)) if axes is None else axes
    rows = np.arange(len(layers))
    delta, gradient = (np.array([getattr(row, k) for row in layers]) for k in ("delta_pre", "gradient"))
    # without parameters the report has NaN too: that is only a fault where the gradient that arrives is one
    shown = np.where(np.isnan(gradient) & ~np.isnan(delta), -1, gradient)
    good = [v for v in (*delta, *shown) if 0 < v < math.inf]
    low, high = (min(good) / 3, max(good) * 3) if good else (0.1, 10.0)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    for values, name, up, style in (
        (delta, "of the pre-activations, ∂L/∂z", -0.13, {"color": BLUE, "marker": "o", "linestyle": "-"}),
        (shown, "of the parameters, ∂L/∂w", 0.13, {"color": VERMILLION, "marker": "s", "linestyle": "none"}),
    ):
        drawable = np.where((values > 0) & np.isfinite(values), values, np.nan)
        axes.plot(drawable, rows + up, label=name, markersize=7, linewidth=1, **style)
        for row, value in enumerate(values):
            if (end := _end(value)) is not None:
                at, side, text = end
                axes.text(at, row + up, text, ha=side, va="center", color=style["color"], fontweight="bold",
                          transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yticks(rows, [_title(f"{row.name}  {row.what}") for row in layers])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.grid(axis="both", color="0.9")
    axes.set_axisbelow(True)
    for row, layer in enumerate(layers):
        sound = layer.verdict == "healthy"
        axes.text(1.02, row, layer.verdict, transform=axes.get_yaxis_transform(), va="center",
                  color=BLACK if sound else VERMILLION, fontweight="normal" if sound else "bold")  # fmt: skip
    axes.set_xlabel("root mean square of the gradient of the mean loss")
    axes.set_ylabel("layers, from input to output")
    _legend_above(axes)
    return axes


def _end(value: float) -> tuple[float, str, str] | None:
    """Where along the axis, on which side of that and as which text, if a logarithmic axis cannot hold the value."""
    if value == 0:
        return 0.01, "left", "0"
    return None if math.isfinite(value) else (0.5, "center", "NaN") if math.isnan(value) else (0.99, "right", "∞")


def _title(text: str, most: int = 44) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


# ---- decisions -----------------------------------------------------------------------------------------------------


def decision_regions(
    model: Layer | Trainer, x: Any, y: Any, axes: Axes = None, columns: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None, names: Sequence[str] | None = None,
) -> Axes:  # fmt: skip
    """The class a model, or a trainer's, predicts over the plane of two columns of x, and the rows as points.

    Of more than two columns `columns` says which two, the others are held at their mean. `classes` are the names of the
    classes, `names` those of the columns.
    """
    where = "decision_regions"
    model = model.model if isinstance(model, Trainer) else model
    check_model(model, where)
    rows = as_features(x, np.float64, model.inputs, where)
    check_same_length(rows, y, where)
    across, up = _two(columns, rows.shape[1], where)
    titles = _named(names, [f"column {i}" for i in range(rows.shape[1])], f"{where}: x has", "columns but names")
    ends = [_ends(rows[:, i]) for i in (across, up)]
    a, b = (np.linspace(*end, GRID) for end in ends)
    plane = np.tile(rows.mean(0), (GRID * GRID, 1))
    plane[:, across], plane[:, up] = (grid.ravel() for grid in np.meshgrid(a, b))
    if (several := model.predict_classes(rows[:1])).ndim != 1:
        raise ValueError(f"{where}: the model has {several.shape[1]} sigmoid outputs, not one class; expected outputs "
                         "that compete, of loss cross_entropy, or a single one")  # fmt: skip
    scores = model.predict(plane).astype(np.float64)
    scores = np.hstack([-scores, scores]) if scores.shape[1] == 1 else scores
    count = scores.shape[1]
    labels = as_labels(y, count, where)
    texts = _named(classes, [str(i) for i in range(count)], f"{where}: the model has", "classes but classes")
    axes = new_axes(7.2, 4.8) if axes is None else axes
    _fill(scores.reshape(GRID, GRID, count), a, b, texts, axes)
    for k in np.unique(labels):
        points, style = rows[labels == k][:, [across, up]], _style(k)
        style |= {"linestyle": "none", "markersize": 6 if len(rows) <= 300 else 4}
        axes.plot(*points.T, **style, label=texts[k])
    axes.set_xlim(a[0], a[-1])
    axes.set_ylim(b[0], b[-1])
    axes.set_xlabel(titles[across])
    axes.set_ylabel(titles[up])
    _legend_beside(axes, "class", length=1)
    return axes


def _two(columns: Any, width: int, where: str) -> tuple[int, int]:
    """The columns to draw."""
    if columns is None:
        if width != 2:
            remedy = "choose two with columns=(i, j)" if width > 2 else "add another"
            raise ValueError(f"{where}: x has {width} column{'s' * (width > 1)}, expected 2; {remedy}")
        return 0, 1
    if not isinstance(columns, Sequence) or len(columns) != 2:
        raise TypeError(f"{where}: columns is {columns!r}; expected two numbers of columns, as (0, 3)")
    i, j = (whole(where, f"columns[{k}]", value, 0) for k, value in enumerate(columns))
    if i == j or max(i, j) >= width:
        raise ValueError(f"{where}: columns is {columns!r}, expected two different numbers from 0 to {width - 1}")
    return i, j


def _named(given: Sequence[str] | None, otherwise: list[str], has: str, but: str) -> list[str]:
    names = otherwise if given is None else [str(name) for name in given]
    if len(names) != len(otherwise):
        raise ValueError(f"{has} {len(otherwise)} {but} has {len(names)} names; give one for each")
    return names


def _ends(values: Floats) -> tuple[float, float]:
    margin = 0.06 * float(np.ptp(values)) or 0.5
    return float(values.min()) - margin, float(values.max()) + margin


def _fill(scores: Floats, a: Floats, b: Floats, texts: Sequence[str], axes: Axes) -> None:
    """Tint each class's region, where its score is the highest; a line around it, its name where there is most room."""
    from matplotlib import patheffects
    from matplotlib.colors import to_rgb

    halo = [patheffects.withStroke(linewidth=3, foreground="white")]
    for k, text in enumerate(texts):
        ahead = scores[..., k] - np.delete(scores, k, axis=-1).max(-1)
        if not (ahead > 0).any():
            continue
        tint = [0.72 + 0.28 * c for c in to_rgb(COLOURS[k % len(COLOURS)])]
        axes.contourf(a, b, ahead, [0, ahead.max()], colors=[tint])
        if (ahead < 0).any():
            axes.contour(a, b, ahead, [0], colors="black", linewidths=0.8)
        row, column = _middle(ahead > 0)
        axes.text(a[column], b[row], text, ha="center", va="center", fontweight="bold", path_effects=halo, zorder=6)


def _middle(inside: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """A point of the region as far from its border as any."""
    while inside.any():
        left, inside = inside, np.pad(inside, 1)
        inside = inside[1:-1, 1:-1] & inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    row, column = np.argwhere(left)[np.count_nonzero(left) // 2]
    return int(row), int(column)
