"""Model files: what comes back is what went in, every fault is named, and no fault costs the file that was there."""

import copy
import errno
import json
import os
import pickle
import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gpubackprop as gb
from gpubackprop.backends import get_backend
from gpubackprop.checkpoint import BUILTIN, check_writable, load_model, read_metadata, save_model, write_file
from gpubackprop.formulas import ACTIVATIONS
from gpubackprop.layers import CLASSES, Activation

SWOOSH = {"forward": "x * sigmoid(k * x - 1)",
          "derivative": "sigmoid(k * x - 1) * (1 + k * x * (1 - sigmoid(k * x - 1)))"}  # fmt: skip


class Gain(gb.Layer):
    """A user's layer, with a parameter, a list of sublayers and an initializer of its own."""

    def __init__(self, columns, gain_init="ones", sizes=(), settings=None):
        self.gain = gb.Parameter((columns,), gain_init)
        self.rest = [gb.Dense(columns, columns, activation="tanh") for _ in sizes]
        self.settings = settings

    def forward(self, x):
        x = x * self.gain
        for layer in self.rest:
            x = layer(x)
        return x


class Changing(gb.Layer):
    """A layer whose class changes between saving and loading."""

    width = 3

    def __init__(self):
        self.weight = gb.Parameter((type(self).width,), "ones")

    def forward(self, x):
        return x * self.weight


