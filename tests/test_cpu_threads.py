"""The CPU's threads: how many there are, that they change no bit, and that BLAS's own are given back."""

import ctypes
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.backends import get_backend, native
from gpubackprop.backends.blas import LEAST, PIECES, blas, blocks
from gpubackprop.backends.threads import _quota, available_cores, default_threads, most_threads

pytestmark = pytest.mark.skipif(
    native.why_not_native() is not None or blas().threads is None, reason="no native library, or a BLAS not known here"
)


@pytest.fixture
def blas_threads():
    """What NumPy's BLAS says of the number of its threads, which a test leaves as it was."""
    get = ctypes.CFUNCTYPE(ctypes.c_int)(blas().threads[0])
    before = get()
    yield get
    assert get() == before


def big(rng, rows=256):
    """A trainer whose products are cut, and its data."""
    trainer = gb.Trainer(gb.mlp([100, 120, 1]), "mse", seed=0, device="cpu")
    return trainer, rng.normal(size=(rows, 100)).astype("f"), rng.normal(size=rows)


# ---- the same bits ---------------------------------------------------------------------------------------------------

FITS = """
import hashlib, os, sys
import numpy as np, gpubackprop as gb
rng, found = np.random.default_rng(0), hashlib.sha256()
def fit(sizes, batch, loss, optimizer=None, dtype="float32", rows=512, model=None):
    x = rng.normal(size=(rows, sizes[0]))
    y = rng.integers(0, sizes[-1], rows) if loss == "cross_entropy" else rng.normal(size=(rows, sizes[-1]))
    t = gb.Trainer(model or gb.mlp(sizes, dtype=dtype), loss, optimizer or gb.Adam(), seed=0, device="cpu")
    t.fit(x, y, epochs=2, batch_size=batch, progress=False)
    for a in (*t.model.state_dict().values(), t.predict(x), np.array(list(t.evaluate(x, y).values()))):
        found.update(a.tobytes())
def run():
    for dtype in ("float32", "float64"):
        fit([200, 150, 10], 64, "cross_entropy", dtype=dtype)
        fit([130, 257, 1], 100, "mse", dtype=dtype)
    fit([300, 5], 500, "cross_entropy", model=gb.Sequential(gb.Dense(300, 300, init="orthogonal"), gb.Dense(300, 5)))
    fit([1500, 1], 512, "mse", rows=1024)
    fit([60, 200, 1], 512, "mse", gb.LBFGS(), dtype="float64")
    print(found.hexdigest())
"""
CONFIGURATIONS = {
    "one core": ("", {"GPUBACKPROP_THREADS": "1"}, "run()"),
    "five threads": ("", {"GPUBACKPROP_THREADS": "5"}, "run()"),
    "OMP_NUM_THREADS": ("", {"OMP_NUM_THREADS": "1"}, "run()"),
    "BLAS of one thread": ("", {"OPENBLAS_NUM_THREADS": "1"}, "run()"),
    "affinity": ("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", {}, "run()"),
    "threadpoolctl": ("import threadpoolctl", {}, "with threadpoolctl.threadpool_limits(1): run()"),
    "gb.threads": ("", {}, "with gb.threads(3): run()"),
    "a loky worker": ("import joblib", {}, "print(*joblib.Parallel(2)(joblib.delayed(work)() for _ in range(2)))"),
}
WORK = """
def work():
    import contextlib, io
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(FITS + "run()", names)
    return out.getvalue().strip()
"""


def digests(before, variables, call):
    code = f"{before}\nFITS = {FITS!r}\n{FITS}\n{WORK}\n{call}"
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_THREADS")} | variables
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def usual():
    return digests("", {}, "run()")


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_fit_ends_in_the_same_bits_however_many_threads_there_are(configuration, usual):
    assert digests(*CONFIGURATIONS[configuration]) == usual


def test_products_are_the_same_bits_beside_one_that_holds_the_pool(rng):
    trainer, x, y = big(rng)
    alone = trainer.fit(x, y, epochs=3)["loss"]
    with_others, threads = [], []
    for _ in range(3):
        other = gb.Trainer(gb.mlp([100, 120, 1]), "mse", seed=0, device="cpu")
        threads.append(threading.Thread(target=lambda t=other: with_others.append(t.fit(x, y, epochs=3)["loss"])))
    [t.start() for t in threads], [t.join() for t in threads]
    assert with_others == [alone] * 3


# ---- how a product is cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 128, 784), (784, 128, 64), (1024, 1024, 1024), (5000, 1, 4000), (1, 9, 10**6)])
def test_blocks_cover_a_product_in_as_many_pieces_as_it_is_worth(shape):
    m, n, k = shape
    height, width = blocks(*shape)
    pieces = -(-m // height) * -(-n // width)
    wanted = max((count for least, count in PIECES if 2 * m * n * k >= least), default=1)
    assert pieces <= wanted and 1 <= height <= m and 1 <= width <= n
    assert pieces > wanted // 2 or max(height, width) < 2 * LEAST


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(64, 130, 784), (785, 128, 64), (600, 1, 1000), (1, 900, 1000), (300, 301, 302)])
def test_a_product_in_blocks_is_the_product(shape, dtype, rng, blas_threads):
    (m, n, k), back = shape, get_backend("cpu")
    for first, second in ((False, False), (True, False), (False, True)):
        a = rng.normal(size=(k, m) if first else (m, k)).astype(dtype)
        b = rng.normal(size=(n, k) if second else (k, n)).astype(dtype)
        out = np.ones((m, n), dtype)
        expected = (a.T if first else a).astype(float) @ (b.T if second else b).astype(float)
        for accumulate, more in ((True, 1), (False, 0)):
            back.gemm(a, b, out, transpose_a=first, transpose_b=second, accumulate=accumulate).run()
            bound = 4 * k * np.finfo(dtype).eps * (abs(expected).max() + 1)
            np.testing.assert_allclose(out, expected + more, rtol=0, atol=bound)


