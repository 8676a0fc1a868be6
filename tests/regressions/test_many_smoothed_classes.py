"""Smoothed labels take memory for the rows of a batch, never for classes × classes."""

import tracemalloc

import numpy as np
import pytest

import gpubackprop as gb

CLASSES, ROWS = 20_000, 20


def smooth_rows(labels, share, classes):
    rows = np.full((len(labels), classes), share / classes)
    rows[np.arange(len(labels)), labels] += 1 - share
    return rows


@pytest.mark.parametrize("host", ["cpu", "cpu:reference"])
def test_smoothed_labels_of_many_classes_take_little_memory(host):
    x, y = np.ones((ROWS, 4)), np.arange(ROWS)
    trainer = gb.Trainer(gb.mlp([4, 8, CLASSES]), label_smoothing=0.1, device=host, seed=0)
    tracemalloc.start()
    try:
        trainer.fit(x, y, epochs=1, batch_size=10)
        trainer.plan(10)
        loss = trainer.evaluate(x, y)["loss"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * ROWS * CLASSES * 4  # 160 MB; classes × classes would be 1.6 GB
    z = trainer.predict(x).astype(np.float64)
    log_softmax = z - np.log(np.exp(z).sum(1, keepdims=True))
    assert loss == pytest.approx(-(smooth_rows(y, 0.1, CLASSES) * log_softmax).sum(1).mean(), rel=1e-6)


@pytest.mark.parametrize("device, precision", [
    ("cpu", "float32"), ("cpu:reference", "float32"), ("cpu", "bfloat16"), ("cuda", "bfloat16"),
])  # fmt: skip
def test_smoothed_labels_train_and_count_as_their_rows(device, precision, request, rng):
    if device == "cuda":
        request.getfixturevalue("cuda")
    x, y, share = rng.normal(size=(12, 3)), rng.integers(0, 300, 12), np.float32(0.25)
    runs = []
    for smoothing, target in ((share, y), (0, smooth_rows(y, 0.25, 300))):
        trainer = gb.Trainer(gb.mlp([3, 300]), "cross_entropy", gb.SGD(0.1), device=device, precision=precision,
                             seed=0, label_smoothing=smoothing)  # fmt: skip
        history = trainer.fit(x, target, epochs=2, batch_size=5, sample_weight=np.arange(12.0))
        runs.append((history["loss"], trainer.evaluate(x, target)["loss"], trainer.model.state_dict()["0.weight"]))
        if target.ndim == 1:
            assert trainer.evaluate(x, y)["accuracy"] == (trainer.predict(x).argmax(1) == y).mean()
    for a, b in zip(*runs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
