"""What the five seed documents state, row by row of the checklist, with its errata."""

from itertools import pairwise

import numpy as np
import pytest

import gpubackprop as gb


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(a):
    e = np.exp(a - a.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def leaf(a):
    return gb.tensor(np.asarray(a, np.float64), requires_grad=True)


def gradient(function, *arrays):
    """∂function/∂array for each array."""
    leaves = [leaf(a) for a in arrays]
    function(*leaves).backward()
    grads = [x.grad.numpy() for x in leaves]
    return grads[0] if len(grads) == 1 else grads


def parameters(layers):
    return [(layer.weight, layer.bias) for layer in layers]


# ---- rows 1 to 3: dense networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation, f", [("sigmoid", sigmoid), ("tanh", np.tanh), ("relu", lambda a: np.maximum(a, 0))]
)
def test_seed_01_the_column_form_is_the_row_form(activation, f, rng):
    """A = W Z + B on columns (W: out × in) is the transpose of x @ w + b on rows (erratum E11)."""
    model = gb.mlp([7, 5, 6, 3], activation, dtype="float64").initialize(1)
    x = rng.normal(size=(4, 7))
    z = x.T
    for w, b in parameters(model.layers):
        a = w.numpy().T @ z + b.numpy()[:, None]
        z = a if b.shape == (3,) else f(a)
    assert np.abs(model(x).numpy() - z.T).max() <= 1e-12


def test_seed_01_backward_in_column_form(rng):
    """Δ(r) = f′(A) ⊙ Wᵀ Δ(r+1), dW = Δ Zᵀ summed over the samples, dB the row sums of Δ (erratum E8)."""
    model = gb.mlp([4, 5, 3], "sigmoid", dtype="float64").initialize(2)
    x, labels = rng.normal(size=(6, 4)), rng.integers(0, 3, 6)
    gb.softmax_cross_entropy(model(x), labels, "sum").backward()
    (w1, b1), (w2, b2) = parameters(model.layers)
    z1 = sigmoid(w1.numpy().T @ x.T + b1.numpy()[:, None])
    y = softmax((w2.numpy().T @ z1 + b2.numpy()[:, None]).T).T
    delta2 = y - np.eye(3)[labels].T
    delta1 = z1 * (1 - z1) * (w2.numpy() @ delta2)
    for p, expected in ((w2, delta2 @ z1.T), (b2, delta2.sum(1)), (w1, delta1 @ x), (b1, delta1.sum(1))):
        assert np.abs(p.grad.numpy().T - expected).max() <= 1e-12


def test_seed_02_the_linear_model_has_gradient_x_times_y_minus_t(rng):
    """dL/dw_ki = x_i (y_k − t_k), to the last bit, for one sample: residual and outer product are one rounding each."""
    model = gb.Sequential(gb.Dense(5, 3), dtype="float64").initialize(3)
    x, label = rng.normal(size=(1, 5)), np.array([1])
    logits = model(x).retain_grad()
    gb.softmax_cross_entropy(logits, label).backward()
    ((w, b),) = parameters(model.layers)
    residual = logits.grad.numpy()
    np.testing.assert_allclose(residual, softmax(logits.numpy()) - np.eye(3)[label], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(w.grad.numpy(), x.T * residual)
    np.testing.assert_array_equal(b.grad.numpy(), residual[0])


def test_seed_02_multiclass_logistic_regression_is_convex_and_its_gradient_checks(rng):
    x, labels = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)

    def loss(w, b):
        return gb.softmax_cross_entropy(gb.tensor(x) @ w + b, labels)

    def value(w, b):
        return loss(gb.tensor(w), gb.tensor(b)).item()

    for _ in range(5):
        p, q = ((rng.normal(size=(4, 3)), rng.normal(size=3)) for _ in "pq")
        assert gb.gradcheck(loss, p) <= 1e-8
        assert value(*((a + b) / 2 for a, b in zip(p, q, strict=True))) < (value(*p) + value(*q)) / 2
        dw, db = gradient(loss, *p)  # the graph lies above its tangent
        assert value(*q) >= value(*p) + np.sum(dw * (q[0] - p[0])) + np.sum(db * (q[1] - p[1]))


def test_seed_03_a_bias_is_a_weight_on_the_constant_1(rng):
    x, w, b, t = (rng.normal(size=s) for s in ((6, 4), (4, 3), (3,), (6, 3)))
    one = np.ones((6, 1))
    with_bias = gradient(lambda w, b: gb.mse(gb.dense(gb.tensor(x), w, b, "tanh"), t), w, b)
    as_weight = gradient(
        lambda v: gb.mse(gb.dense(gb.tensor(np.hstack([x, one])), v, None, "tanh"), t), np.vstack([w, b])
    )
    assert np.abs(as_weight[:4] - with_bias[0]).max() <= 1e-12
    assert np.abs(as_weight[4] - with_bias[1]).max() <= 1e-12


# ---- rows 5 to 9: activations and losses ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "identity"])
def test_seed_05_activations(activation, rng):
    layer = gb.Activation(activation)
    x = rng.uniform(0.1, 4, (40,)) * rng.choice([-1, 1], 40)
    assert gb.gradcheck(layer, x, tolerance=1e-9) <= 1e-9
    extreme = leaf([-1e4, 1e4])
    y = layer(extreme)
    y.sum().backward()
    assert np.isfinite(y.numpy()).all() and np.isfinite(extreme.grad.numpy()).all()


def test_seed_05_the_largest_slope_of_the_sigmoid_is_a_quarter():
    x = np.linspace(-8, 8, 1601)
    slope = gradient(lambda x: gb.sigmoid(x).sum(), x)
    z = sigmoid(x)
    assert slope.max() == 0.25 and x[slope.argmax()] == 0
    np.testing.assert_allclose(slope, z * (1 - z), rtol=1e-13)


E9 = np.array([[0.3, -0.2, 0.8]]), np.array([[0.5, 0.2, 0.1]])


def test_seed_06_softmax_with_cross_entropy(rng):
    a, t = rng.normal(size=(5, 7)) * 4, rng.random((5, 7))
    np.testing.assert_allclose(gb.softmax(gb.tensor(a)).numpy().sum(1), 1, rtol=1e-15)
    shifted = [gradient(lambda a: gb.softmax_cross_entropy(a, t), a + c) for c in (0, 1e4, -1e4)]
    np.testing.assert_allclose(shifted[1], shifted[0], atol=1e-11)
    np.testing.assert_allclose(shifted[2], shifted[0], atol=1e-11)
    for target in ([1], [0], np.array([[0.5, 0.5, 0.0]])):
        x = leaf([[1e4, -1e4, 0]])
        loss = gb.softmax_cross_entropy(x, target)
        loss.backward()
        assert np.isfinite(loss.item()) and np.isfinite(x.grad.numpy()).all()


