"""What happens inside a training step: each layer's values and gradients, one weight's gradient, the loss of weights.

Everything runs on a copy of the trainer, in training mode, with the draws of dropout that its next step would have.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop import ops
from gpubackprop.arena import Parameter
from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Buffer, is_on_device
from gpubackprop.checks import whole
from gpubackprop.columns import Shown
from gpubackprop.formulas import ACTIVATIONS, Activation
from gpubackprop.layers import Dense
from gpubackprop.model import Layer, training
from gpubackprop.names import unknown
from gpubackprop.observe import observing
from gpubackprop.tensor import Tensor
from gpubackprop.trainer import Trainer

__all__ = [
    "Observed", "Site", "WeightGradient", "check_trainer", "copied", "explain_weight", "gradient_at", "loss_of_weights",
    "observed", "sensitivity",
]  # fmt: skip

Array = npt.NDArray[Any]


# ---- one forward and backward, watched -----------------------------------------------------------------------------


@dataclass(eq=False)  # frozen ones take a millisecond each to import
class Site:
    """One call of a layer, or an activation that a layer's own forward applies beside other work.

    preact goes into the activation and postact comes out; without an activation both are the layer's output. After the
    backward pass their `.grad` is ∂L/∂preact and ∂L/∂postact.
    """

    name: str
    layer: Layer | None
    x: Tensor
    row: Activation | None
    preact: Tensor
    postact: Tensor

    @property
    def parameters(self) -> list[Parameter]:
        """The layer's own trained parameters."""
        return [] if self.layer is None else [p for p in self.layer._own_parameters().values() if p.stepped]


class _Watcher:
    """The observer that keeps the sites of a forward pass, in the order in which they are computed."""

    def __init__(self, model: Layer) -> None:
        self.sites: list[Site] = []
        self._within = "loss"  # the layer being called; outside of the model it is the loss that calls activations
        self._paths: dict[int, list[str]] = {}
        for path, layer in model._places():
            self._paths.setdefault(id(layer), []).append(path)

    def call(self, layer: Layer, x: Tensor) -> Tensor:
        paths = self._paths.get(id(layer), [type(layer).__name__])
        path = paths.pop(0) if len(paths) > 1 else paths[0]  # a layer that stands in several places is called in order
        outer, self._within, first = self._within, path, len(self.sites)
        try:
            y = layer.forward(x)
        finally:
            self._within = outer
        name, inside = path or type(layer).__name__, self.sites[first:]
        if len(inside) == 1 and inside[0].layer is None:
            inside[0].name, inside[0].layer, inside[0].x = name, layer, x
        elif not inside or layer._own_parameters():  # no mere container
            self.sites.append(Site(name, layer, x, None, y.retain_grad(), y))
        return y

    def activate(self, x: Tensor, row: Activation) -> Tensor:
        with observing(None):
            if row.name == "identity" or ACTIVATIONS.get(row.name) != row:
                return ops.unary(x, row)
            z = ops.unary(x, ACTIVATIONS["identity"]).retain_grad()  # a node of its own: x may have other users
            y = ops.unary(z, row).retain_grad()
        self.sites.append(Site(f"{self._within}.{row.name}".lstrip("."), None, x, row, z, y))
        return y

    def named(self) -> dict[str, Site]:
        """The sites by name; the second of a name is name:2."""
        seen = Counter[str]()
        for site in self.sites:
            seen[site.name] += 1
            site.name += f":{seen[site.name]}" * (seen[site.name] > 1)
        return {site.name: site for site in self.sites}


@dataclass(eq=False)
class Observed:
    """What was seen of one forward and backward, and the copy of the trainer that ran it."""

    trainer: Trainer
    sites: dict[str, Site]
    loss: float
    rows: int

    def site(self, name: Any, where: str) -> Site:
        """The site of that name, or an error that lists the names."""
        if str(name) not in self.sites:
            raise ValueError(unknown("layer", name, self.sites, where))
        return self.sites[str(name)]


