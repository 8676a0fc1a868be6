"""Messages name what came and what it is called here: unknown names, other libraries' words, data of another form."""

import pickle
import types
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import gpubackprop as gb
from gpubackprop.cli import main
from gpubackprop.formulas import ACTIVATIONS
from gpubackprop.losses import LOSSES
from gpubackprop.metrics import METRICS
from gpubackprop.names import FOREIGN, hint
from gpubackprop.optimizers import OPTIMIZERS

X, Y = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12) % 2
NAMED = {
    "activation": (ACTIVATIONS, lambda name: gb.Dense(3, 3, activation=name)),
    "loss": (LOSSES, lambda name: gb.Trainer(gb.mlp([3, 2]), name)),
    "metric": (METRICS, lambda name: gb.Trainer(gb.mlp([3, 2]), metrics=[name])),
    "optimizer": (OPTIMIZERS, lambda name: gb.Trainer(gb.mlp([3, 2]), optimizer=name)),
    "precision": (("float32", "bfloat16"), lambda name: gb.Trainer(gb.mlp([3, 2]), precision=name)),
    "initializer": (("he_normal", "zeros"), lambda name: gb.Dense(3, 3, init=name).initialize(0)),
    "data set": (("digits",), gb.datasets.load),
    "setting": (("weight_decay",), lambda name: gb.Adam(groups={"*": {name: 0.1}})),
    "attribute": (("Sequential", "softmax"), lambda name: getattr(gb, name)),
}


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMED)
@given(data=st.data())
def test_a_name_with_two_letters_swapped_is_recognised(kind, data):
    known, use = NAMED[kind]
    name = data.draw(st.sampled_from(sorted(k for k in known if len(k) > 3)))
    i = data.draw(st.integers(0, len(name) - 2))
    swapped = name[:i] + name[i + 1] + name[i] + name[i + 2 :]
    if swapped in known or swapped.lower() in FOREIGN.get(kind, {}) or hasattr(gb, swapped):
        return
    with pytest.raises((ValueError, AttributeError), match=rf"'{swapped}'.*; did you mean '{name}'\?$"):
        use(swapped)


FOREIGN_NAMES = [
    (lambda: gb.Linear, AttributeError, r"has no attribute 'Linear'; here it is gb\.Dense\(inputs, units\)"),
    (lambda: gb.ReLU, AttributeError, r"'ReLU'; here it is gb\.Dense\(…, activation='relu'\)"),
    (lambda: gb.CrossEntropyLoss, AttributeError, "loss='cross_entropy'"),
    (lambda: gb.mlp([3, 2]).fit, AttributeError, r"a model has no fit; here it is gb\.Trainer\(model, loss"),
    (lambda: gb.mlp([3, 2]).eval(), AttributeError, "a model has no eval; it is not needed"),
    (
        lambda: gb.Dense(3, 2, activation="softmax"),
        ValueError,
        r"unknown activation 'softmax'.* part of loss='cross_en",
    ),
    (lambda: gb.Dense(3, 2, activation="linear"), ValueError, "here it is 'identity'"),
    (lambda: gb.Dense(3, 2, activation=gb.relu), ValueError, "did you mean 'relu'"),
    (
        lambda: gb.Sequential(gb.Dense(3, 2), gb.relu),
        TypeError,
        r"item 1 is the function relu; .*gb\.Activation\('relu'\)",
    ),
    (lambda: gb.Sequential([gb.Dense(3, 2)]), TypeError, r"item 0 is list; expected a layer: pass them one by one"),
    (
        lambda: gb.Adam(learning_rate=0.1),
        TypeError,
        "Adam: unknown argument 'learning_rate'; here it is lr of an optim",
    ),
    (
        lambda: gb.Trainer(gb.mlp([3, 2]), lr=0.1),
        TypeError,
        r"Trainer: unknown argument 'lr'; here it is lr of an opti",
    ),
    (lambda: gb.Trainer(gb.mlp([3, 2]), epochs=3), TypeError, "here it is an argument of fit"),
    (lambda: gb.Trainer(gb.mlp([3, 2])).fit(X, Y, learning_rate=1), TypeError, "fit: unknown argument 'learning_rate'"),
    (
        lambda: gb.Trainer(gb.mlp([3, 2])).fit(X, Y, validation_split=0.1),
        TypeError,
        r"here it is validation_data=\(x_val",
    ),
    (lambda: gb.Trainer(gb.mlp([3, 2])).fit(X, Y, epoch=1), TypeError, "'epoch'; did you mean 'epochs'"),
    (
        lambda: gb.Dense(in_features=3, out_features=2),
        TypeError,
        "Dense: unknown argument 'in_features'; here it is inp",
    ),
    (lambda: gb.Dropout(p=0.5), TypeError, "Dropout: unknown argument 'p'; here it is rate"),
    (lambda: gb.Trainer(gb.mlp([3, 2]), "categorical_crossentropy"), ValueError, "here it is 'cross_entropy'"),
    (lambda: gb.Trainer(gb.mlp([3, 2]), device="gpu"), ValueError, "here it is 'cuda'"),
    (lambda: gb.split(X, Y, test_size=0.2), TypeError, "split: unknown argument 'test_size'; here it is test"),
    (lambda: gb.KFold(n_split=3), TypeError, "KFold: unknown argument 'n_split'; did you mean 'n_splits'"),
    (lambda: gb.EarlyStopping(patiense=3), TypeError, "EarlyStopping: unknown argument 'patiense'; did you mean 'pat"),
    (
        lambda: gb.Trainer(gb.mlp([3, 2])).evaluate(X, Y, sample_weights=Y),
        TypeError,
        "evaluate: unknown argument 'sample_weights'; did you mean 'sample_weight'",
    ),
    (lambda: gb.tensor(X).unsqueeze(0), AttributeError, "a tensor has no attribute 'unsqueeze'; here it is reshape"),
    (lambda: gb.save_model(types.SimpleNamespace(model_=gb.mlp([3, 2])), "a"), TypeError, "pass its model_"),
    (
        lambda: gb.Trainer(gb.mlp([3, 2]), lambda o, t: (o - t).mean()).fit(X, Y + 30),
        ValueError,
        r"label 30 at row 0 is out of range.* or pass y\[:, None\] if they are numbers",
    ),
    (lambda: gb.grid_points(11935), TypeError, "grid_points: model is int; expected a layer"),
    (
        lambda: gb.random_search(gb.mlp([3, 2]), X, Y),
        TypeError,
        "random_search: trainer is Sequential; expected a Train",
    ),
]


