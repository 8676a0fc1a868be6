"""The data sets that ship with the package: real, small, and read afresh by each call."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpubackprop.names import unknown

__all__ = ["NAMES", "digits", "load", "regression7"]

_FOLDER = os.path.join(os.path.dirname(__file__), "data")  # pathlib would take 5 ms to import


def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """1,797 handwritten digits: images x (1797, 64), 8×8 pixels in [0, 1], and labels y (1797,), 0 to 9.

    E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
    doi 10.24432/C50P49, CC BY 4.0: the test partition, scaled by 1/16.

    >>> x, y = digits()
    >>> x.shape, x.dtype.name, y[:5].tolist()
    ((1797, 64), 'float32', [0, 1, 2, 3, 4])
    """
    with np.load(os.path.join(_FOLDER, "digits.npz")) as file:
        return file["x"] / np.float32(16), file["y"].astype(np.int64)


def regression7() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seven points x (7, 1), y (7,), of ml4a's chapter "How neural networks are trained".

    The least-squares line is 0.335593220339 x + 0.804721549637, its mean squared error 0.018051885161.

    >>> x, y = regression7()
    >>> np.polyfit(x.ravel(), y, 1).round(6).tolist()
    [0.335593, 0.804722]
    """
    x = np.array([2.4, 2.8, 3.2, 3.6, 4.0, 4.2, 5.0])
    return x.reshape(-1, 1), np.array([1.7, 1.85, 1.79, 1.95, 2.1, 2.0, 2.7])


NAMES: dict[str, Callable[[], tuple[NDArray[Any], NDArray[Any]]]] = {
    "digits": digits,
    "regression7": regression7,
}


def load(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """The bundled set of that name, (x, y); NAMES lists them."""
    if name not in NAMES:
        raise ValueError(unknown("data set", name, NAMES))
    return NAMES[name]()
