"""gpubackprop.sklearn: scikit-learn's checks, its numbers from the same random_state, its tools used unchanged."""

import inspect
import pickle
import re
import signal
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn import datasets, neural_network
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.model_selection import cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler, scale
from sklearn.utils.estimator_checks import parametrize_with_checks

import gpubackprop as gb
from gpubackprop.sklearn import MLPClassifier, MLPRegressor

PEERS = {MLPClassifier: neural_network.MLPClassifier, MLPRegressor: neural_network.MLPRegressor}
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

iris_x, iris_y = datasets.load_iris(return_X_y=True)
iris_x = scale(iris_x)
two_x, two_y = iris_x[iris_y > 0], iris_y[iris_y > 0]  # two classes that overlap
many_x, many_y = datasets.make_multilabel_classification(80, n_features=6, n_classes=3, random_state=0)
rng = np.random.RandomState(0)
line_x = rng.randn(90, 5)
line_y = line_x @ rng.randn(5, 3) + 0.3 * rng.randn(90, 3)
counts = rng.poisson(np.exp(0.5 * line_y)).astype(float)


# ---- scikit-learn's own checks -------------------------------------------------------------------------------------


@parametrize_with_checks(
    [MLPClassifier(max_iter=25, learning_rate_init=0.03), MLPRegressor(max_iter=25, learning_rate_init=0.03)]
)
def test_scikit_learn_checks_pass(estimator, check):
    check(estimator)


def test_the_parameters_are_those_of_scikit_learn_and_ours():
    for ours, theirs in PEERS.items():
        more = {"device": "auto", "precision": None, "dropout": 0.0, "callbacks": ()}
        assert ours().get_params() == theirs().get_params() | more
        first, second = (list(inspect.signature(kind).parameters)[:3] for kind in (ours, theirs))
        assert first == second  # which go by place


# ---- the same numbers ----------------------------------------------------------------------------------------------

