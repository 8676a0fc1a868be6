"""Arrays at the door: what users bring becomes checked rows of numbers."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpubackprop.backends.base import is_on_device
from gpubackprop.checks import refuse_masked

__all__ = [
    "as_features",
    "as_labels",
    "as_probabilities",
    "as_seed",
    "as_targets",
    "as_weights",
    "by_name",
    "check_same_length",
    "column_names",
    "labels_of",
    "on_host",
    "row_count",
    "surely_finite",
]

Array = NDArray[Any]
MOST_LISTED = 8  # names in a message


# ---- the door ----------------------------------------------------------------------------------------------


def as_features(
    x: Any, dtype: DTypeLike | None, columns: int | None = None, where: str = "fit", name: str = "x", *,
    finite: bool = True,
) -> Array:  # fmt: skip
    """x as finite C-contiguous rows (n, columns) of `dtype`, without a copy where x is that already.

    Lists, frames, Tensors, integers and bools will do. The result is never to be written to. finite=False leaves it to
    the caller to see that all numbers are finite. With dtype None the rows are of x's type and layout.
    """
    a = _numbers(x, where, name, "encode text as numbers")
    n = row_count(a, where, name)
    width = math.prod(a.shape[1:])
    if a.ndim == 1:
        remedy = f"{name}.reshape(-1, 1) for one column or {name}[None] for one row"
        raise ValueError(f"{where}: {name} has shape ({n},), expected rows and columns; use {remedy}")
    if a.ndim > 2:
        remedy = f"{name}.reshape({n}, {width})"
        raise ValueError(f"{where}: {name} has shape {a.shape}, expected rows and columns; use {remedy}")
    if columns is not None and width != columns:
        turned = f"; it has {n} rows: pass {name}.T if it is transposed" if n == columns and width > 1 else ""
        raise ValueError(f"{where}: {name} has {width} columns but the model expects {columns}{turned}")
    if width == 0:
        raise ValueError(f"{where}: {name} has 0 columns, expected at least 1; pass some features")
    return _cast(a, dtype, where, name, finite)


def column_names(a: Any) -> tuple[Any, ...] | None:
    """The labels of a frame's columns; None for what has none, or no others than 0, 1, 2, … in order."""
    try:
        names = tuple(getattr(a, "columns", ()))
    except TypeError:
        return None
    return names if names != tuple(range(len(names))) else None


def by_name(a: Any, names: Sequence[Any] | None, where: str, name: str = "x") -> Any:
    """A frame with its columns in the order of these names, which must be its own; anything without names as it is."""
    given = column_names(a)
    if names is None and given is not None and set(given) == set(range(len(given))):
        names = range(len(given))
    if names is None or given is None or given == tuple(names):
        return a
    if set(given) == set(names) and len(set(given)) == len(given):
        if hasattr(a, "iloc") or hasattr(a, "select"):
            return a[list(names)] if hasattr(a, "iloc") else a.select(list(names))
        place = {key: i for i, key in enumerate(given)}
        return on_host(a, where, name)[:, [place[key] for key in names]]
    missing, others = [k for k in names if k not in given], [k for k in given if k not in names]
    faults = [f"lacks {_listed(missing)}"] * bool(missing) + [f"has {_listed(others)}, which is new"] * bool(others)
    attribute = "feature_names" if name == "x" else "target_names"
    raise ValueError(
        f"{where}: {name} {' and '.join(faults) or 'has columns of one name in another order'}; the model knows the "
        f"columns {_listed(names)}; pass these, in any order (model.{attribute} = None goes by position)"
    )


