"""The checks of `gpubackprop doctor`: what is installed, whether the GPU gives NumPy's results, and how fast it is.

Each check returns a Result and prints nothing. What is measured stands in a group that names the device.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from gpubackprop import __version__, datasets, parity, roofline
from gpubackprop.backends import INSTALL, codegen, get_backend, nvrtc
from gpubackprop.backends.cuda import CudaBackend
from gpubackprop.backends.driver import Paper
from gpubackprop.formulas import parse
from gpubackprop.gradients import gradcheck
from gpubackprop.holdout import split
from gpubackprop.installation import CUPY, installed, nvidia_driver
from gpubackprop.layers import mlp
from gpubackprop.optimizers import Adam
from gpubackprop.parity import Case, Disagreement, Ground
from gpubackprop.trainer import Trainer

__all__ = ["FULL", "QUICK", "Check", "Effort", "Result", "checks", "examine", "report", "status", "verdict"]

Numbers = dict[str, Any]
NO_GPU = 3


@dataclass(frozen=True)
class Result:
    """What a check found: "ok", "failed" or "skipped", in words and in numbers."""

    group: str
    name: str
    verdict: str
    detail: str = ""
    numbers: Numbers | None = None


class Skip(Exception):
    """What a check lacks."""


@dataclass(frozen=True)
class Check:
    """A function that returns words and numbers, or raises: Skip for what cannot be checked, all else for a fault."""

    group: str
    name: str
    run: Callable[[], tuple[str, Numbers]]

    def __call__(self) -> Result:
        try:
            detail, numbers = self.run()
        except Skip as reason:
            return Result(self.group, self.name, "skipped", str(reason))
        except Exception as error:  # whatever it is, the other checks go on
            kind = "" if isinstance(error, Disagreement | RuntimeError | ValueError) else f"{type(error).__name__}: "
            return Result(self.group, self.name, "failed", " ".join(f"{kind}{error}".split()))
        return Result(self.group, self.name, "ok", detail, numbers)


@dataclass(frozen=True)
class Effort:
    """How much is checked, and how large what is measured."""

    dtypes: tuple[str, ...] = parity.DTYPES
    precisions: tuple[str, ...] = ("float32", "tf32", "float16", "bfloat16")
    cases: Callable[[], Sequence[Case]] = parity.cases
    places: tuple[tuple[int, int, int], ...] = parity.PLACES
    epochs: int = 15
    measured: tuple[str, ...] | None = None  # cases by name; None: all
    rows: int = 8192  # of measured arrays: more than caches hold
    columns: int = 4096
    steps: int = 1000  # of a measured epoch
    seconds: float = 0.02  # that a measurement runs for, five times


FULL = Effort()
HOT = ("relu forward", "relu backward, bias", "cross entropy, labels", "dropout", "feed", "sgd update", "adam update",
       "layer norm forward", "layer norm backward", "sum of all", "product x @ w")  # fmt: skip
QUICK = Effort(dtypes=("float32",), precisions=("float32",), measured=HOT, seconds=0.005)


def examine(device: str = "cuda", effort: Effort = FULL) -> Iterator[Result]:
    """Go through the checks."""
    for check in checks(device, effort):
        yield check()


def checks(device: str = "cuda", effort: Effort = FULL) -> list[Check]:
    """Every check that this machine allows; a failing device leaves those that need none."""
    common = [
        Check("installation", "gpubackprop", lambda: (__version__, {"version": __version__})),
        Check("installation", "NVIDIA driver", _driver),
        Check("installation", "CuPy", _cupy),
        Check("installation", "ml_dtypes", _ml_dtypes),
        Check("installation", "device", partial(_device, device)),
        Check("installation", "CUDA sources", _sources),
        Check("plan for CUDA", "784-512-512-10", _plan),
    ]
    try:
        back = get_backend(device)
    except RuntimeError:
        return common + _without_gpu(effort)
    if not isinstance(back, CudaBackend) or isinstance(back.driver, Paper):
        raise ValueError(f"doctor: device {device!r} is no GPU; choose cuda or cuda:N")
    return common + _agreement(back, effort) + _measurements(back, effort)


def status(results: Sequence[Result]) -> int:
    """0 if all agree, 1 if something does not, 3 if nothing could be checked on a GPU."""
    if any(r.verdict == "failed" for r in results):
        return 1
    return NO_GPU if any(r.name == "device" and r.verdict == "skipped" for r in results) else 0


def verdict(results: Sequence[Result]) -> str:
    """The outcome in a sentence."""
    if failed := [r.name for r in results if r.verdict == "failed"]:
        return f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}"
    if status(results) == NO_GPU:
        return "no fault was found, but there is no GPU here: no kernel has run"
    skipped = sum(r.verdict == "skipped" for r in results)
    return f"{len(results) - skipped} checks agree" + f", {skipped} skipped" * bool(skipped)


def report(results: Sequence[Result]) -> dict[str, Any]:
    """The results as JSON holds them."""
    return {"gpubackprop": __version__, "status": status(results), "verdict": verdict(results),
            "checks": [asdict(r) for r in results]}  # fmt: skip


# ---- what is installed ---------------------------------------------------------------------------------------------


def _driver() -> tuple[str, Numbers]:
    if (found := nvidia_driver()) is None:
        raise Skip("none; a GPU needs it, and nvidia-smi must list the GPU (a container needs --gpus all)")
    return str(found), asdict(found)


def _cupy() -> tuple[str, Numbers]:
    if (found := installed(*CUPY)) == "not installed":
        raise Skip(f"not installed; {INSTALL}")
    return found, {"package": found}


def _ml_dtypes() -> tuple[str, Numbers]:
    if (found := installed("ml_dtypes")) == "not installed":
        raise Skip("not installed, so bfloat16 is not checked; pip install ml_dtypes")
    return found, {"package": found}


def _device(device: str) -> tuple[str, Numbers]:
    try:
        back = get_backend(device)
    except RuntimeError as error:
        if (driver := nvidia_driver()) is not None and driver.gpus:
            raise  # a GPU that is not used
        raise Skip(str(error)) from None
    if not isinstance(back, CudaBackend) or isinstance(back.driver, Paper):
        raise Skip("no GPU")
    about, (free, total) = back.driver.properties(), back.driver.memory()
    numbers = asdict(about) | {"device": back.device, "free": free, "total": total}
    return (f"{back.device}: {about.name}, compute capability {about.capability}, {about.multiprocessors} "
            f"multiprocessors, {free:,} of {total:,} bytes free"), numbers  # fmt: skip


def _sources() -> tuple[str, Numbers]:
    generated = [kernel for row in codegen.names() for kernel in codegen.kernels(row)]
    counts = {"generated": len(generated), "written": len(codegen.written())}
    return f"{counts['generated']} kernels from formulas, {counts['written']} by hand in {codegen.sources()}", counts


def _plan() -> tuple[str, Numbers]:
    plan = Trainer(mlp([784, 512, 512, 10]), device="cuda:plan", seed=0).plan(128)
    numbers = {"launches": roofline.launches(plan)} | {k: asdict(v) for k, v in roofline.traffic(plan).items()}
    moved = ", ".join(f"{k} {v}" for k, v in roofline.traffic(plan).items())
    return f"{numbers['launches']} launches, 1 with a CUDA graph; {moved}", numbers


# ---- without a GPU -------------------------------------------------------------------------------------------------


def _without_gpu(effort: Effort) -> list[Check]:
    group = "without a GPU"
    return [
        *(Check(group, f"kernels compile, {dtype}", partial(_compile, dtype)) for dtype in effort.dtypes),
        Check(group, "gradients on NumPy", _gradients),
        Check(group, "digits on NumPy", partial(_digits_on_cpu, effort.epochs)),
    ]


def _compile(dtype: str) -> tuple[str, Numbers]:
    """Every kernel by the real compiler, for Hopper."""
    try:
        compiler = nvrtc.version()
    except (ImportError, OSError) as error:
        raise Skip(f"{error}; pip install nvidia-cuda-nvrtc nvidia-cuda-runtime") from None
    rows = codegen.names()
    units = {f"{row} and others": codegen.unit([k for name in rows[i::8] for k in codegen.kernels(name)], dtype)
             for i, row in enumerate(rows[:8])}  # fmt: skip
    units |= {file: codegen.file_unit(file, dtype) for file in codegen.written().values()}

    def compiled(name: str) -> str:
        try:
            return nvrtc.compile_cuda(units[name], "sm_90").log
        except nvrtc.CompileError as error:
            raise Disagreement(f"{name}: {error}") from None

    with ThreadPoolExecutor() as pool:  # the compiler works outside the interpreter's lock
        warned = [name for name, words in zip(units, pool.map(compiled, units), strict=True) if words]
    numbers = {"kernels": sum(len(codegen.kernels(row)) for row in rows) + len(codegen.written()), "warnings": warned}
    warning = f"warnings in {', '.join(warned)}" if warned else "no warning"
    return f"{numbers['kernels']} kernels for sm_90 by NVRTC {compiler}, {warning}", numbers


def _gradients() -> tuple[str, Numbers]:
    model = mlp([5, 7, 3], "gelu", dtype="float64").initialize(0)
    error = gradcheck(lambda x: model(x).sum(), np.random.default_rng(0).standard_normal((4, 5)))
    return f"within {error:.1g} of finite differences", {"error": error}


def _digits_on_cpu(epochs: int) -> tuple[str, Numbers]:
    losses, accuracy = _digits("cpu", "float32", epochs)
    return _trained(accuracy, losses)


# ---- agreement -----------------------------------------------------------------------------------------------------


def _agreement(back: CudaBackend, effort: Effort) -> list[Check]:
    return [
        *(Check("kernels against NumPy", c.name, partial(_kernel, back, c, effort)) for c in effort.cases()),
        *(Check("products against dot", f"product in {d}", partial(_dot, back, d))
          for d in effort.dtypes if d != "bfloat16"),  # of which dot makes no float product
        Check("CUDA graph", "captured step", partial(_graph, back.device)),
        *(Check("training", f"digits in {p}", partial(_training, back.device, p, effort.epochs))
          for p in effort.precisions),
    ]  # fmt: skip


def _kernel(back: CudaBackend, case: Case, effort: Effort) -> tuple[str, Numbers]:
    """The case in every type; the first fault is told with its type."""
    worst: dict[str, float | None] = {}
    for dtype in (d for d in effort.dtypes if d in case.dtypes):
        try:
            worst[dtype] = parity.compare(case, back, dtype, effort.places)
        except ImportError:
            worst[dtype] = None
        except Disagreement as found:
            raise Disagreement(f"{dtype}: {found}") from None
        except Exception as error:
            raise RuntimeError(f"{dtype}: {error}") from error
    words = {None: "not checked", 0.0: "exact"}
    return ", ".join(f"{d} {words.get(w) or f'{w:.2g} eps'}" for d, w in worst.items()), dict(worst)


def _dot(back: CudaBackend, dtype: str) -> tuple[str, Numbers]:
    """Our products against those of the array module, which gives cuBLAS the same arguments: all four transposes."""
    if (dot := getattr(back.xp, "dot", None)) is None:
        raise Skip(f"{back.xp.__name__} has no dot")
    worst, (m, k, n) = 0.0, (129, 65, 258)
    for i in range(4):
        ground, left, right = Ground(back, dtype), bool(i & 1), bool(i & 2)
        a = ground.normal(*((k, m) if left else (m, k)))
        b, out = ground.normal(*((n, k) if right else (k, n))), ground.blank(m, n)
        back.gemm(a, b, out, transpose_a=left, transpose_b=right).run()
        ours, theirs = (back.to_numpy(x).astype(float) for x in (out, dot(a.T if left else a, b.T if right else b)))
        error = float(np.abs(ours - theirs).max() / np.abs(theirs).max() / parity.EPS[dtype])
        if not error <= parity.SUM:
            sides = f"a{'ᵀ' * left} @ b{'ᵀ' * right}"
            raise Disagreement(f"{sides} is {error:.3g} eps of its largest element off, {parity.SUM:g} are allowed")
        worst = max(worst, error)
    return "exact" if worst == 0 else f"within {worst:.2g} eps", {"eps": worst}


def _graph(device: str) -> tuple[str, Numbers]:
    """Two epochs with and without a graph must end in the same bits."""
    ends = []
    for captured in (False, True):
        x, y = datasets.load("digits")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = Trainer(mlp([64, 32, 10], dropout=0.2), device=device, seed=0, clip_norm=1.0, cuda_graph=captured)
            trainer.fit(x[:320], y[:320], epochs=2, batch_size=64, progress=False)
        if reasons := [str(w.message) for w in caught if "cuda_graph" in str(w.message)]:
            raise RuntimeError(reasons[0])
        ends.append({k: v.tobytes() for k, v in trainer.model.state_dict().items()} | {"history": trainer.history})
    if differing := [k for k in ends[0] if ends[0][k] != ends[1][k]]:
        raise Disagreement(f"after two epochs {', '.join(differing)} differ from those of steps launched one by one")
    return "the same bits as launched one by one", {}


LEAST_ACCURACY = 0.95
FIRST_LOSS, LAST_LOSS = 1e-4, 0.05  # how far the loss may be off NumPy's after the first epoch and the last, in float32


def _training(device: str, precision: str, epochs: int) -> tuple[str, Numbers]:
    try:
        losses, accuracy = _digits(device, precision, epochs)
    except RuntimeError as error:
        if "ml_dtypes" in str(error):
            raise Skip(str(error)) from None
        raise
    detail, numbers = _trained(accuracy, losses)
    if precision == "float32":
        reference, _ = _digits("cpu", precision, epochs)
        for when, i, allowed in (("first", 0, FIRST_LOSS), ("last", -1, LAST_LOSS)):
            numbers[f"{when} loss off by"] = off = abs(losses[i] / reference[i] - 1)
            if not off <= allowed:
                raise Disagreement(f"the loss after the {when} epoch is {losses[i]:.7g}, on NumPy {reference[i]:.7g}")
        detail += f", the first epoch's within {numbers['first loss off by']:.1g} of NumPy's"
    return detail, numbers


def _digits(device: str, precision: str, epochs: int) -> tuple[list[float], float]:
    """The losses of a training and its accuracy on rows held out."""
    x, x_test, y, y_test = split(*datasets.load("digits"), test=0.2, seed=0)
    trainer = Trainer(mlp([64, 128, 10]), "cross_entropy", Adam(lr=3e-3), device=device, seed=0, precision=precision)
    losses = trainer.fit(x, y, epochs=epochs, batch_size=64, progress=False)["loss"]
    return losses, trainer.evaluate(x_test, y_test)["accuracy"]


def _trained(accuracy: float, losses: Sequence[float]) -> tuple[str, Numbers]:
    if not accuracy >= LEAST_ACCURACY:
        raise Disagreement(f"accuracy {accuracy:.3f} on rows held out; {LEAST_ACCURACY} is expected")
    return f"accuracy {accuracy:.3f}, loss {losses[-1]:.4g}", {"accuracy": accuracy, "loss": list(losses)}


# ---- measuring -----------------------------------------------------------------------------------------------------


def _measurements(back: CudaBackend, effort: Effort) -> list[Check]:
    group, rows = f"measured on {back.driver.properties().name}", effort.rows
    while 10 * 4 * rows * effort.columns > back.driver.memory()[0] and rows > 1:
        rows //= 2  # a case has up to six arrays
    effort = replace(effort, rows=rows)
    bandwidth = _Copy(back, effort)
    return [
        Check(group, "copy on the device", bandwidth),
        *(Check(group, c.name, partial(_speed, back, c, effort, bandwidth)) for c in effort.cases()
          if "float32" in c.dtypes and (effort.measured is None or c.name in effort.measured)),
        Check(group, "launch", partial(_launch_cost, back, effort)),
        Check(group, "step, launched one by one", partial(_step_cost, back, effort, False)),
        Check(group, "step, as a CUDA graph", partial(_step_cost, back, effort, True)),
    ]  # fmt: skip


def _seconds(back: CudaBackend, run: Callable[[], object], least: float) -> float:
    """What one call takes on the device when many follow each other: the median of five rounds, once it is warm."""

    def round_of(count: int) -> float:
        back.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            run()
        back.synchronize()
        return time.perf_counter() - begun

    count = 1
    while round_of(count) < least and count < 1 << 20:
        count *= 2
    return median(round_of(count) / count for _ in range(5))


class _Copy:
    """A copy from device memory to device memory: what the kernels are measured by."""

    def __init__(self, back: CudaBackend, effort: Effort) -> None:
        self.back, self.effort = back, effort
        self.rate = 0.0  # bytes read and written in a second

    def __call__(self) -> tuple[str, Numbers]:
        driver, shape = self.back.driver, (self.effort.rows, self.effort.columns)
        source, destination = (self.back.empty(shape, np.float32) for _ in range(2))
        self.back.write(source, 0)

        def run() -> None:
            with driver.scope():
                driver.copy(source, destination, driver.current())

        self.rate = 2 * source.nbytes / _seconds(self.back, run, self.effort.seconds)
        return f"{self.rate / 1e9:,.0f} GB/s", {"GB/s": self.rate / 1e9}


def _speed(back: CudaBackend, case: Case, effort: Effort, copy: _Copy) -> tuple[str, Numbers]:
    """Bytes per second, or of a product operations per second, over arrays larger than caches."""
    ground = Ground(back, "float32")
    launch, _ = case.bind(ground, effort.rows, effort.columns)
    taken = _seconds(back, launch.run, effort.seconds)
    numbers = {"seconds": taken, "GB/s": launch.bytes / taken / 1e9, "TFLOP/s": launch.flops / taken / 1e12}
    if case.name.startswith("product"):
        return f"{numbers['TFLOP/s']:,.1f} TFLOP/s", numbers
    share = launch.bytes / taken / copy.rate if copy.rate else float("nan")
    return f"{numbers['GB/s']:,.0f} GB/s, {share:.0%} of a copy", numbers | {"share": share}


def _launch_cost(back: CudaBackend, effort: Effort) -> tuple[str, Numbers]:
    ground = Ground(back, "float32")
    x, y = ground.normal(32), ground.blank(32)
    launch = back.elementwise("launch", parse("y = x + 1"), {"x": x}, {"y": y})
    taken = _seconds(back, back.sequence([launch] * effort.steps), effort.seconds) / effort.steps
    return f"{taken * 1e6:.2f} µs", {"seconds": taken}


def _step_cost(back: CudaBackend, effort: Effort, captured: bool) -> tuple[str, Numbers]:
    """A step of 64-256-10 in batches of 32: an epoch of many, by their number."""
    rng = np.random.default_rng(0)
    x, y = rng.random((32 * effort.steps, 64), np.float32), rng.integers(0, 10, 32 * effort.steps)
    trainer = Trainer(mlp([64, 256, 10]), device=back.device, seed=0, cuda_graph=captured)
    ends: list[float] = []
    trainer.fit(x, y, epochs=5, batch_size=32, progress=False, callbacks=[lambda _: ends.append(time.perf_counter())])
    taken = median(b - a for a, b in pairwise(ends)) / effort.steps  # without the epoch that recorded
    return f"{taken * 1e6:.1f} µs (64-256-10, batches of 32)", {"seconds": taken}
