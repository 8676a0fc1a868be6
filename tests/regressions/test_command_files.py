"""The command line says before training what cannot be learnt, and keeps what was learnt whatever ends the run."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import gpubackprop as gb
from gpubackprop import cli, runs
from gpubackprop.checkpoint import read_metadata


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every command runs in an empty folder, with a folder of its own for temporary files."""
    (tmp_path / "here").mkdir()
    (tmp_path / "spare").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spare"))
    return tmp_path / "here"


def run(*arguments, status=0):
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.output


def fails(*arguments, status=2):
    *_, line = run(*arguments, status=status).splitlines()
    assert line.startswith("gpubackprop: ")
    return line.removeprefix("gpubackprop: ")


def write_csv(path, **columns):
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")


@pytest.fixture
def untrained(monkeypatch):
    """Training is not to begin."""

    def begin(*_, **__):
        raise AssertionError("it trains")

    monkeypatch.setattr(gb.Trainer, "fit", begin)


# ---- what is no class ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
@pytest.mark.parametrize("kind", ["text", "integers", "npz"])
def test_a_target_of_too_many_classes_is_refused_before_training(kind, quiet, folder, untrained, rng):
    n = 300
    x, y = rng.normal(size=n), rng.permutation(n) * 7
    if kind == "npz":
        np.savez("t.npz", x=x[:, None], y=y)
        told, data = "the target", ["t.npz"]
    else:
        write_csv(folder / "t.csv", x=x, y=y if kind == "integers" else [f"id-{v}" for v in y])
        told, data = "the target 'y'", ["t.csv", "--target", "y"]
    remedy = (
        "a column that names each row is no target" if kind == "text" else "if they are amounts, use --task regression"
    )
    expected = f"{data[0]}: {told} has 300 classes in 300 rows, expected two rows or more of most; {remedy}"
    assert fails("train", *data, *quiet) == expected
    if kind != "text":
        with pytest.raises(AssertionError, match="it trains"):
            CliRunner().invoke(cli.main, ["train", *data, "--task", "regression"], catch_exceptions=False)


@pytest.mark.parametrize("classes, rows", [(3, 4), (20, 24), (40, 81), (100, 400)])
def test_classes_with_rows_enough_are_trained(classes, rows, folder, rng):
    write_csv(folder / "t.csv", x=rng.normal(size=rows), y=[f"c{i % classes}" for i in range(rows)])
    assert f"{classes} classes" in run("train", "t.csv", "--target", "y", "--epochs", 1)


# ---- what the type cannot hold -------------------------------------------------------------------------------------

BEYOND = {  # what becomes of the column, and of the target
    "a cell": (lambda x: np.where(np.arange(len(x)) == 35, 1e39, x), 1, r"column 'a' has 1e\+39 at row 35, too large"),
    "a spread": (lambda x: 1e-46 * x, 1, "numbers of column 'a' lie .*e-4.* apart, too close for float32"),
    "a target": (lambda x: x, 1e39, "column 'y' has .*e.39 at row .*, too large for float32"),
}


@pytest.mark.parametrize("what", BEYOND)
def test_numbers_beyond_float32_are_said_before_training_with_a_remedy_that_works(what, folder, monkeypatch):
    a, size, message = BEYOND[what]
    rng = np.random.default_rng(3)
    x, b = rng.normal(size=(2, 100))
    write_csv(folder / "t.csv", a=a(x), b=b, y=size * (b + x))
    command = "train", "t.csv", "--target", "y", "--hidden", "", "--epochs", 60, "--lr", 0.05
    with monkeypatch.context() as inside:
        inside.setattr(gb.Trainer, "fit", lambda *_, **__: pytest.fail("it trains"))
        line = fails(*command, "--dtype", "float32")
    assert re.search(message, line) and line.endswith("; use --dtype float64")
    figures = run(*command)
    assert re.search("float64 +because column", figures)
    [loss, r2] = re.search(r"train +loss ([\d.e+-]+), r2 ([\d.e+-]+)", figures).groups()
    assert np.isfinite(float(loss)) and float(r2) > (0.1 if what == "a cell" else 0.95)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_targets_whose_squares_are_beyond_float32_are_trained_and_measured(size, folder, rng):
    x = rng.normal(size=100)
    write_csv(folder / "t.csv", a=x, y=size * x)
    figures = run("train", "t.csv", "--target", "y", "--hidden", "", "--epochs", 60, "--lr", 0.05)
    [loss, r2] = re.search(r"train +loss ([\d.e+-]+), r2 ([\d.e+-]+)", figures).groups()
    assert 0 < float(loss) < np.inf and float(r2) > 0.95