def _listed(names: Sequence[Any]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > MOST_LISTED else ""
    return ", ".join(map(repr, names[:MOST_LISTED])) + more


def as_labels(
    y: Any, classes: int, where: str = "fit", name: str = "y", numbers: str = "give the model more outputs"
) -> NDArray[np.int64]:
    """Labels y (n,) as int64 in 0 … classes − 1; integers, bools and integral floats are labels.

    `numbers` is what else to do where they are out of range.
    """
    renumber = f"number the classes with np.unique({name}, return_inverse=True)"
    a = _numbers(y, where, name, renumber)
    n = row_count(a, where, name)
    if a.ndim > 1:
        remedy = f"np.ravel({name})" if a.size == n else f"{name}.argmax(axis=1) if the rows are one-hot"
        raise ValueError(f"{where}: {name} has shape {a.shape}, expected ({n},), one label each; use {remedy}")
    with np.errstate(invalid="ignore"):  # NaN and infinity become some integer, which then differs from them
        labels = a.astype(np.int64)
    bad = (labels != a) | (labels < 0) | (labels >= classes)
    if not bad.any():
        return labels
    row = int(bad.argmax())
    value, allowed = a[row].item(), f"0 to {classes - 1}"
    if not np.isfinite(a[row]):
        raise ValueError(f"{where}: {name} has {_kind(value)} at row {row}; remove or fill such rows")
    if value % 1:
        problem = f"is fractional, expected an integer {allowed}; {renumber}, or train with the loss 'mse'"
    else:
        problem = f"is out of range, expected {allowed}; {renumber}, or {numbers}"
    raise ValueError(f"{where}: label {value} at row {row} {problem}")


def as_targets(
    y: Any, dtype: DTypeLike | None, outputs: int, where: str = "fit", name: str = "y",
    encode: str = "number the classes with np.unique(y, return_inverse=True), and train with loss='cross_entropy'",
) -> Array:  # fmt: skip
    """Targets or soft labels y as finite rows (n, outputs) of `dtype`, or with None of y's; (n,) fits one output.

    `encode` is what to do where y holds text.
    """
    a = _numbers(y, where, name, encode)
    n = row_count(a, where, name)
    if a.shape[1:] != (outputs,) and (a.ndim, outputs) != (1, 1):
        got = f"has {a.shape[1]} columns" if a.ndim == 2 else f"has shape {a.shape}"
        expected = "1 output" if outputs == 1 else f"{outputs} outputs"
        remedy = f"pass targets of shape ({n}, {outputs})"
        raise ValueError(f"{where}: {name} {got} but the model has {expected}; {remedy}")
    return _cast(a, dtype, where, name).reshape(n, outputs)


def as_probabilities(y: Any, dtype: DTypeLike | None, outputs: int, where: str = "fit", name: str = "y") -> Array:
    """As `as_targets`, every element from 0 to 1."""
    rows = as_targets(
        y, dtype, outputs, where, name, f"number the two classes 0 and 1, as ({name} == 'yes').astype(float)"
    )
    if rows.min() < 0 or rows.max() > 1:
        bad = (rows < 0) | (rows > 1)
        row, column = (int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        at = f"{row}, column {column}" if outputs > 1 else f"{row}"
        remedy = "number the two classes 0 and 1, or use loss='cross_entropy' for more"
        raise ValueError(f"{where}: {name} has {rows[row, column]:g} at row {at}, expected 0 to 1; {remedy}")
    return rows


def labels_of(rows: Array) -> Array:
    """The labels of rows that are all one-hot; others as they are."""
    one_hot = rows.ndim == 2 and ((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all()
    return rows.argmax(1) if one_hot else rows


def as_weights(w: Any, where: str = "fit", name: str = "sample_weight") -> NDArray[np.float64]:
    """Weights w (n,) of rows as float64: finite and at least 0."""
    a = _numbers(w, where, name, "pass numbers")
    n = row_count(a, where, name)
    if a.ndim > 1:
        remedy = f"np.ravel({name})" if a.size == n else f"{name}[:, 0] for those of one column"
        raise ValueError(f"{where}: {name} has shape {a.shape}, expected ({n},), one weight each; use {remedy}")
    weights = _cast(a, np.float64, where, name)
    if weights.min() < 0:
        row = int(weights.argmin())
        raise ValueError(f"{where}: {name} has {weights[row]:g} at row {row}, expected at least 0; 0 leaves a row out")
    return weights


def as_seed(seed: Any, where: str) -> int | None:
    """The seed as a Python integer >= 0; None stays None."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"{where}: seed must be an integer or None, got {type(seed).__name__} {seed!r}")
    if seed < 0:
        raise ValueError(f"{where}: seed must be at least 0, got {seed}")
    return int(seed)


def check_same_length(x: Any, y: Any, where: str = "fit", name: str = "y") -> None:
    """Raise unless x and y, or what else is named, have a row each per sample."""
    n, m = row_count(x, where, "x"), row_count(y, where, name)
    if n != m:
        shape: Any = getattr(x, "shape", ())
        turned = f", or x.T if x is transposed: it has {m} columns" if len(shape) == 2 and shape[1] == m else ""
        raise ValueError(f"{where}: x has {n} rows but {name} has {m}; pass one {name} per row of x{turned}")


def on_host(a: Any, where: str, name: str) -> Array:
    """a as a NumPy array. Device arrays stop here; this is where they will pass once a backend takes them."""
    if is_on_device(a):
        remedy = f"copy it with {name}.get() or {name}.cpu()"
        raise TypeError(f"{where}: {name} lies on a CUDA device, expected host data; {remedy}")
    refuse_masked(where, name, a)
    if callable(convert := getattr(a, "numpy", None)):  # a Tensor
        a = convert()
    if callable(convert := getattr(a, "to_numpy", None)):  # a frame, whose bools beside floats become objects
        a = np.asarray(convert())
        if a.dtype.kind == "O" and all(isinstance(value, Real | np.bool_) for value in a.flat):
            a = a.astype(np.float64)
    try:
        return np.asarray(a)
    except ValueError:
        if not isinstance(a, Sequence):
            raise
        sizes = [len(row) if isinstance(row, Sequence | np.ndarray) else 1 for row in a]
        row = next((i for i, size in enumerate(sizes) if size != sizes[0]), 0)
        detail = f"{sizes[row]} values in row {row} but {sizes[0]} in row 0" if row else "nested unevenly"
        raise ValueError(f"{where}: {name} is ragged: {detail}, expected equal lengths; pad or drop") from None


def _numbers(a: Any, where: str, name: str, remedy: str) -> Array:
    """The host array of a, which must hold real numbers or bools."""
    array = on_host(a, where, name)
    if array.dtype.kind in "biuf" or array.dtype.name == "bfloat16":
        return array
    if array.dtype.kind == "O" and array.ndim:
        for place in np.ndindex(array.shape):
            if (value := array[place]) is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas' own
                at = ", column ".join(map(str, place))
                raise ValueError(f"{where}: {name} has a missing value ({value}) at row {at}; remove or fill such rows")
    if array.dtype.kind == "O" and array.ndim == 0:
        remedy = f"use {name}.toarray()" if hasattr(a, "toarray") else "pass an array, a frame or lists"
        raise TypeError(f"{where}: {name} is of type {type(a).__name__}, expected numbers; {remedy}")
    if array.dtype.kind == "c":
        remedy = f"pass {name}.real and {name}.imag as columns of their own"
    elif array.dtype.kind == "m":
        remedy = f"divide by a unit, as {name} / np.timedelta64(1, 's')"
    elif array.dtype.kind == "M":
        remedy = f"subtract a date and divide by a unit, as ({name} - date) / np.timedelta64(1, 'D')"
    elif array.dtype.kind in "OUS":
        text = (place for place, value in np.ndenumerate(array) if not _reads(value))
        if (first := next(text, None)) is None:
            remedy = f"convert with {name}.astype(float)"
        elif array.ndim == 2 and (columns := list(getattr(a, "columns", ()))):
            what = f"{name}'s column {str(columns[first[1]])!r} has {_brief(array[first])} at row {first[0]}"
            raise TypeError(f"{where}: {what}, expected numbers; {remedy}, or leave the column out")
        elif array.ndim == 2:
            remedy += f" ({_brief(array[first])} at row {first[0]}, column {first[1]})"
    raise TypeError(f"{where}: {name} has dtype {array.dtype}, expected numbers; {remedy}")


def _reads(value: Any) -> bool:
    """Whether Python reads it as a number."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _brief(value: Any) -> str:
    text = repr(str(value)) if isinstance(value, str) else f"{type(value).__name__} {value}"
    return text if len(text) <= 40 else f"{text[:40]}…"


def row_count(a: Any, where: str, name: str) -> int:
    """The number of rows, at least one, of any array, frame or list."""
    shape = getattr(a, "shape", None)
    if shape == () or (shape is None and not hasattr(a, "__len__")):
        got = "a single value" if shape == () else f"of type {type(a).__name__}"
        raise TypeError(f"{where}: {name} is {got}, expected rows; pass an array, a frame or lists")
    n = int(shape[0]) if shape else len(a)
    if n == 0:
        raise ValueError(f"{where}: {name} has 0 rows, expected at least 1; pass some data")
    return n


def _cast(a: Array, dtype: DTypeLike | None, where: str, name: str, finite: bool = True) -> Array:
    """a in `dtype`, C-contiguous and aligned, copied only if it is not; with None as it is. NaN and infinity raise,
    unless finite=False."""
    with np.errstate(all="ignore"):
        out: Array = a if dtype is None else np.require(a, dtype, ["C", "A"])
    if not finite or a.dtype.kind in "biu" or surely_finite(out):
        return out
    good = np.isfinite(out)
    if good.all():
        return out
    place = tuple(int(i) for i in np.unravel_index(int(good.argmin()), a.shape))
    value, at = a[place], ", column ".join(str(i) for i in place)
    if not np.isfinite(value):
        raise ValueError(f"{where}: {name} has {_kind(value)} at row {at}; remove or fill such rows")
    wider = {2: ", or train with precision='bfloat16' or 'float32'", 4: ' or use dtype="float64"'}
    remedy = f"scale {name}{wider.get(out.itemsize, '')}"
    raise ValueError(f"{where}: {name} has {value:.3g} at row {at}, too large for {out.dtype}; {remedy}")


def surely_finite(a: Array) -> bool:
    """Whether the sum is finite: then so are all elements, in one pass. Finite ones may overflow it: then look."""
    with np.errstate(all="ignore"):
        return math.isfinite(a.sum())


def _kind(value: Any) -> str:
    return "a NaN" if value != value else "an infinity"
