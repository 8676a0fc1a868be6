"""Tables and text: how results show themselves when printed, at the prompt and in a notebook."""

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

__all__ = ["Columns", "Grid", "History", "Shown", "brief", "line_width", "table"]

PREFIXES = {"G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6, "n": 1e-9}
NARROWEST = 80  # what a table is fitted to at the least
LAST_EPOCHS = 10


def brief(number: float, unit: str) -> str:
    """To three digits, with a prefix: 65.5 kop, 680 B; of seconds downwards, 12 ns."""
    known = {prefix: scale for prefix, scale in PREFIXES.items() if (scale <= 1 if unit == "s" else scale >= 1)}
    prefix = next((prefix for prefix, scale in known.items() if number >= scale), list(known)[-1])
    return f"{number / known[prefix]:.3g} {prefix}{unit}"


def line_width() -> int | None:
    """Columns that printed lines may take: $COLUMNS, else the terminal's, 80 at the least; None, no limit, where stdout
    is a file, a pipe or a notebook."""
    given = os.environ.get("COLUMNS", "")
    try:
        width = int(given) if given.isdecimal() else os.get_terminal_size(sys.stdout.fileno()).columns
    except (AttributeError, OSError, ValueError):
        return None
    return max(width, NARROWEST)


# ---- what shows itself ---------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """A table: its first row names the columns, and `right` says which of them are set to the right."""

    rows: Sequence[Sequence[str]]
    right: Sequence[bool]
    ruled: bool = True  # whether a rule stands beneath the names
    total: bool = False  # whether one stands above the last row too

    @property
    def lines(self) -> list[str]:
        """The table as text."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        justify = [str.rjust if right else str.ljust for right in self.right]
        lines = ["  ".join(j(c, w) for j, c, w in zip(justify, r, widths, strict=True)).rstrip() for r in self.rows]
        rule = "  ".join("─" * w for w in widths)
        head, body = [lines[0], *[rule] * self.ruled], lines[1:]
        return [*head, *body[:-1], rule, body[-1]] if self.total else [*head, *body]


def table(rows: Sequence[Sequence[str]], numbers: int, *, total: bool = False) -> Grid:
    """The rows as a ruled table, of which the last so many columns are set to the right."""
    return Grid(rows, [False] * (len(rows[0]) - numbers) + [True] * numbers, total=total)


class Shown(ABC):
    """A result made of lines of text and tables: `print` and the prompt show the same, a notebook tables of HTML."""

    __slots__ = ()

    @abstractmethod
    def parts(self) -> Iterable[str | Grid]:
        """The texts and tables, from top to bottom."""

    def __str__(self) -> str:
        texts = ([part] if isinstance(part, str) else part.lines for part in self.parts())
        return "\n".join(line for text in texts for line in text)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return "\n".join(_text(part) if isinstance(part, str) else _html(part) for part in self.parts())


def _text(part: str) -> str:
    from html import escape  # its table of names takes a millisecond to import

    return f'<div style="white-space: pre-wrap">{escape(part)}</div>'


def _html(grid: Grid) -> str:
    from html import escape

    def row(cells: Sequence[str], tag: str) -> str:
        sides = ("right" if right else "left" for right in grid.right)
        pairs = zip(cells, sides, strict=True)
        return "<tr>" + "".join(f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for cell, side in pairs)

    head, *body = grid.rows
    return "\n".join(["<table>", row(head, "th"), *(row(cells, "td") for cells in body), "</table>"])


class Columns(dict[str, list[Any]], Shown):
    """Lists of one length by name; shown side by side, text to the left and numbers to the right.

    >>> print(Columns(layer=["0", "1"], variance=[1.0, 0.123456]))
    layer  variance
    0             1
    1        0.1235
    """

    def add(self, **row: Any) -> None:
        """One more row, with a value for each column."""
        for name, value in row.items():
            self.setdefault(name, []).append(value)

    def parts(self) -> Iterable[str | Grid]:
        rows = zip(*([name, *map(_cell, values)] for name, values in self.items()), strict=True)
        right = [not all(isinstance(value, str) for value in values) for values in self.values()]
        return [Grid(list(rows), right, ruled=False)] if self else ["no rows"]

    __str__, __repr__ = Shown.__str__, Shown.__repr__


class History(dict[str, list[float]], Shown):
    """A list of floats by the name of each figure, one for each epoch; shown as a table of the last epochs.

    >>> History(loss=[1.5, 0.25])
    epoch  loss
        1   1.5
        2  0.25
    """

    def parts(self) -> Iterable[str | Grid]:
        epochs = max(map(len, self.values()), default=0)
        shown = range(max(epochs - LAST_EPOCHS, 0), epochs)
        last = Columns(epoch=[i + 1 for i in shown])
        for name, values in self.items():
            last[name] = [values[i] if i < len(values) else math.nan for i in shown]
        return last.parts() if epochs else ["no epochs"]

    __str__, __repr__ = Shown.__str__, Shown.__repr__


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
