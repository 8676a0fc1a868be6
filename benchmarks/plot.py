"""Pictures of figures: bars of ratios, and curves of cost along one axis (matplotlib, extra `plot`)."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpubackprop.checkpoint import write_file

from .report import along
from .rounds import Figures

__all__ = ["plot"]


def plot(figures: Sequence[Figures], about: dict[str, Any], folder: Path) -> list[Path]:
    """Write one SVG for each group of cases and each axis of scaling; which files."""
    from matplotlib.figure import Figure

    taken = [f for f in figures if f.seconds]
    caption = f"{about['machine']}, gpubackprop {about['gpubackprop']}, NumPy {about['numpy']}, {about['date'][:10]}"
    written = []
    for group in dict.fromkeys(f.group for f in taken if f.group != "scaling"):
        figure = Figure(layout="constrained")
        _bars(figure, [f for f in taken if f.group == group])
        written.append(_save(figure, f"{group}: time relative to gpubackprop\n{caption}", folder / f"{group}.svg"))
    curves = list(along(taken))
    for axis in dict.fromkeys(case.axis for case, _ in curves):
        figure = Figure(layout="constrained")
        _curves(figure, axis, [(case.value, f) for case, f in curves if case.axis == axis])
        written.append(_save(figure, f"a step's time by {axis}\n{caption}", folder / f"scaling-{axis}.svg"))
    return written


def _bars(figure: Any, taken: Sequence[Figures]) -> None:
    """For each case a bar for each contender, as long as its time over that of the first."""
    names, cases = (list(dict.fromkeys(getattr(f, k) for f in taken)) for k in ("contender", "case"))
    first = {c: next(f.median for f in taken if f.case == c) for c in cases}
    axes = figure.add_subplot()
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        own = {f.case: f.median for f in taken if f.contender == name}
        places = [k + i * height for k, c in enumerate(cases) if c in own]
        axes.barh(places, [own[c] / first[c] for c in cases if c in own], height, label=name)
    figure.set_size_inches(8, 1.2 + 0.22 * len(cases) * (len(names) + 1))
    axes.set_yticks([k + 0.4 - height / 2 for k in range(len(cases))], cases)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"time / time of {names[0]}")
    axes.legend()


def _curves(figure: Any, axis: str, taken: Sequence[tuple[int, Figures]]) -> None:
    axes = figure.add_subplot()
    for name in dict.fromkeys(f.contender for _, f in taken):
        points = sorted((value, f.median) for value, f in taken if f.contender == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel("seconds")
    axes.legend()


def _save(figure: Any, title: str, path: Path) -> Path:
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file := io.BytesIO(), format="svg")
    write_file(path, file.getvalue())
    return path
