"""A trainer goes on where its model was moved to."""

import pytest

import gpubackprop as gb


@pytest.mark.parametrize("call", [
    lambda t, x, y: t.evaluate(x, y)["loss"],
    lambda t, x, y: t.predict(x).sum(),
    lambda t, x, y: t.fit(x, y, epochs=1)["loss"][-1],
    lambda t, x, y: t.plan(4).flops,
])  # fmt: skip
def test_a_trainer_goes_on_after_its_model_moved(call, rng):
    x, y = rng.normal(size=(12, 3)), rng.integers(0, 2, 12)
    stays, moves = (gb.Trainer(gb.mlp([3, 4, 2]), device="cpu", seed=0) for _ in range(2))
    moves.model.to("cpu:reference")
    assert call(moves, x, y) == pytest.approx(call(stays, x, y), rel=1e-5)
    assert moves.model.backend.device == "cpu:reference"
