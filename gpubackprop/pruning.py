"""Fewer weights: the smallest taken out under masks, put back to earlier values, units that do nothing removed."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop import ops
from gpubackprop.arena import Parameter
from gpubackprop.backends import get_backend
from gpubackprop.backprop import backward
from gpubackprop.checks import choice, number, warn
from gpubackprop.claims import exclusive
from gpubackprop.columns import Columns
from gpubackprop.data import as_features, by_name
from gpubackprop.fused import activation_row
from gpubackprop.layers import Activation, Concatenate, Dense, Dropout, InputNoise, Residual, Sequential, edges
from gpubackprop.model import Layer, Mode, check_model, mode, training
from gpubackprop.plan import Plan, empty
from gpubackprop.predictor import of_the_library
from gpubackprop.scaling import showing
from gpubackprop.tensor import Tensor

__all__ = ["prune", "rewind", "shrink"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Sites = dict[Parameter, dict[Dense, str]]  # the Dense layers, with their paths, that have the weight
ELEMENTWISE = (Activation, Dropout, InputNoise)
THIN = 0.25  # a layer that is left with less than this part of its share is warned of


# ---- single weights ------------------------------------------------------------------------------------------------


@exclusive
def prune(model: Layer, sparsity: float, *, scope: str = "layer") -> Columns:
    """Take out the smallest |w| of each layer until round(sparsity · weights) of it have no edge, by masks, in place.

    Layers are all Dense ones except frozen ones (requires_grad=False); biases do not count. With scope="global" the
    smallest of all layers together go, exactly round(sparsity · all weights), most from layers of small weights. A
    UserWarning names a layer that is left with no weights, or with less than a quarter of the share 1 − sparsity. Ties
    are broken by position. Weights without an edge, pruned before or under a mask of yours, count as pruned: sparsity
    only rises, and a layer that is sparser already stays as it is.

    A pruned weight is exactly 0 and stays so in training, also by a Trainer that trained before; a mask is saved with
    the model. Weights that were never drawn are drawn as when the model is called, and a Trainer keeps them. A weight
    that layers share counts once. Prune between fits: the running step is recorded without the masks, so that in a
    callback it is an error.

    Columns: layer (its path), weights, left, sparsity; `print` shows a table.

    >>> from gpubackprop.layers import mlp
    >>> print(prune(mlp([64, 32, 10]).initialize(0), 0.9))
    layer  weights  left  sparsity
    0        2,048   205    0.8999
    1          320    32       0.9
    """
    check_model(model, "prune")
    model.check_unpinned("prune")
    sparsity = number("prune", "sparsity", sparsity, "in [0, 1)")
    choice("prune", "scope", scope, ("global", "layer"))
    _ = model.backend  # which draws weights that have no value yet
    sites, known = _sites(model), edges(model)
    names = {p: key for key, p in model.named_parameters().items()}
    sizes = {w: _magnitudes(w, known.get(w), names[w]) for w in sites}
    groups = list(sizes.values()) if scope == "layer" else [np.concatenate(list(sizes.values()))]
    parts = np.split(_smallest(groups, sparsity), np.cumsum([m.size for m in sizes.values()])[:-1])
    left = {w: ~part.reshape(w.shape) for w, part in zip(sites, parts, strict=True)}
    paths = {w: next(iter(layers.values())) for w, layers in sites.items()}
    counts = {paths[w]: (int((sizes[w] >= 0).sum()), int(left[w].sum()), w.size) for w in sites}
    _warn_of_thin(counts, sparsity, scope)  # before anything is changed: a warning may be an error
    _apply_masks(model, sites, known, left)
    rows = Columns(layer=[], weights=[], left=[], sparsity=[])
    for path, (_, n, size) in counts.items():
        rows.add(layer=path, weights=size, left=n, sparsity=1 - n / size)
    return rows


def _apply_masks(model: Layer, sites: Sites, known: Mapping[Parameter, Bools], left: Mapping[Parameter, Bools]) -> None:
    """Give the layers masks of the edges that are left; on an error the model is as before."""
    device = model.backend.device
    kept = {layer: (layer.mask, layer.arguments) for layers in sites.values() for layer in layers}
    values = {w: w.numpy() for w in sites}
    try:
        for w, layers in sites.items():
            if w in known or not left[w].all():  # a mask of ones would cost a launch
                mask = Parameter(w.shape, left[w].astype(np.float64), trainable=False)
                for layer in layers:
                    layer.mask = mask
                    layer._argue(mask=left[w])
        model._lay_out(device)  # anew, so that trainers see that what they keep is of before
        _check_held(model, sites)
    except Exception:
        for layer, before in kept.items():
            layer.mask, layer.arguments = before
        model._lay_out(device)
        for w, value in values.items():
            w.backend.write(w.buffer, value)
        raise
    for p in model.named_parameters().values():
        p.settled = True


def _warn_of_thin(counts: Mapping[str, tuple[int, int, int]], sparsity: float, scope: str) -> None:
    """Warn of layers that lose nearly all: by path, edges before and after, and weights."""
    before, after, _ = (sum(column) for column in zip(*counts.values(), strict=True))
    for path, (had, left, size) in counts.items():
        more_than_others = left * before < after * had
        if left < had and (not left or (more_than_others and left < THIN * (1 - sparsity) * size)):
            remedy = "ask for less" if scope == "layer" else "scope='layer' takes the same share of each layer"
            what = f"layer {path!r} is left with {left:,} of its {size:,} weights at sparsity {sparsity:g}"
            warn(f"prune: {what}; {remedy}")


@exclusive
def rewind(model: Layer, state: Mapping[str, Any]) -> None:
    """Write an earlier `state_dict` into the model, in place, but keep its masks: pruned weights stay 0.

    It may be of before pruning, without masks. What is left after pruning, with the values that training began from, is
    a lottery ticket (Frankle & Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks");
    train it with a new Trainer, whose moments are new too.
    """
    check_model(model, "rewind")
    if isinstance(state, Mapping):
        masks = {layer.mask for _, layer in model.named_layers() if isinstance(layer, Dense)}
        state = {**state, **{key: p.numpy() for key, p in model.named_parameters().items() if p in masks}}
    model.load_state_dict(state)


def _sites(model: Layer) -> Sites:
    found: Sites = {}
    for path, layer in model.named_layers():
        if isinstance(layer, Dense) and layer.weight.stepped:
            found.setdefault(layer.weight, {}).setdefault(layer, path)
    if not found:
        raise ValueError("prune: the model has no weights of Dense layers that are trained; unfreeze some, or add one")
    return found


def _magnitudes(w: Parameter, edges: Bools | None, key: str) -> Array:
    """|w| in one row, −1 where there is no edge."""
    values = np.abs(w.numpy())
    if bad := np.count_nonzero(np.isnan(values)):
        remedy = "load weights of before; gb.find_nan names the launch that makes them"
        raise ValueError(f"prune: {key!r} has {bad:,} NaN, expected numbers, which have an order; {remedy}")
    return (values if edges is None else np.where(edges, values, -1)).ravel()


def _smallest(groups: list[Array], sparsity: float) -> Bools:
    """Where the round(sparsity · size) smallest of each group are, of equal ones the first; the groups in one row."""
    before = [int(np.count_nonzero(m < 0)) for m in groups]
    wanted = [round(sparsity * m.size) for m in groups]
    if all(now < then for now, then in zip(wanted, before, strict=True)):
        raise ValueError(f"prune: sparsity {sparsity:g} asked for, but {sum(before) / sum(m.size for m in groups)} of "
                         "the weights are pruned already; ask for no less, or prune a copy of before")  # fmt: skip
    found = [np.zeros(m.size, np.bool_) for m in groups]
    for smallest, m, counts in zip(found, groups, zip(wanted, before, strict=True), strict=True):
        smallest[np.argsort(m, kind="stable")[: max(counts)]] = True
    return np.concatenate(found)


def _check_held(model: Layer, sites: Sites) -> None:
    """Raise if a layer of the user's writes into the gradient of a pruned weight after its mask: it would grow back."""
    if all(of_the_library(type(layer)) for _, layer in model.named_layers()):
        return
    if model.inputs is None:
        raise ValueError("prune: the model does not say how many columns it takes; give its class an `inputs`")
    kept = {p: p.grad_data for p in model.named_parameters().values()}
    plan, x = Plan(model.backend, dry=True), empty(model.backend, (2, model.inputs), model.arena.dtype)
    try:
        with plan.record("gradient"), training():
            y = model(Tensor(x, model.backend))
            leaves = backward(y, empty(model.backend, y.shape, y.dtype)) if y.requires_grad else set()
        for w, layers in sites.items():
            writers = [k.name for k in plan.launches if any(out is w.grad_data for out in k.writes)]
            layer, path = next(iter(layers.items()))
            if w in leaves and layer.mask is not None and writers[-1:] != ["mask"]:
                raise ValueError(f"prune: pruned weights of layer {path or type(layer).__name__!r} would grow back, "
                                 "because its mask is not the last to write their gradient; pass it on wherever the "
                                 "weight is used: gb.dense(…, mask=self.mask)")  # fmt: skip
    finally:
        for p, gradient in kept.items():
            p.grad_data = gradient


# ---- whole units ---------------------------------------------------------------------------------------------------


@exclusive
def shrink(model: Layer, x: Any = None) -> Layer:
    """A smaller model with the same outputs in inference, but for rounding: without the hidden units that do nothing.

    A unit between two Dense layers goes if no weight leads out of it (all are 0), or none into it: then it is a
    constant, f(b), and becomes part of the next layer's bias. With x also if it is the same number in all rows of x, 0
    for a dead relu: outputs are then the same for rows in which it is that number, and no others. What does nothing
    after that goes too; one unit of each layer stays.

    Between the two there may be Activation, Dropout and InputNoise; the layers may lie in Sequentials, and these in
    Residual and Concatenate. Other units stay, as beside BatchNorm, in layers of your own, and in what is shared. The
    model itself is left as it is; dropout draws otherwise in the smaller one.
    """
    check_model(model, "shrink")
    device = model.backend.device  # which draws what has no value yet
    x = by_name(x, model.feature_names, "shrink")
    rows = None if x is None else as_features(x, model.dtype, model.inputs, "shrink")
    if rows is not None and len(rows) < 2:
        raise ValueError(f"shrink: x has {len(rows)} rows, expected two or more; in one row every unit is constant")
    smaller = copy.deepcopy(model)
    smaller._lay_out(device)
    while _shrink_once(smaller, {} if rows is None else _constants(smaller, rows)):
        smaller._lay_out(device)
    return smaller


def _shrink_once(model: Layer, constants: Mapping[Layer, Floats]) -> bool:
    """Whether any unit went."""
    shared = {
        below for _, layer, first, _ in model._met("", {}) if first is not None for _, below in layer.named_layers()
    }
    uses = Counter(p for _, layer in model.named_layers() for p in layer._own_parameters().values())

    def alone(layer: Layer) -> bool:
        return layer not in shared and all(uses[p] == 1 for p in layer.named_parameters().values())

    found = False
    for chain in _chains(model):
        head: Dense | None = None
        between: list[Layer] = []
        for layer in chain:
            if type(layer) is Dense and alone(layer):
                found |= head is not None and _join(head, between, layer, constants.get(layer))
                head, between = layer, []
            elif type(layer) in ELEMENTWISE:
                between.append(layer)
            else:
                head = None
    return found


def _chains(layer: Layer) -> Iterator[list[Layer]]:
    """The layers that are called one after another, each on the output of the one before."""
    if type(layer) is Concatenate:
        for branch in layer.layers:
            yield from _chains(branch)
    elif type(layer) in (Sequential, Residual):
        chain = list(_flat(layer))
        yield chain
        for inner in chain:
            yield from _chains(inner)


def _flat(layer: Layer) -> Iterator[Layer]:
    for inner in layer.children().values():
        if type(inner) is Sequential:
            yield from _flat(inner)
        else:
            yield inner


def _constants(model: Layer, rows: Array) -> dict[Layer, Floats]:
    """What goes into each Dense layer from columns that are the same number in all rows, NaN from others."""
    found: dict[Layer, Floats] = {}

    def look(layer: Layer, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, Dense):
            values = x.numpy().astype(np.float64)
            found[layer] = np.where((values == values[0]).all(0), values[0], np.nan)

    with mode(Mode()), showing(look):
        model(rows)
    return found


def _join(head: Dense, between: list[Layer], tail: Dense, constants: Floats | None) -> bool:
    """Remove units of the head that the tail can do without; whether there are any."""
    w, v = _value(head.weight), _value(tail.weight)
    still, read = ~w.any(0), v.any(1)
    value = np.where(still, _outputs(head, between), np.nan if constants is None else constants)
    gone = ~read | np.isfinite(value)
    folded = gone & read
    if gone.all():
        gone[0] = False  # it stays, but nothing leads out of it
    if not (gone | folded).any():
        return False
    _cut(head, np.ones(len(w), np.bool_), ~gone)
    _cut(tail, ~gone, np.ones(v.shape[1], np.bool_), value[folded] @ v[folded])
    if tail.weight.value is not None:
        tail.weight.value[folded[~gone]] = 0
    return True


def _value(p: Parameter | None) -> Floats:
    value = None if p is None else p.host_value()
    return np.asarray(0 if value is None else value, np.float64)


def _outputs(head: Dense, between: list[Layer]) -> Floats:
    """What the units give where nothing goes in, in float64."""
    b = np.zeros((1, head.weight.shape[1])) + _value(head.bias)
    y = ops.unary(Tensor(b, get_backend("cpu")), activation_row(head.activation))
    for layer in between:
        y = ops.unary(y, layer.row) if isinstance(layer, Activation) else y
    return y.numpy().reshape(-1)


def _cut(layer: Dense, inputs: Bools, units: Bools, shift: Floats | None = None) -> None:
    """Leave these inputs and units of the layer, and add the shift to its bias."""
    edges = np.ix_(inputs, units)
    weight, bias, mask = layer.weight, layer.bias, layer.mask
    if bias is None and shift is not None and shift.any():
        bias = Parameter((len(units),))
        bias.settled, bias.requires_grad = weight.settled, weight.requires_grad
        layer._argue(bias=True)
    layer.inputs = int(inputs.sum())
    layer.weight = _part(weight, edges, _value(weight))
    layer.bias = None if bias is None else _part(bias, (units,), _value(bias) + (0 if shift is None else shift))
    layer.mask = None if mask is None else _part(mask, edges, _value(mask))
    given = {"init": layer.weight, "bias_init": layer.bias, "mask": layer.mask}
    arrays = {k: p.init for k, p in given.items() if p is not None and _is_array(p.init)}
    layer._argue(inputs=layer.inputs, units=int(units.sum()), **arrays)


def _part(p: Parameter, index: Any, value: Floats) -> Parameter:
    """Those elements of the parameter as one of its own, and of its initial value where that is an array."""
    init = np.broadcast_to(np.asarray(p.init), p.shape)[index] if _is_array(p.init) else p.init
    part = Parameter(value[index].shape, init, trainable=p.trainable)
    part.value, part.settled, part.requires_grad = value[index], p.settled, p.requires_grad
    return part


def _is_array(init: Any) -> bool:
    return not callable(init) and np.ndim(init) > 0
