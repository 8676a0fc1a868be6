"""A tensor as a key means what an array means; in a recorded step its integers are read anew at every replay."""

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.backends import get_backend
from gpubackprop.backprop import backward
from gpubackprop.plan import Plan
from gpubackprop.tensor import Tensor

DEVICES = ["cpu", "cpu:reference", "cuda"]
X = np.arange(24.0).reshape(4, 6) / 7 - 1.3


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return request.param


# ---- outside of a plan ---------------------------------------------------------------------------------------------


def test_masks_choose_elements(device):
    x = gb.tensor(X, device=device, requires_grad=True)
    for mask, chosen in [
        (x > 1, X > 1), (x[:, 0] > 0, X[:, 0] > 0), ((x > 0) * (x < 1), (X > 0) & (X < 1)), (x != x, X != X),
        (gb.maximum(x > 1, x < 0), (X > 1) | (X < 0)), ((x > 1).reshape(4, 6), X > 1), ((x.T > 1).T, X > 1),
        (gb.tensor(X > 1, device=device), X > 1), (x.astype(bool), X != 0),
    ]:  # fmt: skip
        assert x[mask].numpy().tolist() == X[chosen].tolist()
    (x[x > 1] * 3).sum().backward()
    assert x.grad.numpy().tolist() == np.where(X > 1, 3.0, 0.0).tolist()


def test_integers_choose_places(device):
    x, at = gb.tensor(X, device=device, requires_grad=True), gb.tensor([2, 0, 2, -1], device=device).astype(int)
    found = at.numpy()
    for key, same in [(at, found), ((slice(None), at), (slice(None), found)), ((range(4), at), (range(4), found)),
                      ((at, None, slice(1, 3)), (found, None, slice(1, 3))), ((..., at), (..., found)),
                      (at[0], 2), ((at[0], at), (2, found)), (at.reshape(2, 2), found.reshape(2, 2))]:  # fmt: skip
        assert (
            x[tuple(map(list_of, key)) if isinstance(key, tuple) else key].numpy().tolist()
            == X[tuple(map(list_of, same)) if isinstance(same, tuple) else same].tolist()
        )
    assert gb.gather(x, at, axis=1).numpy().tolist() == X[:, found].tolist()
    assert gb.gather(x, at * 1.0).numpy().tolist() == X[found].tolist()
    x[at].sum().backward()
    assert x.grad.numpy()[:, 0].tolist() == [1, 0, 2, 1]


def list_of(k):
    return list(k) if isinstance(k, range) else k


@pytest.mark.parametrize("call, kind, message", [
    (lambda x: x[x], TypeError, r"index: a tensor of float64 is no key; use .astype\(int\) for places"),
    (lambda x: x[gb.tensor([9]).astype(int)], IndexError, "index: index 9 is out of bounds for axis 0"),
    (lambda x: gb.gather(x, gb.tensor([0, 9])), IndexError, "gather: index 0…9 outside axis 0"),
    (lambda x: gb.gather(x, gb.tensor([0.5])), TypeError, "gather: 1-D integers expected, got float64"),
    (lambda x: gb.gather(x, gb.tensor([np.nan])), TypeError, "gather: 1-D integers expected"),
    (lambda x: gb.gather(x, x[:, 0] > 0), TypeError, "gather: 1-D integers expected"),
    (lambda x: x[x[0] > 1], IndexError, "index: boolean index did not match"),
])  # fmt: skip
def test_keys_that_are_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call(gb.tensor(X))


def test_integers_give_integers_and_take_the_type_of_floats():
    t, single = gb.tensor([2, 0, 1]).astype(int), gb.tensor(np.ones(3, "f"))
    for made, expected in [(t + 1, [3, 1, 2]), (1 - t, [-1, 1, 0]), (t * t, [4, 0, 1]), (gb.maximum(t, 1), [2, 1, 1]),
                           (t + np.arange(3), [2, 1, 3]), (t.reshape(3, 1)[:, 0], [2, 0, 1]), (t[t > 0], [2, 1]),
                           (gb.concatenate([t, t])[2:4], [1, 2]), (gb.stack([t, t])[1], [2, 0, 1])]:  # fmt: skip
        assert made.dtype == np.int64 and made.numpy().tolist() == expected
    for made in (single * t, single + (t == 2), gb.where(t == 2, single, 0.0), t < single, single - t):
        assert made.dtype == np.float32
    assert (t / 2).numpy().tolist() == [1, 0, 0.5] and gb.exp(t).dtype == np.float64 and t.sum().item() == 3
    assert (t == 2).numpy().tolist() == [1, 0, 0]


# ---- while a plan records ------------------------------------------------------------------------------------------


