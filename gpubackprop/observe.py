"""Who watches a forward pass: calls of layers and activations go through this thread's observer, if there is one."""

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from gpubackprop.backends.base import setting

if TYPE_CHECKING:
    from gpubackprop.formulas import Activation
    from gpubackprop.model import Layer
    from gpubackprop.tensor import Tensor

__all__ = ["Observer", "observer", "observing"]


class Observer(Protocol):
    """Runs what it watches, and may keep what goes in and comes out."""

    def call(self, layer: "Layer", x: "Tensor") -> "Tensor":
        """layer.forward(x)."""

    def activate(self, x: "Tensor", row: "Activation") -> "Tensor":
        """y = row.forward(x), the same as outside of an observation."""


_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


def observer() -> Observer | None:
    """Who watches this thread, if anyone."""
    return _observer.get()


def observing(by: Observer | None) -> AbstractContextManager[None]:
    """Layers and activations called inside go through this observer, or through none."""
    return setting(_observer, by)
