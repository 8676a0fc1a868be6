"""A fit that is refused leaves a scikit-learn estimator exactly as it was; messages name the user's own labels."""

import copy

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_predict

import gpubackprop as gb
from gpubackprop.sklearn import MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
rng = np.random.default_rng(0)
X = rng.normal(size=(30, 4))
LABELS = np.array(["a", "b", "c"])[np.arange(30) % 3]
NUMBERS = X @ rng.normal(size=4)


def replaced(a, row, value):
    a = a.astype(object if isinstance(value, str) else np.float64)
    a[row] = value
    return a


ANY = {  # arguments in place of a good call's
    "zero weights": {"sample_weight": np.zeros(30)},
    "negative weights": {"sample_weight": np.full(30, -1.0)},
    "one negative weight": {"sample_weight": replaced(np.ones(30), 3, -1)},
    "NaN weights": {"sample_weight": replaced(np.ones(30), 3, np.nan)},
    "infinite weights": {"sample_weight": replaced(np.ones(30), 3, np.inf)},
    "too few weights": {"sample_weight": np.ones(29)},
    "weights in columns": {"sample_weight": np.ones((30, 2))},
    "weights of text": {"sample_weight": ["heavy"] * 30},
    "NaN": {"X": replaced(X, 3, np.nan)},
    "infinity": {"X": replaced(X, 3, np.inf)},
    "X of one dimension": {"X": X[:, 0]},
    "X of text": {"X": [["a"] * 4] * 30},
    "too few rows": {"X": X[:29]},
    "no rows": {"X": X[:0], "y": LABELS[:0]},
    "divergence": {"X": np.where(X > 0, 1.7e308, -1.7e308)},
}
CLASSES = {
    "NaN labels": {"y": replaced(np.arange(30) % 3, 4, np.nan)},
    "real labels": {"y": NUMBERS},
    "two columns of classes": {"y": np.c_[np.arange(30) % 3, np.arange(30) % 4]},
    "other classes, no weights": {
        "y": np.array(["d", "e", "f", "g"])[np.arange(30) % 4],
        "sample_weight": np.zeros(30),
    },
}
NUMERIC = {
    "text": {"y": LABELS},
    "NaN targets": {"y": replaced(NUMBERS, 4, np.nan)},
    "targets that overflow": {"y": NUMBERS * 1e300},
    "three dimensions": {"y": np.zeros((30, 2, 2))},
}
REMADE = {  # a network that is trained further
    "other columns": {"X": X[:, :3]},
}
INCREMENTAL = {
    "a label out of classes": {"y": np.where(np.arange(30) == 5, "z", LABELS)},
    "no such classes": {"classes": ["a", "b"]},
    "classes of two kinds": {"classes": [["a"], 1]},
}
PARAMETERS = [
    {"alpha": -1}, {"activation": "sinus"}, {"solver": "newton"}, {"hidden_layer_sizes": (0,)}, {"batch_size": 0},
    {"device": "tpu"}, {"precision": "float8"}, {"callbacks": 3}, {"random_state": "seven"},
    {"early_stopping": True, "validation_fraction": 0.01}, {"callbacks": (lambda trainer: 1 / 0,)},
    {"solver": "sgd", "learning_rate_init": 1e200}, {"hidden_layer_sizes": (5,), "early_stopping": True, "dropout": 2},
]  # fmt: skip


def good(kind):
    return {"X": X, "y": LABELS if kind is MLPClassifier else NUMBERS}


def fitted(e, by, kind):
    if by == "fit":
        e.fit(**good(kind))
    elif by == "partial_fit":
        for _ in range(2):
            e.partial_fit(**good(kind), **({"classes": ["a", "b", "c"]} if kind is MLPClassifier else {}))
    return e


