"""How scikit-learn trains its perceptrons: epochs of descent with its rules of stopping, or L-BFGS over all rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Buffer, is_on_device
from gpubackprop.checks import warn
from gpubackprop.optimizers import LBFGS, SGD, Adam, Optimizer
from gpubackprop.step import Keeper
from gpubackprop.trainer import Trainer, TrainingDiverged

__all__ = ["STOCHASTIC", "descend", "minimise", "undone_on_error"]

Array = npt.NDArray[Any]
STOCHASTIC = ("sgd", "adam")
LOSSES = {"softmax": "cross_entropy", "logistic": "bce_sum", "identity": "half_sse", "exp": "poisson_sum"}
LEAST_RATE = 1e-6  # an adaptive learning rate that is no larger is not divided again


@dataclass
class Rate:
    """A learning rate that changes between epochs."""

    value: float

    def __call__(self, update: int) -> float:
        return self.value


@dataclass
class Strength:
    """scikit-learn's alpha, which is divided by the rows of a batch."""

    alpha: float

    def __call__(self, rows: float) -> float:
        return self.alpha / rows


def _trainer(e: Any, optimizer: Optimizer, random: np.random.RandomState) -> Trainer:
    """A trainer of the estimator's network by its parameters, with moments of zero."""
    several = e.out_activation_ == "identity" and e.n_outputs_ > 1
    return Trainer(
        e.model_, LOSSES[e.out_activation_], optimizer, ["mse"] if several else [], e.device, precision=e.precision,
        seed=int(random.randint(2**31)) if e.dropout else 0, l2=Strength(e.alpha),
    )  # fmt: skip


def _loss(history: dict[str, list[float]], outputs: int, weighted: bool) -> float:
    """The epoch's loss as scikit-learn reports it: what it descends on sums the outputs' squares, but this is a mean.

    Metrics do not weigh, so that with weights of the rows the penalty is divided by the outputs too.
    """
    loss = history["loss"][-1]
    if "mse" not in history:
        return loss
    return loss / outputs if weighted else loss - (outputs - 1) / 2 * history["mse"][-1]


def _beside(x: Buffer, a: Array, e: Any) -> Any:
    """The array where x lies."""
    return get_backend(e.device).asarray(a) if is_on_device(x) else a


# ---- all or nothing ------------------------------------------------------------------------------------------------


@contextmanager
def undone_on_error(e: Any, continuing: bool) -> Iterator[None]:
    """Fit the estimator inside; on any error it is put back as it was before, the draws of its RandomState too.

    A network that is trained further (`continuing`) is written to in place, so its values and its trainer are kept.
    """
    attributes, random = vars(e).copy(), e.random_state
    draws = random.get_state() if isinstance(random, np.random.RandomState) else None
    put_back = _network(e) if continuing else None
    try:
        yield
    except BaseException:
        vars(e).clear()
        vars(e).update(attributes)
        if draws is not None:
            random.set_state(draws)
        if put_back is not None:
            put_back()
        raise


def _network(e: Any) -> Callable[[], None]:
    """Keep what training changes in place; the function that puts it back."""
    model, trainer = e.model_, getattr(e, "trainer_", None)
    values, dtype, device, head = model.state_dict(), model.dtype, model.backend.device, model.output_kind
    curves = [getattr(e, name, None) for name in ("loss_curve_", "validation_scores_")]
    trained = None if trainer is None else trainer.__getstate__() | {"history": dict(trainer.history)}
    history = trained["history"] if trained else {}
    lists = [(curve, len(curve)) for curve in (*curves, *history.values()) if curve is not None]
    settings = [] if trainer is None else [trainer.penalty.l2, trainer.optimizer.lr]
    before = [(each, vars(each).copy()) for each in settings if isinstance(each, Rate | Strength)]

    def put_back() -> None:
        if (model.dtype, model.backend.device) != (dtype, device):
            model.dtype = dtype
            model._lay_out(device)
        model.load_state_dict(values)
        model.output_kind = head
        for curve, length in lists:
            del curve[length:]
        for each, numbers in before:
            vars(each).update(numbers)
        if trainer is not None:
            trainer.__setstate__(trained)

    return put_back


# ---- descent -------------------------------------------------------------------------------------------------------


