"""What a training step takes on a device: the message when it does not fit."""

import copy
from typing import TYPE_CHECKING

from gpubackprop.backends.driver import DeviceMemoryError

if TYPE_CHECKING:
    from gpubackprop.trainer import Trainer

__all__ = ["explained"]


def explained(error: DeviceMemoryError, trainer: "Trainer", batch_size: int, ragged: bool) -> DeviceMemoryError:
    """The error with what the step needs, what is free, and the batch size that would fit.

    A ragged last batch has a step of its own, of fewer rows; it is counted as a whole one.
    """
    free, total = trainer.backend.memory() or (error.free, error.total)
    needs, per_row = (n * (1 + ragged) for n in _needs(trainer, batch_size))
    rows = int((free - (needs - per_row * batch_size)) / per_row)
    remedy = f"batch_size={rows} would fit" if 0 < rows < batch_size else "use a smaller model, or a smaller batch_size"
    have = f"{free:,} of {total:,} are free on {trainer.backend.device}"
    text = f"fit: steps of {batch_size:,} rows need {int(needs):,} bytes beside the weights, but {have}; {remedy}"
    text += f"; the model is as after epoch {trainer.epoch}"
    return DeviceMemoryError(error.nbytes, free, total, text)


def _needs(trainer: "Trainer", batch_size: int) -> tuple[int, float]:
    """Bytes of a step beside weights, gradients and moments, and of these the bytes for each row, by plans alone."""
    twin = type(trainer).__new__(type(trainer))
    twin.__setstate__(copy.deepcopy(trainer.__getstate__()) | {"device": "cuda:plan"})
    arena = twin.state.arena
    kept = arena.weights.nbytes * (2 + len(twin.state.moments))
    large, small = (twin.plan(n).bytes_resident - kept for n in (batch_size, max(1, batch_size // 2)))
    return large, (large - small) / max(1, batch_size - batch_size // 2)