def test_seed_06_targets_need_not_sum_to_1():
    """The gradient is (Σt) y − t (erratum E9); y − t only for Σt = 1."""
    a, t = E9
    d = gradient(lambda a: gb.softmax_cross_entropy(a, t), a)
    np.testing.assert_allclose(d, [[-0.25424, -0.05094, 0.30518]], atol=5e-6)
    assert np.abs(d - [[-0.19280, -0.01368, 0.40648]]).max() > 0.03
    t = t / t.sum()
    np.testing.assert_allclose(gradient(lambda a: gb.softmax_cross_entropy(a, t), a), softmax(a) - t, atol=1e-15)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "mse", "half_mse", "sse", "bce_with_logits"])
def test_seed_07_duplicating_the_data_leaves_loss_and_gradient_unchanged(loss, rng):
    """L is a mean over the samples; as a sum it doubles."""
    x, w, t = rng.normal(size=(6, 4)), rng.normal(size=(4, 3)), rng.random((6, 3))

    def both(x, t, reduction):
        v = leaf(w)
        value = getattr(gb, loss)(gb.tensor(x) @ v, t, reduction)
        value.backward()
        return value.item(), v.grad.numpy()

    for reduction, factor in (("mean", 1), ("sum", 2)):
        once, twice = both(x, t, reduction), both(np.vstack([x, x]), np.vstack([t, t]), reduction)
        assert twice[0] == pytest.approx(factor * once[0], rel=1e-14)
        np.testing.assert_allclose(twice[1], factor * once[1], rtol=1e-12)
    assert both(x, t, "mean")[0] == pytest.approx(both(x, t, "sum")[0] / 6, rel=1e-14)


def test_seed_08_squared_errors_behind_a_sigmoid(rng):
    """δ_L = 2 (a − y) σ′(z) per sample; mse is the mean over samples and outputs, half_mse its half, sse the sum."""
    z, t = rng.normal(size=(5, 3)), rng.random((5, 3))
    a = sigmoid(z)
    delta = 2 * (a - t) * a * (1 - a)
    for loss, factor, per in (("sse", 1, 1), ("mse", 1, 3), ("half_mse", 0.5, 3)):
        value = getattr(gb, loss)
        np.testing.assert_allclose(
            gradient(lambda z, f=value: f(gb.sigmoid(z), t, "sum"), z), factor * delta / per, rtol=1e-13
        )
        np.testing.assert_allclose(
            gradient(lambda z, f=value: f(gb.sigmoid(z), t), z), factor * delta / per / 5, rtol=1e-13
        )


def test_seed_08_the_line_of_the_seed():
    """f = −0.11 x + 2.5 has MSE 0.160241; the seed's 0.08 is half of it (erratum E2). The best line has 0.018052."""
    x, y = gb.datasets.regression7()
    for m, b, mse, half in ((-0.11, 2.5, 0.160241, 0.080120), (0.335593220339, 0.804721549637, 0.018052, 0.009026)):
        line, target = gb.tensor(m * x + b), y.reshape(-1, 1)
        assert gb.mse(line, target).item() == pytest.approx(mse, abs=6e-7)
        assert gb.half_mse(line, target).item() == pytest.approx(half, abs=6e-7)


def test_seed_09_cross_entropy_learns_where_squared_errors_do_not():
    """The saturated neuron (w, b) = (2, 2), x = 1, t = 0: δ = a − y for cross-entropy, times σ′ for half-MSE."""
    x, t = np.array([[1.0]]), np.array([[0.0]])
    slopes = {}
    for key, loss in (("ce", gb.bce_with_logits), ("half_mse", lambda z, t: gb.half_mse(gb.sigmoid(z), t))):
        slopes[key], _ = gradient(lambda w, b, f=loss: f(gb.dense(gb.tensor(x), w, b), t), [[2.0]], [2.0])
    assert slopes["ce"].item() == pytest.approx(0.98201, abs=5e-6)
    assert slopes["half_mse"].item() == pytest.approx(0.01735, abs=5e-6)
    assert slopes["ce"].item() / slopes["half_mse"].item() == pytest.approx(56.6, abs=0.05)


def test_seed_09_the_gradient_at_the_logit_is_a_minus_y(rng):
    z, t = rng.normal(size=(6, 1)) * 3, rng.random((6, 1))
    np.testing.assert_allclose(
        gradient(lambda z: gb.bce_with_logits(z, t, "sum"), z), sigmoid(z) - t, rtol=1e-13, atol=1e-15
    )


# ---- rows 12, 13, 17: flow rules, chain rule, matrix form ----------------------------------------------------------

FLOW = [  # rule, z, ∂z/∂x and ∂z/∂y at (x, y)
    ("addition", lambda x, y: x + y, lambda x, y: (1, 1)),
    ("a constant", lambda x, y: 3.5 * x + 0 * y, lambda x, y: (3.5, 0)),
    ("multiplication", lambda x, y: x * y, lambda x, y: (y, x)),
    ("maximum", gb.maximum, lambda x, y: ((x > y) + (x == y) / 2, (y > x) + (x == y) / 2)),
    ("sigmoid", lambda x, y: gb.sigmoid(x) + 0 * y, lambda x, y: (sigmoid(x) * (1 - sigmoid(x)), 0)),
]


@pytest.mark.parametrize("rule, z, exact", FLOW)
@pytest.mark.parametrize("x, y", [(0.7, -1.2), (-0.3, 2.0), (1.5, 1.5)])
def test_seed_12_flow_rules(rule, z, exact, x, y):
    """At a tie of the maximum each branch gets half, where "0 otherwise" would give neither any (erratum E15)."""
    for dz in (1.0, -2.5):
        leaves = leaf(x), leaf(y)
        z(*leaves).backward(dz)
        for p, d in zip(leaves, exact(x, y), strict=True):
            assert p.grad.item() == pytest.approx(dz * d, rel=1e-15)


def test_seed_12_fan_out_adds_up():
    assert gradient(lambda x: x + x, 5.0) == 2
    assert gradient(lambda x: gb.concatenate([x.reshape(1)] * 9).sum(), 5.0) == 9
    y = leaf([2.0, 3.0])
    (gb.sigmoid(y[0]) + y[0] * y[1] + y.sum()).backward()
    s = sigmoid(2.0)
    np.testing.assert_allclose(y.grad.numpy(), [s * (1 - s) + 3 + 1, 2 + 1], rtol=1e-15)


