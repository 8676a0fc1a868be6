"""scikit-learn's MLPClassifier and MLPRegressor, trained by this library; needs the extra `sklearn`.

>>> from gpubackprop.sklearn import MLPClassifier
>>> MLPClassifier(random_state=1, max_iter=1000).fit([[0, 0], [0, 1], [1, 0], [1, 1]], [0, 1, 1, 0]).predict([[0, 1]])
array([1])
"""

from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import sklearn  # noqa: F401
except ImportError as error:
    remedy = "pip install 'gpubackprop[sklearn]'"
    raise ImportError(f"gpubackprop.sklearn needs scikit-learn, which is not installed; {remedy}") from error

from collections.abc import Sequence

from scipy.special import expit
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target, unique_labels

from gpubackprop import ops
from gpubackprop.callbacks import Callback
from gpubackprop.checks import choice
from gpubackprop.claims import exclusive
from gpubackprop.perceptron import Perceptron
from gpubackprop.solvers import STOCHASTIC
from gpubackprop.tensor import tensor

__all__ = ["MLPClassifier", "MLPRegressor"]

Array = npt.NDArray[Any]
LABELS = "multilabel-indicator"  # as scikit-learn calls rows of 0 and 1


def _stochastic(estimator: Any) -> bool:
    if estimator.solver not in STOCHASTIC:
        remedy = "use solver='sgd' or 'adam'"
        raise AttributeError(f"partial_fit: the solver {estimator.solver!r} takes all rows at once; {remedy}")
    return True


class MLPClassifier(ClassifierMixin, Perceptron):  # type: ignore[misc]
    """sklearn.neural_network.MLPClassifier with its parameters, attributes and random draws: from the same random_state
    come its losses and weights, but for rounding.

    Beside its parameters: `device` ("auto", "cpu", "cuda", "cuda:N"); `precision` of the Trainer (None: as scikit-learn
    does X's own type, for lbfgs float64; "float32" is faster, on most GPUs by far); the rate of `dropout` after each
    hidden layer; `callbacks`, each called with the trainer after each epoch, to stop if one returns True.

    Beside its attributes: `model_`, the network as a gb.Sequential, and `trainer_`, what it was trained by (None for
    lbfgs). `coefs_` and `intercepts_` are copies that cannot be written to; assign a whole list to change the network.

    It differs where rows of several batches have weights: `loss_` is then their weighted mean over the epoch, by which
    training may end in another one. A sparse X is made dense.

    y holds classes (n,), or for several labels rows of 0 and 1 (n, labels).
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    @available_if(_stochastic)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> "MLPClassifier":
        """One epoch over X and y; the first call must name all the `classes` there will be."""
        self._fit(X, y, sample_weight, incremental=True, classes=classes)
        return self

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of rows whose prediction is right, every label of it; CuPy arrays are copied to the host."""
        return float(super().score(*map(self._on_host, (X, y, sample_weight))))

    def _target(self, y: Array, incremental: bool, classes: Any) -> Array:
        if (kind := type_of_target(y)) not in ("binary", "multiclass", LABELS):
            check_classification_targets(y)  # says what is wrong with the others
            raise ValueError("fit: y has several columns of classes; one column, or columns of 0 and 1, are expected")
        several = kind == LABELS
        found = np.arange(y.shape[1]) if several else np.unique(y)
        if not hasattr(self, "classes_") or not (self.warm_start or incremental):
            self.classes_, self._labels = _named(classes) if incremental else found, several
        else:
            self._check_known(found, several, incremental, classes)
        if len(unknown := np.setdiff1d(found, self.classes_)):
            raise ValueError(f"partial_fit: y has the classes {unknown}, which are not among {self.classes_}")
        if self._labels:
            return y.astype(np.float32)
        codes = np.searchsorted(self.classes_, y)
        return codes if len(self.classes_) > 2 else codes.astype(np.float32).reshape(-1, 1)

    def _check_known(self, found: Array, several: bool, incremental: bool, classes: Any) -> None:
        """Raise if the network was made for other classes, or for rows of labels in place of one class each."""
        if incremental and classes is not None and not np.array_equal(self.classes_, unique_labels(classes)):
            raise ValueError(f"partial_fit: classes {classes} differ from those of the first call, {self.classes_}")
        if several != self._labels:
            now, then = (("one class each", "several labels")[kind] for kind in (several, self._labels))
            raise ValueError(f"fit: the rows of y have {now}, but the network was made for {then}; fit a new estimator")
        if self.warm_start and not (incremental or np.array_equal(found, self.classes_)):
            what = f"y has the classes {found}, but the network was trained on {self.classes_}"
            raise ValueError(f"fit: {what}; with warm_start they must be the same")

    def _names(self, target: Array) -> Array:
        """The user's own labels of targets for one output."""
        return self.classes_.take(target.ravel().astype(np.intp))

    def _head(self, target: Array) -> tuple[int, str]:
        return (target.shape[1], "logistic") if target.ndim == 2 else (len(self.classes_), "softmax")

    def _validation_score(self, output: Array, target: Array, weight: Array | None) -> float:
        right = output.argmax(1) == target if target.ndim == 1 else ((output > 0) == target).all(1)
        return float(np.average(right, weights=weight))

    @exclusive
    def predict(self, X: Any) -> Any:
        """The class of each row (n,), or whether it has each label (n, labels); on the device for a CuPy array."""
        output = self._output(X)
        if self._labels:
            return self._beside(X, (output > 0).astype(np.int64))
        codes = output.argmax(1) if self.out_activation_ == "softmax" else output[:, 0] > 0
        return self._beside(X, self.classes_.take(codes, mode="clip"))  # clip: where there is but one class

    @exclusive
    def predict_proba(self, X: Any) -> Any:
        """The probability of each class (n, classes), in the order of classes_, or of each label (n, labels).

        A network trained on a single class, of however many rows, has one column of ones, where scikit-learn's has two.
        """
        return self._beside(X, self._probabilities(X))

    @exclusive
    def predict_log_proba(self, X: Any) -> Any:
        """The logarithm of predict_proba: −∞ where that rounds to 0."""
        with np.errstate(divide="ignore"):
            return self._beside(X, np.log(self._probabilities(X)))

    def _probabilities(self, X: Any) -> Array:
        output = self._output(X)
        if self.out_activation_ == "softmax":
            found: Array = ops.softmax(tensor(output)).numpy()  # SciPy's has NaN for an infinite output
        elif len(self.classes_) == 1 and not self._labels:
            found = np.ones_like(output)
        else:
            found = expit(output if self._labels else np.hstack([-output, output]))
        return found


