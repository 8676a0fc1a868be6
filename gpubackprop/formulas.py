"""The elementwise mathematics, once: rows of text that every compiler renders from one tree.

The language reads as Python and as C++: assignment lines with locals, declared constants, `+ - * /`, one comparison
inside `where(c, a, b)`, and the functions of FUNCTIONS. `parse` turns text into an interned expression graph (equal
subexpressions are the same object), and the code generators in `backends/` render that graph, never the text.
"""

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any
from weakref import WeakValueDictionary

__all__ = [
    "ACTIVATIONS",
    "BINARY",
    "CONSTRAINTS",
    "LOSSES",
    "PASSES",
    "PENALTIES",
    "RULES",
    "RUNNING",
    "TWO_SUM",
    "UNARY",
    "Activation",
    "Expr",
    "cut",
    "parse",
    "register_activation",
]


LONGEST = 5000  # characters of a description; the built-in rows keep below
KEPT = 1024  # graphs, and what is made of them, that a cache holds: users register rows, and drop them again


def cut(text: str, most: int = 200) -> str:
    """The text, or its beginning and … if it is longer."""
    return text if len(text) <= most else text[: most - 1] + "…"


# ---- the rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """y = forward(x), dx = dy * derivative, the derivative written in y where the mathematics allows, else in x."""

    name: str
    forward: str
    derivative: str
    constants: tuple[tuple[str, float], ...] = ()

    @property
    def needs(self) -> set[str]:
        """What backward reads: a subset of {"x", "y"}; x is kept only if the derivative names it."""
        return set(free_names(self.backward_graph())) - {"dy"}

    def forward_graph(self, x: "Expr | None" = None) -> "Expr":
        """The graph of y, with another expression (a bias added, say) in the place of x."""
        return _graph(self.forward, self.constants, x or name("x"))

    def backward_graph(self) -> "Expr":
        """The graph of dx = dy * derivative; a NaN that the derivative's comparisons would lose is dx itself."""
        derivative = _graph(self.derivative, self.constants, name("x"))
        dx, names = chain(name("dy"), derivative), free_names(derivative)
        return dx if not names or derivative.keeps_nan else _unless_nan(name("y" if "y" in names else "x"), dx)


def _rows(*rows: Any) -> dict[str, Any]:
    return {row.name: row for row in rows}


def row(name: str, forward: str, derivative: str, **constants: float) -> Activation:
    """One row of a table of unary functions."""
    return Activation(name, forward, derivative, tuple(constants.items()))


#       name            forward, of x                                     derivative, of y (or of x)
ACTIVATIONS: dict[str, Activation] = _rows(
    row("identity",     "x",                                              "1"),
    row("relu",         "maximum(x, 0)",                                  "where(y > 0, 1, 0)"),
    row("leaky_relu",   "where(x > 0, x, slope * x)",                     "where(y > 0, 1, slope)", slope=0.01),
    row("elu",          "where(x > 0, x, alpha * expm1(minimum(x, 0)))",  "where(y > 0, 1, y + alpha)", alpha=1.0),
    row("selu",         "scale * where(x > 0, x, alpha * expm1(minimum(x, 0)))",
                        "where(y > 0, scale, y + scale * alpha)",
                        scale=1.0507009873554805, alpha=1.6732632423543772),
    row("sigmoid",      "sigmoid(x)",                                     "y * (1 - y)"),
    row("tanh",         "tanh(x)",                                        "1 - y * y"),
    row("softplus",     "softplus(x)",                                    "-expm1(-y)"),
    row("silu",         "x * sigmoid(x)",                                 "sigmoid(x) * (1 + x * (1 - sigmoid(x)))"),
    row("gelu",         "0.5 * x * (1 + erf(x * 0.7071067811865476))",
                        "0.5 * (1 + erf(x * 0.7071067811865476)) + x * (0.3989422804014327 * exp(-0.5 * x * x))"),
    row("gelu_tanh",    "0.5 * x * (1 + tanh(k * (x + c * x * x * x)))",
                        "t = tanh(k * (x + c * x * x * x))\n"  # beyond ±10 t is ±1, and z keeps 0 · inf away
                        "z = minimum(maximum(x, -10), 10)\n"
                        "0.5 * (1 + t) + 0.5 * z * (1 - t * t) * (k * (1 + 3 * c * z * z))",
                        k=0.7978845608028654, c=0.044715),
    row("mish",         "x * tanh(softplus(x))",
                        "t = tanh(softplus(x))\nt + x * sigmoid(x) * (1 - t * t)"),
    row("hard_sigmoid", "minimum(maximum(x / 6 + 0.5, 0), 1)",  # y compared once: ptxas keeps its vectors whole
                        "t = abs(y - 0.5)\nwhere(t < 0.5, 1 / 6, where(t >= 0.5, 0, t))"),
    row("hard_tanh",    "minimum(maximum(x, -1), 1)",                     "where(abs(y) < 1, 1, 0)"),
)  # fmt: skip

