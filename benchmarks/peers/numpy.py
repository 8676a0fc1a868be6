"""NumPy as one writes it by hand: whole arrays, an array for every intermediate result."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..cases import Import, Kernel, Update
from . import Prepared, flat, repeated, updates
from .processes import script

Array = Any


def update(case: Update, variant: str) -> Prepared:
    lr, beta1, beta2, eps = {"sgd": 1e-2, "momentum": 1e-2, "adam": 1e-3}[case.rule], 0.9, 0.999, 1e-8

    def new() -> tuple[Callable[[], None], Callable[[], Array]]:
        p, g = case.arrays()
        m, v, z, t = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), 0

        def step() -> None:
            nonlocal p, m, v, z, t
            t += 1
            if case.rule == "adam":
                m += (1 - beta1) * (g - m)
                v += (1 - beta2) * (g * g - v)
                p -= lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
            elif case.rule == "momentum":
                z = 0.9 * z + g
                p -= lr * z
            else:
                p -= lr * g

        return step, lambda: p

    return updates(case, new)


def _cross_entropy(x: Array, labels: Array) -> list[Array]:
    rows, shifted = np.arange(len(x)), x - x.max(axis=1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(axis=1, keepdims=True)
    gradient = e / total
    gradient[rows, labels] -= 1
    return [(np.log(total[:, 0]) - shifted[rows, labels]).sum(), gradient]


def _relu_backward(x: Array, dy: Array) -> list[Array]:
    da = np.where(x > 0, dy, np.float32(0))
    return [da, da.sum(axis=0)]


def _layer_norm(x: Array, gain: Array, bias: Array) -> list[Array]:
    centred = x - x.mean(axis=1, keepdims=True)
    return [gain * (centred / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + 1e-5)) + bias]


KERNELS: dict[str, Callable[[dict[str, Array]], list[Array]]] = {  # not gelu: NumPy has no erf
    "relu": lambda a: [np.maximum(a["x"] + a["bias"], 0)],
    "tanh": lambda a: [np.tanh(a["x"] + a["bias"])],
    "relu_backward": lambda a: _relu_backward(a["x"], a["dy"]),
    "layer_norm": lambda a: _layer_norm(a["x"], a["gain"], a["bias"]),
    "cross_entropy": lambda a: _cross_entropy(a["x"], a["labels"]),
}


def kernel(case: Kernel, variant: str) -> Prepared | None:
    if (call := KERNELS.get(case.kernel)) is None:
        return None
    arrays = case.arrays()
    return repeated(lambda: call(arrays), case.calls, lambda: flat(call(arrays)))


def start(case: Import, variant: str) -> Prepared:
    return script("import numpy")
