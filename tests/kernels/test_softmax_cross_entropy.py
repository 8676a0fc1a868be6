"""Softmax with cross-entropy and top-1: values against float64, special values against the NumPy reference."""

from functools import cache

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, shifted

from gpubackprop.backends import codegen, rows
from gpubackprop.backends.geometry import Geometry, softmax_geometry, top1_geometry

FEW, MANY = (
    [1, 2, 3, 10, 16, 17, 33, 100, 128, 129, 256],
    [257, 264, 1000, 5000],
)  # classes: those of a warp, of a block
SMALL_BLOCK = (64, 1, 1)  # a block for each row all the same, and soon done
STATE = np.array([2, 0, 11, 0])  # row 2 of the table, which is step 13
TABLE = np.array([[np.nan, np.nan], [np.nan, np.nan], [np.nan, 1 / 32]])

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
either_target = pytest.mark.parametrize("kind", ["labels", "rows"])


@cache
def library(dtype, weighted=""):
    return build(codegen.file_unit(f"softmax_cross_entropy{weighted}.cu", dtype.name))


def geometry(block, n):
    blocks = -(-n // block[1])
    return Geometry((blocks, 1, 1), block, blocks, 1)


def launch(x, target, *, w=None, place=None, share=False, scale=None, loss=None, events=None, every_order=False):
    """dx and total."""
    dtype, wide, kind = x.dtype, arithmetic(x.dtype), "labels" if target.ndim == 1 else "rows"
    place = place or softmax_geometry(*x.shape, dtype.itemsize)
    dx, total, ticket = np.zeros_like(x), np.full(1, np.nan, wide), np.zeros(1, np.uint32)
    if x.ctypes.data % 16:
        dx = shifted(dx, 1)
    weighted, weights = ("", {}) if w is None else ("_weighted", {"weights": w})
    made = library(dtype, weighted)
    run = made.run if every_order else made.launch
    run(
        f"softmax_cross_entropy_{kind}{weighted}", place.grid, place.block, dx=dx, total=total, ticket=ticket,
        partials=np.full(place.partials, np.nan, wide), loss=loss, events=events, x=x,
        **{"labels" if kind == "labels" else "target": target}, **weights, table=TABLE.astype(wide), state=STATE,
        scale=scale, width=2, share_at=1 if share else -1, rows=x.shape[0], classes=x.shape[1],
    )  # fmt: skip
    assert not ticket.any()
    return dx, total[0]


def top1(x, labels, *, count=0, place=None, every_order=False):
    """What it adds to the count."""
    counted, place = np.array([count]), place or top1_geometry(*x.shape, x.dtype.itemsize)
    run = library(x.dtype).run if every_order else library(x.dtype).launch
    run("top1", place.grid, place.block, count=counted, x=x, labels=labels, rows=x.shape[0], classes=x.shape[1])
    return counted[0] - count


def draw(kind, n, classes, dtype):
    rng = np.random.default_rng(3)
    x = (3 * rng.standard_normal((n, classes))).astype(dtype)
    return x, rng.integers(0, classes, n) if kind == "labels" else rng.random((n, classes)).astype(arithmetic(dtype))


def oracle(x, t):
    """dx and the losses of the rows, in float64."""
    z = x.astype(np.float64) - x.astype(np.float64).max(1, keepdims=True)
    t = np.eye(x.shape[1])[t] if t.ndim == 1 else t.astype(np.float64)
    log_softmax = z - np.log(np.exp(z).sum(1, keepdims=True))
    return t.sum(1, keepdims=True) * np.exp(log_softmax) - t, -(t * log_softmax).sum(1)


def reference(x, t):
    """dx and total as the NumPy backend has them, in the arithmetic type."""
    x = x.astype(arithmetic(x.dtype))
    dx, total = np.empty_like(x), np.empty((), x.dtype)
    with np.errstate(all="ignore"):
        for call in rows.softmax_cross_entropy(x, t, dx, total):
            call()
    return dx, total[()]


def assert_close(dx, expected, t):
    """Within the rounding of sums and functions in the arithmetic type, and of one more to the type of storage."""
    eps = float(np.finfo(arithmetic(dx.dtype)).eps)
    stored = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dx.dtype.name, 0.0)
    subnormal = 2.0**-24 if dx.dtype.name == "float16" else 0.0
    weight = 1 if t.ndim == 1 else float(t.sum(1).max())
    rtol, atol = stored + 32 * eps, subnormal + 4 * eps * weight
    np.testing.assert_allclose(dx.astype(np.float64), np.asarray(expected, np.float64), rtol=rtol, atol=atol)


