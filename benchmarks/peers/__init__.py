"""Who computes the cases. One module a library, with a function for each group of cases it can do.

A function takes the case and the variant of the peer, and returns what is timed and what is checked.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from ..cases import Case, Train, Update

__all__ = ["PEERS", "Peer", "Prepared", "ends", "epochs", "flat", "prepare", "repeated", "updates"]

Epoch = Callable[[Any, Any, bool], float]
Step = Callable[[], object]

FEW = 64  # numbers of an array that are compared


@dataclass(frozen=True)
class Prepared:
    """`run` is timed, and takes `units` units of the case; `check` gives numbers that every peer must give."""

    run: Callable[[], object]
    check: Callable[[], Any]
    units: int = 1


@dataclass(frozen=True)
class Peer:
    """A library: the modules it takes, the groups of cases it can do, its variants, and those that do only some."""

    name: str
    modules: tuple[str, ...]
    groups: tuple[str, ...]
    variants: tuple[str, ...] = ("",)
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def does(self, variant: str, case: Case) -> bool:
        """Whether the variant is for cases of that group; of those it may still have no way to do one."""
        return case.group in self.only.get(variant, self.groups)

    @property
    def missing(self) -> str:
        """The command that installs what is not there; empty if all is."""
        lacks = [PACKAGES.get(m, m) for m in self.modules if importlib.util.find_spec(m) is None]
        return f"pip install {' '.join(lacks)}" if lacks else ""

    @property
    def versions(self) -> str:
        """The modules with their versions."""
        return ", ".join(f"{m} {import_module(m).__version__}" for m in self.modules)


PACKAGES = {"sklearn": "scikit-learn"}  # modules whose package has another name
_EVERYTHING = ("train", "scaling", "busy", "predict", "update", "kernel", "import", "shell")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("gpubackprop", ("gpubackprop",), _EVERYTHING, ("cpu",)),
        Peer("products", ("numpy",), ("train", "scaling", "predict"), ("cpu",)),
        Peer("numpy", ("numpy",), ("update", "kernel", "import")),
        Peer("torch", ("torch",), _EVERYTHING, ("eager", "compile"),
             {"compile": ("train", "scaling", "predict", "kernel")}),
        Peer("jax", ("jax",), ("train", "scaling", "predict", "update", "kernel", "import"), ("step", "scan"),
             {"scan": ("train", "scaling")}),
        Peer("sklearn", ("sklearn",), ("train", "busy", "predict", "import", "shell")),
        Peer("onnxruntime", ("onnxruntime", "onnx"), ("predict", "import")),
    )
}  # fmt: skip


def repeated(
    call: Callable[[], object], times: int, check: Callable[[], Any], end: Callable[[], object] = lambda: None
) -> Prepared:
    """So many calls at a time; `end` waits for what the last one began."""

    def run() -> None:
        for _ in range(times):
            call()
        end()

    return Prepared(run, check, times)


def epochs(case: Train, new: Callable[[], Epoch], array: Callable[[Any], Any]) -> Prepared:
    """Training by what `new` starts: epoch(x, y, shuffle) goes on for one, and returns its mean loss."""
    epoch, (x, y) = new(), map(array, case.data())

    def run() -> None:
        for _ in range(case.epochs):
            epoch(x, y, True)

    def check() -> list[float]:
        (few_x, few_y), once = map(array, case.data(4)), new()
        return [once(few_x, few_y, False) for _ in range(2)]

    return Prepared(run, check, case.steps * case.epochs)


def updates(
    case: Update, new: Callable[[], tuple[Step, Callable[[], Any]]], end: Callable[[], object] = lambda: None
) -> Prepared:
    """Steps of the optimizer that `new` starts, which comes with what reads its parameters."""

    def check() -> list[float]:
        step, read = new()
        for _ in range(3):
            step()
        return flat([read()])

    step, _ = new()
    return repeated(step, case.calls, check, end)


def ends(output: Any) -> list[float]:
    """The first and the last rows of an output."""
    return flat([output[:8], output[-8:]])


def flat(arrays: Iterable[Any]) -> list[float]:
    """The first numbers of each array, and its mean."""
    found = [np.asarray(a, np.float64).ravel() for a in arrays]
    return [float(v) for a in found for v in (*a[:FEW], a.mean())]


def prepare(peer: str, variant: str, case: Case) -> Prepared | None:
    """What the peer does for the case; None if it cannot."""
    group = {"scaling": "train", "busy": "train", "import": "start"}.get(case.group, case.group)
    function = getattr(import_module(f"{__name__}.{peer}"), group, None)
    prepared: Prepared | None = function(case, variant) if function else None
    return prepared
