"""What a training step takes on a device: the message when it does not fit."""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Buffer, is_on_device, too_large
from gpubackprop.backends.driver import DeviceMemoryError
from gpubackprop.step import Keeper

if TYPE_CHECKING:
    from gpubackprop.trainer import Trainer

__all__ = ["explained"]

USABLE = 0.9  # of the free memory: the rest is for what the allocator rounds up and for libraries


def explained(
    error: DeviceMemoryError, trainer: "Trainer", x: Buffer, y: npt.NDArray[Any], w: npt.NDArray[Any] | None,
    batch_size: int,
) -> DeviceMemoryError:  # fmt: skip
    """The error with what training in such steps needs, what is free, and the largest batch size that would fit."""
    free, total = trainer.backend.memory() or (error.free, error.total)
    once, each, per_row = _needs(trainer, x, y, w, batch_size)
    data, staged = y.nbytes + (0 if w is None else w.nbytes) + 8 * len(x), 0.0  # the order too
    if not is_on_device(x):
        data += x.nbytes
        if too_large(x.nbytes + y.nbytes, free):
            data, staged = 0, 2 * data / len(x)  # two batches

    def needs(rows: int) -> float:
        """Bytes of the step and, where the rows do not divide the data, of that of the last batch."""
        return once + data + staged * rows + sum(each + per_row * n for n in (rows, len(x) % rows) if n)

    usable = USABLE * free
    most = batch_size - 1 if needs(batch_size) > usable else batch_size // 2  # where more was taken than is known here
    rows = next((n for n in range(most, 0, -1) if needs(n) <= usable), 0)
    remedy = f"batch_size={rows} would fit" if rows else "use a smaller model, or a smaller batch_size"
    have = f"{free:,} of {total:,} are free on {trainer.backend.device}"
    text = f"fit: steps of {batch_size:,} rows need {int(needs(batch_size)):,} bytes beside the weights, but {have}"
    text += f"; {remedy}; the model is as after epoch {trainer.epoch}"
    return DeviceMemoryError(error.nbytes, free, total, text)


def _needs(
    trainer: "Trainer", x: Buffer, y: npt.NDArray[Any], w: npt.NDArray[Any] | None, batch_size: int
) -> tuple[float, float, float]:
    """Bytes of what the trainer has yet to make once, of a step of any size, of each of its rows; by plans alone."""
    twin = type(trainer).__new__(type(trainer))
    twin.__setstate__(copy.deepcopy(trainer.__getstate__()) | {"device": "cuda:plan"})
    resident = []
    for rows in (batch_size, half := batch_size // 2 or 1):
        like = np.zeros((rows, *y.shape[1:]), y.dtype)
        plan = twin._plan(x.shape[1], like, None if w is None else np.ones(rows, w.dtype))
        plan.discard("feed")  # which reads the data
        resident.append(plan.bytes_resident - _lasting(twin))
    per_row = (resident[0] - resident[1]) / max(1, batch_size - half)
    keeper = 0 if trainer._keeper else Keeper(twin.model, twin.state).nbytes
    return _lasting(twin) - _lasting(trainer) + keeper, resident[0] - per_row * batch_size, per_row


def _lasting(trainer: "Trainer") -> int:
    """Bytes of what steps of any size share, as far as it is made: weights, gradients, copies, moments, scratch."""
    arenas, dtype = (trainer.model.arena, trainer.model.statistics), trainer.precision.dtype
    buffers = (*trainer.state.moments.values(), *trainer._space.scratch.values())
    return sum(a.nbytes(dtype) for a in arenas) + sum(int(b.nbytes) for b in buffers)