KEYS = {  # of x (5, 4, 3), with t: five labels below 3
    "x[rows, 1, t]": lambda x, t: x[np.arange(5), 1, t],
    "x[:, :, t]": lambda x, t: x[:, :, t],
    "x[t]": lambda x, t: x[t],
    "x[t, t]": lambda x, t: x[t, t],
    "x[t, :, t]": lambda x, t: x[t, :, t],
    "x[-t]": lambda x, t: x[0 - t],
    "x[..., t + 0]": lambda x, t: x[..., t + 0],
    "x[None, 1:3, t, None]": lambda x, t: x[None, 1:3, t, None],
    "x[t[:, None], t[None]]": lambda x, t: x[t.reshape(5, 1), t.reshape(1, 5)],
    "x[mask, t]": lambda x, t: x[np.array([True, False, True, False, False]), t[:2]],
    "x[t[0]]": lambda x, t: x[t[0]],
    "x[2, t[0], 1]": lambda x, t: x[2, t[0], 1],
    "gather flat": lambda x, t: gb.gather(x.reshape(-1), t + np.arange(5) * 12),
    "gather along 1": lambda x, t: gb.gather(x, t, axis=1),
    "gather floats": lambda x, t: gb.gather(x, t * 1.0, axis=2),
    "take": lambda x, t: np.take(x, t, axis=1),
    "take_along_axis": lambda x, t: np.take_along_axis(x, t.reshape(5, 1, 1), 2),
    "table of constants": lambda x, t: gb.tensor([0.5, 2.0, 3.0], dtype=x.dtype, device=x.device)[t] * x[:, 0, 0],
    "labels of labels": lambda x, t: x[t[t]],
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_recorded_key_reads_its_integers_at_every_replay(name, dtype, device, rng):
    """Forward and backward have the bits of what runs outside of a plan."""
    back, function = get_backend(device), KEYS[name]
    value, weights = rng.normal(size=(5, 4, 3)).astype(dtype), None
    labels = back.asarray(np.zeros(5, np.int64))
    x, plan = gb.tensor(value, device=device, requires_grad=True), Plan(back)
    with plan.record("all"):
        y = function(x, Tensor(labels, back))
        weights = rng.normal(size=y.shape).astype(dtype)
        dy = back.asarray(weights)
        backward(y, dy)
    for _ in range(3):
        t = rng.integers(0, 3, 5)
        back.write(labels, t)
        plan.replay("all")
        leaf = gb.tensor(value, device=device, requires_grad=True)
        expected = function(leaf, Tensor(back.asarray(t), back))
        expected.backward(weights)
        assert y.numpy().tobytes() == expected.numpy().tobytes()
        assert x.grad.numpy().tobytes() == leaf.grad.numpy().tobytes()
        held = gb.tensor(t, device="cpu").astype(int)
        gb.gradcheck(lambda v, held=held: function(v, held), [value.astype("float64")])


@pytest.mark.parametrize("name", ["x[t]", "x[rows, 1, t]", "gather along 1"])
def test_a_recorded_key_out_of_range_gives_nan(name, device):
    back = get_backend(device)
    labels = back.asarray(np.zeros(5, np.int64))
    x, plan = gb.tensor(np.ones((5, 4, 3), "f"), device=device, requires_grad=True), Plan(back)
    with plan.record("all"):
        y = KEYS[name](x, Tensor(labels, back))
    back.write(labels, np.array([0, 100, -1, -100, 2]))
    plan.replay("all")
    bad = np.isnan(np.moveaxis(y.numpy(), 1 if name == "gather along 1" else 0, 0).reshape(5, -1))
    assert bad.all(1).tolist() == bad.any(1).tolist() == [False, True, False, True, False]


def test_a_recorded_float_that_is_no_integer_gives_nan(device):
    back = get_backend(device)
    at, plan = back.asarray(np.zeros(4)), Plan(back)
    with plan.record("all"):
        y = gb.gather(gb.tensor([1.0, 2.0, 3.0], device=device), Tensor(at, back))
    back.write(at, np.array([1.0, 0.5, np.nan, -np.inf]))
    plan.replay("all")
    np.testing.assert_array_equal(y.numpy(), [2, np.nan, np.nan, np.nan])


def test_a_key_of_another_device_is_refused_while_a_plan_records(cuda):
    with (
        Plan(cuda).record("all"),
        pytest.raises(ValueError, match=r"index: x lives on cpu but the key on cuda:0; make x with device=t\.device"),
    ):
        gb.tensor([1.0, 2.0])[Tensor(cuda.asarray(np.zeros(2, np.int64)), cuda)]


def test_ignored_labels_need_no_place(rng):
    """A branch that is not chosen may be out of range: its NaN reaches neither loss nor gradient."""

    def loss(o, t):
        return gb.where(t >= 2, o[np.arange(len(o)), t - 2 - 100 * gb.maximum(2 - t, 0)], 0.0).mean()

    def picked(o, t):
        return (o * (t.reshape(-1, 1) - 2 == np.arange(o.shape[1]))).sum(1).mean()

    x, t = rng.normal(size=(12, 3)), np.arange(12) % 6
    fits = [gb.Trainer(gb.mlp([3, 6]), f, seed=0).fit(x, t, epochs=2, batch_size=4)["loss"] for f in (loss, picked)]
    np.testing.assert_allclose(*fits, rtol=1e-6)
    with pytest.raises(gb.TrainingDiverged):
        gb.Trainer(gb.mlp([3, 6]), lambda o, t: o[np.arange(len(o)), t + 4].mean(), seed=0).fit(x, t, epochs=1)


def test_a_mask_is_refused_while_a_plan_records(rng):
    x, y = rng.normal(size=(8, 2)), rng.normal(size=(8, 2))
    for loss in (
        lambda o, t: o[o > 0].sum(),
        lambda o, t: o[o.astype(bool)].sum(),
        lambda o, t: o[(o > 0)[:, 0]].sum(),
    ):
        with pytest.raises(RuntimeError, match=r"index: a mask leaves .*fixed shapes; use gb\.where\(mask, x, 0\)"):
            gb.Trainer(gb.mlp([2, 2]), loss, seed=0).fit(x, y, epochs=1)


# ---- losses on labels ----------------------------------------------------------------------------------------------


def focal(o, t):
    p = gb.softmax(o)[np.arange(len(o)), t]
    return -((1 - p) ** 2 * gb.log(p)).mean()


def focal_flat(o, t):
    p = gb.gather(gb.softmax(o).reshape(-1), t + np.arange(len(o)) * o.shape[1])
    return -((1 - p) ** 2 * gb.log(p)).mean()


def focal_masked(o, t):
    p = (gb.softmax(o) * (t.reshape(-1, 1) == np.arange(o.shape[1]))).sum(1)
    return -((1 - p) ** 2 * gb.log(p)).mean()


def focal_one_hot(o, t):
    p = (gb.softmax(o) * t).sum(1)
    return -((1 - p) ** 2 * gb.log(p)).mean()


@pytest.mark.parametrize("loss", [focal, focal_flat, focal_masked])
def test_a_focal_loss_on_labels_trains_as_on_one_hot_rows(loss, device, rng):
    """Over full batches, a ragged one and several epochs."""
    dtype = "float64" if device == "cpu" else "float32"
    x, t = rng.normal(size=(50, 4)), rng.integers(0, 3, 50)
    fits = []
    for function, target in ((loss, t), (focal_one_hot, np.eye(3)[t])):
        model = gb.mlp([4, 8, 3], dtype=dtype)
        trainer = gb.Trainer(model, function, gb.Adam(1e-2), seed=0, device=device)
        losses = trainer.fit(x, target, epochs=3, batch_size=16)["loss"]
        fits.append([*losses, trainer.evaluate(x, target)["loss"]])
    np.testing.assert_allclose(*fits, rtol=1e-5 if dtype == "float32" else 1e-12)


def test_a_label_loss_by_index_is_cross_entropy(device, rng):
    def loss(o, t):
        return -gb.log_softmax(o)[np.arange(len(o)), t].mean()

    x, t = rng.normal(size=(40, 4)), rng.integers(0, 3, 40)
    fits = [
        gb.Trainer(gb.mlp([4, 3], dtype="float64"), f, seed=0, device=device).fit(x, t, epochs=3, batch_size=16)["loss"]
        for f in (loss, "cross_entropy")
    ]
    np.testing.assert_allclose(*fits, rtol=1e-12)


def test_a_table_too_short_for_the_labels_diverges_instead_of_reading_elsewhere(rng):
    def loss(o, t):
        return (gb.tensor([1.0, 2.0], dtype=o.dtype)[t] * gb.exp(o).sum(1)).mean()

    x, t = rng.normal(size=(16, 4)), np.arange(16) % 3
    with pytest.raises(gb.TrainingDiverged):
        gb.Trainer(gb.mlp([4, 3]), loss, seed=0).fit(x, t, epochs=1, batch_size=8)


@pytest.mark.parametrize("loss", [focal, focal_flat, focal_masked])
def test_the_gradient_of_a_focal_loss_is_that_of_differences(loss, rng):
    t = gb.tensor(rng.integers(0, 3, 6)).astype(int)
    gb.gradcheck(lambda o: loss(o, t), [rng.normal(size=(6, 3))])


def test_a_plan_of_a_label_loss_binds_without_running():
    trainer = gb.Trainer(gb.mlp([4, 3]), focal, seed=0)
    trainer.fit(np.ones((6, 4)), np.arange(6) % 3, epochs=1, batch_size=3)
    assert "scatter_add" in str(trainer.plan(5))
