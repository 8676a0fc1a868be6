"""A model whose running statistics or validation loss are not finite has diverged, as one whose weights are not."""

import copy
import pickle
import warnings

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.model import current_mode

DEVICES = ["cpu", "cpu:reference", "cuda"]
RNG = np.random.default_rng(3)
X = RNG.normal(size=(48, 3))
Y = (X.sum(1) > 0).astype(int)
FILLED = X.copy()
FILLED[7, 1] = 1e20  # the fill value of climate data, whose square is no float32


class Fragile(gb.BatchNorm):
    """Batch norm whose running variance is NaN after values whose squares overflow, which the loss does not show."""

    def forward(self, x):
        y = super().forward(x)
        if current_mode().training:
            squares = (x * x).sum(axis=0)
            self._follow(self.variance, (squares - squares + 1).buffer, 1.0)
        return y


def model(hidden=False, norm=Fragile):
    first = [gb.Dense(3, 3, "relu")] if hidden else []
    return gb.Sequential(*first, norm(3), gb.Dense(3, 4, "tanh"), gb.Dense(4, 2))


class Masked(gb.Layer):
    """Logits, but for a class that never occurs."""

    def __init__(self):
        self.dense = gb.Dense(3, 3)
        self.norm = Fragile(3)
        self.mask = gb.Parameter((3,), np.array([0, 0, -np.inf]), trainable=False)

    def forward(self, x):
        return self.norm(self.dense(x)) + self.mask


def state(trainer):
    moments = {m: {k: v.tobytes() for k, v in values.items()} for m, values in trainer.state.host().items()}
    return {k: v.tobytes() for k, v in trainer.model.state_dict().items()}, moments, trainer.step, trainer.epoch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden", [False, True], ids=["first", "hidden"])
@pytest.mark.parametrize("validated", [False, True])
def test_a_broken_running_statistic_ends_the_fit_at_the_last_good_epoch(device, hidden, validated, cuda):
    t = gb.Trainer(model(hidden), device=device, seed=0)
    t.fit(X, Y, epochs=2, batch_size=16)
    before, history = state(t), copy.deepcopy(t.history)
    how = {"validation_data": (X, Y)} if validated else {}
    name = f"{int(hidden)}.variance"
    with pytest.raises(gb.TrainingDiverged, match=f"the running statistic '{name}' is NaN or infinite after epoch 3; "
                       "the model is as after epoch 2; look for cells"):  # fmt: skip
        t.fit(FILLED, Y, epochs=3, batch_size=16, **how)
    assert (state(t), t.history) == (before, history)
    t.fit(X, Y, epochs=1, batch_size=16)
    assert np.isfinite(t.predict(X)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden", [False, True], ids=["first", "hidden"])
def test_a_fill_value_leaves_the_statistics_of_batch_norm_finite(device, hidden, cuda):
    t = gb.Trainer(model(hidden, gb.BatchNorm), device=device, seed=0)
    t.fit(FILLED, Y, epochs=5, batch_size=16, validation_data=(X, Y))
    assert all(np.isfinite(values).all() for values in t.history.values())
    assert np.isfinite(t.predict(X)).all() and np.isfinite(t.predict(FILLED)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_validation_loss_that_is_not_finite_ends_it_too(device, cuda):
    far = X.copy()
    far[5] = 3e38
    t = gb.Trainer(gb.mlp([3, 4, 2]), device=device, seed=0)
    t.fit(X, Y, epochs=1, batch_size=16, validation_data=(X, Y))
    before, history = state(t), copy.deepcopy(t.history)
    with pytest.raises(gb.TrainingDiverged, match="the validation loss is NaN or infinite after epoch 2; the model is"):
        t.fit(X, Y, epochs=3, batch_size=16, validation_data=(far, Y))
    assert (state(t), t.history) == (before, history)


def test_going_on_after_a_refused_epoch_is_going_on_as_if_it_had_not_been():
    ends = []
    for tried in (True, False):
        t = gb.Trainer(model(), seed=0)
        t.fit(X, Y, epochs=2, batch_size=16)
        if tried:
            with pytest.raises(gb.TrainingDiverged):
                t.fit(FILLED, Y, epochs=1, batch_size=16)
        t.fit(X, Y, epochs=2, batch_size=16)
        ends.append((state(t), t.history))
    assert ends[0] == ends[1]


def test_an_infinity_that_a_layer_means_is_no_divergence(tmp_path):
    t = gb.Trainer(Masked(), seed=0)
    t.fit(X, Y, epochs=3, batch_size=16, validation_data=(X, Y))
    assert t.epoch == 3 and np.isfinite(t.history["loss"]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gb.save_model(t.model, tmp_path / "m.safetensors")
    with pytest.raises(gb.TrainingDiverged, match=r"the running statistic 'norm\.(mean|variance)'"):
        t.fit(FILLED, Y, epochs=1, batch_size=16)


def test_a_failing_validation_leaves_the_epoch_undone(monkeypatch):
    t = gb.Trainer(model(), seed=0)
    t.fit(X, Y, epochs=1, batch_size=16)
    before, history = state(t), copy.deepcopy(t.history)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(t, "_figures", full)
    with pytest.raises(MemoryError):
        t.fit(X, Y, epochs=1, batch_size=16, validation_data=(X, Y))
    assert (state(t), t.history) == (before, history)


def test_what_diverged_survives_a_pickle():
    for error in (gb.TrainingDiverged(3, 2), gb.TrainingDiverged(3, None, what="the validation loss")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("value, what", [(np.nan, "a NaN"), (np.inf, "an infinity")])
@pytest.mark.parametrize("name", ["1.weight", "1.bias", "0.variance", "0.mean", "0.gain"])
def test_a_model_that_is_not_finite_is_saved_with_a_warning(name, value, what, tmp_path):
    path = tmp_path / "m.safetensors"
    m = gb.Sequential(gb.BatchNorm(3), gb.Dense(3, 4)).initialize(0)
    gb.save_model(m, path)
    good = path.read_bytes()
    values = m.state_dict()
    values[name].flat[1] = value
    m.load_state_dict(values)
    with pytest.raises(
        RuntimeWarning, match=f"save_model: '{name}' holds {what}"
    ):  # an error here: the old file stands
        gb.save_model(m, path)
    assert path.read_bytes() == good
    with pytest.warns(RuntimeWarning, match=name):
        gb.save_model(m, path)
    np.testing.assert_array_equal(gb.load_model(path, "cpu").state_dict()[name], values[name])
