"""The doctor: its checks over the emulated device, what it says without a GPU, and planted faults that it must find."""

import ctypes
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from emulator.driver import EmulatedDriver

from gpubackprop import backends, cli, doctor, installation, parity
from gpubackprop.backends import codegen, get_backend, nvrtc, why_not_cuda
from gpubackprop.backends.cuda import CudaBackend
from gpubackprop.backends.driver import CaptureError
from gpubackprop.doctor import Effort
from gpubackprop.formulas import apply, number

CPU = get_backend("cpu:reference")
PLACES = ((5, 19, 1), (3, 128, 0))
FEW = ("relu forward", "tanh backward", "tanh backward, bias", "adam update", "cross entropy, labels", "product x @ w")
without_gpu = pytest.mark.skipif(why_not_cuda() is None, reason="CUDA works here")


def named(*names):
    found = [case for case in parity.cases() if case.name in names]
    assert len(found) == len(names)
    return found


def effort(*names, **changes):
    """Little enough for a device that is emulated."""
    small = Effort(dtypes=("float32",), precisions=("float32",), cases=lambda: named(*names), places=PLACES,
                   rows=4, columns=64, steps=3, seconds=0.0)  # fmt: skip
    return replace(small, **changes)


@pytest.fixture
def device(monkeypatch):
    """An emulated device that get_backend knows."""
    back = CudaBackend(EmulatedDriver())
    monkeypatch.setitem(backends._backends, "cuda:0", back)
    monkeypatch.setattr(backends, "_obstacle", lambda index: None)
    yield back
    back.driver.check()


def only(results, name):
    [result] = [r for r in results if r.name == name]
    return result


def check(device, name, how):
    """The result of the one check of that name (of several, the first)."""
    return next(c for c in doctor.checks("cuda:0", how) if c.name == name)()


# ---- the cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", parity.DTYPES)
def test_every_case_agrees_with_itself(dtype):
    for case in parity.cases():
        if dtype in case.dtypes:
            assert parity.compare(case, CPU, dtype, [(4, 7, 1)]) == 0, case.name


def test_the_cases_have_names_of_their_own_and_reach_every_row():
    names = [case.name for case in parity.cases()]
    assert len(names) == len(set(names))
    for row in codegen.names():
        assert any(name.split()[0] == row or name == row for name in names), row


def test_inputs_are_the_same_on_every_backend_and_lie_off_the_boundary_where_told(device):
    for off in (0, 1):
        values = [parity.Ground(b, "float32", off).normal(3, 70_000, extremes=True) for b in (CPU, device)]
        np.testing.assert_array_equal(values[0], device.to_numpy(values[1]))
        assert [b.ctypes.data % 16 if b is values[0] else b.address % 16 for b in values] == [4 * off] * 2
    assert {0.0, 1e4, -1e4} <= set(values[0].ravel().tolist())


@pytest.mark.parametrize("found, expected, error", [
    ([1.0, 2.0], [1.0, 2.0], 0), ([np.nan, np.inf], [np.nan, np.inf], 0), ([0.0], [-0.0], 0),
    ([1 + 2.0**-23], [1.0], 1), ([2.0**-23], [0.0], 1), ([8 + 2.0**-20], [8.0], 1), ([np.nan], [1.0], np.inf),
    ([1.0], [np.nan], np.inf), ([np.inf], [1.0], np.inf), ([-np.inf], [np.inf], np.inf), ([], [], 0),
])  # fmt: skip
def test_errors_are_counted_in_eps(found, expected, error):
    arrays = (np.array(a, np.float32) for a in (found, expected))
    assert parity._error(*arrays, largest=False)[0] == pytest.approx(error, rel=1e-6)


def test_errors_of_sums_are_counted_by_the_largest():
    found, expected = np.array([1 + 1e-5, 100.0], np.float32), np.array([1.0, 100.0], np.float32)
    error, where = parity._error(found, expected, largest=True)
    assert error == pytest.approx(1e-7 / 2.0**-23, rel=0.05) and where == (0,)


# ---- on a device ---------------------------------------------------------------------------------------------------


