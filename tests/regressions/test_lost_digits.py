"""Numbers whose information float32 rounds away are named before anything is trained, or kept in float64."""

import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, r2_score

import gpubackprop as gb
from gpubackprop import runs
from gpubackprop.spread import extremes, lost, spread

COLUMN = "has a standard deviation of .*, but float32 rounds it by up to .*, at row"


# ---- measuring columns ----


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 50, 3000]), columns=st.sampled_from([1, 3, 300]), seed=st.integers(0, 9),
    kind=st.sampled_from(["f", "d", "i", "B", "?", "e"]), offset=st.sampled_from([0, 7, 100]), fortran=st.booleans(),
)  # fmt: skip
def test_means_and_deviations_are_numpys(rows, columns, seed, kind, offset, fortran):
    a = (np.random.default_rng(seed).normal(3, 2, (rows, columns)) + offset).astype(kind)
    a = np.asfortranarray(a) if fortran else a
    wide, found = a.astype(np.float64), spread(a)
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.deviation, wide.std(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(extremes(a), [wide.min(0), wide.max(0)])
    assert ((found.deviation == 0) == (wide.min(0) == wide.max(0))).all()


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-20, 1e20, 1e200, 1e307])
def test_deviations_whose_squares_float64_cannot_hold(scale, rng):
    z = rng.uniform(-1, 1, (1000, 2))
    found = spread(np.column_stack([z * scale, np.full(1000, scale), rng.random(1000)]))
    np.testing.assert_allclose(found.deviation[:2] / scale, z.std(0), rtol=1e-12)
    assert found.deviation[2] == 0 and 0.2 < found.deviation[3] < 0.4


@settings(max_examples=60, deadline=None)
@given(offset=st.floats(1, 1e12), seed=st.integers(0, 9), log_scale=st.floats(-20, 20))
def test_a_column_is_lost_where_rounding_reaches_a_hundredth_of_its_deviation(offset, seed, log_scale):
    column = (offset + np.random.default_rng(seed).normal(size=(300, 1))) * 10**log_scale
    errors = abs(column - column.astype("f"))
    found = lost(np.column_stack([np.ones(300), column]), "float32")
    assert (found is not None) == (errors.max() > 0.01 * spread(column).deviation[0])
    if found is not None:
        assert (found.column, found.row, found.error) == (1, errors.argmax(), errors.max())


@pytest.mark.parametrize("a", [
    np.full((50, 1), 1e8 / 3),
    0.1 * np.arange(3)[:, None] * 0 + [[0.3], [0.1 + 0.2], [0.3]],
    np.arange(50)[:, None] + 1e4,
    1.7e9 + 86400 * np.arange(365)[:, None], (2**24 + np.arange(9)[:, None]).astype("f"), np.arange(9)[:, None] > 3,
    np.append(np.zeros(99999), 1e9)[:, None], 2000 + np.arange(25)[:, None],
    np.zeros((3, 1)), np.full((3, 1), -1e300) * 0,
], ids=range(10))  # fmt: skip
def test_columns_with_nothing_to_lose(a):
    assert lost(a, "float32") is None


# ---- fit ----


def fitted(x, y, loss="mse", dtype="float32"):
    outputs = y.shape[1] if y.ndim == 2 else 1 + (loss == "cross_entropy")
    model = gb.mlp([x.shape[1], outputs], dtype=dtype)
    return gb.Trainer(model, loss, gb.SGD(1e-30), seed=0).fit(x, y, epochs=1, progress=False)


def test_fit_names_the_column_and_row_of_x_that_float32_rounds_away(rng):
    x = rng.normal(size=(400, 3))
    x[:, 1] += 1e8
    row = abs(x[:, 1] - x[:, 1].astype("f")).argmax()
    for loss, y in (("mse", x[:, 0]), ("cross_entropy", (x[:, 0] > 0).astype(int))):
        with pytest.warns(RuntimeWarning, match=f"fit: x column 1 {COLUMN} {row}; .*float64"):
            fitted(x, y, loss)
    fitted(x, x[:, 0], dtype="float64")
    fitted(x.astype("f"), x[:, 0])


