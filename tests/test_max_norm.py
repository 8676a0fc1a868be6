"""Weights bounded after every update: columns no longer than max_norm, and what layers of one's own ask for."""

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.formulas import parse
from gpubackprop.plan import run

C = 0.5
OTHERS = ["cpu:reference", "cuda"]
OPTIMIZERS = {
    "sgd": gb.SGD(lr=0.5), "momentum": gb.SGD(lr=0.2, momentum=0.9),
    "lookahead": gb.SGD(lr=0.2, momentum=0.9, nesterov="lookahead"), "adam": gb.Adam(lr=0.05),
}  # fmt: skip


@pytest.fixture
def data(rng):
    return rng.normal(size=(60, 6)), rng.integers(0, 3, 60)


def network(c=C, dtype="float64"):
    return gb.Sequential(
        gb.Dense(6, 8, "tanh", max_norm=c), gb.Dense(8, 3, bias=False, max_norm=c), dtype=dtype
    ).initialize(1)


def trained(data, c=C, device="cpu", optimizer="sgd", epochs=1, dtype="float64", **options):
    trainer = gb.Trainer(network(c, dtype), optimizer=OPTIMIZERS[optimizer], device=device, seed=0, **options)
    trainer.fit(*data, epochs=epochs, batch_size=25)
    return trainer


def norms(trainer):
    state = trainer.model.state_dict()
    return np.concatenate([np.linalg.norm(w.astype("d"), axis=0) for k, w in state.items() if k.endswith("weight")])


@pytest.mark.parametrize("optimizer, device", [*((o, "cpu") for o in OPTIMIZERS), *(("adam", d) for d in OTHERS)])
def test_no_column_is_longer_after_any_epoch(optimizer, device, data, cuda):
    trainer, touched = trained(data, device=device, optimizer=optimizer), 0
    for _ in range(3):
        assert norms(trainer).max() <= C * (1 + 4e-16)
        touched += np.count_nonzero(norms(trainer) >= C * (1 - 4e-16))
        trainer.fit(*data, epochs=1, batch_size=25)
    assert touched > 3


def test_a_step_is_the_optimizers_and_then_the_formula(data):
    model = network()
    before = model.state_dict()
    trainer = gb.Trainer(model, optimizer=gb.SGD(lr=0.5), seed=0)
    trainer.fit(*data, epochs=1, batch_size=60, shuffle=False)
    arena = model.arena
    for key, p in arena.parameters.items():
        stepped = before[key] - 0.5 * arena.slice(arena.gradients, key)
        if stepped.ndim == 2:
            lengths = np.linalg.norm(stepped, axis=0)
            assert (lengths > C).any()
            stepped *= np.minimum(1, C / lengths)
        np.testing.assert_allclose(p.numpy(), stepped, rtol=1e-14)


def test_the_first_gradient_is_that_without(data):
    """Weights that were drawn longer are used as they are; the update bounds them."""
    free, bound = (trained((data[0][:20], data[1][:20]), c) for c in (None, C))
    np.testing.assert_array_equal(free.model.arena.gradients, bound.model.arena.gradients)
    assert norms(free).max() > 2 * C and np.linalg.norm(network().state_dict()["0.weight"], axis=0).max() > 2 * C


@pytest.mark.parametrize("device, precision", [("cpu", "float32"), ("cuda", "float16")])
def test_a_bound_that_is_far_changes_no_bit(precision, device, data, cuda):
    free, bound = (
        trained(data, c, device, "adam", dtype="float32", precision=precision).model.state_dict() for c in (None, 1e3)
    )
    assert all(free[k].tobytes() == bound[k].tobytes() for k in free)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_copy_in_half_precision_follows(device, data, cuda):
    trainer = trained(data, device=device, optimizer="adam", epochs=2, dtype="float32", precision="float16")
    arena = trainer.model.arena
    weights, copy = (arena.backend.to_numpy(b) for b in (arena.weights, arena.copy_in(np.float16)))
    np.testing.assert_array_equal(copy, weights.astype(np.float16))
    assert C * (1 - 1e-6) < norms(trainer).max() <= C * (1 + 1e-6)


def test_the_plan_bounds_after_the_update(data):
    plan = trained(data, dtype="float32", precision="bfloat16").plan(25)
    names = [(launch.layer, launch.name) for launch in plan.sections["update"]]
    bounded = [(key, name) for key in "01" for name in ("max_norm columns", "max_norm", "copy")]
    assert names[-7:] == [("", "sgd"), *bounded]


def test_a_saved_model_keeps_its_bound(data, tmp_path):
    model = trained(data).model
    gb.save_model(model, tmp_path / "m.safetensors")
    again = gb.load_model(tmp_path / "m.safetensors")
    assert [layer.max_norm for layer in again.layers] == [C, C] and "max_norm=0.5" in str(again)
    trainer = gb.Trainer(again, optimizer=OPTIMIZERS["sgd"], seed=0)
    trainer.fit(*data, epochs=1)
    assert norms(trainer).max() <= C * (1 + 4e-16)


def test_a_shared_layer_is_bounded_once_and_a_frozen_one_never(data):
    shared, frozen = gb.Dense(6, 6, max_norm=C), gb.Dense(6, 3, max_norm=C)
    frozen.weight.requires_grad = False
    model = gb.Sequential(shared, shared, frozen, dtype="float64").initialize(0)
    before = model.state_dict()["2.weight"]
    trainer = gb.Trainer(model, optimizer="sgd", seed=0)
    trainer.fit(*data, epochs=1)
    assert [launch.name for launch in trainer.plan(32).sections["update"]].count("max_norm") == 1
    np.testing.assert_array_equal(model.state_dict()["2.weight"], before)


def test_lbfgs_knows_no_bounds(data):
    trainer = gb.Trainer(network(), optimizer=gb.LBFGS(), seed=0)
    before = trainer.model.state_dict()
    with pytest.raises(ValueError, match="LBFGS searches without bounds, but layer '0' has them; leave out max_norm"):
        trainer.fit(*data, epochs=1)
    assert all((before[k] == w).all() for k, w in trainer.model.state_dict().items())


class Floored(gb.Dense):
    """Weights that are ½ at least."""

    def constrain(self):
        w = self.weight.master
        what = parse("w = maximum(w, 0.5)")
        run(w, lambda: self.weight.backend.elementwise("floor", what, {"w": w}, {"w": w}))
        return (self.weight,)


@pytest.mark.parametrize("device, precision", [("cpu", "float32"), ("cuda", "float16")])
def test_a_layer_of_ones_own_may_bound_its_weights(device, precision, data, cuda):
    model = gb.Sequential(Floored(6, 3)).initialize(0)
    trainer = gb.Trainer(model, optimizer=OPTIMIZERS["adam"], device=device, precision=precision, seed=0)
    trainer.fit(*data, epochs=5)
    w = model.state_dict()["0.weight"]
    assert w.min() == 0.5 and w.max() > 0.5