def test_a_device_that_agrees(device):
    results = list(doctor.examine("cuda:0", effort(*FEW)))
    assert [r for r in results if r.verdict == "failed"] == [] and doctor.status(results) == 0
    assert only(results, "device").detail.startswith("cuda:0: Emulated, compute capability 9.0, ")
    rows = [r for r in results if r.group == "kernels against NumPy"]
    assert [r.name for r in rows] == [case.name for case in named(*FEW)]
    assert rows[0].detail == "float32 exact" and rows[0].numbers == {"float32": 0.0}
    assert only(results, "captured step").verdict == "ok"
    trained = only(results, "digits in float32")
    assert trained.numbers["accuracy"] >= 0.95 and trained.numbers["first loss off by"] < 1e-5
    assert doctor.verdict(results).endswith(" skipped") or doctor.verdict(results).endswith(" agree")


def test_measurements_say_what_they_were_taken_on(device):
    """Nothing that looks like a rate or a time stands outside of a group that names the device."""
    results = list(doctor.examine("cuda:0", effort("relu forward", "product x @ w", epochs=2)))
    measured = [r for r in results if r.group == "measured on Emulated"]
    assert {"copy on the device", "relu forward", "product x @ w", "launch"} < {r.name for r in measured}
    assert all(r.verdict == "ok" for r in measured), measured
    assert "% of a copy" in only(measured, "relu forward").detail
    assert only(measured, "product x @ w").detail.endswith("TFLOP/s")
    others = " ".join(r.detail for r in results if r not in measured)
    assert not any(unit in others for unit in ("GB/s", "TFLOP/s", "µs"))


def test_what_is_measured_fits_into_the_device(device, monkeypatch):
    monkeypatch.setattr(device.driver, "memory", lambda: (10_000, 1 << 30))
    copy = next(c for c in doctor.checks("cuda:0", effort(rows=64)) if c.name == "copy on the device")
    assert copy.run.effort.rows == 2
    names = [c.name for c in doctor.checks("cuda:0", effort(*FEW, measured=FEW[:2])) if c.group.startswith("measured")]
    assert names[1:3] == list(FEW[:2]) and not {*FEW[2:]} & {*names}
    assert {*doctor.HOT} <= {case.name for case in parity.cases()}


def test_types_are_told_apart(device):
    result = check(device, "relu forward", effort("relu forward", dtypes=("float32", "float64", "bfloat16")))
    assert result.detail == "float32 exact, float64 exact, bfloat16 exact"


def test_products_are_compared_with_dot_if_there_is_one(device, monkeypatch):
    assert check(device, "product in float32", effort()).detail == "emulated has no dot"

    def dot(a, b):
        left, right = (device.to_numpy(x.T).T if not x.flags.c_contiguous else device.to_numpy(x) for x in (a, b))
        return device.asarray(factor * (left @ right))

    device.xp = SimpleNamespace(dot=dot)
    factor = np.float32(1)
    result = check(device, "product in float32", effort())
    assert result.verdict == "ok" and result.numbers["eps"] < 10
    factor = np.float32(1.001)
    result = check(device, "product in float32", effort())
    assert result.verdict == "failed" and "a @ b is 8.38e+03 eps of its largest element off" in result.detail


# ---- planted faults ------------------------------------------------------------------------------------------------


def test_a_kernel_with_wrong_results_is_named_with_type_and_error(device, monkeypatch):
    right = device.elementwise

    def wrong(label, graph, reads, writes, **options):
        if label == "tanh backward" and next(iter(writes.values())).dtype == np.float64:
            graph = {k: apply("*", e, number(1 + 1e-9)) for k, e in graph.items()}
        return right(label, graph, reads, writes, **options)

    monkeypatch.setattr(device, "elementwise", wrong)
    how = effort("relu forward", "tanh backward", dtypes=("float32", "float64"), precisions=(), epochs=1)
    results = list(doctor.examine("cuda:0", how))
    row = only([r for r in results if r.group == "kernels against NumPy"], "tanh backward")
    assert row.verdict == "failed" and row.detail.startswith("float64: dz[") and "eps off where 0 are" in row.detail
    assert doctor.status(results) == 1 and doctor.verdict(results).endswith("checks failed: tanh backward")


def test_a_kernel_that_writes_nothing_is_found(device, monkeypatch):
    right = device.fill
    monkeypatch.setattr(device, "fill", lambda out, value: replace(right(out, value), run=lambda: None))
    result = check(device, "fill", effort("fill"))
    assert result.verdict == "failed" and "is nan instead of 0.1" in result.detail


