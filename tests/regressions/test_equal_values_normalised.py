"""Normalisation: equal values give 0 whatever they are, no finite value overflows, and rounding does not add up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpubackprop as gb

EPS = 1e-5
DTYPES = {"float32": np.float32, "float64": np.float64}


@pytest.fixture(params=["cpu", "cpu:reference", "cuda"])
def back(request):
    return request.getfixturevalue("cuda") if request.param == "cuda" else gb.get_backend(request.param)


def normalised(back, x, axis, eps=EPS):
    """out, mean, variance, rstd with a gain of 2 and a bias of 3; then dx, dgain, dbias for some dy."""
    lines, columns = x.shape[1 - axis], x.shape[1]

    def put(a):
        return back.asarray(np.ascontiguousarray(a, x.dtype))

    x_, gain, bias = put(x), put(np.full(columns, 2.0)), put(np.full(columns, 3.0))
    out, dx = back.empty(x.shape, x.dtype), back.empty(x.shape, x.dtype)
    mean, variance, rstd = (back.empty((lines,), x.dtype) for _ in range(3))
    dgain, dbias = (back.empty((columns,), x.dtype) for _ in range(2))
    back.normalize(x_, gain, bias, axis, eps, out, mean, variance, rstd).run()
    dy = put(1 + np.arange(x.size).reshape(x.shape) % 7)
    back.normalize_backward(dy, x_, gain, mean, rstd, axis, dx, dgain, dbias, (False,) * 3).run()
    return [back.to_numpy(a) for a in (out, mean, variance, rstd, dx, dgain, dbias)]


def assert_zeros(back, value, count, axis, dtype):
    x = np.full((count, 3) if axis == 0 else (3, count), value, dtype)
    out, mean, variance, _, dx, dgain, _ = normalised(back, x, axis)
    np.testing.assert_array_equal(out, 3)
    np.testing.assert_array_equal(mean, x.flat[0])
    np.testing.assert_array_equal(variance, 0)
    np.testing.assert_array_equal(dgain, 0)
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 7, 100, 1025, 9000])
def test_equal_values_give_zero(back, axis, dtype, count):
    largest = float(np.finfo(dtype).max)
    for value in (123456.7, -30000.0, 0.1, 3333333.3, 1e-30, 1e30, largest, -largest, 0.0):
        assert_zeros(back, value, count, axis, dtype)


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(2, 300), st.sampled_from([0, 1]),
    st.sampled_from(["cpu", "cpu:reference"]), st.sampled_from([*DTYPES]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_any_equal_values_give_zero(value, count, axis, device, dtype):
    assert_zeros(gb.get_backend(device), value, count, axis, dtype)


def oracle(x, axis):
    x = x.astype(np.longdouble)
    centred = x - x.mean(axis, keepdims=True)
    variance = (centred**2).mean(axis, keepdims=True)
    return centred / np.sqrt(variance + EPS), x.mean(axis), variance.squeeze(axis)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1.0, 1e-8, 1e-20, 1e-30])
def test_no_finite_values_overflow(back, axis, dtype, share, rng):
    """Up to the largest number of either sign; a variance beyond it is the largest number."""
    largest = float(np.finfo(dtype).max)
    x = (rng.uniform(-1, 1, (40, 30)) * largest * share).astype(dtype)
    x[0, :] = np.where(np.arange(30) % 2, 1, -1) * largest * share
    out, mean, variance, _, dx, dgain, _ = normalised(back, x, axis)
    wanted, centre, spread = oracle(x, axis)
    np.testing.assert_allclose(out, 2 * wanted + 3, atol=2e-5 if dtype == "float32" else 1e-13)
    np.testing.assert_allclose(mean, centre.astype(dtype), atol=float(np.abs(x).max()) * 1e-6)
    np.testing.assert_allclose(variance, np.minimum(spread, largest).astype(dtype), rtol=1e-5)
    assert np.isfinite(dx).all() and np.isfinite(dgain).all()


def test_one_line_that_overflows_leaves_the_bits_of_the_others(back, rng):
    for axis, line in ((1, np.s_[4]), (0, np.s_[:, 4])):
        x = rng.normal(size=(300, 40)).astype("f")
        huge = x.copy()
        huge[line] *= 1e30
        for a, b, shape in zip(normalised(back, x, axis), normalised(back, huge, axis), [2, 1, 1, 1, 2], strict=False):
            others = np.arange(a.shape[0 if axis or shape == 1 else 1]) != 4
            at = np.s_[:, others] if shape == 2 and axis == 0 else np.s_[others]
            np.testing.assert_array_equal(a[at], b[at])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("offset, bound", [(0.0, 2e-6), (1e4, 6e-4), (1e6, 4e-2)])
def test_the_mean_is_rounded_once(back, axis, offset, bound, rng):
    """An offset costs half a unit in the last place of the mean, and the variance nothing."""
    x = (offset + rng.normal(size=(700, 600))).astype("f")
    out, mean, variance, *_ = normalised(back, x, axis)
    wanted, centre, spread = oracle(x, axis)
    np.testing.assert_allclose((out - 3) / 2, wanted, atol=bound)
    np.testing.assert_allclose(mean, centre.astype(float), rtol=7e-8, atol=2e-7)
    np.testing.assert_allclose(variance, spread.astype(float), rtol=2e-5)


def test_a_first_element_far_from_the_others_costs_nothing(back, rng):
    for axis, shape in ((1, (3, 3000)), (0, (3000, 3))):
        x = rng.normal(size=shape).astype("f")
        x[np.s_[:, 0] if axis else 0] = 1e6
        out, *_ = normalised(back, x, axis)
        np.testing.assert_allclose((out - 3) / 2, oracle(x, axis)[0], atol=1e-4)


def test_the_public_functions_and_layers_give_zero(back):
    x = gb.tensor(np.full((4, 3), 123456.7, "f"), requires_grad=True, device=back.device)
    one, zero = (gb.tensor(np.full(3, v, "f"), device=back.device) for v in (1, 0))
    for y in (gb.layer_norm(x, one, zero), gb.batch_norm(x, one, zero)[0]):
        np.testing.assert_array_equal(y.numpy(), 0)
    layers = gb.Sequential(gb.LayerNorm(3)).initialize(0)
    np.testing.assert_array_equal(layers.predict(np.full((4, 3), 30000.1, "f")), 0)


@pytest.mark.parametrize("axis", [0, 1])
def test_half_precision_has_statistics_in_float32(back, axis):
    x = np.full((7, 5), 12345.0, np.float16)
    lines = x.shape[1 - axis]
    one, out = back.asarray(np.ones(5, x.dtype)), back.empty(x.shape, x.dtype)
    mean, variance, rstd = (back.empty((lines,), np.float32) for _ in range(3))
    back.normalize(back.asarray(x), one, one, axis, EPS, out, mean, variance, rstd).run()
    np.testing.assert_array_equal(back.to_numpy(out), 1)
    np.testing.assert_array_equal(back.to_numpy(mean), np.float32(x[0, 0]))
    np.testing.assert_array_equal(back.to_numpy(variance), 0)


@pytest.mark.parametrize("device", ["cpu", "cpu:reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_running_statistics_reach_a_constant_exactly(device, dtype, rng):
    """A constant column beside N(0, 1) columns is 0 in inference, not ±1."""
    x = rng.normal(size=(100, 4)).astype(dtype)
    x[:, 1] = 3333333.3
    model = gb.Sequential(gb.BatchNorm(4), dtype=dtype)
    trainer = gb.Trainer(model, "mse", gb.SGD(1e-30), seed=0, device=device)
    trainer.fit(x, x * 0, epochs=200 if dtype == "float32" else 400, batch_size=25)
    assert model.state_dict()["0.mean"][1] == x[0, 1]
    y = model.predict(x)
    np.testing.assert_array_equal(y[:, 1], 0)
    assert 0.5 < y[:, 0].std() < 2


def test_running_statistics_of_huge_values_stay_finite(back):
    largest = float(np.finfo("f").max)
    x = np.array([[largest, 1e30], [-largest, -1e30], [largest, 1e30]], "f")
    model = gb.Sequential(gb.BatchNorm(2, momentum=1.0))
    trainer = gb.Trainer(model, "mse", gb.SGD(1e-30), seed=0, device=back.device)
    for sign in (1, -1, 1):
        trainer.fit(sign * x, x * 0, epochs=1, batch_size=3)
    state = model.state_dict()
    assert all(np.isfinite(state[f"0.{k}"]).all() for k in ("mean", "variance"))


def test_running_statistics_still_average(rng):
    """An exponential average with the unbiased variance, as before."""
    x, momentum = rng.normal(5, 3, (60, 2)), 0.3
    model = gb.Sequential(gb.BatchNorm(2, momentum=momentum), dtype="float64")
    gb.Trainer(model, "mse", gb.SGD(1e-30), seed=0).fit(x, x * 0, epochs=3, batch_size=20, shuffle=False)
    mean, variance = np.zeros(2), np.ones(2)
    for _ in range(3):
        for batch in x.reshape(3, 20, 2):
            mean += momentum * (batch.mean(0) - mean)
            variance += momentum * (batch.var(0, ddof=1) - variance)
    np.testing.assert_allclose(model.state_dict()["0.mean"], mean, rtol=1e-13)
    np.testing.assert_allclose(model.state_dict()["0.variance"], variance, rtol=1e-13)
