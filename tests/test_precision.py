"""Precision: what a step stores and multiplies in, the scale of the loss, skipped steps, clipping."""

import builtins
import pickle
import re
import warnings
from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.backends import get_backend, rows
from gpubackprop.precision import PRECISIONS, precision

STORED = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
x, y = gb.datasets.digits()


def net(seed=0):
    return gb.Sequential(
        gb.Dense(64, 48, "gelu"), gb.BatchNorm(48), gb.LayerNorm(48), gb.Dropout(0.1), gb.Dense(48, 10)
    ).initialize(seed)


def trained(name, optimizer=None, epochs=2, **arguments):
    trainer = gb.Trainer(net(), optimizer=optimizer or gb.Adam(3e-3), seed=0, precision=name, **arguments)
    trainer.fit(x[:640], y[:640], epochs=epochs, batch_size=32)
    return trainer


@pytest.fixture(scope="module")
def reference():
    return trained("float64")


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, close", [("float32", 1e-4), ("tf32", 3e-3), ("float16", 3e-3), ("bfloat16", 2e-2)])
def test_every_precision_trains_as_float64_does(name, close, reference):
    trainer = trained(name)
    assert trainer.history["loss"][-1] == pytest.approx(reference.history["loss"][-1], rel=close)
    assert trainer.model.arena.dtype == trainer.model.arena.gradients.dtype == np.float32
    assert {p.dtype for p in trainer.model.named_parameters().values()} == {np.dtype(np.float32)}


def test_tf32_differs_from_float32_and_costs_what_it_should():
    losses = {name: trained(name, epochs=1).history["loss"][0] for name in ("float32", "tf32")}
    assert 0 < abs(losses["tf32"] / losses["float32"] - 1) < 1e-3


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize(
    "optimizer", [gb.SGD(0.05, momentum=0.9), gb.Adam(3e-3), gb.AdamW(3e-3)], ids=lambda o: o.label
)
def test_the_update_writes_the_copy_too(name, optimizer):
    trainer = trained(name, optimizer, epochs=1)
    arena = trainer.model.arena
    np.testing.assert_array_equal(arena.copy_in(STORED[name]), arena.weights.astype(STORED[name]))


def test_what_a_callback_writes_reaches_the_copy():
    model = gb.mlp([64, 10]).initialize(0)
    trainer = gb.Trainer(model, optimizer=gb.SGD(1e-30), seed=0, precision="bfloat16")

    def zero(trainer):
        model.load_state_dict({k: np.zeros_like(v) for k, v in model.state_dict().items()})

    history = trainer.fit(x, y, epochs=2, batch_size=64, callbacks=[zero])
    assert history["loss"][1] == pytest.approx(np.log(10), rel=1e-6)


def test_activations_are_of_the_compute_type():
    step = gb.Trainer(gb.mlp([64, 32, 10]).initialize(0), precision="float16", seed=0).plan(16)
    forward = next(launch for launch in step.launches if launch.name == "gemm")
    assert {b.dtype for b in (*forward.reads, *forward.writes)} == {np.dtype(np.float16)}
    weight = next(launch for launch in step.launches if launch.what.startswith("dw"))
    assert weight.writes[0].dtype == np.float32 and weight.reads[0].dtype == np.float16


def test_float64_and_float32_convert_the_model():
    model = gb.mlp([4, 3]).initialize(0)
    before = model.state_dict()["0.weight"]
    trainer = gb.Trainer(model, precision="float64", seed=0)
    assert model.arena.dtype == np.float64
    np.testing.assert_array_equal(model.state_dict()["0.weight"], before.astype(np.float64))
    assert gb.Trainer(gb.mlp([4, 3], dtype="float64"), precision="float32").model.arena.dtype == np.float32
    assert trainer.precision is PRECISIONS["float64"]


