"""This library, on the device that the variant names."""

from collections.abc import Callable
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop.arena import Arena, Parameter
from gpubackprop.backends import get_backend
from gpubackprop.formulas import ACTIVATIONS
from gpubackprop.fused import dense_graph
from gpubackprop.moments import Moments
from gpubackprop.optimizers import SGD, Adam, Optimizer
from gpubackprop.plan import Plan

from ..cases import Import, Kernel, Network, Predict, Shell, Train, Update
from . import Prepared, ends, flat, repeated, updates
from .processes import script

RULES: dict[str, Optimizer] = {"sgd": SGD(), "momentum": SGD(momentum=0.9), "adam": Adam()}


def _model(case: Network, activation: str) -> gb.Sequential:
    model = gb.mlp(list(case.sizes), activation)
    layers = enumerate(case.weights())
    model.load_state_dict({f"{i}.{k}": a for i, pair in layers for k, a in zip(("weight", "bias"), pair, strict=True)})
    return model


def _trainer(case: Train, device: str) -> gb.Trainer:
    return gb.Trainer(_model(case, case.activation), case.loss, gb.Adam(), metrics=[], device=device, seed=0)


def train(case: Train, device: str) -> Prepared:
    trainer, (x, y) = _trainer(case, device), case.data()

    def check() -> list[float]:
        few = _trainer(case, device).fit(*case.data(4), 2, case.batch, shuffle=False, progress=False)
        return few["loss"]

    def run() -> None:
        trainer.fit(x, y, epochs=case.epochs, batch_size=case.batch, progress=False)

    return Prepared(run, check, case.steps * case.epochs)


def resident(case: Train, device: str) -> int:
    """Bytes that the recorded step holds."""
    return _trainer(case, device).plan(case.batch).bytes_resident


def predict(case: Predict, device: str) -> Prepared:
    model, x = _model(case, "relu").to(device), case.x()
    return repeated(lambda: model.predict(x), case.calls, lambda: ends(model.predict(x)))


def update(case: Update, device: str) -> Prepared:
    back = get_backend(device)

    def new() -> tuple[Callable[[], object], Callable[[], Any]]:
        p, g = case.arrays()
        arena = Arena({"p": Parameter(p.shape)}, back, "float32")
        for buffer, value in ((arena.weights, p), (arena.gradients, g)):
            back.write(arena.slice(buffer, "p"), value)
        state, plan = Moments(RULES[case.rule], arena), Plan(back, dry=True)
        table = back.step_table(list(state.scalars), "float32", 1024)
        table.load(np.stack(list(state.table_rows(0, 1024).values()), axis=1), np.zeros(1024, np.int64), 1)
        with plan.record("update"):
            state.record(table)
        return plan.sequence(), lambda: back.to_numpy(arena.slice(arena.weights, "p"))

    return updates(case, new, back.synchronize)


def kernel(case: Kernel, device: str) -> Prepared:
    back = get_backend(device)
    a = {k: back.asarray(v) for k, v in case.arrays().items()}
    x, dy, bias, labels = (a[k] for k in ("x", "dy", "bias", "labels"))
    y, pre, row, total = (back.empty(shape, x.dtype) for shape in (x.shape, x.shape, bias.shape, ()))
    outputs: list[Any] = [y]
    if case.kernel == "relu_backward":
        outputs = [y, row]
        da = {"da": ACTIVATIONS["relu"].backward_graph()}
        launch = back.elementwise_columns("relu backward", da, {"dy": dy, "y": x}, y, row)
    elif case.kernel == "layer_norm":
        statistics = (back.empty(labels.shape, x.dtype) for _ in range(3))
        launch = back.normalize(x, a["gain"], bias, 1, 1e-5, y, *statistics)
    elif case.kernel == "cross_entropy":
        outputs = [total, y]
        launch = back.softmax_cross_entropy(x, labels, y, total)
    else:  # as in a layer, which keeps the pre-activation where the derivative needs it
        graph = dense_graph(ACTIVATIONS[case.kernel], True)
        writes = {k: v for k, v in {"y": y, "x": pre}.items() if k in graph}
        launch = back.elementwise(case.kernel, graph, {"x": x, "b": bias}, writes)

    def check() -> list[float]:
        launch.run()
        return flat(map(back.to_numpy, outputs))

    return repeated(back.sequence([launch]), case.calls, check, back.synchronize)


def start(case: Import, device: str) -> Prepared:
    return script("import gpubackprop")


def shell(case: Shell, device: str) -> Prepared:
    return script(f"""
import gpubackprop as gb
x, y = gb.datasets.digits()
trainer = gb.Trainer(gb.mlp({list(case.sizes)}), device={device!r}, seed=0)
trainer.fit(x, y, epochs={case.epochs}, batch_size={case.batch}, progress=False)
assert trainer.evaluate(x, y)["accuracy"] > 0.98
""")
