"""gpubackprop."""

__version__ = "0.1.0"

from gpubackprop import datasets
from gpubackprop.arena import Parameter
from gpubackprop.backends import get_backend
from gpubackprop.data import split
from gpubackprop.formulas import register_activation
from gpubackprop.fused import *
from gpubackprop.gradients import gradcheck, value_and_grad
from gpubackprop.layers import *
from gpubackprop.ops import *
from gpubackprop.optimizers import *
from gpubackprop.plan import Plan
from gpubackprop.tensor import Tensor, tensor
from gpubackprop.trainer import *
