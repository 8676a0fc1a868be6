"""The first replay of a step that calls a user's code is held against a fresh run, and what differs is refused."""

import tracemalloc

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import rerun, step
from gpubackprop.plan import recording

DEVICES = ["cpu", "cpu:reference", "cuda"]


def squares(o, t):
    return ((o - t) ** 2).mean()


class Drawn(gb.Layer):
    """Noise that Python draws."""

    def forward(self, x):
        return x * float(np.random.default_rng().uniform(1, 2))


class Third(gb.Layer):
    """Another value at every third call."""

    def __init__(self):
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (0.5 if self.calls % 3 == 0 else 1.0)


class Branching(Third):
    """Another launch at every third call."""

    def forward(self, x):
        self.calls += 1
        return x if self.calls % 3 else gb.tanh(x)


class Kept(gb.Layer):
    """Deterministic, with everything that a fresh run could leave behind: draws, statistics, Python state."""

    def __init__(self, columns):
        self.norm, self.dropout = gb.BatchNorm(columns), gb.Dropout(0.3)
        self.calls, self.seen, self.named, self.shapes = 0, [], {}, set()

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        self.named[self.calls] = x.shape
        self.shapes.add(self.calls)
        return self.dropout(self.norm(x))


def data(rows=40, columns=3):
    rng = np.random.default_rng(1)
    return rng.normal(size=(rows, columns)), rng.normal(size=(rows, 1))


def drawn_loss(o, t):
    return squares(o, t) * float(np.random.default_rng().uniform(1, 2))


def counting_loss():
    count = iter(range(1000))
    return lambda o, t: squares(o, t) * (1 + next(count))


FAULTY = {
    "a layer draws": lambda: (gb.Sequential(gb.Dense(3, 3), Drawn(), gb.Dense(3, 1)), "mse", "multiply .* layer '1'"),
    "a layer counts": lambda: (gb.Sequential(Third(), gb.Dense(3, 1)), "mse", "multiply .* of layer '0'"),
    "a layer branches": lambda: (gb.Sequential(Branching(), gb.Dense(3, 1)), "mse", r"launch \d+ was .*tanh"),
    "a loss draws": lambda: (gb.mlp([3, 4, 1]), drawn_loss, "multiply .* of the loss"),
    "a loss counts": lambda: (gb.mlp([3, 4, 1]), counting_loss(), "multiply .* of the loss"),
}  # fmt: skip
HOW = {
    "plain": {}, "16 bits": {"precision": "float16"}, "accumulated": {"accumulate": 3}, "graph": {"cuda_graph": True},
    "penalty": {"l2": 0.1}, "lbfgs": {"optimizer": gb.LBFGS()},
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", FAULTY)
def test_a_step_that_depends_on_python_is_refused_and_undone(case, device, cuda):
    model, loss, message = FAULTY[case]()
    trainer = gb.Trainer(model, loss, device=device, seed=0)
    before = model.state_dict()
    with pytest.raises(RuntimeError, match="the step depends on Python values: .*" + message):
        trainer.fit(*data(), epochs=3, batch_size=20)
    assert (trainer.history, trainer.epoch, trainer.step) == ({}, 0, 0)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_is_refused_however_the_step_is_made(how, device, cuda):
    for case in ("a layer draws", "a loss counts"):
        model, loss, message = FAULTY[case]()
        with pytest.raises(RuntimeError, match="depends on Python values: .*" + message):
            gb.Trainer(model, loss, **{"device": device, "seed": 0} | HOW[how]).fit(*data(), epochs=3, batch_size=10)


def test_a_step_of_all_rows_is_refused_in_its_second_epoch():
    trainer = gb.Trainer(gb.mlp([3, 1]), drawn_loss, seed=0)
    with pytest.raises(RuntimeError, match="depends on Python values"):
        trainer.fit(*data(), epochs=2, batch_size=100)
    assert trainer.epoch == len(trainer.history["loss"]) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["plain", "16 bits", "accumulated", "penalty"])