@pytest.mark.parametrize("what, scale", [("x", 1e300), ("y", 1e300), ("y", 1e-300)])
def test_numbers_beyond_every_type_are_said_too(what, scale, folder, untrained, rng):
    x = rng.normal(size=50)
    write_csv(folder / "t.csv", a=x * (scale if what == "x" else 1), y=x * (scale if what == "y" else 1))
    for dtype in ("float32", "float64"):
        line = fails("train", "t.csv", "--target", "y", "--dtype", dtype)
        assert line.endswith("; scale it by a power of ten") and ("'a'" if what == "x" else "'y'") in line


def test_a_constant_target_and_plain_columns_are_trained(folder, rng):
    x = rng.normal(size=50)
    write_csv(folder / "t.csv", a=1e30 * x, b=np.full(50, 1e-50), c=1e-30 * x, y=np.full(50, 2.5))
    assert "train " in run("train", "t.csv", "--target", "y", "--epochs", 1)


# ---- what a model file says of its run -----------------------------------------------------------------------------

WRONG = [
    ({"classes": "Layer"}, "its classes are no list of names"),
    ({"classes": 3}, "its classes are no list of names"),
    ({"classes": {"a": 1}}, "its classes are no list of names"),
    ({"classes": [1, 2, 3]}, "its classes are no list of names"),
    ({"classes": ["a", None, "b"]}, "its classes are no list of names"),
    ({"classes": [["a"], ["b"], ["c"]]}, "its classes are no list of names"),
    ({"classes": []}, "its classes are no list of names"),
    ({"classes": ["a", "b"]}, "it names 2 classes but the model has 3 outputs"),
    ({"classes": ["a", "b", "a"]}, "its classes have a name twice"),
    ({"columns": "ab"}, "its columns are no list of names"),
    ({"columns": {"a": 1, "b": 2}}, "its columns are no list of names"),
    ({"columns": ["a", 1]}, "its columns are no list of names"),
    ({"columns": ["a"]}, "it names 1 columns but the model takes 2"),
    ({"columns": ["a", "a"]}, "its columns have a name twice"),
    ({"target": 3}, "its target is 3, expected text"),
    ({"target": ["y" * 10**5]}, "its target is .*, expected text"),
    ({"data": {}}, "its data is {}, expected text"),
    ({"task": "both"}, "its task is 'both', expected classification or regression"),
    ({"task": [1]}, r"its task is \[1\], expected classification or regression"),
    ({"test": "half"}, "its test is 'half', expected a fraction"),
    ({"test": True}, "its test is True, expected a fraction"),
    ({"seed": -1}, "its seed is -1, expected an integer"),
    ({"seed": 0.5}, "its seed is 0.5, expected an integer"),
]


@pytest.fixture
def model(folder, rng):
    """A saved model of two columns and three classes, with a table."""
    x, label = rng.normal(size=(60, 2)), [f"c{i % 3}" for i in range(60)]
    write_csv(folder / "t.csv", a=x[:, 0], b=x[:, 1], y=label)
    run("train", "t.csv", "--target", "y", "--epochs", 1, "--out", "m", "--quiet")
    return folder / "m"


def change(path, **entries):
    header = read_metadata(path)
    header["extra"] |= entries
    save_file(load_file(path), path, {"gpubackprop": json.dumps(header)})


