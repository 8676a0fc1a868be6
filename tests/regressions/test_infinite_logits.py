"""A target or weight of 0 takes an infinite logit out of a loss; log_softmax and the losses are the log of softmax."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as hypothesis_arrays
from scipy import special

import gpubackprop as gb
from gpubackprop.shapes import cast

INF, NAN = np.inf, np.nan
LOGITS, SHARES, WEIGHTS = [-INF, -2.5, 0.0, 0.5, 8.0, INF, NAN], [0.0, 0.25, 1.0], [0.0, 0.5, 1.0]
DTYPE = st.sampled_from(["float32", "float64"])
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def arrays(elements, *shape):
    return hypothesis_arrays(float, shape, elements=st.sampled_from(elements))


@pytest.fixture(params=["cpu", "cpu:reference", "cuda"])
def device(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return request.param


def times(t, v):
    """t · v, 0 where t is, whatever v is."""
    return np.where(t == 0, 0, t * v)


def log_softmax(x):
    top = x.max(-1, keepdims=True)
    shifted = np.where(x == top, 0, x - top)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cross_entropy(x, t):
    lost = -times(t, log_softmax(x)).sum(-1)
    return np.where(np.isnan(x).any(-1), NAN, lost), t.sum(-1, keepdims=True) * np.exp(log_softmax(x)) - t


def bce(x, t):
    lost = times(t, np.logaddexp(0, -x)) + times(1 - t, np.logaddexp(0, x))
    return np.where(np.isnan(x), NAN, lost), special.expit(x) - t


def poisson(x, t):
    lost = np.exp(x) - np.where(t == 0, 0, np.where(x == INF, -INF, t * x)) + special.xlogy(t, t) - t
    return np.where(np.isnan(x), NAN, lost), np.exp(x) - t


ELEMENTWISE = {
    gb.bce_with_logits: (bce, 1 / 3), gb.bce_with_logits_sum: (bce, 1.0),
    gb.poisson: (poisson, 1 / 3), gb.poisson_sum: (poisson, 1.0),
}  # fmt: skip


def expected(operation, x, t):
    """The losses of the rows, and their gradients."""
    with np.errstate(all="ignore"):
        if operation is gb.softmax_cross_entropy:
            return cross_entropy(x, t)
        oracle, share = ELEMENTWISE[operation]
        lost, dx = oracle(x, t)
        return share * lost.sum(-1), share * dx


def assert_law(operation, x, t, w, dtype, device):
    """The sum of the losses and its gradient are the oracle's."""
    logits = gb.tensor(x, requires_grad=True, dtype=dtype, device=device)
    loss = operation(logits, gb.tensor(t, dtype=dtype, device=device), reduction="sum", weights=w)
    loss.backward()
    lost, dx = expected(operation, x, t)
    with np.errstate(invalid="ignore"):
        total, dx = (lost, dx) if w is None else (times(w, lost), times(w[:, None], dx))
        np.testing.assert_allclose(loss.numpy(), total.sum(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), dx, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("operation", [gb.softmax_cross_entropy, *ELEMENTWISE], ids=lambda f: f.__name__)
@given(x=arrays(LOGITS, 2, 3), t=arrays(SHARES, 2, 3), w=st.none() | arrays(WEIGHTS, 2), dtype=DTYPE)
@few
def test_zero_times_infinity_is_zero_in_every_loss(operation, device, x, t, w, dtype):
    assert_law(operation, x, t, w, dtype, device)
    assert_law(operation, x[:1], t[:1], w if w is None else w[:1], dtype, device)


def test_zero_times_infinity_in_rows_that_take_a_block_of_threads(device):
    x = np.full((6, 300), -INF)
    x[:, 0], x[2, 1], x[3, :2], x[4] = [0, 1, 2, INF, 0, NAN], INF, INF, -INF
    t = np.zeros((6, 300))
    t[:, 0] = [1, 1, 0, 1, 1, 1]
    for row in range(6):
        assert_law(gb.softmax_cross_entropy, x[row : row + 1], t[row : row + 1], None, "float32", device)


def test_losses_of_counts_that_weigh_nothing(device):
    """exp(200) overflows float32: 0 · inf is not 0."""
    x = gb.tensor(np.array([[1.0], [0.5]], "f"), requires_grad=True, device=device)
    t = gb.tensor(np.array([[200.0], [1.0]], "f"), device=device)
    loss = gb.poisson(x, t, weights=np.array([0.0, 1.0]))
    loss.backward()
    assert loss.item() == pytest.approx(np.exp(0.5) - 1.5, rel=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), [[0], [np.exp(0.5) - 1]], rtol=1e-6)


# ---- labels --------------------------------------------------------------------------------------------------------


