"""The scale of what each layer gives on to the next: measured, and set to 1 before training."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop import ops
from gpubackprop.claims import exclusive
from gpubackprop.columns import Columns
from gpubackprop.formulas import Activation
from gpubackprop.fused import dense
from gpubackprop.initializers import draw
from gpubackprop.layers import Dense
from gpubackprop.model import Layer, Mode, check_model, mode, seed_or_fresh
from gpubackprop.observe import observing
from gpubackprop.tensor import Tensor

__all__ = ["layer_stats", "lsuv", "showing"]

Array = npt.NDArray[np.float64]
TOLERANCE = 0.01  # of the variance; where the biases are zero the second trial is exact
TRIALS = 10


@dataclass(eq=False)
class _Shown:
    """Shows every call of a layer: what it is, what goes in, what comes out."""

    look: Callable[[Layer, Tensor, Tensor], object]

    def call(self, layer: Layer, x: Tensor) -> Tensor:
        y = layer.forward(x)
        self.look(layer, x, y)
        return y

    def activate(self, x: Tensor, row: Activation) -> Tensor:
        with observing(None):
            return ops.unary(x, row)


def showing(look: Callable[[Layer, Tensor, Tensor], object]) -> AbstractContextManager[None]:
    """Every layer called inside is shown with its x and its output, innermost first; what a plan records is not."""
    return observing(_Shown(look))


@exclusive
def layer_stats(model: Layer, x: Any) -> Columns:
    """Mean and variance of each layer's outputs for the rows of x, all its columns together; `print` shows a table.

    Columns: layer (its path), what it is, mean, variance; a row per call, in order. Inside `with gb.training():` layers
    behave as in training, and BatchNorm's running statistics follow.
    """
    stats = Columns()

    def look(layer: Layer, x: Tensor, y: Tensor) -> None:
        if layer is not model or not layer.children():  # what the whole model gives, its last layer gave
            outputs = y.numpy().astype(np.float64)
            stats.add(
                layer=layer._path, what=layer.describe(), mean=float(outputs.mean()), variance=float(outputs.var())
            )

    with showing(look):
        model(x)
    return stats


@exclusive
def lsuv(model: Layer, x: Any, seed: int | None = None) -> Layer:
    """Draw every Dense layer's weight orthogonal, then scale it until x @ w + b has variance 1 over the rows of x.

    Layer by layer in the order they are called, x through those before, as in inference (Mishkin & Matas, "All you need
    is a good init"). x is a batch of some hundred rows, scaled as for training. The biases are drawn as `initialize`
    draws them; what else was not set yet, too; frozen weights stay. `seed` is that of `initialize`; a Trainer keeps the
    weights.

    ValueError where the rows of x all come out of a layer alike, or where its biases alone vary by more; the weights
    are then as they were.
    """
    check_model(model, "lsuv")
    seed = seed_or_fresh(seed, "lsuv")
    model.initialize(seed, missing=True)
    before = model.state_dict()
    try:
        _orthogonalise(model, x, seed)
    except BaseException:
        model.load_state_dict(before)
        raise
    model.seed = seed
    return model


def _orthogonalise(model: Layer, x: Any, seed: int) -> None:
    names = {p: key for key, p in model.named_parameters().items()}
    layers = _dense_layers(model, x)
    for _, layer in layers:
        weight, bias = layer.weight, layer.bias
        weight.backend.write(weight.buffer, draw("orthogonal", weight.shape, seed, names[weight]))
        layer.settle()
        if bias is not None:
            model._draw(seed, [names[bias]])
    for path, layer in layers:
        _scale(model, x, path, layer)


def _dense_layers(model: Layer, x: Any) -> list[tuple[str, Dense]]:
    """The Dense layers whose weight is trained, with their paths, in the order they are called; a shared one once."""
    found: dict[Any, tuple[str, Dense]] = {}

    def look(layer: Layer, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, Dense) and layer.weight.stepped:
            found.setdefault(layer.weight, (layer._path, layer))

    with mode(Mode()), showing(look):
        model(x)
    return list(found.values())


def _scale(model: Layer, x: Any, path: str, layer: Dense) -> None:
    """Divide the weight by the deviation of the pre-activations, until that is 1."""
    where, weight = f"lsuv: layer {path or 'Dense'!r}", layer.weight
    for _ in range(TRIALS):
        a = _preactivations(model, x, layer)
        if not np.isfinite(a).all():
            raise ValueError(f"{where}: x @ w + b is not finite; scale x first, with a gb.Scaler in front")
        if np.ptp(a, axis=0).max() <= 8 * np.finfo(weight.dtype).eps * np.abs(a).max():
            raise ValueError(f"{where}: x @ w + b is the same for all {len(a)} rows of x; pass rows that differ in it")
        variance = a.var()
        if abs(variance - 1) <= TOLERANCE:
            return
        weight.backend.write(weight.buffer, weight.numpy() / np.sqrt(variance))
    raise ValueError(
        f"{where}: x @ w + b has variance {variance:.3g} after {TRIALS} trials, expected 1; give it bias_init='zeros'"
    )


def _preactivations(model: Layer, x: Any, layer: Dense) -> Array:
    """x @ w + b of that layer, where it is first called."""
    seen: list[Array] = []

    def look(called: Layer, x: Tensor, y: Tensor) -> None:
        if called is layer and not seen:
            seen.append(dense(x, layer.weight, layer.bias).numpy().astype(np.float64))

    with mode(Mode()), showing(look):
        model(x)
    return seen[0]
