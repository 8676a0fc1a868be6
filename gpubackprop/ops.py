"""Differentiable operations: forward lines, and beneath them the closure that propagates dy back.

Closures hold buffers, never the result itself, so that a graph is freed as soon as its last tensor is dropped.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from gpubackprop import formulas
from gpubackprop.backends.base import Buffer
from gpubackprop.backprop import Gradients
from gpubackprop.formulas import RESULT, Activation
from gpubackprop.observe import observer
from gpubackprop.operands import (
    axes_of,
    broadcast_shape,
    graph,
    integers,
    new,
    operands,
    recast,
    result,
    share,
    sum_to,
)
from gpubackprop.plan import release, run
from gpubackprop.shapes import broadcast_to, cast, reshape
from gpubackprop.tensor import Axis, Tensor

__all__ = [
    "abs", "add", "clip", "cos", "divide", "exp", "expm1", "log", "log1p", "log_softmax", "logsumexp", "matmul",
    "max", "maximum", "mean", "min", "minimum", "multiply", "neg", "power", "relu", "sigmoid", "sin", "softmax",
    "sqrt", "subtract", "sum", "tanh", "where",
]  # fmt: skip


def _fill_elementwise(name: str, text: str, like: Tensor, reads: dict[str, Buffer], y: Buffer) -> Buffer:
    run(y, lambda: like.backend.elementwise(name, graph(text), reads, {RESULT: y}))
    return y


# ---- elementwise ---------------------------------------------------------------------------------------------------


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
        full = _fill_elementwise(name, text, x, reads, new(x, shape))
    sum_to(grads, x, full)
    if full is not reads["dy"]:
        release(full)


def unary(x: Any, row: Activation) -> Tensor:
    """y = row.forward(x), elementwise."""
    (x,) = operands(row.name, x)
    if (watcher := observer()) is not None:
        return watcher.activate(x, row)
    y = new(x, x.shape)
    run(y, lambda: x.backend.elementwise(row.name, {RESULT: row.forward_graph()}, {"x": x.buffer}, {RESULT: y}))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        reads = {"dy": dy} | {k: v for k, v in (("x", x.buffer), ("y", y)) if k in row.needs}
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


WHOLE = ("add", "subtract", "multiply", "maximum", "minimum")  # integers give integers
MASKS = ("multiply", "maximum", "minimum")  # masks give a mask: of both, of either


def _binary(row: formulas.Binary) -> Callable[[Any, Any], Tensor]:
    def operation(a: Any, b: Any) -> Tensor:
        if row.name in WHOLE and integers(a, b):
            return cast(operation(*(recast(v, np.float64) if isinstance(v, Tensor) else v for v in (a, b))), np.int64)
        a, b = operands(row.name, a, b)
        y = new(a, broadcast_shape(row.name, a, b))
        _fill_elementwise(row.name, row.forward, a, {"a": a.buffer, "b": b.buffer}, y)

        def backprop(dy: Buffer, grads: Gradients) -> None:
            reads = {"dy": dy, "a": a.buffer, "b": b.buffer, "y": y}
            for x, text in ((b, row.db), (a, row.da)):
                if text == "dy" and x is a and a.shape == y.shape:
                    grads.hand_on(a, dy)
                else:
                    names = formulas.free_names(*graph(text).values())
                    _add_gradient(
                        grads, x, f"{row.name} backward", text, {k: reads[k] for k in ("dy", *names)}, y.shape
                    )

        outcome = result(y, (a, b), backprop)
        outcome.boolean = row.name in MASKS and a.boolean and b.boolean
        return outcome

    operation.__name__ = operation.__qualname__ = row.name
    operation.__doc__ = f"y = {row.forward}, elementwise with broadcasting; da = {row.da}, db = {row.db}."
    return operation


add, subtract, multiply, divide, power, maximum, minimum = map(_binary, formulas.BINARY.values())


def compare(sign: str, a: Any, b: Any) -> Tensor:
    """1 where the comparison holds, else 0; a constant, which serves as a mask."""
    a, b = operands(sign, a, b)
    reads, y = {"a": a.buffer, "b": b.buffer}, new(a, broadcast_shape(sign, a, b))
    holds = Tensor(_fill_elementwise(sign, f"where(a {sign} b, 1, 0)", a, reads, y), a.backend)
    holds.boolean = True
    return holds


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the condition is not 0, else b; the gradient goes to the chosen side."""
    if not isinstance(condition, Tensor):
        condition = (np.asarray(condition) != 0).astype(np.int8)
    c, a, b = operands("where", condition, a, b)
    y = new(a, broadcast_shape("where", c, a, b))
    _fill_elementwise("where", "where(c != 0, a, b)", a, {"c": c.buffer, "a": a.buffer, "b": b.buffer}, y)

    def backprop(dy: Buffer, grads: Gradients) -> None:
        reads = {"dy": dy, "c": c.buffer}
        _add_gradient(grads, a, "where backward", "where(c != 0, dy, 0)", reads, y.shape)
        _add_gradient(grads, b, "where backward", "where(c != 0, 0, dy)", reads, y.shape)

    return result(y, (a, b), backprop)


def clip(x: Any, low: float, high: float) -> Tensor:
    """x limited to [low, high], as minimum(maximum(x, low), high): the gradient is 0 beyond a limit, half at it."""
    if not (isinstance(low, Real) and isinstance(high, Real)):
        raise TypeError(f"clip: two numbers expected, got {low!r} and {high!r}; use maximum or minimum for one side")
    if low != low or high != high:
        raise ValueError(f"clip: low is {low} and high {high}, expected numbers; for one side use maximum or minimum")
    if not low <= high:
        raise ValueError(f"clip: low {low} exceeds high {high}")
    return minimum(maximum(x, low), high)


