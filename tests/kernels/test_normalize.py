"""Layer norm and batch norm against the reference in float64, for lines that fit the registers and that do not."""

from functools import cache
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic, shifted

from gpubackprop.backends import codegen, geometry, rows

LAYER = [(1, 1), (1, 7), (5, 1), (3, 8), (300, 3), (130, 16), (9, 100), (70, 512), (4, 515), (6, 1024), (3, 1032)]
LONG = [(3, 5000), (2, 8208), (3, 8195)]  # the last two are longer than the registers at any type
BATCH = [(1, 1), (1, 9), (2, 3), (128, 10), (5, 64), (33, 70), (600, 8), (1100, 5), (2100, 16)]
AXIS = {"layer": 1, "batch": 0}
EPS = 1e-5


@cache
def library(dtype):
    return build(codegen.file_unit("normalize.cu", dtype.name))


def operands(shape, dtype, offset=0):
    rng = np.random.default_rng(shape)
    arrays = {"x": rng.normal(3, 2, shape), "dy": rng.normal(size=shape)}
    arrays |= {k: rng.normal(1, 0.5, shape[1]) for k in ("gain", "bias")}
    return {k: shifted(a.astype(dtype), offset) for k, a in arrays.items()}


def place(kind, back, shape, dtype):
    suffix = "_backward" if kind == "layer" and back else ""
    return getattr(geometry, f"{kind}_norm{suffix}_geometry")(*shape, dtype.itemsize)


def forward(kind, arrays, dtype, offset=0):
    """out, mean, variance, rstd by the kernel in every order."""
    x = arrays["x"]
    at, wide = place(kind, False, x.shape, dtype), arithmetic(dtype)
    lines = x.shape[1 - AXIS[kind]]
    written = {"out": shifted(np.full(x.shape, 9, dtype), offset)}
    written |= {k: np.full(lines, np.nan, wide) for k in ("mean", "variance", "rstd")}
    read = {k: arrays[k] for k in ("x", "gain", "bias")}
    library(dtype).run(f"{kind}_norm_forward", at.grid, at.block, **written, **read, eps=EPS, rows=x.shape[0],
                       columns=x.shape[1])  # fmt: skip
    return written


def backward(kind, arrays, statistics, outs, dtype, accumulate=(0, 0, 0), at=None):
    """dx, dgain, dbias (None where NULL) in place, by the kernel in every order."""
    shape, wide = arrays["x"].shape, arithmetic(dtype)
    at = at or place(kind, True, shape, dtype)
    scratch = {}
    if kind == "layer":
        scratch = {"partials": np.full(at.partials, np.nan, wide), "tickets": np.zeros(at.tickets, np.uint32)}
    flags = {f"accumulate_{k}": a for k, a in zip(("dx", "dgain", "dbias"), accumulate, strict=True)}
    read = {k: arrays[k] for k in ("x", "dy", "gain")} | {k: statistics[k] for k in ("mean", "rstd")}
    library(dtype).run(
        f"{kind}_norm_backward", at.grid, at.block, **outs, **scratch, **read, **flags, rows=shape[0], columns=shape[1]
    )
    assert not any(scratch.get("tickets", ()))


def gradients(arrays, dtype, fill=9.0, offset=0):
    shape, wide = arrays["x"].shape, arithmetic(dtype)
    outs = {"dx": shifted(np.full(shape, fill, dtype), offset)}
    return outs | {k: np.full(shape[1], fill, wide) for k in ("dgain", "dbias")}


def expected(kind, arrays):
    """All that the reference computes, in float64."""
    a = {k: v.astype(np.float64) for k, v in arrays.items()}
    axis, shape = AXIS[kind], a["x"].shape
    out = {k: np.empty(shape) for k in ("out", "dx")} | {k: np.empty(shape[1]) for k in ("dgain", "dbias")}
    out |= {k: np.empty(shape[1 - axis]) for k in ("mean", "variance", "rstd")}
    statistics = [out[k] for k in ("mean", "variance", "rstd")]
    calls = rows.normalize(axis, EPS, a["x"], a["gain"], a["bias"], out["out"], *statistics)
    calls += rows.normalize_backward(
        axis, (False,) * 3, a["dy"], a["x"], a["gain"], out["mean"], out["rstd"], out["dx"], out["dgain"], out["dbias"]
    )
    for call in calls:
        call()
    return out


