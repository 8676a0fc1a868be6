"""Row-wise kernels of the reference: softmax with cross-entropy, normalisation, draws, as lists of NumPy calls."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.chunked import INTEGERS
from gpubackprop.backends.philox import Draws

__all__ = [
    "adding", "as_tf32", "column_sum", "dropout", "line_sum", "noise", "normalize", "normalize_backward",
    "softmax_cross_entropy",
]  # fmt: skip

Array = npt.NDArray[Any]
Call = Callable[[], object]
RUN = 64  # rows of float32 that are added up at once: the sum of so many equal values is right to some 5e-7


def adding(call: Callable[[Array], object], out: Array, accumulate: bool) -> list[Call]:
    """`call(out)`, or the calls that add its result to `out`."""
    if not accumulate:
        return [partial(call, out)]
    fresh = np.empty_like(out)
    return [partial(call, fresh), partial(np.add, out, fresh, out)]


def column_sum(x: Array, out: Array, accumulate: bool) -> list[Call]:
    """out (…, n) = Σ_rows x (…, rows, n), as ones @ x, which is faster than row by row.

    A running sum of float32 drifts as it grows: RUN rows at a time are added up, and in float64 what these give.
    """
    rows = x.shape[-2]
    if rows <= RUN or x.dtype == np.float64:
        product = np.dot if x.ndim == 2 else np.matmul
        return adding(partial(product, np.ones(rows, x.dtype), x), out, accumulate)
    blocks, rest = divmod(rows, RUN)
    runs, end = x[..., : blocks * RUN, :].reshape(*x.shape[:-2], blocks, RUN, x.shape[-1]), x[..., blocks * RUN :, :]
    partials = np.empty((*x.shape[:-2], blocks + (rest > 0), x.shape[-1]), x.dtype)
    calls: list[Call] = [partial(np.matmul, np.ones(RUN, x.dtype), runs, partials[..., :blocks, :])]
    if rest:
        calls.append(partial(np.matmul, np.ones(rest, x.dtype), end, partials[..., blocks, :]))
    if partials.shape[-2] <= RUN:
        return calls + column_sum(partials, out, accumulate)
    wide, sums = np.empty(partials.shape), np.empty(out.shape)
    calls += [partial(np.copyto, wide, partials), partial(np.add.reduce, wide, -2, None, sums)]
    return calls + adding(partial(_rounded, sums), out, accumulate)


def _rounded(x: Array, out: Array) -> None:
    np.copyto(out, x, "same_kind")


def line_sum(x: Array, out: Array) -> list[Call]:
    """out (outer, inner) = Σ x (outer, length, inner) over the length, without the drift of a running sum."""
    if x.shape[2] == 1:  # contiguous, where NumPy adds up pairs
        return [partial(np.add.reduce, x.reshape(x.shape[:2]), 1, None, out.reshape(x.shape[:1]))]
    if x.shape[1] <= RUN:
        return [partial(np.add.reduce, x, 1, None, out)]
    return column_sum(x, out, False)


def softmax_cross_entropy(x: Array, target: Array, residual: Array, total: Array, w: Array | None = None) -> list[Call]:
    """total = Σ_rows −w·Σ_k t·log softmax(x), residual = w·((Σt)·softmax(x) − t), w = 1 without weights; rows are
    shifted by their largest element, and where t is 0 so is t·log softmax(x), because 0 · inf is not."""
    n, classes = x.shape
    top, row = np.empty((n, 1), x.dtype), np.empty((n, 1), x.dtype)
    shift: list[Call] = [
        partial(np.maximum.reduce, x, 1, None, top, True), partial(_below, x, top, residual, np.empty((n, 1), bool)),
    ]  # fmt: skip
    softmax: list[Call] = [
        partial(np.exp, residual, residual), _row_sum(residual, row),
        partial(np.divide, residual, row, residual), partial(np.log, row, row),  # row = log Σ exp(x − top)
    ]  # fmt: skip
    if target.ndim == 1:
        start, flat, picked = np.arange(n) * classes, np.empty(n, np.intp), np.empty(n, x.dtype)
        elements, one = residual.reshape(-1), np.ones((), x.dtype)
        pick = partial(elements.take, flat, None, picked, "clip")  # the label's element of each row
        return [
            *shift, partial(np.add, start, target, flat), pick, *softmax,
            partial(np.subtract, row.reshape(-1), picked, picked), *_weighed(picked, w),
            partial(np.add.reduce, picked, None, None, total),
            pick, partial(np.subtract, picked, one, picked), partial(elements.__setitem__, flat, picked),
            *_weighed(residual, w),
        ]  # fmt: skip
    weight, dot, product = np.empty((n, 1), x.dtype), np.empty((n, 1), x.dtype), np.empty_like(x)
    bits, counts = product.view(INTEGERS[x.itemsize]), np.empty(x.shape, INTEGERS[x.itemsize])
    return [
        *shift, partial(np.multiply, target, residual, product),
        partial(np.not_equal, target, np.zeros((), x.dtype), counts), partial(np.multiply, bits, counts, bits),
        _row_sum(product, dot), _row_sum(target, weight), *softmax, partial(np.multiply, row, weight, row),
        partial(np.subtract, row, dot, row), *_weighed(row, w), partial(np.add.reduce, row, None, None, total),
        partial(np.multiply, residual, weight, residual), partial(np.subtract, residual, target, residual),
        *_weighed(residual, w),
    ]  # fmt: skip


def _row_sum(x: Array, out: Array) -> Call:
    """out (rows, 1) = Σ_columns x: as x @ ones where that does not drift, which is faster; else in pairs."""
    if x.shape[1] > 4 * RUN:
        return partial(np.add.reduce, x, 1, None, out, True)
    return partial(np.dot, x, np.ones((x.shape[1], 1), x.dtype), out)


def _below(x: Array, top: Array, out: Array, infinite: Array) -> None:
    """out = x − top of each row; 0 at the top itself, also where that is infinite."""
    np.subtract(x, top, out)
    if np.isinf(top, infinite).any():
        np.copyto(out, 0, where=np.equal(x, top))


def _weighed(x: Array, w: Array | None) -> list[Call]:
    """The calls for x (rows, …) *= w (rows,), if there are weights; 0 where they are, because 0 · inf is not."""
    if w is None:
        return []
    each, none = w.reshape(-1, *(1,) * (x.ndim - 1)), np.empty(w.shape, bool)
    where, zero = none.reshape(each.shape), np.zeros((), x.dtype)
    return [
        partial(np.equal, w, zero, none), partial(np.multiply, x, each, x), partial(np.copyto, x, zero, where=where),
    ]  # fmt: skip


def normalize(
    axis: int, eps: float, x: Array, gain: Array, bias: Array, out: Array, mean: Array, variance: Array, rstd: Array
) -> list[Call]:
    """out = gain · (x − mean) / √(variance + eps) + bias, statistics along the axis."""
    work, centre, scale = np.empty_like(x), np.expand_dims(mean, axis), np.expand_dims(rstd, axis)
    small = 2.0 ** -(np.finfo(x.dtype).maxexp * 3 // 4)

    def mend() -> None:
        """Lines whose squares overflow again, scaled by a power of two."""
        if (lines := np.flatnonzero(~np.isfinite(variance))).size:
            part = x.take(lines, 1 - axis) * x.dtype.type(small)
            m, v, r = (np.empty(lines.size, x.dtype) for _ in range(3))
            for call in _statistics(axis, eps * small**2, part, m, v, r, np.empty_like(part)):
                call()
            mean[lines], rstd[lines] = m / small, r * small
            variance[lines] = np.minimum(v / small / small, np.finfo(x.dtype).max)
            at = (lines, slice(None)) if axis else (slice(None), lines)
            own = (gain, bias) if axis else (gain[lines], bias[lines])
            out[at] = (part - np.expand_dims(m, axis)) * np.expand_dims(r, axis) * own[0] + own[1]

    return [
        *_statistics(axis, eps, x, mean, variance, rstd, work), partial(np.subtract, x, centre, work),
        partial(np.multiply, work, scale, work), partial(np.multiply, work, gain, out), partial(np.add, out, bias, out),
        mend,
    ]  # fmt: skip


def _statistics(axis: int, eps: float, x: Array, mean: Array, variance: Array, rstd: Array, work: Array) -> list[Call]:
    """Mean, variance and 1 / √(variance + eps) along the axis.

    The mean is that of the differences from a line's first element, corrected by the mean of what it leaves, and the
    variance is corrected by the same (Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance"): of equal
    elements they are that element and 0.
    """
    centre, spread, scale = (np.expand_dims(a, axis) for a in (mean, variance, rstd))
    top, rest = (x[:, :1] if axis else x[:1]), np.empty_like(centre)
    share, small, one = (np.array(v, x.dtype) for v in (1 / x.shape[axis], eps, 1))

    return [
        partial(np.subtract, x, top, work), *_total(work, axis, centre),
        partial(np.multiply, centre, share, centre), partial(np.add, top, centre, centre),
        partial(np.subtract, x, centre, work), *_total(work, axis, rest),
        partial(np.multiply, rest, share, rest), partial(np.add, centre, rest, centre),
        partial(np.multiply, rest, rest, rest), partial(np.multiply, work, work, work),
        *_total(work, axis, spread), partial(np.multiply, spread, share, spread),
        partial(np.subtract, spread, rest, spread), partial(np.add, spread, small, scale),
        partial(np.sqrt, scale, scale), partial(np.divide, one, scale, scale),
    ]  # fmt: skip


def _total(x: Array, axis: int, out: Array) -> list[Call]:
    """out = Σ x along the axis of a matrix, which out keeps."""
    return line_sum(np.expand_dims(x, 2 if axis else 0), out)


def normalize_backward(
    axis: int, accumulate: tuple[bool, bool, bool], dy: Array, x: Array, gain: Array, mean: Array, rstd: Array,
    dx: Array | None, dgain: Array | None, dbias: Array | None,
) -> list[Call]:  # fmt: skip
    """The gradients of `normalize` in dx, dgain and dbias; see Backend."""
    keep = tuple(1 if i == axis else n for i, n in enumerate(dy.shape))
    centre, scale = mean.reshape(keep), rstd.reshape(keep)
    work, xhat, part = np.empty_like(dy), np.empty_like(dy), np.empty(keep, dy.dtype)
    half, two = np.array(0.5, dy.dtype), np.array(2, dy.dtype)
    calls: list[Call] = [  # x − mean may overflow, half of each may not
        partial(np.multiply, x, half, xhat), partial(np.multiply, centre, half, part),
        partial(np.subtract, xhat, part, xhat), partial(np.multiply, scale, two, part),
        partial(np.multiply, xhat, part, xhat),
    ]  # fmt: skip
    if dbias is not None:
        calls += column_sum(dy, dbias, accumulate[2])
    if dgain is not None:
        calls += [partial(np.multiply, dy, xhat, work), *column_sum(work, dgain, accumulate[1])]
    if dx is not None:
        d, share = np.empty_like(dy), np.array(1 / dy.shape[axis], dy.dtype)
        calls += [
            partial(np.multiply, dy, gain, d), partial(np.multiply, d, xhat, work),
            *_total(work, axis, part), partial(np.multiply, part, share, part),
            partial(np.multiply, xhat, part, work), *_total(d, axis, part),
            partial(np.multiply, part, share, part), partial(np.subtract, d, part, d), partial(np.subtract, d, work, d),
            *adding(partial(np.multiply, d, scale), dx, accumulate[0]),
        ]  # fmt: skip
    return calls


def as_tf32(x: Array, calls: list[Call]) -> Array:
    """A copy of float32 x that `calls` will fill with x rounded to 10 bits of mantissa, ties to even; else x itself."""
    if x.dtype != np.float32:
        return x
    out = np.empty(x.shape, np.float32)
    bits, odd = out.view(np.int32), np.empty(x.shape, np.int32)
    half, keep, thirteen, one = (np.array(v, np.int32) for v in (0x0FFF, ~0x1FFF, 13, 1))
    calls += [
        partial(np.copyto, out, x), partial(np.right_shift, bits, thirteen, odd),
        partial(np.bitwise_and, odd, one, odd), partial(np.add, bits, half, bits), partial(np.add, bits, odd, bits),
        partial(np.bitwise_and, bits, keep, bits),
    ]  # fmt: skip
    return out


def dropout(
    x: Array, rate: float, seed: int, site: int, step: Callable[[], int], out: Array, accumulate: bool
) -> list[Call]:
    """out = x / (1 − rate) where Philox keeps the element, else 0: selected on the bits, so 0·inf cannot appear."""
    draws, integer = Draws(x.size, x.dtype), INTEGERS[x.dtype.itemsize]
    kept, scale = np.empty(x.shape, integer), np.array(1 / (1 - rate), x.dtype)
    into = np.empty_like(out) if accumulate else out

    def draw() -> None:
        np.copyto(kept.reshape(-1), draws.bernoulli(1 - rate, seed, site, step()))

    select = partial(np.multiply, into.view(integer), kept, into.view(integer))
    calls: list[Call] = [draw, partial(np.multiply, x, scale, into), select]
    return [*calls, partial(np.add, out, into, out)] if accumulate else calls


def noise(x: Array, sigma: float, seed: int, site: int, step: Callable[[], int], out: Array) -> list[Call]:
    """out = x + sigma · N(0, 1)."""
    draws, scale, flat = Draws(x.size, x.dtype), np.array(sigma, x.dtype), out.reshape(-1)

    def draw() -> None:
        np.multiply(draws.normal(seed, site, step()), scale, flat)

    return [draw, partial(np.add, x, out, out)]
