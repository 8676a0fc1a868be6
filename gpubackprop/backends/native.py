"""NumPy arrays with compiled fused kernels: the reference, but for what the native library has a kernel for.

The library is optional. The package's build makes one for each instruction set; the best that the machine has is
loaded, if it was made of the formulas and sources that are here.
"""

import ctypes
import importlib.machinery
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import host
from gpubackprop.backends.base import GROWTH_STEPS, Graph, Launch, StepTable, Tally, one_per_row, owned
from gpubackprop.backends.blas import blas, blocks
from gpubackprop.backends.numpy import Calls, NumpyBackend, calls_of
from gpubackprop.backends.numpy_state import NumpyStepTable, NumpyTally
from gpubackprop.backends.threads import default_threads
from gpubackprop.formulas import KEPT, describe, name

__all__ = ["Library", "NativeBackend", "available", "library", "why_not_native"]

Array = npt.NDArray[Any]
Call = Callable[[], object]
REBUILD = "build it with a C++ compiler: pip install --force-reinstall --no-deps gpubackprop, or -e . in a checkout"
NORMS = {1: "layer", 0: "batch"}
COPY = {"out": name("x")}
LARGE = 2**18  # elements from which on a copy is worth the binding of a kernel
LARGE_VECTOR = 2**19  # elements of a matrix whose product with a vector is faster by BLAS's gemv, which NumPy takes
GRAIN, LEAST_ROWS = 16384, 64  # elements of a piece of work, as in host.h; rows that a column sum adds up at once


# ---- the library ---------------------------------------------------------------------------------------------------


class Library:
    """The native library of an instruction set; RuntimeError if it does not fit the sources, OSError if not there."""

    def __init__(self, instructions: str) -> None:
        self.instructions = instructions
        if not (path := _path(instructions)).exists():
            raise RuntimeError(f"{path.name} was not built; {REBUILD}")
        self._loaded = ctypes.CDLL(str(path))
        if self._function("gpubackprop_digest", result=ctypes.c_char_p)().decode() != host.digest():
            raise RuntimeError(f"{path.name} was made of other sources; {REBUILD}")
        self._run = self._function("gpubackprop_run", ctypes.c_void_p, ctypes.c_longlong)
        self.set_threads = self._function("gpubackprop_set_threads", ctypes.c_int)
        self.set_threads_here = self._function("gpubackprop_set_threads_here", ctypes.c_int, result=ctypes.c_int)
        self.get_threads = self._function("gpubackprop_get_threads", result=ctypes.c_int)
        self._enter_blas = self._function("gpubackprop_enter_blas")
        self._leave_blas = self._function("gpubackprop_leave_blas")
        self.set_threads(default_threads())
        if (functions := blas().threads) is not None:
            self._function("gpubackprop_use_blas", ctypes.c_void_p, ctypes.c_void_p)(*functions)

    def _function(self, name: str, *types: Any, result: Any = None) -> Any:
        function = getattr(self._loaded, name)
        function.argtypes, function.restype = types, result
        return function

    @contextmanager
    def one_blas_thread(self) -> Iterator[None]:
        """Inside, NumPy's BLAS computes in the thread that asks, for every thread of the process."""
        self._enter_blas()
        try:
            yield
        finally:
            self._leave_blas()

    @lru_cache(maxsize=KEPT)  # noqa: B019 - there is one library
    def kernel(self, name: str, dtype: np.dtype[Any]) -> Any:
        """The kernel of that name and type; None if there is none."""
        try:
            return self._function(f"{name}_{dtype.name}", ctypes.c_void_p)
        except AttributeError:
            return None

    def together(self, jobs: Sequence["Job"]) -> Call:
        """One call that does the jobs in order."""
        if len(jobs) == 1:
            return jobs[0]
        pairs = np.array([(ctypes.cast(job.kernel, ctypes.c_void_p).value, job.args[0]) for job in jobs], np.int64)
        call = Job(self._run, pairs.ctypes.data, len(jobs))
        call.kept = pairs, jobs
        return call


class Job(partial[None]):
    """A kernel and its argument, the address of the numbers and addresses that it works with."""

    kept: object  # what the addresses stand for

    @property
    def kernel(self) -> Any:
        """The function of the library."""
        return self.func

    @classmethod
    def of(cls, kernel: Any, *words: "int | Array | NativeStepTable | None") -> "Job":
        """The kernel with these: numbers, and arrays and step tables as their addresses."""
        array = np.array([_word(w) for w in words], np.int64)
        job = cls(kernel, array.ctypes.data)
        job.kept = array, words
        return job


