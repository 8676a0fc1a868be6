"""A model file asks for no more work than its size and some constants allow, and is refused by name or loads."""

import copy
import json
import string
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import gpubackprop as gb
from gpubackprop import formulas
from gpubackprop.checkpoint import load_model, read_metadata, save_model
from gpubackprop.formulas import ACTIVATIONS, LONGEST, chain, describe, name, parse
from gpubackprop.layers import Activation

SECONDS = 5.0  # of the processor; each of these took a minute, or memory without end


@pytest.fixture(autouse=True)
def rows():
    """The activations that a test registers are gone after it."""
    before = dict(ACTIVATIONS)
    yield
    for key in ACTIVATIONS.keys() - before:
        del ACTIVATIONS[key]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


def rewrite(path, **entries):
    header = read_metadata(path) | entries
    save_file(load_file(path), path, {"gpubackprop": json.dumps(header)})


def row(forward, derivative="1", name="mine", **constants):
    return {"name": name, "forward": forward, "derivative": derivative, "constants": constants}


def doubled(lines):
    return "a = x\n" + "a = 0.5 * (a + a)\n" * lines + "a"


def with_activation(path, *added):
    """A file whose model has the last of these activations."""
    gb.register_activation("mine", "x", "1")
    save_model(gb.Sequential(gb.Dense(2, 3), Activation("mine")), path)
    del ACTIVATIONS["mine"]
    rewrite(path, activations=list(added))


def dense(inputs=2, units=2):
    return {"layer": "Dense", "arguments": [inputs, units], "keywords": {}}


def nested(kind, levels, first):
    """Each level calls that before it twice."""
    layer = first
    for level in range(levels):
        layer = {"layer": kind, "arguments": [layer, {"same": level}], "keywords": {}}
    return layer


# ---- formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cpu:reference"])
@pytest.mark.parametrize("lines", [28, 200])
def test_a_formula_that_shares_its_parts_is_as_quick_as_its_graph(lines, device, path):
    begun = time.process_time()
    with_activation(path, row(doubled(lines)))
    model = load_model(path, device)
    x = np.array([[1.0, -2.0]], np.float32)
    np.testing.assert_allclose(model.predict(x), load_model(path, device).layers[0](x).numpy(), rtol=1e-6)
    assert time.process_time() - begun < SECONDS


def test_a_formula_that_shares_its_parts_is_trained_with_on_every_backend(cuda, path, rng):
    with_activation(path, row(doubled(30)))
    x, y = rng.normal(size=(6, 2)), rng.normal(size=(6, 3))
    found = []
    for device in ("cpu", "cpu:reference", "cuda"):
        trainer = gb.Trainer(load_model(path, device), "mse", gb.SGD(0.1), device=device, seed=0)
        found.append(trainer.fit(x, y, epochs=2, batch_size=6)["loss"][-1])
        assert all(len(launch.what) < 2 * LONGEST for launch in trainer.plan(6).launches)
    np.testing.assert_allclose(found, found[0], rtol=1e-6)


def test_a_derivative_of_shared_choices_is_chained_once_for_each_node():
    derivative = parse("a = where(x > 0, 1, x)\n" + "a = where(x > 1, a, -a)\n" * 60 + "a")["result"]
    graph = chain(name("dy"), derivative)
    assert len(graph.order) < 500 and len(describe(graph)) <= LONGEST
    value = formulas.evaluate(graph, {"x": 2.0, "dy": 3.0})
    assert value == 3.0 * formulas.evaluate(derivative, {"x": 2.0})


def test_a_description_is_whole_up_to_its_limit_and_cut_beyond():
    short, long = (parse(doubled(lines))["result"] for lines in (5, 40))
    assert parse(describe(short))["result"] is short
    assert len(describe(long)) == LONGEST and describe(long).endswith("…")


@pytest.mark.parametrize("added, message", [
    ([row("a = x\n" + "a = a + 0\n" * 20_000 + "a")], "its activations have more than 100,000 characters"),
    ([row(f"polynomial(x, 0, 1{', 0' * 50_000})")], "its activations have more than 100,000 characters"),
    ([row("x\n" * 3000)], "has 6,000 characters, expected at most 4,096"),
    ([row("x + " + " + ".join(f"0 * erf(x + {i})" for i in range(200)))], "operations, expected at most 2,000"),
    ([row("x", name=f"a{i}") for i in range(2000)], "has 2,000 activations of its own, expected at most 100"),
    ([row(" + ".join(["x", *(f"0 * (x + {k}.{i})" for k in range(200))]), name=f"a{i}") for i in range(100)],
     "its activations have more than"),
    ([row("x", name="a" * 10_000)], "has 10,000 characters, expected at most 4,096"),
    ([row("x", **{"k" * 200_000: 1})], "its activations have more than 100,000 characters"),
    ([3], "an activation is not one"),
    ([row("x") | {"constants": {"forward": 1}}], "an activation is not one"),
])  # fmt: skip
def test_formulas_beyond_bounds_are_refused_at_once(added, message, path):
    begun, before = time.process_time(), dict(ACTIVATIONS)
    with_activation(path, *added)
    with pytest.raises(ValueError, match=rf"^load_model: .*m\.safetensors: .*{message}") as caught:
        load_model(path)
    assert time.process_time() - begun < SECONDS and len(str(caught.value)) < 1500
    assert before == ACTIVATIONS  # none of a refused file stays


