"""Differentiable changes of shape: reshape aliases its buffer, all others write a new one."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Buffer
from gpubackprop.backprop import Gradients
from gpubackprop.operands import axes_of, new, operands, result, sum_to
from gpubackprop.plan import empty, run
from gpubackprop.tensor import Tensor

__all__ = ["broadcast_to", "cast", "concatenate", "gather", "index", "reshape", "stack", "transpose"]


def reshape(x: Any, shape: Sequence[int] | int) -> Tensor:
    """The same elements, in C order, in another shape; one length may be -1."""
    (x,) = operands("reshape", x)
    try:
        y = x.buffer.reshape(shape)
    except ValueError:
        raise ValueError(f"reshape: {x.size} elements of shape {x.shape} do not fit {shape}") from None
    return x if y.shape == x.shape else result(y, (x,), lambda dy, grads: grads.hand_on(x, dy))


def transpose(x: Any, *axes: Any) -> Tensor:
    """The axes in the given order, or reversed; a copy."""
    (x,) = operands("transpose", x)
    order = (
        tuple(axes[0]) if len(axes) == 1 and not isinstance(axes[0], int) else axes or tuple(reversed(range(x.ndim)))
    )
    if sorted(a % max(x.ndim, 1) for a in order) != list(range(x.ndim)):
        raise ValueError(f"transpose: axes {order} are not an order of the {x.ndim} axes of shape {x.shape}")
    order = tuple(a % x.ndim for a in order)
    view = x.buffer.transpose(order)
    y = new(x, view.shape)
    run(y, lambda: x.backend.copy(view, y))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        back = dy.transpose(tuple(np.argsort(order)))
        grads.write(x, lambda dx, accumulate: x.backend.copy(back, dx, accumulate=accumulate))

    return result(y, (x,), backprop)


def cast(x: Any, dtype: npt.DTypeLike) -> Tensor:
    """The same elements in another floating type."""
    (x,) = operands("cast", x)
    if x.dtype == dtype:
        return x  # type: ignore[no-any-return]
    y = empty(x.backend, x.shape, dtype)
    run(y, lambda: x.backend.copy(x.buffer, y))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        grads.write(x, lambda dx, accumulate: x.backend.copy(dy, dx, accumulate=accumulate))

    return result(y, (x,), backprop)


def broadcast_to(x: Any, shape: Sequence[int]) -> Tensor:
    """x repeated along new and length-1 axes."""
    (x,) = operands("broadcast_to", x)
    shape = tuple(shape)
    if x.shape == shape:
        return reshape(x, shape)
    if len(shape) < x.ndim or any(n not in (1, m) for n, m in zip(reversed(x.shape), reversed(shape), strict=False)):
        raise ValueError(f"broadcast_to: shape {x.shape} does not broadcast to {shape}")
    y = new(x, shape)
    run(y, lambda: x.backend.copy(x.buffer, y))
    return result(y, (x,), lambda dy, grads: sum_to(grads, x, dy) if x.requires_grad else None)


def concatenate(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """The tensors one after another along an axis they have."""
    parts = operands("concatenate", *tensors)
    first = parts[0]
    (axis,) = axes_of("concatenate", first, axis)
    for t in parts:
        if t.ndim != first.ndim or any(i != axis and n != first.shape[i] for i, n in enumerate(t.shape)):
            raise ValueError(f"concatenate: shapes {[t.shape for t in parts]} differ beside axis {axis}")
    ends = np.cumsum([t.shape[axis] for t in parts])
    y = new(first, (*first.shape[:axis], int(ends[-1]), *first.shape[axis + 1 :]))
    lead = (slice(None),) * axis
    keys = [(*lead, slice(int(e) - t.shape[axis], int(e))) for t, e in zip(parts, ends, strict=True)]
    for t, key in zip(parts, keys, strict=True):
        run(t.buffer, lambda t=t, key=key: first.backend.copy(t.buffer, y[key]))  # type: ignore[misc]

    def backprop(dy: Buffer, grads: Gradients) -> None:
        for t, key in zip(parts, keys, strict=True):
            grads.write(t, lambda dx, accumulate, key=key: first.backend.copy(dy[key], dx, accumulate=accumulate))  # type: ignore[misc]

    return result(y, tuple(parts), backprop)


def stack(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """Tensors of one shape along a new axis."""
    parts = operands("stack", *tensors)
    if len({t.shape for t in parts}) > 1:
        raise ValueError(f"stack: shapes {[t.shape for t in parts]} differ; use concatenate")
    ndim = parts[0].ndim + 1
    if not -ndim <= axis < ndim:
        raise ValueError(f"stack: axis {axis} does not exist in the {ndim} axes of the result")
    at = axis % ndim
    return concatenate([reshape(t, (*t.shape[:at], 1, *t.shape[at:])) for t in parts], at)


def index(x: Any, key: Any) -> Tensor:
    """x[key] as NumPy: slices and integers copy a part, integer and boolean arrays gather elements (repeats add up)."""
    (x,) = operands("index", x)
    parts = key if isinstance(key, tuple) else (key,)
    basic = int | slice | type(None) | type(Ellipsis) | np.integer
    if all(isinstance(k, basic) and not isinstance(k, bool) for k in parts):
        if not any(k is Ellipsis for k in parts):
            parts = (*parts, Ellipsis)  # so that integers alone give a view, not a scalar
        try:
            view = x.buffer[parts]
        except IndexError as error:
            raise IndexError(f"index: {error} (shape {x.shape})") from None
        y = new(x, view.shape)
        run(y, lambda: x.backend.copy(view, y))

        def backprop(dy: Buffer, grads: Gradients) -> None:
            grads.add(x, lambda dx: x.backend.copy(dy, dx[parts], accumulate=True))

        return result(y, (x,), backprop)
    try:
        flat = np.arange(x.size).reshape(x.shape)[key]
    except IndexError as error:
        raise IndexError(f"index: {error} (shape {x.shape})") from None
    return reshape(gather(reshape(x, (x.size,)), flat.reshape(-1)), flat.shape)


def gather(x: Any, indices: Any, axis: int = 0) -> Tensor:
    """The slices of x along the axis at the indices (a 1-D array of integers); repeats add up in the gradient."""
    (x,) = operands("gather", x)
    (axis,) = axes_of("gather", x, axis)
    where_ = np.asarray(indices)
    length = x.shape[axis]
    if where_.ndim != 1 or (where_.dtype.kind not in "iu" and where_.size):
        raise TypeError(f"gather: 1-D integers expected, got {where_.dtype} of shape {where_.shape}")
    if where_.size and not (-length <= where_.min() and where_.max() < length):
        raise IndexError(f"gather: index {where_.min()}…{where_.max()} outside axis {axis} of shape {x.shape}")
    device_index = x.backend.asarray(where_ % max(length, 1), np.intp)
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    y = new(x, (*x.shape[:axis], where_.size, *x.shape[axis + 1 :]))
    source, target = x.buffer.reshape(outer, length, inner), y.reshape(outer, where_.size, inner)
    run(y, lambda: x.backend.gather(source, device_index, target))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        part = dy.reshape(target.shape)
        grads.add(x, lambda dx: x.backend.scatter_add(part, device_index, dx.reshape(source.shape)))

    return result(y, (x,), backprop)
