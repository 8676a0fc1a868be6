"""Sample weights and class weights: what they mean, on every backend, and what is refused."""

import itertools
import math
import tracemalloc
import warnings

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.row_weights import inverse, weight_of_batches

DEVICES = ["cpu", "cpu:reference", "cuda"]
every_device = pytest.mark.parametrize("device", DEVICES, indirect=True)

LOSSES = {  # name, outputs, targets of n rows
    "labels": ("cross_entropy", 3, lambda rng, n: rng.integers(0, 3, n)),
    "soft labels": ("cross_entropy", 3, lambda rng, n: rng.dirichlet([1, 1, 1], n)),
    "bce": ("bce", 1, lambda rng, n: rng.integers(0, 2, n)),
    "bce of several": ("bce", 3, lambda rng, n: rng.integers(0, 2, (n, 3))),
    "mse": ("mse", 3, lambda rng, n: rng.normal(size=(n, 3))),
    "half_mse": ("half_mse", 1, lambda rng, n: rng.normal(size=n)),
    "sse": ("sse", 3, lambda rng, n: rng.normal(size=(n, 3))),
}


@pytest.fixture
def device(request):
    """The device of that name; "cuda" is emulated."""
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return request.param


def drawn(rng, name, n=53):
    """A loss with its outputs, and rows with targets for it."""
    loss, outputs, targets = LOSSES[name]
    return loss, outputs, rng.normal(size=(n, 4)), targets(rng, n)


def trained(loss, outputs, x, y, epochs=1, batch_size=1000, shuffle=False, *, device="cpu", **weights):
    """A trainer after SGD(lr=1) in float64: the weights have moved by the gradient."""
    model = gb.mlp([4, 5, outputs], dtype="float64")
    trainer = gb.Trainer(model, loss, gb.SGD(1.0), seed=3, device=device)
    trainer.fit(x, y, epochs, batch_size, shuffle=shuffle, **weights)
    return trainer


def assert_same(a, b, exact=False):
    """Weights and loss of two trainers are equal: to 1e-12, or bit for bit."""
    for key, value in a.model.state_dict().items():
        np.testing.assert_allclose(value, b.model.state_dict()[key], rtol=0, atol=0 if exact else 1e-12)
    np.testing.assert_allclose(a.history["loss"], b.history["loss"], rtol=0 if exact else 1e-12)


# ---- what weights mean ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, name",
    [*itertools.product(DEVICES[:2], LOSSES), *(("cuda", key) for key in ("labels", "soft labels", "bce", "mse"))],
    indirect=["device"],
)
def test_integer_weights_are_repeated_rows(name, device, rng):
    """And a weight of 0 is a row left out: of loss, gradient and evaluation."""
    *kind, x, y = drawn(rng, name)
    w = rng.integers(0, 4, len(x))
    weighted = trained(*kind, x, y, sample_weight=w, device=device)
    repeated = trained(*kind, x.repeat(w, 0), y.repeat(w, 0), device=device)
    assert_same(weighted, repeated)
    loss = weighted.evaluate(x, y, w)["loss"]
    assert loss == pytest.approx(repeated.evaluate(x.repeat(w, 0), y.repeat(w, 0))["loss"], rel=1e-12)
    assert loss != weighted.evaluate(x, y)["loss"]


@every_device
@pytest.mark.parametrize("name", ["labels", "bce", "mse"])
def test_weights_of_1_change_no_bit(name, device, rng):
    """Nor do others that are all one power of two; also of shuffled batches with a ragged one."""
    *kind, x, y = drawn(rng, name)
    plain = trained(*kind, x, y, 2, 16, True, device=device)
    for w in (np.ones(len(x)), np.full(len(x), 4)):
        assert_same(trained(*kind, x, y, 2, 16, True, sample_weight=w, device=device), plain, exact=True)


