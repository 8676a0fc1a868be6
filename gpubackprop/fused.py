"""Operations with kernels of their own: dense, the losses, dropout and noise, layer and batch normalisation."""

import math
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from gpubackprop import ops
from gpubackprop.backends.base import Backend, Buffer, Graph, StepTable, Tally, arithmetic
from gpubackprop.backprop import Gradients
from gpubackprop.formulas import ACTIVATIONS, KEPT, LOSSES, PASSES, RESULT, Activation, Loss, apply, name, parse
from gpubackprop.names import unknown
from gpubackprop.observe import observer
from gpubackprop.operands import graph, operands, result, share
from gpubackprop.plan import empty, release, run
from gpubackprop.shapes import reshape
from gpubackprop.tensor import Tensor

__all__ = [
    "activation_row", "batch_norm", "bce_with_logits", "bce_with_logits_sum", "dense", "dense_graph", "dropout",
    "elementwise_loss_step", "half_mse", "half_sse", "layer_norm", "mse", "noise", "poisson", "poisson_sum", "smoothed",
    "softmax_cross_entropy", "softmax_cross_entropy_step", "sse",
]  # fmt: skip


# ---- dense ---------------------------------------------------------------------------------------------------------


def activation_row(activation: str) -> Activation:
    """The row of that name, or an error that lists the names."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(unknown("activation", activation, sorted(ACTIVATIONS)))
    return ACTIVATIONS[activation]


@lru_cache(maxsize=KEPT)
def dense_graph(row: Activation, bias: bool) -> Graph:
    """y = f(x + b); the pre-activation is kept in x only if f' is written in it."""
    x = apply("+", name("x"), name("b")) if bias else name("x")
    return {"y": row.forward_graph(x)} | ({"x": x} if "x" in row.needs else {})


def dense(x: Any, w: Any, b: Any = None, activation: str = "identity", mask: Tensor | None = None) -> Tensor:
    """y = f(x @ w + b): one gemm, then bias and activation in one launch.

    x (batch, in), w (in, units), b (units,); or with a leading axis of members each: x (members, batch, in), w
    (members, in, units), b (members, units). Backward: f' ⊙ dy with the bias gradient in one launch, then two gemms;
    with a mask, of w's shape, the gradient of w is 0 where the mask is.
    """
    row = activation_row(activation)
    if row.name != "identity" and observer() is not None:  # who wants to see the pre-activation
        return ops.unary(dense(x, w, b, mask=mask), row)
    x, w, *rest = operands("dense", x, w, *(() if b is None else (b,)))
    _check_dense(x, w, rest[0] if rest else None)
    bias = rest[0] if rest else None
    back = x.backend
    pre = y = empty(back, x.shape[:-1] + w.shape[-1:], x.dtype)
    run(pre, lambda: back.gemm(x.buffer, w.buffer, pre, what="a = x @ w"))
    if bias is not None or row.name != "identity":
        forward, reads = dense_graph(row, bias is not None), {"x": pre}
        if bias is not None:
            reads["b"] = bias.buffer if w.ndim == 2 else bias.buffer.reshape(w.shape[0], 1, w.shape[2])
        y = empty(back, pre.shape, x.dtype) if "x" in forward else pre
        writes = {"x": pre, "y": y} if "x" in forward else {"y": y}
        z = "a + b" if bias is not None else "a"
        what = f"y = {z}" if row.name == "identity" else f"y = {row.name}({z})"
        run(y, lambda: back.elementwise("bias activation", forward, reads, writes, what=what))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        dz = _activation_backward(row, bias, dy, pre, y, grads, back)
        grads.write(w, lambda dw, accumulate: back.gemm(
            x.buffer, dz, dw, transpose_a=True, accumulate=accumulate, what="dw = xᵀ @ da"))  # fmt: skip
        if mask is not None and w.requires_grad:
            dw, masked = grads.buffers[w], PASSES["mask"].graph()
            reads = {"g": dw, "mask": mask.buffer}
            run(dw, lambda: back.elementwise("mask", masked, reads, {"g": dw}, what="dw = 0 where the mask is"))
        grads.write(x, lambda dx, accumulate: back.gemm(
            dz, w.buffer, dx, transpose_b=True, accumulate=accumulate, what="dx = da @ wᵀ"))  # fmt: skip

    return result(y, (x, w, *rest), backprop)


