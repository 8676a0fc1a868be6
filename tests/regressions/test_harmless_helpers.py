"""What looks at a trained network, or searches near it, leaves it no worse: on success, on refusal, on interruption."""

import contextlib
import copy
import inspect

import numpy as np
import pytest

import gpubackprop as gb

rng = np.random.default_rng(0)
x = rng.normal(size=(60, 3))
y = (x[:, 0] + x[:, 1] > 0).astype(int) + (x[:, 2] > 0.5)


def trained(device="cpu", hidden=4):
    model = gb.Sequential(gb.Dense(3, hidden, "tanh"), gb.BatchNorm(hidden), gb.Dropout(0.1), gb.Dense(hidden, 3))
    trainer = gb.Trainer(model, optimizer=gb.Adam(0.05), seed=0, device=device)
    trainer.fit(x, y, epochs=15, batch_size=20, progress=False)
    return trainer


def state(trainer):
    kept = trainer.__getstate__()
    numbers = {k: kept[k] for k in ("epoch", "step", "history", "seed")} | {"control": kept["control"]}
    arrays = {k: v.tobytes() for k, v in trainer.model.state_dict().items()}
    moments = {(m, k): v.tobytes() for m, values in kept["moments"].items() for k, v in values.items()}
    return copy.deepcopy(numbers), arrays, moments, trainer.model.output_kind, trainer.optimizer


LOOKS = {  # by public name; the others that take a trainer or a model change it, which is what they are for
    "gradient_report": lambda t, x, y: gb.gradient_report(t, x, y),
    "explain_weight": lambda t, x, y: gb.explain_weight(t, x, y, "0", 1, 2),
    "sensitivity": lambda t, x, y: gb.sensitivity(t, x, y, "0"),
    "loss_of_weights": lambda t, x, y: (lambda f, w: gb.value_and_grad(f)(*w))(*gb.loss_of_weights(t, x, y)),
    "find_nan": lambda t, x, y: gb.find_nan(t, x, y, batch_size=20),
    "lr_range_test": lambda t, x, y: gb.lr_range_test(t, x, y, updates=20),
    "learning_curve": lambda t, x, y: gb.learning_curve(lambda: t, x, y, [1.0], epochs=2),
    "layer_stats": lambda t, x, y: gb.layer_stats(t.model, x),
    "grid_points": lambda t, x, y: gb.grid_points(t.model),
    "shrink": lambda t, x, y: gb.shrink(t.model, x),
    "landscape.plane": lambda t, x, y: gb.landscape.plane(t, x, y)([0.5], [1.0]),
    "lab.compare": lambda t, x, y: gb.lab.gradients(t, x, y),
}
CHANGES = {"random_search", "grid_search", "lsuv", "prune", "rewind", "save_model"}


def test_every_function_of_a_trainer_or_model_is_here():
    names = {
        name for name in dir(gb)
        if inspect.isfunction(f := getattr(gb, name)) and {"trainer", "model"} & set(inspect.signature(f).parameters)
    }  # fmt: skip
    assert names - CHANGES <= LOOKS.keys()


@pytest.mark.parametrize(
    "name, device",
    [*((name, device) for name in LOOKS for device in ("cpu", "cpu:reference")), ("lr_range_test", "cuda")],
)
def test_looking_changes_nothing(name, device, cuda):
    trainer = trained(device)
    before = state(trainer)
    LOOKS[name](trainer, x, y)
    assert state(trainer) == before
    for bad in (x[:, :2], np.full((60, 3), np.nan)):
        with contextlib.suppress(ValueError):
            LOOKS[name](trainer, bad, y)
        assert state(trainer) == before
    twin = trained(device)
    assert trainer.fit(x, y, epochs=2, batch_size=20) == twin.fit(x, y, epochs=2, batch_size=20)


# ---- guesses -------------------------------------------------------------------------------------------------------

SEARCHES = {
    "random": lambda t, x, y: gb.random_search(t, x, y, guesses=5),
    "random, far away": lambda t, x, y: gb.random_search(t, x, y, guesses=5, low=-1e20, high=1e20),
    "grid": lambda t, x, y: gb.grid_search(t, x, y, segments=2, low=-3, high=3),
}


