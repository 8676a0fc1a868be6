"""Differentiable operations: forward lines, and beneath them the closure that propagates dy back.

Closures hold buffers, never the result itself, so that a graph is freed as soon as its last tensor is dropped.
"""

import builtins
import math
import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from gpubackprop import formulas
from gpubackprop.backends.base import Buffer, Graph
from gpubackprop.formulas import RESULT, Activation, parse
from gpubackprop.plan import empty, release, run
from gpubackprop.tensor import FLOATS, Axis, Backprop, Gradients, Tensor

__all__ = [
    "abs", "add", "broadcast_to", "clip", "concatenate", "cos", "divide", "exp", "expm1", "gather", "log", "log1p",
    "log_softmax", "logsumexp", "matmul", "max", "maximum", "mean", "min", "minimum", "multiply", "neg", "power",
    "relu", "reshape", "sigmoid", "sin", "softmax", "sqrt", "stack", "subtract", "sum", "tanh", "transpose", "where",
]  # fmt: skip


# ---- operands and results ------------------------------------------------------------------------------------------


def constant(value: Any, like: Tensor) -> Tensor:
    """The value as a tensor beside `like`: Python numbers and integers take its dtype, floats must have it."""
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    adapts = isinstance(value, int | float) or array.dtype.kind in "iub"
    if not adapts and array.dtype not in FLOATS:
        raise TypeError(
            f"tensor expected, got {type(value).__name__} of dtype {array.dtype}; convert it to float first"
        )
    return Tensor(like.backend.asarray(array, like.dtype if adapts else None), like.backend)


def operands(name: str, *values: Any) -> list[Tensor]:
    """The values as tensors of one device and dtype."""
    like = next((v for v in values if isinstance(v, Tensor)), None)
    if like is None:
        raise TypeError(f"{name}: at least one operand must be a tensor; make one with gb.tensor(…)")
    tensors = [constant(v, like) for v in values]
    if len({t.dtype for t in tensors}) > 1:
        kinds = " and ".join(str(t.dtype) for t in tensors)
        raise TypeError(f"{name}: dtypes differ ({kinds}); convert one with gb.tensor(array, dtype=…)")
    if len({t.device for t in tensors}) > 1:
        raise ValueError(f"{name}: tensors live on different devices ({', '.join(t.device for t in tensors)})")
    return tensors


def result(y: Buffer, inputs: tuple[Tensor, ...], backprop: Backprop) -> Tensor:
    """The tensor of an operation's output; it remembers the operation if an input requires a gradient."""
    backend = inputs[0].backend
    if any(x.requires_grad for x in inputs):
        return Tensor(y, backend, requires_grad=True, inputs=inputs, backprop=backprop)
    return Tensor(y, backend)


def _new(like: Tensor, shape: Sequence[int]) -> Buffer:
    return empty(like.backend, shape, like.dtype)


@cache
def graph(text: str) -> Graph:
    """The parsed text, once."""
    return parse(text)


def _fill_elementwise(name: str, text: str, like: Tensor, reads: dict[str, Buffer], y: Buffer) -> Buffer:
    run(y, lambda: like.backend.elementwise(name, graph(text), reads, {RESULT: y}))
    return y


# ---- elementwise ---------------------------------------------------------------------------------------------------


def _broadcast(name: str, *tensors: Tensor) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*(t.shape for t in tensors))
    except ValueError:
        shapes = " and ".join(str(t.shape) for t in tensors)
        raise ValueError(f"{name}: shapes {shapes} do not broadcast") from None


def _add_gradient(
    grads: Gradients, x: Tensor, name: str, text: str, reads: dict[str, Buffer], shape: tuple[int, ...]
) -> None:
    """x's gradient += text, summed over the axes along which x was broadcast to `shape`."""
    if not x.requires_grad:
        return
    backend = x.backend
    if x.shape == shape:
        grads.write(
            x, lambda dx, accumulate: backend.elementwise(name, graph(text), reads, {RESULT: dx}, accumulate=accumulate)
        )
        return
    full = reads["dy"]
    if text != "dy":
        full = _fill_elementwise(name, text, x, reads, _new(x, shape))
    _sum_to(grads, x, full)
    if full is not reads["dy"]:
        release(full)


def _sum_to(grads: Gradients, x: Tensor, full: Buffer) -> None:
    lead = full.ndim - x.ndim
    axes = tuple(i for i, n in enumerate(full.shape) if i < lead or (x.shape[i - lead] == 1 and n != 1))
    kept = tuple(n for i, n in enumerate(full.shape) if i not in axes)
    grads.write(x, lambda dx, accumulate: x.backend.reduce("sum", full, axes, dx.reshape(kept), accumulate=accumulate))


