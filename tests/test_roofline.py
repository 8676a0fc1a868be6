"""Floors of launches, counted by hand, and the roofline model."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.backends.base import Launch
from gpubackprop.formulas import RULES
from gpubackprop.precision import PRECISIONS
from gpubackprop.roofline import FLOORS, GPUS, Traffic, floor, launches, roofline, traffic

BATCH = 128


def plan(sizes=(784, 512, 512, 10), device="cuda:plan", loss="cross_entropy", optimizer="adam", mlp=None, **how):
    return gb.Trainer(gb.mlp(list(sizes), **(mlp or {})), loss, optimizer, device=device, seed=0, **how).plan(BATCH)


def launch(name, reads, writes):
    reads, writes = (tuple(np.empty(*b) if isinstance(b, tuple) else np.empty(b) for b in bs) for bs in (reads, writes))
    return Launch(name, "", reads, writes, 0, lambda: None)


F, H = np.float32, np.float16
MATRIX, ROW, VECTOR = ((4, 8), F), (8, F), (64, F)


@pytest.mark.parametrize("name, reads, writes, expected", [
    ("feed", [((4, 8), np.uint8), (4, np.int64)], [MATRIX, (4, np.int64)], 32 + 128),
    ("bias activation", [MATRIX, ROW], [MATRIX], 256),
    ("bias activation", [MATRIX, ROW], [MATRIX, MATRIX], 256),  # the pre-activation is kept: more than need be
    ("bias activation", [((4, 8), H), (8, H)], [((4, 8), H)], 128),
    ("activation backward", [MATRIX, MATRIX], [MATRIX, ROW], 384),
    ("activation backward", [MATRIX], [ROW], 128),  # of the identity: sums alone
    ("softmax_cross_entropy", [MATRIX, (4, np.int64)], [MATRIX, ((), F)], 256),
    ("mse", [MATRIX, MATRIX], [((), F), MATRIX], 384),
    ("dropout", [MATRIX], [MATRIX], 256),
    ("noise", [MATRIX], [MATRIX], 256),
    ("normalize", [MATRIX, ROW, ROW], [MATRIX, ROW, ROW, ROW], 256),
    ("normalize_backward", [MATRIX, MATRIX, ROW, ROW, ROW], [MATRIX, ROW, ROW], 384),
    ("gradient norm", [VECTOR], [(4, F)], 256),
    ("sgd", [VECTOR] * 2, [VECTOR], 12 * 64),
    ("momentum", [VECTOR] * 3, [VECTOR] * 2, 20 * 64),
    ("adam", [VECTOR] * 4, [VECTOR] * 3, 28 * 64),
    ("adam", [VECTOR] * 4, [(64, H), *[VECTOR] * 3], 30 * 64),  # with the copy in half
    ("something else", [MATRIX], [MATRIX, ROW], 256 + 32),
])  # fmt: skip
def test_floors(name, reads, writes, expected):
    assert floor(launch(name, reads, writes)) == expected


def test_every_rule_has_its_floor():
    """p and g read and p written, and each moment read and written."""
    known = {"sgd": 12, "momentum": 20, "nesterov": 20, "adam": 28, "adamw": 28, "lion": 20, "adadelta": 28}
    assert {k: 4 * FLOORS[k] for k in known} == known and set(RULES) <= set(FLOORS)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", gb.SGD(momentum=0.9)])
@pytest.mark.parametrize("precision", ["float32", "float64", "tf32", "float16", "bfloat16"])
def test_a_step_on_cuda_moves_little_more_than_it_must(precision, optimizer):
    made = plan(optimizer=optimizer, precision=precision)
    assert launches(made) <= 17 + (precision == "float16")  # whose loss scale follows the gradient's norm
    for part, moved in traffic(made).items():
        assert 1 <= moved.ratio <= 1.1, (part, moved)


def test_clipping_adds_one_launch():
    assert launches(plan(clip_norm=1.0)) == launches(plan()) + 1


def test_a_launch_in_two_passes_counts_twice():
    run = SimpleNamespace(calls=(1, 2))
    made = SimpleNamespace(launches=[Launch("sum", "", (), (), 0, run), Launch("copy", "", (), (), 0, lambda: None)])
    assert launches(made) == 3


def test_traffic_of_nothing():
    assert str(Traffic(0, 0)) == "0 bytes, 1.00 of the least"


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_model_says_that_it_is_one(gpu, precision):
    made = plan(sizes=(64, 32, 10), precision=precision)
    title, _, *rows, total = roofline(made, gpu, precision).splitlines()
    assert (
        title.startswith(f"roofline MODEL of one {gpu.name}, not a measurement: ") and "launching is left out" in title
    )
    assert ("for want of" in title) == (gpu is GPUS["t4"] and precision in ("tf32", "bfloat16"))
    times = [float(re.search(r"([\d.]+)  (?:memory|arithmetic)$", row)[1]) for row in rows]
    assert len(times) == len(made.launches) and float(total.split()[-1]) == pytest.approx(
        sum(times), abs=1e-3 * len(rows)
    )


def test_the_model_by_hand():
    made = plan(sizes=(4096, 4096))
    product = next(n for n in made.launches if n.name == "gemm")
    [row] = [line for line in roofline(made, GPUS["t4"], "float32").splitlines() if " gemm " in line][:1]
    arithmetic, memory = 2 * BATCH * 4096**2 / 8.1e12, product.bytes / 320e9
    assert arithmetic > memory and row.split()[-2:] == [f"{1e6 * arithmetic:.3f}", "arithmetic"]
    [row] = [line for line in roofline(made, GPUS["t4"], "float32").splitlines() if " adam " in line]
    assert row.split()[-2:] == [f"{1e6 * 28 * made.launches[-1].writes[0].size / 320e9:.3f}", "memory"]
