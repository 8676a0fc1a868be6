"""Plans: a replay is a fresh recording bit for bit, allocates and records nothing; dry plans touch nothing."""

import copy
import gc
import threading
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.backends import chunked, get_backend
from gpubackprop.backprop import backward
from gpubackprop.formulas import RESULT, parse
from gpubackprop.optimizers import OPTIMIZERS as KINDS
from gpubackprop.plan import Plan, held, recording, run

BACK = get_backend("cpu")
MODELS = {
    "mlp": lambda **d: gb.mlp([6, 9, 4], **d),
    "dropout": lambda **d: gb.mlp([6, 9, 9, 4], "gelu", dropout=0.3, **d),
    "norms": lambda **d: gb.Sequential(
        gb.Dense(6, 8), gb.BatchNorm(8), gb.Activation("silu"), gb.LayerNorm(8), gb.Dense(8, 4, bias=False), **d),
    "residual": lambda **d: gb.Sequential(
        gb.Scaler(6), gb.InputNoise(0.1), gb.Dense(6, 8, activation="tanh"),
        gb.Residual(gb.Dense(8, 8, activation="elu"), gb.Dropout(0.2)),
        gb.Dense(8, 4, max_norm=1.0), **d),
    "branches": lambda **d: gb.Sequential(
        gb.Concatenate(gb.Dense(6, 5, "tanh"), gb.Sequential(), gb.Dense(6, 3)), gb.Dense(14, 4), **d),
}  # fmt: skip
OPTIMIZERS = {
    "sgd": gb.SGD(lr=0.05), "momentum": gb.SGD(lr=0.02, momentum=0.9),
    "nesterov": gb.SGD(lr=0.02, momentum=0.9, nesterov="lookahead"), "adam": gb.Adam(lr=0.01),
    "adamw": gb.AdamW(lr=0.01),
}  # fmt: skip


def own_loss(output, target):
    return ((output - target) ** 2).mean() + output.relu().max() * 0.01


LOSSES = {"cross_entropy": "labels", "bce": "rows", "mse": "rows", "half_mse": "rows", "sse": "rows", own_loss: "rows"}


def data(rng, n, kind="labels", columns=6):
    y = rng.integers(0, 4, n) if kind == "labels" else rng.random((n, 4))
    return rng.normal(size=(n, columns)).astype(np.float32), y


EVERYTHING = {"l1": 1e-4, "l2": 1e-4, "label_smoothing": 0.1, "clip_value": 1.0, "clip_norm": 1.0}


def trainer(model="mlp", optimizer="adam", loss="cross_entropy", more=(), **how):
    return gb.Trainer(MODELS[model](**how), loss=loss, optimizer=OPTIMIZERS[optimizer], seed=3, **dict(more))


def bits(t):
    """Everything that training changes."""
    arrays = {**t.model.state_dict(), **{f"moment {k}": BACK.to_numpy(b) for k, b in t.state.moments.items()}}
    return {k: a.tobytes() for k, a in arrays.items()} | {"history": copy.deepcopy(t.history), "at": (t.epoch, t.step)}


# ---- fresh recording == replay -------------------------------------------------------------------------------------

RUNS = [
    *((m, o, "cross_entropy", "float32") for m in MODELS for o in OPTIMIZERS),
    *(("mlp", "adam", loss, dtype) for loss in LOSSES for dtype in ("float32", "float64")),
]


@pytest.mark.parametrize("model, optimizer, loss, dtype", RUNS)
def test_a_replay_is_a_fresh_recording(model, optimizer, loss, dtype, rng):
    """One trainer records its first step and replays the rest; the other records every step anew."""
    x, y = data(rng, 8, LOSSES[loss])
    replaying, recording_ = (trainer(model, optimizer, loss, dtype=dtype) for _ in range(2))
    replaying.fit(x, y, epochs=4, batch_size=8)
    for _ in range(4):
        recording_._steps.clear()
        recording_.fit(x, y, epochs=1, batch_size=8)
    assert bits(replaying) == bits(recording_)


