"""Every kernel against the NumPy reference: the cases that `gpubackprop doctor` and the tests on a GPU go through."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Backend, Buffer, Graph, Launch, StepTable, arithmetic, use_tf32
from gpubackprop.formulas import (
    ACTIVATIONS,
    BINARY,
    CONSTRAINTS,
    LOSSES,
    PASSES,
    PENALTIES,
    RESULT,
    RULES,
    UNARY,
    Activation,
    Binary,
    Constraint,
    Expr,
    Loss,
    Pass,
    Penalty,
    Rule,
    apply,
    describe,
    evaluate,
    exact,
    free_names,
    hoist,
    name,
    parse,
)  # fmt: skip

__all__ = ["DTYPES", "PLACES", "Case", "Disagreement", "Ground", "cases", "compare", "dtype_named"]

DTYPES = ("float32", "float64", "float16", "bfloat16")
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# Rows, columns, elements off the boundary: tails of vectors; whole ones; sums that many blocks share.
PLACES = ((37, 129, 1), (256, 512, 0), (2051, 70, 0))

# How far a result may be off, in eps of its type: of |result| or 1 if that is more; for sums, of the largest result.
EXACT, FUNCTION, SUM = 0.0, 16.0, 64.0
CANCELS = {"gelu_tanh backward": 256.0, "mish backward": 256.0}  # x (1 − t²) beyond t = ±0.999
NARROW = 2.0  # in eps of a 16-bit type: what float32 is off changes the rounding alone, of results or of addends
TF32 = 2.0**-10 / EPS["float32"]  # what TF32 keeps of an operand, in eps

Outputs = Mapping[str, Buffer | Callable[[], Any]]  # buffers, or what reads something else
Bind = Callable[["Ground", int, int], tuple[Launch, Outputs]]


@dataclass(frozen=True)
class Case:
    """A launch, bound for any backend, type and (rows, columns), with its outputs and how far they may be off."""

    name: str
    bind: Bind
    tolerance: float
    dtypes: tuple[str, ...] = DTYPES


class Ground:
    """A backend and a type to bind cases for: buffers of the same values whatever the backend, by the seed."""

    def __init__(self, back: Backend, dtype: str, off: int = 0, seed: int = 0) -> None:
        self.back, self.dtype, self.off = back, dtype_named(dtype), off
        self.wide = arithmetic(self.dtype)
        self.rng = np.random.default_rng(seed)
        self.kept: list[Any] = []  # what launches read and do not hold

    def put(self, values: Any, dtype: npt.DTypeLike | None = None) -> Buffer:
        """The values in a buffer that starts `off` elements off its boundary."""
        values = np.asarray(values).astype(self.dtype if dtype is None else dtype)
        buffer = self.back.empty((values.size + self.off,), values.dtype)[self.off :].reshape(values.shape)
        self.back.write(buffer, values)
        self.kept.append(buffer)
        return buffer

    def normal(self, *shape: int, dtype: npt.DTypeLike | None = None, extremes: bool = False) -> Buffer:
        """Normal numbers, repeated after the first 2¹⁶; with `extremes`, 0, −0 and ±10⁴ among them."""
        return self.put(self.numbers(*shape, extremes=extremes), dtype)

    def numbers(self, *shape: int, extremes: bool = False) -> npt.NDArray[np.float64]:
        """The same on the host."""
        size = int(np.prod(shape))
        values = 2 * self.rng.standard_normal(min(size, 1 << 16))
        if extremes and size > 8:
            values[1:8:2] = 0, -0.0, 1e4, -1e4
        return np.resize(values, shape)

    def integers(self, count: int, below: int) -> Buffer:
        """`count` numbers from 0 to below − 1."""
        return self.put(self.rng.integers(0, below, count), np.int64)

    def weights(self, *shape: int) -> Buffer:
        """Weights of rows, every third of them 0, in the type that values are computed in."""
        values = np.abs(self.numbers(*shape))
        values[::3] = 0
        return self.put(values, self.wide)

    def blank(self, *shape: int, dtype: npt.DTypeLike | None = None) -> Buffer:
        """An output that shows where it was not written."""
        return self.put(np.broadcast_to(np.nan, shape), dtype)

    def table(self, columns: Mapping[str, float], step: int = 3) -> StepTable:
        """A step table with this one row."""
        made = self.back.step_table(tuple(columns), self.wide, 1)
        made.load(np.array([list(columns.values())], np.float64), np.zeros(1, np.int64), step)
        self.kept.append(made)
        return made


def dtype_named(name: str) -> np.dtype[Any]:
    """The type of that name; ImportError without the package that has bfloat16."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