# ---- reductions ----------------------------------------------------------------------------------------------------


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
    axes = axes_of("sum", x, axis)
    kept = _kept(x, axes)
    y = _reduce("sum", x, x.buffer, axes, new(x, kept))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        grads.write(x, lambda dx, accumulate: x.backend.copy(dy.reshape(kept), dx, accumulate=accumulate))

    return result(y.reshape(kept if keepdims else _reduced(x, axes)), (x,), backprop)


def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Arithmetic mean over the axes (all by default); of nothing it is an error."""
    (x,) = operands("mean", x)
    axes = axes_of("mean", x, axis)
    kept, count = _kept(x, axes), _count("mean", x, axes)
    factor = share(1 / count, x)
    y = _reduce("mean", x, x.buffer, axes, new(x, kept))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        reads = {"dy": dy.reshape(kept), "k": factor}
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
        axes = axes_of(kind, x, axis)
        _count(kind, x, axes)
        kept = _kept(x, axes)
        y = _reduce(kind, x, x.buffer, axes, new(x, kept))

        def backprop(dy: Buffer, grads: Gradients) -> None:
            reads = {"x": x.buffer, "y": y}
            tied = _fill_elementwise("ties", "where(x == y, 1, 0)", x, reads, new(x, x.shape))
            ties = _reduce("sum", x, tied, axes, new(x, kept))
            reads |= {"dy": dy.reshape(kept), "n": ties}
            shared = graph("where(y != y, y, where(x == y, dy / n, 0))")  # a NaN has no order with any element
            grads.write(x, lambda dx, accumulate: x.backend.elementwise(
                f"{kind} backward", shared, reads, {RESULT: dx}, accumulate=accumulate))  # fmt: skip
            release(tied)
            release(ties)

        return result(y.reshape(kept if keepdims else _reduced(x, axes)), (x,), backprop)

    operation.__name__ = operation.__qualname__ = kind
    operation.__doc__ = (
        f"The {kind}imum over the axes (all by default); ties share the gradient equally, and a NaN spreads to it."
    )
    return operation


max, min = _extremum("max"), _extremum("min")


def _exp_shifted(name: str, x: Tensor, axis: int) -> tuple[tuple[int, ...], Buffer, Buffer, Buffer]:
    """(axes, top, exp(x − top), its sums along the axis); 1 at the top itself, also where the top is infinite."""
    axes = axes_of(name, x, axis)
    _count(name, x, axes)
    top = _reduce("max", x, x.buffer, axes, new(x, _kept(x, axes)))
    e = _fill_elementwise(name, "where(x == top, 1, exp(x - top))", x, {"x": x.buffer, "top": top}, new(x, x.shape))
    return axes, top, e, _reduce("sum", x, e, axes, new(x, top.shape))


def logsumexp(x: Any, axis: int = -1, keepdims: bool = False) -> Tensor:
    """log Σ exp(x) along an axis, shifted by the largest element."""
    (x,) = operands("logsumexp", x)
    axes, top, e, total = _exp_shifted("logsumexp", x, axis)
    y = _fill_elementwise("logsumexp", "top + log(s)", x, {"top": top, "s": total}, new(x, top.shape))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        reads = {"dy": dy.reshape(top.shape), "e": e, "s": total}
        grads.write(x, lambda dx, accumulate: x.backend.elementwise(
            "logsumexp backward", graph("dy * (e / s)"), reads, {RESULT: dx}, accumulate=accumulate))  # fmt: skip

    return result(y.reshape(top.shape if keepdims else _reduced(x, axes)), (x,), backprop)


def softmax(x: Any, axis: int = -1) -> Tensor:
    """exp(x) / Σ exp(x) along an axis."""
    (x,) = operands("softmax", x)
    axes, _, e, total = _exp_shifted("softmax", x, axis)
    y = _fill_elementwise("softmax", "e / s", x, {"e": e, "s": total}, new(x, x.shape))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        weighted = _fill_elementwise("softmax backward", "dy * y", x, {"dy": dy, "y": y}, new(x, x.shape))
        reads = {"dy": dy, "y": y, "s": _reduce("sum", x, weighted, axes, new(x, total.shape))}
        grads.write(x, lambda dx, accumulate: x.backend.elementwise(
            "softmax backward", graph("y * (dy - s)"), reads, {RESULT: dx}, accumulate=accumulate))  # fmt: skip
        release(weighted)
        release(reads["s"])

    return result(y, (x,), backprop)


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """x − log Σ exp(x) along an axis."""
    (x,) = operands("log_softmax", x)
    axes, top, e, total = _exp_shifted("log_softmax", x, axis)
    reads = {"x": x.buffer, "top": top, "s": total}
    y = _fill_elementwise("log_softmax", "where(x == top, 0, x - top) - log(s)", x, reads, new(x, x.shape))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        sums = _reduce("sum", x, dy, axes, new(x, total.shape))
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
    y = new(a, a.shape[:-1] + b.shape[-1:])
    run(y, lambda: a.backend.gemm(a.buffer, b.buffer, y))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        grads.write(a, lambda da, accumulate: a.backend.gemm(dy, b.buffer, da, transpose_b=True, accumulate=accumulate))
        grads.write(b, lambda db, accumulate: a.backend.gemm(a.buffer, dy, db, transpose_a=True, accumulate=accumulate))

    return result(y, (a, b), backprop)
