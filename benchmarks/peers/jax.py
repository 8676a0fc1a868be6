"""JAX on the CPU, jitted, weights and moments donated: a call for each step, or one for an epoch, scanned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..cases import Import, Kernel, Predict, Train, Update
from . import Prepared, ends, epochs, flat, repeated, updates
from .processes import script

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": partial(jax.nn.gelu, approximate=False), "tanh": jnp.tanh}
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8


def _forward(weights: Any, x: Any, activation: str) -> Any:
    for w, b in weights[:-1]:
        x = ACTIVATIONS[activation](x @ w + b)
    w, b = weights[-1]
    return x @ w + b


def _adam(p: Any, g: Any, m: Any, v: Any, t: Any) -> tuple[Any, Any, Any]:
    m, v = m + (1 - BETA1) * (g - m), v + (1 - BETA2) * (g * g - v)
    return p - LR * (m / (1 - BETA1**t)) / (jnp.sqrt(v / (1 - BETA2**t)) + EPS), m, v


def _epoch(case: Train, variant: str) -> Callable[[Any, Any, bool], float]:
    """The mean loss over an epoch of steps on new weights."""

    def loss(weights: Any, x: Any, y: Any) -> Any:
        output = _forward(weights, x, case.activation)
        if not case.classifies:
            return jnp.mean((output - y) ** 2)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(output), y[:, None], 1))

    def one(state: Any, x: Any, y: Any, rows: Any) -> Any:
        weights, m, v, t, total = state
        value, gradients = jax.value_and_grad(loss)(weights, x[rows], y[rows])
        new = jax.tree.map(lambda p, g, m, v: _adam(p, g, m, v, t + 1), weights, gradients, m, v)
        weights, m, v = (jax.tree.map(lambda _, n, i=i: n[i], weights, new) for i in range(3))
        return weights, m, v, t + 1, total + value

    @partial(jax.jit, donate_argnums=(0,))
    def scanned(state: Any, x: Any, y: Any, order: Any) -> Any:
        return jax.lax.scan(lambda s, rows: (one(s, x, y, rows), None), state, order)[0]

    step = jax.jit(one, donate_argnums=(0,))
    weights = jax.tree.map(jnp.asarray, case.weights())
    zeros = partial(jax.tree.map, jnp.zeros_like, weights)
    state = weights, zeros(), zeros(), jnp.zeros(()), jnp.zeros(())

    def epoch(x: Any, y: Any, shuffle: bool) -> float:
        nonlocal state
        rng = np.random.default_rng(0)
        order = rng.permutation(len(x)) if shuffle else np.arange(len(x))
        before = float(state[-1])
        batches = order.reshape(-1, case.batch)
        if variant == "scan":
            state = scanned(state, x, y, batches)
        else:
            for rows in batches:
                state = step(state, x, y, rows)
        return (float(state[-1]) - before) / (len(x) // case.batch)

    return epoch


def train(case: Train, variant: str) -> Prepared:
    return epochs(case, lambda: _epoch(case, variant), jnp.asarray)


def predict(case: Predict, variant: str) -> Prepared:
    weights, x = jax.tree.map(jnp.asarray, case.weights()), case.x()
    forward = jax.jit(partial(_forward, activation="relu"))

    def run() -> Any:
        return np.asarray(forward(weights, x))

    return repeated(run, case.calls, lambda: ends(run()))


def update(case: Update, variant: str) -> Prepared:

    @partial(jax.jit, donate_argnums=(0,))
    def step(state: Any, g: Any) -> Any:
        p, m, v, t = state
        if case.rule == "adam":
            return *_adam(p, g, m, v, t + 1), t + 1
        m = (0.9 if case.rule == "momentum" else 0) * m + g
        return p - 1e-2 * m, m, v, t + 1

    latest: Any = None

    def new() -> tuple[Callable[[], None], Callable[[], Any]]:
        p, g = map(jnp.asarray, case.arrays())
        state = p, jnp.zeros_like(p), jnp.zeros_like(p), jnp.zeros(())

        def call() -> None:
            nonlocal state, latest
            latest = state = step(state, g)

        return call, lambda: state[0]

    return updates(case, new, lambda: jax.block_until_ready(latest))


def _cross_entropy(x: Any, labels: Any) -> Any:
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], 1))


def _layer_norm(x: Any, gain: Any, bias: Any) -> Any:
    centred = x - x.mean(1, keepdims=True)
    return gain * centred / jnp.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) + bias


KERNELS: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{k: lambda a, f=f: [f(a["x"] + a["bias"])] for k, f in ACTIVATIONS.items()},  # type: ignore[misc]
    "relu_backward": lambda a: [da := jnp.where(a["x"] > 0, a["dy"], 0), da.sum(0)],
    "layer_norm": lambda a: [_layer_norm(a["x"], a["gain"], a["bias"])],
    "cross_entropy": lambda a: jax.value_and_grad(_cross_entropy)(a["x"], a["labels"]),
}


def kernel(case: Kernel, variant: str) -> Prepared:
    a, call = jax.tree.map(jnp.asarray, case.arrays()), jax.jit(KERNELS[case.kernel])
    once = partial(call, a)
    return repeated(lambda: jax.block_until_ready(once()), case.calls, lambda: flat(once()))


def start(case: Import, variant: str) -> Prepared:
    return script("import jax")
