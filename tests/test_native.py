"""The native library: its kernels against the reference, how work is shared, and what happens where it is not there."""

import ctypes
import gc
import itertools
import os
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import formulas, parity
from gpubackprop.backends import get_backend, host, native
from gpubackprop.backends.blas import PRODUCTS, blas
from gpubackprop.backends.host import loop, loops
from gpubackprop.backends.native import Job, Library, NativeBackend, available, why_not_native
from gpubackprop.backends.numpy import NumpyBackend, calls_of
from gpubackprop.backends.threads import default_threads

REQUIRED = os.environ.get("GPUBACKPROP_REQUIRE_NATIVE") == "1"
pytestmark = pytest.mark.skipif(not REQUIRED and why_not_native() is not None, reason=f"no library: {why_not_native()}")
CASES = {case.name: case for case in parity.cases()}


@pytest.fixture(scope="module", params=["base", *host.INSTRUCTION_SETS])
def back(request):
    """A backend on the library of each instruction set that this machine has."""
    if request.param not in available():
        pytest.skip(f"{request.param} does not run on this machine, or was not built")
    return NativeBackend(Library(request.param))


# ---- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", host.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_reference(back, name, dtype):
    parity.compare(CASES[name], back, dtype)  # formulas of + - * / sqrt and where: bit for bit


@pytest.mark.parametrize("dtype", host.DTYPES)
@pytest.mark.parametrize("name", ["gelu", "tanh", "exp", "bce_with_logits", "adam"])
def test_instruction_sets_have_equal_bits(name, dtype):
    """No sum depends on the width of a vector, and nothing is contracted."""
    results = []
    for instructions in available():
        made, bits = NativeBackend(Library(instructions)), []
        for case in (c for key, c in CASES.items() if key.split()[0] == name):
            outputs = parity._outputs(case, parity.Ground(made, dtype), 257, 129)
            bits += [(key, a.tobytes()) for key, a in outputs.items()]
        results.append(bits)
    assert results[0] and all(r == results[0] for r in results)


def test_nan_and_infinity_are_the_references():
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-310, -3.0, 88.8, -104.0, 710.0, 1e300, -1e300] * 5)
    for dtype in host.DTYPES:
        with np.errstate(all="ignore"):
            x = odd.astype(dtype)
        for row in formulas.ACTIVATIONS.values():
            graph, found = {"y": row.forward_graph()}, []
            for device in ("cpu", "cpu:reference"):
                y = np.empty_like(x)
                get_backend(device).elementwise(row.name, graph, {"x": x}, {"y": y}).run()
                found.append(y)
            np.testing.assert_array_equal(*map(np.isnan, found), err_msg=row.name)
            np.testing.assert_array_equal(*map(np.isinf, found), err_msg=row.name)
            eps = np.finfo(dtype).eps
            np.testing.assert_allclose(*found, rtol=16 * eps, atol=16 * eps, err_msg=row.name)


# ---- what is compiled ----------------------------------------------------------------------------------------------


def compiled(launch):
    return all(isinstance(call, Job) for call in calls_of([launch]))


@pytest.mark.parametrize(
    "optimizer", [gb.SGD(), gb.SGD(momentum=0.9), gb.SGD(momentum=0.9, nesterov="lookahead"), gb.Adam(), gb.AdamW()]
)
@pytest.mark.parametrize("activation", formulas.ACTIVATIONS)
def test_a_training_step_is_one_call(activation, optimizer, monkeypatch):
    for products in (PRODUCTS, ()):  # NumPy's BLAS known, and not
        monkeypatch.setattr("gpubackprop.backends.blas.PRODUCTS", products)
        blas.cache_clear()
        for loss, units, dropout in (("cross_entropy", 3, 0.2), ("mse", 1, 0.0), ("bce", 2, 0.0)):
            model = gb.mlp([5, 8, units], activation, dropout=dropout)
            trainer = gb.Trainer(model, loss, optimizer, device="cpu", seed=0, clip_norm=1.0, metrics=[])
            plan = trainer.plan(batch_size=4)
            left = {n.name for n in plan.launches if not compiled(n)}
            assert left == (set() if blas().routine("gemm", np.dtype("f")) else {"gemm"}), (activation, loss)
            assert isinstance(plan.backend.sequence(plan.launches), Job) == (not left)
    blas.cache_clear()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("loss, units", [("cross_entropy", 3), ("mse", 1), ("half_mse", 3), ("bce", 1), ("bce", 2)])
def test_a_step_of_weighted_rows_is_one_call(loss, units, rows):
    plan = gb.Trainer(gb.mlp([5, 8, units]), loss, device="cpu", seed=0, metrics=[]).plan(rows, weighted=True)
    assert {n.name for n in plan.launches if not compiled(n)} <= {"gemm"}


