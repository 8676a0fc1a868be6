"""Penalties, clipping by value, accumulated gradients, early stopping, groups: what surrounds the update rule."""

import copy
import math

import numpy as np
import pytest

import gpubackprop as gb

HOSTS = ["cpu", "cpu:reference"]
L1, L2 = 0.03, 0.2


@pytest.fixture(params=HOSTS)
def host(request):
    return request.param


@pytest.fixture(params=[*HOSTS, "cuda"])
def device(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return request.param


def regression(rng, rows=22):
    return rng.normal(size=(rows, 3)), rng.normal(size=(rows, 2))


def trained(x, t, optimizer=None, device="cpu", epochs=3, batch=8, dtype="float64", model=None, **more):
    model = model or gb.mlp([3, 5, 2], "tanh", dtype=dtype)
    trainer = gb.Trainer(model, "mse", optimizer or gb.SGD(0.1), device=device, seed=0, **more)
    trainer.fit(x, t, epochs=epochs, batch_size=batch)
    return trainer


def weights(trainer):
    return trainer.model.state_dict()


def assert_close(a, b, rtol=1e-12):
    for key, value in weights(a).items():
        np.testing.assert_allclose(value, weights(b)[key], rtol=rtol, atol=rtol, err_msg=key)


def penalty(state, l1=L1, l2=L2):
    matrices = [w for w in state.values() if w.ndim == 2]
    return sum(l1 * np.abs(w).sum() + 0.5 * l2 * (w * w).sum() for w in matrices)


# ---- penalties -----------------------------------------------------------------------------------------------------


def test_seed_42_penalties_add_their_gradient_to_the_weights_alone(rng, device):
    """One step of rate 1: the difference to a step without them is λ w + λ sign(w), and nothing of the biases."""
    x, t = regression(rng, 8)
    start = weights(trained(x, t, gb.SGD(1e-300), epochs=1))
    plain, both = (trained(x, t, gb.SGD(1.0), device, epochs=1, **more) for more in ({}, {"l1": L1, "l2": L2}))
    for key, value in weights(both).items():
        w = start[key]
        expected = L2 * w + L1 * np.sign(w) if w.ndim == 2 else 0 * w
        np.testing.assert_allclose(weights(plain)[key] - value, expected, rtol=1e-11, atol=1e-14)


def test_the_loss_includes_the_penalty_and_says_so_in_evaluate(rng, host):
    x, t = regression(rng, 8)
    trainer = trained(x, t, gb.SGD(1e-300), host, epochs=1, l1=L1, l2=L2)
    data = float(((trainer.predict(x) - t) ** 2).mean())
    assert trainer.history["loss"][0] == pytest.approx(data + penalty(weights(trainer)), rel=1e-12)
    assert trainer.evaluate(x, t)["loss"] == pytest.approx(data + penalty(weights(trainer)), rel=1e-12)


def test_three_meanings_of_l2(rng, host):
    """In the loss and coupled take the same steps; what is apart from the gradient does not, where it is divided."""
    x, t = regression(rng)
    in_loss, coupled = trained(x, t, device=host, l2=L2), trained(x, t, gb.SGD(0.1, weight_decay=L2), host)
    assert_close(in_loss, coupled)
    assert in_loss.history["loss"][0] > coupled.history["loss"][0]
    adams = [trained(x, t, gb.Adam(0.1), host, l2=L2), trained(x, t, gb.Adam(0.1, weight_decay=L2), host)]
    assert_close(*adams)
    decoupled = trained(x, t, gb.AdamW(0.1, weight_decay=L2), host)
    assert np.abs(weights(decoupled)["0.weight"] - weights(adams[0])["0.weight"]).max() > 1e-3


def test_a_strength_may_depend_on_the_rows_of_the_batch(rng, host):
    """scikit-learn's alpha / n, of each batch, the ragged one too."""
    x, t = regression(rng, 22)
    seen = trained(x, t, device=host, l2=lambda rows: 3.0 / rows, epochs=1)
    model = gb.mlp([3, 5, 2], "tanh", dtype="float64").initialize(0)
    order = np.random.Generator(np.random.PCG64([0, 0])).permutation(22)
    for start in (0, 8, 16):
        batch = order[start : start + 8]
        one = gb.Trainer(model, "mse", gb.SGD(0.1), seed=0, l2=3.0 / len(batch))
        one.fit(x[batch], t[batch], epochs=1, batch_size=8, shuffle=False)
    assert_close(seen, one)


def test_a_penalty_counts_in_the_clipped_norm(rng, host):
    x, t = regression(rng, 8)
    start = weights(trained(x, t, gb.SGD(1e-300), epochs=1))
    after = weights(trained(x, t, gb.SGD(1.0), host, epochs=1, l2=5.0, clip_norm=0.5))
    assert math.sqrt(sum(((after[k] - start[k]) ** 2).sum() for k in start)) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_penalty_in_mixed_precision_is_that_of_float32(precision, rng, device):
    x, t = regression(rng, 8)
    mixed, single = (
        trained(x, t, gb.SGD(0.01), device, epochs=2, dtype="float32", precision=p, l1=L1, l2=L2)
        for p in (precision, "float32")
    )
    assert_close(mixed, single, 2e-3 if precision == "float16" else 2e-2)
    assert mixed.history["loss"] == pytest.approx(single.history["loss"], rel=1e-2)


def test_a_model_without_matrices_has_no_penalty(rng):
    x, t = rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    model = gb.Sequential(gb.LayerNorm(3), dtype="float64")
    assert_close(
        trained(x, t, model=model, l2=9.0), trained(x, t, model=gb.Sequential(gb.LayerNorm(3), dtype="float64"))
    )


@pytest.mark.parametrize("bad, kind, message", [
    ({"l2": -1}, ValueError, "Trainer: l2 must be >= 0, got -1"),
    ({"l1": "much"}, TypeError, "Trainer: l1 must be a number, got str 'much'"),
    ({"clip_value": 0}, ValueError, "Trainer: clip_value must be positive and finite, got 0; None does not clip"),
    ({"accumulate": 0}, ValueError, "Trainer: accumulate must be at least 1, got 0"),
    ({"accumulate": 2.0}, TypeError, "Trainer: accumulate must be an integer, got float 2.0"),
])  # fmt: skip
def test_bad_settings(bad, kind, message):
    with pytest.raises(kind, match=message):
        gb.Trainer(gb.mlp([3, 2]), **bad)


def test_a_function_that_gives_no_strength(rng):
    x, t = regression(rng, 8)
    with pytest.raises(ValueError, match=r"Trainer: l2\(8\) must be >= 0, got -8"):
        trained(x, t, l2=lambda rows: -rows)


# ---- clipping by value ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_clipping_by_value_holds_every_element(precision, rng, device):
    x, t = regression(rng, 8)
    settings = {"epochs": 1, "dtype": "float32", "precision": precision}
    start = weights(trained(x, t, gb.SGD(1e-30), epochs=1, dtype="float32"))
    runs = (trained(x, t, gb.SGD(1.0), device, clip_value=c, **settings) for c in (None, 0.05))
    plain, clipped = ({k: start[k] - w for k, w in weights(r).items()} for r in runs)
    close = {"rtol": 2e-3, "atol": 1e-3} if precision == "float16" else {"rtol": 1e-5, "atol": 1e-7}
    for key, g in plain.items():
        np.testing.assert_allclose(clipped[key], np.clip(g, -0.05, 0.05), **close)
    assert max(np.abs(g).max() for g in plain.values()) > 0.2


# ---- label smoothing -----------------------------------------------------------------------------------------------


def smooth_rows(labels, share, classes=3):
    return (1 - share) * np.eye(classes)[labels] + share / classes


@pytest.mark.parametrize("precision", ["float64", "float16"])
def test_smoothed_labels_train_as_the_rows_they_stand_for(precision, rng, device):
    x, y = rng.normal(size=(22, 3)), rng.integers(0, 3, 22)
    settings = {"device": device, "seed": 0, "precision": precision}
    dtype = "float64" if precision == "float64" else "float32"
    models = [gb.mlp([3, 5, 3], "tanh", dtype=dtype) for _ in range(2)]
    labels = gb.Trainer(models[0], optimizer=gb.SGD(0.1), label_smoothing=0.3, **settings)
    rows = gb.Trainer(models[1], optimizer=gb.SGD(0.1), **settings)
    labels.fit(x, y, epochs=3, batch_size=8, sample_weight=np.linspace(0, 1, 22))
    rows.fit(x, smooth_rows(y, 0.3), epochs=3, batch_size=8, sample_weight=np.linspace(0, 1, 22))
    assert_close(labels, rows, 1e-12 if precision == "float64" else 1e-3)
    assert labels.history["loss"] == pytest.approx(rows.history["loss"], rel=1e-12 if precision == "float64" else 1e-3)
    assert labels.evaluate(x, y)["accuracy"] == (labels.predict(x).argmax(1) == y).mean()
    assert len(labels.history["accuracy"]) == 3 and "accuracy" not in rows.history


def test_smoothed_losses_are_torchs(rng):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, y = rng.normal(size=(9, 3)), rng.integers(0, 3, 9)
    model = gb.mlp([3, 3], dtype="float64")
    trainer = gb.Trainer(model, label_smoothing=0.2, seed=0)
    theirs = torch.nn.functional.cross_entropy(torch.tensor(trainer.predict(x)), torch.tensor(y), label_smoothing=0.2)
    assert trainer.evaluate(x, y)["loss"] == pytest.approx(theirs.item(), rel=1e-13)
    soft = rng.dirichlet(np.ones(3), 9)
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(trainer.predict(x)), torch.tensor(soft), label_smoothing=0.2
    )
    assert trainer.evaluate(x, soft)["loss"] == pytest.approx(theirs.item(), rel=1e-13)


