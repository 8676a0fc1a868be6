"""Graphs of formulas evaluated by NumPy, in the type that kernels compute in."""

import ml_dtypes
import numpy as np

from gpubackprop import formulas
from gpubackprop.backends import chunked, codegen

DTYPES = {d: np.dtype(ml_dtypes.bfloat16 if d == "bfloat16" else d) for d in codegen.ITEMSIZE}


def arithmetic(dtype):
    """What a kernel of that type computes in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def exact(kernel):
    """Whether the kernel's values are the same bits on every backend."""
    return formulas.exact(kernel.graph.values())


def evaluated(kernel, values, shape, dtype):
    """The graph's values before they are stored: operands broadcast to the shape."""
    wide = arithmetic(dtype)
    values = {k: np.broadcast_to(v, shape).astype(wide) for k, v in values.items()}
    table = chunked.UFUNCS | {"where": lambda c, a, b: np.where(c, a, b).astype(wide)}
    with np.errstate(all="ignore"):
        return {k: np.broadcast_to(formulas.evaluate(e, values, table), shape) for k, e in kernel.graph.items()}


def assert_stored(actual, expected, bits=True):
    """What a kernel stored is the expected value rounded; bits=False: within the functions' rounding."""
    with np.errstate(over="ignore"):
        expected = expected.astype(actual.dtype)
    if bits:
        np.testing.assert_array_equal(np.asarray(actual, np.float64), np.asarray(expected, np.float64))
        return
    bound = 128 * float(np.finfo(arithmetic(actual.dtype)).eps) + float(ml_dtypes.finfo(actual.dtype).eps)
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), rtol=bound, atol=bound)


def shifted(array, offset):
    """A copy `offset` elements off a boundary of 16 bytes."""
    spare = np.zeros(array.size + offset + 16, array.dtype)
    start = -spare.ctypes.data % 16 // array.itemsize + offset
    moved = spare[start : start + array.size].reshape(array.shape)
    moved[...] = array
    return moved