@pytest.mark.parametrize(("use", "error", "message"), FOREIGN_NAMES, ids=lambda value: None)
def test_what_other_libraries_call_it_is_answered_with_its_name_here(use, error, message):
    with pytest.raises(error, match=message):
        use()


def test_the_command_line_recognises_names_too():
    for option, name, meant in (("--activation", "rleu", "relu"), ("--optimizer", "adma", "adam")):
        done = CliRunner().invoke(main, ["train", "digits", option, name])
        assert done.exit_code == 2 and f"did you mean '{meant}'?" in " ".join(done.output.split())


def theirs(name, module="torch.nn.modules"):
    return types.new_class(name, exec_body=lambda body: body.update(__module__=module, __call__=lambda *_: None))


@pytest.mark.parametrize("make", [lambda cls: cls, lambda cls: cls()])
def test_objects_of_pytorch_are_named(make):
    with pytest.raises(TypeError, match=r"loss is PyTorch's CrossEntropyLoss; expected .*; here it is 'cross_entropy'"):
        gb.Trainer(gb.mlp([3, 2]), make(theirs("CrossEntropyLoss")))
    with pytest.raises(TypeError, match="optimizer is PyTorch's AdamW; expected a name or one such as gb"):
        gb.Trainer(gb.mlp([3, 2]), optimizer=make(theirs("AdamW", "torch.optim.adamw")))
    with pytest.raises(TypeError, match=r"model is PyTorch's Linear; expected a layer.*; here it is gb\.Dense"):
        gb.Trainer(make(theirs("Linear")))
    with pytest.raises(TypeError, match=r"item 0 is PyTorch's Linear; expected a layer; here it is gb\.Dense"):
        gb.Sequential(make(theirs("Linear")))


def test_foreign_names_are_names_of_nothing_here():
    tables = {"activation": ACTIVATIONS, "loss": LOSSES, "metric": METRICS}
    assert {kind: set(FOREIGN[kind]) & set(table) for kind, table in tables.items()} == {kind: set() for kind in tables}
    assert [name for name in FOREIGN["model"] if hasattr(gb.Layer, name)] == []
    assert [name for name in FOREIGN["tensor"] if hasattr(gb.Tensor, name)] == []
    assert all(key == key.lower() for table in FOREIGN.values() for key in table)


def test_a_hint_hides_no_error_and_no_attribute():
    class Faulty(gb.Layer):
        @property
        def width(self):
            return self.missing

    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        _ = Faulty().width
    assert not hasattr(gb.mlp([2, 2]), "fit") and not hasattr(gb, "Linear") and hint("model", "anything") == ""
    twin = pickle.loads(pickle.dumps(gb.Adam(0.5)))
    assert twin == gb.Adam(0.5)


# ---- data ----------------------------------------------------------------------------------------------------------


