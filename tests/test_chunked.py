"""Formulas compiled to chunked NumPy calls against the same formulas evaluated directly."""

import math
import operator
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubackprop.backends import get_backend
from gpubackprop.backends.chunked import CHUNK, bind, chunks, compile_graph
from gpubackprop.formulas import ADAM, RESULT, apply, evaluate, free_names, name, number, parse

BACK = get_backend("cpu")
DTYPES = [np.float32, np.float64]
DIRECT = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "neg": operator.neg, "abs": np.abs,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
    "where": np.where, "maximum": np.maximum, "minimum": np.minimum, "pow": np.power,
    **{f: getattr(np, f) for f in ("exp", "log", "log1p", "expm1", "sqrt", "sin", "cos", "tanh")},
}  # fmt: skip


def direct(e, arrays, dtype):
    """The value of a graph, one whole array at a time."""
    with np.errstate(all="ignore"):
        value = evaluate(e, arrays, {**DIRECT, "where": lambda c, a, b: np.where(c, dtype(a), dtype(b))})
    shape = np.broadcast_shapes(*(a.shape for a in arrays.values()))
    return np.broadcast_to(np.asarray(value, dtype), shape)


def compiled(graph, reads, shape, dtype, writes=None, **how):
    """The graph's outputs by the backend; `writes` names arrays to write into."""
    out = {k: np.full(shape, 7, dtype) for k in graph} if writes is None else writes
    BACK.elementwise("test", graph, reads, out, **how).run()
    return out


def assert_same_bits(a, b):
    """Equal values, and equal signs of zero; a NaN is a NaN."""
    np.testing.assert_array_equal(a, b)
    there = ~np.isnan(b)
    np.testing.assert_array_equal(np.signbit(a)[there], np.signbit(b)[there])


# ---- random formulas -----------------------------------------------------------------------------------------------

LITERALS = [0.0, -0.0, 1.0, -1.0, 0.1, 3.0, 1e-30, -7e20]
leaves = st.one_of(st.sampled_from("abcd").map(name), st.sampled_from(LITERALS).map(number))


def extend(below):
    named = st.sampled_from("abcd").map(name)
    binary = st.tuples(st.sampled_from("+-*/"), below, named) | st.tuples(st.sampled_from("+-*/"), named, below)
    unary = st.tuples(
        st.sampled_from(["neg", "abs", "sqrt"]), st.tuples(st.just("+"), below, named).map(lambda t: apply(*t))
    )
    test = st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), below, named).map(lambda t: apply(*t))
    select = st.tuples(st.just("where"), test, below, below)
    return st.one_of(binary, unary, select, select).map(lambda t: apply(*t))


trees = st.recursive(leaves, extend, max_leaves=20)
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, 1.0, -1.0]
SHAPES = [((), (), (), ()), ((5,), (5,), (5,), ()), ((2, 3), (3,), (2, 1), (1, 1)),
          ((4, 2, 3), (2, 1), (4, 1, 1), (3,)), ((0, 3), (3,), (0, 1), ()), ((1,), (1, 1), (), (1,))]  # fmt: skip


