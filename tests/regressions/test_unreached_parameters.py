"""A parameter that the loss does not depend on has the gradient 0, whatever stood there before."""

import numpy as np
import pytest

import gpubackprop as gb


class Aside(gb.Layer):
    """y = x @ w; a parameter that nothing reads, and one that is read as a constant alone."""

    def __init__(self, loose=True):
        self.weight = gb.Parameter((3, 2), "glorot_uniform")
        self.unused, self.constant = gb.Parameter((5,), "ones"), gb.Parameter((2,), "ones")
        self.loose = loose

    def forward(self, x):
        y = x @ self.weight * self.constant.detach()
        return y if self.loose else y + self.unused.sum() + self.constant


X = np.random.default_rng(0).normal(size=(24, 3))
Y = np.random.default_rng(1).normal(size=(24, 2))
HOW = {
    "plain": {}, "accumulated": {"accumulate": 2}, "16 bits": {"precision": "bfloat16"}, "clipped": {"clip_norm": 0.01},
    "all rows": {"optimizer": gb.LBFGS()},
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cpu:reference", "cuda"])
@pytest.mark.parametrize("how", HOW)
def test_it_stays_where_it_is(how, device, cuda):
    t = gb.Trainer(Aside(), "mse", **{"optimizer": gb.SGD(0.5), "seed": 0, "device": device} | HOW[how])
    before = t.model.state_dict()
    t.model.arena.backend.write(t.model.arena.gradients, 7.0)  # as an earlier backward pass may have left it
    t.fit(X, Y, epochs=2, batch_size=8)
    after = t.model.state_dict()
    for key in ("unused", "constant"):
        np.testing.assert_array_equal(after[key], before[key])
        np.testing.assert_array_equal(t.backend.to_numpy(t.model.arena.slice(t.model.arena.gradients, key)), 0)
    assert (after["weight"] != before["weight"]).all()


def test_it_counts_for_nothing_in_the_norm():
    """Clipped, the step is that of a model without it."""
    ends = []
    for model in (Aside(), gb.Sequential(gb.Dense(3, 2, bias=False))):
        t = gb.Trainer(model, "mse", gb.SGD(0.5), seed=0, clip_norm=0.01)
        key = "weight" if isinstance(model, Aside) else "0.weight"
        model.load_state_dict(model.state_dict() | {key: np.full((3, 2), 0.1)})
        t.fit(X, Y, epochs=2, batch_size=8)
        ends.append(model.state_dict()[key])
    np.testing.assert_allclose(*ends, rtol=1e-6)


def test_what_is_reached_after_all_is_trained_again():
    t = gb.Trainer(Aside(), "mse", gb.SGD(0.5), seed=0)
    t.fit(X, Y, epochs=1, batch_size=8)
    t.model.loose = False
    t.fit(X, Y, epochs=1, batch_size=8)
    assert (t.model.state_dict()["unused"] != 1).all() and (t.model.state_dict()["constant"] != 1).all()