def assert_near(actual, wanted, magnitude, ulps=32):
    """Within some roundings in R of values of that magnitude, and one of the type stored."""
    stored = float(ml_dtypes.finfo(actual.dtype).eps)
    bound = ulps * float(np.finfo(arithmetic(actual.dtype)).eps) * magnitude + stored * np.abs(wanted)
    wrong = np.abs(np.asarray(actual, np.float64) - wanted) - bound
    assert np.all(wrong <= 0), f"beyond the tolerance by {np.max(wrong)}"


def check(kind, shape, dtype, offset=0):
    arrays = operands(shape, dtype, offset)
    wanted = expected(kind, arrays)
    made = forward(kind, arrays, dtype, offset)
    made |= (outs := gradients(arrays, dtype, offset=offset))
    backward(kind, arrays, made, outs, dtype)
    scale = wanted["rstd"][:, None] if kind == "layer" else wanted["rstd"]
    sums = np.abs(arrays["dy"].astype(np.float64)).sum(0)
    for key, magnitude in {
        "out": 20 * scale, "mean": 10, "variance": 100, "rstd": wanted["rstd"] ** 3, "dx": 20 * scale**2,
        "dgain": 5 * sums * scale.max(), "dbias": sums,
    }.items():  # fmt: skip
        assert_near(made[key], wanted[key], magnitude)
    return made


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind, shape", [*product(["layer"], LAYER), *product(["batch"], BATCH)])
def test_against_the_reference(kind, shape, dtype):
    check(kind, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", LONG)
def test_rows_longer_than_the_registers(shape, dtype):
    check("layer", shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind, shape", [
    ("layer", (5, 24)), ("layer", (3, 1024)), ("layer", (2, 8208)), ("batch", (70, 24)), ("batch", (1100, 8)),
])  # fmt: skip
def test_arrays_off_the_boundary_give_the_same_bits(kind, shape, dtype):
    aligned, moved = check(kind, shape, dtype), check(kind, shape, dtype, offset=1)
    for key, value in aligned.items():
        np.testing.assert_array_equal(value.view(np.uint8), np.ascontiguousarray(moved[key]).view(np.uint8), key)


@pytest.mark.parametrize("kind, shape", [("layer", (37, 20)), ("layer", (5, 8200)), ("batch", (37, 20))])
@pytest.mark.parametrize("absent", [("dx",), ("dgain",), ("dbias",), ("dgain", "dbias"), ("dx", "dgain")])
def test_outputs_may_be_absent(kind, shape, absent):
    dtype = DTYPES["float32"]
    arrays = operands(shape, dtype)
    statistics, all_outs = forward(kind, arrays, dtype), gradients(arrays, dtype)
    backward(kind, arrays, statistics, all_outs, dtype)
    some = gradients(arrays, dtype) | dict.fromkeys(absent)
    backward(kind, arrays, statistics, some, dtype)
    for key in some.keys() - set(absent):
        np.testing.assert_array_equal(some[key], all_outs[key])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind, shape", [("layer", (37, 20)), ("layer", (2, 8200)), ("batch", (37, 21))])
def test_each_output_may_accumulate(kind, shape, dtype):
    arrays = operands(shape, dtype)
    statistics, fresh = forward(kind, arrays, dtype), gradients(arrays, dtype)
    backward(kind, arrays, statistics, fresh, dtype)
    for accumulate in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        added = gradients(arrays, dtype, fill=2.0)
        backward(kind, arrays, statistics, added, dtype, accumulate)
        for key, flag in zip(("dx", "dgain", "dbias"), accumulate, strict=True):
            bound = 2 * float(ml_dtypes.finfo(fresh[key].dtype).eps) * flag  # `fresh` was rounded before the addition
            wanted = fresh[key].astype(np.float64) + 2 * flag
            np.testing.assert_allclose(np.asarray(added[key], np.float64), wanted, rtol=bound, atol=bound * 4)


