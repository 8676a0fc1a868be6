"""The reference backend: every primitive bound to NumPy calls that allocate nothing when replayed."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import chunked, rows
from gpubackprop.backends.base import Graph, Launch, StepTable, workspace
from gpubackprop.formulas import Expr, apply, describe, hoist, name, walk

__all__ = ["NumpyBackend", "NumpyStepTable"]

Array = npt.NDArray[Any]
Call = Callable[[], object]
REDUCTIONS: dict[str, Any] = {"sum": np.add, "mean": np.add, "max": np.maximum, "min": np.minimum}


class Calls:
    """Ready calls, run in order with NumPy's warnings off: training looks for bad values itself."""

    __slots__ = ("calls",)

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = tuple(calls)

    def __call__(self) -> None:
        with np.errstate(all="ignore"):
            for call in self.calls:
                call()


class NumpyStepTable:
    """The step table in host memory; launches read the row in force through 0-d views of one buffer."""

    def __init__(self, columns: Sequence[str], dtype: npt.DTypeLike) -> None:
        self.columns = tuple(columns)
        self.row = np.zeros(len(self.columns), dtype)
        self.counter = np.zeros((), np.int64)
        self.load(np.zeros((1, len(self.columns))), np.zeros(1, np.int64), 1)

    def load(self, rows: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64], first: int) -> None:
        """Take the rows of the coming steps; see StepTable."""
        with np.errstate(over="ignore"):  # a learning rate beyond float32 diverges, and is reported as that
            self.rows, self.offsets, self.first = rows.astype(self.row.dtype), offsets, first
        self.counter[...] = -1
        self.advance()

    def advance(self) -> None:
        """Move on to the next row; past the last one the row in force stays."""
        self.counter += 1
        if self.counter < len(self.rows):
            self.row[...] = self.rows[self.counter]

    def step(self) -> int:
        """The number of the step in force, counted over the whole training from 1."""
        return self.first + int(self.counter)

    def offset(self) -> int:
        """The first row of the batch in force."""
        return int(self.offsets[min(int(self.counter), len(self.offsets) - 1)])

    def scalar(self, column: str) -> Array:
        """The column's value in force, as a 0-d view that follows it."""
        i = self.columns.index(column)
        return self.row[i : i + 1].reshape(())


