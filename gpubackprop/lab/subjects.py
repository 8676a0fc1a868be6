"""What engines differentiate: a graph of numbers, or a network on its rows; each unrolled to edges on demand."""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop import fused, ops
from gpubackprop.checks import number, whole
from gpubackprop.columns import Grid, Shown, table
from gpubackprop.formulas import Activation as Row
from gpubackprop.layers import Activation, Dense, Dropout, InputNoise, Sequential, edges
from gpubackprop.model import Layer, check_model
from gpubackprop.names import hint
from gpubackprop.tensor import Tensor, tensor
from gpubackprop.trainer import Trainer

__all__ = ["Edge", "Graph", "GraphAt", "NetworkAt", "Node", "Subject", "product_graph"]

Floats = npt.NDArray[np.float64]
Node = Hashable
Edge = tuple[Node, Node, float]  # tail, head, z = ∂head/∂tail


# ---- graphs --------------------------------------------------------------------------------------------------------


class Graph(Shown):
    """A computational graph of numbers: inputs by name, then nodes that are functions of those before; the last one
    is the output.

    >>> graph = Graph("w")
    >>> graph.node("y", lambda w: w**2, "w")
    >>> graph.node("o", gb.cos, "y")
    >>> print(gradients(graph, 0.7))
    """

    def __init__(self, *inputs: str) -> None:
        if not inputs or len(set(inputs)) < len(inputs):
            raise ValueError(f"Graph: got the inputs {inputs}, expected one or more distinct names")
        self.inputs = inputs
        self.nodes: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {}

    def node(self, name: str, function: Callable[..., Tensor], *parents: str) -> None:
        """Add name = function(*parents), a function of tensors of one element; a parent may be given twice."""
        known = (*self.inputs, *self.nodes)
        if name in known:
            raise ValueError(f"Graph: there is a node {name!r} already; choose another name")
        if not parents or (unknown := [p for p in parents if p not in known]):
            has = f"the unknown parent {unknown[0]!r}" if parents else "no parents"
            near = hint("parent", unknown[0], known) if parents else ""
            raise ValueError(f"Graph: node {name!r} has {has}; choose from {', '.join(known)}{near}")
        self.nodes[name] = function, parents

    def parts(self) -> Iterable[str | Grid]:
        rows = [
            (name, getattr(f, "__name__", repr(f)), ", ".join(parents)) for name, (f, parents) in self.nodes.items()
        ]
        title = f"graph of {', '.join(self.inputs)}, {len(rows)} nodes, the last one the output"
        return [title, table([("node", "function", "of"), *rows], 0)]

    def __call__(self, *inputs: Any) -> Tensor:
        """The output."""
        if not self.nodes:
            raise ValueError("Graph: there is no node; add one with graph.node(name, function, *parents)")
        values = {k: x if isinstance(x, Tensor) else tensor(x) for k, x in zip(self.inputs, inputs, strict=True)}
        for name, (function, parents) in self.nodes.items():
            values[name] = y = _checked(name, function(*(values[p] for p in parents)))
        return y


