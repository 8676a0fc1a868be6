"""Landscapes: the path an optimizer takes on a function, and functions, losses too, over a plane."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.arena import Parameter
from gpubackprop.checks import interval, number, warn, whole
from gpubackprop.columns import Shown
from gpubackprop.datasets import regression7
from gpubackprop.diagnostics import copied
from gpubackprop.initializers import draw
from gpubackprop.model import Layer
from gpubackprop.optimizers import SGD, Adadelta, Adagrad, Adam, Optimizer, RMSprop
from gpubackprop.plan import recording
from gpubackprop.rates import Rate
from gpubackprop.shapes import broadcast_to
from gpubackprop.tensor import Tensor, tensor
from gpubackprop.trainer import Trainer, TrainingDiverged

__all__ = [
    "Plane", "Surface", "descend", "line_loss", "plane", "race", "racers", "saddle", "steps_until", "surface", "valley",
    "values_at",
]  # fmt: skip

Floats = npt.NDArray[np.float64]
Function = Callable[..., Tensor]
State = Mapping[str, Any]


# ---- functions to descend ------------------------------------------------------------------------------------------


def line_loss(m: Any, b: Any) -> Any:
    """1/7 Σ (m x + b − y)² over the seven points of `datasets.regression7`; like the other functions here elementwise,
    of tensors, arrays or numbers."""
    x, y = regression7()
    return sum((m * a + b - t) ** 2 for a, t in zip(x.ravel().tolist(), y.tolist(), strict=True)) / len(x)


def saddle(x: Any, y: Any) -> Any:
    """x² − y²: level at (0, 0), where it falls along y alone."""
    return x * x - y * y


def valley(x: Any, y: Any) -> Any:
    """(1 − x)² + 100 (y − x²)²: a curved valley that falls slowly to its least value, 0 at (1, 1)
    (Rosenbrock, "An Automatic Method for Finding the Greatest or Least Value of a Function")."""
    across = y - x * x
    return (1 - x) ** 2 + 100 * across * across


# ---- descent -------------------------------------------------------------------------------------------------------


class _Point(Layer):
    """A model whose weights are a point and whose output, whatever x is, is the function there."""

    inputs = 1
    dtype = "float64"

    def __init__(self, function: Function, start: Sequence[float]) -> None:
        self.function = function
        self.point = [Parameter((), value) for value in start]

    def forward(self, x: Tensor) -> Tensor:
        value = self.function(*self.point)
        if not isinstance(value, Tensor) or value.size != 1:
            got = f"shape {value.shape}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"descend: the function returned {got}; expected a tensor of one element, made of its "
                            f"{len(self.point)} arguments, tensors of shape ()")  # fmt: skip
        return broadcast_to(value.reshape(1, 1), (len(x), 1))


def descend(
    function: Function, start: Sequence[float] | Floats, optimizer: Optimizer | str = "sgd", steps: int = 100
) -> Floats:
    """The points an optimizer visits on a function of n tensors, each of shape (): (steps + 1, n), the start first.

    It is a Trainer that makes the steps, in float64, one to an epoch: what is seen here is what trains networks. The
    path is shorter where LBFGS finds no further decrease; and where the function or a coordinate is not finite any
    more: then it ends with the last point that was, and a RuntimeWarning says so.

    >>> descend(lambda x, y: x**2 - y**2, (1.0, 0.5), SGD(0.01), steps=1)
    array([[1.  , 0.5 ],
           [0.98, 0.51]])
    """
    where = "descend"
    if not callable(function):
        raise TypeError(f"{where}: function is {type(function).__name__}; expected one of tensors, as landscape.saddle")
    begin, steps = _point(start, where), whole(where, "steps", steps)
    model = _Point(function, begin)
    trainer = Trainer(model, lambda output, _: output.mean(), optimizer, metrics=[], device="cpu", seed=0)
    points = [begin]

    def note(_: Trainer) -> None:
        points.append([p.item() for p in model.point])

    row = np.zeros((1, 1))
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # a function without a least value leads LBFGS far out
            trainer.fit(row, row, epochs=steps, batch_size=1, shuffle=False, callbacks=[note], progress=False)
    except TrainingDiverged:
        remedy = "try a smaller learning rate, or fewer steps"
        warn(
            f"{where}: step {len(points)} of {trainer.optimizer} leads to where the function or a coordinate is NaN or "
            f"infinite; the path ends before it; {remedy}", RuntimeWarning,
        )  # fmt: skip
    return np.array(points)


def _point(start: Any, where: str) -> list[float]:
    values = np.asarray(start).tolist() if isinstance(start, np.ndarray) else start
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TypeError(f"{where}: start is {start!r}; expected a number for each argument of the function, as (1, 2)")
    return [number(where, f"start[{i}]", value) for i, value in enumerate(values)]


def racers(lr: Rate = 0.01, adaptive: Rate | None = None) -> dict[str, Optimizer]:
    """Seven optimizers by name, at one learning rate, or Adagrad, RMSprop and Adam at the `adaptive` one, which is
    about the length of their steps. Adadelta has none (ours is a factor, which stays 1), and the mean of RMSprop goes
    back ten steps, as in Hinton's lecture."""
    adaptive = lr if adaptive is None else adaptive
    return {
        "SGD": SGD(lr),
        "momentum": SGD(lr, momentum=0.9),
        "Nesterov": SGD(lr, momentum=0.9, nesterov="lookahead"),
        "Adagrad": Adagrad(adaptive),
        "Adadelta": Adadelta(),
        "RMSprop": RMSprop(adaptive, rho=0.9),
        "Adam": Adam(adaptive),
    }


