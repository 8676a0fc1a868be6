"""Every test starts from one seed; tests marked `gpu` run where a GPU is, and the summary says if there was none."""

import gc
import os
import random
import re
import signal

import numpy as np
import pytest

from gpubackprop.backends import why_not_cuda

skipped: list[str] = []


@pytest.fixture(autouse=True)
def rng():
    """A generator for the test; Python's own starts from the same seed."""
    random.seed(0)
    return np.random.default_rng(0)


@pytest.fixture
def cuda(monkeypatch):
    """Devices "cuda" and "cuda:N" are emulated; the backend of "cuda:0". At the end, no rule of a device was broken."""
    from emulator.driver import EmulatedDriver, current_device

    from gpubackprop import backends
    from gpubackprop.backends.base import Workspace, use_workspace
    from gpubackprop.backends.cuda import CudaBackend

    made, make = {"cpu": backends.get_backend("cpu")}, backends._make

    def emulated(name):
        index = re.fullmatch(r"cuda:(\d+)", name)
        return make(name) if index is None else CudaBackend(EmulatedDriver(int(index[1]), order=2))

    monkeypatch.setattr(backends, "_backends", made)
    monkeypatch.setattr(backends, "_index", lambda device, number: int(number[1:]) if number else current_device())
    monkeypatch.setattr(backends, "_make", emulated)
    with use_workspace(Workspace()):
        yield backends.get_backend("cuda")
    for name, backend in made.items():
        if re.fullmatch(r"cuda:\d+", name):
            backend.driver.check()


def pytest_configure():
    """Ctrl-C is what it is in a terminal, in processes that tests start too; a shell's background ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Keep what thousands of tests are made of out of every look for garbage."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    """Skip a test marked `gpu` without one, unless GPUBACKPROP_REQUIRE_GPU=1: then it fails."""
    if item.get_closest_marker("gpu") and (reason := why_not_cuda()) is not None:
        if os.environ.get("GPUBACKPROP_REQUIRE_GPU") == "1":
            pytest.fail(f"GPUBACKPROP_REQUIRE_GPU=1, but {reason}", pytrace=False)
        skipped.append(item.nodeid)
        pytest.skip(f"needs a GPU: {reason}")


def pytest_terminal_summary(terminalreporter):
    """Say how many tests want a GPU that is not here."""
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests marked gpu were skipped: {why_not_cuda()}")
