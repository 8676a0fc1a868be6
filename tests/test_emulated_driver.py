"""What only a device has: typed launches, graphs, streams, memory; and that the emulated one keeps a device's rules."""

import ctypes
import inspect
from dataclasses import replace

import numpy as np
import pytest
from emulator.driver import EmulatedDriver, Violation
from test_backend import close, drawn, junk, put

from gpubackprop.backends import codegen
from gpubackprop.backends.base import Workspace, use_workspace
from gpubackprop.backends.cuda import CudaBackend, gemm_arguments
from gpubackprop.backends.driver import CaptureError, DeviceMemoryError, Driver, Paper
from gpubackprop.backends.launcher import Launcher
from gpubackprop.formulas import RESULT, parse


@pytest.fixture
def device():
    driver = EmulatedDriver()
    with use_workspace(Workspace()):
        yield CudaBackend(driver)
    driver.check()


def bind(back, **changes):
    """relu_forward: y = max(x + b, 0) of (1, 4, 8), with some arguments changed; and those arguments."""
    x, y, b = (put(back, np.ones(s), "f") for s in ((4, 8), (4, 8), (8,)))
    arguments = {"y": y, "x": x, "b": b, "rows": 4, "columns": 8, "members": 1} | changes
    arguments = {k: v for k, v in arguments.items() if v is not ...}
    types, source = {"T": np.dtype(np.float32)}, codegen.source("relu")
    call = Launcher(back.driver).bind(source, "relu_forward", types, (1, 1, 1), (2, 4, 1), arguments)
    return call, arguments


def test_a_typed_launch(device):
    call, arguments = bind(device)
    call()
    assert (device.to_numpy(arguments["y"]) == 2).all()


@pytest.mark.parametrize("error, match, change", [
    (TypeError, "relu_forward: x has dtype float64, expected float32", lambda put, x: {"x": put(np.ones((4, 8)))}),
    (ValueError, r"relu_forward: x of shape \(4, 8\) is not C-contiguous; copy it first", lambda put, x: {"x": x.T}),
    (TypeError, "relu_forward: arguments and parameters differ in rows", lambda put, x: {"rows": ...}),
    (TypeError, "relu_forward: arguments and parameters differ in t", lambda put, x: {"t": x}),
    (TypeError, "relu_forward: rows is 1.5, expected an integer", lambda put, x: {"rows": 1.5}),
    (TypeError, "relu_forward: rows is 9223372036854775808, expected an integer of 64 bits",
     lambda put, x: {"rows": 2**63}),
])  # fmt: skip
def test_a_launch_is_checked_when_it_is_bound(error, match, change, device):
    with pytest.raises(error, match=match):
        bind(device, **change(lambda a: put(device, a), put(device, np.ones((8, 4)), "f")))


def test_an_address_off_the_boundary_of_an_element(device):
    class Shifted:
        dtype, shape, flags = np.dtype(np.float32), (4, 8), np.ones(1).flags

    class Driver(EmulatedDriver):
        def address(self, buffer):
            return 0x1002 if isinstance(buffer, Shifted) else super().address(buffer)

    with pytest.raises(ValueError, match="relu_forward: x lies at 0x1002, off the boundary of its 4-byte elements"):
        bind(CudaBackend(Driver()), x=Shifted())


def test_scratch_may_grow_while_earlier_launches_use_it(device, rng):
    """A larger sum bound later has larger scratch; the launch bound before keeps its own."""
    small, large = drawn(rng, 5_000, "d"), drawn(rng, 200_000, "d")
    outs, bound = [junk(device, ()) for _ in range(2)], []
    for x, out in zip((small, large), outs, strict=True):
        bound.append(device.elementwise_sum("test", parse("total = x"), {"x": put(device, x)}, out))
    for launch in bound:
        launch.run()
    close([device.to_numpy(out) for out in outs], [small.sum(), large.sum()], scale=1000)


def test_a_graph_replays_what_was_captured(device):
    x, y = put(device, np.zeros(3)), put(device, np.zeros(3))
    body = [
        device.fill(x, 2.0),
        device.elementwise("e", parse("y += x * x"), {"x": x, "y": y}, {"y": y}),
        device.fill(x, 5.0),
    ]
    graph = device.capture(body)
    assert device.to_numpy(y).tolist() == [0] * 3  # captured, not run
    before = device.driver.counts.copy()
    for _ in range(3):
        graph()
    assert device.driver.counts - before == {"graph launches": 3, "nodes of graphs": 9}
    assert device.to_numpy(y).tolist() == [12] * 3 and device.to_numpy(x).tolist() == [5] * 3