def test_a_column_of_text_is_named():
    pd = pytest.importorskip("pandas")
    trainer = gb.Trainer(gb.mlp([3, 2]), seed=0)
    for text in (["P", "Q"], pd.Categorical(["P", "Q"])):
        frame = pd.DataFrame({"a": [1.0, 2.0], "city": text, "b": [1, 2]})
        for call in (lambda f: trainer.fit(f, [0, 1]), trainer.predict):
            with pytest.raises(TypeError, match=r"^\w+: x's column 'city' has 'P' at row 0, expected numbers; encode"):
                call(frame)


@pytest.mark.parametrize("columns, rows", [(3, 12), (5, 2)])
def test_x_transposed_is_said_to_be(columns, rows):
    x, trainer = np.ones((rows, columns)), gb.Trainer(gb.mlp([columns, 2]), seed=0)
    for call in (lambda x: trainer.fit(x, np.zeros(rows, int)), trainer.predict):
        with pytest.raises(ValueError, match=rf"has {rows} columns but .* expects {columns}; it has .* pass x\.T"):
            call(x.T)


@pytest.mark.parametrize(("x", "y", "message"), [
    (gb.mlp([3, 1]), np.linspace(0, 9, 12), "cross_entropy needs an output per class .*; use loss='mse' for numbers"),
    (gb.mlp([3, 1]), Y, "cross_entropy needs an output per class but the model has one; use loss='bce'"),
])  # fmt: skip
def test_advice_on_the_loss_goes_by_the_targets(x, y, message):
    with pytest.raises(ValueError, match=message):
        gb.Trainer(x, seed=0).fit(X, y)


@pytest.mark.parametrize("loss", ["bce", "mse", "cross_entropy"])
def test_text_that_is_no_number_is_not_to_be_converted_to_one(loss):
    trainer = gb.Trainer(gb.mlp([3, 2 if loss == "cross_entropy" else 1]), loss, seed=0)
    with pytest.raises(TypeError, match="expected numbers; number the") as error:
        trainer.fit(X, np.array(["no", "yes"])[Y])
    assert "y.astype" not in str(error.value)


def test_probabilities_of_a_poisson_model_are_counts():
    trainer = gb.Trainer(gb.mlp([3, 1]), "poisson", seed=0)
    trainer.fit(X, Y, epochs=1, progress=False)
    with pytest.raises(
        ValueError, match=r"trained for regression; np\.exp\(model\.predict\(x\)\) is the expected count"
    ):
        trainer.model.predict_proba(X)


def test_what_float16_cannot_hold_is_for_precisions_that_the_trainer_takes():
    with pytest.raises(ValueError, match="too large for float16; scale x, or train with precision='bfloat16' or 'floa"):
        gb.Trainer(gb.mlp([3, 2]), precision="float16", seed=0).fit(np.full((4, 3), 1e5), [0, 1, 0, 1])
    for precision in ("bfloat16", "float32"):
        trainer = gb.Trainer(gb.mlp([3, 2]), precision=precision, seed=0)
        trainer.fit(np.full((4, 3), 1e5), [0, 1, 0, 1], epochs=1)


def test_one_hot_rows_keep_accuracy():
    trainer = gb.Trainer(gb.mlp([3, 2]), seed=0)
    history = trainer.fit(X, np.eye(2)[Y], epochs=2, validation_data=(X, np.eye(2, dtype=int)[Y]), progress=False)
    assert {"accuracy", "val_accuracy"} <= set(history)
    assert trainer.evaluate(X, np.eye(2)[Y]) == trainer.evaluate(X, Y)
    assert set(gb.Trainer(gb.mlp([3, 2]), metrics=["mse"], seed=0).evaluate(X, np.eye(2)[Y])) == {"loss", "mse"}


# ---- models --------------------------------------------------------------------------------------------------------


class Passing(gb.Layer):
    def forward(self, x):
        return x


class Doubled(gb.Sequential):
    def forward(self, x):
        return gb.concatenate([super().forward(x)] * 2, axis=1)