class NumpyBackend:
    """NumPy arrays, and no compiled code of ours."""

    device = "cpu"
    xp = np

    # ---- buffers

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """An uninitialised buffer that starts on a cache line."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        raw = np.empty(size + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + size].view(dtype).reshape(tuple(shape))

    def asarray(self, array: Any, dtype: npt.DTypeLike | None = None) -> Array:
        """The array as a buffer: C-contiguous, copied only where it must be."""
        return np.asarray(array, dtype, order="C")

    def to_numpy(self, buffer: Array) -> Array:
        """A copy on the host."""
        return np.array(buffer)

    def synchronize(self) -> None:
        """Wait for the device; here every call has finished when it returns."""

    def step_table(self, columns: Sequence[str], dtype: npt.DTypeLike) -> NumpyStepTable:
        """A step table with these columns."""
        return NumpyStepTable(columns, dtype)

    def sequence(self, launches: Sequence[Launch]) -> Call:
        """One call that runs the launches in order, unrolled into one flat list."""
        return Calls([c for launch in launches for c in getattr(launch.run, "calls", (launch.run,))])

    # ---- elementwise

    def elementwise(
        self, label: str, graph: Graph, reads: Mapping[str, Array], writes: Mapping[str, Array], *,
        table: StepTable | None = None, accumulate: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """writes[k] = graph[k], element by element; see Backend."""
        if accumulate:
            graph = {k: apply("+", name(k), e) for k, e in graph.items()}
            reads = {**reads, **writes}
        shape, dtype = _common(label, reads, writes)
        what = what or "; ".join(f"{k} = {describe(e)}" for k, e in graph.items())
        scalars = {}
        if table is not None:
            graph, hoisted = hoist(graph, reads)
            scalars = {k: _numpy(table).scalar(describe(e)) for k, e in hoisted.items()}
        calls = chunked.bind(graph, {**reads, **scalars}, writes, shape, dtype, workspace())
        return _launch(label, what, reads, writes, _flops(graph, shape), calls)

    def elementwise_sum(
        self, label: str, graph: Graph, reads: Mapping[str, Array], out: Array, *, what: str = ""
    ) -> Launch:
        """out = Σ graph; see Backend."""
        shape, dtype = _common(label, {**reads, "out": out}, {})
        partials = np.zeros(sum(1 for _ in chunked.chunks(shape)) if math.prod(shape) else 1, dtype)

        def add_up(values: Array, n: int) -> list[Call]:
            return [partial(np.add.reduce, values, None, None, partials[n : n + 1].reshape(()))]

        calls = chunked.bind(graph, reads, {}, shape, dtype, workspace(), add_up)
        calls.append(partial(np.add.reduce, partials, None, None, out))
        what = what or f"Σ {describe(next(iter(graph.values())))}"
        return _launch(label, what, reads, {"out": out}, _flops(graph, shape) + math.prod(shape), calls)

    def elementwise_columns(
        self, label: str, graph: Graph, reads: Mapping[str, Array], out: Array, columns: Array, *,
        accumulate: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """out = graph and columns = its column sums; see Backend."""
        [(key, root)] = graph.items()
        shape, dtype = _common(label, reads, {key: out})
        _expect(label, columns.shape == shape[:-2] + shape[-1:], f"column sums {columns.shape} of {shape}")
        in_place = root.op == "name" and reads[str(root.value)] is out
        calls = [] if in_place else chunked.bind(graph, reads, {key: out}, shape, dtype, workspace())
        calls += rows.column_sum(out, columns, accumulate)
        what = what or f"{key} = {describe(root)}; columns = Σ {key}"
        return _launch(label, what, reads, {key: out, "columns": columns}, _flops(graph, shape) + out.size, calls)

    # ---- products, copies, reductions

    def gemm(
        self, a: Array, b: Array, out: Array, *, transpose_a: bool = False, transpose_b: bool = False,
        accumulate: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """out = op(a) @ op(b); see Backend."""
        _common("gemm", {"out": out}, {}, extra=(a, b))
        _expect("gemm", a.ndim >= 2 and b.ndim >= 2, f"{a.shape} @ {b.shape} into {out.shape}")
        left = a.swapaxes(-1, -2) if transpose_a else a
        right = b.swapaxes(-1, -2) if transpose_b else b
        (m, k), n = left.shape[-2:], right.shape[-1]
        stacks = {s for s in (a.shape[:-2], b.shape[:-2]) if s}
        fits = right.shape[-2] == k and len(stacks) <= 1 and out.shape == (*next(iter(stacks), ()), m, n)
        _expect("gemm", fits and out.ndim <= 3, f"{left.shape} @ {right.shape} into {out.shape}")
        product = np.dot if out.ndim == 2 else np.matmul  # dot reaches BLAS half a microsecond sooner
        what = what or f"out {'+' * accumulate}= a{'ᵀ' * transpose_a} @ b{'ᵀ' * transpose_b}"
        calls = rows.adding(partial(product, left, right), out, accumulate)
        return _launch("gemm", what, {"a": a, "b": b}, {"out": out}, 2 * out.size * k, calls)

    def copy(self, x: Array, out: Array, *, accumulate: bool = False) -> Launch:
        """out = x broadcast; see Backend."""
        _common("copy", {"x": x}, {"out": out})
        call = partial(np.add, out, x, out) if accumulate else partial(np.copyto, out, x)
        return _launch("copy", f"out {'+' * accumulate}= x", {"x": x}, {"out": out}, 0, [call])

    def fill(self, out: Array, value: float) -> Launch:
        """out = value; see Backend."""
        return _launch("fill", f"out = {value:g}", {}, {"out": out}, 0, [partial(out.fill, value)])

    def reduce(self, kind: str, x: Array, axes: tuple[int, ...], out: Array, *, accumulate: bool = False) -> Launch:
        """out = kind of x over the axes; see Backend."""
        reduced = tuple(n for i, n in enumerate(x.shape) if i not in axes)
        _expect(kind, kind in REDUCTIONS and out.shape == reduced, f"{x.shape} over axes {axes} into {out.shape}")

        def compute(into: Array) -> None:
            REDUCTIONS[kind].reduce(x, axes, None, into)
            if kind == "mean":
                np.multiply(into, share, into)

        share = np.array(out.size / max(1, x.size), x.dtype)
        calls = rows.adding(compute, out, accumulate)
        return _launch(kind, f"{kind} over axes {axes}", {"x": x}, {"out": out}, x.size, calls)

    def gather(self, x: Array, index: Array, out: Array) -> Launch:
        """out[:, i] = x[:, index[i]]; see Backend."""
        _expect("gather", out.shape == (x.shape[0], index.size, x.shape[2]), f"{x.shape} into {out.shape}")
        call = partial(x.take, index.reshape(-1), 1, out, "clip")  # any other mode buffers `out`
        return _launch("gather", "out[:, i] = x[:, index[i]]", {"x": x, "index": index}, {"out": out}, 0, [call])

    def scatter_add(self, dy: Array, index: Array, out: Array) -> Launch:
        """out[:, index[i]] += dy[:, i]; see Backend."""
        _expect("scatter_add", dy.shape == (out.shape[0], index.size, out.shape[2]), f"{dy.shape} into {out.shape}")
        where: Any = (slice(None), index.reshape(-1))
        call = partial(np.add.at, out, where, dy)
        what = "out[:, index[i]] += dy[:, i]"
        return _launch("scatter_add", what, {"dy": dy, "index": index}, {"out": out}, dy.size, [call])

    # ---- the training step

    def feed(self, source: Array, permutation: Array, table: StepTable, out: Array) -> Launch:
        """out = this step's rows of the permuted source; see Backend."""
        fits = source.shape[1:] == out.shape[1:] and source.dtype == out.dtype
        _expect("feed", fits, f"{source.shape} {source.dtype} into {out.shape} {out.dtype}")
        n, steps = len(out), _numpy(table)

        def take() -> None:
            start = steps.offset()
            source.take(permutation[start : start + n], 0, out, "clip")

        return _launch("feed", "the batch's rows of the data", {"rows": out}, {"out": out}, 0, [take])

    def softmax_cross_entropy(self, x: Array, target: Array, residual: Array, total: Array) -> Launch:
        """total and residual of the rows; see Backend."""
        fits = target.shape in ((len(x),), x.shape) and residual.shape == x.shape
        _expect("softmax_cross_entropy", fits, f"logits {x.shape} with target {target.shape}")
        calls = rows.softmax_cross_entropy(x, target, residual, total)
        what = "total = Σ −t·log softmax(x); residual = softmax(x) − t"
        reads, writes = {"x": x, "target": target}, {"residual": residual, "total": total}
        return _launch("softmax_cross_entropy", what, reads, writes, 8 * x.size, calls)

    def top1(self, x: Array, labels: Array, count: Array) -> Launch:
        """count += rows whose largest element stands at the label; see Backend."""
        best, hit = np.empty(len(x), np.intp), np.empty(len(x), bool)

        def add() -> None:
            x.argmax(1, best)
            np.equal(best, labels, hit)
            count[...] += np.count_nonzero(hit)

        what = "count += argmax(x) == label"
        return _launch("top1", what, {"x": x, "labels": labels}, {"count": count}, x.size, [add])

    def normalize(
        self, x: Array, gain: Array, bias: Array, axis: int, eps: float, out: Array, xhat: Array, mean: Array,
        variance: Array, rstd: Array,
    ) -> Launch:  # fmt: skip
        """Standardise along the axis, then scale and shift; see Backend."""
        calls = rows.normalize(x, gain, bias, axis, eps, out, xhat, mean, variance, rstd)
        reads = {"x": x, "gain": gain, "bias": bias}
        writes = {"out": out, "xhat": xhat, "mean": mean, "variance": variance, "rstd": rstd}
        return _launch("normalize", "out = gain · (x − mean) / √(var + eps) + bias", reads, writes, 8 * x.size, calls)

    def normalize_backward(
        self, dy: Array, xhat: Array, gain: Array, rstd: Array, axis: int, dx: Array | None, dgain: Array | None,
        dbias: Array | None, accumulate: tuple[bool, bool, bool],
    ) -> Launch:  # fmt: skip
        """All three gradients of `normalize`; see Backend."""
        calls = rows.normalize_backward(dy, xhat, gain, rstd, axis, dx, dgain, dbias, accumulate)
        reads = {"dy": dy, "xhat": xhat, "gain": gain, "rstd": rstd}
        writes = {k: v for k, v in (("dx", dx), ("dgain", dgain), ("dbias", dbias)) if v is not None}
        what = "dx = rstd · (d − mean(d) − x̂ · mean(d · x̂)), d = gain · dy; gain and bias gradients"
        return _launch("normalize_backward", what, reads, writes, 12 * dy.size, calls)

    def dropout(
        self,
        x: Array,
        rate: float,
        seed: int,
        site: int,
        step: StepTable | int,
        out: Array,
        *,
        accumulate: bool = False,
    ) -> Launch:
        """out = x / (1 − rate) where kept, else 0; see Backend."""
        number = (lambda: int(step)) if isinstance(step, int | np.integer) else _numpy(step).step
        calls = rows.dropout(x, rate, seed, site, number, out, accumulate)
        what = f"out {'+' * accumulate}= x / {1 - rate:g} where kept, else 0"
        return _launch("dropout", what, {"x": x}, {"out": out}, x.size, calls)

    def accumulate_loss(self, total: Array, table: StepTable, out: Array, bad_step: Array) -> Launch:
        """out += total, noting the first step that is not finite; see Backend."""
        steps = _numpy(table)

        def add() -> None:
            value = float(total)
            out[...] += value
            if not math.isfinite(value) and not bad_step:
                bad_step[...] = steps.step()

        return _launch(
            "accumulate_loss", "loss += total", {"total": total}, {"loss": out, "bad_step": bad_step}, 1, [add]
        )

    def advance(self, table: StepTable) -> Launch:
        """Move on to the next row; see Backend."""
        steps = _numpy(table)
        writes = {"counter": steps.counter, "row": steps.row}
        return _launch("advance", "next row of the step table", {}, writes, 0, [steps.advance])


