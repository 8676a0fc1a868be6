"""What every operation does first and last: operands of one kind, axes, the result with its closure."""

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Buffer, Graph, arithmetic, setting
from gpubackprop.backprop import Backprop, Gradients
from gpubackprop.checks import refuse_masked
from gpubackprop.formulas import parse
from gpubackprop.plan import empty, run
from gpubackprop.tensor import FLOATS, Axis, Tensor

__all__ = [
    "axes_of", "broadcast_shape", "constant", "graph", "integers", "new", "operands", "recast", "result", "row_by_row",
    "share", "sum_to",
]  # fmt: skip

_batch: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("batch", default=None)


def row_by_row(output: Tensor, target: Tensor) -> AbstractContextManager[None]:
    """Inside, one value per row as (n,) is not broadcast with the same as (n, 1): a loss of these means row by row."""
    return setting(_batch, (output, target) if len(output) > 1 else None)


def constant(value: Any, like: Tensor) -> Tensor:
    """The value as a tensor beside `like`: Python numbers, integers and masks take its dtype, floats must have it."""
    if isinstance(value, Tensor):
        return recast(value, like.dtype) if _adapts(value) and value.dtype != like.dtype else value
    refuse_masked("tensor", "array", value)
    array = np.array(value)  # a copy: the caller may write over it before backward reads it
    adapts = isinstance(value, int | float) or array.dtype.kind in "iub"
    if not adapts and array.dtype not in FLOATS:
        raise TypeError(
            f"tensor expected, got {type(value).__name__} of dtype {array.dtype}; convert it to float first"
        )
    return Tensor(like.backend.asarray(array, like.dtype if adapts else None), like.backend)


def _adapts(x: Tensor) -> bool:
    """Whether a tensor takes the type of the floats beside it."""
    return x.boolean or x.dtype.kind in "iu"


def integers(*values: Any) -> bool:
    """Whether the values, of which one at least is a tensor, are all integers."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    others = [v for v in values if not isinstance(v, Tensor)]
    return (
        len(tensors) > 0
        and all(t.dtype.kind in "iu" for t in tensors)
        and all(np.asarray(v).dtype.kind in "iub" for v in others)
    )


def recast(x: Tensor, dtype: npt.DTypeLike) -> Tensor:
    """The same elements in another type, as a constant."""
    y = empty(x.backend, x.shape, dtype)
    run(y, lambda: x.backend.copy(x.buffer, y))
    same = Tensor(y, x.backend)
    same.boolean = x.boolean
    return same


def share(value: float, like: Tensor) -> Buffer:
    """A factor of one element in the type that values of the tensor are computed in."""
    return like.backend.asarray(np.array(value, arithmetic(like.dtype)))


def operands(name: str, *values: Any, integers: bool = False) -> list[Tensor]:
    """The values as tensors of one device and one floating type; with integers=True, tensors of integers stay such."""
    given = [v for v in values if isinstance(v, Tensor)]
    if not given:
        raise TypeError(f"{name}: at least one operand must be a tensor; make one with gb.tensor(…)")
    like = next((t for t in given if not _adapts(t)), given[0])
    if like.dtype.kind in "iu" and not (integers and all(isinstance(v, Tensor) for v in values)):
        like = recast(like, np.float64)
    tensors = [constant(v, like) for v in values]
    if len({t.dtype for t in tensors}) > 1:
        kinds = " and ".join(dict.fromkeys(t.dtype.name for t in tensors))
        wanted = tensors[-1].dtype.name  # a layer's parameters come after its input
        raise TypeError(f"{name}: dtypes differ ({kinds}); convert one, as with .astype({wanted!r})")
    if len({t.device for t in tensors}) > 1:
        raise ValueError(f"{name}: tensors live on different devices ({', '.join(t.device for t in tensors)})")
    return tensors


def result(y: Buffer, inputs: tuple[Tensor, ...], backprop: Backprop) -> Tensor:
    """The tensor of an operation's output; it remembers the operation if an input requires a gradient."""
    backend = inputs[0].backend
    if any(x.requires_grad for x in inputs):
        return Tensor(y, backend, requires_grad=True, inputs=inputs, backprop=backprop)
    return Tensor(y, backend)


def new(like: Tensor, shape: Sequence[int]) -> Buffer:
    """An uninitialised buffer of the tensor's dtype, beside it."""
    return empty(like.backend, shape, like.dtype)


@cache
def graph(text: str) -> Graph:
    """The parsed text, once."""
    return parse(text)


def broadcast_shape(name: str, *tensors: Tensor) -> tuple[int, ...]:
    """The shape the tensors broadcast to."""
    if (batch := _batch.get()) is not None:
        _check_row_by_row(name, {t.shape for t in tensors}, *batch)
    try:
        return np.broadcast_shapes(*(t.shape for t in tensors))
    except ValueError:
        shapes = " and ".join(str(t.shape) for t in tensors)
        raise ValueError(f"{name}: shapes {shapes} do not broadcast") from None


def _check_row_by_row(name: str, shapes: set[tuple[int, ...]], output: Tensor, target: Tensor) -> None:
    flat, column = (n := len(output),), (len(output), 1)
    if {flat, column} <= shapes:
        has = "the output's shape" if target.shape == output.shape else "shape"
        raise ValueError(f"{name}: shapes {flat} and {column} would broadcast to {(n, n)}, every row with every other; "
                         f"in a loss the target has {has} {target.shape}: take output and target as they come, or one "
                         "column of each, as t[:, 0]; for all pairs, or values that are not of rows, give one the "
                         f"shape {(1, n)}")  # fmt: skip


def axes_of(name: str, x: Tensor, axis: Axis) -> tuple[int, ...]:
    """The axes meant, counted from 0, in order; None means all."""
    listed = range(x.ndim) if axis is None else axis if isinstance(axis, Sequence) else [axis]
    axes = tuple(operator.index(a) for a in listed)
    for a in axes:
        if not -x.ndim <= a < x.ndim:
            raise ValueError(f"{name}: axis {a} does not exist in shape {x.shape}")
    if len({a % x.ndim for a in axes}) < len(axes):
        raise ValueError(f"{name}: axes {axes} name one axis twice")
    return tuple(sorted(a % x.ndim for a in axes))


def sum_to(grads: Gradients, x: Tensor, full: Buffer) -> None:
    """x's gradient is `full` summed over the axes along which x was broadcast to its shape."""
    lead = full.ndim - x.ndim
    axes = tuple(i for i, n in enumerate(full.shape) if i < lead or (x.shape[i - lead] == 1 and n != 1))
    kept = tuple(n for i, n in enumerate(full.shape) if i not in axes)
    grads.write(x, lambda dx, accumulate: x.backend.reduce("sum", full, axes, dx.reshape(kept), accumulate=accumulate))
