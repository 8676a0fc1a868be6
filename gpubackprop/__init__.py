"""Backprop for NumPy and CuPy arrays: fused kernels, recorded training steps, every gradient checkable.

>>> import gpubackprop as gb
>>> x, y = gb.datasets.digits()
>>> trainer = gb.Trainer(gb.mlp([64, 128, 10]), seed=0)
>>> history = trainer.fit(x, y, epochs=20, batch_size=64)
"""

from gpubackprop import datasets, schedules
from gpubackprop.arena import Parameter
from gpubackprop.backends import get_backend
from gpubackprop.callbacks import EarlyStopping
from gpubackprop.checkpoint import load_model, save_model
from gpubackprop.data import split
from gpubackprop.formulas import register_activation
from gpubackprop.fused import (
    batch_norm,
    bce_with_logits,
    dense,
    dropout,
    half_mse,
    layer_norm,
    mse,
    noise,
    softmax_cross_entropy,
    sse,
)
from gpubackprop.gradients import gradcheck, value_and_grad
from gpubackprop.layers import (
    Activation,
    BatchNorm,
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
from gpubackprop.range_test import lr_range_test
from gpubackprop.shapes import broadcast_to, concatenate, gather, reshape, stack, transpose
from gpubackprop.tensor import Tensor, tensor
from gpubackprop.trainer import Trainer, TrainingDiverged

__version__ = "0.1.0"

__all__ = [
    "LBFGS", "SGD", "Activation", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "BatchNorm", "Dense", "Dropout",
    "EarlyStopping", "InputNoise", "Layer", "LayerNorm", "Lion", "Nadam", "Optimizer", "Parameter", "Plan", "RAdam",
    "RMSprop", "Residual", "Scaler", "Sequential", "Tensor", "Trainer", "TrainingDiverged", "abs", "add", "batch_norm",
    "bce_with_logits", "broadcast_to", "clip", "concatenate", "cos", "datasets", "dense", "divide", "dropout", "exp",
    "expm1", "gather", "get_backend", "gradcheck", "half_mse", "layer_norm", "load_model", "log", "log1p",
    "log_softmax", "logsumexp", "lr_range_test", "matmul", "max", "maximum", "mean", "min", "minimum", "mlp", "mse",
    "multiply", "neg", "noise", "power", "register_activation", "relu", "reshape", "save_model", "schedules", "sigmoid",
    "sin", "softmax", "softmax_cross_entropy", "split", "sqrt", "sse", "stack", "subtract", "sum", "tanh", "tensor",
    "training", "transpose", "value_and_grad", "where",
]  # fmt: skip