@pytest.mark.parametrize("name", ["tf32", "float16", "bfloat16"])
def test_a_loss_of_ones_own_is_computed_in_float32(name):
    seen = []

    def loss(output, target):
        seen.append(output.dtype)
        return ((output - target) ** 2).mean()

    t = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    own, named = (
        gb.Trainer(gb.mlp([64, 8, 3]).initialize(0), f, gb.SGD(0.05), [], seed=0, precision=name).fit(
            x[:64], t, epochs=3, batch_size=32
        )
        for f in (loss, "mse")
    )
    assert set(seen) == {np.dtype(np.float32)}
    np.testing.assert_allclose(own["loss"], named["loss"], rtol=2e-3)


# ---- the scale of the loss -----------------------------------------------------------------------------------------


def test_float16_keeps_gradients_that_would_underflow():
    """Of a loss so small that its gradients lie below float16's least number."""

    def tiny(output, target):
        return ((output - target) ** 2).mean() * 1e-6

    t = np.ones((64, 3), np.float32)
    changed = {}
    for name in ("float16", "float32"):
        model = gb.mlp([64, 8, 3]).initialize(0)
        before = model.state_dict()
        trainer = gb.Trainer(model, tiny, gb.SGD(1e3), [], seed=0, precision=name)
        trainer.fit(x[:64], t, epochs=1, batch_size=64)
        changed[name] = model.state_dict()["0.weight"] - before["0.weight"]
    difference = np.linalg.norm(changed["float16"] - changed["float32"])
    assert difference < 1e-2 * np.linalg.norm(changed["float32"])


@pytest.mark.parametrize("optimizer", [gb.SGD(1e-5, momentum=0.9, nesterov="lookahead"), gb.Adam(3e-3)])
def test_a_gradient_that_is_not_finite_skips_its_step_and_halves_the_scale(optimizer):
    """2^16 times this loss overflows float16 until the scale has come down; then training goes on as if nothing was."""

    def large(output, target):
        return ((output - target) ** 2).mean() * 2000

    t = np.full((64, 3), 10, np.float32)
    model = gb.mlp([64, 8, 3]).initialize(0)
    before = model.state_dict()
    trainer = gb.Trainer(model, large, optimizer, [], seed=0, precision="float16")
    scales, weights = [], [before]

    def note(trainer):
        scales.append(float(trainer._table.control[0]))
        weights.append(model.state_dict())

    trainer.fit(x[:64], t, epochs=16, batch_size=64, callbacks=[note])
    skipped = [after < now for now, after in zip([2.0**16, *scales], scales, strict=False)]
    assert skipped == sorted(skipped, reverse=True) and 2 < sum(skipped) < 16
    assert scales[-1] == 2.0 ** (16 - sum(skipped))
    for i, skip in enumerate(skipped[1:], 1):  # a look-ahead stays ahead after a skipped step: from the second on
        for key in before:
            assert np.array_equal(weights[i][key], weights[i + 1][key]) == skip
    assert all(np.isfinite(v).all() for v in weights[-1].values())
    assert trainer.history["loss"][-1] < trainer.history["loss"][0]


def test_adams_powers_stand_still_where_a_step_is_skipped():
    table = get_backend("cpu").step_table(["t"], np.float32, 4)
    table.load(np.arange(4.0).reshape(4, 1), np.arange(4), 1)
    seen = []
    for ok in (1, 0, 0, 1, 1):
        table.control[2] = ok
        seen.append((float(table.scalar("t")), float(table.scalar("t", applied=True))))
        table.advance()
    assert seen == [(0, 0), (1, 1), (2, 1), (3, 1), (3, 2)]  # past the last row it stays


def test_the_scale_doubles_after_2000_good_steps():
    back = get_backend("cpu")
    table, g = back.step_table([], np.float32, 1), np.ones(64, np.float32)
    table.control[:] = 8, 1, 1, 1998
    launch = back.gradient_norm(g, table, clip=np.inf, dynamic=True)
    seen = []
    for _ in range(3):
        launch.run()
        seen.append(table.control.tolist())
    assert seen == [[8, 1 / 8, 1, 1999], [16, 1 / 8, 1, 0], [16, 1 / 16, 1, 1]]
    g[3] = np.inf
    launch.run()
    assert table.control.tolist() == [8, 0, 0, 0]


