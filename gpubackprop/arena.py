"""The arena: every parameter of a model in one buffer, each slice on a boundary of 64 elements, padding always zero."""

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Backend, Buffer
from gpubackprop.initializers import resolve
from gpubackprop.plan import run
from gpubackprop.tensor import Tensor

__all__ = ["ALIGNMENT", "Arena", "Parameter"]

ALIGNMENT = 64  # elements: whole cache lines, and whole vectors of every kernel


class Parameter(Tensor):
    """A tensor that a layer declares: its shape and how it is drawn; the model's arena gives it its data.

    `init` is an initializer's name, a number, an array or a callable (shape, generator) -> array. Without one a matrix
    (two dimensions or more) is drawn by glorot_uniform, since units that all start at 0 never learn, and a vector is 0.
    With trainable=False it is state that training does not step (running statistics, a scaler): 0 without an `init`.
    """

    __slots__ = ("_home", "_shape", "init", "master", "settled", "trainable", "value")

    def __init__(self, shape: tuple[int, ...], init: Any = None, *, trainable: bool = True) -> None:
        if any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1 for n in shape):
            raise ValueError(f"parameter: shape {shape} is not one of positive integers")
        if init is None:
            init = "glorot_uniform" if trainable and len(shape) >= 2 else "zeros"
        resolve(init)
        super().__init__(None, None, requires_grad=trainable)  # type: ignore[arg-type]
        self._shape = tuple(int(n) for n in shape)
        self.init = init
        self.master: Buffer = None  # the arena's slice; `data` is that, or while a step is lowered its copy's
        self.trainable = trainable
        self.value: npt.NDArray[Any] | None = None  # kept here while there is no arena
        self._home: weakref.ref[Arena] | None = None
        self.settled = False  # whether its value was asked for, by a seed, a state or training

    @property
    def shape(self) -> tuple[int, ...]:
        """The declared shape."""
        return self._shape

    @property
    def stepped(self) -> bool:
        """Whether training steps it: trainable, and not frozen by requires_grad=False."""
        return self.trainable and self.requires_grad

    @property
    def home(self) -> "Arena | None":
        """The arena that holds the data, while a model keeps it: a weak reference, so that no cycle holds memory."""
        return None if self._home is None else self._home()

    def _missing(self) -> RuntimeError:
        return RuntimeError(f"parameter of shape {self._shape}: it has no value yet; call the model's initialize(seed)")

    def numpy(self) -> npt.NDArray[Any]:
        """A copy as a NumPy array."""
        if self.buffer is None:
            raise self._missing()
        return super().numpy()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        if self.buffer is None:
            raise self._missing()
        return super().dtype

    def __repr__(self) -> str:
        return f"Parameter(shape={self._shape}, no value yet)" if self.buffer is None else super().__repr__()

    def host_value(self) -> npt.NDArray[Any] | None:
        """A copy of the value on the host, if there is one yet."""
        return self.value if self.buffer is None else self.backend.to_numpy(self.buffer)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "shape": self._shape, "init": self.init, "trainable": self.trainable, "requires_grad": self.requires_grad,
            "settled": self.settled, "value": self.host_value(),
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        Parameter.__init__(self, tuple(state["shape"]), state["init"], trainable=state["trainable"])
        self.requires_grad, self.settled, self.value = (state[k] for k in ("requires_grad", "settled", "value"))


def _restored(shape: tuple[int, ...], init: Any, trainable: bool, state: dict[str, Any]) -> Parameter:
    """Read pickles of before Parameter had `__getstate__`, which name this function."""
    parameter = Parameter(shape, init, trainable=trainable)
    for key, value in state.items():
        setattr(parameter, key, value)
    return parameter


class Arena:
    """Slices of one (members, P) buffer, bound to the parameters as their data.

    Matrices come first, then the vectors, so that what is said of weights only (decay) is said of one range. The
    gradients are a second buffer with the same offsets, made when first asked for.
    """

    def __init__(self, parameters: Mapping[str, Parameter], backend: Backend, dtype: npt.DTypeLike) -> None:
        self.backend = backend
        self.dtype = np.dtype(dtype)
        self.parameters = dict(sorted(parameters.items(), key=lambda item: len(item[1].shape) < 2))
        self.offsets: dict[str, int] = {}
        self.matrices = end = 0  # the end of the matrices' range
        for key, p in self.parameters.items():
            self.offsets[key] = end
            end += -(-math.prod(p.shape) // ALIGNMENT) * ALIGNMENT
            if len(p.shape) >= 2:
                self.matrices = end
        self.size = end
        self.pinned = False  # by a fit, whose steps are recorded with the parameters where they are
        self.weights = self.zeros()
        self._gradients: Buffer | None = None
        self._copies: dict[np.dtype[Any], Buffer] = {}  # of the weights, which the updates write too
        for key, p in self.parameters.items():
            value = p.host_value()
            p.buffer = p.master = self.slice(self.weights, key)
            p.backend, p._home = backend, weakref.ref(self)
            if value is not None:
                backend.write(p.buffer, value)
            p.value = p.grad_buffer = None

    def __repr__(self) -> str:
        named = ", ".join(f"{key} {p.shape}" for key, p in self.parameters.items())
        return f"Arena({named or 'no parameters'}; {self.dtype} on {self.backend.device})"

    def zeros(self) -> Buffer:
        """A zeroed buffer with the arena's layout."""
        buffer = self.backend.empty((1, self.size), self.dtype)
        self.backend.write(buffer, 0)
        return buffer

    def slice(self, buffer: Buffer, key: str) -> Buffer:
        """The parameter's place in a buffer with the arena's layout."""
        shape, start = self.parameters[key].shape, self.offsets[key]
        return buffer[0, start : start + math.prod(shape)].reshape(shape)

    @property
    def gradients(self) -> Buffer:
        """∂L/∂weights, at the same offsets."""
        if self._gradients is None:
            self._gradients = self.zeros()
            for key, p in self.parameters.items():
                p.grad_buffer = self.slice(self._gradients, key)
        return self._gradients

    def nbytes(self, dtype: npt.DTypeLike) -> int:
        """Bytes of weights, gradients and the copy in this type, as far as they are made."""
        buffers = (self.weights, self._gradients, self._copies.get(np.dtype(dtype)))
        return sum(int(b.nbytes) for b in buffers if b is not None)

    def copy_in(self, dtype: npt.DTypeLike) -> Buffer:
        """The copy of the weights in this type, for a step that computes in it; made when first asked for."""
        if np.dtype(dtype) not in self._copies:
            self._copies[np.dtype(dtype)] = self.backend.empty(self.weights.shape, dtype)
        return self._copies[np.dtype(dtype)]

    def refresh(self, dtype: npt.DTypeLike) -> None:
        """Bring the copy in this type up to date."""
        copy = self.copy_in(dtype)
        run(copy, lambda: self.backend.copy(self.weights, copy))

    @contextmanager
    def lowered(self, dtype: npt.DTypeLike) -> Iterator[None]:
        """Inside, operations read the parameters from the copy in this type; gradients stay where they are."""
        copy = self.weights if self.dtype == dtype else self.copy_in(dtype)
        for key, p in self.parameters.items():
            p.buffer = self.slice(copy, key)
        try:
            yield
        finally:
            for p in self.parameters.values():
                p.buffer = p.master