def test_an_error_in_one_check_leaves_the_others(device, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")

    monkeypatch.setattr(device, "fill", broken)
    results = [check(device, name, effort("fill", "relu forward")) for name in ("fill", "relu forward")]
    assert [r.verdict for r in results] == ["failed", "ok"]
    assert results[0].detail == "float32: cudaErrorIllegalAddress: an illegal memory access was encountered"


def test_a_capture_that_fails_is_told_with_its_reason(device, monkeypatch):
    def refuse(stream, body):
        raise CaptureError("the stream cannot be captured")

    monkeypatch.setattr(device.driver, "capture", refuse)
    result = check(device, "captured step", effort())
    assert result.verdict == "failed" and "the stream cannot be captured" in result.detail


def test_a_captured_step_that_differs_is_found(device, monkeypatch):
    monkeypatch.setattr(device, "capture", lambda launches: device.sequence(launches[:-1]))  # no update
    result = check(device, "captured step", effort())
    assert result.verdict == "failed" and "differ from those of steps launched one by one" in result.detail


def test_a_training_that_learns_nothing_or_something_else_is_found(device, monkeypatch):
    monkeypatch.setattr(doctor, "_digits", lambda *_: ([1.0, 0.5], 0.4))
    result = check(device, "digits in float32", effort())
    assert result.verdict == "failed" and result.detail.startswith("accuracy 0.400 on rows held out")
    ends = {"cpu": ([1.0, 0.5], 0.97), "cuda:0": ([1.001, 0.5], 0.97)}
    monkeypatch.setattr(doctor, "_digits", lambda place, *_: ends[place])
    result = check(device, "digits in float32", effort())
    assert result.detail == "the loss after the first epoch is 1.001, on NumPy 1"


# ---- without a GPU -------------------------------------------------------------------------------------------------


@without_gpu
def test_without_a_gpu_it_checks_what_it_can(monkeypatch):
    monkeypatch.setattr(codegen, "names", lambda: ["relu", "adam"])
    monkeypatch.setattr(codegen, "written", lambda: {"advance": "scalars.cu"})
    results = list(doctor.examine("cuda", effort()))
    assert doctor.status(results) == 3 and "there is no GPU here: no kernel has run" in doctor.verdict(results)
    assert [r for r in results if r.verdict == "failed"] == []
    assert why_not_cuda() in only(results, "device").detail and "pip install" in only(results, "device").detail
    plan = only(results, "784-512-512-10")
    assert plan.numbers["launches"] <= 17 and plan.detail.startswith(f"{plan.numbers['launches']} launches, 1 with a")
    assert " kernels for sm_90 by NVRTC " in only(results, "kernels compile, float32").detail
    assert only(results, "gradients on NumPy").numbers["error"] < 1e-8
    assert only(results, "digits on NumPy").numbers["accuracy"] >= 0.95
    assert not any(r.group.startswith("measured") for r in results)


@without_gpu
def test_a_fault_counts_more_than_a_missing_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_ACCURACY", 1.1)
    results = list(doctor.examine("cuda", effort(dtypes=(), epochs=1)))
    assert doctor.status(results) == 1 and doctor.verdict(results).endswith("checks failed: digits on NumPy")


@without_gpu
def test_a_gpu_that_cannot_be_used_is_a_fault(monkeypatch):
    found = installation.NvidiaDriver("13.0", ("NVIDIA H100 (9.0)",))
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: found)
    results = list(doctor.examine("cuda", effort(dtypes=(), epochs=1)))
    assert only(results, "NVIDIA driver").detail == "runs CUDA 13.0; NVIDIA H100 (9.0)"
    assert only(results, "device").verdict == "failed" and doctor.status(results) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda:plan"])
def test_what_is_no_gpu_is_refused(device):
    with pytest.raises(ValueError, match=rf"^doctor: device '{device}' is no GPU; choose cuda or cuda:N$"):
        doctor.checks(device, effort())


def test_missing_packages_come_with_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda *_: "not installed")
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: None)
    results = {c.name: c() for c in doctor.checks("cuda", effort())[:4]}
    assert [r.verdict for r in results.values()] == ["ok", "skipped", "skipped", "skipped"]
    assert backends.INSTALL in results["CuPy"].detail and "pip install ml_dtypes" in results["ml_dtypes"].detail
    assert "nvidia-smi" in results["NVIDIA driver"].detail


