"""A recorded section beside the same one bound afresh: what Python code puts into its launches must not change."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Backend, Buffer, Launch
from gpubackprop.losses import Objective
from gpubackprop.model import Layer
from gpubackprop.plan import Plan, allocation
from gpubackprop.predictor import of_the_library, own_code

__all__ = ["calls_own_code", "replay_checked"]

CALLS = 3  # of the code: a layer that does something else at every third call is found out too
REMEDY = (
    "a recorded step replays its launches, so that what Python draws, counts or reads elsewhere stays as it was when "
    "the step was recorded; compute it with tensors (gb.Dropout and gb.InputNoise draw anew in every step), or change "
    "it between fits"
)

Record = Callable[[], object]
Place = tuple[Buffer, npt.NDArray[Any]]  # a buffer and what it held


def calls_own_code(model: Layer, objective: Objective) -> bool:
    """Whether a step of this model and loss calls Python code that is not the library's."""
    loss = objective.own and not of_the_library(objective.function)
    return loss or any(own_code(layer) for _, layer in model.named_layers())


def replay_checked(plan: Plan, section: str, record: Record, model: Layer) -> None:
    """Replay the section; a RuntimeError if `record`, called anew, binds other launches or leaves other bits.

    What lasts is as after one replay: gradients, statistics, sums; so are the attributes of the layers as before.
    """
    recorded = plan.sections[section]
    state: list[Place] = []
    after: list[bytes] = []
    with _attributes_kept(model):
        for call in range(CALLS):
            try:
                fresh = _bound(plan.backend, section, record)
            except MemoryError:  # a step that just fits is not to fail for want of a second one's room
                if call == 0:
                    plan.replay(section)
                return
            _compare_launches(recorded, fresh.sections[section])
            if call == 0:
                state = _shared(plan.backend, recorded, fresh.sections[section])
                plan.replay(section)
                after = _bits(plan.backend, state)
            _restore(plan.backend, state)
            fresh.replay(section)
            if _bits(plan.backend, state) != after:
                raise _differs(_first_difference(plan.backend, recorded, fresh.sections[section], state))


def _bound(backend: Backend, section: str, record: Record) -> Plan:
    """The section bound to buffers and scratch of its own, which go with it."""
    fresh = Plan(backend, dry=True)
    with fresh.record(section):
        record()
    return fresh


@contextmanager
def _attributes_kept(model: Layer) -> Iterator[None]:
    """Inside, layers may set attributes, and change their lists, dicts and sets; afterwards these are as before."""
    kept = []
    for _, layer in model.named_layers():
        held = [(value, value.copy()) for value in vars(layer).values() if isinstance(value, list | dict | set)]
        kept.append((vars(layer), dict(vars(layer)), held))
    try:
        yield
    finally:
        for attributes, before, held in kept:
            for new in attributes.keys() - before.keys():
                del attributes[new]
            attributes.update(before)
            for value, copy in held:
                value.clear()
                value.extend(copy) if isinstance(value, list) else value.update(copy)


# ---- launches ------------------------------------------------------------------------------------------------------


def _compare_launches(recorded: Sequence[Launch], fresh: Sequence[Launch]) -> None:
    for i in range(max(len(recorded), len(fresh))):
        then, now = (list(map(_outline, part[i : i + 1])) for part in (recorded, fresh))
        if then != now:
            said = [_named(part[i]) if i < len(part) else "no launch" for part in (recorded, fresh)]
            raise _differs(f"launch {i + 1} was {said[0]} when it was recorded, and is {said[1]} at a later call")


def _outline(launch: Launch) -> tuple[Any, ...]:
    operands = (*launch.reads, *launch.writes)
    return launch.name, launch.what, launch.layer, *((b.shape, b.dtype) for b in operands)


def _named(launch: Launch) -> str:
    what = f" ({launch.what.splitlines()[0]})" if launch.what else ""
    return f"{launch.name}{what} of " + (f"layer {launch.layer!r}" if launch.layer else "the loss")


def _differs(how: str) -> RuntimeError:
    return RuntimeError(f"fit: the step depends on Python values: {how}; {REMEDY}")


# ---- what they leave behind ----------------------------------------------------------------------------------------


def _shared(backend: Backend, recorded: Sequence[Launch], fresh: Sequence[Launch]) -> list[Place]:
    """What both write, and not each in a buffer of its own, as it is now."""
    pairs = ((a, b) for x, y in zip(recorded, fresh, strict=True) for a, b in zip(x.writes, y.writes, strict=True))
    return [(a, backend.to_numpy(a)) for a, b in pairs if allocation(a) is allocation(b)]


def _bits(backend: Backend, state: Sequence[Place]) -> list[bytes]:
    return [_digest(backend.to_numpy(buffer)) for buffer, _ in state]


def _digest(values: npt.NDArray[Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes()).digest()


def _restore(backend: Backend, state: Sequence[Place]) -> None:
    for buffer, value in state:
        backend.write(buffer, value)


def _first_difference(
    backend: Backend, recorded: Sequence[Launch], fresh: Sequence[Launch], state: Sequence[Place]
) -> str:
    """The first launch that writes other bits, found by running either list anew."""
    seen: list[list[list[bytes]]] = []
    for launches in (recorded, fresh):
        _restore(backend, state)
        seen.append([])
        for launch in launches:
            launch.run()
            seen[-1].append([_digest(backend.to_numpy(b)) for b in launch.writes])
    for launch, then, now in zip(recorded, *seen, strict=True):
        if then != now:
            return f"{_named(launch)} writes other values at a later call than when it was recorded"
    return "a later call leaves other values than the one that was recorded"
