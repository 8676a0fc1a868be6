"""The step's own numbers: the counters of the step table, and the tally of losses."""

from functools import cache

import numpy as np
import pytest
from emulator import build
from reference import DTYPES, arithmetic

from gpubackprop.backends import codegen
from gpubackprop.backends.geometry import one_thread

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@cache
def library(dtype):
    return build(codegen.file_unit("scalars.cu", dtype.name))


def launch(name, dtype, **arguments):
    place = one_thread()
    library(dtype).run(name, place.grid, place.block, **arguments)


@every_dtype
def test_the_applied_row_stands_still_on_a_skipped_step(dtype):
    state = np.array([0, 0, 5, 77])
    for ok in (1, 0, 1, 1, 0):
        launch("advance", dtype, state=state, control=np.array([4, 0.5, ok, 9], arithmetic(dtype)), applies=1)
    assert state.tolist() == [5, 3, 5, 77]
    launch("advance", dtype, state=state, control=None, applies=1)
    assert state.tolist() == [6, 4, 5, 77]
    launch("advance", dtype, state=state, control=np.array([1, 1, 1, 0], arithmetic(dtype)), applies=0)
    assert state.tolist() == [7, 4, 5, 77]


@every_dtype
def test_past_the_last_row_the_row_in_force_stays(dtype):
    """Nothing reads outside of the step table, whatever runs after its last step."""
    state, rows = np.array([0, 0, 5, 2]), []
    for ok in (1, 0, 1, 1, 1):
        launch("advance", dtype, state=state, control=np.array([1, 1, ok, 0], arithmetic(dtype)), applies=1)
        rows.append(state[:2].tolist())
    assert rows == [[1, 1], [2, 1], [2, 2], [2, 2], [2, 2]] and state[2:].tolist() == [5, 2]


@every_dtype
def test_losses_add_up_as_exactly_as_in_twice_the_bits(dtype):
    wide = arithmetic(dtype)
    losses = np.random.default_rng(2).random(300).astype(wide)
    loss, events, state = np.array([2.0**20, 0], wide), np.array([0, 3]), np.array([0, 0, 1, 0])
    for total in losses:
        launch("accumulate_loss", dtype, loss=loss, events=events, total=total.reshape(1), state=state)
    exact = 2**20 + losses.astype(np.longdouble).sum()
    assert abs(loss.astype(np.longdouble).sum() - exact) <= 2e-12 * exact
    assert events.tolist() == [0, 3]


@every_dtype
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_the_first_bad_step_is_kept(bad, dtype):
    wide, state = arithmetic(dtype), np.array([4, 2, 100, 0])
    loss, events = np.zeros(2, wide), np.array([0, 3])
    for total, expected in ((1, 0), (bad, 105), (bad, 105), (1, 105)):
        launch("accumulate_loss", dtype, loss=loss, events=events, total=np.array([total], wide), state=state)
        state[0] += 1
        assert events.tolist() == [expected, 3]