# ---- comparing -----------------------------------------------------------------------------------------------------


class Disagreement(Exception):
    """A result that is not NumPy's: which output, where, by how much."""


def compare(case: Case, back: Backend, dtype: str, places: Iterable[tuple[int, int, int]] = PLACES) -> float:
    """The case's worst error on a backend, in eps of the results' types; Disagreement beyond its tolerance."""
    worst = 0.0
    for rows, columns, off in places:
        reference, found = (
            _outputs(case, Ground(b, dtype, off), rows, columns) for b in (get_backend("cpu:reference"), back)
        )
        for key, expected in reference.items():
            error, where = _error(found[key], expected, largest=case.tolerance >= SUM)
            allowed = _allowed(case, dtype, expected.dtype)
            if not error <= allowed:
                got, wanted = (a[where].item() for a in (found[key], expected))
                at = f"{key}[{', '.join(map(str, where))}]" if where else key
                raise Disagreement(f"{at} of {rows}×{columns} is {got:.9g} instead of {wanted:.9g}, {error:.3g} eps "
                                   f"off where {allowed:g} are allowed")  # fmt: skip
            worst = max(worst, error)
    return worst


def _allowed(case: Case, dtype: str, result: np.dtype[Any]) -> float:
    """How many eps of its type a result may be off."""
    if EPS[dtype] < EPS["float16"] or case.tolerance == EXACT:
        return case.tolerance
    return NARROW * EPS[dtype] / EPS[result.name] if result.name in EPS else case.tolerance


def _outputs(case: Case, ground: Ground, rows: int, columns: int) -> dict[str, npt.NDArray[Any]]:
    with np.errstate(all="ignore"):
        launch, outputs = case.bind(ground, rows, columns)
        launch.run()
        read = ground.back.to_numpy
        return {k: np.asarray(v()) if callable(v) else read(v) for k, v in outputs.items()}


def _error(found: Any, expected: Any, largest: bool) -> tuple[float, tuple[int, ...]]:
    """The worst error in eps, and where it is."""
    eps = EPS.get(expected.dtype.name, 1.0)  # integers agree or do not
    a, r = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(r)
    scale = max(float(np.abs(r[finite]).max(initial=0.0)), float(np.finfo(np.float32).tiny)) if largest else 1.0
    with np.errstate(invalid="ignore"):
        error = np.abs(a - r) / (eps * np.maximum(np.abs(r), scale))
    error = np.where((a == r) | (np.isnan(a) & np.isnan(r)), 0.0, np.where(finite & np.isfinite(a), error, np.inf))
    where = np.unravel_index(int(error.argmax()), error.shape) if error.size else ()
    return float(error.max(initial=0.0)), tuple(int(i) for i in where)


# ---- the cases -----------------------------------------------------------------------------------------------------


@cache
def cases() -> tuple[Case, ...]:
    """Every kernel that the library launches."""
    return (
        *(case for row in ACTIVATIONS.values() for case in _activation(row)),
        *(case for row in UNARY.values() for case in _unary(row)),
        *(case for row in BINARY.values() for case in _binary(row)),
        *(_loss(row, weighted) for row in LOSSES.values() for weighted in (False, True)),
        *(_map(row.name, row.graph(), partial(_pass_shape, row)) for row in PASSES.values()),
        *(_penalty(row) for row in PENALTIES.values()),
        *(case for row in CONSTRAINTS.values() for case in _constraint(row)),
        *(case for row in RULES.values() for case in _rule(row)),
        *_WRITTEN,
        *(_reduction(kind, axes, of) for kind in ("sum", "mean", "max", "min") for axes, of in _AXES.items()),
    )


