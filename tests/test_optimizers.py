"""Optimizers: every rule against a plain NumPy loop of its paper's equations, and torch where there is one."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.optimizers import OPTIMIZERS

# ---- the papers' equations -----------------------------------------------------------------------------------------
#
# Each is a generator: it yields where it wants the gradient and where the weights are, and is sent the gradient.
# `decays` says whether weight decay applies to the array.


def sgd(p, o, decays):
    while True:
        p = p - o.lr * (yield p, p)


def momentum(p, o, decays):
    z = np.zeros_like(p)
    while True:
        z = o.momentum * z + (yield p, p)
        p = p - o.lr * z


def lookahead(p, o, decays):
    """Nesterov: v' = βv − α∇f(p + βv), p' = p + v'."""
    v = np.zeros_like(p)
    while True:
        v = o.momentum * v - o.lr * (yield p + o.momentum * v, p)
        p = p + v


def adam(p, o, decays):
    """Kingma & Ba, Algorithm 1; with weight decay Loshchilov & Hutter, Algorithm 2 (decoupled)."""
    m, v, t = np.zeros_like(p), np.zeros_like(p), 0
    decay = o.lr * getattr(o, "weight_decay", 0.0) if decays else 0.0
    while True:
        g = yield p, p
        t += 1
        m = o.beta1 * m + (1 - o.beta1) * g
        v = o.beta2 * v + (1 - o.beta2) * g * g
        m_hat, v_hat = m / (1 - o.beta1**t), v / (1 - o.beta2**t)
        p = p - decay * p - o.lr * m_hat / (np.sqrt(v_hat) + o.eps)


# Not every setting can be compared over 100 steps: Adam with beta2 = 0.9 swings around the minimum so that one rounding
# error grows by 10⁷.
RULES = {
    "sgd": (gb.SGD(0.05), sgd),
    "momentum": (gb.SGD(0.02, momentum=0.9), momentum),
    "lookahead": (gb.SGD(0.02, momentum=0.9, nesterov="lookahead"), lookahead),
    "adam": (gb.Adam(0.01), adam),
    "adam, other constants": (gb.Adam(0.02, beta1=0.8, beta2=0.99, eps=1e-2), adam),
    "adamw": (gb.AdamW(0.01, weight_decay=0.1), adam),
    "adamw without decay": (gb.AdamW(0.01, weight_decay=0.0), adam),
}


def plain_loop(rule, optimizer, weights, gradient, steps):
    """The weights after that many steps; gradient maps a dict of arrays to one of gradients."""
    loops = {k: rule(w, optimizer, w.ndim >= 2) for k, w in weights.items()}
    now = {k: next(loop) for k, loop in loops.items()}
    for _ in range(steps):
        g = gradient({k: at for k, (at, _) in now.items()})
        now = {k: loop.send(g[k]) for k, loop in loops.items()}
    return {k: p for k, (_, p) in now.items()}


# ---- a small net and a quadratic -----------------------------------------------------------------------------------


def net_gradient(x, t):
    """∂(mean over rows and outputs of (a − t)²) of x → tanh → linear, by hand."""

    def gradient(w):
        h = np.tanh(x @ w["0.weight"] + w["0.bias"])
        dy = 2 * (h @ w["1.weight"] + w["1.bias"] - t) / t.size
        dh = dy @ w["1.weight"].T * (1 - h * h)
        return {"0.weight": x.T @ dh, "0.bias": dh.sum(0), "1.weight": h.T @ dy, "1.bias": dy.sum(0)}

    return gradient


def net_case(rng):
    x, t = rng.normal(size=(12, 3)), rng.normal(size=(12, 2))
    model = gb.mlp([3, 5, 2], "tanh", dtype="float64").initialize(2)
    return model, x, t, net_gradient(x, t)