# ---- shapes --------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("n, classes", [(1, 1), (1, 10), (2, 1000), *((7, c) for c in FEW), *((1, c) for c in MANY)])
@either_target
def test_every_shape(kind, n, classes, dtype):
    x, t = draw(kind, n, classes, dtype)
    dx, total = launch(x, t, every_order=True)
    expected, losses = oracle(x, t)
    assert_close(dx, expected, t)
    eps = np.finfo(total.dtype).eps
    np.testing.assert_allclose(total, losses.sum(), rtol=64 * eps, atol=eps)


@every_dtype
@pytest.mark.parametrize("n, classes", [(9, 8), (9, 10), (9, 16), (9, 33), (9, 256), (2, 1024), (2, 5000)])
@either_target
def test_off_the_boundary_of_16_bytes_the_bits_are_the_same(kind, n, classes, dtype):
    x, t = draw(kind, n, classes, dtype)
    dx, total = launch(x, t)
    moved, same = launch(shifted(x, 1), t if kind == "labels" else shifted(t, 1))
    np.testing.assert_array_equal(moved, dx)
    assert same == total
    if kind == "labels":
        assert top1(shifted(x, 1), t) == top1(x, t)


@every_dtype
@pytest.mark.parametrize("n, classes, block", [(70, 10, (8, 8, 1)), (33, 3, (4, 8, 1)), (5, 600, SMALL_BLOCK)])
@either_target
def test_any_number_of_blocks(kind, n, classes, block, dtype):
    """Fewer blocks than the rows need walk over them: dx has the same bits, the total another order of adding."""
    x, t = draw(kind, n, classes, dtype)
    dx, total = launch(x, t, place=geometry(block, n))
    for blocks in (1, 3):
        few, about = launch(x, t, place=Geometry((blocks, 1, 1), block, blocks, 1), every_order=True)
        np.testing.assert_array_equal(few, dx)
        np.testing.assert_allclose(about, total, rtol=32 * np.finfo(total.dtype).eps)


# ---- special values ------------------------------------------------------------------------------------------------

NAN, INF = np.nan, np.inf
SPECIAL = [
    [0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1], [-0.0, 0, 0], [1e4, -1e4, 0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4],
    [-INF, 0, 1], [0, -INF, -INF], [-INF, -INF, -INF], [INF, 0, 1], [0, INF, INF], [INF, -INF, 0], [INF, INF, INF],
    [NAN, 0, 1], [0, 1, NAN], [NAN, NAN, 0], [0, NAN, NAN], [NAN, INF, 0], [INF, NAN, -INF], [-INF, -INF, NAN],
]  # fmt: skip
SPECIAL_SHAPES = [(3, (4, 8, 1)), (40, (16, 2, 1)), (100, SMALL_BLOCK)]  # classes, block


def special(classes, dtype):
    """Rows that begin and end with the special ones, far below or −∞ between, with labels at both ends and between."""
    x = np.full((len(SPECIAL), classes), -50.0)
    x[1::3] = -INF
    x[:, :2], x[:, -1] = np.array(SPECIAL)[:, :2], np.array(SPECIAL)[:, 2]
    return x.astype(dtype).repeat(3, 0), np.tile([0, 1, classes - 1], len(x))


@every_dtype
@pytest.mark.parametrize("classes, block", SPECIAL_SHAPES)
def test_special_logits_are_the_references(classes, block, dtype):
    x, labels = special(classes, dtype)
    shares = np.full((len(x), classes), 1 / classes, arithmetic(dtype))
    shares[::2] = np.eye(classes)[labels[::2]]
    for t in (labels, shares):
        dx, _ = launch(x, t, place=geometry(block, len(x)))
        assert_close(dx, reference(x, t)[0], t)


