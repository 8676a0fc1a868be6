"""What is timed: training steps, inference, optimizer updates, single kernels, import, from the shell to a model.

A case says what to compute, from which numbers, and how much work that is; `peers/` has who computes it.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "CASES",
    "GROUPS",
    "KERNELS",
    "Busy",
    "Case",
    "Import",
    "Kernel",
    "Predict",
    "Shell",
    "Train",
    "Update",
    "chosen",
]

Array = npt.NDArray[Any]
ROWS = 1024  # that a forward pass takes at once


def _calls(work: int, each: int) -> int:
    """How many calls do so much work, if each does that; 1 to 1000."""
    return min(1000, max(1, work // each))


@dataclass(frozen=True)
class Case:
    """One line of the suite. Figures are per `unit`, of which a call takes as many as a peer's Prepared says."""

    group: ClassVar[str]
    unit: ClassVar[str]
    rtol: ClassVar[float] = 1e-3  # within which peers must agree, relative to the largest figure
    # without annotations: cases of some groups make them fields
    beside = 0  # processes that do nothing but run, while it is timed
    at_once = 1  # processes that do it side by side

    @property
    def name(self) -> str:
        """What the case is called on the command line."""
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Operations of the matrix products of one unit; 0 where there are none."""
        return 0

    @property
    def bytes(self) -> int:
        """Bytes that one unit must move at least, where that is what bounds it; else 0."""
        return 0

    def smoke(self) -> "Case":
        """The same at a tiny size."""
        return self


@dataclass(frozen=True)
class Network(Case):
    """Dense layers of these sizes: weights (in, out) and zero biases, in float32."""

    sizes: tuple[int, ...]

    @property
    def shape(self) -> str:
        """The sizes, as 784-128-10."""
        return "-".join(map(str, self.sizes))

    def weights(self) -> list[tuple[Array, Array]]:
        """Every layer's weight and bias."""
        rng = np.random.default_rng(1)
        scaled = (rng.standard_normal((a, b), np.float32) * np.float32((2 / a) ** 0.5) for a, b in pairwise(self.sizes))
        return [(w, np.zeros(w.shape[1], np.float32)) for w in scaled]


@dataclass(frozen=True)
class Train(Network):
    """Adam steps: whole epochs over data on the host, shuffle and gather included, in one call."""

    batch: int
    steps: int = 50  # of an epoch
    epochs: int = 4
    activation: str = "relu"
    group: ClassVar[str] = "train"
    unit: ClassVar[str] = "step"

    @property
    def name(self) -> str:
        activation = "" if self.activation == "relu" else f"{self.activation} "
        return f"{self.group} {activation}{self.shape} ({self.batch})"

    @property
    def flops(self) -> int:  # forward, and backward's two a layer, but for the first layer's dx
        pairs = list(pairwise(self.sizes))
        return sum((4 if i == 0 else 6) * self.batch * a * b for i, (a, b) in enumerate(pairs))

    @property
    def classifies(self) -> bool:
        """Whether the loss is cross entropy of labels; else the mean squared error of all outputs."""
        return self.sizes[-1] <= 10

    @property
    def loss(self) -> str:
        """That loss, as this library calls it."""
        return "cross_entropy" if self.classifies else "mse"

    def data(self, steps: int | None = None) -> tuple[Array, Array]:
        """Inputs and labels or targets for that many steps (None: an epoch)."""
        rng, rows = np.random.default_rng(0), self.batch * (steps or self.steps)
        x, outputs = rng.standard_normal((rows, self.sizes[0]), np.float32), self.sizes[-1]
        return x, (rng.integers(0, outputs, rows) if self.classifies
                   else rng.standard_normal((rows, outputs), np.float32))  # fmt: skip

    def smoke(self) -> Case:
        return replace(self, sizes=(5, 7, self.sizes[-1] if self.classifies else 11), batch=4, steps=2, epochs=1)


@dataclass(frozen=True)
class Scaling(Train):
    """A training step on the way along one axis: batch, width, depth or samples."""

    axis: str = "batch"
    value: int = 0
    group: ClassVar[str] = "scaling"

    @property
    def name(self) -> str:
        return f"{self.group} {self.axis} {self.value}"


