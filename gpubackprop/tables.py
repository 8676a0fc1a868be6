"""Files for the command line: a CSV or an npz becomes a checked `Table` of numbers, labels and names."""

import csv
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .data import as_features, as_targets, check_same_length
from .datasets import NAMES
from .formulas import cut
from .names import hint, unknown

__all__ = ["Table", "Task", "read_table"]

Task = Literal["classification", "regression"]
Names = Sequence[str]
At = Callable[[int], str]  # the place of a row's cell, in words

_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_MISSING = {"", "na", "n/a", "nan"}


@dataclass(frozen=True, eq=False)
class Table:
    """Rows x with their labels or targets y, and the names that a model keeps."""

    x: NDArray[np.float64]  # (n, d)
    y: NDArray[Any] | None = None  # labels (n,) of int64, or targets (n, outputs) of float64
    columns: list[str] | None = None  # the d names; an npz has none
    target: str | None = None
    task: Task | None = None  # None if y is
    classes: list[str] | None = None  # classes[label] is its name


def read_table(
    path: str | Path,
    target: str | None = None,
    task: Task | None = None,
    classes: Names | None = None,
    columns: Names | None = None,
    labelled: bool = True,
) -> Table:
    """The table in a file; whatever is wrong with the file raises a ValueError that says where.

    A `.csv` has a header row, one of , ; tab between its fields, and y in the column `target`. An `.npz` has
    arrays x and, optionally, y. Integers and text in y mean classes, floats regression, unless `task` says
    otherwise. Missing values (empty, NA, N/A, NaN) are errors. A stored model gives its `classes`, which then
    number the labels, and its `columns`, which are picked by name in that order; the target may be absent. With
    labelled=False it is not looked at.
    """
    path = Path(path)
    if task not in (None, "classification", "regression"):
        raise ValueError(unknown("task", task, ("classification", "regression")))
    _check_file(path)
    read = _read_csv if path.suffix.lower() == ".csv" else _read_npz
    return read(path, target, task, classes, columns, labelled)


def _check_file(path: Path) -> None:
    """Raise unless path is a file of a known kind with something in it."""
    remedy = f"give a .csv or .npz file or a bundled set ({', '.join(NAMES)})"
    try:
        if path.is_dir():
            raise ValueError(f"{path}: is a directory, expected a file; {remedy}")
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if path.suffix.lower() not in (".csv", ".npz"):
        raise ValueError(f"{path}: is of unknown kind {path.suffix!r}; {remedy}")
    if empty:
        raise ValueError(f"{path}: the file is empty; {remedy}")


# ---- npz ---------------------------------------------------------------------------------------------------


def _read_npz(
    path: Path, target: str | None, task: Task | None, classes: Names | None, columns: Names | None, labelled: bool
) -> Table:
    """The arrays x and y; of a model's columns only the number can be checked, its target is y."""
    if target is not None and columns is None:
        raise ValueError(f"{path}: target {target!r} was given, but the target of an npz is its array y; drop it")
    where, remedy = str(path), "write it with np.savez(path, x=x, y=y)"
    try:
        if not zipfile.is_zipfile(path):  # np.load would take it for a pickle
            raise ValueError("it is no zip archive, or cut short")
        with (
            path.open("rb") as raw,
            np.load(raw, allow_pickle=False) as file,
        ):  # by path it stays open on errors
            names = list(file)
            lengths = _lengths(file, labelled)
            arrays = {name: file[name] for name in lengths} if len({*lengths.values()}) == 1 else {}
    except Exception as error:  # a damaged zip raises a dozen types, from BadZipFile to NotImplementedError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as npz ({reason}); {remedy}") from None
    if len(lengths) == 2:
        check_same_length(range(lengths["x"]), range(lengths["y"]), where)
    if "x" not in arrays:
        raise ValueError(f"{path}: has the arrays {_some(names)}, expected x and y; {remedy}")
    x = as_features(arrays["x"], np.float64, None if columns is None else len(columns), where)
    if "y" not in arrays:
        return Table(x)
    y = arrays["y"]
    check_same_length(x, y, where)
    task = task or ("regression" if y.dtype.kind == "f" and classes is None else "classification")
    if y.dtype.kind not in "UST" or task == "regression":
        targets = as_targets(y, np.float64, y.shape[1] if y.ndim == 2 else 1, where)
        if task == "regression":
            return Table(x, targets, task=task)
    if y.ndim != 1:
        raise ValueError(f"{path}: y has shape {y.shape}, expected ({len(y)},), one label each; use np.ravel(y)")
    cells = [str(value) for value in (y.astype(str) if y.dtype.kind in "ST" else y).tolist()]
    labels, known = _labels(path, cells, classes, lambda row: f"y at row {row}")
    return Table(x, labels, task=task, classes=known)


