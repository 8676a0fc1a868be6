"""The language and its rows: what is refused, what is folded, and that every derivative is the derivative."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpubackprop as gb
from gpubackprop.backends import get_backend
from gpubackprop.formulas import (
    ACTIVATIONS,
    BINARY,
    COMPARISONS,
    EXACT,
    LOSSES,
    RESULT,
    RULES,
    UNARY,
    apply,
    chain,
    describe,
    evaluate,
    exact,
    free_names,
    hoist,
    name,
    number,
    parse,
    walk,
)

ROWS = ACTIVATIONS | UNARY


def compute(graph, dtype=np.float64, **arrays):
    """The graph's value by the reference backend."""
    arrays = {k: np.asarray(a, dtype) for k, a in arrays.items()}
    out = np.empty(np.broadcast_shapes(*(a.shape for a in arrays.values())), dtype)
    reads = {k: arrays[k] for k in free_names(graph)}
    get_backend("cpu").elementwise("test", {RESULT: graph}, reads, {RESULT: out}).run()
    return out


# ---- the parser ----------------------------------------------------------------------------------------------------

KNOWN = r"only \+ - \* /, one comparison, numbers, names and calls are known"
REFUSED = [
    ("", "the text is empty"),
    ("x +", "not an expression or assignment"),
    ("x y", "not an expression or assignment"),
    ("x\0y", "not an expression or assignment"),
    *((text, KNOWN) for text in (
        "x ** 2", "x // 2", "x % 2", "x @ y", "x << 1", "x | y", "~x", "+x", "not x", "x and y", "x if y else z",
        "a < b < c", "a in b", "a is b", "'text'", "b'x'", "1j * x", "True", "None", "...", "x.real", "x[0]", "x, y",
        "[x]", "{x}", "{x: y}", "lambda: x", "(x := 1)", "f'{x}'", "exp(x=1)", "exp(*x)", "exp(**x)", "exp(x)(y)",
        "x.exp(1)", "[x for x in y]", "await_(x)[0]", "(yield)",
    )),
    *((text, "expected `name = …`, `name \\+= …` or a last expression") for text in (
        "import os", "x: int = 1", "a = b = 1", "a, b = x", "a[0] = x", "a.b = x", "a **= 2", "x; x", "del x", "pass",
        "def f(): return x", "for i in x: y = i", "if x: y = 1", "while x: y = 1", "assert x", "return x",
        "with x: y = 1", "global x", "raise x",
    )),
    ("__import__('os')", KNOWN),
    ("open(x)", "unknown function 'open'; choose from abs, cos, erf, exp"),
    ("exp()", "exp takes 1 arguments, got 0"),
    ("exp(x, y)", "exp takes 1 arguments, got 2"),
    ("maximum(x)", "maximum takes 2 arguments, got 1"),
    ("sigmoid(x, y)", "sigmoid takes 1 arguments, got 2"),
    ("where(a < b, x)", "where takes 3 arguments, got 2"),
    ("where(x, 1, 2)", "the first argument of where must be a comparison"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", REFUSED)
def test_the_language_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("text", ["a < b", "(a < b) * x", "where((a < b) < c, x, y)", "exp(a < b)", "-(a < b)"])
def test_a_comparison_stands_inside_where_only(text):
    with pytest.raises(ValueError, match="comparison"):
        parse(text)


@pytest.mark.parametrize("text", ["1 / (1 - 1) * x", "log(0) * x", "exp(1000) * x", "pow(-1, 0.5) * x", "sqrt(-1) * x",
                                  "9" * 400, "1e999 * x", "1e308 * 10 * x"])  # fmt: skip
def test_literals_without_a_finite_value_are_refused(text):
    with pytest.raises(ValueError, match="formula"):
        parse(text)


@pytest.mark.parametrize("text", ["-" * 3000 + "x", "-" * 50_000 + "x", "+".join(["x"] * 20_000), "\ud800"])
def test_texts_beyond_the_parser_are_refused_as_formulas(text):
    with pytest.raises(ValueError, match="formula"):
        parse(text)


def test_names_may_be_those_of_functions_and_are_never_called():
    assert free_names(parse("exp + print")[RESULT]) == ["exp", "print"]


def test_lines_assign_and_later_lines_read_the_new_value():
    graphs = parse("t = x * 2\nt += y\nt * t")
    assert {k: describe(e) for k, e in graphs.items()} == {"t": "x * 2 + y", RESULT: "(x * 2 + y) * (x * 2 + y)"}


FOLDED = [
    ("2 * 3 + x * (1 / 4)", "6 + x * 0.25"),
    ("-2 * x", "-2 * x"),
    ("x - -2", "x - -2"),
    ("sqrt(2) * x", f"{math.sqrt(2)!r} * x"),
    ("maximum(2, 3) + minimum(2, 3) + x", "5 + x"),
    ("pow(2, 10) * abs(-1) * x", "1024 * x"),
    ("k * 3 * x", "6 * x"),
    ("x * 0", "x * 0"),
    ("x + 2 + 3", "x + 2 + 3"),
    ("polynomial(x, 1, 2, 3)", "(3 * x + 2) * x + 1"),
    ("sigmoid(x)", "1 / (1 + exp(-x))"),
]


@pytest.mark.parametrize("text, folded", FOLDED)
def test_only_operations_on_literals_are_folded(text, folded):
    assert describe(parse(text, {"k": 2.0})[RESULT]) == folded


def test_equal_subexpressions_are_one_object():
    a, b = parse("exp(x) * exp(x)")[RESULT].args
    assert a is b and a is parse("exp(x)")[RESULT]
    assert number(0.0) is not number(-0.0)


# ---- chain ---------------------------------------------------------------------------------------------------------

CHAINED = [
    ("1", "dy"),
    ("0", "0"),
    ("-1", "-dy"),
    ("2", "dy * 2"),
    ("-x", "-(dy * x)"),
    ("where(x > 0, 1, 0)", "where(x > 0, dy, 0)"),
    ("where(x > 0, slope, -1)", "where(x > 0, dy * 0.5, -dy)"),
    ("where(x > 0, where(x > 1, 0, x), 1)", "where(x > 0, where(x > 1, 0, dy * x), dy)"),
    ("-where(x > 0, 1, 0)", "-where(x > 0, dy, 0)"),
    ("1 - y * y", "dy * (1 - y * y)"),
]


@pytest.mark.parametrize("derivative, product", CHAINED)
def test_chain(derivative, product):
    assert describe(chain(name("dy"), parse(derivative, {"slope": 0.5})[RESULT])) == product


FLAT = {  # where a row is constant its derivative is exactly 0
    "relu": [-1.0, -0.0, 0.0, -1e4], "hard_sigmoid": [-4.0, 4.0, 1e4], "hard_tanh": [-2.0, 2.0, -1e4], "abs": [0.0],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("row", FLAT)
def test_zero_times_infinity_cannot_appear(row, dtype):
    x = np.array(FLAT[row], dtype)
    y = compute(ROWS[row].forward_graph(), dtype, x=x)
    for dy in (np.inf, -np.inf, np.nan):
        dx = compute(ROWS[row].backward_graph(), dtype, x=x, y=y, dy=dy)
        np.testing.assert_array_equal(dx, np.zeros_like(x))


# ---- hoist, describe -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("part", ["update", "before"])
def test_hoist_takes_every_scalar_and_changes_no_value(rule, part, rng):
    graph = parse(getattr(RULES[rule], part) or "p = p")
    arrays = {"p", "g", *RULES[rule].state}
    scalars = {k: 0.1 + 0.8 * rng.random() for k in free_names(*graph.values()) if k not in arrays}
    values = {k: 0.1 + rng.random() for k in arrays}
    hoisted, taken = hoist(graph, arrays)
    assert set(free_names(*hoisted.values())) <= arrays | set(taken)
    computed = {k: evaluate(e, scalars) for k, e in taken.items()}
    for node in walk(hoisted.values()):
        if node.op in COMPARISONS.values():  # a table holds numbers
            continue
        assert not node.args or any(a.op not in ("name", "number") or a.value in arrays for a in node.args)
    for key, e in graph.items():
        assert evaluate(hoisted[key], values | computed) == evaluate(e, values | scalars)


def test_hoist_leaves_literals_and_names_each_scalar_once():
    hoisted, taken = hoist(parse("p -= lr * k * g\nq = lr * k + p * 2"), ["p", "g", "q"])
    assert {k: describe(e) for k, e in hoisted.items()} == {"p": "p - s0 * g", "q": "s0 + (p - s0 * g) * 2"}
    assert {k: describe(e) for k, e in taken.items()} == {"s0": "lr * k"}


def test_hoist_leaves_a_condition_of_scalars_a_comparison():
    hoisted, _ = hoist(parse("where(lr > 0, p, 3 * p)"), ["p"])
    assert hoisted[RESULT].args[0].op == ">"


GRAPHS = {
    **{
        f"{r.name} {k}": g()
        for r in ROWS.values()
        for k, g in (("forward", r.forward_graph), ("back", r.backward_graph))
    },
    **{f"{r.name} {k}": parse(getattr(r, k))[RESULT] for r in BINARY.values() for k in ("forward", "da", "db")},
    **{f"{r.name} {k}": parse(getattr(r, k))[RESULT] for r in LOSSES.values() for k in ("forward", "derivative")},
    **{f"{r.name} {k}": e for r in RULES.values() for k, e in parse(r.update).items()},
}


@pytest.mark.parametrize("key", GRAPHS)
def test_describe_round_trip(key):
    assert parse(describe(GRAPHS[key]))[RESULT] is GRAPHS[key]


def extend(below):
    binary = st.tuples(st.sampled_from(["+", "-", "*", "/", "maximum", "pow"]), below, below)
    unary = st.tuples(st.sampled_from(["neg", "exp", "sqrt"]), below)
    condition = st.tuples(st.sampled_from(["<", ">=", "=="]), below, below).map(lambda t: apply(*t))
    selected = st.tuples(condition, below, below).map(lambda t: apply("where", *t))
    return st.one_of(binary.map(lambda t: apply(*t)), unary.map(lambda t: apply(*t)), selected)


LEAVES = st.one_of(st.sampled_from("xyz").map(name), st.floats(allow_nan=False, allow_infinity=False).map(number))
# Literals alone are folded, some to errors: give every operator a name to work on.
EXPRESSIONS = st.recursive(st.sampled_from("xyz").map(name), lambda below: extend(below | LEAVES.map(
    lambda e: apply("+", name("x"), e))), max_leaves=25)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(EXPRESSIONS)
def test_describe_round_trip_of_anything(e):
    assert parse(describe(e))[RESULT] is e


# ---- rows ----------------------------------------------------------------------------------------------------------

GRID = np.arange(-61, 62) * 0.0654321 + 0.00123456789  # ±4, its points away from the kinks at 0, ±1 and ±3
POSITIVE = {"log", "sqrt"}
STEP = 6e-6


def central(graph, at, **others):
    """(f(x + h) − f(x − h)) / 2h in the variable `at`."""
    ((key, x),) = at.items()
    high, low = (compute(graph, **others, **{key: x + s}) for s in (STEP, -STEP))
    return (high - low) / ((x + STEP) - (x - STEP))


def assert_close(analytic, numeric):
    assert np.max(np.abs(analytic - numeric) / np.maximum(1, np.abs(numeric))) <= 1e-9


@pytest.mark.parametrize("row", ROWS)
def test_derivative_of_unary_rows(row):
    x = np.abs(GRID) + 0.5 if row in POSITIVE else GRID[GRID > -0.5] if row == "log1p" else GRID
    forward = ROWS[row].forward_graph()
    y = compute(forward, x=x)
    assert_close(compute(ROWS[row].backward_graph(), x=x, y=y, dy=np.ones_like(x)), central(forward, {"x": x}))


@pytest.mark.parametrize("row", BINARY)
def test_derivatives_of_binary_rows(row):
    a, b = np.meshgrid(GRID[3::10], GRID[5::10] * 1.1 + 0.3)
    if row == "power":
        a = np.abs(a) + 0.3
    if row == "divide":
        b = np.abs(b) + 0.4
    forward = parse(BINARY[row].forward)[RESULT]
    values = {"a": a, "b": b, "y": compute(forward, a=a, b=b), "dy": np.ones_like(a)}
    assert_close(compute(parse(BINARY[row].da)[RESULT], **values), central(forward, {"a": a}, b=b))
    assert_close(compute(parse(BINARY[row].db)[RESULT], **values), central(forward, {"b": b}, a=a))


@pytest.mark.parametrize("row", LOSSES)
def test_derivatives_of_losses(row):
    x, t = np.meshgrid(GRID, [-1.0, 0.0, 0.3, 1.0])
    forward = parse(LOSSES[row].forward)[RESULT]
    assert_close(compute(parse(LOSSES[row].derivative)[RESULT], x=x, t=t), central(forward, {"x": x}, t=t))


AT_TEN_THOUSAND = {  # (at -1e4, at +1e4), to float32's precision
    "identity": (-1e4, 1e4), "relu": (0, 1e4), "leaky_relu": (-100, 1e4), "elu": (-1, 1e4),
    "selu": (-1.7580993408473766, 10507.009873554805), "sigmoid": (0, 1), "tanh": (-1, 1), "softplus": (0, 1e4),
    "silu": (0, 1e4), "gelu": (0, 1e4), "gelu_tanh": (0, 1e4), "mish": (0, 1e4), "hard_sigmoid": (0, 1),
    "hard_tanh": (-1, 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("row", ACTIVATIONS)
def test_activations_at_ten_thousand(row, dtype):
    x = np.array([-1e4, 1e4], dtype)
    y = compute(ACTIVATIONS[row].forward_graph(), dtype, x=x)
    np.testing.assert_allclose(y, AT_TEN_THOUSAND[row], rtol=1e-6, atol=1e-30)
    dx = compute(ACTIVATIONS[row].backward_graph(), dtype, x=x, y=y, dy=np.ones_like(x))
    assert np.isfinite(dx).all() and np.all(np.abs(dx) <= 1.06)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("row", ROWS)
def test_nan_passes_through(row, dtype):
    y = compute(ROWS[row].forward_graph(), dtype, x=np.array([0.5, np.nan, 0.5], dtype))
    assert np.isnan(y).tolist() == [False, True, False]


KNOWN_VALUES = [  # by hand or from the functions' tables
    ("relu", -1.5, 0), ("relu", 1.5, 1.5), ("leaky_relu", -2, -0.02), ("elu", -1, math.exp(-1) - 1),
    ("selu", 1, 1.0507009873554805), ("sigmoid", 0, 0.5), ("sigmoid", 1, 0.7310585786300049),
    ("tanh", 1, 0.7615941559557649), ("softplus", 0, math.log(2)), ("silu", 1, 0.7310585786300049),
    ("gelu", 1, 0.8413447460685429), ("gelu", -1, -0.15865525393145707), ("gelu_tanh", 1, 0.8411919906082768),
    ("mish", 1, 0.8650983882673103), ("hard_sigmoid", 1.5, 0.75), ("hard_tanh", -0.3, -0.3), ("hard_tanh", 3, 1),
]  # fmt: skip


@pytest.mark.parametrize("row, x, y", KNOWN_VALUES)
def test_known_values(row, x, y):
    np.testing.assert_allclose(compute(ACTIVATIONS[row].forward_graph(), x=[x]), [y], rtol=1e-14)


def test_gradient_at_kinks_is_zero_or_the_left_one():
    """ReLU′(0) = 0 (erratum E15); limits of the hard functions have none; leaky and exponential units take the left."""
    zero = {"relu": 0, "leaky_relu": 0.01, "elu": 1, "abs": 0}
    for row, expected in zero.items():
        y = compute(ROWS[row].forward_graph(), x=[0.0])
        assert compute(ROWS[row].backward_graph(), x=[0.0], y=y, dy=[1.0]) == expected
    for row, x in (("hard_tanh", [-1.0, 1.0]), ("hard_sigmoid", [-3.0, 3.0])):
        y = compute(ROWS[row].forward_graph(), x=x)
        assert compute(ROWS[row].backward_graph(), x=x, y=y, dy=[1.0, 1.0]).tolist() == [0, 0]


# ---- erf -----------------------------------------------------------------------------------------------------------

ERF = parse("erf(x)")[RESULT]
ABRAMOWITZ = [  # Abramowitz & Stegun, "Handbook of Mathematical Functions", table 7.1
    (0.02, 0.0225645747), (0.1, 0.1124629160), (0.5, 0.5204998778), (0.84, 0.7651427115), (1.0, 0.8427007929),
    (1.5, 0.9661051465), (1.96, 0.9944262755), (2.0, 0.9953222650),
]  # fmt: skip


@pytest.mark.parametrize("x, y", ABRAMOWITZ)
def test_erf_table(x, y):
    assert abs(compute(ERF, x=[x])[0] - y) <= 5.1e-11


def test_erf_is_within_two_ulp():
    x = np.concatenate([np.linspace(-6.5, 6.5, 60_001), np.geomspace(1e-300, 6, 20_001), np.linspace(0.4, 1.1, 20_001)])
    exact = np.array([math.erf(v) for v in x])
    ulp = np.abs(compute(ERF, x=x) - exact) / np.spacing(np.abs(exact))
    assert ulp.max() <= 2, f"{ulp.max()} ulp at {x[ulp.argmax()]}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_erf_is_odd_bounded_and_monotone(dtype, rng):
    x = np.sort(np.concatenate([rng.uniform(0, 7, 10_000), [0, 1e-30, 1e4, 3e38]]).astype(dtype))
    y = compute(ERF, dtype, x=x)
    np.testing.assert_array_equal(compute(ERF, dtype, x=-x), -y)
    assert y[0] == 0 and y[-1] == 1 and y.max() <= 1
    assert np.all(np.diff(y.astype(np.float64)) >= -2 * np.spacing(y[1:]))
    assert np.isnan(compute(ERF, dtype, x=[np.nan])).all()
    np.testing.assert_array_equal(compute(ERF, dtype, x=[-np.inf, np.inf]), [-1, 1])


# ---- users' rows ---------------------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    """The activations; what a test registers is forgotten again."""
    before = dict(ACTIVATIONS)
    yield ACTIVATIONS
    ACTIVATIONS.clear()
    ACTIVATIONS.update(before)


SWOOSH = {"forward": "softplus(x - 4) - 0.08 * x", "derivative": "sigmoid(x - 4) - 0.08"}
ACCEPTED = [
    SWOOSH,
    {"forward": "x * x", "derivative": "2 * x"},
    {"forward": "a * sin(x / a)", "derivative": "cos(x / a)", "a": 2.0},
    {"forward": "exp(-x * x)", "derivative": "-2 * x * y"},
    {"forward": "t = tanh(x)\nt * t * t", "derivative": "t = tanh(x)\n3 * t * t * (1 - t * t)"},
    {"forward": "where(x > 0, x, 0)", "derivative": "where(y > 0, 1, 0)"},
]


@pytest.mark.parametrize("row", ACCEPTED)
def test_a_registered_row_works_everywhere(rows, rng, row):
    gb.register_activation("swoosh", **row)
    gb.register_activation("swoosh", **row)  # the same row again is no conflict
    x, w, b = rng.normal(size=(4, 3)), rng.normal(size=(3, 2)), rng.normal(size=2)
    assert gb.gradcheck(lambda x, w, b: gb.dense(x, w, b, "swoosh"), [x, w, b]) <= 1e-8
    model = gb.Sequential(gb.Dense(3, 2, activation="swoosh"), gb.Activation("swoosh"), dtype="float64")
    y = rows["swoosh"].forward_graph()
    w, b = model.initialize(1).state_dict().values()
    np.testing.assert_allclose(model(x).numpy(), compute(y, x=compute(y, x=x @ w + b)), rtol=1e-12)


WRONG = [
    ({"derivative": "1.0001 * (sigmoid(x - 4) - 0.08)"}, r"derivative gives .*, central difference .*; correct"),
    ({"derivative": "1"}, r"at x = .*: derivative gives 1, central difference"),
    ({"forward": "k * x", "derivative": "k"}, "forward of 'swoosh' names k; give each a value as a keyword"),
    ({"derivative": "dy * sigmoid(x - 4)"}, "derivative of 'swoosh' names dy"),
    ({"forward": "x ** 2"}, KNOWN),
    ({"forward": "erfc(x)"}, "unknown function 'erfc'"),
    ({"forward": "log(x)", "derivative": "1 / x"}, "'swoosh' cannot be evaluated at x = "),
    ({"forward": "1 / (x - x)", "derivative": "0"}, "'swoosh' cannot be evaluated at x = "),
    ({"forward": "y = x * x", "derivative": "2 * x"}, "last"),
    ({"forward": "x * k", "derivative": "k", "k": math.nan}, "derivative gives nan|nan"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_a_wrong_row_is_refused_and_not_kept(rows, change, message):
    with pytest.raises(ValueError, match=message):
        gb.register_activation("swoosh", **SWOOSH | change)
    assert "swoosh" not in rows


def test_names_of_rows(rows):
    with pytest.raises(ValueError, match=r"'relu' is taken by 'maximum\(x, 0\)'; choose another name"):
        gb.register_activation("relu", **SWOOSH)
    with pytest.raises(ValueError, match="'my-row' is not an identifier"):
        gb.register_activation("my-row", **SWOOSH)
    with pytest.raises(ValueError, match=r"unknown activation 'rleu'; choose from elu, gelu, .*identity.*, relu"):
        gb.Dense(2, 2, activation="rleu")


# ---- what is bit-equal everywhere ----------------------------------------------------------------------------------


def test_exact_are_arithmetic_roots_comparisons_and_choices():
    assert {"name", "number", "neg", "sqrt", "abs", "where", "maximum", "minimum", *"+-*/",
                     "<", "<=", ">", ">=", "==", "!="} == EXACT  # fmt: skip
    assert exact(parse("where(a < 1, sqrt(abs(a)), -a / 3)").values())
    assert not exact(parse("x = a * b\ny = x + exp(a)").values())
