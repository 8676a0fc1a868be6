"""The benchmark suite at tiny sizes: it runs, its contenders compute the same, and what it prints and stores holds."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import gpubackprop as gb
from benchmarks.__main__ import main
from benchmarks.breakeven import cells
from benchmarks.cases import CASES, GROUPS, Case, chosen
from benchmarks.measure import limits, median_and_spread, timed
from benchmarks.peers import PEERS, Prepared, prepare
from benchmarks.report import circumstances, compared, duration, read, scaling, shares, table, write
from benchmarks.rounds import Contender, Figures, busy, contenders, disagreement, measure
from gpubackprop.backends import why_not_cuda

TRAIN = "train 64-64-64-10 (32)"


def command(*arguments):
    return CliRunner().invoke(main, arguments)


def figures(contender="gpubackprop cpu", seconds=(1.0, 1.0, 1.0), case=TRAIN, **more):
    found = CASES[case]
    return Figures(case, found.group, found.unit, contender, found.flops, found.bytes, seconds=list(seconds), **more)


# ---- cases and peers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.group != "shell"], ids=lambda c: c.name)
def test_what_contenders_compute_agrees(case):
    """In this process, with those that need nothing beside this library: on both CPU backends, and by hand."""
    small, found = case.smoke(), []
    for peer, variant in (("gpubackprop", "cpu"), ("gpubackprop", "cpu:reference"), ("products", "cpu"), ("numpy", "")):
        if case.group in PEERS[peer].groups and (prepared := prepare(peer, variant, small)) is not None:
            prepared.run()
            assert prepared.units >= 1
            found.append(
                Figures(
                    case.name, case.group, case.unit, str(Contender(PEERS[peer], variant)), 0, 0, check=prepared.check()
                )
            )
    assert len([f for f in found if f.check]) >= 2 or case.group == "import"
    assert list(disagreement(case, found)) == []


@pytest.mark.parametrize("peer", ["torch:eager", "jax", "sklearn", "onnxruntime"])
def test_peers_compute_the_same(peer):
    """In processes of their own, those that are installed; the others are named with what installs them."""
    among = contenders([peer], ["cpu"])
    if missing := among[-1].peer.missing:
        assert missing.startswith("pip install ")
        return
    for case in (TRAIN, "predict 64-128-10 (1,797 rows)", "update adam (10,000)", "kernel layer_norm (128×512)"):
        found = measure(CASES[case], among, 1, smoke=True)
        assert [f.absent for f in found if f.absent] == []
        assert list(disagreement(CASES[case], found)) == []


def test_a_step_beside_others_is_set_against_one_alone():
    """Figures of both, and the ratio; the busy processes are gone afterwards."""
    names = ["busy 64-256-10 (64)", "busy 64-256-10 (64) beside 1", "busy 64-256-10 (64), 2 at once"]
    found = [f for name in names for f in measure(CASES[name], contenders([], ["cpu"])[:1], 2, smoke=True)]
    assert [len(f.seconds) for f in found] == [2, 2, 2] and not any(f.absent for f in found)
    full = [replace(f, case=name) for f, name in zip(found, names, strict=True)]
    head, *rows = shares(full)
    assert head.split() == ["case", "contender", "a", "step", "×", "alone", "a", "fair", "share"]
    assert [row.startswith(name) for row, name in zip(rows, names[1:], strict=True)] == [True, True]
    with busy(2):
        pass
    assert not subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "os.getppid"], capture_output=True).stdout


def test_the_limits_of_the_machine_are_positive_and_shares_of_them_below_one():
    most = limits(rounds=3)
    assert 1e9 < most.bytes < 1e13 and (most.flops == 0 or 1e9 < most.flops < 1e15)
    a = np.ones((512, 512), np.float32)
    seconds = min(timed(lambda: a @ a)["seconds"] for _ in range(5))
    assert 0 <= most.share(2 * 512**3, 0, seconds) < 1.2 and f"{most.bytes / 1e9:.1f} GB/s copied" in str(most)


def test_work_is_counted():
    case = CASES["train 784-512-512-10 (128)"]
    products = [(784, 512, 2), (512, 512, 3), (512, 10, 3)]
    assert case.flops == sum(2 * 128 * a * b * n for a, b, n in products)
    assert CASES["update adam (10,000)"].bytes == 10_000 * 4 * 7
    assert CASES["update sgd (10,000)"].bytes == 10_000 * 4 * 3
    assert CASES["kernel relu (128×512)"].bytes == 128 * 512 * 4 * 2


def test_cases_are_chosen_by_name_group_and_pattern():
    assert chosen([TRAIN]) == [CASES[TRAIN]]
    assert {c.group for c in chosen(["update", "import"])} == {"update", "import"}
    assert chosen(["*gelu*"]) == [c for n, c in CASES.items() if "gelu" in n]
    assert {c.group for c in chosen([])} == {*GROUPS} - {"scaling", "busy"}
    assert not any(c.beside for c in chosen([]))
    with pytest.raises(ValueError, match="no case 'trian'; choose from train, predict"):
        chosen(["trian"])


def test_contenders_are_chosen_by_name_and_variant():
    names = [str(c) for c in contenders(["torch:compile", "jax"], ["cpu:reference", "cpu"])]
    own = ["gpubackprop cpu:reference", "gpubackprop cpu", "products cpu:reference"]
    assert names == [*own, "numpy", "torch compile", "jax step", "jax scan"]
    for wrong in ("torhc", "torch:jit", "gpubackprop"):
        with pytest.raises(ValueError, match=f"no peer '{wrong}'; choose from numpy, torch, torch:eager"):
            contenders([wrong], ["cpu"])


# ---- row 48: both backends, and on what -----------------------------------------------------------------------------


def test_seed_48_both_backends_compute_the_same_step(cuda):
    """What is timed on NumPy's arrays and on CUDA's agrees, step by step; without a GPU CUDA is emulated."""
    small, found = CASES[TRAIN].smoke(), []
    for device in ("cpu", "cpu:reference", "cuda"):
        check = prepare("gpubackprop", device, small).check()
        assert len(check) == 2 and check[1] < check[0]
        found.append(Figures(small.name, small.group, small.unit, device, 0, 0, check=check))
    assert list(disagreement(small, found)) == []


def test_seed_48_the_speed_table_says_what_it_was_taken_on():
    """One table with a row for each backend, under the processor and GPU; `gpu` tests add "cuda"."""
    backends = ["cpu", "cpu:reference"] + ["cuda"] * (why_not_cuda() is None)
    asked = [argument for device in backends for argument in ("--backend", device)]
    done = command("run", "--smoke", "--repeats", "2", "--case", TRAIN, "--peers", "none", *asked)
    assert done.exit_code == 0, done.output
    first, _, _, *rows = done.output.splitlines()
    about = circumstances()
    assert about["machine"] in first and about["gpu"] in first and first.split("; ")[0].endswith(" cores")
    assert [row.split("  ")[0] for row in rows[: len(backends)]] == [f"gpubackprop {device}" for device in backends]
    assert all(re.search(r" [µm]?s  ", row) for row in rows[: len(backends)])


# ---- rounds --------------------------------------------------------------------------------------------------------


def test_a_contender_that_computes_something_else_is_named():
    a, b = figures(check=[1.0, 2.0]), figures("torch eager", check=[1.0, 2.01])
    assert list(disagreement(CASES[TRAIN], [a, b])) == [
        f"{TRAIN}: torch eager does not compute what gpubackprop cpu does (apart by 0.01)"
    ]
    b.check = [1.0, 2.0005]
    assert list(disagreement(CASES[TRAIN], [a, b])) == []
    b.check = [1.0]
    assert len(list(disagreement(CASES[TRAIN], [a, b]))) == 1


def test_what_is_missing_and_what_fails_is_said(monkeypatch):
    absent = PEERS["jax"].__class__("jax", ("no_such_module",), ("train",))
    monkeypatch.setitem(PEERS, "jax", absent)  # of one variant, without a name
    found = measure(CASES[TRAIN], contenders(["jax"], ["cpu", "cuda:7"]), 1, smoke=True)
    said = {f.contender: f.absent for f in found}
    assert said["jax"] == "not installed: pip install no_such_module"
    assert said["gpubackprop cuda:7"].startswith("failed: RuntimeError: device 'cuda:7'")
    assert said["gpubackprop cpu"] == said["products cpu"] == ""
    assert [len(f.seconds) for f in found if not f.absent] == [1, 1]
    assert "jax: not installed: pip install no_such_module" in table(found)


def test_a_contender_that_dies_between_rounds_is_no_figure(monkeypatch):
    import benchmarks.rounds as rounds

    answer, calls = rounds._Process.answer, []

    def dying(self):
        calls.append(self)
        if len(calls) == 4:  # both are ready, and the first was measured once
            self._process.kill()
            self._process.wait()
        return answer(self)

    monkeypatch.setattr(rounds._Process, "answer", dying)
    found = measure(CASES[TRAIN], contenders([], ["cpu"]), 3, smoke=True)
    assert [(f.contender, len(f.seconds), f.absent) for f in found] == [
        ("gpubackprop cpu", 3, ""), ("products cpu", 0, "failed: exit status -9"),
    ]  # fmt: skip


def test_a_process_that_fails_is_an_error(monkeypatch):
    from benchmarks.peers.processes import script

    with pytest.raises(RuntimeError, match="AssertionError: 98"):
        script("assert False, 98").run()
    assert isinstance(script("pass"), Prepared)


# ---- the command line ----------------------------------------------------------------------------------------------


def test_run_writes_what_compare_and_plot_read(tmp_path):
    path = str(tmp_path / "a.json")
    chosen_ = ("--case", TRAIN, "--case", "scaling depth *", "--peers", "none")
    done = command("run", "--smoke", "--repeats", "2", "--json", path, *chosen_)
    assert done.exit_code == 0, done.output
    assert "products cpu" in done.output and "GFLOP/s" in done.output
    about, found = read(path)
    assert {"machine", "commit", "numpy", "date"} <= set(about)
    assert all(len(f.seconds) == 2 for f in found)
    assert json.loads((tmp_path / "a.json").read_text())["figures"][0]["median"] == found[0].median
    done = command("compare", path, path)
    assert done.exit_code == 0 and TRAIN in done.output and "1.00" in done.output
    assert "faster" not in done.output and "slower" not in done.output
    slower = [replace(f, seconds=[9 * s for s in f.seconds]) for f in found]
    write(str(tmp_path / "b.json"), [replace(f, case=f.case.removesuffix(", smoke")) for f in slower])
    assert "no measured case in common" in command("compare", path, str(tmp_path / "b.json")).output  # smoke is marked
    done = command("plot", str(tmp_path / "b.json"), "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"train.svg", "scaling-depth.svg"}
    assert command("plot", str(tmp_path / "b.json"), "--out", f"{path}/under").exit_code == 1  # a file, no folder


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    import benchmarks.__main__ as module

    calls = []

    def interrupted(case: Case, *rest, **more):
        calls.append(case)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return [figures()]

    monkeypatch.setattr(module, "measure", interrupted)
    done = command("run", "--json", str(tmp_path / "a.json"))
    assert done.exit_code == 1
    assert [f.case for f in read(str(tmp_path / "a.json"))[1]] == [TRAIN]


def test_errors_of_the_command_line(tmp_path):
    assert "no case 'x'" in command("run", "--case", "x").output
    assert "no peer 'x'" in command("run", "--peers", "x").output
    assert "no peer 'x'" in command("run", "--peers", "none, x").output
    done = command("run", "--json", str(tmp_path / "no" / "a.json"), "--case", TRAIN)
    assert done.exit_code == 2 and "No such file or directory" in done.output
    assert "device 'cuda'" in command("run", "--backend", "cuda", "--case", TRAIN).output
    (tmp_path / "bad.json").write_text("{}")
    done = command("compare", str(tmp_path / "bad.json"), str(tmp_path / "bad.json"))
    assert done.exit_code == 1 and "not figures of" in done.output
    write(str(tmp_path / "a.json"), [figures()])
    write(str(tmp_path / "b.json"), [figures("numpy")])
    assert "no measured case in common" in command("compare", *(str(tmp_path / f"{n}.json") for n in "ab")).output


# ---- reports -------------------------------------------------------------------------------------------------------


def test_comparisons_are_sure_beyond_both_spreads():
    steady, noisy = [1.0, 1.01, 0.99, 1.0], [0.5, 1.5, 1.0, 1.0]
    slower = [1.2 * s for s in steady]
    [_, line] = compared([figures(seconds=steady)], [figures(seconds=slower)])
    assert line.endswith("1.20  slower")
    [_, line] = compared([figures(seconds=slower)], [figures(seconds=steady)])
    assert line.endswith("0.83  faster")
    for few in ({"seconds": noisy}, {"seconds": steady[:2]}):
        [_, line] = compared([figures(**few)], [figures(seconds=slower)])
        assert not line.endswith("er")
    [_, line] = compared([figures(seconds=steady)], [figures(seconds=slower)], alike=False)
    assert line.endswith("1.20")


def test_scaling_says_what_each_more_takes():
    depths = [c for c in CASES.values() if c.group == "scaling" and c.axis == "depth"]
    found = [figures(seconds=[1e-3 + 2e-3 * c.value] * 3, case=c.name) for c in depths]
    lines = [line.split() for line in scaling(found, "cpu")]
    assert lines[0] == ["depth", "a", "step", "each", "layer", "more", "resident"]
    assert lines[1][:3] == ["1", "3.00", "ms"]
    assert all(line[3:5] == ["2.00", "ms"] for line in lines[2:-1])
    plan = gb.Trainer(gb.mlp([*depths[0].sizes]), seed=0, device="cpu", metrics=[]).plan(depths[0].batch)
    assert lines[1][3:] == [f"{plan.bytes_resident / 1e6:.2f}", "MB"]


def test_a_table_has_ratios_to_the_first_and_to_the_floor():
    found = [figures(seconds=[2e-3] * 3), figures("products cpu", [1e-3] * 3), figures("torch eager", [8e-3] * 3)]
    lines = [line.split() for line in table(found)]
    assert lines[1][:7] == ["gpubackprop", "cpu", "2.00", "ms", "0.0%", "1.00", "2.00"]
    assert lines[3][:7] == ["torch", "eager", "8.00", "ms", "0.0%", "4.00", "8.00"]
    assert float(lines[1][7]) == pytest.approx(CASES[TRAIN].flops / 2e-3 / 1e9, abs=0.1)


def test_durations_have_three_digits():
    assert [duration(s) for s in (2.5, 0.0264, 26.4e-6, 0.264e-6, 123e-6, -2e-3)] == [
        "2.50 s", "26.4 ms", "26.4 µs", "264 ns", "123 µs", "-2.00 ms",
    ]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says")
def test_memory_is_this_process_s_own():
    """Neither the parent's peak nor what was freed before counts."""
    code = """
from benchmarks.measure import forget_peak, peak_memory
def big(n): return len(bytearray(n))
big(200_000_000); forget_peak(); before = peak_memory(); big(50_000_000)
assert 45e6 < peak_memory() - before < 80e6, peak_memory() - before
"""
    held = np.ones(20_000_000)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0 and held.all(), done.stderr


def test_cuda_is_timed_between_events_too(monkeypatch):
    """Events around the call, on a device whose clock is the order in which things happen."""
    happened = []

    class Event:
        def record(self):
            happened.append("record")
            self.time = len(happened)

        def synchronize(self):
            happened.append("synchronize")

    elapsed = SimpleNamespace(Event=Event, get_elapsed_time=lambda a, b: 1e3 * (b.time - a.time))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=elapsed))
    taken = timed(lambda: happened.append("call"), "cuda:0")
    assert happened == ["record", "call", "record", "synchronize"]
    assert taken["device_seconds"] == 2 and taken["seconds"] >= 0
    assert set(timed(lambda: None)) == {"seconds"}


def test_median_and_spread():
    assert median_and_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, pytest.approx(0.5))
    assert median_and_spread([2.0]) == (2.0, 0.0)


def test_breakeven_says_that_it_is_a_model():
    [small, large] = cells("h100", "float32", 2, True, widths=(8, 64), batches=(16,))
    assert 0 < small.cpu < large.cpu and 17e-6 < small.gpu < large.gpu
    done = command("breakeven")
    assert done.exit_code == 2 and "no GPU here" in done.output and "--gpu models one of t4" in done.output
    assert np.isfinite(small.gain)
