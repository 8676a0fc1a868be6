"""A model file holds which parameters are frozen."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gpubackprop as gb
from gpubackprop.checkpoint import read_metadata


class Extractor(gb.Layer):
    """Its constructor freezes what it extracts with."""

    def __init__(self):
        self.features, self.out = gb.Dense(4, 5, "tanh"), gb.Dense(5, 2)
        self.features.weight.requires_grad = False

    def forward(self, x):
        return self.out(self.features(x))


def network():
    shared = gb.Dense(5, 5, "tanh")
    return gb.Sequential(
        gb.Scaler(4), gb.Dense(4, 5), gb.BatchNorm(5), shared, shared, gb.Dense(5, 2, mask=np.eye(5, 2))
    )


def frozen(model):
    return {key for key, p in model.named_parameters().items() if p.trainable and not p.requires_grad}


def rewritten(path, change):
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    [(entry, text)] = metadata.items()
    header = json.loads(text)
    change(header)
    save_file(load_file(path), path, {entry: json.dumps(header)})


@pytest.mark.parametrize("keys", [
    (), ("1.weight",), ("1.weight", "1.bias", "2.gain"), ("3.bias", "5.weight"),
    ("1.weight", "1.bias", "2.gain", "2.bias", "3.weight", "3.bias", "5.weight", "5.bias"),
], ids=len)  # fmt: skip
@pytest.mark.parametrize("pruned", [False, True])
def test_frozen_parameters_stay_frozen(keys, pruned, tmp_path, rng):
    model = network().initialize(0)
    named = model.named_parameters()
    if pruned:
        gb.prune(model, 0.8)
    for key in keys:
        named[key].requires_grad = False
    gb.save_model(model, tmp_path / "m.safetensors")
    assert read_metadata(tmp_path / "m.safetensors")["frozen"] == [k for k in model.named_parameters() if k in keys]
    loaded = gb.load_model(tmp_path / "m.safetensors")
    assert frozen(loaded) == frozen(model) == set(keys)
    if len(keys) < 8:
        before = loaded.state_dict()
        gb.Trainer(loaded, seed=0).fit(rng.normal(size=(20, 4)), rng.integers(0, 2, 20), epochs=2, progress=False)
        after = loaded.state_dict()
        assert {k for k in keys if (after[k] == before[k]).all()} == set(keys)
        assert {k for k, p in loaded.named_parameters().items() if p.stepped and (after[k] != before[k]).any()}
    gb.save_model(loaded, tmp_path / "again.safetensors")
    assert frozen(gb.load_model(tmp_path / "again.safetensors")) == set(keys)


@pytest.mark.parametrize("thawed", [False, True])
def test_what_a_constructor_freezes_may_have_been_thawed(thawed, tmp_path):
    model = Extractor().initialize(0)
    model.features.weight.requires_grad = thawed
    gb.save_model(model, tmp_path / "m.safetensors")
    assert gb.load_model(tmp_path / "m.safetensors").features.weight.requires_grad is thawed


def test_a_file_of_before_leaves_freezing_to_the_constructors(tmp_path):
    for model, expected in ((network(), set()), (Extractor(), {"features.weight"})):
        gb.save_model(model.initialize(0), tmp_path / "m.safetensors")
        rewritten(tmp_path / "m.safetensors", lambda header: header.pop("frozen"))
        assert frozen(gb.load_model(tmp_path / "m.safetensors")) == expected


@pytest.mark.parametrize(
    "bad", [None, "1.weight", 3, {}, [3], ["0.mean"], ["5.mask"], ["9.weight"], [["1.weight"]]], ids=str
)
def test_a_damaged_list_is_an_error(bad, tmp_path):
    gb.save_model(network().initialize(0), tmp_path / "m.safetensors")
    rewritten(tmp_path / "m.safetensors", lambda header: header.update(frozen=bad))
    with pytest.raises(ValueError, match=r"m\.safetensors: its header is damaged \(frozen is no list of trained param"):
        gb.load_model(tmp_path / "m.safetensors")
