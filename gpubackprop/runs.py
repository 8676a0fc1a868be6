"""Runs: what the command line does, without printing: data by name or file, training by a recipe, predictions."""

import copy
import csv
import io
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpubackprop import __version__, datasets
from gpubackprop.checkpoint import load_model, read_metadata
from gpubackprop.formulas import cut
from gpubackprop.holdout import split
from gpubackprop.layers import Dense, Layer, Scaler, Sequential, mlp
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.precision import precision
from gpubackprop.spread import lost
from gpubackprop.tables import Table, Task, read_table
from gpubackprop.trainer import Trainer

__all__ = ["RATES", "Prediction", "Recipe", "Run", "doubtful_classes", "figures", "held_out", "kind_of", "load",
           "predict", "read", "read_for", "trained_loss"]  # fmt: skip

Array = NDArray[Any]

LOSSES = {"softmax": "cross_entropy", "sigmoid": "bce", "identity": "mse", "exp": "poisson"}  # by the model's head
FEW = 20  # classes that any table may have
RATES = {"adam": (3e-3, 3e-3), "adamw": (3e-3, 3e-3), "sgd": (0.1, 5e-3)}  # for classes, for numbers


@dataclass(frozen=True)
class Recipe:
    """How a network is made and trained; the defaults are tuned on the digits.

    None leaves the choice to the run: dropout 0.5 for classes and 0 for numbers, `lr` of RATES (or the optimizer's
    own), a scaler for all but the bundled digits, whose pixels lie in [0, 1], dtype float32, but float64 where a column
    or target loses too much in it, the precision of `dtype`, no clipping.
    """

    hidden: tuple[int, ...] = (256,)
    activation: str = "relu"
    dropout: float | None = None
    epochs: int = 40
    batch_size: int = 32
    optimizer: str = "adam"
    lr: float | None = None
    seed: int = 0
    test: float = 0.2
    scale: bool | None = None
    dtype: str | None = None
    precision: str | None = None
    clip_norm: float | None = None
    cuda_graph: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {value}")
        if self.dtype == "float64" and self.weights != "float64":
            raise ValueError(f"precision: {self.precision} keeps weights in {self.weights}, not in the dtype float64; "
                             "leave one out")  # fmt: skip

    @property
    def weights(self) -> str:
        """The type of the weights: the precision's, or `dtype`, or float32."""
        return precision(self.precision).master if self.precision else self.dtype or "float32"

    def dropout_for(self, task: Task) -> float:
        """The rate, chosen by the task if it was left open: dropping units out blurs numbers more than it helps."""
        return self.dropout if self.dropout is not None else 0.5 if task == "classification" else 0.0

    def rate_for(self, task: Task) -> float:
        """The learning rate, chosen by the optimizer and the task if it was left open."""
        own: Any = OPTIMIZERS[self.optimizer].lr  # a number, by default
        return self.lr if self.lr is not None else RATES.get(self.optimizer, (own, own))[task == "regression"]


# ---- data ----------------------------------------------------------------------------------------------------------


def read(data: str, target: str | None = None, task: Task | None = None) -> Table:
    """The table to train on: a bundled set by its name, or a file."""
    if data not in datasets.NAMES:
        return read_table(data, target, task)
    if target or task:
        option = "--target" if target else "--task"
        raise ValueError(f"{data}: is a bundled set, whose target and task are known; leave out {option}")
    x, y = datasets.load(data)
    if y.dtype.kind == "f":
        return Table(x, y.reshape(len(y), -1), task="regression")
    return Table(x, y, task="classification", classes=[str(i) for i in range(int(y.max()) + 1)])


def read_for(model: Layer, data: str, extra: Mapping[str, Any], labelled: bool = True) -> Table:
    """The table as the model reads it: its columns by name and, if `labelled`, its target by the model's classes."""
    if data in datasets.NAMES:
        return read(data)
    if not labelled:
        return read_table(data, columns=extra.get("columns"), labelled=False)
    task: Task = "regression" if trained_loss(model) in ("mse", "poisson") else "classification"
    classes = extra.get("classes")
    if task == "classification" and classes is None and model.inputs:  # of gb.save_model: its labels are numbers
        outputs = model.predict(np.zeros((1, model.inputs))).shape[1]
        classes = [str(i) for i in range(max(outputs, 2))]
    return read_table(data, extra.get("target"), task, classes, extra.get("columns"))