def unary(x: Any, row: Activation) -> Tensor:
    """y = row.forward(x), elementwise."""
    (x,) = operands(row.name, x)
    y = _new(x, x.shape)
    run(y, lambda: x.backend.elementwise(row.name, {RESULT: row.forward_graph()}, {"x": x.data}, {RESULT: y}))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        reads = {"dy": dy} | {k: v for k, v in (("x", x.data), ("y", y)) if k in row.needs}
        back = {RESULT: row.backward_graph()}
        grads.write(x, lambda dx, accumulate: x.backend.elementwise(
            f"{row.name} backward", back, reads, {RESULT: dx}, accumulate=accumulate), reuse=True)  # fmt: skip

    return result(y, (x,), backprop)


def _unary(row: Activation) -> Callable[[Any], Tensor]:
    def operation(x: Any) -> Tensor:
        return unary(x, row)

    operation.__name__ = operation.__qualname__ = row.name
    operation.__doc__ = f"y = {row.forward}, elementwise; its derivative is {row.derivative.splitlines()[-1]}."
    return operation


neg, exp, log, log1p, expm1, sqrt, sin, cos, abs = map(_unary, formulas.UNARY.values())
relu, sigmoid, tanh = (_unary(formulas.ACTIVATIONS[k]) for k in ("relu", "sigmoid", "tanh"))


def _binary(row: formulas.Binary) -> Callable[[Any, Any], Tensor]:
    def operation(a: Any, b: Any) -> Tensor:
        a, b = operands(row.name, a, b)
        y = _new(a, _broadcast(row.name, a, b))
        _fill_elementwise(row.name, row.forward, a, {"a": a.data, "b": b.data}, y)

        def backprop(dy: Buffer, grads: Gradients) -> None:
            reads = {"dy": dy, "a": a.data, "b": b.data, "y": y}
            for x, text in ((b, row.db), (a, row.da)):
                if text == "dy" and x is a and a.shape == y.shape:
                    grads.hand_on(a, dy)
                else:
                    names = formulas.free_names(*graph(text).values())
                    _add_gradient(
                        grads, x, f"{row.name} backward", text, {k: reads[k] for k in ("dy", *names)}, y.shape
                    )

        return result(y, (a, b), backprop)

    operation.__name__ = operation.__qualname__ = row.name
    operation.__doc__ = f"y = {row.forward}, elementwise with broadcasting; da = {row.da}, db = {row.db}."
    return operation


add, subtract, multiply, divide, power, maximum, minimum = map(_binary, formulas.BINARY.values())


def compare(sign: str, a: Any, b: Any) -> Tensor:
    """1 where the comparison holds, else 0; a constant."""
    a, b = operands(sign, a, b)
    reads, y = {"a": a.data, "b": b.data}, _new(a, _broadcast(sign, a, b))
    return Tensor(_fill_elementwise(sign, f"where(a {sign} b, 1, 0)", a, reads, y), a.backend)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the condition is not 0, else b; the gradient goes to the chosen side."""
    if not isinstance(condition, Tensor):
        condition = (np.asarray(condition) != 0).astype(np.int8)
    c, a, b = operands("where", condition, a, b)
    y = _new(a, _broadcast("where", c, a, b))
    _fill_elementwise("where", "where(c != 0, a, b)", a, {"c": c.data, "a": a.data, "b": b.data}, y)

    def backprop(dy: Buffer, grads: Gradients) -> None:
        reads = {"dy": dy, "c": c.data}
        _add_gradient(grads, a, "where backward", "where(c != 0, dy, 0)", reads, y.shape)
        _add_gradient(grads, b, "where backward", "where(c != 0, 0, dy)", reads, y.shape)

    return result(y, (a, b), backprop)


def clip(x: Any, low: float, high: float) -> Tensor:
    """x limited to [low, high]; no gradient at or beyond the limits."""
    if not low <= high:
        raise ValueError(f"clip: low {low} exceeds high {high}")
    return minimum(maximum(x, low), high)


# ---- reductions ----------------------------------------------------------------------------------------------------


def _axes(name: str, x: Tensor, axis: Axis) -> tuple[int, ...]:
    listed = range(x.ndim) if axis is None else axis if isinstance(axis, Sequence) else [axis]
    axes = tuple(operator.index(a) for a in listed)
    for a in axes:
        if not -x.ndim <= a < x.ndim:
            raise ValueError(f"{name}: axis {a} does not exist in shape {x.shape}")
    if len({a % x.ndim for a in axes}) < len(axes):
        raise ValueError(f"{name}: axes {axes} name one axis twice")
    return tuple(sorted(a % x.ndim for a in axes))


def _kept(x: Tensor, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if i in axes else n for i, n in enumerate(x.shape))


def _reduced(x: Tensor, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(x.shape) if i not in axes)


def _reduce(kind: str, like: Tensor, x: Buffer, axes: tuple[int, ...], out: Buffer) -> Buffer:
    """out, of the kept shape (1 on the reduced axes), = kind of x over the axes."""
    reduced = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    run(out, lambda: like.backend.reduce(kind, x, axes, out.reshape(reduced)))
    return out


def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Σ over the axes (all by default)."""
    (x,) = operands("sum", x)
    axes = _axes("sum", x, axis)
    kept = _kept(x, axes)
    y = _reduce("sum", x, x.data, axes, _new(x, kept))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        grads.write(x, lambda dx, accumulate: x.backend.copy(dy.reshape(kept), dx, accumulate=accumulate))

    return result(y.reshape(kept if keepdims else _reduced(x, axes)), (x,), backprop)