@every_dtype
@pytest.mark.parametrize("classes, block", [(3, (4, 8, 1)), (100, SMALL_BLOCK)])
@either_target
def test_a_special_row_has_the_loss_of_the_reference(kind, classes, block, dtype):
    """What is not picked counts for nothing: neither with labels nor where a share is 0."""
    x, labels = special(classes, dtype)
    for row, label in zip(x[::2, None], labels[::2, None], strict=True):
        t = label if kind == "labels" else np.eye(classes)[label].astype(arithmetic(dtype))
        _, total = launch(row, t, place=geometry(block, 1))
        np.testing.assert_allclose(total, reference(row, t)[1], rtol=1e-6, atol=1e-6)


# ---- weights of the rows -------------------------------------------------------------------------------------------

WEIGHED = [(70, 10), (33, 3), (40, 128), (7, 300)]  # rows, classes: several blocks, parts of a warp, a block for a row


@every_dtype
@pytest.mark.parametrize("n, classes", WEIGHED)
@either_target
def test_a_row_counts_by_its_weight(kind, n, classes, dtype):
    """Powers of two and 0: bit for bit what the row alone gives times its weight."""
    x, t = draw(kind, n, classes, dtype)
    w = np.resize([0, 1, 2, 0.5], n).astype(arithmetic(dtype))
    dx, _ = launch(x, t)
    weighed, total = launch(x, t, w=w, every_order=True)
    subnormal = 2.0**-24 if dtype == np.float16 else 0.0
    np.testing.assert_allclose(weighed.astype(np.float64), w[:, None] * dx.astype(np.float64), rtol=0, atol=subnormal)
    losses = oracle(x, t)[1]
    np.testing.assert_allclose(total, (w * losses).sum(), rtol=64 * np.finfo(total.dtype).eps)


@every_dtype
@pytest.mark.parametrize("n, classes", WEIGHED)
@either_target
def test_weights_of_1_give_the_same_bits_as_none(kind, n, classes, dtype):
    x, t = draw(kind, n, classes, dtype)
    (dx, total), (same, again) = (launch(x, t, w=w, share=True) for w in (None, np.ones(n, arithmetic(dtype))))
    np.testing.assert_array_equal(dx, same)
    assert total == again


@every_dtype
@pytest.mark.parametrize("n, classes", WEIGHED)
@either_target
def test_a_row_of_weight_0_does_no_harm(kind, n, classes, dtype):
    """Nor do its logits, whatever they are; rows right are counted all the same."""
    x, t = draw(kind, n, classes, dtype)
    w = np.resize([0, 1], n).astype(arithmetic(dtype))
    dx, total = launch(x, t, w=w)
    x[::2] = np.resize([np.nan, np.inf, -np.inf], x[::2].shape)
    loss, events = np.zeros(2, arithmetic(dtype)), np.zeros(2, np.int64)
    same, again = launch(x, t, w=w, loss=loss, events=events)
    np.testing.assert_array_equal(dx, same)
    assert not same[::2].any() and again == total == loss[0]
    assert events.tolist() == [0, np.sum(x.astype(np.float64).argmax(1) == t) if kind == "labels" else 0]


@every_dtype
def test_rows_of_zeros_have_no_part_in_anything(dtype):
    x, t = draw("rows", 12, 10, dtype)
    t[::3] = 0
    dx, total = launch(x, t)
    assert not dx[::3].any()
    left = np.arange(12) % 3 > 0
    np.testing.assert_allclose(total, launch(x[left], t[left])[1], rtol=1e-6)


@every_dtype
@pytest.mark.parametrize("classes", [3, 300])
def test_a_label_that_is_no_class(classes, dtype):
    """Its loss is infinite, which training reports; it reads nothing outside of the row."""
    x, _ = draw("labels", 1, classes, dtype)
    for label in (-1, classes, -(2**40), 2**32):
        loss, events = np.zeros(2, arithmetic(dtype)), np.zeros(2, np.int64)
        assert launch(x, np.array([label]), loss=loss, events=events)[1] == np.inf
        assert events.tolist() == [13, 0] and top1(x, np.array([label])) == 0


