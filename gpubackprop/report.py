"""Why a network does not learn: the scales of values, gradients and updates layer by layer, and a verdict on each."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop import ops
from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Buffer
from gpubackprop.columns import Grid, Shown, table
from gpubackprop.diagnostics import Observed, Site, gradient_at, observed
from gpubackprop.formulas import KEPT, Activation, evaluate
from gpubackprop.names import unknown
from gpubackprop.tensor import Tensor
from gpubackprop.trainer import Trainer, TrainingDiverged

__all__ = ["GradientReport", "LayerReport", "gradient_report"]

Floats = npt.NDArray[np.float64]

# Gradients are compared by their norm with that at the output of the last trained layer, so that neither the number of
# rows, nor the loss's scale, nor a scaler behind the network matters. Descent has one learning rate for all layers:
# where the gradient is a thousandth of that, a layer moves a thousand times slower.
VANISHING, EXPLODING = 1e-3, 1e3
LARGE_LOSS = 10.0  # times that of a constant guess: outputs that are far off, whatever gradients they send
LARGE_UPDATE = 1.0  # of the weights: a step that is longer than they are keeps little of what they were
SMALL_UPDATE = 1e-6  # of the weights: in a thousand steps they move by a thousandth
# A value is saturated where its activation passes less than a twentieth of the gradient that it passes at best. Sound
# networks of hard_tanh that have long been trained on the digits have two thirds of such values in a layer.
SATURATED_SLOPE, SATURATED_SHARE = 0.05, 0.8
# Sound networks of relu on the digits have up to a fifth of dead units; these are named, but no harm.
DEAD_SHARE = 0.25
DEAD_ROWS = 20  # a unit of relu is off in about half of the rows: in 20 rows by chance, once in a million units

REMEDIES = {  # by verdict, the gravest first
    "exploding": "try a smaller learning rate, clip_norm=1, scaled inputs and targets (gb.Scaler), the default "
    "initialisation, or LayerNorm or BatchNorm between the layers",
    "dead": "try a smaller learning rate, leaky_relu or elu, a bias_init above 0, or scaled inputs (gb.Scaler)",
    "vanishing": "try relu or another activation that does not flatten, the default initialisation, Residual around "
    "layers, LayerNorm or BatchNorm between them, or fewer of them",
    "saturated": "try scaled inputs (gb.Scaler), the default initialisation, LayerNorm or BatchNorm before the "
    "activation, or cross_entropy or bce in place of squared errors of probabilities",
    "healthy": "gradients of a sound size reach every layer; if it does not learn, look at the data and its labels",
}


@dataclass(eq=False, repr=False)
class LayerReport(Shown):
    """One layer, or an activation in the forward of a layer of one's own; scales are root mean squares."""

    name: str
    what: str
    verdict: str
    why: str  # the figure behind the verdict
    preact: float
    postact: float
    delta_pre: float  # ∂L/∂preact of the mean loss L
    delta_post: float
    share: float  # ‖∂L/∂preact‖ as a share of ‖∂L/∂output‖ of the last trained layer
    gradient: float  # ∂L/∂parameters; NaN without trained ones
    update: float  # ‖Δw‖ / ‖w‖ of the step that the optimizer would make
    saturation: float  # share of rows × units; NaN unless the activation flattens on both sides
    units: int
    dead: tuple[int, ...]  # units whose activation passes no gradient in any row

    @property
    def advice(self) -> str:
        """What to try."""
        return REMEDIES[self.verdict]

    def parts(self) -> Iterable[str | Grid]:
        note = [self.why] if self.why else []
        return [table([_COLUMNS, _cells(self)], len(_COLUMNS) - 3), *note, f"{self.verdict}: {self.advice}"]


@dataclass(eq=False, repr=False)
class GradientReport(Shown):
    """What one training step looks like from inside, layer by layer; `print` it."""

    loss: float
    rows: int
    layers: tuple[LayerReport, ...]
    guess: float  # the loss of equal probabilities, or of the targets' mean; NaN of a user's loss

    def __getitem__(self, name: str | int) -> LayerReport:
        """The layer of that name."""
        if (found := next((row for row in self.layers if row.name == str(name)), None)) is None:
            raise KeyError(unknown("layer", name, [row.name for row in self.layers]))
        return found

    @property
    def verdict(self) -> str:
        """The gravest of the layers' verdicts; exploding if the loss is far above that of a guess."""
        if self.loss_is_large:
            return "exploding"
        return min((row.verdict for row in self.layers), key=list(REMEDIES).index)

    @property
    def loss_is_large(self) -> bool:
        """Whether the loss is more than 10 times that of a constant guess: the outputs are far off."""
        return self.loss > LARGE_LOSS * self.guess > 0

    @property
    def advice(self) -> str:
        """The verdicts in plain words, with what to try."""
        lines = []
        if self.loss_is_large:
            what = f"the loss {self.loss:.6g} is more than {LARGE_LOSS:g} times that of a constant guess"
            lines.append(f"exploding ({what}): {REMEDIES['exploding']}")
        for verdict, remedy in REMEDIES.items():
            names = [row.name for row in self.layers if row.verdict == verdict]
            if names and verdict != "healthy":
                lines.append(f"{verdict} (layer{'s' * (len(names) > 1)} {', '.join(names)}): {remedy}")
        updates = [row.update for row in self.layers if not math.isnan(row.update)]
        if updates and max(updates) < SMALL_UPDATE:
            lines.append(
                f"a step moves no layer by more than {max(updates):.1e} of its weights: raise the learning rate"
            )
        return "\n".join(lines) or f"healthy: {REMEDIES['healthy']}"

    def parts(self) -> Iterable[str | Grid]:
        rows = [_COLUMNS, *map(_cells, self.layers)]
        guess = "" if math.isnan(self.guess) else f" (a constant guess: {self.guess:.6g})"
        units = "root mean squares; share of the gradient at the output, update of the weights"
        title = f"loss {self.loss:.6g} over {self.rows} rows{guess}; {units}"
        notes = [
            f"layer {row.name}: {note}" for row in self.layers for note in (row.why, _listed(row, self.rows)) if note
        ]
        return [title, table(rows, len(_COLUMNS) - 3), THRESHOLDS, *notes, self.advice]