@given(x=arrays(LOGITS, 2, 3), labels=st.tuples(st.integers(0, 2), st.integers(0, 2)), dtype=DTYPE)
@few
def test_labels_are_the_rows_they_stand_for(x, labels, dtype, device):
    for rows in (slice(0, 2), slice(0, 1)):
        logits = gb.tensor(x[rows], requires_grad=True, dtype=dtype, device=device)
        loss = gb.softmax_cross_entropy(logits, np.array(labels)[rows], reduction="sum")
        loss.backward()
        lost, dx = expected(gb.softmax_cross_entropy, x[rows], np.eye(3)[list(labels)][rows])
        np.testing.assert_allclose(loss.numpy(), lost.sum(), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(logits.grad.numpy(), dx, rtol=1e-6, atol=1e-6)


def test_an_infinite_logit_is_certain(device):
    for label, loss in ((0, 0.0), (1, INF)):
        assert gb.softmax_cross_entropy(gb.tensor([[INF, 0.0]], device=device), [label]).item() == loss


# ---- log_softmax, softmax, logsumexp -------------------------------------------------------------------------------


@given(x=arrays(LOGITS, 3), dtype=DTYPE)
@few
def test_log_softmax_is_the_log_of_softmax(x, dtype, device):
    values, gradients = {}, {}
    for operation in (gb.softmax, gb.log_softmax, gb.logsumexp):
        leaf = gb.tensor(x, requires_grad=True, dtype=dtype, device=device)
        y = operation(leaf)
        (y if operation is gb.logsumexp else y[0]).backward()
        values[operation], gradients[operation] = y.numpy(), leaf.grad.numpy()
    p = values[gb.softmax].astype(np.float64)
    with np.errstate(all="ignore"):
        logarithm, total = log_softmax(x), NAN if np.isnan(x).any() else np.logaddexp.reduce(x)
        np.testing.assert_allclose(np.log(p), logarithm, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(values[gb.log_softmax], logarithm, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(values[gb.logsumexp], total, rtol=1e-6)
    first = np.array([1, 0, 0])
    np.testing.assert_allclose(gradients[gb.logsumexp], p, rtol=1e-6)
    np.testing.assert_allclose(gradients[gb.log_softmax], first - p, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradients[gb.softmax], p[0] * (first - p), rtol=1e-6, atol=1e-6)


def test_log_softmax_at_infinities(device):
    def values(operation, x):
        return operation(gb.tensor(x, device=device)).numpy()

    np.testing.assert_array_equal(values(gb.log_softmax, [INF, 1.0]), [0, -INF])
    np.testing.assert_allclose(values(gb.log_softmax, [-INF, -INF]), np.log([0.5, 0.5]))
    assert values(gb.logsumexp, [INF, 1.0]) == INF and values(gb.logsumexp, [-INF, -INF]) == -INF
    assert np.isnan(values(gb.log_softmax, [NAN, 1.0])).all()


# ---- training ------------------------------------------------------------------------------------------------------


class Masked(gb.Layer):
    """Takes the last of three classes out."""

    def forward(self, x):
        return x + cast(gb.tensor(np.array([0, 0, -INF], "f"), device=x.device), x.dtype)


@pytest.mark.parametrize("precision", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_masked_class_trains_alike_with_labels_and_with_one_hot_rows(precision, weighted, device, rng):
    x, y = rng.normal(size=(22, 3)), rng.integers(0, 2, 22)
    w = np.linspace(0, 1, 22) if weighted else None
    runs = []
    for t in (y, np.eye(3)[y]):
        model = gb.Sequential(gb.Dense(3, 3), Masked(), dtype="float64" if precision == "float64" else "float32")
        trainer = gb.Trainer(model, "cross_entropy", gb.SGD(0.1), device=device, precision=precision, seed=0)
        history = trainer.fit(x, t, epochs=2, batch_size=8, sample_weight=w)
        runs.append((history["loss"], trainer.evaluate(x, t)["loss"], model.state_dict()["0.weight"]))
    close = 1e-2 if "16" in precision else 1e-6
    for a, b in zip(*runs, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=close, atol=close)


@pytest.mark.parametrize("loss", ["bce", "bce_sum", "poisson", "poisson_sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_output_at_minus_infinity_trains_against_zeros(loss, weighted, device, rng):
    x, t = rng.normal(size=(12, 3)), rng.integers(0, 2, (12, 3)).astype(float)
    t[:, 2] = 0
    trainer = gb.Trainer(gb.Sequential(gb.Dense(3, 3), Masked()), loss, gb.SGD(0.1), device=device, seed=0)
    history = trainer.fit(x, t, epochs=2, batch_size=5, sample_weight=np.arange(12.0) if weighted else None)
    assert np.isfinite(history["loss"]).all() and np.isfinite(trainer.evaluate(x, t)["loss"])