def test_seed_13_chain_rule():
    assert gradient(lambda w: gb.sigmoid(gb.sigmoid(w)), 0.7) == pytest.approx(0.0496742538397, abs=5e-14)
    assert gradient(lambda w: gb.cos(w * w), 0.7) == pytest.approx(-0.6588762434, abs=5e-11)
    assert gradient(lambda w: gb.cos(w**2), 0.7) == pytest.approx(-2 * 0.7 * np.sin(0.7**2), rel=1e-15)  # erratum E13


def test_seed_13_two_paths_add_up():
    """o = K(p, q), p = g(y), q = h(z), y = z = f(w): ∂o/∂w = K_p g′(y) f′(w) + K_q h′(z) f′(w)."""
    w = 0.7
    f, g, h = np.sin(w), np.exp(np.sin(w)), np.sin(w) ** 3
    exact = h * np.exp(f) * np.cos(w) + g * 3 * f**2 * np.cos(w)  # K(p, q) = p q
    p_only = gradient(lambda w: gb.exp(gb.sin(w)) * gb.sin(w).detach() ** 3, w)
    q_only = gradient(lambda w: gb.exp(gb.sin(w)).detach() * gb.sin(w) ** 3, w)
    both = gradient(lambda w: (lambda y: gb.exp(y) * y**3)(gb.sin(w)), w)
    assert both == pytest.approx(exact, rel=1e-14)
    assert p_only + q_only == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("activation", sorted(gb.formulas.ACTIVATIONS))
