"""The library on the CUDA backend over emulated devices: operations, updates, training, what a step asks for."""

import copy
import gc

import numpy as np
import pytest
from emulator.driver import NULL, Rehearsal, Violation
from test_ops import CASES

import gpubackprop as gb
from gpubackprop import backends
from gpubackprop.arena import Arena, Parameter
from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Workspace, use_workspace
from gpubackprop.backends.cuda import CudaBackend
from gpubackprop.backprop import backward
from gpubackprop.moments import Moments
from gpubackprop.plan import Plan

X, Y = (a[:320] for a in gb.datasets.digits())


def on(backend, a):
    """A leaf there."""
    return gb.Tensor(backend.asarray(np.array(a)), backend, requires_grad=True)


def net(*layers):
    return gb.Sequential(*(layers or (gb.Dense(64, 32, activation="relu"), gb.Dense(32, 10))))


def trained(device, make=net, *, data=(X, Y), epochs=1, batch_size=100, **how):
    """A trainer after an epoch."""
    trainer = gb.Trainer(make(), device=device, seed=3, **{"optimizer": gb.Adam(lr=1e-3)} | how)
    trainer.fit(*data, epochs=epochs, batch_size=batch_size)
    return trainer


def weights(trainer):
    return trainer.model.state_dict()


def assert_close(a, b, tolerance=1e-5):
    """History and weights of two trainers."""
    for key, values in a.history.items():
        np.testing.assert_allclose(values, b.history[key], rtol=tolerance, atol=tolerance, err_msg=key)
    for key, w in weights(a).items():
        np.testing.assert_allclose(w, weights(b)[key], rtol=0, atol=tolerance, err_msg=key)


def assert_same(a, b):
    """The same, bit for bit."""
    assert a.history == b.history
    assert {k: w.tobytes() for k, w in weights(a).items()} == {k: w.tobytes() for k, w in weights(b).items()}


@pytest.fixture(scope="module", autouse=True)
def rehearsal():
    """What the tests below launch is compiled while they run, two units at a time."""
    before, device = backends._backends.pop("cuda:plan", None), CudaBackend(Rehearsal())
    backends._backends["cuda:plan"] = device
    for how in [
        {},
        *({"precision": p} for p in PRECISIONS),
        *({"loss": loss} for loss in LOSSES),
        *({"optimizer": o} for o in OPTIMIZERS),
        {"clip_norm": 1.0},
        {"loss": "mse", "precision": "float16"},
    ]:
        gb.Trainer(net(), device="cuda:plan", seed=0, **how).plan(100)
    for how in [{}, {"precision": "float16"}]:
        for make in (normalized, branched):
            gb.Trainer(make(), optimizer=gb.SGD(), device="cuda:plan", seed=0, **how).plan(100)
    for key in OPERATIONS:
        computed(key, device)
    del backends._backends["cuda:plan"]
    if before is not None:
        backends._backends["cuda:plan"] = before


# ---- operations ----------------------------------------------------------------------------------------------------

OPERATIONS = [  # every operation, and those that reach a kernel of another form
    "neg (2, 3)", "exp (2, 3)", "log (2, 3)", "log1p (2, 3)", "expm1 (2, 3)", "sqrt (2, 3)", "sin (2, 3)", "cos (2, 3)",
    "tanh (2, 3)", "sigmoid (2, 3)", "abs (2, 3)", "relu (2, 3)", "relu (0,)", "relu ()",
    "add ((2, 3), (2, 3))", "add ((4, 1, 3), (2, 1))", "add ((1, 3), (0, 3))", "subtract ((2, 3), (3,))",
    "multiply ((2, 1), (1, 3))", "divide ((), (2, 3))", "power ((2, 3), (2, 3))", "maximum ((3,), (2, 3))",
    "minimum ((1,), (1, 1))",
    "sum over None", "sum over 1", "sum over (0, 2) kept", "sum of no rows", "sum of one", "mean over (0, 1, 2)",
    "mean over 0 kept", "max over -1", "max over (-1, 0)", "min over 0", "logsumexp along 1 of (2, 5, 3)",
    "softmax along 0 of (3, 4)", "log_softmax along -1 of (3, 4)", "softmax of no rows",
    "matmul ((3,), (3,))", "matmul ((2, 3), (3, 4))", "matmul ((2, 1, 2, 3), (4, 3, 2))", "matmul ((5, 2, 3), (3, 4))",
    "matmul ((2, 0), (0, 3))", "matmul ((0, 3), (3, 2))", "fan-out x @ x",
    "index reversed", "index strided", "index inner newaxis", "index pairs", "index mask", "index empty",
    "gather along 1", "gather nothing", "concatenate along 1", "concatenate unequal", "stack along -1",
    "reshape (2, -1)", "transpose (2, 0, 1)", "T", "broadcast (1, 3) to (4, 2, 3)", "where (3,) (2, 1) ()",
    "where x > 0", "clip", "fan-out through views",
    "dense", "dense of members", "dense twice", "dense of no rows", "dense gelu",
    "cross-entropy of labels mean", "cross-entropy of rows sum", "mse mean", "half_mse sum", "sse mean", "bce mean",
    "losses of no rows", "layer_norm", "layer_norm of a stack", "layer_norm inside", "batch_norm", "dropout",
    "dropout inside", "noise inside",
]  # fmt: skip


