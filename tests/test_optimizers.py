"""Optimizers: every rule against a plain NumPy loop of its paper's equations, and torch where there is one."""

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.optimizers import OPTIMIZERS

# ---- the papers' equations -----------------------------------------------------------------------------------------
#
# Each is a generator: it yields where it wants the gradient and where the weights are, and is sent the gradient.
# `decays` says whether weight decay applies to the array.


def coupled(p, o, decays):
    """What weight decay adds to the gradient."""
    return o.weight_decay * p if decays else 0.0


def sgd(p, o, decays):
    while True:
        g = (yield p, p) + coupled(p, o, decays)
        p = p - o.lr * g


def momentum(p, o, decays):
    z = np.zeros_like(p)
    while True:
        z = o.momentum * z + (yield p, p) + coupled(p, o, decays)
        p = p - o.lr * z


def lookahead(p, o, decays):
    """Nesterov: v' = βv − α∇f(p + βv), p' = p + v'."""
    v = np.zeros_like(p)
    while True:
        v = o.momentum * v - o.lr * (yield p + o.momentum * v, p)
        p = p + v


def nesterov_torch(p, o, decays):
    z = np.zeros_like(p)
    while True:
        g = (yield p, p) + coupled(p, o, decays)
        z = o.momentum * z + g
        p = p - o.lr * (g + o.momentum * z)


def nesterov_seed(p, o, decays):
    """z' = βz + ∇f(p − βz), p' = p − αz': the notes' look-ahead, without the learning rate."""
    z = np.zeros_like(p)
    while True:
        z = o.momentum * z + (yield p - o.momentum * z, p)
        p = p - o.lr * z


def root(v, o):
    """√v + eps, or √(v + eps)."""
    return np.sqrt(v) + o.eps if o.eps_at == "outside" else np.sqrt(v + o.eps)


def adagrad(p, o, decays):
    v = np.zeros_like(p)
    while True:
        g = (yield p, p) + coupled(p, o, decays)
        v = v + g * g
        p = p - o.lr * g / root(v, o)


def adadelta(p, o, decays):
    """Zeiler, Algorithm 1; lr scales the step."""
    v, u = np.zeros_like(p), np.zeros_like(p)
    while True:
        g = (yield p, p) + coupled(p, o, decays)
        v = o.rho * v + (1 - o.rho) * g * g
        step = np.sqrt(u + o.eps) / np.sqrt(v + o.eps) * g
        u = o.rho * u + (1 - o.rho) * step * step
        p = p - o.lr * step


def rmsprop(p, o, decays):
    v, m, z = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    while True:
        g = (yield p, p) + coupled(p, o, decays)
        v = o.rho * v + (1 - o.rho) * g * g
        m = o.rho * m + (1 - o.rho) * g
        z = o.momentum * z + g / root(v - m * m if o.centered else v, o)
        p = p - o.lr * z


def adam(p, o, decays):
    """Kingma & Ba, Algorithm 1; with AdamW's weight decay Loshchilov & Hutter, Algorithm 2 (decoupled)."""
    m, v, t = np.zeros_like(p), np.zeros_like(p), 0
    decoupled = isinstance(o, gb.AdamW)
    while True:
        g = (yield p, p) + (0 if decoupled else coupled(p, o, decays))
        t += 1
        m = o.beta1 * m + (1 - o.beta1) * g
        v = o.beta2 * v + (1 - o.beta2) * g * g
        m_hat, v_hat = m / (1 - o.beta1**t), v / (1 - o.beta2**t)
        eps = o.eps if o.eps_at == "outside" else o.eps / math.sqrt(1 - o.beta2**t)
        p = p - o.lr * decoupled * coupled(p, o, decays) - o.lr * m_hat / (np.sqrt(v_hat) + eps)


def nadam(p, o, decays):
    """Dozat, with PyTorch's schedule of the momentum."""
    m, v, t, product = np.zeros_like(p), np.zeros_like(p), 0, 1.0
    while True:
        g = (yield p, p) + coupled(p, o, decays)
        t += 1
        now, ahead = (o.beta1 * (1 - 0.5 * 0.96 ** (k * o.momentum_decay)) for k in (t, t + 1))
        product *= now
        m = o.beta1 * m + (1 - o.beta1) * g
        v = o.beta2 * v + (1 - o.beta2) * g * g
        m_hat = ahead * m / (1 - product * ahead) + (1 - now) * g / (1 - product)
        p = p - o.lr * m_hat / (np.sqrt(v / (1 - o.beta2**t)) + o.eps)


def adamax(p, o, decays):
    """Kingma & Ba, Algorithm 2, with eps beside |g|."""
    m, u, t = np.zeros_like(p), np.zeros_like(p), 0
    while True:
        g = (yield p, p) + coupled(p, o, decays)
        t += 1
        m = o.beta1 * m + (1 - o.beta1) * g
        u = np.maximum(o.beta2 * u, np.abs(g) + o.eps)
        p = p - o.lr / (1 - o.beta1**t) * m / u


