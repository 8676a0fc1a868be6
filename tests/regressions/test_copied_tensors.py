"""Tensors are copied and pickled as their values; what has a graph beneath it says so."""

import copy
import pickle

import numpy as np
import pytest

import gpubackprop as gb

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda t: pickle.loads(pickle.dumps(t))}


class Shifted(gb.Layer):
    def __init__(self):
        self.inputs, self.w, self.shift = 3, gb.Parameter((3,), "ones"), gb.tensor(np.ones(3, "f"))

    def forward(self, x):
        return x * self.w + self.shift


@pytest.mark.parametrize("how", COPIES)
def test_a_tensor_comes_back(how):
    for t in (gb.tensor([1.0, 2.0], requires_grad=True), gb.tensor(np.float32(3)), gb.tensor([1.0, 3.0]) > 2):
        again = COPIES[how](t)
        assert again is not t and (again.dtype, again.device) == (t.dtype, t.device)
        assert (again.requires_grad, again.boolean) == (t.requires_grad, t.boolean)
        np.testing.assert_array_equal(again.numpy(), t.numpy())


@pytest.mark.parametrize("how", COPIES)
def test_a_result_with_a_graph_names_detach(how):
    with pytest.raises(TypeError, match=r"use \.detach\(\)"):
        COPIES[how](gb.tensor([1.0], requires_grad=True) * 2)


@pytest.mark.parametrize("how", COPIES)
def test_a_layer_that_keeps_a_tensor_is_copied_and_looked_into(how, rng):
    x, y = rng.normal(size=(12, 3)), rng.normal(size=12)
    trainer = gb.Trainer(gb.Sequential(Shifted(), gb.Dense(3, 1)), "mse", seed=0)
    trainer.fit(x, y, epochs=1)
    np.testing.assert_array_equal(COPIES[how](trainer).predict(x), trainer.predict(x))
    assert gb.find_nan(trainer, x, y) is None


def test_masks_are_combined_as_in_numpy():
    a = np.arange(5.0)
    t = gb.tensor(a)
    for mask, expected in (
        ((t > 1) & (t < 4), (a > 1) & (a < 4)),
        ((t < 1) | (a > 3), (a < 1) | (a > 3)),
        (~(t > 1), ~(a > 1)),
    ):
        np.testing.assert_array_equal(mask.numpy(), expected)
        np.testing.assert_array_equal(t[mask].numpy(), a[expected])
    with pytest.raises(TypeError, match="a mask such as x > 0"):
        _ = ~t
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = t & t