# ---- top-1 ---------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("classes, block", SPECIAL_SHAPES)
def test_top1_is_argmax(classes, block, dtype):
    x, labels = special(classes, dtype)
    right = x.astype(arithmetic(dtype)).argmax(1) == labels
    events, loss = np.array([0, 7]), np.zeros(2, arithmetic(dtype))
    launch(x, labels, place=geometry(block, len(x)), loss=loss, events=events)
    assert events[1] - 7 == top1(x, labels, count=5) == right.sum()
    for row in range(len(x)):
        alone = geometry((min(32, block[0]), 32 // min(32, block[0]), 1), 1)
        assert top1(x[row : row + 1], labels[row : row + 1], place=alone) == right[row]


@every_dtype
@pytest.mark.parametrize("classes", FEW + MANY)
def test_top1_of_every_shape(classes, dtype):
    n = 13 if classes in FEW else 7
    x, labels = draw("labels", n, classes, dtype)
    labels[::2] = x[::2].astype(np.float64).argmax(1)
    expected = np.count_nonzero(x.astype(np.float64).argmax(1) == labels)
    assert top1(x, labels) == expected
    assert top1(x, labels, place=Geometry((3, 1, 1), (16, 2, 1)), every_order=True) == expected


# ---- the training step ---------------------------------------------------------------------------------------------


@every_dtype
@either_target
def test_share_and_loss_scale(kind, dtype):
    """Powers of two: the gradient is that of the sum times both, bit for bit; the total is not scaled."""
    x, t = draw(kind, 32, 10, dtype)
    scale = np.full(1, 1024, arithmetic(dtype))
    dx, total = launch(x, t)
    shared, same = launch(x, t, share=True)
    scaled, again = launch(x, t, share=True, scale=scale)
    assert total == same == again
    subnormal = 2.0**-20 if dtype == np.float16 else 0.0  # what dx / 32 loses, 32 times
    for a, b in ((scaled, dx.astype(np.float64) * 32), (dx, shared.astype(np.float64) * 32)):
        np.testing.assert_allclose(a.astype(np.float64), b, rtol=0, atol=subnormal * 32)
    np.testing.assert_array_equal(launch(x, t, scale=scale)[0], dx)  # the plain gradient has no scale


@every_dtype
def test_the_tally_over_several_steps(dtype):
    x, labels = draw("labels", 40, 10, dtype)
    wide, steps = arithmetic(dtype), 5
    right = np.count_nonzero(x.astype(np.float64).argmax(1) == labels)
    loss, events = np.zeros(2, wide), np.zeros(2, np.int64)
    for _ in range(steps):
        _, total = launch(x, labels, share=True, loss=loss, events=events)
    assert loss.astype(np.float64).sum() == pytest.approx(steps * float(total), rel=1e-12)
    assert events.tolist() == [0, steps * right]
    x[3, 3] = np.nan
    launch(x, labels, loss=loss, events=events)
    assert events[0] == 13
    events[0] = 4
    launch(x, labels, loss=loss, events=events)
    assert events[0] == 4  # the first bad step stays
    counted = events.copy()
    launch(x, np.eye(10, dtype=wide)[labels], loss=loss, events=events)
    np.testing.assert_array_equal(events, counted)  # rows of shares have no label to count


def test_geometry():
    for itemsize, held in ((2, 8), (4, 8), (8, 4)):
        for classes in range(1, 600):
            for n in (1, 33, 10**9):
                grid, (team, teams, _), partials, tickets = softmax_geometry(n, classes, itemsize)
                assert team * teams == 256 and (partials, tickets) == (grid[0], 1) and 1 <= grid[0] <= 2048
                if classes > 32 * held:
                    assert team == 256
                else:
                    assert team in (1, 2, 4, 8, 16, 32) and classes <= team * held
                    assert top1_geometry(n, classes, itemsize).block[0] == team
    assert softmax_geometry(128, 10, 4) == ((4, 1, 1), (8, 32, 1), 4, 1)
    assert softmax_geometry(128, 1000, 4) == ((128, 1, 1), (256, 1, 1), 128, 1)