def load(path: str, device: str = "auto") -> tuple[Layer, dict[str, Any]]:
    """A saved model, and what its file says of the run; ValueError if that is of a wrong kind, or of another model."""
    model, extra = load_model(path, device), read_metadata(path)["extra"]
    for key in ("columns", "classes"):
        names = extra.get(key)
        if names is not None and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            raise ValueError(f"{path}: its {key} are no list of names; save the model again")
        if names is not None and len(set(names)) < len(names):
            raise ValueError(f"{path}: its {key} have a name twice; save the model again")
    for key, known, expected in (
        ("data", _is_text, "text"), ("target", _is_text, "text"), ("task", _is_task, "classification or regression"),
        ("test", _is_part, "a fraction or a number of rows"), ("seed", _is_seed, "an integer of at least 0"),
    ):  # fmt: skip
        if extra.get(key) is not None and not known(extra[key]):
            raise ValueError(
                f"{path}: its {key} is {cut(repr(extra[key]), 50)}, expected {expected}; save the model again"
            )
    _check_shape(path, model, extra)
    return model, extra


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_task(value: Any) -> bool:
    return value in ("classification", "regression")


def _is_part(value: Any) -> bool:
    return not isinstance(value, bool) and (
        (isinstance(value, int) and value > 0) or (isinstance(value, float) and 0 < value < 1)
    )


def _is_seed(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int) and value >= 0


def _check_shape(path: str, model: Layer, extra: Mapping[str, Any]) -> None:
    """Raise unless the model takes so many columns and, if it is of classes, knows so many."""
    columns, classes, inputs = extra.get("columns"), extra.get("classes"), model.inputs
    if not inputs:
        return
    if columns is not None and len(columns) != inputs:
        raise ValueError(f"{path}: it names {len(columns):,} columns but the model takes {inputs:,}; save it again")
    try:
        outputs = model.predict(np.zeros((1, inputs))).shape[1]
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path}: the model cannot be used ({cut(str(error), 500)}); save it again") from None
    if classes is None:
        return
    if model.output_kind in ("identity", "exp"):
        raise ValueError(f"{path}: it names classes but the model gives numbers; save it again")
    if len(classes) != max(outputs, 2):
        raise ValueError(
            f"{path}: it names {len(classes):,} classes but the model has {outputs:,} outputs; save it again"
        )


def doubtful_classes(table: Table) -> int:
    """The number of classes, if they are integers so many that they may be amounts; else 0."""
    names = table.classes or []
    many = len(names) > max(20, len(table.x) / 10)
    return len(names) if many and all(name.lstrip("-").isdecimal() for name in names) else 0


def held_out(data: str, table: Table, extra: Mapping[str, Any]) -> tuple[Array, Array] | None:
    """The rows that the run which wrote `extra` held out of this data, if it is a bundled set it was trained on."""
    if data not in datasets.NAMES or extra.get("data") != data or not {"test", "seed"} <= extra.keys():
        return None
    _, x, _, y = split(table.x, table.y, test=extra["test"], seed=extra["seed"])
    return x, y


# ---- training ------------------------------------------------------------------------------------------------------