def available() -> list[str]:
    """The instruction sets that this machine has and a library was built for, the best last."""
    return [name for name in _of_this_machine() if _path(name).exists()]


def _of_this_machine() -> list[str]:
    umath = sys.modules.get("numpy._core._multiarray_umath") or sys.modules["numpy.core._multiarray_umath"]
    return host.instruction_sets(name for name, has in umath.__cpu_features__.items() if has)


def _word(w: "int | Array | NativeStepTable | None") -> int:
    if isinstance(w, NativeStepTable):
        w = w.state
    return w.ctypes.data if isinstance(w, np.ndarray) else w or 0


@cache
def library() -> Library:
    """The library for this machine; RuntimeError or OSError saying why there is none."""
    if os.environ.get("GPUBACKPROP_NATIVE") == "0":
        raise RuntimeError("GPUBACKPROP_NATIVE is 0")
    return Library((available() or _of_this_machine())[-1])


def why_not_native() -> str | None:
    """The reason why the native library is not in use, as a phrase; None if it is."""
    try:
        library()
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    return None


def _path(instructions: str) -> Path:
    return Path(__file__).with_name(f"_native_{instructions}{importlib.machinery.EXTENSION_SUFFIXES[0]}")


# ---- the step table ------------------------------------------------------------------------------------------------


class NativeStepTable(NumpyStepTable):
    """The step table as kernels read it: struct Steps of kernels/host/host.h."""

    def __init__(self, columns: Sequence[str], dtype: npt.DTypeLike) -> None:
        self.state = np.zeros(10, np.int64)
        super().__init__(columns, dtype)

    def load(self, rows: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64], first: int) -> None:
        """Take the rows of the coming steps; see StepTable."""
        self.counters = self.state[:2]
        super().load(rows, np.ascontiguousarray(offsets, np.int64), first)
        arrays = (self.rows, self.offsets, self.row, self.applied_row, self.control)
        addresses = (a.__array_interface__["data"][0] for a in arrays)  # a quarter of the time of a.ctypes.data
        self.state[2:] = len(rows) - 1, first, len(self.columns), *addresses


# ---- the backend ---------------------------------------------------------------------------------------------------