# Functions of one tensor that are not offered as a layer's activation.
UNARY: dict[str, Activation] = _rows(
    row("neg",          "-x",                                             "-1"),
    row("exp",          "exp(x)",                                         "y"),
    row("log",          "log(x)",                                         "1 / where(x >= 0, x, y)"),
    row("log1p",        "log1p(x)",                                       "1 / where(x >= -1, 1 + x, y)"),
    row("expm1",        "expm1(x)",                                       "y + 1"),
    row("sqrt",         "sqrt(x)",                                        "0.5 / y"),
    row("sin",          "sin(x)",                                         "cos(x)"),
    row("cos",          "cos(x)",                                         "-sin(x)"),
    row("abs",          "abs(x)",                                         "where(x > 0, 1, where(x < 0, -1, 0))"),
)  # fmt: skip


@dataclass(frozen=True)
class Binary:
    """y = forward(a, b) with both gradients, written in a, b, y and dy."""

    name: str
    forward: str
    da: str
    db: str


# At a tie of maximum or minimum each side gets half of the gradient: their derivatives sum to 1, as those of any
# subgradient do, and central differences agree. relu has a row of its own, whose derivative at 0 is 0. Where the
# operands have no order one of them is NaN, and so is a + b.
BINARY: dict[str, Binary] = _rows(
    Binary("add",       "a + b",          "dy",                               "dy"),
    Binary("subtract",  "a - b",          "dy",                               "-dy"),
    Binary("multiply",  "a * b",          "dy * b",                           "dy * a"),
    Binary("divide",    "a / b",          "dy / b",                           "-dy * y / b"),
    Binary("power",     "pow(a, b)",      "where(b == 0, 0, where(a != a, a, dy * (b * pow(a, b - 1))))",
                                          "where(a <= 0, where(y == y, 0, y), dy * (y * log(a)))"),
    Binary("maximum",   "maximum(a, b)",  "where(a > b, dy, where(a < b, 0, where(a == b, 0.5 * dy, a + b)))",
                                          "where(b > a, dy, where(b < a, 0, where(a == b, 0.5 * dy, a + b)))"),
    Binary("minimum",   "minimum(a, b)",  "where(a < b, dy, where(a > b, 0, where(a == b, 0.5 * dy, a + b)))",
                                          "where(b < a, dy, where(b > a, 0, where(a == b, 0.5 * dy, a + b)))"),
)  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """Elementwise loss of prediction x against target t, and its derivative in x."""

    name: str
    forward: str
    derivative: str

    def graph(self, dy: "Expr", *, weighted: bool = False) -> dict[str, "Expr"]:
        """total = k · forward and dx = dy · k · derivative, k being the share of one element in the loss of its row.

        weighted: both times the row's weight w, and 0 where that is 0, because 0 · inf is not 0.
        """
        k, w, forward, derivative = name("k"), name("w"), value(self.forward), value(self.derivative)
        total, share = apply("*", k, forward), apply("*", dy, k)
        if not weighted:
            return {"total": total, "dx": chain(share, derivative)}
        graph = {"total": apply("*", w, total), "dx": chain(apply("*", share, w), derivative)}
        return {k: apply("where", apply("==", w, number(0)), number(0), e) for k, e in graph.items()}


# A factor of 0 takes an infinite x out: 0 · inf is not 0. Beyond 1,000, where exp(x) is infinite, x counts as 1,000 in
# t * x, because inf - inf is not inf.
LOSSES: dict[str, Loss] = _rows(
    Loss("mse",             "(x - t) * (x - t)",                                     "2 * (x - t)"),
    Loss("half_mse",        "0.5 * ((x - t) * (x - t))",                             "x - t"),
    Loss("bce_with_logits", "where(where(x > 0, 1, 0) == t, 0, x * (where(x > 0, 1, 0) - t)) + log1p(exp(-abs(x)))",
                            "sigmoid(x) - t"),
    Loss("poisson",         "exp(x) - where(t == 0, 0, t * minimum(x, 1000)) + where(t > 0, t * log(t) - t, 0)",
                            "exp(x) - t"),
)  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """What happens to a gradient g on its way to the update, in place; arrays in `single` have one element."""

    name: str
    text: str
    single: tuple[str, ...] = ()

    def graph(self) -> dict[str, "Expr"]:
        """The graph of g."""
        return {"g": value(self.text)}