def descend(
    e: Any, x: Buffer, target: Array, weight: Array | None, random: np.random.RandomState, incremental: bool
) -> None:
    """Train the estimator by epochs of mini-batches: one if `incremental`, else until its rules of stopping hold."""
    if e.early_stopping and incremental:
        raise ValueError("partial_fit does not support early_stopping=True, which holds rows out of all data; use fit")
    if not incremental or getattr(e, "trainer_", None) is None or e.trainer_.model is not e.model_:
        e.trainer_ = _trainer(e, _optimizer(e), random)
    e.trainer_.penalty.l2.alpha = e.alpha
    watch = Watch(e)
    if e.early_stopping:
        x, target, weight = watch.hold_out(x, target, weight, random)
    watch.rows, watch.weighted, e.n_iter_ = len(x), weight is not None, 0
    try:
        e.trainer_.fit(
            x, _beside(x, target, e), 1 if incremental else e.max_iter, _batch_size(e, len(x)), progress=False,
            shuffle=_orders(random) if e.shuffle else False, callbacks=[watch, *e.callbacks], sample_weight=weight,
        )  # fmt: skip
    except KeyboardInterrupt:
        warn("Training interrupted by user.")
    except TrainingDiverged as error:
        if not e.early_stopping:
            raise ValueError(str(error)) from error
        warn(f"{error}; the best validation score was before", ConvergenceWarning)
    if e.n_iter_ == e.max_iter and not (incremental or watch.stopped):
        what = f"Maximum iterations ({e.max_iter}) reached and the optimization hasn't converged yet"
        warn(f"fit: {what}; raise max_iter", ConvergenceWarning)


def _optimizer(e: Any) -> Optimizer:
    if e.solver == "adam":
        return Adam(e.learning_rate_init, e.beta_1, e.beta_2, e.epsilon, eps_at="hat")
    nesterov = "torch" if e.nesterovs_momentum and e.momentum else None
    return SGD(Rate(e.learning_rate_init), e.momentum, nesterov, velocity=True)


def _batch_size(e: Any, rows: int) -> int:
    if e.batch_size == "auto":
        return min(200, rows)
    if e.batch_size > rows:
        what = f"batch_size {e.batch_size} is more than the {rows} rows"
        warn(f"fit: {what}; all of them are used")
    return min(int(e.batch_size), rows)


def _orders(random: np.random.RandomState) -> Callable[[int], Array]:
    """scikit-learn's order of the rows in each epoch: that of the epoch before, shuffled."""
    last = np.zeros(0, np.intp)

    def order(rows: int) -> Array:
        nonlocal last
        shuffled = np.arange(rows)
        random.shuffle(shuffled)
        last = last[shuffled] if last.size else shuffled
        return last

    return order