def observed(trainer: Trainer, x: Any, y: Any, where: str) -> Observed:
    """One forward and backward of the mean loss over the rows, without penalties, in the model's own type."""
    twin = copied(trainer, where)
    rows, targets, _ = twin._data(x, y, where)
    back, watcher = twin.backend, _Watcher(twin.model)
    with training(twin.seed, twin._batches + 1), observing(watcher):
        output = twin.model(Tensor(back.asarray(rows), back, requires_grad=True))  # so that frozen layers show theirs
        loss = twin.objective.total(output, Tensor(back.asarray(targets), back)) * (1 / len(rows))
    loss.backward()
    return Observed(twin, watcher.named(), loss.item(), len(rows))


def check_trainer(trainer: Any, where: str) -> None:
    """Raise unless it is a Trainer."""
    if not isinstance(trainer, Trainer):
        raise TypeError(f"{where}: trainer is {type(trainer).__name__}; expected a Trainer: gb.Trainer(model, …)")


def copied(trainer: Trainer, where: str) -> Trainer:
    """A copy to try things on, with a model, moments and memory of its own."""
    check_trainer(trainer, where)
    return copy.deepcopy(trainer)


def gradient_at(t: Tensor) -> Buffer:
    """∂L/∂t after the backward pass; zeros if the loss does not depend on it."""
    if t.grad is not None:
        return t.grad.buffer
    zeros = t.backend.empty(t.shape, t.dtype)
    t.backend.write(zeros, 0)
    return zeros


def sensitivity(trainer: Trainer, x: Any, y: Any, layer: str | int) -> Any:
    """∂L/∂z of the mean loss L over the rows, for every row and unit of the layer's pre-activations z.

    What goes into the activation is z; of a layer without one, what comes out. Layers have the names that
    `print(model)` shows; a layer's second call is "name:2", an activation in the forward of a layer of one's own
    "name.relu". An array of the model's type, on the device if x is, else NumPy's.
    """
    seen = observed(trainer, x, y, "sensitivity")
    delta = gradient_at(seen.site(layer, "sensitivity").preact)
    return delta if is_on_device(x) else seen.trainer.backend.to_numpy(delta)


# ---- one weight ----------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class WeightGradient(Shown):
    """∂L/∂w of one weight from unit i to unit j, as the sum over the rows of tail activation × head delta."""

    name: str
    i: int
    j: int
    tail: Array  # (rows,) a_i, what unit i sends along the edge
    head: Array  # (rows,) δ_j = ∂L/∂z_j, what comes back at its end
    gradient: float  # as backward() stored it

    @property
    def products(self) -> Array:
        """Each row's share of the gradient."""
        return self.tail * self.head

    def parts(self) -> list[str]:
        products, total = self.products, float(self.products.sum())
        a, d = f"a[{self.i}]", f"δ[{self.j}]"
        lines = [f"∂L/∂{self.name}[{self.i}, {self.j}] = Σ {a} · {d} over {len(products)} rows = {total:.6g}"]
        if abs(self.gradient - total) > 1e-5 * np.abs(products).sum():  # more than float32 rounds off
            lines.append(f"backward() stored {self.gradient:.6g}: the weight is masked, or has other uses")
        if not products.all():
            zeros = [int((factor == 0).sum()) for factor in (self.tail, self.head)]
            lines.append(f"{a} is 0 in {zeros[0]} rows and {d} in {zeros[1]}: these rows add nothing")
        for row in np.argsort(-np.abs(products), kind="stable")[:3]:
            lines.append(f"row {row}: {self.tail[row]:.6g} · {self.head[row]:.6g} = {products[row]:.6g}")
        return lines