def radam(p, o, decays):
    """Liu et al., Algorithm 2."""
    m, v, t = np.zeros_like(p), np.zeros_like(p), 0
    while True:
        g = (yield p, p) + coupled(p, o, decays)
        t += 1
        m = o.beta1 * m + (1 - o.beta1) * g
        v = o.beta2 * v + (1 - o.beta2) * g * g
        m_hat, power, last = m / (1 - o.beta1**t), o.beta2**t, 2 / (1 - o.beta2) - 1
        rho = last - 2 * t * power / (1 - power)
        if rho > 5:
            r = math.sqrt((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho))
            p = p - o.lr * m_hat * r * math.sqrt(1 - power) / (np.sqrt(v) + o.eps)
        else:
            p = p - o.lr * m_hat


def lion(p, o, decays):
    """Chen et al., Algorithm 2."""
    m = np.zeros_like(p)
    while True:
        g = yield p, p
        c = o.beta1 * m + (1 - o.beta1) * g
        p = p - o.lr * (np.sign(c) + coupled(p, o, decays))
        m = o.beta2 * m + (1 - o.beta2) * g


# Not every setting can be compared over 100 steps: Adam with beta2 = 0.9 swings around the minimum so that one rounding
# error grows by 10⁷.
RULES = {
    "sgd": (gb.SGD(0.05), sgd),
    "sgd, decay": (gb.SGD(0.05, weight_decay=0.1), sgd),
    "momentum": (gb.SGD(0.02, momentum=0.9), momentum),
    "momentum, decay": (gb.SGD(0.02, momentum=0.9, weight_decay=0.1), momentum),
    "lookahead": (gb.SGD(0.02, momentum=0.9, nesterov="lookahead"), lookahead),
    "nesterov, torch": (gb.SGD(0.02, momentum=0.9, nesterov="torch"), nesterov_torch),
    "velocity": (gb.SGD(0.02, momentum=0.9, velocity=True), momentum),
    "velocity, torch": (gb.SGD(0.02, momentum=0.9, nesterov="torch", velocity=True), nesterov_torch),
    "nesterov, seed": (gb.SGD(0.02, momentum=0.1, nesterov="seed"), nesterov_seed),
    "adagrad": (gb.Adagrad(0.1), adagrad),
    "adagrad, inside": (gb.Adagrad(0.1, eps=1e-3, eps_at="inside"), adagrad),
    "adadelta": (gb.Adadelta(), adadelta),
    "adadelta, decay": (gb.Adadelta(0.5, rho=0.8, eps=1e-4, weight_decay=0.1), adadelta),
    "rmsprop": (gb.RMSprop(0.003), rmsprop),
    "rmsprop, inside": (gb.RMSprop(0.003, eps=1e-3, eps_at="inside"), rmsprop),
    "rmsprop, momentum": (gb.RMSprop(0.001, momentum=0.8), rmsprop),
    "rmsprop, centered": (gb.RMSprop(0.003, rho=0.9, centered=True, eps=1e-2), rmsprop),
    "rmsprop, both": (gb.RMSprop(0.001, rho=0.9, momentum=0.8, centered=True, eps=1e-2, weight_decay=0.1), rmsprop),
    "adam": (gb.Adam(0.01), adam),
    "adam, other constants": (gb.Adam(0.02, beta1=0.8, beta2=0.99, eps=1e-2), adam),
    "adam, decay": (gb.Adam(0.01, weight_decay=0.1), adam),
    "adam, hat": (gb.Adam(0.01, eps=1e-2, eps_at="hat"), adam),
    "adamw": (gb.AdamW(0.01, weight_decay=0.1), adam),
    "adamw without decay": (gb.AdamW(0.01, weight_decay=0.0), adam),
    "nadam": (gb.Nadam(0.01), nadam),
    "adamax": (gb.Adamax(0.01), adamax),
    "radam": (gb.RAdam(0.01), radam),
    "radam, decay": (gb.RAdam(0.01, beta2=0.99, weight_decay=0.1), radam),
    "lion": (gb.Lion(0.003), lion),
    "lion, decay": (gb.Lion(0.003, weight_decay=0.5), lion),
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


@pytest.mark.parametrize("name", RULES)
def test_a_second_fit_goes_on_with_the_moments(name, rng):
    optimizer, rule = RULES[name]
    model, x, t, gradient = net_case(rng)
    expected = plain_loop(rule, optimizer, model.state_dict(), gradient, 100)
    trainer = gb.Trainer(model, "mse", optimizer, seed=0)
    for epochs in (1, 99):
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


@pytest.mark.parametrize("nesterov", ["lookahead", "torch", "seed"])
@pytest.mark.parametrize(
    "h, beta, lr", [(1.0, 0.9, 0.5), (3.0, 0.5, 0.2), (29.18, 0.9, 0.02), (29.18, 0.9, 0.1), (2.5, 0.9, 1e-3)]
)
def test_seed_27_three_meanings_of_nesterov_on_a_parabola(nesterov, h, beta, lr):
    """½ h w²: the step is a linear map of (w, z), whose determinant for the notes' form, β(1 − h), has no learning rate
    in it (erratum E5): it diverges for h > 1 + 1/β however small the rate, where the others follow theirs."""
    maps = {
        "lookahead": [[1 - lr * h, -lr * beta * (1 - lr * h)], [h, beta * (1 - lr * h)]],
        "torch": [[1 - lr * h * (1 + beta), -lr * beta**2], [h, beta]],
        "seed": [[1 - lr * h, -lr * beta * (1 - h)], [h, beta * (1 - h)]],
    }
    assert np.linalg.det(maps["seed"]) == pytest.approx(beta * (1 - h))
    model = gb.Sequential(gb.Dense(1, 1, bias=False, init=1.0), dtype="float64")
    trainer, path = gb.Trainer(model, "mse", gb.SGD(lr, beta, nesterov), seed=0), [1.0]
    at, z, x = 1.0, 0.0, math.sqrt(h / 2)  # (x w)² = ½ h w²
    for _ in range(30):
        trainer.fit([[x]], [0.0], epochs=1)
        path.append(model.state_dict()["0.weight"].item())
        at, z = np.array(maps[nesterov]) @ (at, z)
        assert path[-1] == pytest.approx(at, rel=1e-9, abs=1e-12)
    radius = max(abs(np.linalg.eigvals(np.array(maps[nesterov]))))
    if nesterov == "seed":
        assert radius > 1 or h <= 1 + 1 / beta
    else:
        assert (radius > 1) == (lr == 0.1)


FIRST = {  # from w = 0 under a gradient g
    "adagrad": (gb.Adagrad(0.1, eps=1e-3, eps_at="inside"), lambda g: 0.1 * g / math.sqrt(g * g + 1e-3)),
    "adagrad, outside": (gb.Adagrad(0.1, eps=1e-3), lambda g: 0.1 * g / (abs(g) + 1e-3)),
    "adadelta": (gb.Adadelta(1.0, rho=0.9, eps=1e-4), lambda g: 1e-2 * g / math.sqrt(0.1 * g * g + 1e-4)),
    "rmsprop": (gb.RMSprop(0.1, rho=0.9, eps=1e-3, eps_at="inside"), lambda g: 0.1 * g / math.sqrt(0.1 * g * g + 1e-3)),
    "adam": (gb.Adam(0.1, eps=1e-3), lambda g: 0.1 * g / (abs(g) + 1e-3)),
    "lion": (gb.Lion(0.1), lambda g: math.copysign(0.1, g)),
}


@pytest.mark.parametrize("g", [1e-3, -3.0, 1e3])
@pytest.mark.parametrize("name", FIRST)
def test_seed_28_first_steps(name, g):
    optimizer, step = FIRST[name]
    assert constant_gradient(optimizer, 1, g)[1] == pytest.approx(-step(g), rel=1e-12)


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

PATHS = json.loads((Path(__file__).parent / "data" / "torch_paths.json").read_text())


def following(optimizer, path, x, t):
    """The largest distance from a path of weights, {steps: {name: array}}, over the weights there."""
    model = gb.mlp([3, 5, 2], "tanh", dtype="float64").initialize(2)
    trainer, worst = gb.Trainer(model, "mse", optimizer, seed=0), 0.0
    for steps, weights in path.items():
        trainer.fit(x, t, epochs=int(steps) - trainer.epoch, batch_size=12, shuffle=False)
        for key, value in model.state_dict().items():
            w = np.array(weights[key])
            worst = max(worst, float(np.abs(value - w).max() / np.abs(w).max()))
    return worst


@pytest.mark.parametrize("name", PATHS["paths"])
def test_seed_28_weights_follow_the_stored_path_of_torch(name, rng):
    _, x, t, _ = net_case(rng)
    assert following(RULES[name][0], PATHS["paths"][name], x, t) <= 1e-12


@pytest.mark.parametrize("name", PATHS["paths"])
def test_seed_28_weights_follow_torch(name, rng):
    pytest.importorskip("torch", reason="torch is not installed")
    from torch_paths import path_of

    _, x, t, _ = net_case(rng)
    assert following(RULES[name][0], path_of(RULES[name][0], x, t), x, t) <= 1e-12


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
    "velocity": (
        lambda: gb.SGD(momentum=0.9, nesterov="seed", velocity=True),
        "SGD: velocity=True goes with nesterov None or 'torch', got 'seed'",
    ),
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
