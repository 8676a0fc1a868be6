"""How parameters are drawn: in float64 on the host, keyed by the seed and the parameter's name."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.threads import one_blas_thread
from gpubackprop.names import unknown

__all__ = ["INITIALIZERS", "Constant", "Orthogonal", "draw", "resolve"]

Shape = tuple[int, ...]
Initializer = Callable[[Shape, "np.random.Generator"], Any]  # a string: numpy.random takes 10 ms to import


def draw(
    init: str | float | npt.ArrayLike | Initializer, shape: Shape, seed: int, name: str
) -> npt.NDArray[np.float64]:
    """The initial value of the parameter of that name: the same for a seed, whatever other parameters there are.

    `init` is a name of INITIALIZERS, a number, an array, or a callable (shape, generator) -> array.
    """
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    value = np.asarray(init if isinstance(init, np.ndarray) else resolve(init)(shape, generator), np.float64)
    if value.shape != shape:
        raise ValueError(f"initializer of {name}: returned shape {value.shape}, expected {shape}")
    return value


def resolve(init: str | float | npt.ArrayLike | Initializer) -> Initializer:
    """The initializer meant; an unknown name is an error that lists the names."""
    if isinstance(init, str):
        if init not in INITIALIZERS:
            raise ValueError(unknown("initializer", init, sorted(INITIALIZERS)))
        return INITIALIZERS[init]
    return init if callable(init) else Constant(init)


@dataclass(frozen=True, eq=False)  # arrays have no one equality
class Constant:
    """Every element = value, a number or an array of the parameter's shape."""

    value: npt.ArrayLike

    def __call__(self, shape: Shape, generator: "np.random.Generator") -> Any:
        return np.full(shape, self.value)


@dataclass(frozen=True)
class Orthogonal:
    """w wᵀ = gain² I, or wᵀ w where there are more rows than columns, uniformly distributed among such matrices.

    Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks". It is the Q of
    a QR decomposition by LAPACK, on which its last bits depend.
    """

    gain: float = 1.0

    def __call__(self, shape: Shape, generator: "np.random.Generator") -> Any:
        if len(shape) < 2:
            raise ValueError(f"orthogonal: shape {shape} is not a matrix's; draw a vector from another initializer")
        *members, rows, columns = shape
        tall = generator.standard_normal((*members, max(rows, columns), min(rows, columns)))
        with one_blas_thread():
            q, r = np.linalg.qr(tall)
        # The signs that R's diagonal has are LAPACK's habit; with those of a Gaussian's no direction is preferred
        # (Mezzadri, "How to generate random matrices from the classical compact groups").
        q *= self.gain * np.copysign(1, np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
        return q if rows >= columns else q.swapaxes(-2, -1)


def _scaled(gain: float, fans: Callable[[int, int], float], uniform: bool) -> Initializer:
    """Mean 0, variance gain / fans(fan_in, fan_out); a weight is (in, out)."""

    def initialize(shape: Shape, generator: "np.random.Generator") -> Any:
        fan_in, fan_out = (shape[-2], shape[-1]) if len(shape) > 1 else (shape[0], shape[0])
        deviation = math.sqrt(gain / fans(fan_in, fan_out))
        if uniform:
            limit = math.sqrt(3) * deviation
            return generator.uniform(-limit, limit, shape)
        return deviation * generator.standard_normal(shape)

    return initialize


def _fan_in(fan_in: int, fan_out: int) -> float:
    return fan_in


def _average(fan_in: int, fan_out: int) -> float:
    return (fan_in + fan_out) / 2


# Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks"; He et al., "Delving Deep
# into Rectifiers"; LeCun et al., "Efficient BackProp".
INITIALIZERS: dict[str, Initializer] = {
    "zeros": Constant(0.0),
    "ones": Constant(1.0),
    "glorot_uniform": _scaled(1.0, _average, uniform=True),
    "glorot_normal": _scaled(1.0, _average, uniform=False),
    "he_uniform": _scaled(2.0, _fan_in, uniform=True),
    "he_normal": _scaled(2.0, _fan_in, uniform=False),
    "lecun_uniform": _scaled(1.0, _fan_in, uniform=True),
    "lecun_normal": _scaled(1.0, _fan_in, uniform=False),
    "orthogonal": Orthogonal(),
}