PASSES: dict[str, Pass] = _rows(
    Pass("mask",       "where(mask == 0, 0, g)"),
    # what is not finite stays so, for the norm to find: then g - g is NaN
    Pass("clip_value", "where(g - g == 0, minimum(maximum(g, -limit * scale), limit * scale), g)",
         single=("limit", "scale")),
)  # fmt: skip


@dataclass(frozen=True)
class Penalty:
    """What a weight p adds to a batch's mean loss, and its derivative in p."""

    name: str
    value: str
    derivative: str

    def graph(self) -> dict[str, "Expr"]:
        """The total over the weight of the batch's rows, and the gradient, at the scale of the loss."""
        return parse(f"total = weight * ({self.value})\ng += scale * ({self.derivative})")


PENALTIES: dict[str, Penalty] = _rows(  # the derivative of abs(p) is p where that is 0 or NaN
    Penalty("l1",          "l1 * abs(p)",              "where(p > 0, l1, where(p < 0, -l1, p))"),
    Penalty("l2",          "0.5 * l2 * (p * p)",       "l2 * p"),
    Penalty("elastic_net", "l1 * abs(p) + 0.5 * l2 * (p * p)",
                           "where(p > 0, l1, where(p < 0, -l1, p)) + l2 * p"),
)  # fmt: skip


@dataclass(frozen=True)
class Constraint:
    """What a weight w becomes after an update, where n is the sum of `measure` over its column, and c a number."""

    name: str
    measure: str
    value: str


CONSTRAINTS: dict[str, Constraint] = _rows(
    Constraint("max_norm", "w * w", "where(n > c * c, w * (c / sqrt(n)), w)"),
)


@dataclass(frozen=True)
class Rule:
    """An optimizer's update of the weights p by the gradient g, with its moments; `before` runs ahead of g."""

    name: str
    state: tuple[str, ...]
    update: str
    before: str = ""

    def graph(self, *, before: bool = False, general: bool = False, skips: bool = False) -> dict[str, "Expr"]:
        """The graphs of `update`, or of `before`, by array; empty if it has none.

        general: the gradient is g * factor + weight_decay * p, its last term only if the text has no decay of its own.
        skips: the arrays keep their values unless `ok` is above 0.
        """
        if not (text := self.before if before else self.update):
            return {}
        g = parse("g * factor" if self.decays else "g * factor + weight_decay * p")[RESULT]
        graph = parse(text, given={"g": g} if general else {})
        graph = {k: graph[k] for k in ("p", *self.state) if k in graph}  # no locals
        ok = apply(">", name("ok"), number(0))
        return {k: apply("where", ok, e, name(k)) for k, e in graph.items()} if skips else graph

    @property
    def decays(self) -> bool:
        """Whether the weights decay by the text itself: apart from the gradient, and from what is made of it."""
        return "weight_decay" in self.update


ADAM = """
m += (1 - beta1) * (g - m)
v += (1 - beta2) * (g * g - v)
p -= lr * sqrt(1 - beta2_t) / (1 - beta1_t) * m / (sqrt(v) + eps * sqrt(1 - beta2_t))
"""  # the last line is lr * (m / (1 - beta1_t)) / (sqrt(v / (1 - beta2_t)) + eps), its scalars gathered

ADAGRAD = """
v += g * g
p -= lr * g / (sqrt(v + inside) + outside)
"""

ADADELTA = """
v += (1 - rho) * (g * g - v)
step = sqrt(u + eps) / sqrt(v + eps) * g
u += (1 - rho) * (step * step - u)
p -= lr * step
"""

SQUARES = "v += (1 - rho) * (g * g - v)\n"
CENTRE = "m += (1 - rho) * (g - m)\n"
ROOT, CENTRED = (f"(sqrt({square} + inside) + outside)" for square in ("v", "maximum(v - m * m, 0)"))

NADAM = """
m += (1 - beta1) * (g - m)
v += (1 - beta2) * (g * g - v)
p -= (lr * (1 - mu) / (1 - mu_product) * g + lr * mu_next / (1 - mu_product * mu_next) * m) / (
    sqrt(v / (1 - beta2_t)) + eps)
"""