def computed(key, backend):
    """The value of an operation, and the gradients of what it is of."""
    function, _, arrays = CASES[key]
    leaves = [on(backend, a.astype("f")) for a in arrays]
    y = function(*leaves)
    y.backward(np.linspace(0.5, 1.5, y.size, dtype="f").reshape(y.shape))
    assert y.device == backend.device
    return [y.numpy(), *(None if x.grad is None else x.grad.numpy() for x in leaves)]


@pytest.mark.parametrize("key", OPERATIONS)
def test_operations_agree_with_the_cpu(key, cuda):
    for expected, got in zip(computed(key, get_backend("cpu")), computed(key, cuda), strict=True):
        if expected is not None:
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
        else:
            assert got is None


def test_a_tensor_is_made_on_the_device_it_is_asked_for(cuda):
    x = gb.tensor([[1.0, 2.0]], device="cuda", requires_grad=True)
    (x * x).sum().backward()
    assert x.device == "cuda:0" and x.grad.numpy().tolist() == [[2, 4]] and "tensor([[1., 2.]]" in repr(x)
    assert gb.tensor(x, device="cpu").device == "cpu" and gb.tensor(x).device == "cuda:0"
    with pytest.raises(ValueError, match="tensors live on different devices"):
        x + gb.tensor([[1.0, 2.0]])


# ---- training ------------------------------------------------------------------------------------------------------


def test_digits_train_as_on_the_cpu(cuda):
    data = gb.datasets.digits()
    cpu, gpu = (trained(d, data=data, metrics=["accuracy"]) for d in ("cpu", "cuda"))
    assert_close(cpu, gpu)
    assert gpu.backend is cuda and cpu.evaluate(*data) == pytest.approx(gpu.evaluate(*data), abs=1e-5)
    np.testing.assert_allclose(gpu.predict(X), cpu.predict(X), atol=1e-4)


OPTIMIZERS = [gb.SGD(lr=0.1), gb.SGD(lr=0.1, momentum=0.9), gb.SGD(lr=0.1, momentum=0.9, nesterov="lookahead"),
              gb.Adam(lr=0.01), gb.AdamW(lr=0.01, weight_decay=0.1)]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("how", ["plain", "clipped", "scaled"])