@pytest.mark.parametrize("entries, message", WRONG, ids=[str(e)[:40] for e, _ in WRONG])
def test_what_a_file_says_of_its_run_is_checked_and_named(entries, message, model):
    change(model, **entries)
    for command in (["evaluate", "m", "t.csv"], ["predict", "m", "t.csv", "--out", "p.csv"],
                    ["plot", "gradients", "m", "t.csv", "--out", "g.svg"]):  # fmt: skip
        line = fails(*command)
        assert re.match(rf"m: {message}", line) and len(line) < 300, line


def test_what_a_file_does_not_say_is_not_asked_for(model):
    change(model, data=None, task=None, test=None, seed=None, mine={"a": [1]})
    run("evaluate", "m", "t.csv")
    gb.save_model(gb.mlp([2, 3]), "plain", extra={"note": 1})
    np.savez("t.npz", x=np.ones((4, 2)))
    assert runs.load("plain")[1] == {"note": 1}
    run("predict", "plain", "t.npz", "--out", "p.csv")


def test_classes_of_numbers_are_refused(model, folder):
    write_csv(folder / "n.csv", a=range(50), b=range(50), y=np.linspace(0, 1, 50))
    run("train", "n.csv", "--target", "y", "--epochs", 1, "--out", "n", "--quiet")
    change(folder / "n", classes=["a", "b"])
    assert fails("evaluate", "n", "n.csv").startswith("n: it names classes but the model gives numbers")


def test_a_model_that_cannot_be_called_is_named(model):
    wrong = gb.Sequential(gb.Residual(gb.Dense(2, 3)))  # whose sum has no shape
    gb.save_model(wrong, "wrong")
    assert re.match(r"wrong: the model cannot be used \(.*\); save it again", fails("evaluate", "wrong", "t.csv"))


# ---- files that cannot be written ----------------------------------------------------------------------------------


def full_in(monkeypatch, *places):
    """The disk is full where one of these folders lies."""
    fsync = os.fsync

    def full(number):
        if any(os.readlink(f"/proc/self/fd/{number}").startswith(str(place)) for place in places):
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)


def test_a_full_disk_costs_neither_the_figures_nor_the_model(folder, monkeypatch):
    full_in(monkeypatch, folder)
    output = run("train", "digits", "--epochs", 1, "--out", "m", status=1)
    assert "held out" in output and re.search(r"^train +loss .*accuracy 0\.\d+", output, re.MULTILINE)
    message, place = re.search(r"gpubackprop: (.*); the model was saved to (\S+/m)$", output.strip()).groups()
    assert message == "m: cannot be written (No space left on device); free some space, or name another place"
    assert list(folder.iterdir()) == [] and run("evaluate", place, "digits").startswith("held out")
    assert os.stat(os.path.dirname(place)).st_mode & 0o777 == 0o700


def test_where_there_is_no_room_at_all_the_figures_are_printed(folder, monkeypatch):
    full_in(monkeypatch, folder.parent)
    output = run("train", "digits", "--epochs", 1, "--out", "m", "--json", "f.json", status=1)
    assert "held out" in output and output.strip().endswith(
        "the model is not saved: train it again with --out where there is room"
    )
    assert list(folder.iterdir()) == [] and list((folder.parent / "spare").iterdir()) == []


def test_figures_that_cannot_be_written_are_printed(folder, monkeypatch):
    full_in(monkeypatch, folder / ".f.json")
    output = run("train", "digits", "--epochs", 1, "--out", "m", "--json", "f.json", status=1)
    assert "held out" in output and "gpubackprop: f.json: cannot be written (No space left on device)" in output
    assert [p.name for p in folder.iterdir()] == ["m"]


def test_predictions_and_pictures_name_the_file_that_cannot_be_written(model, folder, monkeypatch):
    full_in(monkeypatch, folder)
    message = r"{}: cannot be written \(No space left on device\); free some space, or name another place"
    for command, out in ((["predict", "m", "t.csv"], "p.csv"), (["explain", "m"], "e.svg")):
        assert re.fullmatch(message.format(out), fails(*command, "--out", out, status=1))
    assert sorted(p.name for p in folder.iterdir()) == ["m", "t.csv"]