ADAMAX = """
m += (1 - beta1) * (g - m)
u = maximum(beta2 * u, abs(g) + eps)
p -= lr / (1 - beta1_t) * m / u
"""

RADAM = """
m += (1 - beta1) * (g - m)
v += (1 - beta2) * (g * g - v)
p -= lr / (1 - beta1_t) * m * where(r > 0, r * sqrt(1 - beta2_t) / (sqrt(v) + eps), 1)
"""

LION = """
c = beta1 * m + (1 - beta1) * g
p -= lr * weight_decay * p
p -= where(c > 0, lr, where(c < 0, -lr, 0))
m += (1 - beta2) * (g - m)
"""

# high + low grows by part, as exact as twice the bits (Knuth's TwoSum, Dekker's for the carry), because nothing is
# contracted; without the carry the errors of low would add up over many parts.
TWO_SUM = """
total = high + part
rest = total - high
low = where(total - total == 0, low + (high - (total - rest)) + (part - rest), 0)
high = total + low
low -= high - total
"""

# r += momentum * (factor * batch - r), in halves that do not overflow; `top` is the largest number of the type. Where
# rounding would leave r short of what it follows, it becomes that: a constant is reached exactly.
RUNNING = """
t = minimum(factor * batch, top)
step = half * t - half * r
r = where(r + step + step == r, t, r + step + step)
"""

# A name ending in _t is its constant to the power t, the number of the step counted from 1.
RULES: dict[str, Rule] = _rows(
    Rule("sgd",      (),          "p -= lr * g"),
    Rule("momentum", ("z",),      "z = momentum * z + g\np -= lr * z"),
    # g is taken at p - lr * momentum * z; stepping on from there, p -= lr * g is p_old - lr * (momentum * z + g).
    Rule("nesterov", ("z",),      "z = momentum * z + g\np -= lr * g", before="p -= lr * momentum * z"),
    Rule("nesterov_torch", ("z",), "z = momentum * z + g\np -= lr * (g + momentum * z)"),
    Rule("velocity", ("z",),      "z = momentum * z + lr * g\np -= z"),
    Rule("velocity_torch", ("z",), "z = momentum * z + lr * g\np -= momentum * z + lr * g"),
    # g is taken at p - momentum * z, without the learning rate; stepping on from there.
    Rule("nesterov_seed", ("z",), "p += momentum * z - lr * (momentum * z + g)\nz = momentum * z + g",
         before="p -= momentum * z"),
    Rule("adagrad",  ("v",),      ADAGRAD),
    Rule("adadelta", ("u", "v"),  ADADELTA),
    Rule("rmsprop",  ("v",),      f"{SQUARES}p -= lr * g / {ROOT}"),
    Rule("rmsprop_momentum", ("v", "z"), f"{SQUARES}z = momentum * z + g / {ROOT}\np -= lr * z"),
    Rule("rmsprop_centered", ("m", "v"), f"{SQUARES}{CENTRE}p -= lr * g / {CENTRED}"),
    Rule("rmsprop_centered_momentum", ("m", "v", "z"),
         f"{SQUARES}{CENTRE}z = momentum * z + g / {CENTRED}\np -= lr * z"),
    Rule("adam",     ("m", "v"),  ADAM),
    Rule("adamw",    ("m", "v"),  "p -= lr * weight_decay * p\n" + ADAM),
    Rule("nadam",    ("m", "v"),  NADAM),
    Rule("adamax",   ("m", "u"),  ADAMAX),
    Rule("radam",    ("m", "v"),  RADAM),
    Rule("lion",     ("m",),      LION),
)  # fmt: skip


# ---- the language --------------------------------------------------------------------------------------------------

RESULT = "result"  # the name of a text's last line when it is a bare expression

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
}  # fmt: skip
OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
FUNCTIONS = {"exp": 1, "log": 1, "log1p": 1, "expm1": 1, "sqrt": 1, "sin": 1, "cos": 1, "tanh": 1, "abs": 1,
             "maximum": 2, "minimum": 2, "pow": 2, "where": 3}  # fmt: skip

