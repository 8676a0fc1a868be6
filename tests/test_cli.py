"""The command line: what it prints and writes, and each error as one line with its exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import gpubackprop as gb
from gpubackprop import cli, runs
from gpubackprop.backends import why_not_cuda
from gpubackprop.checkpoint import load_model, read_metadata, save_model
from gpubackprop.optimizers import OPTIMIZERS

without_gpu = pytest.mark.skipif(why_not_cuda() is None, reason="CUDA works here")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every command runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, status=0):
    """The output (both streams) of a command, which must end with that status and without a traceback."""
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.output


def fails(*arguments, status=2):
    """The one line of an error."""
    *_, line = output = run(*arguments, status=status).splitlines()
    assert line.startswith("gpubackprop: ") and sum(t.startswith("gpubackprop") for t in output) == 1
    return line.removeprefix("gpubackprop: ")


def load_classes(path):
    return read_metadata(path)["extra"]["classes"]


def line_of(output, label):
    [line] = [line for line in output.splitlines() if line.startswith(label)]
    return line


def write_flowers(path, n=120, seed=0, species=("iris", "lily", "rose")):
    """A CSV of two columns at very different scales, the second in clusters by a species in text."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % len(species)
    rows = zip(1e-3 * rng.normal(size=n), 5000 + 400 * label + 60 * rng.normal(size=n), label, strict=True)
    lines = [f"{a:.8g},{b:.8g},{species[i]}" for a, b, i in rows]
    path.write_text("\n".join(["length,price,species", *lines]) + "\n")


