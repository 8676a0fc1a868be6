"""Rows held out: a test part kept away, a validation part, folds, and what more rows to train on would bring."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpubackprop.backends.base import is_on_device
from gpubackprop.checks import whole
from gpubackprop.columns import Columns
from gpubackprop.data import as_seed, check_same_length, on_host, row_count
from gpubackprop.names import explains_keywords

if TYPE_CHECKING:
    from gpubackprop.trainer import Trainer

__all__ = ["KFold", "learning_curve", "split", "take"]

Rows = NDArray[np.intp]


# ---- two or three parts --------------------------------------------------------------------------------------------


@explains_keywords
def split(
    x: Any, y: Any, *more: Any, test: float = 0.2, validation: float | None = None, seed: int | None = 0,
    stratify: bool | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Shuffle the rows and hold some out: x, x_test, y, y_test and so on, each in its own array type.

    With `validation` three parts of each: x, x_val, x_test, y, y_val, y_test and so on; for one seed the test rows are
    the same with and without it. `test` and `validation` are counts of rows, or fractions of all rows that are rounded
    to the nearest count; no part is left empty. Stratified parts hold the classes of y in proportion (largest
    remainder: the sizes are exact), and each class at least once where there is room. That is the default if y (n,)
    holds integers, bools or text, two rows or more of each class; `stratify=True` demands it, `stratify=False` draws
    from all rows alike.

    >>> x, x_test, y, y_test = split([[0], [1], [2], [3], [4]], [0, 0, 1, 1, 1], test=2)
    >>> x.shape, sorted(y_test.tolist())
    ((3, 1), [0, 1])
    """
    arrays = (x, y, *more)
    n = row_count(x, "split", "x")
    for i, a in enumerate(arrays):
        name = f"array {i + 1}" if i > 1 else "xy"[i]
        if (rows := row_count(a, "split", name)) != n:
            raise ValueError(f"split: x has {n} rows but {name} has {rows}; pass one row of each per sample")
    counts = _counts(n, test, validation)
    codes = _strata(y, stratify, "split")
    parts = _dealt(n, codes, counts, np.random.default_rng(as_seed(seed, "split")))
    return tuple(take(a, part, "split") for a in arrays for part in parts)


def _counts(n: int, test: float, validation: float | None) -> list[int]:
    """How many of n rows the test part asks for, and the validation part if there is one."""
    asked = {"test": test} | ({} if validation is None else {"validation": validation})
    if n <= len(asked):
        plural = "s" * (n > 1)
        raise ValueError(
            f"split: x has {n} row{plural}, expected at least {len(asked) + 1}, one for each part; pass more data"
        )
    counts: list[int] = []
    for name, given in asked.items():
        most = n - sum(counts) - (len(asked) - len(counts))
        counts.append(_count(given, n, most, f"split: {name} is", f"{name}=0.2"))
    if validation is not None and sum(_fraction(given, n) for given in asked.values()) >= 1:
        raise ValueError(
            f"split: test {test} and validation {validation} of {n} rows leave none to train on; both are parts of all "
            "rows, such as 0.15 and 0.15"
        )
    return counts


def _count(given: Any, n: int, most: int, what: str, example: str) -> int:
    """The count from 1 to `most` that a count or fraction of n rows stands for."""
    if isinstance(given, int | np.integer) and not isinstance(given, bool) and 0 < given <= most:
        return int(given)
    if isinstance(given, float | np.floating) and (0 < given < 1 or (given == 1 and most == n)):
        return min(max(round(float(given) * n), 1), most)
    expected = f"a fraction between 0 and 1 or a count from 1 to {most} of the {n} rows"
    raise ValueError(f"{what} {given!r}, expected {expected}; try {example}")


def _fraction(given: float, n: int) -> float:
    return given if isinstance(given, float | np.floating) else given / n


