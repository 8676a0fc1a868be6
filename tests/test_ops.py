"""Every operation against NumPy's value and against central differences, in one table; then what tensors promise."""

import gc
import math
import operator
import sys
import tracemalloc
import weakref

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.formulas import ACTIVATIONS
from gpubackprop.plan import Plan

try:
    import torch
except ImportError:
    torch = None

# ---- the table -----------------------------------------------------------------------------------------------------


def away(x):
    """Moved away from 0, where |x| and max(x, 0) have no derivative."""
    return np.where(x < 0, x - 0.2, x + 0.2)


def positive(x):
    return np.abs(x) + 0.4


def same(x):
    return x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lse(x, axis):
    return np.log(np.exp(x).sum(axis, keepdims=True))


UNARY = {  # name: (reference, where its argument comes from)
    "neg": (np.negative, same), "exp": (np.exp, same), "log": (np.log, positive), "log1p": (np.log1p, positive),
    "expm1": (np.expm1, same), "sqrt": (np.sqrt, positive), "sin": (np.sin, same), "cos": (np.cos, same),
    "tanh": (np.tanh, same), "sigmoid": (sigmoid, same), "relu": (lambda x: np.maximum(x, 0), away),
    "abs": (np.abs, away),
}  # fmt: skip
BINARY = {
    "add": (np.add, same), "subtract": (np.subtract, same), "multiply": (np.multiply, same),
    "divide": (np.divide, positive), "power": (np.power, positive), "maximum": (np.maximum, same),
    "minimum": (np.minimum, same),
}  # fmt: skip
BROADCASTS = [((2, 3), (2, 3)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((), (2, 3)), ((2, 3), ()), ((), ()),
              ((4, 1, 3), (2, 1)), ((1,), (1, 1)), ((0, 3), (3,)), ((2, 0), (2, 1)), ((1, 3), (0, 3))]  # fmt: skip
SHAPES = [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)]
AXES = [None, 0, 1, -1, (0, 2), (0, 1, 2), (-1, 0), ()]
MATMULS = [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 3), (3, 4)), ((5, 2, 3), (3, 4)), ((2, 3), (5, 3, 4)),
           ((5, 2, 3), (5, 3, 4)), ((2, 1, 2, 3), (4, 3, 2)), ((1, 2, 3), (5, 3, 2)), ((5, 2, 3), (3,)),
           ((3,), (5, 3, 2)), ((1, 1), (1, 1)), ((0, 3), (3, 2)), ((2, 0), (0, 3)), ((2, 3), (3, 0)),
           ((0, 2, 3), (3, 2)), ((0, 2, 3), (0, 3, 2)), ((0,), (0,)), ((0,), (0, 3)), ((2, 0), (0,))]  # fmt: skip
KEYS = {
    "integer": 1, "negative": -1, "two integers": (1, -2), "NumPy integer": np.int64(1), "slice": slice(1, None),
    "reversed": slice(None, None, -1), "strided": (slice(None), slice(None, None, 2)), "newaxis": (None, 1),
    "inner newaxis": (slice(None), None), "ellipsis": ..., "ellipsis last": (..., 0), "nothing": (),
    "empty": slice(1, 1), "list": [2, 0], "repeated": [0, 0, 2, 0], "negative repeated": [-1, 2, -1],
    "matrix of integers": np.array([[0, 1], [1, 1]]),
    "second axis": (slice(None), [1, 1, 0]), "pairs": ([0, 2, 0], [1, 1, 1]), "integer and list": (0, [1, 1]),
    "mask": np.arange(12).reshape(3, 4) % 5 > 1, "mask of rows": np.array([True, False, True]),
    "mask of columns": (slice(None), np.array([True, False, True, True])), "no row": [],
    "all False": np.zeros((3, 4), bool),
    "outer": np.ix_([0, 2], [1, 3]), "0-d array": np.array(1), "a list beside newaxis": (None, [0, 0]), "true": True,
}  # fmt: skip

CASES = {}  # name: (function of tensors, the same of arrays, [arrays])


def case(name, function, reference, *shapes, of=same):
    rng = np.random.default_rng(len(CASES))
    assert name not in CASES
    CASES[name] = function, reference, [of(rng.uniform(-2, 2, s)) for s in shapes]


for key, (reference, of) in UNARY.items():
    for shape in SHAPES:
        case(f"{key} {shape}", getattr(gb, key), reference, shape, of=of)
for key, (reference, of) in BINARY.items():
    for shapes in BROADCASTS:
        case(f"{key} {shapes}", getattr(gb, key), reference, *shapes, of=of)
for key in ACTIVATIONS:
    if key not in UNARY:
        case(f"activation {key}", lambda x, r=key: gb.Activation(r)(x), None, (4, 5), of=away)
for kind, reference in (("sum", np.sum), ("mean", np.mean), ("max", np.max), ("min", np.min)):
    for axis in AXES:
        for keep in (False, True):
            case(f"{kind} over {axis}{' kept' * keep}", lambda x, k=kind, a=axis, d=keep: getattr(gb, k)(x, a, d),
                 lambda x, r=reference, a=axis, d=keep: r(x, axis=a, keepdims=d), (2, 3, 2))  # fmt: skip
    case(f"{kind} of one", getattr(gb, kind), reference, ())
    case(f"{kind} over none of no rows", lambda x, k=kind: getattr(gb, k)(x, 1), lambda x, r=reference: r(x, 1), (0, 3))
case("sum of nothing", gb.sum, np.sum, (0, 3))
case("sum of no rows", lambda x: gb.sum(x, 0), lambda x: x.sum(0), (0, 3))
for axis in (0, 1, -1):
    for shape in ((3, 4), (1, 1), (2, 5, 3)):
        at = f"along {axis} of {shape}"
        case(f"logsumexp {at}", lambda x, a=axis: gb.logsumexp(x, a), lambda x, a=axis: lse(x, a).squeeze(a), shape)
        case(f"logsumexp kept {at}", lambda x, a=axis: gb.logsumexp(x, a, True), lambda x, a=axis: lse(x, a), shape)
        case(f"softmax {at}", lambda x, a=axis: gb.softmax(x, a), lambda x, a=axis: np.exp(x - lse(x, a)), shape)
        case(f"log_softmax {at}", lambda x, a=axis: gb.log_softmax(x, a), lambda x, a=axis: x - lse(x, a), shape)
case("softmax of no rows", gb.softmax, same, (0, 3))
for shapes in MATMULS:
    case(f"matmul {shapes}", gb.matmul, np.matmul, *shapes)
for key in KEYS:
    case(f"index {key}", lambda x, k=key: x[KEYS[k]], lambda x, k=key: x[KEYS[k]], (3, 4))