SGD = {"solver": "sgd", "learning_rate_init": 0.1}
CASES = {
    "three classes": (MLPClassifier, iris_x, iris_y, {}),
    "two classes": (MLPClassifier, two_x, two_y, {}),
    "one class": (MLPClassifier, two_x[:50], two_y[:50], {}),
    "labels": (MLPClassifier, many_x, many_y, {}),
    "one output": (MLPRegressor, line_x, line_y[:, 0], {}),
    "three outputs": (MLPRegressor, line_x, line_y, {"alpha": 0.1}),
    "poisson": (MLPRegressor, line_x, counts[:, 0], {"loss": "poisson"}),
    "poisson, three outputs": (MLPRegressor, line_x, counts, {"loss": "poisson"}),
    "float32": (MLPClassifier, iris_x.astype("f"), iris_y, {"max_iter": 5}),
    "logistic, two layers": (MLPClassifier, iris_x, iris_y, {"activation": "logistic", "hidden_layer_sizes": (7, 5)}),
    "tanh, one layer": (MLPClassifier, iris_x, iris_y, {"activation": "tanh", "hidden_layer_sizes": 9}),
    "identity": (MLPRegressor, line_x, line_y, {"activation": "identity"}),
    "no hidden layer": (MLPClassifier, iris_x, iris_y, {"hidden_layer_sizes": ()}),
    "in order": (MLPClassifier, iris_x[::7], iris_y[::7], {"shuffle": False}),
    "alpha 0": (MLPClassifier, iris_x, iris_y, {"alpha": 0, "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-4}),
    "sgd": (MLPClassifier, iris_x, iris_y, SGD),
    "sgd, momentum": (MLPClassifier, iris_x, iris_y, SGD | {"nesterovs_momentum": False}),
    "sgd alone": (MLPClassifier, iris_x, iris_y, SGD | {"momentum": 0}),
    "sgd, invscaling": (MLPClassifier, iris_x, iris_y, SGD | {"learning_rate": "invscaling", "power_t": 0.3}),
    "sgd, adaptive": (
        MLPClassifier, iris_x, iris_y,
        SGD | {"learning_rate": "adaptive", "tol": 1e-2, "n_iter_no_change": 1, "max_iter": 60},
    ),
    "adaptive to its end": (
        MLPRegressor, line_x, line_y[:, 0],
        SGD | {"learning_rate": "adaptive", "learning_rate_init": 4e-6, "tol": 0.5, "n_iter_no_change": 1},
    ),
    "stops by tol": (MLPClassifier, iris_x, iris_y, {"tol": 0.02, "n_iter_no_change": 3, "max_iter": 200}),
    "early stopping": (MLPClassifier, two_x, two_y, {"early_stopping": True, "n_iter_no_change": 4}),
    "early stopping, three classes": (MLPClassifier, iris_x, iris_y, {"early_stopping": True, "max_iter": 12}),
    "early stopping, labels": (MLPClassifier, many_x, many_y, {"early_stopping": True, "validation_fraction": 0.3}),
    "early stopping, sgd": (MLPRegressor, line_x, line_y, SGD | {"early_stopping": True, "learning_rate_init": 0.01}),
    "lbfgs": (MLPClassifier, iris_x, iris_y, {"solver": "lbfgs"}),
    "lbfgs, numbers": (MLPRegressor, line_x, line_y[:, 1], {"solver": "lbfgs"}),
    "lbfgs, max_fun": (MLPRegressor, line_x, line_y[:, 0], {"solver": "lbfgs", "max_fun": 7}),
}  # fmt: skip
FIGURES = ["loss_", "best_loss_", "loss_curve_", "validation_scores_", "best_validation_score_", "n_iter_", "t_",
           "n_layers_", "n_outputs_", "out_activation_", "n_features_in_", "classes_"]  # fmt: skip


def pair(kind, **parameters):
    given = {"hidden_layer_sizes": (8,), "max_iter": 15, "batch_size": 32, "random_state": 0} | parameters
    return kind(device="cpu", **given), PEERS[kind](**given)


def assert_equal_fits(ours, theirs, x, atol=1e-12):
    for key in FIGURES:
        a, b = (getattr(e, key, "none") for e in (ours, theirs))
        if a is None or isinstance(a, str):
            assert a == b, key
        else:
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=key)
    for key in ("coefs_", "intercepts_"):
        for a, b in zip(getattr(ours, key), getattr(theirs, key), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=key)
    for key in ("predict", "predict_proba", "predict_log_proba"):
        if hasattr(theirs, key):
            a, b = (getattr(e, key)(x) for e in (ours, theirs))
            if key != "predict" and len(theirs.classes_) == 1:
                b = np.full_like(b[:, :1], key == "predict_proba")  # theirs has a second column
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=100 * atol, atol=100 * atol, err_msg=key)


@pytest.mark.filterwarnings("ignore:Got `batch_size`", "ignore:fit. batch_size")
@pytest.mark.parametrize("case", CASES)
def test_fits_equal_scikit_learns(case):
    kind, x, y, parameters = CASES[case]
    ours, theirs = (e.fit(x, y) for e in pair(kind, **parameters))
    assert_equal_fits(ours, theirs, x, 1e-6 if x.dtype == np.float32 else 1e-8 if "lbfgs" in case else 1e-12)
    assert theirs.n_iter_ > 1


@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_partial_fit_equals_scikit_learns(solver):
    """The moments go on, the order of the rows begins anew; alpha is that of each call."""
    ours, theirs = pair(MLPClassifier, solver=solver, learning_rate="invscaling")
    for e in (ours, theirs):
        for rows in (slice(0, 150, 2), slice(1, 150, 3), slice(0, 40)):
            e.partial_fit(iris_x[rows], iris_y[rows], classes=[0, 1, 2])
            e.set_params(alpha=0.5)
    assert_equal_fits(ours, theirs, iris_x)
    assert len(ours.loss_curve_) == 3


