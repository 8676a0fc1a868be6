"""Learning rates that change: closed forms, the step table they go into, and what does not fit."""

import math

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import schedules as s
from gpubackprop.rates import rates

T = np.arange(0, 40, dtype=np.float64)

CLOSED = {
    "constant": (s.Constant(0.2), lambda t: 0.2),
    "step": (s.Step(0.2, every=10, decay=0.5), lambda t: 0.2 * 0.5 ** (t // 10)),
    "exponential": (s.Exponential(0.2, decay=0.9), lambda t: 0.2 * 0.9**t),
    "polynomial": (s.Polynomial(0.2, length=20, power=2, end=0.01),
                   lambda t: 0.19 * (1 - min(t, 20) / 20) ** 2 + 0.01),
    "cosine": (s.Cosine(0.2, length=30, warmup=5, end=0.02), lambda t: 0.2 * (t + 1) / 6 if t < 5 else
               0.02 + 0.18 * (1 + math.cos(math.pi * min((t - 5) / 25, 1))) / 2),
    "one cycle": (s.OneCycle(0.2, length=30, rise=0.4, start=0.02, end=0.002), lambda t: 0.2 * (
        0.1 + 0.9 * (1 - math.cos(math.pi * t / 12)) / 2 if t < 12 else
        0.01 + 0.99 * (1 + math.cos(math.pi * min((t - 12) / 18, 1))) / 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_seed_30_closed_forms(name):
    schedule, form = CLOSED[name]
    np.testing.assert_allclose(schedule(T), [form(t) for t in T], rtol=1e-14)
    np.testing.assert_allclose(schedule.rates(T[7:], 3, {}), [form(t) for t in T[7:]], rtol=1e-14)
    assert schedule(7) == schedule(T)[7]


def test_seed_30_known_values():
    assert s.Step(1.0, every=3)([0, 2, 3, 6]) == pytest.approx([1, 1, 0.1, 0.01])
    assert s.Cosine(1.0, length=10)([0, 5, 10, 99]) == pytest.approx([1, 0.5, 0, 0])
    assert s.Cosine(1.0, length=10, warmup=4)([0, 3]) == pytest.approx([0.2, 0.8])
    assert s.OneCycle(1.0, length=100, rise=0.25)([0, 25, 100]) == pytest.approx([0, 1, 0])
    assert s.Polynomial(1.0, length=4)([0, 1, 4, 5]) == pytest.approx([1, 0.75, 0, 0])


def path(optimizer, epochs=6, rows=6, batch=2, **more):
    """The weight after each epoch under a gradient of 1 everywhere: what the rates add up to."""
    model = gb.Sequential(gb.Dense(1, 1, bias=False, init=0.0), dtype="float64")
    trainer, seen = gb.Trainer(model, lambda output, target: output.mean(), optimizer, seed=0), []
    trainer.fit(np.ones((rows, 1)), np.ones(rows), epochs=epochs, batch_size=batch,
                callbacks=[lambda t: seen.append(-model.state_dict()["0.weight"].item())], **more)  # fmt: skip
    return np.array(seen), trainer


@pytest.mark.parametrize("per, at", [("updates", lambda k: 3 * k), ("epochs", lambda k: k)])
def test_every_update_takes_its_rate(per, at):
    schedule = s.Exponential(0.5, decay=0.8, per=per)
    seen, trainer = path(gb.SGD(schedule))
    each = [sum(0.5 * 0.8 ** (at(k) + (i if per == "updates" else 0)) for i in range(3)) for k in range(6)]
    np.testing.assert_allclose(seen, np.cumsum(each), rtol=1e-13)
    last = [0.5 * 0.8 ** (at(k) + (2 if per == "updates" else 0)) for k in range(6)]
    assert trainer.history["lr"] == pytest.approx(last, rel=1e-14)


def test_a_function_is_a_schedule_and_a_second_fit_goes_on():
    seen, trainer = path(gb.SGD(lambda k: 1 / (1 + k)), epochs=2)
    assert seen[-1] == pytest.approx(sum(1 / (1 + k) for k in range(6)))
    trainer.fit(np.ones((6, 1)), np.ones(6), epochs=1, batch_size=2)
    weight = -trainer.model.state_dict()["0.weight"].item()
    assert weight == pytest.approx(sum(1 / (1 + k) for k in range(9)))
    assert trainer.history["lr"] == pytest.approx([1 / 3, 1 / 6, 1 / 9])


def test_a_constant_schedule_is_the_number_bit_for_bit(rng):
    x, t, bits = rng.normal(size=(40, 3)), rng.normal(size=(40, 2)), []
    for lr in (0.01, s.Constant(0.01), lambda k: 0.01):
        model = gb.mlp([3, 5, 2])
        gb.Trainer(model, "mse", gb.Adam(lr), seed=0).fit(x, t, epochs=3, batch_size=8)
        bits.append([a.tobytes() for a in model.state_dict().values()])
    assert bits[0] == bits[1] == bits[2]


def test_plateau_is_a_function_of_the_history():
    plateau = s.Plateau(1.0, patience=2, decay=0.1, min_delta=0.01)
    losses = [1.0, 0.9, 0.895, 0.899, 0.8, 0.8, 0.8, 0.8, 0.8]
    found = [float(rates(plateau, np.zeros(1), k, {"loss": losses[:k]})[0]) for k in range(len(losses) + 1)]
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001])
    rising = {"loss": losses, "val_accuracy": [0.1, 0.2, 0.3]}
    assert rates(s.Plateau(1.0, patience=1, monitor="val_accuracy"), np.zeros(2), 3, rising).tolist() == [1, 1]
    assert s.Plateau(1.0, patience=1, end=0.5).rates(np.zeros(1), 9, {"loss": [1.0] * 9})[0] == 0.5
    with pytest.raises(ValueError, match="Plateau: unknown figure 'val_loss'; the history has loss"):
        s.Plateau(1.0, monitor="val_loss").rates(np.zeros(1), 1, {"loss": [1.0]})


def test_plateau_lowers_the_rate_of_a_fit_that_stands_still():
    _, trainer = path(gb.SGD(s.Plateau(0.5, patience=1, monitor="still", mode="min")), epochs=1)
    trainer.history["still"] = [1.0]
    stand = [lambda t: t.history["still"].append(1.0)]
    trainer.fit(np.ones((6, 1)), np.ones(6), epochs=3, batch_size=2, callbacks=stand)
    assert trainer.history["lr"] == pytest.approx([0.5, 0.5, 0.05, 0.005])
    trainer.fit(np.ones((6, 1)), np.ones(6), epochs=2, batch_size=2)  # epochs without the figure count for nothing
    assert trainer.history["lr"][-2:] == pytest.approx([0.0005, 0.0005])


def test_the_figure_that_is_watched_is_one_the_last_epoch_has():
    plateau, nan = s.Plateau(1.0, patience=2), math.nan
    history = {"loss": [5.0, 4, 3, 2, 1], "val_loss": [2.0, 1, nan, nan, nan]}
    assert plateau.rates(np.zeros(1), 5, history)[0] == 1
    history = {"loss": [1.0, 1, 1, 1, 1], "val_loss": [nan, nan, nan, 2, 1]}
    assert plateau.rates(np.zeros(1), 5, history)[0] == 1


@pytest.mark.parametrize(
    "make, kind, message",
    [
        (lambda: s.Step(0, every=1), ValueError, "Step: lr must be > 0, got 0"),
        (lambda: s.Step(1.0, every=0), ValueError, "Step: every must be at least 1, got 0"),
        (lambda: s.Exponential(1.0, decay=1.5), ValueError, r"Exponential: decay must be in \(0, 1\], got 1.5"),
        (lambda: s.Cosine(1.0, length=5, warmup=5), ValueError, "Cosine: warmup 5 must be less than length 5"),
        (lambda: s.Cosine(1.0, length=5.5), TypeError, "Cosine: length must be an integer, got float 5.5"),
        (lambda: s.OneCycle(1.0, length=5, rise=1), ValueError, r"OneCycle: rise must be in \(0, 1\), got 1"),
        (
            lambda: s.Step(1.0, every=1, per="hours"),
            ValueError,
            "Step: unknown per 'hours'; choose from 'updates', 'epochs'",
        ),
        (lambda: path(gb.SGD(lambda k: -1.0)), ValueError, "learning rate: the schedule gives -1.0 at update 0"),
        (lambda: path(gb.SGD(lambda k: math.nan if k == 4 else 1.0)), ValueError, "gives nan at update 4"),
        (lambda: path(gb.SGD(lambda k: "fast")), TypeError, "gives str 'fast' at update 0; expected a number"),
        (lambda: gb.SGD(s.Step), TypeError, "SGD: lr is the class Step; make one"),
    ],
)
def test_bad_schedules(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_the_range_test_finds_where_the_loss_falls_and_leaves_the_trainer_alone():
    x, y = gb.datasets.digits()
    trainer = gb.Trainer(gb.mlp([64, 32, 10]), optimizer=gb.SGD(0.1, momentum=0.9), seed=0)
    before = trainer.model.state_dict()
    found = gb.lr_range_test(trainer, x, y, low=1e-5, high=100.0, updates=60, batch_size=64)
    assert all((value == before[key]).all() for key, value in trainer.model.state_dict().items())
    assert trainer.epoch == trainer.step == 0 and not trainer.history and trainer.optimizer.lr == 0.1
    assert found.lr[0] == pytest.approx(1e-5) and (np.diff(np.log(found.lr)) > 0).all()
    assert len(found.lr) == len(found.loss) < 60  # it ends where the loss has blown up
    assert 1e-3 < found.suggestion < 1.0 and f"{found.suggestion:.2g}" in str(found)


def test_the_range_test_keeps_the_ratios_of_groups_and_knows_what_it_cannot_test(rng):
    x, t = rng.normal(size=(40, 3)), rng.normal(size=40)
    still = gb.SGD(0.1, groups={"0.*": {"lr": 1e-9}})
    model = gb.mlp([3, 4, 1], dtype="float64").initialize(0)
    fast, slow = (gb.lr_range_test(gb.Trainer(model, "mse", o, seed=0), x, t, updates=20, batch_size=8)
                  for o in (gb.SGD(0.1), still))  # fmt: skip
    assert len(slow.loss) >= len(fast.loss) and (slow.loss[: len(fast.loss)] != fast.loss).any()
    with pytest.raises(ValueError, match="lr_range_test: LBFGS searches for the length of its steps"):
        gb.lr_range_test(gb.Trainer(model, "mse", gb.LBFGS()), x, t)
    with pytest.raises(ValueError, match="lr_range_test: x has 40 rows but y has 39"):
        gb.lr_range_test(gb.Trainer(model, "mse"), x, t[:39])
    with pytest.raises(TypeError, match="lr_range_test: trainer is Sequential; expected a Trainer"):
        gb.lr_range_test(model, x, t)