def _lengths(file: Any, labelled: bool) -> dict[str, int]:
    """The lengths of x and y, by their headers alone; ValueError if one is not as long as it says, or too long."""
    lengths: dict[str, int] = {}
    members = {info.filename.removesuffix(".npy"): info for info in file.zip.infolist()}
    for name in ("x", "y")[: 1 + labelled]:
        if (info := members.get(name)) is None:
            continue
        with file.zip.open(info) as member:
            first = np.lib.format.read_magic(member) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
            size = math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and member.tell() + size != info.file_size:
                raise ValueError(f"{name} has {info.file_size:,} bytes, but its shape {shape} takes {size:,}")
        if (wanted := max(size, 8 * math.prod(shape))) > (room := _memory()):
            raise ValueError(f"{name} of shape {shape} takes {wanted:,} bytes, and this machine has {room:,}")
        lengths[name] = shape[0] if shape else 1
    return lengths


def _memory() -> int:
    """The bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 2**63


# ---- CSV ---------------------------------------------------------------------------------------------------


def _read_csv(
    path: Path, target: str | None, task: Task | None, classes: Names | None, columns: Names | None, labelled: bool
) -> Table:
    """The columns of a CSV by name, parsed column by column."""
    names, rows, lines = _records(path)
    cells = dict(zip(names, zip(*rows, strict=True), strict=True))
    if target is not None and target not in cells and columns is None:
        near = hint("column", target, names)
        raise ValueError(f"{path}: has no column {_shown(target)} for the target; choose from {_some(names)}{near}")
    wanted = [name for name in names if name != target] if columns is None else list(columns)
    if absent := [name for name in wanted if name not in cells]:
        raise ValueError(f"{path}: lacks the model's columns {_some(absent)}; it has {_some(names)}")
    if not wanted:
        raise ValueError(f"{path}: has no column but the target {_shown(str(target))}, expected features; add some")

    def at(name: str) -> At:
        return lambda row: f"line {lines[row]}, column {_shown(name)}"

    x = np.empty((len(rows), len(wanted)))
    for j, name in enumerate(wanted):
        ways = [] if columns else ["remove the column"]
        if columns is None and target is None and labelled:
            ways.append(f"use --target {name}")
        x[:, j] = _numbers(path, cells[name], at(name), ways)
    if not labelled or target is None or target not in cells:
        return Table(x, columns=wanted)
    y = [cell.strip() for cell in cells[target]]
    task = task or ("classification" if classes is not None else _guess_task(path, y, at(target)))
    if task == "regression":
        numbers = _numbers(path, y, at(target), ["use --task classification"])
        return Table(x, numbers.reshape(-1, 1), wanted, target, task)
    labels, known = _labels(path, y, classes, at(target))
    return Table(x, labels, wanted, target, task, known)


def _records(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """The header, the rows, and the line of the file on which each row begins."""
    rows: list[list[str]] = []
    lines: list[int] = []
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next((text for text in file if text.strip()), "")
            file.seek(0)
            reader = csv.reader(file, delimiter=_delimiter(header), skipinitialspace=True, strict=True)
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(line)
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: line {line} cannot be read ({error}); check its quotes") from None
    if len(rows) < 2:
        raise ValueError(f"{path}: has no rows under a header row, expected at least 1; add data")
    names = [name.strip() for name in rows.pop(0)]
    del lines[0]
    if all(map(_NUMBER.fullmatch, names)) and not all(map(_INTEGER.fullmatch, names)):
        raise ValueError(f"{path}: the first line is {_some(names)}, expected column names; add a header row")
    if "" in names:
        at = names.index("") + 1
        raise ValueError(f"{path}: column {at} has no name, expected one in the header; name or remove it")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{path}: columns share the name {_some(twice)}, expected distinct names; rename them")
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(names):
            remedy = "add what it lacks" if len(row) < len(names) else "quote a field that holds the delimiter"
            expected = f"expected {len(names)} as in the header; {remedy} or remove the line"
            raise ValueError(f"{path}: line {line} has {len(row)} fields, {expected}")
    return names, rows, lines


def _delimiter(header: str) -> str:
    """The delimiter that finds most names in the header; a comma if none finds two."""
    counts = {d: len(next(csv.reader([header], delimiter=d, skipinitialspace=True))) for d in ",;\t"}
    return max(counts, key=lambda delimiter: counts[delimiter])


def _numbers(path: Path, cells: Names, at: At, ways: Names = ()) -> NDArray[np.float64]:
    """The cells of a column as finite numbers, 1 and 0 if it holds True and False; `ways` out besides mending it."""
    try:
        numbers = np.fromiter(map(float, cells), np.float64, len(cells))
        if np.isfinite(numbers).all() and "_" not in "".join(cells):
            return numbers
    except ValueError:
        words = [cell.strip().lower() for cell in cells]
        if {"true", "false"} >= set(words):
            return np.array([word == "true" for word in words], np.float64)
    _check_present(path, cells, at)
    bad = np.isnan([_number(cell) for cell in cells])
    row = int(bad.argmax())
    *most, last = ["encode it" if bad.mean() > 0.5 else "fix it", *ways]
    remedy = " or ".join([", ".join(most), last] if most else [last])
    if re.fullmatch(r"[+-]?\d+,\d+", cells[row].strip()):
        remedy = "write it with a decimal point"
    raise ValueError(f"{path}: {at(row)} has {_shown(cells[row])}, expected a finite number; {remedy}")


def _number(cell: str) -> float:
    """The finite number in a cell, or NaN; Python would read 1_000 too, but nobody writes that in a table."""
    try:
        number = float(cell)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) and "_" not in cell else math.nan


def _guess_task(path: Path, cells: Names, at: At) -> Task:
    """Floats mean regression, integers and text classes; of text among fractions nobody knows."""
    _check_present(path, cells, at)
    distinct = dict.fromkeys(cells)
    if all(map(_INTEGER.fullmatch, distinct)):
        return "classification"
    text = [cell for cell in distinct if not _NUMBER.fullmatch(cell)]
    if not text:
        return "regression"
    if any(_NUMBER.fullmatch(cell) and not _INTEGER.fullmatch(cell) for cell in distinct):
        where = at(cells.index(text[0]))
        raise ValueError(f"{path}: {where} has {_shown(text[0])} among fractions; fix it or give --task")
    return "classification"


# ---- classes -----------------------------------------------------------------------------------------------


def _labels(path: Path, cells: Names, classes: Names | None, at: At) -> tuple[NDArray[np.int64], list[str]]:
    """The label of each cell and the classes' names: those given, else the distinct cells in order."""
    _check_present(path, cells, at)
    distinct = dict.fromkeys(cells)
    plain = {cell: _plain(cell) for cell in distinct}
    if classes is not None:
        names = list(classes)
    elif all(map(_NUMBER.fullmatch, distinct)):
        names = sorted(set(plain.values()), key=float)
    else:
        names = sorted(distinct)
    if classes is None and len(names) < 2:
        raise ValueError(f"{path}: every row has the class {_shown(names[0])}, expected at least 2 classes; add rows")
    index = {name: label for label, name in enumerate(names)}
    for cell in distinct:
        if cell not in index and plain[cell] not in index:
            where = at(cells.index(cell))
            raise ValueError(f"{path}: {where} has the unknown class {_shown(cell)}; the model knows {_some(names)}")
    label = {cell: index[cell] if cell in index else index[plain[cell]] for cell in distinct}
    return np.fromiter((label[cell] for cell in cells), np.int64, len(cells)), names


def _plain(cell: str) -> str:
    """A number in its shortest form, so that 1, 01 and 1.0 name one class; text as it is."""
    if _INTEGER.fullmatch(cell):
        return str(int(cell))
    if not _NUMBER.fullmatch(cell):
        return cell
    number = float(cell)
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else str(number)


def _check_present(path: Path, cells: Names, at: At) -> None:
    """Raise if a cell is empty or says that its value is missing."""
    for cell in dict.fromkeys(cells):
        if cell.strip().lower() in _MISSING:
            where = at(cells.index(cell))
            raise ValueError(f"{path}: {where} is missing ({cell!r}), expected a value; fill or remove such rows")


def _some(names: Names, most: int = 10) -> str:
    """The names as a list on one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return " ".join(", ".join(cut(name, 60) for name in names[:most]).split()) + more


def _shown(cell: str) -> str:
    """A cell or a name in a message: its beginning, if it is long."""
    return cut(repr(cell), 100)
