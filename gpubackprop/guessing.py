"""Weights found by guessing: at random, or all points of a grid; what backprop is to be compared with."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.checks import interval, whole
from gpubackprop.claims import exclusive
from gpubackprop.columns import Shown
from gpubackprop.data import as_seed
from gpubackprop.diagnostics import check_trainer
from gpubackprop.model import Layer, check_model
from gpubackprop.trainer import Trainer

__all__ = ["Guesses", "grid_points", "grid_search", "random_search"]

Floats = npt.NDArray[np.float64]
MOST_POINTS = 1_000_000


@dataclass(eq=False, repr=False)
class Guesses(Shown):
    """The loss of each guess, in order, and that of the weights there were before."""

    losses: Floats
    before: float

    @property
    def evaluations(self) -> int:
        """How often the loss was evaluated."""
        return len(self.losses)

    @property
    def best(self) -> float:
        """The least loss of the guesses."""
        return float(np.fmin.reduce(self.losses))  # a NaN is no guess that is kept

    @property
    def found(self) -> bool:
        """Whether a guess is better than the weights before, which the model otherwise keeps."""
        return _better(self.best, self.before)

    def parts(self) -> list[str]:
        middle = float(np.median(self.losses))
        kept = "" if self.found else f"; the weights before are kept, with loss {self.before:.6g}"
        return [f"{self.evaluations:,} guesses: the least loss is {self.best:.6g}, the median {middle:.6g}{kept}"]


@exclusive
def random_search(
    trainer: Trainer, x: Any, y: Any, guesses: int = 100, low: float = -1.0, high: float = 1.0, seed: int | None = 0
) -> Guesses:
    """Guess the model's weights: draw all trained ones uniformly from [low, high), `guesses` times, and keep the best.

    The weights there are count as a guess too, so that the loss over x and y is never larger afterwards; if evaluation
    fails, they stay.
    """
    where = "random_search"
    check_trainer(trainer, where)
    low, high = interval(where, low, high)
    generator = np.random.default_rng(as_seed(seed, where))
    size = _weights(trainer.model)
    return _best_of(
        trainer, x, y, (generator.uniform(low, high, size) for _ in range(whole(where, "guesses", guesses)))
    )


def grid_points(model: Layer, segments: int = 10) -> int:
    """segments^N, the points of a grid over the N trained weights: how many guesses a search among them takes."""
    check_model(model, "grid_points")
    points: int = whole("grid_points", "segments", segments) ** _weights(model)
    return points


@exclusive
def grid_search(trainer: Trainer, x: Any, y: Any, segments: int = 10, low: float = -1.0, high: float = 1.0) -> Guesses:
    """Guess the model's weights: try every point of a grid, the middles of `segments` segments of [low, high] for each
    trained weight, and keep the best, or the weights there are if no point is better. ValueError for more than a
    million points."""
    where = "grid_search"
    check_trainer(trainer, where)
    low, high = interval(where, low, high)
    points = grid_points(trainer.model, segments)
    if points > MOST_POINTS:
        n = _weights(trainer.model)
        count = f"{segments}^{n:,} guesses, a number of {1 + math.floor(n * math.log10(segments)):,} digits"
        raise ValueError(f"{where}: {count}, are more than {MOST_POINTS:,}; use random_search, or better a gradient")
    middles = low + (high - low) * (np.arange(segments) + 0.5) / segments
    return _best_of(trainer, x, y, map(np.array, itertools.product(middles, repeat=_weights(trainer.model))))


def _weights(model: Layer) -> int:
    """How many weights are trained, without those that are frozen."""
    return sum(math.prod(p.shape) for p in model.named_parameters().values() if p.stepped)


def _best_of(trainer: Trainer, x: Any, y: Any, guesses: Iterable[Floats]) -> Guesses:
    """Evaluate each vector of weights, laid out as the parameters are named, and keep the best."""
    model, losses = trainer.model, list[float]()
    trained = {key: p.shape for key, p in model.named_parameters().items() if p.stepped}
    ends = np.cumsum([math.prod(shape) for shape in trained.values()])
    least = before = trainer.evaluate(x, y)["loss"]
    best = state = model.state_dict()
    try:
        for guess in guesses:
            parts = np.split(guess, ends[:-1])
            values = {key: part.reshape(shape) for (key, shape), part in zip(trained.items(), parts, strict=True)}
            model.load_state_dict(state | values)
            losses.append(trainer.evaluate(x, y)["loss"])
            if _better(losses[-1], least):
                best, least = state | values, losses[-1]
    finally:
        model.load_state_dict(best)
    return Guesses(np.array(losses), before)


def _better(loss: float, than: float) -> bool:
    """Whether the loss is less; a NaN is more than any number."""
    return loss < than or (math.isnan(than) and not math.isnan(loss))