_COLUMNS = ("layer", "", "verdict", "preact", "postact", "delta_pre", "delta_post", "share", "gradient", "update",
            "saturated", "dead")  # fmt: skip
THRESHOLDS = (
    f"exploding: share > {EXPLODING:g}, update > {LARGE_UPDATE:g} or loss > {LARGE_LOSS:g} guesses; "
    f"vanishing: share < {VANISHING:g}; saturated > {SATURATED_SHARE:.0%}; dead > {DEAD_SHARE:.0%} of the units"
)


def _cells(row: LayerReport) -> tuple[str, ...]:
    scales = [f"{scale:.1e}" for scale in (row.preact, row.postact, row.delta_pre, row.delta_post)]
    scales += ["" if math.isnan(scale) else f"{scale:.1e}" for scale in (row.share, row.gradient, row.update)]
    saturated = "" if math.isnan(row.saturation) else f"{row.saturation:.0%}"
    return (row.name, row.what, row.verdict, *scales, saturated, str(len(row.dead) or ""))


def _listed(row: LayerReport, rows: int) -> str:
    if not row.dead:
        return ""
    few = "; too few rows to tell" if rows < DEAD_ROWS else ""
    units = ", ".join(map(str, row.dead[:12])) + ", …" * (len(row.dead) > 12)
    which = "unit is" if row.units == 1 else "units are"
    return f"{len(row.dead)} of {row.units} {which} dead, passing no gradient in any row: {units}{few}"


def gradient_report(trainer: Trainer, x: Any, y: Any) -> GradientReport:
    """The scales of values, gradients and updates in one training step over the rows, and a verdict on every layer.

    The verdicts, the gravest first; one rule holds for every layer:

    - exploding: ‖∂L/∂preact‖ is more than 1000 times ‖∂L/∂output‖ of the last trained layer (`share`), the step is
      longer than the weights, or a value is not finite. The whole report also if the loss is more than 10 times that of
      a constant guess: equal probabilities (ln K for K classes), or the targets' mean (for mse their variance).
    - dead: more than a quarter of the units pass no gradient in any of 20 rows or more.
    - vanishing: `share` is less than 0.001.
    - saturated: more than 80 % of the values lie where the activation passes less than 5 % of its largest slope.
    - healthy: none of these.

    `print` the report for the figures, these thresholds, reasons and what to try. Some hundred rows tell enough.
    Neither the trainer nor its model changes: a copy takes the step.
    """
    seen = observed(trainer, x, y, "gradient_report")
    sites = list(seen.sites.values())
    last = max((k for k, site in enumerate(sites) if site.parameters), default=len(sites) - 1)
    output = _norm(_host(gradient_at(sites[last].postact), seen))
    layers = [_measured(site, seen, output if k <= last else math.nan) for k, site in enumerate(sites)]
    updates = _updates(sites, seen, x, y)
    layers = [replace(layer, update=update) for layer, update in zip(layers, updates, strict=True)]
    verdicts = [_verdict(layer, seen.rows) for layer in layers]
    judged = (replace(layer, verdict=v, why=why) for layer, (v, why) in zip(layers, verdicts, strict=True))
    return GradientReport(seen.loss, seen.rows, tuple(judged), _guess(seen.trainer, x, y))


# ---- measuring -----------------------------------------------------------------------------------------------------


