"""NumPy's functions of tensors: each calls the operations that compute it, by NumPy's names of arguments.

Loaded when NumPy is first called with a tensor.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, reduce
from typing import Any

import numpy as np

from gpubackprop import ops, shapes
from gpubackprop.operands import operands
from gpubackprop.tensor import Axis, Tensor

__all__ = ["FUNCTIONS", "UFUNCS", "call", "call_ufunc"]

# What NumPy takes and tensors do not, unless it has the value that changes nothing.
NEUTRAL = {"order": "C", "mode": "raise", "subok": False, "where": True, "casting": "same_kind"}
REFUSED = {"out", "dtype", "where", "initial", "order", "casting", "subok", "like", "device", "copy", "mode", "mean",
           "correction", "newshape"}  # fmt: skip


# ---- dispatch ------------------------------------------------------------------------------------------------------


def call_ufunc(ufunc: np.ufunc, method: str, inputs: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
    """The ufunc of inputs of which one at least is a tensor."""
    name = f"np.{ufunc.__name__}"
    if method != "__call__":
        raise TypeError(f"{name}.{method}: tensors have no such operation; use np.sum, np.max or np.min, or the values "
                        "of .detach().numpy()")  # fmt: skip
    _refuse(name, options)
    if ufunc not in UFUNCS:
        raise _unknown(name)
    return UFUNCS[ufunc](*inputs)


def call(function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """The function of NumPy with these arguments, among which are tensors."""
    name = f"{function.__module__}.{function.__name__}".replace("numpy", "np", 1)
    if function in VALUES:
        return function(*map(_value, arguments), **{k: _value(v) for k, v in options.items()})
    if function in MOVES:
        return _move(name, function, arguments, options)
    if function not in FUNCTIONS:
        raise _unknown(name)
    own = FUNCTIONS[function]
    try:
        bound = _signature(own).bind(*arguments, **options)
    except TypeError as error:
        taken = ", ".join(k for k in _signature(own).parameters if k not in REFUSED)
        raise TypeError(f"{name}: {error}; of tensors it takes {taken}") from None
    given = {k: v for k, v in bound.arguments.items() if k in REFUSED}
    _refuse(name, given)
    bound.arguments = {k: v for k, v in bound.arguments.items() if k not in given}
    return own(*bound.args, **bound.kwargs)


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _refuse(name: str, options: Mapping[str, Any]) -> None:
    """Raise for an option that tensors cannot serve."""
    for key, value in options.items():
        if value is None or (type(value) is type(NEUTRAL.get(key)) and value == NEUTRAL[key]):
            continue
        if key == "out":
            raise TypeError(f"{name}: the result is a tensor and cannot be written into an array; write a = a + t in "
                            "place of a += t, and leave out `out`")  # fmt: skip
        raise TypeError(f"{name}: tensors do not take {key}={value!r}; leave it out")


def _unknown(name: str) -> TypeError:
    return TypeError(f"{name}: there is no such operation of tensors; for values without a gradient, take those of "
                     ".detach().numpy()")  # fmt: skip


def _value(a: Any) -> Any:
    return a.numpy() if isinstance(a, Tensor) else a


def _move(name: str, function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """A function that takes elements elsewhere and changes none: it does so with their numbers, by which we gather."""
    given = [*arguments, *options.values()]
    moved = [a for a in given if isinstance(a, Tensor)]
    if len(moved) != 1:
        raise TypeError(f"{name}: one tensor expected, got {len(moved)}; the other arguments are numbers or arrays")
    (x,) = moved
    numbers = np.arange(x.size).reshape(x.shape)
    taken = function(*(numbers if a is x else a for a in arguments),
                     **{k: numbers if v is x else v for k, v in options.items()})  # fmt: skip
    return [_taken(x, t) for t in taken] if isinstance(taken, list | tuple) else _taken(x, taken)


def _taken(x: Tensor, numbers: Any) -> Tensor:
    """The elements of these numbers: in the order in which they lie, without a copy."""
    numbers = np.asarray(numbers)
    if numbers.size == x.size and np.array_equal(numbers.reshape(-1), np.arange(x.size)):
        return shapes.reshape(x, numbers.shape)
    return shapes.reshape(shapes.gather(shapes.reshape(x, (x.size,)), numbers.reshape(-1)), numbers.shape)


# ---- compositions --------------------------------------------------------------------------------------------------


def _where(condition: Any, x: Any = None, y: Any = None) -> Tensor:
    if x is None or y is None:
        raise TypeError("np.where: of a condition alone, how many places it has depends on values; give x and y too")
    return ops.where(condition, x, y)


def _clip(a: Any, a_min: Any = None, a_max: Any = None, out: Any = None, *, min: Any = None, max: Any = None) -> Tensor:
    low, high = a_min if min is None else min, a_max if max is None else max
    a = a if low is None else ops.maximum(a, low)
    return a if high is None else ops.minimum(a, high)


def _root(total: Tensor, degree: float = 2) -> Tensor:
    """The root with slope 0 at 0, as of a norm."""
    zero = total == 0
    away = ops.where(zero, 1.0, total)
    return ops.where(zero, 0.0, ops.sqrt(away) if degree == 2 else ops.power(away, 1 / degree))


def _var(
    a: Tensor, axis: Axis = None, dtype: Any = None, out: Any = None, ddof: float = 0, keepdims: bool = False
) -> Tensor:
    centred = a - ops.mean(a, axis, True)
    squares = ops.sum(centred * centred, axis, keepdims)
    return squares / (a.size / max(1, squares.size) - ddof)


def _norm(x: Tensor, ord: Any = None, axis: Axis = None, keepdims: bool = False) -> Tensor:
    vectors = x.ndim == 1 if axis is None else np.ndim(axis) == 0 or len(axis) == 1  # type: ignore[arg-type]
    if ord is None or (ord == "fro" and not vectors) or (ord == 2 and vectors):
        return _root(ops.sum(x * x, axis, keepdims))
    if not vectors or ord in (0, "fro", "nuc"):
        raise TypeError(f"np.linalg.norm: ord {ord!r} of shape {x.shape} has no operation of tensors; choose 'fro' for "
                        "matrices, a number but 0 or an infinity for vectors")  # fmt: skip
    size = ops.abs(x)
    if math.isinf(ord):
        return ops.max(size, axis, keepdims) if ord > 0 else ops.min(size, axis, keepdims)
    total = ops.sum(size if ord == 1 else ops.power(size, ord), axis, keepdims)
    return total if ord == 1 else _root(total, ord)


def _dot(a: Any, b: Any, out: Any = None) -> Tensor:
    a, b = operands("np.dot", a, b)
    if 0 in (a.ndim, b.ndim):
        return ops.multiply(a, b)
    return ops.matmul(a, b) if b.ndim <= 2 else _tensordot(a, b, (-1, -2))


def _inner(a: Any, b: Any) -> Tensor:
    a, b = operands("np.inner", a, b)
    return ops.multiply(a, b) if 0 in (a.ndim, b.ndim) else _tensordot(a, b, (-1, -1))


def _outer(a: Any, b: Any, out: Any = None) -> Tensor:
    a, b = operands("np.outer", a, b)
    return shapes.reshape(a, (a.size, 1)) * shapes.reshape(b, (1, b.size))


def _vdot(a: Any, b: Any) -> Tensor:
    a, b = operands("np.vdot", a, b)
    return ops.sum(shapes.reshape(a, (a.size,)) * shapes.reshape(b, (b.size,)))


def _tensordot(a: Any, b: Any, axes: Any = 2) -> Tensor:
    a, b = operands("np.tensordot", a, b)
    if isinstance(axes, int | np.integer):
        left, right = np.arange(a.ndim - axes, a.ndim), np.arange(axes)
    else:
        left, right = (np.atleast_1d(side) for side in axes)
    names, others = list(range(a.ndim)), list(range(a.ndim, a.ndim + b.ndim))
    for i, j in zip(left, right, strict=True):
        others[j] = names[i]
    kept = [n for n in (*names, *others) if (n in names) != (n in others)]
    return _contract([(a, names), (b, others)], kept)


def _einsum(*given: Any, out: Any = None, optimize: Any = None, **options: Any) -> Tensor:
    _refuse("np.einsum", options)
    subscripts, *arrays = given
    if not isinstance(subscripts, str) or "." in subscripts:
        raise TypeError("np.einsum: of tensors it takes subscripts as letters, such as 'ij,jk->ik', without '...'")
    left, arrow, right = subscripts.replace(" ", "").partition("->")
    letters = left.replace(",", "")
    wanted = right if arrow else "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    parts = left.split(",")
    tensors = operands("np.einsum", *arrays)
    if [len(p) for p in parts] != [t.ndim for t in tensors] or not set(wanted) <= set(letters):
        raise ValueError(f"np.einsum: {subscripts!r} does not fit shapes {[t.shape for t in tensors]}")
    return _contract([(t, list(p)) for t, p in zip(tensors, parts, strict=True)], list(wanted))


def _contract(terms: list[tuple[Tensor, list[Any]]], wanted: list[Any]) -> Tensor:
    """Σ of the product of the terms over all axes, by name, that are not wanted: product after product."""
    terms = [_diagonal(t, names) for t, names in terms]
    (x, names), *rest = terms
    for i, (y, others) in enumerate(rest):
        later = {n for _, more in rest[i + 1 :] for n in more} | set(wanted)
        x, names = _product(*_summed(x, names, later | set(others)), *_summed(y, others, later | set(names)), later)
    x, names = _summed(x, names, set(wanted))
    return shapes.transpose(x, [names.index(n) for n in wanted]) if names != wanted else x


def _diagonal(x: Tensor, names: list[Any]) -> tuple[Tensor, list[Any]]:
    """Axes of one name as one: the elements at equal places."""
    once = list(dict.fromkeys(names))
    if once == names:
        return x, names
    lengths = [x.shape[names.index(n)] for n in once]
    grid = dict(zip(once, np.ogrid[tuple(slice(n) for n in lengths)], strict=True))
    return shapes.index(x, tuple(grid[n] for n in names)), once


def _summed(x: Tensor, names: list[Any], kept: set[Any]) -> tuple[Tensor, list[Any]]:
    axes = [i for i, n in enumerate(names) if n not in kept]
    return (ops.sum(x, axes), [n for n in names if n in kept]) if axes else (x, names)


def _product(x: Tensor, names: list[Any], y: Tensor, others: list[Any], kept: set[Any]) -> tuple[Tensor, list[Any]]:
    """Of two terms as one product of (stacks of) matrices."""
    length = dict(zip((*names, *others), (*x.shape, *y.shape), strict=True))
    both = [n for n in names if n in others]
    if [x.shape[names.index(n)] for n in both] != [length[n] for n in both]:
        raise ValueError(f"np.einsum: an axis has several lengths in shapes {x.shape} and {y.shape}")
    stack, inner = [n for n in both if n in kept], [n for n in both if n not in kept]
    left, right = [n for n in names if n not in both], [n for n in others if n not in both]

    def matrix(t: Tensor, own: list[Any], *groups: list[Any]) -> Tensor:
        order = [own.index(n) for group in groups for n in group]
        t = t if order == sorted(order) else shapes.transpose(t, order)
        return shapes.reshape(t, [math.prod(length[n] for n in group) for group in groups])

    found = ops.matmul(matrix(x, names, stack, left, inner), matrix(y, others, stack, inner, right))
    order = [*stack, *left, *right]
    return shapes.reshape(found, [length[n] for n in order]), order


def _concatenate(arrays: Any, axis: int | None = 0, out: Any = None, dtype: Any = None, casting: Any = None) -> Tensor:
    if axis is None:
        arrays, axis = [shapes.reshape(a, (a.size,)) for a in operands("np.concatenate", *arrays)], 0
    return shapes.concatenate(list(arrays), axis)


def _joined(function: Callable[[Any], Any], axis: int) -> Callable[..., Tensor]:
    """np.vstack and the like: each part in the shape that the function gives it alone, then one after the other."""

    def join(tup: Any, dtype: Any = None, casting: Any = None) -> Tensor:
        parts = operands(f"np.{function.__name__}", *tup)
        whole = [shapes.reshape(t, function([np.empty(t.shape, bool)]).shape) for t in parts]
        return shapes.concatenate(whole, min(axis, whole[0].ndim - 1))

    return join


def _take(a: Tensor, indices: Any, axis: int | None = None, out: Any = None, mode: Any = None) -> Tensor:
    if axis is None:
        return shapes.index(shapes.reshape(a, (a.size,)), indices)
    return shapes.index(a, (*[slice(None)] * (axis % a.ndim), indices))


def _take_along_axis(arr: Tensor, indices: Any, axis: int | None = -1) -> Tensor:
    if axis is None:
        return shapes.index(shapes.reshape(arr, (arr.size,)), indices)
    key: list[Any] = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
    key[axis % arr.ndim] = indices
    return shapes.index(arr, tuple(key))


def _diff(a: Tensor, n: int = 1, axis: int = -1) -> Tensor:
    if n < 0:
        raise ValueError(f"np.diff: n is {n}, expected 0 or more")
    lead = [slice(None)] * (axis % a.ndim)
    return reduce(lambda t, _: t[(*lead, slice(1, None))] - t[(*lead, slice(-1))], range(n), a)


def _full(value: int) -> Callable[..., Tensor]:
    def full(a: Tensor, dtype: Any = None, order: Any = None, subok: Any = None, shape: Any = None) -> Tensor:
        return operands("np.full_like", a, np.full(a.shape if shape is None else shape, value))[1]

    return full


def _logical(holds: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    def combine(a: Any, b: Any) -> Tensor:
        a, b = operands("np.logical_and", a, b)
        return holds(a != 0, b != 0)

    return combine


# ---- the tables ----------------------------------------------------------------------------------------------------

UFUNCS: dict[np.ufunc, Callable[..., Tensor]] = {
    np.add: ops.add, np.subtract: ops.subtract, np.multiply: ops.multiply, np.divide: ops.divide,
    np.power: ops.power, np.maximum: ops.maximum, np.minimum: ops.minimum,
    np.matmul: ops.matmul, np.negative: ops.neg, np.exp: ops.exp, np.log: ops.log, np.log1p: ops.log1p,
    np.expm1: ops.expm1, np.sqrt: ops.sqrt, np.sin: ops.sin, np.cos: ops.cos, np.tanh: ops.tanh,
    np.absolute: ops.abs, np.fabs: ops.abs,
    np.positive: lambda x: x,
    np.square: lambda x: x * x,
    np.reciprocal: lambda x: 1 / x,
    np.tan: lambda x: ops.sin(x) / ops.cos(x),
    np.sinh: lambda x: (ops.expm1(x) - ops.expm1(-x)) / 2,
    np.cosh: lambda x: (ops.exp(x) + ops.exp(-x)) / 2,
    np.exp2: lambda x: ops.exp(x * math.log(2)),
    np.log2: lambda x: ops.log(x) / math.log(2),
    np.log10: lambda x: ops.log(x) / math.log(10),
    np.logaddexp: lambda a, b: ops.logsumexp(shapes.stack(_broadcast(*operands("np.logaddexp", a, b))), 0),
    np.sign: lambda x: ops.where(x == x, (x > 0) - (x < 0) * 1.0, x),
    np.isnan: lambda x: x != x,
    np.isfinite: lambda x: x - x == 0,
    np.isinf: lambda x: ops.abs(x) == math.inf,
    np.logical_and: _logical(ops.multiply),
    np.logical_or: _logical(ops.maximum),
    np.logical_xor: _logical(lambda a, b: a != b),
    np.logical_not: lambda x: x == 0,
    **{u: partial(ops.compare, sign) for u, sign in (
        (np.equal, "=="), (np.not_equal, "!="), (np.less, "<"), (np.less_equal, "<="), (np.greater, ">"),
        (np.greater_equal, ">="))},
}  # fmt: skip


def _broadcast(*tensors: Tensor) -> list[Tensor]:
    shape = np.broadcast_shapes(*(t.shape for t in tensors))
    return [shapes.broadcast_to(t, shape) for t in tensors]


def _reduction(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, axis=None, out=None, keepdims=False, initial=None, where=None: operation(a, axis, keepdims)


def _sum_or_mean(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, axis=None, dtype=None, out=None, keepdims=False, initial=None, where=None: operation(
        a, axis, keepdims
    )


def _std(
    a: Tensor, axis: Axis = None, dtype: Any = None, out: Any = None, ddof: float = 0, keepdims: bool = False
) -> Tensor:
    return _root(_var(a, axis, ddof=ddof, keepdims=keepdims))


FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    np.sum: _sum_or_mean(ops.sum), np.mean: _sum_or_mean(ops.mean), np.var: _var, np.std: _std,
    np.max: _reduction(ops.max), np.amax: _reduction(ops.max),
    np.min: _reduction(ops.min), np.amin: _reduction(ops.min),
    np.ptp: lambda a, axis=None, out=None, keepdims=False: ops.max(a, axis, keepdims) - ops.min(a, axis, keepdims),
    np.linalg.norm: _norm,
    np.dot: _dot, np.inner: _inner, np.outer: _outer, np.vdot: _vdot, np.tensordot: _tensordot, np.einsum: _einsum,
    np.where: _where, np.clip: _clip, np.diff: _diff, np.take: _take, np.take_along_axis: _take_along_axis,
    np.concatenate: _concatenate,
    np.stack: lambda arrays, axis=0, out=None, dtype=None, casting=None: shapes.stack(list(arrays), axis),
    np.vstack: _joined(np.vstack, 0), np.hstack: _joined(np.hstack, 1), np.dstack: _joined(np.dstack, 2),
    np.column_stack: _joined(np.column_stack, 1),
    np.transpose: lambda a, axes=None: shapes.transpose(a, *(() if axes is None else (axes,))),
    np.broadcast_to: lambda array, shape, subok=None: shapes.broadcast_to(array, shape),
    np.zeros_like: _full(0), np.ones_like: _full(1),
    np.shape: lambda a: a.shape, np.ndim: lambda a: a.ndim,
    np.size: lambda a, axis=None: a.size if axis is None else a.shape[axis],
}  # fmt: skip

MOVES = {
    np.reshape, np.ravel, np.squeeze, np.expand_dims, np.atleast_1d, np.atleast_2d, np.atleast_3d, np.swapaxes,
    np.moveaxis, np.rollaxis, np.flip, np.fliplr, np.flipud, np.rot90, np.roll, np.repeat, np.tile, np.diagonal,
    np.split, np.array_split, np.vsplit, np.hsplit, np.dsplit, np.delete,
}  # fmt: skip

VALUES = {np.all, np.any, np.allclose, np.isclose, np.array_equal}  # of which nothing has a gradient
