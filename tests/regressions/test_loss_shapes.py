"""A loss of one's own sees targets of a known shape, and cannot pair every row with every other by mistake."""

import numpy as np
import pytest

import gpubackprop as gb

N = 12
RNG = np.random.default_rng(5)
X = RNG.normal(size=(N, 4))
W = RNG.normal(size=(4, 1))
FLOATS, COLUMN, INTEGERS = (X @ W)[:, 0], X @ W, np.arange(N)

TRAPS = {
    "column of the output": lambda o, t: ((o[:, 0] - t) ** 2).mean(),
    "row of the target": lambda o, t: ((o - t.reshape(-1)) ** 2).mean(),
    "reduced output": lambda o, t: gb.abs(o.sum(axis=1) - t).mean(),
    "product": lambda o, t: (t * o[:, 0]).mean(),
    "comparison": lambda o, t: (o * (o[:, 0] > t)).mean(),
    "where": lambda o, t: gb.where(o > 0, o[:, 0], t).mean(),
    "maximum": lambda o, t: gb.maximum(o[:, 0], t).mean(),
    "constant": lambda o, t: ((o - t) ** 2 * np.ones(len(o), o.dtype)).mean(),
}
FINE = {
    "as they come": lambda o, t: ((o - t) ** 2).mean(),
    "columns of both": lambda o, t: ((o[:, 0] - t[:, 0]) ** 2).mean(),
    "rows of both": lambda o, t: ((o.reshape(-1) - t.reshape(-1)) ** 2).mean(),
    "the library's": gb.mse,
    "all pairs": lambda o, t: ((o - o.reshape(1, -1) - (t - t.reshape(1, -1))) ** 2).mean(),
    "a total": lambda o, t: ((o - t) ** 2).sum() / len(o),
}


def calls(t, x, y):
    """Everything that takes a loss of one's own."""
    yield lambda: t.fit(x, y, epochs=1, batch_size=5)
    yield lambda: t.evaluate(x, y)
    yield lambda: gb.gradient_report(t, x, y)
    yield lambda: gb.find_nan(t, x, y)
    yield lambda: gb.loss_of_weights(t, x, y)[0](*(gb.tensor(w) for w in gb.loss_of_weights(t, x, y)[1]))


def trainer(loss, outputs=1, **how):
    return gb.Trainer(gb.mlp([4, outputs]), loss, gb.SGD(0.01), seed=0, **how)


@pytest.mark.parametrize("y", [FLOATS, COLUMN, INTEGERS], ids=["floats", "column", "integers"])
@pytest.mark.parametrize("case", TRAPS)
def test_one_value_per_row_is_never_paired_with_all_rows(case, y):
    t = trainer(TRAPS[case])
    before = t.model.state_dict()["0.weight"]
    for call in calls(t, X, y):
        with pytest.raises(ValueError, match=r": shapes \(\d+,\) and \(\d+, 1\) would broadcast to .*; in a loss the "
                           r"target has the output's shape \(\d+, 1\): .* for all pairs"):  # fmt: skip
            call()
    with pytest.raises(ValueError, match="would broadcast"):
        t.plan(batch_size=4)
    np.testing.assert_array_equal(t.model.state_dict()["0.weight"], before)


@pytest.mark.parametrize("device", ["cpu", "cpu:reference", "cuda"])
@pytest.mark.parametrize("case", FINE)
def test_losses_that_keep_to_the_shapes_are_right(case, device, cuda):
    for y in (FLOATS, COLUMN):
        t = trainer(FINE[case], device=device)
        t.model.load_state_dict({"0.weight": W, "0.bias": np.zeros(1)})
        assert t.evaluate(X, y)["loss"] == pytest.approx(0, abs=1e-10)
        t.fit(X, y, epochs=1, batch_size=5)
        np.testing.assert_allclose(t.model.state_dict()["0.weight"], W, atol=1e-5)
        t.plan(batch_size=4)


@pytest.mark.parametrize("case", [case for case in TRAPS if case not in ("comparison", "where")])
def test_a_batch_of_one_row_cannot_go_wrong(case):
    t = trainer(TRAPS[case])
    one = t.evaluate(X[:1], FLOATS[:1])["loss"]
    o, y = float(t.predict(X[:1])[0, 0]), float(FLOATS[0])
    expected = {"reduced output": abs(o - y), "product": o * y, "maximum": max(o, y)}.get(case, (o - y) ** 2)
    assert one == pytest.approx(expected, rel=1e-5)


def test_one_target_beside_several_outputs_comes_as_a_column():
    """A mean and a logarithmic variance, say."""

    def loss(o, t):
        shapes.add((o.shape, t.shape))
        return ((o[:, :1] - t) ** 2 * gb.exp(-o[:, 1:]) + o[:, 1:]).mean()

    shapes = set()
    t = trainer(loss, outputs=2)
    t.evaluate(X, FLOATS)
    assert shapes == {((N, 2), (N, 1))}
    with pytest.raises(ValueError, match=r"in a loss the target has shape \(12, 1\)"):
        trainer(lambda o, t: ((o[:, 0] - t) ** 2).mean(), outputs=2).evaluate(X, FLOATS)


def test_labels_of_several_outputs_stay_labels():
    def loss(o, t):
        shapes.add(t.shape)
        return gb.softmax_cross_entropy(o, t)

    shapes = set()
    trainer(loss, outputs=N).evaluate(X, INTEGERS)
    assert shapes == {(N,)}


@pytest.mark.parametrize("rows", [1, N])
def test_a_loss_that_is_not_reduced_is_refused(rows):
    t = trainer(lambda o, t: (o - t)[:, 0] ** 2)
    for call in (t.fit, t.evaluate):
        if rows > 1:
            with pytest.raises(
                TypeError, match=rf"returned shape \({rows},\); expected a tensor of one element, the mean"
            ):
                call(X[:rows], FLOATS[:rows])
        else:
            call(X[:rows], FLOATS[:rows])  # one row is its own mean


def test_what_a_loss_may_not_is_no_matter_elsewhere():
    a, b = gb.tensor(FLOATS), gb.tensor(COLUMN)
    assert (a - b).shape == (N, N)
