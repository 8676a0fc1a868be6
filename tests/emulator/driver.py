"""The CUDA driver on the CPU: kernels under emulation, cuBLAS by a BLAS, and every rule of a device enforced.

Nothing runs when it is given: streams are queues that work when someone waits for them, so that a copy from a pinned
array reads it late, and what was not ordered runs too soon or never. memory.py has what uses of memory must hold.
"""

import ctypes
import hashlib
import json
import math
import re
import threading
import weakref
from bisect import bisect_right, insort
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np

from benchmarks.cuda import compile_cuda
from emulator import EmulationError, build, cache_folder
from gpubackprop.backends import codegen
from gpubackprop.backends.driver import OPTIONS, CaptureError, DeviceMemoryError, Paper, Properties

from . import blas
from .memory import Block, DeviceArray, Owner, Queue, Violation, device_array

__all__ = ["NULL", "DeviceArray", "EmulatedDriver", "EmulationError", "Rehearsal", "Violation", "current_device"]

NULL = 0  # the default stream
_here = threading.local()


def current_device():
    """The index of the device that is current in this thread."""
    return getattr(_here, "device", 0)


class Bound:
    """A kernel with its arguments, whose types are those of the PTX; once it runs, it must be compiled."""

    def __init__(self, function, grid, block, arguments, values):
        self.function, self.bind, self.types = function, (grid, block, values), [_ptx_type(a) for a in arguments]
        self.kept, self.call = arguments, None

    def __call__(self, order):
        if self.call is None:
            library, parameters = self.function.unit.result()
            if self.types != parameters[self.function.name]:
                raise Violation(f"{self.function.name}: arguments {self.types} for the parameters "
                                f"{parameters[self.function.name]} of the PTX")  # fmt: skip
            self.call = library.bind(self.function.name, *self.bind)
        self.call(order)