@pytest.fixture
def swoosh():
    """A registered activation, gone after the test."""
    yield gb.register_activation("swoosh", **SWOOSH, k=1.5)
    ACTIVATIONS.pop("swoosh", None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


def rewrite(path, change):
    """Write the file anew with a changed header."""
    header = read_metadata(path)
    change(header)
    save_file(load_file(path), path, {"gpubackprop": json.dumps(header)})


# ---- round trips ---------------------------------------------------------------------------------------------------

shared = gb.Dense(4, 4, activation="relu")
MODELS = {
    "mlp": lambda: gb.mlp([4, 8, 3], activation="gelu", dropout=0.25),
    "float64": lambda: gb.mlp([4, 8, 3], dtype="float64"),
    "dtype class": lambda: gb.mlp([4, 3], dtype=np.float64),
    "dtype object": lambda: gb.Sequential(gb.Dense(4, 3), dtype=np.dtype("float64")),
    "every layer": lambda: gb.Sequential(
        gb.Scaler(4), gb.InputNoise(0.1), gb.Residual(gb.Dense(4, 4), gb.LayerNorm(4, eps=1e-3)),
        gb.BatchNorm(4, momentum=0.5), Activation("silu"), gb.Dropout(0.5),
        gb.Concatenate(gb.Dense(4, 1), gb.Sequential(gb.Dense(4, 3))), gb.Dense(4, 2, bias=False),
        gb.Scaler(2, inverse=True)),
    "shared": lambda: gb.Sequential(shared, gb.Dense(4, 4), shared),
    "one dense": lambda: gb.Dense(4, 2),
    "no parameters": lambda: gb.Sequential(gb.Dropout(0.5)),
    "a user's": lambda: gb.Sequential(Gain(4, sizes=[1, 2], settings={"a": (1, [2.5, None]), 3: "b"}), gb.Dense(4, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, path, rng):
    model = MODELS[name]()
    model.initialize(7)
    for p in model.named_parameters().values():
        p.data[...] = rng.uniform(0.5, 1.5, p.shape)
    x = rng.normal(size=(5, 4))
    save_model(model, path)
    loaded = load_model(path)
    assert type(loaded) is type(model) and repr(loaded) == repr(model)
    assert np.dtype(loaded.dtype) == np.dtype(model.dtype) and loaded.output_kind is None
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    for key in before:
        assert before[key].dtype == after[key].dtype and before[key].tobytes() == after[key].tobytes()
    if before:  # without parameters there is nothing to say how wide x is
        np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


def test_numpy_numbers_are_numbers(path):
    save_model(gb.Dense(np.int64(4), np.int32(2), bias=np.bool_(False)), path)
    assert load_model(path).arguments == ((4, 2), {"bias": False})


def test_shared_layers_stay_shared(path):
    model = MODELS["shared"]()
    save_model(model, path)
    loaded = load_model(path)
    assert loaded.layers[0] is loaded.layers[2] is not loaded.layers[1]
    assert loaded.parameter_count == model.parameter_count


def test_arguments_keep_their_kinds(path):
    save_model(MODELS["a user's"](), path)
    assert load_model(path).layers[0].settings == {"a": (1, [2.5, None]), 3: "b"}


def test_a_trained_model_comes_back_with_its_head(path):
    x, y = gb.datasets.digits()
    model = gb.mlp([64, 16, 10])
    trainer = gb.Trainer(model, seed=0, device="cpu")
    trainer.fit(x, y, epochs=2)
    save_model(model, path)
    loaded = load_model(path)
    assert loaded.output_kind == "softmax"
    np.testing.assert_array_equal(loaded.predict_proba(x), model.predict_proba(x))
    assert gb.Trainer(loaded, seed=1, device="cpu").evaluate(x, y) == trainer.evaluate(x, y)


def test_loaded_weights_are_settled(path):
    model = gb.mlp([4, 2]).initialize(3)
    save_model(model, path)
    loaded = load_model(path)
    gb.Trainer(loaded, seed=9)
    np.testing.assert_array_equal(loaded.state_dict()["0.weight"], model.state_dict()["0.weight"])
    loaded.initialize(3)
    np.testing.assert_array_equal(loaded.state_dict()["0.weight"], model.state_dict()["0.weight"])


def test_a_model_that_was_never_drawn_is_saved_as_it_would_be_drawn(path):
    save_model(gb.mlp([4, 2]), path)
    np.testing.assert_array_equal(load_model(path).state_dict()["0.weight"], gb.mlp([4, 2]).state_dict()["0.weight"])


def test_a_copied_or_unpickled_or_loaded_model_saves_the_same_bytes(path):
    model = MODELS["every layer"]()
    save_model(model, path)
    written = path.read_bytes()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), load_model(path), model):
        save_model(other, path)
        assert path.read_bytes() == written


def test_part_of_a_model_can_be_saved(path):
    model = gb.Sequential(gb.Sequential(gb.Dense(4, 3)), gb.Dense(3, 2), dtype="float64").initialize(1)
    save_model(model.layers[0], path)
    loaded = load_model(path)
    assert np.dtype(loaded.dtype) == np.float64
    np.testing.assert_array_equal(loaded.state_dict()["0.weight"], model.state_dict()["0.0.weight"])


@pytest.mark.parametrize("init", [lambda shape, rng: rng.normal(size=shape), np.full((4, 2), 0.5)])
def test_initializers_are_left_out(init, path):
    model = gb.Sequential(gb.Dense(4, 2, init=init, bias_init=np.ones(2)), Gain(2, np.array([2.0, 3.0])))
    save_model(model, path)
    dense, gain = read_metadata(path)["architecture"]["arguments"]
    assert (dense["arguments"], dense["keywords"]) == ([4, 2], {"init": None, "bias_init": "zeros"})
    assert (gain["arguments"], gain["keywords"]) == ([2, "ones"], {})
    loaded = load_model(path)
    np.testing.assert_array_equal(loaded.state_dict()["0.weight"], model.state_dict()["0.weight"])
    np.testing.assert_array_equal(loaded.state_dict()["1.gain"], [2, 3])


def test_metadata_is_read_without_the_classes(path, monkeypatch):
    save_model(gb.Sequential(Gain(2)), path, extra={"classes": ["ä", "b"], "n": 1.5})
    monkeypatch.delitem(CLASSES, f"{__name__}:Gain")
    header = read_metadata(path)
    assert header["extra"] == {"classes": ["ä", "b"], "n": 1.5}
    assert (header["format"], header["gpubackprop"], header["dtype"]) == (1, gb.__version__, "float32")
    assert header["architecture"]["layer"] == "Sequential"


def test_the_arrays_are_plain_safetensors(path):
    model = gb.mlp([4, 2])
    save_model(model, path)
    assert {k: a.shape for k, a in load_file(path).items()} == {"0.weight": (4, 2), "0.bias": (2,)}


# ---- activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: gb.mlp([3, 4, 2], "swoosh"), lambda: gb.Sequential(gb.Dense(3, 2),
                         gb.Sequential(Activation("swoosh")))], ids=["dense", "activation"])  # fmt: skip
def test_registered_rows_travel(make, swoosh, path, rng):
    model = make()
    x = rng.normal(size=(5, 3))
    expected = model.predict(x)
    save_model(model, path)
    assert read_metadata(path)["activations"] == [{"name": "swoosh", **SWOOSH, "constants": {"k": 1.5}}]
    np.testing.assert_array_equal(load_model(path).predict(x), expected)  # still registered, by the same row
    del ACTIVATIONS["swoosh"]
    np.testing.assert_array_equal(load_model(path).predict(x), expected)
    assert ACTIVATIONS["swoosh"] == swoosh


