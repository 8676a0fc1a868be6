"""How kernels are launched: grids, blocks, scratch and strides, from the shape alone. Standard library only."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

__all__ = [
    "THREADS", "Geometry", "batch_norm_geometry", "broadcast_geometry", "collapse", "columns_geometry",
    "draws_geometry", "elementwise_geometry", "feed_geometry", "flat_geometry", "layer_norm_backward_geometry",
    "layer_norm_geometry", "layout", "norm_geometry", "one_thread", "reduce_geometry", "reduction_steps",
    "slices_geometry", "softmax_geometry", "sum_geometry", "top1_geometry", "transpose_geometry",
]  # fmt: skip

THREADS = 256  # of a block, as the prelude has it
EACH = 4  # rows or vectors that a thread of a reduction takes, at least
BLOCKS = 2048  # of a reduction, about: two rounds of the largest devices, and partials that one block adds up soon
HIGHEST = 65_535  # blocks along y and z
WARP = 32
DEPTH = 4  # vectors under way together in each thread of a reduction


class Geometry(NamedTuple):
    """How a kernel is launched: it follows from the shape alone, and so do the bits of sums."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    partials: int = 0  # elements of R
    tickets: int = 0  # zeros, which are zeros again afterwards


# ---- kernels of formulas -------------------------------------------------------------------------------------------


def elementwise_geometry(rows: int, columns: int, members: int, lanes: int) -> Geometry:
    """For `Kernel`s of (members, rows, columns) arrays in vectors of `lanes` elements."""
    across = _threads(columns, lanes, THREADS)
    down = THREADS // across
    tiles, splits = _divided(columns, across * lanes), _divided(rows, down * (EACH if rows > down else 1))
    return Geometry((tiles, min(splits, HIGHEST), min(members, HIGHEST)), (across, down, 1))


def broadcast_geometry(rows: int, columns: int, lanes: int) -> Geometry:
    """For `Broadcast`s of rows of `columns` elements."""
    return elementwise_geometry(rows, columns, 1, lanes)