def _named(classes: Any) -> Array:
    """The classes that a first partial_fit names."""
    if classes is None:
        raise ValueError("partial_fit: classes must be passed on the first call to partial_fit")
    return np.asarray(unique_labels(classes))


class MLPRegressor(RegressorMixin, Perceptron):  # type: ignore[misc]
    """sklearn.neural_network.MLPRegressor with its parameters, attributes and random draws: from the same random_state
    come its losses and weights, but for rounding. What there is beside them stands at MLPClassifier.

    y holds numbers (n,) or (n, outputs); for loss="poisson" they are not negative, and the network's own output is the
    logarithm of what is predicted.
    """

    def __init__(
        self, loss: str = "squared_error", hidden_layer_sizes: Any = (100,), activation: str = "relu", *,
        solver: str = "adam", alpha: float = 0.0001, batch_size: Any = "auto", learning_rate: str = "constant",
        learning_rate_init: float = 0.001, power_t: float = 0.5, max_iter: int = 200, shuffle: bool = True,
        random_state: Any = None, tol: float = 1e-4, verbose: bool = False, warm_start: bool = False,
        momentum: float = 0.9, nesterovs_momentum: bool = True, early_stopping: bool = False,
        validation_fraction: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-8,
        n_iter_no_change: float = 10, max_fun: int = 15000, device: str = "auto", precision: str | None = None,
        dropout: float = 0.0, callbacks: Sequence[Callback] = (),
    ) -> None:  # fmt: skip
        super().__init__(
            hidden_layer_sizes, activation, solver=solver, alpha=alpha, batch_size=batch_size,
            learning_rate=learning_rate, learning_rate_init=learning_rate_init, power_t=power_t, max_iter=max_iter,
            shuffle=shuffle, random_state=random_state, tol=tol, verbose=verbose, warm_start=warm_start,
            momentum=momentum, nesterovs_momentum=nesterovs_momentum, early_stopping=early_stopping,
            validation_fraction=validation_fraction, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon,
            n_iter_no_change=n_iter_no_change, max_fun=max_fun, device=device, precision=precision, dropout=dropout,
            callbacks=callbacks,
        )  # fmt: skip
        self.loss = loss

    @available_if(_stochastic)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> "MLPRegressor":
        """One epoch over X and y."""
        self._fit(X, y, sample_weight, incremental=True)
        return self

    def _check_parameters(self) -> None:
        choice("MLPRegressor", "loss", self.loss, ("squared_error", "poisson"))
        super()._check_parameters()

    def _target(self, y: Array, incremental: bool, classes: Any) -> Array:
        if self.loss == "poisson" and y.min() < 0:
            raise ValueError(f"fit: y has {y.min():g}, but the loss 'poisson' is of numbers that are not negative")
        return y.reshape(len(y), -1)

    def _head(self, target: Array) -> tuple[int, str]:
        return target.shape[1], "exp" if self.loss == "poisson" else "identity"

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R² of the predictions, its mean over the outputs; CuPy arrays are copied to the host."""
        return float(super().score(*map(self._on_host, (X, y, sample_weight))))

    def _validation_score(self, output: Array, target: Array, weight: Array | None) -> float:
        with np.errstate(over="ignore"):
            return float(r2_score(target, self._mean(output), sample_weight=weight))

    def _mean(self, output: Array) -> Array:
        return np.exp(output) if self.out_activation_ == "exp" else output

    @exclusive
    def predict(self, X: Any) -> Any:
        """The numbers of each row, (n,) or (n, outputs); on the device for a CuPy array."""
        y = self._mean(self._output(X))
        return self._beside(X, y[:, 0] if y.shape[1] == 1 else y)