def _activation_backward(
    row: Activation, bias: Tensor | None, dy: Buffer, pre: Buffer, y: Buffer, grads: Gradients, back: Backend
) -> Buffer:
    """dz = f' ⊙ dy, over dy where it is ours; with the bias gradient in the same launch."""
    dz = dy if row.name == "identity" or grads.spare is not None else empty(back, dy.shape, dy.dtype)
    graph = {"dz": row.backward_graph()}
    reads = {"dy": dy} | {k: v for k, v in (("x", pre), ("y", y)) if k in row.needs}
    if bias is not None and bias.requires_grad:
        what = f"da = {'dy' if row.name == 'identity' else f'{row.name}′ ⊙ dy'}; db = Σ_rows da"
        grads.write(bias, lambda db, accumulate: back.elementwise_columns(
            "activation backward", graph, reads, dz, db, accumulate=accumulate, what=what))  # fmt: skip
    elif row.name != "identity":
        run(
            dz, lambda: back.elementwise("activation backward", graph, reads, {"dz": dz}, what=f"da = {row.name}′ ⊙ dy")
        )
    return dz


def _check_dense(x: Tensor, w: Tensor, b: Tensor | None) -> None:
    if w.ndim not in (2, 3) or x.ndim != w.ndim:
        raise ValueError(f"dense: x has shape {x.shape} and the weight {w.shape}; expected (batch, in) and (in, units)")
    if x.shape[-1] != w.shape[-2]:
        raise ValueError(f"dense: x has {x.shape[-1]} columns but the weight has {w.shape[-2]} rows")
    if x.shape[:-2] != w.shape[:-2]:
        raise ValueError(f"dense: x has {x.shape[0]} members but the weight has {w.shape[0]}")
    if b is not None and b.shape != w.shape[:-2] + w.shape[-1:]:
        raise ValueError(f"dense: the bias has shape {b.shape} but the weight has {w.shape[-1]} columns")


# ---- losses --------------------------------------------------------------------------------------------------------


def _reduction(loss: str, total: Tensor, rows: int, weights: Any, reduction: str) -> Tensor:
    """The sum of a batch's losses, or their mean over its rows by weight."""
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise ValueError(unknown("reduction", reduction, ("mean", "sum"), loss))
    weight = rows if weights is None else float(np.asarray(weights).sum(dtype=np.float64))
    if weight == 0:
        what = "rows whose weights sum to 0" if rows else "an empty batch"
        raise ValueError(f"{loss}: the mean over {what} has no value")
    return ops.multiply(total, 1 / weight)


def _weights(loss: str, weights: Any, x: Tensor) -> Buffer | None:
    """The weights (batch,) of the rows of x in the type that it is computed in."""
    if weights is None:
        return None
    dtype = arithmetic(x.dtype)
    w = weights.buffer if isinstance(weights, Tensor) else x.backend.asarray(np.asarray(weights, dtype))
    if w.shape != x.shape[:1] or w.dtype != dtype:
        raise ValueError(f"{loss}: the weights have shape {w.shape} and dtype {w.dtype}, but the output has shape "
                         f"{x.shape}; expected ({x.shape[0]},) of {dtype}")  # fmt: skip
    return w


def softmax_cross_entropy(logits: Any, target: Any, reduction: str = "mean", weights: Any = None) -> Tensor:
    """−Σ_k t_k log softmax(logits)_k of each row, reduced over the rows ("mean" or "sum").

    logits (batch, classes); target integer labels (batch,) or rows t (batch, classes), which need not sum to 1:
    the gradient is (Σt)·softmax(logits) − t. With weights w (batch,) the sum is Σ w·loss, the mean that over Σ w.
    """
    (logits,) = operands("softmax_cross_entropy", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"softmax_cross_entropy: logits of shape (batch, classes) expected, got {logits.shape}")
    t, w = _class_target(logits, target), _weights("softmax_cross_entropy", weights, logits)
    residual, total = empty(logits.backend, logits.shape, logits.dtype), empty(logits.backend, (), logits.dtype)
    back = logits.backend
    if logits.size:
        run(total, lambda: back.softmax_cross_entropy(logits.buffer, t, residual, total, w=w))
    else:
        run(total, lambda: back.fill(total, 0.0))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        reads = {"residual": residual, "dy": dy}
        grads.write(logits, lambda dx, accumulate: back.elementwise(
            "softmax_cross_entropy backward", graph("dy * residual"), reads, {RESULT: dx}, accumulate=accumulate,
            what="dx = dy · (softmax(x) − t)"))  # fmt: skip

    loss = result(total, (logits,), backprop)
    return _reduction("softmax_cross_entropy", loss, logits.shape[0], weights, reduction)


