"""The networks that are timed, and a training step of each: ours, and its matrix products alone."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

import gpubackprop as gb

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A network of dense layers, a batch size, and the steps that one measurement takes."""

    sizes: tuple[int, ...]
    batch: int
    steps: int

    @property
    def name(self) -> str:
        """Sizes and batch, as 784-128-10 (64)."""
        return f"{'-'.join(map(str, self.sizes))} ({self.batch})"

    @property
    def gemm_flops(self) -> int:
        """Operations of one step's products: forward, and backward's two a layer, but for the first layer's dx."""
        pairs = list(pairwise(self.sizes))
        return sum((4 if i == 0 else 6) * self.batch * a * b for i, (a, b) in enumerate(pairs))

    def data(self) -> tuple[Any, Any]:
        """Random inputs and labels; targets where the outputs are many."""
        rng, rows = np.random.default_rng(0), self.batch * self.steps
        x = rng.standard_normal((rows, self.sizes[0]), np.float32)
        outputs = self.sizes[-1]
        return x, rng.integers(0, outputs, rows) if outputs <= 10 else rng.standard_normal((rows, outputs), np.float32)

    def fit(self, device: str = "cpu", activation: str = "relu") -> Callable[[], object]:
        """One epoch of `steps` Adam steps through Trainer.fit, shuffle and gather included."""
        x, y = self.data()
        loss = "cross_entropy" if y.ndim == 1 else "mse"
        trainer = gb.Trainer(gb.mlp(list(self.sizes), activation), loss, gb.Adam(), device=device, seed=0)
        return lambda: trainer.fit(x, y, epochs=1, batch_size=self.batch, progress=False)

    def products(self) -> Callable[[], None]:
        """The same steps' matrix products alone, through np.matmul(out=): the floor."""
        rng, calls = np.random.default_rng(0), []
        for i, (a, b) in enumerate(pairwise(self.sizes)):
            x, w = rng.standard_normal((self.batch, a), np.float32), rng.standard_normal((a, b), np.float32)
            y, dw, dx = np.empty((self.batch, b), np.float32), np.empty_like(w), np.empty_like(x)
            calls += [(x, w, y), (x.T, y, dw)] + [(y, w.T, dx)] * (i > 0)

        def run() -> None:
            for _ in range(self.steps):
                for left, right, out in calls:
                    np.matmul(left, right, out=out)

        return run


CASES = {
    case.name: case
    for case in (
        Case((64, 64, 64, 10), 32, 400),
        Case((784, 128, 10), 64, 100),
        Case((784, 512, 512, 10), 128, 25),
        Case((256, 1024, 1024, 1024, 256), 1024, 2),
    )
}
