"""Evaluation: loss and metrics of outputs already computed, in float64 on the host, a part of the rows at a time."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import Backend, get_backend
from gpubackprop.losses import Objective
from gpubackprop.predictor import CHUNK_ROWS
from gpubackprop.step import Sums
from gpubackprop.tensor import Tensor

__all__ = ["add_up", "host_of", "rows_at_a_time"]

Array = npt.NDArray[Any]
PREDICTED, MEASURED = 2**20, 2**18  # elements of the outputs at a time; the latter, in float64, stay in the cache


def host_of(backend: Backend) -> Backend:
    """The backend that forms figures: this one, or for a CUDA device, whose kernels have no float64, the CPU's."""
    return backend if backend.device.startswith("cpu") else get_backend("cpu")


def rows_at_a_time(outputs: int) -> int:
    """Rows of so many outputs to predict at a time."""
    return max(1, PREDICTED // outputs // CHUNK_ROWS) * CHUNK_ROWS


def add_up(objective: Objective, sums: Sums, parts: Iterable[Array], y: Array, w: Array | None) -> None:
    """Add metrics of the outputs to the sums, and the loss if it is known by name; each of `parts` holds the rows that
    follow those of the one before."""
    if objective.own and not sums.metrics:
        return
    back, row = sums.backend, 0
    table = back.step_table((), np.float64, 1)
    for outputs in parts:
        height = max(1, MEASURED // outputs.shape[1])
        for start in range(0, len(outputs), height):
            values = outputs[start : start + height]
            rows = slice(row, row := row + len(values))
            output, target = Tensor(_wide(values), back), Tensor(_target(objective, y[rows]), back)
            if not objective.own:
                weights = None if w is None else Tensor(_wide(w[rows]), back)
                objective.tallied(output, target, table, sums.tally, sums.counts, weights)
            elif sums.counts:
                back.top1(output.buffer, target.buffer, sums.tally).run()
            sums.add(output, target)


def _target(objective: Objective, y: Array) -> Array:
    return np.ascontiguousarray(y) if y.ndim == 1 else objective.softened(_wide(y))


def _wide(a: Array) -> Array:
    return np.ascontiguousarray(a, np.float64)