def test_only_rows_in_use_travel(swoosh, path):
    save_model(gb.mlp([3, 4, 2], "gelu"), path)
    assert read_metadata(path)["activations"] == []
    assert "swoosh" not in BUILTIN and "gelu" in BUILTIN


def test_another_row_under_the_name_is_an_error(swoosh, path):
    save_model(gb.mlp([3, 4, 2], "swoosh"), path)
    del ACTIVATIONS["swoosh"]
    gb.register_activation("swoosh", "2 * x", "2")
    with pytest.raises(ValueError, match=r"load_model: .*m\.safetensors: .*'swoosh' is taken by '2 \* x'"):
        load_model(path)


@pytest.mark.parametrize("row, message", [
    ({"forward": "__import__('os').getcwd()"}, "formula"),
    ({"forward": "(lambda: x)()"}, "formula"),
    ({"derivative": "2 * y"}, "central difference"),
    ({"name": "a b"}, "identifier"),
    ({"name": "relu"}, "is taken by"),
    ({"name": 3}, "m.safetensors"),
    ({"forward": 3}, "m.safetensors"),
    ({"constants": {"name": 1}}, "m.safetensors"),
    ({"forward": "-" * 5000 + "x"}, "m.safetensors"),
])  # fmt: skip
def test_formulas_pass_through_the_whitelist(row, message, swoosh, path):
    save_model(gb.mlp([3, 4, 2], "swoosh"), path)
    del ACTIVATIONS["swoosh"]
    before = dict(ACTIVATIONS)
    rewrite(path, lambda header: header["activations"][0].update(row))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(path)
    assert before == ACTIVATIONS


# ---- saving: errors ------------------------------------------------------------------------------------------------


def test_what_is_no_layer_is_refused(path):
    with pytest.raises(TypeError, match=r"save_model: model is dict; expected a layer"):
        save_model({}, path)


@pytest.mark.parametrize("settings", [lambda x: x, np.ones(2), {1, 2}, object(), [gb.Parameter((2,))]])
def test_arguments_that_a_file_cannot_hold_are_named(settings, path):
    with pytest.raises(TypeError, match=r"save_model: argument 'settings' of Gain is .*; a model file holds numbers"):
        save_model(gb.Sequential(Gain(2, settings=settings)), path)
    assert not path.exists()


def test_extra_that_is_not_json_is_refused(path):
    with pytest.raises(TypeError, match=r"save_model: extra cannot be written as JSON .*ndarray"):
        save_model(gb.mlp([2, 2]), path, extra={"a": np.ones(2)})
    assert not path.exists()


def test_a_model_changed_after_its_constructor_is_refused(path):
    model = gb.mlp([2, 2])
    model.layers = (*model.layers, gb.Dense(2, 3))
    with pytest.raises(ValueError, match=r"save_model: the model has '1\.weight' of shape \(2, 3\), but absent when"):
        save_model(model, path)
    assert not path.exists()


def test_a_class_defined_anew_is_refused(path):
    def define():
        class Again(gb.Layer):
            def forward(self, x):
                return x

        return Again()

    first, _ = define(), define()
    with pytest.raises(TypeError, match="the class Again was defined anew"):
        save_model(first, path)


@pytest.mark.parametrize("name, message", [
    ("missing/m.safetensors", "there is no folder"),
    ("file/m.safetensors", "there is no folder"),
    ("folder", "is a folder, expected the name of a file"),
    ("fifo", "is not a regular file"),
])  # fmt: skip
def test_unwritable_paths(name, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match=message):
        save_model(gb.mlp([2, 2]), tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "file", "folder"]


def test_a_folder_without_permission(path, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(PermissionError, match=r"m\.safetensors: cannot write in the folder .* \(Permission denied\)"):
        save_model(gb.mlp([2, 2]), path)


# ---- atomic writes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function, error", [
    ("fsync", OSError(errno.ENOSPC, "No space left on device")),
    ("replace", PermissionError(errno.EACCES, "Permission denied")),
    ("fsync", KeyboardInterrupt()),
])  # fmt: skip
def test_a_failure_in_the_middle_leaves_the_old_file(function, error, path, monkeypatch):
    save_model(gb.mlp([2, 2]).initialize(1), path)
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        save_model(gb.mlp([2, 2]).initialize(2), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_write_file_makes_an_ordinary_file_and_follows_links(tmp_path):
    target, link = tmp_path / "real", tmp_path / "link"
    before = os.umask(0o022)
    try:
        link.symlink_to(target)
        write_file(link, b"one")
        write_file(link, b"two")
    finally:
        os.umask(before)
    assert link.is_symlink() and target.read_bytes() == b"two"
    assert target.stat().st_mode & 0o777 == 0o644
    assert check_writable(link) == target.resolve()


def test_long_names_can_be_written(tmp_path):
    write_file(tmp_path / ("n" * 250), b"x")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"x"]


