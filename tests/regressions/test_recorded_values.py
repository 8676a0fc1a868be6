"""A recorded step depends on its launches alone: no Python value enters it unnoticed."""

import numpy as np
import pytest

import gpubackprop as gb


def huber_by_values(o, t):
    e = gb.abs(o - t)
    return gb.where(e.data < 1, 0.5 * e * e, e - 0.5).mean()


@pytest.mark.parametrize("read", [lambda t: t.data, lambda t: t.numpy(), float, bool, np.asarray], ids=str)
def test_values_of_tensors_are_refused_while_a_plan_records(read):
    def loss(o, t):
        read((o - t).mean())
        return ((o - t) ** 2).mean()

    x = np.ones((4, 1))
    trainer = gb.Trainer(gb.mlp([1, 1]), loss, seed=0)
    with pytest.raises(RuntimeError, match="a tensor's value was asked for while a plan records"):
        trainer.fit(x, x, epochs=1)


def test_a_huber_loss_that_selects_by_data_is_refused_instead_of_frozen(rng):
    x = rng.normal(size=(64, 1))
    trainer = gb.Trainer(gb.mlp([1, 1]), huber_by_values, gb.SGD(0.1), seed=0)
    with pytest.raises(RuntimeError, match=r"use gb\.where"):
        trainer.fit(x, 3 * x, epochs=2, batch_size=64)


class Scaled(gb.Layer):
    def __init__(self, by):
        self.inputs, self.p, self.by = 3, gb.Parameter((3,), "ones"), by

    def forward(self, x):
        return x * self.p * np.asarray(self.by, np.float32)


@pytest.mark.parametrize(
    "before, after", [(np.float32(1), np.float32(5)), ([1.0] * 3, [5.0] * 3), (np.ones(3), 5 * np.ones(3))]
)
def test_predictions_follow_what_a_users_layer_reads(before, after, rng):
    x = rng.normal(size=(8, 3)).astype("f")
    trainer = gb.Trainer(gb.Sequential(layer := Scaled(before)), "mse", seed=0)
    trainer.model.predict(x), trainer.evaluate(x, x)
    layer.by = after
    np.testing.assert_array_equal(trainer.model.predict(x), trainer.model(x).numpy())
    assert trainer.evaluate(x, x)["loss"] == pytest.approx(16 * (x.astype(float) ** 2).mean(), rel=1e-6)


def test_a_loss_that_a_callback_changes_is_refused(rng):
    x, state = rng.normal(size=(64, 3)), {"weight": 1.0}

    def loss(o, t):
        return ((o - t) ** 2).mean() * state["weight"]

    def anneal(_):
        state["weight"] += 1

    trainer = gb.Trainer(gb.mlp([3, 1]), loss, seed=0)
    with pytest.raises(RuntimeError, match="the step depends on Python values"):
        trainer.fit(x, x[:, :1], epochs=3, batch_size=16, callbacks=[anneal])


def test_a_parameter_frozen_in_a_callback_is_refused(rng):
    x, y = rng.normal(size=(12, 3)), rng.integers(0, 2, 12)
    model = gb.mlp([3, 4, 2])

    def freeze(_):
        model.layers[0].weight.requires_grad = False

    with pytest.raises(RuntimeError, match="between fits, not in a callback"):
        gb.Trainer(model, seed=0).fit(x, y, epochs=3, callbacks=[freeze])
