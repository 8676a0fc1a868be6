"""Which launch first made a NaN: a fit repeated on a copy, launch by launch, with a look at every result."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Buffer, Launch, is_on_device
from gpubackprop.columns import Shown
from gpubackprop.diagnostics import copied
from gpubackprop.plan import running
from gpubackprop.trainer import Trainer, TrainingDiverged

__all__ = ["BadLaunch", "find_nan"]


@dataclass(eq=False, repr=False)
class BadLaunch(Shown):
    """The first launch that wrote a NaN or an infinity."""

    epoch: int
    step: int  # of the epoch, from 1: the batch, as in TrainingDiverged
    layer: str
    name: str
    what: str  # the equation it computes
    nans: int
    infinities: int
    inputs_finite: bool  # whether all that it read was finite
    weights: tuple[str, ...]  # the parameters that were not finite before it ran

    def parts(self) -> list[str]:
        of = f" of layer {self.layer!r}" if self.layer else ""
        made = f"{self.nans} NaN and {self.infinities} infinite values"
        read = "what it read was finite" if self.inputs_finite else "not all that it read was finite"
        held = f", such as {', '.join(self.weights)}" if self.weights else ""
        what = f" ({self.what.splitlines()[0]})" if self.what else ""
        return [f"epoch {self.epoch}, step {self.step}: {self.name}{of}{what} wrote {made}; {read}{held}"]


class _Found(Exception):
    """Ends the fit."""


class _Search:
    """Runs each launch of a trainer's fit, and keeps those that write what is not finite: the first of every step.

    It ends the fit at the first; not with a dynamic scale of the loss, where gradients overflow now and again: those
    steps are skipped, and only if the fit diverges is one at fault.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.found: dict[tuple[int, int], BadLaunch] = {}  # by epoch and step
        self._epoch, self._begun = trainer.epoch, trainer._batches

    def __call__(self, launch: Launch) -> None:
        trainer = self.trainer
        if trainer.epoch != self._epoch:
            self._epoch, self._begun = trainer.epoch, trainer._batches
        finite = not self._bad(launch.reads).any()
        named = {} if finite else trainer.model.named_parameters()
        weights = tuple(k for k, p in named.items() if self._bad([p.master]).any())  # the launch may write over them
        launch.run()
        nans, infinities = self._bad(launch.writes).tolist()
        if nans or infinities:
            at = self._epoch + 1, trainer._batches - self._begun + 1
            bad = BadLaunch(*at, launch.layer, launch.name, launch.what, nans, infinities, finite, weights)
            self.found.setdefault(at, bad)
            if not trainer.precision.dynamic:
                raise _Found

    def _bad(self, buffers: Sequence[Buffer]) -> npt.NDArray[np.int64]:
        """How many NaN and how many infinite values the buffers hold."""
        counts = np.zeros(2, np.int64)
        for buffer in buffers:
            if isinstance(buffer, np.ndarray) or is_on_device(buffer):  # not what stands for a part of the data
                values = self.trainer.backend.to_numpy(buffer)
                if values.dtype.itemsize == 2:  # bfloat16 is no type of NumPy's own
                    values = values.astype(np.float32)
                if not np.isfinite(values).all():
                    counts += np.isnan(values).sum(), np.isinf(values).sum()
        return counts


def find_nan(trainer: Trainer, x: Any, y: Any, *, epochs: int = 1, **how: Any) -> BadLaunch | None:
    """The first launch that writes a NaN or an infinity if `fit` trains on from here, or None if none does.

    Give it what was given to the `fit` that raised TrainingDiverged, which left the model as after the last good epoch:
    a copy of the trainer repeats the steps that followed, launch by launch, and every result is looked at. In float16
    steps whose gradient overflows are skipped, and only a fit that diverges has a launch to name.
    """
    twin = copied(trainer, "find_nan")
    twin._graphs = None  # a captured step has no launches to look at
    search = _Search(twin)
    try:
        with running(search):
            twin.fit(x, y, epochs, **{"progress": False, **copy.deepcopy(how)})
    except _Found:
        return next(iter(search.found.values()))
    except TrainingDiverged as error:
        return next((b for b in search.found.values() if b.epoch == error.epoch and error.step in (None, b.step)), None)
    return None