def test_seed_17_the_fused_backward_is_f_prime_times_w_delta(activation, rng):
    """dense in one launch = its parts; Δ(1) = f′(A) ⊙ Wᵀ Δ(2)."""
    x, w, b, v, t = (rng.normal(size=s) for s in ((6, 4), (4, 5), (5,), (5, 3), (6, 3)))
    f = gb.Activation(activation)
    parts = {}

    def fused(x, w, b, v):
        return gb.sse(gb.dense(gb.dense(x, w, b, activation), v), t, "sum")

    def unfused(x, w, b, v):
        a = (x @ w + b).retain_grad()
        z = f(a).retain_grad()
        y = (z @ v).retain_grad()
        parts.update(a=a, z=z, y=y)
        return ((y - t) ** 2).sum()

    for one, other in zip(gradient(fused, x, w, b, v), gradient(unfused, x, w, b, v), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
    a, z, y = (parts[k] for k in "azy")
    slope = leaf(a.numpy())
    f(slope).sum().backward()
    np.testing.assert_allclose(z.grad.numpy(), y.grad.numpy() @ v.T, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(a.grad.numpy(), slope.grad.numpy() * z.grad.numpy(), rtol=1e-13, atol=1e-13)


# ---- rows 20, 21: descent ------------------------------------------------------------------------------------------


def descend(w, b, x, t, lr, batch, epochs):
    """Mini-batch gradient descent of a linear model with softmax and cross-entropy, by hand; (w, b, L per epoch)."""
    losses = []
    for _ in range(epochs):
        total = 0.0
        for start in range(0, len(x), batch):
            part, goal = x[start : start + batch], t[start : start + batch]
            y = softmax(part @ w + b)
            total -= np.sum(goal * np.log(y))
            residual = (y - goal) / len(part)
            w, b = w - lr * part.T @ residual, b - lr * residual.sum(0)
        losses.append(total / len(x))
    return w, b, losses


@pytest.mark.parametrize("batch", [1, 4, 5, 12, 100])
def test_seed_20_gd_sgd_and_mini_batches(batch, rng):
    """B = 1 is SGD and B = M is GD; the last batch of B = 5 has two rows and is averaged over them."""
    x, labels = rng.normal(size=(12, 4)), rng.integers(0, 3, 12)
    model = gb.Sequential(gb.Dense(4, 3), dtype="float64")
    trainer = gb.Trainer(model, optimizer=gb.SGD(lr=0.3), seed=0)
    start = model.state_dict()
    history = trainer.fit(x, labels, epochs=5, batch_size=batch, shuffle=False)
    w, b, losses = descend(start["0.weight"], start["0.bias"], x, np.eye(3)[labels], 0.3, min(batch, 12), 5)
    end = model.state_dict()
    assert np.abs(end["0.weight"] - w).max() <= 1e-12 and np.abs(end["0.bias"] - b).max() <= 1e-12
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-12)


def test_seed_20_the_batch_gradient_is_the_mean_of_the_samples_gradients(rng):
    model = gb.mlp([4, 6, 3], "tanh", dtype="float64").initialize(0)
    x, labels = rng.normal(size=(8, 4)), rng.integers(0, 3, 8)

    def gradients(rows):
        gb.softmax_cross_entropy(model(x[rows]), labels[rows]).backward()
        return [p.grad.numpy() for pair in parameters(model.layers) for p in pair]

    each = [gradients([i]) for i in range(8)]
    for whole, *parts in zip(gradients(list(range(8))), *each, strict=True):
        assert np.abs(whole - np.mean(parts, axis=0)).max() <= 1e-12


@pytest.mark.parametrize("n, batch", [(12, 4), (13, 4), (7, 1), (9, 9)])
def test_seed_20_each_sample_is_seen_once_per_epoch(n, batch):
    """Sample i alone moves weight i, by −1/B each time it is seen in a batch of B."""
    model = gb.Sequential(gb.Dense(n, 1, bias=False, init="zeros"), dtype="float64")
    trainer = gb.Trainer(model, loss=lambda y, t: (y * t).mean(), optimizer=gb.SGD(lr=1.0), metrics=[], seed=4)
    moves = []
    for _ in range(3):
        before = model.state_dict()["0.weight"]
        trainer.fit(np.eye(n), np.ones(n), epochs=1, batch_size=batch)
        moves.append((before - model.state_dict()["0.weight"]).ravel())
    last = n % batch
    for move in moves:
        expected = np.sort([1 / batch] * (n - last) + [1 / max(last, 1)] * last)
        np.testing.assert_allclose(np.sort(move), expected, rtol=1e-14)
    if last:  # who is in the short batch changes from epoch to epoch
        assert len({tuple(np.round(move, 9)) for move in moves}) > 1


def problem(rng, n=50):
    x = rng.normal(size=(n, 4))
    return x, (x @ rng.normal(size=(4, 3)) + 0.3 * rng.normal(size=(n, 3))).argmax(1)


def test_seed_21_stops_at_the_first_check_below_the_threshold(rng):
    """B-SGD, Steps 1 to 4: after each epoch the validation loss is compared with τ."""
    x, y = problem(rng)
    held_out = rng.normal(size=(20, 4)), rng.integers(0, 3, 20)  # noise: the loss goes up and down

    def fit(**how):
        trainer = gb.Trainer(gb.mlp([4, 8, 3], "tanh", dtype="float64"), optimizer=gb.SGD(lr=0.5), seed=0)
        return trainer.fit(x, y, epochs=12, batch_size=16, validation_data=held_out, **how)["val_loss"]

    losses = fit()
    assert len(losses) == 12
    for tau in [*losses, *np.linspace(min(losses) * 1.001, max(losses), 5)]:
        below = [i for i, loss in enumerate(losses) if loss < tau]
        assert fit(stop_below=tau) == (losses[: below[0] + 1] if below else losses)


def test_seed_21_without_validation_data_the_training_loss_is_checked(rng):
    x, y = problem(rng)

    def fit(**how):
        trainer = gb.Trainer(gb.mlp([4, 8, 3], "tanh", dtype="float64"), optimizer=gb.SGD(lr=0.05), seed=0)
        return trainer.fit(x, y, epochs=8, batch_size=16, **how)["loss"]

    losses = fit()
    assert losses == sorted(losses, reverse=True)
    assert fit(stop_below=losses[3]) == losses[:5]
    assert fit(stop_below=losses[3] * (1 + 1e-12)) == losses[:4]


def test_seed_21_the_loss_of_an_epoch_weighs_every_sample_alike(rng):
    """The ragged batch counts by its own rows: at a standstill the epoch's loss is that of the whole data."""
    x, y = problem(rng, 50)
    model = gb.mlp([4, 8, 3], dtype="float64")
    trainer = gb.Trainer(model, optimizer=gb.SGD(lr=1e-300), seed=0)
    whole = gb.softmax_cross_entropy(model(x), y).item()
    for batch in (16, 49, 50, 1):
        assert trainer.fit(x, y, epochs=1, batch_size=batch)["loss"][-1] == pytest.approx(whole, rel=1e-13)
    assert trainer.evaluate(x, y)["loss"] == pytest.approx(whole, rel=1e-13)


# ---- row 23: the seven points --------------------------------------------------------------------------------------


def test_seed_23_training_reaches_the_least_squares_line():
    x, y = gb.datasets.regression7()
    model = gb.Sequential(gb.Scaler(1).fit(x), gb.Dense(1, 1), dtype="float64")
    trainer = gb.Trainer(model, "mse", gb.SGD(lr=0.4), seed=0)
    trainer.fit(x, y, epochs=60, batch_size=7)
    b, b_plus_m = model.predict([[0.0], [1.0]]).ravel()
    assert b_plus_m - b == pytest.approx(0.335593220339, abs=1e-12)
    assert b == pytest.approx(0.804721549637, abs=1e-12)
    assert trainer.evaluate(x, y)["loss"] == pytest.approx(0.018051885161, abs=1e-12)


# ---- rows 33 to 35: counts, initial values, scaling ----------------------------------------------------------------


def test_seed_33_parameter_counts():
    model = gb.mlp([784, 15, 10], "sigmoid")
    assert model.parameter_count == 11_910 + 25 == 11_935
    assert "11,935 parameters" in str(model)
    weights = sum(np.prod(p.shape) for k, p in model.named_parameters().items() if k.endswith("weight"))
    assert (weights, 11_935 - weights) == (11_910, 25)
    assert "11,935 parameters" in str(gb.Trainer(model, seed=0).plan(32))
    # 224 × 224 × 3 × 100 is 15,052,800 (erratum E1: the seed's product is off by 30,000)
    assert gb.Dense(224 * 224 * 3, 100, bias=False).parameter_count == 15_052_800


INITIALIZERS = [
    ("glorot_uniform", 2 / (300 + 200)), ("glorot_normal", 2 / (300 + 200)), ("he_uniform", 2 / 300),
    ("he_normal", 2 / 300), ("lecun_uniform", 1 / 300), ("lecun_normal", 1 / 300),
]  # fmt: skip


@pytest.mark.parametrize("init, variance", INITIALIZERS)
def test_seed_34_the_sample_variance_is_the_initializers(init, variance):
    n = 300 * 200
    w = gb.Dense(300, 200, init=init).initialize(5).state_dict()["weight"].astype(np.float64)
    kurtosis = 3.0 if init.endswith("normal") else 1.8
    assert abs(w.mean()) < 4 * np.sqrt(variance / n)
    assert abs(w.var() / variance - 1) < 4 * np.sqrt((kurtosis - 1) / n)
    assert abs(np.mean(w**4) / w.var() ** 2 - kurtosis) < 0.15
    limit = np.sqrt(3 * variance)
    assert (np.abs(w).max() <= limit * (1 + 1e-6)) == init.endswith("uniform")
    assert len(np.unique(w)) > 0.9 * n or init.endswith("uniform")


@pytest.mark.parametrize("activation, variance", [
    ("relu", 2 / 300), ("gelu", 2 / 300), ("tanh", 2 / 500), ("sigmoid", 2 / 500), ("identity", 2 / 500),
    ("selu", 1 / 300),
])  # fmt: skip
def test_seed_34_the_default_fits_the_activation(activation, variance):
    state = gb.Dense(300, 200, activation).initialize(5).state_dict()
    assert abs(state["weight"].astype(np.float64).var() / variance - 1) < 4 * np.sqrt(2 / 60_000)
    assert not state["bias"].any()


@pytest.mark.parametrize("activation, init", [("tanh", "zeros"), ("sigmoid", "zeros"), ("tanh", 0.1), ("relu", 0.1)])
def test_seed_34_equal_units_stay_equal(activation, init, rng):
    """The symmetry of a constant start is never broken by gradients; a random start has none."""
    x, y = problem(rng)

    def hidden_after_training(init):
        model = gb.Sequential(gb.Dense(4, 6, activation, init=init), gb.Dense(6, 3, init=init), dtype="float64")
        gb.Trainer(model, optimizer=gb.Adam(lr=0.05), seed=0).fit(x, y, epochs=20, batch_size=16)
        return model.state_dict()["0.weight"]

    w = hidden_after_training(init)
    assert np.abs(w - w[:, :1]).max() <= 1e-12
    assert np.abs(hidden_after_training(None) - w).max() > 0.1


def test_seed_34_custom_starts():
    given = np.arange(6.0).reshape(2, 3)
    for init in (given, lambda shape, generator: given, given.tolist()):
        assert gb.Dense(2, 3, init=init).initialize(0).state_dict()["weight"].tolist() == given.tolist()
    drawn = gb.Dense(2, 3, init=lambda shape, g: g.normal(size=shape), bias_init=0.5).initialize(0).state_dict()
    assert drawn["weight"].std() > 0 and drawn["bias"].tolist() == [0.5] * 3
    with pytest.raises(ValueError, match="unknown initializer 'glorot'; choose from glorot_normal, glorot_uniform"):
        gb.Dense(2, 3, init="glorot").initialize(0)
    with pytest.raises(ValueError, match=r"initializer of weight: returned shape \(3, 2\), expected \(2, 3\)"):
        gb.Dense(2, 3, init=lambda shape, generator: given.T.copy()).initialize(0)


@pytest.mark.parametrize("inputs, units", [(60, 40), (40, 60)])
def test_seed_34_orthogonal_weights_keep_lengths(inputs, units, rng):
    """Into more units every length is kept, into fewer it is projected: of E|x w|² the share units / inputs is left."""
    w = gb.Dense(inputs, units, init="orthogonal").initialize(5).state_dict()["weight"].astype(np.float64)
    x = rng.normal(size=(500, inputs))
    lengths = np.linalg.norm(x @ w, axis=1) ** 2 / np.linalg.norm(x, axis=1) ** 2
    if units >= inputs:
        np.testing.assert_allclose(lengths, 1, atol=1e-5)
    else:  # each share is Beta(20, 10)
        assert abs(lengths.mean() - 2 / 3) < 4 * np.sqrt(2 / 9 / 31 / 500)


def skewed(rng, n=400):
    """Columns of very different scale, one of them constant, and what is to be learnt of them."""
    z = rng.normal(size=(n, 4))
    return z * [1e-3, 1, 50, 0] + [0, 10, -200, 7], (z[:, 0] + z[:, 1] * z[:, 2])[:, None]


def test_seed_35_the_scaler_in_the_model_is_saved_with_it(rng, tmp_path):
    x, y = skewed(rng)
    model = gb.Sequential(gb.Scaler(4).fit(x), gb.Dense(4, 16, "tanh"), gb.Dense(16, 1), dtype="float64")
    trainer = gb.Trainer(model, "mse", gb.Adam(lr=0.01), seed=0)
    trainer.fit(x, y, epochs=2, batch_size=50)
    gb.save_model(model, tmp_path / "m.safetensors")
    loaded = gb.load_model(tmp_path / "m.safetensors", device="cpu")
    for scaler in (model.layers[0], loaded.layers[0]):  # as fitted: training does not step it
        z = scaler(gb.tensor(x)).numpy()
        np.testing.assert_allclose(z.mean(0), 0, atol=1e-10)
        np.testing.assert_allclose(z.var(0), [1, 1, 1, 0], atol=1e-10)
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


def test_seed_35_the_scale_is_kept_in_each_layer(rng):
    """Unscaled inputs drown a plain start; a Scaler with LSUV, or with BatchNorm, keeps mean 0 and variance 1 about."""
    x, y = skewed(rng)

    def deep(*front, norm=False):
        hidden = [
            part
            for _ in range(8)
            for part in (gb.Dense(32, 32), *([gb.BatchNorm(32)] if norm else []), gb.Activation("tanh"))
        ]
        return gb.Sequential(*front, gb.Dense(4, 32), *hidden, gb.Dense(32, 1), dtype="float64")

    def variances(model, kind):
        stats = gb.layer_stats(model, x)
        return np.array([v for what, v in zip(stats["what"], stats["variance"], strict=True) if kind in what])

    plain = deep().initialize(0)
    assert variances(plain, "Dense")[0] > 100
    scaled = gb.lsuv(deep(gb.Scaler(4).fit(x)), x, seed=0)
    np.testing.assert_allclose(variances(scaled, "Dense"), 1, atol=0.01)
    normed = deep(gb.Scaler(4).fit(x), norm=True)
    gb.Trainer(normed, "mse", gb.SGD(lr=1e-3), seed=0).fit(x, y, epochs=20, batch_size=100)
    with gb.training():
        np.testing.assert_allclose(variances(normed, "BatchNorm"), 1, atol=0.01)
    np.testing.assert_allclose(variances(normed, "BatchNorm"), 1, atol=0.1)  # by its running statistics


# ---- row 11: two passes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [1, 15, 1260])
def test_seed_11_a_step_is_one_forward_and_one_backward_whatever_the_size(hidden):
    """10 to 10^6 parameters: a product a layer forward, two a layer backward (but for the first layer's dx)."""
    plan = gb.Trainer(gb.mlp([784, hidden, 10]), seed=0).plan(8)
    products = [launch for launch in plan.launches if launch.name == "gemm"]
    assert [launch.layer for launch in products] == ["0", "1", "1", "1", "0"]
    forward, backward = (sum(launch.flops for launch in part) for part in (products[:2], products[2:]))
    assert forward == 2 * 8 * (784 * hidden + hidden * 10) and forward < backward <= 2 * forward
    assert len(plan.launches) == len(gb.Trainer(gb.mlp([2, 1, 2]), seed=0).plan(3).launches)


# ---- rows 39 to 41: what is held out -------------------------------------------------------------------------------


def test_seed_39_overfitting(rng):
    """Eleven noisy points of a line: a polynomial of degree 10 meets them all, and is the worse between them."""

    def sample(n):
        x = np.sort(rng.uniform(-1, 1, n)) if n != 11 else np.linspace(-1, 1, 11)
        return x, 0.5 * x + 1 + 0.3 * rng.normal(size=n)

    (x, y), (x_new, y_new) = sample(11), sample(200)
    q, r = np.linalg.qr(np.vander(x, 11, increasing=True))  # polynomials that are orthonormal on the eleven points

    def fit(degree):
        basis = np.linalg.inv(r)[:, : degree + 1]
        new = np.vander(x_new, 11, increasing=True) @ basis
        model = gb.Sequential(gb.Dense(degree + 1, 1, bias=False), dtype="float64")
        trainer = gb.Trainer(model, "mse", gb.SGD(lr=5.0), seed=0)  # the Hessian is 2/11 of the identity
        return trainer.fit(q[:, : degree + 1], y, epochs=40, batch_size=11, validation_data=(new, y_new))

    line, curve = fit(1), fit(10)
    assert curve["loss"][-1] < 1e-24 and line["loss"][-1] > 0.01
    assert curve["val_loss"][-1] > 1.2 * line["val_loss"][-1]
    assert curve["gap"][-1] > 2 * abs(line["gap"][-1])
    for history in (line, curve):
        assert history["gap"] == [held - own for held, own in zip(history["val_loss"], history["loss"], strict=True)]


@pytest.mark.parametrize("train", [0.7, 0.8])
@pytest.mark.parametrize("stratify", [None, False])
def test_seed_40_train_validation_and_test(train, stratify):
    """70 or 80 % to train on, the rest halved; the test rows are the same whether or not there is validation."""
    x, y = gb.datasets.digits()
    n, rest = len(x), (1 - train) / 2
    row = np.arange(n)
    *_, y_train, y_val, y_test, own, val, test = gb.split(x, y, row, test=rest, validation=rest, stratify=stratify)
    assert len(test) == len(val) == round(rest * n) and len(own) == n - 2 * len(test)
    assert sorted([*own, *val, *test]) == list(row)
    for labels, part in ((y_train, own), (y_val, val), (y_test, test)):
        np.testing.assert_array_equal(labels, y[part])
        if stratify is None:
            assert (np.abs(np.bincount(labels) - np.bincount(y) * len(part) / n) < 2).all()
    np.testing.assert_array_equal(gb.split(x, y, row, test=rest, stratify=stratify)[-1], test)
    assert not np.array_equal(gb.split(x, y, row, test=rest, validation=rest, seed=1)[-1], test)


@pytest.mark.parametrize("k", [3, 10])
def test_seed_41_k_fold(k):
    """Every row validates once, and is trained on in all other folds; each fold has the classes of the whole."""
    x, y = gb.datasets.digits()
    validated, trained = np.zeros(len(x), int), np.zeros(len(x), int)
    for train, test in gb.KFold(k).split(x, y):
        validated[test] += 1
        trained[train] += 1
        assert len(test) in (len(x) // k, len(x) // k + 1)
        assert (np.abs(np.bincount(y[test]) - np.bincount(y) / k) < 1).all()
    assert (validated == 1).all() and (trained == k - 1).all()


def test_seed_41_cross_validation():
    """Ten folds in turn: each network is measured on rows it has not seen."""
    x, y = (a[:300] for a in gb.datasets.digits())
    accuracies = []
    for train, test in gb.KFold(10).split(x, y):
        trainer = gb.Trainer(gb.mlp([64, 32, 10]), optimizer=gb.Adam(lr=0.01), seed=0)
        trainer.fit(x[train], y[train], epochs=15, batch_size=30)
        accuracies.append(trainer.evaluate(x[test], y[test])["accuracy"])
    assert np.mean(accuracies) > 0.85 and min(accuracies) > 0.6


# ---- row 32: guessing ----------------------------------------------------------------------------------------------


def test_seed_32_guesses_it_takes_to_search_ten_segments_of_each_weight():
    two, three = (gb.Sequential(gb.Dense(n, 1, bias=False)) for n in (2, 3))
    assert (gb.grid_points(two), gb.grid_points(two, 100), gb.grid_points(three)) == (100, 10_000, 1_000)
    handwriting = gb.mlp([784, 15, 10])
    assert handwriting.parameter_count == 11_910 + 25
    assert gb.grid_points(handwriting) == 10**11_935  # a 1 and 11,935 zeros
    trainer = gb.Trainer(handwriting, seed=0)
    with pytest.raises(ValueError, match=r"10\^11,935 guesses, a number of 11,936 digits, are more than 1,000,000"):
        gb.grid_search(trainer, np.zeros((1, 784)), [0])


def test_seed_32_a_grid_and_random_guesses_find_what_a_gradient_finds_sooner(rng):
    x, w = rng.normal(size=(50, 2)), np.array([[0.35], [-0.75]])  # the middle of a segment of width 0.1 and 0.5
    model = gb.Sequential(gb.Dense(2, 1, bias=False), dtype="float64")
    trainer = gb.Trainer(model, "mse", gb.LBFGS(), seed=0)
    grid = gb.grid_search(trainer, x, x @ w, segments=20)
    assert grid.evaluations == 400 and grid.best == pytest.approx(0, abs=1e-25)
    np.testing.assert_allclose(model.state_dict()["0.weight"], w, atol=1e-12)
    assert gb.random_search(trainer, x, x @ w, guesses=3).best > trainer.evaluate(x, x @ w)["loss"]  # which is kept
    guessed = gb.random_search(gb.Trainer(model.initialize(3), "mse", seed=0), x, x @ w, guesses=200, seed=1)
    assert guessed.evaluations == 200 and 1e-6 < guessed.best < np.median(guessed.losses) / 20
    assert trainer.evaluate(x, x @ w)["loss"] == guessed.best
    assert trainer.fit(x, x @ w, epochs=10)["loss"][-1] < 1e-12 < guessed.best


# ---- rows 18, 19, 36, 37: seeing gradients -------------------------------------------------------------------------


def test_seed_18_a_weights_gradient_is_tail_activation_times_head_delta(rng):
    """For one sample a single product; for a batch their sum: to 1e-12 the stored gradient, for every weight."""
    x, labels = rng.normal(size=(6, 4)), rng.integers(0, 3, 6)
    trainer = gb.Trainer(gb.mlp([4, 5, 3], "sigmoid", dtype="float64"), seed=0, device="cpu")
    w, v = (layer.weight.numpy() for layer in trainer.model.layers)
    for rows in (1, 6):
        z = sigmoid(x[:rows] @ w)
        delta = (softmax(z @ v) - np.eye(3)[labels[:rows]]) / rows
        deltas, tails = (z * (1 - z) * (delta @ v.T), delta), (x[:rows], z)
        for layer, i, j in ((0, 2, 4), (0, 3, 0), (1, 0, 0), (1, 4, 2)):
            told = gb.explain_weight(trainer, x[:rows], labels[:rows], layer, i, j)
            np.testing.assert_allclose(told.tail, tails[layer][:, i], rtol=1e-12)
            np.testing.assert_allclose(told.head, deltas[layer][:, j], rtol=1e-12)
            assert abs(told.products.sum() - told.gradient) <= 1e-12
            assert told.gradient == pytest.approx((told.tail * told.head).sum(), abs=1e-12)


def test_seed_19_what_happens_to_the_cost_if_z_is_perturbed(rng):
    """∂C/∂z_j = δ_j, against central differences of C over a perturbed pre-activation."""
    x, t = rng.normal(size=(5, 4)), rng.random((5, 2))
    model = gb.Sequential(gb.Dense(4, 3, "sigmoid"), gb.Dense(3, 2, "sigmoid"), dtype="float64")
    trainer = gb.Trainer(model, "mse", seed=0, device="cpu")
    (w, b), (v, c) = ((p.numpy(), q.numpy()) for p, q in parameters(model.layers))
    first = x @ w + b
    rest = {0: lambda z: gb.mse(gb.dense(gb.sigmoid(z), v, c, "sigmoid"), t), 1: lambda z: gb.mse(gb.sigmoid(z), t)}
    for layer, z in enumerate((first, sigmoid(first) @ v + c)):
        delta = gb.sensitivity(trainer, x, t, layer)
        for at in np.ndindex(z.shape):
            low, high = z.copy(), z.copy()
            low[at] -= 1e-5
            high[at] += 1e-5
            numeric = (rest[layer](gb.tensor(high)).item() - rest[layer](gb.tensor(low)).item()) / 2e-5
            assert delta[at] == pytest.approx(numeric, abs=1e-10)


@pytest.mark.parametrize("units, verdict", [(1, "healthy"), (3, "healthy"), (10, "vanishing"), (20, "vanishing")])
def test_seed_36_a_chain_of_sigmoid_units_shrinks_the_gradient_by_a_quarter_each(units, verdict):
    """With w = 1 the gradient before L units is at most 0.25^L of that behind them: 9.54e-7 for ten."""
    model = gb.Sequential(*(gb.Dense(1, 1, "sigmoid", init="ones") for _ in range(units)), dtype="float64")
    x = np.linspace(-2, 2, 30).reshape(-1, 1)
    report = gb.gradient_report(gb.Trainer(model, "mse", seed=0, device="cpu"), x, np.ones((30, 1)))
    shares, bounds = np.array([row.share for row in report.layers]), 0.25 ** np.arange(units, 0, -1)
    assert (shares <= bounds).all() and (shares > 0).all()
    assert bounds[0] == pytest.approx(9.54e-7, abs=5e-10) or units != 10
    assert report.verdict == report[0].verdict == verdict and report[units - 1].verdict == "healthy"
    assert f"{verdict} (layers 0, 1, " in str(report) or verdict == "healthy"


def test_seed_36_weights_that_are_too_large_explode(rng):
    """Linear units with w = 3: the gradient behind L units is exactly 3^(L-1) times that at the last."""
    model = gb.Sequential(*(gb.Dense(1, 1, init=3.0) for _ in range(10)), dtype="float64")
    report = gb.gradient_report(
        gb.Trainer(model, "mse", seed=0, device="cpu"), rng.normal(size=(30, 1)), rng.random((30, 1))
    )
    np.testing.assert_allclose([row.share for row in report.layers], 3.0 ** np.arange(9, -1, -1), rtol=1e-12)
    assert [row.verdict for row in report.layers] == ["exploding"] * 3 + ["healthy"] * 7
    assert report.verdict == "exploding"


def test_seed_37_a_planted_dead_unit_is_named():
    x, y = (a[:600] for a in gb.datasets.digits())
    model = gb.mlp([64, 32, 32, 10], "relu")
    trainer = gb.Trainer(model, seed=0, device="cpu")
    before = gb.gradient_report(trainer, x, y)
    alive = next(j for j in range(5, 32) if j not in before[1].dead)
    state = model.state_dict()
    state["1.bias"][alive] = -1e3
    model.load_state_dict(state)
    report = gb.gradient_report(trainer, x, y)
    assert report[1].dead == tuple(sorted({*before[1].dead, alive})) and report[0].dead == before[0].dead
    note = next(line for line in str(report).splitlines() if line.startswith("layer 1:"))
    assert f"{len(report[1].dead)} of 32 units are dead" in note
    assert str(alive) in note.split("row: ")[1].split(", ")


def test_seed_37_no_false_alarm_on_a_healthy_network():
    """A unit counts as dead only if it is off for every row: those of relu that are, found by hand, and no others."""
    x, y = (a[:600] for a in gb.datasets.digits())
    for seed in range(4):
        trainer = gb.Trainer(gb.mlp([64, 32, 32, 10], "relu"), seed=seed, device="cpu")
        trainer.fit(x, y, epochs=5, batch_size=64)
        report, z = gb.gradient_report(trainer, x, y), x
        for layer in (0, 1):
            weight, bias = parameters(trainer.model.layers)[layer]
            z = np.maximum(z @ weight.numpy() + bias.numpy(), 0)
            assert report[layer].dead == tuple(np.flatnonzero((z == 0).all(0)))
        assert report.verdict == "healthy"


# ---- rows 24, 46, 47: curvature ------------------------------------------------------------------------------------


def line(lr=0.05):
    """The 7 points' line from (0, 0), trained by plain gradient descent on the MSE."""
    model = gb.Sequential(gb.Dense(1, 1, init="zeros"), dtype="float64")
    return gb.Trainer(model, "mse", gb.SGD(lr=lr), metrics=[], seed=0, device="cpu")


def descended(trainer, steps):
    """(m, b) after so many steps more, each over all 7 points: one epoch of the points again and again."""
    x, y = gb.datasets.regression7()
    trainer.fit(np.tile(x, (steps, 1)), np.tile(y, steps), epochs=1, batch_size=7, shuffle=False)
    return np.concatenate([p.numpy().ravel() for p in trainer.model.named_parameters().values()])


def hessian(function, inputs):
    """The matrix of second derivatives, column by column."""
    sizes = np.cumsum([a.size for a in inputs])
    columns = []
    for unit in np.eye(sizes[-1]):
        v = [part.reshape(a.shape) for part, a in zip(np.split(unit, sizes[:-1]), inputs, strict=True)]
        product = gb.hessian_vector_product(function, tuple(inputs), tuple(v))
        columns.append(np.concatenate([p.ravel() for p in product]))
    return np.stack(columns, 1)


BEST_LINE = np.array([0.335593220339, 0.804721549637])


def test_seed_24_the_curvature_of_the_line():
    h = hessian(*gb.loss_of_weights(line(), *gb.datasets.regression7()))
    low, high = np.linalg.eigvalsh(h)
    assert high == pytest.approx(29.176128, abs=5e-7) and low == pytest.approx(0.0924435, abs=5e-8)
    assert 2 / high == pytest.approx(0.0685492, abs=5e-8)


def test_seed_24_gradient_descent_takes_2896_steps():
    """At lr 0.05 from 0 until both m and b are within 1e-6 of the best line's."""
    trainer = line()
    assert np.abs(descended(trainer, 2895) - BEST_LINE).max() > 1e-6
    assert np.abs(descended(trainer, 1) - BEST_LINE).max() <= 1e-6


@pytest.mark.parametrize("lr, converges", [(0.0685, True), (0.0686, False)])
def test_seed_24_too_high_a_rate_climbs(lr, converges):
    """Along the Hessian's eigenvector the error is multiplied by 1 − lr λ at each step: the limit is 2 / 29.176128."""
    values, vectors = np.linalg.eigh(hessian(*gb.loss_of_weights(line(), *gb.datasets.regression7())))
    errors = vectors.T @ (descended(line(lr), 1500) - BEST_LINE)
    expected = (1 - lr * values) ** 1500 * (vectors.T @ -BEST_LINE)
    np.testing.assert_allclose(errors, expected, rtol=1e-8, atol=1e-11)
    assert (abs(1 - lr * values[1]) < 1) == converges == (np.abs(errors[1]) < np.abs(vectors[:, 1] @ BEST_LINE))


def test_seed_46_convex_and_saddle():
    """Least squares curves upwards wherever one stands; x² − y² has a direction of each sign."""
    x, y = gb.datasets.regression7()
    function, _ = gb.loss_of_weights(line(), x, y)
    for m, b in ((0.0, 0.0), (-3.0, 7.0), tuple(BEST_LINE)):
        values = np.linalg.eigvalsh(hessian(function, (np.array([[m]]), np.array([b]))))
        np.testing.assert_allclose(values, [0.0924435, 29.176128], rtol=1e-6)
    saddle = hessian(lambda x, y: (x**2 - y**2).sum(), (np.zeros(1), np.zeros(1)))
    np.testing.assert_allclose(saddle, np.diag([2.0, -2.0]), atol=1e-12)
    up, down = (gb.hessian_vector_product(lambda p: p[0] ** 2 - p[1] ** 2, np.zeros(2), v) @ v for v in np.eye(2))
    assert up > 0 > down


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def test_seed_47_the_gradient_of_rosenbrocks_function_is_exact(rng):
    """∂f/∂x_i = 200 (x_i − x_{i−1}²) − 400 x_i (x_{i+1} − x_i²) − 2 (1 − x_i); of integers to the last bit."""

    def exact(x):
        g, valley = np.zeros_like(x), x[1:] - x[:-1] ** 2
        g[1:] += 200 * valley
        g[:-1] -= 400 * x[:-1] * valley + 2 * (1 - x[:-1])
        return g

    f = gb.value_and_grad(rosenbrock)
    for x in ([1.0, 1.0], [0.0, 0.0], [-1.0, 2.0], [3.0, -2.0, 5.0, 1.0]):
        value, gradient = f(x)
        np.testing.assert_array_equal(gradient, exact(np.array(x)))
        assert value == sum(100 * (b - a * a) ** 2 + (1 - a) ** 2 for a, b in pairwise(x))
    assert f([1.0, 1.0])[0] == 0
    value, gradient = f([-1.2, 1.0])
    assert value == pytest.approx(24.2, rel=1e-14)
    np.testing.assert_allclose(gradient, [-215.6, -88.0], rtol=1e-14)
    x = rng.normal(size=50)
    np.testing.assert_allclose(f(x)[1], exact(x), rtol=1e-12, atol=1e-12)
    h = hessian(rosenbrock, (np.ones(2),))
    np.testing.assert_allclose(h, [[802, -400], [-400, 200]], rtol=1e-8)


# ---- rows 43 and 44: noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_seed_43_dropout_has_its_rate_and_one_mask_on_every_device(rate, cuda):
    x, masks = np.ones((300, 70), "f"), []
    for device in ("cpu:reference", "cpu", "cuda"):
        layer = gb.Sequential(gb.Dropout(rate))
        with gb.training(seed=3, step=5):
            y = layer(gb.tensor(x, device=device)).numpy()
        assert set(np.unique(y)) == {0, np.float32(1) * np.float32(1 / (1 - rate))}  # inverted: the mean stays
        masks.append(y == 0)
        np.testing.assert_array_equal(layer(gb.tensor(x, device=device)).numpy(), x)
    assert (masks[0] == masks[1]).all() and (masks[0] == masks[2]).all()
    assert abs(masks[0].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / x.size)


def test_seed_44_input_noise_is_weight_decay_of_a_linear_model(rng):
    """E loss = MSE + sigma² ‖w‖², and so in the gradient 2 sigma² w: means over steps within four standard errors."""
    sigma, steps, x, t = 0.7, 400, rng.normal(size=(50, 6)), rng.normal(size=(50, 1))
    model = gb.Sequential(gb.InputNoise(sigma), gb.Dense(6, 1), dtype="float64").initialize(1)
    w = model.layers[1].weight
    found = []
    for step in range(steps):
        with gb.training(seed=2, step=step):
            loss = gb.mse(model(x), t)
        loss.backward()
        found.append([loss.item(), *w.grad.numpy()[:, 0]])
    clean = gb.mse(model(x), t)
    clean.backward()
    weights = w.numpy()[:, 0]
    expected = [clean.item() + sigma**2 * weights @ weights, *(w.grad.numpy()[:, 0] + 2 * sigma**2 * weights)]
    error = np.std(found, 0) / np.sqrt(steps)
    assert (np.abs(np.mean(found, 0) - expected) < 4 * error).all()
    assert (error < np.abs(np.array(expected) - [clean.item(), *w.grad.numpy()[:, 0]]).max() / 8).all()  # and can tell


# ---- row 45: hyperparameters ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_seed_45_a_grid_search_works_unchanged():
    """GridSearchCV over a pipeline finds for our estimator, fold by fold, what it finds for scikit-learn's own."""
    from sklearn import datasets, model_selection, neural_network, pipeline, preprocessing

    from gpubackprop.sklearn import MLPClassifier

    x, y = datasets.load_iris(return_X_y=True)
    grid = {"mlp__hidden_layer_sizes": [(3,), (12,)], "mlp__learning_rate_init": [1e-3, 1e-1]}
    found = []
    for kind in (MLPClassifier, neural_network.MLPClassifier):
        steps = [("scale", preprocessing.StandardScaler()), ("mlp", kind(max_iter=15, batch_size=30, random_state=0))]
        found.append(model_selection.GridSearchCV(pipeline.Pipeline(steps), grid, cv=3).fit(x, y))
    ours, theirs = found
    assert ours.best_params_ == theirs.best_params_
    for fold in range(3):
        np.testing.assert_array_equal(*(s.cv_results_[f"split{fold}_test_score"] for s in found))
    assert isinstance(ours.best_estimator_[-1].model_, gb.Sequential) and ours.score(x, y) > 0.95


def test_guessing_leaves_frozen_weights_alone(rng):
    model = gb.mlp([3, 4, 1], dtype="float64").initialize(0)
    model.layers[0].weight.requires_grad = False
    before = model.state_dict()
    gb.random_search(gb.Trainer(model, "mse", seed=0), rng.normal(size=(9, 3)), np.ones(9), guesses=5)
    after = model.state_dict()
    assert (after["0.weight"] == before["0.weight"]).all() and (after["1.weight"] != before["1.weight"]).all()
    assert gb.grid_points(model, 2) == 2 ** (4 + 4 + 1)
