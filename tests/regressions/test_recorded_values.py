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