def softmax_cross_entropy_step(
    output: Tensor, target: Tensor, table: StepTable, tally: Tally, count: bool, weights: Tensor | None = None
) -> Buffer:
    """∂(scaled mean loss of the batch)/∂output; losses and, if asked, the rows right go to the tally: one launch."""
    back, t = output.backend, _class_target(output, target)
    w = _weights("softmax_cross_entropy", weights, output)
    dx, total = empty(back, output.shape, output.dtype), empty(back, (), table.control.dtype)
    run(total, lambda: back.softmax_cross_entropy(
        output.buffer, t, dx, total, w=w, table=table, tally=tally, count=count))  # fmt: skip
    return dx


def smoothed(target: Tensor, logits: Tensor, share: float) -> Tensor:
    """Labels (batch,) as rows, 1 − share + share / classes at the label and share / classes elsewhere; rows as they are
    (Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", section 7)."""
    if target.ndim != 1:
        return target
    back, (n, classes), dtype = logits.backend, logits.shape, arithmetic(logits.dtype)
    label, rows = empty(back, (n, 1), dtype), empty(back, (n, classes), dtype)
    column, spread = back.asarray(np.arange(classes, dtype=dtype)), float(share) / classes
    run(label, lambda: back.copy(target.buffer.reshape(n, 1), label))
    text, reads = f"where(label == column, {1 - float(share) + spread}, {spread})", {"label": label, "column": column}
    run(rows, lambda: back.elementwise("smoothed labels", graph(text), reads, {RESULT: rows}))
    release(label)
    return Tensor(rows, back)


def _class_target(logits: Tensor, target: Any) -> Buffer:
    """Labels or soft rows as a buffer; labels on the host are checked here, those of a Tensor were checked before."""
    if isinstance(target, Tensor):
        if target.requires_grad:
            raise ValueError("softmax_cross_entropy: the target requires a gradient; detach() it")
        t = target.buffer
        if t.dtype != np.intp and (t.dtype != arithmetic(logits.dtype) or t.ndim == 1):
            raise TypeError(f"softmax_cross_entropy: target of dtype {t.dtype} with logits of {logits.dtype}")
    else:
        array = np.asarray(target)
        if array.ndim == 1:
            from gpubackprop.data import as_labels

            array = as_labels(array, logits.shape[1], where="softmax_cross_entropy") if array.size else array
        t = logits.backend.asarray(array, np.intp if array.ndim == 1 else logits.dtype)
    if t.shape not in ((logits.shape[0],), logits.shape):
        raise ValueError(f"softmax_cross_entropy: logits have shape {logits.shape} but the target {t.shape}; "
                         f"expected ({logits.shape[0]},) labels or {logits.shape} rows")  # fmt: skip
    return t


# name: row of LOSSES, whether its mean over the outputs is taken, and what that is
_ELEMENTWISE = {
    "mse": ("mse", True, "(x − t)², its mean over the outputs"),
    "half_mse": ("half_mse", True, "½ (x − t)², its mean over the outputs"),
    "sse": ("mse", False, "(x − t)², its sum over the outputs"),
    "half_sse": ("half_mse", False, "½ (x − t)², its sum over the outputs"),
    "bce_with_logits": ("bce_with_logits", True, "−t log σ(x) − (1 − t) log(1 − σ(x)), its mean over the outputs"),
    "bce_with_logits_sum": ("bce_with_logits", False, "−t log σ(x) − (1 − t) log(1 − σ(x)), its sum over the outputs"),
    "poisson": ("poisson", True, "eˣ − t x + t log t − t, half a deviance, of x = log mean, its mean over the outputs"),
    "poisson_sum": ("poisson", False, "eˣ − t x + t log t − t, half a deviance, its sum over the outputs"),
}


