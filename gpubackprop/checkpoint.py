"""Model files: safetensors with the architecture as JSON beside the arrays; reading one executes nothing it holds."""

import inspect
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np

from gpubackprop.arena import Parameter
from gpubackprop.backends import get_backend
from gpubackprop.checks import warn
from gpubackprop.claims import exclusive
from gpubackprop.files import KINDS, Damaged, Safetensors, check_writable, write_file
from gpubackprop.formulas import ACTIVATIONS, Activation, checked_activation, cut, walk
from gpubackprop.layers import Concatenate, Dense, Scaler, Sequential
from gpubackprop.model import CLASSES, Layer, as_dtype, check_model
from gpubackprop.predictor import of_the_library

__all__ = ["check_suffix", "check_writable", "encode_model", "load_model", "read_metadata", "save_model", "write_file"]

FORMAT = 1
ENTRY = "gpubackprop"  # one metadata entry: safetensors writes several in random order, so equal models would differ
NAMES = ("feature_names", "target_names")  # of frames' columns, if the model knows any
HEADS = (None, "softmax", "sigmoid", "identity", "exp")
# What a file may ask for beside its own size, so that reading it, and predicting with what it holds, comes to an end.
ROWS, TEXTS, NODES = 100, 100_000, 5000  # registered activations; characters of their texts; nodes of their graphs
DEPTH = 100  # of layers and lists within each other
CALLS = 10_000  # of layers in a prediction: one that is shared, in one that is shared, is called 2ⁿ times
VALUES = 10_000_000  # of all outputs for a row: a Concatenate of a layer with itself doubles them
OTHER_FORMATS = {".pt", ".pth", ".bin", ".h5", ".hdf5", ".keras", ".onnx", ".pkl", ".pickle", ".joblib", ".npz", ".npy"}
BUILTIN = frozenset(ACTIVATIONS)  # this module is imported before a user can register a row

PathLike = str | os.PathLike[str]
Shapes = Mapping[str, tuple[int, ...]]


# ---- the doors -----------------------------------------------------------------------------------------------------


