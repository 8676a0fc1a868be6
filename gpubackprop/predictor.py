"""Inference: forward-only plans, replayed over padded batches."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from gpubackprop.backends.base import Backend, Buffer, is_on_device
from gpubackprop.data import as_features, by_name, surely_finite
from gpubackprop.device_data import on_device
from gpubackprop.plan import Plan
from gpubackprop.tensor import Tensor

if TYPE_CHECKING:
    from gpubackprop.model import Layer

__all__ = ["Predictor", "as_output", "of_the_library", "own_code", "settings"]

CHUNK_ROWS = 1024


@dataclass(frozen=True)
class _Forward:
    """A recorded forward: fill x, replay, read output."""

    plan: Plan
    x: Buffer
    output: Buffer


class Predictor:
    """model.predict: batches are padded to CHUNK_ROWS rows, small ones to a power of two, so that few plans serve all.

    A row's result does not depend on the values in the rows beside it, so the padding may hold anything; at least two
    rows are computed, because the product of one row is another routine, with other last bits. A plan's buffers serve
    one call at a time: the caller has the model to itself (`claims.using`).
    """

    def __init__(self) -> None:
        self._recorded: list[Any] = []
        self._forwards: dict[tuple[int, int], _Forward] = {}

    def __call__(self, model: "Layer", x: Any, checked: bool = False) -> Buffer:
        """The model's output for every row of x, as a buffer of the model's device; checked=True: x is what it takes,
        and finite."""
        homes = model.homes()
        dtype = homes[0].dtype if homes else model.dtype
        x = by_name(x, model.feature_names, "predict")
        door = partial(as_features, x, dtype, model.inputs, "predict")
        host = not (checked or is_on_device(x))
        if checked:
            rows = x
        elif host:  # looked at part by part, while each is in the cache
            rows = door(finite=False)
        else:
            rows = on_device(x, model.backend, dtype, model.inputs, "predict", "x")
        layers = [met.layer for met in model._met("", {})]
        recorded = [*homes, *(part for layer in layers for part in settings(layer))]
        # other arenas, other layers, a layer with another setting, or with code of a user's, which may read anything
        if recorded != self._recorded or any(map(own_code, layers)):
            self._recorded, self._forwards = recorded, {}
        return self._predict(model, rows, homes[0].backend if homes else model.backend, door if host else None)

    def _predict(self, model: "Layer", rows: Buffer, backend: Backend, complain: Callable[[], object] | None) -> Buffer:
        n = min(max(2, 1 << (len(rows) - 1).bit_length()), CHUNK_ROWS)
        key = (n, rows.shape[1])
        if key not in self._forwards:
            self._forwards[key] = _record(model, *key, rows.dtype)
        forward = self._forwards[key]
        out = backend.empty((len(rows), *forward.output.shape[1:]), forward.output.dtype)
        for start in range(0, len(rows), n):
            part = rows[start : start + n]
            if complain is not None and not surely_finite(part):
                complain()
            backend.write(forward.x[: len(part)], part)
            forward.plan.replay("predict")
            backend.write(out[start : start + len(part)], forward.output[: len(part)])
        return out


def own_code(layer: "Layer") -> bool:
    """Whether calling the layer runs Python code that is not the library's."""
    return "forward" in vars(layer) or not of_the_library(type(layer))


def of_the_library(thing: Any) -> bool:
    """Whether a class or function is one of the library's."""
    return str(getattr(thing, "__module__", None)).startswith("gpubackprop.")


def settings(layer: "Layer") -> Iterator[Any]:
    """The layer (weakly: it holds its predictor), and its attributes that are numbers or text."""
    yield weakref.ref(layer)
    for name, value in vars(layer).copy().items():
        if isinstance(value, int | float | str) and not name.startswith("_"):
            yield value


def _record(model: "Layer", rows: int, columns: int, dtype: npt.DTypeLike) -> _Forward:
    backend = model.backend
    plan, x = Plan(backend, f"predict, {rows} rows"), backend.empty((rows, columns), dtype)
    backend.write(x, 0)
    with plan.record("predict"):
        output = model(Tensor(x, backend))
    y = as_output(output, x.shape, "predict")
    return _Forward(plan, x, y.buffer)


def as_output(output: Any, shape: tuple[int, ...], where: str) -> Tensor:
    """What a model returned for x of this shape: one tensor of as many rows."""
    if not isinstance(output, Tensor):
        got = (
            f"a {type(output).__name__} of {len(output)}" if isinstance(output, tuple | list) else type(output).__name__
        )
        remedy = "return one, or put several side by side with gb.concatenate(…, axis=1)"
        raise TypeError(f"{where}: the model returns {got}; expected one tensor (rows, outputs): {remedy}")
    if output.ndim != 2 or output.shape[0] != shape[0]:
        raise ValueError(f"{where}: the model returns shape {output.shape} for {shape}; expected (rows, outputs)")
    return output
