"""On a real GPU: every kernel, whole trainings, graphs, steady state and full memory.

`gpubackprop doctor` does much of it for users. GPUBACKPROP_REQUIRE_GPU=1 makes the want of a GPU a failure.
"""

from collections import Counter

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import parity
from gpubackprop.backends import get_backend
from gpubackprop.backends.driver import DeviceMemoryError

pytestmark = pytest.mark.gpu
x, y = gb.datasets.digits()


def trained(device, epochs=2, **arguments):
    model = gb.Sequential(
        gb.Dense(64, 64, "gelu"), gb.BatchNorm(64), gb.LayerNorm(64), gb.Dropout(0.1), gb.Dense(64, 10)
    ).initialize(0)
    trainer = gb.Trainer(model, optimizer=gb.AdamW(3e-3), seed=0, device=device, **arguments)
    trainer.fit(x, y, epochs=epochs, batch_size=64)
    return trainer


@pytest.mark.parametrize("case", parity.cases(), ids=lambda case: case.name)
def test_kernels_agree_with_numpy(case):
    for dtype in case.dtypes:
        parity.compare(case, get_backend("cuda"), dtype)


@pytest.mark.parametrize(
    "precision, close", [("float32", 1e-4), ("float64", 1e-9), ("tf32", 5e-3), ("float16", 1e-2), ("bfloat16", 3e-2)]
)
def test_every_precision_trains_as_on_the_cpu(precision, close):
    gpu, cpu = (trained(device, precision=precision) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(gpu.history["loss"], cpu.history["loss"], rtol=close)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_graph_trains_the_same_bits_as_single_launches(precision, recwarn):
    eager, graph = (trained("cuda", precision=precision, cuda_graph=g) for g in (False, True))
    assert not recwarn.list
    for key, value in eager.model.state_dict().items():
        np.testing.assert_array_equal(value, graph.model.state_dict()[key])
    assert eager.history == graph.history


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_neither_waits_nor_allocates(cuda_graph, monkeypatch):
    """The calls of an epoch of 23 steps are those of one of 12, but for the launches."""
    trainer = trained("cuda", cuda_graph=cuda_graph)
    driver, calls = get_backend("cuda").driver, Counter()

    def counting(name):
        method = getattr(type(driver), name)

        def counted(self, *arguments, **keywords):
            calls[name] += 1
            return method(self, *arguments, **keywords)

        monkeypatch.setattr(type(driver), name, counted)

    for name in ("empty", "synchronize", "copy", "function", "launch", "gemm", "capture", "wrap"):
        counting(name)
    seen = []
    for rows in (1472, 768):
        trainer.fit(x[:rows], y[:rows], epochs=1, batch_size=64)
        seen.append(dict(calls))
        calls.clear()
    assert seen[0] == seen[1]


def test_cupy_arrays_go_in_and_come_out_without_a_copy():
    import cupy

    device_x, device_y = cupy.asarray(x), cupy.asarray(y)
    host, device = trained("cuda"), trained("cuda", epochs=1)
    device.fit(device_x, device_y, epochs=1, batch_size=64)
    assert host.history == device.history
    out = device.predict(device_x)
    assert isinstance(out, cupy.ndarray)
    np.testing.assert_array_equal(out.get(), host.predict(x))
    assert get_backend("cuda").asarray(device_x).data.ptr == device_x.data.ptr


def test_work_is_done_on_the_current_stream():
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        own = trained("cuda", cuda_graph=True)
        stream.synchronize()
    assert own.history == trained("cuda").history


def test_a_step_that_does_not_fit_says_what_would():
    import cupy

    pool = cupy.get_default_memory_pool()
    model = gb.mlp([64, 2048, 2048, 10]).initialize(0)
    trainer = gb.Trainer(model, seed=0, device="cuda")
    rows, labels = np.tile(x, (40, 1)), np.tile(y, 40)
    trainer.fit(rows, labels, epochs=1, batch_size=256)
    before, limit = model.state_dict(), pool.get_limit()
    pool.free_all_blocks()
    try:
        pool.set_limit(size=pool.total_bytes() + 300_000_000)
        with pytest.raises(
            DeviceMemoryError, match=r"batch_size=\d+ would fit; the model is as after epoch 1$"
        ) as told:
            trainer.fit(rows, labels, epochs=1, batch_size=32_768)
        for key, value in model.state_dict().items():
            np.testing.assert_array_equal(value, before[key])
        fits = int(str(told.value).partition("batch_size=")[2].partition(" ")[0])
        trainer.fit(rows, labels, epochs=1, batch_size=fits)
    finally:
        pool.set_limit(size=limit)