for axis in (0, 1, -1):
    case(f"gather along {axis}", lambda x, a=axis: gb.gather(x, [1, 0, 1, -1], a),
         lambda x, a=axis: np.take(x, [1, 0, 1, -1], a), (2, 3, 2))  # fmt: skip
    case(f"concatenate along {axis}", lambda *t, a=axis: gb.concatenate(t, a), lambda *t, a=axis: np.concatenate(t, a),
         (2, 3, 2), (2, 3, 2), (2, 3, 2))  # fmt: skip
    case(f"stack along {axis}", lambda *t, a=axis: gb.stack(t, a), lambda *t, a=axis: np.stack(t, a), (2, 3), (2, 3))
case("gather nothing", lambda x: gb.gather(x, []), lambda x: x[:0], (2, 3))
case("concatenate unequal", lambda *t: gb.concatenate(t), lambda *t: np.concatenate(t), (2, 3), (0, 3), (1, 3))
case("concatenate one", lambda x: gb.concatenate([x]), same, (2, 3))
for shape in ((6,), (3, 2), (-1,), (2, -1), (1, 6, 1)):
    case(f"reshape {shape}", lambda x, s=shape: gb.reshape(x, s), lambda x, s=shape: x.reshape(s), (2, 3))
case("reshape scalar", lambda x: x.reshape(()), lambda x: x.reshape(()), (1, 1))
case("reshape nothing", lambda x: x.reshape(3, 0), lambda x: x.reshape(3, 0), (0, 2))
for axes in ((), (0, 2, 1), (2, 0, 1), (-1, 0, 1)):
    case(f"transpose {axes}", lambda x, a=axes: x.transpose(*a), lambda x, a=axes: x.transpose(*a), (2, 3, 4))
case("T", lambda x: x.T, np.transpose, (2, 3))
case("T of a vector", lambda x: x.T, same, (3,))
case("T of a scalar", lambda x: x.T, same, ())
for shape, wide in (
    ((3,), (2, 3)),
    ((2, 1), (2, 3)),
    ((), (2, 2)),
    ((1,), (0,)),
    ((2, 3), (2, 3)),
    ((1, 3), (4, 2, 3)),
):
    case(f"broadcast {shape} to {wide}", lambda x, s=wide: gb.broadcast_to(x, s),
         lambda x, s=wide: np.broadcast_to(x, s), shape)  # fmt: skip
for c, a, b in (((2, 3), (2, 3), (2, 3)), ((3,), (2, 1), ()), ((2, 1), (3,), (2, 3)), ((0, 3), (3,), (3,))):
    mask = np.random.default_rng(5).random(c) > 0.5
    case(f"where {c} {a} {b}", lambda x, y, m=mask: gb.where(m, x, y), lambda x, y, m=mask: np.where(m, x, y), a, b)
case("where x > 0", lambda x: gb.where(x > 0, x * x, x * 3), lambda x: np.where(x > 0, x * x, x * 3), (3, 4), of=away)
case("clip", lambda x: x.clip(-0.5, 0.7), lambda x: x.clip(-0.5, 0.7), (3, 4))
case("power of a negative", lambda x: x**3, lambda x: x**3, (5,))
case("cube at zero", lambda x: (x * 0) ** 2 + x, same, (3,))
case(
    "reflected",
    lambda x: (1 + x) * (2 - x) / (3 / x) + 2**x,
    lambda x: (1 + x) * (2 - x) / (3 / x) + 2**x,
    (4,),
    of=away,
)
case("fan-out x + x", lambda x: x + x, lambda x: 2 * x, (3,))
case("fan-out x − x", lambda x: x - x, lambda x: 0 * x, (3,))
case("fan-out x · x", lambda x: x * x * x, lambda x: x**3, (3,))
case("fan-out x @ x", lambda x: x @ x, lambda x: x @ x, (3, 3))
case("fan-out of a vector", lambda x: x @ x, lambda x: x @ x, (3,))
case("fan-out through views", lambda x: x.T @ x + x.reshape(3, 3)[0] * x[0, 0],
     lambda x: x.T @ x + x[0] * x[0, 0], (3, 3))  # fmt: skip
case(
    "fan-out through concatenate",
    lambda x: gb.concatenate([x, x, x * 2]),
    lambda x: np.concatenate([x, x, x * 2]),
    (3,),
)
case("diamond", lambda x: (lambda y: y * y + y.exp())(x.sin()), lambda x: np.sin(x) ** 2 + np.exp(np.sin(x)), (3,))

# ---- fused operations in the same table ----------------------------------------------------------------------------

LABELS = np.array([2, 0, 3, 3])
SOFT = np.arange(12.0).reshape(4, 3) / 9
T01 = np.array([[0.0, 1], [1, 0.25], [0.5, 1]])
COUNTS = np.array([[0.0, 1], [3, 0], [2.5, 7]])


def norm(x, gain, bias, axis):
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5) * gain + bias


def bce(x, t):
    return np.logaddexp(0, x) - x * t


def poisson(x, t):
    """Half the deviance of counts t from means eˣ."""
    return np.exp(x) - t + t * np.log(np.where(t > 0, t, 1)) - t * x


def cross_entropy(x, t):
    return -(t * (x - lse(x, 1))).sum(1)


case("dense", lambda x, w, b: gb.dense(x, w, b), lambda x, w, b: x @ w + b, (4, 3), (3, 2), (2,))
case("dense without bias", lambda x, w: gb.dense(x, w, activation="tanh"), lambda x, w: np.tanh(x @ w), (4, 3), (3, 2))
case("dense of members", lambda x, w, b: gb.dense(x, w, b, "tanh"), lambda x, w, b: np.tanh(x @ w + b[:, None]),
     (2, 4, 3), (2, 3, 5), (2, 5))  # fmt: skip
case(
    "dense of no rows",
    lambda x, w, b: gb.dense(x, w, b, "tanh"),
    lambda x, w, b: np.tanh(x @ w + b),
    (0, 3),
    (3, 2),
    (2,),
)
case("dense twice", lambda x, w, b: gb.dense(gb.dense(x, w, b, "tanh"), w, b, "sigmoid"),
     lambda x, w, b: sigmoid(np.tanh(x @ w + b) @ w + b), (4, 3), (3, 3), (3,))  # fmt: skip
for key in ACTIVATIONS:
    case(f"dense {key}", lambda x, w, b, r=key: gb.dense(x, w, b, r), None, (4, 3), (3, 5), (5,))
    case(
        f"dense {key} inside",
        lambda x, w, b, r=key: gb.dense(x * 2, w * x.sum(), b + 1, r) ** 2,
        None,
        (4, 3),
        (3, 5),
        (5,),
    )
