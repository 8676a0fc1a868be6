"""Differentiable changes of shape and choices of elements: reshape aliases its buffer, all others write a new one."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Buffer, arithmetic
from gpubackprop.backprop import Backprop, Gradients
from gpubackprop.operands import axes_of, graph, new, operands, recast, result, share, sum_to
from gpubackprop.plan import empty, recording, run
from gpubackprop.tensor import Tensor

__all__ = ["broadcast_to", "cast", "concatenate", "gather", "index", "reshape", "stack", "transpose"]


def reshape(x: Any, shape: Sequence[int] | int) -> Tensor:
    """The same elements, in C order, in another shape; one length may be -1."""
    (x,) = operands("reshape", x, integers=True)
    try:
        y = x.buffer.reshape(shape)
    except ValueError:
        raise ValueError(f"reshape: {x.size} elements of shape {x.shape} do not fit {shape}") from None
    return x if y.shape == x.shape else _moved(y, x, lambda dy, grads: grads.hand_on(x, dy))


def transpose(x: Any, *axes: Any) -> Tensor:
    """The axes in the given order, or reversed; a copy."""
    (x,) = operands("transpose", x, integers=True)
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

    return _moved(y, x, backprop)


def cast(x: Any, dtype: npt.DTypeLike) -> Tensor:
    """The same elements in another type: differentiable between floats, a constant where integers are."""
    (x,) = operands("cast", x, integers=True)
    if x.dtype == dtype:
        return x  # type: ignore[no-any-return]
    if (kind := np.dtype(dtype).kind) in "iu" or x.dtype.kind in "iu":
        return recast(x, np.int64 if kind in "iu" else dtype)
    y = empty(x.backend, x.shape, dtype)
    run(y, lambda: x.backend.copy(x.buffer, y))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        grads.write(x, lambda dx, accumulate: x.backend.copy(dy, dx, accumulate=accumulate))

    return _moved(y, x, backprop)


def broadcast_to(x: Any, shape: Sequence[int]) -> Tensor:
    """x repeated along new and length-1 axes."""
    (x,) = operands("broadcast_to", x, integers=True)
    shape = tuple(shape)
    if x.shape == shape:
        return reshape(x, shape)
    if len(shape) < x.ndim or any(n not in (1, m) for n, m in zip(reversed(x.shape), reversed(shape), strict=False)):
        raise ValueError(f"broadcast_to: shape {x.shape} does not broadcast to {shape}")
    y = new(x, shape)
    run(y, lambda: x.backend.copy(x.buffer, y))
    return _moved(y, x, lambda dy, grads: sum_to(grads, x, dy) if x.requires_grad else None)


def concatenate(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """The tensors one after another along an axis they have."""
    parts = operands("concatenate", *tensors, integers=True)
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
    parts = operands("stack", *tensors, integers=True)
    if len({t.shape for t in parts}) > 1:
        raise ValueError(f"stack: shapes {[t.shape for t in parts]} differ; use concatenate")
    ndim = parts[0].ndim + 1
    if not -ndim <= axis < ndim:
        raise ValueError(f"stack: axis {axis} does not exist in the {ndim} axes of the result")
    at = axis % ndim
    return concatenate([reshape(t, (*t.shape[:at], 1, *t.shape[at:])) for t in parts], at)


def index(x: Any, key: Any) -> Tensor:
    """x[key] as NumPy: slices and integers copy a part, integer and boolean arrays gather elements (repeats add up).

    Tensors serve as arrays do: comparisons as masks, integers as places. While a plan records, masks are refused, and
    integers are read anew at each replay; one that is out of range then gives NaN.
    """
    (x,) = operands("index", x, integers=True)
    parts = key if isinstance(key, tuple) else (key,)
    if any(isinstance(k, Tensor) for k in parts):
        if recording() is not None:
            return _recorded_index(x, [_integers(k) if isinstance(k, Tensor) else k for k in parts])
        parts = key = tuple(_values(k) if isinstance(k, Tensor) else k for k in parts)
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

        return _moved(y, x, backprop)
    try:
        flat = np.arange(x.size).reshape(x.shape)[key]
    except IndexError as error:
        raise IndexError(f"index: {error} (shape {x.shape})") from None
    return reshape(gather(reshape(x, (x.size,)), flat.reshape(-1)), flat.shape)


def gather(x: Any, indices: Any, axis: int = 0) -> Tensor:
    """The slices of x along the axis at the indices (a 1-D array of integers); repeats add up in the gradient.

    The indices may be a tensor; while a plan records, it is read anew at each replay, and one that is no integer or out
    of range gives NaN.
    """
    (x,) = operands("gather", x, integers=True)
    (axis,) = axes_of("gather", x, axis)
    length = x.shape[axis]
    if isinstance(indices, Tensor) and recording() is not None:
        if indices.ndim != 1:
            raise TypeError(f"gather: 1-D integers expected, got a tensor of shape {indices.shape}")
        places = [_Place(recast(indices, np.float64), length, 1)]
        return _gather(x, axis, *_computed(x, places, np.zeros(1), whole=indices.dtype.kind in "iu"))
    where_ = _whole(indices) if isinstance(indices, Tensor) else np.asarray(indices)
    if where_.ndim != 1 or (where_.dtype.kind not in "iu" and where_.size):
        raise TypeError(f"gather: 1-D integers expected, got {where_.dtype} of shape {where_.shape}")
    if where_.size and not (-length <= where_.min() and where_.max() < length):
        raise IndexError(f"gather: index {where_.min()}…{where_.max()} outside axis {axis} of shape {x.shape}")
    return _gather(x, axis, x.backend.asarray(where_ % max(length, 1), np.intp))


def _gather(x: Tensor, axis: int, places: Buffer, inside: Buffer | None = None) -> Tensor:
    """The slices of x at the places; NaN where `inside`, of places that launches compute, is 0."""
    if x.dtype.kind in "iu":
        return cast(_gather(recast(x, np.float64), axis, places, inside), x.dtype)
    back, length, count = x.backend, x.shape[axis], places.size
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    y = new(x, (*x.shape[:axis], count, *x.shape[axis + 1 :]))
    source, target = x.buffer.reshape(outer, length, inner), y.reshape(outer, count, inner)
    run(y, lambda: back.gather(source, places, target))
    if inside is not None:
        reads = {"y": target, "inside": inside.reshape(1, count, 1), "nan": share(math.nan, x)}
        what = "y = NaN where a place is out of range"
        run(
            y,
            lambda: back.elementwise("index", graph("y = where(inside != 0, y, nan)"), reads, {"y": target}, what=what),
        )

    def backprop(dy: Buffer, grads: Gradients) -> None:
        part = dy.reshape(target.shape)
        grads.add(x, lambda dx: back.scatter_add(part, places, dx.reshape(source.shape), live=inside is not None))

    return _moved(y, x, backprop)


def _moved(y: Buffer, x: Tensor, backprop: Backprop) -> Tensor:
    """The result of an operation that moves elements of x: of a mask, a mask."""
    moved = result(y, (x,), backprop)
    moved.boolean = x.boolean
    return moved


# ---- tensors as keys -----------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where along an axis, float64 numbers from −length on, and how far apart its elements are."""

    values: Tensor
    length: int
    stride: int


