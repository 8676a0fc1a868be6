"""Models, trainers and estimators are trees of plain data, also for what writes `__getstate__` alone, as skops."""

import copy
import functools
import json
import pickle
import types
from pathlib import Path

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.sklearn import MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
rng = np.random.default_rng(0)
x, y = rng.normal(size=(40, 4)), np.arange(40) % 3


def rebuilt(value, memo):
    """The value written and read as skops does: objects by class and state, then `__new__`, `__setstate__`."""
    if isinstance(value, np.dtype | type | types.FunctionType | types.BuiltinFunctionType | np.ufunc):
        assert "<" not in getattr(value, "__qualname__", ""), f"{value} cannot be found by name"
        return value
    if isinstance(value, np.ndarray | np.generic):
        assert value.dtype.kind in "fiubU"
        return value.copy()
    if value is None or isinstance(value, bool | int | float | str):
        return json.loads(json.dumps(value))
    if id(value) not in memo:
        memo[id(value)] = rebuilt_object(value, memo), value  # the value too, so that no other takes its id
    return memo[id(value)][0]


def rebuilt_object(value, memo):
    if type(value) in (list, tuple):
        return type(value)(rebuilt(item, memo) for item in value)
    if isinstance(value, dict):  # a history too, by its items
        assert all(isinstance(key, str) for key in value) and not getattr(value, "__dict__", None)
        return type(value)({key: rebuilt(item, memo) for key, item in value.items()})
    if type(value) is functools.partial:
        return functools.partial(rebuilt(value.func, memo), *rebuilt(value.args, memo), **rebuilt(value.keywords, memo))
    assert type(value).__reduce__ is object.__reduce__, f"{type(value).__name__} is written by its __reduce__"
    new = type(value).__new__(type(value))
    memo[id(value)] = new, value
    state = rebuilt(value.__getstate__(), memo)
    assert state is None or isinstance(state, dict)
    if hasattr(new, "__setstate__"):
        new.__setstate__(state)
    elif state is not None:
        vars(new).update(state)
    return new


COPIES = {
    "state": lambda value: rebuilt(value, {}),
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda value, n=n: pickle.loads(pickle.dumps(value, n)) for n in range(6)},
}


class Tied(gb.Layer):
    def __init__(self, columns, units):
        self.w = gb.Parameter((columns, units))
        self.scale = gb.Parameter((columns,), np.linspace(1, 2, columns))

    def forward(self, x):
        return gb.tanh(x @ self.w) @ gb.transpose(self.w) * self.scale


def network(max_norm=2.0):
    shared = gb.Dense(5, 5, "tanh")
    return gb.Sequential(
        gb.Scaler(4).fit(x), gb.Dense(4, 5, mask=rng.random((4, 5)) < 0.8), gb.Activation("leaky_relu"),
        gb.BatchNorm(5), shared, shared, gb.Residual(gb.Dense(5, 5, max_norm=max_norm)),
        gb.Concatenate(gb.Dense(5, 3), gb.Sequential()), gb.LayerNorm(8), Tied(8, 3), gb.Dense(8, 3),
    )  # fmt: skip


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("drawn", [False, True])
def test_a_model_comes_back(how, drawn):
    model = network()
    model.layers[3].gain.requires_grad = False
    if drawn:
        model.initialize(3)
    again = COPIES[how](model)
    assert again is not model and list(again.named_parameters()) == list(model.named_parameters())
    for p, q in zip(model.named_parameters().values(), again.named_parameters().values(), strict=True):
        assert (p.shape, p.trainable, p.requires_grad, p.settled) == (q.shape, q.trainable, q.requires_grad, q.settled)
    assert again.layers[4] is again.layers[5] and str(again) == str(model)
    np.testing.assert_array_equal(again.predict(x), model.predict(x))
    np.testing.assert_array_equal(again.initialize(7).predict(x), model.initialize(7).predict(x))


@pytest.mark.parametrize("how", COPIES)
def test_a_parameter_comes_back(how):
    for p in (gb.Parameter((3,)), gb.Parameter((2, 3), 0.5, trainable=False), network().initialize(0).layers[1].weight):
        q = COPIES[how](p)
        assert (type(q), q.shape, q.trainable, q.home) == (gb.Parameter, p.shape, p.trainable, None)
        assert (p.host_value() is None) == (q.host_value() is None)
        if p.host_value() is not None:
            np.testing.assert_array_equal(p.host_value(), q.host_value())


