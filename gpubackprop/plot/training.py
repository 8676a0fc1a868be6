"""Pictures of training: a history with its gap, the flow of gradients, the regions of decision."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.checks import whole
from gpubackprop.data import as_features, as_labels, by_name, check_same_length
from gpubackprop.model import Layer, check_model
from gpubackprop.plot.figures import (
    BLACK,
    BLUE,
    COLOURS,
    GRID,
    VERMILLION,
    Axes,
    Floats,
    in_text,
    legend_above,
    legend_beside,
    line_style,
    new_axes,
)
from gpubackprop.rates import direction, measures
from gpubackprop.report import GradientReport
from gpubackprop.trainer import Trainer

__all__ = ["curves", "decision_regions", "gradient_flow"]


# ---- training ------------------------------------------------------------------------------------------------------


def curves(history: Any, figure: str = "loss", axes: Axes = None) -> Axes:
    """A figure of a history, or of a trainer's, after every epoch: of the rows trained on and of the validation rows,
    with the gap between them shaded and, of the library's own figures, the best epoch marked."""
    found = history.history if isinstance(history, Trainer) else history
    if not isinstance(found, Mapping):
        raise TypeError(f"curves: history is {type(history).__name__}; expected what fit returns, or a trainer")
    own = _curve(found, figure) if found else np.zeros(0)
    if not own.size:
        raise ValueError("curves: the history is empty; train first")
    held = _curve(found, f"val_{figure}") if f"val_{figure}" in found else None
    key = figure if held is None else f"val_{figure}"
    signed = np.asarray(found[key]) * (direction(key, "auto", "curves") if measures(key) else np.nan)
    axes = new_axes() if axes is None else axes
    epochs = np.arange(1, len(own) + 1)
    few = "o" if len(own) == 1 else None
    axes.plot(epochs, own, color=BLUE, marker=few, label=f"{figure}, training")
    if held is not None:
        axes.plot(epochs, held, color=VERMILLION, linestyle="--", marker=few or "", label=f"{figure}, validation")
        at_end = held[-1] - own[-1]
        label = f"gap, {in_text(at_end)} at the end" if np.isfinite(at_end) else "gap"
        axes.fill_between(epochs, own, held, color="0.85", linewidth=0, label=label)
    bad = np.flatnonzero(~np.isfinite(own + (0 if held is None else held))) + 1
    for k, epoch in enumerate(bad):
        axes.axvspan(epoch - 0.5, epoch + 0.5, facecolor="none", edgecolor="0.5", hatch="//", linewidth=0,
                     label=f"not finite in {len(bad)} epoch{'s' * (len(bad) > 1)}" if k == 0 else None)  # fmt: skip
    if np.isfinite(signed).any():
        at = int(np.nanargmin(np.where(np.isfinite(signed), signed, np.nan)))
        best = f"best, {in_text(found[key][at])} after epoch {at + 1}"
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
        (delta, "of the pre-activations, ∂L/∂preact", -0.13, {"color": BLUE, "marker": "o", "linestyle": "-"}),
        (shown, "of the parameters, ∂L/∂parameter", 0.13, {"color": VERMILLION, "marker": "s", "linestyle": "none"}),
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
    legend_above(axes)
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
    rows = as_features(by_name(x, model.feature_names, where), np.float64, model.inputs, where)
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
    beside = 1 + (count - 1) // 14  # columns of the legend
    axes = new_axes(5.4 + 1.8 * beside, 4.8) if axes is None else axes
    _fill(scores.reshape(GRID, GRID, count), a, b, texts, axes)
    for k in np.unique(labels):
        points, style = rows[labels == k][:, [across, up]], line_style(k)
        style |= {"linestyle": "none", "markersize": 6 if len(rows) <= 300 else 4}
        axes.plot(*points.T, **style, label=texts[k])
    axes.set_xlim(a[0], a[-1])
    axes.set_ylim(b[0], b[-1])
    axes.set_xlabel(titles[across])
    axes.set_ylabel(titles[up])
    legend_beside(axes, "class", length=1, columns=beside)
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