@pytest.mark.parametrize("device", ["cpu", "cpu:reference", "cuda"])
@pytest.mark.parametrize("how", SEARCHES)
@pytest.mark.parametrize("epochs", [0, 60])
def test_a_search_never_leaves_a_network_worse(how, device, epochs, cuda):
    if (how, device) == ("grid", "cuda"):
        return  # 512 points; its steps are those of the random search
    trainer = gb.Trainer(gb.Sequential(gb.Dense(3, 3, bias=False)), optimizer=gb.Adam(0.05), seed=0, device=device)
    if epochs:
        trainer.fit(x, y, epochs=epochs, batch_size=20, progress=False)
    weights, before = trainer.model.state_dict(), trainer.evaluate(x, y)["loss"]
    with np.errstate(all="ignore"):
        found = SEARCHES[how](trainer, x, y)
    after = trainer.evaluate(x, y)["loss"]
    assert found.before == before and after == min(before, found.best) and found.found == (after < before)
    if not found.found:
        assert all((value == weights[k]).all() for k, value in trainer.model.state_dict().items())
        assert str(found).endswith(f"the weights before are kept, with loss {before:.6g}")
    assert len(found.losses) == found.evaluations


def test_the_trained_network_of_the_digits_is_kept():
    digits = gb.datasets.digits()
    trainer = gb.Trainer(gb.mlp([64, 32, 10]), seed=0)
    trainer.fit(*digits, epochs=5, progress=False)
    before = trainer.evaluate(*digits)
    gb.random_search(trainer, *digits, guesses=5)
    assert trainer.evaluate(*digits) == before


@pytest.mark.parametrize("how", SEARCHES)
def test_a_search_that_ends_early_keeps_the_best_so_far(how, monkeypatch):
    trainer = gb.Trainer(gb.Sequential(gb.Dense(3, 3, bias=False)), seed=0)
    trainer.fit(x, y, epochs=5, progress=False)
    before, evaluate, losses = trainer.model.state_dict(), trainer.evaluate, []

    def interrupted(*data):
        if len(losses) == 3:
            raise KeyboardInterrupt
        losses.append(evaluate(*data)["loss"])
        return {"loss": losses[-1]}

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt), np.errstate(all="ignore"):
        SEARCHES[how](trainer, x, y)
    assert evaluate(x, y)["loss"] == min(losses)
    before = trainer.model.state_dict()
    monkeypatch.undo()
    for bad in ((x[:, :2], y), (x, y + 9), (x, y[:-1])):
        with pytest.raises(ValueError):
            SEARCHES[how](trainer, *bad)
    assert all((value == before[k]).all() for k, value in trainer.model.state_dict().items())


def test_a_guess_of_nan_is_never_kept():
    model = gb.mlp([3, 3]).initialize(0)
    trainer = gb.Trainer(model, seed=0)
    model.load_state_dict({k: np.full(v.shape, np.nan) for k, v in model.state_dict().items()})
    found = gb.random_search(trainer, x, y, guesses=3)
    assert np.isnan(found.before) and found.found and trainer.evaluate(x, y)["loss"] == found.best


@pytest.mark.parametrize("search", [gb.random_search, gb.grid_search])
def test_the_first_line_says_what_is_guessed(search):
    assert search.__doc__.splitlines()[0].startswith("Guess the model's weights")


# ---- other helpers -------------------------------------------------------------------------------------------------


def test_a_learning_curve_of_one_model_trains_nothing():
    trainer = trained()
    before = state(trainer)
    for make in (lambda: trainer, lambda: gb.Trainer(trainer.model, seed=1)):
        with pytest.raises(ValueError, match="make_trainer gave the same model twice"):
            gb.learning_curve(make, x, y, [0.5, 1.0], epochs=2)
        assert state(trainer) == before


def test_lsuv_that_fails_leaves_the_weights():
    model = gb.mlp([3, 8, 8, 3])
    trainer = gb.Trainer(model, seed=0)
    trainer.fit(x, y, epochs=3, progress=False)
    before = model.state_dict()
    for rows in (np.ones((20, 3)), np.full((20, 3), np.nan), x[:, :2]):
        with pytest.raises(ValueError), np.errstate(all="ignore"):
            gb.lsuv(model, rows)
        assert all((value == before[k]).all() for k, value in model.state_dict().items())
