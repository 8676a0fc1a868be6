"""Piecewise functions on the way back: ties sum to 1, a NaN stays visible, and all other gradients keep their bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gpubackprop as gb
from gpubackprop import formulas, ops

NAN = float("nan")
UNARY = formulas.ACTIVATIONS | formulas.UNARY
PIECEWISE = ["relu", "leaky_relu", "elu", "selu", "hard_sigmoid", "hard_tanh", "abs"]
PAIRS = [(NAN, 1.0), (1.0, NAN), (-1.0, NAN), (NAN, -1.0), (0.0, NAN), (NAN, NAN)]


@pytest.fixture(params=["cpu", "cpu:reference", "cuda"])
def device(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return request.param


def gradients(f, *values, device="cpu", dtype="float32"):
    leaves = [gb.tensor(np.array(v, dtype), requires_grad=True, device=device) for v in values]
    y = f(*leaves)
    y.backward(np.ones(y.shape, dtype))
    return y.numpy(), *(leaf.grad.numpy() if hasattr(leaf.grad, "numpy") else np.asarray(leaf.grad) for leaf in leaves)


# ---- ties ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [gb.maximum, gb.minimum])
def test_a_tie_gives_half_to_each_side(f, device):
    _, da, db = gradients(f, [1.0, 0.0, -0.0, 2.0], [1.0, -0.0, 0.0, 3.0], device=device)
    np.testing.assert_array_equal(da[:3], 0.5)
    np.testing.assert_array_equal(da + db, 1)


@given(arrays.arrays(np.float64, 6, elements=st.floats(-4, 4)), st.integers(0, 63))
def test_the_two_gradients_of_an_extremum_sum_to_one(a, tied):
    b = np.where(tied >> np.arange(6) & 1, a, a[::-1])
    for f in (gb.maximum, gb.minimum):
        _, da, db = gradients(f, a, b, dtype="float64")
        np.testing.assert_array_equal(da + db, 1)


def test_an_extremum_of_a_tensor_with_itself_is_the_tensor():
    gb.gradcheck(lambda a: gb.maximum(a, a).sum(), [1.0, 2.0])
    gb.gradcheck(lambda a: gb.minimum(a, a * 1.0).sum(), [1.0, 2.0])


def test_clip_agrees_with_central_differences_at_its_limits():
    gb.gradcheck(lambda x: (gb.clip(x, -1, 1) * np.array([1.0, 2, 3, 4])).sum(), [-1.0, 1.0, 0.3, 7.0])


def test_relu_keeps_the_derivative_0_at_0(device):
    assert gradients(gb.relu, [0.0, -0.0], device=device)[1].tolist() == [0, 0]


def test_a_maxout_of_units_that_start_equal_learns():
    w, x = np.zeros((1, 2)), np.random.default_rng(0).normal(size=(64, 1)) ** 2
    for _ in range(100):
        value, dw = gb.value_and_grad(
            lambda v: ((gb.maximum(*((gb.tensor(x) * v[0, k]) for k in (0, 1))) - 2 * x) ** 2).mean()
        )(w)
        w = w - 0.05 * dw
    assert value < 1e-3


# ---- NaN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", UNARY.values(), ids=UNARY)
def test_the_derivative_at_a_nan_is_nan(row):
    for device in ("cpu", "cpu:reference"):
        y, dx = gradients(lambda x: ops.unary(x, row), [0.5, NAN, NAN], device=device)
        assert np.isnan(y[1:]).all() and not np.isnan(dx[0])
        assert np.isnan(dx[1:]).all() or not formulas.free_names(formulas.value(row.derivative, dict(row.constants)))


@pytest.mark.parametrize("row", PIECEWISE)
def test_the_derivative_at_a_nan_is_nan_on_a_gpu(cuda, row):
    assert np.isnan(gradients(lambda x: ops.unary(x, UNARY[row]), [0.5, NAN], device="cuda")[1]).tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize("name", ["maximum", "minimum", "power", "divide", "multiply"])
def test_both_gradients_of_what_compares_with_a_nan_are_nan(name, device):
    a, b = map(list, zip(*PAIRS, strict=True))
    y, da, db = gradients(getattr(gb, name), a, b, device=device)
    row = formulas.BINARY[name]
    for text, d in ((row.da, da), (row.db, db)):
        if "where" in text or {"a", "b", "y"} <= set(formulas.free_names(formulas.parse(text)[formulas.RESULT])):
            assert np.isnan(d[np.isnan(y)]).all()
    assert (np.isnan(da) | np.isnan(db)).all()


@pytest.mark.parametrize("f", [gb.max, gb.min])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_an_extremum_over_a_nan_has_no_gradient_of_zero(f, axis, device):
    x = np.array([[1.0, NAN, 3.0], [4.0, 5.0, 6.0]])
    y, dx = gradients(lambda t: f(t, axis=axis), x, device=device)
    spread = np.isnan(y) if axis is None else np.expand_dims(np.isnan(y), axis)
    np.testing.assert_array_equal(np.isnan(dx), np.broadcast_to(spread, x.shape))


def test_clip_keeps_a_nan(device):
    dx = gradients(lambda x: gb.clip(x, -1, 1), [0.5, NAN, 7.0], device=device)[1]
    np.testing.assert_array_equal(dx, [1, NAN, 0])


def test_a_penalty_keeps_the_nan_of_a_weight():
    for row in formulas.PENALTIES.values():
        g = formulas.value(row.derivative, {"l1": 1.0, "l2": 0.0})
        back, p, out = gb.get_backend("cpu"), np.array([NAN, 0.0, 2.0, -2.0]), np.empty(4)
        back.elementwise(row.name, {"g": g}, {"p": p}, {"g": out}).run()
        assert np.isnan(out[0]) and not np.isnan(out[1:]).any()


def test_registered_rows_keep_nans_too():
    row = formulas.row("ramp", "minimum(maximum(x, 0), 6)", "where(x > 0, where(x < 6, 1, 0), 0)")
    for device in ("cpu", "cpu:reference"):
        dx = gradients(lambda x: ops.unary(x, row), [NAN, -1.0, 3.0, 9.0], device=device)[1]
        np.testing.assert_array_equal(dx, [NAN, 0, 1, 0])


def test_operands_may_be_given_in_another_order_than_the_formula_names_them(device):
    back = gb.get_backend(device)
    x, y = (np.arange(n, dtype="float32").reshape(s) for n, s in ((6, (2, 3)), (2, (2, 1))))
    out = back.asarray(np.empty_like(x))
    reads = {"x": back.asarray(x), "y": back.asarray(y)}
    back.elementwise("order", {"out": formulas.value("y * 10 + x")}, reads, {"out": out}).run()
    np.testing.assert_array_equal(back.to_numpy(out), y * 10 + x)


@pytest.mark.parametrize("row", UNARY.values(), ids=UNARY)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_gradients_keep_their_bits(row, dtype, rng):
    """Numbers, infinities and zeros of both signs as before: dy * derivative, with no 0 · inf."""
    special = np.array([0.0, -0.0, 1, -1, 6, -6, np.inf, -np.inf, 1e30, -1e30], dtype)
    starts = np.repeat(special, 4), np.resize([1.0, np.inf, -0.0, -np.inf], 40)
    x, dy = (np.concatenate([start, rng.normal(size=70_000)]).astype(dtype) for start in starts)
    plain = formulas.chain(formulas.name("dy"), formulas.value(row.derivative, dict(row.constants)))
    back = gb.get_backend("cpu:reference")
    y, wanted = np.empty_like(x), np.empty_like(x)
    with np.errstate(all="ignore"):
        back.elementwise("forward", {"y": row.forward_graph()}, {"x": x}, {"y": y}).run()
        known = {"x": x, "y": y, "dy": dy}
        reads = {k: known[k] for k in formulas.free_names(plain)}
        back.elementwise("plain", {"dx": plain}, reads, {"dx": wanted}).run()
        good = ~np.isnan(y)
        for device in ("cpu", "cpu:reference") if formulas.exact([plain]) else ("cpu:reference",):
            back, dx = gb.get_backend(device), np.empty_like(x)
            graph = {"dx": row.backward_graph()}
            reads = {k: known[k] for k in formulas.free_names(*graph.values())}
            back.elementwise("backward", graph, reads, {"dx": dx}).run()
            np.testing.assert_array_equal(dx[good].view(np.uint8), wanted[good].view(np.uint8))


@pytest.mark.parametrize("f", [gb.log, gb.log1p, gb.sqrt])
def test_outside_of_its_domain_a_function_and_its_derivative_are_nan(f, device):
    for value, slope in zip(*gradients(f, [-2.0, NAN, 3.0], device=device), strict=True):
        assert np.isnan(value) == np.isnan(slope)


def test_a_power_that_is_nan_has_two_derivatives_that_are(device):
    y, da, db = gradients(gb.power, [-2.0, NAN, -2.0], [0.5, 1.0, 3.0], device=device)
    np.testing.assert_array_equal(y, np.array([NAN, NAN, -8], "f"))
    np.testing.assert_array_equal(da, np.array([NAN, NAN, 12], "f"))
    np.testing.assert_array_equal(db, np.array([NAN, NAN, 0], "f"))
