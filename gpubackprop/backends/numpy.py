"""The reference backend: every primitive bound to NumPy calls that allocate nothing when replayed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import chunked, rows
from gpubackprop.backends.base import (
    GROWTH_STEPS,
    LARGEST_SCALE,
    CaptureError,
    Graph,
    Launch,
    StepTable,
    Tally,
    arithmetic,
    common,
    expect,
    expect_rows,
    expect_softmax,
    flops_of,
    owned,
    softmax_equation,
    tf32,
    workspace,
)  # fmt: skip
from gpubackprop.backends.geometry import reduction_steps
from gpubackprop.backends.numpy_state import NumpyStepTable, NumpyTally, Wide
from gpubackprop.formulas import apply, describe, free_names, hoist, name

__all__ = ["Calls", "NumpyBackend", "NumpyStepTable", "NumpyTally", "calls_of"]

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


def calls_of(launches: Sequence[Launch]) -> list[Call]:
    """All calls of the launches, in order."""
    return [c for launch in launches for c in getattr(launch.run, "calls", (launch.run,))]


class NumpyBackend:
    """NumPy arrays, and no compiled code of ours.

    A primitive checks and says what it does; the method under its name with an underscore has the calls.
    """

    xp = np

    def __init__(self, device: str = "cpu:reference") -> None:
        self.device = device

    def __repr__(self) -> str:
        return f"{type(self).__name__}(device={self.device!r})"

    # ---- buffers

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """An uninitialised buffer that starts on a cache line."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        raw = np.empty(size + 64, np.uint8)
        start = -raw.__array_interface__["data"][0] % 64
        return raw[start : start + size].view(dtype).reshape(tuple(shape))

    def asarray(self, array: Any, dtype: npt.DTypeLike | None = None) -> Array:
        """The array as a buffer: C-contiguous, copied only where it must be."""
        return np.asarray(array, dtype, order="C")

    def to_numpy(self, buffer: Array) -> Array:
        """A copy on the host."""
        return np.array(buffer)

    def synchronize(self) -> None:
        """Wait for the device; here every call has finished when it returns."""

    def memory(self) -> None:
        """The host's; see Backend."""

    def write(self, buffer: Array, value: Any) -> None:
        """buffer[...] = value."""
        buffer[...] = value

    def step_table(self, columns: Sequence[str], dtype: npt.DTypeLike, steps: int) -> NumpyStepTable:
        """A step table with these columns; it has room for any number of rows."""
        return NumpyStepTable(columns, dtype)

    def staging(self, x: Array, y: Array, w: Array | None, rows: int) -> None:
        """The data is here already."""

    def tally(self, dtype: npt.DTypeLike) -> NumpyTally:
        """A tally of zeros."""
        return NumpyTally()

    def sequence(self, launches: Sequence[Launch]) -> Call:
        """One call that runs the launches in order, unrolled into one flat list."""
        return Calls(calls_of(launches))

    def capture(self, launches: Sequence[Launch]) -> Call:
        """Nothing to capture with; see Backend."""
        raise CaptureError("the CPU has no CUDA graphs")

    # ---- elementwise

    def elementwise(
        self, label: str, graph: Graph, reads: Mapping[str, Array], writes: Mapping[str, Array], *,
        table: StepTable | None = None, accumulate: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """writes[k] = graph[k], element by element; see Backend."""
        if accumulate:
            graph = {k: apply("+", name(k), e) for k, e in graph.items()}
            reads = {**reads, **writes}
        shape, dtype = common(label, reads, writes)
        what = what or "; ".join(f"{k} = {describe(e)}" for k, e in graph.items())
        calls = self._map(graph, reads, writes, shape, dtype, table)
        return _launch(label, what, reads, writes, flops_of(graph, shape), calls)

    def _map(
        self, graph: Graph, reads: Mapping[str, Array], writes: Mapping[str, Array], shape: tuple[int, ...],
        dtype: np.dtype[Any], table: StepTable | None, suffix: str = "", applied: bool = False,
    ) -> list[Call]:  # fmt: skip
        """writes[k] = graph[k]; scalars are the table's columns with that suffix."""
        graph, scalars = _scalars(graph, reads, table, suffix, applied=applied)
        return _elementwise(graph, reads, writes, shape, dtype, scalars)

    def elementwise_sum(
        self, label: str, graph: Graph, reads: Mapping[str, Array], total: Array,
        writes: Mapping[str, Array] = MappingProxyType({}), *, table: StepTable | None = None,
        tally: Tally | None = None, what: str = "",
    ) -> Launch:  # fmt: skip
        """total = Σ graph["total"]; writes[k] = graph[k]; see Backend."""
        shape, dtype = common(label, {**reads, "total": total}, writes)
        what = what or f"total = Σ {describe(graph['total'])}"
        graph = dict(sorted(graph.items(), key=lambda item: item[0] != "total"))
        calls = self._sum(graph, reads, total, writes, shape, dtype, table, tally)
        flops = flops_of(graph, shape) + math.prod(shape)
        return _launch(label, what, reads, {"total": total, **writes} | _buffers(tally), flops, calls)

    def _sum(
        self, graph: Graph, reads: Mapping[str, Array], total: Array, writes: Mapping[str, Array],
        shape: tuple[int, ...], dtype: np.dtype[Any], table: StepTable | None, tally: Tally | None,
    ) -> list[Call]:  # fmt: skip
        """total = Σ of the graph's first output, and to the tally; the others are written."""
        partials = np.zeros(sum(1 for _ in chunked.chunks(shape)) if math.prod(shape) else 1, dtype)

        def add_up(values: Array, n: int) -> list[Call]:
            return [partial(np.add.reduce, values, None, None, partials[n : n + 1].reshape(()))]

        graph, scalars = _scalars(graph, reads, table)
        calls = _elementwise(graph, reads, writes, shape, dtype, scalars, add_up)
        calls.append(partial(np.add.reduce, partials, None, None, total))
        if tally is not None:
            calls.append(_tally(tally).adding(total, _numpy(table)))
        return calls

    def elementwise_columns(
        self, label: str, graph: Graph, reads: Mapping[str, Array], out: Array, columns: Array, *,
        accumulate: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """out = graph and columns = its column sums; see Backend."""
        [(key, root)] = graph.items()
        shape, dtype = common(label, reads, {key: out})
        expect(label, columns.shape == shape[:-2] + shape[-1:], f"column sums {columns.shape} of {shape}")
        in_place = root.op == "name" and reads[str(root.value)] is out
        calls = self._columns(graph, reads, None if in_place else out, columns, accumulate, shape, dtype)
        what = what or f"{key} = {describe(root)}; columns = Σ {key}"
        writes = {"columns": columns} if in_place else {key: out, "columns": columns}
        return _launch(label, what, reads, writes, flops_of(graph, shape) + out.size, calls)

    def _columns(
        self, graph: Graph, reads: Mapping[str, Array], out: Array | None, columns: Array, accumulate: bool,
        shape: tuple[int, ...], dtype: np.dtype[Any],
    ) -> list[Call]:  # fmt: skip
        """columns (+)= column sums of the graph, which is written to `out`, or stands in the read that is its root."""
        [(key, root)] = graph.items()
        wide = Wide()
        inputs = {k: wide.read(a) for k, a in reads.items()}
        to = inputs[str(root.value)] if out is None else wide.write(out)
        calls = [] if out is None else chunked.bind(graph, inputs, {key: to}, shape, dtype, workspace())
        return wide.around([*calls, *rows.column_sum(to, wide.write(columns, accumulate), accumulate)])

    def update(
        self, label: str, graph: Graph, arrays: Mapping[str, Array], table: StepTable, *,
        groups: Sequence[slice] = (), advance: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """arrays[k] = graph[k] over vectors, scalars by group; see Backend."""
        shape, dtype = common(label, arrays, {k: arrays[k] for k in graph})
        used = {k: arrays[k] for k in free_names(*graph.values()) if k in arrays}
        writes = {k: arrays[k] for k in graph}
        calls: list[Call] = []
        for i, part in enumerate(groups or [slice(None)]):
            reads, outs = ({k: a[part] if a.size > 1 else a for k, a in d.items()} for d in (used, writes))
            extent = outs[next(iter(outs))].shape
            calls += self._map(graph, reads, outs, extent, dtype, table, f" [{i}]" if groups else "", applied=True)
        steps = _numpy(table)
        if advance:
            calls.append(self._advance(steps, True))
        more = {"counters": steps.counters, "row": steps.row} if advance else {}
        return _launch(label, what, used, {**writes, **more}, flops_of(graph, shape), calls)

    def gradient_norm(self, g: Array, table: StepTable, *, clip: float, dynamic: bool) -> Launch:
        """The norm of the gradient and what follows from it; see Backend."""
        call = self._gradient_norm(g, steps := _numpy(table), clip, dynamic)
        what = f"n = ‖g‖; g is scaled by min(1, {clip:g} / n) in the update" if math.isfinite(clip) else "n = ‖g‖"
        return _launch("gradient norm", what, {"g": g}, {"control": steps.control}, 2 * g.size, [call])

    def _gradient_norm(self, g: Array, steps: NumpyStepTable, clip: float, dynamic: bool) -> Call:
        control, work = steps.control, np.empty((), g.dtype)
        flat = g.reshape(-1)

        def follow() -> None:
            np.dot(flat, flat, work)
            norm, scale = math.sqrt(work), float(control[0])
            ok = math.isfinite(norm)
            control[1] = min(1.0, clip * scale / norm if norm else 1.0) / scale if ok else 0.0
            control[2] = ok
            if dynamic:
                control[3] = control[3] + 1 if ok else 0
                if not ok:
                    control[0] = max(scale / 2, 1.0)
                elif control[3] >= GROWTH_STEPS:
                    control[0], control[3] = min(scale * 2, LARGEST_SCALE), 0

        return follow

    # ---- products, copies, reductions

    def gemm(
        self, a: Array, b: Array, out: Array, *, transpose_a: bool = False, transpose_b: bool = False,
        accumulate: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """out = op(a) @ op(b); see Backend."""
        common("gemm", {"out": out}, {}, extra=(a, b))
        expect("gemm", a.ndim >= 2 and b.ndim >= 2, f"{a.shape} @ {b.shape} into {out.shape}")
        wide = Wide()
        rounding: list[Call] = []
        left, right = (rows.as_tf32(wide.read(x), rounding) if tf32() else wide.read(x) for x in (a, b))
        left, right = left.swapaxes(-1, -2) if transpose_a else left, right.swapaxes(-1, -2) if transpose_b else right
        (m, k), n = left.shape[-2:], right.shape[-1]
        stacks = {s for s in (a.shape[:-2], b.shape[:-2]) if s}
        fits = right.shape[-2] == k and len(stacks) <= 1 and out.shape == (*next(iter(stacks), ()), m, n)
        expect("gemm", fits and out.ndim <= 3, f"{left.shape} @ {right.shape} into {out.shape}")
        what = what or f"out {'+' * accumulate}= a{'ᵀ' * transpose_a} @ b{'ᵀ' * transpose_b}"
        calls = wide.around([*rounding, *self._gemm(left, right, wide.write(out, accumulate), accumulate)])
        return _launch("gemm", what, {"a": a, "b": b}, {"out": out}, 2 * out.size * k, calls)

    def _gemm(self, left: Array, right: Array, out: Array, accumulate: bool) -> list[Call]:
        product = np.dot if out.ndim == 2 else np.matmul  # dot reaches BLAS half a microsecond sooner
        return rows.adding(partial(product, left, right), out, accumulate)

    def copy(self, x: Array, out: Array, *, accumulate: bool = False) -> Launch:
        """out = x broadcast; see Backend."""
        expect("copy", np.broadcast_shapes(x.shape, out.shape) == out.shape, f"{x.shape} into {out.shape}")
        return _launch("copy", f"out {'+' * accumulate}= x", {"x": x}, {"out": out}, 0, self._copy(x, out, accumulate))

    def _copy(self, x: Array, out: Array, accumulate: bool) -> list[Call]:
        if not accumulate:
            return [partial(np.copyto, out, x, "unsafe")]  # from one float type to another, where they differ
        wide = Wide()
        into, from_ = wide.write(out, keep=True), wide.read(x)
        return wide.around([partial(np.add, into, from_, into)])

    def fill(self, out: Array, value: float) -> Launch:
        """out = value; see Backend."""
        return _launch("fill", f"out = {value:g}", {}, {"out": out}, 0, [partial(out.fill, value)])

    def reduce(self, kind: str, x: Array, axes: tuple[int, ...], out: Array, *, accumulate: bool = False) -> Launch:
        """out = kind of x over the axes; see Backend."""
        reduced = tuple(n for i, n in enumerate(x.shape) if i not in axes)
        expect(kind, kind in REDUCTIONS and out.shape == reduced, f"{x.shape} over axes {axes} into {out.shape}")
        expect(kind, x.flags.c_contiguous, f"x of shape {x.shape} is not C-contiguous")
        wide = Wide()
        from_, to = wide.read(x), wide.write(out, accumulate)
        into = np.empty_like(to) if accumulate else to
        calls = _reduction(kind, from_, axes, into)
        if accumulate:
            calls.append(partial(np.add, to, into, to))
        return _launch(kind, f"{kind} over axes {axes}", {"x": x}, {"out": out}, x.size, wide.around(calls))

    def gather(self, x: Array, index: Array, out: Array) -> Launch:
        """out[:, i] = x[:, index[i]]; see Backend."""
        expect("gather", out.shape == (x.shape[0], index.size, x.shape[2]), f"{x.shape} into {out.shape}")
        call = partial(x.take, index.reshape(-1), 1, out, "clip")  # any other mode buffers `out`
        return _launch("gather", "out[:, i] = x[:, index[i]]", {"x": x, "index": index}, {"out": out}, 0, [call])

    def scatter_add(self, dy: Array, index: Array, out: Array, *, live: bool = False) -> Launch:
        """out[:, index[i]] += dy[:, i], by the index as it is at the time; see Backend."""
        expect("scatter_add", dy.shape == (out.shape[0], index.size, out.shape[2]), f"{dy.shape} into {out.shape}")
        where: Any = (slice(None), index.reshape(-1))
        wide = Wide()
        calls = wide.around([partial(np.add.at, wide.write(out, keep=True), where, wide.read(dy))])
        what = "out[:, index[i]] += dy[:, i]"
        return _launch("scatter_add", what, {"dy": dy, "index": index}, {"out": out}, dy.size, calls)

    # ---- the training step

    def feed(
        self, source_x: Array, source_y: Array | None, order: Array, table: StepTable, x: Array, y: Array | None,
        scale: float,
    ) -> Launch:  # fmt: skip
        """x, y = this step's rows of the data in the given order; see Backend."""
        expect_rows(source_x, source_y, x, y)
        call = self._feed(source_x, source_y, order, _numpy(table), x, y, scale)
        writes = {"x": x} | ({} if y is None else {"y": y})
        reads = writes | {"x": _like(source_x, x)}  # bytes are those of the batch, not of all the data
        return _launch("feed", "the batch's rows of the data", reads, writes, 0, [call])

    def _feed(
        self, source_x: Array, source_y: Array | None, order: Array, steps: NumpyStepTable, x: Array, y: Array | None,
        scale: float,
    ) -> Call:  # fmt: skip
        n, factor = len(x), np.array(scale, arithmetic(x.dtype))
        same = source_x.dtype == x.dtype and scale == 1

        def take() -> None:
            start = steps.offset()
            batch = order[start : start + n]
            if same:
                source_x.take(batch, 0, x, "clip")
            else:
                np.multiply(source_x[batch], factor, x, casting="unsafe")
            if source_y is not None:
                source_y.take(batch, 0, y, "clip")

        return take

    def softmax_cross_entropy(
        self, x: Array, target: Array, dx: Array, total: Array, *, w: Array | None = None,
        table: StepTable | None = None, tally: Tally | None = None, count: bool = False,
    ) -> Launch:  # fmt: skip
        """total and dx of the rows; see Backend."""
        expect_softmax(x, target, dx, w)
        calls = self._softmax_cross_entropy(x, target, dx, total, w, table, tally, count)
        reads = {"x": x, "target": target} | ({} if w is None else {"w": w})
        writes = {"dx": dx, "total": total} | _buffers(tally)
        what = softmax_equation(w is not None, table is not None)
        return _launch("softmax_cross_entropy", what, reads, writes, 8 * x.size, calls)

    def _softmax_cross_entropy(
        self, x: Array, target: Array, dx: Array, total: Array, w: Array | None, table: StepTable | None,
        tally: Tally | None, count: bool,
    ) -> list[Call]:  # fmt: skip
        wide = Wide()
        logits, t, out = wide.read(x), wide.read(target), wide.write(dx)
        calls = rows.softmax_cross_entropy(logits, t, out, total, w)
        if table is not None:
            share, scale = _numpy(table).scalar("1 / weight"), table.control[:1].reshape(())
            factor = np.empty((), out.dtype)
            calls += [partial(np.multiply, share, scale, factor), partial(np.multiply, out, factor, out)]
        if tally is not None:
            calls.append(_tally(tally).adding(total, _numpy(table)))
        if tally is not None and count:
            calls.append(_tally(tally).counting(logits, target))
        return wide.around(calls)

    def top1(self, x: Array, labels: Array, tally: Tally) -> Launch:
        """tally += rows whose largest element stands at the label; see Backend."""
        wide, counts = Wide(), _tally(tally)
        calls = wide.around([counts.counting(wide.read(x), labels)])
        reads, writes = {"x": x, "labels": labels}, {"correct": counts.correct}
        return _launch("top1", "correct += argmax(x) == label", reads, writes, x.size, calls)

    def normalize(
        self, x: Array, gain: Array, bias: Array, axis: int, eps: float, out: Array, mean: Array, variance: Array,
        rstd: Array,
    ) -> Launch:  # fmt: skip
        """Standardise along the axis, then scale and shift; see Backend."""
        reads = {"x": x, "gain": gain, "bias": bias}
        writes = {"out": out, "mean": mean, "variance": variance, "rstd": rstd}
        calls = self._normalize(axis, eps, reads.values(), writes.values())
        return _launch("normalize", "out = gain · (x − mean) / √(var + eps) + bias", reads, writes, 8 * x.size, calls)

    def _normalize(self, axis: int, eps: float, reads: Iterable[Array], writes: Iterable[Array]) -> list[Call]:
        wide = Wide()
        return wide.around(rows.normalize(axis, eps, *map(wide.read, reads), *map(wide.write, writes)))

    def normalize_backward(
        self, dy: Array, x: Array, gain: Array, mean: Array, rstd: Array, axis: int, dx: Array | None,
        dgain: Array | None, dbias: Array | None, accumulate: tuple[bool, bool, bool],
    ) -> Launch:  # fmt: skip
        """All three gradients of `normalize`; see Backend."""
        reads = {"dy": dy, "x": x, "gain": gain, "mean": mean, "rstd": rstd}
        outs = {"dx": dx, "dgain": dgain, "dbias": dbias}
        calls = self._normalize_backward(axis, accumulate, reads.values(), outs.values())
        writes = {k: v for k, v in outs.items() if v is not None}
        what = "dx = rstd · (d − mean(d) − x̂ · mean(d · x̂)), d = gain · dy; gain and bias gradients"
        return _launch("normalize_backward", what, reads, writes, 12 * dy.size, calls)

    def _normalize_backward(
        self, axis: int, accumulate: tuple[bool, bool, bool], reads: Iterable[Array], outs: Iterable[Array | None]
    ) -> list[Call]:
        wide = Wide()
        r = map(wide.read, reads)
        w = (None if a is None else wide.write(a, adds) for a, adds in zip(outs, accumulate, strict=True))
        return wide.around(rows.normalize_backward(axis, accumulate, *r, *w))

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
        calls = self._dropout(x, rate, seed, site, step, out, accumulate)
        what = f"out {'+' * accumulate}= x / {1 - rate:g} where kept, else 0"
        return _launch("dropout", what, {"x": x}, {"out": out}, x.size, calls)

    def _dropout(
        self, x: Array, rate: float, seed: int, site: int, step: StepTable | int, out: Array, accumulate: bool
    ) -> list[Call]:
        wide, number = Wide(), _number(step)
        return wide.around(
            rows.dropout(wide.read(x), rate, seed, site, number, wide.write(out, accumulate), accumulate)
        )

    def noise(self, x: Array, sigma: float, seed: int, site: int, step: StepTable | int, out: Array) -> Launch:
        """out = x + sigma · N(0, 1); see Backend."""
        calls = self._noise(x, sigma, seed, site, step, out)
        return _launch("noise", f"out = x + {sigma:g} · N(0, 1)", {"x": x}, {"out": out}, 2 * x.size, calls)

    def _noise(self, x: Array, sigma: float, seed: int, site: int, step: StepTable | int, out: Array) -> list[Call]:
        wide = Wide()
        return wide.around(rows.noise(wide.read(x), sigma, seed, site, _number(step), wide.write(out)))

    def accumulate_loss(self, total: Array, table: StepTable, tally: Tally) -> Launch:
        """tally += total; see Backend."""
        sums = _tally(tally)
        call = self._accumulate_loss(total, _numpy(table), sums)
        return _launch("accumulate_loss", "loss += total", {"total": total}, sums.buffers, 1, [call])

    def _accumulate_loss(self, total: Array, steps: NumpyStepTable, sums: NumpyTally) -> Call:
        return sums.adding(total, steps)

    def advance(self, table: StepTable, *, applies: bool = True) -> Launch:
        """Move on to the next row; see Backend."""
        steps = _numpy(table)
        writes = {"counters": steps.counters, "row": steps.row}
        return _launch("advance", "next row of the step table", {}, writes, 0, [self._advance(steps, applies)])

    def _advance(self, steps: NumpyStepTable, applies: bool) -> Call:
        return partial(steps.advance, applies)


# ---- checks and shorthands -----------------------------------------------------------------------------------------


def _launch(
    label: str, what: str, reads: Mapping[str, Array], writes: Mapping[str, Array], flops: int, calls: Sequence[Call]
) -> Launch:
    return Launch(label, what, tuple(reads.values()), tuple(writes.values()), flops, Calls(calls))


def _scalars(
    graph: Graph, reads: Mapping[str, Array], table: StepTable | None, suffix: str = "", *, applied: bool = False
) -> tuple[Graph, Mapping[str, Array]]:
    """The graph with its expressions of scalars alone as names, and those names' places in the step table."""
    if table is None:
        return graph, {}
    inner, hoisted = hoist(graph, reads)
    steps = _numpy(table)
    return inner, {k: steps.scalar(describe(e) + suffix, applied=applied) for k, e in hoisted.items()}


def _elementwise(
    graph: Graph, reads: Mapping[str, Array], writes: Mapping[str, Array], shape: tuple[int, ...],
    dtype: np.dtype[Any], scalars: Mapping[str, Array] = MappingProxyType({}),
    after: Callable[[Array, int], list[Call]] | None = None,
) -> list[Call]:  # fmt: skip
    wide = Wide()
    inputs = {k: wide.read(a) for k, a in reads.items()}
    outputs = {k: wide.write(a) for k, a in writes.items()}
    return wide.around(chunked.bind(graph, {**inputs, **scalars}, outputs, shape, dtype, workspace(), after))


def _reduction(kind: str, x: Array, axes: tuple[int, ...], out: Array) -> list[Call]:
    """The calls for out = kind of x over the axes."""
    calls: list[Call] = []
    size = x.size
    if kind in ("max", "min") or x.dtype != np.float32 or not x.size:
        calls.append(partial(REDUCTIONS[kind].reduce, x, axes, None, out))
    else:
        steps = reduction_steps(x.shape, axes)
        for i, (outer, length, inner) in enumerate(steps):
            sums = out if i == len(steps) - 1 else np.empty(outer * inner, x.dtype)
            calls += rows.line_sum(x.reshape(outer, length, inner), sums.reshape(outer, inner))
            x = sums
    if kind == "mean":
        calls.append(partial(np.multiply, out, np.array(out.size / max(1, size), out.dtype), out))
    return calls


def _like(source: Array, x: Array) -> Array:
    """An array of x's shape and the source's dtype that takes no memory: for counting bytes."""
    return np.broadcast_to(np.empty((), source.dtype), x.shape)


def _numpy(table: StepTable | None) -> NumpyStepTable:
    return owned(NumpyStepTable, table, "step table")


def _number(step: StepTable | int) -> Callable[[], int]:
    """The number of the step in force."""
    return (lambda: int(step)) if isinstance(step, int | np.integer) else _numpy(step).step


def _tally(tally: Tally) -> NumpyTally:
    return owned(NumpyTally, tally, "tally")


def _buffers(tally: Tally | None) -> dict[str, Array]:
    return {} if tally is None else _tally(tally).buffers
