"""The plan: launches kept while they run, to be replayed, printed, added up and timed."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import zip_longest
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import (
    Backend,
    Buffer,
    Launch,
    Workspace,
    is_on_device,
    setting,
    shapes_of,
    use_workspace,
)
from gpubackprop.columns import Grid, Shown, brief, line_width, table
from gpubackprop.observe import observing

__all__ = [
    "Plan",
    "allocation",
    "current_layer",
    "empty",
    "held",
    "recording",
    "release",
    "run",
    "running",
    "within",
]

NARROW_HEAD = ("layer", "launch", "computes, reads → writes", "flops", "bytes")
MOST_IN_FULL = 10**6  # operations or bytes; above it a narrow table has prefixes

_current: ContextVar["Plan | None"] = ContextVar("plan", default=None)
_layer: ContextVar[str] = ContextVar("layer", default="")
_runner: ContextVar[Callable[[Launch], object] | None] = ContextVar("runner", default=None)


def recording() -> "Plan | None":
    """The plan that is recording in this thread, if any."""
    return _current.get()


def current_layer() -> str:
    """The path of the layer whose forward or backward is being recorded."""
    return _layer.get()


def within(layer: str) -> AbstractContextManager[None]:
    """Launches kept inside carry the layer's path."""
    return setting(_layer, layer)


def running(by: Callable[[Launch], object]) -> AbstractContextManager[None]:
    """Plans recorded and replayed inside, but for dry ones, run each launch by this function of it."""
    return setting(_runner, by)


def run(out: Buffer, bind: Callable[[], Launch]) -> None:
    """Bind the launch that fills `out` and run it; a plan that is recording keeps it. Nothing to fill, no launch."""
    if math.prod(out.shape) == 0:
        return
    plan = _current.get()
    if plan is None:
        bind().run()
    else:
        plan.add(bind())


def empty(backend: Backend, shape: Sequence[int], dtype: npt.DTypeLike) -> Buffer:
    """An uninitialised buffer, from the recording plan's pool if there is one."""
    plan = _current.get()
    return backend.empty(shape, dtype) if plan is None else plan.empty(shape, dtype)


def release(buffer: Buffer) -> None:
    """Say that nothing launched from here on reads the buffer: a recording plan uses it again."""
    if (plan := _current.get()) is not None:
        plan.release(buffer)