@pytest.mark.parametrize("model", MODELS)
def test_one_fit_of_many_epochs_is_many_fits_of_one(model, rng):
    x, y = data(rng, 21)  # 8, 8 and a last batch of 5
    at_once, in_parts = trainer(model), trainer(model)
    at_once.fit(x, y, epochs=5, batch_size=8)
    for epochs in (1, 3, 1):
        in_parts.fit(x.copy(), y.copy(), epochs=epochs, batch_size=8)
    assert bits(at_once) == bits(in_parts)


@pytest.mark.parametrize("model", MODELS)
def test_a_copy_continues_with_the_same_bits(model, rng):
    x, y = data(rng, 21)
    first = trainer(model)
    first.fit(x, y, epochs=2, batch_size=8)
    second = copy.deepcopy(first)
    first.fit(x, y, epochs=2, batch_size=8)
    second.fit(x, y, epochs=2, batch_size=8)
    assert bits(first) == bits(second)


def small_graph(x, w, b):
    h = gb.dense(x, w, b, "gelu")
    picked = gb.concatenate([h, h.T.reshape(h.shape)], 1)[:, [0, 2, 2]]
    return (
        (gb.softmax(picked) * gb.where(picked > 0, picked, 0.1)).sum() + gb.layer_norm(h, b, b).max() + (h @ h.T).mean()
    )


def test_a_section_replays_what_it_recorded_with_new_inputs(rng):
    """A plan made by hand: forward and backward over fixed inputs, replayed after they changed."""
    values = [rng.normal(size=s) for s in ((5, 3), (3, 4), (4,))]
    changed = [rng.normal(size=v.shape) for v in values]
    leaves = [gb.tensor(v, requires_grad=True) for v in values]
    plan = Plan(BACK)
    with plan.record("forward"):
        y = small_graph(*leaves)
    seed = np.ones(())
    with plan.record("backward"):
        backward(y, seed)
    for new in (changed, values, changed):
        for leaf, v in zip(leaves, new, strict=True):
            leaf.data[...] = v
        plan.replay()
        fresh = [gb.tensor(v, requires_grad=True) for v in new]
        z = small_graph(*fresh)
        z.backward()
        assert y.item() == z.item()
        for a, b in zip(leaves, fresh, strict=True):
            assert a.grad.numpy().tobytes() == b.grad.numpy().tobytes()


UNARY = [gb.sin, gb.tanh, gb.Tensor.sigmoid, lambda t: t.reshape(16).reshape(4, 4), lambda t: -t, lambda t: t.T,
         lambda t: t[::-1], lambda t: gb.dropout(t, 0.3), gb.softmax,
         lambda t: t - t.max(0, keepdims=True) + t.mean(1)]  # fmt: skip
BINARY = [gb.add, gb.subtract, gb.multiply, gb.maximum, gb.matmul, lambda a, b: gb.dense(a, b, a[0], "gelu"),
          lambda a, b: gb.layer_norm(a, b[0], a[1]), lambda a, b: gb.concatenate([a, b])[2:6]]  # fmt: skip


def random_graph(seed, x, y):
    """Operations on operands drawn from all results so far, all of one shape: every buffer fits every other's place."""
    rng = np.random.default_rng(seed)
    values = [x, y]
    for _ in range(25):
        a, b = (values[i] for i in rng.integers(max(0, len(values) - 6), len(values), 2))
        values.append(rng.choice(UNARY)(a) if rng.random() < 0.5 else rng.choice(BINARY)(a, b) * 0.7)
    return (values[-1] * values[-2] + values[-3]).sum()


@pytest.mark.parametrize("seed", range(40))
def test_released_buffers_are_reused_only_when_they_are_dead(seed, rng):
    """A plan's pool against plain eager memory."""
    values = rng.normal(size=(2, 4, 4))
    eager, kept = ([gb.tensor(v, requires_grad=True) for v in values] for _ in "ab")
    random_graph(seed, *eager).backward()
    plan = Plan(BACK)
    with plan.record("step"):
        backward(random_graph(seed, *kept), np.ones(()))
    for _ in range(2):
        for a, b in zip(eager, kept, strict=True):
            assert (a.grad is None and b.grad is None) or a.grad.numpy().tobytes() == b.grad.numpy().tobytes()
        plan.replay()