@exclusive
def save_model(model: Layer, path: PathLike, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write the model's architecture and weights to a safetensors file, replacing a file of that name in one step.

    The architecture is each layer's class and the arguments it was made with; functions and arrays given as `init` or
    `…_init`, and masks, are left out, since the values are stored. Rows of `register_activation` that the model uses
    travel along, and so does which parameters are frozen.
    `extra` is anything JSON holds; `read_metadata` gives it back. On any error the old file stands. A RuntimeWarning
    names the first parameter that is not finite: trained, or a statistic of the library's layers; NaN also elsewhere.
    """
    _check_path(path, "save_model")
    check_model(model, "save_model")
    check_suffix(path)
    check_writable(path)
    write_file(path, encode_model(model, extra))


def check_suffix(path: PathLike) -> None:
    """Raise if the name is that of another format."""
    stem, suffix = os.path.splitext(os.fspath(path))
    if suffix.lower() in OTHER_FORMATS:
        name = f"{os.path.basename(stem)}.safetensors"
        raise ValueError(f"{path}: names another format than the model's, safetensors; name it {name}")


def encode_model(model: Layer, extra: Mapping[str, Any] | None = None) -> bytes:
    """The bytes that `save_model` writes."""
    import json

    from safetensors.numpy import save

    from gpubackprop import __version__

    state = model.state_dict()
    header = {
        "format": FORMAT,
        "gpubackprop": __version__,
        "architecture": _encode(model, "model", []),
        "dtype": str(next((a.dtype for a in state.values()), np.dtype(model.dtype))),
        "head": model.output_kind,
        "frozen": [key for key, p in model.named_parameters().items() if p.trainable and not p.requires_grad],
        "activations": [
            {"name": r.name, "forward": r.forward, "derivative": r.derivative, "constants": dict(r.constants)}
            for r in _registered_rows(model)
        ],
        "extra": dict(extra or {}),
    } | {key: names for key in NAMES if (names := _written_names(model, key))}
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise TypeError(f"save_model: extra cannot be written as JSON ({error}); use numbers, text and lists") from None
    try:
        made = _shapes(_masked(_bounded(_build(json.loads(text)["architecture"], [])), state))
    except ValueError as error:
        raise ValueError(f"save_model: {error}; no file could hold the model") from None
    if difference := _difference({k: a.shape for k, a in state.items()}, made):
        remedy = "a file holds what constructors are given, so add layers and parameters there"
        raise ValueError(f"save_model: the model has {difference} when made anew; {remedy}")
    if name := _not_finite(model, state):
        what = "a NaN" if np.isnan(state[name]).any() else "an infinity"
        warn(f"save_model: {name!r} holds {what}, so predictions are of no use; save a model from before it "
                      f"diverged", RuntimeWarning)  # fmt: skip
    return bytes(save(state, {ENTRY: text}))


def load_model(path: PathLike, device: str = "auto") -> Layer:
    """The model in the file, on the device, its weights settled: training and `initialize(missing=True)` keep them.

    Layers of users' own classes need those classes imported before. The file is only read: its formulas pass through
    `register_activation`'s checks, and an activation of that name with another formula is an error.
    """
    _check_path(path, "load_model")
    backend = get_backend(device)
    where = f"load_model: {os.fspath(path)}"
    with _opened(path, where) as (header, file):
        stored = {k: one.shape for k, one in file.arrays.items()}
        model = _masked(_model(header, where), stored)
        if difference := _difference(stored, _shapes(model)):
            raise ValueError(f"{where}: it has {difference} in the model it describes; a layer's class has changed")
        _freeze(model, header, where)
        arrays = file.read(header["dtype"])
    for key, p in model.named_parameters().items():
        p.value, p.settled = arrays[key], True
    for _, layer in model.named_layers():
        if isinstance(layer, Dense | Scaler):  # whose masks and statistics were given, not drawn
            for p in (p for p in layer._own_parameters().values() if not p.trainable):
                p.init = p.value = None if p.value is None else p.value.copy()  # not the whole file
        if isinstance(layer, Dense) and layer.mask is not None:
            layer._argue(mask=layer.mask.value)  # in place of what stood for it
    return model.to(backend.device)


def read_metadata(path: PathLike) -> dict[str, Any]:
    """What the file says beside the arrays: format, gpubackprop (its version), architecture, dtype, head, frozen,
    activations, extra. Needs none of the model's classes."""
    _check_path(path, "read_metadata")
    with _opened(path, f"read_metadata: {os.fspath(path)}") as (header, _):
        return header


def _check_path(path: Any, where: str) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{where}: path is {type(path).__name__}; expected the name of a file, such as 'm.safetensors'")


def _written_names(model: Layer, key: str) -> list[Any] | None:
    """The names of columns as JSON holds them, if all are text and numbers."""
    names = [int(n) if isinstance(n, Integral) else n for n in getattr(model, key) or ()]  # NumPy's too
    if unknown := [n for n in names if not isinstance(n, str | int | float) or n != n]:
        kept = "a file keeps text and numbers, so that its model takes columns by position"
        warn(f"save_model: {key} has {cut(repr(unknown[0]))}; {kept}", RuntimeWarning)
        return None
    return names


def _not_finite(model: Layer, state: Mapping[str, Any]) -> str | None:
    """The first parameter that should be finite and is not; a user's layer may hold infinities that are not trained."""
    for path, layer in model.named_layers():
        ours = of_the_library(type(layer))
        for key, p in layer._own_parameters().items():
            name = f"{path}.{key}" if path else key
            if name not in state:
                continue
            good = np.isfinite(state[name]) if ours or p.trainable else ~np.isnan(state[name])
            if not good.all():
                return name
    return None


# ---- reading -------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: PathLike, where: str) -> Iterator[tuple[dict[str, Any], Safetensors]]:
    """The header and the open file; every fault of the file is an error that starts with `where`."""
    try:
        with open(path, "rb") as raw:
            file = Safetensors(raw)
            yield _header(file.metadata, where), file
    except Damaged as error:
        raise ValueError(f"{where}: is cut short, damaged or not safetensors ({error}); save it again") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: no such file") from None
    except OSError as error:
        raise type(error)(f"{where}: cannot be read ({error.strerror})") from None


def _header(metadata: Any, where: str) -> dict[str, Any]:
    import json

    text = metadata.get(ENTRY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        remedy = "load its arrays with safetensors.numpy.load_file and model.load_state_dict"
        raise ValueError(f"{where}: is safetensors but not a file of gb.save_model; {remedy}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its header is damaged ({error}); save it again") from None
    match header:
        case {"format": int(number)} if number > FORMAT:
            raise ValueError(
                f"{where}: has format {cut(str(number), 20)}, this version reads up to {FORMAT}; upgrade gpubackprop"
            )
        case {"format": int(), "architecture": _, "dtype": str(), "head": None | str(), "activations": list(),
              "extra": dict()}:  # fmt: skip
            return dict(header)
    raise ValueError(f"{where}: its header is damaged (an entry is missing or of the wrong kind); save it again")


def _model(header: dict[str, Any], where: str) -> Layer:
    """The model that the header describes, without values; if there is none, its activations are forgotten too."""
    dtype, head = header["dtype"], header["head"]
    added: list[str] = []
    try:
        if dtype not in KINDS:
            raise ValueError(f"it has the dtype {cut(repr(dtype))}, expected {' or '.join(KINDS)}; save it again")
        _register(header["activations"], added)
        model = _bounded(_build(header["architecture"], []))
        if np.dtype(as_dtype(model.dtype, type(model).__name__)) != dtype:
            model.dtype = dtype
        if head not in HEADS:
            raise ValueError(f"its header is damaged (the unknown head {cut(repr(head))}); save it again")
        for key in NAMES:
            names = header.get(key)
            if names is not None and not (
                isinstance(names, list) and all(isinstance(n, str | int | float) for n in names)
            ):
                raise ValueError(f"its header is damaged ({key} is no list of names); save it again")
            if key == "feature_names" and names and model.inputs not in (None, len(names)):
                raise ValueError(
                    f"its header is damaged ({len(names):,} names of {model.inputs:,} columns); save it again"
                )
            if names:
                setattr(model, key, tuple(names))
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        for name in added:
            ACTIVATIONS.pop(name, None)
        raise ValueError(f"{where}: {cut(str(error), 1000)}") from error
    if head is not None:
        model.output_kind = head
    return model


def _register(rows: list[Any], added: list[str]) -> None:
    """Register the rows of a file, which are not too many and not too long; `added` are the names that are new."""
    if len(rows) > ROWS:
        raise ValueError(f"it has {len(rows):,} activations of its own, expected at most {ROWS}")
    texts = nodes = 0
    for given in rows:
        match given:
            case {
                "name": str(name),
                "forward": str(forward),
                "derivative": str(derivative),
                "constants": dict(more),
            } if all(key.isidentifier() for key in more) and not {"name", "forward", "derivative"} & {*more}:
                texts += len(name) + len(forward) + len(derivative) + sum(map(len, more))
            case _:
                raise ValueError("its header is damaged (an activation is not one); save it again")
        if texts > TEXTS:
            raise ValueError(f"its activations have more than {TEXTS:,} characters")
        row = checked_activation(name, forward, derivative, **more)
        nodes += len(walk([row.forward_graph(), row.backward_graph()]))
        if nodes > NODES:
            raise ValueError(f"its activations have more than {NODES:,} operations")
        if name not in ACTIVATIONS:
            added.append(name)
        ACTIVATIONS[name] = row


def _bounded(model: Any) -> Layer:
    """The model, if it is one and a prediction of it is bounded."""
    if not isinstance(model, Layer):
        raise ValueError("its header is damaged (it describes no layer); save it again")
    if (calls := _calls(model, {})) > CALLS:
        got = f"would be called {cut(f'{calls:,}', 20)} times in a prediction"
        raise ValueError(f"its layers, as they are shared, {got}, expected at most {CALLS:,}")
    values = [0]
    _columns(model, model.inputs or 1, values)
    if values[0] > VALUES + sum(math.prod(shape) for shape in _shapes(model).values()):
        raise ValueError(
            f"its layers would give {cut(f'{values[0]:,}', 20)} values for a row, expected at most {VALUES:,}"
        )
    return model


def _calls(layer: Layer, known: dict[int, int]) -> int:
    """How many layers a prediction calls, if each calls its children once."""
    if id(layer) not in known:
        known[id(layer)] = 1 + sum(_calls(child, known) for child in layer.children().values())
    return known[id(layer)]


def _columns(layer: Layer, columns: int, values: list[int]) -> int:
    """The columns of the layer's output, which is added to the values."""
    if isinstance(layer, Dense):
        columns = layer.weight.shape[1]
    elif isinstance(layer, Concatenate):
        columns = sum(_columns(branch, columns, values) for branch in layer.layers)
    elif isinstance(layer, Sequential):
        for inner in layer.layers:
            columns = _columns(inner, columns, values)
    values[0] += columns
    return columns


def _freeze(model: Layer, header: dict[str, Any], where: str) -> None:
    """Freeze what was frozen and nothing else; of files that do not say, what the constructors froze."""
    trained = {key: p for key, p in model.named_parameters().items() if p.trainable}
    frozen = header.get("frozen", [key for key, p in trained.items() if not p.requires_grad])
    if not isinstance(frozen, list) or any(not isinstance(key, str) or key not in trained for key in frozen):
        raise ValueError(f"{where}: its header is damaged (frozen is no list of trained parameters); save it again")
    keys = set(frozen)
    for key, p in trained.items():
        p.requires_grad = key not in keys


def _masked(model: Layer, keys: Collection[str]) -> Layer:
    """The model with masks where there are arrays for them: what makes a layer need not know that it was pruned."""
    layers: dict[Parameter, dict[str, Dense]] = {}
    for path, layer in model.named_layers():
        if isinstance(layer, Dense):
            layers.setdefault(layer.weight, {})[f"{path}.mask" if path else "mask"] = layer
    for weight, same in layers.items():
        if all(layer.mask is None for layer in same.values()) and any(key in keys for key in same):
            mask = Parameter(weight.shape, "ones", trainable=False)
            for layer in same.values():
                layer.mask = mask
    return model


def _shapes(model: Layer) -> Shapes:
    return {k: p.shape for k, p in model.named_parameters().items()}


def _difference(stored: Shapes, expected: Shapes) -> str | None:
    """The first leaf in which the two differ, with both shapes, to follow "has" and to go before "in …"."""
    for key in {**expected, **stored}:
        if stored.get(key) != expected.get(key):
            a, b = (f"of shape {shapes[key]}" if key in shapes else "absent" for shapes in (stored, expected))
            return f"{cut(repr(key))} {cut(a)}, but {cut(b)}"
    return None


# ---- the architecture ----------------------------------------------------------------------------------------------


def _encode(value: Any, where: str, seen: list[Layer]) -> Any:
    """The value as JSON; layers by class name and arguments, one met before by its number (a shared layer)."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.bool_() | np.number():
            return value.item()
        case np.dtype() | type() if isinstance(value, np.dtype) or issubclass(value, np.generic | float):
            return np.dtype(value).name
        case list():
            return [_encode(v, where, seen) for v in value]
        case tuple():
            return {"tuple": [_encode(v, where, seen) for v in value]}
        case dict():
            return {"dict": [[_encode(v, where, seen) for v in pair] for pair in value.items()]}
        case Layer():
            return _encode_layer(value, seen)
    got = f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else f"of type {type(value).__name__}"
    remedy = "a model file holds numbers, text, lists and layers, and leaves out arguments named init, …_init or mask"
    raise TypeError(f"save_model: {where} is {got}; {remedy}")


def _encode_layer(layer: Layer, seen: list[Layer]) -> Any:
    for i, other in enumerate(seen):
        if other is layer:
            return {"same": i}
    kind = type(layer)
    name = next((k for k, c in CLASSES.items() if c is kind), None)
    if name is None:
        raise TypeError(f"save_model: the class {kind.__name__} was defined anew after the layer; make the layer again")
    declared = list(inspect.signature(kind.__init__).parameters.values())[1:]
    defaults = {p.name: "zeros" if p.default is p.empty else p.default for p in declared}

    def encoded(key: str, value: Any) -> Any:
        drawn = callable(value) or isinstance(value, np.ndarray)
        if drawn and (key == "init" or key.endswith("_init")):
            value = defaults.get(key, "zeros")
        if key == "mask" and value is not None:
            value = "ones"
        return _encode(value, f"argument {key!r} of {kind.__name__}", seen)

    arguments, keywords = layer.arguments
    names = [p.name for p in declared if p.kind is not p.KEYWORD_ONLY]
    names += names[-1:] * len(arguments)  # the rest are those of *arguments
    description = {
        "layer": name,
        "arguments": [encoded(key, value) for key, value in zip(names, arguments, strict=False)],
        "keywords": {key: encoded(key, value) for key, value in keywords.items()},
    }
    seen.append(layer)
    return description


def _build(data: Any, made: list[Layer], depth: int = DEPTH) -> Any:
    """What `_encode` encoded; only classes of CLASSES are made, by their constructors."""
    if depth == 0:
        raise ValueError(f"its header is nested too deeply, expected at most {DEPTH} layers or lists in each other")

    def inner(value: Any) -> Any:
        return _build(value, made, depth - 1)

    match data:
        case int() if abs(data) >= 2**63:
            raise ValueError(f"its architecture has the number {cut(str(data), 30)}, expected one of 64 bits")
        case None | bool() | int() | float() | str():
            return data
        case list():
            return [inner(v) for v in data]
        case {"tuple": list(items)}:
            return tuple(inner(v) for v in items)
        case {"dict": list(pairs)}:
            return {inner(k): inner(v) for k, v in pairs}
        case {"same": int(i)} if 0 <= i < len(made):
            return made[i]
        case {"layer": str(name), "arguments": list(arguments), "keywords": dict(keywords)}:
            given = [inner(v) for v in arguments], {k: inner(v) for k, v in keywords.items()}
            made.append(_make(name, *given))
            return made[-1]
    raise ValueError("its architecture is damaged; save it again")


def _make(name: str, arguments: list[Any], keywords: dict[str, Any]) -> Layer:
    if name not in CLASSES:
        module, _, _ = name.rpartition(":")
        known = ", ".join(k for k in CLASSES if ":" not in k)
        remedy = f"import {cut(repr(module))}, which defines it, first" if module else "a newer gpubackprop may have it"
        if module == "__main__":
            remedy = "it was defined in the script that saved it; put the class into a module of its own"
        raise ValueError(f"unknown layer class {cut(repr(name))}; {remedy} (built in are {known})")
    try:
        return CLASSES[name](*arguments, **keywords)
    except Exception as error:  # a user's constructor raises what it likes
        reason = f"{type(error).__name__}: {cut(str(error), 500)}"
        raise ValueError(f"the layer {name} cannot be made ({reason})") from error


def _registered_rows(model: Layer) -> list[Activation]:
    """The rows of register_activation that a layer was given or names in an attribute."""
    found: set[str] = set()
    for _, layer in model.named_layers():
        arguments, keywords = layer.arguments
        for value in (*arguments, *keywords.values(), *vars(layer).values()):
            if isinstance(value, str | Activation):
                found.add(value if isinstance(value, str) else value.name)
    return [ACTIVATIONS[name] for name in sorted((found & ACTIVATIONS.keys()) - BUILTIN)]