def quadratic_case(rng):
    """Least squares: ‖x w − t‖² / n, a quadratic of one matrix."""
    x, t = rng.normal(size=(12, 4)), rng.normal(size=(12, 1))
    model = gb.Sequential(gb.Dense(4, 1, bias=False), dtype="float64").initialize(2)
    return model, x, t, lambda w: {"0.weight": 2 / len(x) * x.T @ (x @ w["0.weight"] - t)}


CASES = {"net": net_case, "quadratic": quadratic_case}


@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
def test_weights_follow_the_papers_equations(name, case, steps, rng):
    optimizer, rule = RULES[name]
    model, x, t, gradient = CASES[case](rng)
    before = model.state_dict()
    gb.Trainer(model, "mse", optimizer, seed=0).fit(x, t, epochs=steps, batch_size=12, shuffle=False)
    expected = plain_loop(rule, optimizer, before, gradient, steps)
    for key, value in model.state_dict().items():
        assert np.abs(value - before[key]).max() > 1e-4  # something was trained
        np.testing.assert_allclose(value, expected[key], rtol=1e-12, atol=1e-12 * np.abs(expected[key]).max())


@pytest.mark.parametrize("split", [(1, 99), (50, 50)])
@pytest.mark.parametrize("name", RULES)
def test_a_second_fit_goes_on_with_the_moments(name, split, rng):
    optimizer, rule = RULES[name]
    model, x, t, gradient = net_case(rng)
    expected = plain_loop(rule, optimizer, model.state_dict(), gradient, 100)
    trainer = gb.Trainer(model, "mse", optimizer, seed=0)
    for epochs in split:
        trainer.fit(x, t, epochs=epochs, batch_size=12, shuffle=False)
    for key, value in model.state_dict().items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_float32_follows_float64_within_rounding(name, rng):
    optimizer, rule = RULES[name]
    _, x, t, gradient = net_case(rng)
    model = gb.mlp([3, 5, 2], "tanh").initialize(2)
    before = {k: a.astype(np.float64) for k, a in model.state_dict().items()}
    gb.Trainer(model, "mse", optimizer, seed=0).fit(x, t, epochs=100, batch_size=12, shuffle=False)
    expected = plain_loop(rule, optimizer, before, gradient, 100)
    for key, value in model.state_dict().items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-3, atol=1e-4)


# ---- laws ----------------------------------------------------------------------------------------------------------