class Watch:
    """After each epoch what scikit-learn does then: figures noted, the learning rate changed, whether to stop."""

    rows = 0  # of the data trained on
    weighted = False
    stopped = False
    held_out: tuple[Buffer, Array, Array | None] | None = None

    def __init__(self, estimator: Any) -> None:
        self.e = e = estimator
        self.rate = e.trainer_.optimizer.lr
        if e.t_ == 0 or (getattr(e, "validation_scores_", None) is not None) != e.early_stopping:
            e.loss_curve_, e._no_improvement_count = [], 0
            e.validation_scores_, e.best_validation_score_ = ([], -np.inf) if e.early_stopping else (None, None)
            e.best_loss_ = None if e.early_stopping else np.inf

    def hold_out(
        self, x: Buffer, target: Array, weight: Array | None, random: np.random.RandomState
    ) -> tuple[Buffer, Array, Array | None]:
        """Put the rows aside that the validation score is taken on; the others."""
        e = self.e
        stratify = e._names(target) if e.out_activation_ == "logistic" and e.n_outputs_ == 1 else None
        kept, held = train_test_split(
            np.arange(len(x)), random_state=random, test_size=e.validation_fraction, stratify=stratify
        )
        if len(held) < 2:
            remedy = "increase validation_fraction, or pass more data"
            raise ValueError(f"fit: the validation set has {len(held)} rows, expected at least 2; {remedy}")
        parts = [(_take(x, rows, e), target[rows], None if weight is None else weight[rows]) for rows in (kept, held)]
        self.held_out = parts[1]
        return parts[0]

    def begin(self, trainer: Trainer) -> None:
        """The network as it is counts as the best so far."""
        if self.held_out is not None:
            x, *rest = self.held_out
            if not is_on_device(x):  # once, not in every epoch
                x = trainer.backend.asarray(x, trainer.model.dtype)
            self.held_out = x, *rest
            self._best = Keeper(trainer.model, trainer.state)
            self._best.keep()

    def end(self, trainer: Trainer) -> None:
        """Back to the network with the best validation score."""
        if self.held_out is not None:
            self._best.restore()
            del self._best

    def __call__(self, trainer: Trainer) -> bool:
        e = self.e
        e.n_iter_ += 1
        e.t_ += self.rows
        e.loss_ = _loss(trainer.history, e.n_outputs_, self.weighted)
        e.loss_curve_.append(e.loss_)
        self._say(f"Iteration {e.n_iter_}, loss = {e.loss_:.8f}")
        e._no_improvement_count = 0 if self._improved(trainer) else e._no_improvement_count + 1
        if isinstance(self.rate, Rate) and e.learning_rate == "invscaling":
            self.rate.value = e.learning_rate_init / (e.t_ + 1) ** e.power_t
        if e._no_improvement_count > e.n_iter_no_change:
            self.stopped = self._stops()
            if not self.stopped:  # but goes on at a lower rate
                e._no_improvement_count = 0
        return self.stopped

    def _improved(self, trainer: Trainer) -> bool:
        """Whether the epoch was better than the best by tol at least; a NaN counts as that, as in scikit-learn."""
        e = self.e
        if self.held_out is None:
            best, e.best_loss_ = e.best_loss_, min(e.best_loss_, e.loss_)
            return not e.loss_ > best - e.tol
        x, target, weight = self.held_out
        output = trainer.backend.to_numpy(trainer.model.predict(x))
        score = e._validation_score(output, target, weight) if np.isfinite(output).all() else np.nan
        e.validation_scores_.append(score)
        self._say(f"Validation score: {score:f}")
        best = e.best_validation_score_
        if score > best:
            e.best_validation_score_ = score
            self._best.keep()
        return not score < best + e.tol

    def _stops(self) -> bool:
        """Whether too many epochs without improvement end training: an adaptive learning rate is divided first."""
        e, what = self.e, "Validation score" if self.held_out else "Training loss"
        why = f"{what} did not improve more than tol={e.tol:f} for {e.n_iter_no_change} consecutive epochs."
        if not isinstance(self.rate, Rate) or e.learning_rate != "adaptive":
            self._say(f"{why} Stopping.")
            return True
        if self.rate.value <= LEAST_RATE:
            self._say(f"{why} Learning rate too small. Stopping.")
            return True
        self.rate.value /= 5
        self._say(f"{why} Setting learning rate to {self.rate.value:f}")
        return False

    def _say(self, line: str) -> None:
        if self.e.verbose:
            print(line)


def _take(x: Buffer, rows: Array, e: Any) -> Buffer:
    """Those rows of x, where it lies."""
    if not is_on_device(x):
        return x[rows]
    backend = get_backend(e.device)
    out = backend.empty((len(rows), x.shape[1]), x.dtype)
    backend.gather(x.reshape(1, *x.shape), backend.asarray(rows, np.intp), out.reshape(1, *out.shape)).run()
    return out


# ---- L-BFGS --------------------------------------------------------------------------------------------------------


def minimise(e: Any, x: Buffer, target: Array, weight: Array | None, random: np.random.RandomState) -> None:
    """Train the estimator by SciPy's L-BFGS-B, whose counts and tolerance max_iter, max_fun and tol are.

    Unlike scikit-learn's, the loss it is given for several outputs is the one whose gradient it is given.
    """
    found: list[Any] = []

    def search(function: Callable[[Array], tuple[float, Array]], weights: Array) -> Array:
        options = {"maxiter": e.max_iter, "maxfun": e.max_fun, "gtol": e.tol}
        found.append(minimize(function, weights, method="L-BFGS-B", jac=True, options=options))
        return np.asarray(found[-1].x)

    e.trainer_, trainer = None, _trainer(e, LBFGS(minimizer=search), random)
    try:
        trainer.fit(
            x, _beside(x, target, e), 1, shuffle=False, callbacks=[*e.callbacks], progress=False, sample_weight=weight
        )
    except TrainingDiverged as error:
        raise ValueError(str(error)) from error
    [result] = found
    e.loss_ = _loss(trainer.history, e.n_outputs_, weight is not None)
    e.n_iter_ = min(result.nit, e.max_iter)
    if e.verbose:
        print(f"{result.message} after {e.n_iter_} iterations, loss = {e.loss_:.8f}")
    if result.status:
        what = f"lbfgs has not converged after {e.n_iter_} iterations ({result.message})"
        warn(f"fit: {what}; raise max_iter, or scale the data", ConvergenceWarning)
