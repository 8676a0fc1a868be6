"""The trainer: a recorded step per batch size, and the loop that replays it."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Backend, Buffer, StepTable, Workspace, is_on_device
from gpubackprop.backends.driver import DeviceMemoryError
from gpubackprop.callbacks import Callback, EarlyStopping, around
from gpubackprop.checks import flag, number, warn, whole
from gpubackprop.claims import exclusive, trains, using
from gpubackprop.columns import History
from gpubackprop.data import as_features, as_targets, by_name, check_same_length, column_names, labels_of
from gpubackprop.device_data import check_one_place, on_device, taken
from gpubackprop.evaluation import add_up, host_of, rows_at_a_time
from gpubackprop.layers import edges
from gpubackprop.lbfgs import Curvature, SearchStep
from gpubackprop.losses import objective
from gpubackprop.metrics import metric
from gpubackprop.model import Layer, Mode, check_model, mode, seed_or_fresh
from gpubackprop.moments import HostMoments, Moments
from gpubackprop.names import explains_keywords, of_pytorch, unknown
from gpubackprop.optimizers import LBFGS, OPTIMIZERS, Optimizer
from gpubackprop.penalty import Penalty, Strength
from gpubackprop.plan import Plan
from gpubackprop.precision import precision as precision_named
from gpubackprop.predictor import CHUNK_ROWS, as_output, settings
from gpubackprop.progress import Bar, Interrupts
from gpubackprop.rates import check_measured, measures
from gpubackprop.rerun import calls_own_code
from gpubackprop.room import explained
from gpubackprop.row_weights import inverse, row_weights, weight_of_batches
from gpubackprop.spread import lost, unsquared
from gpubackprop.step import Graphs, Keeper, Source, StagedSource, Step, Sums, Terms
from gpubackprop.tensor import Tensor

__all__ = ["Trainer", "TrainingDiverged"]

Array = npt.NDArray[Any]
Order = Callable[[int], Any]
Names = tuple[Any, ...] | None
KEPT_STEPS = 8
FEWEST_ROWS = 1024  # of the step table
TRIED_SIZES = 16  # above and below a batch size that does not work
TO_WIDER = ", or use precision bfloat16 or float32"


class TrainingDiverged(FloatingPointError):
    """Loss, weights, running statistics or the validation loss became NaN or infinite; the model stands as after the
    last good epoch.

    Or no gradient of a whole epoch had a finite norm, so that no step was applied: in float16, at the least scale of
    the loss too. `unapplied` is then the precision.
    """

    def __init__(self, epoch: int, step: int | None, unapplied: str = "", what: str = "a weight") -> None:
        super().__init__(epoch, step, unapplied, what)
        self.epoch, self.step, self.unapplied, self.what = epoch, step, unapplied, what

    def __str__(self) -> str:
        remedy = "try a smaller learning rate or scaled inputs; gb.find_nan names the launch it began with"
        if self.unapplied:
            what = (
                f"no gradient of epoch {self.epoch} has a finite norm in {self.unapplied}, so that no step was applied"
            )
            remedy = f"scale the targets or inputs{TO_WIDER * (self.unapplied == 'float16')}"
        elif self.step:
            what = f"the loss is NaN or infinite in epoch {self.epoch}, step {self.step}"
        else:
            what = f"{self.what} is NaN or infinite after epoch {self.epoch}"
            if self.what != "a weight":
                remedy = "look for cells of x far from the others, such as a fill value, and remove or scale them"
        return f"fit: {what}; the model is as after epoch {self.epoch - 1}; {remedy}"


class Trainer:
    """Trains a model by mini-batch descent; after the first step of a batch size every step is a replay.

    `loss` is a name (cross_entropy, bce, mse, poisson, …) or a callable (output, target) -> tensor, the mean over
    the batch. Its target has a row of columns for each row, as the output has: y (n,) comes as (n, 1), so that of one
    output both are (n, 1); integers y (n,) of several outputs stay labels (n,). `optimizer` is an instance or a name,
    `metrics` names (None: accuracy or r2, by the loss). `seed` keys the weights (unless model.initialize ran before),
    the order of the rows and dropout; None draws a fresh one, kept in `.seed`. While a thread trains a model, calls of
    other threads on it are errors; other calls wait for each other.

    `precision` is one of float32, float64, tf32, float16, bfloat16 (None: the model's). `clip_norm` scales a longer
    gradient down to that norm, which is taken in the type of the weights: a float32 gradient with elements beyond about
    1e19 counts as not finite; `clip_value` holds each element within ±clip_value first. `cuda_graph` replays each step
    as one CUDA graph.

    `l1` and `l2` add l1 · Σ|w| + ½ · l2 · Σw², over the weight matrices, to the loss, in what is reported too; each a
    number or a function of the batch's rows. (An optimizer's weight_decay is not part of the loss.) `label_smoothing`
    spreads that share of every label over all classes. With `accumulate` an update is made of the gradients of so many
    batches, the mean over all their rows.
    """

    @explains_keywords
    def __init__(
        self, model: Layer, loss: str | Callable[..., Tensor] = "cross_entropy", optimizer: Optimizer | str = "adam",
        metrics: Sequence[str] | None = None, device: str = "auto", seed: int | None = None, *,
        precision: str | None = None, clip_norm: float | None = None, clip_value: float | None = None,
        l1: Strength = 0.0, l2: Strength = 0.0, label_smoothing: float = 0.0, accumulate: int = 1,
        cuda_graph: bool = False,
    ) -> None:  # fmt: skip
        check_model(model, "Trainer")
        self.model = model
        self._optimizer = _optimizer(optimizer)
        if isinstance(metrics, str):
            raise TypeError(f"Trainer: metrics must be a list of names, got {metrics!r}; use metrics=[{metrics!r}]")
        self.seed = seed_or_fresh(seed, "Trainer")
        named = precision_named(precision or np.dtype(model.dtype).name)
        master = np.dtype(named.master)
        self._terms = Terms(
            objective(loss).smoothed(label_smoothing), named, Penalty(l1, l2), _limit("clip_norm", clip_norm, master),
            _limit("clip_value", clip_value, master), whole("Trainer", "accumulate", accumulate), self.seed,
        )  # fmt: skip
        self.metrics = None if metrics is None else [metric(m, self.objective.head) for m in metrics]
        self.cuda_graph = flag("Trainer", "cuda_graph", cuda_graph)
        self.history = History()
        self.epoch = self.step = 0  # step: updates made
        self._batches = self._begun = 0  # batches seen; the update that this rule began with
        if not any(p.trainable for p in model.named_parameters().values()):
            raise ValueError("Trainer: the model has no trained parameters; layers declare them as attributes")
        self._check_optimizer()
        self._asked = device
        with using("Trainer", model.shared()):
            if np.dtype(model.dtype) != self.precision.master:
                model.dtype = self.precision.master
                model._lay_out(device)
            self._prepare(device)
            model.initialize(self.seed, missing=True)
            model.output_kind = model.output_kind or self.objective.head  # what it was trained as stays until fit

    def _check_optimizer(self) -> None:
        clips = min(self.clip_norm, self.clip_value) < math.inf
        if self._searches and (self.precision.mixed or clips or self.accumulate > 1):
            raise ValueError("Trainer: LBFGS searches along gradients of all rows in the weights' own type; leave out "
                             "clip_norm, clip_value and accumulate, and use precision float32 or float64")  # fmt: skip
        names = list(self.model.named_parameters())
        for pattern in self._optimizer.groups:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"Trainer: the optimizer's group {pattern!r} matches no parameter; "
                                 f"the model has {', '.join(names)}")  # fmt: skip

    def _prepare(self, device: str, moments: HostMoments | None = None, control: Sequence[float] = ()) -> None:
        """Everything that lives on the device."""
        self.backend = get_backend(device)
        if self.model.arena.backend is not self.backend:
            self.model.to(self.backend.device)
        optimizer, arena = self._optimizer, self.model.arena
        self.state = Curvature(optimizer, arena) if isinstance(optimizer, LBFGS) else Moments(optimizer, arena)
        self.state.load(moments or {})
        self.state.hold(edges(self.model))
        self._space = Workspace()
        self._steps: OrderedDict[Any, Step] = OrderedDict()
        self._settings: list[Any] = []  # that the steps were recorded with
        self._sums: dict[tuple[int, bool], Sums] = {}
        self._graphs = Graphs() if self.cuda_graph else None
        self._table = self._new_table(FEWEST_ROWS, control)
        self._keeper: Keeper | None = None

    def shared(self) -> list[object]:
        """The objects that threads using the trainer at once share: those of its model."""
        return self.model.shared()

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        device = {"backend", "state", "_space", "_steps", "_settings", "_sums", "_table", "_keeper", "_graphs"}
        kept = {k: v for k, v in vars(self).items() if k not in device}
        place = "auto" if self._asked == "auto" else self.backend.device  # a file may be read where there is no GPU
        return kept | {"device": place, "moments": self.state.host(), "control": self._control()}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        device, moments, control = (kept.pop(key) for key in ("device", "moments", "control"))
        vars(self).update(kept)
        self._prepare(device, moments, control)

    def _control(self) -> list[float]:
        """The scale of the loss and what goes with it; see StepTable."""
        control: list[float] = self.backend.to_numpy(self._table.control).tolist()
        return control

    objective = property(lambda self: self._terms.objective, doc="The loss.")
    precision = property(lambda self: self._terms.precision, doc="What a step stores and multiplies in.")
    penalty = property(lambda self: self._terms.penalty, doc="L1 and L2 in the loss.")
    clip_norm = property(lambda self: self._terms.clip_norm, doc="The largest norm of a gradient.")
    clip_value = property(lambda self: self._terms.clip_value, doc="The largest element of a gradient.")
    accumulate = property(lambda self: self._terms.accumulate, doc="Batches to an update.")

    @property
    def optimizer(self) -> Optimizer:
        """The rule that steps the weights; `use` goes on with another one."""
        return self._optimizer

    @exclusive
    def use(self, optimizer: Optimizer | str) -> None:
        """Go on with this optimizer: moments and the count of its updates stay where its rule is the same, and begin
        anew where it is another one. A schedule goes by that count."""
        if trains(self.model):
            raise RuntimeError("use: this trainer is training; change the optimizer between fits")
        before, self._optimizer = self._optimizer, _optimizer(optimizer)
        try:
            self._check_optimizer()
        except ValueError:
            self._optimizer = before
            raise
        same = before.rule == self._optimizer.rule
        self._begun = self._begun if same else self.step
        self._prepare(self.backend.device, self.state.host() if same else None, self._control())

    @property
    def updates(self) -> int:
        """Updates made by the present rule, which schedules go by."""
        return self.step - self._begun

    @property
    def _searches(self) -> bool:
        """Whether a step is a line search over all rows."""
        return isinstance(self._optimizer, LBFGS)

    def __repr__(self) -> str:
        about = f"{self.objective.name}, {self.optimizer}, {self.backend.device}, seed {self.seed}"
        return f"Trainer({about}, {self.epoch} epochs done, {self.model.parameter_count:,} parameters)"

    # ---- training

    @explains_keywords
    def fit(
        self, x: Any, y: Any, epochs: int = 10, batch_size: int = 128, *,
        validation_data: tuple[Any, ...] | None = None, shuffle: bool | Order = True,
        callbacks: Sequence[Callback] = (), progress: bool | None = None, stop_below: float | None = None,
        sample_weight: Any = None, class_weight: Mapping[Any, float] | str | None = None,
    ) -> History:  # fmt: skip
        """Train for `epochs` more epochs; returns the history, one float per epoch for loss, metrics and val_… of each,
        and for the learning rate where it is scheduled: a dict of lists, shown as a table of the last epochs.

        With validation data it has gap = val_loss − loss, which grows where a model overfits. The loss of an epoch is
        taken while training, under dropout and over weights that change: at first the gap may well be negative.

        The last batch is used at its own size; a batch_size beyond the data uses all of it. `shuffle` may be a function
        of the number of rows that returns their order. After an epoch each callback is called with the trainer, and one
        that returns True stops; `stop_below` stops at the first epoch whose loss (validation loss, if there is
        validation data) is below it. `progress` shows a bar, and leaves a line with the last figures (None: on a
        terminal and in a notebook). Ctrl-C lets the step in flight finish, then re-raises; completed epochs stay in the
        history. SIGTERM raises SystemExit(143) as late, unless it has a handler of your own.

        `sample_weight` (n,) says how much each row counts, `class_weight` each label, {label: weight} (others 1) or
        "balanced" (n / (classes · rows of the class)); of both, the product. A batch's loss is Σ w·loss / Σ w, that of
        an epoch the same over all rows; metrics do not weigh. `validation_data` is (x, y) or (x, y, weights).

        A frame's columns are taken by the names of `model.feature_names` (of y, `target_names`), which the first fit on
        a frame sets. What callbacks append to a list in the history stands once per epoch there.

        A step that calls layers or a loss of one's own is recorded anew in each fit, and run afresh beside its runs 2,
        4, 8, …: a RuntimeError if it depends on what Python draws, counts or reads. TrainingDiverged if loss, weights,
        running statistics or the validation loss are not finite, or no gradient of an epoch is in float16 at any scale
        of the loss; a RuntimeWarning if no step of all epochs was applied while that scale comes down.
        """
        _check_fit(epochs, batch_size, shuffle, callbacks, stop_below)
        with using("fit", self.shared(), training=True):
            if np.dtype(self.model.dtype) != self.precision.master:
                raise RuntimeError(
                    f"fit: the model is {self.model.dtype} since another Trainer took it over, but this one trains in "
                    f"{self.precision.name}; make a new Trainer"
                )
            self._follow()
            named = self._names(x, y)
            x, y, w = self._data(x, y, "fit", sample_weight, class_weight)
            held = None
            if validation_data is not None:
                held_x, held_y, held_w = (*_held_out(validation_data), None)[:3]
                held = self._data(held_x, held_y, "fit: validation_data", held_w, named=named, exact=True)
            batch_size = self._rows(len(x), batch_size)
            try:
                return self._fit(
                    x, y, w, int(epochs), batch_size, held, shuffle, list(callbacks), progress, stop_below, named
                )  # fmt: skip
            except DeviceMemoryError as error:  # whose traceback, and that of its cause, hold what the failed step took
                failed = DeviceMemoryError(error.nbytes, error.free, error.total)
            self._steps.clear()
            raise explained(failed, self, x, y, w, batch_size) from None

    def _rows(self, n: int, batch_size: int) -> int:
        """The rows of a batch of n rows of data."""
        return n if self._searches else min(int(batch_size), n)

    def _check_batches(self, columns: int, n: int, batch_size: int, target: Array | None = None) -> int:
        """Columns of the output; an error if a layer or the loss refuses the last batch of n rows, by its size."""
        outputs = self._outputs(columns, batch_size, training=True, target=target)
        if (rest := n % batch_size) and (error := self._refusal(columns, rest, target)):
            tries = [*(batch_size + sign * i for i in range(1, TRIED_SIZES) for sign in (1, -1)), n]
            fits = (
                b for b in tries if 0 < b <= n
                and not any(self._refusal(columns, rows, target) for rows in {b, n % b} - {0})
            )  # fmt: skip
            last = f"{rest} row{'s' * (rest > 1)}, as {n} = {n // batch_size} · {batch_size} + {rest}"
            remedy = f"; batch_size={found} leaves no such batch" if (found := next(fits, None)) else ""
            raise ValueError(f"fit: the last batch has {last}: {error}{remedy}") from error
        return outputs

    def _refusal(self, columns: int, rows: int, target: Array | None) -> ValueError | None:
        """Why a training batch of so many rows cannot be, if it cannot."""
        try:
            self._outputs(columns, rows, training=True, target=target)
        except ValueError as error:
            return error
        return None

    def _follow(self) -> None:
        """Go on where the model is now: it may have moved, grown, become part of another one, or been given masks."""
        if self.model.arena is not self.state.arena:
            self._prepare(self.model.backend.device, self.state.host(), self._control())
        else:
            self.state.hold(edges(self.model))

    def _fit(
        self, x: Buffer, y: Array, w: Array | None, epochs: int, batch_size: int,
        held_out: tuple[Buffer, Array, Array | None] | None, shuffle: bool | Order, callbacks: Sequence[Callback],
        progress: bool | None, stop_below: float | None, named: tuple[Names, Names],
    ) -> History:  # fmt: skip
        outputs = self._check_batches(x.shape[1], len(x), batch_size, y)  # before anything is trained
        if not self.epoch and _applies(self.objective.head, self._forward(x.shape[1], 2, training=True)[0]):
            what = f"the model ends in {self.objective.head}, which the loss {self.objective.name} applies by itself"
            remedy = "leave it out" + ", predict_proba has it" * (self.objective.head != "exp")
            warn(f"fit: {what}, so that training goes wrong; {remedy}")
        sums = self._sums_of(y, outputs)
        self._check_watched(callbacks, sums, held_out is not None)
        self.model.output_kind = self.objective.head
        self.model.feature_names, self.model.target_names = named
        source = self._source(x, y, w, batch_size)
        squares = sums.spread(y)
        if (count := -(-len(x) // batch_size)) > self._table.capacity:
            self._table = self._new_table(2 * count, self._control())
            self._steps.clear()  # they read the old one
        steps = self._steps_for(source, sums, len(x), batch_size)
        keeper = self._keeper = self._keeper or Keeper(self.model, self.state)
        keeper.keep()
        self.state.finished = applied = False
        try:
            with (
                self.model.pinned(), Interrupts() as interrupts, closing(source),
                Bar(progress, epochs, len(x), self.epoch) as bar, around(callbacks, self),
            ):  # fmt: skip
                for _ in range(epochs):
                    seen = self._begin_epoch(source, steps, sums, shuffle, w)
                    begun = self.step, self._batches, self._control()
                    applied |= self._run_epoch(source, steps, sums, keeper, interrupts, bar, seen, begun)
                    try:
                        figures = sums.figures(len(x), squares, float(seen[-1])) | self._rate()
                        figures |= self._validated(held_out, figures["loss"])
                    except BaseException:
                        self._go_back(keeper, begun)
                        raise
                    keeper.keep()
                    self.epoch += 1
                    self._note(figures)
                    bar.epoch(figures)
                    stops = self._called(callbacks)
                    _ = self.model.arena  # an error if a callback froze a parameter
                    loss = figures["loss" if held_out is None else "val_loss"]
                    if stops or self.state.finished or (stop_below is not None and loss < stop_below):
                        break
        finally:
            for step in set(steps):
                step.detach()
        if not applied:
            warn(
                f"fit: no step was applied, because every gradient overflows {self.precision.name} while the scale of "
                f"the loss comes down, which is {self._control()[0]:g} now; train on, scale the targets or inputs"
                + TO_WIDER,
                RuntimeWarning,
            )
        return self.history

    def _run_epoch(
        self, source: Source, steps: Sequence[Step], sums: Sums, keeper: Keeper, interrupts: Interrupts, bar: Bar,
        weight: Array, begun: tuple[int, int, Sequence[float]],
    ) -> bool:  # fmt: skip
        """Run every step; where one is cut short, or a value is not finite, go back to the last good epoch.

        Whether any step was applied: in float16 it may be none while the scale of the loss comes down.
        """
        for i, step in enumerate(steps):
            first, last = i % self.accumulate == 0, (i + 1) % self.accumulate == 0 or i + 1 == len(steps)
            try:
                source.before(i)
                step.run(first, last)
            except BaseException:  # its launches may have run in part
                self._go_back(keeper, begun)
                raise
            self._batches += 1
            self.step += last
            if interrupts.pending and last:
                if sums.bad_step or keeper.damage():
                    self._go_back(keeper, begun)
                interrupts.deliver()
            if bar.shown and bar.due():
                bar.advance(i * steps[0].rows + step.rows, sums.tally.peek() / (float(weight[i]) or 1))
        bad = sums.bad_step
        if bad or (damage := keeper.damage()):
            self._go_back(keeper, begun)
            raise TrainingDiverged(self.epoch + 1, bad - self._batches) if bad else self._diverged(damage)
        scale, *_ = begun[2]
        if not (applied := self._table.applied()) and scale <= 2 ** (len(steps) - 1):  # 1 for the last step: no hope
            self._go_back(keeper, begun)
            raise TrainingDiverged(self.epoch + 1, None, self.precision.name)
        return applied

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(self.epoch + 1, None, what=what)

    def _validated(self, held_out: tuple[Buffer, Array, Array | None] | None, loss: float) -> dict[str, float]:
        """The figures of the rows held out, if there are any; TrainingDiverged if only their loss is not finite."""
        if held_out is None:
            return {}
        figures = {f"val_{k}": v for k, v in self._figures(*held_out).items()}
        if math.isfinite(loss) and not math.isfinite(figures["val_loss"]):
            raise self._diverged("the validation loss")
        return figures | {"gap": figures["val_loss"] - loss}

    def _go_back(self, keeper: Keeper, begun: tuple[int, int, Sequence[float]]) -> None:
        keeper.restore()
        self.step, self._batches, control = begun
        self.backend.write(self._table.control, control)

    def _source(self, x: Buffer, y: Array, w: Array | None, batch_size: int) -> Source:
        """The data where the steps take it from: on the device, or staged from the host where it would not fit."""
        staging = None if is_on_device(x) else self.backend.staging(x, y, w, batch_size)
        if staging is not None:
            return StagedSource(self.backend, staging, len(x))
        return Source(self.backend, *(None if a is None else self.backend.asarray(a) for a in (x, y, w)))

    def _steps_for(self, source: Source, sums: Sums, n: int, batch_size: int) -> list[Step]:
        """The step of each batch of an epoch: one object per batch size, fed from this source. It is kept for later
        fits, unless what Python put into it may have changed since."""
        now = [part for _, layer in self.model.named_layers() for part in settings(layer)]
        if now != self._settings or calls_own_code(self.model, self.objective):
            self._steps.clear()
        self._settings = now
        columns, target = source.x.shape[1], source.y.shape[1:]
        sizes = [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
        chosen: dict[int, Step] = {}
        for rows in dict.fromkeys(sizes):
            key = (self.model.arena, rows, columns, target, source.y.dtype, source.w is not None)
            if key not in self._steps:
                while len(self._steps) >= KEPT_STEPS:
                    self._steps.popitem(last=False)
                self._steps[key] = self._new_step(rows, columns, target, source.w is not None, sums, self._table)
            self._steps.move_to_end(key)
            chosen[rows] = self._steps[key]
            chosen[rows].attach(source, self._graphs if rows == batch_size else None)  # the ragged batch is rare
        return [chosen[rows] for rows in sizes]

    def _begin_epoch(
        self, source: Source, steps: Sequence[Step], sums: Sums, shuffle: bool | Order, w: Array | None
    ) -> Array:
        """Shuffle, and load the step table; the weight of all rows seen by the end of each step."""
        sizes = np.array([step.rows for step in steps])
        order = self._order(int(sizes.sum()), shuffle)
        weight = weight_of_batches(w, order, sizes)
        self._load(self._table, weight, source.begin(order, sizes))
        self._lower()
        sums.clear()
        return np.cumsum(weight)

    def _order(self, rows: int, shuffle: bool | Order) -> Array | None:
        """The order of an epoch's rows; None: as they lie."""
        if not callable(shuffle):
            if not shuffle or self._searches:  # whose step takes all rows at once: their order is rounding alone
                return None
            return np.random.Generator(np.random.PCG64([self.seed, self.epoch])).permutation(rows)
        order = np.asarray(shuffle(rows))
        if order.shape != (rows,) or order.dtype.kind not in "iu" or (np.sort(order) != np.arange(rows)).any():
            raise ValueError(f"fit: shuffle({rows}) must return the numbers 0 to {rows - 1} in some order")
        return order.astype(np.intp)

    def _rate(self) -> dict[str, float]:
        """The learning rate of the epoch's last update, if it is scheduled."""
        return {"lr": self.state.last_lr} if callable(self.optimizer.lr) else {}

    def _new_step(
        self, rows: int, columns: int, target: tuple[int, ...], weighted: bool, sums: Sums, table: StepTable,
        dry: bool = False,
    ) -> Step:  # fmt: skip
        step = SearchStep if self._searches else Step
        return step(self.model, self._terms, self.state, table, sums, rows, columns, target, weighted, self._space, dry)

    def _lower(self) -> None:
        """Bring the copies in the compute type up to date with what anyone wrote into the weights."""
        if self.precision.mixed:
            for arena in (self.model.arena, self.model.statistics):
                arena.refresh(self.precision.dtype)

    def _note(self, figures: dict[str, float]) -> None:
        """One more epoch; a figure of the library's own that an epoch lacks is NaN there."""
        before = len(self.history.get("loss", ()))
        for key in dict.fromkeys((*self.history, *figures)):
            if key in figures or measures(key):
                self.history.setdefault(key, [math.nan] * before).append(figures.get(key, math.nan))

    def _called(self, callbacks: Sequence[Callback]) -> bool:
        """Call each; whether one stops. A figure that they append to the history stands once per epoch: of several the
        last, NaN in epochs without."""
        known, epochs = set(self.history), len(self.history["loss"])
        try:
            results = [c(self) for c in callbacks]  # all of them, whichever stops
            return any(isinstance(r, bool | np.bool_) and bool(r) for r in results)
        finally:
            for key, values in self.history.items():
                if not isinstance(values, list):
                    continue
                if len(values) > epochs:
                    del values[epochs - 1 : -1]
                elif len(values) < epochs:
                    at = len(values) if key in known else 0
                    values[at:at] = [math.nan] * (epochs - len(values))

    def _check_watched(self, callbacks: Sequence[Callback], sums: Sums, validated: bool) -> None:
        """Raise if a callback or a schedule of the library's watches a figure that this fit does not measure."""
        own = ["loss", *(m.name for m, _ in sums.metrics)]
        measured = [*own, *(f"val_{key}" for key in own), "gap"] if validated else own
        for watcher in (*callbacks, *(o.lr for o in (self.optimizer, *(o for _, o in self.state.parts)))):
            if isinstance(watcher, EarlyStopping) or callable(getattr(watcher, "rates", None)):
                check_measured(getattr(watcher, "monitor", None), [*measured, *self._rate()], type(watcher).__name__)

    # ---- the step table

    def _new_table(self, steps: int, control: Sequence[float] = ()) -> StepTable:
        """A table for so many steps that goes on from there, or begins."""
        columns = dict.fromkeys((*self.state.scalars, "1 / weight", *self.penalty.columns))
        table = self.backend.step_table(list(columns), self.model.dtype, steps)
        self.backend.write(table.control, control or (self.precision.scale, 1 / self.precision.scale, 1, 0))
        return table

    def _load(self, table: StepTable, weight: Array, offsets: Array) -> None:
        """Rows for batches that weigh so much and begin at these offsets, of which `accumulate` make an update."""
        updates = np.arange(len(weight)) // self.accumulate
        whole_weight = np.bincount(updates, weight)[updates].astype(np.float64)  # of all batches of the update
        values = self.state.table_rows(self.updates, updates[-1] + 1, self.epoch, self.history)
        if self.accumulate > 1:  # fewer updates than batches
            values = {k: np.pad(v, (0, len(weight) - len(v)), "edge") for k, v in values.items()}
        values |= {"1 / weight": inverse(whole_weight)} | self.penalty.table_rows(whole_weight)
        rows = np.empty((len(weight), len(table.columns)))
        for i, column in enumerate(table.columns):
            rows[:, i] = values[column]
        table.load(rows, offsets, self._batches + 1)

    # ---- reading

    @exclusive
    @explains_keywords
    def evaluate(self, x: Any, y: Any, sample_weight: Any = None) -> dict[str, float]:
        """Mean loss, by weight where rows have weights, penalties included, and metrics over the rows, without training
        behaviour.

        Outputs are taken in the model's type, and all that is made of them in float64 on the host, some rows at a time;
        a loss that is a function gets all rows at once, in the model's type if it takes no other.
        """
        if not trains(self.model):
            self._follow()
        return self._figures(*self._data(x, y, "evaluate", sample_weight, exact=True))

    def _figures(self, x: Buffer, y: Array, w: Array | None) -> dict[str, float]:
        predict = partial(self.model._predict, checked=True)
        whole = predict(x) if self.objective.own or len(x) <= CHUNK_ROWS else None
        outputs = self._outputs(x.shape[1], 2) if whole is None else whole.shape[1]
        sums = self._new_sums(y, outputs, host_of(self.backend), np.float64)
        read = np.asarray if sums.backend is self.backend else self.backend.to_numpy
        height = rows_at_a_time(outputs)
        parts = (x[i : i + height] for i in range(0, len(x), height))
        add_up(self.objective, sums, map(read, map(predict, parts) if whole is None else [whole]), y, w)
        weight = len(y) if w is None else float(w.sum(dtype=np.float64))
        figures = sums.figures(len(y), sums.spread(y), weight)
        if self.objective.own and whole is not None:
            figures["loss"] = self._own_loss(read(whole), y)
        return figures | {"loss": figures["loss"] + self.penalty.value(self.model.arena, weight)}

    def _own_loss(self, output: Array, y: Array) -> float:
        """The mean loss by a user's function, in float64; of tensors of the model's type where it knows only these."""
        with suppress(TypeError, ValueError):
            return self._total(np.asarray(output, np.float64), y, host_of(self.backend))
        return self._total(self.backend.asarray(output), y, self.backend)

    def _total(self, output: Buffer, y: Array, backend: Backend) -> float:
        target = y if y.ndim == 1 else as_targets(y, output.dtype, y.shape[1], "evaluate")
        total = self.objective.total(Tensor(output, backend), Tensor(backend.asarray(target), backend))
        return float(total.item()) / len(y)

    def predict(self, x: Any) -> Any:
        """The raw output for every row (logits, for a classifier): a NumPy array, or a device array for x on
        a device."""
        return self.model.predict(x)

    @exclusive
    def plan(self, batch_size: int = 128, *, weighted: bool = False) -> Plan:
        """The training step for a batch of that many rows, bound but not run: print it, add it up, profile it.

        A loss of the user's own has labels if it was trained on labels, else rows of numbers. It is fed from a stand-in
        of one batch: the data of a `fit` lies where it is, and is no part of what it holds.
        """
        whole("plan", "batch_size", batch_size)
        if not trains(self.model):
            self._follow()
        columns = self.model.inputs
        if columns is None:
            raise ValueError("plan: the model does not say how many columns it takes; give its class an `inputs`")
        outputs = self._outputs(columns, batch_size, training=True)
        labels = any(step.target_shape == () for step in self._steps.values())  # of a loss of the user's own
        classes = self.objective.classes or labels
        y = np.zeros((batch_size,) if classes else (batch_size, outputs), np.int64 if classes else self.model.dtype)
        return self._plan(columns, y, np.ones(batch_size, self.model.dtype) if weighted else None)

    def _plan(self, columns: int, y: Array, w: Array | None = None) -> Plan:
        """The step for rows of so many columns with targets and weights like y and w."""
        batch_size, outputs = len(y), self._outputs(columns, len(y), training=True)
        table = self._new_table(1)
        self._load(table, np.array([batch_size]), np.zeros(1, np.int64))
        with Plan(self.backend, dry=True, space=self._space).record("copies"):
            self._lower()
        sums = self._new_sums(y, outputs)
        step = self._new_step(batch_size, columns, y.shape[1:], w is not None, sums, table, dry=True)
        x = self.backend.empty((batch_size, columns), self.model.dtype)
        self.backend.write(x, 0)
        step.attach(Source(self.backend, x, self.backend.asarray(y), w if w is None else self.backend.asarray(w)))
        step.run()
        return step.plan

    # ---- data

    def _names(self, x: Any, y: Any) -> tuple[Names, Names]:
        """The model's names of the columns of x and y; where it has none, those of these frames. One column of y goes
        by any name."""
        given = column_names(y) or ()
        return (
            self.model.feature_names or column_names(x),
            self.model.target_names or (given if len(given) > 1 else None),
        )

    def _data(
        self, x: Any, y: Any, where: str, sample_weight: Any = None,
        class_weight: Mapping[Any, float] | str | None = None, named: tuple[Names, Names] | None = None,
        exact: bool = False,
    ) -> tuple[Buffer, Array, Array | None]:  # fmt: skip
        """x as checked rows, where it lies; y as checked targets, and the weights of the rows if any, on the host: in
        the model's type, to be trained on, or with exact=True as they were given, to be measured by.

        Frames' columns are taken by the model's names, or these.
        """
        names = self._names(x, y) if named is None else named
        x, y = (by_name(a, known, where, name) for a, known, name in zip((x, y), names, "xy", strict=True))
        check_one_place(x, y, where)
        dtype = self.model.dtype
        if is_on_device(x):
            rows = on_device(x, self.backend, dtype, self.model.inputs, where, "x")
            given = rows if x.dtype == dtype else self.backend.to_numpy(taken(x, self.backend, where, "x"))
            y = self.backend.to_numpy(taken(y, self.backend, where, "y"))
            if is_on_device(sample_weight):
                sample_weight = self.backend.to_numpy(taken(sample_weight, self.backend, where, "sample_weight"))
        else:
            given = as_features(x, None, self.model.inputs, where, finite=False)
            rows = as_features(given, dtype, None, where)
            if where == "fit" and self.precision.compute == "float16":
                as_features(rows, np.float16, None, where)  # what overflows it is named here, by row and column
        check_same_length(rows, y, where)
        outputs = self._outputs(rows.shape[1], 2)
        targets = self.objective.targets(y, None, outputs, where)
        if self.objective.classes and (self.metrics is None or [m.name for m in self.metrics] == ["accuracy"]):
            targets = labels_of(targets)  # accuracy counts them
        weights = row_weights(self.objective, targets, outputs, sample_weight, class_weight, where)
        if exact:
            return rows, targets, weights
        if where == "fit":
            self._warn_of_rounding(given, targets)
        if targets.ndim == 2:
            targets = self.objective.softened(as_targets(targets, dtype, targets.shape[1], where))
        return rows, targets, weights if weights is None else weights.astype(dtype)

    def _warn_of_rounding(self, x: Buffer, y: Array) -> None:
        """Say which column of what `fit` was given the model's type cannot hold, before anything is trained."""
        dtype, wider = np.dtype(self.model.dtype), ", or make the model with dtype='float64'"
        for name, a in (("x", x), ("y", y)):
            if a.dtype != dtype and a.ndim == 2 and (loss := lost(a, dtype)) is not None:
                remedy = f"subtract its mean and divide by its deviation in float64 first{wider}"
                if dtype == np.float64:
                    remedy = "subtract its least number first, as an integer"
                warn(f"fit: {name} {loss.phrase()}; {remedy}", RuntimeWarning)
        squares = self.objective.head == "identity" or any(m.squares for m in self.metrics or ())
        if squares and y.ndim == 2 and (what := unsquared(y, dtype)) is not None:
            figures = "the loss and its gradient would vanish or overflow"
            remedy = f"divide y by its deviation{wider if dtype == np.float32 else ''}"
            warn(f"fit: y {what}, so that {figures}; {remedy}", RuntimeWarning)

    def _outputs(self, columns: int, rows: int, training: bool = False, target: Array | None = None) -> int:
        """Columns of the model's output, found by binding its forward without running it: layers check shapes here."""
        _, output = self._forward(columns, rows, training)
        if target is not None:
            with Plan(self.backend, dry=True, space=self._space).record("loss"):
                like = self.backend.empty((rows, *target.shape[1:]), target.dtype)
                self.objective.total(output, Tensor(like, self.backend))
        return output.shape[1]

    def _forward(self, columns: int, rows: int, training: bool) -> tuple[Plan, Tensor]:
        """The forward pass and its output, bound but not run."""
        plan = Plan(self.backend, dry=True, space=self._space)
        with plan.record("forward"), mode(Mode(training, self.seed)):
            x = Tensor(self.backend.empty((rows, columns), self.model.dtype), self.backend)
            output = as_output(self.model(x), x.shape, "Trainer")
        return plan, output

    def _sums_of(self, y: Array, outputs: int) -> Sums:
        labels = y.ndim == 1
        if (outputs, labels) not in self._sums:
            self._sums[outputs, labels] = self._new_sums(y, outputs)
        return self._sums[outputs, labels]

    def _new_sums(
        self, y: Array, outputs: int, backend: Backend | None = None, dtype: npt.DTypeLike | None = None
    ) -> Sums:
        """Sums for targets like y, of the trainer's own backend and type unless others are given."""
        labels = y.ndim == 1
        soft = self.objective.classes and not labels
        if self.metrics is None:
            chosen = [metric(m, self.objective.head) for m in self.objective.metrics if not soft]
        elif soft and any(m.name == "accuracy" for m in self.metrics):
            raise ValueError("metric 'accuracy' counts labels, but y holds rows of class weights; leave it out")
        elif self.objective.head in ("identity", "exp") and any(m.name == "accuracy" for m in self.metrics):
            raise ValueError(
                f"metric 'accuracy' counts classes, but the loss is {self.objective.name}; use 'r2' or 'mae'"
            )
        else:
            chosen = self.metrics
        return Sums(backend or self.backend, chosen, outputs, dtype or self.model.dtype, labels)


