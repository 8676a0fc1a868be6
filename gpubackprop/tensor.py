"""Tensors: arrays on a device that remember how they were computed, with operators and methods."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Backend, Buffer, is_on_device
from gpubackprop.backprop import Backprop, backward
from gpubackprop.checks import refuse_masked
from gpubackprop.names import hint
from gpubackprop.plan import current_layer, recording

__all__ = ["Axis", "Tensor", "tensor"]

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

Axis = int | Sequence[int] | None

_serial = itertools.count()


class _Override:
    """`__array_ufunc__`: NumPy finds it on the class, and calls it. CuPy asks the tensor, and where it finds None, an
    array's operators give way to the tensor's."""

    def __get__(self, tensor: "Tensor | None", kind: type) -> Any:
        return _numpy_ufunc if tensor is None else None


class Tensor:
    """An array on a device that knows how it was computed.

    `buffer` is the backend's own array, C-contiguous; `data` is that for users. Results of operations keep their inputs
    and a closure that propagates a gradient back to them, where any input requires one. `boolean` marks the 0 and 1 of
    a comparison: a mask as a key, and beside floats of any type.
    """

    __array_ufunc__ = _Override()
    __slots__ = ("__weakref__", "backend", "backprop", "boolean", "buffer", "grad_buffer", "grad_data", "inputs",
                 "layer", "requires_grad", "retains_grad", "serial")  # fmt: skip

    def __init__(
        self, buffer: Buffer, backend: Backend, *, requires_grad: bool = False, inputs: tuple["Tensor", ...] = (),
        backprop: Backprop | None = None,
    ) -> None:  # fmt: skip
        self.buffer = buffer
        self.backend = backend
        self.requires_grad = requires_grad
        self.inputs = inputs
        self.backprop = backprop
        self.serial = next(_serial)
        self.layer = current_layer()
        self.retains_grad = False
        self.boolean = False
        self.grad_buffer: Buffer | None = None  # where a parameter's gradient has its fixed place
        self.grad_data: Buffer | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"a tensor has no attribute {name!r}{hint('tensor', name)}", name=name, obj=self)

    # ---- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return tuple(self.buffer.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        dtype: np.dtype[Any] = self.buffer.dtype
        return dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def device(self) -> str:
        """Where the data lives."""
        return self.backend.device

    @property
    def data(self) -> Buffer:
        """The backend's own array, C-contiguous and not copied; a RuntimeError while a plan records."""
        _refuse_values()
        return self.buffer

    @property
    def grad(self) -> "Tensor | None":
        """The gradient the last backward() left here: of leaves that require one, and after retain_grad()."""
        return None if self.grad_data is None else Tensor(self.grad_data, self.backend)

    def retain_grad(self) -> "Tensor":
        """Keep this result's gradient at the next backward()."""
        self.retains_grad = True
        return self

    def detach(self) -> "Tensor":
        """The same data, as a constant."""
        return Tensor(self.buffer, self.backend)

    def numpy(self) -> npt.NDArray[Any]:
        """A copy as a NumPy array."""
        _refuse_values()
        return self.backend.to_numpy(self.buffer)

    def item(self) -> float:
        """The value of a tensor of one element."""
        if self.size != 1:
            raise ValueError(f"item: one element expected, got shape {self.shape}; use .numpy()")
        return float(self.numpy().reshape(-1)[0])

    def __getstate__(self) -> dict[str, Any]:
        """Its value, on the host: what copies and pickles hold. A result with a graph beneath it has none."""
        if self.backprop is not None:
            raise TypeError("pickle: the tensor is a result that requires a gradient; use .detach() to copy its value")
        kept = {key: getattr(self, key) for key in ("requires_grad", "boolean", "device")}
        return kept | {"value": self.backend.to_numpy(self.buffer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = get_backend(state["device"])
        buffer = backend.empty(state["value"].shape, state["value"].dtype)
        backend.write(buffer, state["value"])
        Tensor.__init__(self, buffer, backend, requires_grad=state["requires_grad"])
        self.boolean = state["boolean"]

    def __float__(self) -> float:
        return self.item()

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(
                f"bool: the truth of a tensor of shape {self.shape} is ambiguous; reduce it to one element, choose "
                "elements with gb.where, or compare tensors with `is`"
            )
        return bool(self.item())

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        if self.size != 1:
            raise TypeError(f"format {spec!r}: one element expected, got shape {self.shape}; format those of .numpy()")
        return format(self.item(), spec)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len: a tensor of shape () has no length")
        return self.shape[0]

    def __iter__(self) -> "Iterator[Tensor]":
        if not self.shape:
            raise TypeError("iter: a tensor of shape () has no rows")
        return (self[i] for i in range(len(self)))

    def __contains__(self, value: Any) -> bool:
        return isinstance(same := self == value, Tensor) and bool(np.any(same.numpy()))

    def __repr__(self) -> str:
        about = f", requires_grad={self.requires_grad}" if self.requires_grad else ""
        if recording() is not None:
            return f"tensor(shape={self.shape}, dtype={self.dtype}{about})"
        body = np.array2string(self.numpy(), prefix="tensor(", separator=", ")
        return f"tensor({body}, dtype={self.dtype}{about})"

    # ---- other libraries

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        _refuse_values()
        if self.requires_grad:
            raise RuntimeError(
                "array: a tensor that requires a gradient would lose it in a NumPy array; use an operation of gb "
                "(gb.stack for tensors in a list), or take the values with .detach() or .numpy()"
            )
        return self.numpy().astype(dtype or self.dtype, copy=False)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        from gpubackprop.numpy_functions import call

        return call(function, arguments, options)

    def __dlpack__(self, **options: Any) -> Any:
        """The data for another library, without a copy; a BufferError if the tensor requires a gradient."""
        if self.requires_grad:
            raise BufferError("dlpack: a tensor that requires a gradient would lose it; pass its .detach()")
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.buffer.__dlpack_device__()
        return device

    # ---- gradients

    def backward(self, gradient: Any = None) -> None:
        """∂self/∂leaf into `.grad` of every leaf below that requires one, overwriting it.

        `gradient` is the cotangent ∂L/∂self, of self's shape; for a tensor of one element it defaults to 1.
        """
        if not self.requires_grad:
            raise RuntimeError(
                "backward: nothing below this tensor requires a gradient; make a leaf with requires_grad=True "
                "(a gradient is a constant: there are no second derivatives here; use gb.hessian_vector_product)"
            )
        if gradient is None and self.size != 1:
            raise ValueError(
                f"backward: shape {self.shape} is not a scalar; reduce it, or give the cotangent as gradient="
            )
        dy = constant(1.0 if gradient is None else gradient, self)
        if dy.shape != self.shape:
            if dy.size != 1 or self.size != 1:
                raise ValueError(f"backward: gradient has shape {dy.shape} but the tensor has shape {self.shape}")
            dy = Tensor(dy.buffer.reshape(self.shape), self.backend)
        if dy.dtype != self.dtype:
            raise TypeError(
                f"backward: gradient is {dy.dtype} but the tensor {self.dtype}; use .astype({self.dtype.name!r})"
            )
        backward(self, dy.buffer)

    # ---- operators

    def __add__(self, other: Any) -> "Tensor":
        return ops.add(self, other)

    def __sub__(self, other: Any) -> "Tensor":
        return ops.subtract(self, other)

    def __mul__(self, other: Any) -> "Tensor":
        return ops.multiply(self, other)

    def __truediv__(self, other: Any) -> "Tensor":
        return ops.divide(self, other)

    def __pow__(self, other: Any) -> "Tensor":
        return ops.power(self, other)

    def __matmul__(self, other: Any) -> "Tensor":
        return ops.matmul(self, other)

    def __radd__(self, other: Any) -> "Tensor":
        return ops.add(other, self)

    def __rsub__(self, other: Any) -> "Tensor":
        return ops.subtract(other, self)

    def __rmul__(self, other: Any) -> "Tensor":
        return ops.multiply(other, self)

    def __rtruediv__(self, other: Any) -> "Tensor":
        return ops.divide(other, self)

    def __rpow__(self, other: Any) -> "Tensor":
        return ops.power(other, self)

    def __rmatmul__(self, other: Any) -> "Tensor":
        return ops.matmul(other, self)

    def __neg__(self) -> "Tensor":
        return ops.neg(self)

    def __eq__(self, other: Any) -> "Tensor":  # type: ignore[override]
        return NotImplemented if _never_equal(other) else ops.compare("==", self, other)

    def __ne__(self, other: Any) -> "Tensor":  # type: ignore[override]
        return NotImplemented if _never_equal(other) else ops.compare("!=", self, other)

    __hash__ = object.__hash__  # by identity: tensors are keys

    def __gt__(self, other: Any) -> "Tensor":
        return ops.compare(">", self, other)

    def __ge__(self, other: Any) -> "Tensor":
        return ops.compare(">=", self, other)

    def __lt__(self, other: Any) -> "Tensor":
        return ops.compare("<", self, other)

    def __le__(self, other: Any) -> "Tensor":
        return ops.compare("<=", self, other)

    def __and__(self, other: Any) -> "Tensor":
        return np.logical_and(self, other) if self.boolean else NotImplemented

    def __or__(self, other: Any) -> "Tensor":
        return np.logical_or(self, other) if self.boolean else NotImplemented

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> "Tensor":
        if not self.boolean:
            raise TypeError("~: a mask such as x > 0 expected; use 1 - x, or -x")
        return np.logical_not(self)  # type: ignore[return-value]

    def __getitem__(self, key: Any) -> "Tensor":
        return shapes.index(self, key)

    # ---- operations as methods

    @property
    def T(self) -> "Tensor":
        """The axes in reverse order."""
        return shapes.transpose(self)

    def astype(self, dtype: npt.DTypeLike) -> "Tensor":
        """The same values in another type, differentiable between floats; integers serve as indices, bools as masks."""
        return self != 0 if np.dtype(dtype).kind == "b" else shapes.cast(self, dtype)

    def reshape(self, *shape: Any) -> "Tensor":
        """The same elements in another shape; one length may be -1."""
        return shapes.reshape(self, shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    def transpose(self, *axes: Any) -> "Tensor":
        """The axes in the given order, or reversed."""
        return shapes.transpose(self, *axes)

    def sum(self, axis: Axis = None, keepdims: bool = False) -> "Tensor":
        """Σ over the axes (all by default)."""
        return ops.sum(self, axis, keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> "Tensor":
        """Mean over the axes (all by default)."""
        return ops.mean(self, axis, keepdims)

    def max(self, axis: Axis = None, keepdims: bool = False) -> "Tensor":
        """Maximum over the axes (all by default)."""
        return ops.max(self, axis, keepdims)

    def min(self, axis: Axis = None, keepdims: bool = False) -> "Tensor":
        """Minimum over the axes (all by default)."""
        return ops.min(self, axis, keepdims)

    def logsumexp(self, axis: int = -1, keepdims: bool = False) -> "Tensor":
        """log Σ exp along the axis."""
        return ops.logsumexp(self, axis, keepdims)

    def softmax(self, axis: int = -1) -> "Tensor":
        """exp / Σ exp along the axis."""
        return ops.softmax(self, axis)

    def log_softmax(self, axis: int = -1) -> "Tensor":
        """log of softmax along the axis."""
        return ops.log_softmax(self, axis)

    def clip(self, low: float, high: float) -> "Tensor":
        """Limited to [low, high]."""
        return ops.clip(self, low, high)

    def exp(self) -> "Tensor":
        """exp(x), elementwise."""
        return ops.exp(self)

    def log(self) -> "Tensor":
        """log(x), elementwise."""
        return ops.log(self)

    def log1p(self) -> "Tensor":
        """log(1 + x), elementwise."""
        return ops.log1p(self)

    def expm1(self) -> "Tensor":
        """exp(x) - 1, elementwise."""
        return ops.expm1(self)

    def sqrt(self) -> "Tensor":
        """√x, elementwise."""
        return ops.sqrt(self)

    def sin(self) -> "Tensor":
        """sin(x), elementwise."""
        return ops.sin(self)

    def cos(self) -> "Tensor":
        """cos(x), elementwise."""
        return ops.cos(self)

    def tanh(self) -> "Tensor":
        """tanh(x), elementwise."""
        return ops.tanh(self)

    def sigmoid(self) -> "Tensor":
        """1 / (1 + exp(-x)), elementwise."""
        return ops.sigmoid(self)

    def relu(self) -> "Tensor":
        """max(x, 0), elementwise."""
        return ops.relu(self)

    def abs(self) -> "Tensor":
        """|x|, elementwise."""
        return ops.abs(self)

    __abs__ = abs


def _numpy_ufunc(tensor: Tensor, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
    from gpubackprop.numpy_functions import call_ufunc

    return call_ufunc(ufunc, method, inputs, options)


def _never_equal(other: Any) -> bool:
    """Whether a tensor differs from the other as a whole, as from None or a text, and Python's identity decides."""
    return other is None or isinstance(other, str | bytes)


def _refuse_values() -> None:
    if recording() is not None:
        raise RuntimeError(
            "a tensor's value was asked for while a plan records: a recorded step replays its launches and cannot "
            "branch on values; use gb.where, gb.tensor(array)[t] for array[t], or compute the value outside the model"
        )


def tensor(
    array: Any, requires_grad: bool = False, *, dtype: npt.DTypeLike | None = None, device: str | None = None
) -> Tensor:
    """A leaf holding a copy of the array. float32 and float64 are kept, integers and bools become float64.

    `device` defaults to where the array lives. A result of operations that requires a gradient is
    refused, because a copy would not pass it on.
    """
    if isinstance(array, Tensor):
        if array.backprop is not None:
            raise RuntimeError(
                "tensor: a copy of a result that requires a gradient would lose it; use the tensor itself or .astype, "
                "or copy its values with gb.tensor(t.detach())"
            )
        device, array = device or array.device, array.data
    home = _home(array)
    backend = get_backend(device or home)
    if home != "cpu" and backend is not (there := get_backend(home)):
        array = there.to_numpy(there.asarray(array))
    elif home != "cpu":
        return _on_device(backend.asarray(array), backend, dtype, requires_grad)
    refuse_masked("tensor", "array", array)
    try:
        values = np.asarray(array)
    except ValueError:
        raise ValueError("tensor: rows of equal length expected, got a ragged list; pad it") from None
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    wanted = _wanted(values.dtype, dtype)
    data = backend.empty(values.shape, wanted)
    backend.write(data, values)
    leaf = Tensor(data, backend, requires_grad=requires_grad)
    leaf.boolean = values.dtype.kind == "b"
    return leaf


def _wanted(given: np.dtype[Any], dtype: npt.DTypeLike | None) -> np.dtype[Any]:
    """The dtype of a tensor of values of `given`: that asked for, else the same, else float64."""
    if given.kind not in "fiub":
        raise TypeError(f"tensor: numbers expected, got dtype {given}; convert the values to float first")
    wanted = np.dtype(dtype) if dtype is not None else given if given in FLOATS else np.dtype(np.float64)
    if wanted not in FLOATS:
        raise TypeError(f"tensor: dtype {wanted} is not supported; choose from float32, float64")
    return wanted


def _home(array: Any) -> str:
    """The device an array lies on."""
    if not is_on_device(array):
        return "cpu"
    return f"cuda:{array.__dlpack_device__()[1]}" if hasattr(array, "__dlpack_device__") else "cuda"


def _on_device(array: Any, backend: Backend, dtype: npt.DTypeLike | None, requires_grad: bool) -> Tensor:
    """A leaf holding a copy of an array of the backend's device."""
    if array.dtype.kind != "f":
        raise TypeError(f"tensor: floats expected on a device, got {array.dtype}; convert them with .astype('float32')")
    data = backend.empty(array.shape, _wanted(array.dtype, dtype))
    if math.prod(array.shape):
        backend.copy(array, data).run()
    return Tensor(data, backend, requires_grad=requires_grad)


from gpubackprop import ops, shapes  # noqa: E402  (the operators above and the operations need each other)
from gpubackprop.operands import constant  # noqa: E402
