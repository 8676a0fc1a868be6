"""Model files: safetensors with the architecture as JSON beside the arrays; reading one executes nothing it holds."""

import inspect
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from gpubackprop.arena import Parameter
from gpubackprop.backends import get_backend
from gpubackprop.formulas import ACTIVATIONS, Activation, register_activation
from gpubackprop.layers import Dense, Scaler
from gpubackprop.model import CLASSES, Layer, check_model
from gpubackprop.threads import exclusive

__all__ = ["check_writable", "load_model", "read_metadata", "save_model", "write_file"]

FORMAT = 1
ENTRY = "gpubackprop"  # one metadata entry: safetensors writes several in random order, so equal models would differ
NAMES = ("feature_names", "target_names")  # of frames' columns, if the model knows any
HEADS = (None, "softmax", "sigmoid", "identity", "exp")
BUILTIN = frozenset(ACTIVATIONS)  # this module is imported before a user can register a row

PathLike = str | os.PathLike[str]
Shapes = Mapping[str, tuple[int, ...]]


# ---- the doors -----------------------------------------------------------------------------------------------------


@exclusive
def save_model(model: Layer, path: PathLike, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write the model's architecture and weights to a safetensors file, replacing a file of that name in one step.

    The architecture is each layer's class and the arguments it was made with; functions and arrays given as `init` or
    `…_init`, and masks, are left out, since the values are stored. Rows of `register_activation` that the model uses
    travel along.
    `extra` is anything JSON holds; `read_metadata` gives it back. On any error the old file stands. A RuntimeWarning
    names the first parameter that is not finite: trained, or a statistic of the library's layers; NaN also elsewhere.
    """
    _check_path(path, "save_model")
    check_model(model, "save_model")
    import json

    from safetensors.numpy import save

    from gpubackprop import __version__

    check_writable(path)
    state = model.state_dict()
    header = {
        "format": FORMAT,
        "gpubackprop": __version__,
        "architecture": _encode(model, "model", []),
        "dtype": str(next((a.dtype for a in state.values()), np.dtype(model.dtype))),
        "head": model.output_kind,
        "activations": [
            {"name": r.name, "forward": r.forward, "derivative": r.derivative, "constants": dict(r.constants)}
            for r in _registered_rows(model)
        ],
        "extra": dict(extra or {}),
    } | {key: list(names) for key in NAMES if (names := getattr(model, key))}
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise TypeError(f"save_model: extra cannot be written as JSON ({error}); use numbers, text and lists") from None
    made = _shapes(_masked(_build(json.loads(text)["architecture"], []), state))
    if difference := _difference({k: a.shape for k, a in state.items()}, made):
        remedy = "a file holds what constructors are given, so add layers and parameters there"
        raise ValueError(f"save_model: the model has {difference} when made anew; {remedy}")
    if name := _not_finite(model, state):
        what = "a NaN" if np.isnan(state[name]).any() else "an infinity"
        warnings.warn(f"save_model: {name!r} holds {what}, so predictions are of no use; save a model from before it "
                      f"diverged", RuntimeWarning, stacklevel=2)  # fmt: skip
    write_file(path, save(state, {ENTRY: text}))


def load_model(path: PathLike, device: str = "auto") -> Layer:
    """The model in the file, on the device, its weights settled: training and `initialize(missing=True)` keep them.

    Layers of users' own classes need those classes imported before. The file is only read: its formulas pass through
    `register_activation`'s checks, and an activation of that name with another formula is an error.
    """
    _check_path(path, "load_model")
    backend = get_backend(device)
    where = f"load_model: {os.fspath(path)}"
    with _opened(path, where) as (header, file):
        model = _masked(_model(header, where), file.keys())
        stored = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118 (no mapping)
        if difference := _difference(stored, _shapes(model)):
            raise ValueError(f"{where}: it has {difference} in the model it describes; a layer's class has changed")
        for key, p in model.named_parameters().items():
            p.value, p.settled = file.get_tensor(key), True
    for _, layer in model.named_layers():
        if isinstance(layer, Dense | Scaler):  # whose masks and statistics were given, not drawn
            for p in (p for _, p in layer._members() if isinstance(p, Parameter) and not p.trainable):
                p.init = p.value
        if isinstance(layer, Dense) and layer.mask is not None:
            layer._argue(mask=layer.mask.value)  # in place of what stood for it
    return model.to(backend.device)


def read_metadata(path: PathLike) -> dict[str, Any]:
    """What the file says beside the arrays: format, gpubackprop (its version), architecture, dtype, head, activations,
    extra. Needs none of the model's classes."""
    _check_path(path, "read_metadata")
    with _opened(path, f"read_metadata: {os.fspath(path)}") as (header, _):
        return header


def _check_path(path: Any, where: str) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{where}: path is {type(path).__name__}; expected the name of a file, such as 'm.safetensors'")


def _not_finite(model: Layer, state: Mapping[str, Any]) -> str | None:
    """The first parameter that should be finite and is not; a user's layer may hold infinities that are not trained."""
    for path, layer in model.named_layers():
        ours = type(layer).__module__.startswith("gpubackprop.")
        for key, p in layer._members():
            name = f"{path}.{key}" if path else key
            if not isinstance(p, Parameter) or name not in state:
                continue
            good = np.isfinite(state[name]) if ours or p.trainable else ~np.isnan(state[name])
            if not good.all():
                return name
    return None


# ---- reading -------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: PathLike, where: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """The header and the open file; every fault of the file is an error that starts with `where`."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb"):
            pass  # for Python's kinds of error; safetensors has its own
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: no such file") from None
    except OSError as error:
        raise type(error)(f"{where}: cannot be read ({error.strerror})") from None
    try:
        with safe_open(path, framework="np") as file:
            yield _header((file.metadata() or {}).get(ENTRY), where), file
    except SafetensorError as error:
        raise ValueError(f"{where}: is cut short, damaged or not safetensors ({error}); save it again") from None


def _header(text: str | None, where: str) -> dict[str, Any]:
    import json

    if text is None:
        remedy = "load its arrays with safetensors.numpy.load_file and model.load_state_dict"
        raise ValueError(f"{where}: is safetensors but not a file of gb.save_model; {remedy}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its header is damaged ({error}); save it again") from None
    match header:
        case {"format": int(number)} if number > FORMAT:
            raise ValueError(f"{where}: has format {number}, this version reads up to {FORMAT}; upgrade gpubackprop")
        case {"format": int(), "architecture": _, "dtype": str(), "head": None | str(), "activations": list(),
              "extra": dict()}:  # fmt: skip
            return dict(header)
    raise ValueError(f"{where}: its header is damaged (an entry is missing or of the wrong kind); save it again")


def _model(header: dict[str, Any], where: str) -> Layer:
    """The model that the header describes, without values."""
    try:
        for row in header["activations"]:
            register_activation(row["name"], row["forward"], row["derivative"], **row["constants"])
        model = _build(header["architecture"], [])
        dtype, head = np.dtype(header["dtype"]).name, header["head"]
    except RecursionError:
        raise ValueError(f"{where}: its header is nested too deeply; save it again") from None
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(model, Layer) or head not in HEADS:
        raise ValueError(f"{where}: its header is damaged (no layer, or the unknown head {head!r}); save it again")
    if np.dtype(model.dtype) != dtype:
        model.dtype = dtype
    if head is not None:
        model.output_kind = head
    for key in NAMES:
        names = header.get(key)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{where}: its header is damaged ({key} is no list of names); save it again")
        if names:
            setattr(model, key, tuple(names))
    return model


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
            return f"{key!r} {a}, but {b}"
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


def _build(data: Any, made: list[Layer]) -> Any:
    """What `_encode` encoded; only classes of CLASSES are made, by their constructors."""
    match data:
        case None | bool() | int() | float() | str():
            return data
        case list():
            return [_build(v, made) for v in data]
        case {"tuple": list(items)}:
            return tuple(_build(v, made) for v in items)
        case {"dict": list(pairs)}:
            return {_build(k, made): _build(v, made) for k, v in pairs}
        case {"same": int(i)} if 0 <= i < len(made):
            return made[i]
        case {"layer": str(name), "arguments": list(arguments), "keywords": dict(keywords)}:
            given = [_build(v, made) for v in arguments], {k: _build(v, made) for k, v in keywords.items()}
            made.append(_make(name, *given))
            return made[-1]
    raise ValueError("its architecture is damaged; save it again")


def _make(name: str, arguments: list[Any], keywords: dict[str, Any]) -> Layer:
    if name not in CLASSES:
        module, _, _ = name.rpartition(":")
        known = ", ".join(k for k in CLASSES if ":" not in k)
        remedy = f"import {module!r}, which defines it, first" if module else "a newer gpubackprop may have it"
        if module == "__main__":
            remedy = "it was defined in the script that saved it; put the class into a module of its own"
        raise ValueError(f"unknown layer class {name!r}; {remedy} (built in are {known})")
    try:
        return CLASSES[name](*arguments, **keywords)
    except Exception as error:  # a user's constructor raises what it likes
        raise ValueError(f"the layer {name} cannot be made ({type(error).__name__}: {error})") from error


def _registered_rows(model: Layer) -> list[Activation]:
    """The rows of register_activation that a layer was given or names in an attribute."""
    found: set[str] = set()
    for _, layer in model.named_layers():
        arguments, keywords = layer.arguments
        for value in (*arguments, *keywords.values(), *vars(layer).values()):
            if isinstance(value, str | Activation):
                found.add(value if isinstance(value, str) else value.name)
    return [ACTIVATIONS[name] for name in sorted((found & ACTIVATIONS.keys()) - BUILTIN)]


# ---- writing -------------------------------------------------------------------------------------------------------


def check_writable(path: PathLike) -> Path:
    """The real path of a file that `write_file` can make or replace; an OSError that says what is in the way if not."""
    real = Path(os.path.realpath(path))
    if os.path.islink(path) and f"{os.path.realpath(os.path.dirname(path))}/".startswith(("/dev/", "/proc/")):
        remedy = "renaming a new file over it would lose what else goes there; name a file of its own"
        raise FileExistsError(f"{path}: stands for the open file {real}; {remedy}")
    if real.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected the name of a file; add one")
    if real.exists() and not real.is_file():
        raise FileExistsError(f"{path}: is not a regular file; choose another name")
    if not real.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {real.parent}; make it first")
    trial = _temporary(real)
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise type(error)(f"{path}: cannot write in the folder {real.parent} ({error.strerror})") from None
    return real


def write_file(path: PathLike, data: bytes) -> None:
    """Write the file in one step: a temporary one beside it, flushed to disk, then renamed; errors leave nothing."""
    real = check_writable(path)
    temporary = _temporary(real)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _temporary(real: Path) -> Path:
    return real.with_name(f".{real.name[:100]}.{os.urandom(4).hex()}.tmp")