def race(
    function: Function, start: Sequence[float] | Floats, optimizers: Mapping[str, Optimizer | str] | None = None,
    steps: int = 100,
) -> dict[str, Floats]:  # fmt: skip
    """The path of `descend` for each optimizer, by its name; None: those of `racers()`."""
    given = racers() if optimizers is None else optimizers
    if not isinstance(given, Mapping) or not given:
        raise TypeError(f"race: optimizers is {given!r}; expected them by name, such as {{'Adam': gb.Adam(0.01)}}")
    return {name: descend(function, start, optimizer, steps) for name, optimizer in given.items()}


def steps_until(path: Floats, condition: Callable[[Floats], Any]) -> int | None:
    """The number of steps to the first point of a path that meets the condition; None if none does."""
    return next((k for k, point in enumerate(path) if condition(point)), None)


# ---- surfaces ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)  # arrays have no one equality
class Surface(Shown):
    """A function's values over a grid: first (n,) and second (m,), values (m, n), and what the axes are called."""

    first: Floats
    second: Floats
    values: Floats
    names: tuple[str, str] = ("x", "y")

    @property
    def lowest(self) -> tuple[float, float, float]:
        """(first, second, value) where the least finite value is."""
        least = np.where(np.isfinite(self.values), self.values, np.inf).argmin()
        row, column = np.unravel_index(least, self.values.shape)
        return float(self.first[column]), float(self.second[row]), float(self.values[row, column])

    def parts(self) -> list[str]:
        axes = zip(self.names, (self.first, self.second), strict=True)
        named = " and ".join(f"{name} from {a[0]:g} to {a[-1]:g} in {len(a)} points" for name, a in axes)
        first, second, value = self.lowest
        return [f"surface over {named}; least {value:.6g} at ({first:g}, {second:g})"]


def surface(
    function: Function, first: tuple[float, float], second: tuple[float, float], *, step: float | None = None,
    points: int = 101,
) -> Surface:  # fmt: skip
    """The function's values over a grid from the low to the high of each pair, both included.

    Along each axis lie `points` points, or as many as are a `step` apart. The function is called once, with two float64
    tensors of the grid's shape (second, first), and must return one of that shape.

    >>> surface(saddle, (-1, 1), (-1, 1), step=0.5).lowest
    (0.0, -1.0, -1.0)
    """
    across, up = _axis("first", first, step, points), _axis("second", second, step, points)
    values = values_at(function, *np.meshgrid(across, up), where="surface")
    if not np.isfinite(values).any():
        raise ValueError("surface: no value is finite, expected some that are; choose other bounds")
    return Surface(across, up, values, _names(function))


def values_at(function: Function, *arrays: Floats, where: str) -> Floats:
    """The function's value at every element of arrays of one shape, by one call with tensors of that shape."""
    value, shape = function(*(tensor(np.ascontiguousarray(a)) for a in arrays)), arrays[0].shape
    if not isinstance(value, Tensor) or value.shape != shape:
        got = f"a tensor of shape {value.shape}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{where}: the function returned {got}, expected a tensor of shape {shape}; it is called once "
                        "with all points, so write it in elementwise operations")  # fmt: skip
    return value.numpy().astype(np.float64)


def _axis(name: str, bounds: Any, step: float | None, points: int) -> Floats:
    """From low to high; (low (n − k) + high k) / n rounds once, so that both ends and whole steps are met."""
    where = f"surface: {name}"
    if not isinstance(bounds, Sequence | np.ndarray) or len(bounds) != 2:
        raise TypeError(f"{where} is {bounds!r}; expected a pair of numbers, low and high, as (-1, 1)")
    low, high = interval(where, *bounds)
    if step is None:
        n = whole("surface", "points", points, 2) - 1
    else:
        parts = (high - low) / number("surface", "step", step, "> 0")
        n = round(parts)
        if n < 1 or abs(parts - n) > 1e-6:
            remedy = f"try step={(high - low) / max(n, 1):g}, or points"
            raise ValueError(f"{where}: from {low:g} to {high:g} are {parts:g} steps of {step:g}, expected a whole "
                             f"number; {remedy}")  # fmt: skip
    k = np.arange(n + 1)
    axis: Floats = (low * (n - k) + high * k) / n
    return axis


