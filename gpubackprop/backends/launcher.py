"""The typed launcher: a kernel's arguments, bound by name, checked once against its signature."""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpubackprop.backends.base import arithmetic
from gpubackprop.backends.cpp import signature
from gpubackprop.backends.driver import Call, Driver, Stream

__all__ = ["Bound", "Launcher"]

NUMBERS: dict[str, Any] = {
    "Index": ctypes.c_longlong, "int": ctypes.c_int, "Word": ctypes.c_uint, "Long": ctypes.c_ulonglong,
}  # fmt: skip
POINTED = {"Index": np.int64, "Word": np.uint32, "unsigned char": np.uint8}


class Bound:
    """Calls bound to buffers, in order, which run on the stream that is current when they run."""

    __slots__ = ("calls", "driver", "kept")

    def __init__(self, driver: Driver, calls: Iterable[Call], kept: Iterable[Any]) -> None:
        self.driver = driver
        self.calls = tuple(calls)
        self.kept = tuple(kept)  # what the calls work with: buffers they know by their addresses alone

    @classmethod
    def of(cls, driver: Driver, parts: Sequence["Bound"]) -> "Bound":
        """What the parts do, in order."""
        return cls(driver, (call for part in parts for call in part.calls), parts)

    def __call__(self) -> None:
        with self.driver.scope():
            self.on(self.driver.current())

    def on(self, stream: Stream) -> None:
        """Run on this stream, the device being the current one."""
        for call in self.calls:
            call(stream)


class Launcher:
    """Kernels of one device, compiled when first bound."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._functions: dict[tuple[str, str], Any] = {}

    def bind(
        self, source: str, name: str, types: Mapping[str, Any], grid: tuple[int, int, int],
        block: tuple[int, int, int], arguments: Mapping[str, Any], strided: Sequence[str] = (),
    ) -> Bound:  # fmt: skip
        """The launch of a kernel with its arguments by name: buffers, None for an absent one, numbers, layouts.

        `types` gives the dtype of T, S, O and Y where the source has them. A buffer must have its parameter's dtype, be
        C-contiguous (but for those named in `strided`, whose strides the kernel is told) and lie on a boundary of its
        elements; a vector's boundary is the kernel's own concern.
        """
        parameters = signature(source, name)
        if unknown := arguments.keys() ^ {key for _, key in parameters}:
            raise TypeError(f"kernel {name}: arguments and parameters differ in {', '.join(sorted(unknown))}")
        known = {**types, "R": arithmetic(types["T"])}
        packed = [
            self._argument(f"kernel {name}: {key}", kind, arguments[key], known, key in strided)
            for kind, key in parameters
        ]
        call = self.driver.launch(self._function(source, name), grid, block, packed)
        return Bound(self.driver, [call], arguments.values())

    def _function(self, source: str, name: str) -> Any:
        if (source, name) not in self._functions:
            with self.driver.scope():
                self._functions[source, name] = self.driver.function(source, name)
        return self._functions[source, name]

    def _argument(self, where: str, kind: str, value: Any, types: Mapping[str, Any], strided: bool) -> Any:
        pointed = kind.removeprefix("const ").removesuffix(" __restrict__")
        if not pointed.endswith("*"):
            return _number(where, pointed, value, types)
        if value is None:
            return ctypes.c_void_p(None)
        wanted = np.dtype(POINTED.get(pointed[:-1], types.get(pointed[:-1])))
        if value.dtype != wanted:
            raise TypeError(f"{where} has dtype {value.dtype}, expected {wanted}")
        if not (strided or value.flags.c_contiguous):
            raise ValueError(f"{where} of shape {value.shape} is not C-contiguous; copy it first")
        address = self.driver.address(value)
        if address % wanted.itemsize:
            raise ValueError(f"{where} lies at {address:#x}, off the boundary of its {wanted.itemsize}-byte elements")
        return ctypes.c_void_p(address)


def _number(where: str, kind: str, value: Any, types: Mapping[str, Any]) -> Any:
    if kind.startswith("Layout"):
        return (ctypes.c_longlong * len(value))(*value)
    if kind == "R":
        return (ctypes.c_double if types["R"] == np.float64 else ctypes.c_float)(float(value))
    packed = NUMBERS[kind](int(value))
    if packed.value != value:
        raise TypeError(f"{where} is {value!r}, expected an integer of {8 * ctypes.sizeof(packed)} bits")
    return packed
