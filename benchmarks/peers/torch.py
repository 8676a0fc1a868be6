"""PyTorch on the CPU: eager with its fused optimizers, or through torch.compile."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..cases import Import, Kernel, Network, Predict, Shell, Train, Update
from . import Prepared, ends, epochs, flat, repeated, updates
from .processes import DIGITS, script

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def _model(case: Network, activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (w, b) in enumerate(case.weights()):
        layer = nn.Linear(*w.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(w.T))
            layer.bias.copy_(torch.from_numpy(b))
        layers += [layer] if i == len(case.sizes) - 2 else [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


def _epoch(case: Train, variant: str) -> Callable[[Any, Any, bool], float]:
    """The mean loss over an epoch of steps on new weights."""
    model, loss = _model(case, case.activation), nn.CrossEntropyLoss() if case.classifies else nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    forward = torch.compile(lambda x, y: loss(model(x), y)) if variant == "compile" else lambda x, y: loss(model(x), y)

    def epoch(x: Any, y: Any, shuffle: bool) -> float:
        order = torch.randperm(len(x)) if shuffle else torch.arange(len(x))
        total = torch.zeros(())
        for rows in order.split(case.batch):
            optimizer.zero_grad()
            value = forward(x[rows], y[rows])
            value.backward()
            optimizer.step()
            total += value.detach()
        return float(total) / (len(x) // case.batch)

    return epoch


def train(case: Train, variant: str) -> Prepared:
    return epochs(case, lambda: _epoch(case, variant), torch.from_numpy)


def predict(case: Predict, variant: str) -> Prepared:
    model, x = _model(case, "relu").eval(), torch.from_numpy(case.x())
    forward = torch.compile(model) if variant == "compile" else model

    def run() -> Any:
        with torch.inference_mode():
            return forward(x).numpy()

    return repeated(run, case.calls, lambda: ends(run()))


def update(case: Update, variant: str) -> Prepared:
    def new() -> tuple[Callable[[], object], Callable[[], Any]]:
        p, g = map(torch.from_numpy, case.arrays())
        p.grad = g
        if case.rule == "adam":
            return torch.optim.Adam([p], fused=True).step, p.numpy
        return torch.optim.SGD([p], lr=1e-2, momentum=0.9 if case.rule == "momentum" else 0, fused=True).step, p.numpy

    return updates(case, new)


def _cross_entropy(a: dict[str, Any]) -> tuple[Any, Any]:
    x = a["x"].requires_grad_()
    total = F.cross_entropy(x, a["labels"], reduction="sum")
    return total.detach(), torch.autograd.grad(total, x)[0]


def _relu_backward(a: dict[str, Any]) -> tuple[Any, Any]:
    da = torch.where(a["x"] > 0, a["dy"], 0)
    return da, da.sum(0)


KERNELS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "relu": lambda a: [F.relu(a["x"] + a["bias"])],
    "gelu": lambda a: [F.gelu(a["x"] + a["bias"])],
    "tanh": lambda a: [torch.tanh(a["x"] + a["bias"])],
    "relu_backward": _relu_backward,
    "layer_norm": lambda a: [F.layer_norm(a["x"], a["gain"].shape, a["gain"], a["bias"])],
    "cross_entropy": _cross_entropy,
}


def kernel(case: Kernel, variant: str) -> Prepared:
    a, call = {k: torch.from_numpy(v) for k, v in case.arrays().items()}, KERNELS[case.kernel]
    call = torch.compile(call) if variant == "compile" else call
    return repeated(lambda: call(a), case.calls, lambda: flat(t.numpy() for t in call(a)))


def start(case: Import, variant: str) -> Prepared:
    return script("import torch")


def shell(case: Shell, variant: str) -> Prepared:
    layers = ", nn.ReLU(), ".join(f"nn.Linear({a}, {b})" for a, b in pairwise(case.sizes))
    return script(f"""
{DIGITS}
import torch
from torch import nn
x, y = torch.from_numpy(x), torch.from_numpy(y)
torch.manual_seed(0)
model = nn.Sequential({layers})
optimizer, loss = torch.optim.Adam(model.parameters(), fused=True), nn.CrossEntropyLoss()
for _ in range({case.epochs}):
    for rows in torch.randperm(len(x)).split({case.batch}):
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
assert (model(x).argmax(1) == y).float().mean() > 0.98
""")
