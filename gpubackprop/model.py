"""What every layer and model is: declared parameters, a tree of sublayers, one arena, a forward of operations."""

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpubackprop import initializers, ops
from gpubackprop.arena import Arena, Parameter
from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Backend, Buffer, StepTable, is_on_device, setting
from gpubackprop.claims import exclusive, refuse_while_trained, using
from gpubackprop.data import as_features, as_seed, by_name
from gpubackprop.formulas import cut
from gpubackprop.names import hint, of_pytorch, refuse_keywords
from gpubackprop.observe import observer
from gpubackprop.plan import recording, within
from gpubackprop.predictor import Predictor, of_the_library
from gpubackprop.tensor import FLOATS, Tensor

__all__ = ["CLASSES", "Layer", "Mode", "check_model", "current_mode", "mode", "seed_or_fresh", "training"]


# ---- training or inference -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """Whether layers train, and what random layers key their draws by."""

    training: bool = False
    seed: int = 0
    step: StepTable | int = 0


_mode: ContextVar[Mode] = ContextVar("mode", default=Mode())  # noqa: B039 (frozen)


def current_mode() -> Mode:
    """The mode in force."""
    return _mode.get()


def mode(new: Mode) -> AbstractContextManager[None]:
    """Layers called inside behave in this mode."""
    return setting(_mode, new)


def training(seed: int = 0, step: StepTable | int = 0) -> AbstractContextManager[None]:
    """Layers called inside `with training():` behave as in training: dropout draws, keyed by seed and step, and
    BatchNorm takes batch statistics. Outside it they infer."""
    return mode(Mode(True, seed, step))


# ---- the base ------------------------------------------------------------------------------------------------------

NESTED = (list, tuple, dict)
PLAIN = {type(None), bool, int, float, str}
NO_MEMBERS = ("arguments", "_arenas", "_feature_names", "target_names")  # attributes that hold no layers or parameters


class _Eager(threading.local):
    """Whether this thread is in a call of a layer."""

    within = False


_eager = _Eager()

CLASSES: dict[str, type["Layer"]] = {}  # by the name that model files use