def _names(function: Function) -> tuple[str, str]:
    """What the function calls its two arguments."""
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some functions written in C
        names = ()
    return (names[0], names[1]) if len(names) == 2 else ("x", "y")


# ---- a network's loss over a plane of its weights ------------------------------------------------------------------


class Plane:
    """The loss of a trainer's model at w + a·u + b·v, w its weights: a function for `surface`, without a gradient.

    u and v are arrays by parameter; `path` holds the coordinates (a, b) of the snapshots, `share` the part of their
    variance that lies in the plane: both None where u and v were drawn.
    """

    def __init__(self, trainer: Trainer, x: Any, y: Any) -> None:
        self._trainer = copied(trainer, "plane")
        self._data = self._trainer._data(x, y, "plane", exact=True)
        named = self._trainer.model.named_parameters().items()
        self._parameters = {k: p for k, p in named if p.stepped}
        self.origin = {k: p.numpy().astype(np.float64) for k, p in self._parameters.items()}
        self.u: dict[str, Floats] = {}
        self.v: dict[str, Floats] = {}
        self.path: Floats | None = None
        self.share: float | None = None

    def __call__(self, a: Any, b: Any) -> Tensor:
        if recording() is not None:
            remedy = "train the trainer, and give plane its states as path"
            raise RuntimeError(f"plane: the loss over a plane is measured, not differentiated; to descend it {remedy}")
        grids = np.broadcast_arrays(*(np.asarray(c, np.float64) for c in (a, b)))
        losses = [self._loss(*point) for point in zip(*(grid.ravel().tolist() for grid in grids), strict=True)]
        return tensor(np.reshape(losses, grids[0].shape))

    def _loss(self, a: float, b: float) -> float:
        for k, p in self._parameters.items():
            p.backend.write(p.buffer, self.origin[k] + a * self.u[k] + b * self.v[k])
        return self._trainer._figures(*self._data)["loss"]


def plane(trainer: Trainer, x: Any, y: Any, path: Sequence[State] | None = None, seed: int = 0) -> Plane:
    """The loss over the rows, as `evaluate` takes it, at w + a·u + b·v: a function of a and b for `surface`.

    u and v are drawn by the seed, and each unit's weights in them (a vector as a whole) are as long as the model's
    (Li et al., "Visualizing the Loss Landscape of Neural Nets"), so that a = 1 moves by as much as there is. Given
    the `state_dict`s of a training run as `path`, u and v are of length 1 and the two directions in which these vary
    most; the plane's `path` says where they lie. Only trained weights move, on a copy of the trainer.
    """
    found = Plane(trainer, x, y)
    if path is None:
        for axis, name in ((found.u, "u"), (found.v, "v")):
            axis.update({k: _as_long(_drawn(w.shape, seed, f"{k}.{name}"), w) for k, w in found.origin.items()})
        return found
    away = np.array([_away(state, found.origin, f"plane: path[{i}]") for i, state in enumerate(path)])
    u, v, found.share = _principal(away)
    found.path = away @ np.stack((u, v), 1)
    ends = np.cumsum([w.size for w in found.origin.values()])[:-1]
    for axis, vector in ((found.u, u), (found.v, v)):
        parts = zip(found.origin.items(), np.split(vector, ends), strict=True)
        axis.update({k: part.reshape(w.shape) for (k, w), part in parts})
    return found


def _away(state: Any, origin: Mapping[str, Floats], where: str) -> Floats:
    """The state's weights less those of the origin, all in one vector."""
    if not isinstance(state, Mapping) or any(np.shape(state.get(k, "")) != w.shape for k, w in origin.items()):
        raise ValueError(f"{where} is not a state of this model; expected what model.state_dict() returns")
    return np.concatenate([np.ravel(state[k] - w) for k, w in origin.items()])


def _principal(rows: Floats) -> tuple[Floats, Floats, float]:
    """The two directions in which the rows vary most, of length 1, and their share of the variance."""
    if len(rows):
        _, lengths, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    if len(rows) < 3 or lengths[1] <= 1e-9 * lengths[0]:
        raise ValueError(f"plane: the {len(rows)} states of path lie on a line, which spans no plane; expected three "
                         "or more that differ, such as one an epoch")  # fmt: skip
    return axes[0], axes[1], float((lengths[:2] ** 2).sum() / (lengths**2).sum())


def _drawn(shape: tuple[int, ...], seed: int, name: str) -> Floats:
    return draw(lambda shape, generator: generator.standard_normal(shape), shape, seed, name)


def _as_long(d: Floats, w: Floats) -> Floats:
    """d with the norm of w: column by column of a matrix (inputs, units)."""
    axis = 0 if w.ndim == 2 else None
    scaled: Floats = d * (np.linalg.norm(w, axis=axis, keepdims=True) / np.linalg.norm(d, axis=axis, keepdims=True))
    return scaled