def _measured(site: Site, seen: Observed, output: float) -> LayerReport:
    """The site's figures, but for its update and verdict; `output` is the norm that its gradient is compared with."""
    pre, post = _host(site.preact.buffer, seen), _host(site.postact.buffer, seen)
    delta_pre, delta_post = (_host(gradient_at(t), seen) for t in (site.preact, site.postact))
    gradients = [_host(gradient_at(p), seen).ravel() for p in site.parameters]
    saturation, dead = math.nan, list[int]()
    if site.row is not None:
        slopes = _slopes(site.row, site.preact, seen)
        saturation = float((slopes < SATURATED_SLOPE * _peak(site.row)).mean()) if _peak(site.row) else math.nan
        silent = (slopes == 0) & np.isfinite(pre)
        dead = np.flatnonzero(silent.reshape(-1, silent.shape[-1]).all(0)).tolist()
    counts = bool(site.parameters or site.row)
    return LayerReport(
        name=site.name,
        what=site.layer.describe() if site.layer else "",
        verdict="healthy",
        why="",
        preact=_rms(pre),
        postact=_rms(post),
        delta_pre=_rms(delta_pre),
        delta_post=_rms(delta_post),
        share=(_norm(delta_pre) / output if output else 0.0) if counts else math.nan,
        gradient=_rms(np.concatenate(gradients)) if gradients else math.nan,
        update=math.nan,
        saturation=saturation,
        units=pre.shape[-1],
        dead=tuple(dead),
    )


def _updates(sites: Sequence[Site], seen: Observed, x: Any, y: Any) -> list[float]:
    """‖Δw‖ / ‖w‖ of each site's parameters in a step that the copy of the trainer makes; NaN where it has none."""
    before = [[_host(p.buffer, seen) for p in site.parameters] for site in sites]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a step that float16 skips: the update is 0 then
            seen.trainer.fit(x, y, epochs=1, batch_size=seen.rows, shuffle=False, progress=False)
    except TrainingDiverged:
        return [math.nan] * len(sites)
    after = [[_host(p.buffer, seen) for p in site.parameters] for site in sites]
    return [
        _ratio(_norm(*(b - a for a, b in zip(*w, strict=True))), _norm(*w[0])) for w in zip(before, after, strict=True)
    ]


def _guess(trainer: Trainer, x: Any, y: Any) -> float:
    """The mean loss of outputs that are the same for all rows: equal probabilities, or the targets' mean."""
    objective = trainer.objective
    if objective.own:
        return math.nan
    rows, targets, _ = trainer._data(x, y, "gradient_report")
    outputs = np.zeros((len(targets), trainer._outputs(rows.shape[1], 2)))
    if targets.dtype.kind == "f":
        targets = targets.astype(np.float64)
    if objective.head in ("identity", "exp"):
        outputs += targets.mean(0)
    if objective.head == "exp":
        outputs = np.log(np.maximum(outputs, np.finfo(np.float64).tiny))
    back = get_backend("cpu")
    return float(objective.total(Tensor(outputs, back), Tensor(back.asarray(targets), back)).item()) / len(targets)


def _host(buffer: Buffer, seen: Observed) -> Floats:
    return seen.trainer.backend.to_numpy(buffer).astype(np.float64)


def _norm(*arrays: Floats) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(sum(float(np.sum(a * a)) for a in arrays))


def _rms(a: Floats) -> float:
    return _norm(a) / math.sqrt(max(a.size, 1))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _slopes(row: Activation, z: Tensor, seen: Observed) -> Floats:
    """|f′(z)| in the model's type."""
    leaf = Tensor(z.buffer, z.backend, requires_grad=True)
    ops.unary(leaf, row).backward(np.ones(z.shape, z.dtype))
    return np.abs(_host(gradient_at(leaf), seen))


@lru_cache(maxsize=KEPT)
def _peak(row: Activation) -> float:
    """The largest |f′| of an activation that flattens on both sides; 0 of others."""
    backward, forward = row.backward_graph(), row.forward_graph()

    def slope(x: float) -> float:
        return abs(float(evaluate(backward, {"dy": 1.0, "x": x, "y": evaluate(forward, {"x": x})})))

    peak = max(slope(k / 10) for k in range(-60, 61))
    return peak if max(slope(-30.0), slope(30.0)) < VANISHING * peak else 0.0


# ---- judging -------------------------------------------------------------------------------------------------------


def _verdict(layer: LayerReport, rows: int) -> tuple[str, str]:
    """The gravest verdict that holds of the layer, and why."""
    scales = (layer.preact, layer.postact, layer.delta_pre, layer.delta_post)
    if not all(map(math.isfinite, scales)):
        return "exploding", "values or gradients are NaN or infinite; gb.find_nan(trainer, x, y) names the launch"
    if layer.share > EXPLODING:
        return "exploding", f"its gradient is {layer.share:.1e} times that at the output of the last trained layer"
    if layer.update > LARGE_UPDATE:
        return "exploding", f"the next step is {layer.update:.1e} times as long as its weights"
    if rows >= DEAD_ROWS and len(layer.dead) > DEAD_SHARE * layer.units:
        return "dead", ""  # the units are listed anyway
    if layer.share == 0:
        return "vanishing", "no gradient arrives: units behind it are dead, weights are 0, or the loss is at its least"
    if layer.share < VANISHING:
        return "vanishing", f"its gradient is {layer.share:.1e} of that at the output of the last trained layer"
    if layer.saturation > SATURATED_SHARE:
        return "saturated", f"{layer.saturation:.0%} of its values lie where the activation is flat"
    return "healthy", ""