def test_sections_replay_alone_and_in_any_order():
    x, y = np.zeros(3), np.zeros(3)
    plan = Plan(BACK)
    with plan.record("one"):
        run(x, lambda: BACK.elementwise("e", parse("x + 1"), {"x": x}, {RESULT: x}))
    with plan.record("two"):
        run(y, lambda: BACK.elementwise("e", parse("x * 10"), {"x": x}, {RESULT: y}))
    assert (x[0], y[0]) == (1, 10)
    plan.replay("two", "one", "one")
    assert (x[0], y[0]) == (3, 10)
    plan.replay()
    assert (x[0], y[0]) == (4, 40)


def test_what_cannot_be_recorded_or_replayed():
    plan = Plan(BACK)
    with (
        plan.record("a"),
        pytest.raises(RuntimeError, match="record 'b': a plan is recording in this thread already"),
        Plan(BACK).record("b"),
    ):
        pass
    with pytest.raises(ValueError, match="record 'a': the plan has this section"), plan.record("a"):
        pass
    with pytest.raises(ValueError, match="replay: unknown section 'z'; recorded are a"):
        plan.replay("z")
    with pytest.raises(ZeroDivisionError), plan.record("broken"):
        raise ZeroDivisionError
    assert list(plan.sections) == ["a"] and recording() is None
    with plan.record("broken"):
        pass


# ---- nothing recorded, nothing allocated ---------------------------------------------------------------------------


@pytest.fixture
def bound(monkeypatch):
    """Counts the launches that are bound from here on."""
    counts = {"launches": 0}
    import gpubackprop.backends.numpy as module

    make = module._launch

    def counting(*arguments):
        counts["launches"] += 1
        return make(*arguments)

    monkeypatch.setattr(module, "_launch", counting)
    return counts


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_nothing_is_recorded_from_the_second_step_on(model, optimizer, rng, bound):
    x, y = data(rng, 8 * 50)
    t, seen = trainer(model, optimizer), []
    t.fit(x, y, epochs=3, batch_size=8, callbacks=[lambda t: seen.append(bound["launches"])])
    assert seen[0] > 0 and seen == seen[:1] * 3
    t.fit(x[:24], y[:24], epochs=1, batch_size=8)
    assert bound["launches"] - seen[-1] < 60  # a new source: its feed, and the checks of the data; no model twice
    assert len(t._steps) == 1


def growth(action, times):
    """(peak while running the action so many times, what stays) above the memory in use before.

    It runs as often beforehand, because NumPy keeps up to 12 kB of small blocks for use again.
    """
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(times):
            action()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(times):
            action()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - before, after - before


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_replaying_100_steps_allocates_nothing(model, dtype, rng):
    x, y = data(rng, 256)
    t = trainer(model, "adamw", dtype=dtype)
    t.fit(x, y, epochs=1, batch_size=256)
    (step,) = t._steps.values()
    peak, stays = growth(step.plan.replay, 100)
    assert peak < 65_536 and stays < 2048


@pytest.mark.parametrize("optimizer", sorted(KINDS.keys() - {"lbfgs"}))
def test_replaying_100_updates_of_every_rule_under_everything_allocates_nothing(optimizer, rng):
    """Penalties, smoothed labels, both clips, weights of the rows and accumulated gradients, on NumPy alone."""
    x, y = data(rng, 256)
    decays = {"weight_decay": 0.1, "groups": {"0.*": {"lr": 1e-3}}}
    t = gb.Trainer(MODELS["mlp"](), optimizer=KINDS[optimizer](**decays), device="cpu:reference", seed=3, accumulate=2,
                   **EVERYTHING)  # fmt: skip
    t.fit(x, y, epochs=1, batch_size=128, sample_weight=np.linspace(0, 1, 256))
    (step,) = t._steps.values()
    peak, stays = growth(step.plan.replay, 100)
    assert peak < 65_536 and stays < 2048


@pytest.mark.parametrize("model, more", [*((model, {}) for model in MODELS), ("mlp", EVERYTHING | {"accumulate": 2})],
                         ids=[*MODELS, "everything"])  # fmt: skip