def test_smoothing_of_two_classes_with_one_output_is_that_of_two_outputs(rng):
    """bce of the difference of two logits is their cross-entropy."""
    x, y = rng.normal(size=(9, 3)), rng.integers(0, 2, 9)
    two, one = gb.mlp([3, 2], dtype="float64").initialize(1), gb.mlp([3, 1], dtype="float64")
    w = two.state_dict()
    one.load_state_dict({k: a[..., 1:] - a[..., :1] for k, a in w.items()})
    losses = [
        gb.Trainer(m, loss, label_smoothing=0.2, seed=0).evaluate(x, y)
        for m, loss in ((two, "cross_entropy"), (one, "bce"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("loss, share, message", [
    ("mse", 0.1, "Trainer: label_smoothing is for the losses cross_entropy and bce, got mse"),
    ("cross_entropy", 1.0, r"Trainer: label_smoothing must be in \[0, 1\), got 1"),
])  # fmt: skip
def test_bad_smoothing(loss, share, message):
    with pytest.raises(ValueError, match=message):
        gb.Trainer(gb.mlp([3, 2]), loss, label_smoothing=share)


# ---- accumulated gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [gb.SGD(0.1, momentum=0.9, nesterov="lookahead"), gb.Adam(0.01)], ids=str)
def test_batches_add_up_to_the_batch_of_all_their_rows(optimizer, rng, device):
    """Also where the last update has fewer batches and the last batch fewer rows."""
    x, t = regression(rng, 22)
    whole = trained(x, t, optimizer, device, batch=12, l2=lambda rows: 1 / rows, clip_norm=1.0)
    parts = trained(x, t, optimizer, device, batch=4, accumulate=3, l2=lambda rows: 1 / rows, clip_norm=1.0)
    assert_close(whole, parts)
    assert whole.history["loss"] == pytest.approx(parts.history["loss"], rel=1e-12)
    assert parts.step == whole.step == 6


def test_accumulating_draws_dropout_anew_for_every_batch(rng, host):
    """A linear unit of dropout over ones: the gradient is the mean of the draws, which differ."""
    x, t = np.ones((4, 1)), np.ones(4)
    model = gb.Sequential(gb.Dropout(0.5), gb.Dense(1, 1, bias=False, init=0.0), dtype="float64")
    trainer = gb.Trainer(model, lambda output, target: output.mean(), gb.SGD(1.0), device=host, seed=0, accumulate=4)
    seen = []
    trainer.fit(x, t, epochs=8, batch_size=1, callbacks=[lambda t: seen.append(weights(t)["1.weight"].item())])
    steps = -np.diff([0.0, *seen])
    assert set(np.round(4 * steps / 2).astype(int)) <= {0, 1, 2, 3, 4} and len(set(steps)) > 2


def test_a_replayed_update_of_several_batches_only_launches(rng, cuda):
    x, t = regression(rng, 24)
    trainer = trained(x, t, gb.Adam(0.01), "cuda", dtype="float32", batch=4, accumulate=3, l2=0.1, clip_value=1.0)
    step = next(iter(trainer._steps.values()))
    recorded = {name: list(launches) for name, launches in step.plan.sections.items()}
    trainer.fit(x, t, epochs=2, batch_size=4)
    assert {k: v for k, v in step.plan.sections.items() if k != "feed"} == {
        k: v for k, v in recorded.items() if k != "feed"
    }
    assert set(step.plan.sections) | {"feed"} == {"feed", "before", "gradient", "penalty", "pass", "update"}


def test_accumulating_under_graphs(rng, cuda):
    x, t = regression(rng, 24)
    runs = [
        trained(x, t, gb.Adam(0.01), "cuda", dtype="float32", batch=4, accumulate=3, cuda_graph=g)
        for g in (False, True)
    ]
    assert_close(*runs, 0.0)


# ---- early stopping ------------------------------------------------------------------------------------------------


def scripted(losses):
    """A callback that puts these in the place of the validation loss."""
    values = iter(losses)

    def say(trainer):
        trainer.history["val_loss"] = [*trainer.history.get("val_loss", []), next(values)]

    return say


def test_seed_22_stops_at_the_exact_epoch_with_the_best_weights(rng, host):
    x, t = regression(rng)
    kept = {}
    stop = gb.EarlyStopping(patience=3)
    trainer = gb.Trainer(gb.mlp([3, 5, 2], dtype="float64"), "mse", device=host, seed=0)
    remember = lambda t: kept.setdefault(t.epoch, weights(t))  # noqa: E731
    callbacks = [scripted([5, 4, 2, 3, 2, 2.5, 1]), remember, stop]
    trainer.fit(x, t, epochs=20, batch_size=8, callbacks=callbacks)
    assert trainer.epoch == 6 and (stop.best, stop.best_epoch) == (2, 3)
    for key, value in weights(trainer).items():
        assert value.tobytes() == kept[3][key].tobytes() != kept[6][key].tobytes()


@pytest.mark.parametrize(
    "settings, losses, epochs, best",
    [
        ({"patience": 1}, [3, 2, 2, 1], 3, 2),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.8, 2.6, 1], 3, 1),
        ({"monitor": "val_loss", "patience": 2}, [3, math.nan, math.nan, 1], 3, 1),
        ({"patience": 9}, [3, 2, 1, 4], 4, 3),
    ],
)
def test_when_it_stops(settings, losses, epochs, best, rng):
    x, t = regression(rng, 8)
    stop, kept = gb.EarlyStopping(**settings), {}
    trainer = gb.Trainer(gb.mlp([3, 2]), "mse", seed=0)
    callbacks = [scripted(losses), stop, lambda t: kept.setdefault(t.epoch, weights(t))]
    trainer.fit(x, t, epochs=4, validation_data=(x, t), callbacks=callbacks)
    assert (trainer.epoch, stop.best_epoch) == (epochs, best)
    restored = weights(trainer)["0.weight"].tobytes()
    assert restored == kept.get(best, weights(trainer))["0.weight"].tobytes()


def test_accuracy_is_better_upwards_and_the_last_weights_may_stay():
    x, y = gb.datasets.digits()
    stop = gb.EarlyStopping("val_accuracy", patience=2, restore_best=False)
    trainer = gb.Trainer(gb.mlp([64, 16, 10]), seed=0)
    history = trainer.fit(x[:300], y[:300], epochs=60, validation_data=(x[300:600], y[300:600]), callbacks=[stop])
    values = history["val_accuracy"]
    assert stop.best == max(values) and len(values) < 60 and values[-3:].count(max(values)) <= 1
    assert trainer.evaluate(x[300:600], y[300:600])["accuracy"] == values[-1]


def test_the_moments_of_the_best_epoch_come_back_too(rng):
    """Training on from there is training on from then."""
    x, t = regression(rng)
    until = trained(x, t, gb.Adam(0.01), epochs=3)
    stopped = gb.Trainer(gb.mlp([3, 5, 2], "tanh", dtype="float64"), "mse", gb.Adam(0.01), seed=0)
    stopped.fit(x, t, epochs=9, batch_size=8, callbacks=[scripted([3, 2, 1, 4, 4]), gb.EarlyStopping(patience=2)])
    assert_close(until, stopped, 0.0)
    for m, moment in until.state.host().items():
        for key, value in moment.items():
            assert value.tobytes() == stopped.state.host()[m][key].tobytes()


def test_begin_and_end_surround_every_fit_however_it_ends(rng):
    x, t = regression(rng, 8)
    said = []

    class Loud:
        def begin(self, trainer):
            said.append("begin")

        def __call__(self, trainer):
            said.append(trainer.epoch)
            if trainer.epoch == 3:
                raise KeyError("no more")

        def end(self, trainer):
            said.append("end")

    trainer = gb.Trainer(gb.mlp([3, 2]), "mse", seed=0)
    trainer.fit(x, t, epochs=1, callbacks=[Loud()])
    with pytest.raises(KeyError):
        trainer.fit(x, t, epochs=9, callbacks=[Loud()])
    assert said == ["begin", 1, "end", "begin", 2, 3, "end"]


@pytest.mark.parametrize("bad, kind, message", [
    ({"patience": 0}, ValueError, "EarlyStopping: patience must be at least 1, got 0"),
    ({"min_delta": -1}, ValueError, "EarlyStopping: min_delta must be >= 0, got -1"),
    ({"restore_best": 1}, TypeError, "EarlyStopping: restore_best must be True or False, got int 1"),
])  # fmt: skip
def test_bad_patience(bad, kind, message):
    with pytest.raises(kind, match=message):
        gb.EarlyStopping(**bad)


def test_an_unknown_figure_lists_those_there_are(rng):
    x, t = regression(rng, 8)
    with pytest.raises(ValueError, match="EarlyStopping: 'val_loss' is not measured in this fit, which has loss, r2"):
        gb.Trainer(gb.mlp([3, 2]), "mse", seed=0).fit(x, t, epochs=1, callbacks=[gb.EarlyStopping("val_loss")])


# ---- groups --------------------------------------------------------------------------------------------------------


def test_groups_step_by_their_own_numbers(rng, host):
    """One step of plain descent: each parameter's rate shows in how far it went."""
    x, t = regression(rng, 8)
    start = weights(trained(x, t, gb.SGD(1e-300), epochs=1))
    plain = weights(trained(x, t, gb.SGD(1.0), epochs=1))
    groups = {"*.bias": {"lr": 0.5}, "1.*": {"lr": 0.25, "weight_decay": 0.1}, "1.bias": {"lr": 2.0}}
    grouped = weights(trained(x, t, gb.SGD(1.0, groups=groups), host, epochs=1))
    rates = {"0.weight": 1.0, "0.bias": 0.5, "1.weight": 0.25, "1.bias": 2.0}
    for key, rate in rates.items():
        g = start[key] - plain[key] + (0.1 * start[key] if key.startswith("1.") else 0)
        np.testing.assert_allclose(start[key] - grouped[key], rate * g, rtol=1e-11, atol=1e-14)


def test_a_group_may_have_a_schedule_of_its_own(rng):
    x, t = regression(rng, 8)
    groups = {"0.*": {"lr": gb.schedules.Step(0.1, every=1, decay=0.5)}}
    a = trained(x, t, gb.SGD(0.1, groups=groups), epochs=3, batch=8)
    b = gb.Trainer(gb.mlp([3, 5, 2], "tanh", dtype="float64"), "mse", gb.SGD(0.1), seed=0)
    for rate in (0.1, 0.05, 0.025):
        b.use(gb.SGD(0.1, groups={"0.*": {"lr": rate}}))
        b.fit(x, t, epochs=1, batch_size=8)
    assert_close(a, b)


@pytest.mark.parametrize("groups, kind, message", [
    ({"7.*": {"lr": 1.0}}, ValueError, r"the optimizer's group '7\.\*' matches no parameter; the model has 0\.weight"),
    ({"0.*": {"rate": 1.0}}, ValueError, r"SGD: groups\['0\.\*'\]: unknown setting 'rate'; choose from lr"),
    ({"0.*": {"lr": -1.0}}, ValueError, "SGD: lr must be > 0, got -1"),
    ({"0.*": {"momentum": 0.9}}, ValueError, "momentum asks for another rule; all groups share one"),
    ({"0.*": 0.1}, TypeError, "SGD: groups must map patterns to settings"),
])  # fmt: skip
def test_bad_groups(groups, kind, message):
    with pytest.raises(kind, match=message):
        gb.Trainer(gb.mlp([3, 2]), optimizer=gb.SGD(0.1, groups=groups))


# ---- the order of the rows -----------------------------------------------------------------------------------------


def test_shuffle_may_be_a_function(rng):
    x, t = regression(rng)
    orders = [np.random.Generator(np.random.PCG64([0, epoch])).permutation(22) for epoch in range(3)]
    given = iter(orders)
    own = gb.Trainer(gb.mlp([3, 5, 2], "tanh", dtype="float64"), "mse", gb.SGD(0.1), seed=0)
    own.fit(x, t, epochs=3, batch_size=8, shuffle=lambda rows: next(given))
    assert_close(own, trained(x, t), 0.0)
    with pytest.raises(ValueError, match=r"fit: shuffle\(22\) must return the numbers 0 to 21 in some order"):
        own.fit(x, t, epochs=1, shuffle=lambda rows: np.zeros(rows, int))


# ---- another optimizer ---------------------------------------------------------------------------------------------


def test_the_same_rule_goes_on_with_its_moments_and_its_count(rng):
    x, t = regression(rng)
    whole, parts = (gb.Trainer(gb.mlp([3, 5, 2], dtype="float64"), "mse", gb.Adam(0.01), seed=0) for _ in range(2))
    whole.fit(x, t, epochs=4, batch_size=8)
    parts.fit(x, t, epochs=2, batch_size=8)
    parts.use(gb.Adam(lambda k: 0.01))
    parts.fit(x, t, epochs=2, batch_size=8)
    assert_close(whole, parts, 0.0)
    assert parts.updates == parts.step == 12


def test_another_rule_begins_anew(rng):
    """Adam's first step is its rate, however many updates others made."""
    x, t = regression(rng, 8)
    trainer = trained(x, t, gb.SGD(0.01, momentum=0.9), epochs=50)
    before = weights(trainer)
    trainer.use(gb.Adam(1e-3))
    trainer.fit(x, t, epochs=1, batch_size=8)
    for key, value in weights(trainer).items():
        np.testing.assert_allclose(np.abs(value - before[key]), 1e-3, rtol=1e-4)
    assert (trainer.updates, trainer.step, trainer.epoch) == (1, 51, 51)
    trainer.use(gb.SGD(gb.schedules.Step(0.1, every=1)))  # counts from here
    assert trainer.fit(x, t, epochs=2, batch_size=8)["lr"][-2:] == pytest.approx([0.1, 0.01])


def test_what_a_trainer_was_made_with_cannot_be_changed_under_it(rng):
    x, t = regression(rng, 8)
    trainer = trained(x, t)
    for key in ("clip_norm", "clip_value", "penalty", "accumulate", "objective", "precision"):
        with pytest.raises(AttributeError):
            setattr(trainer, key, 1)
    with pytest.raises(RuntimeError, match="use: this trainer is training; change the optimizer between fits"):
        trainer.fit(x, t, epochs=1, callbacks=[lambda t: t.use("adam")])
    trainer.fit(x, t, epochs=1)


def test_a_schedule_is_asked_for_the_updates_there_are_alone(rng):
    x, t = regression(rng, 16)
    asked = []
    trained(x, t, gb.SGD(lambda k: asked.append(k) or 0.1), epochs=2, batch=4, accumulate=4)
    assert asked == [0, 1]


def test_a_group_of_matrices_and_vectors_decays_its_matrices_alone(rng):
    still = {"0.*": {"weight_decay": 0.1}, "1.bias": {"weight_decay": 0.2}}
    model = gb.Sequential(gb.Dense(3, 2, init=2.0, bias_init=2.0), gb.Dense(2, 1, bias_init=2.0), dtype="float64")
    trainer = gb.Trainer(model, lambda output, target: (output * 0).mean(), gb.SGD(1.0, groups=still), seed=0)
    trainer.fit(np.ones((4, 3)), np.zeros(4), epochs=1)
    state = weights(trainer)
    assert (state["0.weight"] == 1.8).all() and (state["0.bias"] == 2).all() and (state["1.bias"] == 1.6).all()


def test_settings_of_groups_are_copied():
    groups = {"0.*": {"lr": 0.5}}
    optimizer = gb.SGD(groups=groups)
    groups["0.*"]["lr"] = 7.0
    groups.clear()
    assert optimizer.groups == {"0.*": {"lr": 0.5}}


def test_a_model_that_is_frozen_whole_is_only_looked_at(rng):
    x, t = regression(rng, 8)
    trainer = trained(x, t)
    before = weights(trainer)
    for p in trainer.model.named_parameters().values():
        p.requires_grad = False
    trainer.fit(x, t, epochs=1)
    assert all((value == before[key]).all() for key, value in weights(trainer).items())


def test_an_overflowed_gradient_is_skipped_not_clipped(device):
    """In float16 the first row's gradient overflows at the first scale of the loss: its sign would be wrong too."""
    model = gb.Sequential(gb.Dense(1, 1, init="zeros", bias=False))
    settings = {"optimizer": gb.SGD(1.0), "precision": "float16", "clip_value": 0.01, "device": device}
    trainer = gb.Trainer(model, "sse", **settings)
    x, t = np.ones((11, 1)), np.r_[-12.0, np.full(10, 4.0)][:, None]
    trainer.fit(x, t, epochs=3, batch_size=11)
    assert weights(trainer)["0.weight"].item() in (pytest.approx(0.01), pytest.approx(0.02))


def test_ends_are_called_for_all_that_were_begun(rng):
    x, t = regression(rng, 8)
    said = []

    class Loud:
        def __init__(self, name, fails=""):
            self.name, self.fails = name, fails

        def begin(self, trainer):
            if self.fails == "begin":
                raise KeyError(self.name)
            said.append(f"begin {self.name}")

        def __call__(self, trainer):
            pass

        def end(self, trainer):
            said.append(f"end {self.name}")
            if self.fails == "end":
                raise KeyError(self.name)

    trainer = gb.Trainer(gb.mlp([3, 2]), "mse", seed=0)
    with pytest.raises(KeyError):
        trainer.fit(x, t, epochs=1, callbacks=[Loud("a"), Loud("b", "end")])
    with pytest.raises(KeyError):
        trainer.fit(x, t, epochs=1, callbacks=[Loud("c"), Loud("d", "begin")])
    assert said == ["begin a", "begin b", "end b", "end a", "begin c", "end c"]
    trainer.fit(x, t, epochs=1)


def test_early_stopping_may_be_copied_while_it_watches(rng):
    x, t = regression(rng, 8)
    stop, copies = gb.EarlyStopping("loss"), []
    gb.Trainer(gb.mlp([3, 2]), "mse", seed=0).fit(
        x, t, 2, callbacks=[stop, lambda t: copies.append(copy.deepcopy(stop))]
    )
    assert [c.best_epoch for c in copies] == [1, 2]
