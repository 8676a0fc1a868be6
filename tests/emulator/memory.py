"""Device memory: arrays whose values the host cannot touch, and who may use them when.

Every stream keeps a queue and a clock: how much of each other stream's work comes before what it is given next. From
the clocks follows, for each block of memory, whether two uses of which one writes have an order; if not, that is an
error even where the numbers come out right.
"""

import ctypes
import math
from collections import deque
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

__all__ = ["Block", "DeviceArray", "Queue", "Violation"]

BOUNDARY = 512  # bytes, of CuPy's pool
MARGIN = np.full(64, 0xA5, np.uint8)  # around every block: shows what was written outside


class Violation(RuntimeError):
    """What a device would not do, or would do wrongly."""


class Queue:
    """A stream: what it was given and has not done yet. It works only when someone waits for it."""

    def __init__(self, number):
        self.number, self.done, self.work = number, 0, deque()
        self.clock = {}  # of the other streams: how many pieces of work come before what is given next

    @property
    def given(self):
        return self.done + len(self.work)

    def run(self, until):
        """Work until so many pieces are done."""
        while self.done < until:
            work = self.work.popleft()
            self.done += 1
            work()

    def follow(self, clock):
        """Come after all that the clock counts."""
        for number, count in clock.items():
            self.clock[number] = max(count, self.clock.get(number, 0))

    def seen(self):
        """The clock of who waits for all that it was given."""
        return self.clock | {self.number: self.given}


class Use(NamedTuple):
    """The count-th piece of work of a stream, and the bytes (from, to) that it touches; None: any."""

    number: int
    count: int
    span: tuple[int, int] | None

    def before(self, queue):
        return queue.number == self.number or queue.clock.get(self.number, 0) >= self.count


def _disjoint(a, b):
    return a is not None and b is not None and (a[1] <= b[0] or b[1] <= a[0])


class Block:
    """Memory of one allocation, filled with junk; `live` until the last array on it is gone."""

    def __init__(self, nbytes, queue):
        self.nbytes, self.live = nbytes, True
        self.home = queue  # whose share of the pool it comes from, and returns to
        self._writes, self._reads = [Use(queue.number, queue.given, None)], []
        self._raw = np.full(nbytes + BOUNDARY + 2 * MARGIN.size, 0xFF, np.uint8)  # NaN, −1
        start = -(self._raw.ctypes.data + MARGIN.size) % BOUNDARY + MARGIN.size
        self.memory = self._raw[start : start + nbytes]
        self.address = self.memory.ctypes.data
        self._margins = self._raw[start - MARGIN.size : start], self._raw[start + nbytes :][: MARGIN.size]
        for margin in self._margins:
            margin[...] = MARGIN

    def use(self, what, queue, written, span=None):
        """Note what the queue's next piece of work does with it, or with a span of its bytes; Violation unless all that
        it must not meet is ordered before.

        A kernel may read any part, so what others write into a span meanwhile it must not read: these spans come back.
        """
        if not self.live:
            raise Violation(f"{what}: memory of {self.nbytes} bytes was freed")
        span, meanwhile = None if span == (0, self.nbytes) else span, []
        for other in [*self._writes, *(self._reads if written else ())]:
            if not (_disjoint(span, other.span) or other.before(queue)):
                if written or span is not None or other.span is None:
                    where = f"memory of {self.nbytes} bytes on stream {queue.number}"
                    raise Violation(f"{what}: {where} is not ordered after its use on stream {other.number}")
                meanwhile.append(other.span)
        if written and span is None:  # all later uses come after it, or are errors
            self._writes, self._reads = [], []
        kept = self._writes if written else self._reads
        kept[:] = [u for u in kept if (u.number, u.span) != (queue.number, span)]
        kept.append(Use(queue.number, queue.given + 1, span))
        return meanwhile

    def free(self):
        """Give it back: whoever asks next on its home stream may get it."""
        self.live = False
        self.home.work.append(self._spoil)
        if late := [u.number for u in (*self._writes, *self._reads) if not u.before(self.home)]:
            where = f"memory of {self.nbytes} bytes was freed on stream {self.home.number}"
            raise Violation(f"{where} and reused while stream {late[0]} works on it")

    @contextmanager
    def spoilt(self, span):
        """Inside, these bytes are junk."""
        part = self.memory[slice(*span)]
        before = part.copy()
        part[...] = 0xFF
        yield
        part[...] = before

    def _spoil(self):
        self.check()
        self.memory[...] = 0xFF

    def check(self):
        """Violation if something wrote beside it."""
        if any((margin != MARGIN).any() for margin in self._margins):
            raise Violation(f"something wrote outside of an allocation of {self.nbytes} bytes")


class Owner:
    """What keeps a block alive: all arrays on it have the one."""


class DeviceArray:
    """An array of which the host knows all but the values: a view of a block, or a part of another view.

    What CuPy would do by a launch, a copy or a wait of its own is an error here.
    """

    __slots__ = ("__weakref__", "_owner", "_view", "base", "block", "device")
    __hash__ = None
    __array_priority__ = 100

    def __init__(self, view, block, owner, device, base=None):
        self._view, self.block, self._owner, self.device, self.base = view, block, owner, device, base

    shape = property(lambda self: self._view.shape)
    dtype = property(lambda self: self._view.dtype)
    strides = property(lambda self: self._view.strides)
    size = property(lambda self: self._view.size)
    nbytes = property(lambda self: self._view.nbytes)
    itemsize = property(lambda self: self._view.itemsize)
    ndim = property(lambda self: self._view.ndim)
    flags = property(lambda self: self._view.flags)
    T = property(lambda self: self.transpose())

    @property
    def address(self):
        """Where the first element lies: nowhere, if there is none."""
        return self._view.ctypes.data if self.size else 0

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3,
                "strides": None if self.flags.c_contiguous else self.strides, "stream": 1}  # fmt: skip

    def _part(self, view):
        root = self if self.base is None else self.base
        return DeviceArray(view, self.block, self._owner, self.device, root)

    def __len__(self):
        return len(self._view)

    def __repr__(self):
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device!r})"

    def reshape(self, *shape):
        view = self._view.reshape(*shape)
        if view.size and not np.may_share_memory(view, self._view):
            raise Violation(f"reshape of {self.shape} with strides {self.strides} copies")
        return self._part(view)

    def transpose(self, *axes):
        return self._part(self._view.transpose(*axes))

    def __getitem__(self, key):
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(k, int | np.integer | slice | type(None) | type(...)) for k in parts):
            raise Violation(f"{self!r}[{key!r}] gathers elements by a launch of its own")
        return self._part(self._view[parts if any(k is ... for k in parts) else (*parts, ...)])


def _refused(name):
    def refuse(self, *arguments, **options):
        raise Violation(f"{name} of {self!r}: that computes or copies behind the back of the backend")

    return refuse


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
for _name in (
    "array", "array_ufunc", "array_function", "float", "int", "complex", "bool", "index", "iter", "contains", "setitem",
    "eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert",
    *BINARY, *(f"r{_n}" for _n in BINARY), *(f"i{_n}" for _n in BINARY),
):  # fmt: skip
    setattr(DeviceArray, f"__{_name}__", _refused(_name))


def bytes_at(address, nbytes):
    """Memory as an array of bytes, without a copy."""
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), np.uint8)


def device_array(block, owner, shape, dtype, device):
    """A C-contiguous array on a whole block."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return DeviceArray(block.memory[:nbytes].view(dtype).reshape(shape), block, owner, device)