def test_without_the_compiler(monkeypatch):
    def missing():
        raise ImportError("NVRTC and the CUDA headers are not installed")

    monkeypatch.setattr(nvrtc, "version", missing)
    [check] = [c for c in doctor._without_gpu(effort()) if c.name == "kernels compile, float32"]
    assert check().verdict == "skipped" and "pip install nvidia-cuda-nvrtc" in check().detail


def test_a_kernel_that_does_not_compile_is_a_fault(monkeypatch):
    monkeypatch.setattr(codegen, "names", lambda: ["relu"])
    monkeypatch.setattr(codegen, "written", dict)
    monkeypatch.setattr(codegen, "unit", lambda kernels, dtype: "int f() { return nothing; }" if kernels else "")
    [check] = [c for c in doctor._without_gpu(effort()) if c.name == "kernels compile, float32"]
    result = check()
    assert result.verdict == "failed" and result.detail.startswith("relu and others: unit.cu(1): error: ")


# ---- the NVIDIA driver ---------------------------------------------------------------------------------------------


class Libcuda:
    """libcuda with two GPUs, of which only what is asked for is there."""

    def __init__(self, status=0):
        self.status = status

    def cuInit(self, flags):
        return self.status

    def cuDriverGetVersion(self, number):
        number._obj.value = 12040
        return 0

    def cuDeviceGetCount(self, number):
        number._obj.value = 2
        return 0

    def cuDeviceGetName(self, text, length, index):
        text.value = f"GPU {index}".encode()
        return 0

    def cuDeviceGetAttribute(self, number, attribute, index):
        number._obj.value = {75: 8, 76: 6 + index}[attribute]
        return 0


@pytest.mark.parametrize("status, gpus, text", [
    (0, ("GPU 0 (8.6)", "GPU 1 (8.7)"), "runs CUDA 12.4; GPU 0 (8.6), GPU 1 (8.7)"),
    (100, (), "runs CUDA 12.4; no GPU"),
])  # fmt: skip
def test_the_driver_is_asked_without_cupy(status, gpus, text, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libcuda(status))
    found = installation.nvidia_driver()
    assert (found.cuda, found.gpus, str(found)) == ("12.4", gpus, text)


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert installation.nvidia_driver() is None


# ---- the command ---------------------------------------------------------------------------------------------------


def doctor_command(monkeypatch, *options, **how):
    for name in ("FULL", "QUICK"):
        monkeypatch.setattr(doctor, name, effort("relu forward", epochs=15, **how))
    return CliRunner().invoke(cli.main, ["doctor", "--device", "cuda:0", *map(str, options)])


def test_the_command_prints_a_table_and_writes_json(device, monkeypatch, tmp_path):
    done = doctor_command(monkeypatch, "--json", tmp_path / "d.json", "--quick")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "installation" and "kernels against NumPy" in lines and lines[-1].startswith("verdict ")
    assert any(line.split() == ["ok", "relu", "forward", "float32", "exact"] for line in lines)
    report = json.loads((tmp_path / "d.json").read_text())
    assert report["status"] == 0 and {c["verdict"] for c in report["checks"]} <= {"ok", "skipped"}
    assert {"group", "name", "verdict", "detail", "numbers"} == set(report["checks"][0])


def test_the_command_ends_with_1_if_something_disagrees(device, monkeypatch):
    right = device.elementwise
    monkeypatch.setattr(device, "elementwise", lambda label, graph, reads, writes, **options: right(
        label, {k: apply("neg", e) for k, e in graph.items()} if label == "relu forward" else graph, reads, writes,
        **options))  # fmt: skip
    done = doctor_command(monkeypatch, "--json", "-", precisions=())
    assert done.exit_code == 1 and json.loads(done.stdout)["status"] == 1
    assert "failed   relu forward" in done.stderr and "float32: y[" in done.stderr


@without_gpu
def test_the_command_ends_with_3_without_a_gpu(monkeypatch):
    for name in ("FULL", "QUICK"):
        monkeypatch.setattr(doctor, name, effort(dtypes=()))
    done = CliRunner().invoke(cli.main, ["doctor"])
    assert done.exit_code == 3 and "no kernel has run" in done.stdout.splitlines()[-1]
    assert why_not_cuda() in done.stdout


def test_the_command_refuses_a_device_that_is_no_gpu():
    done = CliRunner().invoke(cli.main, ["doctor", "--device", "cpu"])
    assert (done.exit_code, done.stderr) == (2, "gpubackprop: doctor: device 'cpu' is no GPU; choose cuda or cuda:N\n")