def explain_weight(trainer: Trainer, x: Any, y: Any, layer: str | int, i: int, j: int) -> WeightGradient:
    """∂L/∂weight[i, j] = Σ over rows of a_i · δ_j: the Dense layer's input times the loss's sensitivity at its output.

    `print` it; it has the factors of each row in `tail` and `head`. A weight that is used several times has the rows of
    every use, one after the other.
    """
    where = "explain_weight"
    i, j = whole(where, "i", i, 0), whole(where, "j", j, 0)
    seen = observed(trainer, x, y, where)
    site = seen.site(layer, where)
    if (weight := _weight_of(site)) is None:
        has = site.layer.describe() if site.layer else "an activation"
        names = ", ".join(name for name, other in seen.sites.items() if _weight_of(other) is not None)
        raise ValueError(f"{where}: layer {layer!r} is {has}; choose a Dense layer from {names}")
    inputs, units = weight.shape
    if i >= inputs or j >= units:
        raise ValueError(f"{where}: the weight of layer {layer!r} has shape {weight.shape}; there is no [{i}, {j}]")
    if weight.grad is None:
        raise ValueError(f"{where}: layer {layer!r} is frozen; set its weight.requires_grad = True")
    uses, read = [s for s in seen.sites.values() if _weight_of(s) is weight], seen.trainer.backend.to_numpy
    tail = np.concatenate([read(s.x.buffer)[:, i] for s in uses]).astype(np.float64)
    head = np.concatenate([read(gradient_at(s.preact))[:, j] for s in uses]).astype(np.float64)
    name = next(k for k, p in seen.trainer.model.named_parameters().items() if p is weight)
    return WeightGradient(name, i, j, tail, head, float(weight.grad.numpy()[i, j]))


def _weight_of(site: Site) -> Parameter | None:
    """The weight of a Dense layer, unless a class of one's own computes something else with it."""
    layer = site.layer
    return layer.weight if isinstance(layer, Dense) and type(layer).forward is Dense.forward else None


# ---- the loss as a function ----------------------------------------------------------------------------------------


def loss_of_weights(trainer: Trainer, x: Any, y: Any) -> tuple[Callable[..., Tensor], tuple[Array, ...]]:
    """(L, w): the mean training loss over the rows as a function of the trained weights, and these, all in float64.
    Penalties and smoothed labels are part of it.

    L takes a tensor for each array of w, in the order of `model.named_parameters()`, and computes where they lie: for
    `gb.hessian_vector_product`, `gb.gradcheck` and `gb.value_and_grad`, which take w as it is.
    """
    where = "loss_of_weights"
    twin, batch = copied(trainer, where), trainer._batches + 1
    double = Trainer(
        twin.model, twin.objective.given, device=twin.backend.device, seed=twin.seed, precision="float64",
        label_smoothing=twin.objective.smoothing,
    )  # fmt: skip
    rows, targets, _ = double._data(x, y, where)
    host = double.backend.to_numpy(rows) if is_on_device(rows) else np.array(rows)  # the caller may write over x and y
    targets, model, penalty = np.array(targets), double.model, trainer._terms.penalty
    trained = [p for p in model.named_parameters().values() if p.stepped]

    def loss_of(*weights: Tensor) -> Tensor:
        if [w.shape for w in weights] != [p.shape for p in trained]:
            wanted = ", ".join(str(p.shape) for p in trained)
            raise ValueError(
                f"{where}: tensors of shapes {wanted} expected, got {', '.join(str(w.shape) for w in weights)}"
            )
        back = get_backend(weights[0].device)
        with_weights = copy.deepcopy(model, {id(p): w for p, w in zip(trained, weights, strict=True)})
        with_weights._lay_out(back.device)
        with training(double.seed, batch):
            output = with_weights(Tensor(back.asarray(host), back))
            mean = double.objective.total(output, Tensor(back.asarray(targets), back)) * (1 / len(host))
            return penalty.added(mean, weights, len(host))

    return loss_of, tuple(p.numpy() for p in trained)