def _elementwise_loss(label: str) -> Callable[..., Tensor]:
    row, _, equation = _ELEMENTWISE[label]

    def operation(output: Any, target: Any, reduction: str = "mean", weights: Any = None) -> Tensor:
        x, t = operands(label, output, target)
        _check_target(label, x, t)
        total, back = empty(x.backend, (), x.dtype), x.backend
        forward, backward = _loss_graphs(LOSSES[row], weights is not None)
        reads = {"x": x.buffer, "t": t.buffer, "k": _share(label, x)} | _by_row(label, weights, x)
        what = f"total = Σ {_times(weights)}k · ({LOSSES[row].forward})"
        run(total, lambda: back.elementwise_sum(label, forward, reads, total, what=what))

        def backprop(dy: Buffer, grads: Gradients) -> None:
            grads.write(x, lambda dx, accumulate: back.elementwise(
                f"{label} backward", backward, reads | {"dy": dy}, {RESULT: dx}, accumulate=accumulate))  # fmt: skip

        return _reduction(label, result(total, (x,), backprop), x.shape[0], weights, reduction)

    operation.__name__ = operation.__qualname__ = label
    operation.__doc__ = (
        f'{equation}, averaged over the rows (reduction="mean") or summed ("sum"); equal shapes.\n\n'
        "With weights w of the rows the sum is Σ w·loss, the mean that over Σ w."
    )
    return operation


def elementwise_loss_step(
    label: str, output: Tensor, target: Tensor, table: StepTable, tally: Tally, count: bool,
    weights: Tensor | None = None,
) -> Buffer:  # fmt: skip
    """∂(scaled mean loss of the batch)/∂output, and the losses to the tally, in one launch."""
    _check_target(label, output, target)
    row, back = LOSSES[_ELEMENTWISE[label][0]], output.backend
    forward, backward = _loss_graphs(row, weights is not None, "scale * (1 / weight)")
    dx, total = empty(back, output.shape, output.dtype), empty(back, (), table.control.dtype)
    reads = {"x": output.buffer, "t": target.buffer, "k": _share(label, output), "scale": table.control[:1]}
    reads |= _by_row(label, weights, output)
    graph_, writes, w = {**forward, "dx": backward[RESULT]}, {"dx": dx}, _times(weights)
    of_batch = "rows" if weights is None else "Σw"
    what = f"total = Σ {w}k · ({row.forward}); dx = {w}k · ({row.derivative}) / {of_batch}"
    run(total, lambda: back.elementwise_sum(label, graph_, reads, total, writes, table=table, tally=tally, what=what))
    return dx


def _by_row(label: str, weights: Any, x: Tensor) -> dict[str, Buffer]:
    """The weights, if there are any, in a shape that broadcasts over the outputs."""
    w = _weights(label, weights, x)
    return {} if w is None else {"w": w.reshape(-1, *(1,) * (x.ndim - 1))}


def _times(weights: Any) -> str:
    return "" if weights is None else "w · "


def _check_target(label: str, x: Tensor, t: Tensor) -> None:
    if x.shape != t.shape or x.ndim == 0:
        raise ValueError(f"{label}: the output has shape {x.shape} but the target {t.shape}; they must be equal")
    if t.requires_grad:
        raise ValueError(f"{label}: the target requires a gradient; detach() it, or write the loss with operators")


def _share(label: str, x: Tensor) -> Buffer:
    """The share of one element in its row's loss."""
    outputs = math.prod(x.shape[1:])
    return share(1 / outputs if _ELEMENTWISE[label][1] and outputs else 1.0, x)


@cache
def _loss_graphs(row: Loss, weighted: bool, dy: str = "dy") -> tuple[Graph, Graph]:
    """The loss times its share k, and dx for a cotangent dy."""
    found = row.graph(parse(dy)[RESULT], weighted=weighted)
    return {"total": found["total"]}, {RESULT: found["dx"]}


(
    mse, half_mse, sse, half_sse, bce_with_logits, bce_with_logits_sum, poisson, poisson_sum,
) = map(_elementwise_loss, _ELEMENTWISE)  # fmt: skip


# ---- draws and normalisation ---------------------------------------------------------------------------------------


