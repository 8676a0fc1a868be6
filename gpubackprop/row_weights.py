"""How much each row counts in the loss: sample weights and class weights at the door, and what batches weigh."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.data import as_weights, check_same_length
from gpubackprop.losses import Objective

__all__ = ["inverse", "row_weights", "weight_of_batches"]

Array = npt.NDArray[Any]
LARGEST = 1e30  # of a weight: times losses, or the inverse times the scale of the loss, it stays in float32


def row_weights(
    objective: Objective, y: Array, outputs: int, sample_weight: Any, class_weight: Any, where: str
) -> npt.NDArray[np.float64] | None:
    """The weights (n,) of the rows whose checked targets are y; None if nothing is weighed."""
    if sample_weight is None and class_weight is None:
        return None
    if objective.own:
        raise ValueError(
            f"{where}: the loss {objective.name!r} is a function that returns the mean over a batch, which cannot be "
            "weighted afterwards; use a loss by name"
        )
    w = np.ones(len(y))
    if sample_weight is not None:
        w = as_weights(sample_weight, where)
        check_same_length(y, w, where, "sample_weight")
    if class_weight is not None:
        labels, classes = _labels(objective, y, outputs, where)
        with np.errstate(over="ignore"):
            w = w * _of_classes(class_weight, labels, classes, where)[labels]
    if not w.any():
        raise ValueError(f"{where}: the weights of all rows are 0; give a row that counts a weight above 0")
    if not 1 / LARGEST <= (largest := w.max()) <= LARGEST:
        remedy = "scale the weights: a common factor changes nothing"
        raise ValueError(f"{where}: the largest weight is {largest:.3g}, expected 1e-30 to 1e+30; {remedy}")
    return w


def weight_of_batches(w: Array | None, order: Array | None, sizes: Array) -> Array:
    """What the rows of each batch weigh together; `sizes` are the batches' rows, taken in this order (None: as they
    are). Without weights a row weighs 1."""
    if w is None:
        return sizes
    return np.add.reduceat(w if order is None else w[order], np.cumsum(sizes) - sizes, dtype=np.float64)


def inverse(weight: Array) -> npt.NDArray[np.float64]:
    """1 / weight of each batch, which its gradient is multiplied by; 0 where the rows weigh nothing."""
    return np.divide(1, weight, out=np.zeros(len(weight)), where=weight >= 1 / LARGEST)


# ---- classes -------------------------------------------------------------------------------------------------------


def _labels(objective: Objective, y: Array, outputs: int, where: str) -> tuple[Array, int]:
    """The label of each row, and how many classes there are."""
    if objective.classes and y.ndim == 1:
        return y, outputs
    if objective.name == "bce" and outputs == 1 and np.isin(y, (0, 1)).all():
        return y[:, 0].astype(np.int64), 2
    what = "the loss is " + objective.name
    if objective.classes:
        what = "y holds rows of class weights"
    elif objective.name == "bce":
        what = f"the model has {outputs} outputs" if outputs > 1 else "y has values between 0 and 1"
    raise ValueError(
        f"{where}: class_weight goes by the label of a row, but {what}; use sample_weight, or labels with "
        "cross_entropy, or 0 and 1 with bce and one output"
    )


def _of_classes(given: Any, labels: Array, classes: int, where: str) -> npt.NDArray[np.float64]:
    """The weight of each class."""
    if isinstance(given, Mapping):
        weights = np.ones(classes)
        for label, weight in given.items():
            weights[_class(label, classes, where)] = _weight(label, weight, where)
        return weights
    if not isinstance(given, str):
        got = f"{type(given).__name__} {given!r}"
        raise TypeError(f'{where}: class_weight must be "balanced" or a dict {{label: weight}}, got {got}')
    if given != "balanced":
        raise ValueError(f'{where}: unknown class_weight {given!r}; choose "balanced" or a dict {{label: weight}}')
    counts = np.bincount(labels, minlength=classes)
    return len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))


def _class(label: Any, classes: int, where: str) -> int:
    number = float(label) if isinstance(label, Real | np.bool_) else math.nan
    if not (0 <= number < classes and number.is_integer()):
        raise ValueError(f"{where}: class_weight has a class {label!r}, expected labels from 0 to {classes - 1}")
    return int(number)


def _weight(label: Any, weight: Any, where: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, Real):
        got = f"{type(weight).__name__} {weight!r}"
        raise TypeError(f"{where}: class_weight of class {label} must be a number, got {got}")
    if not 0 <= (number := float(weight)) < math.inf:
        raise ValueError(f"{where}: class_weight of class {label} must be finite and at least 0, got {weight}")
    return number