def operands(shapes, dtype, seed):
    """Arrays a, b, c, d with special values among the ordinary."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for key, shape in zip("abcd", shapes, strict=True):
        values = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, shape)
        arrays[key] = np.where(rng.random(shape) < 0.2, rng.choice(SPECIAL, shape), values).astype(dtype)
    return arrays


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(graph=st.lists(trees, min_size=1, max_size=3), shapes=st.sampled_from(SHAPES), seed=st.integers(0, 99))
def test_random_formulas_are_bit_equal(dtype, graph, shapes, seed):
    arrays = operands(shapes, dtype, seed)
    shape = np.broadcast_shapes(*shapes)
    graph = {f"y{i}": e for i, e in enumerate(graph)}
    reads = {k: arrays[k] for k in free_names(*graph.values())}
    for key, value in compiled(graph, reads, shape, dtype).items():
        assert_same_bits(value, np.broadcast_to(direct(graph[key], arrays, dtype), shape))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(graph=st.lists(trees, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_outputs_over_inputs_read_what_stood_there_before(dtype, graph, seed):
    """a, b, c, d = f(a, b, c, d), …: whatever the order, every formula sees the old values."""
    arrays = operands([(7,)] * 4, dtype, seed)
    graph = dict(zip("abcd", graph, strict=False))
    expected = {k: direct(e, {k: a.copy() for k, a in arrays.items()}, dtype) for k, e in graph.items()}
    compiled(graph, arrays, (7,), dtype, {k: arrays[k] for k in graph})
    for key, value in expected.items():
        assert_same_bits(arrays[key], value)


IN_PLACE = [  # text, outputs expected from a = 1, 2, 3 and b = 10, 20, 30
    ("t = a\na = b\nb = t", [10, 20, 30], [1, 2, 3]),
    ("t = a\na = a - b\nb = t", [-9, -18, -27], [1, 2, 3]),
    ("a += b\nb = a - b", [11, 22, 33], [1, 2, 3]),
    ("a = b\nb = a * 2", [10, 20, 30], [20, 40, 60]),
    ("b = a", [1, 2, 3], [1, 2, 3]),
    ("a = where(a > 1, b, a)\nb = where(a > 5, 0, b)", [1, 20, 30], [10, 0, 0]),
    ("a = 5\nb = a", [5, 5, 5], [5, 5, 5]),
]


@pytest.mark.parametrize("text, a, b", IN_PLACE)
def test_assignments_in_place(text, a, b):
    arrays = {"a": np.array([1.0, 2, 3]), "b": np.array([10.0, 20, 30])}
    graph = parse(text)
    compiled(graph, arrays, (3,), np.float64, {k: arrays[k] for k in graph if k in arrays})
    assert (arrays["a"].tolist(), arrays["b"].tolist()) == (a, b)


@pytest.mark.parametrize("text, expected", [("where(a > 0, a, -0.0)", -0.0), ("where(a > 0, -0.0, a)", -1.0),
                                            ("where(a > 0, -0.0, 0)", 0.0), ("a * -0.0", 0.0)])  # fmt: skip
def test_minus_zero_is_not_zero(text, expected):
    compiled(parse("a + 0"), {"a": np.array([-1.0])}, (1,), np.float64)  # a literal 0 seen before changes nothing
    assert_same_bits(compiled(parse(text), {"a": np.array([-1.0])}, (1,), np.float64)[RESULT], np.array([expected]))


# ---- shapes and sizes ----------------------------------------------------------------------------------------------

SIZES = [(), (0,), (1,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3 * CHUNK + 5,), (2, CHUNK), (3, CHUNK // 2 + 1),
         (2, 3, CHUNK // 4), (CHUNK + 1, 1), (2, 0, 3), (5, 2 * CHUNK + 3)]  # fmt: skip


@pytest.mark.parametrize("shape", SIZES)
def test_chunks_cut_a_shape_into_contiguous_pieces_that_cover_it_once(shape):
    a = np.arange(math.prod(shape)).reshape(shape)
    pieces = [a[index] for index in chunks(shape)]
    assert all(p.size <= CHUNK and p.flags.c_contiguous for p in pieces)
    np.testing.assert_array_equal(np.concatenate([p.ravel() for p in pieces]), a.ravel())


FORMULA = parse(
    "t = where(a > b, a * c, sqrt(abs(b)) - 2)\nmaximum(t, -1) / (c + 3) + minimum(d, 0.5) * where(a < 0, 0, t)"
)
BROADCASTS = [
    lambda s: (s, s, s, s),
    lambda s: (s, s[-1:], (), (1,) * len(s)),
    lambda s: (s, (*s[:-1], 1), s[-1:], s),
    lambda s: ((*s[:-1], 1), s[-1:], (1,), s),
    lambda s: (s, (1, *s[1:]), s, ()),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, broadcast", [(s, k) for s in SIZES for k in range(len(BROADCASTS) if s else 1)])
def test_sizes_and_broadcasting(shape, broadcast, dtype, rng):
    graph = {RESULT: FORMULA[RESULT]}
    arrays = {k: rng.normal(size=s).astype(dtype) for k, s in zip("abcd", BROADCASTS[broadcast](shape), strict=True)}
    out = compiled(graph, arrays, shape, dtype)[RESULT]
    assert_same_bits(out, np.broadcast_to(direct(graph[RESULT], arrays, dtype), shape))


@pytest.mark.parametrize("shape", [(4,), (2, 3), (3, CHUNK // 2 + 1)])
def test_accumulate_adds_to_what_is_there(shape, rng):
    a, b, out = rng.normal(size=shape), rng.normal(size=shape[-1:]), rng.normal(size=shape)
    expected = out + a * b
    compiled(parse("a * b"), {"a": a, "b": b}, shape, np.float64, {RESULT: out}, accumulate=True)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("reads, writes, error, message", [
    ({"x": (2, 3)}, {RESULT: (3,)}, ValueError, "test: shapes do not fit"),
    ({"x": (2, 3)}, {RESULT: (2, 4)}, ValueError, "broadcast"),
    ({"x": (1, 3)}, {RESULT: (3,)}, ValueError, "test: shapes do not fit"),
])  # fmt: skip
def test_shapes_that_do_not_fit(reads, writes, error, message):
    make = lambda shapes: {k: np.ones(s) for k, s in shapes.items()}  # noqa: E731
    with pytest.raises(error, match=message):
        BACK.elementwise("test", parse("x * 2"), make(reads), make(writes))


def test_dtypes_do_not_mix():
    with pytest.raises(TypeError, match="test: operands of one dtype expected, got float32, float64"):
        BACK.elementwise("test", parse("x * 2"), {"x": np.ones(3)}, {RESULT: np.ones(3, np.float32)})


# ---- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 1000, CHUNK + 1])
def test_adam_in_place_is_adam(dtype, size, rng):
    arrays = {k: rng.normal(size=size).astype(dtype) for k in "pgm"} | {"v": rng.random(size).astype(dtype)}
    constants = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "beta1_t": 0.9**3, "beta2_t": 0.999**3}
    p, g, m, v = (arrays[k].copy() for k in "pgmv")
    m += (1 - 0.9) * (g - m)
    v += (1 - 0.999) * (g * g - v)
    expected = p - 0.01 * (m / (1 - 0.9**3)) / (np.sqrt(v / (1 - 0.999**3)) + 1e-8)
    compiled(parse(ADAM, constants), arrays, (size,), dtype, {k: arrays[k] for k in "mvp"})
    assert_same_bits(arrays["m"], m)
    assert_same_bits(arrays["v"], v)
    np.testing.assert_allclose(arrays["p"], expected, rtol=8 * np.finfo(dtype).eps, atol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("text", [ADAM, "p = where(p > lr, maximum(m, 0), sqrt(v)) + erf(g)"])
def test_a_replay_allocates_nothing(text, rng):
    arrays = {k: rng.random(2 * CHUNK + 7) for k in "pgmv"}
    graph = parse(text, {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "beta1_t": 0.5, "beta2_t": 0.5})
    launch = BACK.elementwise("test", graph, arrays, {k: arrays[k] for k in graph})
    launch.run()
    tracemalloc.start()
    try:
        for _ in range(3):
            launch.run()
        assert tracemalloc.get_traced_memory()[1] < 8192
    finally:
        tracemalloc.stop()


def test_no_result_outlives_its_last_use():
    """Scratch is reused: Horner's rule of any degree needs one register."""
    code = compile_graph(tuple(parse("polynomial(x, 1, 2, 3, 4, 5, 6, 7, 8, 9)").items()))
    assert {step.out.key for step in code if step.out.kind == "scratch"} == {0}
    assert code[-1].out.kind == "write"


def test_a_formula_is_compiled_once():
    graph = tuple(parse("a * b + exp(a)").items())
    assert compile_graph(graph) is compile_graph(tuple(parse("a * b + exp(a)").items()))


def test_an_output_without_a_buffer_lives_in_scratch():
    from gpubackprop.backends.base import Workspace

    out, a = np.zeros(3), np.arange(3.0)
    for call in bind(parse("t = a * 2\nout = t + 1"), {"a": a}, {"out": out}, (3,), a.dtype, Workspace()):
        call()
    assert out.tolist() == [1, 3, 5]
