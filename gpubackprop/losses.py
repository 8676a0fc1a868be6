"""Losses by name: the operation, what its targets are, how outputs become probabilities, and the metric that fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop import fused
from gpubackprop.backends.base import Buffer, StepTable, Tally
from gpubackprop.checks import number
from gpubackprop.data import as_labels, as_probabilities, as_targets, on_host
from gpubackprop.names import hint, of_pytorch
from gpubackprop.operands import graph, row_by_row
from gpubackprop.plan import empty, run
from gpubackprop.shapes import cast
from gpubackprop.tensor import Tensor

__all__ = ["LOSSES", "Objective", "objective"]


@dataclass(frozen=True)
class Objective:
    """A loss as the Trainer uses it. Without classes, targets are rows of numbers like the outputs."""

    name: str
    function: Callable[..., Tensor]
    head: str | None  # what turns outputs into probabilities or means; None is decided by the number of outputs
    metrics: tuple[str, ...]
    step: Callable[..., Buffer] | None = None  # its gradient in one launch; None for a user's callable
    classes: bool = False
    smoothing: float = 0.0  # the share of every target that is spread over all classes

    @property
    def own(self) -> bool:
        """Whether it is a user's callable, which returns the mean over the batch."""
        return self.step is None

    @property
    def given(self) -> str | Callable[..., Tensor]:
        """What `objective` made it of, but for smoothing."""
        return self.function if self.own else self.name

    def seed(
        self, output: Tensor, target: Tensor, table: StepTable, tally: Tally, count: bool, weights: Tensor | None = None
    ) -> tuple[Tensor, Buffer]:
        """Where the backward pass of a training step begins, and its cotangent there: the gradient of the batch's mean
        loss, by weight, times the scale. The loss goes to the tally, and with count=True the rows right."""
        if self.step is not None:
            return output, self.step(output, target, table, tally, count, weights)
        back, total = output.backend, self.tallied(output, target, table, tally, count, weights)
        dy = empty(back, (), total.dtype)
        scale = {"scale": table.control[:1].reshape(())}
        run(dy, lambda: back.elementwise("seed", graph("dy = scale * (1 / weight)"), scale, {"dy": dy}, table=table))
        return total, dy.reshape(total.shape)

    def tallied(
        self, output: Tensor, target: Tensor, table: StepTable, tally: Tally, count: bool, weights: Tensor | None = None
    ) -> Tensor:
        """The sum of the batch's losses, which goes to the tally too, and with count=True the rows right."""
        back, total = output.backend, self.total(cast(output, table.control.dtype), target, weights)
        run(total.buffer, lambda: back.accumulate_loss(total.buffer, table, tally))
        if count:
            run(output.buffer, lambda: back.top1(output.buffer, target.buffer, tally))
        return total

    def total(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum of the batch's losses, by weight if there are weights of its rows; a user's loss knows none."""
        if not self.own:
            return self.function(output, target, reduction="sum", weights=weights)
        with row_by_row(output, target):
            mean = self.function(output, target)
        if not isinstance(mean, Tensor) or mean.size != 1:
            got = f"shape {mean.shape}" if isinstance(mean, Tensor) else type(mean).__name__
            raise TypeError(
                f"loss: the callable returned {got}; expected a tensor of one element, the mean over the batch"
            )
        return mean * len(output)

    def smoothed(self, share: float) -> "Objective":
        """The same loss against (1 − share) · t + share / K · Σt of K classes; of bce, (1 − share) · t + share / 2."""
        number("Trainer", "label_smoothing", share, "in [0, 1)")
        if share and self.name not in ("cross_entropy", "bce"):
            raise ValueError(f"Trainer: label_smoothing is for the losses cross_entropy and bce, got {self.name}")
        if not (share and self.classes):
            return replace(self, smoothing=share)
        function, step = partial(_smoothed_loss, share), partial(_smoothed_step, share)
        return replace(self, smoothing=share, function=function, step=step)

    def softened(self, y: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Checked targets as the loss takes them; labels stay as they are, and are smoothed where they are used."""
        if not self.smoothing or y.ndim == 1:
            return y
        spread: Any = y.mean(1, keepdims=True) if self.classes else y.dtype.type(0.5)
        rows: npt.NDArray[Any] = (1 - self.smoothing) * y + self.smoothing * spread
        return rows

    def targets(self, y: Any, dtype: npt.DTypeLike | None, outputs: int, where: str) -> npt.NDArray[Any]:
        """y as labels (n,) or rows (n, outputs) of the dtype, or with None of y's; a user's loss gets integers as
        labels if there are several outputs."""
        y = on_host(y, where, "y")
        if (self.classes and y.ndim != 2) or (self.classes and y.ndim == 2 and y.shape[1] == 1):
            if outputs == 1:
                numbers = y.dtype.kind == "f" and not np.isin(y, (0, 1)).all()
                remedy = "use loss='mse' for numbers" if numbers else "use loss='bce'"
                raise ValueError(f"{where}: {self.name} needs an output per class but the model has one; {remedy}")
            return as_labels(y, outputs, where)
        if self.own and y.ndim == 1 and y.dtype.kind in "iu" and outputs > 1:
            return as_labels(y, outputs, where, numbers="pass y[:, None] if they are numbers, not labels")
        if self.own:
            return as_targets(y, dtype, y.shape[1] if y.ndim == 2 else 1, where)
        rows = (as_probabilities if self.head == "sigmoid" else as_targets)(y, dtype, outputs, where)
        if (self.classes or self.head == "exp") and rows.min() < 0:
            row, what = int(rows.min(1).argmin()), "weights of classes" if self.classes else f"numbers of {self.name}"
            raise ValueError(f"{where}: y has {rows[row].min():g} at row {row}; {what} must not be negative")
        return rows


def _smoothed_loss(share: float, output: Tensor, target: Any, reduction: str = "mean", weights: Any = None) -> Tensor:
    return fused.softmax_cross_entropy(output, fused.smoothed(target, output, share), reduction, weights)


def _smoothed_step(
    share: float, output: Tensor, target: Tensor, table: StepTable, tally: Tally, count: bool,
    weights: Tensor | None = None,
) -> Buffer:  # fmt: skip
    rows = fused.smoothed(target, output, share)
    dx = fused.softmax_cross_entropy_step(output, rows, table, tally, False, weights)
    if count:
        run(output.buffer, lambda: output.backend.top1(output.buffer, target.buffer, tally))
    return dx


def _step(label: str) -> Callable[..., Buffer]:
    return partial(fused.elementwise_loss_step, label)


LOSSES = {
    o.name: o
    for o in (
        Objective(
            "cross_entropy",
            fused.softmax_cross_entropy,
            "softmax",
            ("accuracy",),
            fused.softmax_cross_entropy_step,
            classes=True,
        ),
        Objective("bce", fused.bce_with_logits, "sigmoid", ("accuracy",), _step("bce_with_logits")),
        Objective("bce_sum", fused.bce_with_logits_sum, "sigmoid", ("accuracy",), _step("bce_with_logits_sum")),
        Objective("mse", fused.mse, "identity", ("r2",), _step("mse")),
        Objective("half_mse", fused.half_mse, "identity", ("r2",), _step("half_mse")),
        Objective("sse", fused.sse, "identity", ("r2",), _step("sse")),
        Objective("half_sse", fused.half_sse, "identity", ("r2",), _step("half_sse")),
        Objective("poisson", fused.poisson, "exp", (), _step("poisson")),
        Objective("poisson_sum", fused.poisson_sum, "exp", (), _step("poisson_sum")),
    )
}


def objective(loss: str | Callable[..., Tensor]) -> Objective:
    """The objective of a name, or of a callable (output, target) -> tensor."""
    theirs = "" if isinstance(loss, str) else of_pytorch(loss)
    if theirs or isinstance(loss, type) or not (isinstance(loss, str) or callable(loss)):
        got = f"{theirs or type(loss).__name__}; expected a name or a function (output, target) -> tensor"
        raise TypeError(f"loss is {got}{hint('loss', loss)}")
    if callable(loss):
        return Objective(getattr(loss, "__name__", "loss"), loss, None, ())
    if loss not in LOSSES:
        known = sorted(LOSSES)
        raise ValueError(
            f"unknown loss {loss!r}; choose from {', '.join(known)}, or pass a callable{hint('loss', loss, known)}"
        )
    return LOSSES[loss]