def test_100_steps_of_fit_allocate_nothing(model, more, rng):
    """Between one epoch's end and the next: 100 steps, the permutation, the step table, the figures."""
    x, y = data(rng, 1600)
    seen = []

    def note(t):
        if tracemalloc.is_tracing():
            seen.append(tracemalloc.get_traced_memory())
        else:
            tracemalloc.start()
        tracemalloc.reset_peak()

    t = trainer(model, more=more)
    try:
        t.fit(x, y, epochs=5, batch_size=16, callbacks=[note])
    finally:
        tracemalloc.stop()
    assert len(seen) == 4
    for (before, _), (after, peak) in pairwise(seen[1:]):
        assert peak - before < 65_536 and after - before < 8192


# ---- reading a plan ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_printed_plan_has_every_launch(model):
    plan = trainer(model, "nesterov").plan(16)
    lines = str(plan).splitlines()
    body = iter(lines)
    for launch in plan.launches:  # each on a line of its own, in order
        said = [launch.name, launch.what.splitlines()[0], f"{launch.flops:,}", f"{launch.bytes:,}"]
        said += ["×".join(map(str, b.shape)) or "1" for b in launch.writes]
        assert any(all(word in line for word in said) for line in body), launch
    assert list(plan.sections) == ["feed", "before", "gradient", "update"]
    assert all(any(line.startswith(s) for line in lines) for s in plan.sections)
    assert "16 rows" in lines[0] and "cpu" in lines[0] and f"{plan.bytes_resident:,} bytes resident" in lines[0]
    assert f"{len(plan.launches)} launches" in lines[-1]
    assert len({len(line) for line in lines[1:] if line[-1] in "s─0123456789"}) == 1  # a table


def test_sums_of_a_plan():
    plan = trainer("mlp").plan(16)
    assert plan.flops == sum(launch.flops for launch in plan.launches) > 0
    assert plan.bytes == sum(launch.bytes for launch in plan.launches) > 0
    gemms = [launch for launch in plan.launches if launch.name == "gemm"]
    weights = 6 * 9 + 9 * 4  # forward, dw and dx of each layer, but no dx of the first
    assert sum(launch.flops for launch in gemms) == 2 * 16 * (3 * weights - 6 * 9)
    for launch in plan.launches:
        assert launch.bytes == sum(b.nbytes for b in (*launch.reads, *launch.writes))


def test_bytes_resident_counts_each_buffer_once():
    plan = Plan(back := get_backend("cpu:reference"))
    x, y = back.empty((1000,), np.float64), back.empty((1000,), np.float64)
    with plan.record("one"):
        run(y, lambda: back.copy(x, y))
        run(y, lambda: back.copy(x[:10], y[10:20]))
        run(y, lambda: back.copy(x, y, accumulate=True))
    assert plan.bytes_resident == 16_000 + 2 * 64  # each with a cache line, to start on one


def test_bytes_resident_of_views_of_other_memory(tmp_path):
    """Memory of a file or of Python counts as the outermost array on it; a broadcast array as what it repeats."""
    mapped = np.memmap(tmp_path / "x", np.float64, "w+", shape=(100,))
    views = [
        mapped[10:20],
        np.frombuffer(bytes(80), np.float64),
        np.lib.stride_tricks.as_strided(np.ones(10), (10, 10)),
    ]
    for view, nbytes in zip(views, (800, 80, 80), strict=True):
        assert sum(b.nbytes for b in held([view, (view[:5], {"again": view})])) == nbytes


def of_a_trainer(model, optimizer, loss="cross_entropy", target=None, **how):
    """A maker of the plan of a step: a dry one, which has a feed, or one that was trained."""

    def make(device, rng, dry):
        t = gb.Trainer(MODELS[model](), loss=loss, optimizer=OPTIMIZERS[optimizer], device=device, **how)
        if dry:
            return t.plan(24)
        t.fit(*data(rng, 24, target or LOSSES[loss]), epochs=2, batch_size=24)
        (step,) = t._steps.values()
        return step.plan

    return make