class EmulatedDriver:
    """A device of `memory` bytes. `order` seeds the order of threads and blocks; `counts` says what was asked for."""

    xp = SimpleNamespace(ndarray=DeviceArray, __name__="emulated")

    def __init__(self, index=0, *, memory=1 << 30, order=0, name="Emulated", capability="9.0", multiprocessors=4):
        self.index, self.device, self.order_seed = index, f"cuda:{index}", order
        self.counts = Counter()
        self._properties = Properties(name, capability, multiprocessors)
        self._total, self._used = memory, 0
        self._queues = {NULL: Queue(NULL)}
        self._host = {}  # what the host has waited for, as the clock of a stream
        self._blocks = []  # (address, block) of what is live, sorted
        self._pinned = []  # the same of page-locked arrays: (address, end)
        self._compiled = set()
        self._faults = []  # found where nothing can be raised
        self._thread = threading.local()  # its current stream, and what it captures
        self._lock = threading.RLock()

    # ---- facts

    def properties(self):
        return self._properties

    def memory(self):
        return self._total - self._used, self._total

    @contextmanager
    def scope(self):
        before, _here.device = current_device(), self.index
        try:
            yield
        finally:
            _here.device = before

    def check(self):
        """Violation if anything went wrong so far: all streams work until they are done."""
        for queue in self._queues.values():
            queue.run(queue.given)
        for _, block in self._blocks:
            block.check()
        self._report()

    def _report(self):
        if self._faults:
            raise Violation("; ".join(self._faults))

    # ---- memory

    def empty(self, shape, dtype, *, pinned=False):
        self._outside_capture("allocation")
        self.counts["pinned allocations" if pinned else "allocations"] += 1
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if pinned:
            return self._empty_pinned(nbytes).view(dtype).reshape(shape)
        self._expect_scope("allocation")
        if self._used + nbytes > self._total:
            try:
                raise MemoryError("the pool is exhausted")
            except MemoryError as cause:  # with a traceback that holds all callers' frames, as CuPy's has
                raise DeviceMemoryError(nbytes, *self.memory()) from cause
        block, owner = Block(nbytes, self._queues[self.current()]), Owner()
        weakref.finalize(owner, self._free, block).atexit = False
        with self._lock:
            self._used += nbytes
            insort(self._blocks, (block.address, block), key=lambda entry: entry[0])
        return device_array(block, owner, tuple(shape), dtype, self.device)

    def _free(self, block):
        with self._lock:
            self._used -= block.nbytes
            self._blocks.remove((block.address, block))
            block.home.follow(self._host)
            try:
                block.free()
            except Violation as fault:
                self._faults.append(str(fault))

    def _empty_pinned(self, nbytes):
        memory = bytearray(b"\xff" * max(1, nbytes))
        base = np.frombuffer(memory, np.uint8)  # of all views
        self._pinned.append(span := (base.ctypes.data, base.ctypes.data + nbytes))
        weakref.finalize(base, self._free_pinned, memory, span).atexit = False
        return base[:nbytes]

    def _free_pinned(self, memory, span):
        """Whoever asks next may get it, whatever a stream has still to copy."""
        memory[:] = b"\xff" * len(memory)
        self._pinned.remove(span)

    def wrap(self, array):
        self._outside_capture("wrapping")
        if isinstance(array, DeviceArray) and array.device == self.device:
            return array
        about = array.__cuda_array_interface__
        if (block := self._block_at(address := about["data"][0])) is None:
            home = getattr(array, "device", "another device")
            raise ValueError(f"the array lies on {home!r} but {self.device!r} is in use; copy it there")
        if about.get("stream") not in (None, 1, 2):  # the default streams
            self.order(about["stream"], self.current())
        view = block.memory[address - block.address :]
        strides = about.get("strides")
        view = np.ndarray(about["shape"], np.dtype(about["typestr"]), view, 0, strides)
        return DeviceArray(view, block, array, self.device, array)

    def address(self, buffer):
        return buffer.address if isinstance(buffer, DeviceArray) else buffer.ctypes.data

    def _block_at(self, address):
        """The live allocation in which an address lies."""
        with self._lock:
            i = bisect_right(self._blocks, address, key=lambda entry: entry[0]) - 1
            block = self._blocks[i][1] if i >= 0 else None
        return block if block is not None and address < block.address + block.nbytes else None

    def _block(self, what, address, nbytes=1):
        if (block := self._block_at(address)) is None or address + nbytes > block.address + block.nbytes:
            raise Violation(f"{what}: {nbytes} bytes at {address:#x} are no live memory of {self.device}")
        return block

    def copy(self, source, destination, stream):
        if source.nbytes != destination.nbytes or not (source.flags.c_contiguous and destination.flags.c_contiguous):
            raise ValueError(f"copy: {source.shape} into {destination.shape}: expected equal bytes, contiguous")
        on_device = [isinstance(b, DeviceArray) for b in (source, destination)]
        pageable = not all(d or self._is_pinned(b) for d, b in zip(on_device, (source, destination), strict=True))
        if pageable:
            self._outside_capture("a copy with a pageable array")
        if not source.nbytes:
            return
        kind = {(1, 1): "on the device", (0, 1): "to the device", (1, 0): "to the host"}[(*map(int, on_device),)]
        to, from_, nbytes = self.address(destination), self.address(source), source.nbytes
        blocks = [self._block("copy", at, nbytes) if d else None for at, d in zip((from_, to), on_device, strict=True)]
        spans = [b and (at - b.address, at - b.address + nbytes) for b, at in zip(blocks, (from_, to), strict=True)]
        uses = [(b, i == 1, s) for i, (b, s) in enumerate(zip(blocks, spans, strict=True)) if b]

        def move():
            ctypes.memmove(to, from_, nbytes)

        self._give(stream, f"{'pageable ' * pageable}copies {kind}", "copy", uses, move)
        if pageable:
            self._wait(stream)

    def _is_pinned(self, array):
        return any(
            start <= array.ctypes.data and array.ctypes.data + array.nbytes <= end for start, end in self._pinned
        )

    # ---- work

    def function(self, source, name):
        self._outside_capture("compilation")
        self._expect_scope("compilation")
        if source not in self._compiled:
            self._compiled.add(source)
            self.counts["compilations"] += 1
        return SimpleNamespace(name=name, source=source, unit=_compiling(source))

    def launch(self, function, grid, block, arguments):
        values = [[*a] if isinstance(a, ctypes.Array) else a.value for a in arguments]
        uses = [
            (self._block(f"{function.name}: {key}", value), not kind.startswith("const"))
            for (kind, key), value in zip(codegen.signature(function.source, function.name), values, strict=True)
            if "*" in kind and value
        ]
        bound = Bound(function, grid, block, arguments, values)
        return self._call("launches", function.name, uses, lambda: bound(self.order_seed), bound)

    def gemm(self, arguments):
        places = [(at, n * t.itemsize) for at, n, t in blas.extents(arguments)]
        uses = [(self._block("gemm", *place), i == 2) for i, place in enumerate(places)]
        return self._call("products", "gemm", uses, lambda: blas.gemm(arguments))

    def _call(self, kind, name, uses, work, kept=None):
        def run(stream, kept=kept):
            self._expect_scope(name)
            self._give(stream, kind, name, uses, work)

        return run

    # ---- order

    def stream(self):
        self._outside_capture("making a stream")
        number = 1 + len(self._queues)
        self._queues[number] = Queue(number)
        return number

    def current(self):
        return getattr(self._thread, "stream", NULL)

    @contextmanager
    def on(self, stream):
        """Inside, this stream is the caller's current one."""
        before, self._thread.stream = self.current(), stream
        try:
            yield
        finally:
            self._thread.stream = before

    def order(self, before, after):
        self._outside_capture("ordering streams")
        if before != after:
            first, second = self._queues[before], self._queues[after]
            with self._lock:
                count = first.given
                second.follow(first.seen())
                second.work.append(lambda: first.run(count))

    def synchronize(self, stream):
        self._outside_capture("waiting")
        self._expect_scope("waiting")
        self.counts["synchronisations"] += 1
        self._wait(stream)

    def _wait(self, stream):
        queue = self._queues[stream]
        with self._lock:
            queue.run(queue.given)
            for number, count in queue.seen().items():
                self._host[number] = max(count, self._host.get(number, 0))
        self._report()

    def _give(self, stream, kind, what, uses, work):
        """Let the stream, or the graph that is captured from it, have a piece of work of that kind."""
        self._report()
        if (capturing := self._capturing()) is not None:
            if stream != capturing[0]:
                raise Violation(f"{what} on stream {stream} while stream {capturing[0]} is captured")
            capturing[1].append(("nodes of graphs", what, uses, work))
            return
        self.counts[kind] += 1
        queue = self._queues[stream]
        with self._lock:
            queue.follow(self._host)
            meanwhile = [
                (b, span) for b, *how in sorted(uses, key=lambda use: use[1]) for span in b.use(what, queue, *how)
            ]
            queue.work.append(partial(_beside, meanwhile, work) if meanwhile else work)

    def capture(self, stream, body):
        if stream == NULL or stream not in self._queues:
            raise CaptureError("only a stream of the driver's own can be captured, the null stream never")
        self._outside_capture("capturing")
        self._expect_scope("capturing")
        self._thread.capturing = stream, (captured := [])
        try:
            body()
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        finally:
            self._thread.capturing = None

        def replay(stream):
            self.counts["graph launches"] += 1
            for node in captured:
                self._give(stream, *node)

        return replay

    def _capturing(self):
        """(stream, what it was given so far) while this thread captures."""
        return getattr(self._thread, "capturing", None)

    def _outside_capture(self, what):
        if self._capturing() is not None:
            raise Violation(f"{what} while a stream is captured")

    def _expect_scope(self, what):
        if current_device() != self.index:
            raise Violation(f"{what} for {self.device} while cuda:{current_device()} is the current device")


