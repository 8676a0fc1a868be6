"""What the compiled formulas must not cost, as a ratio of medians taken in turn: machines and minutes differ."""

import statistics

import numpy as np

from benchmarks.measure import interleaved
from gpubackprop.arena import Arena, Parameter
from gpubackprop.backends import get_backend
from gpubackprop.moments import Moments
from gpubackprop.optimizers import Adam
from gpubackprop.plan import Plan

PARAMETERS, CHUNK = 670_000, 65_536


def compiled():
    """The Adam launch of an arena."""
    state = Moments(Adam(), Arena({"w": Parameter((PARAMETERS,))}, backend := get_backend("cpu"), "float32"))
    table = backend.step_table(list(state.scalars), "float32", 1)
    table.load(np.stack(list(state.table_rows(0, 1).values()), axis=1), np.zeros(1, np.int64), 1)
    fill(state.arena.weights, state.arena.gradients, *state.moments.values())
    plan = Plan(backend)
    with plan.record("update"):
        state.record(table)
    return plan.sequence()


def by_hand():
    """The same arithmetic as anyone would write it: chunks, two scratch arrays, out= everywhere."""
    p, g, m, v = arrays = [np.empty(PARAMETERS, np.float32) for _ in range(4)]
    fill(*arrays)
    s, t = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    a, b, lr, eps = (np.float32(x) for x in (0.1, 0.001, 1e-3, 1e-8))

    def update():
        for i in range(0, PARAMETERS, CHUNK):
            P, G, M, V = (x[i : i + CHUNK] for x in (p, g, m, v))
            S, T = s[: len(P)], t[: len(P)]
            np.subtract(G, M, out=S), np.multiply(S, a, out=S), np.add(M, S, out=M)
            np.multiply(G, G, out=S), np.subtract(S, V, out=S), np.multiply(S, b, out=S), np.add(V, S, out=V)
            np.sqrt(V, out=S), np.add(S, eps, out=S), np.multiply(M, lr, out=T), np.divide(T, S, out=T)
            np.subtract(P, T, out=P)

    return update


def fill(*arrays):
    for array in arrays:
        array[...] = 0.01 * np.random.default_rng(0).random(array.shape, np.float32)


def test_a_compiled_formula_costs_what_its_calls_cost():
    seconds = interleaved({"compiled": compiled(), "by hand": by_hand()}, 40)
    ratio = statistics.median(seconds["compiled"]) / statistics.median(seconds["by hand"])
    assert ratio <= 1.15
