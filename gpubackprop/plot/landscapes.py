"""Pictures of functions: contours, the path of a descent, optimizers in a race."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpubackprop.landscape import Surface, values_at
from gpubackprop.plot.figures import (
    BLUE,
    GRID,
    ORANGE,
    SHADES,
    VERMILLION,
    Axes,
    Floats,
    in_text,
    legend_above,
    legend_beside,
    line_style,
    new_axes,
)

__all__ = ["path", "progress", "race", "surface"]

LEVELS = 14  # of contours, at most about
MARKS = 7  # on a path


def surface(surface: Surface, axes: Axes = None, path: Any = None) -> Axes:
    """Contours of a `gb.surface` with its lowest point, and a path of `gb.descend` over it.

    The levels are 1, 2, 5, 10, … above the lowest point, as far as there are values; where that lies on the border and
    below 0, as of a saddle, they are evenly spaced.
    """
    _check_surface(surface, "surface")
    points = None if path is None else _points(path, "path")
    axes = new_axes() if axes is None else axes
    filled, inside = _contours(surface, axes, filled=True), _inside(surface)
    *lowest, value = surface.lowest
    above = f" above the lowest, {in_text(value)}" if _is_bowl(surface) else ""
    bar = axes.get_figure().colorbar(filled, ax=axes, label=f"value{above}", ticks=filled.levels)
    bar.ax.set_yticklabels(map(in_text, filled.levels))
    where = ", ".join(f"{n} = {in_text(a)}" for n, a in zip(surface.names, lowest, strict=True))
    axes.plot(*lowest, "*", color=ORANGE, markeredgecolor="black", markersize=14, linestyle="none", clip_on=False,
              label=f"lowest{'' if inside else ' on the grid'}, {where}")  # fmt: skip
    if points is not None:
        _path(points, axes, "descent from ○ to ✕, a dot a step", color="white", linewidth=0.8)
        axes.plot(*points.T, ".", color=VERMILLION, markersize=3, markeredgewidth=0)
    legend_above(axes)
    return axes


def path(path: Any, axes: Axes, label: str | None = None, **line: Any) -> Axes:
    """A path (steps + 1, 2) as a line, its start a circle, its end a cross; `line` goes to matplotlib's `plot`."""
    from matplotlib import patheffects

    points = _points(path, "path")
    [drawn] = axes.plot(*points.T, label=label, **{"color": BLUE, "linewidth": 1.5} | line)
    edge = "black" if drawn.get_color() == "white" else "white"
    drawn.set_path_effects([patheffects.withStroke(linewidth=drawn.get_linewidth() + 1.5, foreground=edge)])
    for point, marker in (points[0], "o"), (points[-1], "X"):
        axes.plot(*point, marker, color=drawn.get_color(), markeredgecolor=edge, markersize=9,
                  zorder=drawn.get_zorder() + 1)  # fmt: skip
    return axes


_path = path  # where an argument has that name


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
        axes.plot(*points.T, **line_style(i), linewidth=width, markevery=marks, label=label)
    for start in {tuple(points[0].tolist()) for points in checked.values()}:
        axes.plot(*start, "o", color="black", markerfacecolor="white", markersize=10, markeredgewidth=2, zorder=9)
    legend_beside(axes)
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
        axes.plot(value, **line_style(i), linewidth=1.6, markevery=every, label=label)
    shown = np.concatenate(list(values.values()))
    shown, start = shown[np.isfinite(shown)], max(abs(float(value[0])) for value in values.values()) or 1.0
    if (shown > 0).all():
        axes.set_yscale("log")
        axes.set_ylim(shown.min() / 2, 10 * start)
    else:
        axes.set_ylim(-1.1 * start, 1.1 * start)
    axes.set_xlabel("steps")
    axes.set_ylabel("value")
    legend_beside(axes)
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


def _is_bowl(surface: Surface) -> bool:
    """Whether heights are seen best from the lowest point: it lies inside, or values are of a kind that ends at 0."""
    return _inside(surface) or surface.lowest[2] >= 0


def _contours(surface: Surface, axes: Axes, filled: bool) -> Any:
    """Draw contours of the value, of a bowl above its lowest point; set limits and the axes' names."""
    from matplotlib.colors import BoundaryNorm

    bowl = _is_bowl(surface)
    height = np.ma.masked_invalid(surface.values - surface.lowest[2] if bowl else surface.values)
    levels = _log_levels(height.compressed()) if bowl else _even_levels(height.compressed())
    rows, columns = (np.unique(np.linspace(0, n - 1, GRID).round().astype(int)) for n in height.shape)
    grid = surface.first[columns], surface.second[rows], height[np.ix_(rows, columns)]
    if filled:
        drawn = axes.contourf(*grid, levels, cmap=SHADES, norm=BoundaryNorm(levels, 256))
    else:
        drawn = axes.contour(*grid, levels, colors="0.75", linewidths=0.8)
        axes.clabel(drawn, fontsize=7, colors="0.45", fmt=in_text)
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