class NativeBackend(NumpyBackend):
    """NumPy arrays; compiled kernels for what the library has one for, the reference for all else.

    The library has the formulas of the tables and the hand-written kernels of kernels/host, in float32 and float64.
    """

    def __init__(self, library: Library) -> None:
        super().__init__("cpu")
        self.library = library

    def step_table(self, columns: Sequence[str], dtype: npt.DTypeLike, steps: int) -> NativeStepTable:
        """A step table with these columns; it has room for any number of rows."""
        return NativeStepTable(columns, dtype)

    def sequence(self, launches: Sequence[Launch]) -> Call:
        """One call that runs the launches in order; kernels that follow each other are one call."""
        calls: list[Call] = []
        jobs: list[Job] = []
        for call in (*calls_of(launches), None):
            if isinstance(call, Job):
                jobs.append(call)
                continue
            calls += [self.library.together(jobs)] if jobs else []
            calls += [call] if call else []
            jobs = []
        return calls[0] if len(calls) == 1 and isinstance(calls[0], Job) else Calls(calls)

    def write(self, buffer: Array, value: Any) -> None:
        """buffer[...] = value; a large array on all cores."""
        if isinstance(value, np.ndarray) and value.size >= LARGE and value.shape == buffer.shape:
            self.copy(value, buffer).run()
        else:
            super().write(buffer, value)

    def _copy(self, x: Array, out: Array, accumulate: bool) -> list[Call]:
        alike = x.shape == out.shape and _plain(out.dtype, x, out) and not np.may_share_memory(x, out)
        if accumulate or not alike:
            return super()._copy(x, out, accumulate)
        return self._map(COPY, {"x": x}, {"out": out}, out.shape, out.dtype, None)

    # ---- formulas

    def _map(
        self, graph: Graph, reads: Mapping[str, Array], writes: Mapping[str, Array], shape: tuple[int, ...],
        dtype: np.dtype[Any], table: StepTable | None, suffix: str = "", applied: bool = False,
    ) -> list[Call]:  # fmt: skip
        for columnwise, single in _broadcast(reads, shape):
            found = self._loop("map", graph, reads, writes, dtype, columnwise, (), single)
            if found is not None:
                loop, kernel = found
                columns = shape[-1] if columnwise else 0
                members = reads[columnwise[0]].size // columns if columns else 1
                extents = math.prod(shape), columns, shape[-2] if members > 1 else 0
                outputs = (writes[k] for k in loop.outputs)
                return [Job.of(kernel, *outputs, *_inputs(loop, reads, table, suffix, applied), *extents)]
        return super()._map(graph, reads, writes, shape, dtype, table, suffix, applied)

    def _columns(
        self, graph: Graph, reads: Mapping[str, Array], out: Array | None, columns: Array, accumulate: bool,
        shape: tuple[int, ...], dtype: np.dtype[Any],
    ) -> list[Call]:  # fmt: skip
        [(key, root)] = graph.items()
        writes = {} if out is None else {key: out}
        whole = all(a.shape == shape for a in reads.values()) and (out is None) == (root.op == "name")
        found = self._loop("columns", graph, reads, writes | {"columns": columns}, dtype) if whole else None
        if found is None or 0 in shape:
            return super()._columns(graph, reads, out, columns, accumulate, shape, dtype)
        loop, kernel = found
        rows, n = shape[-2:]
        members, height = math.prod(shape[:-2]), max(LEAST_ROWS, GRAIN // n)
        blocks = members, -(-rows // height), n
        extents = columns, np.empty(blocks), np.empty(blocks, dtype), members, rows, n, height, accumulate
        return [Job.of(kernel, *writes.values(), *_inputs(loop, reads), *extents)]

    def _sum(
        self, graph: Graph, reads: Mapping[str, Array], total: Array, writes: Mapping[str, Array],
        shape: tuple[int, ...], dtype: np.dtype[Any], table: StepTable | None, tally: Tally | None,
    ) -> list[Call]:  # fmt: skip
        others = {k: a for k, a in reads.items() if a.shape != shape}
        rowwise = tuple(k for k, a in others.items() if one_per_row(a, shape))
        single = tuple(k for k, a in others.items() if a.size == 1 and k not in rowwise)
        found = None
        if len(rowwise) + len(single) == len(others):
            found = self._loop("sum", graph, reads, {**writes, "total": total}, dtype, (), rowwise, single)
        if found is None:
            return super()._sum(graph, reads, total, writes, shape, dtype, table, tally)
        loop, kernel = found
        size = math.prod(shape)
        partials = np.empty(-(-size // GRAIN) or 1, dtype)
        added = (None, None, None) if tally is None else (*_tallied(tally), _native(table))
        outputs = (writes[k] for k in loop.outputs if k in writes)
        inputs, columns = _inputs(loop, reads, table), math.prod(shape[1:])
        return [Job.of(kernel, *outputs, *inputs, total, partials, *added, size, columns)]

    def _loop(
        self, skeleton: str, graph: Graph, reads: Mapping[str, Array], writes: Mapping[str, Array],
        dtype: np.dtype[Any], columnwise: tuple[str, ...] = (), rowwise: tuple[str, ...] = (),
        single: tuple[str, ...] = (),
    ) -> tuple[host.Loop, Any] | None:  # fmt: skip
        """The loop and its kernel, if there is one and the arrays are what it takes."""
        if not _plain(dtype, *reads.values(), *writes.values()):
            return None
        loop = host.loop(skeleton, tuple(graph.items()), tuple(reads), columnwise, rowwise, single)
        kernel = self.library.kernel(loop.symbol, dtype)
        return None if kernel is None else (loop, kernel)

    # ---- products

    def _gemm(self, left: Array, right: Array, out: Array, accumulate: bool) -> list[Call]:
        (m, k), n = left.shape[-2:], right.shape[-1]
        transposed = _transposed(left), _transposed(right)
        one_type = left.dtype == right.dtype == out.dtype and out.flags.c_contiguous
        apart = not (np.may_share_memory(out, left) or np.may_share_memory(out, right))
        vector = 1 in (m, n) and m * k * n > LARGE_VECTOR and out.ndim == 2
        name = "gemv" if vector else "gemm"
        routine = blas().routine(name, out.dtype) if one_type and apart and None not in transposed else None
        if routine is None or 0 in (*left.shape, n):
            calls = super()._gemm(left, right, out, accumulate)
            return [partial(self._alone, call) for call in calls]
        kernel, shared = self.library.kernel(name, out.dtype), blas().threads is not None
        height, width = blocks(m, n, k) if shared else (m, n)
        if vector:  # out = op(matrix) · x, and of a row the transpose of that
            matrix, x, turned = (left, right, transposed[0]) if n == 1 else (right, left, not transposed[1])
            return [Job.of(kernel, routine, out, matrix, x, turned, m * n, k, accumulate, max(height, width))]
        strides = (a.strides[0] // a.itemsize if a.ndim == 3 else 0 for a in (left, right))
        extents = math.prod(out.shape[:-2]), m, n, k, accumulate, height, width, blas().tile if shared else 0
        return [Job.of(kernel, routine, out, left, right, *transposed, *strides, *extents)]

    def _alone(self, call: Call) -> None:
        """A call of NumPy, whose products are computed by this thread alone."""
        with self.library.one_blas_thread():
            call()

    # ---- the training step

    def _feed(
        self, source_x: Array, source_y: Array | None, order: Array, steps: NumpyStepTable, x: Array, y: Array | None,
        scale: float,
    ) -> Call:  # fmt: skip
        contiguous = all(a.flags.c_contiguous for a in (source_x, source_y, order, x, y) if a is not None)
        if scale != 1 or not contiguous or order.dtype != np.int64 or source_x.dtype != x.dtype:
            return super()._feed(source_x, source_y, order, steps, x, y, scale)
        kernel = self.library.kernel("feed", np.dtype(np.float32))
        widths = (0 if a is None else math.prod(a.shape[1:]) * a.itemsize for a in (x, y))
        return Job.of(kernel, x, y, source_x, source_y, order, _native(steps), len(x), *widths)

    def _softmax_cross_entropy(
        self, x: Array, target: Array, dx: Array, total: Array, w: Array | None, table: StepTable | None,
        tally: Tally | None, count: bool,
    ) -> list[Call]:  # fmt: skip
        labels = target.ndim == 1
        given = [a for a in (None if labels else target, w) if a is not None]
        if not _plain(x.dtype, x, dx, total, *given) or 0 in x.shape:
            return super()._softmax_cross_entropy(x, target, dx, total, w, table, tally, count)
        kernel = self.library.kernel(f"softmax_cross_entropy_{'labels' if labels else 'rows'}", x.dtype)
        rows, classes = x.shape
        scratch = np.empty(rows, x.dtype), np.empty(rows, x.dtype), np.empty(rows, np.int64)
        steps = None if table is None else _native(table)
        factors = (None, None) if steps is None else (steps.scalar("1 / weight"), steps.control[:1])
        added = (None, None) if tally is None else _tallied(tally)
        correct = _tally(tally).correct if tally is not None and count else None
        return [Job.of(kernel, dx, total, x, target, w, *scratch, *factors, *added, correct, steps, rows, classes)]

    def _normalize(self, axis: int, eps: float, reads: Iterable[Array], writes: Iterable[Array]) -> list[Call]:
        x, *_ = reads = list(reads)
        if not _plain(x.dtype, *reads, *writes) or 0 in x.shape:
            return super()._normalize(axis, eps, reads, writes)
        kernel = self.library.kernel(f"{NORMS[axis]}_norm", x.dtype)
        return [Job.of(kernel, *writes, *reads, np.array(eps, x.dtype), *x.shape)]

    def _normalize_backward(
        self, axis: int, accumulate: tuple[bool, bool, bool], reads: Iterable[Array], outs: Iterable[Array | None]
    ) -> list[Call]:
        dy, *_ = reads = list(reads)
        if not _plain(dy.dtype, *reads, *(a for a in outs if a is not None)) or 0 in dy.shape:
            return super()._normalize_backward(axis, accumulate, reads, outs)
        kernel = self.library.kernel(f"{NORMS[axis]}_norm_backward", dy.dtype)
        rows, columns = dy.shape
        partials = np.empty((-(-rows // LEAST_ROWS), 2, columns), dy.dtype) if axis == 1 else None
        return [Job.of(kernel, *outs, *reads, partials, rows, columns, *accumulate)]

    def _gradient_norm(self, g: Array, steps: NumpyStepTable, clip: float, dynamic: bool) -> Call:
        if not _plain(g.dtype, g, steps.control):
            return super()._gradient_norm(g, steps, clip, dynamic)
        partials = np.empty(-(-g.size // GRAIN), g.dtype)
        most = np.array(clip, g.dtype)
        kernel = self.library.kernel("gradient_norm", g.dtype)
        return Job.of(kernel, g, steps.control, partials, most, g.size, dynamic, GROWTH_STEPS)

    def _dropout(
        self, x: Array, rate: float, seed: int, site: int, step: StepTable | int, out: Array, accumulate: bool
    ) -> list[Call]:
        if not _plain(x.dtype, x, out):
            return super()._dropout(x, rate, seed, site, step, out, accumulate)
        kernel, scale = self.library.kernel("dropout", x.dtype), np.array(1 / (1 - rate), x.dtype)
        return [Job.of(kernel, *_drawing(x, seed, site, step, out), round((1 - rate) * 2**32), accumulate, scale)]

    def _noise(self, x: Array, sigma: float, seed: int, site: int, step: StepTable | int, out: Array) -> list[Call]:
        if not _plain(x.dtype, x, out):
            return super()._noise(x, sigma, seed, site, step, out)
        kernel = self.library.kernel("noise", x.dtype)
        return [Job.of(kernel, *_drawing(x, seed, site, step, out), np.array(sigma, x.dtype))]

    def _accumulate_loss(self, total: Array, steps: NumpyStepTable, sums: NumpyTally) -> Call:
        kernel = self.library.kernel("accumulate_loss", total.dtype)
        return Job.of(kernel, total, *_tallied(sums), sums.correct, _native(steps))

    def _advance(self, steps: NumpyStepTable, applies: bool) -> Call:
        return Job.of(self.library.kernel("advance", steps.row.dtype), _native(steps), applies)


# ---- jobs ----------------------------------------------------------------------------------------------------------


def _plain(dtype: np.dtype[Any], *arrays: Array) -> bool:
    """Whether the arrays are of that type, C-contiguous, and the library has kernels for it."""
    return dtype.name in host.DTYPES and all(a.dtype == dtype and a.flags.c_contiguous for a in arrays)


def _transposed(a: Array) -> bool | None:
    """Whether a matrix lies in memory as its transpose, not as it is; None if as neither."""
    return False if a.flags.c_contiguous else True if a.swapaxes(-1, -2).flags.c_contiguous else None


def _broadcast(reads: Mapping[str, Array], shape: tuple[int, ...]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(broadcast over the rows, of one element) of the reads; two ways to see it where a row has one element."""
    others = {k: a for k, a in reads.items() if a.shape != shape}
    forms = {k: (1,) * (len(shape) - a.ndim) + a.shape for k, a in others.items()}
    rows = [(1,) * (len(shape) - 1), (*shape[:1], 1) if len(shape) == 3 else None]
    for least in (2, 1):  # elements of an array that is broadcast over the rows
        by_row = tuple(k for k, a in others.items() if a.size >= least and forms[k][-1:] == shape[-1:])
        single = tuple(k for k, a in others.items() if a.size == 1 and k not in by_row)
        kinds = {forms[k][:-1] for k in by_row}
        if len(by_row) + len(single) == len(others) and len(kinds) <= 1 and kinds <= {*rows}:
            yield by_row, single
        if least == 2 and shape[-1:] != (1,):
            return


def _inputs(
    loop: host.Loop, reads: Mapping[str, Array], table: StepTable | None = None, suffix: str = "",
    applied: bool = False,
) -> Iterator[Array]:  # fmt: skip
    """The arrays and scalars that a loop reads, in its order."""
    yield from (reads[k] for k in loop.inputs)
    for e in loop.scalars:
        yield _native(table).scalar(describe(e) + suffix, applied=applied)


def _drawing(
    x: Array, seed: int, site: int, step: StepTable | int, out: Array
) -> tuple["int | Array | NativeStepTable | None", ...]:
    """What the jobs that draw random words for the elements of x begin with."""
    fixed = int(step) % 2**32 if isinstance(step, int | np.integer) else None
    state = None if fixed is not None else _native(step)
    return out, x, x.size, (seed + 2**63) % 2**64 - 2**63, site % 2**32, state, fixed


def _tallied(tally: Tally) -> tuple[Array, Array]:
    sums = _tally(tally)
    return sums.loss, sums.bad_step


def _native(table: Any) -> NativeStepTable:
    return owned(NativeStepTable, table, "step table")


def _tally(tally: Tally) -> NumpyTally:
    return owned(NumpyTally, tally, "tally")
