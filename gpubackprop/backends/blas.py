"""The BLAS that NumPy has loaded: its products, the number of its threads, and the blocks that a product is cut into.

OpenBLAS's caller waits for workers of its own that may have no core. So where its threads can be counted and set, each
of its calls is kept to the thread that makes it, and the native library's threads share the blocks of a product.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np

from gpubackprop.formulas import KEPT

__all__ = ["Blas", "blas", "blocks"]

LETTERS = {"float32": "s", "float64": "d"}
PRODUCTS = ("scipy_cblas_{}64_", "cblas_{}64_", "cblas_{}$NEWLAPACK$ILP64")  # with 64-bit integers
THREADS = ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_")
CONFIG = ("scipy_openblas_get_config64_", "openblas_get_config64_")


@dataclass(frozen=True)
class Blas:
    """What NumPy's BLAS offers, as addresses: None for what it does not have under a name that is known here."""

    library: Any

    def _address(self, *symbols: str) -> int | None:
        for symbol in symbols:
            if (function := getattr(self.library, symbol, None)) is not None:
                return ctypes.cast(function, ctypes.c_void_p).value
        return None

    @lru_cache(maxsize=16)  # noqa: B019 - there is one BLAS
    def routine(self, name: str, dtype: np.dtype[Any]) -> int | None:
        """cblas_?name of that type, with 64-bit integers."""
        if dtype.name not in LETTERS:
            return None
        return self._address(*(form.format(LETTERS[dtype.name] + name) for form in PRODUCTS))

    @cached_property
    def threads(self) -> tuple[int, int] | None:
        """The functions that get and set the number of its threads."""
        get, set_ = (self._address(*(form.format(verb) for form in THREADS)) for verb in ("get", "set"))
        return None if get is None or set_ is None else (get, set_)

    @cached_property
    def tile(self) -> int:
        """Rows in whose multiples a product may be cut without other bits; 0 where none are known."""
        return ROWS if self.name.endswith(TILED) else 0

    @cached_property
    def name(self) -> str:
        """Its own name for itself, "" if it has none that is known here."""
        for symbol in CONFIG:
            if (config := getattr(self.library, symbol, None)) is not None:
                config.restype = ctypes.c_char_p
                words = config().decode().split()
                return " ".join(word for word in words if word[0].isdigit() or word in ("OpenBLAS", words[-2]))
        return ""


@cache
def blas() -> Blas:
    """NumPy's own."""
    return Blas(ctypes.CDLL(np.linalg._umath_linalg.__file__))  # the libraries that it needs are searched too


# ---- blocks --------------------------------------------------------------------------------------------------------

# Pieces that a product of so many operations is cut into. With more of them a helper that loses its core keeps others
# waiting less; but each packs its operands anew, which takes 2 to 5 % of the time of one thread here.
PIECES = ((1e6, 2), (256e6, 4), (8e9, 8))
TILES = 4, 16  # rows and columns that kernels of OpenBLAS go in, or a multiple
LEAST = 64  # rows or columns of what is cut
ROWS = 48  # any cut in multiples of so many rows has the bits of the whole, on cores of these names
TILED = ("SkylakeX", "Cooperlake", "Sapphirerapids", "Haswell", "Zen", "Sandybridge")


@lru_cache(maxsize=KEPT)
def blocks(m: int, n: int, k: int) -> tuple[int, int]:
    """(rows, columns) of the blocks of an m × n product of depth k: of these numbers alone, so that its bits are.

    Halved along the longer side, until there are the pieces that its operations are worth.
    """
    wanted = max((pieces for least, pieces in PIECES if 2 * m * n * k >= least), default=1)
    sides, parts = (m, n), [1, 1]
    while math.prod(parts) < wanted:
        lengths = [side / part for side, part in zip(sides, parts, strict=True)]
        if max(lengths) < 2 * LEAST:
            break
        parts[lengths[1] > lengths[0]] *= 2
    height, width = (
        side if part == 1 else min(side, -(-side // part // tile) * tile)
        for side, part, tile in zip(sides, parts, TILES, strict=True)
    )
    return height, width
