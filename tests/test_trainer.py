"""The Trainer: what fit, evaluate and predict promise, on good data and on bad."""

import copy
import gc
import pickle
import signal
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import runs
from gpubackprop.plan import recording
from gpubackprop.precision import PRECISIONS


def state_bits(model):
    return {k: a.tobytes() for k, a in model.state_dict().items()}


def everything(trainer):
    """What training changes, to compare two trainers bit for bit."""
    moments = {k: b.tobytes() for k, b in trainer.state.moments.items()}
    control = trainer._table.control.tolist()
    return state_bits(trainer.model), moments, trainer.history, trainer.epoch, trainer.step, control


def classes(rng, n=50, columns=4, outputs=3):
    return rng.normal(size=(n, columns)).astype(np.float32), rng.integers(0, outputs, n)


def regression(rng, n=50, columns=4, outputs=1):
    x = rng.normal(size=(n, columns)).astype(np.float32)
    return x, np.tanh(x @ rng.normal(size=(columns, outputs))).astype(np.float32)


def busy(seed=0, loss="cross_entropy", outputs=3, **options):
    """A trainer of a model with everything that has state: dropout, batch statistics, moments."""
    model = gb.Sequential(
        gb.Dense(4, 8, "relu"), gb.BatchNorm(8), gb.Dropout(0.2), gb.Residual(gb.Dense(8, 8, "tanh")), gb.LayerNorm(8),
        gb.Dense(8, outputs),
    )  # fmt: skip
    return gb.Trainer(model, loss, seed=seed, **options)


@pytest.fixture
def handler():
    before = signal.getsignal(signal.SIGINT)
    yield before
    signal.signal(signal.SIGINT, before)


# ---- learning ------------------------------------------------------------------------------------------------------


def test_digits_are_learnt():
    x, x_test, y, y_test = gb.split(*gb.datasets.digits(), test=0.2, seed=0)
    trainer = gb.Trainer(gb.mlp([64, 64, 10]), optimizer=gb.Adam(lr=3e-3), metrics=["accuracy"], seed=0)
    history = trainer.fit(x, y, epochs=12, batch_size=64, validation_data=(x_test, y_test))
    assert list(history) == ["loss", "accuracy", "val_loss", "val_accuracy", "gap"]
    assert {len(v) for v in history.values()} == {12}
    assert all(type(f) is float for v in history.values() for f in v)
    assert np.diff(history["loss"]).max() < 0.01 and history["loss"][-1] < 0.1 * history["loss"][0]
    assert history["val_accuracy"][-1] > 0.95
    assert trainer.evaluate(x_test, y_test) == {k: history[f"val_{k}"][-1] for k in ("loss", "accuracy")}
    assert (trainer.model.predict_classes(x_test) == y_test).mean() == history["val_accuracy"][-1]
    assert history is trainer.history


def test_counts_are_learnt_as_logarithms_of_means(tmp_path, rng):
    x = rng.uniform(-1, 1, (400, 2))
    means = np.exp(1 + x @ [0.5, -1])
    model = gb.mlp([2, 16, 1], "tanh").initialize(0)
    gb.Trainer(model, "poisson", gb.Adam(0.02), seed=0).fit(x, rng.poisson(means), epochs=60, batch_size=50)
    gb.save_model(model, tmp_path / "counts.safetensors")
    predicted = runs.predict(gb.load_model(tmp_path / "counts.safetensors"), x).value
    np.testing.assert_array_equal(predicted, np.exp(model.predict(x))[:, 0])
    assert np.abs(predicted / means - 1).mean() < 0.15
    with pytest.raises(ValueError, match="predict_proba: the model was trained for regression"):
        model.predict_proba(x)
    with pytest.raises(ValueError, match="y has -1 at row 1; numbers of poisson must not be negative"):
        gb.Trainer(model, "poisson").fit(x[:2], [[0], [-1]])


@pytest.mark.parametrize("loss", ["mse", "half_mse", "sse"])
def test_a_regression_is_learnt(loss, rng):
    x, y = regression(rng, 200)
    trainer = gb.Trainer(gb.mlp([4, 32, 1], "tanh"), loss, gb.Adam(0.02), seed=0)
    history = trainer.fit(x, y, epochs=60, batch_size=32)
    assert list(history) == ["loss", "r2"]
    assert history["loss"][-1] < 0.05 * history["loss"][0] and history["r2"][-1] > 0.97


# ---- the same bits -------------------------------------------------------------------------------------------------


def test_a_seed_fixes_every_bit(rng):
    x, y = classes(rng)
    runs = []
    for seed in (0, 0, 1):
        trainer = busy(seed)
        trainer.fit(x, y, epochs=4, batch_size=16, validation_data=(x, y))
        runs.append(everything(trainer))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0] and runs[0][2] != runs[2][2]


def test_without_a_seed_a_fresh_one_is_drawn_and_kept(rng):
    x, y = classes(rng)
    trainers = [busy(None) for _ in range(2)]
    assert trainers[0].seed != trainers[1].seed
    again = busy(trainers[0].seed)
    for trainer in (trainers[0], again):
        trainer.fit(x, y, epochs=2, batch_size=16)
    assert everything(trainers[0]) == everything(again)


