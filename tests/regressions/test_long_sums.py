"""Sums over many rows do not drift: they are right for equal values, which a running sum in float32 gets wrong."""

import numpy as np
import pytest
from emulator import build

import gpubackprop as gb
from gpubackprop.backends import codegen, get_backend
from gpubackprop.backends.geometry import Geometry
from gpubackprop.formulas import name

VALUES = [0.1, 0.6931472, 1 / 3, 0.9]
CLOSE = 8e-7
host = pytest.mark.parametrize("host", ["cpu", "cpu:reference"])


def relative(found, value):
    return np.abs(np.asarray(found, np.float64) / float(np.float32(value)) - 1).max()


# ---- on the host ---------------------------------------------------------------------------------------------------


@host
@pytest.mark.parametrize("n", [65, 4160, 300_001])
@pytest.mark.parametrize("value", VALUES)
def test_means_along_every_axis(host, value, n):
    for shape, axes in (((n, 2), (0, None, (0, 1))), ((2, n, 2), (1, (0, 1), (1, 2))), ((1, n), (1,))):
        x = gb.tensor(np.full(shape, value, "f"), device=host)
        for axis in axes:
            assert relative(x.mean(axis=axis).numpy(), value) < CLOSE
            count = x.size / x.mean(axis=axis).size
            assert relative(x.sum(axis=axis).numpy() / count, value) < CLOSE


@host
@pytest.mark.parametrize("shape", [(1, 1), (64, 3), (65, 3), (4097, 2), (70, 5, 4), (3, 200, 1), (2, 3, 4100), (0, 3)])
def test_sums_are_those_of_float64(host, shape, rng):
    x = rng.normal(size=shape).astype("f")
    for axis in (None, *range(len(shape))):
        found = gb.tensor(x, device=host).sum(axis=axis).numpy()
        bound = 1e-6 * np.abs(x.astype(np.float64)).sum(axis)
        assert np.all(np.abs(found - x.astype(np.float64).sum(axis)) <= bound)


@host
@pytest.mark.parametrize("columns", [1, 2, 40])
@pytest.mark.parametrize("value", VALUES)
def test_column_sums(host, value, columns):
    back, n = get_backend(host), 50_001
    x, sums = back.asarray(np.full((2, n, columns), value, "f")), back.empty((2, columns), "f")
    for accumulate in (False, True):
        launch = back.elementwise_columns("sums", {"dy": name("dy")}, {"dy": x}, x, sums, accumulate=accumulate)
        launch.run()
        assert relative(sums / n / (1 + accumulate), value) < CLOSE


@host
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_losses_of_equal_rows(host, value, weighted):
    n = 300_001
    x, w = np.full((n, 1), value, "f"), np.ones(n) if weighted else None
    logits = np.hstack([x, np.zeros_like(x)])
    lost = np.log1p(np.exp(-np.float64(np.float32(value))))
    labels, rows = np.zeros(n, int), np.tile(np.array([1, 0], "f"), (n, 1))
    for target in (labels, rows):
        found = gb.softmax_cross_entropy(gb.tensor(logits, device=host), target, weights=w).item()
        assert found == pytest.approx(lost, rel=CLOSE)
    found = gb.bce_with_logits(gb.tensor(x, device=host), np.ones((n, 1), "f"), weights=w).item()
    assert found == pytest.approx(lost, rel=CLOSE)
    found = gb.mse(gb.tensor(x, device=host), np.zeros((n, 1), "f"), weights=w).item()
    assert found == pytest.approx(float(np.float32(value)) ** 2, rel=CLOSE)


@host
def test_the_loss_of_a_large_batch_and_its_bias_gradient(host):
    n = 200_000
    trainer = gb.Trainer(gb.mlp([1, 2]), "cross_entropy", gb.SGD(1.0), device=host, seed=0)
    trainer.model.load_state_dict({"0.weight": np.zeros((1, 2)), "0.bias": np.zeros(2)})
    x, y = np.ones((n, 1), "f"), np.zeros(n, int)
    assert trainer.evaluate(x, y)["loss"] == pytest.approx(np.log(2), rel=CLOSE)
    assert trainer.fit(x, y, epochs=1, batch_size=n)["loss"] == [pytest.approx(np.log(2), rel=CLOSE)]
    np.testing.assert_allclose(trainer.model.state_dict()["0.bias"], [0.5, -0.5], rtol=CLOSE)