def columns_geometry(rows: int, columns: int, members: int, lanes: int) -> Geometry:
    """For `Columns` of (members, rows, columns): partials (members, splits, columns), tickets (tiles, members)."""
    across = _threads(columns, lanes, WARP)
    down = THREADS // across
    tiles = _divided(columns, across * lanes)
    splits = min(_divided(rows, down * EACH), max(1, BLOCKS // (tiles * members)))
    partials, tickets = (members * splits * columns, tiles * members) if splits > 1 else (0, 0)
    return Geometry((tiles * members, splits, 1), (across, down, 1), partials, tickets)


def sum_geometry(size: int, lanes: int) -> Geometry:
    """For `Sum`s of `size` elements."""
    blocks = min(_divided(size, THREADS * lanes * EACH), BLOCKS)
    return Geometry((blocks, 1, 1), (THREADS, 1, 1), blocks, 1)


def collapse(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The fewest dimensions that say the same: those of size 1 dropped, and those merged that all operands may merge.

    >>> collapse((5, 1, 4, 6), [(24, 24, 6, 1), (1, 1, 0, 0)])
    ([5, 24], [[24, 1], [1, 0]])
    """
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for n, *steps in zip(shape, *strides, strict=True):
        if n == 1:
            continue
        if sizes and all(k[-1] == s * n for k, s in zip(kept, steps, strict=True)):
            sizes[-1] *= n
            for k, s in zip(kept, steps, strict=True):
                k[-1] = s
        else:
            sizes.append(n)
            for k, s in zip(kept, steps, strict=True):
                k.append(s)
    return sizes, kept


def layout(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of the Layout of up to 8 dimensions, the innermost last: sizes, then each operand's strides."""
    if len(shape) > 8:
        raise ValueError(f"layout: {len(shape)} dimensions that do not collapse, of at most 8; copy an operand first")
    short = 8 - len(shape)
    return [*[1] * short, *shape, *(s for steps in strides for s in (*[0] * short, *steps))]


# ---- losses, draws, feed, norm -------------------------------------------------------------------------------------


def softmax_geometry(rows: int, classes: int, itemsize: int) -> Geometry:
    """For softmax_cross_entropy_labels and _rows: a team for each row, part of a warp where that can hold it."""
    held = 4 if itemsize == 8 else 8
    team = _class_team(classes, itemsize) if classes <= WARP * held else THREADS
    blocks = min(_divided(rows, THREADS // team), BLOCKS)
    return Geometry((blocks, 1, 1), (team, THREADS // team, 1), partials=blocks, tickets=1)


def top1_geometry(rows: int, classes: int, itemsize: int) -> Geometry:
    """For top1: a warp for each row, or the part of it that the row needs."""
    team = _class_team(classes, itemsize)
    return Geometry((min(_divided(rows, THREADS // team), BLOCKS), 1, 1), (team, THREADS // team, 1))


def _class_team(classes: int, itemsize: int) -> int:
    """The least power of two of threads with a vector each for the row, or a warp; vectors divide the classes."""
    width = next(w for w in (16 // itemsize, 2, 1) if classes % w == 0)
    return _threads(classes, width, WARP)


def draws_geometry(size: int, itemsize: int) -> Geometry:
    """For dropout and noise of `size` elements: each thread a share of whole blocks of Philox and whole vectors."""
    share = max(4, 16 // itemsize)
    return Geometry((_divided(size, THREADS * share), 1, 1), (THREADS, 1, 1))


def feed_geometry(rows: int, columns: int, itemsize: int) -> Geometry:
    """For feed: each thread a vector of a row, because it waits for the row's place first."""
    lanes = 16 // itemsize
    across = _threads(columns, lanes, THREADS)
    down = THREADS // across
    return Geometry((_divided(columns, across * lanes), min(_divided(rows, down), HIGHEST), 1), (across, down, 1))


def norm_geometry(size: int, itemsize: int) -> Geometry:
    """For gradient_norm of `size` elements of R: a vector a thread, then more; one round of the largest devices."""
    blocks = min(_divided(size, THREADS * (16 // itemsize)), BLOCKS // 2)
    return Geometry((blocks, 1, 1), (THREADS, 1, 1), partials=blocks, tickets=1)


def one_thread() -> Geometry:
    """For advance and accumulate_loss."""
    return Geometry((1, 1, 1), (1, 1, 1))


# ---- normalisation, reductions, copies -----------------------------------------------------------------------------

SPREAD = 512  # blocks among which a few long lines are split


def layer_norm_geometry(rows: int, columns: int, itemsize: int) -> Geometry:
    """For layer_norm_forward: a team for each row, part of a warp where that can hold the row, else a block."""
    team = _row_team(columns, itemsize)
    down = max(1, 128 // team)
    return Geometry((_divided(rows, down), 1, 1), (team, down, 1))


def layer_norm_backward_geometry(rows: int, columns: int, itemsize: int) -> Geometry:
    """For layer_norm_backward: as forward, in up to 256 blocks, each of which leaves two sums per column."""
    (blocks, _, _), block, *_ = layer_norm_geometry(rows, columns, itemsize)
    blocks = min(blocks, 256)
    return Geometry((blocks, 1, 1), block, partials=blocks * 2 * columns, tickets=1 + _divided(blocks, 16))


def _row_team(columns: int, itemsize: int) -> int:
    """A thread keeps `held` elements of a row at most, and half as many where there is a choice."""
    held = 16 if itemsize == 8 else 32
    team = power_of_two(_divided(columns, held // 2))
    return min(team, WARP) if columns <= WARP * held else min(max(team, 128), THREADS)


def batch_norm_geometry(rows: int, columns: int, itemsize: int) -> Geometry:
    """For batch_norm_forward and _backward: a block for all rows of 32 to 128 bytes of columns.

    As wide as leaves 128 blocks and, if they fit at all, as keeps the rows in registers.
    """
    lanes, held = 16 // itemsize, 64 // max(4, itemsize) // (16 // itemsize)
    wide = [n for n in (8, 4) if _divided(columns, n * lanes) >= 128]
    fit = [n for n in wide if rows <= held * THREADS // n]
    across = (fit or (wide if rows > held * THREADS else []) or [2])[0]
    return Geometry((_divided(columns, across * lanes), 1, 1), (across, THREADS // across, 1))


def reduction_steps(shape: Sequence[int], axes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(outer, length, inner) of the reductions that together reduce the axes, each over the result of the one before.

    >>> reduction_steps((2, 3, 4, 5), (0, 2, 3))
    [(6, 20, 1), (1, 2, 3)]
    """
    runs = [
        (reduced, math.prod(shape[i] for i in run))
        for reduced, run in groupby((i for i, n in enumerate(shape) if n != 1), lambda i: i in axes)
    ]
    steps = [
        (math.prod(n for _, n in runs[:at]), length, math.prod(n for later, n in runs[at + 1 :] if not later))
        for at, (reduced, length) in enumerate(runs)
        if reduced
    ]
    return steps[::-1] or [(math.prod(shape), 1, 1)]


def reduce_geometry(outer: int, length: int, inner: int, itemsize: int) -> Geometry:
    """For reductions of (outer, length, inner), read in vectors of 16 bytes: a team, part of a warp or a block, for
    each line; several blocks where lines are few and long.
    """
    wide = 16 // itemsize
    if inner == 1:
        whole = length > WARP * wide * DEPTH * (4 if outer >= SPREAD else 1)
        across = THREADS if whole else _threads(length, wide * DEPTH, WARP)
        down = THREADS // across
        blocks, each = _divided(outer, down), across * wide * DEPTH
        block = across, down, 1
    else:
        across = _threads(inner, wide, WARP)
        down = _threads(length, DEPTH, WARP // across)
        whole = length > down * DEPTH * 4
        down = THREADS // across if whole else down
        lines = min(THREADS // (across * down), max(WARP // (across * down), power_of_two(outer)), 64)
        blocks, each = _divided(inner, across * wide) * _divided(outer, lines), down * DEPTH * 2
        block = across, down, lines
    split = min(_divided(length, each), _divided(SPREAD, blocks)) if whole else 1
    partials, tickets = (outer * inner * split, blocks) if split > 1 else (0, 0)
    return Geometry((blocks, split, 1), block, partials, tickets)


def flat_geometry(size: int, itemsize: int) -> Geometry:
    """For copy_flat and fill: a vector of 16 bytes to a thread, in blocks of one dimension, as the kernels are."""
    return Geometry((_divided(size, THREADS * (16 // itemsize)), 1, 1), (THREADS, 1, 1))


def slices_geometry(slices: int, elements: int, itemsize: int) -> Geometry:
    """For copy, gather and scatter_add: slices of contiguous elements, or rows of a layout."""
    across = _threads(elements, 16 // itemsize, THREADS)
    down = THREADS // across
    blocks = min(_divided(elements, across * (16 // itemsize)), HIGHEST)
    return Geometry((_divided(slices, down), blocks, 1), (across, down, 1))


def transpose_geometry(rows: int, columns: int) -> Geometry:
    """For transpose: tiles of 32 × 32."""
    return Geometry((_divided(rows, 32) * _divided(columns, 32), 1, 1), (32, 8, 1))


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _threads(columns: int, lanes: int, most: int) -> int:
    """The threads that take a row: the least power of two with a vector each, up to `most`."""
    return min(most, power_of_two(_divided(columns, lanes)))


def _divided(n: int, by: int) -> int:
    return -(-n // by)