# erf(x) = x P(x²) for |x| <= 0.8125, else sign(x) (1 - N(s) / (D(s) exp(x²))), s = |x| - 0.8125. No comparison is
# needed: beyond 0.8125 P lies above erf(x)/x (its degree is even); below it s is held at 0 and y lies above erf(|x|).
# So the minimum selects, and -y gives the sign. Counting s from the boundary keeps N and D nearly free of rounding
# where exp(-x²) is largest. Coefficients: minimax by Remez exchange in 60 digits, D rounded first and N fitted again.
# Largest error 1.62 ulp in float64 (9.8 million points), 2.77 in float32. Odd, keeps -0, 1 from 5.93 on, passes NaN.
ERF = """
a = minimum(abs(x), 6)
z = a * a
s = maximum(a - 0.8125, 0)
p = x * polynomial(z, 1.1283791670955126, -0.3761263890318357, 0.1128379167094433, -0.026866170642598716,
                   0.0052239775948995535, -0.0008548324869248713, 0.00012055237985208352,
                   -1.4922949507375148e-05, 1.641248435719127e-06, -1.5793037118401537e-07, 1.09677461917571e-08)
n = polynomial(s, 206.7053845599227, 262.9568143167265, 149.95091106051945, 46.497598377268915,
               7.7914189542522605, 0.5641825115570606)
d = polynomial(s, 426.36296960031723, 841.8946790767651, 717.6815984246945, 339.20675907853484,
               94.13947359024786, s + 14.622103168272519)
y = 1 - n / (d * exp(z))
maximum(minimum(p, y), -y)
"""

# Functions written in the language itself, of x.
DERIVED = {
    "sigmoid": "1 / (1 + exp(-x))",
    "softplus": "maximum(x, 0) + log1p(exp(-abs(x)))",
    "erf": ERF,
}


# The nodes that have the same bits on every backend; the other functions round as each library does.
EXACT = {"name", "number", "neg", "sqrt", "abs", "maximum", "minimum", "where", *OPERATORS.values(),
         *COMPARISONS.values()}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Expr:
    """A node of the interned graph: op is "name", "number", "neg", an operator, a comparison or a function."""

    op: str
    args: tuple["Expr", ...] = ()
    value: str | float = 0.0

    def __reduce__(self) -> Any:  # a copy is the interned node itself
        return _intern, (self.op, self.args, self.value, _sign(self.value))

    @cached_property
    def order(self) -> tuple["Expr", ...]:
        """Every node of the graph once, arguments before users."""
        return tuple(walk([self]))

    @cached_property
    def keeps_nan(self) -> bool:
        """Whether it is NaN where all that it reads is; a comparison may choose an arm that is not."""
        return math.isnan(evaluate(self, dict.fromkeys(free_names(self), math.nan), _NAN))

    @cached_property
    def text(self) -> str:
        """The graph as `describe` gives it."""
        return _described(self)


_nodes: WeakValueDictionary[tuple[Any, ...], Expr] = WeakValueDictionary()  # a graph goes with its last user


def _intern(op: str, args: tuple[Expr, ...], value: str | float, sign: float) -> Expr:
    key = op, args, value, sign
    node = _nodes.get(key)
    return _nodes.setdefault(key, Expr(op, args, value)) if node is None else node


def _sign(value: str | float) -> float:
    return 0.0 if isinstance(value, str) else math.copysign(1.0, value)  # 0.0 == -0.0, but they are two literals


def name(text: str) -> Expr:
    """A free name: an array, a scalar or a local."""
    return _intern("name", (), text, _sign(text))


def number(value: float) -> Expr:
    """A literal, kept in float64 and rounded once to the arithmetic type."""
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        raise ValueError("formula: an integer literal is too large for a float64") from None
    if not finite:
        raise ValueError(f"formula: the literal {value} is not a finite float64")
    return _intern("number", (), float(value), _sign(float(value)))


@lru_cache(maxsize=KEPT)  # eager code binds them again and again
def _graph(text: str, constants: tuple[tuple[str, float], ...], x: Expr) -> Expr:
    return value(text, dict(constants), {"x": x})


def apply(op: str, *args: Expr) -> Expr:
    """The node op(args), with operations on literals alone carried out in float64."""
    if all(a.op == "number" for a in args) and op not in ("where", *COMPARISONS.values()):
        try:
            return number(evaluate(Expr(op, args), {}))
        except (ArithmeticError, ValueError):
            of = ", ".join(str(a.value) for a in args)
            raise ValueError(f"formula: {op} of the literals {of} has no finite value") from None
    return _intern(op, args, 0.0, _sign(0.0))