for how, over in (("mean", np.mean), ("sum", np.sum)):
    case(f"cross-entropy of labels {how}", lambda x, h=how: gb.softmax_cross_entropy(x, LABELS, h),
         lambda x, o=over: o(cross_entropy(x, np.eye(4)[LABELS])), (4, 4))  # fmt: skip
    case(f"cross-entropy of rows {how}", lambda x, h=how: gb.softmax_cross_entropy(x, SOFT, h),
         lambda x, o=over: o(cross_entropy(x, SOFT)), (4, 3))  # fmt: skip
    case(
        f"mse {how}",
        lambda x, h=how: gb.mse(x, T01.astype(x.dtype), h),
        lambda x, o=over: o(((x - T01) ** 2).mean(1)),
        (3, 2),
    )
    case(
        f"half_mse {how}",
        lambda x, h=how: gb.half_mse(x, T01.astype(x.dtype), h),
        lambda x, o=over: o(((x - T01) ** 2).mean(1)) / 2,
        (3, 2),
    )
    case(
        f"sse {how}",
        lambda x, h=how: gb.sse(x, T01.astype(x.dtype), h),
        lambda x, o=over: o(((x - T01) ** 2).sum(1)),
        (3, 2),
    )
    case(
        f"half_sse {how}",
        lambda x, h=how: gb.half_sse(x, T01.astype(x.dtype), h),
        lambda x, o=over: o(((x - T01) ** 2).sum(1)) / 2,
        (3, 2),
    )
    case(
        f"bce {how}",
        lambda x, h=how: gb.bce_with_logits(x, T01.astype(x.dtype), h),
        lambda x, o=over: o(bce(x, T01).mean(1)),
        (3, 2),
    )
    case(
        f"bce_sum {how}",
        lambda x, h=how: gb.bce_with_logits_sum(x, T01.astype(x.dtype), h),
        lambda x, o=over: o(bce(x, T01).sum(1)),
        (3, 2),
    )
    case(
        f"poisson {how}",
        lambda x, h=how: gb.poisson(x, COUNTS.astype(x.dtype), h),
        lambda x, o=over: o(poisson(x, COUNTS).mean(1)),
        (3, 2),
    )
    case(
        f"poisson_sum {how}",
        lambda x, h=how: gb.poisson_sum(x, COUNTS.astype(x.dtype), h),
        lambda x, o=over: o(poisson(x, COUNTS).sum(1)),
        (3, 2),
    )
WEIGHTS = np.array([0.5, 0.0, 2.0, 1.25])
for how, over in (("mean", lambda rows: rows @ WEIGHTS / WEIGHTS.sum()), ("sum", lambda rows: rows @ WEIGHTS)):
    case(f"cross-entropy of weighted rows {how}",
         lambda x, h=how: gb.softmax_cross_entropy(x, LABELS, h, WEIGHTS),
         lambda x, o=over: o(cross_entropy(x, np.eye(4)[LABELS])), (4, 4))  # fmt: skip
    case(f"mse of weighted rows {how}",
         lambda x, h=how: gb.mse(x, np.ones(x.shape, x.dtype), h, WEIGHTS),
         lambda x, o=over: o(((x - 1) ** 2).mean((1, 2))), (4, 2, 3))  # fmt: skip
    case(f"bce of a weighted vector {how}",
         lambda x, h=how: gb.bce_with_logits(x, np.ones(x.shape, x.dtype), h, WEIGHTS),
         lambda x, o=over: o(bce(x, np.ones(4))), (4,))  # fmt: skip
case("losses of no rows", lambda x: gb.mse(x, x.detach(), "sum") + gb.softmax_cross_entropy(x, np.zeros(0, int), "sum"),
     lambda x: np.zeros(()), (0, 2))  # fmt: skip
case("layer_norm", gb.layer_norm, lambda x, g, b: norm(x, g, b, -1), (4, 5), (5,), (5,))
case("layer_norm of a stack", gb.layer_norm, lambda x, g, b: norm(x, g, b, -1), (2, 3, 4), (4,), (4,))
case("layer_norm of a vector", gb.layer_norm, lambda x, g, b: norm(x, g, b, -1), (4,), (4,), (4,))
case("layer_norm inside", lambda x, g, b: gb.layer_norm(x * x, g * 2, b + g) ** 2,
     lambda x, g, b: norm(x * x, g * 2, b + g, -1) ** 2, (4, 5), (5,), (5,))  # fmt: skip
case("batch_norm", lambda x, g, b: gb.batch_norm(x, g, b)[0], lambda x, g, b: norm(x, g, b, 0), (6, 3), (3,), (3,))
case("dropout", lambda x: gb.dropout(x, 0.4, 1, 2, 3), None, (5, 6))
case("noise", lambda x: gb.noise(x, 0.4, 1, 2, 3), None, (5, 6))
case("noise inside", lambda x: gb.noise(gb.noise(x * x, 0.4, 1) * x, 0.2, 1, 1), None, (5, 6))
case("dropout inside", lambda x: gb.dropout(gb.dropout(x * x, 0.4, 1) + x, 0.2, 1, 1), None, (5, 6))


@pytest.mark.parametrize("key", [k for k, c in CASES.items() if c[1] is not None])
def test_value(key):
    function, reference, arrays = CASES[key]
    y = function(*map(gb.tensor, arrays))
    expected = np.asarray(reference(*arrays))
    assert (y.shape, y.dtype) == (expected.shape, np.float64)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-13)
    assert not y.requires_grad


@pytest.mark.parametrize("key", CASES)
def test_gradient(key):
    function, _, arrays = CASES[key]
    assert gb.gradcheck(function, arrays) <= 1e-8


def strided(a):
    """The same values in memory of another order: every second element of a reversed, transposed array."""
    wide = np.full([2 * n for n in a.T.shape], np.nan)
    view = wide[(..., *(slice(None, None, -2),) * a.ndim)].T
    view[...] = a
    assert a.size < 2 or not view.flags.c_contiguous
    return view


@pytest.mark.parametrize("key", [k for k, c in CASES.items() if max(a.size for a in c[2]) > 1])
def test_non_contiguous_inputs_give_the_same_bits(key):
    function, _, arrays = CASES[key]
    results = []
    for given in (arrays, [strided(a) for a in arrays]):
        leaves = [gb.tensor(a, requires_grad=True) for a in given]
        y = function(*leaves)
        y.backward(strided(np.ones(y.shape)) if given is not arrays else np.ones(y.shape))
        results.append([t.numpy().tobytes() for t in (y, *(x.grad for x in leaves if x.grad is not None))])
    assert results[0] == results[1]


