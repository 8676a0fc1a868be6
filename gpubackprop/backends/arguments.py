"""A graph of formulas with the buffers it reads and writes, each under one name: what becomes a kernel's arguments."""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from gpubackprop.backends import skeletons
from gpubackprop.backends.base import Buffer, Graph, StepTable
from gpubackprop.formulas import KEPT, Expr, describe, free_names, hoist, name, renamed

__all__ = ["Formula", "steps_of"]


class Formula:
    """The graph over names a0, a1, …, one for each array however many it had; s0, s1, … are columns of the table.

    `__restrict__` asks for that: no two names of a kernel stand for one array.
    """

    def __init__(
        self, graph: Graph, reads: Mapping[str, Buffer], writes: Mapping[str, Buffer], table: StepTable | None,
        address: Callable[[Buffer], int], suffix: str = "",
    ) -> None:  # fmt: skip
        names: dict[str, str] = {}
        known: dict[Any, str] = {}
        self.arrays: dict[str, Buffer] = {}
        for key, array in (*writes.items(), *reads.items()):
            names[key] = known.setdefault((address(array), array.shape, array.strides, array.dtype), f"a{len(known)}")
            self.arrays[names[key]] = array
        self.graph: Graph = {names.get(k, k): e for k, e in renamed(graph, names).items()}
        hoisted: Mapping[str, Expr] = {}
        if table is not None:
            self.graph, hoisted = hoist(self.graph, self.arrays)
        used = dict.fromkeys((*self.graph, *free_names(*self.graph.values())))  # in the order of a skeleton's `reads`
        self.arrays = {k: self.arrays[k] for k in used if k in self.arrays}
        self.table = hoisted
        self.places = _places(table, hoisted, suffix) if hoisted else {}
        self.dtype = min((a.dtype for a in self.arrays.values()), key=lambda d: d.itemsize)
        self.lanes = 16 // self.dtype.itemsize
        self.writes = [k for k, e in self.graph.items() if k in self.arrays and e != name(k)]

    @property
    def reads(self) -> list[str]:
        """The arrays it only reads, except those of one element, in the order of the kernel's strides."""
        read = (k for k in free_names(*self.graph.values()) if k in self.arrays)
        return [k for k in read if k not in self.graph and k not in self.single]

    @property
    def single(self) -> tuple[str, ...]:
        """The arrays of one element that it reads, beside larger ones or ones that it writes."""
        ones = tuple(k for k, a in self.arrays.items() if k not in self.graph and a.size == 1)
        return ones if len(ones) < len(self.arrays) else ()

    def irregular(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The operands that neither have the shape, C-contiguous, nor one element."""
        return tuple(k for k in self.reads if not _whole(self.arrays[k], shape))

    def per_column(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The irregular operands, if all are (columns,) or all (members, 1, columns), broadcast over the rows."""
        others = self.irregular(shape)
        forms = set()
        for key in others:
            a = self.arrays[key]
            padded = (1,) * (len(shape) - a.ndim) + a.shape
            members = padded[0] if len(shape) == 3 and padded[1] == 1 else 1
            if padded[-1] != shape[-1] or a.size != members * shape[-1] or not a.flags.c_contiguous:
                return ()
            if members not in (1, shape[0]):
                return ()
            forms.add(members)
        return others if len(forms) == 1 else ()

    def source(self, skeleton: str, label: str, **options: Any) -> tuple[str, str]:
        """(source, name) of the kernel on a skeleton."""
        kernel = re.sub(r"\W+", "_", label) + "_kernel"  # sqrt alone is a function of the prelude
        wide = tuple(k for k, a in self.arrays.items() if a.dtype != self.dtype)
        return _source(skeleton, kernel, tuple(self.graph.items()), self.single, tuple(self.table.items()), wide,
                       tuple(options.items()), self.dtype.name), kernel  # fmt: skip

    def stride(self, table: Any, suffix: str) -> int:
        """How far the columns of the table lie apart from one group to the next."""
        return table.columns.index(describe(self.table["s0"]) + suffix) - self.places["s0_at"] if self.table else 0


def steps_of(a: Buffer, shape: tuple[int, ...]) -> list[int]:
    """The strides, in elements, of an array broadcast to a shape."""
    steps = [0 if n == 1 else s // a.dtype.itemsize for n, s in zip(a.shape, a.strides, strict=True)]
    return [0] * (len(shape) - a.ndim) + steps


def _whole(a: Buffer, shape: tuple[int, ...]) -> bool:
    return bool(a.shape == shape and a.flags.c_contiguous)


def _places(table: Any, hoisted: Mapping[str, Expr], suffix: str) -> dict[str, Any]:
    """The arguments that say where the scalars are."""
    at = {f"{k}_at": table.columns.index(describe(e) + suffix) for k, e in hoisted.items()}
    return {"table": table.table, "state": table.state, "width": table.width, **at}


@lru_cache(maxsize=KEPT)
def _source(
    skeleton: str, kernel: str, graph: tuple[Any, ...], single: tuple[str, ...], table: tuple[Any, ...],
    wide: tuple[str, ...], options: tuple[Any, ...], dtype: str,
) -> str:  # fmt: skip
    make = getattr(skeletons, skeleton)
    what = "; ".join(f"{k} = {describe(e)}" for k, e in graph)
    return skeletons.unit([make(kernel, dict(graph), what, single, dict(table), wide, **dict(options))], dtype)