def _strata(y: Any, stratify: bool | None, where: str) -> Rows | None:
    """The class number of each row, or None if all rows are alike."""
    if not isinstance(stratify, bool | None):
        expected = "expected True, False or None; the classes are those of y"
        raise TypeError(f"{where}: stratify is of type {type(stratify).__name__}, {expected}")
    if stratify is False:
        return None
    a = on_host(y.get() if is_on_device(y) and hasattr(y, "get") else y, where, "y")  # a CuPy array's labels
    if a.ndim == 1 and (a.dtype.kind in "biuSUT" or all(isinstance(label, str) for label in a)):
        names, codes, sizes = np.unique(a, return_inverse=True, return_counts=True)
        if sizes.min() > 1:
            return codes
        problem = f"class {names[sizes.argmin()]} has 1 row, expected at least 2; drop it"
    else:
        problem = f"y has shape {a.shape}, dtype {a.dtype}, expected (n,) integers, bools or text; pass labels"
    if stratify:
        raise ValueError(f"{where}: {problem} or use stratify=False")
    return None


def _dealt(n: int, codes: Rows | None, counts: Sequence[int], rng: "np.random.Generator") -> list[Rows]:
    """n rows, shuffled: those left over, then a part of each count; the first count is drawn first and stands last."""
    rest, parts = rng.permutation(n), list[Rows]()
    for count in counts:
        held = _shared_out(rest, codes, count, rng)
        parts.insert(0, rest[held])
        rest = rest[~held]
    return [rest, *parts]


def _shared_out(rows: Rows, codes: Rows | None, count: int, rng: "np.random.Generator") -> NDArray[np.bool_]:
    """Which of the shuffled rows to hold out: the first `count`, or the first of each class."""
    at = np.arange(len(rows))
    if codes is None:
        return at < count
    codes = codes[rows]
    sizes = np.bincount(codes)
    shares = np.empty_like(sizes)
    ties = rng.permutation(len(sizes))  # else the same few classes would win every tie of remainders
    shares[ties] = _shares(sizes[ties], count)
    rank = np.empty_like(at)  # of each row within its class
    rank[codes.argsort(kind="stable")] = at - np.repeat(sizes.cumsum() - sizes, sizes)
    return rank < shares[codes]


def _shares(sizes: Rows, count: int) -> Rows:
    """`count` rows shared among classes in proportion to their sizes, by largest remainder.

    Where what is held out has room for every class it gets one of each, even if that is more than its proportion; and
    where the rest has, it keeps one of each.
    """
    classes, rest = np.count_nonzero(sizes), int(sizes.sum()) - count
    quota = sizes * count / (count + rest)
    high = (sizes - (rest >= classes)).clip(0)
    low = np.minimum(count >= classes, high)
    shares = quota.astype(np.intp).clip(low, high)
    for _ in range(count - int(shares.sum())):
        shares[np.where(shares < high, quota - shares, -np.inf).argmax()] += 1
    for _ in range(int(shares.sum()) - count):
        shares[np.where(shares > low, quota - shares, np.inf).argmin()] -= 1
    return shares


def take(a: Any, rows: Rows, where: str) -> Any:
    """Those rows of a in its own type; lists become arrays."""
    if hasattr(a, "iloc"):
        return a.iloc[rows]
    return a[rows] if hasattr(a, "shape") else on_host(a, where, "a list")[rows]


# ---- folds ---------------------------------------------------------------------------------------------------------