class Run:
    """A table split by the recipe's seed, and a network that is trained on one part and measured on both.

    Columns and numbers are learnt in units of their own spread, so that a learning rate means the same for every table
    and 16-bit types have room for them; the model that is measured and saved has the scalers at its ends.
    """

    def __init__(self, data: str, table: Table, recipe: Recipe) -> None:
        if table.y is None or table.task is None:
            names = f", one of {', '.join(table.columns)}" if table.columns else ""
            remedy = f"name its column with --target{names}" if names else "add an array y"
            raise ValueError(f"{data}: has no target to learn; {remedy}")
        _check_classes(data, table)
        self.data, self.table, self.recipe, self.task = data, table, recipe, table.task
        self.why_wider = "" if recipe.dtype or recipe.precision else _lost(table, recipe.weights)
        self.dtype = "float64" if self.why_wider else recipe.weights
        _check_range(data, table, self.dtype, recipe.scale is not False)
        self.x, self.x_test, self.y, self.y_test = split(table.x, table.y, test=recipe.test, seed=recipe.seed)
        outputs = len(table.classes) if table.classes else table.y.shape[1]
        self.sizes = [table.x.shape[1], *recipe.hidden, outputs]
        self.lr, self.dropout = recipe.rate_for(self.task), recipe.dropout_for(self.task)
        scale = recipe.scale if recipe.scale is not None else data != "digits"
        self._front = self._scaler(self.x) if scale else None
        self._back = self._scaler(self.y, inverse=True) if self.task == "regression" else None
        self.model = self._network = mlp(self.sizes, recipe.activation, dropout=self.dropout, dtype=self.dtype)
        self.loss = "mse" if self._back else "cross_entropy"
        optimizer = OPTIMIZERS[recipe.optimizer](lr=self.lr)
        self.trainer = Trainer(
            self.model, self.loss, optimizer, device=recipe.device, seed=recipe.seed, precision=recipe.precision,
            clip_norm=recipe.clip_norm, cuda_graph=recipe.cuda_graph,
        )  # fmt: skip
        self._check_loss()
        self.seconds = 0.0

    def _scaler(self, rows: Array, inverse: bool = False) -> Scaler:
        return Scaler(rows.shape[1], inverse, self.dtype).fit(rows)

    def _check_loss(self) -> None:
        """Raise if the loss of numbers, in their own units, is beyond float64, in which figures are formed."""
        if self._back is None:
            return
        outputs, spread = self.sizes[-1], float(np.ptp(self.y, axis=0).max())
        mean = Sequential(Dense(1, outputs, init="zeros"), copy.deepcopy(self._back), dtype=self.dtype)
        mean.output_kind = "identity"  # it says the mean
        with np.errstate(all="ignore"):
            loss = figures(mean, np.zeros((len(self.y), 1)), self.y, self.trainer.backend.device)["loss"]
        if not (math.isfinite(loss) and (loss > 0 or spread == 0)):
            column = f"column {cut(repr(self.table.target or 'y'))}"
            apart = f"the numbers of {column} lie {spread:.3g} apart, and squares of that are beyond float64"
            raise ValueError(f"{self.data}: {apart}; {_wider('float64', spread)}")

    def fit(self, progress: bool | None = None, *, validate: bool = False) -> None:
        """Train; when it ends, also by Ctrl-C, `model` is the network in the data's own units.

        With validate=True the history has the figures of the rows held out too, after each epoch; the weights are the
        same.
        """
        parts = ((self.x, self.y), (self.x_test, self.y_test))
        (x, y), held_out = ((_scaled(a, self._front), _scaled(b, self._back)) for a, b in parts)
        begun = time.perf_counter()
        try:
            self.trainer.fit(
                x, y, self.recipe.epochs, self.recipe.batch_size, progress=progress,
                validation_data=held_out if validate else None,
            )  # fmt: skip
        finally:
            self.seconds = time.perf_counter() - begun
            if self._front is not None or self._back is not None:
                layers = [layer for layer in (self._front, *self._network.layers, self._back) if layer is not None]
                self.model = Sequential(*layers, dtype=self.dtype)
                self.model.output_kind = self._network.output_kind

    def figures(self) -> dict[str, dict[str, float]]:
        """Loss and metric on the rows trained on and on those held out."""
        parts = {"train": (self.x, self.y), "held_out": (self.x_test, self.y_test)}
        return {k: figures(self.model, *part, self.trainer.backend.device) for k, part in parts.items()}

    @property
    def extra(self) -> dict[str, Any]:
        """What a model file keeps of the run."""
        table = self.table
        return {
            "data": Path(self.data).name, "task": self.task, "target": table.target, "columns": table.columns,
            "classes": table.classes, "test": self.recipe.test, "seed": self.recipe.seed, "epochs": self.trainer.epoch,
        }  # fmt: skip

    def lines(self) -> list[tuple[str, str]]:
        """What is about to be trained, in labelled lines."""
        recipe, table, device = self.recipe, self.table, self.trainer.backend.device
        hint = " (`gpubackprop info` says why not CUDA)" if device == "cpu" and recipe.device == "auto" else ""
        goal = f"{len(table.classes)} classes" if table.classes else _count(self.sizes[-1], "target")
        named = f" in {table.target!r}" if table.target else ""
        dropout = f", dropout {self.dropout:g}" if self.dropout and recipe.hidden else ""
        layout, batch = "-".join(map(str, self.sizes)), min(recipe.batch_size, len(self.x))
        weights = f"{self.model.parameter_count:,} parameters, {self.dtype}"
        computed = f", computed in {recipe.precision}" if recipe.precision not in (None, self.dtype) else ""
        rule = f"{recipe.optimizer}, learning rate {self.lr:g}"
        rule += f", clipped to norm {recipe.clip_norm:g}" if recipe.clip_norm is not None else ""
        return [
            ("device", device + hint),
            ("data", f"{self.data}: {len(table.x):,} rows, {_count(self.sizes[0], 'column')}, {goal}{named}"),
            ("split", f"{len(self.x):,} rows to train, {len(self.x_test):,} held out, seed {recipe.seed}"),
            ("network", f"{layout}, {recipe.activation}{dropout}, {weights}{computed}"),
            *([("float64", f"because {self.why_wider}")] if self.why_wider else []),
            ("training", f"{recipe.epochs} epochs in batches of {batch}, {rule}"),
        ]

    def report(self) -> dict[str, Any]:
        """Everything about the run but the figures, as JSON holds it."""
        recipe = asdict(self.recipe) | {"lr": self.lr, "dropout": self.dropout, "dtype": self.dtype}
        return {
            "gpubackprop": __version__, **recipe, **self.extra, "device": self.trainer.backend.device,
            "rows": len(self.table.x), "train_rows": len(self.x), "held_out_rows": len(self.x_test),
            "parameters": self.model.parameter_count, "history": self.trainer.history, "seconds": self.seconds,
        }  # fmt: skip


