"""Training on an emulated CUDA device: data on its way, arrays at the door, graphs, full memory."""

import copy
import gc
import pickle
import re
import signal
import threading
import warnings

import numpy as np
import pytest
from emulator.driver import EmulatedDriver

import gpubackprop as gb
from gpubackprop import backends
from gpubackprop.backends.cuda import CudaBackend
from gpubackprop.backends.driver import CaptureError, DeviceMemoryError
from gpubackprop.step import StagedSource

x, y = gb.datasets.digits()
x, y = x[:150], y[:150]


def trainer(device="cuda", **arguments):
    model = gb.mlp([64, 24, 10], dropout=0.2).initialize(3)
    return gb.Trainer(model, optimizer=gb.Adam(3e-3), seed=0, device=device, **arguments)


def state(trained):
    return trained.model.state_dict()


def assert_same_bits(a, b):
    for key, value in state(a).items():
        np.testing.assert_array_equal(value, state(b)[key])
    assert a.history == b.history


# ---- data on its way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_staged_data_trains_the_same_bits_as_resident_data(cuda, shuffle, monkeypatch):
    """Batches gathered on the host and copied beside the step before theirs; with a ragged one, or only one."""
    for batch in (64, 150):
        resident, staged = trainer(), trainer()
        resident.fit(x, y, epochs=2, batch_size=batch, shuffle=shuffle)
        with monkeypatch.context() as patched:
            patched.setattr(cuda.driver, "memory", lambda: (x.nbytes, 1 << 30))  # not half of it free for the data
            staged.fit(x, y, epochs=2, batch_size=batch, shuffle=shuffle)
        assert_same_bits(resident, staged)


@pytest.fixture
def staged(cuda, monkeypatch):
    """No data has room on the device; its backend."""
    monkeypatch.setattr(cuda.driver, "memory", lambda: (0, 1 << 30))
    return cuda


def test_a_staged_step_allocates_nothing_and_waits_once_for_an_older_copy(staged, monkeypatch):
    t, counts, queue, behind = trainer(), staged.driver.counts, staged.driver._queues[0], []
    t.fit(x, y, epochs=1, batch_size=32)
    before = StagedSource.before

    def seen(self, i):
        before(self, i)
        behind.append((queue.given, queue.done))

    spent = []
    with monkeypatch.context() as patched:
        patched.setattr(StagedSource, "before", seen)
        for rows in (150, 118, 118):  # five steps; four, whose ragged one is recorded; four
            earlier = counts.copy()
            t.fit(x[:rows], y[:rows], epochs=1, batch_size=32)
            spent.append(counts - earlier)
    five, _, four = spent
    more = {k: five[k] - four[k] for k in five}
    copies = {k: more.pop(k) for k in list(more) if "copies" in k}
    assert copies.pop("copies to the device") == 2 and not any(copies.values())  # x and y, out of pinned memory
    assert more.pop("synchronisations") == 1
    assert {k for k, n in more.items() if n} == {"launches", "products"}
    (given, _), (_, done) = behind[1], behind[3]
    assert done <= given  # before the fourth step the second and the third may still be under way