def write_line(path, n=200, seed=0):
    """A CSV whose target is linear in its columns, far from unit scale."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2)) * [3, 1e4] + [10, 1e5]
    y = 2e5 + 4e4 * x[:, 0] - 5 * x[:, 1]
    lines = [f"{a!r},{b!r},{c!r}" for (a, b), c in zip(x.tolist(), y.tolist(), strict=True)]
    path.write_text("\n".join(["age,size,worth", *lines]) + "\n")


# ---- train and evaluate --------------------------------------------------------------------------------------------


def test_digits_defaults_meet_the_accuracy():
    table = runs.read("digits")
    accuracies, seconds = [], []
    for seed in range(10):
        training = runs.Run("digits", table, runs.Recipe(seed=seed))
        training.fit(progress=False)
        accuracies.append(training.figures()["held_out"]["accuracy"])
        seconds.append(training.seconds)
    assert np.mean(accuracies) >= 0.975 and min(accuracies) >= 0.96, accuracies
    assert np.median(seconds) < 5


def test_train_prints_and_evaluate_repeats_its_figure(folder):
    output = run("train", "digits", "--epochs", 3, "--out", "m.safetensors", "--json", "m.json")
    assert line_of(output, "device").split()[1] in ("cpu", "cuda:0")
    assert line_of(output, "data").endswith("digits: 1,797 rows, 64 columns, 10 classes")
    assert line_of(output, "split").endswith("1,438 rows to train, 359 held out, seed 0")
    assert line_of(output, "network").endswith("64-256-10, relu, dropout 0.5, 19,210 parameters, float32")
    assert re.search(r"loss 0\.\d+, accuracy 0\.9\d+$", line_of(output, "held out"))
    assert line_of(output, "saved").endswith("m.safetensors")
    assert line_of(run("evaluate", "m.safetensors", "digits"), "held out") == line_of(output, "held out")
    run("evaluate", "m.safetensors", "digits", "--json", "e.json")
    report, again = json.loads((folder / "m.json").read_text()), json.loads((folder / "e.json").read_text())
    assert report["held_out"] == {k: again[k] for k in ("loss", "accuracy")} and again["rows"] == 359
    assert len(report["history"]["loss"]) == report["epochs"] == 3 and report["parameters"] == 19_210
    everything = run("evaluate", "m.safetensors", "digits", "--all", "--json", "a.json")
    assert everything.startswith("all rows") and json.loads((folder / "a.json").read_text())["rows"] == 1797


def test_the_same_bits_on_a_second_run(folder):
    for name in ("a", "b"):
        run("train", "digits", "--epochs", 2, "--out", name, "--json", f"{name}.json", "--quiet")
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    a, b = (json.loads((folder / f"{name}.json").read_text()) for name in "ab")
    assert a["history"] == b["history"] and a["held_out"] == b["held_out"]


def test_other_seeds_hold_out_other_rows_and_are_kept(folder):
    output = run("train", "digits", "--epochs", 1, "--seed", 4, "--test", 0.5, "--out", "m")
    assert line_of(output, "split").endswith("seed 4")
    assert line_of(run("evaluate", "m", "digits"), "held out") == line_of(output, "held out")


def test_options_reach_the_run(folder):
    output = run("train", "digits", "--hidden", "32, 16", "--activation", "gelu", "--dropout", 0, "--epochs", 2,
                 "--batch-size", 50, "--lr", 0.05, "--optimizer", "sgd", "--dtype", "float64", "--device", "cpu",
                 "--scale", "--out", "m")  # fmt: skip
    assert line_of(output, "network").endswith("64-32-16-10, gelu, 2,778 parameters, float64")
    assert line_of(output, "training").endswith("2 epochs in batches of 50, sgd, learning rate 0.05")
    assert "Scaler" in repr(load_model("m")) and load_file("m")["1.weight"].dtype == np.float64
    assert "64-10, " in run("train", "digits", "--hidden", "", "--epochs", 1)
    assert "batches of 1438" in run("train", "digits", "--batch-size", 5000, "--epochs", 1)


def test_every_optimizer_learns_the_digits_by_its_default_rate():
    for name in runs.RATES:
        output = run("train", "digits", "--optimizer", name, "--epochs", 15)
        assert float(line_of(output, "held out").split()[-1]) > 0.95, name


@pytest.mark.parametrize("precision, weights", [("tf32", "float32"), ("float16", "float32"), ("bfloat16", "float32"),
                                                ("float64", "float64")])  # fmt: skip
def test_precision_and_clipping_reach_the_run(precision, weights, folder):
    output = run(
        "train", "digits", "--epochs", 5, "--precision", precision, "--clip-norm", 2, "--out", "m", "--json", "j"
    )
    computed = "" if precision == weights else f", computed in {precision}"
    assert line_of(output, "network").endswith(f"19,210 parameters, {weights}{computed}")
    assert line_of(output, "training").endswith("learning rate 0.003, clipped to norm 2")
    assert float(line_of(output, "held out").split()[-1]) > 0.9
    assert {a.dtype for a in load_file("m").values()} == {np.dtype(weights)}
    report = json.loads((folder / "j").read_text())
    assert (report["precision"], report["clip_norm"], report["cuda_graph"]) == (precision, 2, False)
    trainer = runs.Run("digits", runs.read("digits"), runs.Recipe(precision=precision, clip_norm=2)).trainer
    assert (trainer.precision.name, trainer.clip_norm) == (precision, 2)


def test_a_regression_in_half_precision(folder):
    write_line(folder / "line.csv")
    output = run("train", "line.csv", "--target", "worth", "--precision", "float16", "--out", "m")
    assert float(line_of(output, "held out").split()[-1]) > 0.98
    assert float(run("evaluate", "m", "line.csv").split()[-1]) > 0.98


def test_a_graph_that_cannot_be_is_warned_of_in_one_line():
    trainer = runs.Run("digits", runs.read("digits"), runs.Recipe(cuda_graph=True, epochs=1)).trainer
    assert trainer.cuda_graph
    done = launch(
        "train", "digits", "--epochs", 1, "--cuda-graph", "--device", "cpu", stdout=subprocess.DEVNULL, strict=()
    )
    assert done.returncode == 0
    [line] = done.stderr.splitlines()
    assert re.fullmatch("gpubackprop: warning: cuda_graph: the CPU has no CUDA graphs; .*", line)


def test_quiet_prints_nothing():
    assert run("train", "digits", "--epochs", 1, "--quiet") == ""


def test_a_bundled_regression():
    output = run("train", "regression7", "--epochs", 3, "--out", "m")
    assert line_of(output, "data").endswith("regression7: 7 rows, 1 column, 1 target")
    assert line_of(run("evaluate", "m", "regression7"), "held out") == line_of(output, "held out")


# ---- files ---------------------------------------------------------------------------------------------------------


def test_csv_with_text_target_end_to_end(folder):
    write_flowers(folder / "flowers.csv")
    output = run("train", "flowers.csv", "--target", "species", "--out", "m", "--epochs", 30)
    assert line_of(output, "data").endswith("flowers.csv: 120 rows, 2 columns, 3 classes in 'species'")
    assert float(line_of(output, "held out").split()[-1]) > 0.9
    extra = read_metadata("m")["extra"]
    assert (extra["classes"], extra["columns"]) == (["iris", "lily", "rose"], ["length", "price"])
    assert (extra["target"], extra["task"], extra["data"]) == ("species", "classification", "flowers.csv")
    assert run("evaluate", "m", "flowers.csv").startswith("all rows")
    text = "species,price,note,length\nrose,5810,x,0.001\niris,4990,y,0\n"
    (folder / "new.csv").write_text(text)  # other columns, another order, a class missing
    assert run("evaluate", "m", "new.csv").endswith("accuracy 1.0000\n")
    (folder / "plain.csv").write_text("length,price\n0.001,5810\n0,4990\n")
    for name in ("new", "plain"):
        assert run("predict", "m", f"{name}.csv", "--out", f"{name}.out.csv").endswith("2 predictions\n")
        rows = [line.split(",") for line in (folder / f"{name}.out.csv").read_text().splitlines()]
        assert rows[0] == ["prediction", "probability_iris", "probability_lily", "probability_rose"]
        assert [row[0] for row in rows[1:]] == ["rose", "iris"]
        assert all(abs(sum(map(float, row[1:])) - 1) < 1e-6 for row in rows[1:])


def test_the_scaler_is_fitted_on_the_training_rows_alone(folder):
    write_flowers(folder / "flowers.csv")
    run("train", "flowers.csv", "--target", "species", "--out", "m", "--epochs", 1, "--dtype", "float64")
    table = runs.read("flowers.csv", "species")
    x, _, _, _ = gb.split(table.x, table.y, test=0.2, seed=0)
    arrays = load_file("m")
    np.testing.assert_array_equal(arrays["0.mean"], x.mean(0))
    np.testing.assert_array_equal(arrays["0.scale"], x.std(0))
    run("train", "flowers.csv", "--target", "species", "--out", "m", "--epochs", 1, "--no-scale", "--force")
    assert "0.mean" not in load_file("m")


def test_two_classes_and_numbered_classes(folder):
    write_flowers(folder / "two.csv", species=("2", "10"))
    output = run("train", "two.csv", "--target", "species", "--out", "m", "--epochs", 30)
    assert "2 classes" in output and float(line_of(output, "held out").split()[-1]) > 0.9
    for kind in ("npz", "npy"):
        run("predict", "m", "two.csv", "--out", f"p.{kind}")
    with np.load("p.npz") as file:
        assert set(file) == {"prediction", "probability", "classes"} and file["classes"].tolist() == [2, 10]
        assert file["probability"].shape == (120, 2)
        np.testing.assert_array_equal(file["prediction"], np.load("p.npy"))
        np.testing.assert_array_equal(file["prediction"], file["classes"][file["probability"].argmax(1)])


@pytest.mark.parametrize("optimizer", runs.RATES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_regression_end_to_end(optimizer, dtype, folder):
    write_line(folder / "line.csv")
    output = run("train", "line.csv", "--target", "worth", "--out", "m", "--optimizer", optimizer, "--dtype", dtype)
    assert "1 target in 'worth'" in output and "dropout" not in output
    assert float(line_of(output, "held out").split()[-1]) > 0.98
    assert run("evaluate", "m", "line.csv", "--json", "e.json").startswith("all rows")
    assert json.loads((folder / "e.json").read_text())["r2"] > 0.98
    run("predict", "m", "line.csv", "--out", "p.csv")
    table = runs.read("line.csv", "worth")
    header, *values = (folder / "p.csv").read_text().split()
    assert header == "prediction"
    predicted, worth = np.array(values, float), table.y[:, 0]
    assert 1 - ((predicted - worth) ** 2).sum() / ((worth - worth.mean()) ** 2).sum() > 0.98
    np.testing.assert_array_equal(predicted.astype(dtype), load_model("m").predict(table.x)[:, 0])
    x, _, y, _ = gb.split(table.x, table.y, test=0.2, seed=0)
    np.testing.assert_allclose(load_file("m")["3.mean"], y.mean(0), rtol=1e-6)
    np.testing.assert_allclose(load_file("m")["0.scale"], x.std(0), rtol=1e-6)


def test_task_overrides_the_guess(folder):
    write_flowers(folder / "two.csv", species=("2", "10"))
    output = run("train", "two.csv", "--target", "species", "--task", "regression", "--epochs", 1)
    assert "1 target" in output and "r2" in line_of(output, "held out")


def test_npz_with_several_targets(folder, rng):
    x = rng.normal(size=(60, 3))
    np.savez("data.npz", x=x, y=x @ rng.normal(size=(3, 2)))
    assert "3 columns, 2 targets" in run("train", "data.npz", "--out", "m", "--epochs", 2)
    run("predict", "m", "data.npz", "--out", "p.csv")
    assert (folder / "p.csv").read_text().startswith("prediction_0,prediction_1\n")
    run("predict", "m", "data.npz", "--out", "p.npz")
    with np.load("p.npz") as file:
        assert list(file) == ["prediction"] and file["prediction"].shape == (60, 2)


def test_models_of_the_library_are_evaluated_and_predicted(folder, rng):
    x = rng.normal(size=(40, 3))
    y = (x[:, 0] > 0).astype(int)
    np.savez("data.npz", x=x, y=y)
    np.savez("ones.npz", x=x[y == 1], y=y[y == 1])  # of one class only: its number is still 1
    for name, outputs, loss, targets in (("s", 2, "cross_entropy", y), ("b", 1, "bce", y), ("r", 1, "mse", x[:, :1])):
        model = gb.mlp([3, 8, outputs])
        gb.Trainer(model, loss, gb.Adam(lr=0.05), seed=0).fit(x, targets, epochs=40)
        save_model(model, name)
    for name in "sb":
        assert float(run("evaluate", name, "data.npz").split()[-1]) > 0.9
        assert float(run("evaluate", name, "ones.npz").split()[-1]) > 0.9
        run("predict", name, "data.npz", "--out", f"{name}.npz")
        with np.load(f"{name}.npz") as file:
            assert file["probability"].shape == (40, 2) and (file["prediction"] == y).mean() > 0.9
    run("predict", "r", "data.npz", "--out", "r.npy")
    assert np.corrcoef(np.load("r.npy"), x[:, 0])[0, 1] > 0.9


def test_models_of_unknown_loss_predict_raw_numbers_or_probabilities(folder, rng):
    x = rng.normal(size=(5, 3)).astype("float32")
    np.savez("data.npz", x=x, y=np.arange(5) % 2)
    for outputs in (1, 2):
        model = gb.mlp([3, outputs]).initialize(0)
        model.output_kind = None  # as after training with a function as the loss
        save_model(model, f"m{outputs}")
        run("predict", f"m{outputs}", "data.npz", "--out", f"p{outputs}.npz")
        message = (
            "trained with a loss of its own or not at all, but to evaluate or explain it takes a named loss; train"
        )
        assert message in fails("evaluate", f"m{outputs}", "data.npz") and message in fails("explain", f"m{outputs}")
    with np.load("p1.npz") as one, np.load("p2.npz") as two:
        assert list(one) == ["prediction"]
        np.testing.assert_array_equal(one["prediction"], load_model("m1").predict(x).ravel())
        np.testing.assert_array_equal(two["probability"], load_model("m2").predict_proba(x))


def test_predict_ignores_the_target(folder):
    write_flowers(folder / "f.csv", n=30)
    run("train", "f.csv", "--target", "species", "--epochs", 1, "--out", "m", "--quiet")
    x = [[1e-3, 5000], [0, 5400]]
    (folder / "new.csv").write_text("length,price,species\n0.001,5000,\n0,5400,oak\n")
    np.savez("new.npz", x=x, y=np.array([None, "oak"], object))
    for name in ("new.csv", "new.npz"):
        assert run("predict", "m", name, "--out", "p.npy", "--force").endswith("2 predictions\n")
        assert np.load("p.npy").tolist() == [load_classes("m")[i] for i in load_model("m").predict_classes(x)]
    assert "is missing" in fails("evaluate", "m", "new.csv") and "new.npz" in fails("evaluate", "m", "new.npz")


def test_integers_in_many_classes_are_doubted_on_stderr(folder):
    (folder / "n.csv").write_text("a,price\n" + "".join(f"{i},{1000 + i // 3}\n" for i in range(90)))
    options = ["train", "n.csv", "--target", "price", "--epochs", 1]
    line = ("gpubackprop: warning: the target's integers are taken as 30 classes of 90 rows; if they are amounts, "
            "use --task regression\n")  # fmt: skip
    assert CliRunner().invoke(cli.main, list(map(str, options))).stderr == line
    for more in ("--quiet", "--task=regression", "--task=classification"):
        assert "warning" not in run(*options, more)
    np.savez("few.npz", x=np.ones((30, 1)), y=np.arange(30) % 15)
    assert "warning" not in run("train", "few.npz", "--epochs", 1)


# ---- what is printed, and what if it cannot be ---------------------------------------------------------------------


def test_json_on_stdout_has_the_lines_on_stderr(folder):
    result = CliRunner().invoke(cli.main, ["train", "digits", "--epochs", "1", "--out", "m", "--json", "-"])
    assert json.loads(result.stdout)["out"] == "m" and line_of(result.stderr, "saved") and result.exit_code == 0
    result = CliRunner().invoke(cli.main, ["evaluate", "m", "digits", "--json", "-"])
    assert json.loads(result.stdout)["rows"] == 359 and result.stderr.startswith("held out")
    assert json.loads(run("train", "digits", "--epochs", 1, "--quiet", "--json", "-"))["train_rows"] == 1438
    assert sorted(path.name for path in folder.iterdir()) == ["m"]


def test_json_has_null_for_what_is_no_number(folder, monkeypatch):
    monkeypatch.setattr(runs, "figures", lambda *_: {"loss": 0.5, "r2": float("nan")})
    assert line_of(run("train", "regression7", "--epochs", 1, "--json", "m.json"), "held out").endswith("r2 nan")
    text = (folder / "m.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["held_out"] == {"loss": 0.5, "r2": None}


def test_json_replaces_no_file_without_force(folder):
    run("train", "digits", "--epochs", 1, "--out", "m", "--quiet")
    (folder / "j").write_text("mine")
    for command in (["train", "digits", "--epochs", 1], ["evaluate", "m", "digits"]):
        assert fails(*command, "--json", "j") == "j: exists; use --force to replace it, or another name"
        assert (folder / "j").read_text() == "mine"
    for command in (["train", "digits", "--epochs", 1], ["evaluate", "m", "digits"]):
        run(*command, "--json", "j", "--force")
        assert json.loads((folder / "j").read_text())["data"] == "digits"


def launch(*arguments, strict=("-W", "error"), **options):
    """A finished process of the command, whose warnings are errors."""
    command = [sys.executable, *strict, "-m", "gpubackprop", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **{"env": environment()} | options)


def environment(**more):
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | more


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "so.txt"])
def test_the_file_that_stdout_goes_to_is_not_replaced(name, folder):
    if name.startswith("/") and not os.path.exists(name):
        pytest.skip(f"no {name} here")
    with open("so.txt", "w") as file:
        done = launch("train", "digits", "--epochs", 1, "--json", name, "--force", stdout=file)
    assert done.returncode == 2 and re.fullmatch(rf"gpubackprop: {name}: (stands|is) .*\n", done.stderr)
    assert (folder / "so.txt").read_text() == "" and len(list(folder.iterdir())) == 1


@pytest.fixture(params=["full", "broken"])
def deaf(request):
    """A stdout that takes nothing."""
    if request.param == "broken":
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as file:
            yield file
    elif not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    else:
        with open("/dev/full", "w") as file:
            yield file


def test_a_stdout_that_takes_nothing_costs_no_work(deaf, folder):
    error = "" if deaf.name != "/dev/full" else "gpubackprop: stdout: cannot be written (No space left on device)\n"
    done = launch("train", "digits", "--epochs", 2, "--out", "m", "--json", "j", stdout=deaf)
    assert (done.returncode, done.stderr) == (1, error)
    assert read_metadata("m")["extra"]["epochs"] == 2 and json.loads((folder / "j").read_text())["held_out"]
    for command in (["evaluate", "m", "digits", "--json", "e"], ["predict", "m", "digits", "--out", "p.csv"]):
        done = launch(*command, stdout=deaf)
        assert (done.returncode, done.stderr) == (1, error) and (folder / command[-1]).stat().st_size
    for command in ("explain", "kernels", "info", "--version", "--help"):
        done = launch(command, stdout=deaf)
        assert (done.returncode, done.stderr) == (1, error), command


def test_what_stdout_cannot_encode_is_replaced():
    options = {"stdout": subprocess.PIPE, "encoding": "cp1252"}
    done = launch("explain", env=environment(PYTHONIOENCODING="cp1252"), **options)
    assert (done.returncode, done.stderr) == (0, "") and "32×64" in done.stdout and "?" in done.stdout


def test_a_closed_stdout_is_no_error(folder):
    command = '"$0" -m gpubackprop train digits --epochs 1 --out m >&-'
    done = subprocess.run(["sh", "-c", command, sys.executable], env=environment(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and (folder / "m").exists()


# ---- explain, kernels, info ----------------------------------------------------------------------------------------


def test_explain_prints_the_plan_and_trains_nothing(folder):
    output = run("explain")
    assert "gemm" in output and "adam" in output and "32×64" in output and "total" in output
    assert "128×5" in run("explain", "--sizes", "7,5,3", "--batch-size", 128, "--activation", "gelu", "--dropout", 0)
    write_line(folder / "line.csv", n=20)
    run("train", "line.csv", "--target", "worth", "--epochs", 1, "--out", "m", "--quiet")
    before = (folder / "m").read_bytes()
    assert "mse" in run("explain", "m", "--optimizer", "sgd") and (folder / "m").read_bytes() == before
    assert fails("explain", "m", "--sizes", "2,2").startswith("explain: got a MODEL and --sizes")
    assert fails("explain", "--sizes", "2,x") == (
        "--sizes: got '2,x', expected positive integers between commas, such as 128,64")  # fmt: skip
    assert fails("explain", "--sizes", "2").startswith("mlp: ")


@without_gpu
def test_explain_plans_for_cuda_without_a_gpu():
    digits = run("explain", "--device", "cuda")
    title, *_, launches, elementwise, optimizer = digits.splitlines()
    assert title.startswith(
        f"planned without a GPU ({why_not_cuda()}): training step of 32 rows, 19,210 parameters on "
    )
    output = run("explain", "--device", "cuda", "--sizes", "784,512,512,10", "--dropout", 0, "--batch-size", 128)
    *_, launches, elementwise, optimizer = output.splitlines()
    assert launches == "launches eager: 17; with a CUDA graph: 1"
    assert 1 <= ratio(elementwise, "elementwise") <= 1.1 and 1 <= ratio(optimizer, "optimizer") <= 1.1
    clipped = run("explain", "--device", "cuda", "--sizes", "784,512,512,10", "--dropout", 0, "--clip-norm", 1)
    assert "launches eager: 18; with" in clipped and "gradient norm" in clipped
    for name in ("sgd", "adamw"):
        assert f" {name} " in run("explain", "--device", "cuda", "--optimizer", name)


def ratio(line, part):
    return float(re.fullmatch(rf"{part}: [\d,]+ bytes, ([\d.]+) of the least", line)[1])


def test_explain_refuses_weights_of_two_types():
    message = "precision: float16 keeps weights in float32, not in the dtype float64; leave one out"
    assert fails("explain", "--precision", "float16", "--dtype", "float64") == message


def test_explain_says_nothing_of_cuda_on_the_cpu():
    assert "CUDA graph" not in run("explain", "--device", "cpu")


def test_explain_draws_the_step(folder):
    output = run("explain", "--sizes", "7,5,3", "--out", "s.svg")
    picture = (folder / "s.svg").read_text()
    assert output == "saved       s.svg\n" + run("explain", "--sizes", "7,5,3")
    assert picture.startswith("<?xml") and picture.count("<path") > 50
    assert "s.svg: exists; use --force" in fails("explain", "--out", "s.svg")
    run("explain", "--gpu", "t4", "--out", "s.svg", "--force")
    assert (folder / "s.svg").read_text() != picture
    assert "choose from .svg, .png, .pdf" in run("explain", "--out", "s.gif", status=2)


@without_gpu
def test_explain_models_a_gpu(folder):
    output = run("explain", "--gpu", "h100", "--precision", "bfloat16")
    assert "planned without a GPU" in output and "launches eager" in output
    line = line_of(output, "roofline MODEL of one NVIDIA H100 SXM, not a measurement: ")
    assert "3,350 GB/s for what" in line and "989.4 TFLOP/s in bfloat16 products" in line
    run("train", "digits", "--epochs", 1, "--out", "m", "--quiet")
    assert "roofline MODEL of one NVIDIA T4, " in run("explain", "m", "--gpu", "t4")
    assert fails("explain", "--gpu", "h100", "--device", "cpu") == (
        "explain: --gpu models a step on CUDA, but --device is cpu; leave one out")  # fmt: skip
    assert "'gtx1080' is not one of" in run("explain", "--gpu", "gtx1080", status=2)


def test_kernels():
    homes = dict(line.split() for line in run("kernels").splitlines())
    assert homes["gelu_backward_bias"] == "gelu" and homes["top1"] == "softmax_cross_entropy.cu"
    assert run("kernels", "top1") == run("kernels", "softmax_cross_entropy.cu") != run("kernels", "gather")
    assert run("kernels", "adam_update", "--dtype", "float64") == run("kernels", "adam", "--dtype", "float64")
    assert "__global__" in run("kernels", "gelu") and "__half" in run("kernels", "gelu", "--dtype", "float16")
    assert "gelu" in fails("kernels", "glue")
    assert "float128" in fails("kernels", "gelu", "--dtype", "float128")


def test_info_and_version():
    output = run("info")
    for word in (gb.__version__, np.__version__, "BLAS", "Python", "click", "tqdm", "safetensors", "devices", "cpu"):
        assert word in output
    for label in ("driver", "CuPy", "bfloat16", "compiler"):
        assert line_of(output, label)
    assert why_not_cuda() is None or line_of(output, "not CUDA").endswith(why_not_cuda())
    assert run("--version") == f"gpubackprop {gb.__version__}\n"


@pytest.mark.parametrize("command", ["", "train", "evaluate", "predict", "explain", "kernels", "info", "doctor",
                                     "plot", "plot surface", "plot race", "plot curves", "plot gradients",
                                     "plot regions"])  # fmt: skip
def test_help_has_an_example(command):
    output = run(*command.split(), "--help")
    assert "  gpubackprop " in output
    assert run(*command.split(), "-h") == output


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_plot_surface_draws_the_line_and_its_descent(folder):
    output = run("plot", "surface", "--steps", 5000, "--out", "s.svg")
    m, b = np.polyfit(*(a.ravel() for a in gb.datasets.regression7()), 1)
    assert line_of(output, "end").endswith(f"m {m:.6g}, b {b:.6g}, loss 0.0180519 after 5000 steps")
    assert line_of(output, "saved").endswith("s.svg") and (folder / "s.svg").read_bytes().startswith(b"<?xml")
    run("plot", "surface", "--steps", 5000, "--out", "t.svg")
    assert (folder / "s.svg").read_bytes() == (folder / "t.svg").read_bytes()
    for name in OPTIMIZERS:
        assert "loss 0." in run("plot", "surface", "--optimizer", name, "--start", "0,0", "--out", "s.svg", "--force")
    run("plot", "surface", "--steps", 1, "--lr", 0.001, "--start=-1,2.5", "--out", "p.png")
    assert "after 1 steps" in run("plot", "surface", "--steps", 1, "--out", "p.pdf")


def test_plot_race_says_when_each_leaves_the_saddle(folder):
    output = run("plot", "race", "--out", "r.svg")
    for name, steps in {"SGD": 698, "momentum": 140, "RMSprop": 72, "Adam": 77}.items():
        assert line_of(output, f"{name} ").endswith(f"|y| > 1 after {steps} steps")
    assert "Adagrad" in output and "Adadelta" in output and "Nesterov" in output
    output = run("plot", "race", "--on", "valley", "--steps", 20, "--out", "v.png")
    assert output.count("after 20 steps") == 7 and "|y|" not in output
    done = launch("plot", "race", "--on", "valley", "--steps", 20, "--lr", 0.1, "--out", "w.png", strict=(),
                  stdout=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0 and len(lines := done.stderr.splitlines()) == 3
    assert all(re.match(r"gpubackprop: warning: descend: step \d+ of SGD\(lr=0.1, .*", line) for line in lines)


def test_plot_curves_trains_as_train_does(folder):
    write_flowers(folder / "f.csv")
    options = ["f.csv", "--target", "species", "--epochs", 4, "--hidden", 8]
    output = run("plot", "curves", *options, "--out", "c.svg")
    told = run("train", *options, "--json", "j")
    history = json.loads((folder / "j").read_text())["history"]
    assert line_of(output, "train ") == f"train       loss {history['loss'][-1]:.6g}"
    for label in ("device", "data", "split", "network", "training"):
        assert line_of(output, label) == line_of(told, label)
    assert re.search(r"loss [\d.]+$", line_of(output, "held out"))
    run("plot", "curves", *options, "--figure", "accuracy", "--out", "a.pdf")
    assert "--figure: got 'r2', expected one of loss, accuracy" in fails("plot", "curves", *options, "--figure", "r2",
                                                                         "--out", "b.pdf")  # fmt: skip
    write_line(folder / "line.csv")
    run("plot", "curves", "line.csv", "--target", "worth", "--epochs", 2, "--figure", "r2", "--out", "r.png")


def test_watching_the_rows_held_out_changes_no_weight():
    table, states = runs.read("regression7"), []
    for validate in (False, True):
        trained = runs.Run("regression7", table, runs.Recipe(epochs=3, dropout=0.1))
        trained.fit(False, validate=validate)
        states.append(trained.model.state_dict())
        assert ("val_loss" in trained.trainer.history) is validate
    assert all(np.array_equal(states[0][k], states[1][k]) for k in states[0])


def test_plot_gradients_and_regions_of_a_saved_model(folder):
    write_flowers(folder / "f.csv")
    run("train", "f.csv", "--target", "species", "--epochs", 5, "--out", "m", "--quiet")
    assert re.search("healthy|vanishing|exploding|dead", run("plot", "gradients", "m", "f.csv", "--out", "g.svg"))
    for chosen in ([], ["--columns", "price,length"], ["--columns", "1, 0"]):
        run("plot", "regions", "m", "f.csv", *chosen, "--out", "d.svg", "--force")
    for wrong in ("price", "price,price", "price,2", "a,b", "0,1,1"):
        message = f"--columns: got '{wrong}', expected two of length, price, between a comma"
        assert fails("plot", "regions", "m", "f.csv", "--columns", wrong, "--out", "e.svg") == message
    run("train", "digits", "--epochs", 1, "--out", "digits", "--quiet")
    message = "digits: has 64 columns, expected two to draw; choose them with --columns A,B"
    assert fails("plot", "regions", "digits", "digits", "--out", "e.svg") == message
    run("plot", "regions", "digits", "digits", "--columns", "20,43", "--out", "e.svg")
    write_line(folder / "line.csv")
    run("train", "line.csv", "--target", "worth", "--epochs", 1, "--out", "r", "--quiet")
    run("plot", "gradients", "r", "line.csv", "--out", "h.png")
    assert "was trained for regression" in fails("plot", "regions", "r", "line.csv", "--out", "f.svg")
    (folder / "plain.csv").write_text("length,price\n1,2\n")
    assert "plain.csv: has no target" in fails("plot", "gradients", "m", "plain.csv", "--out", "f.svg")


def test_pictures_are_whole_and_replace_nothing_without_force(folder, monkeypatch):
    (folder / "s.svg").write_text("mine")
    assert fails("plot", "surface", "--out", "s.svg") == "s.svg: exists; use --force to replace it, or another name"
    line = "gpubackprop: s.jpg: is of unknown kind '.jpg'; choose from .svg, .png, .pdf\n"
    assert run("plot", "race", "--out", "s.jpg", status=2) == line  # and no race before it
    write_flowers(folder / "f.csv")
    (folder / "f.csv").rename("f.svg")
    assert "is the input f.svg" in fails("plot", "curves", "f.svg", "--out", "f.svg", "--force")
    for start in ("1", "a,b", "9,0", "0,nan"):
        assert f"--start: got '{start}', expected two numbers" in fails("plot", "surface", "--start", start,
                                                                        "--out", "n.svg")  # fmt: skip
    assert "--out" in run("plot", "surface", status=2)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in fails("plot", "surface", "--out", "s.svg", "--force", status=1)
    assert (folder / "s.svg").read_text() == "mine" and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("command", [["surface"], ["race"], ["curves", "digits"], ["gradients", "m", "digits"]])
def test_pictures_without_matplotlib_end_before_any_work(command, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = 'plot: matplotlib is not installed; pip install "gpubackprop[plot]"'
    assert fails("plot", *command, "--out", "s.svg", status=1) == message


# ---- errors --------------------------------------------------------------------------------------------------------


def test_bad_data_is_one_line(folder):
    write_flowers(folder / "f.csv")
    assert "no such file; give a .csv or .npz file or a bundled set (digits, regression7)" in fails("train", "digit")
    assert "has no column 'specie' for the target" in fails("train", "f.csv", "--target", "specie")
    assert "use --target species" in fails("train", "f.csv")
    (folder / "n.csv").write_text("a,b\n1,2\n2,3\n")
    assert fails("train", "n.csv") == "n.csv: has no target to learn; name its column with --target, one of a, b"
    np.savez("x.npz", x=np.ones((3, 2)))
    assert fails("train", "x.npz") == "x.npz: has no target to learn; add an array y"
    (folder / "gap.csv").write_text("a,b\n1,2\n,3\n")
    assert "line 3, column 'a' is missing" in fails("train", "gap.csv", "--target", "b")
    assert "is a bundled set" in fails("train", "digits", "--target", "y")
    assert "leave out --task" in fails("train", "digits", "--task", "regression")


@pytest.mark.parametrize("options, message", [
    (["--epochs", 0], "epochs must be at least 1"),
    (["--batch-size", 0], "batch_size must be at least 1"),
    (["--lr", 0], "lr must be > 0"),
    (["--lr", "nan"], "lr must be > 0"),
    (["--dropout", 1], "1.0 is not in [0, 1)"),
    (["--test", 0], "test is 0.0, expected a fraction between 0 and 1"),
    (["--test", 1.5], "test is 1.5"),
    (["--hidden", "0"], "--hidden: got '0', expected positive integers between commas"),
    (["--hidden", "8,,8"], "--hidden: got '8,,8'"),
    (["--device", "gpu"], "unknown device 'gpu'; choose from auto, cpu, cuda, cuda:N"),
    (["--out", "none/m"], "none/m: there is no folder"),
    (["--out", "."], "is a folder"),
    (["--json", "none/m"], "none/m: there is no folder"),
    (["--clip-norm", 0], "clip_norm must be positive and finite, got 0.0"),
    (["--dtype", "float64", "--precision", "float16"], "precision: float16 keeps weights in float32, not in the dtype"),
    (["--clip-norm", 1e-300], "clip_norm must be positive and finite, got 1e-300, which is 0 in float32"),
    (["--out", "m", "--json", "./m"], "is the file of --out, which would be lost"),
])  # fmt: skip
def test_bad_settings_end_before_training(options, message, folder):
    assert message in fails("train", "digits", *options)
    assert run("train", "digits", *options, status=2).count("\n") == 1  # nothing else is printed
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("options", [["--seed", -1], ["--activation", "rleu"], ["--optimizer", "adm"],
                                     ["--epochs", "x"], ["--nope"]])  # fmt: skip
def test_options_that_click_refuses(options):
    assert re.search("Invalid value|No such option|not one of", run("train", "digits", *options, status=2))


def test_no_file_is_replaced_without_force(folder, monkeypatch):
    run("train", "digits", "--epochs", 1, "--out", "m", "--quiet")
    before = (folder / "m").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "fit", None)
        assert fails("train", "digits", "--out", "m") == "m: exists; use --force to replace it, or another name"
    assert (folder / "m").read_bytes() == before
    run("train", "digits", "--epochs", 2, "--out", "m", "--quiet", "--force")
    assert (folder / "m").read_bytes() != before
    run("predict", "m", "digits", "--out", "p.csv")
    assert "p.csv: exists" in fails("predict", "m", "digits", "--out", "p.csv")
    run("predict", "m", "digits", "--out", "p.csv", "--force")


def test_input_files_are_never_replaced(folder):
    write_flowers(folder / "f.csv")
    before = (folder / "f.csv").read_bytes()
    options = ["--target", "species", "--epochs", 1, "--force"]
    message = "is the input f.csv, which would be lost; give another name"
    assert message in fails("train", "f.csv", *options, "--out", "./f.csv")
    assert message in fails("train", "f.csv", *options, "--json", folder / "f.csv")
    run("train", "f.csv", *options, "--out", "m")
    assert message in fails("predict", "m", "f.csv", "--out", "f.csv", "--force")
    assert "is the input m" in fails("evaluate", "m", "f.csv", "--json", "m")
    assert (folder / "f.csv").read_bytes() == before


def test_bad_models_are_one_line(folder):
    run("train", "digits", "--epochs", 1, "--out", "m", "--quiet")
    (folder / "short").write_bytes((folder / "m").read_bytes()[:-9])
    for command in (["evaluate"], ["predict", "--out", "p.csv"]):
        assert fails(*command, "none", "digits") == "load_model: none: no such file"
        assert "short: is cut short" in fails(*command, "short", "digits")
    assert "unknown kind '.txt'; choose from .csv, .npz, .npy" in fails("predict", "m", "digits", "--out", "p.txt")
    assert "has 1 columns but the model expects 64" in fails("evaluate", "m", "regression7", "--all")
    (folder / "n.csv").write_text("a,b\n1,2\n")
    assert "has no target to compare with" in fails("evaluate", "m", "n.csv")
    save_model(gb.mlp([64, 10]), "raw")
    assert "the model was trained with a loss of its own or not at all" in fails("evaluate", "raw", "digits")
    assert not (folder / "p.csv").exists()


def test_a_table_that_does_not_fit_the_model(folder):
    write_flowers(folder / "f.csv")
    run("train", "f.csv", "--target", "species", "--epochs", 1, "--out", "m")
    (folder / "less.csv").write_text("length,species\n1,iris\n")
    assert "lacks the model's columns price; it has length, species" in fails("evaluate", "m", "less.csv")
    (folder / "more.csv").write_text("length,price,species\n1,2,iris\n1,2,oak\n")
    message = "line 3, column 'species' has the unknown class 'oak'; the model knows iris, lily, rose"
    assert message in fails("evaluate", "m", "more.csv")


def test_a_device_that_does_not_work_is_status_1():
    if gb.get_backend("auto").device == "cpu":
        assert "cuda" in fails("train", "digits", "--device", "cuda", status=1)


def test_divergence_is_status_1_and_saves_nothing(folder, monkeypatch):
    def diverge(*_, **__):
        raise gb.TrainingDiverged(3, 7)

    monkeypatch.setattr(gb.Trainer, "fit", diverge)
    message = fails("train", "digits", "--out", "m", status=1)
    assert message.startswith("fit: the loss is NaN or infinite in epoch 3, step 7; ")
    assert message.endswith("; nothing was saved") and not (folder / "m").exists()


def test_a_full_disk_is_status_1_and_keeps_the_old_file(folder, monkeypatch):
    run("train", "digits", "--epochs", 1, "--out", "m", "--quiet")
    before = (folder / "m").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in fails("train", "digits", "--epochs", 1, "--out", "m", "--force", status=1)
    assert (folder / "m").read_bytes() == before and [p.name for p in folder.iterdir()] == ["m"]


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch):
    """Training is interrupted as that many epochs are done."""

    def after(epochs):
        fit = gb.Trainer.fit

        def stop(trainer):
            if trainer.epoch == epochs:
                raise KeyboardInterrupt

        def patched(self, *arguments, **keywords):
            if epochs == 0:
                raise KeyboardInterrupt
            return fit(self, *arguments, **keywords, callbacks=[stop])

        monkeypatch.setattr(gb.Trainer, "fit", patched)

    return after


def test_an_interrupted_run_keeps_what_it_learnt(interrupted, folder):
    interrupted(3)
    message = fails("train", "digits", "--out", "m", status=130)
    assert message == "interrupted after 3 of 40 epochs; the model as it stands was saved to m"
    assert read_metadata("m")["extra"]["epochs"] == 3
    assert float(run("evaluate", "m", "digits").split()[-1]) > 0.9
    assert fails("train", "digits", status=130).endswith("3 of 40 epochs; nothing was saved (there is no --out)")


def test_an_interrupted_regression_predicts_in_its_own_units(interrupted, folder):
    write_line(folder / "line.csv")
    interrupted(30)
    fails("train", "line.csv", "--target", "worth", "--out", "m", status=130)
    assert float(run("evaluate", "m", "line.csv").split()[-1]) > 0.9


def test_interrupted_before_anything_was_learnt(interrupted, folder):
    interrupted(0)
    message = fails("train", "digits", "--out", "m", status=130)
    assert message == "interrupted in the first epoch; nothing was saved" and not (folder / "m").exists()


def test_interrupted_elsewhere(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "read", interrupt)
    assert fails("train", "digits", status=130) == "interrupted; no file is left half written"


def start(*arguments):
    command = [sys.executable, "-W", "error", "-m", "gpubackprop", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def test_sigint_ends_a_process_with_130(folder):
    process = start("train", "regression7", "--epochs", 10**7, "--out", "m")
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("training") for line in lines)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.fullmatch(r"gpubackprop: interrupted after \d+ of 10000000 epochs; the model .* saved to m\n", errors)
    assert run("evaluate", "m", "regression7").startswith("held out")


def test_the_module_is_the_command():
    process = start("train", "nowhere.csv")
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("gpubackprop: nowhere.csv: no such file") and errors.count("\n") == 1
    process = start("--help")
    assert process.communicate(timeout=30)[0].startswith("Usage: gpubackprop ") and process.returncode == 0


def test_the_entry_point_is_a_click_group():
    assert isinstance(cli.main, click.Group)
    assert set(cli.main.commands) == {"train", "evaluate", "predict", "explain", "kernels", "info", "doctor", "plot"}
    assert set(cli.main.commands["plot"].commands) == {"surface", "race", "curves", "gradients", "regions"}
