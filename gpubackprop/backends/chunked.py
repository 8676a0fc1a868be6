"""Formulas rendered to NumPy: ufunc calls with `out=` over cache-sized chunks, with fixed scratch.

A graph is compiled once into instructions over registers; binding it to arrays yields a flat list of ready calls.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Workspace
from gpubackprop.formulas import COMPARISONS, KEPT, Expr, walk

__all__ = ["CHUNK", "bind", "chunks", "compile_graph"]

Array = npt.NDArray[Any]
Call = Callable[[], object]

CHUNK = 65_536  # elements: at 8,192 the calls dominate, at 262,144 the operands leave the second-level cache

UFUNCS: dict[str, Any] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "neg": np.negative, "abs": np.absolute,
    "exp": np.exp, "log": np.log, "log1p": np.log1p, "expm1": np.expm1, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos,
    "tanh": np.tanh, "maximum": np.maximum, "minimum": np.minimum, "pow": np.power, "&": np.bitwise_and,
    "^": np.bitwise_xor,
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal, "!=": np.not_equal,
}  # fmt: skip
INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Register:
    """Where a value lives: kind "scratch", "mask", "read", "write", "number" or "integer"; bits = seen as integers."""

    kind: str
    key: int | str  # the number of a slot, the name of an array, the text of a number (0.0 and -0.0 are two)
    bits: bool = False

    @property
    def as_bits(self) -> "Register":
        """The same place seen as integers."""
        return Register(self.kind, self.key, bits=True)


@dataclass(frozen=True)
class Instruction:
    """out = op(args), op naming a ufunc or "copy" (where the second argument is true, if there is one)."""

    op: str
    args: tuple[Register, ...]
    out: Register


# ---- compiling -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def compile_graph(outputs: tuple[tuple[str, Expr], ...]) -> tuple[Instruction, ...]:
    """Instructions for the graph; a register is reused as soon as its value is dead."""
    return tuple(_Compiler(outputs).code)


class _Compiler:
    def __init__(self, outputs: tuple[tuple[str, Expr], ...]) -> None:
        order = walk(e for _, e in outputs)
        self.code: list[Instruction] = []
        self.place: dict[Expr, Register] = {}
        self.free: dict[str, list[int]] = {"scratch": [], "mask": []}
        self.count = {"scratch": 0, "mask": 0}
        self.last_use = {a: i for i, node in enumerate(order) for a in node.args}
        self.last_use |= {e: len(order) for _, e in outputs}
        # An output is computed straight into its buffer if what the buffer held before is read no later.
        position = {e: i for i, e in enumerate(order)}
        inputs = {str(n.value): n for n in order if n.op == "name"}
        targets = {
            e: Register("write", key) for key, e in reversed(outputs)
            if e.args and (key not in inputs or self.last_use[inputs[key]] <= position[e])
        }  # fmt: skip
        for e, place in [*targets.items()]:  # what NaNs are copied into goes there too
            if _keeps_nan(e) and self.last_use[e.args[2]] == position[e] and place.key not in inputs:
                targets[e.args[2]] = place
        saved: dict[str, Register] = {}  # outputs that are what another output's buffer held before
        for key, e in outputs:
            if e.op == "name" and any(e.value == other != key for other, _ in outputs):
                saved[key] = self._new("scratch")
                self._emit("copy", (_leaf(e),), saved[key])
        for i, node in enumerate(order):
            if not node.args:
                self.place[node] = _leaf(node)
            elif node.op == "where":
                self._select(i, node, targets.get(node))
            else:
                args = tuple(self.place[a] for a in node.args)
                self._release(i, node.args)  # a ufunc may write over its own argument
                out = targets.get(node) or self._new("mask" if node.op in COMPARISONS.values() else "scratch")
                self._emit(node.op, args, out)
                self.place[node] = out
        for key, e in outputs:
            place = saved.get(key, self.place[e])
            if place != Register("write", key):
                self._emit("copy", (place,), Register("write", key))

    def _emit(self, op: str, args: tuple[Register, ...], out: Register) -> None:
        self.code.append(Instruction(op, args, out))

    def _new(self, kind: str) -> Register:
        if not self.free[kind]:
            self.free[kind].append(self.count[kind])
            self.count[kind] += 1
        return Register(kind, self.free[kind].pop())

    def _drop(self, register: Register) -> None:
        if register.kind in self.free:
            self.free[register.kind].append(int(register.key))

    def _release(self, i: int, args: tuple[Expr, ...]) -> None:
        for a in dict.fromkeys(args):
            if self.last_use[a] == i:
                self._drop(self.place[a])

    def _select(self, i: int, node: Expr, target: Register | None) -> None:
        """where(c, a, b) = b ^ ((a ^ b) & -c) on the bits, less for an arm of 0; masked copies are ten times slower,
        but where nothing is copied: NaNs are few."""
        held = self.place[node.args[2]]
        if _keeps_nan(node) and held.kind in ("scratch", "write") and self.last_use[node.args[2]] == i:
            self._emit("copy", (Register("number", "nan"), self.place[node.args[0]]), held)
            self._release(i, node.args[:2])
            self.place[node] = held
            return
        c, a, b = (self.place[x].as_bits for x in node.args)
        mask = self._new("scratch").as_bits
        zero = Register("number", "0.0", bits=True)
        out = target or self._new("scratch")
        self._emit("copy", (c,), mask)
        if b == zero:
            self._emit("*", (a, mask), out.as_bits)
        elif a == zero:
            self._emit("-", (mask, Register("integer", "1")), mask)
            self._emit("&", (b, mask), out.as_bits)
        else:
            difference = self._new("scratch").as_bits  # not `out`, which may be where an arm is read
            self._emit("neg", (mask,), mask)
            self._emit("^", (a, b), difference)
            self._emit("&", (difference, mask), difference)
            self._emit("^", (difference, b), out.as_bits)
            self._drop(difference)
        self._drop(mask)
        self._release(i, node.args)
        self.place[node] = out


def _keeps_nan(node: Expr) -> bool:
    """Whether the node is where(v != v, v, …), as formulas make it for NaNs."""
    return node.op == "where" and node.args[0].op == "!=" and node.args[0].args == (node.args[1],) * 2


def _leaf(node: Expr) -> Register:
    return Register("read", str(node.value)) if node.op == "name" else Register("number", repr(node.value))


# ---- binding -------------------------------------------------------------------------------------------------------


def chunks(shape: tuple[int, ...], size: int = CHUNK) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut a C-ordered array into contiguous pieces of at most `size` elements."""
    inner = 1
    for axis in reversed(range(len(shape))):
        if inner * shape[axis] > size:
            step = max(1, size // inner)
            for outer, start in product(product(*map(range, shape[:axis])), range(0, shape[axis], step)):
                yield (*outer, slice(start, start + step))
            return
        inner *= shape[axis]
    yield ()


def bind(
    outputs: Mapping[str, Expr],
    reads: Mapping[str, Array],
    writes: Mapping[str, Array],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    space: Workspace,
    after: Callable[[Array, int], list[Call]] | None = None,
) -> list[Call]:
    """The calls that compute the graph over `shape`, chunk by chunk; `reads` broadcast, `writes` have that shape.

    An output without a buffer lives in scratch. `after(values of the first output, number of the chunk)` adds calls.
    """
    code = compile_graph(tuple(outputs.items()))
    if all(a.shape == shape or a.size == 1 for a in reads.values()):  # one flat run
        reads, writes = ({k: a.reshape(-1) if a.shape == shape else a for k, a in d.items()} for d in (reads, writes))
        shape = (math.prod(shape),)
    calls: list[Call] = []
    for n, index in enumerate(chunks(shape)):
        piece = np.broadcast_to(np.empty(()), shape)[index].shape if index else shape
        cut = {k: _cut(a, index, shape) for k, a in reads.items()}
        frame = _Frame(cut, {k: a[index] for k, a in writes.items()}, piece, dtype, space)
        calls += map(frame.call, code)
        if after is not None:
            calls += after(frame.array(Register("write", next(iter(outputs)))), n)
    return calls


def _cut(a: Array, index: tuple[int | slice, ...], shape: tuple[int, ...]) -> Array:
    """The part of a broadcasting operand that belongs to a chunk."""
    if a.size == 1:
        return a.reshape(())
    return np.broadcast_to(a, shape)[index] if index else a


@lru_cache(maxsize=KEPT)
def _constant(value: str, dtype: np.dtype[Any]) -> Array:
    return np.array(float(value), dtype)


@lru_cache(maxsize=64)
def _full(value: str, dtype: np.dtype[Any]) -> Array:
    return np.full(CHUNK, float(value), dtype)


@dataclass(frozen=True)
class _Frame:
    """The arrays behind the registers of one chunk."""

    reads: Mapping[str, Array]
    writes: Mapping[str, Array]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    space: Workspace

    def call(self, step: Instruction) -> Call:
        """The instruction as a call without arguments."""
        args, out = [self.array(r) for r in step.args], self.array(step.out)
        if step.op == "copy":
            return partial(np.copyto, out, args[0], where=args[1] if args[1:] else True)
        if step.op in ("maximum", "minimum"):  # a scalar operand takes NumPy's slow loop (3x); out= must be a keyword
            args = [self._spread(r, a) for r, a in zip(step.args, args, strict=True)]
            return partial(UFUNCS[step.op], *args, out=out)
        return partial(UFUNCS[step.op], *args, out)

    def array(self, r: Register) -> Array:
        """The array behind a register."""
        integer = INTEGERS[self.dtype.itemsize]
        if r.kind == "integer":
            return _constant(str(r.key), np.dtype(integer))
        if r.kind == "number":
            a = _constant(str(r.key), self.dtype)
        elif r.kind == "read":
            a = self.reads[str(r.key)]
        elif r.kind == "write" and r.key in self.writes:
            a = self.writes[str(r.key)]
        else:
            a = self._scratch(r)
        return a.view(np.int8 if a.dtype == bool else integer) if r.bits else a

    def _scratch(self, r: Register) -> Array:
        dtype = np.dtype(bool) if r.kind == "mask" else self.dtype
        key = (r.kind, r.key, dtype)
        if key not in self.space.scratch:
            self.space.scratch[key] = np.empty(CHUNK, dtype)
        scratch: Array = self.space.scratch[key]
        return scratch[: math.prod(self.shape)].reshape(self.shape)

    def _spread(self, r: Register, a: Array) -> Array:
        return _full(str(r.key), self.dtype)[: math.prod(self.shape)].reshape(self.shape) if r.kind == "number" else a