@pytest.mark.parametrize("shape, blocks", [
    ((35, 20), 1), ((35, 20), 2), ((35, 20), 17), ((35, 20), 33), ((35, 512), 2), ((70, 512), 17), ((5, 8200), 2),
])  # fmt: skip
def test_any_number_of_blocks_adds_up_all_rows(shape, blocks):
    """Groups of 16 blocks, the last of which may be of one; and blocks that take several turns of rows."""
    dtype, columns = DTYPES["float32"], shape[1]
    arrays = operands(shape, dtype) | {"dy": np.ones(shape, dtype)}
    at = place("layer", True, shape, dtype)
    block = (32, 1, 1) if columns == 20 else at.block  # with many teams in a block, some blocks would have no row
    at = geometry.Geometry((blocks, 1, 1), block, blocks * 2 * columns, 1 + -(-blocks // 16))
    outs = gradients(arrays, dtype)
    backward("layer", arrays, forward("layer", arrays, dtype), outs, dtype, at=at)
    np.testing.assert_array_equal(outs["dbias"], shape[0])
    assert_near(outs["dgain"], expected("layer", arrays)["dgain"], 100)


@pytest.mark.parametrize("kind", AXIS)
def test_a_large_mean_does_not_spoil_the_variance(kind):
    dtype, shape = DTYPES["float32"], (64, 64)
    arrays = operands(shape, dtype)
    arrays["x"] = (1e4 + np.random.default_rng(0).integers(-4, 5, shape)).astype(dtype)
    made, wanted = forward(kind, arrays, dtype), expected(kind, arrays)
    np.testing.assert_allclose(made["variance"], wanted["variance"], rtol=1e-5)


@pytest.mark.parametrize("kind", AXIS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_stays_in_its_line(kind, bad):
    dtype, shape = DTYPES["float32"], (40, 40)
    arrays = operands(shape, dtype)
    clean = forward(kind, arrays, dtype)
    outs, spoilt = gradients(arrays, dtype), gradients(arrays, dtype)
    backward(kind, arrays, clean, outs, dtype)
    arrays["x"][3, 3] = bad
    made = forward(kind, arrays, dtype)
    backward(kind, arrays, made, spoilt, dtype)
    others = np.arange(40) != 3
    line, others = (np.s_[3], np.s_[others]) if kind == "layer" else (np.s_[:, 3], np.s_[:, others])
    assert np.isnan(made["out"][line]).all() and np.isnan(spoilt["dx"][line]).all()
    np.testing.assert_array_equal(made["out"][others], clean["out"][others])
    np.testing.assert_array_equal(spoilt["dx"][others], outs["dx"][others])


def test_geometry():
    """Teams are parts of a warp or blocks; several teams share a block only where registers hold their rows."""
    for rows_, columns, itemsize in product([1, 100, 10**6], [1, 10, 128, 1000, 1025, 4097, 8193, 10**5], [2, 4, 8]):
        held = 16 if itemsize == 8 else 32
        for back in (False, True):
            find = geometry.layer_norm_backward_geometry if back else geometry.layer_norm_geometry
            (blocks, *_), (team, down, _), partials, tickets = find(rows_, columns, itemsize)
            assert team & (team - 1) == 0 and team * down % 32 == 0 and team * down <= 256
            assert (team <= 32 and columns <= team * held) or (down == 1 and team > 32)
            assert blocks <= -(-rows_ // down) and (back or blocks * down >= rows_)
            assert (partials, tickets) == ((2 * columns * blocks, 1 + -(-blocks // 16)) if back else (0, 0))
        (tiles, *_), (across, down, _), *_ = geometry.batch_norm_geometry(rows_, columns, itemsize)
        assert across * down == 256 and 32 % across == 0 and tiles == -(-columns // (across * 16 // itemsize))