def everything(value, seen=()):
    """The value as plain data that `==` compares, however deep."""
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, value.tobytes() if value.dtype != object else value.tolist()
    if isinstance(value, gb.Layer):
        return {k: everything(v) for k, v in value.state_dict().items()}, str(value.dtype), value.output_kind
    if isinstance(value, gb.Trainer):
        return {k: everything(v, seen) for k, v in value.__getstate__().items()}
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=False))
    if isinstance(value, dict):
        return {k: everything(v, seen) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [everything(v, seen) for v in value]
    if hasattr(value, "__dict__") and not callable(value) and id(value) not in seen:
        return everything(vars(value), (*seen, id(value)))
    return repr(value)


def assert_unchanged(e, call, name=""):
    """The refused call changes nothing of e: attributes, their identity, the network, or what training comes next."""
    before, same, fresh = everything(vars(e)), dict(vars(e)), not hasattr(e, "model_")
    predicted = None if fresh else everything(e.predict(X))
    error = None
    try:
        with np.errstate(all="ignore"):
            call(e)
    except Exception as caught:
        error = caught
    assert error is not None, f"{name}: not refused"
    assert not isinstance(error, UnboundLocalError | NameError | AssertionError)
    assert everything(vars(e)) == before and vars(e).keys() == same.keys()
    assert all(vars(e)[key] is value for key, value in same.items())
    if fresh:
        with pytest.raises(NotFittedError):
            e.predict(X)
    else:
        assert everything(e.predict(X)) == predicted


def calls(kind):
    return ANY | (CLASSES if kind is MLPClassifier else NUMERIC)


def estimator(kind, **parameters):
    return kind(**{"hidden_layer_sizes": (5,), "max_iter": 4, "random_state": 0} | parameters)


@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
@pytest.mark.parametrize("state", ["fresh", "fit", "partial_fit"])
@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
def test_a_refused_fit_changes_nothing(kind, state, warm_start, solver):
    if (solver, state) == ("lbfgs", "partial_fit"):
        return
    e = fitted(estimator(kind, warm_start=warm_start, solver=solver), state, kind)
    further = REMADE if warm_start and state != "fresh" else {}
    for name, arguments in (calls(kind) | further).items():
        assert_unchanged(e, lambda e, arguments=arguments: e.fit(**good(kind) | arguments), name)


@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
@pytest.mark.parametrize("state", ["fresh", "fit", "partial_fit"])
@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_a_refused_partial_fit_changes_nothing(kind, state, solver):
    e = fitted(estimator(kind, solver=solver, learning_rate="invscaling"), state, kind)
    first = {"classes": ["a", "b", "c"]} if kind is MLPClassifier else {}
    more = (REMADE if state != "fresh" else {}) | (INCREMENTAL if kind is MLPClassifier else {})
    for name, arguments in (calls(kind) | more).items():
        assert_unchanged(e, lambda e, arguments=arguments: e.partial_fit(**good(kind) | first | arguments), name)
    if kind is MLPClassifier and state == "fresh":
        assert_unchanged(e, lambda e: e.partial_fit(**good(kind)))  # without the classes


@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
@pytest.mark.parametrize("state", ["fresh", "fit", "partial_fit"])
def test_unknown_parameters_and_failing_callbacks_change_nothing(kind, state):
    first = {"classes": ["a", "b", "c"]} if kind is MLPClassifier and state == "fresh" else {}
    for parameters in PARAMETERS:
        for warm_start in (False, True):
            e = fitted(estimator(kind, warm_start=warm_start), state, kind).set_params(**parameters)
            assert_unchanged(e, lambda e: e.fit(**good(kind)), parameters)
            if parameters.get("solver") != "newton" and "learning_rate_init" not in parameters:
                assert_unchanged(e, lambda e: e.partial_fit(**good(kind), **first), parameters)


@pytest.mark.parametrize("solver", ["adam", "sgd"])
@pytest.mark.parametrize("shared", [False, True])
def test_training_goes_on_as_if_the_refused_call_had_not_been_made(solver, shared):
    def make():
        state = np.random.RandomState(0) if shared else 0
        e = estimator(MLPClassifier, solver=solver, learning_rate="adaptive", random_state=state, dropout=0.2)
        return fitted(e, "partial_fit", MLPClassifier)

    def fails_in_the_third_epoch(trainer):
        if trainer.epoch > 4:
            raise OSError("the disk is full")

    plain, tried = make(), make()
    for arguments in (ANY["divergence"], ANY["zero weights"], INCREMENTAL["a label out of classes"]):
        with np.errstate(all="ignore"), pytest.raises(ValueError):
            tried.partial_fit(**good(MLPClassifier) | arguments)
    tried.set_params(warm_start=True, callbacks=[fails_in_the_third_epoch], max_iter=9)
    epochs = tried.trainer_.epoch
    with pytest.raises(OSError, match="the disk is full"):
        tried.fit(**good(MLPClassifier))
    assert tried.trainer_.epoch == epochs
    tried.set_params(warm_start=False, callbacks=(), max_iter=4)
    for e in (plain, tried):
        for _ in range(3):
            e.partial_fit(**good(MLPClassifier))
    assert plain.loss_curve_ == tried.loss_curve_
    assert everything(plain.model_) == everything(tried.model_)
    assert plain.trainer_.history == tried.trainer_.history


def test_classes_of_a_refused_first_call_are_forgotten():
    e = estimator(MLPClassifier)
    with pytest.raises(ValueError, match="which are not among"):
        e.partial_fit(X, LABELS, classes=["x", "y"])
    with pytest.raises(NotFittedError):
        e.predict(X)
    assert set(e.partial_fit(X, LABELS, classes=["a", "b", "c"]).predict(X)) <= set("abc")

    e = estimator(MLPClassifier).fit(X, np.where(LABELS == "a", "a", "b"))
    kept = e.predict(X)
    with pytest.raises(ValueError, match="sample_weight is zero"):
        e.fit(X, np.where(LABELS == "a", "c", "d"), sample_weight=np.zeros(30))
    np.testing.assert_array_equal(e.predict(X), kept)


def test_a_partial_fit_may_lack_classes_whatever_warm_start_is():
    e = estimator(MLPClassifier, warm_start=True).partial_fit(X, LABELS, classes=["a", "b", "c"])
    e.partial_fit(X[LABELS != "c"], LABELS[LABELS != "c"])
    assert e.t_ == 50


@pytest.mark.parametrize("attribute", ["coefs_", "intercepts_"])
def test_an_estimator_that_is_not_fitted_says_so_of_its_weights(attribute):
    e = MLPClassifier()
    with pytest.raises(NotFittedError, match="not fitted"):
        getattr(e, attribute)
    with pytest.raises(NotFittedError, match="not fitted"):
        setattr(e, attribute, [1])
    assert not hasattr(e, attribute) and copy.deepcopy(e).get_params()["alpha"] == e.alpha


# ---- one class -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 30])
@pytest.mark.parametrize("label", [1, "only"])
def test_a_single_class_has_one_column(rows, label):
    x, y = X[:rows], np.full(rows, label)
    e = estimator(MLPClassifier).fit(x, y)
    np.testing.assert_array_equal(e.predict_proba(X), np.ones((30, 1)))
    np.testing.assert_array_equal(e.predict_log_proba(X), np.zeros((30, 1)))
    assert (e.predict(X) == label).all() and e.score(x, y) == 1
    if rows > 2:
        proba = cross_val_predict(e, x, np.zeros(rows, int), cv=3, method="predict_proba")
        np.testing.assert_array_equal(proba, np.ones((rows, 1)))
    one = estimator(MLPClassifier).partial_fit(x, y, classes=[label])
    assert one.predict_proba(X).shape == (30, 1)
    two = estimator(MLPClassifier).partial_fit(x, y, classes=[label, {1: 2, "only": "other"}[label]])
    assert two.predict_proba(X).shape == (30, 2)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("common, rare", [("a", "b"), ("z", "b"), (7, 40), (40, 7), (True, False)])
def test_messages_name_the_users_own_labels(common, rare):
    x, y = X[:4], np.array([common, common, common, rare])
    with pytest.raises(ValueError, match=rf"\[{rare!r}\]"):
        MLPClassifier(early_stopping=True).fit(x, y)
    with pytest.raises(ValueError, match=rf"\[{rare!r}\]"):
        MLPClassifier(early_stopping=True).fit(x, y.astype(object) if y.dtype.kind == "U" else y)
    with pytest.raises(ValueError, match=f"class {rare} has 1 row"):
        gb.split(x, y, stratify=True)
    with pytest.raises(ValueError, match=f"class {rare} has 1 row"):
        next(gb.KFold(2, stratify=True).split(x, y))
    e = MLPClassifier().partial_fit(x[:3], y[:3], classes=[common])
    with pytest.raises(ValueError, match=rf"\[ ?{rare!r}\], which are not among \[ ?{common!r}\]"):
        e.partial_fit(x, y)
