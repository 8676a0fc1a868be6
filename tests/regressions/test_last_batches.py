"""A last batch that a layer refuses is an error before anything is trained, and names a batch size that works."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpubackprop as gb


class Pairs(gb.Layer):
    """Takes rows two by two."""

    def forward(self, x):
        if len(x) % 2:
            raise ValueError(f"pairs: {len(x)} rows are no pairs")
        return x


def model():
    return gb.Sequential(gb.Dense(3, 4), gb.BatchNorm(4), gb.Dense(4, 1))


def data(n):
    x = np.random.default_rng(n).normal(size=(n, 3))
    return x, x.sum(1)


def named(error):
    return int(re.search(r"batch_size=(\d+) leaves no such batch", str(error.value))[1])


@pytest.mark.parametrize("how", [{}, {"accumulate": 3}], ids=str)
@settings(deadline=None, max_examples=15)
@given(st.integers(2, 40), st.integers(1, 4))
def test_one_row_left_over_is_refused_with_a_size_that_works(how, batch_size, batches):
    n = batches * batch_size + 1
    t = gb.Trainer(model(), "mse", seed=0, **how)
    before = t.model.state_dict()
    with pytest.raises(ValueError, match=rf"^fit: the last batch has 1 row, as {n} = {batches} · {batch_size} \+ 1: "
                       "batch_norm: .*; batch_size=") as error:  # fmt: skip
        t.fit(*data(n), epochs=1, batch_size=batch_size, validation_data=data(5))
    assert t.history == {} and all((t.model.state_dict()[k] == v).all() for k, v in before.items())
    t.fit(*data(n), epochs=1, batch_size=named(error))
    assert t.epoch == 1


def test_a_layer_of_ones_own_may_refuse_other_sizes():
    t = gb.Trainer(gb.Sequential(gb.Dense(3, 4), Pairs(), gb.Dense(4, 1)), "mse", seed=0)
    with pytest.raises(ValueError, match=r"^pairs: 21 rows are no pairs"):
        t.fit(*data(24), epochs=1, batch_size=21)
    with pytest.raises(ValueError, match=r"the last batch has 1 row, as 25 = 3 · 8 \+ 1: pairs: 1 rows are no pairs$"):
        t.fit(*data(25), epochs=1, batch_size=8)  # no size would do


def test_a_learning_curve_is_refused_before_its_first_fit():
    made = []

    def make():
        made.append(gb.Trainer(model(), "mse", seed=0))
        return made[-1]

    with pytest.raises(ValueError, match=r"^fit: the last batch has 1 row, as 33 = 2 · 16 \+ 1: batch_norm"):
        gb.learning_curve(make, *data(60), (16, 33), test=10, epochs=1, batch_size=16)
    assert [t.epoch for t in made] == [0]
    assert gb.learning_curve(make, *data(60), (16, 34), test=10, epochs=1, batch_size=16)["rows"] == [16, 34]


def test_folds_and_range_tests():
    x, y = data(22)
    for train, _ in gb.KFold(2).split(x):
        with pytest.raises(ValueError, match=r"the last batch has 1 row, as 11 = 1 · 10 \+ 1"):
            gb.Trainer(model(), "mse", seed=0).fit(x[train], y[train], epochs=1, batch_size=10)
    assert len(gb.lr_range_test(gb.Trainer(model(), "mse", seed=0), *data(21), batch_size=10, updates=4).lr) == 4


def test_batches_that_divide_and_searches_of_all_rows_are_no_concern():
    for optimizer in ("adam", gb.LBFGS()):
        t = gb.Trainer(model(), "mse", optimizer, seed=0)
        t.fit(*data(32 if optimizer == "adam" else 33), epochs=1, batch_size=16)
        assert t.epoch == 1
