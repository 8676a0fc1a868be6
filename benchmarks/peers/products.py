"""The floor: a case's matrix products alone, through matmul with out=, over buffers that are kept."""

from itertools import pairwise
from typing import Any

import numpy as np

from gpubackprop.backends import get_backend

from ..cases import ROWS, Predict, Train
from . import Prepared, repeated

Product = tuple[Any, Any, Any]


def _prepared(products: list[Product], times: int, device: str) -> Prepared:
    backend = get_backend(device)
    matmul = backend.xp.matmul

    def call() -> None:
        for left, right, out in products:
            matmul(left, right, out=out)

    return repeated(call, times, list, backend.synchronize)


def train(case: Train, device: str) -> Prepared:
    back, products = get_backend(device), list[Product]()
    x = back.asarray(case.data(1)[0])
    for i, (w, _) in enumerate(case.weights()):
        w = back.asarray(w)
        y, dw, dx = (back.asarray(np.ones(s, np.float32)) for s in ((case.batch, w.shape[1]), w.shape, x.shape))
        products += [(x, w, y), (x.T, y, dw)] + [(y, w.T, dx)] * (i > 0)
        x = y
    return _prepared(products, case.steps * case.epochs, device)


def predict(case: Predict, device: str) -> Prepared:
    """In stretches of rows whose activations stay in the cache."""
    back, products, x = get_backend(device), list[Product](), case.x()
    weights = [back.asarray(w) for w, _ in case.weights()]
    rows = min(ROWS, case.rows)
    hidden = [back.empty((rows, units), np.float32) for _, units in pairwise(case.sizes)]
    for start in range(0, case.rows, rows):
        part = back.asarray(x[start : start + rows])
        for left, w, out in zip((part, *(h[: len(part)] for h in hidden)), weights, hidden, strict=False):
            products.append((left, w, out[: len(part)]))
    return _prepared(products, case.calls, device)
