"""Columns: what a measurement gives back, lists by name that print as a table."""

from typing import Any

__all__ = ["Columns", "brief"]

PREFIXES = {"G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6, "n": 1e-9}


def brief(number: float, unit: str) -> str:
    """To three digits, with a prefix: 65.5 kop, 680 B; of seconds downwards, 12 ns."""
    known = {prefix: scale for prefix, scale in PREFIXES.items() if (scale <= 1 if unit == "s" else scale >= 1)}
    prefix = next((prefix for prefix, scale in known.items() if number >= scale), list(known)[-1])
    return f"{number / known[prefix]:.3g} {prefix}{unit}"


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
