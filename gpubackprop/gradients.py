"""Gradients as functions: `value_and_grad` for optimizers, `gradcheck` for who doubts one, and their own slope, H v."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.tensor import Tensor, tensor

__all__ = ["gradcheck", "hessian_vector_product", "value_and_grad"]

Floats = npt.NDArray[np.float64]
NO_SECOND = "gradients have no graph, so use gb.hessian_vector_product for second derivatives"
STEPS = (1, -1, 2, -2)  # where a central difference of fourth order is taken, in units of its step


def value_and_grad(function: Callable[..., Tensor]) -> Callable[..., tuple[float, Any]]:
    """A function of arrays returning (value, gradient) of a function of tensors, in the arrays' own shapes.

    With one argument the gradient is an array, with several a tuple of arrays.

    >>> f = value_and_grad(lambda x: (x * x).sum())
    >>> f([1.0, -2.0])
    (5.0, array([ 2., -4.]))
    """

    def evaluate(*arrays: Any) -> tuple[float, Any]:
        if any(isinstance(a, Tensor) and a.requires_grad for a in arrays):
            raise RuntimeError(f"value_and_grad: an argument requires a gradient, which would be lost; {NO_SECOND}, or "
                               "pass its .detach()")  # fmt: skip
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
    arrays = _arrays(inputs)[0]
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


def _central(function: Callable[..., Tensor], arrays: list[Floats], k: int, weights: Floats, eps: float) -> Floats:
    """The central difference of the weighted function for every element of argument k."""
    out = np.zeros(arrays[k].shape)
    for at in np.ndindex(out.shape):
        values = []
        for step in STEPS:
            moved = [a.copy() for a in arrays]
            moved[k][at] += step * eps
            values.append(function(*(tensor(a) for a in moved)).numpy())
        out[at] = float((_slope(values, eps) * weights).sum())  # differences before the sum: it rounds less
    return out


def _slope(values: Sequence[Floats], h: float) -> Floats:
    """(8 (f(x + h) − f(x − h)) − (f(x + 2h) − f(x − 2h))) / 12h of the values at STEPS."""
    near, far = values[0] - values[1], values[2] - values[3]
    return (8 * near - far) / (12 * h)


def hessian_vector_product(function: Callable[..., Tensor], inputs: Any, v: Any, *, eps: float = 1e-3) -> Any:
    """H v, H the matrix of second derivatives of a function of tensors at `inputs`: how the gradient changes along v.

    `inputs` is an array or several in a list or tuple, `v` the like; so is the result, in float64. backward() gives
    exact gradients; their change along v is a central difference of fourth order, at ±h and ±2h with h = eps / max|v|.
    Its error, over max|v|, is about eps⁴/30 of the gradient's fifth derivative along v / max|v|, and 1e-16 / eps of the
    gradient. A kink (of relu, say) within ±2h is taken for curvature.

    >>> hessian_vector_product(lambda x, y: (x**2 - y**2).sum(), ([1.0], [1.0]), ([1.0], [1.0]))
    (array([2.]), array([-2.]))
    """
    (arrays, several), (direction, _) = _arrays(inputs), _arrays(v)
    if [a.shape for a in arrays] != [d.shape for d in direction]:
        got, wanted = (", ".join(str(a.shape) for a in group) for group in (direction, arrays))
        raise ValueError(f"hessian_vector_product: v has shapes {got} but the inputs {wanted}; they must be equal")
    largest = max((float(np.abs(d).max()) for d in direction if d.size), default=0.0)
    h = eps / (largest or 1.0)
    gradients = []
    for step in STEPS:
        _, grads = value_and_grad(function)(*(a + step * h * d for a, d in zip(arrays, direction, strict=True)))
        gradients.append(grads if isinstance(grads, tuple) else (grads,))
    products = tuple(_slope(values, h) for values in zip(*gradients, strict=True))
    return products if several else products[0]


def _arrays(inputs: Any) -> tuple[list[Floats], bool]:
    """The inputs in float64, and whether they are several: a tuple, or a list of arrays."""
    several = isinstance(inputs, tuple) or (isinstance(inputs, list) and any(hasattr(a, "shape") for a in inputs))
    listed = [a.numpy() if isinstance(a, Tensor) else a for a in (inputs if several else [inputs])]
    return [np.array(a, np.float64) for a in listed], several


def _checked(where: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{where}: the function returned {type(value).__name__}, expected a tensor made of its arguments"
        )
    return value