def of_graphs(device, rng, dry):
    """Every operation of the random graphs, forward and backward, dropout at a fixed step among them."""
    back, plan = get_backend(device), Plan(get_backend(device), dry=dry)
    x, y = (gb.Tensor(v, back, requires_grad=True) for v in rng.normal(size=(2, 4, 4)))
    for i, f in enumerate((*UNARY, lambda t: small_graph(t, y, y[0]))):
        with plan.record(f"unary {i}"):
            backward(f(x).sum(), np.ones(()))
    for i, f in enumerate(BINARY):
        with plan.record(f"binary {i}"):
            backward(f(x, y).sum(), np.ones(()))
    return plan


def of_a_prediction(device, rng, dry):
    model = MODELS["norms"]()
    model.initialize(0)
    model.to(device).predict(rng.normal(size=(20, 6)))
    (forward,) = model._predictor._forwards.values()
    return forward.plan


PRECISIONS = ("float64", "tf32", "float16", "bfloat16")
RESIDENT = {
    **{o: of_a_trainer("mlp", o) for o in OPTIMIZERS},
    **{getattr(loss, "__name__", loss): of_a_trainer("residual", "adamw", loss) for loss in LOSSES},
    **{f"{m} {p}": of_a_trainer(m, "adamw", precision=p, clip_norm=1.0) for m in ("dropout", "norms")
       for p in PRECISIONS},
    "rows": of_a_trainer("mlp", "adam", target="rows"), "metrics": of_a_trainer("norms", "sgd", "mse", metrics=["r2"]),
    "graphs": of_graphs, "predict": of_a_prediction,
}  # fmt: skip


def arrays_alive():
    """Bytes of the arrays of NumPy that were made since tracing began, and live; an empty one takes a byte."""
    for cache in (chunked._constant, chunked._full):  # of the process
        cache.cache_clear()
    gc.collect()
    domain = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    return sum(t.size for t in tracemalloc.take_snapshot().filter_traces([domain]).traces if t.size > 1)


@pytest.mark.parametrize("device, dry", [("cpu", False), ("cpu:reference", True)])
@pytest.mark.parametrize("case", RESIDENT)
def test_bytes_resident_is_what_lives_as_long_as_the_plan(case, dry, device, rng):
    """All else is let go of: model, trainer, data. What NumPy has still allocated is what the plan says."""
    tracemalloc.start()
    try:
        assert arrays_alive() == 0
        plan = RESIDENT[case](device, rng, dry)
        plan.replay()
        assert plan.bytes_resident == arrays_alive() > 0
    finally:
        tracemalloc.stop()


# ---- dry plans -----------------------------------------------------------------------------------------------------


def test_a_dry_plan_runs_nothing():
    x = gb.tensor([1.0, 2.0], requires_grad=True)
    kept = np.full(2, 7.0)
    plan = Plan(BACK, dry=True)
    with plan.record("forward"):
        run(kept, lambda: BACK.fill(kept, 0.0))
        y = (x * x).sum()
        backward(y, np.ones(()))
    assert kept.tolist() == [7, 7] and len(plan.launches) >= 4
    plan.replay()
    assert kept.tolist() == [0, 0] and x.grad.numpy().tolist() == [2, 4] and y.item() == 5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_planning_changes_nothing(model, optimizer, rng):
    """Neither before nor between fits; nor what later fits do."""
    x, y = data(rng, 20)
    planned, plain = trainer(model, optimizer), trainer(model, optimizer)
    for t in (planned, plain):
        for n in (16, 8, 16):
            before = bits(t)
            if t is planned:
                str(t.plan(n))
                t.plan(n).profile(2)
                assert bits(t) == before
            t.fit(x, y, epochs=1, batch_size=8)
            t.evaluate(x, y)
    assert bits(planned) == bits(plain)
    assert planned.predict(x).tobytes() == plain.predict(x).tobytes()


def test_a_plan_needs_no_data_and_costs_no_training():
    t = trainer()
    drawn = t.model.state_dict()
    assert t.plan(1).launches and t.plan(1000).flops > t.plan(10).flops
    assert all(np.array_equal(a, b) for a, b in zip(drawn.values(), t.model.state_dict().values(), strict=True))
    assert t.history == {} and t.epoch == 0