@pytest.mark.parametrize("dtype", host.DTYPES)
@pytest.mark.parametrize("shape", [(32, 64, 48), (7, 65, 3), (1, 40, 9), (40, 1, 9), (40, 9, 1), (130, 300, 70)])
def test_products_are_those_of_numpy(shape, dtype, rng):
    """The same function of the same BLAS, bit for bit where NumPy takes gemm too."""
    assert not REQUIRED or blas().routine("gemm", np.dtype(dtype))
    (m, k, n), back = shape, get_backend("cpu")
    for first, second in itertools.product((False, True), repeat=2):
        a = rng.normal(size=(k, m) if first else (m, k)).astype(dtype)
        b = rng.normal(size=(n, k) if second else (k, n)).astype(dtype)
        out = np.full((m, n), np.nan, dtype)
        launch = back.gemm(a, b, out, transpose_a=first, transpose_b=second)
        launch.run()
        expected = (a.T if first else a) @ (b.T if second else b)
        if 1 in shape:
            np.testing.assert_allclose(out, expected, rtol=64 * np.finfo(dtype).eps, atol=64 * np.finfo(dtype).eps)
        else:
            np.testing.assert_array_equal(out, expected)
        assert compiled(launch) == (blas().routine("gemm", np.dtype(dtype)) is not None)


def test_products_over_an_operand_are_those_of_numpy(rng):
    a, b, back = rng.normal(size=(64, 64)), rng.normal(size=(64, 64)), get_backend("cpu")
    expected = a @ b
    back.gemm(a, b, b).run()
    np.testing.assert_allclose(b, expected, rtol=1e-12, atol=1e-12)


def test_products_of_views_run_on_the_reference(rng):
    """BLAS takes neither every second row nor every second column; a slice of the columns NumPy knows to hand over."""
    a, b, back = rng.normal(size=(8, 12)), rng.normal(size=(6, 5)), get_backend("cpu")
    for view in (a[:, ::2], a[::2, :6], a[:, :6], a[::-1, 6:]):
        out = np.empty((len(view), 5))
        back.gemm(view, b, out).run()
        np.testing.assert_allclose(out, view @ b, rtol=1e-13, atol=1e-13)


def test_loops_are_found_however_their_arrays_are_called():
    graph = formulas.parse("m += (1 - beta) * (g - m)")
    renamed = formulas.renamed({"q": graph["m"]}, {"m": "q", "g": "h"})
    assert (
        loop("map", tuple(graph.items()), ("m", "g")).symbol == loop("map", tuple(renamed.items()), ("q", "h")).symbol
    )
    assert len({made.symbol for made in loops()}) == len(loops())


def test_a_registered_activation_runs_on_the_reference():
    gb.register_activation("bent_of_ours", "(sqrt(x * x + 1) - 1) / 2 + x", "x / (2 * sqrt(x * x + 1)) + 1")
    try:
        x, y, losses = np.random.default_rng(0).normal(size=(40, 5)), np.arange(40) % 3, []
        for device in ("cpu", "cpu:reference"):
            trainer = gb.Trainer(gb.mlp([5, 8, 3], "bent_of_ours", dtype="float64"), seed=0, device=device)
            losses.append(trainer.fit(x, y, epochs=3, progress=False)["loss"])
        np.testing.assert_allclose(*losses, rtol=1e-12)
    finally:
        del formulas.ACTIVATIONS["bent_of_ours"]


def test_launches_that_follow_each_other_become_one_call():
    back = get_backend("cpu")
    a, b = np.ones(8), np.zeros(8)
    launches = [
        back.elementwise("relu", {"y": formulas.ACTIVATIONS["relu"].forward_graph()}, {"x": a}, {"y": y})
        for y in (b, a)
    ]
    both = back.sequence(launches)
    assert isinstance(both, Job)
    a[:4] = -2
    both()
    np.testing.assert_array_equal(a, b)


# ---- cores ---------------------------------------------------------------------------------------------------------


def everything(library_, cores):
    """Bits of large launches of every skeleton, on so many cores."""
    made = NativeBackend(library_)
    library_.set_threads(cores)
    bits = []
    for name in (
        "tanh",
        "tanh backward",
        "tanh backward with bias",
        "mse",
        "softmax_cross_entropy of labels",
        "dropout",
        "adam",
    ):
        for case in (c for key, c in CASES.items() if key.startswith(name)):
            outputs = parity._outputs(case, parity.Ground(made, "float32"), 700, 301)
            bits += [(case.name, key, a.tobytes()) for key, a in outputs.items()]
    return bits


def test_bits_do_not_depend_on_the_number_of_cores():
    shared = native.library()
    try:
        first = everything(shared, 1)
        assert len(first) > 8
        for cores in (2, 3, 5, 2):
            assert everything(shared, cores) == first
    finally:
        shared.set_threads(default_threads())


def big(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=1 << 18)
    y = np.empty_like(x)
    get_backend("cpu").elementwise("exp", {"y": formulas.UNARY["exp"].forward_graph()}, {"x": x}, {"y": y}).run()
    return bool(np.allclose(y, np.exp(x), rtol=1e-14))