@pytest.mark.parametrize("fault", ["Ctrl-C", "an error"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_staged_epoch_cut_short_leaves_no_copy_under_way(staged, fault, at, monkeypatch):
    """Memory that a stream still works on would go back to the pool; the emulated device sees that."""
    before = StagedSource.before

    def cut(self, i):
        before(self, i)
        if i == at:
            if fault == "an error":
                raise OSError("the disk was full")
            signal.raise_signal(signal.SIGINT)

    t = trainer()
    with monkeypatch.context() as patched:
        patched.setattr(StagedSource, "before", cut)
        with pytest.raises((KeyboardInterrupt, OSError)):
            t.fit(x, y, epochs=1, batch_size=32)
    gc.collect()
    staged.driver.check()
    t.fit(x, y, epochs=1, batch_size=32)
    assert t.epoch == 1


def test_streams_are_lent_and_lent_again(staged):
    t, streams = trainer(), []
    for _ in range(4):
        t.fit(x, y, epochs=1, batch_size=64)
        streams.append(len(staged.driver._queues))
    assert streams == [4] * 4  # the null stream, one that copies and two marks


def test_a_threads_stream_serves_the_next_thread(cuda):
    for _ in range(3):
        t = trainer(cuda_graph=True)
        thread = threading.Thread(target=t.fit, args=(x, y), kwargs={"epochs": 1, "batch_size": 50})
        thread.start()
        thread.join()
        assert t.epoch == 1 and len(cuda.driver._queues) == 2
        del t  # whose graphs keep the stream


# ---- arrays at the door --------------------------------------------------------------------------------------------


def on(backend, array):
    return backend.asarray(np.ascontiguousarray(array))


def test_device_arrays_train_predict_and_evaluate_as_host_arrays(cuda):
    host, device = trainer(), trainer()
    host.fit(x, y, epochs=2, batch_size=64, validation_data=(x[:20], y[:20]))
    dx, dy = on(cuda, x), on(cuda, y)
    device.fit(dx, dy, epochs=2, batch_size=64, validation_data=(on(cuda, x[:20]), on(cuda, y[:20])))
    assert_same_bits(host, device)
    out = device.predict(dx)
    assert type(out) is type(dx) and out.shape == (150, 10)
    np.testing.assert_array_equal(cuda.to_numpy(out), host.predict(x))
    assert isinstance(host.predict(x), np.ndarray)
    assert device.evaluate(dx, dy) == host.evaluate(x, y)
    np.testing.assert_array_equal(cuda.to_numpy(dx), x)  # untouched


def test_device_arrays_of_another_type_are_cast_there(cuda):
    wide = trainer()
    plain = trainer()
    plain.fit(x, y, epochs=1, batch_size=64)
    wide.fit(on(cuda, x.astype(np.float64)), on(cuda, y), epochs=1, batch_size=64)
    assert_same_bits(wide, plain)


def test_regression_targets_on_the_device(cuda):
    t = x[:, :3] * 2
    losses = []
    for data in ((x, t), (on(cuda, x), on(cuda, t))):
        model = gb.mlp([64, 8, 3]).initialize(0)
        losses.append(gb.Trainer(model, "mse", seed=0, device="cuda").fit(*data, epochs=2, batch_size=64))
    assert losses[0] == losses[1]


def test_arrays_in_different_places_are_errors(cuda):
    other = backends.get_backend("cuda:1")
    t = trainer()
    with pytest.raises(
        TypeError, match=r"^fit: x lies on a CUDA device but y on the host; move y with cupy\.asarray\(y\)"
    ):
        t.fit(on(cuda, x), y)
    with pytest.raises(
        TypeError, match=r"^fit: y lies on a CUDA device but x on the host; move x with cupy\.asarray\(x\)"
    ):
        t.fit(x, on(cuda, y))
    for data, name in (((on(other, x), on(other, y)), "x"), ((on(cuda, x), on(other, y)), "y")):
        with pytest.raises(ValueError, match=f"^fit: {name}: the array lies on 'cuda:1' but 'cuda:0' is in use; copy"):
            t.fit(*data)
        with pytest.raises(ValueError, match=f"^fit: validation_data: {name}: the array lies on 'cuda:1'"):
            t.fit(x, y, validation_data=data)
    with pytest.raises(
        TypeError, match=r"^fit: x lies on a CUDA device but the model on the CPU; pass x\.get\(\), or make "
    ):
        trainer("cpu").fit(on(cuda, x), on(cuda, y))
    assert t.history == {}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a[:, :60], "^fit: x has 60 columns but the model expects 64$"),
        (lambda a: a[:0], r"^fit: x has shape \(0, 64\), expected at least a row and a column; pass some data$"),
        (lambda a: a.reshape(-1), r"^fit: x has shape \(9600,\), expected rows and columns"),
        (lambda a: np.where(a == a.max(), np.nan, a), "^fit: x has a NaN at row"),
        (lambda a: np.where(a == a.max(), np.inf, a), "^fit: x has an infinity at row"),
    ],
)
def test_bad_device_arrays_are_errors_before_anything_is_trained(cuda, change, message):
    t = trainer()
    with pytest.raises(ValueError, match=message):
        t.fit(on(cuda, change(x)), on(cuda, y[: len(change(x))] if change(x).ndim == 2 else y))
    assert t.history == {} and t.step == 0