TRAINERS = [
    {}, {"optimizer": gb.SGD(0.1, momentum=0.9), "l1": 1e-3, "l2": 1e-2, "label_smoothing": 0.1, "clip_norm": 1.0},
    {"optimizer": gb.Adam(groups={"*bias": {"lr": 1e-4}}), "accumulate": 2}, {"optimizer": "lbfgs"},
    {"precision": "bfloat16", "metrics": ["accuracy"]},
]  # fmt: skip


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", TRAINERS, ids=lambda o: ",".join(o) or "plain")
def test_a_trainer_goes_on(how, options):
    trainer = gb.Trainer(network(None if "lbfgs" in options.values() else 2.0), seed=0, **options)
    trainer.fit(x, y, epochs=2, batch_size=16, progress=False)
    again = COPIES[how](trainer)
    for t in (trainer, again):
        t.fit(x, y, epochs=2, batch_size=16, progress=False)
    assert trainer.history == again.history
    np.testing.assert_array_equal(trainer.predict(x), again.predict(x))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [
    lambda: MLPClassifier((5,), max_iter=3, random_state=0, early_stopping=True),
    lambda: MLPClassifier((5,), max_iter=3, random_state=0, solver="sgd", dropout=0.1, learning_rate="adaptive"),
    lambda: MLPRegressor(hidden_layer_sizes=(5,), max_iter=3, random_state=0, solver="lbfgs"),
    lambda: MLPClassifier(),
])  # fmt: skip
def test_an_estimator_comes_back(how, make):
    e = make()
    again = COPIES[how](e)
    assert again.get_params() == e.get_params()
    again = COPIES[how](e.fit(x, y))
    np.testing.assert_array_equal(again.predict(x), e.predict(x))
    if e.solver != "lbfgs" and not e.early_stopping:
        for each in (e, again):
            each.partial_fit(x, y)
        np.testing.assert_allclose(again.predict_proba(x), e.predict_proba(x), rtol=1e-12)


def test_a_pickle_of_before_is_read():
    """It was written by a `Parameter.__reduce__` that is no more."""
    kept = pickle.loads((Path(__file__).parent.parent / "data" / "model.pickle").read_bytes())
    model = kept["model"]
    np.testing.assert_allclose(model.predict(kept["x"]), kept["y"], rtol=1e-12)
    assert model.layers[2] is model.layers[3] and not model.layers[5].weight.requires_grad
    assert model.layers[1].mask.numpy().sum() == 3
    trainer = gb.Trainer(model, "mse", seed=0)
    trainer.fit(kept["x"], kept["y"], epochs=1, progress=False)
    assert trainer.history["loss"][0] > 0


# ---- parameters without an initializer -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (1, 9), (2, 4, 6)])
@pytest.mark.parametrize("trainable", [True, False])
def test_matrices_are_drawn_and_vectors_are_zero(shape, trainable):
    class One(gb.Layer):
        def __init__(self, **init):
            self.p = gb.Parameter(shape, trainable=trainable, **init)

        def forward(self, x):
            return x

    given, named = One().initialize(5).p.numpy(), {}
    if trainable and len(shape) > 1:
        named = One(init="glorot_uniform").initialize(5).p.numpy()
        np.testing.assert_array_equal(given, named)
        assert given.all() and np.abs(given).max() <= np.sqrt(6 / (shape[-2] + shape[-1]))
    else:
        assert not given.any()
    assert not One(init="zeros").initialize(5).p.numpy().any()
    assert (One(init=3.0).initialize(5).p.numpy() == 3).all()


@pytest.mark.parametrize("device", ["cpu", "cpu:reference", "cuda"])
def test_a_tied_autoencoder_of_ones_own_learns(device, cuda):
    class Autoencoder(gb.Layer):
        def __init__(self, columns, units):
            self.inputs = columns
            self.w, self.into, self.out = (
                gb.Parameter((columns, units)),
                gb.Parameter((units,)),
                gb.Parameter((columns,)),
            )

        def forward(self, x):
            return gb.tanh(x @ self.w + self.into) @ gb.transpose(self.w) + self.out

    data = np.random.default_rng(1).normal(size=(200, 2)) @ np.random.default_rng(2).normal(size=(2, 8)) / 3
    trainer = gb.Trainer(Autoencoder(8, 4), "mse", gb.Adam(0.01), seed=0, device=device)
    first = trainer.evaluate(data, data)["loss"]
    trainer.fit(data, data, epochs=40, batch_size=50, progress=False)
    assert trainer.evaluate(data, data)["loss"] < 0.2 * min(first, data.var())