@pytest.mark.parametrize("key", CASES)
def test_float32_stays_float32(key):
    function, _, arrays = CASES[key]
    single, double = ([gb.tensor(a.astype(d), requires_grad=True) for a in arrays] for d in ("f", "d"))
    y, exact = function(*single), function(*double)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.numpy(), exact.numpy(), rtol=1e-4, atol=1e-4)
    y.backward(np.ones(y.shape, np.float32))
    assert all(x.grad is None or (x.grad.dtype == np.float32 and x.grad.shape == x.shape) for x in single)


# ---- kinks, ties, extremes -----------------------------------------------------------------------------------------


def grad(function, *arrays):
    leaves = [gb.tensor(np.asarray(a, np.float64), requires_grad=True) for a in arrays]
    function(*leaves).sum().backward()
    grads = [x.grad.numpy().tolist() for x in leaves]
    return grads[0] if len(grads) == 1 else grads


@pytest.mark.parametrize("function, arrays, expected", [
    (gb.relu, [[0.0, -0.0]], [0, 0]),
    (gb.abs, [[0.0]], [0]),
    (gb.maximum, [[1.0, 2.0], [1.0, 1.0]], [[0.5, 1], [0.5, 0]]),  # at a tie half to each side
    (gb.minimum, [[1.0, 2.0], [1.0, 1.0]], [[0.5, 0], [0.5, 1]]),
    (gb.max, [[3.0, 3.0, 1.0]], [0.5, 0.5, 0]),  # ties of a reduction share
    (gb.min, [[3.0, 1.0, 1.0]], [0, 0.5, 0.5]),
    (lambda x: x.clip(-1, 1), [[-1.0, 0.5, 1.0, 7.0]], [0.5, 1, 0.5, 0]),
    (lambda x: x**0, [[0.0, 2.0]], [0, 0]),
    (lambda x: x**1, [[0.0, -2.0]], [1, 1]),
    (lambda x: x**2, [[0.0, -2.0]], [0, -4]),
    (lambda a, b: a**b, [[-2.0, 0.0], [2.0, 3.0]], [[-4, 0], [0, 0]]),
    (lambda x: gb.where(x > 0, x, gb.log(x)), [[1.0, 2.0]], [1, 1]),
    (lambda x: gb.where(np.array([True, False]), gb.sqrt(x), 0.0), [[1.0, 4.0]], [0.5, 0]),
    (lambda x: x[[0, 0, 0]], [[1.0, 2.0]], [3, 0]),
])  # fmt: skip
def test_gradients_where_they_are_a_choice(function, arrays, expected):
    assert grad(function, *arrays) == expected


@pytest.mark.parametrize("condition, chosen", [
    ([True, False], [1, 4]), ([0.5, 0.0], [1, 4]), ([256, 0], [1, 4]), ([-1, 0], [1, 4]), ([np.nan, 0], [1, 4]),
    (np.array([1, 0], np.uint64), [1, 4]), (True, [1, 2]), (0, [3, 4]),
])  # fmt: skip
def test_where_chooses_a_wherever_the_condition_is_not_zero(condition, chosen):
    assert gb.where(condition, gb.tensor([1.0, 2.0]), gb.tensor([3.0, 4.0])).numpy().tolist() == chosen


@pytest.mark.parametrize("x", [[-1e4, 1e4], [1e4, 1e4], [-1e4, -1e4]])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_finite_at_ten_thousand(x, dtype):
    for function in (
            gb.sigmoid, gb.tanh, gb.softmax, gb.log_softmax, gb.logsumexp, gb.relu,
            lambda x: gb.softmax_cross_entropy(x.reshape(1, 2), [0]),
            lambda x: gb.bce_with_logits(x, np.full(2, 0.3, x.dtype)),
            lambda x: gb.softmax_cross_entropy(x.reshape(1, 2), np.array([[0.3, 0.7]], dtype)),
    ):  # fmt: skip
        leaf = gb.tensor(np.array(x, dtype), requires_grad=True)
        y = function(leaf)
        y.sum().backward()
        assert np.isfinite(y.numpy()).all() and np.isfinite(leaf.grad.numpy()).all()


def test_logsumexp_of_infinities():
    x = gb.tensor([[-np.inf, 0.0], [-np.inf, -np.inf], [np.inf, 0.0]])
    assert gb.logsumexp(x).numpy().tolist() == [0, -np.inf, np.inf]
    assert gb.softmax(x).numpy()[[0, 2]].tolist() == [[0, 1], [1, 0]]


# ---- operands ------------------------------------------------------------------------------------------------------


OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.matmul, operator.gt,
             operator.ge, operator.lt, operator.le]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("apply", OPERATORS)
def test_numpy_on_either_side_of_an_operator(apply, dtype, rng):
    a, b = (rng.uniform(0.5, 2, (3, 3)).astype(dtype) for _ in "ab")
    others = [b] + [1.5, dtype(1.5)] * (apply is not operator.matmul) + [b.tolist()] * (dtype is np.float64)
    for other in others:
        for y, expected in (
            (apply(gb.tensor(a), other), apply(a, other)),
            (apply(other, gb.tensor(a)), apply(other, a)),
        ):
            assert isinstance(y, gb.Tensor) and y.dtype == dtype
            np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6 if dtype is np.float32 else 1e-14)


@pytest.mark.parametrize("scalar", [2, 2.0, True, np.int64(2), np.float64(2.0), np.array([1, 2, 3])])
def test_python_scalars_and_integers_adapt(scalar):
    x = gb.tensor(np.ones(3, np.float32), requires_grad=True)
    for y in (x * scalar, scalar - x, gb.maximum(x, scalar), gb.where([1, 0, 1], x, scalar)):
        assert y.dtype == np.float32


def test_arithmetic_of_literals_is_rounded_once():
    x = gb.tensor(np.array([3.0], np.float32))
    assert (x * 0.1).item() == np.float32(3) * np.float32(0.1)