def test_a_graph_is_ordered_between_what_the_current_stream_has_and_gets(device):
    driver, x = device.driver, put(device, np.zeros(3))
    with driver.on(driver.stream()):
        device.synchronize()
        graph = device.capture([device.elementwise("e", parse("x * 2 + 1"), {"x": x}, {RESULT: x})])
        add = device.elementwise("e", parse("x + 1"), {"x": x}, {RESULT: x})
        add.run()
        graph()
        add.run()
        assert device.to_numpy(x).tolist() == [4] * 3


def test_what_cannot_be_captured(device):
    x, host = put(device, np.zeros(3)), np.zeros(3)
    for body, reason in (
        (lambda: device.empty((3,), "f"), "allocation"), (device.synchronize, "waiting"),
        (lambda: device.to_numpy(x), "pageable"), (lambda: device.write(x, 1), "pageable"),
        (lambda: bind(device), "allocation"), (lambda: host[9], "IndexError"),
    ):  # fmt: skip
        driver = device.driver
        with driver.scope(), pytest.raises(CaptureError, match=reason):
            driver.capture(driver.stream(), body)
    with driver.scope(), pytest.raises(CaptureError, match="the null stream never"):
        driver.capture(driver.current(), lambda: None)
    device.fill(x, 1.0).run()  # nothing is captured any more
    assert device.to_numpy(x).tolist() == [1] * 3


def test_device_memory_is_exhausted():
    back = CudaBackend(EmulatedDriver(memory=10_000))
    kept = back.empty((1000,), "f")
    with pytest.raises(
        DeviceMemoryError, match="device memory: 8,000 bytes do not fit into 6,000 free of 10,000"
    ) as error:
        back.empty((2000,), "f")
    assert (error.value.nbytes, error.value.free, error.value.total) == (8000, 6000, 10_000)
    del kept
    back.empty((2000,), "f")
    assert back.memory() == (10_000, 10_000)


def test_two_devices(device):
    other = CudaBackend(EmulatedDriver(1))
    x = put(other, np.arange(3.0))
    other.elementwise("e", parse("x + 1"), {"x": x}, {RESULT: x}).run()
    assert other.to_numpy(x).tolist() == [1, 2, 3] and other.device == "cuda:1"
    with pytest.raises(ValueError, match="the array lies on 'cuda:1' but 'cuda:0' is in use; copy it there"):
        device.asarray(x)
    with pytest.raises(Violation, match="no live memory of cuda:0"):
        device.elementwise("e", parse("x + 1"), {"x": x}, {RESULT: x})


def test_arrays_of_other_libraries_are_viewed_not_copied(device):
    mine = put(device, np.arange(6.0).reshape(2, 3))

    class Foreign:
        __cuda_array_interface__ = mine.T.__cuda_array_interface__

    before = device.driver.counts.copy()
    view = device.asarray(Foreign())
    assert device.driver.counts == before and view.shape == (3, 2)
    device.fill(mine, 4.0).run()
    assert (device.to_numpy(view) == 4).all()


# ---- the emulated device keeps its rules ---------------------------------------------------------------------------


@pytest.mark.parametrize("other", [EmulatedDriver, Paper])
def test_every_driver_has_the_calls_of_the_protocol(other):
    calls = {k: f for k, f in vars(Driver).items() if inspect.isfunction(f) and not k.startswith("_")}
    assert len(calls) == 15
    for key, call in calls.items():
        assert [*inspect.signature(getattr(other, key)).parameters] == [*inspect.signature(call).parameters], key


def test_arguments_have_the_types_of_the_ptx(device):
    driver = device.driver
    with driver.scope():
        function = driver.function(codegen.source("relu"), "relu_forward")
    call, arguments = bind(device)
    packed = [ctypes.c_void_p(driver.address(arguments[k])) for k in "yxb"]
    for numbers in (
        (ctypes.c_longlong, ctypes.c_longlong, ctypes.c_int),
        (ctypes.c_longlong, ctypes.c_double, ctypes.c_longlong),
    ):
        driver.launch(function, (1, 1, 1), (2, 4, 1), [*packed, *(t(4) for t in numbers)])(driver.current())
        with pytest.raises(
            Violation, match=r"relu_forward: arguments \[8, 8, 8, .*\] for the parameters \[8, 8, 8, 8, 8, 8\] of"
        ):
            device.synchronize()
    call()


@pytest.mark.parametrize("change, message", [
    ({"lda": 2}, "A is 3×2 with leading dimension 2"), ({"a_type": "float64"}, "cuBLAS has no float64 × float32"),
    ({"m": 4}, "A is 4×2 with leading dimension 3"), ({"batch": 2, "stride_c": 6}, "48 bytes .* are no live memory"),
    ({"c": 0}, "24 bytes at 0x0 are no live memory"),
])  # fmt: skip
def test_products_are_checked_as_cublas_would(change, message, device):
    a, b, out = (put(device, np.ones(s), "f") for s in ((2, 2), (2, 3), (2, 3)))
    arguments = gemm_arguments(a, b, out, False, False, False, device.driver.address, "float32")
    with pytest.raises((ValueError, Violation), match=message):
        device.driver.gemm(replace(arguments, **change))