def _applies(head: str | None, forward: Plan) -> bool:
    """Whether a forward pass ends in what makes probabilities or means of the loss's outputs."""
    names = [launch.name for launch in forward.launches]
    by_hand = head == "softmax" and names[-2:] == ["sum", "divide"] and "exp" in names[-4:]
    return bool(names) and (head == names[-1] or by_hand or forward.launches[-1].what.startswith(f"y = {head}("))


# ---- arguments -----------------------------------------------------------------------------------------------------


def _limit(key: str, given: Any, dtype: np.dtype[Any]) -> float:
    if given is None:
        return math.inf
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"Trainer: {key} must be a number or None, got {type(given).__name__} {given!r}")
    with np.errstate(over="ignore"):
        rounded = dtype.type(float(given))
    if not 0 < rounded < math.inf:
        of = f", which is {rounded:g} in {dtype}" if 0 < float(given) < math.inf else ""
        raise ValueError(f"Trainer: {key} must be positive and finite, got {given}{of}; None does not clip")
    return float(given)


def _optimizer(given: Any) -> Optimizer:
    if isinstance(given, str):
        if given not in OPTIMIZERS:
            raise ValueError(unknown("optimizer", given, sorted(OPTIMIZERS)))
        return OPTIMIZERS[given]()
    if theirs := of_pytorch(given):
        raise TypeError(f"Trainer: optimizer is {theirs}; expected a name or one such as gb.Adam(lr=1e-3)")
    if isinstance(given, type) and issubclass(given, Optimizer):
        raise TypeError(f"Trainer: optimizer is the class {given.__name__}; make one: gb.{given.__name__}()")
    if not isinstance(given, Optimizer):
        raise TypeError(
            f"Trainer: optimizer is {type(given).__name__}; expected a name or one such as gb.Adam(lr=1e-3)"
        )
    return given


def _check_fit(epochs: Any, batch_size: Any, shuffle: Any, callbacks: Any, stop_below: Any) -> None:
    whole("fit", "epochs", epochs)
    whole("fit", "batch_size", batch_size)
    if not callable(shuffle):
        flag("fit", "shuffle", shuffle)
    if stop_below is not None:
        number("fit", "stop_below", stop_below)
    if not isinstance(callbacks, Sequence):
        raise TypeError(f"fit: callbacks is {type(callbacks).__name__}; expected a list of functions of the trainer")
    if bad := [c for c in callbacks if isinstance(c, type)]:
        raise TypeError(f"fit: callback is the class {bad[0].__name__}; make one: {bad[0].__name__}()")
    if bad := [c for c in callbacks if not callable(c)]:
        raise TypeError(f"fit: callback {bad[0]!r} is not callable; expected a function of the trainer")


def _held_out(data: Any) -> Sequence[Any]:
    if not isinstance(data, tuple | list) or len(data) not in (2, 3):
        got = f"{len(data)} items" if isinstance(data, tuple | list) else type(data).__name__
        raise TypeError(f"fit: validation_data must be (x, y) or (x, y, weights), got {got}")
    return data
