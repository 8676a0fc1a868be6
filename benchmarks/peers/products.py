"""The floor: a case's matrix products alone, through matmul with out=, over buffers that are kept."""

from itertools import pairwise
from typing import Any

import numpy as np

from gpubackprop.backends import get_backend

from ..cases import ROWS, Predict, Train
from . import Prepared

Product = tuple[Any, Any, Any]


def _prepared(products: list[Product], times: int, device: str, units: int) -> Prepared:
    backend = get_backend(device)
    matmul = backend.xp.matmul

    def run() -> None:
        for _ in range(times):
            for left, right, out in products:
                matmul(left, right, out=out)
        backend.synchronize()

    return Prepared(run, list, units)


def train(case: Train, device: str) -> Prepared:
    back, products = get_backend(device), list[Product]()
    x = back.asarray(case.data(1)[0])
    for i, (w, _) in enumerate(case.weights()):
        w = back.asarray(w)
        y, dw, dx = (back.asarray(np.ones(s, np.float32)) for s in ((case.batch, w.shape[1]), w.shape, x.shape))
        products += [(x, w, y), (x.T, y, dw)] + [(y, w.T, dx)] * (i > 0)
        x = y
    steps = case.steps * case.epochs
    return _prepared(products, steps, device, steps)


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
    return _prepared(products, case.calls, device, case.calls)