SINGLE, DOUBLE, SQUARE = gb.tensor(np.ones(3, np.float32)), gb.tensor(np.ones(3)), gb.tensor(np.ones((3, 3)))
LEAF = gb.tensor(np.ones((2, 3)), requires_grad=True)
ERRORS = [
    (lambda: SINGLE + DOUBLE, TypeError, r"add: dtypes differ \(float32 and float64\); convert one, as with .astype"),
    (lambda: SINGLE * np.ones(3), TypeError, "multiply: dtypes differ"),
    (lambda: SQUARE @ np.ones((3, 2), np.float32), TypeError, "matmul: dtypes differ"),
    (lambda: gb.dense(SINGLE.reshape(1, 3), SQUARE), TypeError, "dense: dtypes differ"),
    (lambda: DOUBLE + "1", TypeError, "tensor expected, got str"),
    (lambda: DOUBLE + None, TypeError, "tensor expected, got NoneType"),
    (lambda: DOUBLE * 1j, TypeError, "tensor expected, got complex"),
    (lambda: gb.exp(1.0), TypeError, "exp: at least one operand must be a tensor"),
    (lambda: DOUBLE + gb.tensor(np.ones(4)), ValueError, r"add: shapes \(3,\) and \(4,\) do not broadcast"),
    (lambda: gb.where([1, 0], DOUBLE, 0), ValueError, r"where: shapes .* do not broadcast"),
    (lambda: LEAF @ LEAF, ValueError, r"matmul: a has 3 columns but b has 2 rows \(shapes \(2, 3\) and \(2, 3\)\)"),
    (lambda: LEAF @ DOUBLE[:2], ValueError, "matmul: a has 3 columns but b has 2 rows"),
    (lambda: LEAF @ 2.0, ValueError, r"matmul: a scalar operand .*; use \* instead"),
    (lambda: gb.tensor(np.ones((2, 3, 3))) @ gb.tensor(np.ones((4, 3, 3))), ValueError, "matmul: leading axes"),
    (lambda: LEAF.sum(2), ValueError, r"sum: axis 2 does not exist in shape \(2, 3\)"),
    (lambda: LEAF.max((0, -2)), ValueError, r"max: axes \(0, -2\) name one axis twice"),
    (lambda: gb.mean(gb.tensor(np.ones((0, 3)))), ValueError, r"mean: of nothing \(shape \(0, 3\) over"),
    (lambda: gb.max(gb.tensor(np.ones((0, 3))), 0), ValueError, "max: of nothing"),
    (lambda: gb.min(gb.tensor(np.ones(0))), ValueError, "min: of nothing"),
    (lambda: gb.logsumexp(gb.tensor(np.ones((2, 0)))), ValueError, "logsumexp: of nothing"),
    (lambda: LEAF.reshape(4), ValueError, r"reshape: 6 elements of shape \(2, 3\) do not fit"),
    (lambda: LEAF.reshape(-1, 4), ValueError, "reshape: 6 elements"),
    (lambda: LEAF.transpose(0, 0), ValueError, r"transpose: axes \(0, 0\) are not an order of the 2 axes"),
    (lambda: LEAF.transpose(1), ValueError, "transpose: axes"),
    (lambda: gb.broadcast_to(LEAF, (3, 3)), ValueError, r"broadcast_to: shape \(2, 3\) does not broadcast to \(3, 3\)"),
    (lambda: gb.broadcast_to(LEAF, (3,)), ValueError, "broadcast_to: shape"),
    (lambda: gb.concatenate([LEAF, SQUARE], 1), ValueError, "concatenate: shapes .* differ beside axis 1"),
    (lambda: gb.concatenate([LEAF, DOUBLE]), ValueError, "concatenate: shapes"),
    (lambda: gb.stack([LEAF, SQUARE]), ValueError, "stack: shapes .* differ; use concatenate"),
    (lambda: gb.stack([LEAF, LEAF], 5), ValueError, "stack: axis 5"),
    (lambda: LEAF[2], IndexError, r"index: .*out of bounds.* \(shape \(2, 3\)\)"),
    (lambda: LEAF[0, 0, 0], IndexError, "index: .*too many indices"),
    (lambda: LEAF[[0, 7]], IndexError, "index: .*out of bounds"),
    (lambda: LEAF[[0.5]], IndexError, "index: "),
    (lambda: LEAF["a"], IndexError, "index: "),
    (lambda: gb.gather(LEAF, [0, 2]), IndexError, r"gather: index 0…2 outside axis 0 of shape \(2, 3\)"),
    (lambda: gb.gather(LEAF, [-3]), IndexError, "gather: index"),
    (lambda: gb.gather(LEAF, [0.0]), TypeError, "gather: 1-D integers expected"),
    (lambda: gb.gather(LEAF, [[0]]), TypeError, r"gather: 1-D integers expected, got int64 of shape \(1, 1\)"),
    (lambda: LEAF.clip(1, 0), ValueError, "clip: low 1 exceeds high 0"),
    (lambda: gb.dense(np.ones((2, 784)), gb.tensor(np.ones((512, 3)))), ValueError,
     "dense: x has 784 columns but the weight has 512 rows"),
    (lambda: gb.dense(LEAF, SQUARE, DOUBLE[:2]), ValueError, r"dense: the bias has shape \(2,\) but the weight has 3"),
    (lambda: gb.dense(DOUBLE, SQUARE), ValueError, r"dense: x has shape \(3,\)"),
    (lambda: gb.dense(LEAF, SQUARE, None, "rleu"), ValueError, "unknown activation 'rleu'; choose from elu, gelu"),
    (lambda: gb.softmax_cross_entropy(LEAF, [0, 3]), ValueError, "softmax_cross_entropy: .*3"),
    (lambda: gb.softmax_cross_entropy(LEAF, [0, -1]), ValueError, "softmax_cross_entropy: .*-1"),
    (lambda: gb.softmax_cross_entropy(LEAF, [0, 0.5]), (ValueError, TypeError), "softmax_cross_entropy: .*0.5"),
    (lambda: gb.softmax_cross_entropy(LEAF, [0, 0, 0]), ValueError, r"logits .* \(2, 3\) but the target \(3,\)"),
    (lambda: gb.softmax_cross_entropy(LEAF, np.ones((2, 2))), ValueError, "logits have shape"),
    (lambda: gb.softmax_cross_entropy(LEAF, [0, 1], "none"), ValueError, "unknown reduction 'none'; choose"),
    (lambda: gb.softmax_cross_entropy(DOUBLE, [0, 1, 0]), ValueError, r"softmax_cross_entropy: .*\(3,\)"),
    (lambda: gb.softmax_cross_entropy(LEAF, LEAF), ValueError, "softmax_cross_entropy: the target requires a gradient"),
    (lambda: gb.mse(LEAF, LEAF[0]), ValueError, r"mse: the output has shape \(2, 3\) but the target \(3,\)"),
    (lambda: gb.mse(LEAF, LEAF), ValueError, "mse: the target requires a gradient; detach"),
    (lambda: gb.mse(LEAF[:0], np.ones((0, 3))), ValueError, "mse: the mean over an empty batch has no value"),
    (lambda: gb.mse(LEAF, LEAF.detach(), weights=[1, 2, 3]), ValueError,
     r"mse: the weights have shape \(3,\) and dtype float64, but .* shape \(2, 3\); expected \(2,\) of float64"),
    (lambda: gb.softmax_cross_entropy(LEAF, [0, 1], weights=gb.tensor(np.ones(2, "f"))), ValueError,
     r"softmax_cross_entropy: the weights have .* dtype float32, but .*; expected \(2,\) of float64"),
    (lambda: gb.sse(LEAF, LEAF.detach(), weights=[0, 0]), ValueError, "sse: the mean over rows whose weights sum to 0"),
    (lambda: gb.dropout(LEAF, 1.0), ValueError, r"dropout: rate 1.0 is not in \[0, 1\)"),
    (lambda: gb.dropout(LEAF, -0.1), ValueError, "dropout: rate"),
    (lambda: gb.noise(LEAF, -0.1), ValueError, r"noise: sigma -0.1 is not in \[0, inf\)"),
    (lambda: gb.noise(LEAF, math.nan), ValueError, "noise: sigma nan"),
    (lambda: gb.noise(LEAF, 1.0, 0, 2**30), ValueError, r"noise: site 1073741824 is not in \[0, 2\^30\)"),
    (lambda: gb.layer_norm(LEAF, DOUBLE[:2], DOUBLE), ValueError, "layer_norm: x has shape"),
    (lambda: gb.batch_norm(LEAF[:1], DOUBLE, DOUBLE), ValueError, "a training batch of 1 rows has no variance"),
    (lambda: gb.layer_norm(LEAF, DOUBLE, DOUBLE, 0.0), ValueError, "layer_norm: eps must be positive"),
    (lambda: LEAF.item(), ValueError, r"item: one element expected, got shape \(2, 3\)"),
    (lambda: float(LEAF), ValueError, "item: one element expected"),
    (lambda: bool(LEAF), ValueError, "bool: the truth of a tensor"),
    (lambda: len(gb.tensor(1.0)), TypeError, "has no length"),
    (lambda: gb.tensor(["a"]), TypeError, "tensor: numbers expected, got dtype <U1"),
    (lambda: gb.tensor([1j]), TypeError, "tensor: numbers expected, got dtype complex128"),
    (lambda: gb.tensor([None]), TypeError, "tensor: numbers expected, got dtype object"),
    (lambda: gb.tensor([1.0], dtype="int64"), TypeError, "dtype int64 is not supported; choose from float32"),
    (lambda: gb.tensor([1.0], device="gpu"), ValueError, "unknown device 'gpu'"),
    (lambda: LEAF.backward(), ValueError, r"backward: shape \(2, 3\) is not a scalar"),
    (lambda: LEAF.sum().backward(np.ones(3)), ValueError, r"backward: gradient has shape \(3,\)"),
    (lambda: (LEAF * 2).backward(np.ones(3)), ValueError, "backward: gradient has shape"),
    (lambda: (LEAF * 2).backward(np.ones((2, 3), "f")), TypeError, "backward: .*float32.*float64"),
    (lambda: DOUBLE.sum().backward(), RuntimeError, "backward: nothing below this tensor requires a gradient"),
    (lambda: gb.value_and_grad(lambda x: 1.0)(np.ones(2)), TypeError, "value_and_grad: the function returned float"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(ERRORS)), ids=lambda i: ERRORS[i][2][:40])
