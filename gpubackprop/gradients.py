"""Gradients as functions: `value_and_grad` for optimizers that want arrays, `gradcheck` for anyone who doubts one."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.tensor import Tensor, tensor

__all__ = ["gradcheck", "value_and_grad"]


def value_and_grad(function: Callable[..., Tensor]) -> Callable[..., tuple[float, Any]]:
    """A function of arrays returning (value, gradient) of a function of tensors, in the arrays' own shapes.

    With one argument the gradient is an array, with several a tuple of arrays.

    >>> f = value_and_grad(lambda x: (x * x).sum())
    >>> f([1.0, -2.0])
    (5.0, array([ 2., -4.]))
    """

    def evaluate(*arrays: Any) -> tuple[float, Any]:
        leaves = [tensor(a, requires_grad=True) for a in arrays]
        value = _checked("value_and_grad", function(*leaves))
        if value.requires_grad:
            value.backward()
        grads = tuple(np.zeros(t.shape, t.dtype) if t.grad is None else t.grad.numpy() for t in leaves)
        return value.item(), grads[0] if len(grads) == 1 else grads

    return evaluate


def gradcheck(
    function: Callable[..., Tensor], inputs: Sequence[Any] | Any, *, eps: float = 1e-4, tolerance: float = 1e-8
) -> float:
    """Compare backward() with central differences, element by element in float64; return the worst error.

    The error is |analytic − numeric| over the largest gradient, or over what rounding of the function alone explains if
    that is more. `function` takes tensors like `inputs`, an array or several in a list or tuple, and returns a tensor;
    one of several elements is weighted by fixed random numbers. Above the tolerance it raises an AssertionError that
    shows the element with its analytic and numeric value. Differences are of fourth order, at ±eps and ±2 eps: a kink
    that close to an input is taken for a wrong gradient.
    """
    several = isinstance(inputs, tuple) or (isinstance(inputs, list) and any(hasattr(a, "shape") for a in inputs))
    arrays = [np.array(a, np.float64) for a in (inputs if several else [inputs])]
    leaves = [tensor(a, requires_grad=True) for a in arrays]
    y = _checked("gradcheck", function(*leaves))
    weights = np.random.default_rng(0).uniform(0.5, 1.5, y.shape) if y.size > 1 else np.ones(y.shape)
    if y.requires_grad:
        y.backward(weights)
    analytic = [np.zeros(a.shape) if t.grad is None else t.grad.numpy() for a, t in zip(arrays, leaves, strict=True)]
    numeric = [_central(function, arrays, k, weights, eps) for k in range(len(arrays))]
    rounding = 2 * np.finfo(np.float64).eps * float(np.abs(y.numpy() * weights).sum()) / eps
    largest = max([rounding / tolerance, *(float(np.abs(g).max()) for g in (*analytic, *numeric) if g.size)])
    worst = 0.0
    for k, (a, n) in enumerate(zip(analytic, numeric, strict=True)):
        if a.size:
            error = np.abs(a - n) / (largest or 1.0)
            at = np.unravel_index(np.nanargmax(np.where(np.isnan(error), np.inf, error)), a.shape)
            if not error[at] <= tolerance:
                raise AssertionError(f"gradcheck: input {k} at {tuple(map(int, at))}: analytic {a[at]:.12g} numeric "
                                     f"{n[at]:.12g}, error {error[at]:.3g} > {tolerance:g} (eps {eps:g})")  # fmt: skip
            worst = max(worst, float(error[at]))
    return worst


def _central(
    function: Callable[..., Tensor],
    arrays: list[npt.NDArray[np.float64]],
    k: int,
    weights: npt.NDArray[np.float64],
    eps: float,
) -> npt.NDArray[np.float64]:
    """(8 (f(x + h) − f(x − h)) − (f(x + 2h) − f(x − 2h))) / 12h for every element of argument k."""
    out = np.zeros(arrays[k].shape)
    for at in np.ndindex(out.shape):
        values = []
        for steps in (1, -1, 2, -2):
            moved = [a.copy() for a in arrays]
            moved[k][at] += steps * eps
            values.append(function(*(tensor(a) for a in moved)).numpy())
        near, far = values[0] - values[1], values[2] - values[3]  # differences before the sum: it rounds less
        out[at] = float(((8 * near - far) * weights).sum()) / (12 * eps)
    return out


def _checked(where: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: the function returned {type(value).__name__}, expected a tensor")
    return value
