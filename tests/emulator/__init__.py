"""Kernels on the CPU: g++ compiles a kernel's unmodified source under emulation.h, and NumPy arrays are its arguments.

    library = build(codegen.source("relu"))
    library.launch("relu_forward", grid=2, block=64, order=1, y=y, x=x, b=b, rows=1, columns=128, members=1)

`run` launches in several orders of threads and blocks, `bind` takes addresses; see emulation.h for what is emulated.
"""

import atexit
import ctypes
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
from contextlib import suppress
from functools import cache
from math import prod
from operator import index
from pathlib import Path

import ml_dtypes
import numpy as np

from gpubackprop.backends import codegen

__all__ = ["ORDERS", "EmulationError", "Library", "build", "cache_folder", "sanitizer_environment"]

ORDERS = range(5)  # the natural one; two that go warp by warp; two that mix the threads of several blocks
LIMITS = (2**31 - 1, 65_535, 65_535, 1024, 1024, 64)  # of CUDA: grid, block
HERE = Path(__file__).parent
OPTIONS = [
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wconversion",
    "-Wdouble-promotion",
    "-Werror",
]
OPTIONS += [
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
]  # libraries define the same names and must not share them
# Without optimisation, which would take twice as long, and drop reads that nothing needs before they are watched.
SANITIZERS = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
SCHEDULER = ["-O2", "-fsanitize=address"]
KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\w+)\)\s+(\w+)\(')
NUMPY = {"e": np.float16, "E": ml_dtypes.bfloat16}  # the other codes are NumPy's own


class EmulationError(RuntimeError):
    """Threads that wait for each other for ever, results that depend on their order, or a write outside an array."""


def compiler():
    """The path of g++; RuntimeError, not a skipped test, if it is not installed."""
    if (path := shutil.which("g++")) is None:
        raise RuntimeError(
            "kernels run on the CPU by g++, which is not installed: apt install g++ (Debian) or gcc-c++ (Fedora)"
        )
    return path


def sanitizer_environment():
    """The environment of a process whose libraries are sanitized: it must load the sanitizers before all else."""
    commands = [[compiler(), f"-print-file-name={name}.so"] for name in ("libasan", "libubsan", "libstdc++")]
    paths = [subprocess.run(c, capture_output=True, check=True, text=True).stdout.strip() for c in commands]
    return os.environ | {
        "LD_PRELOAD": ":".join(paths), "GPUBACKPROP_SANITIZE": "1", "UBSAN_OPTIONS": "print_stacktrace=1",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python leaks; fibers have their own stacks
    }  # fmt: skip


# ---- compiling -----------------------------------------------------------------------------------------------------


def build(source, *, sanitize=None, options=()):
    """The library of a self-contained source, from the cache if it was built before.

    sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer; by default in a process that loaded them.
    """
    loaded = os.environ.get("GPUBACKPROP_SANITIZE") == "1"
    if sanitize and not loaded:
        raise RuntimeError("a sanitized library needs a process started with sanitizer_environment()")
    return _build(source, loaded if sanitize is None else sanitize, tuple(options))


@cache
def _build(source, sanitize, more):
    kernels = dict(reversed(pair) for pair in KERNEL.findall(source))
    exports = "".join(f"KERNEL({name}, {threads})\n" for name, threads in kernels.items())
    text = f"{source}\nnamespace gpubackprop {{\n{exports}}}\n"
    options = [*OPTIONS, *SANITIZERS * sanitize, *more]
    scheduler = [*OPTIONS, *SCHEDULER[: 2 if sanitize else 1], *more, "-c", "-I", str(HERE)]
    runtime = _cached(".o", (HERE / "emulation.cpp").read_text("utf-8"), scheduler)
    header = ["-include", str(_header(tuple(options))), "-I", str(HERE / "include")]
    return Library(_cached(".so", text, [*options, *header, "-shared"], [str(runtime)]), source, kernels, sanitize)


@cache
def _header(options):
    """emulation.h beside what the compiler makes of it ahead of time, which saves a third of each build."""
    text = (HERE / "emulation.h").read_text("utf-8")
    made = _cached(".gch", text, [*options, "-x", "c++-header"])
    folder = made.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, content in (("emulation.h", text.encode()), ("emulation.h.gch", made.read_bytes())):
        if not (path := folder / name).exists():
            (part := folder / f"{name}.{os.getpid()}.{threading.get_ident()}").write_bytes(content)
            os.replace(part, path)
    return folder / "emulation.h"


@cache
def _surroundings():
    """What a build depends on beside its own text and options."""
    parts = [p.read_bytes() for p in sorted(HERE.rglob("*.h"))]
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    return hashlib.sha256(b"\0".join([version, *parts])).hexdigest()


def cache_folder():
    """Where compiled code is kept: this user's alone, because it is loaded; else one that goes with the process."""
    folder = Path(tempfile.gettempdir()) / f"gpubackprop-emulator-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077:
        return folder
    return _own_folder()


@cache
def _own_folder():
    folder = Path(tempfile.mkdtemp(prefix="gpubackprop-emulator-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _cached(suffix, text, options, objects=()):
    """The compiled text; processes that build it at the same time do not disturb each other."""
    digest = hashlib.sha256("\0".join([_surroundings(), text, *options, *objects]).encode()).hexdigest()
    folder = cache_folder()
    path = folder / f"{digest[:32]}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            (source := Path(work) / "unit.cpp").write_text(text, "utf-8")
            made = Path(work) / f"unit{suffix}"
            command = [compiler(), *options, str(source), *objects, "-o", str(made)]
            plain = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
            done = subprocess.run(command, capture_output=True, text=True, env=plain)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            os.replace(made, path)
    return path


# ---- launching -----------------------------------------------------------------------------------------------------


class _Parameter(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_char_p), ("code", ctypes.c_char_p), ("size", ctypes.c_uint64))


class _Launch(ctypes.Structure):
    _fields_ = (("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("order", ctypes.c_uint64))


class Parameter:
    """What the compiler saw of one parameter: `pointer`, `written`, the dtype, or None for a structure."""

    def __init__(self, name, kind, code, size):
        self.name, self.pointer, self.written, self.size = name, kind != "", kind == "*", size
        self.dtype = None if code == "V" else np.dtype(NUMPY.get(code, code))

    def pack(self, value):
        """The bytes of a number, an address or a structure."""
        if self.pointer:
            return ctypes.c_uint64(index(value or 0))
        if self.dtype is None:
            data = bytes(value) if isinstance(value, ctypes.Structure) else np.asarray(value, np.int64).tobytes()
            if len(data) != self.size:
                raise TypeError(f"{self.name} takes a structure of {self.size} bytes, got {len(data)}")
            return ctypes.create_string_buffer(data, self.size)
        if self.dtype.kind in "iub":
            number, limits = index(value), np.iinfo(self.dtype)
            if not limits.min <= number <= limits.max:
                raise OverflowError(f"{self.name}={number} does not fit into {self.dtype}")
            value = number
        return ctypes.create_string_buffer(np.array(value, self.dtype).tobytes(), self.size)


class Library:
    """The kernels of one source. Launches hold the GIL, so that they follow one another."""

    def __init__(self, path, source, kernels, sanitize):
        self.sanitize = sanitize
        self._library = ctypes.PyDLL(str(path))
        self.parameters = {name: self._parameters(source, name) for name in kernels}
        self._threads = {name: self._function(f"emulated_threads_{name}", ctypes.c_int)() for name in kernels}
        types = ctypes.c_char_p, ctypes.POINTER(_Launch), ctypes.c_void_p
        self._functions = {name: self._function(f"emulated_{name}", *types) for name in kernels}

    def _function(self, name, result, *types):
        function = self._library[name]
        function.restype, function.argtypes = result, types
        return function

    def _parameters(self, source, name):
        """Their names from the source, all else from what the compiler saw."""
        names = [key for _, key in codegen.signature(source, name) if key]
        count = self._function(f"emulated_count_{name}", ctypes.c_int)()
        seen = self._function(f"emulated_parameters_{name}", ctypes.POINTER(_Parameter))()[:count]
        return [Parameter(k, p.kind.decode(), p.code.decode(), p.size) for k, p in zip(names, seen, strict=True)]

    def _known(self, name):
        if name not in self.parameters:
            raise ValueError(f"no kernel {name!r}; the source has {', '.join(self.parameters)}")
        return self.parameters[name]

    def bind(self, name, grid, block, arguments):
        """call(order=0) of the kernel with numbers, addresses and structures in its own order; nothing is copied."""
        parameters = self._known(name)
        if len(arguments) != len(parameters):
            raise TypeError(f"{name} takes {len(parameters)} arguments, got {len(arguments)}")
        grid, block, most = _triple(grid), _triple(block), self._threads[name]
        inside = all(0 < n <= limit for n, limit in zip(grid + block, LIMITS, strict=True))
        if not (inside and prod(block) <= most):
            raise ValueError(f"{name}: grid {grid}, blocks {block}; a block has at most {most} threads")
        packed = [p.pack(v) for p, v in zip(parameters, arguments, strict=True)]
        pointers, function = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, packed)), self._functions[name]

        def call(order=0, keep=packed):
            if (message := function(_Launch(grid, block, order), pointers)) is not None:
                raise EmulationError(message.decode())

        return call

    def launch(self, name, grid, block, order=0, **arguments):
        """Run the kernel with arguments by name: arrays, None for NULL, numbers, structures.

        Arrays are checked, copied into memory of exactly their extent and alignment, and what is written comes back.
        """
        parameters = self._known(name)
        names = [p.name for p in parameters]
        if missing := [k for k in names if k not in arguments]:
            raise TypeError(f"{name} needs {', '.join(missing)}")
        if unknown := [k for k in arguments if k not in names]:
            raise TypeError(f"{name} has no parameter {', '.join(unknown)}; it has {', '.join(names)}")
        strided = any(p.dtype is None for p in parameters)
        blocks, values = {}, []
        try:
            for p in parameters:
                value = arguments[p.name]
                if p.pointer and value is not None:
                    _check(name, p, value, strided)
                    value = self._place(blocks, p, value)
                values.append(value)
            self.bind(name, grid, block, values)(order)
            for memory in blocks.values():
                memory.collect(name)
        finally:
            for memory in blocks.values():
                memory.free()

    def run(self, name, grid, block, **arguments):
        """Launch in each of ORDERS, always from the same arrays; EmulationError unless all give the same bits."""
        arrays = {k: a for k, a in arguments.items() if isinstance(a, np.ndarray)}
        written = {p.name for p in self._known(name) if p.written}
        before = {k: a.copy() for k, a in arrays.items() if k in written}
        first = {}
        for order in ORDERS:
            for k, a in before.items():
                arrays[k][...] = a
            self.launch(name, grid, block, order, **arguments)
            for k in before:
                if first.setdefault(k, arrays[k].tobytes()) != arrays[k].tobytes():
                    raise EmulationError(f"{name}: {k} depends on the order of threads and blocks (seed {order})")

    def _place(self, blocks, parameter, array):
        """The address of a copy of the array; the same memory under two names stays one."""
        low, high = _bounds(array)
        for other in blocks.values():
            if (low, high) != (other.low, other.high) and low < other.high and other.low < high:
                raise ValueError(f"{parameter.name} overlaps {other.name} without being the same array")
        if (low, high) not in blocks:
            blocks[low, high] = _Memory(parameter.name, low, high, self.sanitize)
        memory = blocks[low, high]
        memory.written |= parameter.written
        return memory.address + array.ctypes.data - low


def _triple(size):
    size = (size,) if isinstance(size, int) else tuple(size)
    return size + (1,) * (3 - len(size))


def _check(kernel, parameter, array, strided):
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{kernel}: {parameter.name} takes an array, got {type(array).__name__}")
    if array.dtype != parameter.dtype:
        raise TypeError(f"{kernel}: {parameter.name} is {array.dtype}, the kernel's type is {parameter.dtype}")
    if not (strided or array.flags.c_contiguous):
        raise ValueError(f"{kernel}: {parameter.name} is not C-contiguous")
    if parameter.written and not array.flags.writeable:
        raise ValueError(f"{kernel}: {parameter.name} is written, but read-only")


def _bounds(array):
    """The addresses of the first byte of an array and past its last one."""
    reach = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    low = array.ctypes.data + sum(min(r, 0) for r in reach)
    return (low, low + sum(map(abs, reach)) + array.itemsize) if array.size else (low, low)


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_libc.free.restype, _libc.free.argtypes = None, [ctypes.c_void_p]


class _Memory:
    """A copy of [low, high) as far off a boundary of 16 bytes, in a block of malloc that ends where it ends.

    AddressSanitizer watches the end; without it, a margin shows what was written past it.
    """

    MARGIN = b"\xa5" * 64

    def __init__(self, name, low, high, sanitize):
        self.name, self.low, self.high, self.written = name, low, high, False
        self.offset, self.margin = low % 16, b"" if sanitize else self.MARGIN
        self.block = _libc.malloc(self.offset + high - low + len(self.margin))
        self.address = self.block + self.offset
        ctypes.memmove(self.block, self.MARGIN, self.offset)
        ctypes.memmove(self.address, low, high - low)
        ctypes.memmove(self.address + high - low, self.margin, len(self.margin))

    def collect(self, kernel):
        """Bring back what was written."""
        size = self.high - self.low
        if ctypes.string_at(self.block, self.offset) != self.MARGIN[: self.offset]:
            raise EmulationError(f"{kernel} wrote before {self.name}")
        if ctypes.string_at(self.address + size, len(self.margin)) != self.margin:
            raise EmulationError(f"{kernel} wrote past the end of {self.name}")
        if self.written:
            ctypes.memmove(self.low, self.address, size)

    def free(self):
        _libc.free(self.block)