def test_errors_say_what_came_and_what_was_expected(index):
    call, kind, message = ERRORS[index]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("axis", [np.int64(1), np.intp(-1), np.array(1), [0, 1], (np.int32(0),)])
def test_axes_may_be_numpy_integers(axis):
    expected = np.ones((2, 3)).sum(tuple(axis) if isinstance(axis, list | tuple) else int(axis))
    assert LEAF.sum(axis).numpy().tolist() == expected.tolist()


def test_permutations_may_be_numpy_integers():
    assert gb.transpose(LEAF, *np.array([1, 0])).shape == (3, 2)
    assert LEAF.reshape(np.int64(3), np.int64(2)).shape == LEAF.reshape(np.int64(6)).reshape(np.array([3, 2])).shape


# ---- tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, dtype", [
    (np.ones(2, np.float32), "f4"), (np.ones(2), "f8"), ([1, 2], "f8"), (np.array([True]), "f8"), (3, "f8"),
    (2.5, "f8"), (np.ones(2, np.int8), "f8"), (np.ones((2, 2), order="F"), "f8"), (np.ones(2, ">f4"), "f4"),
    (np.ones(2, ">f8"), "f8"),
])  # fmt: skip
def test_tensor_keeps_floats_and_makes_the_rest_float64(given, dtype):
    t = gb.tensor(given)
    assert t.dtype == np.dtype(dtype) and t.data.flags.c_contiguous and t.shape == np.shape(given)
    np.testing.assert_array_equal(t.numpy(), given)


def test_a_tensor_is_a_copy_and_so_is_its_value():
    a = np.ones(3)
    t = gb.tensor(a)
    a[:] = 5
    t.numpy()[:] = 7
    assert t.numpy().tolist() == [1, 1, 1]
    assert gb.tensor(t, dtype="float32").dtype == np.float32 and gb.tensor(t).data is not t.data
    np.testing.assert_array_equal(np.asarray(t), t.numpy())
    assert np.asarray(t, np.float32).dtype == np.float32


def test_what_a_tensor_says_about_itself():
    x = gb.tensor([[1.0, 2.0]], requires_grad=True)
    assert (x.shape, x.ndim, x.size, len(x), x.dtype.name, x.device) == ((1, 2), 2, 2, 1, "float64", "cpu")
    assert repr(x) == "tensor([[1., 2.]], dtype=float64, requires_grad=True)"
    assert x.sum().item() == 3 and float(x.sum()) == 3 and bool(x.sum() > 2) and not bool(x.sum() > 3)
    assert [row.numpy().tolist() for row in x[0]] == [1, 2]


METHODS = ["exp", "log", "log1p", "expm1", "sqrt", "sin", "cos", "tanh", "sigmoid", "relu", "abs", "sum", "mean", "max",
           "min", "logsumexp", "softmax", "log_softmax"]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_operations_are_methods_too(name, rng):
    x = gb.tensor(rng.random((3, 4)) + 0.1)
    np.testing.assert_array_equal(getattr(x, name)().numpy(), getattr(gb, name)(x).numpy())
    if name in METHODS[-7:]:
        np.testing.assert_array_equal(getattr(x, name)(axis=0).numpy(), getattr(gb, name)(x, axis=0).numpy())
    np.testing.assert_array_equal(abs(-x).numpy(), x.numpy())


def test_backward_overwrites_grad():
    x = gb.tensor([1.0, 2.0], requires_grad=True)
    y = (x * x).sum()
    for _ in range(2):  # also of the same graph
        y.backward()
        assert x.grad.numpy().tolist() == [2, 4]
    (3 * x).sum().backward()
    assert x.grad.numpy().tolist() == [3, 3]
    assert not x.grad.requires_grad