class Layer:
    """Base of all layers, users' too: make Parameters and sublayers in `__init__`, write `forward(x)` in operations.

    Any layer is a model: it can be called with an array or a tensor (batch, features), trained and saved. Calling the
    outermost layer draws the weights (seed 0) if neither `initialize`, a Trainer nor `load_state_dict` set them.

    >>> class Gain(Layer):
    ...     def __init__(self, columns):
    ...         self.gain = Parameter((columns,), "ones")
    ...     def forward(self, x):
    ...         return x * self.gain
    """

    dtype: npt.DTypeLike = "float32"
    output_kind: str | None = None  # what makes predictions of outputs: "softmax", "sigmoid", …; the Trainer sets it
    target_names: tuple[Any, ...] | None = None  # of the columns of y, as feature_names of x
    _feature_names: tuple[Any, ...] | None = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    seed: int | None = None  # of the drawn weights; None while they are not drawn
    _arenas: tuple[Arena, Arena] | None = None  # trained and not
    _bound = False  # whether this layer's parameters lie in arenas, its own or an outer layer's
    _path = ""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        builtin = of_the_library(cls)
        CLASSES[cls.__name__ if builtin else f"{cls.__module__}:{cls.__qualname__}"] = cls
        _, *given = signature(cls.__init__).parameters.values()
        cls.__signature__ = Signature(given)  # type: ignore[attr-defined]  # for help(), which would show that of __new__

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Layer":
        given = cls.__signature__.parameters  # type: ignore[attr-defined]
        if not any(p.kind is p.VAR_KEYWORD for p in given.values()):
            refuse_keywords(cls.__name__, keywords, given)
        self = super().__new__(cls)
        self.arguments = arguments, keywords  # what rebuilds the layer: the architecture of a model file
        return self

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if meant := hint("model", name):
                raise AttributeError(f"{type(self).__name__}: a model has no {name}{meant}", name=name, obj=self)
            return object.__getattribute__(self, name)  # raises what it raised before

    def _argue(self, **changed: Any) -> None:
        """Change what the layer is said to be made with, as far as its class takes arguments of these names."""
        arguments, keywords = list(self.arguments[0]), dict(self.arguments[1])
        names = list(signature(type(self).__init__).parameters)[1:]
        for name, value in changed.items():
            if name in names[: len(arguments)]:
                arguments[names.index(name)] = value
            elif name in names:
                keywords[name] = value
        self.arguments = tuple(arguments), keywords

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; subclasses write it."""
        raise TypeError(f"{type(self).__name__} has no forward(x); write one that returns a tensor")

    def constrain(self) -> Iterable[Parameter]:
        """Bind launches that follow every update of the weights, and return the parameters whose master they write;
        a layer that bounds its weights writes it."""
        return ()

    def __call__(self, x: Any) -> Tensor:
        if not self._bound:
            self._own()
        if not isinstance(x, Tensor):
            x = self._as_input(x)
        expected = vars(self).get("_inputs")
        if expected is not None and (x.ndim != 2 or x.shape[1] != expected):
            got = f"{x.shape[1]} columns" if x.ndim == 2 else f"shape {x.shape}"
            where = f"layer {self._path!r}" if self._path else type(self).__name__
            raise ValueError(f"{where}: x has {got} but {self.describe()} expects {expected} columns")
        if (watcher := observer()) is not None:
            return watcher.call(self, x)
        if recording() is None:
            return self.forward(x) if _eager.within else self._alone(x)
        with within(self._path):
            return self.forward(x)

    def _alone(self, x: Tensor) -> Tensor:
        """The output, while no other thread changes the parameters: sublayers are called within."""
        with using("call", self.shared()):
            _eager.within = True
            try:
                return self.forward(x)
            finally:
                _eager.within = False

    @property
    def inputs(self) -> int | None:
        """Columns of x the layer expects, if it cares; a layer of one's own may assign it."""
        for _, layer in self.named_layers():
            plain = layer is self or type(layer).inputs is Layer.inputs
            given: int | None = vars(layer).get("_inputs") if plain else layer.inputs
            if given:
                return given
        return None

    @inputs.setter
    def inputs(self, columns: int) -> None:
        self._inputs = columns

    @property
    def feature_names(self) -> tuple[Any, ...] | None:
        """The names of x's columns, in the order that the weights have them; the first fit on a frame sets them.

        A frame with the same names is then taken by name, whatever their order; one with others is an error. Arrays,
        and frames whose columns are 0, 1, 2, …, go by position; with None so do all. Model files keep names of text.
        """
        return self._feature_names or next((n for layer in self._takers_of_x() if (n := layer.feature_names)), None)

    @feature_names.setter
    def feature_names(self, names: Iterable[Any] | None) -> None:
        given = None if names is None else tuple(names)
        if isinstance(names, str):
            raise TypeError(f"feature_names: a list of the columns' names expected, or None, got {names!r}")
        self._feature_names = given
        for layer in self._takers_of_x():
            layer.feature_names = given

    def _takers_of_x(self) -> "Sequence[Layer]":
        """The layers below that take this layer's x as it is, as far as that is known."""
        return ()

    # ---- the tree

    def _members(self) -> list[tuple[str, "Layer | Parameter"]]:
        """The layers and parameters among the attributes, by name; those in a list, tuple or dict, however nested, by
        name and position or key."""
        found: list[tuple[str, Layer | Parameter]] = []
        for name, value in vars(self).copy().items():  # another thread may add an attribute
            if type(value) in PLAIN:
                continue
            if isinstance(value, MEMBERS):
                found.append((name, value))
            elif isinstance(value, NESTED) and name not in NO_MEMBERS:
                found += [(key, item) for key, item in _flat(name, value) if isinstance(item, MEMBERS)]
        return found

    def _own_parameters(self) -> dict[str, Parameter]:
        """Parameters by attribute name, without those of sublayers."""
        return {key: p for key, p in self._members() if isinstance(p, Parameter)}

    def children(self) -> dict[str, "Layer"]:
        """Sublayers by attribute name; those in a list, tuple or dict by attribute and position or key."""
        return {key: layer for key, layer in self._members() if isinstance(layer, Layer)}

    def _met(self, path: str, seen: dict[int, str]) -> "Iterator[Met]":
        """Every layer below, and once more for each further place that it has."""
        first = seen.get(id(self))
        members = self._members() if first is None else []
        seen.setdefault(id(self), path)
        yield Met(path, self, first, members)
        for key, member in members:
            if isinstance(member, Layer):
                yield from member._met(f"{path}.{key}" if path else key, seen)

    def named_layers(self, path: str = "") -> Iterator[tuple[str, "Layer"]]:
        """This layer and all below it, with dotted paths, in order; one that is shared once, under its first path."""
        return ((met.path, met.layer) for met in self._met(path, {}) if met.first is None)

    def _places(self, path: str = "") -> Iterator[tuple[str, "Layer"]]:
        """Every place of this layer and of all below it, in order: one for each call of a child."""
        yield path, self
        for key, layer in self.children().items():
            yield from layer._places(f"{path}.{key}" if path else key)

    def named_parameters(self) -> dict[str, Parameter]:
        """Every parameter by its dotted path, trainable or not; one that is shared stands under its first path."""
        found: dict[Parameter, str] = {}
        for path, _, _, members in self._met("", {}):
            for key, p in members:
                if isinstance(p, Parameter) and p not in found:
                    found[p] = f"{path}.{key}" if path else key
        return {key: p for p, key in found.items()}

    def shared(self) -> list[object]:
        """The objects that threads using the layer at once share: the layer and its parameters."""
        return [self, *self.named_parameters().values()]

    @property
    def parameter_count(self) -> int:
        """Number of trained weights."""
        return sum(math.prod(p.shape) for p in self.named_parameters().values() if p.trainable)

    # ---- the arena

    @exclusive
    def to(self, device: str) -> "Layer":
        """Move the parameters, with their values, to the device; what was recorded before is recorded anew."""
        if self.arena.backend is not get_backend(device):
            self._lay_out(device)
        return self

    def _lay_out(self, device: str) -> tuple[Arena, Arena]:
        """One arena for the trained parameters and one for the others; values are kept, missing ones drawn (seed 0)."""
        as_dtype(self.dtype, type(self).__name__)
        self.check_unpinned(type(self).__name__)
        named, backend = self.named_parameters(), get_backend(device)
        undrawn = [k for k, p in named.items() if p.host_value() is None]
        trained, others = ({k: p for k, p in named.items() if p.stepped is t} for t in (True, False))
        self._arenas = arenas = Arena(trained, backend, self.dtype), Arena(others, backend, self.dtype)
        self._draw(0, undrawn)
        for path, layer in self.named_layers():
            layer._path = path
            if layer is not self:
                layer._arenas = None  # what they held has moved
        for _, layer in self.named_layers():
            layer._bound = True  # last, because other threads go by it
        return arenas

    def _own(self) -> tuple[Arena, Arena]:
        """This layer's arenas, with all its parameters: laid out anew if another model or a change took some away."""
        with using("lay out", self.shared()):  # threads that use a model first must not lay it out at once
            own, arenas = self.named_parameters().values(), self._arenas
            if (
                arenas is None
                or any(p.home is not arenas[0 if p.stepped else 1] for p in own)
                or sum(len(a.parameters) for a in arenas) != len(own)
            ):
                return self._lay_out(next((p.home.backend.device for p in own if p.home is not None), "cpu"))
            return arenas

    @property
    def arena(self) -> Arena:
        """The trained parameters."""
        return self._own()[0]

    @property
    def statistics(self) -> Arena:
        """The parameters that training does not step."""
        return self._own()[1]

    def homes(self) -> tuple[Arena, ...]:
        """The arenas that hold the parameters: this model's, or those of a model it is a part of."""
        homes = dict.fromkeys(p.home for p in self.named_parameters().values())
        if not self._bound or None in homes:  # no value yet, or the model it was a part of is gone
            homes = dict.fromkeys(self._own())
        return tuple(h for h in homes if h is not None)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Inside, the parameters stay where they are: what would lay them out anew is an error."""
        homes = self._own()
        for home in homes:
            home.pinned = True
        try:
            yield
        finally:
            for home in homes:
                home.pinned = False

    def check_unpinned(self, where: str) -> None:
        """Raise if a fit is training any of the parameters."""
        if any(p.home is not None and p.home.pinned for p in self.named_parameters().values()):
            what = "fit is training the model, and its steps are recorded with the parameters as they are"
            raise RuntimeError(f"{where}: {what}; prune, freeze, move or convert it between fits, not in a callback")

    @property
    def backend(self) -> Backend:
        """Where the parameters live."""
        homes = self.homes()
        return homes[0].backend if homes else get_backend("cpu")

    @exclusive
    def initialize(self, seed: int | None = None, *, missing: bool = False) -> "Layer":
        """Draw every parameter, keyed by the seed and its name; None draws a fresh seed. `.seed` records it.

        With missing=True only those that neither `initialize`, training nor `load_state_dict` set before.
        """
        seed = seed_or_fresh(seed, "initialize")
        _ = self.arena
        named = self.named_parameters()
        keys = [k for k, p in named.items() if not (missing and p.settled)]
        self._draw(seed, keys)
        for key in keys:
            named[key].settled = True
        if keys:
            self.seed = seed
        return self

    def _draw(self, seed: int, keys: Iterable[str]) -> None:
        named = self.named_parameters()
        for key in keys:
            p = named[key]
            p.backend.write(p.buffer, initializers.draw(p.init, p.shape, seed, key))
        self._settle()

    def settle(self) -> None:
        """Called after values were drawn or loaded: what must hold of a layer's parameters is put right here."""

    def _settle(self) -> None:
        for _, layer in self.named_layers():
            layer.settle()

    @exclusive
    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Every parameter as a NumPy array (a copy), by name."""
        _ = self._bound or self._own()
        return {k: p.backend.to_numpy(p.buffer) for k, p in self.named_parameters().items()}

    @exclusive
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Write the arrays into the parameters, in place; if a name or shape is not the model's, write nothing."""
        if not isinstance(state, Mapping):
            raise TypeError(f"load_state_dict: a dict of arrays expected, got {type(state).__name__}")
        _ = self._bound or self._own()
        named = self.named_parameters()
        if missing := [k for k in named if k not in state]:
            kept = "; gb.rewind keeps the masks that there are" * missing[0].endswith("mask")
            raise ValueError(f"load_state_dict: {missing[0]!r} is missing; the model has {', '.join(named)}{kept}")
        if extra := [k for k in state if k not in named]:
            masked = "; prune it alike, or load the file with gb.load_model" * extra[0].endswith("mask")
            near = masked or hint("parameter", extra[0], named)
            raise ValueError(f"load_state_dict: the model has no {extra[0]!r}; it has {', '.join(named)}{near}")
        values = {k: np.asarray(state[k]) for k in named}
        for k, value in values.items():
            if value.shape != named[k].shape:
                raise ValueError(f"load_state_dict: {k!r} has shape {value.shape} but the model's is {named[k].shape}")
            if value.dtype.kind not in "fiub":
                raise TypeError(f"load_state_dict: {k!r} has dtype {value.dtype}; expected numbers")
            with np.errstate(over="ignore"):
                cast = value.astype(named[k].dtype)
            if (np.isinf(cast) & np.isfinite(value)).any():
                remedy = "make the model with dtype='float64'"
                raise ValueError(f"load_state_dict: {k!r} has values too large for {cast.dtype}; {remedy}")
            values[k] = cast
        for k, p in named.items():
            p.backend.write(p.buffer, values[k])
            p.settled = True
        self._settle()

    def __getstate__(self) -> dict[str, Any]:
        refuse_while_trained("pickle", self.shared)
        return {k: v for k, v in vars(self).copy().items() if k not in ("_arenas", "_bound", "_predictor")}

    # ---- inference

    def _as_input(self, x: Any) -> Tensor:
        if isinstance(x, tuple | list) and any(isinstance(part, Tensor) for part in x):
            where = f"layer {self._path!r}" if self._path else type(self).__name__
            remedy = "pass one of them, or put them side by side with gb.concatenate(…, axis=1)"
            raise TypeError(f"{where}: x is a {type(x).__name__} of {len(x)}; expected one tensor: {remedy}")
        homes = self.homes()
        x = by_name(x, self.feature_names, self._path or type(self).__name__)
        rows = as_features(x, homes[0].dtype if homes else self.dtype, self.inputs, self._path or type(self).__name__)
        return Tensor(self.backend.asarray(np.array(rows)), self.backend)  # the caller may write over x

    def predict(self, x: Any) -> Any:
        """The raw output for every row of x (logits, for a classifier), without training behaviour; on the device for
        an array that lies there, else in NumPy."""
        out = self._predict(x)
        return out if is_on_device(x) or isinstance(out, np.ndarray) else self.backend.to_numpy(out)

    @exclusive
    def _predict(self, x: Any, checked: bool = False) -> Buffer:
        if "_predictor" not in vars(self):
            self._predictor = Predictor()
        with mode(Mode()):  # what it records must infer, also inside `with training()`
            return self._predictor(self, x, checked)

    def predict_proba(self, x: Any) -> npt.NDArray[Any]:
        """Class probabilities: softmax over several outputs, the logistic sigmoid of one (or of each, for bce)."""
        return self._probabilities(self.predict(x), "predict_proba")

    def predict_classes(self, x: Any) -> npt.NDArray[np.int64]:
        """The most probable class of each row; of sigmoid outputs whether each exceeds ½, as (n,) if there is one."""
        out = self.predict(x)
        if self._head(out, "predict_classes") == "softmax":
            return np.asarray(out.argmax(1), np.int64)
        return np.asarray(out > 0, np.int64).reshape(-1 if out.shape[1] == 1 else out.shape)

    def _head(self, out: npt.NDArray[Any], where: str) -> str:
        if self.output_kind in ("identity", "exp"):
            remedy = (
                "use predict" if self.output_kind == "identity" else "np.exp(model.predict(x)) is the expected count"
            )
            raise ValueError(f"{where}: the model was trained for regression; {remedy}")
        return self.output_kind or ("softmax" if out.shape[1] > 1 else "sigmoid")

    def _probabilities(self, out: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
        function = ops.softmax if self._head(out, where) == "softmax" else ops.sigmoid
        return function(Tensor(out, get_backend("cpu"))).numpy()

    # ---- printing

    def describe(self) -> str:
        """One line about the layer itself."""
        arguments, keywords = self.arguments
        parts = [_short(a) for a in arguments if not isinstance(a, Layer)]
        parts += [f"{k}={_short(v)}" for k, v in keywords.items() if not isinstance(v, Layer)]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __repr__(self) -> str:
        rows = [("layer", "", "parameters", "shapes")]
        for path, layer, first, _ in self._met("", {}):
            own = layer._own_parameters().values()
            if first is not None:
                rows.append((path, f"the same as {first}", "", ""))
            elif own or (path and not layer.children()):
                count = sum(math.prod(p.shape) for p in own if p.trainable)
                rows.append((path, layer.describe(), f"{count:,}", " ".join("×".join(map(str, p.shape)) for p in own)))
        if not self.children():
            return self.describe()
        a, b, c = (max(len(r[i]) for r in rows) for i in range(3))
        lines = [f"  {p:<{a}}  {d:<{b}}  {n:>{c}}  {s}".rstrip() for p, d, n, s in rows]
        return "\n".join(
            [f"{type(self).__name__}: {self.parameter_count:,} parameters, {np.dtype(self.dtype)}", *lines]
        )


class Met(NamedTuple):
    """A place of a layer in a model: its path, and, if it stands in several, at the others the first of them."""

    path: str
    layer: Layer
    first: str | None
    members: list[tuple[str, Layer | Parameter]]


MEMBERS = (Layer, Parameter)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, NESTED):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}.{key}", item)
    else:
        yield name, value


