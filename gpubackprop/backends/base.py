"""What a backend is: primitives that bind buffers into launches, and the step table that launches read scalars from."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpubackprop.formulas import Expr

__all__ = ["Backend", "Buffer", "Graph", "Launch", "StepTable", "Workspace", "use_workspace", "workspace"]

Buffer = Any  # a NumPy or CuPy array: C-contiguous unless a primitive says otherwise
Graph = Mapping[str, Expr]  # what an elementwise launch assigns: output name -> expression


@dataclass(frozen=True, slots=True)
class Launch:
    """One bound call: everything was checked when it was made, `run()` takes no arguments and checks nothing."""

    name: str
    what: str  # the equation it computes, for people
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    flops: int
    run: Callable[[], object] = field(repr=False)
    layer: str = ""  # the path of the layer it belongs to, in a recorded model

    @property
    def bytes(self) -> int:
        """Bytes moved if every operand crosses the memory bus once."""
        return sum(int(b.nbytes) for b in (*self.reads, *self.writes))


class StepTable(Protocol):
    """What changes from step to step: a table in device memory, read at the row of a counter that updates advance."""

    columns: tuple[str, ...]

    def load(self, rows: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64], first: int) -> None:
        """Take new rows (steps, columns), rounded once to the table's type, the row offset of each step's batch,
        and the number of the first step, counted over the whole training from 1."""


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


@contextmanager
def use_workspace(space: Workspace) -> Iterator[None]:
    """Launches bound inside take their scratch from `space`."""
    token = _workspace.set(space)
    try:
        yield
    finally:
        _workspace.reset(token)


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
    def step_table(self, columns: Sequence[str], dtype: npt.DTypeLike) -> StepTable: ...
    def sequence(self, launches: Sequence[Launch]) -> Callable[[], object]:
        """One call that runs the launches in order."""

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
        self, name: str, graph: Graph, reads: Mapping[str, Buffer], out: Buffer, *, what: str = ""
    ) -> Launch:
        """out = Σ graph over all elements (out has shape ())."""

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
        """out = x broadcast to out's shape; either may be a strided view."""

    def fill(self, out: Buffer, value: float) -> Launch:
        """out = value."""

    def reduce(self, kind: str, x: Buffer, axes: tuple[int, ...], out: Buffer, *, accumulate: bool = False) -> Launch:
        """out = kind ("sum", "mean", "max", "min") of x over the axes, which out lacks."""

    def gather(self, x: Buffer, index: Buffer, out: Buffer) -> Launch:
        """out[:, i] = x[:, index[i]] for x (outer, n, inner)."""

    def scatter_add(self, dy: Buffer, index: Buffer, out: Buffer) -> Launch:
        """out[:, index[i]] += dy[:, i], in the order of i: deterministic."""

    def feed(self, source: Buffer, permutation: Buffer, table: StepTable, out: Buffer) -> Launch:
        """out = source[permutation[offset : offset + len(out)]], the offset being this step's."""

    def softmax_cross_entropy(self, x: Buffer, target: Buffer, residual: Buffer, total: Buffer) -> Launch:
        """total = Σ_rows −Σ_k t·log softmax(x), residual = (Σt)·softmax(x) − t; target holds labels or rows t."""

    def top1(self, x: Buffer, labels: Buffer, count: Buffer) -> Launch:
        """count += the number of rows whose largest element stands at the label."""

    def normalize(
        self,
        x: Buffer,
        gain: Buffer,
        bias: Buffer,
        axis: int,
        eps: float,
        out: Buffer,
        xhat: Buffer,
        mean: Buffer,
        variance: Buffer,
        rstd: Buffer,
    ) -> Launch:
        """xhat = (x − mean) / √(var + eps) along the axis of a matrix, out = gain · xhat + bias per column."""

    def normalize_backward(
        self,
        dy: Buffer,
        xhat: Buffer,
        gain: Buffer,
        rstd: Buffer,
        axis: int,
        dx: Buffer | None,
        dgain: Buffer | None,
        dbias: Buffer | None,
        accumulate: tuple[bool, bool, bool],
    ) -> Launch:
        """dx = rstd · (d − mean(d) − xhat · mean(d · xhat)), d = gain · dy; dgain = Σ dy · xhat; dbias = Σ dy."""

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

    def accumulate_loss(self, total: Buffer, table: StepTable, out: Buffer, bad_step: Buffer) -> Launch:
        """out += total; the first step whose total is not finite is noted in bad_step (0 while there is none)."""

    def advance(self, table: StepTable) -> Launch:
        """Move on to the next step's row."""