@given(offset=st.integers(-(2**62), 2**62), steps=st.lists(st.integers(0, 2**40), min_size=2, max_size=9))
def test_integers_beyond_two_to_the_53_are_measured_exactly(offset, steps):
    x = np.array([[offset + step] for step in steps])
    of, least = spread(x), min(steps)
    assert of.deviation[0] == pytest.approx(np.std([step - least for step in steps]), rel=1e-12)
    assert of.mean[0] == pytest.approx(sum(map(int, x[:, 0])) / len(x), rel=1e-12)
    error = max(abs(int(v) - int(float(v))) for v in x[:, 0])
    loses = error > 0.01 * of.deviation[0] > 0  # a constant has nothing to lose
    assert (lost(x, "float64") is not None) == loses


def test_fit_and_scaler_name_integers_that_no_float_holds():
    c = np.arange(100) % 2
    x = (2**60 + c)[:, None]
    for fit in (gb.Trainer(gb.mlp([1, 2], dtype="float64"), seed=0).fit, lambda x, *_, **__: gb.Scaler(1).fit(x)):
        with pytest.warns(RuntimeWarning, match="x column 0 has a standard deviation of 0.5, but float"):
            fit(x, c, epochs=1)


def test_integers_have_no_noise(rng):
    x = 2**54 + 4 * rng.integers(0, 4, (40, 1))
    assert lost(x, "float32").column == 0 and lost(x.astype(float), "float32") is None


def test_a_range_test_says_what_float32_rounds_once_and_by_its_own_row(rng):
    y = rng.normal(size=(40, 1))
    x = y + 1e9
    with pytest.warns(RuntimeWarning, match="x column 0 .* float32 rounds it") as seen:
        gb.lr_range_test(gb.Trainer(gb.mlp([1, 1]), "mse", seed=0), x, y, batch_size=8)
    with pytest.warns(RuntimeWarning) as fitted:
        gb.Trainer(gb.mlp([1, 1]), "mse", seed=0).fit(x, y, epochs=1)
    assert [str(w.message) for w in seen] == [str(w.message) for w in fitted]


@pytest.mark.parametrize("y", [lambda u: 1e8 + u, lambda u: np.int64(2**40) + (3 * u).astype(int)])
def test_fit_names_the_target_that_float32_rounds_away(y, rng):
    u = rng.normal(size=200)
    with pytest.warns(RuntimeWarning) as found:
        fitted(u[:, None], y(u))
    assert any("fit: y column 0 has a standard deviation of" in str(w.message) for w in found)


@pytest.mark.parametrize("scale, what", [(1e-25, "a standard deviation of 1e-25"), (1e18, "numbers of about 1e")])
@pytest.mark.parametrize("kind", ["f", "d"])
def test_fit_names_targets_whose_squares_float32_cannot_hold(scale, what, kind):
    t = np.where(np.arange(400) % 2, scale, -scale)[:, None]
    x = np.ones((400, 1))
    fitted(x, t.astype(kind), dtype="float64")  # another type, another loss
    fitted(x, np.minimum(abs(t), 1e-25).astype(kind), "poisson")
    with pytest.warns(RuntimeWarning, match=f"fit: y column 0 has {what}.* whose square float32 cannot hold.*float64"):
        fitted(x, t.astype(kind))


def test_fit_names_float64_data_on_a_device(cuda, rng):
    x = cuda.asarray(1e8 + rng.normal(size=(40, 1)))
    with pytest.warns(RuntimeWarning, match=f"fit: x column 0 {COLUMN}"):
        gb.Trainer(gb.mlp([1, 1]), "mse", device="cuda", seed=0).fit(x, cuda.asarray(rng.normal(size=40)), epochs=1)


# ---- the scaler ----


@pytest.mark.parametrize("inverse", [False, True])
def test_a_scaler_says_what_it_cannot_scale_or_scales_it(inverse, rng):
    x = np.column_stack([rng.normal(size=400), 1e8 + rng.normal(size=400)])
    with pytest.warns(RuntimeWarning, match=rf"Scaler.fit: x column 1 {COLUMN} \d+; .*dtype='float64'"):
        gb.Scaler(2, inverse).fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled = gb.Scaler(2, dtype="float64").fit(x).predict(x)
        model = gb.Sequential(gb.Scaler(2), dtype="float64")
        model.predict(x)
        model.layers[0].fit(x)
        np.testing.assert_allclose([scaled.mean(0), scaled.std(0)], [[0, 0], [1, 1]], atol=1e-7)
        np.testing.assert_array_equal(model.predict(x), scaled)


