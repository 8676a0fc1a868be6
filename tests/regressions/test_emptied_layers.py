"""Pruning takes its share of every layer, never empties one in silence, and is refused while a fit runs."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpubackprop as gb


def weights_left(model):
    return [int(layer.weight.size if layer.mask is None else layer.mask.numpy().sum()) for layer in model.layers]


@pytest.fixture(scope="module")
def digits():
    x, _, y, _ = gb.split(*gb.datasets.digits(), test=0.2)
    return x, y


@pytest.fixture(scope="module")
def trained(digits):
    trainer = gb.Trainer(gb.mlp([64, 256, 10]), seed=0)
    trainer.fit(*digits, epochs=20, progress=False)
    return trainer


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.99])
def test_every_layer_loses_that_share(trained, digits, share):
    model = gb.mlp([64, 256, 10])
    model.load_state_dict(trained.model.state_dict())
    table = gb.prune(model, share)
    assert table["left"] == weights_left(model) == [n - round(share * n) for n in (64 * 256, 256 * 10)]


@pytest.mark.parametrize("share", [0.9, 0.95, 0.99])
def test_all_layers_together_warn_of_the_one_that_pays(trained, share):
    model = gb.mlp([64, 256, 10])
    model.load_state_dict(trained.model.state_dict())
    with pytest.warns(
        UserWarning, match=r"^prune: layer '1' is left with \d+ of its 2,560 .* scope='layer' takes the sa"
    ):
        table = gb.prune(model, share, scope="global")
    assert sum(table["left"]) == 64 * 256 + 2560 - round(share * (64 * 256 + 2560))
    assert table["left"][1] < 0.25 * (1 - share) * 2560


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4), st.lists(st.floats(0, 0.999), min_size=1, max_size=3),
    st.sampled_from(["global", "layer"]), st.lists(st.sampled_from([0.01, 1.0, 30.0]), min_size=3, max_size=3),
)  # fmt: skip
def test_a_layer_is_never_emptied_in_silence(sizes, shares, scope, scales):
    model = gb.mlp(sizes).initialize(0)
    model.load_state_dict({k: v * scales[int(k[0])] for k, v in model.state_dict().items()})
    for share in sorted(shares):
        before = weights_left(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table = gb.prune(model, share, scope=scope)
        after, told = weights_left(model), " ".join(str(w.message) for w in caught)
        assert table["left"] == after and all(b <= a for a, b in zip(before, after, strict=True))
        for i, (had, left, layer) in enumerate(zip(before, after, model.layers, strict=True)):
            assert (
                (f"layer '{i}' is left" in told)
                or left == had
                or left >= 0.25 * (1 - share) * layer.weight.size
                or (
                    left and left * sum(before) >= had * sum(after)  # it lost no more than the others
                )
            )
            if not left and had:
                assert f"layer '{i}' is left with 0 of its" in told
            if scope == "layer":
                n = layer.weight.size
                assert left == min(had, n - round(share * n))


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model = gb.Sequential(gb.Dense(2, 2, init=0.5), gb.Dense(2, 3, init=0.7)).initialize(0)
    state = model.state_dict()
    with pytest.raises(UserWarning, match="layer '0' is left with 0 of its 4 weights"):
        gb.prune(model, 0.6, scope="global")
    assert list(model.state_dict()) == list(state)


def test_a_layer_that_is_sparser_already_stays_as_it_is():
    mask = np.zeros((4, 8))
    mask[0] = 1
    model = gb.Sequential(gb.Dense(4, 8, mask=mask), gb.Dense(8, 4)).initialize(0)
    assert gb.prune(model, 0.5)["left"] == [8, 16]
    np.testing.assert_array_equal(model.layers[0].mask.numpy(), mask)
    with pytest.raises(ValueError, match=r"sparsity 0\.25 asked for, but 0\.625 of the weights are pruned already"):
        gb.prune(model, 0.25)


# ---- while a fit runs ----------------------------------------------------------------------------------------------


def freeze(model):
    model.layers[0].weight.requires_grad = False
    _ = model.arena


CHANGES = {
    "prune": lambda model: gb.prune(model, 0.5),
    "prune a layer": lambda model: gb.prune(model.layers[0], 0.5),
    "freeze": freeze,
    "another model": lambda model: gb.Sequential(model, gb.Dense(3, 2)).initialize(0),
    "a layer by itself": lambda model: model.layers[1].initialize(4),
    "another type": lambda model: gb.Trainer(model, precision="float64"),
    "another device": lambda model: model.to("cpu:reference"),
}


@pytest.mark.parametrize("device", ["cpu", "cpu:reference", "cuda"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_would_move_the_parameters_is_refused_at_the_call(name, device, cuda, rng):
    if (name, device) == ("another device", "cpu:reference"):
        return
    x, y = rng.normal(size=(40, 6)), rng.integers(0, 3, 40)
    model = gb.mlp([6, 8, 3])
    trainer, refused = gb.Trainer(model, seed=0, device=device), []

    def callback(trainer):
        kept = dict(vars(model.layers[0]))
        try:
            CHANGES[name](model)
        except RuntimeError as error:
            refused.append(str(error))
        model.layers[0].weight.requires_grad = True
        model.dtype = "float32"
        assert vars(model.layers[0]) == kept

    history = trainer.fit(x, y, epochs=3, callbacks=[callback], progress=False)
    assert len(refused) == 3 and len(history["loss"]) == 3
    assert all("fit is training the model" in text and "between fits" in text for text in refused)
    twin = gb.Trainer(gb.mlp([6, 8, 3]), seed=0, device=device)
    assert history == twin.fit(x, y, epochs=3, progress=False)
    CHANGES[name](model)  # between fits it may


@pytest.mark.parametrize("inner", [False, True])
def test_a_fit_that_fails_lets_go_of_the_model(inner, rng):
    x, y = rng.normal(size=(40, 6)), rng.integers(0, 3, 40)
    trainer = gb.Trainer(gb.mlp([6, 8, 3]), seed=0)

    def callback(trainer):
        if inner:  # a second trainer's fit of the same model, which is refused, does not let go of it
            with pytest.raises(RuntimeError):
                gb.Trainer(trainer.model, seed=1).fit(x, y, epochs=1, progress=False)
            gb.prune(trainer.model, 0.5)
        raise OSError("disk")

    with pytest.raises(RuntimeError if inner else OSError):
        trainer.fit(x, y, epochs=2, callbacks=[callback], progress=False)
    assert sum(gb.prune(trainer.model, 0.5)["left"]) == 36


# ---- states of before and after ------------------------------------------------------------------------------------


def test_a_state_of_before_pruning_and_one_of_after_say_what_to_do():
    whole, pruned = gb.mlp([6, 8, 3]).initialize(0), gb.mlp([6, 8, 3]).initialize(1)
    before = whole.state_dict()
    gb.prune(pruned, 0.5)
    after = pruned.state_dict()
    with pytest.raises(ValueError, match=r"'0\.mask' is missing; .*; gb\.rewind keeps the masks that there are"):
        pruned.load_state_dict(before)
    with pytest.raises(
        ValueError, match=r"the model has no '0\.mask'; .*; prune it alike, or load the file with gb\.lo"
    ):
        whole.load_state_dict(after)
    for model, state in ((whole, before), (pruned, after)):
        for key, value in model.state_dict().items():
            np.testing.assert_array_equal(value, state[key])
    gb.rewind(pruned, before)
    gb.prune(whole, 0.5)
    whole.load_state_dict(after)
    for key, value in whole.state_dict().items():
        np.testing.assert_array_equal(value, after[key])