def test_a_check_leaves_no_trace(how, device, cuda, monkeypatch):
    ends = []
    graph = {"cuda_graph": True} if (device, how) == ("cuda", "plain") else {}
    for checked in (True, False):
        if not checked:
            monkeypatch.setattr(step, "calls_own_code", lambda *_: False)
        layer = Kept(3)
        model = gb.Sequential(gb.Dense(3, 3), layer, gb.Dense(3, 1))
        trainer = gb.Trainer(model, squares, metrics=["mae"], device=device, seed=0, **HOW[how], **graph)
        trainer.fit(*data(42), epochs=3, batch_size=10)
        state = {k: v.tobytes() for k, v in model.state_dict().items()}
        ends.append((trainer.history, state, layer.calls, layer.seen, layer.named, layer.shapes))
    assert ends[0] == ends[1]


def test_lbfgs_with_a_layer_of_ones_own_searches_as_without_a_check(monkeypatch):
    ends = []
    for checked in (True, False):
        if not checked:
            monkeypatch.setattr(step, "calls_own_code", lambda *_: False)
        model = gb.Sequential(gb.Dense(3, 3), Third(), gb.BatchNorm(3), gb.Dense(3, 1))
        model.layers[1].forward = gb.tanh
        gb.Trainer(model, squares, gb.LBFGS(), seed=0).fit(*data(), epochs=3)
        ends.append({k: v.tobytes() for k, v in model.state_dict().items()})
    assert ends[0] == ends[1]


def test_what_is_changed_between_fits_counts_from_the_next_on():
    """The library's own settings, a layer's and what a loss reads: as in a trainer that begins with them."""
    scale = [1.0]
    x, y = data()

    def loss(o, t):
        return squares(o, t) * scale[0]

    def trained(loss, first, changes, factor):
        scale[0] = 1.0
        trainer = gb.Trainer(
            gb.Sequential(gb.Dense(3, 3), gb.Dropout(first), gb.Dense(3, 1)), loss, gb.SGD(0.1), seed=0
        )
        for rate in changes:
            trainer.model.layers[1].rate = rate
            trainer.fit(x, y, epochs=1, batch_size=20)
            scale[0] = factor
        return trainer

    changed, same = (trained("mse", 0.1, rates, 1.0).history["loss"] for rates in ((0.1, 0.6), (0.1, 0.1)))
    assert changed[0] == same[0] and changed[1] != same[1]
    twice, once = (trained(loss, 0.1, (0.1, 0.1), factor).history["loss"] for factor in (2.0, 1.0))
    assert twice[0] == once[0] and twice[1] > 1.5 * once[1]


def test_built_in_layers_and_losses_are_recorded_once(monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing here is a user's code")

    monkeypatch.setattr(step, "replay_checked", refuse)
    model = gb.Sequential(
        gb.Dense(3, 4, "relu"), gb.BatchNorm(4), gb.Dropout(0.2), gb.Residual(gb.Dense(4, 4)), gb.Dense(4, 1)
    )
    for loss in ("mse", gb.mse):
        gb.Trainer(model, loss, seed=0).fit(*data(), epochs=3, batch_size=10)


def test_a_fresh_run_is_let_go():
    """Nothing of its size stays: neither its buffers nor its launches."""
    x, y = data(64, 256)
    trainer = gb.Trainer(
        gb.Sequential(*(gb.Dense(256, 256, "tanh") for _ in range(4)), Third(), gb.Dense(256, 1)), "mse", seed=0
    )
    trainer.model.layers[4].forward = gb.tanh
    sizes = []

    def size(trainer):
        sizes.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        trainer.fit(x, y, epochs=3, batch_size=64, callbacks=[size])
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 4 * 64 * 256  # less than one layer's activations


def test_no_room_for_a_second_step_is_no_reason_to_fail(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(rerun, "_bound", full)
    ends = []
    for loss in (squares, lambda o, t: gb.mse(o, t)):
        ends.append(gb.Trainer(gb.mlp([3, 1]), loss, seed=0).fit(*data(), epochs=2, batch_size=10)["loss"])
    np.testing.assert_allclose(*ends, rtol=1e-5)


def test_a_loss_that_fails_at_a_later_call_ends_the_fit_as_it_was():
    def loss(o, t):
        if (plan := recording()) is not None and plan.dry and armed:
            raise OSError("gone")
        armed.append(plan is not None and not plan.dry)
        return squares(o, t)

    armed = []
    trainer = gb.Trainer(gb.mlp([3, 1]), loss, seed=0)
    before = trainer.model.state_dict()["0.weight"]
    armed.clear()
    with pytest.raises(OSError, match="gone"):
        trainer.fit(*data(), epochs=2, batch_size=10)
    np.testing.assert_array_equal(trainer.model.state_dict()["0.weight"], before)
