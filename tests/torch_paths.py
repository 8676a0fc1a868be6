"""PyTorch's optimizers on a small network: the paths of weights that ours are compared with.

`python tests/torch_paths.py` writes data/torch_paths.json anew, with torch's version.
"""

import json
from pathlib import Path

import numpy as np

import gpubackprop as gb

STEPS = (1, 10, 100)


def counterpart(optimizer, matrices, vectors):
    """Torch's optimizer of the same settings; weight decay on the matrices alone, as ours."""
    from torch import optim

    o = optimizer
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    common = {"lr": o.lr, "weight_decay": o.weight_decay}
    if isinstance(o, gb.SGD):
        return optim.SGD(groups, momentum=o.momentum, nesterov=o.nesterov == "torch", **common)
    if isinstance(o, gb.Adagrad):
        return optim.Adagrad(groups, eps=o.eps, **common)
    if isinstance(o, gb.Adadelta):
        return optim.Adadelta(groups, rho=o.rho, eps=o.eps, **common)
    if isinstance(o, gb.RMSprop):
        return optim.RMSprop(groups, alpha=o.rho, eps=o.eps, momentum=o.momentum, centered=o.centered, **common)
    kinds = {gb.Adam: optim.Adam, gb.AdamW: optim.AdamW, gb.Nadam: optim.NAdam, gb.Adamax: optim.Adamax,
             gb.RAdam: optim.RAdam}  # fmt: skip
    return kinds[type(o)](groups, betas=(o.beta1, o.beta2), eps=o.eps, **common)


def path_of(optimizer, x, t):
    """{steps: {name: weights}} of x → tanh → linear under the mean squared error, in float64."""
    import torch

    torch.set_default_dtype(torch.float64)  # NAdam keeps its product of momentums in it
    try:
        return _path(torch, optimizer, x, t)
    finally:
        torch.set_default_dtype(torch.float32)


def _path(torch, optimizer, x, t):
    start = gb.mlp([3, 5, 2], "tanh", dtype="float64").initialize(2).state_dict()
    w = {k: torch.tensor(a, requires_grad=True) for k, a in start.items()}
    theirs = counterpart(optimizer, *([p for p in w.values() if (p.ndim < 2) is v] for v in (False, True)))
    x, t, path = torch.tensor(x), torch.tensor(t), {}
    for step in range(1, max(STEPS) + 1):
        theirs.zero_grad()
        h = torch.tanh(x @ w["0.weight"] + w["0.bias"])
        ((h @ w["1.weight"] + w["1.bias"] - t) ** 2).mean().backward()
        theirs.step()
        if step in STEPS:
            path[str(step)] = {k: p.detach().numpy().tolist() for k, p in w.items()}
    return path


def main():
    import torch
    from test_optimizers import RULES, net_case

    ours = ("lookahead", "seed", "inside", "hat", "lion")  # what torch does not have
    names = [name for name in RULES if not any(word in name for word in ours)]
    _, x, t, _ = net_case(np.random.default_rng(0))
    paths = {name: path_of(RULES[name][0], x, t) for name in names}
    text = json.dumps({"torch": torch.__version__, "paths": paths})
    (Path(__file__).parent / "data" / "torch_paths.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