class Rehearsal(Paper):
    """A device on which nothing happens but that kernels are compiled, ahead of tests that will launch them."""

    def function(self, source, name):
        _compiling(source)
        return name

    def launch(self, function, grid, block, arguments):
        return lambda stream: None

    def gemm(self, arguments):
        return lambda stream: None


def _beside(meanwhile, work):
    """Work while others may be writing these spans."""
    with ExitStack() as spoilt:
        for block, span in meanwhile:
            spoilt.enter_context(block.spoilt(span))
        work()


# ---- compiling -----------------------------------------------------------------------------------------------------

_pool = ThreadPoolExecutor(2, "compiler")

FLOATS = {ctypes.c_float: "f32", ctypes.c_double: "f64"}
ENTRY = re.compile(r"\.entry (\w+)\(([^)]*)\)")
PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+) [^,]*?\w+(?:\[(\d+)\])?\s*(?:,|$)")


def _ptx_type(value):
    """f32, f64, or the number of bytes of anything else."""
    return FLOATS.get(type(value)) or ctypes.sizeof(value)


@cache
def _compiling(source):
    """The future (library, types of the parameters) of a source, so that the units of a step are compiled together."""
    return _pool.submit(lambda: (build(source), ptx_parameters(source)))


def ptx_parameters(source):
    """{kernel: the types of its parameters, as _ptx_type gives them} by NVRTC."""
    text = "\0".join([version("nvidia-cuda-nvrtc"), *OPTIONS, source])
    path = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if not path.exists():
        ptx = compile_cuda(source, "compute_75", "--disable-warnings").ptx
        found = {
            name: [_parsed(*p) for p in PARAMETER.findall(" ".join(listed.split()))]
            for name, listed in ENTRY.findall(ptx)
        }
        part = path.with_suffix(f".{threading.get_ident()}")
        part.write_text(json.dumps(found), "utf-8")
        part.replace(path)
    return json.loads(path.read_text("utf-8"))


def _parsed(kind, length):
    if kind in FLOATS.values():
        return kind
    return int(kind[1:]) // 8 * int(length or 1)