# ---- loading: errors -----------------------------------------------------------------------------------------------


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load_model: .*none\.safetensors: no such file"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"read_metadata: .*none: no such file"):
        read_metadata(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match=r"load_model: .*: cannot be read \(Is a directory\)"):
        load_model(tmp_path)


def test_unknown_device_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        load_model(tmp_path / "none", device="gpu")


def test_the_device_is_where_the_weights_lie(path):
    save_model(gb.mlp([2, 2]), path)
    assert load_model(path, device="cpu").arena.backend is get_backend("cpu")
    assert load_model(path).arena.backend is get_backend("auto")


def test_every_truncation_is_named(path):
    save_model(gb.mlp([2, 3]), path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"load_model: .*: is cut short, damaged or not safetensors"):
            load_model(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04" + b"0" * 99, b"x,y\n1,2\n", pickle.dumps({"a": 1}), b"\xff" * 64])
def test_what_is_not_safetensors(content, path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"load_model: .*: is cut short, damaged or not safetensors"):
        load_model(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_another_library(metadata, path):
    save_file({"a": np.zeros(3)}, path, metadata)
    with pytest.raises(ValueError, match=r"is safetensors but not a file of gb\.save_model"):
        load_model(path)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", "null", "{}", '{"format": 1}', "[" * 100_000,
    '{"format": 1, "architecture": [], "dtype": 3, "head": null, "activations": [], "extra": {}}',
    '{"format": 1, "architecture": [], "dtype": "float32", "head": null, "activations": {}, "extra": {}}',
])  # fmt: skip
def test_a_damaged_header(text, path):
    save_file({"a": np.zeros(3)}, path, {"gpubackprop": text})
    with pytest.raises(ValueError, match=r"load_model: .*: its header is damaged"):
        load_model(path)


@pytest.mark.parametrize("architecture", [
    [], "Dense", 3, None, {}, {"layer": "Dense"}, {"same": 0}, {"same": -1}, {"dict": [[1]]}, {"dict": [[[], 1]]},
    {"layer": "Dense", "arguments": [2], "keywords": {}}, {"layer": "Dense", "arguments": [2, "3"], "keywords": {}},
    {"layer": "Dense", "arguments": [2, -3], "keywords": {}},
    {"layer": "Dense", "arguments": [2, 3], "keywords": {"activation": "rleu"}},
    {"layer": "Sequential", "arguments": [3], "keywords": {}},
    {"layer": "Layer", "arguments": [], "keywords": {}}, {"layer": "os:system", "arguments": ["true"], "keywords": {}},
])  # fmt: skip
def test_a_damaged_architecture(architecture, path):
    save_model(gb.mlp([2, 3]), path)
    rewrite(path, lambda header: header.update(architecture=architecture))
    with pytest.raises(ValueError, match=r"load_model: .*m\.safetensors: "):
        load_model(path)


def test_a_header_nested_too_deeply(path):
    save_model(gb.mlp([2, 3]), path)
    deep = []
    for _ in range(sys.getrecursionlimit() // 4):
        deep = [deep]
    rewrite(path, lambda header: header.update(architecture=deep))
    with pytest.raises(ValueError, match=r"load_model: .*: its header"):
        load_model(path)


@pytest.mark.parametrize("change, message", [
    ({"head": "argmax"}, "the unknown head 'argmax'"),
    ({"format": 2}, r"has format 2, this version reads up to 1; upgrade gpubackprop"),
    ({"dtype": "float99"}, "float99"),
])  # fmt: skip
def test_other_entries_of_the_header(change, message, path):
    save_model(gb.mlp([2, 3]), path)
    rewrite(path, lambda header: header.update(change))
    with pytest.raises((ValueError, TypeError), match=message):
        load_model(path)


def test_an_unknown_class_is_named_with_the_module_to_import(path, monkeypatch):
    save_model(gb.Sequential(Gain(2)), path)
    monkeypatch.delitem(CLASSES, f"{__name__}:Gain")
    with pytest.raises(ValueError, match=rf"unknown layer class '{__name__}:Gain'; import '{__name__}', which defines"):
        load_model(path)
    rewrite(path, lambda header: header["architecture"]["arguments"][0].update(layer="__main__:Gain"))
    with pytest.raises(ValueError, match="put the class into a module of its own"):
        load_model(path)


def test_a_changed_class_is_named_by_leaf_and_both_shapes(path, monkeypatch):
    save_model(gb.Sequential(gb.Dense(2, 3), Changing()), path)
    monkeypatch.setattr(Changing, "width", 4)
    with pytest.raises(ValueError, match=r"load_model: .*it has '1\.weight' of shape \(3,\), but of shape \(4,\) in"):
        load_model(path)


def test_missing_and_unknown_leaves_are_named(path):
    save_model(gb.mlp([2, 3]), path)
    header, arrays = {"gpubackprop": json.dumps(read_metadata(path))}, load_file(path)
    save_file({"0.weight": arrays["0.weight"]}, path, header)
    with pytest.raises(ValueError, match=r"it has '0\.bias' absent, but of shape \(3,\) in the model"):
        load_model(path)
    save_file({**arrays, "1.weight": np.zeros((3, 1), np.float32)}, path, header)
    with pytest.raises(ValueError, match=r"it has '1\.weight' of shape \(3, 1\), but absent in the model"):
        load_model(path)


def test_a_huge_shape_is_refused_before_memory_is_asked_for(path):
    save_model(gb.mlp([2, 3]), path)
    rewrite(path, lambda header: header["architecture"]["arguments"][0]["arguments"].__setitem__(0, 10**12))
    with pytest.raises(ValueError, match=r"'0\.weight' of shape \(2, 3\), but of shape \(1000000000000, 3\)"):
        load_model(path)


def test_a_file_for_another_architecture_names_the_leaf_and_both_shapes(path):
    save_model(gb.mlp([2, 3]), path)
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(2, 3\) but the model's is \(2, 4\)"):
        gb.mlp([2, 4]).load_state_dict(load_file(path))


@pytest.mark.parametrize("bad", [None, 3, b"m"])
def test_a_path_that_is_none(bad):
    for name, use in (("load_model", load_model), ("read_metadata", read_metadata),
                      ("save_model", lambda path: save_model(gb.mlp([2, 3]), path))):  # fmt: skip
        message = rf"^{name}: path is {type(bad).__name__}; expected the name of a file, such as 'm\.safetensors'$"
        with pytest.raises(TypeError, match=message):
            use(bad)


def test_a_name_of_an_open_file_is_refused(path):
    if not os.path.islink("/dev/stdout"):
        pytest.skip("no /dev/stdout here")
    path.write_bytes(b"mine")
    message = r"stands for the open file .*; name a file of its own$"
    with open(path, "rb") as file, pytest.raises(FileExistsError, match=message):
        write_file(f"/dev/fd/{file.fileno()}", b"new")
    with pytest.raises(FileExistsError, match=r"^/dev/stdout: stands for the open file"):
        check_writable("/dev/stdout")
    assert path.read_bytes() == b"mine"


def test_initialize_after_loading_keeps_masks_and_scalers(tmp_path, rng):
    """They were given, not drawn: a new draw of the weights leaves them as they were saved."""
    x = rng.normal(3, 2, size=(20, 4))
    model = gb.Sequential(
        gb.Scaler(4).fit(x), gb.Dense(4, 6, mask=rng.random((4, 6)) < 0.5), gb.BatchNorm(6), gb.Dense(6, 2)
    )
    before = model.initialize(0).state_dict()
    gb.prune(model, 0.6)
    gb.save_model(model, tmp_path / "m.safetensors")
    loaded = gb.load_model(tmp_path / "m.safetensors")
    assert str(loaded) == str(model) and "mask=array(4, 6)" in str(loaded)
    after = loaded.initialize(1).state_dict()
    for key in ("0.mean", "0.scale"):
        np.testing.assert_array_equal(after[key], before[key])
    for key in ("1", "3"):
        np.testing.assert_array_equal(after[f"{key}.mask"], model.state_dict()[f"{key}.mask"])
        assert (after[f"{key}.weight"][after[f"{key}.mask"] == 0] == 0).all() and after[f"{key}.weight"].any()
    assert (after["1.weight"] != before["1.weight"]).any() and (after["2.variance"] == 1).all()


def test_a_mask_given_by_position_is_printed_as_an_array_after_loading(tmp_path):
    edges = np.eye(3, 2)
    model = gb.Sequential(gb.Dense(3, 2, "identity", True, None, "zeros", edges)).initialize(0)
    gb.save_model(model, tmp_path / "m.safetensors")
    loaded = gb.load_model(tmp_path / "m.safetensors")
    assert str(loaded) == str(model) and "array(3, 2)" in str(loaded)
