"""A warning points at the user's line, however deep in the library it arises."""

import warnings

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.sklearn import MLPClassifier

FAR = np.random.default_rng(0).normal(size=(30, 2)) + 1e9
LABELS = np.arange(30) % 2


def emptied():
    model = gb.mlp([2, 50, 2]).initialize(0)
    state = model.state_dict()
    model.load_state_dict(state | {"1.weight": state["1.weight"] * 1e-6})
    gb.prune(model, 0.5, scope="global")


@pytest.mark.parametrize("call", [
    lambda: gb.Trainer(gb.mlp([2, 2]), seed=0).fit(FAR, LABELS, epochs=1),
    lambda: gb.Trainer(gb.mlp([2, 1]), "mse", seed=0).fit(FAR - 1e9, FAR[:, 0], epochs=1),
    lambda: gb.Trainer(gb.mlp([2, 1]), "mse", seed=0).fit(FAR - 1e9, 1e-30 * FAR[:, 0], epochs=1),
    lambda: gb.Trainer(gb.Sequential(gb.Dense(2, 1, "sigmoid")), "bce", seed=0).fit(FAR - 1e9, LABELS, epochs=1),
    lambda: gb.Scaler(2).fit(FAR),
    lambda: MLPClassifier((2,), max_iter=1, random_state=0).fit(FAR - 1e9, LABELS),
    emptied,
])  # fmt: skip
def test_a_warning_points_at_the_line_that_called_the_library(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    assert seen and {w.filename for w in seen} == {__file__}
