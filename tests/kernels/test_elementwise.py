"""Every generated elementwise kernel computes what NumPy computes, in every type, at every shape."""

from functools import cache

import ml_dtypes
import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, exact

from gpubackprop import formulas
from gpubackprop.backends import chunked, codegen
from gpubackprop.backends.base import Workspace
from gpubackprop.backends.geometry import elementwise_geometry
from gpubackprop.formulas import EXACT, FUNCTIONS, apply, name

KERNELS = {k.name: k for row in codegen.names() for k in codegen.kernels(row) if isinstance(k, codegen.Kernel)}
INEXACT = [f for f in FUNCTIONS if f not in EXACT]  # they round differently from one library to the next

# The functions each as a kernel, and outputs that are each other's inputs.
SINGLE = {f: codegen.Kernel(f"only_{f}", {"y": apply(f, *map(name, "xz"[: FUNCTIONS[f]]))}, f) for f in INEXACT}
SWAP = codegen.Kernel("swap", {"a": name("b"), "b": name("a")}, "swap")

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-3, -1e-3, 6.0, 20.0, -20.0, 1e4, -1e4, np.inf, -np.inf, np.nan]
GROUPS, ROWS, STRIDE = 3, 4, 2  # in a step table: groups of parameters, steps, and places from one group to the next


@cache
def library(dtype):
    return build(codegen.unit([*KERNELS.values(), SWAP], dtype))


@cache
def functions(dtype):
    return build(codegen.unit(SINGLE.values(), dtype))


