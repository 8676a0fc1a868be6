"""Inference: a forward-only plan per model, replayed over padded batches."""

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpubackprop.data import as_features
from gpubackprop.plan import Plan
from gpubackprop.tensor import Tensor

if TYPE_CHECKING:
    from gpubackprop.arena import Arena
    from gpubackprop.model import Layer

__all__ = ["Predictor"]

CHUNK_ROWS = 1024


class Predictor:
    """model.predict: the last batch is padded with the rows before it, so one plan serves any number of rows."""

    def __init__(self, model: "Layer") -> None:
        self.model = model
        self.key: tuple[Any, ...] | None = None
        self.lock = threading.Lock()  # the plan's buffers serve one call at a time

    def __call__(self, x: Any) -> npt.NDArray[Any]:
        """The output for every row of x."""
        homes = self.model.homes()
        rows = as_features(x, homes[0].dtype if homes else self.model.dtype, self.model.inputs, "predict")
        with self.lock:
            return self._predict(rows, homes)

    def _predict(self, rows: npt.NDArray[Any], homes: tuple["Arena", ...]) -> npt.NDArray[Any]:
        n = min(len(rows), CHUNK_ROWS)
        if self.key != (homes, n, rows.shape[1]):
            self._record(rows[:n])
            self.key = homes, n, rows.shape[1]
        out = np.empty((len(rows), *self.output.shape[1:]), self.output.dtype)
        for start in range(0, len(rows), n):
            part = rows[start : start + n]
            self.x[: len(part)] = self.backend.asarray(part)
            self.plan.replay("predict")
            out[start : start + len(part)] = self.backend.to_numpy(self.output[: len(part)])
        return out

    def _record(self, rows: npt.NDArray[Any]) -> None:
        self.backend = self.model.backend
        self.plan = Plan(self.backend, f"predict, {len(rows)} rows")
        self.x = self.backend.empty(rows.shape, rows.dtype)
        self.x[...] = self.backend.asarray(rows)
        with self.plan.record("predict"):
            output = self.model(Tensor(self.x, self.backend))
        self.output = output.data
        if output.ndim != 2 or len(self.output) != len(rows):
            raise ValueError(
                f"predict: the model returns shape {output.shape} for {len(rows)} rows; expected (rows, outputs)"
            )