@pytest.mark.parametrize("optimizer", [gb.Adam(0.01), gb.AdamW(0.01), gb.SGD(0.1), gb.SGD(0.05, momentum=0.9)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_second_fit_continues(optimizer, shuffle, rng):
    x, y = classes(rng)
    whole, parts = busy(optimizer=optimizer), busy(optimizer=optimizer)
    whole.fit(x, y, epochs=5, batch_size=16, shuffle=shuffle)
    for epochs in (2, 3):
        parts.fit(x, y, epochs=epochs, batch_size=16, shuffle=shuffle)
    assert everything(parts) == everything(whole)


def test_progress_validation_and_reading_change_no_bit(rng, capsys):
    x, y = classes(rng)
    plain, watched = busy(), busy()
    plain.fit(x, y, epochs=4, batch_size=16)

    def look(trainer):
        trainer.evaluate(x, y)
        trainer.predict(x)
        trainer.plan(16)
        trainer.model.predict_proba(x)

    watched.fit(x, y, epochs=4, batch_size=16, validation_data=(x[:9], y[:9]), callbacks=[look], progress=True)
    assert state_bits(watched.model) == state_bits(plain.model)
    assert watched.history["loss"] == plain.history["loss"]


def steep(output, target):
    """A loss for which float16 brings its scale down."""
    return gb.softmax_cross_entropy(output, target) * 100


@pytest.mark.parametrize("how", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("optimizer", [gb.Adam(0.01), gb.SGD(1e-3, momentum=0.9)], ids=["adam", "momentum"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_copied_trainer_continues_identically(how, optimizer, precision, rng):
    x, y = classes(rng)
    trainer = busy(0, steep, optimizer=optimizer, precision=precision, metrics=[])
    for epochs in (0, 2):
        if epochs:
            trainer.fit(x, y, epochs=epochs, batch_size=16)
        twin = how(trainer)
        before = everything(trainer)
        assert everything(twin) == before
        twin.fit(x, y, epochs=3, batch_size=16)
        assert everything(trainer) == before  # nothing is shared
        trainer.fit(x, y, epochs=3, batch_size=16)
        assert everything(twin) == everything(trainer)


def test_two_trainers_of_one_model_have_their_own_moments(rng):
    x, y = classes(rng)
    trainer = busy()
    trainer.fit(x, y, epochs=2, batch_size=16)
    second = gb.Trainer(trainer.model, seed=5)
    assert second.epoch == 0 and second.history == {}
    assert not any(b.any() for b in second.state.moments.values())
    before = state_bits(trainer.model)
    second.fit(x, y, epochs=1, batch_size=16)
    assert state_bits(trainer.model) != before


# ---- batches -------------------------------------------------------------------------------------------------------


def drift(n, rng, columns=1):
    """A model, its data and a loss whose gradient in the weights is the mean of the batch's rows, whatever they are."""
    model = gb.Sequential(gb.Dense(columns, 1, bias=False, init=0.0), dtype="float64")
    return model, rng.normal(size=(n, columns)), lambda output, target: output.mean()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n, batch_size", [(12, 4), (13, 4), (5, 2), (7, 7), (7, 100), (6, 1)])
def test_each_row_is_used_once_per_epoch_and_the_last_batch_averaged_by_its_size(n, batch_size, shuffle, rng):
    model, x, loss = drift(n, rng, columns=n)
    x = np.eye(n)  # so each weight records what its row was given
    gb.Trainer(model, loss, gb.SGD(1.0), seed=0).fit(x, np.zeros(n), 1, batch_size, shuffle=shuffle)
    w, size, last = -model.state_dict()["0.weight"].ravel(), min(batch_size, n), n % min(batch_size, n)
    expected = sorted([1 / size] * (n - last) + [1 / last for _ in range(last)])
    np.testing.assert_allclose(sorted(w), expected, rtol=1e-12)
    if not shuffle and last:
        np.testing.assert_allclose(w[-last:], 1 / last, rtol=1e-12)


def test_seed_20_one_row_and_all_rows_are_sgd_and_gradient_descent(rng):
    x, t = rng.normal(size=(7, 3)), rng.normal(size=(7, 1))
    for batch_size in (1, 7, 3):
        model = gb.Sequential(gb.Dense(3, 1, bias=False), dtype="float64").initialize(1)
        w = model.state_dict()["0.weight"]
        gb.Trainer(model, "mse", gb.SGD(0.05), seed=0).fit(x, t, epochs=4, batch_size=batch_size, shuffle=False)
        for _ in range(4):
            for start in range(0, 7, batch_size):
                a, b = x[start : start + batch_size], t[start : start + batch_size]
                w = w - 0.05 * 2 * a.T @ (a @ w - b) / len(a)
        np.testing.assert_allclose(model.state_dict()["0.weight"], w, rtol=1e-12)


def test_shuffling_differs_from_epoch_to_epoch_and_by_the_seed(rng):
    n, orders = 40, {}
    for seed in (0, 1):
        model, path = gb.Sequential(gb.Dense(1, 1, bias=False, init=0.0), dtype="float64"), []
        trainer = gb.Trainer(model, lambda output, target: output.mean(), gb.SGD(1.0, momentum=0.9), seed=seed)
        note = lambda t, m=model, p=path: p.append(m.state_dict()["0.weight"].item())  # noqa: E731
        trainer.fit(np.arange(n)[:, None] / n, np.zeros(n), epochs=3, batch_size=1, callbacks=[note])
        orders[seed] = np.diff([0.0, *path])
    assert len({*orders[0], *orders[1]}) == 6  # the velocity that each epoch leaves depends on its order


LOSSES = {
    "cross_entropy": lambda rng: (rng.integers(0, 3, 12), "cross_entropy"),
    "soft labels": lambda rng: (rng.dirichlet([1, 1, 1], 12), "cross_entropy"),
    "bce": lambda rng: (rng.integers(0, 2, (12, 3)), "bce"),
    "mse": lambda rng: (rng.normal(size=(12, 3)), "mse"),
    "half_mse": lambda rng: (rng.normal(size=(12, 3)), "half_mse"),
    "sse": lambda rng: (rng.normal(size=(12, 3)), "sse"),
    "half_sse": lambda rng: (rng.normal(size=(12, 3)), "half_sse"),
    "bce_sum": lambda rng: (rng.integers(0, 2, (12, 3)), "bce_sum"),
    "poisson": lambda rng: (rng.poisson(1, (12, 3)), "poisson"),
    "poisson_sum": lambda rng: (rng.poisson(1, (12, 3)), "poisson_sum"),
    "own": lambda rng: (rng.normal(size=(12, 3)), lambda output, target: gb.abs(output - target).mean()),
}


def step_of(weights, x, y, loss):
    """How one step of SGD(lr=1) on these rows moves the weights: the gradient."""
    model = gb.mlp([4, 5, 3], "tanh", dtype="float64")
    model.load_state_dict(weights)
    gb.Trainer(model, loss, gb.SGD(1.0), metrics=[], seed=0).fit(x, y, epochs=1, batch_size=len(x), shuffle=False)
    return {k: weights[k] - a for k, a in model.state_dict().items()}


@pytest.mark.parametrize("name", LOSSES)
def test_the_batch_gradient_is_the_mean_of_its_rows(name, rng):
    y, loss = LOSSES[name](rng)
    x, weights = rng.normal(size=(12, 4)), gb.mlp([4, 5, 3], dtype="float64").initialize(3).state_dict()
    whole = step_of(weights, x, y, loss)
    rows = [step_of(weights, x[i : i + 1], y[i : i + 1], loss) for i in range(12)]
    twice = step_of(weights, np.tile(x, (2, 1)), np.concatenate([y, y]), loss)
    for key, gradient in whole.items():
        np.testing.assert_allclose(gradient, np.mean([r[key] for r in rows], 0), rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(gradient, twice[key], rtol=1e-10, atol=1e-13)  # duplicating data changes nothing


def test_the_reported_loss_is_the_mean_over_rows_not_over_batches(rng):
    x, y = regression(rng, 10)
    model = gb.mlp([4, 1]).initialize(0)
    before = gb.Trainer(model, "mse", seed=0).evaluate(x, y)
    frozen = gb.Trainer(model, "mse", gb.SGD(1e-30), seed=0)
    assert frozen.fit(x, y, epochs=1, batch_size=4)["loss"][0] == pytest.approx(before["loss"], rel=1e-6)
    assert frozen.history["r2"][0] == pytest.approx(before["r2"], rel=1e-6)


def test_many_batch_sizes_in_turn(rng):
    x, y = classes(rng, 60)
    for trainer in (busy(), busy()):
        losses = [trainer.fit(x, y, epochs=1, batch_size=b)["loss"][-1] for b in [*range(10, 25), 10, 60, 16]]
        assert trainer.epoch == len(losses) == 18
    weights = state_bits(trainer.model)
    third = busy()
    for b in [*range(10, 25), 10, 60, 16]:
        third = copy.deepcopy(third)  # without any recorded step
        third.fit(x, y, epochs=1, batch_size=b)
    assert state_bits(third.model) == weights


# ---- figures -------------------------------------------------------------------------------------------------------


def numpy_loss(name, z, y):
    if name == "cross_entropy":
        log_p = z - z.max(1, keepdims=True)
        log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
        t = np.eye(z.shape[1])[y] if y.ndim == 1 else y
        return -(t * log_p).sum(1).mean()
    bce, squares, poisson = (
        np.logaddexp(0, z) - z * y,
        (z - y) ** 2,
        np.exp(z) - y * z + y * np.log(np.maximum(y, 1e-300)) - y,
    )
    each = {"mse": squares, "half_mse": squares / 2, "sse": squares, "half_sse": squares / 2}
    each |= {"bce": bce, "bce_sum": bce, "poisson": poisson, "poisson_sum": poisson}
    return each[name].sum(1).mean() / (1 if name.endswith(("sse", "sum")) else z.shape[1])


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "own"])
@pytest.mark.parametrize("n", [1, 12, 1500])
def test_evaluate_equals_numpy(name, n, rng):
    y = np.concatenate([LOSSES[name](rng)[0] for _ in range(125)])[:n]
    loss = LOSSES[name](rng)[1]
    x = rng.normal(size=(n, 4))
    trainer = gb.Trainer(gb.Sequential(gb.Dense(4, 3), gb.Dropout(0.5), dtype="float64"), loss, seed=0)
    z, before = trainer.predict(x), state_bits(trainer.model)
    figures = trainer.evaluate(x, y)
    assert figures.pop("loss") == pytest.approx(numpy_loss(loss, z, y), rel=1e-12)
    if name == "cross_entropy":
        assert figures == {"accuracy": (z.argmax(1) == y).mean()}
    elif name.startswith("bce"):
        assert figures == {"accuracy": pytest.approx(((z > 0) == (y > 0.5)).mean())}
    elif name.startswith(("soft labels", "poisson")):
        assert figures == {}
    elif n > 1:
        assert figures == {"r2": pytest.approx((1 - ((y - z) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)).mean())}
    assert state_bits(trainer.model) == before and trainer.history == {} and trainer.step == 0


def predicting(values, loss="mse", metrics=("r2", "mse", "mae")):
    """A trainer whose model returns x times `values`."""
    model = gb.Sequential(gb.Dense(1, len(values), bias=False, init=np.array([values])), dtype="float64")
    return gb.Trainer(model, loss, metrics=metrics, seed=0)


#    outputs for x = 1, 2, 3   targets                          r2              mse             mae
FIGURES = [
    ([1.0],      [1, 2, 3],                                     1.0,            0.0,            0.0),
    ([1.0],      [2, 4, 6],                                     1 - 14 / 8,     14 / 3,         2.0),
    ([1.0],      [3, 2, 1],                                     -3.0,           8 / 3,          4 / 3),
    ([0.0],      [1, 2, 3],                                     1 - 14 / 2,     14 / 3,         2.0),
    ([1.0],      [5, 5, 5],                                     0.0,            29 / 3,         3.0),
    ([0.0],      [0, 0, 0],                                     1.0,            0.0,            0.0),
    ([1.0, 0.0], [[1, 7], [2, 7], [3, 7]],                      0.5,            24.5,           3.5),
    ([1.0, 2.0], [[1, 2], [2, 4], [3, 9]],                      (1 + 1 - 9 / 26) / 2, 1.5,      0.5),
]  # fmt: skip


@pytest.mark.parametrize("outputs, targets, r2, mse, mae", FIGURES)
def test_regression_figures_by_hand(outputs, targets, r2, mse, mae):
    trainer = predicting(outputs)
    figures = trainer.evaluate([[1], [2], [3]], targets)
    assert figures == {k: pytest.approx(v, abs=1e-12) for k, v in
                       {"loss": mse, "r2": r2, "mse": mse, "mae": mae}.items()}  # fmt: skip


def test_accuracy_by_hand():
    trainer = predicting([1.0, -1.0], "cross_entropy", ["accuracy"])
    assert trainer.evaluate([[1], [2], [-3], [4]], [0, 1, 1, 0])["accuracy"] == 0.75
    trainer = predicting([1.0], "bce", ["accuracy"])
    assert trainer.evaluate([[1], [2], [-3], [0]], [1, 0, 0, 0])["accuracy"] == 0.75
    trainer = predicting([1.0, -1.0], "bce", ["accuracy"])
    assert trainer.evaluate([[1], [2]], [[1, 1], [1, 0]])["accuracy"] == 0.75


def test_r2_of_many_batches_is_that_of_all_rows(rng):
    x, y = regression(rng, 23, outputs=2)
    trainer = gb.Trainer(gb.mlp([4, 2]), "mse", gb.SGD(1e-30), metrics=["r2", "mae"], seed=0)
    z = trainer.predict(x).astype(np.float64)
    trainer.fit(x, y, epochs=1, batch_size=5, validation_data=(x, y))
    r2 = (1 - ((y - z) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)).mean()
    for prefix in ("", "val_"):
        assert trainer.history[f"{prefix}r2"] == [pytest.approx(r2, rel=1e-5)]
        assert trainer.history[f"{prefix}mae"] == [pytest.approx(np.abs(z - y).mean(), rel=1e-5)]


def test_metrics_may_be_left_out(rng):
    x, y = classes(rng)
    assert list(gb.Trainer(gb.mlp([4, 3]), metrics=[], seed=0).fit(x, y, epochs=1)) == ["loss"]


def test_validation_does_not_train(rng):
    x, y = classes(rng)
    with_, without = busy(), busy()
    with_.fit(x, y, epochs=3, batch_size=16, validation_data=(x[:7], y[:7]))
    without.fit(x, y, epochs=3, batch_size=16)
    assert state_bits(with_.model) == state_bits(without.model)
    assert with_.history["val_loss"][-1] == with_.evaluate(x[:7], y[:7])["loss"]
    losses = zip(with_.history["val_loss"], with_.history["loss"], strict=True)
    assert with_.history["gap"] == [held_out - own for held_out, own in losses]
    assert set(with_.history) - set(without.history) == {"val_loss", "val_accuracy", "gap"}


def test_history_has_one_float_per_epoch_also_when_validation_comes_later(rng):
    x, y = classes(rng)
    trainer = busy()
    trainer.fit(x, y, epochs=2)
    trainer.fit(x, y, epochs=1, validation_data=(x, y))
    trainer.fit(x, y, epochs=1)
    assert {len(v) for v in trainer.history.values()} == {4}
    assert np.isnan(trainer.history["val_loss"]).tolist() == [True, True, False, True]


# ---- targets -------------------------------------------------------------------------------------------------------


class Frame:
    """As much of a pandas object as NumPy users meet: columns of objects, a to_numpy."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.shape, self.ndim, self.dtype = self.values.shape, self.values.ndim, np.dtype(object)

    def __len__(self):
        return len(self.values)

    def to_numpy(self):
        return self.values.astype(object)


class Column:
    """The least that has a to_numpy: no shape, no dtype, no __array__."""

    def __init__(self, values):
        self.to_numpy = lambda: np.asarray(values)
        self.length = len(values)

    def __len__(self):
        return self.length


FORMS = {
    "list": lambda a: np.asarray(a).tolist(),
    "int32": lambda a: a.astype(np.int32),
    "uint8": lambda a: a.astype(np.uint8),
    "bool": lambda a: a.astype(bool),
    "integral floats": lambda a: a.astype(np.float64),
    "big endian": lambda a: a.astype(">i8"),
    "strided": lambda a: np.repeat(a, 2)[::2],
    "read-only": lambda a: np.frombuffer(a.astype(np.int64).tobytes(), np.int64),
    "frame": Frame,
    "column": Column,
    "tensor": gb.tensor,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss, outputs", [("cross_entropy", 2), ("bce", 1), ("mse", 1)])
def test_every_form_of_y_means_the_same(form, loss, outputs, rng):
    x, y = classes(rng, outputs=2)
    expected, got = busy(0, loss, outputs), busy(0, loss, outputs)
    expected.fit(x, y, epochs=2, batch_size=16)
    got.fit(x, FORMS[form](y), epochs=2, batch_size=16, validation_data=(x, FORMS[form](y)))
    assert state_bits(got.model) == state_bits(expected.model)
    assert got.history["loss"] == expected.history["loss"]


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_one_output_takes_a_column_as_it_takes_a_vector(loss, rng):
    x, y = classes(rng, outputs=2)
    runs = []
    for target in (y, y[:, None], y[:, None].astype(float)):
        trainer = busy(0, loss, 1)
        trainer.fit(x, target, epochs=2, batch_size=16)
        runs.append(everything(trainer))
    assert runs[0] == runs[1] == runs[2]


def test_one_hot_rows_are_labels(rng):
    x, y = classes(rng)
    hard, soft = busy(), busy()
    hard.fit(x, y, epochs=3, batch_size=16)
    soft.fit(x, np.eye(3)[y], epochs=3, batch_size=16)
    np.testing.assert_allclose(soft.history["loss"], hard.history["loss"], rtol=1e-5)
    assert soft.history["accuracy"] == hard.history["accuracy"]


def test_x_in_float64_is_cast_once_and_left_alone(rng):
    x, y = rng.normal(size=(50, 4)), rng.integers(0, 3, 50)
    kept, runs = x.copy(), []
    for rows in (x, x.astype(np.float32), np.asfortranarray(x), x.tolist(), Frame(x), gb.tensor(x)):
        trainer = busy()
        trainer.fit(rows, y, epochs=2, batch_size=16)
        runs.append(everything(trainer))
        assert trainer.model.state_dict()["0.weight"].dtype == np.float32
    assert all(r == runs[0] for r in runs)
    np.testing.assert_array_equal(x, kept)


def test_a_float64_model_keeps_float64(rng):
    x, y = regression(rng)
    model = gb.mlp([4, 6, 1], "tanh", dtype="float64")
    trainer = gb.Trainer(model, "mse", seed=0)
    trainer.fit(x, y, epochs=2, batch_size=16)
    assert {a.dtype for a in model.state_dict().values()} == {np.dtype(np.float64)}
    assert {b.dtype for b in trainer.state.moments.values()} == {np.dtype(np.float64)}
    state = model.state_dict()
    h = np.tanh(x.astype(np.float64) @ state["0.weight"] + state["0.bias"])
    np.testing.assert_allclose(model.predict(x), h @ state["1.weight"] + state["1.bias"], rtol=1e-12, atol=1e-13)


# ---- users' losses -------------------------------------------------------------------------------------------------


def test_a_users_loss_is_the_builtin_one_written_out(rng):
    x, y = regression(rng, outputs=2)
    own, builtin = busy(0, lambda output, target: ((output - target) ** 2).mean(), 2), busy(0, "mse", 2)
    own.fit(x, y, epochs=3, batch_size=16, validation_data=(x, y))
    builtin.fit(x, y, epochs=3, batch_size=16, validation_data=(x, y))
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose(own.history[key], builtin.history[key], rtol=1e-4)
    assert list(own.history) == ["loss", "val_loss", "gap"]


def test_a_users_loss_gets_integers_as_labels(rng):
    x, y = classes(rng)
    own, builtin = busy(0, gb.softmax_cross_entropy, metrics=["accuracy"]), busy(0)
    own.fit(x, y, epochs=3, batch_size=16)
    builtin.fit(x, y, epochs=3, batch_size=16)
    np.testing.assert_allclose(own.history["loss"], builtin.history["loss"], rtol=1e-5)
    assert own.history["accuracy"] == builtin.history["accuracy"]


def test_integers_for_one_output_are_numbers_to_a_users_loss(rng):
    x, y = rng.normal(size=(50, 4)), rng.integers(-3, 4, 50)
    own, builtin = busy(0, lambda output, target: ((output - target) ** 2).mean(), 1), busy(0, "mse", 1)
    for trainer in (own, builtin):
        trainer.fit(x, y, epochs=3, batch_size=16)
    np.testing.assert_allclose(own.history["loss"], builtin.history["loss"], rtol=1e-4)


@pytest.mark.parametrize("labels", [[0, 1, 3, 0, 1, 0], [0, -1, 1, 2, 0, 0]], ids=["too large", "negative"])
def test_labels_out_of_range_are_refused_for_a_users_loss_too(labels):
    trainer = gb.Trainer(gb.mlp([4, 3]), gb.softmax_cross_entropy, seed=0)
    for call in (trainer.fit, trainer.evaluate):
        with pytest.raises(ValueError, match=r"label (3|-1) at row \d is out of range, expected 0 to 2"):
            call(np.ones((6, 4)), labels)


BAD_RETURNS = {
    "a number": (lambda o, t: 1.0, TypeError, "the callable returned float; expected a tensor of one element"),
    "nothing": (lambda o, t: None, TypeError, "the callable returned NoneType; expected a tensor of one element"),
    "an array": (lambda o, t: np.ones(1), TypeError, "the callable returned ndarray; expected a tensor of one"),
    "rows": (lambda o, t: (o - t) ** 2, TypeError, r"the callable returned shape \(16, 2\); expected a tensor of one"),
    "a value asked for": (lambda o, t: o.sum() * float(o.sum()), RuntimeError, "while a plan records"),
    "a branch": (lambda o, t: o.sum() if o.sum() > 0 else -o.sum(), RuntimeError, "while a plan records"),
    "its own error": (lambda o, t: {}["key"], KeyError, "key"),
}


@pytest.mark.parametrize("case", BAD_RETURNS)
def test_a_faulty_loss_changes_nothing(case, rng):
    loss, kind, message = BAD_RETURNS[case]
    x, y = regression(rng, outputs=2)
    trainer = busy(0, loss, 2)
    before = everything(trainer)
    with pytest.raises(kind, match=message):
        trainer.fit(x, y, batch_size=16)
    assert everything(trainer) == before


def stumbling(fault, armed, dry):
    """A loss that does `fault` once it is armed: at its next call, or (dry=False) only while a step is recorded."""

    def loss(output, target):
        plan = recording()
        if armed and (dry or (plan is not None and not plan.dry)):
            armed.clear()
            fault()
        return gb.mse(output, target)

    return loss


def fail():
    raise OSError("the disk was full")


def press_twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # the second goes through at once


@pytest.mark.parametrize("dry", [True, False], ids=["at once", "while recorded"])
@pytest.mark.parametrize("fault, kind", [(fail, OSError), (press_twice, KeyboardInterrupt)], ids=["error", "Ctrl-C"])
def test_a_step_cut_short_is_undone_and_fit_goes_on(fault, kind, dry, rng, handler):
    x, y = regression(rng)
    armed, optimizer = [], gb.SGD(0.01, momentum=0.9, nesterov="lookahead")  # which moves weights before the gradient
    trainer, other = (
        busy(0, stumbling(fault, armed, dry), 1, optimizer=optimizer),
        busy(0, "mse", 1, optimizer=optimizer),
    )
    for t in (trainer, other):
        t.fit(x, y, epochs=2, batch_size=25)
    armed.append(True)
    kept = copy.deepcopy(everything(trainer)[:2]), trainer.step
    with pytest.raises(kind):
        trainer.fit(x, y, epochs=2, batch_size=16)
    assert (everything(trainer)[:2], trainer.step) == kept
    for t in (trainer, other):
        t.fit(x, y, epochs=2, batch_size=16)
    np.testing.assert_allclose(trainer.history["loss"], other.history["loss"], rtol=1e-5)
    assert trainer.epoch == 4


# ---- stopping ------------------------------------------------------------------------------------------------------


def test_callbacks_are_called_after_each_epoch_in_order(rng):
    x, y = classes(rng)
    calls = []
    trainer = busy()
    first = lambda t: calls.append(("first", t.epoch, len(t.history["loss"])))  # noqa: E731
    trainer.fit(x, y, epochs=3, callbacks=[first, lambda t: calls.append(("second", t is trainer))])
    assert calls == [c for epoch in (1, 2, 3) for c in (("first", epoch, epoch), ("second", True))]


@pytest.mark.parametrize("value, epochs", [(True, 2), (np.True_, 2), (False, 5), (None, 5), (1, 5), ("stop", 5)])
def test_a_callback_stops_by_returning_true(value, epochs, rng):
    x, y = classes(rng)
    called = []
    trainer = busy()
    trainer.fit(x, y, epochs=5, callbacks=[lambda t: value if t.epoch == 2 else None, called.append])
    assert trainer.epoch == len(trainer.history["loss"]) == len(called) == epochs
    assert len(trainer.fit(x, y, epochs=2)["loss"]) == epochs + 2


def test_seed_21_stop_below_stops_at_the_first_epoch_below(rng):
    x, y = classes(rng)
    losses = busy().fit(x, y, epochs=12, batch_size=16)["loss"]
    threshold = (min(losses[:7]) + min(losses[:6])) / 2
    first = next(i for i, v in enumerate(losses) if v < threshold) + 1
    assert 1 < first < 12
    assert busy().fit(x, y, epochs=12, batch_size=16, stop_below=threshold)["loss"] == losses[:first]
    exact = busy().fit(x, y, epochs=12, batch_size=16, stop_below=losses[first - 1])["loss"]
    assert len(exact) > first  # below, not at


def test_stop_below_looks_at_the_validation_loss_if_there_is_one(rng):
    x, y = classes(rng)
    data = {"batch_size": 16, "validation_data": (x[:9], y[:9])}
    history = busy().fit(x, y, epochs=10, **data)
    threshold = np.median(history["val_loss"])
    first = next(i for i, v in enumerate(history["val_loss"]) if v < threshold) + 1
    assert len(busy().fit(x, y, epochs=10, stop_below=threshold, **data)["loss"]) == first


def test_an_error_in_a_callback_leaves_the_finished_epochs(rng):
    x, y = classes(rng)
    trainer, other = busy(), busy()

    def fail(t):
        if t.epoch == 2:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        trainer.fit(x, y, epochs=5, batch_size=16, callbacks=[fail])
    other.fit(x, y, epochs=2, batch_size=16)
    assert everything(trainer) == everything(other)


# ---- the progress bar ----------------------------------------------------------------------------------------------


def test_off_a_terminal_nothing_is_shown(rng, capfd):
    x, y = classes(rng)
    busy().fit(x, y, epochs=3)
    busy().fit(x, y, epochs=3, progress=False)
    assert capfd.readouterr() == ("", "")


def test_progress_shows_epoch_loss_and_rate(rng, capsys):
    x, y = classes(rng)
    trainer = busy()
    trainer.fit(x, y, epochs=3, progress=True, validation_data=(x, y))
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("epoch 1", "loss", "samples/s"):
        assert part in err
    trainer.fit(x, y, epochs=1, progress=True)
    assert "epoch 4" in capsys.readouterr().err


def test_without_a_standard_error_fit_works(rng, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    x, y = classes(rng)
    assert len(busy().fit(x, y, epochs=1)["loss"]) == 1


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


def as_after(steps, x, y, batch_size, make):
    """A trainer that took exactly that many unshuffled steps."""
    trainer, per_epoch = make(), -(-len(x) // batch_size)
    if steps // per_epoch:
        trainer.fit(x, y, epochs=steps // per_epoch, batch_size=batch_size, shuffle=False)
    if steps % per_epoch:
        rows = steps % per_epoch * batch_size
        trainer.fit(x[:rows], y[:rows], epochs=1, batch_size=batch_size, shuffle=False)
    return trainer


def test_ctrl_c_lets_the_step_in_flight_finish(rng, handler):
    x, y = classes(rng, 20_000)
    trainer, timer = busy(), threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    start = lambda t: timer.start() if t.epoch == 1 else None  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(x, y, epochs=10_000, batch_size=16, shuffle=False, callbacks=[start])
    timer.join()
    assert signal.getsignal(signal.SIGINT) is handler
    assert trainer.epoch >= 1 and trainer.step > 1250 and trainer.epoch == trainer.step // 1250
    assert {len(v) for v in trainer.history.values()} == {trainer.epoch}
    twin = as_after(trainer.step, x, y, 16, busy)
    assert state_bits(twin.model) == state_bits(trainer.model)
    trainer.fit(x[:32], y[:32], epochs=1, batch_size=16, shuffle=False)
    twin.fit(x[:32], y[:32], epochs=1, batch_size=16, shuffle=False)
    assert state_bits(twin.model) == state_bits(trainer.model)  # moments and Adam's t too
    assert trainer.history["loss"][-1] == twin.history["loss"][-1]


def test_ctrl_c_in_a_callback_keeps_the_finished_epoch(rng, handler):
    x, y = classes(rng)
    trainer, after = busy(), []

    def press(t):
        if t.epoch == 2:
            signal.raise_signal(signal.SIGINT)
            after.append("the callback goes on")

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(x, y, epochs=5, batch_size=16, shuffle=False, callbacks=[press])
    assert after and trainer.epoch == 2 and {len(v) for v in trainer.history.values()} == {2}
    assert state_bits(trainer.model) == state_bits(as_after(trainer.step, x, y, 16, busy).model)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(trainer.fit(x, y, epochs=1, batch_size=16)["loss"]) == 3


def test_ctrl_c_after_the_last_step_is_not_lost(rng, handler):
    x, y = classes(rng)
    trainer = busy()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(x, y, epochs=1, batch_size=16, callbacks=[lambda t: signal.raise_signal(signal.SIGINT)])
    assert trainer.epoch == len(trainer.history["loss"]) == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_goes_through_at_once(rng, handler):
    x, y = classes(rng)
    trainer, reached = busy(), []

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(x, y, epochs=3, callbacks=[lambda t: press_twice(), reached.append])
    assert not reached and trainer.epoch == 1 and signal.getsignal(signal.SIGINT) is handler


def test_a_users_handler_is_called_and_put_back(rng, handler):
    x, y = classes(rng)
    seen = []

    def theirs(number, frame):
        seen.append(number)

    signal.signal(signal.SIGINT, theirs)
    press = lambda t: signal.raise_signal(signal.SIGINT) if t.epoch == 1 else None  # noqa: E731
    trainer = busy()
    trainer.fit(x, y, epochs=3, callbacks=[press])
    assert seen == [signal.SIGINT] and trainer.epoch == 3  # it did not raise, so training goes on
    assert signal.getsignal(signal.SIGINT) is theirs


# ---- threads -------------------------------------------------------------------------------------------------------


def test_fit_off_the_main_thread(rng):
    x, y = classes(rng)
    expected = busy()
    expected.fit(x, y, epochs=3, batch_size=16)
    with ThreadPoolExecutor(1) as pool:
        trainer = busy()
        pool.submit(trainer.fit, x, y, 3, 16).result()
        assert everything(trainer) == everything(expected)
        trainer.fit(x, y, epochs=1, batch_size=16)  # and on, back here


def test_trainers_of_several_threads_at_once(rng):
    data = [classes(rng, 200) for _ in range(4)]

    def train(seed):
        trainer = busy(seed)
        trainer.fit(*data[seed], epochs=8, batch_size=16, validation_data=data[seed])
        return everything(trainer)

    expected = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(train, range(4))) == expected


# ---- divergence ----------------------------------------------------------------------------------------------------


def test_divergence_names_epoch_and_step_and_restores_the_start(rng):
    x, y = regression(rng)
    trainer = gb.Trainer(gb.mlp([4, 8, 1]), "mse", gb.SGD(lr=1e6), seed=0)
    before = everything(trainer)
    with pytest.raises(gb.TrainingDiverged, match=r"epoch 1, step \d+; .* smaller learning rate") as caught:
        trainer.fit(x, y, epochs=5, batch_size=2)
    assert isinstance(caught.value, FloatingPointError)
    assert caught.value.epoch == 1 and 1 < caught.value.step <= 25
    assert everything(trainer) == before
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("optimizer", [gb.Adam(0.01), gb.SGD(0.01, momentum=0.9)], ids=["adam", "momentum"])
def test_divergence_restores_the_last_good_epoch_and_training_goes_on(optimizer, rng):
    x, y = regression(rng, 50)
    trainer, other = (busy(0, "mse", 1, optimizer=optimizer) for _ in range(2))
    for t in (trainer, other):
        t.fit(x, y, epochs=2, batch_size=16)
    kept, bad = everything(trainer), y.copy()
    bad[20] = 3e38
    with (
        pytest.raises(gb.TrainingDiverged, match="epoch 3, step 2; the model is as after epoch 2") as caught,
        pytest.warns(RuntimeWarning, match="fit: y column 0 has numbers of about 4.24e"),
    ):
        trainer.fit(x, bad, epochs=2, batch_size=16, shuffle=False)
    assert (caught.value.epoch, caught.value.step) == (3, 2)
    assert everything(trainer) == kept
    for t in (trainer, other):
        t.fit(x, y, epochs=2, batch_size=16)
    assert everything(trainer) == everything(other)  # as if nothing had happened


def test_divergence_between_epochs_of_one_fit_keeps_the_good_ones(rng):
    x, y = regression(rng)
    trainer, other = busy(0, "mse", 1), busy(0, "mse", 1)
    other.fit(x, y, epochs=2, batch_size=16, shuffle=False)

    def spoil(t):  # as a user who writes to the weights might
        if t.epoch == 2:
            y[0] = np.nan

    with pytest.raises(gb.TrainingDiverged, match="epoch 3, step 1"):
        trainer.fit(x, y, epochs=4, batch_size=16, shuffle=False, callbacks=[spoil])
    assert everything(trainer) == everything(other)


def test_a_bad_last_update_of_an_epoch_is_caught(rng):
    x, y = regression(rng)
    trainer = gb.Trainer(gb.mlp([4, 1]), "mse", gb.SGD(lr=3e38), seed=0)
    before = everything(trainer)
    with pytest.raises(gb.TrainingDiverged, match=r"a weight is NaN or infinite after epoch 1; .* as after epoch 0"):
        trainer.fit(x * 100, y * 100, epochs=1)
    assert everything(trainer) == before


def test_divergence_of_batch_statistics_is_undone(rng):
    x, y = regression(rng)
    model = gb.Sequential(gb.BatchNorm(4), gb.Dense(4, 1))
    trainer = gb.Trainer(model, "mse", gb.SGD(lr=1e6), seed=0)
    before = state_bits(model)
    with pytest.raises(gb.TrainingDiverged):
        trainer.fit(x * 100, y, epochs=3, batch_size=4)
    assert state_bits(model) == before
    assert np.isfinite(model.predict(x)).all()


def test_ctrl_c_in_a_diverged_epoch_does_not_leave_nan(rng, handler):
    x, y = regression(rng, 200_000)
    trainer = gb.Trainer(gb.mlp([4, 8, 1]), "mse", gb.SGD(lr=1e6), seed=0)
    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises((KeyboardInterrupt, gb.TrainingDiverged)):
        trainer.fit(x, y, epochs=1, batch_size=4)
        timer.join()
    timer.join()
    assert all(np.isfinite(a).all() for a in trainer.model.state_dict().values())


# ---- a model in several hands --------------------------------------------------------------------------------------

USES = {
    "nothing": lambda m: None,
    "a layer predicts": lambda m: m.layers[0].predict(np.ones((2, 4))),
    "a layer is called": lambda m: m.layers[0](np.ones((2, 4))),
    "a layer is initialised": lambda m: m.layers[1].initialize(3),
    "its first layers make a model": lambda m: gb.Sequential(*m.layers[:1]).predict(np.ones((2, 4))),
    "it becomes part of a model": lambda m: gb.Sequential(gb.Scaler(4), m).predict(np.ones((2, 4))),
    "a shallow copy predicts": lambda m: copy.copy(m).predict(np.ones((2, 4))),
    "it moves": lambda m: m.to("cpu"),
    "another trainer": lambda m: gb.Trainer(m, seed=7),
}


@pytest.mark.parametrize("recorded", [True, False], ids=["after a fit", "before any fit"])
@pytest.mark.parametrize("use", USES)
def test_using_a_part_of_a_model_does_not_stop_its_training(use, recorded, rng):
    x, y = classes(rng)
    make = lambda: gb.Trainer(gb.mlp([4, 6, 3]), optimizer=gb.SGD(0.1, momentum=0.9), seed=0)  # noqa: E731
    trainer, plain = make(), make()
    for t in (trainer, plain):
        if recorded:
            t.fit(x, y, epochs=1, batch_size=16)
    USES[use](trainer.model)
    plain.model.load_state_dict(trainer.model.state_dict())
    for t in (trainer, plain):
        t.fit(x, y, epochs=2, batch_size=16)
    assert state_bits(trainer.model) == state_bits(plain.model)
    assert trainer.history == plain.history
    np.testing.assert_array_equal(trainer.predict(x), plain.predict(x))


def test_parts_of_a_model_see_its_training(rng):
    x, y = classes(rng)
    model = gb.mlp([4, 6, 3])
    trainer = gb.Trainer(model, seed=0)
    features = gb.Sequential(*model.layers[:1])
    for _ in range(2):
        trainer.fit(x, y, epochs=1)
        state = model.state_dict()
        expected = np.maximum(x @ state["0.weight"] + state["0.bias"], 0)
        np.testing.assert_allclose(features.predict(x), expected, rtol=1e-5, atol=1e-6)


# ---- bad input -----------------------------------------------------------------------------------------------------

X, Y = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32), np.array([0, 1, 2, 0, 1, 2])
V, NAN = Y.astype(np.float32), float("nan")


def changed(array, at, value):
    array = np.array(array, float)
    array[at] = value
    return array


#    name                  x, y                                        kind        message
BAD_LABELS = {
    "(n,1) labels":        (X, Y[:, None],                             ValueError, r"y has shape \(6, 1\).*\(6,\)"),
    "(n,8,8) inputs":      (np.zeros((6, 8, 8)), Y,                    ValueError, r"x has shape \(6, 8, 8\).*resh"),
    "one row as a vector": (X[0], Y[:1],                               ValueError, r"x has shape \(4,\)"),
    "columns":             (X[:, :3], Y,                               ValueError, "x has 3 columns .* expects 4"),
    "too large":           (X, changed(Y, 2, 3),                       ValueError, "label 3.0 at row 2 .* 0 to 2"),
    "negative":            (X, Y - 1,                                  ValueError, "label -1 at row 0 .* 0 to 2"),
    "fractional":          (X, changed(Y, 1, 0.5),                     ValueError, "label 0.5 at row 1 is fraction"),
    "NaN in y":            (X, changed(Y, 4, NAN),                     ValueError, "y has a NaN at row 4"),
    "NaN in x":            (changed(X, (3, 1), NAN), Y,                ValueError, "x has a NaN at row 3, column 1"),
    "infinity in x":       (changed(X, (5, 0), np.inf), Y,             ValueError, "x has an infinity at row 5"),
    "too large for x":     (changed(X, (5, 0), 1e39), Y,               ValueError, r"x has 1e\+39 at row 5, column 0"),
    "no rows":             (X[:0], Y[:0],                              ValueError, "x has 0 rows"),
    "no columns":          (X[:, :0], Y,                               ValueError, "x has 0 columns"),
    "length":              (X, Y[:5],                                  ValueError, "x has 6 rows but y has 5"),
    "object x":            (np.array([["a", 1, 2, 3]] * 6, object), Y, TypeError,  "x has dtype object"),
    "complex x":           (X + 1j, Y,                                 TypeError,  "x has dtype complex"),
    "text x":              (np.full((6, 4), "1"), Y,                   TypeError,  "x has dtype <U1"),
    "text y":              (X, np.array(list("abcabc")),               TypeError,  "y has dtype <U1.*np.unique"),
    "text y in a list":    (X, list("abcabc"),                         TypeError,  "y has dtype <U1.*np.unique"),
    "complex y":           (X, Y + 1j,                                 TypeError,  "y has dtype complex"),
    "object y":            (X, np.array([object()] * 6),               TypeError,  "y has dtype object"),
    "missing y":           (X, np.array([0, None, 1, 2, 0, 1]),         ValueError, r"y has a missing value .* row 1"),
    "ragged x":            ([[1, 2, 3, 4], [1, 2]], Y[:2],             ValueError, "x is ragged: 2 values in row 1"),
    "ragged y":            (X[:2], [[1], [1, 2]],                      ValueError, "y is ragged: 2 values in row 1"),
    "no y":                (X, None,                                   TypeError,  "y is of type NoneType"),
    "no x":                (None, Y,                                   TypeError,  "x is of type NoneType"),
    "too many columns":    (X, np.ones((6, 5)),                        ValueError, "y has 5 columns .* 3 outputs"),
    "NaN in soft labels":  (X, changed(np.eye(3)[Y], (2, 1), NAN),     ValueError, "y has a NaN at row 2, column 1"),
}  # fmt: skip
BAD_VALUES = {
    "(n,) for 2 outputs":  ("mse", 2, V,                               ValueError, r"y has shape \(6,\).* 2 outputs"),
    "(n,2) for 1 output":  ("mse", 1, np.ones((6, 2)),                 ValueError, "y has 2 columns .* 1 output"),
    "(1,n) for 1 output":  ("mse", 1, V[None],                         ValueError, "x has 6 rows but y has 1"),
    "(n,1,1)":             ("mse", 1, V[:, None, None],                ValueError, r"y has shape \(6, 1, 1\)"),
    "NaN target":          ("mse", 1, changed(V, 3, NAN),              ValueError, "y has a NaN at row 3"),
    "text target":         ("mse", 1, list("abcdef"),                  TypeError,  "y has dtype <U1"),
    "bce above 1":         ("bce", 1, Y,                               ValueError, "y has 2.* at row 2"),
    "bce of -1 and 1":     ("bce", 1, np.where(Y > 0, 1, -1),          ValueError, "y has -1.* at row 0"),
    "bce, one of several": ("bce", 3, changed(np.eye(3)[Y], (4, 2), 1.5),  ValueError, "y has 1.5 at row 4, column 2"),
}  # fmt: skip


def unharmed(trainer, before):
    assert everything(trainer) == before
    assert trainer.epoch == 1
    trainer.fit(X, trainer.good, epochs=1)  # and it still works


@pytest.fixture
def trained():
    """A function that makes a trainer with an epoch behind it."""

    def make(loss="cross_entropy", outputs=3):
        trainer = gb.Trainer(gb.mlp([4, 5, outputs], "tanh"), loss, seed=0)
        trainer.good = Y if loss == "cross_entropy" else np.zeros((6, outputs))
        trainer.fit(X, trainer.good, epochs=1)
        return trainer

    return make


CALLS = {
    "fit": ("fit", lambda t, x, y: t.fit(x, y)),
    "evaluate": ("evaluate", lambda t, x, y: t.evaluate(x, y)),
    "validation": ("fit: validation_data", lambda t, x, y: t.fit(X, t.good, validation_data=(x, y))),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_rows_and_labels(case, call, trained):
    x, y, kind, message = BAD_LABELS[case]
    where, run = CALLS[call]
    trainer = trained()
    before = copy.deepcopy(everything(trainer))
    with pytest.raises(kind, match=f"^{where}: {message}"):
        run(trainer, x, y)
    unharmed(trainer, before)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_targets(case, call, trained):
    loss, outputs, y, kind, message = BAD_VALUES[case]
    where, run = CALLS[call]
    trainer = trained(loss, outputs)
    before = copy.deepcopy(everything(trainer))
    with pytest.raises(kind, match=f"^{where}: {message}"):
        run(trainer, X, y)
    unharmed(trainer, before)


BAD_ARGUMENTS = {
    "no epochs":         ({"epochs": 0},                  ValueError, "epochs must be at least 1, got 0"),
    "negative epochs":   ({"epochs": -3},                 ValueError, "epochs must be at least 1, got -3"),
    "epochs 2.0":        ({"epochs": 2.0},                TypeError,  "epochs must be an integer, got float 2.0"),
    "epochs True":       ({"epochs": True},               TypeError,  "epochs must be an integer, got bool True"),
    "epochs None":       ({"epochs": None},               TypeError,  "epochs must be an integer, got NoneType"),
    "batch_size 0":      ({"batch_size": 0},              ValueError, "batch_size must be at least 1, got 0"),
    "batch_size -1":     ({"batch_size": -1},             ValueError, "batch_size must be at least 1, got -1"),
    "batch_size 1.5":    ({"batch_size": 1.5},            TypeError,  "batch_size must be an integer, got float 1.5"),
    "batch_size text":   ({"batch_size": "16"},           TypeError,  "batch_size must be an integer, got str '16'"),
    "validation alone":  ({"validation_data": X},         TypeError,  r"validation_data must be .*, got ndarray"),
    "validation of 4":   ({"validation_data": (X,) * 4},  TypeError,  r"validation_data must be \(x, y\) or .*got 4"),
    "callback":          ({"callbacks": [3]},             TypeError,  "callback 3 is not callable"),
    "callback, no list": ({"callbacks": print},           TypeError,  "fit: callbacks .*list"),
    "callbacks None":    ({"callbacks": None},            TypeError,  "fit: callbacks .*list"),
    "stop_below text":   ({"stop_below": "0.1"},          TypeError,  "stop_below must be a number, got str"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_of_fit(case, trained):
    arguments, kind, message = BAD_ARGUMENTS[case]
    trainer = trained()
    before = copy.deepcopy(everything(trainer))
    with pytest.raises(kind, match=message):
        trainer.fit(X, Y, **arguments)
    unharmed(trainer, before)


def test_numpy_integers_are_integers(trained):
    assert len(trained().fit(X, Y, epochs=np.int64(2), batch_size=np.int32(4))["loss"]) == 3


def test_metrics_that_do_not_fit_the_targets(rng):
    for metrics, loss, y, message in (
        (["r2"], "cross_entropy", Y, "metric 'r2' needs targets like the outputs, but y holds labels"),
        (["accuracy"], "cross_entropy", np.eye(3)[Y] / 2 + 1 / 6, "metric 'accuracy' counts labels, but y holds rows"),
    ):
        trainer = gb.Trainer(gb.mlp([4, 3]), loss, metrics=metrics, seed=0)
        before = copy.deepcopy(everything(trainer))
        for call in (trainer.fit, trainer.evaluate):
            with pytest.raises(ValueError, match=message):
                call(X, y)
        assert everything(trainer) == before


class Flat(gb.Layer):
    """A model that returns one number per row without the axis of outputs."""

    def __init__(self):
        self.dense = gb.Dense(4, 1)

    def forward(self, x):
        return self.dense(x).reshape(-1)


def model():
    return gb.mlp([4, 3])


BAD_TRAINERS = {
    "model class":      (lambda: gb.Trainer(gb.Sequential), TypeError, "model is .*; expected a layer, such as gb.mlp"),
    "model list":       (lambda: gb.Trainer([gb.Dense(2, 2)]), TypeError, "model is list; expected a layer"),
    "loss":             (lambda: gb.Trainer(model(), "crossentropy"), ValueError,
                         "unknown loss 'crossentropy'; choose from bce, bce_sum, cross_entropy, half_mse, half_sse, "),
    "metric":           (lambda: gb.Trainer(model(), metrics=["acc"]), ValueError,
                         "unknown metric 'acc'; choose from accuracy, mae, mse, r2"),
    "metrics, no list": (lambda: gb.Trainer(model(), metrics="accuracy"), TypeError, r"metrics .*\['accuracy'\]"),
    "device":           (lambda: gb.Trainer(model(), device="gpu"), ValueError,
                         "unknown device 'gpu'; choose from auto, cpu, cuda"),
    "negative seed":    (lambda: gb.Trainer(model(), seed=-1), ValueError, "seed must be .*got -1"),
    "fractional seed":  (lambda: gb.Trainer(model(), seed=1.5), TypeError, "seed must be an integer.*1.5"),
    "text seed":        (lambda: gb.Trainer(model(), seed="a"), TypeError, "seed must be an integer.*'a'"),
    "initialize seed":  (lambda: model().initialize(-1), ValueError, "seed must be .*got -1"),
    "dtype":            (lambda: gb.Trainer(gb.mlp([4, 3], dtype="int64")), TypeError, "int64 is not supported"),
    "shapes":           (lambda: gb.Trainer(gb.Sequential(gb.Dense(4, 5), gb.Dense(6, 3)), seed=0).fit(X, Y),
                         ValueError, r"layer '1': x has 5 columns but Dense\(6, .* expects 6 columns"),
    "one output":       (lambda: gb.Trainer(gb.mlp([4, 1]), seed=0).fit(X, Y), ValueError,
                         "cross_entropy needs an output per class but the model has one; use loss='bce'"),
    "1-D output":       (lambda: gb.Trainer(Flat(), "mse", seed=0).fit(X, V), ValueError,
                         r"returns shape \(2,\) .*; expected \(rows, outputs\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TRAINERS)
def test_bad_trainers(case):
    call, kind, message = BAD_TRAINERS[case]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    "arguments",
    [{"loss": "nope"}, {"optimizer": "nope"}, {"metrics": ["nope"]}, {"device": "nope"}, {"optimizer": gb.Adam}],
    ids=str,
)
def test_a_trainer_that_cannot_be_made_leaves_the_model_undrawn(arguments):
    undrawn = gb.mlp([4, 3])
    with pytest.raises((ValueError, TypeError)):
        gb.Trainer(undrawn, **{"seed": 3} | arguments)
    gb.Trainer(undrawn, seed=9)
    assert state_bits(undrawn) == state_bits(gb.mlp([4, 3]).initialize(9))


@pytest.mark.parametrize("x", [X[:, :3], X[0], X[:0], changed(X, (1, 1), NAN), X + 1j, None], ids=range(6))
def test_predict_refuses_what_fit_refuses(x, trained):
    trainer = trained()
    before = copy.deepcopy(everything(trainer))
    with pytest.raises((ValueError, TypeError), match=r"^predict: x "):
        trainer.predict(x)
    unharmed(trainer, before)


# ---- found by trying to break it -----------------------------------------------------------------------------------


def test_an_own_loss_leaves_a_classifier_a_classifier(rng):
    x, y = classes(rng)
    trainer = gb.Trainer(gb.mlp([x.shape[1], 3]), lambda o, t: gb.softmax_cross_entropy(o, t), seed=0)
    trainer.fit(x, y, epochs=1)
    np.testing.assert_allclose(trainer.model.predict_proba(x).sum(1), 1, rtol=1e-5)


def test_only_training_changes_what_a_models_outputs_mean(rng):
    x, y = classes(rng)
    model = gb.mlp([x.shape[1], 3])
    gb.Trainer(model, seed=0).fit(x, y, epochs=1)
    gb.Trainer(model, "mse")
    assert model.predict_classes(x).shape == y.shape


def test_negative_weights_of_classes_are_refused(rng):
    x, y = classes(rng)
    with pytest.raises(ValueError, match="y has -5 at row 0; weights of classes must not be negative"):
        gb.Trainer(gb.mlp([x.shape[1], 3]), seed=0).fit(x, -5 * np.eye(3)[y], epochs=1)


def test_r2_of_one_row_is_undefined():
    trainer = gb.Trainer(gb.mlp([2, 1]), "mse", seed=0)
    assert np.isnan(trainer.evaluate(np.ones((1, 2)), [1.0])["r2"])


def test_a_learning_rate_beyond_float32_is_reported_as_divergence(rng):
    x, y = classes(rng)
    with pytest.raises(gb.TrainingDiverged):
        gb.Trainer(gb.mlp([x.shape[1], 3]), optimizer=gb.Adam(lr=1e300), seed=0).fit(x, y, epochs=2)


def test_the_optimizer_is_fixed_and_the_trainer_says_what_it_is():
    trainer = gb.Trainer(gb.mlp([2, 3]), optimizer=gb.SGD(lr=0.1), seed=0)
    with pytest.raises(AttributeError):
        trainer.optimizer = gb.Adam()
    assert repr(trainer).startswith("Trainer(cross_entropy, SGD(lr=0.1, momentum=0.0, nesterov=None), cpu, seed 0")


def test_a_frozen_parameter_does_not_move(rng):
    x, y = classes(rng)
    model = gb.mlp([x.shape[1], 4, 3])
    trainer = gb.Trainer(model, optimizer=gb.AdamW(lr=0.1, weight_decay=0.5), seed=0)
    trainer.fit(x, y, epochs=2)
    weight = model.named_parameters()["0.weight"]
    weight.requires_grad, kept = False, weight.numpy()
    trainer.fit(x, y, epochs=2)
    np.testing.assert_array_equal(weight.numpy(), kept)
    weight.requires_grad = True
    trainer.fit(x, y, epochs=1)
    assert (weight.numpy() != kept).any()


def test_a_layer_taken_out_is_out(rng):
    x, y = classes(rng)
    model = gb.mlp([x.shape[1], 4, 4, 3])
    trainer = gb.Trainer(model, seed=0)
    trainer.fit(x, y, epochs=1)
    model.predict(x)
    model.layers = (model.layers[0], model.layers[2])
    np.testing.assert_allclose(model.predict(x), model(x).numpy(), rtol=1e-5, atol=1e-6)
    history = trainer.fit(x, y, epochs=1)
    assert np.isfinite(history["loss"]).all() and len(model.arena.parameters) == 4


@pytest.mark.parametrize("act, message", [
    (lambda t: gb.Sequential(t.model, gb.Dropout(0.1)).arena, "Sequential: fit is training the model, .* between fits"),
    (lambda t: t.fit(np.ones((4, 4)), [0, 1, 2, 0]), "a callback cannot call fit"),
])  # fmt: skip
def test_callbacks_may_not_pull_the_rug(act, message, rng):
    x, y = classes(rng)
    trainer = gb.Trainer(gb.mlp([x.shape[1], 3]), seed=0)
    with pytest.raises(RuntimeError, match=message):
        trainer.fit(x, y, epochs=2, callbacks=[act])
    trainer.fit(x, y, epochs=1, callbacks=[lambda t: t.model.to("cpu") and None])


def test_a_trainer_lets_go_of_the_data(rng):
    x, y = classes(rng)
    trainer = gb.Trainer(gb.mlp([x.shape[1], 3]), seed=0)
    for _ in range(3):
        data = x.astype(np.float32)
        gone = weakref.ref(data)
        trainer.fit(data, y, epochs=1)
        del data
        gc.collect()
        assert gone() is None