@pytest.mark.parametrize("scale", [1e-300, 1e-46, 1e40, 1e300])
def test_deviations_that_float32_makes_zero_or_infinite(scale, rng):
    x = rng.normal(size=(50, 1))
    with pytest.raises(ValueError, match=r"Scaler.fit: x column 0 has a standard deviation of .*float32 cannot hold"):
        gb.Scaler(1).fit(x * scale)
    scaled = gb.Scaler(1, dtype="float64").fit(x * scale).predict(x * scale)
    np.testing.assert_allclose(scaled, (x - x.mean()) / x.std(), atol=1e-9)


def test_a_constant_that_float32_cannot_hold():
    with pytest.raises(ValueError, match=r"Scaler.fit: x column 0 has 1e\+40 at row 0, too large for float32"):
        gb.Scaler(1).fit(np.full((3, 1), 1e40))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["f", "d", "B"])
def test_a_scaler_is_fitted_to_a_file_without_reading_it_into_memory(kind, order, tmp_path, rng):
    x = np.memmap(tmp_path / "x", kind, "w+", shape=(100_000, 50), order=order)
    x[:] = rng.integers(0, 100, (1000, 50)).repeat(100, 0)
    tracemalloc.start()
    scaler = gb.Scaler(50).fit(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3e6 + 0.02 * x.nbytes
    np.testing.assert_allclose(scaler.state_dict()["scale"], x.astype("d").std(0), rtol=1e-6)


# ---- the command line's runs ----


def trained(table, **keywords):
    run = runs.Run("t.csv", table, runs.Recipe(hidden=(16,), epochs=15, lr=0.02, **keywords))
    run.fit(False)
    return run, run.figures()["train"]


def table_of(x, y, classes=None):
    task = "regression" if classes is None else "classification"
    return runs.Table(x, y if classes else y[:, None], task=task, columns=["t"], target="y", classes=classes)


@pytest.mark.parametrize("y", [
    lambda t: 1e8 + t, lambda t: 3e7 + t, lambda t: 1e7 + t, lambda t: 1e25 * t, lambda t: 1e-25 * t,
    lambda t: 1e-100 * t,
], ids=range(6))  # fmt: skip
def test_a_run_prints_the_figures_of_the_model_that_it_saves(y, rng):
    t = rng.normal(size=300)
    run, figures = trained(table_of(t[:, None], y(t)))
    assert figures["r2"] == pytest.approx(r2_score(run.y, run.model.predict(run.x)), rel=1e-6)
    assert figures["r2"] > 0.9


@pytest.mark.parametrize("x", [lambda t: 1.7e9 + 10 * t, lambda t: 1e8 + t, lambda t: 1e40 * t,
                               lambda t: 1e-100 * t], ids=range(4))  # fmt: skip
def test_what_was_trained_is_what_is_served(x, rng):
    t = rng.normal(size=300)
    run, figures = trained(table_of(x(t)[:, None], (t > 0).astype(int), ["n", "p"]), dropout=0.0)
    assert figures["accuracy"] == accuracy_score(run.y, run.model.predict_classes(run.x)) > 0.95
    assert figures["accuracy"] == pytest.approx(run.trainer.history["accuracy"][-1], abs=0.03)
    (line,) = [text for label, text in run.lines() if label == "float64"]
    assert line.startswith("because column 't' has")
    assert run.model.arena.dtype == run.report()["dtype"] == "float64"


def test_a_run_stays_in_float32_where_that_will_do_or_is_asked_for(rng):
    t = rng.normal(size=100)
    run = runs.Run("t.csv", table_of(t[:, None], t), runs.Recipe())
    assert run.dtype == "float32" and not run.why_wider
    for keywords in ({"dtype": "float32"}, {"precision": "float32"}):
        with pytest.warns(RuntimeWarning, match=f"Scaler.fit: x column 0 {COLUMN}"):
            assert runs.Run("t.csv", table_of(1e8 + t[:, None], t), runs.Recipe(**keywords)).dtype == "float32"