def chain(dy: Expr, derivative: Expr) -> Expr:
    """dy * derivative, the product taken inside `where` and 0 and 1 folded, so that 0·inf cannot appear."""
    done: dict[Expr, Expr] = {}
    for node in walk([derivative], _factors):
        if node.op == "where":
            done[node] = apply("where", node.args[0], *(done[a] for a in node.args[1:]))
        elif node.op == "number" and node.value in (0.0, 1.0, -1.0):
            done[node] = {0.0: number(0), 1.0: dy, -1.0: apply("neg", dy)}[float(node.value)]
        elif node.op == "neg":
            done[node] = apply("neg", done[node.args[0]])
        else:
            done[node] = apply("*", dy, node)
    return done[derivative]


def _factors(node: Expr) -> tuple[Expr, ...]:
    """The arguments into which a factor of the node is taken."""
    return node.args[1:] if node.op == "where" else node.args if node.op == "neg" else ()


def _unless_nan(v: Expr, e: Expr) -> Expr:
    """e, but v where that is NaN: the one value that is not itself."""
    return apply("where", apply("!=", v, v), v, e)


def parse(
    text: str, constants: Mapping[str, float] | None = None, given: Mapping[str, Expr] | None = None
) -> dict[str, Expr]:
    """The graphs a text assigns, by name; a bare last expression is assigned to RESULT.

    `constants` become literals and `given` replaces free names. A name read after its assignment means the new value.
    """
    scope = {k: number(v) for k, v in (constants or {}).items()} | dict(given or {})
    out: dict[str, Expr] = {}
    try:
        lines = ast.parse(text.strip()).body
        for line in lines:
            target, value = _statement(line, scope, last=line is lines[-1])
            scope[target] = out[target] = value
    except (RecursionError, MemoryError, UnicodeError):
        raise ValueError(f"formula {text[:40]!r}…: too deep, or not text") from None
    except SyntaxError as error:
        raise ValueError(f"formula {cut(repr(text.strip()))}: not an expression or assignment ({error.msg})") from None
    if not out:
        raise ValueError("formula: the text is empty")
    return out


def value(text: str, constants: Mapping[str, float] | None = None, given: Mapping[str, Expr] | None = None) -> Expr:
    """The graph of a text's last line, which must be a bare expression."""
    graphs = parse(text, constants, given)
    if RESULT not in graphs:
        raise ValueError(f"formula {cut(repr(text.strip()))}: the last line must be an expression")
    return graphs[RESULT]


def _statement(line: ast.stmt, scope: Mapping[str, Expr], last: bool) -> tuple[str, Expr]:
    match line:
        case ast.Assign(targets=[ast.Name(id=target)], value=value):
            return target, _expression(value, scope)
        case ast.AugAssign(target=ast.Name(id=target), op=op, value=value) if type(op) in OPERATORS:
            return target, apply(OPERATORS[type(op)], scope.get(target, name(target)), _expression(value, scope))
        case ast.Expr(value=value) if last:
            return RESULT, _expression(value, scope)
    raise ValueError(f"formula line {_quoted(line)}: expected `name = …`, `name += …` or a last expression")


def _expression(node: ast.expr, scope: Mapping[str, Expr]) -> Expr:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return number(value)
        case ast.Name(id=text):
            return scope.get(text, name(text))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return apply("neg", _expression(operand, scope))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return apply(OPERATORS[type(op)], _expression(left, scope), _expression(right, scope))
        case ast.Call(func=ast.Name(id="where"), args=[test, *arms], keywords=[]):
            return _call("where", [_condition(test, scope), *(_expression(a, scope) for a in arms)], node)
        case ast.Call(func=ast.Name(id=function), args=args, keywords=[]):
            return _call(function, [_expression(a, scope) for a in args], node)
    raise ValueError(f"formula {_quoted(node)}: only + - * /, one comparison, numbers, names and calls are known")


def _condition(node: ast.expr, scope: Mapping[str, Expr]) -> Expr:
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            return apply(COMPARISONS[type(op)], _expression(left, scope), _expression(right, scope))
    raise ValueError(f"formula {_quoted(node)}: the first argument of where must be a comparison")


def _quoted(node: ast.AST) -> str:
    return cut(repr(ast.unparse(node)))