def constant_gradient(optimizer, steps, g=3.0, dtype="float64"):
    """The weight after each step from 0, for a loss whose gradient is g everywhere."""
    model = gb.Sequential(gb.Dense(1, 1, bias=False, init=0.0), dtype=dtype)
    trainer, path = gb.Trainer(model, lambda output, target: (output * target).mean(), optimizer, seed=0), []
    trainer.fit([[1.0]], [g], epochs=steps, callbacks=[lambda t: path.append(model.state_dict()["0.weight"].item())])
    return np.array([0.0, *path])


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("nesterov", [None, "lookahead"])
def test_seed_26_momentum_of_a_constant_gradient_tends_to_g_over_one_minus_beta(beta, nesterov):
    path = constant_gradient(gb.SGD(0.1, momentum=beta, nesterov=nesterov), 400)
    velocity = -np.diff(path) / 0.1
    k = np.arange(1, 401)
    np.testing.assert_allclose(velocity, 3.0 * (1 - beta**k) / (1 - beta), rtol=1e-9)
    assert velocity[-1] == pytest.approx(3.0 / (1 - beta), rel=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_seed_26_momentum_zero_is_plain_sgd_bit_for_bit(dtype, rng):
    x, t = rng.normal(size=(40, 3)), rng.normal(size=(40, 2))

    def run(optimizer):
        model = gb.mlp([3, 5, 2], dtype=dtype)
        history = gb.Trainer(model, "mse", optimizer, seed=0).fit(x, t, epochs=5, batch_size=8)
        return [a.tobytes() for a in model.state_dict().values()], history["loss"]

    assert run(gb.SGD(0.1, momentum=0.0)) == run(gb.SGD(0.1))
    assert run(gb.SGD(0.1, momentum=1e-3)) != run(gb.SGD(0.1))


@pytest.mark.parametrize("g", [1e-3, -3.0, 1e6])
def test_adams_first_step_is_lr_whatever_the_gradients_size(g):
    path = constant_gradient(gb.Adam(0.01), 3, g)
    assert path[1] == pytest.approx(-0.01 * g / (abs(g) + 1e-8), rel=1e-12)
    np.testing.assert_allclose(np.diff(path), path[1], rtol=1e-9)


def test_adamw_decays_matrices_and_leaves_vectors():
    model = gb.Sequential(gb.Dense(3, 2, init=2.0, bias_init=2.0), gb.LayerNorm(2), dtype="float64")
    constant = gb.Trainer(model, lambda output, target: (output * 0).mean(), gb.AdamW(0.1, weight_decay=0.5), seed=0)
    constant.fit(np.ones((4, 3)), np.zeros(4), epochs=10)
    state = model.state_dict()
    np.testing.assert_allclose(state["0.weight"], 2 * (1 - 0.1 * 0.5) ** 10, rtol=1e-12)
    assert (state["0.bias"] == 2).all() and (state["1.gain"] == 1).all() and (state["1.bias"] == 0).all()


def test_adamw_without_decay_is_adam_bit_for_bit(rng):
    x, t = rng.normal(size=(40, 3)), rng.normal(size=(40, 2))
    runs = []
    for optimizer in (gb.Adam(0.01), gb.AdamW(0.01, weight_decay=0.0)):
        model = gb.mlp([3, 5, 2])
        gb.Trainer(model, "mse", optimizer, seed=0).fit(x, t, epochs=5, batch_size=8)
        runs.append([a.tobytes() for a in model.state_dict().values()])
    assert runs[0] == runs[1]


def test_statistics_are_not_stepped(rng):
    model = gb.Sequential(gb.Scaler(3).fit(rng.normal(3, 2, (9, 3))), gb.Dense(3, 1))
    before = model.state_dict()
    gb.Trainer(model, "mse", gb.AdamW(0.1), seed=0).fit(rng.normal(size=(9, 3)), np.ones(9), epochs=5)
    after = model.state_dict()
    for key in ("0.mean", "0.scale"):
        np.testing.assert_array_equal(after[key], before[key])
    assert (after["1.weight"] != before["1.weight"]).all()


def test_one_instance_serves_many_trainers(rng):
    x, t, optimizer = rng.normal(size=(20, 3)), rng.normal(size=20), gb.Adam(0.01)
    models = [gb.mlp([3, 1]) for _ in range(2)]
    for model in models:
        gb.Trainer(model, "mse", optimizer, seed=0).fit(x, t, epochs=5)
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adam, other constants", "adamw"])
def test_weights_follow_torch(name, rng):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    optimizer, _ = RULES[name]
    model, x, t, gradient = net_case(rng)
    weights = {k: torch.tensor(a, requires_grad=True) for k, a in model.state_dict().items()}
    matrices = [p for p in weights.values() if p.ndim >= 2]
    vectors = [p for p in weights.values() if p.ndim < 2]
    if isinstance(optimizer, gb.SGD):
        theirs = torch.optim.SGD(weights.values(), lr=optimizer.lr, momentum=optimizer.momentum)
    else:
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        betas = optimizer.beta1, optimizer.beta2
        decay = getattr(optimizer, "weight_decay", 0.0)
        theirs = torch.optim.AdamW(groups, lr=optimizer.lr, betas=betas, eps=optimizer.eps, weight_decay=decay)
    gb.Trainer(model, "mse", optimizer, seed=0).fit(x, t, epochs=100, batch_size=12, shuffle=False)
    for _ in range(100):
        for key, g in gradient({k: p.detach().numpy() for k, p in weights.items()}).items():
            weights[key].grad = torch.tensor(g)
        theirs.step()
    for key, value in model.state_dict().items():
        np.testing.assert_allclose(value, weights[key].detach().numpy(), rtol=1e-12, atol=1e-12)


# ---- hyperparameters -----------------------------------------------------------------------------------------------

NAN = float("nan")
BAD = {
    "lr zero": (lambda: gb.Adam(lr=0), "Adam: lr must be > 0, got 0"),
    "lr negative": (lambda: gb.SGD(lr=-0.1), "SGD: lr must be > 0, got -0.1"),
    "lr nan": (lambda: gb.Adam(lr=NAN), "Adam: lr must be > 0, got nan"),
    "lr infinite": (lambda: gb.Adam(lr=math.inf), "Adam: lr must be > 0, got inf"),
    "momentum one": (lambda: gb.SGD(momentum=1), r"SGD: momentum must be in \[0, 1\), got 1"),
    "momentum nan": (lambda: gb.SGD(momentum=NAN), r"SGD: momentum must be in \[0, 1\), got nan"),
    "beta1": (lambda: gb.Adam(beta1=1.0), r"Adam: beta1 must be in \[0, 1\), got 1"),
    "beta2": (lambda: gb.AdamW(beta2=-0.1), r"AdamW: beta2 must be in \[0, 1\), got -0\.1"),
    "eps": (lambda: gb.Adam(eps=0.0), "Adam: eps must be > 0, got 0"),
    "decay": (lambda: gb.AdamW(weight_decay=-1), "AdamW: weight_decay must be >= 0, got -1"),
    "nesterov": (lambda: gb.SGD(momentum=0.9, nesterov="tf"), "unknown nesterov 'tf'; choose from .*lookahead"),
    "nesterov without momentum": (lambda: gb.SGD(nesterov="lookahead"), "nesterov needs a momentum > 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_hyperparameters_are_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("lr", ["0.1", None, True, [0.1], 1j], ids=repr)
def test_a_learning_rate_that_is_no_number_is_refused(lr):
    with pytest.raises(TypeError, match="Adam: lr"):
        gb.Adam(lr=lr)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16], ids=lambda n: n.__name__)
def test_hyperparameters_may_be_numpy_numbers(number, rng):
    x, t = rng.normal(size=(20, 3)), rng.normal(size=20)

    def run(make):
        model = gb.mlp([3, 1])
        gb.Trainer(model, "mse", gb.SGD(make(0.25), momentum=make(0.5)), seed=0).fit(x, t, epochs=2)
        return [a.tobytes() for a in model.state_dict().values()]

    assert run(number) == run(float)
    with pytest.raises(ValueError, match="lr must be > 0"):
        gb.SGD(lr=number(-0.5))


def test_an_integer_of_numpy_is_a_number_too():
    assert constant_gradient(gb.SGD(lr=np.int64(1)), 2).tolist() == [0, -3, -6]


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_class_instead_of_an_instance(kind):
    with pytest.raises(TypeError, match=rf"optimizer is the class {kind.__name__}; make one: gb\.{kind.__name__}\(\)"):
        gb.Trainer(gb.mlp([2, 2]), optimizer=kind)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_name_means_the_defaults(name):
    assert gb.Trainer(gb.mlp([2, 2]), optimizer=name).optimizer == OPTIMIZERS[name]()


@pytest.mark.parametrize(
    "given, kind, message",
    [
        ("adm", ValueError, "unknown optimizer 'adm'; choose from adadelta, adagrad, adam, adamax, .*, sgd"),
        ("Adam", ValueError, "unknown optimizer 'Adam'; choose from adadelta, adagrad, adam, adamax, .*, sgd"),
        (0.1, TypeError, "optimizer is float; expected a name or one such as"),
        (None, TypeError, "optimizer is NoneType; expected a name or one such as"),
    ],
)
def test_an_unknown_optimizer(given, kind, message):
    with pytest.raises(kind, match=message):
        gb.Trainer(gb.mlp([2, 2]), optimizer=given)


def test_hyperparameters_cannot_be_changed_behind_a_recorded_plan():
    with pytest.raises(FrozenInstanceError):
        gb.Adam().lr = 0.1
