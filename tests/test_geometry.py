"""Grids and blocks at extreme sizes: a device takes them, and they leave nothing out."""

from itertools import product
from math import inf, prod

import pytest

from gpubackprop.backends import geometry
from gpubackprop.backends.geometry import BLOCKS, EACH, HIGHEST, THREADS

LIMITS = (2**31 - 1, 65_535, 65_535), (1024, 1024, 64)  # of a grid and of a block, in CUDA
SIZES = (1, 3, 31, 1000, 65_537, 10**7, 2**31 - 1, 2**33)
MOST = 2**36  # elements: 128 GiB of float16
INTS = {"softmax": 1, "top1": 1, "columns": 2}  # where the kernels count in 32 bits: classes, and members


def blocks(extent, each):
    return -(-extent // each)


# For each function of (rows, columns, …) the blocks that take everything at once along x, y and z; then how many there
# are at most where the kernel goes on with the rest in a loop, inf where it does not.
NEEDED = {
    "elementwise": (lambda r, c, m, t, n: (blocks(c, t[0] * n), blocks(r, t[1] * EACH), m), (inf, HIGHEST, HIGHEST)),
    "broadcast": (lambda r, c, t, n: (blocks(c, t[0] * n), blocks(r, t[1] * EACH), 1), (inf, HIGHEST, inf)),
    "columns": (lambda r, c, m, t, n: (m * blocks(c, t[0] * n), 1, 1), (inf, inf, inf)),
    "sum": (lambda size, t, n: (blocks(size, t[0] * n * EACH), 1, 1), (BLOCKS, inf, inf)),
    "softmax": (lambda r, c, t, n: (blocks(r, t[1]), 1, 1), (BLOCKS, inf, inf)),
    "top1": (lambda r, c, t, n: (blocks(r, t[1]), 1, 1), (BLOCKS, inf, inf)),
    "draws": (lambda size, t, n: (blocks(size, t[0] * max(4, n)), 1, 1), (inf, inf, inf)),
    "feed": (lambda r, c, t, n: (blocks(c, t[0] * n), blocks(r, t[1]), 1), (inf, HIGHEST, inf)),
    "norm": (lambda size, t, n: (blocks(size, t[0] * n), 1, 1), (BLOCKS // 2, inf, inf)),
    "layer_norm": (lambda r, c, t, n: (blocks(r, t[1]), 1, 1), (inf, inf, inf)),
    "layer_norm_backward": (lambda r, c, t, n: (blocks(r, t[1]), 1, 1), (256, inf, inf)),
    "batch_norm": (lambda r, c, t, n: (blocks(c, t[0] * n), 1, 1), (inf, inf, inf)),
    "reduce": (
        lambda outer, length, inner, t, n: (
            blocks(outer, t[1]) if inner == 1 else blocks(inner, t[0] * n) * blocks(outer, t[2]), 1, 1,
        ), (inf, inf, inf),
    ),
    "flat": (lambda size, t, n: (blocks(size, t[0] * n), 1, 1), (inf, inf, inf)),
    "slices": (lambda r, c, t, n: (blocks(r, t[1]), blocks(c, t[0] * n), 1), (inf, HIGHEST, inf)),
    "transpose": (lambda r, c, t, n: (blocks(r, 32) * blocks(c, 32), 1, 1), (inf, inf, inf)),
}  # fmt: skip


def test_every_geometry_is_here():
    assert {f"{name}_geometry" for name in NEEDED} == {n for n in geometry.__all__ if n.endswith("_geometry")}


@pytest.mark.parametrize("name", NEEDED)
def test_a_device_takes_it_and_nothing_is_left_out(name):
    function, (needed, most) = getattr(geometry, f"{name}_geometry"), NEEDED[name]
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    by_lanes, sizes = "lanes" in arguments, len([k for k in arguments if k not in ("lanes", "itemsize")])
    for shape, itemsize in product(product(SIZES, repeat=sizes), (2, 4, 8)):
        if prod(shape) > MOST or (name in INTS and shape[INTS[name]] >= 2**31):
            continue
        last = [16 // itemsize if by_lanes else itemsize] * (sizes < len(arguments))
        grid, block, *_ = function(*shape, *last)
        where = f"{name} {shape} of {itemsize} bytes: grid {grid}, blocks {block}"
        for at, limits in zip((grid, block), LIMITS, strict=True):
            assert all(1 <= n <= limit for n, limit in zip(at, limits, strict=True)), where
        assert prod(block) <= THREADS, where
        all_at_once = needed(*shape, block, 16 // itemsize)
        assert all(n >= min(all_, m) for n, all_, m in zip(grid, all_at_once, most, strict=True)), where
