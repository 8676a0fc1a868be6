"""Pictures of a plan: a training step as its launches, down to the loss and back up; what bounds each on a GPU."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpubackprop.backends.base import Launch
from gpubackprop.checks import choice
from gpubackprop.columns import brief
from gpubackprop.formulas import LOSSES
from gpubackprop.plan import Plan, allocation
from gpubackprop.plot.figures import BLUE, ORANGE, Axes, legend_beside, line_style, new_axes
from gpubackprop.precision import PRECISIONS
from gpubackprop.roofline import GPUS, Gpu, attained, modelled

__all__ = ["plan", "roofline"]

TURNS = {"softmax_cross_entropy", "sse", "seed", *LOSSES}  # where forward ends
WIDTH, GAP, ROW = 5.4, 1.6, 0.52  # inches: of a column, between the two, of a launch
LEFT, RIGHT = 0.0, WIDTH + GAP
ROOF = 9.0  # inches of a roofline beside it
MOST = 64  # characters of an equation


# ---- a step --------------------------------------------------------------------------------------------------------


def plan(plan: Plan, axes: Axes = None, gpu: str | None = None, precision: str = "float32") -> Axes:
    """The launches of a training step in the order in which they run: down on the left from the batch to the loss, and
    up again on the right, each layer's way back beside its way forward. Lines lead to where a result is used again.

    A launch has its equation, its operations and bytes, and bars of both beside those of the largest of the step. With
    a `gpu`, such as "h100", it also has the time that the peaks of that alone allow: a model, not a measurement.
    """
    _check("plan", plan)
    return _draw(plan, axes, None if gpu is None else _known("plan", gpu, precision), precision)


def _check(where: str, plan: Any) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"{where}: plan is {type(plan).__name__}; expected what trainer.plan(batch_size) returns")
    if not plan.launches:
        raise ValueError(f"{where}: the plan has no launches; record a section, or take trainer.plan(batch_size)")


def _known(where: str, gpu: Any, precision: Any) -> Gpu:
    choice(where, "gpu", gpu, GPUS)
    choice(where, "precision", precision, PRECISIONS)
    return GPUS[gpu]


def _draw(plan: Plan, axes: Axes, gpu: Gpu | None, precision: str) -> Axes:
    blocks = list(_blocks(plan))
    places, rows = _places(blocks), _rows(blocks)
    axes = new_axes(*_size(rows)) if axes is None else axes
    times = {} if gpu is None else {id(n): brief(s, "s") for n, s, _ in modelled(plan, gpu, precision)}
    most = {key: max(1, *(getattr(n, key) for n in plan.launches)) for key in ("flops", "bytes")}
    _bands(axes, blocks)
    for launch in plan.launches:
        _box(axes, launch, *places[id(launch)], most, times.get(id(launch), ""))
    for made, used in _reused(plan, places):
        axes.annotate("", (RIGHT, used), (WIDTH, made), zorder=1,
                      arrowprops={"arrowstyle": "-|>", "color": "0.55", "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    for x, start, end in ((LEFT - 0.22, -0.4, rows - 0.6), (RIGHT + WIDTH + 0.22, rows - 0.6, -0.4)):
        axes.annotate("", (x, end), (x, start), arrowprops={"arrowstyle": "-|>", "color": "0.2", "linewidth": 1.5})
    for x, text in ((LEFT, "forward, down to the loss"), (RIGHT, "backward, up to the weights")):
        axes.text(x, -0.75, text, fontsize=9, style="italic")
    for k, (key, bar) in enumerate(_BARS.items()):
        axes.barh(-1.45, 0.5, 0.18, LEFT + 3.5 * k, **bar)
        word = "operations" if key == "flops" else "bytes"
        axes.text(LEFT + 3.5 * k + 0.6, -1.45, f"{word}, beside the most: {most[key]:,}", va="center", fontsize=8)
    axes.set_xlim(-0.4, RIGHT + WIDTH + 0.4)
    axes.set_ylim(rows - 0.4, -1.8)
    axes.axis("off")
    axes.set_title(_title(plan, gpu, precision), fontsize=10, loc="left")
    return axes


def with_roofline(plan: Plan, gpu: str, precision: str = "float32") -> Axes:
    """`plan` and `roofline` side by side in a new figure; the Axes of the plan."""
    width, height = _size(_rows(list(_blocks(plan))))
    left, right = new_axes(width + ROOF, max(height, 5), columns=2, width_ratios=(width, ROOF))
    right.set_box_aspect(0.75)
    roofline(plan, gpu, precision, right)
    return _draw(plan, left, GPUS[gpu], precision)


_BARS: dict[str, dict[str, Any]] = {
    "flops": {"color": BLUE, "linewidth": 0},
    "bytes": {"color": ORANGE, "hatch": "////", "edgecolor": "white", "linewidth": 0},
}

Block = tuple[str, list[Launch], list[Launch]]
Places = dict[int, tuple[float, int]]  # of launches by identity: the left edge, the row from the top


def _blocks(plan: Plan) -> Iterator[Block]:
    """What stands side by side, from top to bottom: what goes before and after the gradient, each layer's way forward
    and back, the loss."""
    gradient = plan.sections.get("gradient", [])
    turn = next((k for k, launch in enumerate(gradient) if launch.name in TURNS), len(gradient) - 1)
    ways = gradient[: turn + 1], gradient[turn + 1 :]
    others = {name: section for name, section in plan.sections.items() if name != "gradient"}
    first = [launch for name in ("feed", "before") for launch in others.pop(name, ())]
    yield "", first, [launch for section in others.values() for launch in section]
    for layer in dict.fromkeys([*filter(None, (launch.layer for launch in gradient)), ""]):
        forward, back = ([launch for launch in way if launch.layer == layer] for way in ways)
        yield f"layer {layer}" if layer else "loss", forward, back


def _rows(blocks: list[Block]) -> int:
    return sum(max(len(left), len(right)) for _, left, right in blocks)


def _size(rows: int) -> tuple[float, float]:
    """Of a figure, in inches."""
    return RIGHT + WIDTH + 0.8, ROW * (rows + 2.6) + 0.3


def _places(blocks: list[Block]) -> Places:
    """On the left of a block launches follow one another downwards, on the right upwards."""
    places, row = Places(), 0
    for _, left, right in blocks:
        height = max(len(left), len(right))
        places |= {id(launch): (LEFT, row + k) for k, launch in enumerate(left)}
        places |= {id(launch): (RIGHT, row + height - 1 - k) for k, launch in enumerate(right)}
        row += height
    return places


def _bands(axes: Axes, blocks: list[Block]) -> None:
    """The name of each block between the columns, every other block on grey."""
    row = 0
    for k, (label, left, right) in enumerate(blocks):
        height = max(len(left), len(right))
        if height and k % 2:
            axes.barh(row + height / 2 - 0.5, RIGHT + WIDTH + 0.2, height, LEFT - 0.1, color="0.93", zorder=-1)
        if height and label:
            axes.text(WIDTH + GAP / 2, row + height / 2 - 0.5, label, ha="center", va="center", fontsize=9, zorder=3,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85})  # fmt: skip
        row += height


def _reused(plan: Plan, places: Places) -> Iterator[tuple[int, int]]:
    """The rows of each launch on the left, and of those on the right that read what it wrote last."""
    written: dict[int, int | None] = {}
    for launch in plan.launches:
        left, row = places[id(launch)]
        if left == RIGHT:
            made = dict.fromkeys(written.get(id(allocation(b))) for b in launch.reads)
            yield from ((above, row) for above in made if above is not None)
        written |= {id(allocation(b)): row if left == LEFT else None for b in launch.writes}


def _box(axes: Axes, launch: Launch, left: float, row: int, most: dict[str, int], time: str) -> None:
    """One launch: its name and equation, its work in words, and bars of its operations and bytes."""
    axes.barh(row, WIDTH, 0.84, left, color="white", edgecolor="0.5", linewidth=0.8, zorder=2)
    *more, last = launch.what.splitlines()
    equation = f"… {last}" if more else last  # of an update the line that changes the weights
    equation = equation if len(equation) <= MOST else f"{equation[: MOST - 1]}…"
    work = " · ".join(filter(None, (brief(launch.flops, "op"), brief(launch.bytes, "B"), time)))
    axes.text(left + 0.08, row - 0.2, launch.name, fontsize=8, va="center", weight="bold", zorder=3)
    axes.text(left + WIDTH - 0.08, row - 0.2, work, fontsize=7, va="center", ha="right", color="0.25", zorder=3)
    axes.text(left + 0.08, row + 0.07, equation, fontsize=7.5, va="center", family="monospace", zorder=3)
    for k, (key, bar) in enumerate(_BARS.items()):
        axes.barh(row + 0.27 + 0.085 * k, WIDTH * getattr(launch, key) / most[key], 0.075, left, zorder=3, **bar)


def _title(plan: Plan, gpu: Gpu | None, precision: str) -> str:
    work = f"{len(plan.launches)} launches, {plan.flops:,} operations, {plan.bytes:,} bytes moved"
    model = "" if gpu is None else f"\ntimes: roofline MODEL of one {gpu.name}, {precision} products, not a measurement"
    return f"{plan.title} on {plan.backend.device}\n{work}{model}"


# ---- its bounds ----------------------------------------------------------------------------------------------------


def roofline(plan: Plan, gpu: str, precision: str = "float32", axes: Axes = None) -> Axes:
    """What each launch could attain on a GPU by its published peaks, over its operations per byte moved: a MODEL, not a
    measurement (Williams et al., "Roofline: An Insightful Visual Performance Model").

    Left of the ridge memory bounds it, right of it arithmetic. Launches without operations are left out.
    """
    _check("roofline", plan)
    card = _known("roofline", gpu, precision)
    found = attained(plan, card, precision)
    if not found:
        raise ValueError("roofline: no launch of the plan has operations; take trainer.plan(batch_size)")
    axes = new_axes(8.4, 4.8) if axes is None else axes
    peaks = {card.float32 * 1e12: "what is not products"} | {card.rate(precision): f"{precision} products"}
    intensities = [intensity for _, intensity, _ in found]
    low = min(intensities) / 3
    high = 3 * max(*intensities, *(peak / (card.bandwidth * 1e9) for peak in peaks))
    x = np.geomspace(low, high, 200)
    for (peak, what), dashes in zip(peaks.items(), ("--", "-")[-len(peaks) :], strict=True):
        axes.plot(x, np.minimum(peak, x * card.bandwidth * 1e9) / 1e12, color="0.4", linestyle=dashes,
                  label=f"roof of {what}, {peak / 1e12:g} TFLOP/s")  # fmt: skip
    for i, name in enumerate(dict.fromkeys(launch.name for launch, _, _ in found)):
        points = np.array([(intensity, rate / 1e12) for launch, intensity, rate in found if launch.name == name])
        axes.plot(*points.T, **line_style(i) | {"linestyle": "none"}, label=f"{name} ×{len(points)}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte moved")
    axes.set_ylabel("TFLOP/s at most")
    about = f"{card.bandwidth:,g} GB/s, {precision} products"
    axes.set_title(f"roofline MODEL of one {card.name}, not a measurement\n{about}", fontsize=10, loc="left")
    legend_beside(axes, length=2)
    return axes