PLACE = """
at = where(v < 0, v + length, v)
inside = where(at < 0, 0, where(at < length, others, 0))
flat = start + stride * where(inside != 0, at, 0)
"""


def _values(key: Tensor) -> npt.NDArray[Any]:
    """A key's mask or integers as an array, read now."""
    return key.numpy() != 0 if key.boolean else _integers(key).numpy()


def _integers(key: Tensor) -> Tensor:
    """The key, which must hold integers."""
    if key.boolean:  # while a plan records
        raise RuntimeError(
            "index: a mask leaves as many elements as its values say, and a recorded step has fixed shapes; use "
            "gb.where(mask, x, 0)"
        )
    if key.dtype.kind not in "iu":
        raise TypeError(
            f"index: a tensor of {key.dtype} is no key; use .astype(int) for places, or a comparison (t > 0) for a mask"
        )
    return key


def _whole(indices: Tensor) -> npt.NDArray[Any]:
    """A tensor of whole numbers as an array of integers; others stay what they are."""
    values = indices.numpy()
    whole = values.dtype.kind == "f" and not indices.boolean and (np.rint(values) == values).all()
    return values.astype(np.intp) if whole and (np.abs(values) < 2.0**53).all() else values


def _recorded_index(x: Tensor, key: Sequence[Any]) -> Tensor:
    """x[key] with integers that launches read: a gather from the axes that the key names, all else in one piece."""
    parts = _spelled_out(x, key)
    while isinstance(parts[-1], slice) and parts[-1] == slice(None):
        parts.pop()
    widths = [_width(k) for k in parts]
    axes = sum(widths)
    shape, rest = x.shape[:axes], x.shape[axes:]
    still = [np.zeros(k.shape, np.intp) if isinstance(k, Tensor) else k for k in parts]
    try:
        flat = np.asarray(np.arange(math.prod(shape)).reshape(shape)[tuple(still)])
    except IndexError as error:
        raise IndexError(f"index: {error} (shape {x.shape})") from None
    places = []
    for i, k in enumerate(parts):
        if isinstance(k, Tensor):
            axis = sum(widths[:i])
            numbers = np.arange(max(k.size, 1)).reshape(-1, *[1] * (axes - axis - 1))
            numbers = np.broadcast_to(numbers, (*shape[:axis], max(k.size, 1), *shape[axis + 1 :]))
            which = np.asarray(numbers[(*still[:i], np.arange(k.size).reshape(k.shape), *still[i + 1 :])])
            values = reshape(recast(k, np.float64), (k.size,))
            if not np.array_equal(which.reshape(-1), np.arange(k.size)):
                values = gather(values, which.reshape(-1))
            places.append(_Place(reshape(values, which.shape), shape[axis], math.prod(shape[axis + 1 :])))
    y = _gather(reshape(x, (math.prod(shape), *rest)), 0, *_computed(x, places, flat))
    return reshape(y, flat.shape + rest)