@explains_keywords
@dataclass(frozen=True)
class KFold:
    """n_splits folds of shuffled rows, each of them the test rows once; also for scikit-learn's `cv=`.

    Sizes of folds differ by 1 at most, and so do a class's rows in them: stratified as `split` is.

    >>> for train, test in KFold(2).split([[0], [1], [2], [3]], ["a", "a", "b", "b"]):
    ...     print(len(train), len(test))
    2 2
    2 2
    """

    n_splits: int = 5
    _: KW_ONLY
    stratify: bool | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        whole("KFold", "n_splits", self.n_splits, 2)
        as_seed(self.seed, "KFold")

    def split(self, x: Any, y: Any = None, groups: Any = None) -> Iterator[tuple[Rows, Rows]]:
        """The rows to train on and those to test on, as ascending indices, fold by fold."""
        if groups is not None:
            raise ValueError("KFold: groups are not kept together; use scikit-learn's GroupKFold")
        n = row_count(x, "KFold", "x")
        if n < self.n_splits:
            raise ValueError(
                f"KFold: x has {n} rows, expected at least {self.n_splits}, one for each fold; use fewer folds"
            )
        if y is not None:
            check_same_length(x, y, "KFold")
        elif self.stratify:
            raise ValueError("KFold: stratify=True needs the classes; pass y")
        codes = None if y is None else _strata(y, self.stratify, "KFold")
        order = np.random.default_rng(self.seed).permutation(n)
        if codes is not None:
            order = order[codes[order].argsort(kind="stable")]
        fold = np.empty(n, np.intp)
        fold[order] = np.arange(n) % self.n_splits  # dealt out like cards, class by class
        return ((np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(self.n_splits))

    def get_n_splits(self, x: Any = None, y: Any = None, groups: Any = None) -> int:
        """n_splits, whatever the data."""
        return self.n_splits


# ---- learning curves -----------------------------------------------------------------------------------------------


def learning_curve(
    make_trainer: Callable[[], "Trainer"], x: Any, y: Any, sizes: Sequence[float] = (0.1, 0.2, 0.4, 0.7, 1.0), *,
    test: float = 0.2, epochs: int = 10, batch_size: int = 128, seed: int | None = 0, stratify: bool | None = None,
) -> Columns:  # fmt: skip
    """Losses and metrics of trainers made afresh and trained on ever more rows; `print` shows them as a table.

    Columns: rows, then loss and metrics of those rows, val_… of the `test` rows (held out as `split` does, the same for
    all sizes), and gap, val_loss − loss; all measured after training. A gap that more rows do not close is there to
    stay; one that they close says that more data would help. `sizes` are counts, or fractions of the rows to train on;
    each part holds the smaller ones, with the classes in proportion.
    """
    if not callable(make_trainer):
        remedy = "expected a function that makes one, such as lambda: gb.Trainer(gb.mlp([64, 10]))"
        raise TypeError(f"learning_curve: make_trainer is of type {type(make_trainer).__name__}, {remedy}")
    if not len(sizes):
        raise ValueError("learning_curve: sizes is empty, expected counts or fractions; try sizes=[0.1, 0.5, 1.0]")
    check_same_length(x, y, "learning_curve")
    n = row_count(x, "learning_curve", "x")
    codes = _strata(y, stratify, "learning_curve")
    rng = np.random.default_rng(as_seed(seed, "learning_curve"))
    part, held = _dealt(n, codes, [_count(test, n, n - 1, "learning_curve: test is", "test=0.2")], rng)

    def taken(rows: Rows) -> tuple[Any, Any]:
        return take(x, rows, "learning_curve"), take(y, rows, "learning_curve")

    held_out = taken(held)
    parts = _nested(part, codes, sizes, rng)
    trainers = [make_trainer()]
    _check_sizes(trainers[0], x, [len(p) for p in parts], batch_size)
    trainers += [make_trainer() for _ in parts[1:]]  # before any is trained: two may have one model
    if len({id(trainer.model) for trainer in trainers}) < len(trainers):
        raise ValueError("learning_curve: make_trainer gave the same model twice; make the model in it too")
    curve = Columns()
    for rows, made in zip(parts, trainers, strict=True):
        trainer = copy.deepcopy(made) if made.epoch else made  # one that has learnt is kept as it is
        data = taken(rows)
        trainer.fit(*data, epochs=epochs, batch_size=batch_size, progress=False)
        own, others = trainer.evaluate(*data), trainer.evaluate(*held_out)
        named = own | {f"val_{name}": figure for name, figure in others.items()}
        curve.add(rows=len(rows), **named, gap=others["loss"] - own["loss"])
    return curve


def _check_sizes(trainer: "Trainer", x: Any, sizes: Sequence[int], batch_size: int) -> None:
    """Raise before the first fit what a later one would, on so many rows, for its last batch."""
    shape = getattr(x, "shape", None) or np.shape(x)
    whole("learning_curve", "batch_size", batch_size)
    if len(shape) == 2 and trainer.model.inputs in (None, shape[1]):
        for n in sizes:
            trainer._check_batches(shape[1], n, trainer._rows(n, batch_size))


def _nested(rows: Rows, codes: Rows | None, sizes: Sequence[float], rng: "np.random.Generator") -> list[Rows]:
    """Parts of the shuffled rows of those sizes, ascending, each with all of the one before in it."""
    n, parts = len(rows), list[Rows]()
    counts = {_count(size, n, n, "learning_curve: a size is", "sizes=[0.1, 0.5, 1.0]") for size in sizes}
    for count in sorted(counts, reverse=True):
        rows = rows[_shared_out(rows, codes, count, rng)]
        parts.insert(0, rows)
    return parts
