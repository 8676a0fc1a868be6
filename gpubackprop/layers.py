"""The layers: each declares its parameters and writes its forward in operations; none writes a backward."""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop import fused, ops
from gpubackprop.arena import Parameter
from gpubackprop.checks import warn
from gpubackprop.data import as_features, by_name, column_names
from gpubackprop.formulas import ACTIVATIONS, CONSTRAINTS, RUNNING, Constraint
from gpubackprop.model import CLASSES, Layer, as_dtype, current_mode
from gpubackprop.names import explains_keywords, hint, of_pytorch
from gpubackprop.operands import graph
from gpubackprop.plan import empty, release, run
from gpubackprop.shapes import concatenate
from gpubackprop.spread import TOLERATED, lost, spread
from gpubackprop.tensor import Tensor

__all__ = [
    "CLASSES", "Activation", "BatchNorm", "Concatenate", "Dense", "Dropout", "InputNoise", "Layer", "LayerNorm",
    "Residual", "Scaler", "Sequential", "mlp",
]  # fmt: skip


_DEFAULT_INIT = {"selu": "lecun_normal"} | dict.fromkeys(
    ("identity", "sigmoid", "tanh", "hard_sigmoid", "hard_tanh"), "glorot_uniform"
)


class Dense(Layer):
    """y = activation(x @ weight + bias), weight (inputs, units), bias (units,).

    `init` is an initializer's name, a number, an array or a callable (shape, generator) -> array; by default Glorot's
    for identity, sigmoid and tanh, LeCun's for selu, else He's.

    `mask` (inputs, units) of bools or 0 and 1 says which edges there are: a weight without one is exactly 0 and stays
    so under every optimizer. It is saved with the model. With `max_norm` c, every update leaves the weights into a
    unit, a column, no longer than c: w *= min(1, c / ‖w‖) (Srivastava et al., "Dropout: A Simple Way to Prevent Neural
    Networks from Overfitting"); weights that were drawn or loaded are as they are until then.
    """

    def __init__(
        self, inputs: int, units: int, activation: str = "identity", bias: bool = True, init: Any = None,
        bias_init: Any = "zeros", mask: Any = None, max_norm: float | None = None,
    ) -> None:  # fmt: skip
        fused.activation_row(activation)
        if max_norm is not None:
            _check("Dense", "max_norm", max_norm, lambda v: 0 < v < math.inf, "in (0, inf)")
        self.max_norm = max_norm
        self.inputs = inputs
        self.activation = activation
        self.weight = Parameter(
            (inputs, units), init if init is not None else _DEFAULT_INIT.get(activation, "he_normal")
        )
        self.bias = Parameter((units,), bias_init) if bias else None
        self.mask = None
        if mask is not None:
            self.mask = Parameter(self.weight.shape, _edges(mask, self.weight.shape), trainable=False)

    def forward(self, x: Tensor) -> Tensor:
        return fused.dense(x, self.weight, self.bias, self.activation, self.mask)

    def constrain(self) -> Iterable[Parameter]:
        if self.max_norm is None or not self.weight.stepped:
            return ()
        _constrain(self.weight, CONSTRAINTS["max_norm"], self.max_norm)
        return (self.weight,)

    def settle(self) -> None:
        if self.mask is not None:
            self.weight.backend.write(self.weight.buffer, np.where(self.mask.numpy() == 0, 0, self.weight.numpy()))


def edges(model: Layer) -> dict[Parameter, npt.NDArray[np.bool_]]:
    """Where there is an edge, for each weight of a Dense layer that has a mask."""
    found: dict[Parameter, npt.NDArray[np.bool_]] = {}
    for _, layer in model.named_layers():
        if isinstance(layer, Dense) and layer.mask is not None:
            found[layer.weight] = (layer.mask.numpy() != 0) & found.get(layer.weight, np.True_)
    return found


def _edges(mask: Any, shape: tuple[int, ...]) -> Any:
    """The mask as an initial value; text is an initializer's name, as a saved model has it."""
    if isinstance(mask, str):
        return mask
    edges = np.asarray(mask)
    if edges.shape != shape:
        raise ValueError(f"Dense: mask has shape {edges.shape}, expected {shape}, one element for each weight")
    if not np.isin(edges, (0, 1)).all():
        raise ValueError("Dense: mask has other values than 0 and 1; pass bools, True where there is an edge")
    return edges.astype(np.float64)