def test_a_read_only_file_is_refused_before_training(folder, untrained):
    (folder / "m").write_bytes(b"old")
    (folder / "m").chmod(0o444)
    assert fails("train", "digits", "--out", "m", "--force").startswith("m: is read-only; make it writable (chmod u+w)")
    assert (folder / "m").read_bytes() == b"old"


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_appears_while_training_is_replaced_with_force_only(force, folder, monkeypatch):
    fit = gb.Trainer.fit

    def appear(*arguments, **keywords):
        fit(*arguments, **keywords)
        for key in ("m", "f.json"):
            (folder / key).write_text("theirs")

    monkeypatch.setattr(gb.Trainer, "fit", appear)
    command = "train", "digits", "--epochs", 1, "--out", "m", "--json", "f.json"
    output = run(*command, *["--force"] * force, status=0 if force else 2)
    assert "held out" in output
    assert [(folder / key).read_bytes() == b"theirs" for key in ("m", "f.json")] == [not force] * 2
    if not force:
        assert "gpubackprop: m: exists, and was not replaced; choose another name; the model was saved to" in output


# ---- SIGTERM -------------------------------------------------------------------------------------------------------


def busy(rng, columns=3):
    return rng.normal(size=(64, columns)), rng.normal(size=64)


def test_sigterm_lets_the_step_in_flight_finish_and_the_handler_is_put_back(rng):
    x, y = busy(rng)
    trainer = gb.Trainer(gb.mlp([3, 8, 1]), "mse", seed=0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(SystemExit) as caught:
        trainer.fit(x, y, epochs=5, batch_size=16, callbacks=[lambda t: signal.raise_signal(signal.SIGTERM)])
    assert caught.value.code == 143 and len(trainer.history["loss"]) == 1 and trainer.step == 5
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    trainer.fit(x, y, epochs=1, batch_size=16)


def test_a_second_sigterm_goes_through_at_once(rng):
    x, y = busy(rng)
    trainer = gb.Trainer(gb.mlp([3, 8, 1]), "mse", seed=0)

    def twice(_):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the second one waited")

    with pytest.raises(SystemExit):
        trainer.fit(x, y, epochs=5, batch_size=16, callbacks=[twice])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("handler", ["own", signal.SIG_IGN])
def test_a_handler_of_ones_own_is_left_alone(rng, handler):
    came = []
    mine = (lambda number, _: came.append(number)) if handler == "own" else handler
    before = signal.signal(signal.SIGTERM, mine)
    try:
        x, y = busy(rng)
        gb.Trainer(gb.mlp([3, 8, 1]), "mse", seed=0).fit(
            x, y, epochs=2, batch_size=16, callbacks=[lambda t: signal.raise_signal(signal.SIGTERM)]
        )
        assert came == [signal.SIGTERM] * 2 * (handler == "own") and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def start(*arguments):
    command = [sys.executable, "-W", "error", "-m", "gpubackprop", *map(str, arguments)]
    root = os.path.dirname(os.path.dirname(gb.__file__))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": root})  # fmt: skip


def test_sigterm_saves_the_model_as_ctrl_c_does_and_ends_with_143(folder):
    process = start("train", "regression7", "--epochs", 10**7, "--out", "m")
    assert any(line.startswith("training") for line in iter(process.stdout.readline, ""))
    time.sleep(1)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert re.fullmatch(r"gpubackprop: terminated after \d+ of 10000000 epochs; the model .* saved to m\n", errors)
    assert run("evaluate", "m", "regression7").startswith("held out")


def test_sigterm_elsewhere_is_a_line_and_143(monkeypatch):
    monkeypatch.setattr(runs, "read", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert fails("train", "digits", status=143) == "terminated; no file is left half written"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_comes_while_the_model_is_saved_waits_until_it_is(folder, monkeypatch):
    fsync = os.fsync

    def late(number):
        signal.raise_signal(signal.SIGTERM)
        fsync(number)

    monkeypatch.setattr(os, "fsync", late)
    assert fails("train", "digits", "--epochs", 1, "--out", "m", status=143).startswith("terminated")
    assert run("evaluate", "m", "digits").startswith("held out")