def test_grad_is_on_leaves_and_where_it_is_retained():
    x = gb.tensor([1.0, 2.0], requires_grad=True)
    constant = gb.tensor([5.0, 5.0])
    y = x * constant
    z = (y * y).retain_grad()
    z.sum().backward()
    assert y.grad is None and constant.grad is None
    assert z.grad.numpy().tolist() == [1, 1] and x.grad.numpy().tolist() == [50, 100]
    y.retain_grad()
    z.sum().backward()
    assert y.grad.numpy().tolist() == [10, 20]


def test_gradients_own_their_memory():
    """dy is handed on where it can be; no two gradients, and no cotangent of the caller's, share it."""
    a, b = (gb.tensor(np.ones(3), requires_grad=True) for _ in "ab")
    y = (a + b).retain_grad()
    z = (y + a).reshape(3).retain_grad()
    cotangent = np.array([1.0, 2.0, 3.0])
    z.backward(cotangent)
    grads = [t.grad.data for t in (a, b, y, z)]
    assert [g.tolist() for g in grads] == [[2, 4, 6], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    for i, g in enumerate([*grads, cotangent]):
        assert not any(np.shares_memory(g, h) for h in grads[:i])
    a.backward(cotangent)
    assert a.grad.numpy().tolist() == cotangent.tolist() and not np.shares_memory(a.grad.data, cotangent)


def test_a_cotangent_may_be_given():
    x = gb.tensor(np.arange(3.0), requires_grad=True)
    (x * x).backward([1.0, 10.0, 100.0])
    assert x.grad.numpy().tolist() == [0, 20, 400]
    (x * x).backward(gb.tensor([1.0, 0.0, 0.0]))
    assert x.grad.numpy().tolist() == [0, 0, 0]
    (x * x).sum().reshape(1, 1).backward(2)
    assert x.grad.numpy().tolist() == [0, 4, 8]


def test_detach_stops_the_gradient():
    x = gb.tensor([3.0], requires_grad=True)
    (x * x.detach()).sum().backward()
    assert x.grad.numpy().tolist() == [3] and not x.detach().requires_grad


def test_dropout_is_keyed_by_seed_site_step_and_position(rng):
    x = gb.tensor(np.ones((50, 40)))
    first = gb.dropout(x, 0.3, 1, 2, 3).numpy()
    assert set(first.ravel()) == {0.0, 1 / 0.7} and abs((first == 0).mean() - 0.3) < 4 * math.sqrt(0.21 / 2000)
    np.testing.assert_array_equal(gb.dropout(x, 0.3, 1, 2, 3).numpy(), first)
    np.testing.assert_array_equal(gb.dropout(x[:7], 0.3, 1, 2, 3).numpy(), first[:7])
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (gb.dropout(x, 0.3, *other).numpy() != first).any()
    np.testing.assert_array_equal(gb.dropout(x, 0.3, 1, 2, np.int64(3)).numpy(), first)
    np.testing.assert_array_equal(gb.dropout(x, 0.0).numpy(), x.numpy())


def test_noise_is_keyed_by_seed_site_step_and_position():
    x = gb.tensor(np.zeros((50, 40)))
    first = gb.noise(x, 0.3, 1, 2, 3).numpy()
    assert abs(first.mean()) < 4 * 0.3 / math.sqrt(2000) and abs(first.std() / 0.3 - 1) < 4 / math.sqrt(4000)
    np.testing.assert_array_equal(gb.noise(x, 0.3, 1, 2, np.int64(3)).numpy(), first)
    np.testing.assert_array_equal(gb.noise(x[:7], 0.3, 1, 2, 3).numpy(), first[:7])
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (gb.noise(x, 0.3, *other).numpy() != first).all()
    assert gb.noise(x, 0.0) is x


# ---- size and memory -----------------------------------------------------------------------------------------------


def test_a_chain_of_100_000_operations_differentiates_and_is_freed():
    """Iteratively both ways: no recursion in backward, none when the last reference goes."""
    n = 100_000  # one in ten computes, the others reshape: they cost less to run, and are as deep
    x = y = gb.tensor(1.0, requires_grad=True)
    gc.disable()
    try:
        for i in range(n):
            y = y + x if i == n // 2 else -y if i % 10 == 1 else y.reshape((1,) if y.ndim == 0 else ())
        watched = weakref.ref(y.inputs[0])
        y.backward()
        del y
        assert watched() is None
    finally:
        gc.enable()
    assert x.grad.item() == 2  # an even number of signs on both paths
    assert n > 10 * sys.getrecursionlimit()


def step(w, b, x, t):
    hidden = (x @ w + b).relu()
    loss = gb.softmax_cross_entropy(gb.layer_norm(hidden, b * 0 + 1, b), t) + (w**2).mean() + hidden.max() * 0.1
    loss = (
        loss + gb.dropout(hidden, 0.5)[[0, 0, 1]].softmax().sum() + gb.concatenate([hidden, hidden.T]).clip(0, 1).sum()
    )
    loss.backward()
    return gb.tensor(w.data - 0.01 * w.grad.data, requires_grad=True)


def test_eager_code_in_a_loop_does_not_grow(rng):
    """Nor does it leave work to the garbage collector: graphs hold no cycle. A buffer of 8 kB a step would show."""
    w, b = gb.tensor(rng.normal(size=(32, 32)), requires_grad=True), gb.tensor(np.zeros(32), requires_grad=True)
    x, t = gb.tensor(rng.normal(size=(32, 32))), rng.integers(0, 32, 32)
    w = step(w, b, x, t)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        seen = []
        for n in (20, 60):  # the first of them also fills NumPy's caches
            for _ in range(n):
                w = step(w, b, x, t)
            tensors = sum(issubclass(type(o), gb.Tensor) for o in gc.get_objects())
            seen.append((gc.collect(), tensors, tracemalloc.get_traced_memory()[0]))
    finally:
        tracemalloc.stop()
        gc.enable()
    (garbage, tensors, size), (more_garbage, more_tensors, more) = seen
    assert (garbage, more_garbage, more_tensors) == (0, 0, tensors)
    assert more - size < 65_536


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_formula_is_parsed_once(activation, monkeypatch):
    """Eager code binds every launch anew, but does not read the text again."""
    from gpubackprop import formulas

    parse = formulas.ast.parse

    def use():
        x = gb.tensor(np.ones((2, 2)), requires_grad=True)
        (gb.Activation(activation)(x) + gb.dense(x, x, x[0], activation)).sum().backward()

    use()
    texts = []
    monkeypatch.setattr(formulas.ast, "parse", lambda text: texts.append(text) or parse(text))
    use()
    assert texts == []


# ---- value_and_grad, gradcheck, recording --------------------------------------------------------------------------


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def test_value_and_grad():
    value, gradient = gb.value_and_grad(rosenbrock)(np.array([-1.2, 1.0]))
    assert value == pytest.approx(24.2, rel=1e-14)
    np.testing.assert_allclose(gradient, [-215.6, -88.0], rtol=1e-14)
    value, gradients = gb.value_and_grad(lambda a, b: (a * b).sum())([1.0, 2.0], [3.0, 4.0])
    assert value == 11 and [g.tolist() for g in gradients] == [[3, 4], [1, 2]]
    assert gb.value_and_grad(lambda a: gb.tensor(2.0))(np.ones(2))[1].tolist() == [0, 0]
    assert gb.value_and_grad(rosenbrock)(np.ones(3, np.float32))[1].dtype == np.float32


def test_value_and_grad_drives_scipy():
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is not installed")
    found = optimize.minimize(gb.value_and_grad(rosenbrock), np.full(5, -1.0), jac=True, method="BFGS", tol=1e-10)
    np.testing.assert_allclose(found.x, 1, atol=1e-6)


def planted(factor):
    """x² with a gradient that is off by a factor."""

    def function(x):
        y = x * x
        right = y.backprop
        y.backprop = lambda dy, grads: right(dy * factor, grads)
        return y

    return function


def test_gradcheck_shows_a_wrong_gradient():
    with pytest.raises(AssertionError, match=r"input 0 at \(1,\): analytic -?\d\S* numeric -?\d\S*, error \S+ > 1e-08"):
        gb.gradcheck(planted(1.001), [np.array([0.1, 3.0])])
    assert gb.gradcheck(planted(1.0), [np.array([0.1, 3.0])]) <= 1e-8
    assert gb.gradcheck(planted(1.001), [np.array([0.1, 3.0])], tolerance=1e-2) > 1e-5
    with pytest.raises(AssertionError, match="analytic nan numeric"):
        gb.gradcheck(planted(np.nan), [np.ones(2)])
    with pytest.raises(AssertionError, match=r"input 1 at \(\): analytic 0 numeric"):
        gb.gradcheck(lambda a, b: a * b.detach(), (2.0, 3.0))


def test_gradcheck_takes_one_array_or_several():
    assert gb.gradcheck(gb.sin, np.ones((2, 2))) <= 1e-8
    assert gb.gradcheck(lambda a, b: a @ b, (np.ones((2, 2), np.float32), [[1, 2], [3, 4]])) <= 1e-8


@pytest.mark.parametrize(
    "read", [float, bool, gb.Tensor.numpy, gb.Tensor.item, np.asarray, lambda t: 1 if t > 0 else 2]
)
def test_a_value_is_not_to_be_had_while_a_plan_records(read):
    x = gb.tensor(1.0)
    plan = Plan(x.backend)
    with pytest.raises(RuntimeError, match=r"while a plan records: .* use gb\.where"), plan.record("model"):
        read(x * 2)
    assert plan.launches == [] and read(x) is not None
    with plan.record("model"):
        assert repr(x) == "tensor(shape=(), dtype=float64)"


# ---- a second library ----------------------------------------------------------------------------------------------

TORCH = {  # the operation there, and the rows of the table it is to agree on
    **{k: (k, [f"{k} {s}" for s in SHAPES]) for k in UNARY},
    **{k: (k, [f"{k} {s}" for s in BROADCASTS]) for k in BINARY if k != "power"},
    "power": ("pow", [f"power {s}" for s in BROADCASTS]),
    "matmul": ("matmul", [f"matmul {s}" for s in MATMULS]),
    # not hardsigmoid: its derivative in torch is 1/6 rounded to float32
    **{f"activation {k}": (f"nn.functional.{k}", [f"activation {k}"])
       for k in ("elu", "selu", "gelu", "silu", "mish", "softplus", "leaky_relu")},
    "activation hard_tanh": ("nn.functional.hardtanh", ["activation hard_tanh"]),
}  # fmt: skip


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_torch_agrees(rng):
    for name, keys in TORCH.values():
        other = operator.attrgetter(name)(torch)
        for key in keys:
            function, _, arrays = CASES[key]
            ours = [gb.tensor(a, requires_grad=True) for a in arrays]
            theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
            y, z = function(*ours), other(*theirs)
            dy = rng.normal(size=y.shape)
            y.backward(dy)
            z.backward(torch.tensor(dy))
            np.testing.assert_allclose(y.numpy(), z.detach().numpy(), rtol=1e-12, atol=1e-13, err_msg=key)
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-11, atol=1e-12, err_msg=key)