# ---- graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "float16"])
def test_a_graph_trains_the_same_bits(cuda, precision):
    eager, graph = trainer(precision=precision), trainer(precision=precision, cuda_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in (eager, graph):
            t.fit(x, y, epochs=2, batch_size=32)
            t.fit(x, y, epochs=1, batch_size=32)
    assert_same_bits(eager, graph)
    assert cuda.driver.counts["graph launches"] > 8


def test_a_capture_that_fails_is_one_warning_and_eager_for_good(cuda, monkeypatch):
    asked = []

    def fail(stream, body):
        asked.append(stream)
        raise CaptureError("the driver says no")

    monkeypatch.setattr(cuda.driver, "capture", fail)
    plain, t = trainer(), trainer(cuda_graph=True)
    plain.fit(x, y, epochs=2, batch_size=32)
    with pytest.warns(RuntimeWarning, match=r"^cuda_graph: the driver says no; steps are launched one by one$") as seen:
        t.fit(x, y, epochs=1, batch_size=32)
        t.fit(x, y, epochs=1, batch_size=32)
    assert len(seen) == 1 and len(asked) == 1
    assert_same_bits(plain, t)


# ---- full memory ---------------------------------------------------------------------------------------------------


def small(monkeypatch, memory):
    """A device of so many bytes, with 1,500 rows for it to train on."""
    backend = CudaBackend(EmulatedDriver(0, memory=memory))
    monkeypatch.setitem(backends._backends, "cuda:0", backend)
    return backend, np.tile(x, (10, 1)), np.tile(y, 10)


def advised(t, *data, batch_size, **weights):
    with pytest.raises(
        DeviceMemoryError, match=r"^fit: steps of [\d,]+ rows need [\d,]+ bytes beside the weights"
    ) as told:
        t.fit(*data, epochs=1, batch_size=batch_size, **weights)
    found = re.search(r"free on cuda:0; batch_size=(\d+) would fit; the model is as after epoch \d$", str(told.value))
    return int(found[1])


@pytest.mark.parametrize("asked", [1500, 1499, 1100])
@pytest.mark.parametrize("memory, options", [
    (4_200_000, {}),
    (2_400_000, {"precision": "float16"}),
    (3_400_000, {"optimizer": gb.SGD(0.1), "class_weight": "balanced"}),
    (4_200_000, {"on device": True}),
    (9_000_000, {"columns": 1024}),
])  # fmt: skip
def test_the_batch_size_advised_fits_and_a_larger_one_does_not(cuda, monkeypatch, memory, asked, options):
    """On data that stays on the device, or (1,024 columns) that does not; the last batch has a step of its own."""
    backend, rows, labels = small(monkeypatch, memory)
    options = {**options}
    weights = {"class_weight": options.pop("class_weight", None)}
    rows = np.tile(rows, options.pop("columns", 64) // 64)
    if options.pop("on device", False):
        rows, labels = on(backend, rows), on(backend, labels)

    def make():
        return gb.Trainer(gb.mlp([rows.shape[1], 128, 128, 10]).initialize(0), seed=0, device="cuda", **options)

    t, free = make(), backend.memory()
    fits = advised(t, rows, labels, batch_size=asked, **weights)
    t.fit(rows, labels, epochs=1, batch_size=fits, **weights)
    assert t.epoch == 1
    del t
    gc.collect()  # of the caught error, which holds frames
    t = make()
    assert backend.memory()[0] > 0.99 * free[0]  # but for scratch
    with pytest.raises(DeviceMemoryError):
        t.fit(rows, labels, epochs=1, batch_size=int(1.3 * fits), **weights)


def test_full_memory_changes_neither_model_nor_history(cuda, monkeypatch):
    _, rows, labels = small(monkeypatch, 14_000_000)
    model = gb.mlp([64, 512, 512, 10]).initialize(0)
    t = gb.Trainer(model, seed=0, device="cuda")
    t.fit(rows, labels, epochs=1, batch_size=64)
    before, history = copy.deepcopy(model.state_dict()), copy.deepcopy(t.history)
    fits = advised(t, rows, labels, batch_size=1500)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
    assert t.history == history
    t.fit(rows, labels, epochs=1, batch_size=fits)
    assert len(t.history["loss"]) == 2


# ---- elsewhere -----------------------------------------------------------------------------------------------------


def test_models_move_between_devices_with_their_values(cuda):
    t = trainer()
    t.fit(x, y, epochs=1, batch_size=64)
    before = state(t)
    t.model.to("cuda:1")
    t.model.to("cpu")
    for key, value in state(t).items():
        np.testing.assert_array_equal(value, before[key])
    twin = copy.deepcopy(trainer())
    assert twin.backend.device == "cuda:0"


def test_a_trainer_of_any_device_is_read_where_there_is_no_gpu(cuda, monkeypatch):
    monkeypatch.setattr(backends, "_auto", lambda: "cuda")
    any_device, this_device = trainer("auto"), trainer("cuda")
    any_device.fit(x, y, epochs=1, batch_size=64)
    files = [pickle.dumps(t) for t in (any_device, this_device)]

    def fail(device, number):
        raise RuntimeError(f"device {device!r}: there is no GPU")

    monkeypatch.setattr(backends, "_auto", lambda: "cpu")
    monkeypatch.setattr(backends, "_index", fail)
    read = pickle.loads(files[0])
    assert any_device.backend is cuda and read.backend.device == "cpu"
    assert_same_bits(read, any_device)
    with pytest.raises(RuntimeError, match="there is no GPU"):
        pickle.loads(files[1])


def test_a_moved_model_keeps_the_scale_of_the_loss(cuda):
    t = trainer(precision="float16")
    t.backend.write(t._table.control, (2.0**9, 2.0**-9, 1, 7))
    t.model.to("cuda:1")
    t.fit(x, y, epochs=1, batch_size=50)
    assert t.backend.to_numpy(t._table.control).tolist() == [2.0**9, 2.0**-9, 1, 10]


def test_the_users_stream_is_the_one_that_works(cuda):
    """On it alone, and on no other: the emulator would miss an order between them."""
    with cuda.driver.on(cuda.driver.stream()):
        t = trainer(cuda_graph=True)
        t.fit(x, y, epochs=1, batch_size=64)
        cuda.synchronize()
    plain = trainer("cpu")
    plain.fit(x, y, epochs=1, batch_size=64)
    np.testing.assert_allclose(t.history["loss"], plain.history["loss"], rtol=1e-5)
