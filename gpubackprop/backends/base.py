"""What a backend is: primitives that bind buffers into launches, and what a training step reads and leaves behind."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from gpubackprop.formulas import KEPT, Expr, walk

__all__ = [
    "CONTROL", "GROWTH_STEPS", "LARGEST_SCALE", "Backend", "Buffer", "CaptureError", "Graph", "Launch", "Staging",
    "StepTable", "Tally", "Workspace", "arithmetic", "common", "expect", "expect_rows", "expect_softmax", "flops_of",
    "is_on_device", "one_per_row", "owned", "setting", "shapes_of", "softmax_equation", "tf32", "too_large", "use_tf32",
    "use_workspace", "workspace",
]  # fmt: skip

Buffer = Any  # a NumPy or CuPy array: C-contiguous unless a primitive says otherwise
Graph = Mapping[str, Expr]  # what an elementwise launch assigns: output name -> expression


@dataclass(frozen=True, slots=True, repr=False)
class Launch:
    """One bound call: everything was checked when it was made, `run()` takes no arguments and checks nothing.

    `run` keeps alive all that it works with. What it knows by address alone stands in its `kept`.
    """

    name: str
    what: str  # the equation it computes, for people
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    flops: int
    run: Callable[[], object]
    layer: str = ""  # the path of the layer it belongs to, in a recorded model

    def __repr__(self) -> str:
        of = f" of layer {self.layer!r}" if self.layer else ""
        shapes = f"{shapes_of(self.reads)} → {shapes_of(self.writes)}"
        return f"Launch({self.name}{of}: {self.what!r}, {shapes}, {self.flops:,} flops, {self.bytes:,} bytes)"

    @property
    def bytes(self) -> int:
        """Bytes moved if every operand crosses the memory bus once."""
        return sum(int(b.nbytes) for b in (*self.reads, *self.writes))


def shapes_of(buffers: Sequence[Buffer]) -> str:
    """16×64 64×32; a scalar is 1."""
    return " ".join("×".join(map(str, b.shape)) or "1" for b in buffers)


CONTROL = {"scale": 0, "factor": 1, "ok": 2, "good": 3}
KDL_CUDA = 2  # of DLPack's device types
GROWTH_STEPS, LARGEST_SCALE = 2000, 2.0**24  # of a dynamic loss scale


class CaptureError(RuntimeError):
    """Launches could not be captured as a CUDA graph; the message says why."""


class StepTable(Protocol):
    """What changes from step to step: a table in device memory, read at the row of a counter that updates advance.

    Updates read the row of the steps applied, which stands still where one is skipped; all else reads the step's row.
    `control` holds, at the places CONTROL names: the scale of the loss; the factor of the gradient in the update; 1 if
    the gradient was finite, else 0; and the good steps since the scale last changed.
    """

    columns: tuple[str, ...]
    capacity: int  # the most rows it takes
    control: Buffer

    def load(self, rows: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64], first: int) -> None:
        """Take new rows (steps, columns), rounded once to the table's type, the row offset of each step's batch,
        and the number of the first step, counted over the whole training from 1."""

    def applied(self) -> bool:
        """Whether any step since the rows were loaded was applied: had a finite gradient. Waits for the device."""


class Tally(Protocol):
    """What the steps of an epoch add up on the device."""

    def clear(self) -> None:
        """Start anew."""

    def read(self) -> tuple[float, int, int]:
        """(loss, the first step whose loss was not finite or 0, rows whose largest output stood at the label)."""

    def peek(self) -> float:
        """The loss as of a moment ago, without waiting for the device."""


class Staging(Protocol):
    """Two places on the device, of `rows` rows each in x, y and w, filled from the host beside the work there."""

    x: Buffer
    y: Buffer
    w: Buffer | None
    rows: int

    def put(self, slot: int, index: npt.NDArray[np.intp]) -> None:
        """Gather these rows of the data and send them to the place, once what was given so far has read it.

        The host waits for the copy that was sent there before: with the places taken in turn, that of two batches ago.
        """

    def ready(self, slot: int) -> None:
        """Have what is given from here on wait until the place is filled."""

    def wait(self) -> None:
        """Wait until nothing is on its way."""


_Value = TypeVar("_Value")


@contextmanager
def setting(variable: ContextVar[_Value], value: _Value) -> Iterator[None]:
    """Inside, the variable has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class Workspace:
    """Scratch that the launches of one thread share, because they never run at the same time."""

    def __init__(self) -> None:
        self.scratch: dict[Any, Buffer] = {}