@pytest.mark.skipif(torch is None, reason="torch is not installed")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_torch_agrees_on_cross_entropy_weighted_by_class(reduction, rng):
    x, labels, weights = rng.normal(size=(50, 4)), rng.integers(0, 4, 50), rng.random(4)
    ours, theirs = gb.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    loss = gb.softmax_cross_entropy(ours, labels, reduction, weights[labels])
    other = torch.nn.functional.cross_entropy(
        theirs, torch.tensor(labels), torch.tensor(weights), reduction=reduction
    )  # fmt: skip
    loss.backward()
    other.backward()
    np.testing.assert_allclose(loss.item(), other.item(), rtol=1e-13)
    np.testing.assert_allclose(ours.grad.numpy(), theirs.grad.numpy(), rtol=1e-12, atol=1e-16)


def test_gradcheck_is_relative_to_the_gradient_and_shows_true_numbers():
    with pytest.raises(AssertionError, match=r"analytic 1\b.* numeric 2\b"):
        gb.gradcheck(lambda w: (w * w.detach()).sum(), np.ones(3))
    with pytest.raises(AssertionError, match="gradcheck"):
        gb.gradcheck(lambda w: (w * w.detach()).sum() * 1e-9, np.ones(3))
    assert gb.gradcheck(lambda w: (w * w).sum(), [1, 2, 3]) <= 1e-8  # a list of numbers is one array
    with pytest.raises(TypeError, match="gradcheck: the function returned float, expected a tensor"):
        gb.gradcheck(lambda w: 3.0, np.ones(3))


def test_operands_are_copies_so_that_a_buffer_may_be_used_again():
    w, a = gb.tensor([1.0, 2.0], requires_grad=True), np.array([3.0, 4.0])
    y = (w * a).sum()
    a[:] = 0
    y.backward()
    assert w.grad.numpy().tolist() == [3, 4]


def test_norms_of_no_rows_have_gradients_of_zero():
    x = gb.tensor(np.zeros((0, 3)), requires_grad=True)
    gain, bias = (gb.tensor(np.ones(3), requires_grad=True) for _ in range(2))
    gb.layer_norm(x, gain, bias).sum().backward()
    assert gain.grad.numpy().tolist() == bias.grad.numpy().tolist() == [0, 0, 0]