def test_a_warm_start_equals_scikit_learns():
    ours, theirs = pair(MLPClassifier, warm_start=True)
    for e in (ours, theirs):
        e.fit(iris_x, iris_y)
        e.set_params(learning_rate_init=0.01).fit(iris_x[::2], iris_y[::2])
    assert_equal_fits(ours, theirs, iris_x)


def test_a_warm_start_that_gets_no_better_changes_nothing():
    """Early stopping keeps the best network of all fits; scikit-learn trains on over its copy of it."""
    model = MLPClassifier(
        (8,), max_iter=20, warm_start=True, early_stopping=True, random_state=0, learning_rate_init=0.1
    )
    model.fit(two_x, two_y)
    best, weights = model.best_validation_score_, model.coefs_
    model.set_params(learning_rate_init=50.0, solver="sgd").fit(two_x, two_y)
    assert model.best_validation_score_ == best
    for a, b in zip(model.coefs_, weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_lbfgs_minimises_one_function_for_several_outputs():
    """scikit-learn gives its search the gradient of the outputs' sum and the loss of their mean."""
    ours, theirs = (e.fit(line_x, line_y) for e in pair(MLPRegressor, solver="lbfgs", max_iter=80, activation="tanh"))
    assert ours.loss_ <= theirs.loss_ * 1.02


WEIGHTED = {
    "three classes": (MLPClassifier, iris_x, iris_y, {}),
    "early stopping": (MLPClassifier, two_x, two_y, {"early_stopping": True}),
    "labels": (MLPClassifier, many_x, many_y, {}),
    "numbers": (MLPRegressor, line_x, line_y[:, 0], {"early_stopping": True, "solver": "sgd"}),
    "poisson": (MLPRegressor, line_x, counts, {"loss": "poisson"}),
    "three outputs": (MLPRegressor, line_x, line_y, {"alpha": 0}),
    "lbfgs": (MLPClassifier, iris_x, iris_y, {"solver": "lbfgs"}),
}


@pytest.mark.parametrize("case", WEIGHTED)
def test_weighted_fits_equal_scikit_learns(case):
    kind, x, y, parameters = WEIGHTED[case]
    weight = np.random.RandomState(1).rand(len(x)) + 0.5
    ours, theirs = (e.fit(x, y, sample_weight=weight) for e in pair(kind, batch_size="auto", **parameters))
    assert_equal_fits(ours, theirs, x, 1e-8 if case == "lbfgs" else 1e-12)


def test_weights_of_batches_are_scikit_learns():
    """Weights and predictions; what is reported is the weighted mean over all rows, there one of batches' means."""
    weight = np.random.RandomState(1).rand(150) + 0.5
    ours, theirs = (e.fit(iris_x, iris_y, sample_weight=weight) for e in pair(MLPClassifier))
    for a, b in zip(ours.coefs_, theirs.coefs_, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    assert ours.loss_ == pytest.approx(theirs.loss_, rel=0.05)


# ---- its tools -----------------------------------------------------------------------------------------------------


def test_in_a_pipeline_with_columns_of_several_kinds():
    """A frame in, its column names checked; what the encoder gives is sparse."""
    frame = pd.DataFrame(iris_x, columns=list("abcd")).assign(kind=np.where(iris_y == 2, "x", "y"))
    names = np.array(["setosa", "versicolor", "virginica"])[iris_y]
    columns = make_column_transformer((StandardScaler(), list("abcd")), (OneHotEncoder(), ["kind"]), sparse_threshold=1)
    model = make_pipeline(columns, MLPClassifier((16,), max_iter=30, learning_rate_init=0.05, random_state=0))
    assert sparse.issparse(columns.fit_transform(frame))
    assert model.fit(frame, names).score(frame, names) > 0.95
    assert set(model.predict(frame)) == set(names)
    alone = MLPClassifier(max_iter=2).fit(frame[list("abcd")], names)
    assert alone.feature_names_in_.tolist() == list("abcd")
    with pytest.raises(ValueError, match="feature names should match"):
        alone.predict(frame[list("dcba")])


def test_cross_validation_in_two_processes():
    model = MLPClassifier((8,), max_iter=25, learning_rate_init=0.05, random_state=0, device="cpu")
    here = cross_val_score(model, iris_x, iris_y, cv=3)
    there = cross_val_score(model, iris_x, iris_y, cv=3, n_jobs=2)
    np.testing.assert_array_equal(here, there)
    assert here.mean() > 0.9
    proba = cross_val_predict(model, iris_x, iris_y, cv=3, method="predict_proba")
    np.testing.assert_allclose(proba.sum(1), 1, rtol=0, atol=1e-15)


@pytest.mark.parametrize("parameters", [{}, {"solver": "lbfgs"}, {"dropout": 0.3}, {"early_stopping": True}])
def test_pickles_and_copies_predict_and_go_on(parameters):
    model = MLPClassifier((8,), max_iter=4, random_state=0, device="cpu", **parameters).fit(iris_x, iris_y)
    twin = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(twin.predict_proba(iris_x), model.predict_proba(iris_x))
    if not parameters:
        for e in (model, twin):
            e.partial_fit(iris_x, iris_y)
        np.testing.assert_array_equal(twin.predict_proba(iris_x), model.predict_proba(iris_x))
    fresh = clone(model)
    assert fresh.get_params() == model.get_params() and not hasattr(fresh, "coefs_")


# ---- what is ours --------------------------------------------------------------------------------------------------


def test_weights_are_read_and_assigned():
    model = MLPClassifier((8,), max_iter=3, random_state=0).fit(iris_x, iris_y)
    weights = model.coefs_
    with pytest.raises(ValueError, match="read-only"):
        weights[0][0, 0] = 1
    model.coefs_ = [np.zeros_like(w) for w in weights]
    np.testing.assert_allclose(model.predict_proba(iris_x), model.predict_proba(iris_x[:1]).repeat(150, 0))
    model.intercepts_ = [np.zeros(8), [0, 1, 0]]
    assert (model.predict(iris_x) == 1).all()
    with pytest.raises(ValueError, match=r"^coefs_: got 1 arrays, expected 2, one for each layer$"):
        model.coefs_ = weights[:1]
    with pytest.raises(ValueError, match="has shape"):
        model.coefs_ = weights[::-1]


def test_the_network_goes_on_in_the_library(tmp_path):
    model = MLPClassifier((8,), max_iter=3, random_state=0).fit(iris_x, iris_y)
    gb.save_model(model.model_, tmp_path / "iris.safetensors")
    loaded = gb.load_model(tmp_path / "iris.safetensors")
    np.testing.assert_allclose(loaded.predict_proba(iris_x), model.predict_proba(iris_x), rtol=0, atol=1e-15)
    assert model.trainer_.epoch == 3


def test_dropout_draws_by_the_random_state():
    fits = [MLPClassifier((8,), max_iter=3, dropout=0.5, random_state=s).fit(iris_x, iris_y) for s in (0, 0, 1)]
    a, b, c = (e.loss_curve_ for e in fits)
    assert a == b != c
    plain = MLPClassifier((8,), max_iter=3, random_state=0).fit(iris_x, iris_y)
    assert plain.loss_curve_ != a
    for e in (fits[0], plain):
        np.testing.assert_array_equal(e.predict(iris_x), e.predict(iris_x))


def test_callbacks_see_the_trainer_and_stop_it():
    seen = []
    model = MLPClassifier(
        (8,), max_iter=9, callbacks=[lambda trainer: seen.append(trainer.epoch) or trainer.epoch == 4]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no word of iterations reached
        model.fit(iris_x, iris_y)
    assert seen == [1, 2, 3, 4] and model.n_iter_ == 4


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_precision_is_the_types_of_weights_and_outputs(solver):
    for precision, dtype in ((None, "float64"), ("float32", "float32"), ("float64", "float64")):
        model = MLPRegressor("squared_error", (8,), solver=solver, max_iter=3, precision=precision).fit(line_x, line_y)
        assert model.coefs_[0].dtype == dtype and model.predict(line_x).dtype == "float64"
    narrow = line_x.astype("f")
    assert MLPRegressor(max_iter=3).fit(narrow, line_y).predict(narrow).dtype == "float32"


def test_verbose_prints_scikit_learns_lines(capsys):
    printed = []
    for e in pair(MLPClassifier, max_iter=40, verbose=True, early_stopping=True, n_iter_no_change=2, tol=0.1):
        e.fit(iris_x, iris_y)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


# ---- on a device ---------------------------------------------------------------------------------------------------


def on(backend, array):
    return backend.asarray(np.ascontiguousarray(array))


@pytest.mark.parametrize("parameters", [{}, {"early_stopping": True}])
def test_device_arrays_in_and_out(cuda, parameters):
    given = {"hidden_layer_sizes": (8,), "max_iter": 2, "batch_size": 64, "random_state": 0} | parameters
    x, y = iris_x.astype("f"), 2 * iris_y + 1
    here, there = MLPClassifier(device="cpu", **given).fit(x, y), MLPClassifier(device="cuda", **given)
    dx = on(cuda, x)
    there.fit(dx, on(cuda, y))
    assert there.loss_curve_ == pytest.approx(here.loss_curve_, rel=1e-5) and there.n_features_in_ == 4
    for method in ("predict", "predict_proba", "predict_log_proba"):
        out = getattr(there, method)(dx)
        assert type(out) is type(dx)
        np.testing.assert_allclose(cuda.to_numpy(out), getattr(here, method)(x), rtol=1e-4)
        assert isinstance(getattr(there, method)(x), np.ndarray)
    assert there.score(dx, on(cuda, y)) == here.score(x, y)
    with pytest.raises(ValueError, match="predict: x has 3 columns but the model expects 4"):
        there.predict(on(cuda, x[:, :3]))
    with pytest.raises(ValueError, match="fit: X has a NaN at row 0, column 0"):
        there.fit(on(cuda, np.where(x == x[0, 0], np.nan, x)), on(cuda, y))
    with pytest.raises(TypeError, match="lies on a CUDA device but the model on the CPU"):
        MLPClassifier(device="cpu").fit(dx, on(cuda, y))


def test_numbers_on_a_device(cuda):
    x, y = line_x.astype("f"), line_y.astype("f")
    model = MLPRegressor(hidden_layer_sizes=(8,), max_iter=2, device="cuda", random_state=0)
    out = model.fit(on(cuda, x), on(cuda, y)).predict(on(cuda, x))
    plain = MLPRegressor(hidden_layer_sizes=(8,), max_iter=2, device="cpu", random_state=0).fit(x, y)
    np.testing.assert_allclose(cuda.to_numpy(out), plain.predict(x), rtol=1e-4, atol=1e-5)
    model.partial_fit(x, y)  # of the host, to the same device


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, error, message",
    [
        ({"hidden_layer_sizes": (8, 0)}, ValueError, "MLPClassifier: hidden_layer_sizes must be at least 1, got 0"),
        ({"hidden_layer_sizes": 2.5}, TypeError, "MLPClassifier: hidden_layer_sizes must be an integer, got float 2.5"),
        ({"activation": "gelu"}, ValueError, "MLPClassifier: unknown activation 'gelu'; choose from 'identity', 'log"),
        (
            {"solver": "rmsprop"},
            ValueError,
            "MLPClassifier: unknown solver 'rmsprop'; choose from 'lbfgs', 'sgd', 'adam'",
        ),
        ({"alpha": -1}, ValueError, "MLPClassifier: alpha must be >= 0, got -1"),
        ({"batch_size": 0}, ValueError, "MLPClassifier: batch_size must be at least 1, got 0"),
        ({"momentum": 1.5}, ValueError, r"MLPClassifier: momentum must be in \[0, 1\), got 1\.5"),
        ({"max_iter": 1.5}, TypeError, "MLPClassifier: max_iter must be an integer, got float 1.5"),
        ({"n_iter_no_change": 0}, ValueError, "MLPClassifier: n_iter_no_change must be at least 1, got 0"),
        ({"shuffle": "yes"}, TypeError, "MLPClassifier: shuffle must be True or False, got str 'yes'"),
        ({"precision": "float8"}, ValueError, "unknown precision 'float8'; choose from float32, "),
        ({"device": "tpu"}, ValueError, "device"),
        ({"early_stopping": True, "validation_fraction": 0.005}, ValueError, "test_size = 1 should be greater"),
    ],
)
def test_parameters_that_cannot_be_are_errors_in_fit(parameters, error, message):
    with pytest.raises(error, match=message):
        MLPClassifier(**parameters).fit(two_x, two_y)


def test_data_that_does_not_fit_is_an_error():
    fitted = MLPClassifier((4,), max_iter=2).fit(iris_x, iris_y)
    with pytest.raises(ValueError, match="X has 3 features, but MLPClassifier is expecting 4"):
        fitted.predict(iris_x[:, :3])
    with pytest.raises(NotFittedError):
        MLPClassifier().predict(iris_x)
    with pytest.raises(ValueError, match="Unknown label type"):
        MLPClassifier().fit(line_x, line_y[:, 0])
    with pytest.raises(ValueError, match="several columns of classes"):
        MLPClassifier().fit(iris_x, np.c_[iris_y, iris_y])
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        MLPClassifier().partial_fit(iris_x, iris_y)
    with pytest.raises(ValueError, match="differ from those of the first call"):
        fitted.partial_fit(iris_x, iris_y, classes=[0, 1])
    with pytest.raises(ValueError, match=r"partial_fit: y has the classes \[3\], which are not among \[0 1 2\]"):
        fitted.partial_fit(iris_x, iris_y + 1)
    with pytest.raises(
        ValueError, match=r"fit: y has the classes \[1 2\], but .* with warm_start they must be the same"
    ):
        fitted.set_params(warm_start=True).fit(two_x, two_y)
    with pytest.raises(ValueError, match="partial_fit does not support early_stopping=True"):
        MLPClassifier(early_stopping=True).partial_fit(iris_x, iris_y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="'poisson' is of numbers that are not negative"):
        MLPRegressor("poisson").fit(line_x, line_y)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(3,\), expected \(150,\)"):
        fitted.fit(iris_x, iris_y, sample_weight=[1, 2, 3])


def test_lbfgs_has_no_partial_fit():
    model = MLPRegressor(solver="lbfgs")
    assert not hasattr(model, "partial_fit")
    with pytest.raises(AttributeError):
        _ = model.partial_fit


def test_a_batch_beyond_the_data_is_a_warning():
    with pytest.warns(UserWarning, match="fit: batch_size 500 is more than the 150 rows; all of them are used"):
        MLPClassifier((4,), batch_size=500, max_iter=2).fit(iris_x, iris_y)


def test_iterations_reached_are_a_warning():
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(2\) reached and the optimization hasn't"):
        MLPClassifier((4,), max_iter=2).fit(iris_x, iris_y)


def test_a_column_of_targets_is_a_warning():
    with pytest.warns(DataConversionWarning):
        MLPClassifier((4,), max_iter=2).fit(iris_x, iris_y[:, None])


def test_divergence_is_an_error_or_the_best_network_so_far():
    wild = {"solver": "sgd", "learning_rate_init": 1e6, "max_iter": 20, "random_state": 0, "hidden_layer_sizes": (8,)}
    with pytest.raises(ValueError, match=r"^fit: .* try a smaller learning rate or scaled inputs"):
        MLPRegressor(**wild).fit(line_x, line_y)
    model = MLPRegressor(early_stopping=True, **wild)
    with pytest.warns(ConvergenceWarning, match="NaN or infinite"):
        model.fit(line_x, line_y)
    assert np.isfinite(model.predict(line_x)).all()


def test_ctrl_c_keeps_what_was_trained():
    def interrupt(trainer):
        if trainer.epoch == 3:
            signal.raise_signal(signal.SIGINT)

    model = MLPClassifier((4,), max_iter=50, callbacks=[interrupt])
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        model.fit(iris_x, iris_y)
    assert 3 <= model.n_iter_ <= 4 and model.predict(iris_x).shape == (150,)


def test_without_scikit_learn_the_error_names_the_extra():
    code = "import sys; sys.modules['sklearn'] = None; import gpubackprop.sklearn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"ImportError: .*pip install 'gpubackprop\[sklearn\]'", done.stderr)


# ---- what changes between fits -------------------------------------------------------------------------------------


def small(rng, classes=3):
    return rng.normal(size=(60, 4)), rng.integers(0, classes, 60)


def test_a_network_for_classes_is_not_trained_on_labels(rng):
    x, y = small(rng)
    model = MLPClassifier((4,), max_iter=2, random_state=0)
    with pytest.warns(ConvergenceWarning):
        model.fit(x, y)
    with pytest.raises(
        ValueError, match="the rows of y have several labels, but the network was made for one class each"
    ):
        model.partial_fit(x, np.c_[y > 0, y > 1, y > 1].astype(int))


@pytest.mark.parametrize("rate", ["invscaling", "adaptive"])
def test_another_solver_set_between_partial_fits_goes_on_with_the_first(rate, rng):
    x, y = small(rng)
    model = MLPClassifier((4,), random_state=0, n_iter_no_change=1).partial_fit(x, y, classes=[0, 1, 2])
    model.set_params(solver="sgd", learning_rate=rate, tol=1e9)
    for _ in range(4):
        model.partial_fit(x, y)
    assert len(model.loss_curve_) == 5


@pytest.mark.parametrize("change", [{"activation": "tanh"}, {"hidden_layer_sizes": (5,)}, {"dropout": 0.5}], ids=str)
def test_what_makes_the_network_cannot_be_changed_under_it(change, rng):
    x, y = small(rng)
    model = MLPClassifier((4,), random_state=0).partial_fit(x, y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match=f"fit: {next(iter(change))} was .* when the network was made"):
        model.set_params(**change).partial_fit(x, y)


@pytest.mark.parametrize("bad, kind, message", [
    ({"callbacks": None}, TypeError, "callbacks must be a list of functions of the trainer, got NoneType"),
    ({"device": "cuda"}, RuntimeError, "cuda"),
    ({"solver": "lbfgs", "dropout": 0.5}, ValueError, "lbfgs compares the losses of steps, which dropout draws anew"),
])  # fmt: skip
def test_what_cannot_be_leaves_nothing_fitted(bad, kind, message, rng):
    x, y = small(rng)
    model = MLPClassifier((4,), **bad)
    with pytest.raises(kind, match=message):
        model.fit(x, y)
    with pytest.raises(NotFittedError):
        model.predict(x)


def test_weights_of_the_network_are_assigned_whole(rng):
    x, y = small(rng)
    model = MLPClassifier((4,), random_state=0).partial_fit(x, y, classes=[0, 1, 2])
    with pytest.raises(TypeError):
        model.coefs_[0] = np.zeros((4, 4))
    model.coefs_ = [np.zeros_like(w) for w in model.coefs_]
    assert not model.coefs_[0].any() and np.ptp(model.predict_proba(x), axis=0).max() < 1e-15
