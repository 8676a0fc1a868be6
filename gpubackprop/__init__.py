"""Backprop for NumPy and CuPy arrays: fused kernels, recorded training steps, every gradient checkable.

>>> import gpubackprop as gb
>>> x, y = gb.datasets.digits()
>>> trainer = gb.Trainer(gb.mlp([64, 128, 10]), seed=0)
>>> history = trainer.fit(x, y, epochs=20, batch_size=64)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpubackprop import datasets, initializers
from gpubackprop.arena import Parameter
from gpubackprop.backends import get_backend
from gpubackprop.backends.threads import get_threads, set_threads, threads
from gpubackprop.callbacks import EarlyStopping
from gpubackprop.checkpoint import load_model, save_model
from gpubackprop.formulas import register_activation
from gpubackprop.fused import (
    batch_norm,
    bce_with_logits,
    bce_with_logits_sum,
    dense,
    dropout,
    half_mse,
    half_sse,
    layer_norm,
    mse,
    noise,
    poisson,
    poisson_sum,
    softmax_cross_entropy,
    sse,
)
from gpubackprop.gradients import gradcheck, hessian_vector_product, value_and_grad
from gpubackprop.holdout import KFold, learning_curve, split
from gpubackprop.layers import (
    Activation,
    BatchNorm,
    Concatenate,
    Dense,
    Dropout,
    InputNoise,
    LayerNorm,
    Residual,
    Scaler,
    Sequential,
    mlp,
)
from gpubackprop.model import Layer, training
from gpubackprop.names import hint as _hint
from gpubackprop.ops import (
    abs,
    add,
    clip,
    cos,
    divide,
    exp,
    expm1,
    log,
    log1p,
    log_softmax,
    logsumexp,
    matmul,
    max,
    maximum,
    mean,
    min,
    minimum,
    multiply,
    neg,
    power,
    relu,
    sigmoid,
    sin,
    softmax,
    sqrt,
    subtract,
    sum,
    tanh,
    where,
)
from gpubackprop.optimizers import (
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    Nadam,
    Optimizer,
    RAdam,
    RMSprop,
)
from gpubackprop.plan import Plan
from gpubackprop.shapes import broadcast_to, concatenate, gather, reshape, stack, transpose
from gpubackprop.tensor import Tensor, tensor
from gpubackprop.trainer import Trainer, TrainingDiverged

if TYPE_CHECKING:
    from gpubackprop import lab, landscape, plot, schedules
    from gpubackprop.diagnostics import explain_weight, loss_of_weights, sensitivity
    from gpubackprop.guessing import grid_points, grid_search, random_search
    from gpubackprop.landscape import descend, race, surface
    from gpubackprop.nan_search import find_nan
    from gpubackprop.pruning import prune, rewind, shrink
    from gpubackprop.range_test import lr_range_test
    from gpubackprop.report import gradient_report
    from gpubackprop.scaling import layer_stats, lsuv

__version__ = "0.1.0"

__all__ = [
    "LBFGS", "SGD", "Activation", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "BatchNorm", "Concatenate", "Dense",
    "Dropout", "EarlyStopping", "InputNoise", "KFold", "Layer", "LayerNorm", "Lion", "Nadam", "Optimizer", "Parameter",
    "Plan", "RAdam", "RMSprop", "Residual", "Scaler", "Sequential", "Tensor", "Trainer", "TrainingDiverged", "abs",
    "add", "batch_norm", "bce_with_logits", "bce_with_logits_sum", "broadcast_to", "clip", "concatenate", "cos",
    "datasets", "dense", "descend", "divide", "dropout", "exp", "explain_weight", "expm1", "find_nan", "gather",
    "get_backend", "get_threads", "gradcheck", "gradient_report", "grid_points", "grid_search", "half_mse", "half_sse",
    "hessian_vector_product", "initializers", "lab", "landscape", "layer_norm", "layer_stats", "learning_curve",
    "load_model", "log", "log1p", "log_softmax", "logsumexp", "loss_of_weights", "lr_range_test", "lsuv", "matmul",
    "max", "maximum", "mean", "min", "minimum", "mlp", "mse", "multiply", "neg", "noise", "plot", "poisson",
    "poisson_sum", "power", "prune", "race", "random_search", "register_activation", "relu", "reshape", "rewind",
    "save_model", "schedules", "sensitivity", "set_threads", "shrink", "sigmoid", "sin", "softmax",
    "softmax_cross_entropy", "split", "sqrt", "sse", "stack", "subtract", "sum", "surface", "tanh", "tensor", "threads",
    "training", "transpose", "value_and_grad", "where",
]  # fmt: skip


# What is not needed to train is loaded when it is first asked for: names and their modules.
_LATER = {
    "descend": "landscape",
    "explain_weight": "diagnostics",
    "find_nan": "nan_search",
    "gradient_report": "report",
    "grid_points": "guessing",
    "grid_search": "guessing",
    "layer_stats": "scaling",
    "loss_of_weights": "diagnostics",
    "lr_range_test": "range_test",
    "lsuv": "scaling",
    "prune": "pruning",
    "race": "landscape",
    "random_search": "guessing",
    "rewind": "pruning",
    "sensitivity": "diagnostics",
    "shrink": "pruning",
    "surface": "landscape",
}


_MODULES_LATER = {"lab", "landscape", "plot", "schedules"}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES_LATER:
        return import_module(f"gpubackprop.{name}")
    if name in _LATER:
        return getattr(import_module(f"gpubackprop.{_LATER[name]}"), name)
    meant = "" if name.startswith("_") else _hint("gb", name, __all__)
    raise AttributeError(f"module 'gpubackprop' has no attribute {name!r}{meant}")