def test_python_threads_share_the_pool():
    right = []
    threads = [threading.Thread(target=lambda i=i: right.extend(big(i + k) for k in range(20))) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert right == [True] * 80


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_a_pool_of_its_own():
    code = """
import os, warnings
warnings.simplefilter("ignore")
import test_native as t
t.native.library().set_threads(3)
assert t.big(0)
children = []
for i in range(3):
    if not (pid := os.fork()):
        os._exit(0 if t.big(i) and t.big(i + 1) else 1)
    children.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
assert t.big(9)
"""
    path = os.pathsep.join(map(str, Path(__file__).parents[:2]))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr


# ---- where it is not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish, expected", [("3", 3), ("0", 1), ("", None)])
def test_the_number_of_cores_is_a_number(wish, expected, monkeypatch):
    monkeypatch.delenv("GPUBACKPROP_THREADS", raising=False)
    default = default_threads()
    monkeypatch.setenv("GPUBACKPROP_THREADS", wish)
    assert default_threads() == (expected or default)


@pytest.mark.parametrize("wish", ["²", "many", "-1", "1.5", "1e3", "1000000", "9" * 5000])
def test_a_number_of_cores_that_is_none_or_too_many_is_bounded_and_said(wish, monkeypatch):
    """A million would start all the threads that the system gives."""
    monkeypatch.delenv("GPUBACKPROP_THREADS", raising=False)
    default, most = default_threads(), 4 * os.cpu_count()
    monkeypatch.setenv("GPUBACKPROP_THREADS", wish)
    with pytest.warns(
        RuntimeWarning, match=rf"^GPUBACKPROP_THREADS is .*, expected an integer from 1 to {most}, four"
    ) as w:
        assert default_threads() == (most if wish.isdecimal() else default)
    assert len(str(w[0].message)) < 300


def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(host, "digest", lambda: "of another version")
    with pytest.raises(RuntimeError, match="was made of other sources; build it with a C"):
        Library(available()[-1])


def test_without_the_library_numpy_serves_unless_it_is_required(monkeypatch, caplog):
    monkeypatch.setenv("GPUBACKPROP_NATIVE", "0")
    monkeypatch.delenv("GPUBACKPROP_REQUIRE_NATIVE", raising=False)
    native.library.cache_clear()
    try:
        from gpubackprop import backends

        assert type(backends._make("cpu")) is NumpyBackend and why_not_native() == "GPUBACKPROP_NATIVE is 0"
        monkeypatch.setenv("GPUBACKPROP_REQUIRE_NATIVE", "1")
        with pytest.raises(
            RuntimeError, match="device 'cpu': the native library is not in use: GPUBACKPROP_NATIVE is 0"
        ):
            backends._make("cpu")
    finally:
        native.library.cache_clear()


def pool_program(folder, text, *options):
    """A program over the pool, compiled and run; quick_exit, because its threads never end."""
    source, program = folder / "main.cpp", folder / "main"
    head = '#define DIGEST ""\n#include "pool.cpp"\n#include <cstdlib>\n'
    source.write_text(f"{head}int main() {{\n{text}\nquick_exit(0);\n}}\n")
    options = ["-std=c++17", "-O1", "-g", "-pthread", f"-I{host.sources() / 'host'}", *options]
    subprocess.run(["g++", *options, str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_pool_has_no_race(tmp_path):
    """Under ThreadSanitizer, with callers from several threads."""
    text = """
    gpubackprop_set_threads(4);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) callers.emplace_back([] {
        for (int round = 0; round < 200; ++round) {
            std::vector<int> hits(1 + round % 70);
            gpubackprop::each((long long)hits.size(), true, [&](long long i) { hits[size_t(i)] += 1; });
            for (int hit : hits) if (hit != 1) abort();
        }
    });
    for (auto& caller : callers) caller.join();"""
    done = pool_program(tmp_path, text, "-fsanitize=thread")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("g++") is None or not hasattr(os, "sched_getaffinity"), reason="no g++, or not Linux")
def test_where_threads_run_out_those_that_are_there_do_the_work(tmp_path):
    text = """
    const rlimit none{1, 1};
    setrlimit(RLIMIT_NPROC, &none);
    if (getuid() == 0 && setuid(65534) != 0) abort();  // root's threads are not counted
    gpubackprop_set_threads(8);
    std::atomic<int> done{0};
    for (int round = 0; round < 3; ++round) gpubackprop::each(50, true, [&](long long) { ++done; });
    if (done != 150) abort();"""
    done = pool_program(tmp_path, text, "-include", "sys/resource.h", "-include", "unistd.h")
    assert done.returncode == 0, done.stderr


def test_a_launch_keeps_the_table_that_it_reads():
    back = get_backend("cpu")
    table = back.step_table(["1 / weight"], np.float32, 1)
    launch, still_there = back.advance(table), weakref.ref(table)
    del table
    gc.collect()
    assert compiled(launch) and still_there() is not None


def test_jobs_keep_what_their_addresses_stand_for():
    seen = []
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda a: seen.append(ctypes.c_longlong.from_address(a).value))
    job = Job.of(kernel, np.arange(3), 7)
    job()
    assert seen == [job.kept[1][0].ctypes.data]