@pytest.mark.parametrize("rows, epochs", [(32, 3), (1, 24)])
def test_gradients_that_no_scale_makes_finite_are_divergence(rows, epochs):
    """Of errors beyond float16's largest number, in epochs of many steps and of one."""
    t = np.full((rows, 1), 1e8, np.float32)
    trainer = gb.Trainer(gb.mlp([64, 8, 1]).initialize(0), "mse", seed=0, precision="float16")
    before = trainer.model.state_dict()
    told = "^fit: no gradient of epoch .* finite norm in float16.*; scale the .*, or use precision bfloat16 or float32$"
    with pytest.raises(gb.TrainingDiverged, match=told) as caught:
        trainer.fit(x[:rows], t, epochs=epochs, batch_size=1)
    assert caught.value.epoch == trainer.epoch + 1 == (1 if rows == 32 else 17)  # after 16 halvings the scale is 1
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    for key, value in trainer.model.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_fit_without_a_step_applied_is_a_warning(device, cuda):
    """While the scale of the loss comes down; where it has, training goes on without."""
    t = np.full((64, 3), 1000, np.float32)
    trainer = gb.Trainer(
        gb.mlp([64, 8, 3]).initialize(0), "sse", gb.SGD(1e-6), seed=0, device=device, precision="float16"
    )
    told = "^fit: no step was applied, .* float16 while .* comes down, which is 16384 now; train on, scale the targets"
    with pytest.warns(RuntimeWarning, match=told) as seen:
        trainer.fit(x[:64], t, epochs=1, batch_size=32)
    assert len(seen) == 1 and seen[0].filename == __file__
    history = trainer.fit(x[:64], t, epochs=16, batch_size=32)
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_clipping_by_a_norm_that_overflows_all_epoch_is_divergence(clip):
    trainer = gb.Trainer(gb.mlp([64, 8, 3]).initialize(0), "mse", gb.SGD(1e-30), [], seed=0, clip_norm=clip)
    data = x[:8] * 10, np.full((8, 3), 5e18, np.float32)
    told = r"in float32, so that no step was applied; .* scale the targets or inputs$"
    with nullcontext() if clip is None else pytest.raises(gb.TrainingDiverged, match=told):
        trainer.fit(*data, epochs=1, batch_size=4)
    assert trainer.epoch == (clip is None)


def test_divergence_restores_the_scale_of_the_loss():
    """And with it whether the last step was applied: a look-ahead is undone after one that was."""
    t = np.full((64, 3), 2, np.float32)
    bad = np.where(np.arange(64)[:, None] == 63, np.float32(1e30), t)
    trainers = [
        gb.Trainer(gb.mlp([64, 8, 3]).initialize(0), "mse", gb.SGD(1e-3, momentum=0.9, nesterov="lookahead"), seed=0,
                   precision="float16") for _ in range(2)
    ]  # fmt: skip
    for trainer in trainers:
        trainer.fit(x[:64], t, epochs=1, batch_size=16)
    with pytest.raises(gb.TrainingDiverged), pytest.warns(RuntimeWarning, match="y column 0 has numbers of about 1.2"):
        trainers[0].fit(x[:64], bad, epochs=1, batch_size=16, shuffle=False)
    for trainer in trainers:
        trainer.fit(x[:64], t, epochs=2, batch_size=16)
    assert trainers[0].history == trainers[1].history
    np.testing.assert_array_equal(*(trainer._table.control for trainer in trainers))