def dropout(x: Any, rate: float, seed: int = 0, site: int = 0, step: StepTable | int = 0) -> Tensor:
    """x / (1 − rate) where kept, 0 with probability `rate`: the draw depends on seed, site, step and position alone.

    It drops whenever it is called; `gb.Dropout` is the layer that drops in training only, anew at each step.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: rate {rate} is not in [0, 1)")
    (x,) = tensors = operands("dropout", x)
    if rate == 0:
        return tensors[0]
    y = empty(x.backend, x.shape, x.dtype)
    run(y, lambda: x.backend.dropout(x.buffer, rate, seed, site, step, y))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        grads.write(x, lambda dx, accumulate: x.backend.dropout(dy, rate, seed, site, step, dx, accumulate=accumulate))

    return result(y, (x,), backprop)


def noise(x: Any, sigma: float, seed: int = 0, site: int = 0, step: StepTable | int = 0) -> Tensor:
    """x + sigma · N(0, 1), whose gradient is dy: the draw depends on seed, site, step and position alone.

    It is noisy whenever it is called; `gb.InputNoise` is the layer that is in training only, anew at each step.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"noise: sigma {sigma} is not in [0, inf)")
    if not 0 <= site < 2**30:
        raise ValueError(f"noise: site {site} is not in [0, 2^30)")
    (x,) = tensors = operands("noise", x)
    if sigma == 0:
        return tensors[0]
    y = empty(x.backend, x.shape, x.dtype)
    run(y, lambda: x.backend.noise(x.buffer, sigma, seed, site, step, y))
    return result(y, (x,), lambda dy, grads: grads.hand_on(x, dy))


def layer_norm(x: Any, gain: Any, bias: Any, eps: float = 1e-5) -> Tensor:
    """gain · (x − mean) / √(var + eps) + bias over the last axis (Ba et al., "Layer Normalization")."""
    x, gain, bias = operands("layer_norm", x, gain, bias)
    rows = reshape(x, (math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1))
    return reshape(_normalize("layer_norm", rows, gain, bias, 1, eps)[0], x.shape)


def batch_norm(x: Any, gain: Any, bias: Any, eps: float = 1e-5) -> tuple[Tensor, Buffer, Buffer]:
    """gain · (x − mean) / √(var + eps) + bias over the batch, with the batch's mean and biased variance per column
    (Ioffe & Szegedy, "Batch Normalization"). A batch of one row has no variance: an error.
    """
    x, gain, bias = operands("batch_norm", x, gain, bias)
    if x.ndim == 2 and x.shape[0] < 2:
        raise ValueError(f"batch_norm: a training batch of {x.shape[0]} rows has no variance; use 2 rows or more")
    return _normalize("batch_norm", x, gain, bias, 0, eps)


def _normalize(
    label: str, x: Tensor, gain: Tensor, bias: Tensor, axis: int, eps: float
) -> tuple[Tensor, Buffer, Buffer]:
    if x.ndim != 2 or gain.shape != x.shape[1:] or bias.shape != x.shape[1:] or x.shape[1] == 0:
        raise ValueError(f"{label}: x has shape {x.shape}, gain {gain.shape} and bias {bias.shape}; "
                         f"expected (batch, n), (n,) and (n,)")  # fmt: skip
    if not eps > 0:
        raise ValueError(f"{label}: eps must be positive, got {eps}")
    back, n = x.backend, x.shape[1 - axis]
    y = empty(back, x.shape, x.dtype)
    mean, variance, rstd = (empty(back, (n,), arithmetic(x.dtype)) for _ in range(3))
    run(y, lambda: back.normalize(x.buffer, gain.buffer, bias.buffer, axis, eps, y, mean, variance, rstd))

    def backprop(dy: Buffer, grads: Gradients) -> None:
        slots = [grads.slot(t) if t.requires_grad else (None, False) for t in (x, gain, bias)]
        (dx, a), (dgain, b), (dbias, c) = slots
        for out, adds in ((dgain, b), (dbias, c)):
            if out is not None and not adds and not x.size:  # sums over no rows
                run(out, partial(back.fill, out, 0.0))
        run(dy, lambda: back.normalize_backward(
            dy, x.buffer, gain.buffer, mean, rstd, axis, dx, dgain, dbias, (a, b, c)))  # fmt: skip

    return result(y, (x, gain, bias), backprop), mean, variance