def launch(kernel, dtype, arrays, shape, geometry=None, **more):
    """Run the kernel in every order over (members, rows, columns) arrays by name."""
    members, rows, columns = shape
    geometry = geometry or elementwise_geometry(rows, columns, members, 16 // DTYPES[dtype].itemsize)
    given = {"rows": rows, "columns": columns, "members": members} | more | arrays
    named = {p.name: given[p.name] for p in library(dtype).parameters[kernel.name]}
    library(dtype).run(kernel.name, geometry[0], geometry[1], **named)


def function(f, dtype):
    """The ufunc `f` as the kernels have it."""

    def call(*args):
        x, z = (np.ascontiguousarray(a) for a in np.broadcast_arrays(args[0], args[-1]))
        y = np.empty(x.shape, dtype)
        given = {"y": y, "x": x.astype(dtype), "z": z.astype(dtype), "rows": 1, "columns": x.size, "members": 1}
        named = {p.name: given[p.name] for p in functions(dtype.name).parameters[f"only_{f}"]}
        functions(dtype.name).launch(f"only_{f}", 1, 32, **named)
        return y

    return call


# ---- operands --------------------------------------------------------------------------------------------------------


def operands(kernel, dtype, shape, offset=0):
    """Arrays for every name, `offset` elements off a boundary: pairs of special numbers, then ordinary ones."""
    rng = np.random.default_rng(7)
    pairs = np.array(np.meshgrid(SPECIAL, SPECIAL)).reshape(2, -1)

    def draw(k, i):
        stored = arithmetic(dtype) if k in kernel.wide else dtype
        size = (shape[0], shape[2]) if k in kernel.per_column else (1,) if k in kernel.single else shape
        a = 3 * rng.standard_normal(np.prod(size))
        if a.size > pairs.shape[1] and size == shape:
            a[: pairs.shape[1]] = pairs[i % 2]
        return np.concatenate([np.zeros(offset), a]).astype(stored)[offset:].reshape(size)

    with np.errstate(over="ignore"):
        used = dict.fromkeys((*kernel.graph, *kernel.reads, *kernel.per_column, *kernel.single))
        return {k: draw(k, i) for i, k in enumerate(used)}


def step_table(kernel, dtype, columns):
    """The arguments that belong to the table, NaN but for the step's row, and what each element's scalars are."""
    if not kernel.table:
        return {}, {}
    groups = np.arange(-(-columns // 64), dtype=np.uint8) % GROUPS if kernel.groups else np.zeros(1, np.uint8)
    stride = STRIDE * len(kernel.table)
    table = np.full((ROWS, 1 + stride * GROUPS), np.nan, arithmetic(dtype))
    state = np.full(4, 3)
    state[kernel.row] = 1
    at = {k: 1 + i for i, k in enumerate(kernel.table)}
    scalars = {}
    for i, k in enumerate(kernel.table):
        values = table[1, at[k] :: stride][:GROUPS] = 0.1 * (i + 1) + 0.03 * np.arange(GROUPS)
        scalars[k] = np.repeat(values[groups], 64)[:columns] if kernel.groups else values[0]
    given = {"table": table, "width": table.shape[1], "groups": groups, "stride": stride, "state": state}
    given |= {"control": np.array([1, 1, 1, 0], table.dtype), "ticket": np.zeros(1, np.uint32)}
    return given | {f"{k}_at": v for k, v in at.items()}, scalars


# ---- references ------------------------------------------------------------------------------------------------------


def spread(kernel, dtype, arrays, scalars, shape):
    """Every operand at full size, in the type that is computed with."""
    of_columns = {k: arrays[k][:, None] for k in kernel.per_column}
    return {
        k: np.ascontiguousarray(np.broadcast_to(a, shape), arithmetic(dtype))
        for k, a in {**arrays, **scalars, **of_columns}.items()
    }


def by_numpy(kernel, values, shape):
    """The outputs by the NumPy rendering."""
    writes = {k: values[k].copy() for k in kernel.graph}
    used = formulas.free_names(*kernel.graph.values())
    reads = {k: writes[k] if k in kernel.updates else values[k] for k in used}
    dtype = next(iter(values.values())).dtype
    for call in chunked.bind(kernel.graph, reads, writes, shape, dtype, Workspace()):
        call()
    return writes


def by_kernels(kernel, values):
    """The outputs with exp and the like as the kernels have them, and NumPy for all the rest."""
    shape, dtype = next((a.shape, a.dtype) for a in values.values())
    table = chunked.UFUNCS | {f: function(f, dtype) for f in INEXACT}
    table["where"] = lambda c, a, b: np.where(c, a, b).astype(dtype)
    return {k: np.broadcast_to(formulas.evaluate(e, values, table), shape) for k, e in kernel.graph.items()}


def assert_same_bits(actual, expected):
    """Of numbers; any NaN is as good as another."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    np.testing.assert_array_equal(actual, expected)
    numbers = ~np.isnan(actual)
    np.testing.assert_array_equal(np.signbit(actual)[numbers], np.signbit(expected)[numbers])


def check(kernel, dtype, shape, offset=0, geometry=None):
    """Equal bits but for the functions; with NumPy's, a difference of an ulp may grow where a formula cancels."""
    arrays = operands(kernel, DTYPES[dtype], shape, offset)
    given, scalars = step_table(kernel, DTYPES[dtype], shape[2])
    values = spread(kernel, DTYPES[dtype], arrays, scalars, shape)
    with np.errstate(all="ignore"):
        numpy = by_numpy(kernel, values, shape)
        expected = numpy if exact(kernel) else by_kernels(kernel, values)
    launch(kernel, dtype, arrays, shape, geometry, **given)
    for k in kernel.graph:
        with np.errstate(over="ignore"):
            rounded, close = expected[k].astype(arrays[k].dtype), numpy[k].astype(arrays[k].dtype)
        assert_same_bits(arrays[k], rounded)
        bound = 128 * float(np.finfo(numpy[k].dtype).eps)
        other = (
            float(ml_dtypes.finfo(close.dtype).eps) if close.dtype != numpy[k].dtype else 0
        )  # the neighbour of 16 bits
        pair = (np.asarray(a, np.float64) for a in (arrays[k], close))
        np.testing.assert_allclose(*pair, rtol=bound + other, atol=bound)


# ---- tests -----------------------------------------------------------------------------------------------------------

SMALL_GRID = ((3, 2, 2), (4, 2, 1))  # every thread takes several turns
SHAPES = {
    "many blocks": ((1, 1, 3001), 0, None),
    "members": ((3, 5, 64), 0, SMALL_GRID),
    "tails": ((2, 3, 131), 0, SMALL_GRID),
    "misaligned": ((1, 1, 260), 1, SMALL_GRID),
    "one": ((1, 1, 1), 0, None),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda k: k.name)
def test_kernels_compute_what_numpy_computes(kernel, dtype):
    for shape, offset, geometry in SHAPES.values():
        check(kernel, dtype, shape, offset, geometry)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_may_be_each_others_inputs(dtype):
    a, b = np.arange(9).astype(DTYPES[dtype]), np.ones(9).astype(DTYPES[dtype])
    launch(SWAP, dtype, {"a": a, "b": b}, (1, 1, 9))
    assert a.tolist() == [1] * 9 and b.tolist() == list(range(9))


@pytest.mark.parametrize("good, applied", [(None, 1), (1, 1), (0, 0)])
def test_the_last_block_moves_on_to_the_next_step(good, applied):
    kernel, dtype, shape = KERNELS["sgd_update_half"], "bfloat16", (1, 1, 700)
    given, _ = step_table(kernel, DTYPES[dtype], shape[2])
    given["state"] = np.array([3, 1, 5, 9])
    given["control"] = None if good is None else np.array([1, 1, good, 0], np.float32)
    launch(kernel, dtype, operands(kernel, DTYPES[dtype], shape), shape, SMALL_GRID, **given)
    assert given["state"].tolist() == [4, 1 + applied, 5, 9] and given["ticket"] == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("f", [f for f in INEXACT if FUNCTIONS[f] == 1])
def test_functions_are_within_2_ulp(f, dtype):
    if np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("needs an extended type as the oracle")
    x = np.linspace(-30, 30, 20001).astype(dtype)
    x = np.exp(x) if f in ("log", "log1p") else x
    y = function(f, np.dtype(dtype))(x)
    expected = chunked.UFUNCS[f](x.astype(np.longdouble))
    assert np.max(np.abs(y - expected) / np.spacing(np.abs(expected).astype(dtype))) <= 2