MISMATCHED = {
    "dense": (
        lambda: [gb.Dense(64, 16), gb.Dense(17, 10)],
        r"layer '1': x has 16 columns but Dense\(17, 10\) expects 17",
    ),
    "behind": (
        lambda: [gb.Dense(64, 16), gb.Activation("relu"), gb.Dropout(0.1), gb.Dense(17, 1)],
        "layer '3': x has 16",
    ),
    "inside": (lambda: [gb.Dense(64, 16), gb.Sequential(gb.Dropout(0.1), gb.Dense(17, 1))], r"layer '1\.1': x has 16"),
    "branches": (
        lambda: [gb.Concatenate(gb.Dense(4, 2), gb.Dense(4, 3)), gb.Dense(6, 1)],
        "layer '1': x has 5 columns",
    ),
    "norm": (lambda: [gb.Dense(8, 32), gb.BatchNorm(31)], "layer '1': x has 32 columns but BatchNorm"),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_layers_that_do_not_fit_are_refused_when_built(name):
    layers, message = MISMATCHED[name]
    with pytest.raises(ValueError, match=f"^Sequential: {message}"):
        gb.Sequential(*layers())


def test_layers_of_unknown_width_are_left_to_the_run():
    for layers in ([gb.Dense(4, 3), Passing(), gb.Dense(5, 1)], [Doubled(gb.Dense(4, 3)), gb.Dense(6, 1)],
                   [gb.Dense(4, 3), gb.Concatenate(Passing(), gb.Dense(3, 1)), gb.Dense(4, 1)]):  # fmt: skip
        gb.Sequential(*layers)
    assert gb.Sequential(Doubled(gb.Dense(4, 3)), gb.Dense(6, 1))(np.ones((2, 4))).shape == (2, 1)


def test_shared_layers_are_measured_once():
    model = gb.Sequential(gb.Dense(4, 4))
    for _ in range(12):
        model = gb.Sequential(model, gb.Dense(4, 4), model)
    with pytest.raises(ValueError, match="x has 4 columns but"):
        gb.Sequential(model, gb.Dense(5, 1))


class Twice(gb.Layer):
    def forward(self, x):
        return x, x


def test_a_tuple_of_outputs_is_said_to_be_one():
    model, message = gb.Sequential(gb.Dense(3, 2), Twice()).initialize(0), "returns a tuple of 2; expected one tensor"
    for call in (model.predict, lambda x: gb.Trainer(model, seed=0).fit(x, Y)):
        with pytest.raises(TypeError, match=message):
            call(X)
    with pytest.raises(TypeError, match="layer '2': x is a tuple of 2; expected one tensor"):
        gb.Sequential(gb.Dense(3, 2), Twice(), gb.Dense(2, 2))(X)


class Softmax(gb.Layer):
    def forward(self, x):
        return gb.softmax(x)


class ByHand(gb.Layer):
    def forward(self, x):
        e = gb.exp(x)
        return e / e.sum(axis=1, keepdims=True)


ENDINGS = {
    "softmax": ("cross_entropy", lambda: [gb.Dense(3, 2), Softmax()]),
    "softmax by hand": ("cross_entropy", lambda: [gb.Dense(3, 2), ByHand()]),
    "sigmoid": ("bce", lambda: [gb.Dense(3, 1, activation="sigmoid")]),
    "sigmoid layer": ("bce", lambda: [gb.Dense(3, 1), gb.Activation("sigmoid")]),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_model_that_ends_in_what_its_loss_applies_is_warned_of_once(name):
    loss, layers = ENDINGS[name]
    trainer = gb.Trainer(gb.Sequential(*layers()), loss, seed=0)
    with pytest.warns(
        UserWarning, match=rf"^fit: the model ends in {name.split()[0]}, which the loss {loss} app"
    ) as seen:
        trainer.fit(X, Y, epochs=1, progress=False)
        trainer.fit(X, Y, epochs=1, progress=False)
    assert [w.filename for w in seen] == [__file__]


@pytest.mark.parametrize("loss, layers", [
    ("cross_entropy", lambda: [gb.Dense(3, 2, activation="relu")]),
    ("cross_entropy", lambda: [Softmax(), gb.Dense(3, 2)]),
    ("mse", lambda: [gb.Dense(3, 1, activation="sigmoid")]),
])  # fmt: skip
def test_other_endings_are_nobodys_business(loss, layers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gb.Trainer(gb.Sequential(*layers()), loss, seed=0).fit(X, Y, epochs=1, progress=False)


# ---- files and estimators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".h5", ".onnx", ".pkl", ".npz", ".PT"])
def test_a_model_is_not_saved_under_the_name_of_another_format(suffix, tmp_path):
    path = tmp_path / f"m{suffix}"
    with pytest.raises(ValueError, match=rf"m\{suffix}: .* safetensors; name it m\.safetensors"):
        gb.save_model(gb.mlp([3, 2]), path)
    done = CliRunner().invoke(main, ["train", "digits", "--out", str(path)])
    assert done.exit_code and "name it m.safetensors" in done.output and not path.exists()


def test_an_estimator_that_is_not_fitted_says_so_of_its_weights():
    pytest.importorskip("sklearn")
    from sklearn.exceptions import NotFittedError

    from gpubackprop.sklearn import MLPClassifier

    for name in ("coefs_", "intercepts_"):
        with pytest.raises(NotFittedError, match="MLPClassifier instance is not fitted yet"):
            setattr(MLPClassifier(), name, [1])
        with pytest.raises(AttributeError) as error:
            getattr(MLPClassifier(), name)
        assert "model_" not in str(error.value) and not hasattr(MLPClassifier(), name)
