"""Two fits of three epochs are one of six, bit for bit."""

import pytest

import gpubackprop as gb


@pytest.mark.parametrize("optimizer, accumulate", [
    ("sgd", 1), ("adam", 3), (gb.SGD(0.1, momentum=0.9, nesterov="lookahead"), 3), (gb.LBFGS(), 1),
])  # fmt: skip
def test_a_second_fit_goes_on_as_one_long_fit(optimizer, accumulate, rng):
    x, y = rng.normal(size=(50, 3)), rng.integers(0, 2, 50)
    fits = {}
    for epochs in ([6], [3, 3], [1, 2, 3]):
        trainer = gb.Trainer(gb.mlp([3, 5, 2], dropout=0.0), optimizer=optimizer, seed=0, accumulate=accumulate)
        for n in epochs:
            trainer.fit(x, y, epochs=n, batch_size=8)
        fits[len(epochs)] = trainer.history["loss"], trainer.model.state_dict()
    for losses, state in fits.values():
        assert losses == fits[1][0]
        assert all((state[k] == v).all() for k, v in fits[1][1].items())