def _tolerance(roots: Iterable[Expr]) -> float:
    """Nothing for formulas of + − * / sqrt, comparisons and `where`."""
    return EXACT if exact(roots) else FUNCTION


def _map(label: str, graph: Graph, shapes: Callable[[str, int, int], tuple[int, ...]], extremes: bool = True) -> Case:
    """An elementwise launch; an output that is read too is written in place."""

    def bind(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
        reads = {k: g.normal(*shapes(k, rows, columns), extremes=extremes) for k in free_names(*graph.values())}
        writes = {k: reads[k] if k in reads else g.blank(rows, columns) for k in graph}
        return g.back.elementwise(label, graph, reads, writes), writes

    return Case(label, bind, CANCELS.get(label, _tolerance(graph.values())))


def _full(key: str, rows: int, columns: int) -> tuple[int, ...]:
    return rows, columns


def _activation(row: Activation) -> list[Case]:
    x = apply("+", name("x"), name("b"))
    forward = ({"x": x} if "x" in row.needs else {}) | {"y": row.forward_graph(x)}

    def shapes(key: str, rows: int, columns: int) -> tuple[int, ...]:
        return (columns,) if key == "b" else (rows, columns)

    def bind(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
        reads = {k: g.normal(rows, columns) for k in free_names(*graph.values())}
        dz, sums = g.blank(rows, columns), g.blank(columns, dtype=g.wide)
        out = reads["dy"] if row.name == "identity" else dz
        return g.back.elementwise_columns(f"{row.name} backward, bias", graph, reads, out, sums), {
            "dz": out,
            "db": sums,
        }

    graph = {"dz": row.backward_graph()}
    return [
        _map(f"{row.name} forward", forward, shapes),
        _map(f"{row.name} backward", graph, _full),
        Case(f"{row.name} backward, bias", bind, SUM),
    ]


def _unary(row: Activation) -> list[Case]:
    return [
        _map(f"{row.name} forward", {"y": row.forward_graph()}, _full),
        _map(f"{row.name} backward", {"dx": row.backward_graph()}, _full),
    ]


def _binary(row: Binary) -> list[Case]:
    forward, da, db = (parse(text)[RESULT] for text in (row.forward, row.da, row.db))

    def shapes(key: str, rows: int, columns: int) -> tuple[int, ...]:
        return (rows, 1) if key == "b" else (rows, columns)

    return [
        _map(f"{row.name} forward", {"y": forward}, _full, extremes=False),
        _map(f"{row.name} backward", {"da": da, "db": db}, _full, extremes=False),
        _map(f"{row.name} broadcast", {"y": forward}, shapes, extremes=False),
    ]


def _constraint(row: Constraint) -> list[Case]:
    measure, value = (parse(text)[RESULT] for text in (row.measure, row.value))

    def bind(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
        w, each, sums = g.normal(rows, columns), g.blank(rows, columns), g.blank(columns, dtype=g.wide)
        launch = g.back.elementwise_columns(f"{row.name} columns", {"each": measure}, {"w": w}, each, sums)
        return launch, {"each": each, "sums": sums}

    def shapes(key: str, rows: int, columns: int) -> tuple[int, ...]:
        return {"w": (rows, columns), "n": (columns,), "c": (1,)}[key]

    return [Case(f"{row.name} columns", bind, SUM), _map(row.name, {"w": value}, shapes, extremes=False)]


def _loss(row: Loss, weighted: bool) -> Case:
    """Its sum and its derivative in one launch, as in a training step."""
    graph = row.graph(parse("scale * (1 / weight)")[RESULT], weighted=weighted)

    def bind(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
        table, tally = g.table({"1 / weight": 1 / rows}), g.back.tally(g.wide)
        reads = {"x": g.normal(rows, columns), "t": g.normal(rows, columns), "k": g.put([0.25], g.wide),
                 "scale": g.put([4.0], g.wide)}  # fmt: skip
        reads |= {"w": g.weights(rows, 1)} if weighted else {}
        total, dx = g.blank(dtype=g.wide), g.blank(rows, columns)
        launch = g.back.elementwise_sum(row.name, graph, reads, total, {"dx": dx}, table=table, tally=tally)
        return launch, {"dx": dx, "total": total, "tally": partial(_tallied, tally, g.wide)}

    return Case(row.name + ", weighted" * weighted, bind, SUM)


def _pass_shape(row: Pass, key: str, rows: int, columns: int) -> tuple[int, ...]:
    return (1, 1) if key in row.single else (rows, columns)


def _penalty(row: Penalty) -> Case:
    def bind(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
        graph, n = row.graph(), rows * columns
        p, dp, scale, total = g.normal(n, extremes=True), g.normal(n), g.put([4.0], g.wide), g.blank(dtype=g.wide)
        scalars = hoist(graph, ("p", "g", "scale"))[1].values()
        table, tally = g.table({describe(e): evaluate(e, _CONSTANTS) for e in scalars}), g.back.tally(g.wide)
        reads = {"p": p, "g": dp, "scale": scale}
        launch = g.back.elementwise_sum(f"{row.name} penalty", graph, reads, total, {"g": dp}, table=table, tally=tally)
        return launch, {"g": dp, "total": total, "tally": partial(_tallied, tally, g.wide)}

    return Case(f"{row.name} penalty", bind, SUM)


def _tallied(tally: Any, dtype: npt.DTypeLike) -> Any:
    return np.array(tally.read(), dtype)


_CONSTANTS = {
    "lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "momentum": 0.9, "weight_decay": 0.01, "rho": 0.9,
    "inside": 0, "outside": 1e-8, "mu": 0.85, "mu_next": 0.86, "mu_product": 0.6, "r": 0.3,
    "weight": 32, "l1": 0.01, "l2": 0.02,
}  # fmt: skip
_POWERS = {f"{k}_t": _CONSTANTS[k] ** 3 for k in ("beta1", "beta2")}


def _rule(row: Rule) -> list[Case]:
    """Its passes over the arena: AdamW's by groups, 16-bit ones with the copy of the weights."""
    made = []
    for part, text in (("before", row.before), ("update", row.update)):
        if text:
            graph = row.graph(before=part == "before")
            made.append(Case(f"{row.name} {part}", partial(_update, row, graph), _tolerance(graph.values())))
    return made


def _update(row: Rule, graph: Graph, g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    n = rows * columns
    half = g.dtype.itemsize == 2
    arrays = {
        k: g.put(np.abs(g.numbers(n)) if k in ("u", "v") else g.numbers(n), g.wide) for k in ("p", "g", *row.state)
    }
    cut = n // 128 * 64
    groups = [slice(0, cut), slice(cut, n)] if row.name == "adamw" and cut else []
    scalars = hoist(graph, arrays)[1].values()
    columns_of = {
        describe(e) + (f" [{i}]" if groups else ""): evaluate(e, _CONSTANTS | _POWERS | {"lr": 0.01 * (i + 1)})
        for i in range(max(1, len(groups)))
        for e in scalars
    }
    if half:
        graph, arrays = {**graph, "q": graph["p"]}, arrays | {"q": g.blank(n)}
    used = {k: arrays[k] for k in dict.fromkeys((*free_names(*graph.values()), *graph)) if k in arrays}
    launch = g.back.update(row.name, graph, used, g.table(columns_of), groups=groups)
    return launch, {k: arrays[k] for k in graph}


# ---- hand-written kernels ------------------------------------------------------------------------------------------

_WRITTEN: list[Case] = []


def _case(label: str, tolerance: float, dtypes: Sequence[str] = DTYPES) -> Callable[[Bind], Bind]:
    def add(bind: Bind) -> Bind:
        _WRITTEN.append(Case(label, bind, tolerance, tuple(dtypes)))
        return bind

    return add


def _softmax(labelled: bool, weighted: bool, g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    target = g.integers(rows, columns) if labelled else g.put(np.abs(g.numbers(rows, columns)) / columns, g.wide)
    table, tally = g.table({"1 / weight": 1 / rows}), g.back.tally(g.wide)
    dx, total = g.blank(rows, columns), g.blank(dtype=g.wide)
    w = g.weights(rows) if weighted else None
    launch = g.back.softmax_cross_entropy(g.normal(rows, columns), target, dx, total, w=w, table=table, tally=tally,
                                          count=labelled)  # fmt: skip
    return launch, {"dx": dx, "total": total, "tally": partial(_tallied, tally, g.wide)}


for _weighted in (False, True):
    _case("cross entropy, labels" + ", weighted" * _weighted, SUM)(partial(_softmax, True, _weighted))
    _case("cross entropy, rows" + ", weighted" * _weighted, SUM)(partial(_softmax, False, _weighted))


@_case("top1", EXACT)
def _top1(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    classes = min(columns, 10)
    tally = g.back.tally(g.wide)
    launch = g.back.top1(g.normal(rows, classes), g.integers(rows, classes), tally)
    return launch, {"tally": partial(_tallied, tally, np.int64)}


@_case("dropout", EXACT)
def _dropout(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    out = g.blank(rows, columns)
    return g.back.dropout(g.normal(rows, columns), 0.5, 7, 3, g.table({}), out), {"out": out}


@_case("noise", FUNCTION)
def _noise(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    out = g.blank(rows, columns)
    return g.back.noise(g.normal(rows, columns), 0.5, 7, 3, g.table({}), out), {"out": out}


@_case("dropout, added", EXACT)
def _dropout_added(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    out = g.normal(rows, columns)
    return g.back.dropout(g.normal(rows, columns), 0.5, 7, 3, 5, out, accumulate=True), {"out": out}


def _normalize(axis: int, g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    x, gain, bias = g.normal(rows, columns), g.normal(columns), g.normal(columns)
    out, n = g.blank(rows, columns), (rows, columns)[1 - axis]
    mean, variance, rstd = (g.blank(n, dtype=g.wide) for _ in range(3))
    launch = g.back.normalize(x, gain, bias, axis, 1e-5, out, mean, variance, rstd)
    return launch, {"out": out, "mean": mean, "variance": variance, "rstd": rstd}


def _normalize_backward(axis: int, g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    values = g.numbers(rows, columns)
    dy, x, gain = g.normal(rows, columns), g.put(values), g.normal(columns)
    mean, rstd = g.put(values.mean(axis), g.wide), g.put(1 / np.sqrt(values.var(axis) + 1e-5), g.wide)
    dx, dgain, dbias = g.blank(rows, columns), g.blank(columns, dtype=g.wide), g.blank(columns, dtype=g.wide)
    launch = g.back.normalize_backward(dy, x, gain, mean, rstd, axis, dx, dgain, dbias, (False, False, False))
    return launch, {"dx": dx, "dgain": dgain, "dbias": dbias}


for _axis, _kind in ((1, "layer norm"), (0, "batch norm")):
    _case(f"{_kind} forward", SUM)(partial(_normalize, _axis))
    _case(f"{_kind} backward", SUM)(partial(_normalize_backward, _axis))


def _feed(pixels: bool, g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    n = rows + 5
    values = g.rng.integers(0, 256, (n, columns)) if pixels else g.numbers(n, columns)
    source = g.put(values, np.uint8 if pixels else g.wide)
    labels, order, y = g.integers(n, 10), g.put(g.rng.permutation(n), np.int64), g.put(np.zeros(rows), np.int64)
    table, x = g.table({}), g.blank(rows, columns)
    table.load(np.zeros((1, 0)), np.array([5]), 1)
    return g.back.feed(source, labels, order, table, x, y, 1 / 255 if pixels else 1.0), {"x": x, "y": y}


_case("feed", EXACT)(partial(_feed, False))
_case("feed, from uint8", FUNCTION)(partial(_feed, True))


@_case("feed, of weights", EXACT)
def _feed_weights(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    order, table, w = g.put(g.rng.permutation(rows + 5), np.int64), g.table({}), g.blank(rows, 1, dtype=g.wide)
    table.load(np.zeros((1, 0)), np.array([5]), 1)
    return g.back.feed(g.weights(rows + 5, 1), None, order, table, w, None, 1.0), {"w": w}


@_case("gather", EXACT)
def _gather(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    out = g.blank(1, rows, columns)
    return g.back.gather(g.normal(1, rows, columns), g.integers(rows, rows), out), {"out": out}


@_case("scatter add", EXACT)
def _scatter_add(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    out = g.normal(1, rows, columns)
    return g.back.scatter_add(g.normal(1, rows, columns), g.integers(rows, rows), out), {"out": out}


@_case("scatter add, live", EXACT)
def _scatter_add_live(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    out = g.normal(1, rows, columns)
    return g.back.scatter_add(g.normal(1, rows, columns), g.integers(rows, rows), out, live=True), {"out": out}


@_case("copy", EXACT)
def _copy(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    out = g.blank(rows, columns)
    return g.back.copy(g.normal(rows, columns, dtype=g.wide), out), {"out": out}


@_case("copy, transposed", EXACT)
def _copy_transposed(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    out = g.blank(rows, columns)
    return g.back.copy(g.normal(columns, rows).T, out), {"out": out}


@_case("copy, added", EXACT)
def _copy_added(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    out = g.normal(rows, columns)
    return g.back.copy(g.normal(1, columns), out, accumulate=True), {"out": out}


@_case("fill", EXACT)
def _fill(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    out = g.blank(rows, columns)
    return g.back.fill(out, 0.1), {"out": out}


_AXES = {(1,): "rows", (0,): "columns", (0, 1): "all"}


def _reduction(kind: str, axes: tuple[int, ...], of: str) -> Case:
    def bind(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
        out = g.blank(*(n for i, n in enumerate((rows, columns)) if i not in axes))
        return g.back.reduce(kind, g.normal(rows, columns), axes, out), {"out": out}

    return Case(f"{kind} of {of}", bind, SUM if kind in ("sum", "mean") else EXACT)


@_case("gradient norm", SUM, ("float32", "float64"))
def _gradient_norm(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    table = g.table({})
    launch = g.back.gradient_norm(g.normal(rows * columns), table, clip=1.0, dynamic=True)
    return launch, {"control": table.control}


@_case("accumulate loss", SUM, ("float32", "float64"))
def _accumulate_loss(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    tally = g.back.tally(g.wide)
    launch = g.back.accumulate_loss(g.normal(), g.table({}), tally)
    return launch, {"tally": partial(_tallied, tally, g.wide)}


def _advance(applies: bool, g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    table, x, y = g.back.step_table(["lr"], g.wide, 2), g.normal(), g.blank()
    table.load(np.array([[0.5], [0.25]]), np.zeros(2, np.int64), 1)
    launch = g.back.advance(table, applies=applies)

    def read() -> Any:
        g.back.elementwise("lr", {"y": parse("x * lr")[RESULT]}, {"x": x}, {"y": y}, table=table).run()
        return g.back.to_numpy(y)

    return launch, {"next": read}


_case("advance", EXACT, ("float32", "float64"))(partial(_advance, True))
_case("advance, no update", EXACT, ("float32", "float64"))(partial(_advance, False))


# ---- products ------------------------------------------------------------------------------------------------------


@_case("product x @ w", SUM)
def _product(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    x, w, out = g.normal(rows, columns), g.normal(columns, columns), g.blank(rows, columns)
    return g.back.gemm(x, w, out), {"out": out}


@_case("product xᵀ @ dy, added", SUM)
def _product_left(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    x, dy, out = g.normal(rows, columns), g.normal(rows, columns), g.normal(columns, columns, dtype=g.wide)
    return g.back.gemm(x, dy, out, transpose_a=True, accumulate=True), {"out": out}


@_case("product dy @ wᵀ", SUM)
def _product_right(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    dy, w, out = g.normal(rows, columns), g.normal(columns, columns), g.blank(rows, columns)
    return g.back.gemm(dy, w, out, transpose_b=True), {"out": out}


@_case("products of three members", SUM)
def _products(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    x, w, out = g.normal(3, rows, columns), g.normal(3, columns, columns), g.blank(3, rows, columns)
    return g.back.gemm(x, w, out), {"out": out}


@_case("product in TF32", SUM + TF32, ("float32",))
def _product_tf32(g: Ground, rows: int, columns: int) -> tuple[Launch, Outputs]:
    with use_tf32(True):
        return _product(g, rows, columns)