# ---- clipping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1e-2, 0.5, 1e3])
def test_clipping_by_hand(clip):
    def step(**arguments):
        model = gb.mlp([64, 10]).initialize(0)
        before = model.state_dict()
        gb.Trainer(model, optimizer=gb.SGD(1.0), seed=0, **arguments).fit(x[:64], y[:64], epochs=1, batch_size=64)
        return {k: before[k] - v for k, v in model.state_dict().items()}

    plain, clipped = step(), step(clip_norm=clip)
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in plain.values()))
    for k in plain:
        np.testing.assert_allclose(clipped[k], plain[k] * min(1, clip / norm), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_clipping_adds_one_launch(clip):
    plan = gb.Trainer(gb.mlp([784, 512, 512, 10]), clip_norm=clip, seed=0).plan(128)
    assert len(plan.launches) == 17 + (clip is not None)


# ---- rounding ------------------------------------------------------------------------------------------------------


def test_tf32_rounds_to_ten_bits_ties_to_even():
    one = np.float32(1)
    u = np.float32(2.0**-10)
    given = np.array([1, 1 + u, 1 + u / 2, 1 + 1.5 * u, 1 + 0.49 * u, -(1 + u / 2), 0, np.inf, -np.inf], np.float32)
    calls = []
    rounded = rows.as_tf32(given, calls)
    for call in calls:
        call()
    assert rounded.tolist() == [1, 1 + u, 1, 1 + 2 * u, 1, -1, 0, np.inf, -np.inf]
    assert given[2] != one


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_unknown_names_and_bad_numbers():
    model = gb.mlp([4, 3])
    with pytest.raises(
        ValueError, match=r"^unknown precision 'half'; choose from float32, float64, tf32, float16, bfloat"
    ):
        gb.Trainer(model, precision="half")
    for bad, kind in ((0, ValueError), (-1.0, ValueError), (np.inf, ValueError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(kind, match=r"^Trainer: clip_norm must be"):
            gb.Trainer(model, clip_norm=bad)
    for bad, rounded in ((1e-300, "0"), (1e300, "inf")):
        told = re.escape(f"got {bad:g}, which is {rounded} in float32; None does not clip")
        with pytest.raises(ValueError, match=rf"^Trainer: clip_norm must be positive and finite, {told}$"):
            gb.Trainer(model, clip_norm=bad, precision="bfloat16")
        assert gb.Trainer(gb.mlp([4, 3]), clip_norm=bad, precision="float64").clip_norm == bad


def test_bfloat16_without_its_package(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: real("no_such_module" if name == "ml_dtypes" else name, *a, **k)
    )
    with pytest.raises(RuntimeError, match=r"'bfloat16' needs the package ml_dtypes; pip install ml_dtypes$"):
        _ = precision("bfloat16").dtype


def test_a_graph_on_the_cpu_is_one_warning_and_the_same_bits():
    plain = trained("float32")
    with pytest.warns(
        RuntimeWarning, match=r"^cuda_graph: the CPU has no CUDA graphs; steps are launched one by one$"
    ) as seen:
        asked = trained("float32", cuda_graph=True)
    assert [w.filename for w in seen] == [__file__]  # where fit was called
    for a, b in zip(plain.model.state_dict().values(), asked.model.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked.fit(x[:100], y[:100], epochs=1, batch_size=50)


def test_trainers_of_several_precisions_share_a_model():
    model = net()
    first = {name: gb.Trainer(model, seed=0, precision=name) for name in ("bfloat16", "float32", "float16", "tf32")}
    for _ in range(2):
        for trainer in first.values():
            trainer.fit(x[:64], y[:64], epochs=1, batch_size=32)
    gb.Trainer(model, precision="float64").fit(x[:64], y[:64], epochs=1, batch_size=32)
    with pytest.raises(
        RuntimeError, match=r"^fit: the model is float64 since another Trainer took it over, but this one"
    ):
        first["float32"].fit(x[:64], y[:64], epochs=1)


def test_what_overflows_float16_is_named():
    with pytest.raises(ValueError, match=r"^fit: x has .* at row 0, column 2, too large for float16; scale x"):
        gb.Trainer(net(), precision="float16").fit(x * 1e6, y, epochs=1)
