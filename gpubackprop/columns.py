"""Columns: what a measurement gives back, lists by name that print as a table."""

from typing import Any

__all__ = ["Columns"]


class Columns(dict[str, list[Any]]):
    """Lists of one length by name; `print` shows them side by side, text to the left and numbers to the right.

    >>> print(Columns(layer=["0", "1"], variance=[1.0, 0.123456]))
    layer  variance
    0             1
    1        0.1235
    """

    def add(self, **row: Any) -> None:
        """One more row, with a value for each column."""
        for name, value in row.items():
            self.setdefault(name, []).append(value)

    def __str__(self) -> str:
        cells = [[name, *map(_cell, values)] for name, values in self.items()]
        widths = [max(map(len, column)) for column in cells]
        left = [all(isinstance(value, str) for value in values) for values in self.values()]
        rows = zip(*cells, strict=True)
        return "\n".join("  ".join(map(_justified, row, widths, left)).rstrip() for row in rows)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _justified(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)
