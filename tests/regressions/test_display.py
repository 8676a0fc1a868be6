"""Results show themselves: at the prompt as by print, in a notebook as tables, a plan within the terminal's width."""

import copy
import io
import pickle
import re
import sys
import time
import types

import numpy as np
import pytest
from click.testing import CliRunner

import gpubackprop as gb
from gpubackprop import lab, landscape
from gpubackprop.cli import main
from gpubackprop.columns import Columns, Grid, Shown
from gpubackprop.roofline import traffic


@pytest.fixture(scope="module")
def trainer():
    x, y = gb.datasets.digits()
    trainer = gb.Trainer(gb.mlp([64, 32, 10]), seed=0, device="cpu")
    trainer.fit(x[:200], y[:200], epochs=12, batch_size=50, progress=False)
    return trainer


def graph():
    graph = lab.Graph("w")
    graph.node("y", lambda w: w**2, "w")
    graph.node("o", gb.cos, "y")
    return graph


def diverging():
    trainer = gb.Trainer(gb.mlp([64, 16, 10]), optimizer=gb.SGD(1e30), seed=0)
    return gb.find_nan(trainer, *(a[:50] for a in gb.datasets.digits()), epochs=3)


RESULTS = {
    "plan": lambda t, x, y: t.plan(16),
    "history": lambda t, x, y: t.history,
    "gradient_report": lambda t, x, y: gb.gradient_report(t, x, y),
    "layer report": lambda t, x, y: gb.gradient_report(t, x, y)["0"],
    "explain_weight": lambda t, x, y: gb.explain_weight(t, x, y, "0", 20, 3),
    "lr_range_test": lambda t, x, y: gb.lr_range_test(t, x, y, updates=5),
    "learning_curve": lambda t, x, y: gb.learning_curve(lambda: gb.Trainer(gb.mlp([64, 10]), seed=0), x, y, epochs=1),
    "layer_stats": lambda t, x, y: gb.layer_stats(t.model, x),
    "random_search": lambda t, x, y: gb.random_search(copy.deepcopy(t), x, y, 2),
    "find_nan": lambda t, x, y: diverging(),
    "traffic": lambda t, x, y: traffic(t.plan(16))["optimizer"],
    "surface": lambda t, x, y: gb.surface(landscape.saddle, (-1, 1), (-1, 1), points=3),
    "graph": lambda t, x, y: graph(),
    "gradients": lambda t, x, y: lab.gradients(graph(), 0.7),
    "compare": lambda t, x, y: lab.compare(graph(), 0.7),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_shows_at_the_prompt_what_print_shows_and_html_in_a_notebook(name, trainer, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    x, y = gb.datasets.digits()
    result = RESULTS[name](trainer, x[:100], y[:100])
    assert isinstance(result, Shown) and repr(result) == str(result)
    assert " object at 0x" not in repr(result) and "array(" not in repr(result)
    html, tables = result._repr_html_(), [part for part in result.parts() if isinstance(part, Grid)]
    assert html.count("<table>") == len(tables) == html.count("</table>")
    assert [len(row) for table in tables for row in table.rows] == [
        line.count("</td>") + line.count("</th>") for line in html.splitlines() if line.startswith("<tr>")
    ]
    assert not re.search(r"<(?!/?(table|tr|th|td|div)\b)", html)


def test_launches_backends_and_states_say_what_they_are_without_their_buffers(trainer):
    launch = trainer.plan(16).launches[1]
    assert repr(launch) == ("Launch(gemm of layer '0': 'a = x @ w', 16×64 64×32 → 16×32, 65,536 flops, 14,336 bytes)")
    assert repr(gb.get_backend("cpu:reference")) == "NumpyBackend(device='cpu:reference')"
    assert "'cuda:plan'" in repr(gb.get_backend("cuda:plan"))
    assert re.fullmatch(r"Moments\(Adam\(.*\) keeps m, v for Arena\(0\.weight \(64, 32\), .*; float32 on cpu\)\)",
                        repr(trainer.state))  # fmt: skip
    assert "Curvature" in repr(gb.Trainer(gb.mlp([2, 1]), "mse", "lbfgs", seed=0).state)


# ---- the history ---------------------------------------------------------------------------------------------------


def test_the_history_is_a_dict_that_shows_its_last_epochs(trainer):
    history = trainer.history
    assert history == dict(history) and list(history) == ["loss", "accuracy"] and len(history["loss"]) == 12
    head, *rows = repr(history).splitlines()
    assert head.split() == ["epoch", "loss", "accuracy"] and [row.split()[0] for row in rows] == [
        *map(str, range(3, 13))
    ]
    assert rows[-1].split()[1] == f"{history['loss'][-1]:.4g}"
    for twin in (pickle.loads(pickle.dumps(history)), copy.deepcopy(history)):
        assert type(twin) is type(history) and twin == history
    assert repr(gb.Trainer(gb.mlp([2, 2])).history) == "no epochs" and repr(Columns()) == "no rows"


def test_fit_returns_the_history_that_the_trainer_keeps():
    trainer = gb.Trainer(gb.mlp([2, 2]), seed=0)
    history = trainer.history
    assert trainer.fit(np.eye(2), [0, 1], epochs=1, progress=False) is trainer.history is history


# ---- the plan's width ----------------------------------------------------------------------------------------------


class Deep(gb.Layer):
    def __init__(self):
        self.encoder_with_a_long_name = [[gb.Residual(gb.Dense(784, 784, activation="gelu"), gb.LayerNorm(784))]]
        self.head = gb.Dense(784, 10)
        self.inputs = 784

    def forward(self, x):
        return self.head(self.encoder_with_a_long_name[0][0](x))


PLANS = {
    "small": lambda: gb.Trainer(gb.mlp([64, 32, 10]), device="cpu", seed=0).plan(16),
    "momentum": lambda: gb.Trainer(gb.mlp([3, 2]), "mse", gb.SGD(0.1, 0.9, "lookahead"), device="cpu", seed=0).plan(2),
    "deep": lambda: gb.Trainer(Deep(), clip_norm=1, device="cuda:plan", seed=0).plan(4096),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("columns", [40, 80, 100, 133, 400])
def test_a_printed_plan_fits_the_terminal_and_loses_nothing(name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    plan = PLANS[name]()
    text = str(plan)
    assert max(map(len, text.splitlines())) <= max(columns, 80)
    dense = re.sub(r"\s", "", text)
    for launch in plan.launches:
        assert launch.name in text
    if name == "small":  # where no cell of a column beside it comes between
        assert all(f"{launch.flops:,}" in text and f"{launch.bytes:,}" in text for launch in plan.launches)
        assert "y=relu(a+b)" in dense and ("16×6416×32→64×32" in dense or columns == 400)


@pytest.mark.parametrize("name", PLANS)
def test_wide_or_where_there_is_no_terminal_a_launch_has_one_line(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    plan = PLANS[name]()
    wide = plan.table(wide=True)
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a file or a pipe
    assert str(plan) == wide
    for launch in plan.launches:
        said = (launch.name, launch.what.splitlines()[0], f"{launch.flops:,}", f"{launch.bytes:,}")
        assert any(all(word in line for word in said) for line in wide.splitlines())


def test_explain_fits_the_terminal_and_shows_all_with_wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    fitted, wide = (CliRunner().invoke(main, ["explain", "--device", "cpu", *more]).output for more in ([], ["--wide"]))
    assert max(map(len, fitted.splitlines())) <= 100 < max(map(len, wide.splitlines()))


# ---- progress ------------------------------------------------------------------------------------------------------


def fitted(**how):
    x, y = np.eye(4), np.arange(4)
    gb.Trainer(gb.mlp([4, 4]), seed=0, device="cpu").fit(x, y, epochs=3, validation_data=(x, y), **how)


def test_the_bar_leaves_a_line_with_every_figure_of_the_last_epoch(capsys):
    fitted(progress=True)
    last = re.split(r"[\r\n]", capsys.readouterr().err.rstrip("\n"))[-1]
    assert re.fullmatch(r"epoch 3: loss [\d.]+, accuracy [\d.]+, val_loss [\d.]+, val_accuracy [\d.]+, gap -?[\d.e-]+ "
                        r"\(00:\d\d\)", last), last  # fmt: skip


def notebook(monkeypatch):
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    for name in ("tqdm.auto", "tqdm.autonotebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_notebook_shows_progress_though_its_stderr_is_no_terminal(monkeypatch, capsys):
    notebook(monkeypatch)
    fitted()
    assert "val_loss" in capsys.readouterr().err
    fitted(progress=False)
    assert capsys.readouterr().err == ""


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch, capsys):
    monkeypatch.setitem(
        sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(config={}))
    )
    fitted()
    assert capsys.readouterr().err == ""


# ---- the laboratory's times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["paths", "dynamic_programming"])
def test_the_time_of_a_recursion_is_not_that_of_its_local_derivatives(engine):
    slow = lab.Graph("w")
    slow.node("y", lambda w: (time.sleep(0.02), w**2)[1], "w")
    assert lab.gradients(slow, 0.7, engine=engine).seconds < 0.02