def _constrain(p: Parameter, row: Constraint, c: float) -> None:
    back, w = p.backend, p.master
    each, n = empty(back, w.shape, w.dtype), empty(back, w.shape[1:], w.dtype)
    limit = back.asarray(np.array([c], w.dtype))
    measure, value = graph(f"each = {row.measure}"), graph(f"w = {row.value}")
    run(n, lambda: back.elementwise_columns(f"{row.name} columns", measure, {"w": w}, each, n))
    run(w, lambda: back.elementwise(row.name, value, {"w": w, "n": n, "c": limit}, {"w": w}))
    release(each)
    release(n)


def _check(where: str, key: str, value: Any, holds: Callable[[Any], bool], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where}: {key} must be a number, got {type(value).__name__} {value!r}")
    if not holds(value):
        raise ValueError(f"{where}: {key} {value} is not {wanted}")


class Activation(Layer):
    """y = activation(x), elementwise."""

    def __init__(self, activation: str) -> None:
        self.row = fused.activation_row(activation)

    def forward(self, x: Tensor) -> Tensor:
        return ops.unary(x, self.row)


class Dropout(Layer):
    """In training, 0 with probability `rate`, else x / (1 − rate); in inference x
    (Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting")."""

    def __init__(self, rate: float) -> None:
        _check("Dropout", "rate", rate, lambda v: 0 <= v < 1, "in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        mode = current_mode()
        return fused.dropout(x, self.rate, mode.seed, _site(self._path), mode.step) if mode.training else x


def _site(path: str) -> int:
    """What the draws of the layer there are keyed by; the top two bits of a site name the lane of a draw."""
    return zlib.crc32(path.encode()) >> 2


class InputNoise(Layer):
    """In training x + sigma · N(0, 1), drawn anew at each step; in inference x. For a linear model the expected squared
    error is that without noise and sigma² ‖weight‖² per output (Bishop, "Training with Noise is Equivalent to Tikhonov
    Regularization")."""

    def __init__(self, sigma: float) -> None:
        _check("InputNoise", "sigma", sigma, lambda v: 0 <= v < math.inf, "in [0, inf)")
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        mode = current_mode()
        return fused.noise(x, self.sigma, mode.seed, _site(self._path), mode.step) if mode.training else x


class LayerNorm(Layer):
    """gain · (x − mean) / √(var + eps) + bias over each row's columns."""

    def __init__(self, columns: int, eps: float = 1e-5) -> None:
        _check("LayerNorm", "eps", eps, lambda v: v > 0, "positive")
        self.inputs = columns
        self.eps = eps
        self.gain, self.bias = Parameter((columns,), "ones"), Parameter((columns,))

    def forward(self, x: Tensor) -> Tensor:
        return fused.layer_norm(x, self.gain, self.bias, self.eps)


class BatchNorm(Layer):
    """gain · (x − mean) / √(var + eps) + bias per column: batch statistics in training, running ones in inference.

    running += momentum · (batch − running), the running variance unbiased (n − 1). A training batch of one row is an
    error.
    """

    def __init__(self, columns: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        _check("BatchNorm", "momentum", momentum, lambda v: 0 < v <= 1, "in (0, 1]")
        _check("BatchNorm", "eps", eps, lambda v: v > 0, "positive")
        self.inputs = columns
        self.momentum, self.eps = momentum, eps
        self.gain, self.bias = Parameter((columns,), "ones"), Parameter((columns,))
        self.mean = Parameter((columns,), "zeros", trainable=False)
        self.variance = Parameter((columns,), "ones", trainable=False)

    def forward(self, x: Tensor) -> Tensor:
        if not current_mode().training:
            return (x - self.mean) * (self.gain / ops.sqrt(self.variance + self.eps)) + self.bias
        y, mean, variance = fused.batch_norm(x, self.gain, self.bias, self.eps)
        n = x.shape[0]
        self._follow(self.mean, mean, 1.0)
        self._follow(self.variance, variance, n / (n - 1))
        return y

    def _follow(self, running: Parameter, batch: Any, factor: float) -> None:
        """running += momentum · (factor · batch − running)."""
        back, r = running.backend, running.master
        numbers = {"half": self.momentum / 2, "factor": factor, "top": np.finfo(r.dtype).max}
        reads = {"r": r, "batch": batch} | {k: back.asarray(np.array(v, r.dtype)) for k, v in numbers.items()}
        new, what = {"r": graph(RUNNING)["r"]}, "r += momentum · (factor · batch − r)"
        run(r, partial(back.elementwise, "running statistics", new, reads, {"r": r}, what=what))


class Scaler(Layer):
    """y = (x − mean) / scale per column, or with inverse=True y = x · scale + mean; `fit` takes both from data.

    The statistics are saved with the model and not trained; a constant column has scale 1. They and x are of the type
    of the model that the layer is part of; until it is, of `dtype`.
    """

    def __init__(self, columns: int, inverse: bool = False, dtype: npt.DTypeLike = "float32") -> None:
        self.inputs = columns
        self.inverse = inverse
        self.dtype = as_dtype(dtype, "Scaler")
        self.mean = Parameter((columns,), "zeros", trainable=False)
        self.scale = Parameter((columns,), "ones", trainable=False)

    def fit(self, x: Any) -> "Scaler":
        """Take each column's mean and standard deviation from the rows of x, in float64 and part by part, and a
        frame's names.

        A RuntimeWarning names a column of which the layer's type keeps too little, because its numbers are large beside
        their deviation; a ValueError one that the type cannot hold at all.
        """
        names = column_names(x)
        if sorted(names or ()) == sorted(self.feature_names or ()):  # the weights behind it know this order
            names, x = self.feature_names, by_name(x, self.feature_names, "Scaler.fit")
        rows = as_features(x, None, self.inputs, "Scaler.fit")
        dtype, of = np.dtype(self.dtype if self.mean.home is None else self.mean.home.dtype), spread(rows)
        scale = np.where(of.deviation > 0, of.deviation, 1)
        with np.errstate(all="ignore"):
            poor = ~(abs(scale.astype(dtype) / scale - 1) < TOLERATED)
        remedy = "scale x in float64 first, or use gb.Scaler(…, dtype='float64') in a model with dtype='float64'"
        if poor.any():
            what = f"column {int(poor.argmax())} has a standard deviation of {scale[poor][0]:.3g}"
            raise ValueError(f"Scaler.fit: x {what}, which {dtype} cannot hold; {remedy}")
        if dtype == np.float64:
            remedy = "subtract its least number from x first, as an integer"
        if (loss := lost(rows, dtype)) is not None:
            message = f"Scaler.fit: x {loss.phrase()}; {remedy}"
            if math.isinf(loss.error):
                raise ValueError(message)
            warn(message, RuntimeWarning)
        self.mean.init, self.scale.init = of.mean, scale
        self.homes()
        self._draw(0, ["mean", "scale"])
        self.feature_names = names
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.mean if self.inverse else (x - self.mean) / self.scale


class Sequential(Layer):
    """The layers one after another; names count from "0"."""

    def __init__(self, *layers: Layer, dtype: npt.DTypeLike = "float32") -> None:
        where = type(self).__name__
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"{where}: item {i} is {_no_layer(layer)}")
        self.layers = layers
        self.dtype = as_dtype(dtype, where)
        if _kind(self) in (Sequential, Residual):
            _width(self, None, "", {}, where)

    def _members(self) -> list[tuple[str, Layer | Parameter]]:
        """Its layers by position alone, and a subclass's own parameters."""
        own = ((key, p) for key, p in super()._members() if isinstance(p, Parameter))
        return [*own, *((str(i), layer) for i, layer in enumerate(self.layers))]

    def _takers_of_x(self) -> Sequence[Layer]:
        return self.layers[:1]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _no_layer(thing: Any) -> str:
    """What stands where a layer is expected, and what to write instead."""
    name = getattr(thing, "__name__", "")
    if isinstance(thing, list | tuple):
        return f"{type(thing).__name__}; expected a layer: pass them one by one, as Sequential(*layers)"
    if theirs := of_pytorch(thing):
        return f"{theirs}; expected a layer{hint('gb', thing)}"
    if isinstance(thing, type) and issubclass(thing, Layer):
        return f"the class {name}; call it; expected a layer"
    if callable(thing) and name in ACTIVATIONS:
        return f"the function {name}; expected a layer: gb.Activation({name!r})"
    return f"{type(thing).__name__}; expected a layer"


class Residual(Sequential):
    """y = x + layers(x) (He et al., "Deep Residual Learning for Image Recognition")."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.shape != x.shape:
            raise ValueError(
                f"layer {self._path or 'Residual'!r}: x has shape {x.shape} but its branch returns {y.shape}"
            )
        return x + y


class Concatenate(Sequential):
    """y = the branches' outputs side by side, each of the same x; an empty Sequential as a branch passes x on.

    As the first layer it needs a branch that says how many columns x has, as Dense does and others by `inputs`.
    """

    def __init__(self, *branches: Layer, dtype: npt.DTypeLike = "float32") -> None:
        if not branches:
            raise ValueError("Concatenate: at least one branch expected, got none")
        super().__init__(*branches, dtype=dtype)

    def _takers_of_x(self) -> Sequence[Layer]:
        return self.layers

    def forward(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self.layers]
        if any(y.ndim != 2 or y.shape[0] != outputs[0].shape[0] for y in outputs):
            shapes = ", ".join(str(y.shape) for y in outputs)
            raise ValueError(
                f"layer {self._path or 'Concatenate'!r}: its branches return {shapes}; expected (rows, columns) of as "
                "many rows each"
            )
        return concatenate(outputs, axis=1)


KEEPING = (Activation, Dropout, InputNoise, LayerNorm, BatchNorm, Scaler)  # as many columns as come


def _kind(layer: Layer) -> type:
    """The class whose forward the layer has; a subclass with one of its own may do anything."""
    return next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))


def _width(
    layer: Layer, columns: int | None, path: str, seen: dict[tuple[Layer, int | None], int | None], where: str
) -> int | None:
    """Columns of the layer's output for so many of x, None where they are not known; ValueError where a layer is known
    to take another number."""
    if (key := (layer, columns)) in seen:  # one that stands in several places
        return seen[key]
    takes, kind, gives = vars(layer).get("_inputs"), _kind(layer), None
    if columns is not None and takes not in (None, columns):
        got = f"x has {columns} columns but {layer.describe()} expects {takes} columns"
        raise ValueError(f"{where}: layer {path!r}: {got}")
    if isinstance(layer, Dense) and kind is Dense:
        gives = layer.weight.shape[1]
    elif kind in KEEPING:
        gives = columns if columns is not None else takes
    elif isinstance(layer, Sequential) and kind in (Sequential, Residual):
        gives = columns
        for i, inner in enumerate(layer.layers):
            gives = _width(inner, gives, f"{path}.{i}" if path else str(i), seen, where)
    elif isinstance(layer, Concatenate) and kind is Concatenate:
        several = [_width(inner, columns, f"{path}.{i}", seen, where) for i, inner in enumerate(layer.layers)]
        gives = None if None in several else sum(n or 0 for n in several)
    seen[key] = gives
    return gives


@explains_keywords
def mlp(
    sizes: Sequence[int], activation: str = "relu", *, dropout: float = 0.0, dtype: npt.DTypeLike = "float32"
) -> Sequential:
    """Dense layers of these sizes, input first: the activation between them, none after the last; dropout after each
    hidden layer if asked for."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or len(sizes) < 2:
        raise ValueError(f"mlp: a list of at least the input and output size expected, got {sizes!r}")
    fused.activation_row(activation)
    _check("mlp", "dropout", dropout, lambda v: 0 <= v < 1, "in [0, 1)")
    layers: list[Layer] = []
    for i, (inputs, units) in enumerate(pairwise(sizes)):
        hidden = i < len(sizes) - 2
        layers.append(Dense(inputs, units, activation=activation if hidden else "identity"))
        if hidden and dropout:
            layers.append(Dropout(dropout))
    return Sequential(*layers, dtype=dtype)