def _call(function: str, args: list[Expr], node: ast.AST) -> Expr:
    if function == "polynomial" and len(args) > 1:  # polynomial(x, c0, c1, …), by Horner's rule
        x, *coefficients = args
        total = coefficients.pop()
        while coefficients:
            total = apply("+", apply("*", total, x), coefficients.pop())
        return total
    known = FUNCTIONS | dict.fromkeys(DERIVED, 1)
    if function not in known:
        raise ValueError(f"formula {_quoted(node)}: unknown function {cut(repr(function))}; "
                         f"choose from {', '.join(sorted(known))}")  # fmt: skip
    if len(args) != known[function]:
        raise ValueError(f"formula {_quoted(node)}: {function} takes {known[function]} arguments, got {len(args)}")
    return value(DERIVED[function], given={"x": args[0]}) if function in DERIVED else apply(function, *args)


# ---- reading the graph ---------------------------------------------------------------------------------------------


def walk(roots: Iterable[Expr], below: Callable[[Expr], tuple[Expr, ...]] = attrgetter("args")) -> list[Expr]:
    """Every node below the roots once, arguments before users (iteratively: formulas may be deep)."""
    order: dict[Expr, None] = {}
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            order[node] = None
        elif node not in order:
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(below(node)))
    return list(order)


def exact(roots: Iterable[Expr]) -> bool:
    """Whether the graphs have the same bits on every backend."""
    return all(node.op in EXACT for node in walk(roots))


def free_names(*roots: Expr) -> list[str]:
    """The names the graphs read, in order of first use."""
    return [str(n.value) for n in walk(roots) if n.op == "name"]


def renamed(graph: Mapping[str, Expr], names: Mapping[str, str]) -> dict[str, Expr]:
    """The graphs with other names for those they read."""
    done: dict[Expr, Expr] = {}
    for node in walk(graph.values()):
        if node.op == "name":
            done[node] = name(names.get(str(node.value), str(node.value)))
        else:
            done[node] = apply(node.op, *(done[a] for a in node.args)) if node.args else node
    return {k: done[e] for k, e in graph.items()}


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3}


def describe(root: Expr) -> str:
    """The graph as one line of the language, with no parenthesis that precedence makes needless.

    A text of more than LONGEST characters is cut and ends in …: one for a shared graph may be exponentially long.
    """
    return root.text


def _described(root: Expr) -> str:
    text: dict[Expr, str] = {}

    def bracketed(node: Expr, least: int) -> str:
        return f"({text[node]})" if _PRECEDENCE.get(node.op, 9) < least else text[node]

    for node in root.order:
        if node.op == "name":
            text[node] = str(node.value)
        elif node.op == "number":
            text[node] = repr(node.value).removesuffix(".0")
        elif node.op == "neg":
            text[node] = "-" + bracketed(node.args[0], 3)
        elif (level := _PRECEDENCE.get(node.op)) is not None:
            left, right = node.args
            text[node] = f"{bracketed(left, level)} {node.op} {bracketed(right, level + 1)}"
        elif node.op in COMPARISONS.values():
            text[node] = f"{text[node.args[0]]} {node.op} {text[node.args[1]]}"
        else:
            text[node] = f"{node.op}({', '.join(text[a] for a in node.args)})"
        text[node] = cut(text[node], LONGEST)
    return text[root]


def hoist(outputs: Mapping[str, Expr], arrays: Iterable[str]) -> tuple[dict[str, Expr], dict[str, Expr]]:
    """Replace every largest subexpression of scalars alone by a name: (outputs of arrays and s0, s1, …; those scalars).

    The host evaluates the scalars in float64, once per step, and rounds them once; kernels read them from a table.
    """
    arrays = set(arrays)
    varies: dict[Expr, bool] = {}
    done: dict[Expr, Expr] = {}
    scalars: dict[Expr, Expr] = {}

    for node in walk(outputs.values()):
        varies[node] = str(node.value) in arrays if node.op == "name" else any(varies[a] for a in node.args)
        if varies[node]:
            args = [done[a] if varies[a] else _scalar(a, scalars) for a in node.args]
            done[node] = apply(node.op, *args) if args else node
    return {k: done[e] if varies[e] else _scalar(e, scalars) for k, e in outputs.items()}, {
        str(v.value): k for k, v in scalars.items()
    }


def _scalar(e: Expr, scalars: dict[Expr, Expr]) -> Expr:
    if e.op == "number":
        return e
    if e.op in COMPARISONS.values():  # not a number that a table could hold
        return apply(e.op, *(_scalar(a, scalars) for a in e.args))
    return scalars.setdefault(e, name(f"s{len(scalars)}"))


def _select(c: Any, a: Any, b: Any) -> Any:
    return a if c else b