_workspace: ContextVar[Workspace | None] = ContextVar("workspace", default=None)
_thread = threading.local()  # a copied context may run in another thread, which must not share scratch


def workspace() -> Workspace:
    """The workspace in force: the recording plan's, else this thread's own."""
    if (current := _workspace.get()) is not None:
        return current
    if not hasattr(_thread, "workspace"):
        _thread.workspace = Workspace()
    own: Workspace = _thread.workspace
    return own


def use_workspace(space: Workspace) -> AbstractContextManager[None]:
    """Launches bound inside take their scratch from `space`."""
    return setting(_workspace, space)


def arithmetic(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """What values of a type are computed in: float32 for 16-bit types, else the type itself."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def is_on_device(a: Any) -> bool:
    """Whether an array lies on a CUDA device, by what it offers: the CUDA array interface or DLPack.

    A Tensor, which has a backprop, is no array: its buffer is.
    """
    if hasattr(a, "__cuda_array_interface__"):
        return True
    return hasattr(a, "__dlpack_device__") and not hasattr(a, "backprop") and int(a.__dlpack_device__()[0]) == KDL_CUDA


def too_large(nbytes: int, free: int) -> bool:
    """Whether training data of that size stays on the host, by the free memory of the device."""
    return nbytes > free // 2


_tf32: ContextVar[bool] = ContextVar("tf32", default=False)


def tf32() -> bool:
    """Whether float32 products bound now may round their operands to 10 bits of mantissa."""
    return _tf32.get()


def use_tf32(use: bool) -> AbstractContextManager[None]:
    """Float32 products bound inside may, or may not, round their operands to TF32."""
    return setting(_tf32, use)


# ---- what every backend checks -----------------------------------------------------------------------------------


def expect(label: str, holds: bool, got: str) -> None:
    """Raise unless the shapes fit."""
    if not holds:
        raise ValueError(f"{label}: shapes do not fit: {got}")


def expect_rows(source_x: Buffer, source_y: Buffer | None, x: Buffer, y: Buffer | None) -> None:
    """Raise unless a feed's batch takes rows of its sources; those of y, if there is one, as they are."""
    expect("feed", source_x.shape[1:] == x.shape[1:], f"{source_x.shape} into {x.shape}")
    if source_y is not None and y is not None:
        fits = source_y.shape[1:] == y.shape[1:] and source_y.dtype == y.dtype and len(x) == len(y)
        expect("feed", fits, f"{source_x.shape}, {source_y.shape} into {x.shape}, {y.shape}")


def expect_softmax(x: Buffer, target: Buffer, dx: Buffer, w: Buffer | None) -> None:
    """Raise unless a softmax_cross_entropy's target, gradient and weights are those of its logits."""
    fits = target.shape in (x.shape[:1], x.shape) and dx.shape == x.shape
    expect("softmax_cross_entropy", fits, f"logits {x.shape} with target {target.shape}")
    if w is not None:
        expect("softmax_cross_entropy", w.shape == x.shape[:1], f"logits {x.shape} with weights {w.shape}")


def softmax_equation(weighted: bool, step: bool) -> str:
    """What a softmax_cross_entropy computes, for people."""
    w, of_batch = ("w·", " / Σw") if weighted else ("", " / rows")
    difference = "(softmax(x) − t)" if weighted or step else "softmax(x) − t"
    return f"total = Σ −{w}t·log softmax(x); dx = {w}{difference}{of_batch * step}"


def common(
    label: str, reads: Mapping[str, Buffer], writes: Mapping[str, Buffer], extra: Sequence[Buffer] = ()
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape the operands broadcast to, which every write must have, and the type they are computed in.

    That is their one dtype, or float32 for 16-bit operands, beside which float32 ones may stand.
    """
    arrays = [*writes.values(), *reads.values(), *extra]
    dtypes = {a.dtype for a in arrays}
    narrow = {d for d in dtypes if d.itemsize == 2}
    if len(dtypes - {np.dtype(np.float32)} if narrow else dtypes) != 1:
        raise TypeError(f"{label}: operands of one dtype expected, got {', '.join(str(a.dtype) for a in arrays)}")
    shape = np.broadcast_shapes(*(a.shape for a in (*reads.values(), *writes.values())))
    expect(label, all(a.shape == shape for a in writes.values()), f"{[a.shape for a in arrays]}")
    return shape, np.dtype(np.float32) if narrow else arrays[0].dtype


def one_per_row(a: Buffer, shape: tuple[int, ...]) -> bool:
    """Whether the buffer has an element for each row of arrays of that shape, of more than one element to a row."""
    return bool(a.shape == (*shape[:1], *(1,) * (len(shape) - 1)) != shape and a.flags.c_contiguous)


def owned(kind: type[_Value], thing: Any, what: str) -> _Value:
    """The thing, as what this backend makes; TypeError if it is another backend's."""
    if not isinstance(thing, kind):
        raise TypeError(f"{what} of another backend: {type(thing).__name__}")
    return thing


def flops_of(graph: Graph, shape: tuple[int, ...]) -> int:
    """Operations of an elementwise launch."""
    return math.prod(shape) * _operations(tuple(graph.values()))


@lru_cache(maxsize=KEPT)
def _operations(roots: tuple[Expr, ...]) -> int:
    return sum(1 for node in walk(roots) if node.args)


class Backend(Protocol):
    """Primitives bind and check; what one cannot do is an error, never a silent detour.

    Shapes are written (rows, columns); every primitive takes an optional leading member axis where it says (…).
    `accumulate=True` adds to the output, otherwise it is overwritten. Outputs come last.
    """

    @property
    def device(self) -> str: ...
    @property
    def xp(self) -> Any: ...

    # ---- buffers
    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Buffer: ...
    def asarray(self, array: Any, dtype: npt.DTypeLike | None = None) -> Buffer: ...
    def to_numpy(self, buffer: Buffer) -> npt.NDArray[Any]: ...
    def synchronize(self) -> None: ...
    def memory(self) -> tuple[int, int] | None:
        """(free, total) bytes of the device; None where buffers lie in the host's memory."""

    def write(self, buffer: Buffer, value: Any) -> None:
        """buffer[...] = value: a buffer, or a host array or number, with which it may wait for the device."""

    def step_table(self, columns: Sequence[str], dtype: npt.DTypeLike, steps: int) -> StepTable:
        """A table with these columns and room for that many rows."""

    def staging(
        self, x: npt.NDArray[Any], y: npt.NDArray[Any], w: npt.NDArray[Any] | None, rows: int
    ) -> Staging | None:
        """Places for batches of data that stay on the host; None for data that the device has room for."""

    def tally(self, dtype: npt.DTypeLike) -> Tally: ...
    def sequence(self, launches: Sequence[Launch]) -> Callable[[], object]:
        """One call that runs the launches in order."""

    def capture(self, launches: Sequence[Launch]) -> Callable[[], object]:
        """One call that runs the launches, captured as one; CaptureError, which says why, if that cannot be."""

    # ---- primitives
    def elementwise(
        self,
        name: str,
        graph: Graph,
        reads: Mapping[str, Buffer],
        writes: Mapping[str, Buffer],
        *,
        table: StepTable | None = None,
        accumulate: bool = False,
        what: str = "",
    ) -> Launch:
        """writes[k] = graph[k], element by element; reads broadcast; other names are scalars of the table.

        In place: a write may be the buffer of a read, under its name, or where it is the only write under any.
        """

    def elementwise_sum(
        self,
        name: str,
        graph: Graph,
        reads: Mapping[str, Buffer],
        total: Buffer,
        writes: Mapping[str, Buffer] = MappingProxyType({}),
        *,
        table: StepTable | None = None,
        tally: Tally | None = None,
        what: str = "",
    ) -> Launch:
        """total = Σ graph["total"] over all elements, of shape (), added to the tally too; writes[k] = graph[k].

        A read has the shape of the writes, or one element, or one for each row (rows, 1).
        """

    def update(
        self,
        name: str,
        graph: Graph,
        arrays: Mapping[str, Buffer],
        table: StepTable,
        *,
        groups: Sequence[slice] = (),
        advance: bool = False,
        what: str = "",
    ) -> Launch:
        """arrays[k] = graph[k] over vectors of one length, in place; advance=True: the table moves on to the next step.

        Names that are not arrays are columns of the table at the row of the steps applied. With `groups`, ranges that
        cut the vectors at multiples of 64, group i reads the column "name [i]".
        """

    def gradient_norm(self, g: Buffer, table: StepTable, *, clip: float, dynamic: bool) -> Launch:
        """From n = ‖g‖₂ / scale into table.control: ok = n is finite; factor = min(1, clip / n) / scale, 0 if not ok.

        dynamic: the next step's scale is halved after a gradient that is not finite, and doubled after 2,000 good ones.
        """

    def elementwise_columns(
        self,
        name: str,
        graph: Graph,
        reads: Mapping[str, Buffer],
        out: Buffer,
        columns: Buffer,
        *,
        accumulate: bool = False,
        what: str = "",
    ) -> Launch:
        """out = graph (…, rows, n) and columns = its sums over the rows (…, n), in one launch; out may be a read."""

    def gemm(
        self, a: Buffer, b: Buffer, out: Buffer, *, transpose_a: bool = False, transpose_b: bool = False,
        accumulate: bool = False, what: str = "",
    ) -> Launch:  # fmt: skip
        """out = op(a) @ op(b), of matrices or of equal stacks of them; an operand without the stack axis serves all."""

    def copy(self, x: Buffer, out: Buffer, *, accumulate: bool = False) -> Launch:
        """out = x broadcast to out's shape and cast to its type; either may be a strided view."""

    def fill(self, out: Buffer, value: float) -> Launch:
        """out = value."""

    def reduce(self, kind: str, x: Buffer, axes: tuple[int, ...], out: Buffer, *, accumulate: bool = False) -> Launch:
        """out = kind ("sum", "mean", "max", "min") of x over the axes, which out lacks."""

    def gather(self, x: Buffer, index: Buffer, out: Buffer) -> Launch:
        """out[:, i] = x[:, index[i]] for x (outer, n, inner)."""

    def scatter_add(self, dy: Buffer, index: Buffer, out: Buffer, *, live: bool = False) -> Launch:
        """out[:, index[i]] += dy[:, i], in the order of i: deterministic. live=True: launches may change the index."""

    def feed(
        self, source_x: Buffer, source_y: Buffer | None, order: Buffer, table: StepTable, x: Buffer, y: Buffer | None,
        scale: float,
    ) -> Launch:  # fmt: skip
        """x, y = scale · source_x, source_y at order[offset : offset + len(x)], the offset being this step's; y may be
        None."""

    def softmax_cross_entropy(
        self,
        x: Buffer,
        target: Buffer,
        dx: Buffer,
        total: Buffer,
        *,
        w: Buffer | None = None,
        table: StepTable | None = None,
        tally: Tally | None = None,
        count: bool = False,
    ) -> Launch:
        """total = Σ_rows −w·Σ_k t·log softmax(x), also added to the tally; dx = w · s · ((Σt)·softmax(x) − t).

        target holds labels or rows t, w (rows,) weights; None: 1; where one is 0 so is the row's part. s = 1, or with a
        table its column "1 / weight" times the scale of the loss. count=True adds to the tally the rows whose largest
        element stands at the label.
        """

    def top1(self, x: Buffer, labels: Buffer, tally: Tally) -> Launch:
        """tally += the number of rows whose largest element stands at the label."""

    def normalize(
        self,
        x: Buffer,
        gain: Buffer,
        bias: Buffer,
        axis: int,
        eps: float,
        out: Buffer,
        mean: Buffer,
        variance: Buffer,
        rstd: Buffer,
    ) -> Launch:
        """out = gain · (x − mean) / √(var + eps) + bias, statistics along the axis of a matrix, gain per column."""

    def normalize_backward(
        self,
        dy: Buffer,
        x: Buffer,
        gain: Buffer,
        mean: Buffer,
        rstd: Buffer,
        axis: int,
        dx: Buffer | None,
        dgain: Buffer | None,
        dbias: Buffer | None,
        accumulate: tuple[bool, bool, bool],
    ) -> Launch:
        """dx = rstd · (d − mean(d) − x̂ · mean(d · x̂)), d = gain · dy, x̂ = (x − mean) · rstd; dgain = Σ dy · x̂;
        dbias = Σ dy."""

    def dropout(
        self,
        x: Buffer,
        rate: float,
        seed: int,
        site: int,
        step: "StepTable | int",
        out: Buffer,
        *,
        accumulate: bool = False,
    ) -> Launch:
        """out = x / (1 − rate) where Philox keeps the element, else 0; the backward is the same launch on dy."""

    def noise(self, x: Buffer, sigma: float, seed: int, site: int, step: "StepTable | int", out: Buffer) -> Launch:
        """out = x + sigma · N(0, 1), by Philox, each normal number within 4 ulp; the backward is the identity.

        Sites stay below 2^30.
        """

    def accumulate_loss(self, total: Buffer, table: StepTable, tally: Tally) -> Launch:
        """tally += total; the first step whose total is not finite is noted."""

    def advance(self, table: StepTable, *, applies: bool = True) -> Launch:
        """Move on to the next step's row; applies=False: without an update, so that the row of those applied stays."""
