"""From which network and batch a GPU pays: this machine's CPU measured, the GPU measured or modelled."""

from collections.abc import Iterator
from dataclasses import dataclass

import gpubackprop as gb
from gpubackprop.roofline import GPUS, launches, modelled

from .cases import Train
from .measure import interleaved, median_and_spread
from .peers import prepare

__all__ = ["BATCHES", "LAUNCH", "WIDTHS", "Cell", "cells"]

WIDTHS = (32, 128, 512, 2048)
BATCHES = (32, 256, 2048)
LAUNCH = 4e-6  # seconds that a launch of its own costs the host and the device at least: an assumption
GRAPH_LAUNCH = 1e-6  # of one inside a CUDA graph


@dataclass(frozen=True)
class Cell:
    """Seconds of a training step of width-width-width-10 at a batch size."""

    width: int
    batch: int
    cpu: float
    gpu: float

    @property
    def gain(self) -> float:
        """How many times as fast the GPU is."""
        return self.cpu / self.gpu


def model(case: Train, gpu: str, precision: str, launch: float) -> float:
    """A GPU's seconds for a step, by its published peaks and a cost for each launch."""
    trainer = gb.Trainer(gb.mlp(list(case.sizes)), case.loss, device="cuda:plan", precision=precision, seed=0)
    plan = trainer.plan(case.batch)
    return sum(seconds for _, seconds, _ in modelled(plan, GPUS[gpu], precision)) + launch * launches(plan)


def cells(
    gpu: str | None, precision: str, repeats: int, graph: bool, widths: tuple[int, ...] = WIDTHS,
    batches: tuple[int, ...] = BATCHES,
) -> Iterator[Cell]:  # fmt: skip
    """Every width with every batch. The CPU is measured; so is the GPU, unless one is named: then it is modelled."""
    for width in widths:
        for batch in batches:
            steps = max(2, 2**23 // (width * batch))
            case = Train((width, width, width, 10), batch, min(steps, 256), epochs=1)
            devices = ["cpu"] if gpu else ["cpu", "cuda"]
            prepared = {d: p for d in devices if (p := prepare("gpubackprop", d, case)) is not None}
            taken = interleaved({d: p.run for d, p in prepared.items()}, repeats)
            seconds = {d: median_and_spread(taken[d])[0] / p.units for d, p in prepared.items()}
            if gpu:
                seconds["cuda"] = model(case, gpu, precision, GRAPH_LAUNCH if graph else LAUNCH)
            yield Cell(width, batch, seconds["cpu"], seconds["cuda"])