def _spelled_out(x: Tensor, key: Sequence[Any]) -> list[Any]:
    """The parts of a key with full slices for its ellipsis, and for the axes that it leaves out."""
    missing = [slice(None)] * (x.ndim - sum(_width(k) for k in key))
    if x.ndim < sum(_width(k) for k in key):
        raise IndexError(f"index: too many indices for shape {x.shape}")
    at = next((i for i, k in enumerate(key) if k is Ellipsis), len(key))
    return [*key[:at], *missing, *key[at + 1 :]]


def _width(k: Any) -> int:
    """How many axes a part of a key takes."""
    if k is None or k is Ellipsis:
        return 0
    mask = not isinstance(k, Tensor | slice | int) and np.asarray(k).dtype == bool
    return np.ndim(k) if mask else 1


def _computed(
    x: Tensor, places: Sequence[_Place], start: npt.NDArray[Any], *, whole: bool = True
) -> tuple[Buffer, Buffer]:
    """Launches for the flat places, start + Σ place · stride, and for 1 where each is a whole number in its range."""
    back, like = x.backend, places[0].values
    if like.device != back.device:
        raise ValueError(f"index: x lives on {back.device} but the key on {like.device}; make x with device=t.device")
    flat, inside = back.asarray(start, np.float64), share(1.0, like)
    wanted = {k: graph(PLACE)[k] for k in ("inside", "flat")}
    for p in places:
        reads = {"v": p.values.buffer, "length": share(p.length, like), "stride": share(p.stride, like), "start": flat,
                 "others": inside}  # fmt: skip
        writes = {k: new(like, p.values.shape) for k in wanted}
        run(writes["flat"], lambda r=reads, w=writes: back.elementwise("index", wanted, r, w))  # type: ignore[misc]
        flat, inside = writes["flat"], writes["inside"]
    found = recast(Tensor(flat, back), np.int64)
    if not whole:
        reads = {"back": recast(found, np.float64).buffer, "flat": flat, "inside": inside}
        run(inside, lambda: back.elementwise(
            "index", graph("inside = where(back == flat, inside, 0)"), reads, {"inside": inside}))  # fmt: skip
    dtype = np.float64 if x.dtype.kind in "iu" else arithmetic(x.dtype)
    return found.buffer.reshape(-1), recast(Tensor(inside, back), dtype).buffer
