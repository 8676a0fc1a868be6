"""Precision: what a training step stores and multiplies in, by name."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubackprop.names import unknown

__all__ = ["PRECISIONS", "Precision", "precision"]


@dataclass(frozen=True)
class Precision:
    """Weights, gradients and moments are of the `master` type; activations and their gradients of the `compute` type.

    With `tf32` products may round their float32 operands to 10 bits of mantissa. A `dynamic` scale of the loss keeps
    small gradients out of float16's underflow: a gradient that is not finite skips its step and halves the scale, which
    doubles after 2,000 good steps (Micikevicius et al., "Mixed Precision Training").
    """

    name: str
    master: str
    compute: str
    tf32: bool = False
    dynamic: bool = False
    scale: float = 1.0  # at first

    @property
    def dtype(self) -> np.dtype[Any]:
        """The compute type."""
        if self.compute != "bfloat16":
            return np.dtype(self.compute)
        try:
            import ml_dtypes
        except ImportError:
            raise RuntimeError("precision 'bfloat16' needs the package ml_dtypes; pip install ml_dtypes") from None
        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype

    @property
    def mixed(self) -> bool:
        """Whether the step computes with a copy of the weights in another type."""
        return self.compute != self.master


PRECISIONS = {
    p.name: p
    for p in (
        Precision("float32", "float32", "float32"),
        Precision("float64", "float64", "float64"),
        Precision("tf32", "float32", "float32", tf32=True),
        Precision("float16", "float32", "float16", dynamic=True, scale=2.0**16),
        Precision("bfloat16", "float32", "bfloat16"),
    )
}


def precision(name: str) -> Precision:
    """The precision of that name."""
    if not isinstance(name, str) or name not in PRECISIONS:
        raise ValueError(unknown("precision", name, PRECISIONS))
    return PRECISIONS[name]