def test_activations_within_the_bounds_load(path):
    derivative = "s = sigmoid(k * x)\ns * (1 + k * x * (1 - s))"
    many = [row("x * sigmoid(k * x)", derivative, f"swish{k}", k=k / 9) for k in range(1, 41)]
    with_activation(path, *many, row("x"))
    assert load_model(path).predict(np.ones((1, 2))).shape == (1, 3)


def test_a_registered_row_is_forgotten_with_its_last_user():
    def use(k):
        gb.register_activation("brief", f"x * {k}.5", f"{k}.5")
        gb.Sequential(gb.Dense(2, 2, "brief")).predict(np.ones((1, 2)))
        del ACTIVATIONS["brief"]

    assert formulas._graph.cache_info().maxsize == formulas.KEPT
    for k in range(formulas.KEPT // 2 + 10):  # each asks for the graph forward and, for what it needs, backward
        formulas.Activation("brief", f"x * {k}.25", f"{k}.25").forward_graph()
    formulas._graph.cache_clear()
    before = len(formulas._nodes)
    for k in range(100, 140):
        use(k)
    for module in (formulas._graph, gb.fused.dense_graph):
        module.cache_clear()
    assert formulas._graph.cache_info().currsize == 0 and len(formulas._nodes) < before + 40 * 60


# ---- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [16, 30, 90])
def test_layers_shared_in_shared_layers_are_visited_once(levels):
    layer = gb.Dense(2, 2)
    for _ in range(levels):
        layer = gb.Sequential(layer, layer)
    begun = time.process_time()
    layer.initialize(0)
    assert list(layer.named_parameters()) == [".".join(["0"] * levels) + end for end in (".weight", ".bias")]
    assert len(list(layer.named_layers())) == levels + 1 and layer.inputs == 2 and layer.parameter_count == 6
    assert str(layer).count("the same as") == levels
    assert layer.state_dict() and time.process_time() - begun < SECONDS


@pytest.mark.parametrize("kind, levels, message", [
    ("Sequential", 20, r"would be called 2,097,151 times in a prediction, expected at most 10,000"),
    ("Sequential", 40, "times in a prediction, expected at most 10,000"),
    ("Sequential", 101, "nested too deeply"),
    ("Concatenate", 8, None),
    ("Concatenate", 40, "in a prediction, expected at most 10,000"),
])  # fmt: skip
def test_files_whose_predictions_would_not_end_are_refused(kind, levels, message, path):
    save_model(gb.Sequential(gb.Dense(2, 2)), path)
    begun = time.process_time()
    rewrite(path, architecture=nested(kind, levels, dense()))
    if message is None:
        save_file({".".join(["0"] * levels + [k]): a for k, a in gb.Dense(2, 2).state_dict().items()}, path,
                  {"gpubackprop": json.dumps(read_metadata(path))})  # fmt: skip
        assert load_model(path).predict(np.ones((1, 2))).shape == (1, 2 * 2**levels)
    else:
        with pytest.raises(ValueError, match=rf"^load_model: .*m\.safetensors: .*{message}"):
            load_model(path)
    assert time.process_time() - begun < SECONDS


def test_columns_that_double_in_a_row_of_layers_are_refused(path):
    save_model(gb.Sequential(gb.Dense(2, 2)), path)
    empty = {"layer": "Sequential", "arguments": [], "keywords": {}}
    twice = {"layer": "Concatenate", "arguments": [empty, {"same": 1}], "keywords": {}}
    rewrite(path, architecture={"layer": "Sequential", "arguments": [dense(), twice, *[{"same": 2}] * 40],
                                "keywords": {}})  # fmt: skip
    with pytest.raises(
        ValueError, match=r"m\.safetensors: its layers would give .* values for a row, expected at most"
    ):
        load_model(path)


def test_deep_and_shared_models_load(path):
    one = gb.Dense(4, 4, activation="tanh")
    model = gb.Sequential(*(gb.Dense(4, 4, activation="relu") for _ in range(400)), *[one] * 50, gb.Dense(4, 2))
    inner = gb.Residual(one)
    for _ in range(30):
        inner = gb.Residual(gb.Dense(4, 4), inner)
    model = gb.Sequential(model, gb.Sequential(gb.Dense(2, 4), inner)).initialize(0)
    save_model(model, path)
    x = np.ones((3, 4))
    np.testing.assert_array_equal(load_model(path).predict(x), model.predict(x))


def test_what_could_not_be_loaded_is_not_saved(path):
    layer = gb.Dense(2, 2)
    for _ in range(101):
        layer = gb.Sequential(layer)
    with pytest.raises(ValueError, match=r"^save_model: .*nested too deeply.*"):
        save_model(layer, path)
    assert not path.exists()


@pytest.mark.parametrize("dtype", ["f4," * 10**6 + "f4", "float16", "int8", "f4", "", "x" * 10**6])
def test_another_dtype_is_refused_by_name(dtype, path):
    save_model(gb.Sequential(gb.Dense(2, 2)), path)
    begun = time.process_time()
    for entries in ({"dtype": dtype}, {"architecture": {"layer": "Sequential", "arguments": [dense()],
                                                        "keywords": {"dtype": dtype}}}):  # fmt: skip
        rewrite(path, **({"dtype": "float32"} | entries))
        if entries != {"dtype": dtype} and dtype == "f4":
            continue  # is float32
        with pytest.raises(ValueError, match=r"^load_model: .*m\.safetensors: .*dtype") as caught:
            load_model(path)
        assert len(str(caught.value)) < 1500
    assert time.process_time() - begun < SECONDS


def test_arrays_of_another_type_are_refused(path):
    save_model(gb.Sequential(gb.Dense(2, 2)), path)
    arrays = {k: a.astype(np.int64) for k, a in load_file(path).items()}
    save_file(arrays, path, {"gpubackprop": json.dumps(read_metadata(path))})
    with pytest.raises(ValueError, match=r"^load_model: .*m\.safetensors: .* of type I64, expected F32"):
        load_model(path)


@pytest.mark.parametrize("names", ["ab", [1, None], [[1], [2]], ["a"], {"a": 1}])
def test_names_of_columns_that_are_none_of_the_models_are_refused(names, path):
    save_model(gb.Sequential(gb.Dense(2, 2)), path)
    rewrite(path, feature_names=names)
    with pytest.raises(ValueError, match=r"^load_model: .*m\.safetensors: its header is damaged"):
        load_model(path)


# ---- anything ------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(string.printable, max_size=8)
    | st.sampled_from(["Dense", "Sequential", "relu", "ones", "float64"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["layer", "arguments", "keywords", "same", "tuple", "dict", "name", "constants"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(data, at=()):
    """The ways to every value in JSON."""
    yield at
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*at, key))


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The header and the arrays of a file with something of everything."""
    path = tmp_path_factory.mktemp("valid") / "m.safetensors"
    gb.register_activation("mine", "k * x", "k", k=2.0)
    one = gb.Dense(3, 3, activation="mine")
    model = gb.Sequential(
        gb.Scaler(2),
        gb.Dense(2, 3, mask=np.eye(2, 3), max_norm=2.0),
        one,
        gb.Residual(one),
        gb.BatchNorm(3),
        gb.Dropout(0.5),
        gb.Concatenate(gb.Dense(3, 1), gb.LayerNorm(3)),
    )
    save_model(model, path, extra={"classes": ["a", "b"]})
    del ACTIVATIONS["mine"]
    return read_metadata(path), load_file(path)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_header_loads_or_is_refused_by_name(valid, path, data):
    """Never another kind of error, and in a time that no value in it decides."""
    header, arrays = copy.deepcopy(valid)
    *way, last = data.draw(st.sampled_from([at for at in places(header) if at]))
    part = header
    for key in way:
        part = part[key]
    if data.draw(st.booleans()):
        part[last] = data.draw(JSON)
    else:
        del part[last]
    save_file(arrays, path, {"gpubackprop": json.dumps(header)})
    ACTIVATIONS.pop("mine", None)
    begun = time.process_time()
    try:
        assert isinstance(load_model(path), gb.Layer)
    except ValueError as error:
        assert str(error).startswith(f"load_model: {path}: ") and len(str(error)) < 2000
    assert time.process_time() - begun < SECONDS


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_bytes_load_or_are_refused_by_name(valid, path, data):
    header, arrays = valid
    save_file(arrays, path, {"gpubackprop": json.dumps(header)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    ACTIVATIONS.pop("mine", None)
    try:
        assert isinstance(load_model(path), gb.Layer)
    except ValueError as error:
        assert str(error).startswith(f"load_model: {path}: ")