@dataclass(frozen=True)
class Busy(Train):
    """A training step on a machine that is not idle: beside busy processes, or in fits at once, the slowest of them."""

    beside: int = 0
    at_once: int = 1
    group: ClassVar[str] = "busy"

    @property
    def alone(self) -> str:
        """The name of the same step with the machine to itself."""
        return f"{self.group} {self.shape} ({self.batch})"

    @property
    def name(self) -> str:
        more = f" beside {self.beside}" if self.beside else f", {self.at_once} at once" if self.at_once > 1 else ""
        return self.alone + more


@dataclass(frozen=True)
class Predict(Network):
    """The outputs of many rows, as a NumPy array."""

    rows: int
    group: ClassVar[str] = "predict"
    unit: ClassVar[str] = "call"
    rtol: ClassVar[float] = 1e-4

    @property
    def name(self) -> str:
        return f"{self.group} {self.shape} ({self.rows:,} rows)"

    @property
    def flops(self) -> int:
        return sum(2 * self.rows * a * b for a, b in pairwise(self.sizes))

    @property
    def calls(self) -> int:
        """How many calls one measurement takes."""
        return _calls(10**10, self.flops)

    def x(self) -> Array:
        """The rows."""
        return np.random.default_rng(0).standard_normal((self.rows, self.sizes[0]), np.float32)

    def smoke(self) -> Case:
        return replace(self, sizes=(5, 7, 3), rows=ROWS + 9)


@dataclass(frozen=True)
class Update(Case):
    """One step of an optimizer over one float32 vector of parameters, with a gradient that is there."""

    rule: str  # sgd, momentum or adam
    parameters: int
    group: ClassVar[str] = "update"
    unit: ClassVar[str] = "update"
    rtol: ClassVar[float] = 1e-5
    MOMENTS: ClassVar[dict[str, int]] = {"sgd": 0, "momentum": 1, "adam": 2}

    @property
    def name(self) -> str:
        return f"{self.group} {self.rule} ({self.parameters:,})"

    @property
    def bytes(self) -> int:  # p, g and the moments read, p and the moments written
        return 4 * self.parameters * (3 + 2 * self.MOMENTS[self.rule])

    @property
    def calls(self) -> int:
        """How many updates one measurement takes."""
        return _calls(4_000_000, self.parameters)

    def arrays(self) -> tuple[Array, Array]:
        """Parameters and their gradient."""
        rng = np.random.default_rng(0)
        p, g = (rng.standard_normal(self.parameters, np.float32) for _ in range(2))
        return p, g

    def smoke(self) -> Case:
        return replace(self, parameters=100)


# Kernels: what they compute, and how many arrays of (rows, columns) they must read and write at least.
KERNELS = {
    "relu": ("y = relu(x + bias)", 2),
    "gelu": ("y = gelu(x + bias)", 2),
    "tanh": ("y = tanh(x + bias)", 2),
    "relu_backward": ("da = dy where x > 0, else 0; db = Σ_rows da", 3),
    "layer_norm": ("y = gain · (x − mean) / √(var + 1e-5) + bias, row by row", 2),
    "cross_entropy": ("Σ_rows −log softmax(x)[label], and its gradient", 2),
}


@dataclass(frozen=True)
class Kernel(Case):
    """One of KERNELS over float32 rows."""

    kernel: str
    rows: int
    columns: int
    group: ClassVar[str] = "kernel"
    unit: ClassVar[str] = "launch"
    rtol: ClassVar[float] = 1e-5

    @property
    def name(self) -> str:
        return f"{self.group} {self.kernel} ({self.rows}×{self.columns})"

    @property
    def bytes(self) -> int:
        return 4 * self.rows * self.columns * KERNELS[self.kernel][1]

    @property
    def calls(self) -> int:
        """How many launches one measurement takes."""
        return _calls(8_000_000, self.rows * self.columns)

    def arrays(self) -> dict[str, Array]:
        """x and dy (rows, columns), gain and bias (columns), labels (rows)."""
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal((self.rows, self.columns), np.float32) for _ in range(2))
        gain, bias = (rng.standard_normal(self.columns, np.float32) for _ in range(2))
        return {"x": x, "dy": dy, "gain": gain, "bias": bias, "labels": rng.integers(0, self.columns, self.rows)}

    def smoke(self) -> Case:
        return replace(self, rows=3, columns=5)