def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Arithmetic mean over the axes (all by default); of nothing it is an error."""
    (x,) = operands("mean", x)
    axes = _axes("mean", x, axis)
    kept, count = _kept(x, axes), _count("mean", x, axes)
    share = constant(1 / count, x).data
    y = _reduce("mean", x, x.data, axes, _new(x, kept))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        reads = {"dy": dy.reshape(kept), "k": share}
        grads.write(x, lambda dx, accumulate: x.backend.elementwise(
            "mean backward", graph("dy * k"), reads, {RESULT: dx}, accumulate=accumulate))  # fmt: skip

    return result(y.reshape(kept if keepdims else _reduced(x, axes)), (x,), backprop)


def _count(name: str, x: Tensor, axes: tuple[int, ...]) -> int:
    count = math.prod(x.shape[i] for i in axes)
    if count == 0:
        raise ValueError(f"{name}: of nothing (shape {x.shape} over axes {axes}) has no value")
    return count


def _extremum(kind: str) -> Callable[..., Tensor]:
    def operation(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
        (x,) = operands(kind, x)
        axes = _axes(kind, x, axis)
        _count(kind, x, axes)
        kept = _kept(x, axes)
        y = _reduce(kind, x, x.data, axes, _new(x, kept))

        def backprop(dy: Buffer, grads: Gradients) -> None:
            reads = {"x": x.data, "y": y}
            tied = _fill_elementwise("ties", "where(x == y, 1, 0)", x, reads, _new(x, x.shape))
            ties = _reduce("sum", x, tied, axes, _new(x, kept))
            reads |= {"dy": dy.reshape(kept), "n": ties}
            shared = graph("where(x == y, dy / n, 0)")
            grads.write(x, lambda dx, accumulate: x.backend.elementwise(
                f"{kind} backward", shared, reads, {RESULT: dx}, accumulate=accumulate))  # fmt: skip
            release(tied)
            release(ties)

        return result(y.reshape(kept if keepdims else _reduced(x, axes)), (x,), backprop)

    operation.__name__ = operation.__qualname__ = kind
    operation.__doc__ = f"The {kind}imum over the axes (all by default); ties share the gradient equally."
    return operation


max, min = _extremum("max"), _extremum("min")


def _exp_shifted(name: str, x: Tensor, axis: int) -> tuple[tuple[int, ...], Buffer, Buffer, Buffer]:
    """(axes, top, exp(x − top), its sums along the axis); 1 at the top itself, also where the top is infinite."""
    axes = _axes(name, x, axis)
    _count(name, x, axes)
    top = _reduce("max", x, x.data, axes, _new(x, _kept(x, axes)))
    e = _fill_elementwise(name, "where(x == top, 1, exp(x - top))", x, {"x": x.data, "top": top}, _new(x, x.shape))
    return axes, top, e, _reduce("sum", x, e, axes, _new(x, top.shape))


def logsumexp(x: Any, axis: int = -1, keepdims: bool = False) -> Tensor:
    """log Σ exp(x) along an axis, shifted by the largest element."""
    (x,) = operands("logsumexp", x)
    axes, top, e, total = _exp_shifted("logsumexp", x, axis)
    y = _fill_elementwise("logsumexp", "top + log(s)", x, {"top": top, "s": total}, _new(x, top.shape))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        reads = {"dy": dy.reshape(top.shape), "e": e, "s": total}
        grads.write(x, lambda dx, accumulate: x.backend.elementwise(
            "logsumexp backward", graph("dy * (e / s)"), reads, {RESULT: dx}, accumulate=accumulate))  # fmt: skip

    return result(y.reshape(top.shape if keepdims else _reduced(x, axes)), (x,), backprop)


def softmax(x: Any, axis: int = -1) -> Tensor:
    """exp(x) / Σ exp(x) along an axis."""
    (x,) = operands("softmax", x)
    axes, _, e, total = _exp_shifted("softmax", x, axis)
    y = _fill_elementwise("softmax", "e / s", x, {"e": e, "s": total}, _new(x, x.shape))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        weighted = _fill_elementwise("softmax backward", "dy * y", x, {"dy": dy, "y": y}, _new(x, x.shape))
        reads = {"dy": dy, "y": y, "s": _reduce("sum", x, weighted, axes, _new(x, total.shape))}
        grads.write(x, lambda dx, accumulate: x.backend.elementwise(
            "softmax backward", graph("y * (dy - s)"), reads, {RESULT: dx}, accumulate=accumulate))  # fmt: skip
        release(weighted)
        release(reads["s"])

    return result(y, (x,), backprop)


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """x − log Σ exp(x) along an axis."""
    (x,) = operands("log_softmax", x)
    axes, top, e, total = _exp_shifted("log_softmax", x, axis)
    reads = {"x": x.data, "top": top, "s": total}
    y = _fill_elementwise("log_softmax", "x - top - log(s)", x, reads, _new(x, x.shape))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        sums = _reduce("sum", x, dy, axes, _new(x, total.shape))
        reads = {"dy": dy, "e": e, "s": total, "d": sums}
        grads.write(x, lambda dx, accumulate: x.backend.elementwise(
            "log_softmax backward", graph("dy - e / s * d"), reads, {RESULT: dx}, accumulate=accumulate))  # fmt: skip
        release(sums)

    return result(y, (x,), backprop)


# ---- products ------------------------------------------------------------------------------------------------------


def matmul(a: Any, b: Any) -> Tensor:
    """a @ b as NumPy's matmul: vectors, matrices, and stacks of matrices whose leading axes broadcast."""
    a, b = operands("matmul", a, b)
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError(f"matmul: a scalar operand (shapes {a.shape} and {b.shape}); use * instead")
    inner = b.shape[-2] if b.ndim > 1 else b.shape[0]
    if a.shape[-1] != inner:
        raise ValueError(f"matmul: a has {a.shape[-1]} columns but b has {inner} rows (shapes {a.shape} and {b.shape})")
    if b.ndim == 1:
        y = matmul(a, reshape(b, (b.size, 1)))
        return reshape(y, y.shape[:-1])
    if a.ndim == 1:
        y = matmul(reshape(a, (1, a.size)), b)
        return reshape(y, y.shape[:-2] + y.shape[-1:])
    if b.ndim == 2 and a.ndim > 2:  # one matrix for the whole stack: a single product of all rows
        rows = reshape(a, (math.prod(a.shape[:-1]), a.shape[-1]))
        return reshape(_product(rows, b), a.shape[:-1] + b.shape[-1:])
    try:
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(f"matmul: leading axes of {a.shape} and {b.shape} do not broadcast") from None
    stack = (math.prod(lead),) if lead else ()
    a, b = (reshape(broadcast_to(t, lead + t.shape[-2:]), stack + t.shape[-2:]) for t in (a, b))
    return reshape(_product(a, b), (*lead, a.shape[-2], b.shape[-1]))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Product of two matrices, or of two equal stacks."""
    y = _new(a, a.shape[:-1] + b.shape[-1:])
    run(y, lambda: a.backend.gemm(a.data, b.data, y))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        grads.write(a, lambda da, accumulate: a.backend.gemm(dy, b.data, da, transpose_b=True, accumulate=accumulate))
        grads.write(b, lambda db, accumulate: a.backend.gemm(a.data, dy, db, transpose_a=True, accumulate=accumulate))

    return result(y, (a, b), backprop)


# ---- shapes --------------------------------------------------------------------------------------------------------


def reshape(x: Any, shape: Sequence[int] | int) -> Tensor:
    """The same elements, in C order, in another shape; one length may be -1."""
    (x,) = operands("reshape", x)
    try:
        y = x.data.reshape(shape)
    except ValueError:
        raise ValueError(f"reshape: {x.size} elements of shape {x.shape} do not fit {shape}") from None
    return x if y.shape == x.shape else result(y, (x,), lambda dy, grads: grads.hand_on(x, dy))


def transpose(x: Any, *axes: Any) -> Tensor:
    """The axes in the given order, or reversed; a copy."""
    (x,) = operands("transpose", x)
    order = (
        tuple(axes[0]) if len(axes) == 1 and not isinstance(axes[0], int) else axes or tuple(reversed(range(x.ndim)))
    )
    if sorted(a % builtins.max(x.ndim, 1) for a in order) != list(range(x.ndim)):
        raise ValueError(f"transpose: axes {order} are not an order of the {x.ndim} axes of shape {x.shape}")
    order = tuple(a % x.ndim for a in order)
    view = x.data.transpose(order)
    y = _new(x, view.shape)
    run(y, lambda: x.backend.copy(view, y))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        back = dy.transpose(tuple(np.argsort(order)))
        grads.write(x, lambda dx, accumulate: x.backend.copy(back, dx, accumulate=accumulate))

    return result(y, (x,), backprop)


def broadcast_to(x: Any, shape: Sequence[int]) -> Tensor:
    """x repeated along new and length-1 axes."""
    (x,) = operands("broadcast_to", x)
    shape = tuple(shape)
    if x.shape == shape:
        return reshape(x, shape)
    if len(shape) < x.ndim or any(n not in (1, m) for n, m in zip(reversed(x.shape), reversed(shape), strict=False)):
        raise ValueError(f"broadcast_to: shape {x.shape} does not broadcast to {shape}")
    y = _new(x, shape)
    run(y, lambda: x.backend.copy(x.data, y))
    return result(y, (x,), lambda dy, grads: _sum_to(grads, x, dy) if x.requires_grad else None)


def concatenate(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """The tensors one after another along an axis they have."""
    parts = operands("concatenate", *tensors)
    first = parts[0]
    (axis,) = _axes("concatenate", first, axis)
    for t in parts:
        if t.ndim != first.ndim or any(i != axis and n != first.shape[i] for i, n in enumerate(t.shape)):
            raise ValueError(f"concatenate: shapes {[t.shape for t in parts]} differ beside axis {axis}")
    ends = np.cumsum([t.shape[axis] for t in parts])
    y = _new(first, (*first.shape[:axis], int(ends[-1]), *first.shape[axis + 1 :]))
    lead = (slice(None),) * axis
    keys = [(*lead, slice(int(e) - t.shape[axis], int(e))) for t, e in zip(parts, ends, strict=True)]
    for t, key in zip(parts, keys, strict=True):
        run(t.data, lambda t=t, key=key: first.backend.copy(t.data, y[key]))  # type: ignore[misc]

    def backprop(dy: Buffer, grads: Gradients) -> None:
        for t, key in zip(parts, keys, strict=True):
            grads.write(t, lambda dx, accumulate, key=key: first.backend.copy(dy[key], dx, accumulate=accumulate))  # type: ignore[misc]

    return result(y, tuple(parts), backprop)


def stack(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """Tensors of one shape along a new axis."""
    parts = operands("stack", *tensors)
    if len({t.shape for t in parts}) > 1:
        raise ValueError(f"stack: shapes {[t.shape for t in parts]} differ; use concatenate")
    new = parts[0].ndim + 1
    if not -new <= axis < new:
        raise ValueError(f"stack: axis {axis} does not exist in the {new} axes of the result")
    at = axis % new
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
            view = x.data[parts]
        except IndexError as error:
            raise IndexError(f"index: {error} (shape {x.shape})") from None
        y = _new(x, view.shape)
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
    (axis,) = _axes("gather", x, axis)
    where_ = np.asarray(indices)
    length = x.shape[axis]
    if where_.ndim != 1 or (where_.dtype.kind not in "iu" and where_.size):
        raise TypeError(f"gather: 1-D integers expected, got {where_.dtype} of shape {where_.shape}")
    if where_.size and not (-length <= where_.min() and where_.max() < length):
        raise IndexError(f"gather: index {where_.min()}…{where_.max()} outside axis {axis} of shape {x.shape}")
    device_index = x.backend.asarray(where_ % builtins.max(length, 1), np.intp)
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    y = _new(x, (*x.shape[:axis], where_.size, *x.shape[axis + 1 :]))
    source, target = x.data.reshape(outer, length, inner), y.reshape(outer, where_.size, inner)
    run(y, lambda: x.backend.gather(source, device_index, target))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        part = dy.reshape(target.shape)
        grads.add(x, lambda dx: x.backend.scatter_add(part, device_index, dx.reshape(source.shape)))

    return result(y, (x,), backprop)
