"""scikit-learn's MLPClassifier and MLPRegressor."""

import warnings
from functools import partial
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor

from ..cases import Import, Predict, Shell, Train
from . import Prepared, ends, epochs, repeated
from .processes import DIGITS, script

ACTIVATIONS = {"relu": "relu", "tanh": "tanh"}


def _model(case: Train) -> Any:
    """A model that starts from the case's weights."""
    kind = MLPClassifier if case.classifies else MLPRegressor
    queue = case.weights()

    class Started(kind):  # type: ignore[misc, valid-type]
        def _init_coef(self, fan_in: int, fan_out: int, dtype: Any) -> Any:
            w, b = queue.pop(0)
            assert w.shape == (fan_in, fan_out)
            return w.astype(dtype), b.astype(dtype)

    return Started(hidden_layer_sizes=case.sizes[1:-1], activation=ACTIVATIONS[case.activation], alpha=0,
                   batch_size=case.batch, random_state=0)  # fmt: skip


def _epoch(model: Any, case: Train, x: Any, y: Any, shuffle: bool) -> float:
    """One epoch; its mean loss as other libraries give it (squared errors are halved here)."""
    model.shuffle = shuffle
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if case.classifies:
            model.partial_fit(x, y, classes=np.arange(case.sizes[-1]))
            return float(model.loss_)
        model.partial_fit(x, y)
        return 2 * float(model.loss_)


def train(case: Train, variant: str) -> Prepared | None:
    if case.activation not in ACTIVATIONS or (case.classifies and case.sizes[-1] < 3):
        return None
    return epochs(case, lambda: partial(_epoch, _model(case), case), np.asarray)


def predict(case: Predict, variant: str) -> Prepared:
    few, x = Train(case.sizes, 8), case.x()
    model = _model(few)
    _epoch(model, few, *few.data(1), False)  # which makes its arrays
    model.coefs_, model.intercepts_ = (list(a) for a in zip(*case.weights(), strict=True))
    model.out_activation_ = "identity"  # logits, as elsewhere
    return repeated(lambda: model._forward_pass_fast(x), case.calls, lambda: ends(model._forward_pass_fast(x)))


def start(case: Import, variant: str) -> Prepared:
    return script("from sklearn.neural_network import MLPClassifier")


def shell(case: Shell, variant: str) -> Prepared:
    return script(f"""
{DIGITS}
import warnings
from sklearn.neural_network import MLPClassifier
warnings.simplefilter("ignore")
model = MLPClassifier({case.sizes[1:-1]}, batch_size={case.batch}, max_iter={case.epochs}, alpha=0, random_state=0)
assert model.fit(x, y).score(x, y) > 0.98
""")