class Plan(Shown):
    """Named sections of launches over fixed buffers, recorded once and replayed without checks or allocation.

    `with plan.record("gradient"):` keeps every launch made inside (this thread only); `plan.replay("gradient")` runs
    them again. With dry=True launches are bound but not run: such a plan can be printed and costed before any step.
    """

    def __init__(self, backend: Backend, title: str = "", *, dry: bool = False, space: Workspace | None = None) -> None:
        self.backend = backend
        self.title = title
        self.dry = dry
        self.space = space or Workspace()
        self.sections: dict[str, list[Launch]] = {}
        self._pool: dict[Any, list[Buffer]] = {}
        self._ready: dict[tuple[str, ...], Callable[[], object]] = {}
        self._section: list[Launch] = []

    # ---- recording

    @contextmanager
    def record(self, section: str) -> Iterator["Plan"]:
        """Keep the launches made inside the block as this section, running them as they are bound."""
        if _current.get() is not None:
            raise RuntimeError(f"record {section!r}: a plan is recording in this thread already; sections do not nest")
        if section in self.sections:
            raise ValueError(f"record {section!r}: the plan has this section; record another or make a new plan")
        self._section = launches = list[Launch]()
        token = _current.set(self)
        try:
            with use_workspace(self.space), observing(None):  # a plan's launches are those without an observer
                yield self
        finally:
            _current.reset(token)
            self._section = []
        self.sections[section] = launches  # a section cut short by an error is not kept

    def discard(self, section: str) -> None:
        """Forget the section, if there is one, so that it can be recorded anew."""
        self.sections.pop(section, None)
        self._ready.clear()

    def add(self, launch: Launch) -> None:
        """Keep the launch and run it (unless dry)."""
        kept = replace(launch, layer=_layer.get())
        self._section.append(kept)
        if not self.dry:
            launch.run() if (by := _runner.get()) is None else by(kept)

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Buffer:
        """A released buffer of that size and dtype, else a new one."""
        free = self._pool.get((math.prod(shape), np.dtype(dtype)))
        return free.pop().reshape(tuple(shape)) if free else self.backend.empty(shape, dtype)

    def release(self, buffer: Buffer) -> None:
        """Let launches bound from here on write into the buffer."""
        self._pool.setdefault((math.prod(buffer.shape), buffer.dtype), []).append(buffer.reshape(-1))

    # ---- replaying

    def replay(self, *sections: str) -> None:
        """Run the sections in order (all of them if none is named)."""
        self.sequence(*sections)()

    def sequence(self, *sections: str) -> Callable[[], object]:
        """One call without arguments that replays the sections."""
        names = sections or tuple(self.sections)
        if (by := _runner.get()) is not None and not self.dry:
            launches = self._chosen(names)
            return lambda: [by(launch) for launch in launches]
        if names not in self._ready:
            self._ready[names] = self.backend.sequence(self._chosen(names))
        return self._ready[names]

    def _chosen(self, names: Sequence[str]) -> list[Launch]:
        if unknown := [n for n in names if n not in self.sections]:
            raise ValueError(
                f"replay: unknown section {unknown[0]!r}; recorded are {', '.join(self.sections) or 'none'}"
            )
        return [launch for n in names for launch in self.sections[n]]

    # ---- reading

    @property
    def launches(self) -> list[Launch]:
        """Every launch, in order."""
        return [launch for section in self.sections.values() for launch in section]

    @property
    def flops(self) -> int:
        """Floating-point operations of one replay (a multiply-add counts 2, a function call 1)."""
        return sum(launch.flops for launch in self.launches)

    @property
    def bytes(self) -> int:
        """Bytes moved by one replay if every launch reads and writes its operands once."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def bytes_resident(self) -> int:
        """Bytes of the buffers that live as long as the plan: each allocation once, whole, and as it was asked for.

        They are what launches read and write, others' too (weights, the data that a feed gathers from, the step table),
        and the launches' scratch and arguments, with the workspace. No buffers of a plan's are what CUDA keeps for
        kernels and graphs, and cuBLAS's scratch, which is a thread's.
        """
        return sum(int(b.nbytes) for b in held(self.sections, self._pool, self._ready, *self.space.scratch.values()))

    def __str__(self) -> str:
        return self.table()

    def table(self, *, wide: bool = False) -> str:
        """The launches as a table, which `print(plan)` shows too.

        It fits the terminal (or $COLUMNS, at least 80): shapes stand behind the equations, or beneath them, and long
        ones go on in the next line. With wide=True, and where stdout is a file or a pipe, every launch has one line.
        """
        width = None if wide else line_width()
        if width is None or max(map(len, full := super().__str__().splitlines())) <= width:
            return super().__str__()
        return "\n".join([*_wrapped(full[0], width), *_fitted(self, width).lines])

    def parts(self) -> Iterable[str | Grid]:
        rows: list[tuple[str, ...]] = [("", "layer", "launch", "computes", "reads", "writes", "flops", "bytes")]
        for section, launches in self.sections.items():
            for i, launch in enumerate(launches):
                first, *more = launch.what.splitlines()
                rows.append((section if i == 0 else "", launch.layer, launch.name, first, shapes_of(launch.reads),
                             shapes_of(launch.writes), f"{launch.flops:,}", f"{launch.bytes:,}"))  # fmt: skip
                rows += [("", "", "", line, "", "", "", "") for line in more]
        rows.append(("total", "", f"{len(self.launches)} launches", "", "", "", f"{self.flops:,}", f"{self.bytes:,}"))
        return [
            f"{self.title} on {self.backend.device}, {self.bytes_resident:,} bytes resident",
            table(rows, 2, total=True),
        ]

    def profile(self, repeats: int = 20) -> list[tuple[Launch, float]]:
        """Each launch with its median time in seconds; what the launches write is put back afterwards."""
        kept = {id(b): (b, self.backend.to_numpy(b)) for launch in self.launches for b in launch.writes}
        times: list[list[float]] = [[] for _ in self.launches]
        for _ in range(repeats):
            for launch, seen in zip(self.launches, times, strict=True):
                self.backend.synchronize()
                start = time.perf_counter()
                launch.run()
                self.backend.synchronize()
                seen.append(time.perf_counter() - start)
        for buffer, value in kept.values():
            self.backend.write(buffer, value)
        return [(launch, sorted(seen)[repeats // 2]) for launch, seen in zip(self.launches, times, strict=True)]


def held(*roots: object) -> list[Buffer]:
    """The buffers that the roots keep alive, each once, as the allocations that they are parts of.

    A launch keeps alive what it works with, wherever it has it: in a partial, a closure, an object, or in `kept`, which
    stands for all that an object has.
    """
    ahead, seen, found = list(roots), dict[int, object](), dict[int, Buffer]()
    while ahead:
        thing = ahead.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, np.ndarray) or is_on_device(thing):
            owner = allocation(thing)
            found[id(owner)] = owner
        elif hasattr(thing, "kept"):
            ahead.append(thing.kept)
        elif isinstance(thing, FunctionType):
            ahead += thing.__closure__, thing.__defaults__, thing.__kwdefaults__  # not the module's globals
        else:
            ahead += gc.get_referents(thing)
    return list(found.values())


def allocation(buffer: Buffer) -> Buffer:
    """The whole of what was allocated, of which the buffer is a part."""
    owner = base = buffer
    while (base := getattr(base, "base", None)) is not None:  # at the end may stand a file's or another library's
        owner = base if hasattr(base, "nbytes") else owner
    return owner


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap  # costs a millisecond

    return textwrap.wrap(text, width)


def _fitted(plan: Plan, width: int) -> Grid:
    """The table at that width: each section has a line of its own, and shapes share the column of the equations."""
    exact, total = max(plan.flops, plan.bytes) < MOST_IN_FULL, f"{len(plan.launches)} launches"
    counts = [(n.flops, n.bytes) for n in plan.launches] + [(plan.flops, plan.bytes)]
    figures = [[f"{count:,}" if exact else brief(count, "").strip() for count in pair] for pair in counts]
    first = max(len(path) for path in ("total", *plan.sections, *("  " + n.layer for n in plan.launches)))
    second = max(len(name) for name in (total, *(launch.name for launch in plan.launches)))
    left = min(first, width // 8), min(second, width // 4 + 4)
    right = [max(map(len, column)) for column in zip(*figures, strict=True)]
    room = max(width - sum((*left, *right)) - 2 * 4, len(NARROW_HEAD[2]))
    rows: list[tuple[str, ...]] = [NARROW_HEAD]
    following = iter(figures)
    for section, launches in plan.sections.items():
        rows += [(section, "", "", "", "")] * bool(launches)
        for launch in launches:
            path = [f"  {line}" for line in _wrapped(launch.layer, left[0] - 2)]
            cells = (
                path,
                _wrapped(launch.name, left[1]),
                _equation(launch, room),
                *([figure] for figure in next(following)),
            )
            rows += zip_longest(*cells, fillvalue="")
    return table([*rows, ("total", total, "", *figures[-1])], 2, total=True)


def _equation(launch: Launch, room: int) -> list[str]:
    """What the launch computes, and to the right, in the last line if there is room, the shapes that it reads and
    writes."""
    lines = [line for text in launch.what.splitlines() for line in _wrapped(text, room)]
    shapes = _wrapped(f"{shapes_of(launch.reads)} → {shapes_of(launch.writes)}", room)
    if lines and len(shapes) == 1 and len(lines[-1]) + 2 + len(shapes[0]) <= room:
        return [*lines[:-1], lines[-1] + shapes[0].rjust(room - len(lines[-1]))]
    return lines + [line.rjust(room) for line in shapes]