@host
def test_the_statistics_of_a_large_batch_and_their_gradients(host):
    n, value = 200_000, 0.9
    columns = [np.where(np.arange(n) == 0, 0, value), np.where(np.arange(n) % 2 == 0, value, -value)]
    x = gb.tensor(np.stack(columns, 1).astype("f"), requires_grad=True, device=host)
    gain, bias = (gb.tensor(np.full(2, v, "f"), requires_grad=True, device=host) for v in (1, 0))
    y, mean, variance = gb.batch_norm(x, gain, bias)
    (y * np.float32(value)).sum().backward()
    exact = x.numpy().astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(variance, exact.var(0), rtol=2e-6)
    np.testing.assert_allclose(bias.grad.numpy() / n, [value, value], rtol=CLOSE)
    assert np.abs(x.grad.numpy()[1:]).max() < 1e-6 * value * np.abs(1 / np.sqrt(exact.var(0) + 1e-5)).max()


@host
def test_a_sum_is_the_same_bits_each_time(host, rng):
    x = gb.tensor(rng.normal(size=(30_011, 7)).astype("f"), device=host)
    first = x.sum(axis=0).numpy()
    np.testing.assert_array_equal(first, x.sum(axis=0).numpy())


@host
def test_infinities_stay_infinite_in_long_sums(host):
    x = np.ones((10_000, 2), "f")
    x[7000, 0], x[9999, 1] = np.inf, np.nan
    np.testing.assert_array_equal(gb.tensor(x, device=host).sum(axis=0).numpy(), [np.inf, np.nan])
    assert np.isnan(gb.tensor(x, device=host).sum().item())


# ---- on CUDA: so few blocks that each thread has many elements ----------------------------------------------------


def scratch(n=1):
    return {"partials": np.full(n, np.nan, "f"), "ticket": np.zeros(1, np.uint32)}


@pytest.mark.parametrize("value", [*VALUES, np.inf])
def test_a_thread_of_cuda_adds_up_many_losses(value):
    n, total = 300_001, np.zeros(1, "f")
    nothing = {"loss": None, "events": None, "state": None}
    made = build(codegen.unit([next(k for k in codegen.kernels("mse") if k.name == "mse_forward")]))
    made.launch("mse_forward", (1, 1, 1), (256, 1, 1), total=total, **scratch(), **nothing, x=np.full(n, value, "f"),
                t=np.zeros(n, "f"), k=np.ones(1, "f"), size=n)  # fmt: skip
    square = np.float32(value) ** 2
    assert total[0] == np.inf if np.isinf(value) else relative(total / n, square) < CLOSE


@pytest.mark.parametrize("kind", ["labels", "rows"])
@pytest.mark.parametrize("value", VALUES)
def test_a_team_of_cuda_adds_up_many_rows(value, kind):
    n, total = 100_001, np.zeros(1, "f")
    x = np.tile(np.array([value, 0], "f"), (n, 1))
    target = {"labels": np.zeros(n, int)} if kind == "labels" else {"target": np.tile(np.array([1, 0], "f"), (n, 1))}
    nothing = dict.fromkeys(("loss", "events", "table", "state", "scale"))
    build(codegen.file_unit("softmax_cross_entropy.cu")).launch(
        f"softmax_cross_entropy_{kind}", (1, 1, 1), (1, 256, 1), dx=np.empty_like(x), total=total, x=x, **target,
        **scratch(), **nothing, width=0, share_at=-1, rows=n, classes=2,
    )  # fmt: skip
    assert relative(total / n, np.log1p(np.exp(-np.float64(np.float32(value))))) < CLOSE


@pytest.mark.parametrize("value", VALUES)
def test_a_thread_of_cuda_adds_up_many_rows_of_columns(value):
    n, sums = 100_001, np.zeros(4, "f")
    made = next(k for k in codegen.kernels("identity") if k.name == "identity_backward_bias")
    build(codegen.unit([made])).launch(
        made.name, (1, 1, 1), (1, 256, 1), sums=sums, partials=None, tickets=None, dy=np.full((n, 4), value, "f"),
        accumulate=0, rows=n, columns=4, members=1,
    )  # fmt: skip
    assert relative(sums / n, value) < CLOSE


@pytest.mark.parametrize("shape, block", [((1, 1_000_003, 1), (256, 1, 1)), ((1, 100_001, 4), (1, 256, 1))])
@pytest.mark.parametrize("value", [*VALUES, np.inf])
def test_a_thread_of_cuda_adds_up_many_elements(value, shape, block):
    outer, length, inner = shape
    out, place = np.zeros((outer, inner), "f"), Geometry((1, 1, 1), block)
    build(codegen.file_unit("reduce.cu")).launch(
        "reduce_mean", place.grid, place.block, out=out, partials=None, tickets=None, x=np.full(shape, value, "f"),
        accumulate=0, outer=outer, length=length, inner=inner,
    )  # fmt: skip
    assert (out == np.inf).all() if np.isinf(value) else relative(out, value) < CLOSE
