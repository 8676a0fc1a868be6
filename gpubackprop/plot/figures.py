"""What pictures share: figures and their files, colours and line styles, legends, numbers as text."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.checkpoint import write_file

__all__ = [
    "BLACK", "BLUE", "COLOURS", "GRID", "ORANGE", "SHADES", "VERMILLION", "Axes", "Floats", "check_kind", "in_text",
    "legend_above", "legend_beside", "line_style", "new_axes", "pyplot", "save",
]  # fmt: skip

Axes = Any
Floats = npt.NDArray[np.float64]

# Okabe & Ito, "Color Universal Design", without the yellow, which is too light for lines on white.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")  # fmt: skip
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")  # as many as have no factor with the colours
SHADES = "cividis"
KINDS = (".svg", ".png", ".pdf")
GRID = 201  # points along each side that a picture is drawn from, at most: a file has room for them

# ---- figures and files ---------------------------------------------------------------------------------------------


def pyplot() -> Any:
    """matplotlib's pyplot; without matplotlib an error that says what to install."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('plot: matplotlib is not installed; pip install "gpubackprop[plot]"') from error
    return pyplot


def new_axes(width: float = 6.4, height: float = 4.8, columns: int = 1, **grid: Any) -> Any:
    """The Axes of a new figure of so many inches, or an array of them side by side."""
    return pyplot().subplots(1, columns, figsize=(width, height), layout="constrained", **grid)[1]


def save(axes: Axes, path: str | os.PathLike[str], *, replace: bool = True) -> None:
    """Write the figure of these Axes as .svg, .png or .pdf, whole or not at all: the same picture in the same bytes.

    With replace=False a file that is there is an error.
    """
    from matplotlib import rc_context

    kind, file = check_kind(path), io.BytesIO()
    dates: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "gpubackprop"}):
        axes.get_figure().savefig(file, format=kind[1:], dpi=200, metadata=dates.get(kind))
    write_file(path, file.getvalue(), replace=replace)


def check_kind(path: str | os.PathLike[str]) -> str:
    """The suffix of a picture's file, which must be one of KINDS."""
    if (kind := Path(path).suffix.lower()) not in KINDS:
        raise ValueError(f"{os.fspath(path)}: is of unknown kind {kind!r}; choose from {', '.join(KINDS)}")
    return kind


def line_style(i: int) -> dict[str, Any]:
    """Of the i-th of several lines."""
    return {
        "color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)],
        "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6,
    }  # fmt: skip


def in_text(number: float) -> str:
    """To four digits."""
    return f"{number:.4g}".replace("-", "−")


def legend_beside(axes: Axes, title: str = "", length: float = 3.5, columns: int = 1) -> None:
    """A legend to the right of the Axes, where nothing is drawn."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, title=title,
                handlelength=length, alignment="left", ncols=columns)  # fmt: skip


def legend_above(axes: Axes) -> None:
    """A legend over the Axes."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0, frameon=False)