# ---- checks and shorthands -----------------------------------------------------------------------------------------


def _launch(
    label: str, what: str, reads: Mapping[str, Array], writes: Mapping[str, Array], flops: int, calls: Sequence[Call]
) -> Launch:
    return Launch(label, what, tuple(reads.values()), tuple(writes.values()), flops, Calls(calls))


def _expect(label: str, holds: bool, got: str) -> None:
    if not holds:
        raise ValueError(f"{label}: shapes do not fit: {got}")


def _common(
    label: str, reads: Mapping[str, Array], writes: Mapping[str, Array], extra: Sequence[Array] = ()
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape the operands broadcast to, which every write must have, and their one dtype."""
    arrays = [*writes.values(), *reads.values(), *extra]
    if len({a.dtype for a in arrays}) != 1:
        raise TypeError(f"{label}: operands of one dtype expected, got {', '.join(str(a.dtype) for a in arrays)}")
    shape = np.broadcast_shapes(*(a.shape for a in (*reads.values(), *writes.values())))
    _expect(label, all(a.shape == shape for a in writes.values()), f"{[a.shape for a in arrays]}")
    return shape, arrays[0].dtype


def _flops(graph: Graph, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _operations(tuple(graph.values()))


@cache
def _operations(roots: tuple[Expr, ...]) -> int:
    return sum(1 for node in walk(roots) if node.args)


def _numpy(table: StepTable) -> NumpyStepTable:
    if not isinstance(table, NumpyStepTable):
        raise TypeError(f"step table of another backend: {type(table).__name__}")
    return table