@dataclass(frozen=True)
class Import(Case):
    """A new process that imports the library, and ends."""

    group: ClassVar[str] = "import"
    unit: ClassVar[str] = "process"

    @property
    def name(self) -> str:
        return self.group


@dataclass(frozen=True)
class Shell(Network):
    """A new process that reads the digits, trains on all of them with Adam, and must know 98 % of them."""

    batch: int
    epochs: int
    beside: int = 0
    group: ClassVar[str] = "shell"
    unit: ClassVar[str] = "process"

    @property
    def name(self) -> str:
        more = f" beside {self.beside}" if self.beside else ""
        return f"{self.group} digits {self.shape} ({self.epochs} epochs){more}"


def _scaling() -> Iterable[Scaling]:
    for n in (16, 32, 64, 128, 256, 512, 1024):
        yield Scaling((256, 256, 256, 10), n, axis="batch", value=n, steps=max(4, 4096 // n), epochs=2)
    for n in (32, 64, 128, 256, 512, 1024):
        yield Scaling((n, n, n, 10), 128, axis="width", value=n, steps=max(8, 8192 // n), epochs=2)
    for n in (1, 2, 4, 8, 16):
        yield Scaling((128, *[128] * n, 10), 128, axis="depth", value=n, steps=64, epochs=2)
    for n in (1024, 4096, 16384, 65536):
        yield Scaling((128, 128, 10), 64, axis="samples", value=n, steps=n // 64, epochs=2)


def _busy() -> Iterable[Busy]:
    for sizes in ((784, 256, 10), (64, 256, 10)):
        case = Busy(sizes, 64, steps=60_000 // sizes[0], epochs=4)
        yield from (replace(case, beside=n) for n in (0, 1, 2, 4))
        yield replace(case, at_once=2)


_LARGE = (Train((784, 512, 512, 10), 128), Train((256, 1024, 1024, 1024, 256), 1024, steps=8, epochs=2))
CASES: dict[str, Case] = {case.name: case for case in (
    Train((64, 64, 64, 10), 32, steps=500), Train((784, 128, 10), 64, steps=100), *_LARGE,
    *(replace(case, activation=name) for case in _LARGE for name in ("gelu", "tanh")),
    Predict((784, 512, 512, 10), 100_000), Predict((64, 128, 10), 1_797), Predict((64, 128, 10), 1),
    *(Update(rule, n) for rule in Update.MOMENTS for n in (10_000, 1_000_000)),
    *(Kernel(name, rows, columns) for name in KERNELS for rows, columns in ((128, 512), (4096, 1024))),
    Import(), Shell((64, 128, 10), 64, 30), *_busy(), Shell((64, 128, 10), 64, 30, beside=2), *_scaling(),
)}  # fmt: skip
GROUPS = tuple(dict.fromkeys(case.group for case in CASES.values()))


def chosen(patterns: Iterable[str]) -> list[Case]:
    """Cases by name, group, or a pattern with * of names; all but scaling and busy ones where nothing is asked for.

    ValueError for what no case is called.
    """
    if not (patterns := list(patterns)):
        return [case for case in CASES.values() if case.group not in ("scaling", "busy") and not case.beside]
    found: dict[str, Case] = {}
    for pattern in patterns:
        names = [n for n, c in CASES.items() if pattern in (n, c.group) or fnmatch.fnmatchcase(n, pattern)]
        if not names:
            raise ValueError(f"no case {pattern!r}; choose from {', '.join(GROUPS)}, or {', '.join(CASES)}")
        found |= {n: CASES[n] for n in names}
    return list(found.values())