_PYTHON: dict[str, Callable[..., Any]] = {f: getattr(math, f) for f in FUNCTIONS if hasattr(math, f)} | {
    "abs": abs, "maximum": max, "minimum": min, "where": _select,
    "neg": operator.neg, "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


def _nan_if_any(*args: float) -> float:
    return math.nan if any(map(math.isnan, args)) else 0.0


# Which values are NaN, as every backend has it: whether Python's max keeps one depends on the order of its arguments.
_NAN = {op: f if op == "where" or op in COMPARISONS.values() else _nan_if_any for op, f in _PYTHON.items()}


def evaluate(root: Expr, values: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] = _PYTHON) -> Any:
    """The value of a graph for given values of its names, in Python floats or by another table of functions."""
    result: dict[Expr, Any] = {}
    for node in root.order:
        if node.op == "number":
            result[node] = node.value
        elif node.op == "name":
            result[node] = values[str(node.value)]
        else:
            result[node] = functions[node.op](*(result[a] for a in node.args))
    return result[root]


# ---- users' rows ---------------------------------------------------------------------------------------------------


TEXT, NODES = 4096, 2000  # characters of each text of a row, and nodes of its graphs, at most


def register_activation(name: str, forward: str, derivative: str, **constants: float) -> Activation:
    """Add the row y = forward(x), derivative of y (or x), after checking it against central differences.

    The row then serves as `activation=name` everywhere, on every backend, and travels inside saved models.
    ValueError if the name is taken by another row, a text is outside the language or of more than 4,096 characters, or
    the derivative is wrong.
    """
    ACTIVATIONS[name] = new = checked_activation(name, forward, derivative, **constants)
    return new


def checked_activation(name: str, forward: str, derivative: str, **constants: float) -> Activation:
    """The row that `register_activation` adds."""
    for text in (name, forward, derivative):
        if not isinstance(text, str):
            raise TypeError(f"register_activation: texts expected, got {type(text).__name__} {cut(repr(text))}")
        if len(text) > TEXT:
            got = f"{cut(repr(text), 40)} has {len(text):,} characters"
            raise ValueError(f"register_activation: {got}, expected at most {TEXT:,}")
    for key, constant in constants.items():
        if not isinstance(constant, int | float):
            got = f"{type(constant).__name__} {cut(repr(constant))}"
            raise TypeError(f"register_activation: {cut(key)} must be a number, got {got}")
    new = row(name, forward, derivative, **constants)
    if not name.isidentifier():
        raise ValueError(f"register_activation: {cut(repr(name))} is not an identifier")
    if ACTIVATIONS.get(name, new) != new:
        taken = f"{cut(repr(name))} is taken by {cut(repr(ACTIVATIONS[name].forward))}"
        raise ValueError(f"register_activation: {taken}; choose another name")
    y, d = new.forward_graph(), value(derivative, constants)
    if (nodes := len(walk([y, d]))) > NODES:
        raise ValueError(f"register_activation: {cut(repr(name))} has {nodes:,} operations, expected at most {NODES:,}")
    for text, graph, allowed in (("forward", y, {"x"}), ("derivative", d, {"x", "y"})):
        if unknown := sorted(set(free_names(graph)) - allowed):
            raise ValueError(f"register_activation: {text} of {name!r} names {cut(', '.join(unknown))}; "
                             f"give each a value as a keyword, name=…")  # fmt: skip
    _check_derivative(name, y, d)
    return new


def _check_derivative(name: str, y: Expr, d: Expr, h: float = 1e-5) -> None:
    # An irregular grid, so that a kink at a round number lies between its points: close on ±6, then out to ±40.
    for k in (*range(-61, 62), *(s * k for k in range(65, 400, 7) for s in (-1, 1))):
        x = k * 0.0987654321 + 0.00123456789
        try:
            low, mid, high = (evaluate(y, {"x": x + s}) for s in (-h, 0.0, h))
            analytic = evaluate(d, {"x": x, "y": mid})
        except (ArithmeticError, ValueError) as error:
            raise ValueError(f"register_activation: {name!r} cannot be evaluated at x = {x:.6g} ({error})") from None
        numeric = (high - low) / (2 * h)
        rounding = 1e-16 * abs(mid) / h
        if not abs(analytic - numeric) <= 1e-6 * max(1.0, abs(numeric)) + 10 * rounding:
            raise ValueError(f"register_activation: {name!r} at x = {x:.6g}: derivative gives {analytic:.9g}, "
                             f"central difference {numeric:.9g}; correct the derivative")  # fmt: skip