@pytest.mark.parametrize("factor, exact", [(2.0**-40, True), (3.7, False), (1e-29, False), (9e29, False)])
def test_a_common_factor_changes_nothing(factor, exact, rng):
    *kind, x, y = drawn(rng, "labels")
    w = rng.random(len(x))
    assert_same(*(trained(*kind, x, y, 2, 16, sample_weight=f * w) for f in (1.0, factor)), exact)
    figures = [gb.Trainer(gb.mlp([4, 3]), seed=0).evaluate(x, y, f * w)["loss"] for f in (1.0, factor)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


@every_device
def test_batches_are_divided_by_their_weight_and_epochs_by_that_of_all_rows(device, rng):
    """Against NumPy, by hand, with a ragged last batch."""
    x, t, w = rng.normal(size=(10, 4)), rng.normal(size=(10, 2)), rng.random(10)
    model = gb.Sequential(gb.Dense(4, 2, bias=False), dtype="float64").initialize(1)
    weight, total = model.state_dict()["0.weight"], 0.0
    history = gb.Trainer(model, "mse", gb.SGD(0.5), seed=0, device=device).fit(
        x, t, epochs=1, batch_size=4, shuffle=False, sample_weight=w
    )
    for batch in (slice(0, 4), slice(4, 8), slice(8, 10)):
        error = x[batch] @ weight - t[batch]
        total += w[batch] @ (error**2).mean(1)
        weight = weight - 0.5 * x[batch].T @ (w[batch, None] * error) / w[batch].sum()  # 2 (x − t) / 2 outputs
    np.testing.assert_allclose(model.state_dict()["0.weight"], weight, rtol=1e-12)
    np.testing.assert_allclose(history["loss"], total / w.sum(), rtol=1e-12)


@every_device
@pytest.mark.parametrize("name", ["labels", "mse"])
def test_a_batch_of_no_weight_does_no_harm(name, device, rng):
    *kind, x, y = drawn(rng, name, 12)
    w = np.repeat([1.0, 0.0, 2.0], 4)
    weighted = trained(*kind, x, y, 1, 4, sample_weight=w, device=device)
    assert_same(weighted, trained(*kind, *(np.delete(a, np.s_[4:8], 0) for a in (x, y)), 1, 4, device=device,
                                  sample_weight=np.delete(w, np.s_[4:8])))  # fmt: skip
    assert all(map(math.isfinite, weighted.history["loss"]))


def test_metrics_do_not_weigh(rng):
    x, y = rng.normal(size=(20, 4)), rng.integers(0, 3, 20)
    trainer = trained("cross_entropy", 3, x, y)
    for w in (None, rng.random(20)):
        assert trainer.evaluate(x, y, w)["accuracy"] == (trainer.model.predict_classes(x) == y).mean()


def test_validation_data_has_weights_of_its_own(rng):
    x, y, w = rng.normal(size=(20, 4)), rng.integers(0, 3, 20), rng.random(20)
    options = {"sample_weight": w, "class_weight": {1: 5}}
    for held_out in ((x, y), (x, y, w)):
        trainer = trained("cross_entropy", 3, x, y, validation_data=held_out, **options)
        assert trainer.history["val_loss"][0] == trainer.evaluate(*held_out)["loss"]


def test_what_batches_weigh():
    w, sizes = np.array([1, 2, 4, 8, 0, 0, 0.5], np.float32), np.array([3, 3, 1])
    assert weight_of_batches(None, None, sizes) is sizes
    assert weight_of_batches(w, None, sizes).tolist() == [7, 8, 0.5]
    assert weight_of_batches(w, np.arange(7)[::-1], sizes).tolist() == [0.5, 14, 1]
    assert inverse(sizes).tolist() == [1 / 3, 1 / 3, 1] and inverse(np.array([0.5, 0, 1e-35])).tolist() == [2, 0, 0]


# ---- classes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, labels", [("cross_entropy", [0, 2, 2, 2]), ("bce", [0, 1, 1, 1])])
def test_balanced_is_rows_over_classes_and_rows_of_the_class(loss, labels, rng):
    """As scikit-learn's: 4 / (2 · 1) and 4 / (2 · 3); a class that no row has counts for nothing."""
    y, outputs = np.tile(labels, 10), 3 if loss == "cross_entropy" else 1
    x = rng.normal(size=(40, 4))
    balanced = trained(loss, outputs, x, y, 2, 7, class_weight="balanced")
    assert_same(balanced, trained(loss, outputs, x, y, 2, 7, class_weight={0: 2, max(labels): 2 / 3}), exact=True)
    assert_same(balanced, trained(loss, outputs, x, y, 2, 7, sample_weight=np.where(y, 2 / 3, 2)), exact=True)


def test_class_and_sample_weights_multiply(rng):
    x, y, w = rng.normal(size=(40, 4)), rng.integers(0, 3, 40), rng.random(40)
    both = trained("cross_entropy", 3, x, y, sample_weight=w, class_weight={0: 3, np.int64(2): np.float32(0.5)})
    assert_same(both, trained("cross_entropy", 3, x, y, sample_weight=w * np.array([3, 1, 0.5])[y]))


# ---- every form and precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [list, tuple, np.float32, np.asfortranarray, lambda w: w[::-1].copy()[::-1]])
def test_every_form_of_weights_means_the_same(form, rng):
    *kind, x, y = drawn(rng, "labels")
    w = rng.integers(0, 4, len(x)) / 4
    assert_same(*(trained(*kind, x, y, sample_weight=a) for a in (w, form(w))), exact=True)


@pytest.mark.parametrize(
    "device, name, precision",
    [*itertools.product(DEVICES[:2], ("labels", "mse"), ("float16", "bfloat16")),
     ("cuda", "labels", "float16"), ("cuda", "mse", "bfloat16")],
    indirect=["device"],
)  # fmt: skip
def test_16_bit_steps_weigh_in_float32(device, name, precision, rng):
    """Weights of 1 change no bit, and weights of 2 are as near to rows given twice as those are to themselves."""
    loss, outputs, x, y = drawn(rng, name, 24)
    w, steps = np.repeat([1, 2], 12), {}
    for key, (rows, weights) in {
        "plain": (np.ones(24, int), None), "ones": (np.ones(24, int), np.ones(24)), "weighed": (np.ones(24, int), w),
        "twice": (w, None),
    }.items():  # fmt: skip
        model = gb.mlp([4, 5, outputs]).initialize(0)
        trainer = gb.Trainer(model, loss, gb.SGD(1.0), seed=3, device=device, precision=precision)
        trainer.fit(x.repeat(rows, 0), y.repeat(rows, 0), 1, 1000, shuffle=False, sample_weight=weights)
        steps[key] = np.concatenate([a.ravel() for a in model.state_dict().values()])
    np.testing.assert_array_equal(steps["plain"], steps["ones"])
    np.testing.assert_allclose(steps["weighed"], steps["twice"], atol=2.0**-6 if precision == "bfloat16" else 2.0**-9)
    assert np.abs(steps["weighed"] - steps["plain"]).max() > 1e-3


# ---- what a step promises ------------------------------------------------------------------------------------------


def test_steps_with_and_without_weights_are_kept_apart(rng):
    """Without weights the launches are those of a trainer that never had any, bit for bit."""
    *kind, x, y = drawn(rng, "labels", 32)
    trainer = trained(*kind, x, y, 1, 8, sample_weight=np.ones(32))
    trainer.fit(x, y, 1, 8, shuffle=False)
    assert len(trainer._steps) == 2
    assert_same(trainer, plain := trained(*kind, x, y, 2, 8), exact=True)
    plans = [trainer.plan(8, weighted=weighted) for weighted in (False, True)]
    without, (x_and_y, of_weights, *rest) = (p.launches for p in plans)
    assert of_weights.name == "feed" and of_weights.bytes == 2 * 8 * 8  # 8 weights of 8 bytes
    for a, b in zip(without, [x_and_y, *rest], strict=True):
        assert a.name == b.name and b.bytes - a.bytes == 8 * 8 * (a.name == "softmax_cross_entropy")
    assert [n.what for n in plans[0].launches] == [n.what for n in plain.plan(8).launches]
    assert "total = Σ −w·t·log softmax(x); dx = w·(softmax(x) − t) / Σw" in str(plans[1])


@pytest.mark.parametrize("name", ["labels", "bce of several", "half_mse"])
@pytest.mark.parametrize("device", ["cpu", "cpu:reference"])
def test_a_second_epoch_records_and_allocates_nothing(name, device, rng):
    *kind, x, y = drawn(rng, name, 64)
    trainer = trained(*kind, x, y, 1, 16, sample_weight=np.ones(64), device=device)
    (step,) = trainer._steps.values()
    recorded, seen = {**step.plan.sections}, []
    trainer.fit(x, y, 2, 16, sample_weight=rng.random(64), callbacks=[lambda t: seen.append({**step.plan.sections})])
    assert [*trainer._steps.values()] == [step] and seen[0].pop("feed") is seen[1].pop("feed")  # of the new data
    assert seen == [recorded] * 2
    trainer.fit(x, y, 1, 16, sample_weight=rng.random(64), callbacks=[lambda t: replayed(step.plan)])


def replayed(plan):
    """Replay a hundred times: no growth, and a peak of NumPy's own buffers."""
    plan.replay()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(100):
            plan.replay()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 65_536 and after - before < 4096


def test_a_later_epoch_on_the_device_only_launches(cuda, rng):
    x, y = rng.normal(size=(64, 4)).astype(np.float32), rng.integers(0, 3, 64)
    trainer, seen = gb.Trainer(gb.mlp([4, 5, 3]), device="cuda", seed=0), []
    run_epoch = trainer._run_epoch

    def watched(source, steps, *rest):
        before = cuda.driver.counts.copy()
        for step in steps * (trainer.epoch > 0):
            step.run()
        seen.append(cuda.driver.counts - before)
        return run_epoch(source, steps, *rest)

    trainer._run_epoch = watched
    trainer.fit(x, y, 2, 16, sample_weight=rng.random(64))
    assert set(seen[1]) == {"launches", "products"}


@pytest.mark.parametrize("how", ["staged", "graph", "on the device"])
def test_data_on_its_way_and_graphs_weigh_the_same_bits(how, cuda, rng, monkeypatch):
    x, y = rng.normal(size=(150, 8)).astype(np.float32), rng.integers(0, 3, 150)
    w = rng.random(150).astype(np.float32)

    def fit(*data, **options):
        trainer = gb.Trainer(gb.mlp([8, 5, 3]).initialize(0), device="cuda", seed=0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.fit(*data[:2], 2, 64, sample_weight=data[2])
        return trainer

    plain = fit(x, y, w)
    if how == "staged":
        monkeypatch.setattr(cuda.driver, "memory", lambda: (x.nbytes, 1 << 30))  # not half of it free for the data
    data = [cuda.asarray(a) for a in (x, y, w)] if how == "on the device" else (x, y, w)
    other = fit(*data, cuda_graph=how == "graph")
    assert_same(plain, other, exact=True)
    assert plain.evaluate(x, y, w)["loss"] == other.evaluate(*data)["loss"] != other.evaluate(*data[:2])["loss"]


# ---- what is refused -----------------------------------------------------------------------------------------------

ONES = np.ones(6)
BAD_WEIGHTS = {
    "too few": (ONES[:5], ValueError, "x has 6 rows but sample_weight has 5; pass one sample_weight per row of x"),
    "negative": ([1, 1, -0.5, 1, 1, 1], ValueError, "sample_weight has -0.5 at row 2, expected at least 0; 0 leaves"),
    "NaN": ([1, 1, 1, np.nan, 1, 1], ValueError, "sample_weight has a NaN at row 3"),
    "infinite": ([1, 1, 1, 1, np.inf, 1], ValueError, "sample_weight has an infinity at row 4"),
    "all 0": (0 * ONES, ValueError, "the weights of all rows are 0; give a row that counts a weight above 0"),
    "too large": ([1, 1, 1, 1, 1, 2e30], ValueError, r"the largest weight is 2e\+30, expected 1e-30 to 1e\+30; scale"),
    "too small": (1e-31 * ONES, ValueError, r"the largest weight is 1e-31, expected 1e-30 to 1e\+30; scale the"),
    "a column": (ONES[:, None], ValueError, r"sample_weight has shape \(6, 1\), .* use np.ravel\(sample_weight\)"),
    "a matrix": (np.ones((6, 2)), ValueError, r"sample_weight has shape \(6, 2\), expected \(6,\), one weight each"),
    "a number": (2.0, TypeError, "sample_weight is a single value, expected rows"),
    "text": (list("aaaaaa"), TypeError, "sample_weight has dtype <U1, expected numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_sample_weights(case):
    w, kind, message = BAD_WEIGHTS[case]
    trainer = gb.Trainer(gb.mlp([2, 2]), seed=0)
    x, y = np.ones((6, 2)), np.arange(6) % 2
    with pytest.raises(kind, match=f"^fit: {message}"):
        trainer.fit(x, y, sample_weight=w)
    with pytest.raises(kind, match=f"^evaluate: {message}"):
        trainer.evaluate(x, y, w)
    with pytest.raises(kind, match=f"^fit: validation_data: {message}"):
        trainer.fit(x, y, validation_data=(x, y, w))
    assert trainer.history == {} and trainer.step == 0


BAD_CLASSES = {
    "another name": ("even", ValueError, "unknown class_weight 'even'; choose \"balanced\" or a dict"),
    "a list": ([1, 2], TypeError, r'class_weight must be "balanced" or a dict \{label: weight\}, got list \[1, 2\]'),
    "no class": ({2: 1.0}, ValueError, "class_weight has a class 2, expected labels from 0 to 1"),
    "half a class": ({0.5: 1.0}, ValueError, "class_weight has a class 0.5, expected labels from 0 to 1"),
    "text": ({"cat": 1.0}, ValueError, "class_weight has a class 'cat', expected labels from 0 to 1"),
    "no number": ({0: "2"}, TypeError, "class_weight of class 0 must be a number, got str '2'"),
    "a bool": ({0: True}, TypeError, "class_weight of class 0 must be a number, got bool True"),
    "negative": ({0: -1}, ValueError, "class_weight of class 0 must be finite and at least 0, got -1"),
    "NaN": ({1: np.nan}, ValueError, "class_weight of class 1 must be finite and at least 0, got nan"),
    "all 0": ({0: 0, 1: 0}, ValueError, "the weights of all rows are 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CLASSES)
def test_bad_class_weights(case):
    given, kind, message = BAD_CLASSES[case]
    with pytest.raises(kind, match=f"^fit: {message}"):
        gb.Trainer(gb.mlp([2, 2]), seed=0).fit(np.ones((6, 2)), np.arange(6) % 2, class_weight=given)


@pytest.mark.parametrize("loss, outputs, y, what", [
    ("mse", 1, np.arange(6) % 2, "the loss is mse"),
    ("cross_entropy", 2, np.full((6, 2), 0.5), "y holds rows of class weights"),
    ("bce", 2, np.ones((6, 2)), "the model has 2 outputs"),
    ("bce", 1, np.full(6, 0.5), "y has values between 0 and 1"),
])  # fmt: skip
def test_class_weights_need_labels(loss, outputs, y, what):
    with pytest.raises(
        ValueError, match=f"^fit: class_weight goes by the label of a row, but {what}; use sample_weight"
    ):
        gb.Trainer(gb.mlp([2, outputs]), loss, seed=0).fit(np.ones((6, 2)), y, class_weight="balanced")


@pytest.mark.parametrize("given", [{"sample_weight": ONES}, {"class_weight": "balanced"}])
def test_a_function_cannot_be_weighted(given):
    def own(output, target):
        return gb.mse(output, target)

    trainer = gb.Trainer(gb.mlp([2, 1]), own, seed=0)
    with pytest.raises(ValueError, match=r"^fit: the loss 'own' is a function .* cannot be weighted .* loss by name"):
        trainer.fit(np.ones((6, 2)), np.ones(6), **given)