def _short(argument: Any) -> str:
    if isinstance(argument, np.ndarray):
        return f"array{argument.shape}"
    return str(getattr(argument, "__name__", argument))


def as_dtype(dtype: npt.DTypeLike, where: str) -> npt.DTypeLike:
    """The dtype, if models may have it."""
    try:
        known = not (isinstance(dtype, str) and len(dtype) > 16) and np.dtype(dtype) in FLOATS  # "f4,f4,…" takes long
    except (TypeError, ValueError, SyntaxError):
        known = False
    if not known:
        raise TypeError(f"{where}: dtype {cut(str(dtype))} is not supported; choose from float32, float64")
    return dtype


def check_model(model: Any, where: str) -> None:
    """Raise unless it is a layer."""
    if not isinstance(model, Layer):
        got = f"{of_pytorch(model) or type(model).__name__}; expected a layer, such as gb.mlp([64, 128, 10])"
        if isinstance(getattr(model, "model_", None), Layer):
            raise TypeError(f"{where}: model is {type(model).__name__}; expected a layer: pass its model_")
        raise TypeError(f"{where}: model is {got}{hint('gb', model)}")


def seed_or_fresh(seed: Any, where: str) -> int:
    """The seed, checked; for None one from the system's entropy."""
    given = as_seed(seed, where)
    return given if given is not None else int(np.random.SeedSequence().generate_state(1)[0])