# ---- BLAS's own threads ----------------------------------------------------------------------------------------------


def test_blas_has_its_threads_back_after_a_fit_however_it_ends(blas_threads, rng):
    trainer, x, y = big(rng)

    def interrupt(_):
        raise KeyboardInterrupt

    trainer.fit(x, y, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(x, y, epochs=2, callbacks=[interrupt])
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(big(rng)[0].fit(x, y, epochs=20))) for _ in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(seen) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_of_a_fork_within_a_product_has_blas_as_it_was():
    code = """
import ctypes, os, threading, warnings
import numpy as np, gpubackprop as gb
from gpubackprop.backends.blas import blas
warnings.simplefilter("ignore")
get, before = (count := ctypes.CFUNCTYPE(ctypes.c_int)(blas().threads[0])), 0
before, x = get(), np.random.default_rng(0).normal(size=(2048, 300)).astype("f")
done = threading.Event()
def work():
    model = gb.mlp([300, 300, 300]).initialize(0)
    while not done.is_set(): model.predict(x)
thread = threading.Thread(target=work)
thread.start()
for _ in range(30):
    if not (pid := os.fork()):
        model = gb.mlp([300, 300, 300]).initialize(0)
        os._exit(0 if get() == before and np.isfinite(model.predict(x)).all() and get() == before else 1)
    assert os.waitpid(pid, 0)[1] == 0
done.set()
thread.join()
assert get() == before
from gpubackprop.backends.threads import one_blas_thread
with one_blas_thread():
    pid = os.fork()
    assert get() == 1 and np.isfinite(gb.mlp([300, 300]).initialize(0).predict(x)).all() and get() == 1
assert get() == before
if not pid:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_numpy_in_another_thread_is_right_while_a_fit_runs(rng):
    trainer, x, y = big(rng)
    a = rng.normal(size=(300, 300))
    expected, wrong, done = a @ a, [], threading.Event()

    def multiply():
        while not done.is_set():
            wrong.append(not np.allclose(a @ a, expected))

    thread = threading.Thread(target=multiply)
    thread.start()
    trainer.fit(x, y, epochs=30)
    done.set()
    thread.join()
    assert wrong and not any(wrong)


# ---- how many there are ----------------------------------------------------------------------------------------------


def test_the_number_of_threads_is_set_for_all_or_within_a_thread():
    assert gb.get_threads() == default_threads()
    seen = []
    with gb.threads(3):
        assert gb.get_threads() == 3
        thread = threading.Thread(target=lambda: seen.append(gb.get_threads()))
        thread.start(), thread.join()
        with gb.threads(1):
            assert gb.get_threads() == 1
        assert gb.get_threads() == 3
    assert gb.get_threads() == default_threads() and seen == [default_threads()]
    try:
        gb.set_threads(2)
        assert gb.get_threads() == 2
    finally:
        gb.set_threads(default_threads())


@pytest.mark.parametrize(
    "number, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError), (10**6, ValueError)]
)
def test_a_number_of_threads_that_is_none_is_refused(number, error):
    for use in (gb.set_threads, lambda n: gb.threads(n).__enter__()):
        with pytest.raises(error, match="threads: number"):
            use(number)
    assert gb.get_threads() == default_threads() <= most_threads()


def test_limits_of_threadpoolctl_hold_here_too():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with gb.threads(2), threadpoolctl.threadpool_limits(1):
        assert gb.get_threads() == 1


@pytest.mark.parametrize(
    "wish, expected", [("1", 1), ("1,2", 1), ("0", 1), ("many", None), ("", None), ("9" * 20, None)]
)
def test_omp_num_threads_bounds_it(wish, expected, monkeypatch):
    monkeypatch.delenv("GPUBACKPROP_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", wish)
    assert default_threads() == (expected or available_cores())


@pytest.mark.parametrize("files, own, expected", [
    ({"cpu.max": "150000 100000"}, "0::/", 2),
    ({"cpu.max": "max 100000"}, "0::/", None),
    ({"a/cpu.max": "max 100000", "a/b/cpu.max": "100000 100000", "cpu.max": "300000 100000"}, "0::/a/b", 1),
    ({"cpu.max": "50000 100000"}, "0::/not/there", 1),
    ({"cpu,cpuacct/d/cpu.cfs_quota_us": "400000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/d", 4),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n1:name=systemd:/x", None),
    ({"cpu.max": "nonsense"}, "0::/", None),
    ({}, "nonsense", None),
])  # fmt: skip
def test_a_containers_quota_bounds_it(files, own, expected, tmp_path):
    for name, text in files.items():
        (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    assert _quota(tmp_path, tmp_path / "own") == expected
