"""What scikit-learn's two perceptrons share: parameters, rows at the door, weights as it draws them, raw outputs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, is_regressor
from sklearn.utils import check_array, check_random_state, column_or_1d
from sklearn.utils.validation import check_is_fitted, validate_data

from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Buffer, is_on_device
from gpubackprop.callbacks import Callback
from gpubackprop.checks import choice, flag, number, whole
from gpubackprop.claims import exclusive, using
from gpubackprop.device_data import on_device, taken
from gpubackprop.layers import Dense, mlp
from gpubackprop.precision import precision as precision_named
from gpubackprop.solvers import STOCHASTIC, descend, minimise, undone_on_error

__all__ = ["Perceptron"]

Array = npt.NDArray[Any]
ACTIVATIONS = {"identity": "identity", "logistic": "sigmoid", "tanh": "tanh", "relu": "relu"}  # by scikit-learn's names
CHOICES = {
    "activation": ACTIVATIONS,
    "solver": ("lbfgs", *STOCHASTIC),
    "learning_rate": ("constant", "invscaling", "adaptive"),
}
BOUNDS = {
    "alpha": ">= 0", "learning_rate_init": "> 0", "power_t": ">= 0", "tol": ">= 0", "momentum": "in [0, 1)",
    "validation_fraction": "in [0, 1)", "beta_1": "in [0, 1)", "beta_2": "in [0, 1)", "epsilon": "> 0",
    "dropout": "in [0, 1)",
}  # fmt: skip


class Perceptron(BaseEstimator, ABC):  # type: ignore[misc]
    """Dense layers with scikit-learn's parameters; a subclass says what targets are learnt, and what outputs mean."""

    def __init__(
        self, hidden_layer_sizes: Any = (100,), activation: str = "relu", *, solver: str = "adam",
        alpha: float = 0.0001, batch_size: Any = "auto", learning_rate: str = "constant",
        learning_rate_init: float = 0.001, power_t: float = 0.5, max_iter: int = 200, shuffle: bool = True,
        random_state: Any = None, tol: float = 1e-4, verbose: bool = False, warm_start: bool = False,
        momentum: float = 0.9, nesterovs_momentum: bool = True, early_stopping: bool = False,
        validation_fraction: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-8,
        n_iter_no_change: float = 10, max_fun: int = 15000, device: str = "auto", precision: str | None = None,
        dropout: float = 0.0, callbacks: Sequence[Callback] = (),
    ) -> None:  # fmt: skip
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.power_t = power_t
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change
        self.max_fun = max_fun
        self.device = device
        self.precision = precision
        self.dropout = dropout
        self.callbacks = callbacks

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.target_tags.multi_output = True
        return tags

    # ---- what a subclass says

    @abstractmethod
    def _target(self, y: Array, incremental: bool, classes: Any) -> Array:
        """y as the network learns it: labels (n,), or rows of numbers (n, outputs); of `classes`, if they are named."""

    @abstractmethod
    def _head(self, target: Array) -> tuple[int, str]:
        """The number of outputs, and scikit-learn's name of what is done to them."""

    @abstractmethod
    def _validation_score(self, output: Array, target: Array, weight: Array | None) -> float:
        """The score of raw outputs for such targets, the larger the better."""

    # ---- fitting

    def shared(self) -> list[object]:
        """The objects that threads using the estimator at once share: the estimator."""
        return [self]

    @exclusive
    def __getstate__(self) -> Any:
        return super().__getstate__()

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train on X (n, features) and y (n,) or (n, outputs); returns the estimator.

        X is an array, a frame, a sparse matrix (which is made dense), or a CuPy array, which stays where it is, and y
        lies there too. `sample_weight` (n,) makes every mean over rows a weighted one.
        """
        return self._fit(X, y, sample_weight)

    def _fit(self, X: Any, y: Any, sample_weight: Any, incremental: bool = False, classes: Any = None) -> Any:
        with using("partial_fit" if incremental else "fit", self.shared(), training=True):
            self._fit_alone(X, y, sample_weight, incremental, classes)
        return self

    def _fit_alone(self, X: Any, y: Any, sample_weight: Any, incremental: bool, classes: Any) -> None:
        first = not hasattr(self, "model_") or not (self.warm_start or incremental)
        with undone_on_error(self, continuing=not first):
            self._check_parameters()
            x, y = self._data(X, y, first)
            target, weight = self._target(y, incremental, classes), _weight(sample_weight, len(x))
            random = check_random_state(self.random_state)
            if first:
                self._begin(x, target, random)
            else:
                self._check_unchanged()
            if self.solver == "lbfgs":
                minimise(self, x, target, weight, random)
            else:
                descend(self, x, target, weight, random, incremental)

    def _check_parameters(self) -> None:
        where = type(self).__name__
        for key, known in CHOICES.items():
            choice(where, key, getattr(self, key), known)
        for key, bounds in BOUNDS.items():
            number(where, key, getattr(self, key), bounds)
        for key in ("shuffle", "warm_start", "nesterovs_momentum", "early_stopping"):
            flag(where, key, getattr(self, key))
        for key in ("max_iter", "max_fun"):
            whole(where, key, getattr(self, key))
        if self.n_iter_no_change != math.inf:
            whole(where, "n_iter_no_change", self.n_iter_no_change)
        if self.batch_size != "auto":
            whole(where, "batch_size", self.batch_size)
        for size in self._hidden:
            whole(where, "hidden_layer_sizes", size)
        if not isinstance(self.callbacks, Sequence):
            got = type(self.callbacks).__name__
            raise TypeError(f"{where}: callbacks must be a list of functions of the trainer, got {got}")
        if self.solver == "lbfgs" and self.dropout:
            raise ValueError(f"{where}: lbfgs compares the losses of steps, which dropout draws anew; use sgd or adam")
        if self.precision is not None:
            precision_named(self.precision)
        get_backend(self.device)  # what cannot be had is an error before anything is fitted

    def _check_unchanged(self) -> None:
        """Raise if a parameter that makes the network is not the one it was made with."""
        for key, value in self._made_with.items():
            if self._making()[key] != value:
                raise ValueError(f"fit: {key} was {value!r} when the network was made and is {self._making()[key]!r} "
                                 "now; fit anew, without warm_start or partial_fit")  # fmt: skip

    def _making(self) -> dict[str, Any]:
        sizes = tuple(int(n) for n in self._hidden)
        return {"hidden_layer_sizes": sizes, "activation": self.activation, "dropout": self.dropout}

    @property
    def _hidden(self) -> list[Any]:
        sizes = self.hidden_layer_sizes
        return list(sizes) if hasattr(sizes, "__iter__") else [sizes]

    def _begin(self, x: Buffer, target: Array, random: np.random.RandomState) -> None:
        """A network that has learnt nothing, with weights as scikit-learn draws them (Glorot & Bengio, "Understanding
        the difficulty of training deep feedforward neural networks")."""
        self.n_outputs_, self.out_activation_ = self._head(target)
        self._made_with = self._making()
        sizes = [int(n) for n in (x.shape[1], *self._hidden, self.n_outputs_)]
        self.n_layers_, self.n_iter_, self.t_ = len(sizes), 0, 0
        narrow = x.dtype == np.float32 and self.solver != "lbfgs"  # whose line search needs the digits
        master = precision_named(self.precision or ("float32" if narrow else "float64")).master
        self.model_ = mlp(sizes, ACTIVATIONS[self.activation], dropout=self.dropout, dtype=master)
        for layer, fans in zip(self._dense, pairwise(sizes), strict=True):
            bound = np.sqrt((2.0 if self.activation == "logistic" else 6.0) / sum(fans))
            for p in (layer.weight, layer.bias):
                p.value, p.settled = random.uniform(-bound, bound, p.shape), True

    # ---- the network

    @property
    def _dense(self) -> list[Any]:
        return [layer for layer in self.model_.layers if isinstance(layer, Dense)]

    @property
    def coefs_(self) -> tuple[Array, ...]:
        """The weight matrix (inputs, units) of each layer, as copies; assigning a list of such changes the network."""
        check_is_fitted(self)
        return tuple(_frozen(layer.weight.numpy()) for layer in self._dense)

    @coefs_.setter
    def coefs_(self, values: Sequence[Any]) -> None:
        self._assign("coefs_", "weight", values)

    @property
    def intercepts_(self) -> tuple[Array, ...]:
        """The bias (units,) of each layer, as copies; assigning a list of such changes the network."""
        check_is_fitted(self)
        return tuple(_frozen(layer.bias.numpy()) for layer in self._dense)

    @intercepts_.setter
    def intercepts_(self, values: Sequence[Any]) -> None:
        self._assign("intercepts_", "bias", values)

    def _assign(self, attribute: str, name: str, values: Sequence[Any]) -> None:
        check_is_fitted(self)
        state = self.model_.state_dict()
        keys = [key for key in state if key.endswith(name)]
        if len(values) != len(keys):
            raise ValueError(f"{attribute}: got {len(values)} arrays, expected {len(keys)}, one for each layer")
        self.model_.load_state_dict(state | dict(zip(keys, values, strict=True)))

    def _output(self, X: Any) -> Array:
        """The network's raw output (n, n_outputs_) for checked rows, on the host: as exact as X or the network."""
        check_is_fitted(self)
        if is_on_device(X):
            out: Array = self.model_.backend.to_numpy(self.model_.predict(X))
            return out
        X = _dense_rows(validate_data(self, X, accept_sparse="csr", dtype=(np.float64, np.float32), reset=False))
        out = self.model_.predict(X)
        return out.astype(np.result_type(out.dtype, X.dtype), copy=False)

    def _beside(self, X: Any, result: Array) -> Any:
        """The result where X lies; text stays on the host."""
        return self.model_.backend.asarray(result) if is_on_device(X) and result.dtype.kind in "biuf" else result

    # ---- arrays at the door

    def _data(self, X: Any, y: Any, reset: bool) -> tuple[Buffer, Array]:
        """X as rows of float32 or float64, where they lie, and y on the host, (n,) or (n, outputs)."""
        if is_on_device(X):
            backend = get_backend(self.device)
            dtype = np.float32 if str(X.dtype).endswith("float32") else np.float64  # also a torch.float32
            X = on_device(X, backend, dtype, None if reset else self.model_.inputs, "fit", "X")
            y = check_array(self._on_host(y), ensure_2d=False, dtype=None, input_name="y")
            self.n_features_in_ = X.shape[1]
        else:
            X, y = validate_data(
                self, X, y, accept_sparse="csr", multi_output=True, y_numeric=is_regressor(self),
                dtype=(np.float64, np.float32), reset=reset,
            )  # fmt: skip
        X, y = _dense_rows(X), _dense_rows(y)
        return X, column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y

    def _on_host(self, a: Any) -> Any:
        if not is_on_device(a):
            return a
        backend = get_backend(self.device)
        return backend.to_numpy(taken(a, backend, type(self).__name__, "the array"))


def _dense_rows(a: Any) -> Any:
    return a.toarray() if issparse(a) else a


def _weight(sample_weight: Any, rows: int) -> Array | None:
    """The weights as numbers (rows,), not all of them 0."""
    if sample_weight is None:
        return None
    if np.isscalar(sample_weight):
        sample_weight = np.full(rows, sample_weight)
    weight: Array = check_array(sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight")
    if weight.shape != (rows,):
        raise ValueError(f"fit: sample_weight has shape {weight.shape}, expected ({rows},), one weight for each row")
    if not weight.any():
        raise ValueError("fit: sample_weight is zero for every row; pass at least one weight above zero")
    return weight


def _frozen(a: Array) -> Array:
    a.flags.writeable = False
    return a