def test_a_write_outside_of_an_allocation_is_found():
    back = CudaBackend(EmulatedDriver())
    x = put(back, np.zeros(3), "f")
    back.driver.copy(np.zeros(3, "f"), x, back.driver.current())
    ctypes.memset(x.address + x.nbytes, 7, 1)
    with pytest.raises(Violation, match="something wrote outside of an allocation of 12 bytes"):
        back.driver.check()


@pytest.mark.parametrize("use", [
    np.asarray, float, bool, list, lambda x: x + 1, lambda x: 1 + x, lambda x: np.ones(3) + x, lambda x: x == x, np.sum,
    lambda x: x[[0, 1]], lambda x: x.__setitem__(0, 1), lambda x: x.T.reshape(-1), np.sqrt,
])  # fmt: skip
def test_the_host_cannot_touch_device_memory(use, device):
    x = put(device, np.ones((2, 3)))
    with pytest.raises(Violation):
        use(x if use is not bool else x[0, 0])


def test_memory_is_not_used_after_it_was_freed(device):
    square = put(device, np.ones((3, 3)))
    product = device.driver.gemm(
        gemm_arguments(square, square, square, False, False, False, device.driver.address, "float32")
    )
    del square
    with pytest.raises(Violation, match="gemm: memory of 72 bytes was freed"):
        product(device.driver.current())


def test_what_is_bound_keeps_its_buffers(device):
    x, out = put(device, np.full((3, 3), 2.0)), junk(device, (3, 3))
    bound = [device.copy(x, out).run, device.gemm(x, x, out).run, device.sequence([device.gemm(x, x, out)])]
    del x
    for run in bound:
        run()
    assert (device.to_numpy(out) == 12).all()


def test_memory_is_not_used_on_another_stream_unordered(device):
    driver, x, y = device.driver, put(device, np.ones(3)), put(device, np.zeros(3))
    other = driver.stream()
    add = device.elementwise("e", parse("y += x"), {"x": x, "y": y}, {"y": y})
    add.run()
    with (
        driver.on(other),
        pytest.raises(Violation, match="memory of 24 bytes on stream 2 is not ordered after its use on stream 0"),
    ):
        add.run()
    driver.order(driver.current(), other)
    with driver.on(other):
        add.run()
    with pytest.raises(
        Violation, match="copy: memory of 24 bytes on stream 0 is not ordered after its use on stream 2"
    ):
        device.to_numpy(y)
    driver.order(other, driver.current())
    assert device.to_numpy(y).tolist() == [2] * 3


def test_memory_is_not_freed_under_another_stream():
    back = CudaBackend(EmulatedDriver())
    driver, x = back.driver, put(back, np.ones(3))
    other = driver.stream()
    with driver.on(other):
        back.fill(x, 2.0).run()
    del x
    with pytest.raises(
        Violation, match="memory of 24 bytes was freed on stream 0 and reused while stream 2 works on it"
    ):
        driver.check()


def test_a_copy_from_pinned_memory_reads_it_when_the_stream_runs(device):
    driver, x = device.driver, device.empty((3,), "d")
    pinned = driver.empty((3,), "d", pinned=True)
    pinned[...] = 1
    driver.copy(pinned, x, driver.current())
    pinned[...] = 2  # too soon
    assert device.to_numpy(x).tolist() == [2] * 3
    pageable = np.ones(3)
    driver.copy(pageable, x, driver.current())
    pageable[...] = 2
    assert device.to_numpy(x).tolist() == [1] * 3


def test_what_is_written_while_a_kernel_may_read_it_is_junk_to_the_kernel(device):
    """Another stream fills one half of an array: the other half may be read meanwhile, in an order of its own."""
    driver, x, out = device.driver, put(device, np.ones(8)), junk(device, 4)
    copying, half = driver.stream(), driver.empty((4,), "d", pinned=True)
    half[...] = 5
    lower, upper = (
        device.gather(x.reshape(1, 8, 1), put(device, np.arange(4) + i), out.reshape(1, 4, 1)) for i in (0, 4)
    )
    driver.copy(half, x[4:], copying)
    lower.run()
    assert device.to_numpy(out).tolist() == [1] * 4
    upper.run()
    assert np.isnan(device.to_numpy(out)).all()
    driver.order(copying, driver.current())
    upper.run()
    assert device.to_numpy(out).tolist() == [5] * 4
