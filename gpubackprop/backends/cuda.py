"""The CUDA backend: every primitive bound to fused kernels and cuBLAS products over a thin driver."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import cpp, geometry
from gpubackprop.backends.arguments import Formula, steps_of
from gpubackprop.backends.base import (
    GROWTH_STEPS,
    Buffer,
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
    is_on_device,
    one_per_row,
    owned,
    softmax_equation,
    tf32,
    too_large,
    workspace,
)  # fmt: skip
from gpubackprop.backends.cuda_state import CudaStaging, CudaStepTable, CudaTally, Lent, Streams
from gpubackprop.backends.driver import Driver, Gemm
from gpubackprop.backends.geometry import (
    Geometry,
    broadcast_geometry,
    collapse,
    columns_geometry,
    elementwise_geometry,
    layout,
    sum_geometry,
)
from gpubackprop.backends.launcher import Bound, Launcher
from gpubackprop.formulas import apply, describe, free_names, name

__all__ = ["CudaBackend", "gemm_arguments"]

Buffers = Mapping[str, Buffer]
NOTHING: Buffers = MappingProxyType({})


class CudaBackend:
    """Buffers and launches on the device of a driver."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.device = driver.device
        self.xp = driver.xp
        self._launcher = Launcher(driver)
        self.streams = Streams(driver)
        self._own = threading.local()  # the stream that a thread's graphs are captured and replayed on

    def __repr__(self) -> str:
        return f"{type(self).__name__}(device={self.device!r})"

    # ---- buffers

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Buffer:
        """An uninitialised buffer."""
        with self.driver.scope():
            return self.driver.empty(shape, dtype)

    def asarray(self, array: Any, dtype: npt.DTypeLike | None = None) -> Buffer:
        """The array as a buffer: one of this device as it is, without a copy, one of the host copied here."""
        if is_on_device(array):
            with self.driver.scope():
                return self.driver.wrap(array)
        host = np.asarray(array, dtype, order="C")
        buffer = self.empty(host.shape, host.dtype)
        self.write(buffer, host)
        return buffer

    def to_numpy(self, buffer: Buffer) -> npt.NDArray[Any]:
        """A copy on the host, after all that the current stream was given."""
        if not buffer.flags.c_contiguous:
            packed = self.empty(buffer.shape, buffer.dtype)
            self.copy(buffer, packed).run()
            buffer = packed
        host = np.empty(buffer.shape, buffer.dtype)
        if host.size:
            with self.driver.scope():
                self.driver.copy(buffer, host, self.driver.current())
        return host

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""
        with self.driver.scope():
            return self.driver.memory()

    def write(self, buffer: Buffer, value: Any) -> None:
        """buffer[...] = value: a buffer or host array of its shape, or a number; contiguous."""
        on_device = is_on_device(value)
        source = value if on_device else np.ascontiguousarray(np.broadcast_to(value, buffer.shape), buffer.dtype)
        if on_device and source.dtype != buffer.dtype:
            self.copy(source, buffer).run()
        elif source.size:
            with self.driver.scope():
                self.driver.copy(source, buffer, self.driver.current())

    def synchronize(self) -> None:
        """Wait until the device has done what the current stream was given."""
        with self.driver.scope():
            self.driver.synchronize(self.driver.current())

    def step_table(self, columns: Sequence[str], dtype: npt.DTypeLike, steps: int) -> CudaStepTable:
        """A step table with these columns and room for that many rows."""
        return CudaStepTable(self, columns, dtype, steps)

    def tally(self, dtype: npt.DTypeLike) -> CudaTally:
        """A tally of zeros."""
        return CudaTally(self, dtype)

    def staging(
        self, x: npt.NDArray[Any], y: npt.NDArray[Any], w: npt.NDArray[Any] | None, rows: int
    ) -> CudaStaging | None:
        """Places for batches of data that would take more than half of the free memory; see Backend."""
        free, _ = self.memory()
        return CudaStaging(self, x, y, w, rows) if too_large(x.nbytes + y.nbytes, free) else None

    # ---- sequences and graphs

    def sequence(self, launches: Sequence[Launch]) -> Bound:
        """One call that runs the launches in order, unrolled into one flat list."""
        return Bound.of(self.driver, [_bound(launch) for launch in launches])

    def capture(self, launches: Sequence[Launch]) -> Callable[[], object]:
        """One call that runs the launches as one graph, between what the current stream has and will be given."""
        driver, body = self.driver, self.sequence(launches)
        if not hasattr(self._own, "lent"):
            self._own.lent = self.streams.lend()
        lent: Lent = self._own.lent
        own = lent.stream
        with driver.scope():
            graph = driver.capture(own, lambda: body.on(own))

        def replay() -> None:
            with driver.scope():
                current = driver.current()
                driver.order(current, own)
                graph(own)
                driver.order(own, current)

        replay.kept = body, lent  # type: ignore[attr-defined]
        return replay

    # ---- elementwise

    def elementwise(
        self, label: str, graph: Graph, reads: Buffers, writes: Buffers, *, table: StepTable | None = None,
        accumulate: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """writes[k] = graph[k], element by element; see Backend."""
        if accumulate:
            graph = {k: apply("+", name(k), e) for k, e in graph.items()}
            reads = {**reads, **writes}
        shape, _ = common(label, reads, writes)
        what = what or "; ".join(f"{k} = {describe(e)}" for k, e in graph.items())
        formula = Formula(graph, reads, writes, table and _cuda(table), self.driver.address)
        per_column = formula.per_column(shape)
        if formula.irregular(shape) == per_column:
            call = self._map(label, formula, shape, per_column)
        else:
            call = self._broadcast(label, formula, shape)
        return self._launch(label, what, reads, writes, flops_of(graph, shape), [call])

    def _map(self, label: str, formula: Formula, shape: tuple[int, ...], per_column: tuple[str, ...]) -> Bound:
        members = max((math.prod(formula.arrays[k].shape[:-1]) for k in per_column), default=1)
        columns = shape[-1] if per_column else math.prod(shape)
        rows = math.prod(shape) // (members * columns)
        source, kernel = formula.source("Kernel", label, per_column=per_column)
        place = elementwise_geometry(rows, columns, members, formula.lanes)
        return self._formula_kernel(source, kernel, formula, place, rows=rows, columns=columns, members=members)

    def _broadcast(self, label: str, formula: Formula, shape: tuple[int, ...]) -> Bound:
        source, kernel = formula.source("Broadcast", label)
        sizes, strides = collapse(
            shape, [_contiguous(shape), *(steps_of(formula.arrays[k], shape) for k in formula.reads)]
        )
        rows, columns = math.prod(sizes[:-1]), sizes[-1] if sizes else 1
        place = broadcast_geometry(rows, columns, formula.lanes)
        return self._formula_kernel(source, kernel, formula, place, formula.reads, rows=rows,
                                    layout=layout(sizes, strides[1:]))  # fmt: skip

    def elementwise_sum(
        self, label: str, graph: Graph, reads: Buffers, total: Buffer, writes: Buffers = NOTHING, *,
        table: StepTable | None = None, tally: Tally | None = None, what: str = "",
    ) -> Launch:  # fmt: skip
        """total = Σ graph["total"]; writes[k] = graph[k]; see Backend."""
        shape, _ = common(label, {**reads, "total": total}, writes)
        what = what or f"total = Σ {describe(graph['total'])}"
        size = math.prod(shape)
        if not size:
            return self.fill(total, 0.0)
        formula = Formula(graph, reads, writes, table and _cuda(table), self.driver.address)
        per_row = formula.irregular(shape)
        fits = all(one_per_row(formula.arrays[k], shape) for k in per_row)
        expect(label, fits, f"operands of {shape} that broadcast")
        source, kernel = formula.source("Sum", label, per_row=per_row)
        state = None if table is None and tally is None else _cuda(table).state
        place = sum_geometry(size, formula.lanes)
        more: dict[str, Any] = {"total": total, "state": state, "size": size} | _tallied(tally)
        more |= {"columns": math.prod(shape[1:])} if per_row else {}
        call = self._formula_kernel(source, kernel, formula, place, **more)
        flops = flops_of(graph, shape) + size
        return self._launch(label, what, reads, {"total": total, **writes, **_buffers(tally)}, flops, [call])

    def elementwise_columns(
        self, label: str, graph: Graph, reads: Buffers, out: Buffer, columns: Buffer, *, accumulate: bool = False,
        what: str = "",
    ) -> Launch:  # fmt: skip
        """out = graph and columns = its column sums; see Backend."""
        [(key, root)] = graph.items()
        shape, _ = common(label, reads, {key: out})
        expect(label, columns.shape == shape[:-2] + shape[-1:], f"column sums {columns.shape} of {shape}")
        formula = Formula(graph, reads, {key: out}, None, self.driver.address)
        expect(label, not formula.irregular(shape), f"operands of {shape} that broadcast")
        what = what or f"{key} = {describe(root)}; columns = Σ {key}"
        writes = {key: out, "columns": columns} if formula.writes else {"columns": columns}
        rows, n, members = shape[-2], shape[-1], math.prod(shape[:-2])
        calls = []
        if rows:
            source, kernel = formula.source("Columns", label)
            place = columns_geometry(rows, n, members, formula.lanes)
            calls.append(self._formula_kernel(source, kernel, formula, place, sums=columns, accumulate=accumulate,
                                              rows=rows, columns=n, members=members))  # fmt: skip
        elif not accumulate:
            return self.fill(columns, 0.0)
        return self._launch(label, what, reads, writes, flops_of(graph, shape) + out.size, calls)

    def update(
        self, label: str, graph: Graph, arrays: Buffers, table: StepTable, *, groups: Sequence[slice] = (),
        advance: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """arrays[k] = graph[k] over vectors, scalars by group; see Backend."""
        writes = {k: arrays[k] for k in graph}
        reads = {k: arrays[k] for k in free_names(*graph.values()) if k in arrays}
        shape, _ = common(label, reads, writes)
        steps, suffix = _cuda(table), " [0]" if groups else ""
        formula = Formula(graph, reads, writes, table, self.driver.address, suffix)
        expect(label, not formula.irregular(shape), f"{shape}")
        options = {"row": 1, "groups": bool(groups), "advance": advance}
        source, kernel = formula.source("Kernel", label, **options)
        more: dict[str, Any] = {}
        if groups:
            each = np.concatenate([np.full(-(-(p.stop - p.start) // 64), i, np.uint8) for i, p in enumerate(groups)])
            more |= {"groups": self.asarray(each), "stride": formula.stride(steps, " [1]")}
        if advance:
            more |= {"state": steps.state, "control": steps.control}
        size = math.prod(shape)
        place = elementwise_geometry(1, size, 1, formula.lanes)
        call = self._formula_kernel(source, kernel, formula, place, rows=1, columns=size, members=1, **more)
        moved = {"state": steps.state} if advance else {}
        return self._launch(label, what, reads, {**writes, **moved}, flops_of(graph, shape), [call])

    def _formula_kernel(
        self, source: str, kernel: str, formula: Formula, place: Geometry, strided: Sequence[str] = (), **more: Any
    ) -> Bound:
        return self._kernel(
            source, kernel, {"T": formula.dtype}, place, formula.arrays | formula.places | more, strided
        )

    # ---- products, copies, reductions

    def gemm(
        self, a: Buffer, b: Buffer, out: Buffer, *, transpose_a: bool = False, transpose_b: bool = False,
        accumulate: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """out = op(a) @ op(b); see Backend."""
        common("gemm", {"out": out}, {}, extra=(a, b))
        expect("gemm", a.ndim >= 2 and b.ndim >= 2, f"{a.shape} @ {b.shape} into {out.shape}")
        m, k = a.shape[-2:][:: -1 if transpose_a else 1]
        k_b, n = b.shape[-2:][:: -1 if transpose_b else 1]
        stacks = {s for s in (a.shape[:-2], b.shape[:-2]) if s}
        fits = k == k_b and len(stacks) <= 1 and out.shape == (*next(iter(stacks), ()), m, n) and out.ndim <= 3
        expect("gemm", fits, f"{(m, k)} @ {(k_b, n)} into {out.shape}")
        for label, x in (("a", a), ("b", b), ("out", out)):
            expect("gemm", x.flags.c_contiguous, f"{label} of shape {x.shape} is not C-contiguous")
        if k == 0:  # a sum of nothing, whose operands lie nowhere
            return self.fill(out, 0.0) if not accumulate else self._launch("gemm", what, {}, {"out": out}, 0, [])
        arguments = gemm_arguments(
            a, b, out, transpose_a, transpose_b, accumulate, self.driver.address, "tf32" if tf32() else "float32"
        )
        what = what or f"out {'+' * accumulate}= a{'ᵀ' * transpose_a} @ b{'ᵀ' * transpose_b}"
        with self.driver.scope():
            call = Bound(self.driver, [self.driver.gemm(arguments)], (a, b, out))
        return self._launch("gemm", what, {"a": a, "b": b}, {"out": out}, 2 * out.size * k, [call])

    def copy(self, x: Buffer, out: Buffer, *, accumulate: bool = False) -> Launch:
        """out = x broadcast, strided, cast; see Backend."""
        expect("copy", np.broadcast_shapes(x.shape, out.shape) == out.shape, f"{x.shape} into {out.shape}")
        types = {"T": _float(x, out), "S": x.dtype, "O": out.dtype}
        source = cpp.file_unit("copy.cu", types["T"].name, SOURCE=x.dtype.name, OUTPUT=out.dtype.name)
        sizes, (to, of) = collapse(out.shape, [steps_of(out, out.shape), steps_of(x, out.shape)])
        arguments = {"out": out, "x": x, "accumulate": accumulate}
        wider = max(x.dtype.itemsize, out.dtype.itemsize)
        if to == of == [1][: len(sizes)]:
            kernel, place = "copy_flat", geometry.flat_geometry(out.size, wider)
            arguments |= {"size": out.size}
        elif len(sizes) == 2 and to == [sizes[1], 1] and of == [1, sizes[0]]:
            kernel, place = "transpose", geometry.transpose_geometry(sizes[1], sizes[0])
            arguments |= {"rows": sizes[1], "columns": sizes[0]}
        else:
            kernel, place = "copy", geometry.slices_geometry(math.prod(sizes[:-1]), sizes[-1], wider)
            arguments |= {"layout": _copy_layout(sizes, to, of)}
        call = self._kernel(source, kernel, types, place, arguments, strided=("out", "x"))
        return self._launch("copy", f"out {'+' * accumulate}= x", {"x": x}, {"out": out}, 0, [call])

    def fill(self, out: Buffer, value: float) -> Launch:
        """out = value; see Backend."""
        source = cpp.file_unit("copy.cu", _float(out).name, OUTPUT=out.dtype.name)
        types = {"T": _float(out), "O": out.dtype}
        shape = geometry.flat_geometry(out.size, out.dtype.itemsize)
        call = self._kernel(source, "fill", types, shape, {"out": out, "value": value, "size": out.size})
        return self._launch("fill", f"out = {value:g}", {}, {"out": out}, 0, [call])

    def reduce(self, kind: str, x: Buffer, axes: tuple[int, ...], out: Buffer, *, accumulate: bool = False) -> Launch:
        """out = kind of x over the axes; see Backend."""
        reduced = tuple(n for i, n in enumerate(x.shape) if i not in axes)
        fits = kind in ("sum", "mean", "max", "min") and out.shape == reduced
        expect(kind, fits, f"{x.shape} over axes {axes} into {out.shape}")
        steps = geometry.reduction_steps(x.shape, axes)
        calls, source = [], x
        for i, (outer, length, inner) in enumerate(steps):
            last = i == len(steps) - 1
            to = out if last else self.empty((outer * inner,), arithmetic(x.dtype))
            calls.append(self._reduction(kind, source, (outer, length, inner), to, accumulate and last))
            source = to
        return self._launch(kind, f"{kind} over axes {axes}", {"x": x}, {"out": out}, x.size, calls)

    def _reduction(self, kind: str, x: Buffer, lengths: tuple[int, int, int], out: Buffer, accumulate: bool) -> Bound:
        types = {"T": _float(x, out), "S": x.dtype, "O": out.dtype}
        source = cpp.file_unit("reduce.cu", types["T"].name, SOURCE=x.dtype.name, OUTPUT=out.dtype.name)
        outer, length, inner = lengths
        arguments = {"out": out, "x": x, "accumulate": accumulate, "outer": outer, "length": length, "inner": inner}
        shape = geometry.reduce_geometry(outer, length, inner, x.dtype.itemsize)
        return self._kernel(source, f"reduce_{kind}", types, shape, arguments)

    def gather(self, x: Buffer, index: Buffer, out: Buffer) -> Launch:
        """out[:, i] = x[:, index[i]]; see Backend."""
        outer, length, inner = x.shape
        expect("gather", out.shape == (outer, index.size, inner), f"{x.shape} into {out.shape}")
        arguments = {"out": out, "x": x, "index": index, "outer": outer, "length": length, "count": index.size}
        place = geometry.slices_geometry(outer * index.size, inner, x.dtype.itemsize)
        call = self._file_kernel("gather.cu", "gather", x, place, {**arguments, "inner": inner})
        return self._launch("gather", "out[:, i] = x[:, index[i]]", {"x": x, "index": index}, {"out": out}, 0, [call])

    def scatter_add(self, dy: Buffer, index: Buffer, out: Buffer, *, live: bool = False) -> Launch:
        """out[:, index[i]] += dy[:, i]: each target adds up its rows in their order; see Backend."""
        outer, length, inner = out.shape
        expect("scatter_add", dy.shape == (outer, index.size, inner), f"{dy.shape} into {out.shape}")
        what, reads = "out[:, index[i]] += dy[:, i]", {"dy": dy, "index": index}
        if live:
            numbers = {"outer": outer, "length": length, "count": index.size, "inner": inner}
            shape = geometry.slices_geometry(outer * index.size, inner, dy.dtype.itemsize)
            call = self._file_kernel("gather.cu", "scatter_add_live", dy, shape, {"out": out, **reads, **numbers})
            return self._launch("scatter_add", what, reads, {"out": out}, dy.size, [call])
        host = self.to_numpy(index).reshape(-1)
        order = np.argsort(host, kind="stable")
        targets, starts = np.unique(host[order], return_index=True)
        tables = {"permutation": order, "starts": np.append(starts, len(order)), "targets": targets}
        device = {k: self.asarray(v, np.int64) for k, v in tables.items()}
        numbers = {"segments": len(targets), "outer": outer, "length": length, "count": index.size, "inner": inner}
        shape = geometry.slices_geometry(outer * len(targets), inner, dy.dtype.itemsize)
        call = self._file_kernel("gather.cu", "scatter_add", dy, shape, {"out": out, "dy": dy, **device, **numbers})
        return self._launch("scatter_add", what, reads, {"out": out}, dy.size, [call])

    # ---- the training step

    def feed(
        self, source_x: Buffer, source_y: Buffer | None, order: Buffer, table: StepTable, x: Buffer, y: Buffer | None,
        scale: float,
    ) -> Launch:  # fmt: skip
        """x, y = this step's rows of the data in the given order; see Backend."""
        expect_rows(source_x, source_y, x, y)
        steps, like = _cuda(table), x if y is None else y
        types = {"T": _float(x), "S": source_x.dtype, "O": x.dtype, "Y": like.dtype}
        source = cpp.file_unit("feed.cu", types["T"].name, SOURCE=source_x.dtype.name, OUTPUT=x.dtype.name,
                               TARGET=like.dtype.name)  # fmt: skip
        arguments = {
            "x": x, "y": y, "source_x": source_x, "source_y": source_y, "permutation": order, "offsets": steps.offsets,
            "state": steps.state, "scale": scale, "rows": len(x), "columns_x": x.shape[1],
            "columns_y": math.prod(like.shape[1:]),
        }  # fmt: skip
        shape = geometry.feed_geometry(len(x), x.shape[1], x.dtype.itemsize)
        call = self._kernel(source, "feed", types, shape, arguments)
        writes = {"x": x} | ({} if y is None else {"y": y})
        reads = writes | {"x": _Extent(x.size * source_x.dtype.itemsize, source_x)}
        return self._launch("feed", "the batch's rows of the data", reads, writes, 0, [call])

    def softmax_cross_entropy(
        self, x: Buffer, target: Buffer, dx: Buffer, total: Buffer, *, w: Buffer | None = None,
        table: StepTable | None = None, tally: Tally | None = None, count: bool = False,
    ) -> Launch:  # fmt: skip
        """total and dx of the rows; rows right are counted in any case; see Backend."""
        expect_softmax(x, target, dx, w)
        (rows, classes), labels = x.shape, target.ndim == 1
        arguments = {"dx": dx, "total": total, "x": x, "labels" if labels else "target": target, "rows": rows}
        arguments |= {"classes": classes} | _share(table if tally is None else _cuda(table)) | _tallied(tally)
        arguments |= {} if w is None else {"weights": w}
        weighted, kind = "" if w is None else "_weighted", "labels" if labels else "rows"
        kernel, file = f"softmax_cross_entropy_{kind}{weighted}", f"softmax_cross_entropy{weighted}.cu"
        shape = geometry.softmax_geometry(rows, classes, x.dtype.itemsize)
        call = self._file_kernel(file, kernel, x, shape, arguments)
        reads = {"x": x, "target": target} | ({} if w is None else {"w": w})
        writes, what = {"dx": dx, "total": total, **_buffers(tally)}, softmax_equation(w is not None, table is not None)
        return self._launch("softmax_cross_entropy", what, reads, writes, 8 * x.size, [call])

    def top1(self, x: Buffer, labels: Buffer, tally: Tally) -> Launch:
        """tally += rows whose largest element stands at the label; see Backend."""
        rows, classes = x.shape
        count = _tally(tally).events[1:]
        arguments = {"count": count, "x": x, "labels": labels, "rows": rows, "classes": classes}
        shape = geometry.top1_geometry(rows, classes, x.dtype.itemsize)
        call = self._file_kernel("softmax_cross_entropy.cu", "top1", x, shape, arguments)
        what = "correct += argmax(x) == label"
        return self._launch("top1", what, {"x": x, "labels": labels}, {"correct": count}, x.size, [call])

    def normalize(
        self, x: Buffer, gain: Buffer, bias: Buffer, axis: int, eps: float, out: Buffer, mean: Buffer,
        variance: Buffer, rstd: Buffer,
    ) -> Launch:  # fmt: skip
        """Standardise along the axis, then scale and shift; see Backend."""
        (rows, columns), kind = x.shape, "layer" if axis == 1 else "batch"
        reads = {"x": x, "gain": gain, "bias": bias}
        writes = {"out": out, "mean": mean, "variance": variance, "rstd": rstd}
        find = geometry.layer_norm_geometry if axis == 1 else geometry.batch_norm_geometry
        shape = find(rows, columns, x.dtype.itemsize)
        call = self._file_kernel("normalize.cu", f"{kind}_norm_forward", x, shape,
                                 {**reads, **writes, "eps": eps, "rows": rows, "columns": columns})  # fmt: skip
        what = "out = gain · (x − mean) / √(var + eps) + bias"
        return self._launch("normalize", what, reads, writes, 8 * x.size, [call])

    def normalize_backward(
        self, dy: Buffer, x: Buffer, gain: Buffer, mean: Buffer, rstd: Buffer, axis: int, dx: Buffer | None,
        dgain: Buffer | None, dbias: Buffer | None, accumulate: tuple[bool, bool, bool],
    ) -> Launch:  # fmt: skip
        """All three gradients of `normalize`; see Backend."""
        (rows, columns), kind = x.shape, "layer" if axis == 1 else "batch"
        reads = {"dy": dy, "x": x, "gain": gain, "mean": mean, "rstd": rstd}
        outs = {"dx": dx, "dgain": dgain, "dbias": dbias}
        adds = {f"accumulate_{k}": a for k, a in zip(outs, accumulate, strict=True)}
        find = geometry.layer_norm_backward_geometry if axis == 1 else geometry.batch_norm_geometry
        shape = find(rows, columns, x.dtype.itemsize)
        call = self._file_kernel("normalize.cu", f"{kind}_norm_backward", x, shape,
                                 {**reads, **outs, **adds, "rows": rows, "columns": columns})  # fmt: skip
        what = "dx = rstd · (d − mean(d) − x̂ · mean(d · x̂)), d = gain · dy; gain and bias gradients"
        writes = {k: v for k, v in outs.items() if v is not None}
        return self._launch("normalize_backward", what, reads, writes, 12 * dy.size, [call])

    def dropout(
        self, x: Buffer, rate: float, seed: int, site: int, step: StepTable | int, out: Buffer, *,
        accumulate: bool = False,
    ) -> Launch:  # fmt: skip
        """out = x / (1 − rate) where kept, else 0; see Backend."""
        more = {"threshold": round((1 - rate) * 2**32), "scale": 1 / (1 - rate), "accumulate": accumulate}
        call = self._drawing("dropout", x, out, seed, site, step, more)
        what = f"out {'+' * accumulate}= x / {1 - rate:g} where kept, else 0"
        return self._launch("dropout", what, {"x": x}, {"out": out}, x.size, [call])

    def noise(self, x: Buffer, sigma: float, seed: int, site: int, step: StepTable | int, out: Buffer) -> Launch:
        """out = x + sigma · N(0, 1); see Backend."""
        call = self._drawing("noise", x, out, seed, site, step, {"sigma": sigma})
        return self._launch("noise", f"out = x + {sigma:g} · N(0, 1)", {"x": x}, {"out": out}, 2 * x.size, [call])

    def _drawing(
        self, kernel: str, x: Buffer, out: Buffer, seed: int, site: int, step: StepTable | int, more: Mapping[str, Any]
    ) -> Bound:
        """A kernel in a file of its name that draws random words for the elements of x."""
        fixed = int(step) % 2**32 if isinstance(step, int | np.integer) else None
        arguments = {
            "out": out, "x": x, "size": x.size, "seed": seed % 2**64, "site": site % 2**32, "step": fixed or 0,
            "state": None if fixed is not None else _cuda(step).state,
        }  # fmt: skip
        place = geometry.draws_geometry(x.size, x.dtype.itemsize)
        return self._file_kernel(f"{kernel}.cu", kernel, x, place, {**arguments, **more})

    def gradient_norm(self, g: Buffer, table: StepTable, *, clip: float, dynamic: bool) -> Launch:
        """The norm of the gradient and what follows from it; see Backend."""
        control = _cuda(table).control
        arguments = {"control": control, "g": g, "clip": clip, "dynamic": dynamic, "growth": GROWTH_STEPS}
        call = self._file_kernel("norm.cu", "gradient_norm", g, geometry.norm_geometry(g.size, g.dtype.itemsize),
                                 {**arguments, "size": g.size})  # fmt: skip
        what = f"n = ‖g‖; g is scaled by min(1, {clip:g} / n) in the update" if math.isfinite(clip) else "n = ‖g‖"
        return self._launch("gradient norm", what, {"g": g}, {"control": control}, 2 * g.size, [call])

    def accumulate_loss(self, total: Buffer, table: StepTable, tally: Tally) -> Launch:
        """tally += total; see Backend."""
        sums, steps = _tally(tally), _cuda(table)
        arguments = {"loss": sums.loss, "events": sums.events, "total": total, "state": steps.state}
        call = self._file_kernel("scalars.cu", "accumulate_loss", sums.loss, geometry.one_thread(), arguments)
        return self._launch("accumulate_loss", "loss += total", {"total": total}, sums.buffers, 1, [call])

    def advance(self, table: StepTable, *, applies: bool = True) -> Launch:
        """Move on to the next row; see Backend."""
        steps = _cuda(table)
        arguments = {"state": steps.state, "control": steps.control, "applies": applies}
        call = self._file_kernel("scalars.cu", "advance", steps.control, geometry.one_thread(), arguments)
        return self._launch("advance", "next row of the step table", {}, {"state": steps.state}, 0, [call])

    # ---- binding

    def _launch(
        self, label: str, what: str, reads: Buffers, writes: Buffers, flops: int, calls: Sequence[Bound]
    ) -> Launch:
        return Launch(label, what, tuple(reads.values()), tuple(writes.values()), flops, Bound.of(self.driver, calls))

    def _file_kernel(
        self, file: str, kernel: str, like: Buffer, shape: Geometry, arguments: Mapping[str, Any]
    ) -> Bound:
        """A hand-written kernel whose one type is that of `like`."""
        return self._kernel(cpp.file_unit(file, like.dtype.name), kernel, {"T": like.dtype}, shape, arguments)

    def _kernel(
        self, source: str, kernel: str, types: Mapping[str, Any], shape: Geometry, arguments: Mapping[str, Any],
        strided: Sequence[str] = (),
    ) -> Bound:  # fmt: skip
        """A kernel with the scratch that its geometry asks for; of nothing, no launch."""
        if 0 in shape.grid:
            return Bound.of(self.driver, [])
        wanted = {key for _, key in cpp.signature(source, kernel)}
        scratch: dict[str, Buffer] = {}
        if "partials" in wanted:
            scratch["partials"] = self._scratch("partials", max(1, shape.partials), arithmetic(types["T"]))
        for key in wanted & {"ticket", "tickets"}:
            scratch[key] = self._scratch("tickets", max(1, shape.tickets), np.uint32)
        given = {**scratch, **arguments}
        return self._launcher.bind(source, kernel, types, shape.grid, shape.block, given, strided)

    def _scratch(self, key: str, size: int, dtype: npt.DTypeLike) -> Buffer:
        """Scratch of the workspace in force for the current stream; tickets are zero, and reset themselves.

        Sizes are powers of two, each with a buffer of its own: earlier launches know a smaller one by its address.
        """
        capacity = 1 << max(10, (size - 1).bit_length())
        held, place = workspace().scratch, (self, self.driver.current(), key, np.dtype(dtype), capacity)
        if place not in held:
            held[place] = self.empty((capacity,), dtype)
            self.write(held[place], 0)
        return held[place]


# ---- arguments -----------------------------------------------------------------------------------------------------


def gemm_arguments(
    a: Buffer, b: Buffer, out: Buffer, transpose_a: bool, transpose_b: bool, accumulate: bool,
    address: Callable[[Buffer], int], compute: str,
) -> Gemm:  # fmt: skip
    """out = op(a) @ op(b) of row-major matrices, or stacks, as a column-major product: outᵀ = op(b)ᵀ @ op(a)ᵀ.

    A row-major (r, c) matrix is a column-major (c, r) one with leading dimension c, so the transposes stay as they are.
    """
    m, n = out.shape[-2:]
    k = a.shape[-2 if transpose_a else -1]

    def stride(x: Buffer) -> int:
        return x.shape[-2] * x.shape[-1] if x.ndim == 3 else 0

    return Gemm(
        transpose_a=transpose_b, transpose_b=transpose_a, m=n, n=m, k=k,
        a=address(b), a_type=b.dtype.name, lda=max(1, b.shape[-1]), stride_a=stride(b),
        b=address(a), b_type=a.dtype.name, ldb=max(1, a.shape[-1]), stride_b=stride(a),
        beta=float(accumulate), c=address(out), c_type=out.dtype.name, ldc=max(1, n), stride_c=stride(out),
        batch=out.shape[0] if out.ndim == 3 else 1,
        compute="float64" if out.dtype == np.float64 else compute,
    )  # fmt: skip


def _copy_layout(shape: Sequence[int], out: Sequence[int], x: Sequence[int]) -> list[int]:
    """The numbers of the Layout of kernels/copy.cu: dimensions, sizes, both strides, each of eight places."""
    if len(shape) > 8:
        raise ValueError(f"copy: {len(shape)} dimensions that do not collapse, of at most 8; copy in parts")
    return [len(shape), *(n for part in (shape, out, x) for n in (*part, *[0] * (8 - len(shape))))]


def _contiguous(shape: Sequence[int]) -> list[int]:
    """Strides, in elements, of C order."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _float(*buffers: Buffer) -> np.dtype[Any]:
    """The floating type a kernel of these buffers is compiled for: a 16-bit one if there is, else the widest."""
    floats = [b.dtype for b in buffers if b.dtype.kind not in "iub"] or [np.dtype(np.float32)]
    return next((d for d in floats if d.itemsize == 2), max(floats, key=lambda d: d.itemsize))


class _Extent:
    """Bytes of a buffer that a launch reads only a part of."""

    def __init__(self, nbytes: int, buffer: Buffer) -> None:
        self.nbytes, self.shape, self.dtype, self.base = nbytes, buffer.shape, buffer.dtype, buffer


def _bound(launch: Launch) -> Bound:
    if not isinstance(launch.run, Bound):
        raise TypeError(f"{launch.name}: bound by another backend")
    return launch.run


def _share(table: StepTable | None) -> dict[str, Any]:
    """Where the loss kernels find the share of a row and the scale."""
    if table is None:
        return {"table": None, "state": None, "width": 0, "share_at": -1, "scale": None}
    steps = _cuda(table)
    return {"table": steps.table, "state": steps.state, "width": steps.width,
            "share_at": steps.columns.index("1 / weight"), "scale": steps.control}  # fmt: skip


def _tallied(tally: Tally | None) -> dict[str, Any]:
    return {"loss": None, "events": None} | _buffers(tally)


def _buffers(tally: Tally | None) -> dict[str, Buffer]:
    return {} if tally is None else _tally(tally).buffers


def _cuda(table: Any) -> CudaStepTable:
    return owned(CudaStepTable, table, "step table")


def _tally(tally: Tally) -> CudaTally:
    return owned(CudaTally, tally, "tally")
