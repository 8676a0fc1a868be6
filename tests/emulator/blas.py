"""cuBLAS's products by a Fortran BLAS: the one that NumPy has loaded, given the very arguments."""

import ctypes
import glob
import itertools
import re
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

from gpubackprop.backends.cublas import SUPPORTED
from gpubackprop.backends.rows import as_tf32

from .memory import bytes_at

__all__ = ["extents", "gemm"]

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@cache
def _routine(letter):
    """(function, its integer type) of sgemm or dgemm: scipy-openblas's in NumPy's wheels, any other BLAS elsewhere."""
    wheel = glob.glob(str(Path(np.__file__).parent.parent / "numpy.libs" / "*blas*"))
    mapped = re.findall(r"\s(/\S*(?:blas|mkl_rt)\S*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    for file in dict.fromkeys((*wheel, *mapped)):
        library = ctypes.CDLL(file)
        for prefix, suffix in itertools.product(("scipy_", ""), ("64_", "_64_", "_", "")):
            if (routine := getattr(library, f"{prefix}{letter}gemm{suffix}", None)) is not None:
                return routine, ctypes.c_int64 if "64" in suffix else ctypes.c_int32
    raise RuntimeError("NumPy's BLAS was not found")


def extents(g):
    """(address, elements, dtype) of A, B and C, all matrices of the batch; ValueError for what cuBLAS refuses."""
    if g.a_type != g.b_type or (g.a_type, g.c_type, g.compute) not in SUPPORTED:
        raise ValueError(f"gemm: cuBLAS has no {g.a_type} × {g.b_type} -> {g.c_type} computed in {g.compute}")
    found = []
    for name, rows, columns, address, kind, leading, stride in (
        ("A", *((g.k, g.m) if g.transpose_a else (g.m, g.k)), g.a, g.a_type, g.lda, g.stride_a),
        ("B", *((g.n, g.k) if g.transpose_b else (g.k, g.n)), g.b, g.b_type, g.ldb, g.stride_b),
        ("C", g.m, g.n, g.c, g.c_type, g.ldc, g.stride_c),
    ):
        if leading < max(1, rows) or min(rows, columns, g.batch) < 1:
            raise ValueError(f"gemm: {name} is {rows}×{columns} with leading dimension {leading}, batch {g.batch}")
        found.append((address, leading * (columns - 1) + rows + stride * (g.batch - 1), np.dtype(DTYPES[kind])))
    return found


def gemm(g):
    """C = op(A) op(B) + beta C for every matrix; 16-bit types are converted around sgemm, operands rounded for tf32."""
    a, b, c = (bytes_at(at, n * t.itemsize).view(t) for at, n, t in extents(g))
    real = np.float64 if g.compute == "float64" else np.float32
    routine, integer = _routine("d" if real == np.float64 else "s")
    number = ctypes.c_double if real == np.float64 else ctypes.c_float
    left, right = (_rounded(x.astype(real, copy=False), g.compute) for x in (a, b))
    out = c.astype(real, copy=False)
    flags = [b"NT"[t : t + 1] for t in (g.transpose_a, g.transpose_b)]
    for i in range(g.batch):
        at = [x[i * s :].ctypes.data for x, s in ((left, g.stride_a), (right, g.stride_b), (out, g.stride_c))]
        values = (integer(g.m), integer(g.n), integer(g.k), number(1), at[0], integer(g.lda), at[1], integer(g.ldb),
                  number(g.beta), at[2], integer(g.ldc))  # fmt: skip
        given = [ctypes.c_void_p(v) if isinstance(v, int) else ctypes.byref(v) for v in values]
        routine(*flags, *given, ctypes.c_size_t(1), ctypes.c_size_t(1))
    if out is not c:
        with np.errstate(over="ignore"):
            c[...] = out


def _rounded(x, compute):
    if compute != "tf32":
        return x
    calls = []
    rounded = as_tf32(x, calls)
    for call in calls:
        call()
    return rounded