def test_updates_are_bit_equal(optimizer, how, cuda):
    """Of weights, moments and half-precision copies, for the same gradients and the same factor."""
    results = []
    for backend in (get_backend("cpu"), cuda):
        rng = np.random.default_rng(0)
        parameters = {"w": Parameter((30, 7)), "v": Parameter((7, 5)), "b": Parameter((7,))}
        for p in parameters.values():
            p.value = rng.normal(size=p.shape).astype("f")
        arena = Arena(parameters, backend, "float32")
        state = Moments(optimizer, arena)
        copy = arena.copy_in(np.float16) if how == "scaled" else None
        if copy is not None:
            arena.refresh(np.float16)
        table = backend.step_table(list(state.scalars), "float32", 8)
        values = state.table_rows(0, 5)
        table.load(np.stack([values[c] for c in table.columns], axis=1), np.zeros(5, np.int64), 1)
        backend.write(table.control, np.array([4, 0.25, 1, 0]) if how == "scaled" else np.array([1, 1, 1, 0]))
        bits = []
        for step in range(5):
            state.record(table, dynamic=how == "scaled", copy=copy, before=True)
            for key, p in parameters.items():
                g = rng.normal(size=p.shape).astype("f")
                backend.write(arena.slice(arena.gradients, key), np.inf if how == "scaled" and step == 2 else g)
            if how == "clipped":  # the norm is a sum: what follows from it is given
                backend.write(table.control, np.array([1, 1 / (step + 1), 1, 0]))
                state._launch(state.rule.graph(general=True), table, None, before=False)
            else:
                state.record(table, dynamic=how == "scaled", copy=copy)
            kept = [arena.weights, *state.moments.values(), *([copy] if how == "scaled" else [])]
            bits.append([backend.to_numpy(b).tobytes() for b in kept])
        results.append(bits)
    assert results[0] == results[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_training_with_every_optimizer(optimizer, cuda):
    assert_close(*(trained(d, optimizer=optimizer, epochs=2) for d in ("cpu", "cuda")), 2e-5)


def normalized():
    return net(gb.InputNoise(0.1), gb.Dense(64, 24), gb.BatchNorm(24), gb.Activation("tanh"),
               gb.Dropout(0.2), gb.Dense(24, 16, activation="gelu"), gb.LayerNorm(16), gb.Dense(16, 10))  # fmt: skip


def test_normalisation_and_dropout(cuda):
    cpu, gpu = (trained(d, normalized, optimizer=gb.SGD(lr=0.1), epochs=2) for d in ("cpu", "cuda"))
    assert_close(cpu, gpu, 2e-5)
    assert any("mean" in key for key in weights(gpu))
    assert cpu.evaluate(X, Y) == pytest.approx(gpu.evaluate(X, Y), abs=1e-4)


def branched():
    return net(gb.Concatenate(gb.Dense(64, 24, activation="relu"), gb.Sequential(), gb.Dense(64, 8)), gb.Dense(96, 10))


@pytest.mark.parametrize("precision, tolerance", [(None, 1e-5), ("float16", 2e-2)])
def test_branches(precision, tolerance, cuda):
    how = {"precision": precision, "optimizer": gb.SGD(lr=0.1), "epochs": 2}
    cpu, gpu = (trained(d, branched, **how) for d in ("cpu", "cuda"))
    assert_close(cpu, gpu, tolerance)
    assert gpu.history["loss"][-1] < gpu.history["loss"][0]


def test_scaling_of_layers(cuda):
    """The draws are the host's, and so are the variances they are scaled by."""
    cpu, gpu = branched(), branched().to("cuda")
    for model in (cpu, gpu):
        gb.lsuv(model, X, seed=1)
    for key, w in gpu.state_dict().items():
        np.testing.assert_allclose(w, cpu.state_dict()[key], rtol=1e-4, atol=1e-6)
    assert gpu.backend is cuda and gb.layer_stats(gpu, X)["variance"][-1] == pytest.approx(1, abs=1e-4)


LOSSES = {
    "bce": np.eye(10, dtype="f")[Y], "mse": X[:, :10], "half_mse": X[:, :10], "sse": X[:, :10],
    "cross_entropy": np.eye(10, dtype="f")[Y] * 0.9 + 0.01,
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss, cuda):
    assert_close(*(trained(d, loss=loss, data=(X, LOSSES[loss]), optimizer=gb.SGD(lr=0.01)) for d in ("cpu", "cuda")))


def test_a_loss_of_the_users_own(cuda):
    def loss(output, target):
        return gb.softmax_cross_entropy(output, target) + (output * output).mean() * 0.01

    assert_close(*(trained(d, loss=loss, optimizer=gb.SGD(lr=0.1)) for d in ("cpu", "cuda")))


PRECISIONS = {"float64": 1e-12, "tf32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # how closely backends agree


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision, cuda):
    cpu, gpu = (trained(d, precision=precision, optimizer=gb.SGD(lr=0.1), epochs=2) for d in ("cpu", "cuda"))
    assert_close(cpu, gpu, PRECISIONS[precision])
    assert gpu.history["loss"][-1] < gpu.history["loss"][0]
    assert all(w.dtype == (np.float64 if precision == "float64" else np.float32) for w in weights(gpu).values())


def test_normalisation_and_dropout_in_16_bits(cuda):
    how = {"precision": "float16", "optimizer": gb.SGD(lr=0.1), "epochs": 2}
    assert_close(*(trained(d, normalized, **how) for d in ("cpu", "cuda")), 5e-2)


@pytest.mark.parametrize("loss", ["mse", "bce", "cross_entropy"])
def test_losses_in_16_bits(loss, cuda):
    """Rows of targets stay float32."""
    how = {"loss": loss, "data": (X, LOSSES[loss]), "optimizer": gb.SGD(lr=0.01), "precision": "float16"}
    assert_close(*(trained(d, **how) for d in ("cpu", "cuda")), 2e-2)


def test_a_step_whose_gradient_is_not_finite_is_skipped(cuda):
    """A loss scale too large for float16 halves until it fits; both backends skip the same steps."""
    trainers = []
    for device in ("cpu", "cuda"):
        trainer = gb.Trainer(net(), precision="float16", device=device, seed=3)
        trainer.backend.write(trainer._table.control[:1], 2.0**24)
        trainer.fit(X, Y, epochs=2)
        trainers.append(trainer)
    controls = [t.backend.to_numpy(t._table.control) for t in trainers]
    assert controls[0][0] == controls[1][0] < 2.0**24 and controls[0][3] == controls[1][3]
    assert_close(*trainers, 2e-2)


def test_clipping(cuda):
    cpu, gpu = (trained(d, clip_norm=0.05, optimizer=gb.SGD(lr=1.0)) for d in ("cpu", "cuda"))
    assert_close(cpu, gpu)
    free = trained("cuda", optimizer=gb.SGD(lr=1.0))
    assert free.history != gpu.history


def test_a_diverged_epoch_goes_back_to_the_last_good_one(cuda):
    messages = []
    for device in ("cpu", "cuda"):
        trainer = gb.Trainer(net(), optimizer=gb.SGD(lr=0.1), device=device, seed=3)
        trainer.fit(X, Y, epochs=1)
        before = {k: w.copy() for k, w in weights(trainer).items()}
        bad = X.copy()
        bad[300] = 3e38
        with pytest.raises(gb.TrainingDiverged) as error:
            trainer.fit(bad, Y, epochs=1)
        messages.append(str(error.value))
        assert all((before[k] == w).all() for k, w in weights(trainer).items())
    assert messages[0] == messages[1]


def test_in_any_order_of_threads_and_blocks_the_bits_are_the_same(cuda):
    runs = []
    for order in (0, 1, 2, 3, 4):
        cuda.driver.order_seed = order
        runs.append(trained("cuda", normalized, clip_norm=1.0, batch_size=150))
    for other in runs[1:]:
        assert_same(runs[0], other)


# ---- what a step asks of the device --------------------------------------------------------------------------------

ASKED = ("allocations", "pinned allocations", "compilations", "synchronisations")


def asked(counts):
    return {k: n for k, n in counts.items() if k in ASKED or "copies" in k}


@pytest.mark.parametrize("how", [
    {}, {"clip_norm": 1.0}, {"precision": "float16"}, {"precision": "float16", "cuda_graph": True},
], ids=str)  # fmt: skip
def test_a_replayed_step_only_launches(how, cuda):
    """No allocation, compilation, copy or wait from the second step of a size on: none at all in a later epoch."""
    trainer = gb.Trainer(normalized(), device="cuda", seed=3, **how)
    seen, driver = [], cuda.driver
    run_epoch = trainer._run_epoch

    def watched(source, steps, *rest):
        for step in set(steps):

            def run(*which, inner=step.run):
                before = driver.counts.copy()
                inner(*which)
                seen.append(driver.counts - before)

            step.run = run if trainer.epoch else step.run
        return run_epoch(source, steps, *rest)

    trainer._run_epoch = watched
    trainer.fit(X, Y, epochs=2, batch_size=100)
    assert len(seen) == 4 and all(not asked(counts) for counts in seen)
    kinds = {frozenset(counts) - {"nodes of graphs"} for counts in seen}
    assert kinds == ({frozenset({"graph launches"}), frozenset({"launches", "products"})} if "cuda_graph" in how else
                     {frozenset({"launches", "products"})})  # fmt: skip


def test_a_later_fit_of_the_same_size_compiles_nothing(cuda):
    trainer = trained("cuda")
    before = cuda.driver.counts["compilations"]
    trainer.fit(X, Y, epochs=1, batch_size=100)
    trained("cuda")
    assert cuda.driver.counts["compilations"] == before


def test_memory_is_given_back(cuda):
    free = []
    for _ in range(3):
        trained("cuda")
        gc.collect()
        free.append(cuda.memory()[0])
    assert free[1] == free[2]


@pytest.mark.parametrize("more, launches", [({}, 17), ({"clip_norm": 1.0}, 18)])
def test_a_step_of_784_512_512_10_takes_17_launches(more, launches):
    model = gb.mlp([784, 512, 512, 10], activation="relu")
    plan = gb.Trainer(model, optimizer="adam", device="cuda:plan", seed=0, **more).plan(128)
    assert [launch.name for launch in plan.launches] == [
        "feed", *["gemm", "bias activation"] * 3, "softmax_cross_entropy", "activation backward", "gemm", "gemm",
        "activation backward", "gemm", "gemm", "activation backward", "gemm", *["gradient norm"] * len(more), "adam",
    ]  # fmt: skip
    assert len(plan.launches) == launches and {*plan.sections} == {"feed", "before", "gradient", "update"}


def test_the_plan_is_that_of_a_device(cuda):
    def planned(device):
        plan = gb.Trainer(normalized(), device=device, seed=0).plan(64)
        assert [(launch.name, launch.bytes, launch.flops) for launch in plan.launches]
        return [(launch.name, launch.what, launch.bytes, launch.flops) for launch in plan.launches], plan.bytes_resident

    assert planned("cuda") == planned("cuda:plan")


@pytest.mark.parametrize("make, how", [
    (net, {}), (normalized, {"clip_norm": 1.0}), (net, {"precision": "bfloat16", "optimizer": gb.AdamW(lr=1e-3)}),
])  # fmt: skip
@pytest.mark.parametrize("dry", [True, False])
def test_bytes_resident_is_what_lives_as_long_as_the_plan(make, how, dry, cuda):
    """All else is let go of: model, trainer, data. What the device has still allocated is what the plan says."""

    def planned():
        if dry:
            return gb.Trainer(make(), device="cuda", seed=3, **how).plan(100)
        (step,) = trained("cuda", make, data=(X[:300], Y[:300]), **how)._steps.values()
        return step.plan

    with use_workspace(Workspace()):
        plan = planned()
    gc.collect()
    free, total = cuda.memory()
    assert plan.bytes_resident == total - free > 0
    plan.replay()


def test_bytes_resident_has_what_reductions_and_scatters_make(cuda):
    x = on(cuda, np.ones((3, 5, 7)))
    plan = Plan(cuda, dry=True)
    with plan.record("gradient"):
        backward(x[:, [0, 2, 2]].sum((0, 2)).mean(), cuda.asarray(np.ones(())))
    del x
    gc.collect()
    free, total = cuda.memory()
    assert plan.bytes_resident == total - free > 0


# ---- graphs, streams, devices --------------------------------------------------------------------------------------


def test_a_graph_computes_the_same_bits(cuda):
    runs = []
    for graph in (False, True):
        before = cuda.driver.counts.copy()
        runs.append(trained("cuda", normalized, clip_norm=0.5, epochs=2, batch_size=150, cuda_graph=graph))
        graphs = (cuda.driver.counts - before)["graph launches"]
        assert graphs == (3 if graph else 0)  # the first of four whole batches records
    assert_same(*runs)


def test_a_graph_on_a_stream_of_the_users(cuda):
    eager, stream = trained("cuda", epochs=2), cuda.driver.stream()
    with cuda.driver.on(stream):
        assert_same(eager, trained("cuda", epochs=2, cuda_graph=True))
    assert cuda.driver._queues[stream].done > 100


@pytest.mark.parametrize("forgotten", ["before", "after"])
@pytest.mark.parametrize("where", ["graph", "prefetch"])
def test_a_forgotten_order_does_not_go_unnoticed(where, forgotten, cuda, monkeypatch):
    """Between the null stream, where the launches go, and that of the graph, or of the copies."""
    order, trainer = cuda.driver.order, gb.Trainer(net(), device="cuda", seed=3, cuda_graph=where == "graph")

    def forgetful(before, after):
        if (before if forgotten == "before" else after) != NULL:
            order(before, after)

    with monkeypatch.context() as patched:
        patched.setattr(cuda.driver, "order", forgetful)
        if where == "prefetch":
            patched.setattr(cuda.driver, "memory", lambda: (0, 1 << 30))
        with pytest.raises((Violation, gb.TrainingDiverged)):
            trainer.fit(X, Y, epochs=2, batch_size=100)
    cuda.driver.check = lambda: None  # what was not ordered goes on being found


def test_graphs_on_the_cpu_warn_and_train(cuda):
    with pytest.warns(RuntimeWarning, match="the CPU has no CUDA graphs"):
        assert_same(trained("cpu", cuda_graph=True), trained("cpu"))


def test_two_devices_side_by_side(cuda):
    """Interleaved in one thread, each has scratch of its own."""
    one, other = (gb.Trainer(net(), device=d, seed=3) for d in ("cuda:0", "cuda:1"))
    for trainer in (one, other, one, other):
        trainer.fit(X, Y, epochs=1)
    assert_same(one, other)
    assert (one.backend.device, other.backend.device) == ("cuda:0", "cuda:1")


def test_copies_and_files(cuda, tmp_path):
    trainer = trained("cuda")
    twin = copy.deepcopy(trainer)
    for t in (trainer, twin):
        t.fit(X, Y, epochs=1)
    assert_same(trainer, twin)
    gb.save_model(trainer.model, tmp_path / "m.safetensors")
    loaded = gb.load_model(tmp_path / "m.safetensors")
    np.testing.assert_allclose(loaded.predict(X), trainer.predict(X), atol=1e-5)
