"""The backward pass: from a result to its leaves, each visited once, its closure run on the whole of its gradient."""

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

from gpubackprop.backends.base import Buffer, Launch
from gpubackprop.plan import empty, release, run, within

if TYPE_CHECKING:
    from gpubackprop.tensor import Tensor

__all__ = ["Backprop", "Gradients", "backward"]

Backprop = Callable[[Buffer, "Gradients"], None]  # an operation's backward: dy -> writes into the inputs' gradients


class Gradients:
    """The gradients of one backward pass: first writers overwrite, later ones accumulate."""

    def __init__(self, accumulate: bool = False) -> None:
        self.buffers: dict[Tensor, Buffer] = {}
        self.queue: list[tuple[int, Tensor]] = []
        self.accumulate = accumulate
        self.spare: Buffer | None = None  # the dy in hand, if its closure may write over it

    def slot(self, x: "Tensor", *, reuse: bool = False) -> tuple[Buffer, bool]:
        """Where x's gradient goes, and whether there is one to add to.

        With reuse=True the buffer of dy itself may be given: only in a closure's last use of dy.
        """
        if x in self.buffers:
            return self.buffers[x], True
        if x.grad_buffer is not None:
            return self._keep(x, x.grad_buffer), self.accumulate
        if reuse and self.spare is not None and self.spare.size == x.size:
            dx, self.spare = self.spare.reshape(x.shape), None
            return self._keep(x, dx), False
        return self._keep(x, empty(x.backend, x.shape, x.dtype)), False

    def write(self, x: "Tensor", bind: Callable[[Buffer, bool], Launch], *, reuse: bool = False) -> None:
        """Run bind(dx, accumulate) for an input that requires a gradient."""
        if x.requires_grad:
            dx, accumulate = self.slot(x, reuse=reuse)
            run(dx, lambda: bind(dx, accumulate))

    def add(self, x: "Tensor", bind: Callable[[Buffer], Launch]) -> None:
        """Run bind(dx), which adds to a part of dx: what no one wrote before is zero."""
        if x.requires_grad:
            dx, accumulate = self.slot(x)
            if not accumulate:
                run(dx, lambda: x.backend.fill(dx, 0.0))
            run(dx, lambda: bind(dx))

    def hand_on(self, x: "Tensor", dy: Buffer) -> None:
        """x's gradient is dy itself, reshaped: given away where possible, else copied; a closure's last use of dy."""
        if not x.requires_grad:
            return
        if x not in self.buffers and x.grad_buffer is None and self.spare is not None:
            self.slot(x, reuse=True)
        else:
            self.write(x, lambda dx, accumulate: x.backend.copy(dy.reshape(x.shape), dx, accumulate=accumulate))

    def _keep(self, x: "Tensor", dx: Buffer) -> Buffer:
        self.buffers[x] = dx
        heapq.heappush(self.queue, (-x.serial, x))
        return dx


def backward(root: "Tensor", dy: Buffer, *, accumulate: bool = False) -> set["Tensor"]:
    """Propagate ∂L/∂root = dy to every leaf below that requires a gradient, and return those leaves.

    Results are visited once each by falling serial number, so all of a result's uses come before it. With
    accumulate=True the parameters' gradients are added to instead of overwritten.
    """
    grads = Gradients(accumulate)
    grads.queue.append((-root.serial, root))
    grads.buffers[root] = dy
    leaves: set[Tensor] = set()
    while grads.queue:
        y = heapq.heappop(grads.queue)[1]
        dy = grads.buffers.pop(y)
        if y.retains_grad or y.backprop is None:
            y.grad_data = _copied(dy, y) if y.backprop is not None or y is root else dy
        if y.backprop is None:
            leaves.add(y)
            continue
        grads.spare = None if y is root else dy  # the first cotangent belongs to the caller
        with within(y.layer):
            y.backprop(dy, grads)
        if grads.spare is not None:
            release(grads.spare)
    return leaves


def _copied(dy: Buffer, y: "Tensor") -> Buffer:
    copy = y.backend.empty(y.shape, y.dtype)
    run(copy, lambda: y.backend.copy(dy, copy))
    return copy