@pytest.mark.parametrize("model", MODELS)
def test_profiling_puts_every_buffer_back(model, rng):
    x, y = data(rng, 16)
    t = trainer(model)
    t.fit(x, y, epochs=2, batch_size=16)
    (step,) = t._steps.values()
    buffers = [b for launch in step.plan.launches for b in (*launch.reads, *launch.writes)]
    before = [b.tobytes() for b in buffers]
    profile = step.plan.profile(3)
    assert [b.tobytes() for b in buffers] == before
    assert [launch for launch, _ in profile] == step.plan.launches
    assert all(0 < seconds < 1 for _, seconds in profile)


def test_profiling_does_not_advance_the_step_table():
    steps, p = BACK.step_table(["lr"], np.float64, 3), np.zeros(2)
    steps.load(np.array([[1.0], [10.0], [100.0]]), np.arange(3), 1)
    plan = Plan(BACK)
    with plan.record("update"):
        run(p, lambda: BACK.elementwise("update", parse("p += lr"), {"p": p}, {"p": p}, table=steps))
        run(p, lambda: BACK.advance(steps))
    plan.profile(5)
    plan.replay()
    assert p.tolist() == [11, 11]  # the first step's rate and the second's


# ---- threads -------------------------------------------------------------------------------------------------------


def in_threads(*functions):
    """Run the functions at the same time; re-raise what one raised."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


def test_recordings_in_two_threads_do_not_mix(rng):
    barrier, plans = threading.Barrier(3, timeout=10), [Plan(BACK, f"{i}") for i in range(2)]
    values = rng.normal(size=(2, 40, 30))
    results = {}

    def record(i):
        with plans[i].record("work"):
            barrier.wait()  # both record, and the third does not
            assert recording() is plans[i]
            y = gb.tensor(values[i])
            for _ in range(20):
                y = (y * 0.9).tanh() + i
            results[i] = y
            barrier.wait()

    def eager():
        barrier.wait()
        assert recording() is None
        y = gb.tensor(values[0])
        for _ in range(20):
            y = (y * 0.9).tanh()
        results[2] = y
        barrier.wait()

    in_threads(lambda: record(0), lambda: record(1), eager)
    assert [len(p.launches) for p in plans] == [60, 60]
    for i, start, plus in ((0, 0, 0), (1, 1, 1), (2, 0, 0)):
        y = values[start]
        for _ in range(20):
            y = np.tanh(y * 0.9) + plus
        np.testing.assert_allclose(results[i].numpy(), y, rtol=1e-13)


def test_trainers_in_two_threads_train_as_alone(rng):
    """Also with the same shapes: scratch and the recorder are a plan's or a thread's own."""
    sets = [data(rng, 200) for _ in range(3)]
    alone, together = ([trainer("dropout", "adam") for _ in sets] for _ in "ab")
    for t, (x, y) in zip(alone, sets, strict=True):
        t.fit(x, y, epochs=5, batch_size=32)
    in_threads(*(lambda t=t, d=d: t.fit(*d, epochs=5, batch_size=32) for t, d in zip(together, sets, strict=True)))
    assert list(map(bits, together)) == list(map(bits, alone))


@pytest.mark.parametrize("how", ["eager", "plan"])
def test_a_chunked_formula_in_many_threads(how, rng):
    """Each thread's eager work, and each plan, has scratch of its own."""
    values = [rng.normal(size=70_000) for _ in range(4)]
    results = [None] * 4

    def work(x):
        (gb.where(x > 0, x * x, x.exp() + 1) * gb.sigmoid(x)).sum().backward()

    def eager(i):
        for _ in range(10):
            x = gb.tensor(values[i], requires_grad=True)
            work(x)
        results[i] = x.grad.numpy()

    def planned(i):
        x, plan = gb.tensor(values[i], requires_grad=True), Plan(BACK)
        with plan.record("work"):
            work(x)
        for _ in range(30):
            plan.replay()
        results[i] = x.grad.numpy()

    in_threads(*(lambda i=i: {"eager": eager, "plan": planned}[how](i) for i in range(4)))
    for x, dx in zip(values, results, strict=True):
        s = 1 / (1 + np.exp(-x))
        f, df = np.where(x > 0, x * x, np.exp(x) + 1), np.where(x > 0, 2 * x, np.exp(x))
        np.testing.assert_allclose(dx, df * s + f * s * (1 - s), rtol=1e-12)