def _check_classes(data: str, table: Table) -> None:
    """Raise if the target is no class: most classes would have one row, and the network as many outputs as rows."""
    rows, classes = len(table.x), table.classes or []
    if len(classes) <= max(FEW, rows / 2):
        return
    column = f" {table.target!r}" if table.target else ""
    numbers = all(name.lstrip("-").isdecimal() for name in classes)
    remedy = "if they are amounts, use --task regression" if numbers else "a column that names each row is no target"
    got = f"the target{column} has {len(classes):,} classes in {rows:,} rows"
    raise ValueError(f"{data}: {got}, expected two rows or more of most; {remedy}")


def _check_range(data: str, table: Table, weights: str, scaled_x: bool) -> None:
    """Raise if a column, or how far its numbers lie apart, is beyond the numbers of the weights' type."""
    limits = np.finfo(weights)
    parts: list[tuple[Array, list[str] | None, bool]] = [(table.x, table.columns, scaled_x)]
    if table.y is not None and table.task == "regression":
        parts.append((table.y, [table.target or "y"] * table.y.shape[1], True))
    for rows, names, scaled in parts:
        with np.errstate(over="ignore", invalid="ignore"):
            high, low, spread = rows.max(0), rows.min(0), rows.std(0)
            largest = np.maximum(high, -low)
        for j in range(rows.shape[1]):
            column = f"column {cut(repr(names[j])) if names else j}"
            if largest[j] > limits.max or not spread[j] <= limits.max:
                row = int(np.abs(rows[:, j]).argmax())
                what, size = f"{column} has {rows[row, j]:.3g} at row {row}, too large for {weights}", largest[j]
            elif scaled and high[j] > low[j] and spread[j] < limits.tiny:
                what = f"the numbers of {column} lie {spread[j]:.3g} apart, too close for {weights}"
                size = spread[j]
            else:
                continue
            raise ValueError(f"{data}: {what}; {_wider(weights, size)}")


def _wider(weights: str, size: float) -> str:
    """What helps with numbers of that size, whose squares are taken."""
    return "use --dtype float64" if weights == "float32" and 1e-150 < size < 1e150 else "scale it by a power of ten"