def _checked(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.size != 1:
        got = f"shape {value.shape}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"Graph: node {name!r} returned {got}; expected a tensor of one element")
    return value


def product_graph(layers: int = 5, units: int = 2) -> Graph:
    """h(1, j) = w, h(i, j) = Π over k of h(i−1, k), and o = Π over k of h(layers, k), so that o = w^(units^layers).

    From w to o lead units^layers paths: 32 of them for 5 layers of 2 units, whose sum is 32 w³¹.
    """
    whole("product_graph", "layers", layers), whole("product_graph", "units", units)
    graph = Graph("w")
    for i in range(1, layers + 1):
        for j in range(1, units + 1):
            before = [f"h({i - 1},{k})" for k in range(1, units + 1)] if i > 1 else ["w"]
            graph.node(f"h({i},{j})", _product, *before)
    graph.node("o", _product, *(f"h({layers},{k})" for k in range(1, units + 1)))
    return graph


def _product(first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = first * other
    return first


class GraphAt:
    """A graph at a point: its inputs as leaves, its output, and its edges with their local derivatives."""

    layers = ()  # what the engines for networks alone unroll

    def __init__(self, graph: Graph, x: Any) -> None:
        self.graph = graph
        names, values = ", ".join(graph.inputs), x
        if not isinstance(x, Mapping):
            several = np.atleast_1d(x).tolist()
            if len(several) != len(graph.inputs):
                raise ValueError(f"gradients: x has {len(several)} values, expected one for each of the inputs {names}")
            values = dict(zip(graph.inputs, several, strict=True))
        elif set(x) != set(graph.inputs):
            raise ValueError(f"gradients: x has values for {', '.join(map(str, x))}, expected them for {names}")
        self.leaves = {k: tensor(number("gradients", k, values[k]), requires_grad=True) for k in graph.inputs}

    def output(self) -> Tensor:
        return self.graph(*self.leaves.values())

    def edges(self, _: str) -> Iterator[Edge]:
        """The edges into each node, before those out of it."""
        values = {k: leaf.item() for k, leaf in self.leaves.items()}
        for name, (function, parents) in self.graph.nodes.items():
            arguments = [tensor(values[p], requires_grad=True) for p in parents]
            y = _checked(name, function(*arguments))
            if y.requires_grad:
                y.backward(np.ones(y.shape))
            values[name] = y.item()
            for parent, argument in zip(parents, arguments, strict=True):
                yield parent, name, 0.0 if argument.grad is None else argument.grad.item()

    def sources(self) -> Iterator[tuple[str, int, Node]]:
        """For each element of each leaf its node."""
        return ((name, 0, name) for name in self.leaves)

    def movable(self) -> dict[str, list[int]]:
        """The elements of each leaf that may be moved."""
        return {name: [0] for name in self.leaves}


class NetworkAt:
    """A copy of a network in float64, with the rows that its mean loss is taken over."""

    def __init__(self, model: Layer | Trainer, x: Any, y: Any, loss: str | Callable[..., Tensor] | None) -> None:
        if isinstance(model, Trainer):
            loss = model.objective.given if loss is None else loss
            model = model.model
        check_model(model, "gradients")
        weights = model.state_dict()  # drawn as the model's first call would, if they are not yet
        loss = "cross_entropy" if loss is None else loss
        trainer = Trainer(copy.deepcopy(model), loss, device="cpu", seed=0, precision="float64")
        trainer.model.load_state_dict(weights)
        rows, targets, _ = trainer._data(x, y, "gradients")
        back = trainer.backend
        self.model, self.objective = trainer.model, trainer.objective
        self.rows, self.targets = (Tensor(back.asarray(np.array(a)), back) for a in (rows, targets))
        self.leaves = {k: p for k, p in self.model.named_parameters().items() if p.stepped}
        if not self.leaves:
            raise ValueError("gradients: every weight is frozen, so there is none to take; set requires_grad = True")

    def output(self) -> Tensor:
        return self._loss(self.model(self.rows))

    def _loss(self, output: Tensor) -> Tensor:
        mean: Tensor = self.objective.total(output, self.targets) * (1 / len(self.rows))
        return mean

    @property
    def layers(self) -> list["_Affine"]:
        """The Dense layers' values forward: a = h W + b and Φ(a), with Φ′(a)."""
        h, found = self.rows.numpy(), list[_Affine]()
        for path, layer, activation in _affine_layers(self.model):
            found.append(_Affine.of(path, layer, activation, h))
            h = found[-1].h
        return found

    def output_gradient(self, h: Floats) -> Floats:
        """∂L/∂output, (rows, outputs), by the loss alone."""
        leaf = tensor(h, requires_grad=True)
        self._loss(leaf).backward()
        return np.zeros(h.shape) if leaf.grad is None else leaf.grad.numpy()

    def edges(self, variables: str) -> Iterator[Edge]:
        """The network unrolled to numbers, row by row: weights, units and L, with a node per unit for its pre- or its
        post-activation ("pre", "post") or one for each ("mixed")."""
        layers = self.layers
        dh = self.output_gradient(layers[-1].h)
        inner, outer = {"mixed": ("pre", "post"), "pre": ("pre", "pre"), "post": ("post", "post")}[variables]
        for row in range(len(self.rows)):
            for before, layer in zip((None, *layers), layers, strict=False):
                for j, slope in enumerate(layer.slope[row]):
                    unit, into = (inner, layer.path, row, j), slope if inner == "post" else 1.0
                    for i, w in layer.into(j):
                        yield (layer.weight, i, j), unit, layer.x[row, i] * into
                        if before is not None:
                            out = before.slope[row, i] if outer == "pre" else 1.0
                            yield (outer, before.path, row, i), unit, out * w * into
                    if layer.bias is not None:
                        yield (layer.bias, j), unit, into
                    if inner != outer:
                        yield unit, (outer, layer.path, row, j), slope
            for k, d in enumerate(dh[row]):
                yield (outer, layers[-1].path, row, k), "L", d * (layers[-1].slope[row, k] if outer == "pre" else 1.0)

    def sources(self) -> Iterator[tuple[str, int, Node]]:
        """For each element of each leaf its node."""
        for name, p in self.leaves.items():
            yield from ((name, k, (p, *at)) for k, at in enumerate(np.ndindex(p.shape)))

    def movable(self) -> dict[str, list[int]]:
        """The elements of each leaf that may be moved: not weights without an edge."""
        known = edges(self.model)
        return {name: np.flatnonzero(known.get(p, np.ones(p.shape))).tolist() for name, p in self.leaves.items()}


def _affine_layers(model: Layer) -> list[tuple[str, Dense, Row]]:
    """The Dense layers with their paths, each with its activation, or with that of the Activation behind it."""
    found: list[tuple[str, Dense, Row]] = []
    for path, layer in model._places():
        if type(layer) is Dense:
            found.append((path, layer, fused.activation_row(layer.activation)))
        elif type(layer) is Activation and found and found[-1][2].name == "identity":
            found[-1] = (*found[-1][:2], layer.row)
        elif type(layer) not in (Sequential, Dropout, InputNoise):  # the latter pass on what comes
            raise ValueError(f"gradients: layer {path or type(layer).__name__!r} is {layer.describe()}; this engine "
                             "takes Dense layers one after another, with their activations; 'plan', "
                             "'finite_difference' and 'central' take any")  # fmt: skip
    return found


@dataclass(eq=False)
class _Affine:
    """One Dense layer at its input x: h = Φ(x W + b), slope = Φ′(x W + b)."""

    path: str
    weight: Tensor
    bias: Tensor | None
    w: Floats
    edges: npt.NDArray[Any]  # 1 where there is one, else 0
    x: Floats
    h: Floats
    slope: Floats

    @classmethod
    def of(cls, path: str, layer: Dense, activation: Row, x: Floats) -> "_Affine":
        w = layer.weight.numpy()
        a = tensor(x @ w if layer.bias is None else x @ w + layer.bias.numpy(), requires_grad=True)
        y = ops.unary(a, activation)
        y.backward(np.ones(a.shape))
        slope = np.zeros(a.shape) if a.grad is None else a.grad.numpy()
        there = np.ones(w.shape) if layer.mask is None else layer.mask.numpy()
        return cls(path, layer.weight, layer.bias, w, there, x, y.numpy(), slope)

    def into(self, j: int) -> Iterable[tuple[int, float]]:
        """The weights into unit j, of the edges that there are."""
        return ((i, float(self.w[i, j])) for i in np.flatnonzero(self.edges[:, j]).tolist())


Subject = GraphAt | NetworkAt