def _lost(table: Table, dtype: str) -> str:
    """What the type would lose of a column or of the target, in words; empty if nothing that matters."""
    if (loss := lost(table.x, dtype)) is not None:
        return loss.phrase(cut(repr(table.columns[loss.column])) if table.columns else "")
    if table.task == "regression" and table.y is not None and (loss := lost(table.y, dtype)) is not None:
        return f"the target's {loss.phrase()}" if table.target is None else loss.phrase(cut(repr(table.target)))
    return ""


def _scaled(rows: Array, scaler: Scaler | None) -> Array:
    """The rows in units of the scaler's spread."""
    if scaler is None:
        return rows
    state = scaler.state_dict()
    scaled: Array = (rows - state["mean"]) / state["scale"]
    return scaled


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


# ---- measuring -----------------------------------------------------------------------------------------------------


def trained_loss(model: Layer) -> str:
    """The name of the loss a model was trained with, by its head."""
    if model.output_kind not in LOSSES:
        raise ValueError(
            "the model was trained with a loss of its own or not at all, but to evaluate or explain it takes a named "
            f"loss; train it with one of {', '.join(LOSSES.values())}"
        )
    return LOSSES[model.output_kind]


def figures(model: Layer, x: Array, y: Array, device: str) -> dict[str, float]:
    """Mean loss and metric of the model over the rows."""
    return Trainer(model, trained_loss(model), device=device).evaluate(x, y)


# ---- predicting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prediction:
    """One row each: the class, or the numbers, and for classes the probability of each."""

    value: Array  # (n,) class names or numbers, (n, outputs) numbers
    probability: Array | None = None  # (n, classes)
    classes: Array | None = None

    def encode(self, kind: str) -> bytes:
        """The bytes of a .csv, .npz or .npy file (which holds the value alone)."""
        file = io.BytesIO()
        if kind == ".npz":
            arrays = {"prediction": self.value, "probability": self.probability, "classes": self.classes}
            np.savez(file, **{k: a for k, a in arrays.items() if a is not None})  # type: ignore[arg-type]
        elif kind == ".npy":
            np.save(file, self.value, allow_pickle=False)
        else:
            file.write(self._csv().encode())
        return file.getvalue()

    def _csv(self) -> str:
        value = self.value if self.value.ndim == 2 else self.value.reshape(-1, 1)
        names = ["prediction"] if value.shape[1] == 1 else [f"prediction_{i}" for i in range(value.shape[1])]
        columns = [value.astype(str)]
        if self.probability is not None and self.classes is not None:
            names += [f"probability_{name}" for name in self.classes]
            columns.append(self.probability.astype(str))  # the shortest text that reads back as the same number
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(np.hstack(columns).tolist())
        return text.getvalue()


def predict(model: Layer, x: Array, classes: list[str] | None = None) -> Prediction:
    """The model's prediction for each row; class names that are all integers become numbers.

    Where the loss is not known, one output is a number and several are classes.
    """
    head = model.output_kind
    if head in ("identity", "exp") or (head is None and model.predict(x[:1]).shape[1] == 1):
        value = np.exp(model.predict(x)) if head == "exp" else model.predict(x)
        return Prediction(value.ravel() if value.shape[1] == 1 else value)
    labels, probability = model.predict_classes(x), model.predict_proba(x)
    if labels.ndim != 1:
        raise ValueError("predict: the model has several sigmoid outputs, not one class; use model.predict_proba")
    if probability.shape[1] == 1:
        probability = np.hstack([1 - probability, probability])
    names = _class_names(classes or [str(i) for i in range(probability.shape[1])])
    if len(names) != probability.shape[1]:
        raise ValueError(f"predict: the model has {probability.shape[1]} outputs but names {len(names)} classes")
    return Prediction(names[labels], probability, names)


def _class_names(names: list[str]) -> Array:
    """The names as an array, of integers if they all are."""
    try:
        numbers = np.array([int(name) for name in names], np.int64)
    except (ValueError, OverflowError):
        return np.array(names)
    return numbers if numbers.astype(str).tolist() == names else np.array(names)


def kind_of(path: str) -> str:
    """The kind of file that a path for predictions asks for."""
    kind = Path(path).suffix.lower()
    if kind not in (".csv", ".npz", ".npy"):
        raise ValueError(f"{path}: is of unknown kind {kind!r}; choose from .csv, .npz, .npy")
    return kind
