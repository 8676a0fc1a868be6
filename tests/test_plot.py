"""Pictures: what is drawn is what was given; nothing global changes, and the same picture is the same bytes."""

import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import landscape, plot
from gpubackprop.plot import landscapes, plans
from gpubackprop.roofline import GPUS

matplotlib.use("Agg")

from matplotlib import pyplot


@pytest.fixture(autouse=True)
def tidy():
    """Figures are closed at the end; rcParams are what they were."""
    before = dict(matplotlib.rcParams)
    yield
    pyplot.close("all")
    assert dict(matplotlib.rcParams) == before


@pytest.fixture
def axes():
    return pyplot.subplots(layout="constrained")[1]


def lines(axes):
    """The lines by label, without those that have none."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def drawn(axes):
    """Render, so that what is wrong with it raises."""
    axes.get_figure().canvas.draw()
    return axes


def line_surface():
    return gb.surface(landscape.line_loss, (-2, 4), (-6, 8), points=61)


# ---- surfaces and descents -----------------------------------------------------------------------------------------


def test_seed_25_the_picture_has_logarithmic_contours_above_the_lowest_point(axes):
    found = line_surface()
    assert plot.surface(found, axes) is axes
    bar = drawn(axes).get_figure().axes[1]
    levels = [float(t.get_text()) for t in bar.get_yticklabels()]
    assert levels[0] == 0 and all(float(f"{n:.0e}"[0]) in (1, 2, 5) for n in levels[1:])
    ratios = np.divide(levels[2:], levels[1:-1])
    assert ratios.min() >= 2 and ratios.max() <= 2.5
    highest = found.values.max() - found.lowest[2]
    assert levels[-2] < highest <= levels[-1]
    assert bar.get_ylabel() == f"value above the lowest, {found.lowest[2]:.4g}"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("m", "b")
    assert axes.get_xlim() == (-2, 4) and axes.get_ylim() == (-6, 8)
    [star] = lines(axes).values()
    assert (star.get_xdata()[0], star.get_ydata()[0]) == found.lowest[:2]


def test_a_fine_grid_makes_no_large_file(axes, tmp_path):
    fine = gb.surface(landscape.line_loss, (-2, 4), (-6, 8), step=0.01)
    plot.save(plot.surface(fine, axes), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size < 400_000
    assert lines(axes)["lowest, m = 0.34, b = 0.79"].get_xydata().tolist() == [[0.34, 0.79]]


def test_a_saddle_has_even_levels(axes):
    plot.surface(gb.surface(landscape.saddle, (-1, 1), (-1, 1), points=21), axes)
    levels = [float(t.get_text().replace("−", "-")) for t in drawn(axes).get_figure().axes[1].get_yticklabels()]
    np.testing.assert_allclose(np.diff(levels), levels[1] - levels[0])
    assert levels[0] <= -1 and levels[-1] >= 1 and 0 in levels
    assert legend(axes) == ["lowest on the grid, x = 0, y = −1"]


@pytest.mark.parametrize("decades, base", [(1.5, 2), (30, 100)])
def test_levels_are_few_however_far_they_reach(decades, base):
    levels = landscapes._log_levels(np.logspace(0, decades, 1000) - 1)
    assert 4 < len(levels) < 22 and levels == sorted(set(levels))
    assert max(np.divide(levels[2:], levels[1:-1])) <= 2.5 * base


@pytest.mark.parametrize("function", [
    lambda x, y: 0 * x + 3, lambda x, y: gb.log(x * x + y * y), lambda x, y: gb.log(x) + y,
    lambda x, y: 1e300 * (x * x + y * y), lambda x, y: 1e-300 * (x * x + y * y), lambda x, y: 1e6 + x * x + y * y,
])  # fmt: skip
def test_surfaces_of_any_kind_are_drawn(function, axes):
    """Flat ones too, and such with a hole, with values that are not finite, or of any scale."""
    drawn(plot.surface(gb.surface(function, (-1, 1), (-1, 1), points=21), axes))


def test_seed_25_the_picture_has_the_descent_with_both_ends_and_every_step(axes):
    points = gb.descend(landscape.line_loss, (-1, 6), gb.SGD(0.02), 30)
    plot.surface(line_surface(), axes, path=points)
    assert legend(axes)[1].startswith("descent from")
    line, begin, end, dots = axes.lines[-4:]
    assert np.array_equal(line.get_xydata(), points) and np.array_equal(dots.get_xydata(), points)
    assert (begin.get_xydata().tolist(), begin.get_marker()) == ([[-1.0, 6.0]], "o")
    assert (end.get_xydata().tolist(), end.get_marker()) == ([points[-1].tolist()], "X")
    assert plot.path(points, axes, label="mine", color="red", linewidth=3) is axes
    assert lines(axes)["mine"].get_color() == "red" and lines(axes)["mine"].get_linewidth() == 3
    drawn(axes)


def test_seed_29_the_picture_of_a_race_shows_every_path(axes):
    paths = gb.race(landscape.saddle, (-1, 1e-6), steps=150)
    assert plot.race(gb.surface(landscape.saddle, (-1.5, 1.5), (-1.5, 1.5)), paths, axes) is axes
    shown = [line for line in axes.lines if len(line.get_xydata()) > 1]
    assert len(shown) == len(legend(axes)) == len(paths) == 7
    for line, (name, points), label in zip(shown, paths.items(), legend(axes), strict=True):
        assert np.array_equal(line.get_xydata(), points)
        inside = (np.abs(points) <= 1.5).all(1)
        assert label == (name if inside[-1] else f"{name}, out after {int(inside.sum())} steps")
        assert 1 <= len(line.get_markevery()) <= landscapes.MARKS and inside[line.get_markevery()].all()
    for key in ("color", "marker", "linestyle", "linewidth"):
        looks = {str(getattr(line, f"get_{key}")()) for line in shown}
        assert len(looks) == (7 if key in ("color", "marker", "linewidth") else 2)  # solid or dashed
    assert axes.get_xlim() == axes.get_ylim() == (-1.5, 1.5)
    box = axes.get_legend().get_window_extent(drawn(axes).get_figure().canvas.get_renderer())
    assert box.x0 >= axes.get_window_extent().x1


def test_many_racers_differ_in_colour_or_marker(axes):
    paths = {str(k): np.array([[0, 0], [k, 1]]) for k in range(30)}
    plot.race(gb.surface(landscape.saddle, (-1, 1), (-1, 1), points=5), paths, axes)
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines if len(line.get_xydata()) > 1}
    assert len(looks) == 30


def test_paths_that_diverge_are_drawn():
    with pytest.warns(RuntimeWarning, match="descend: step 7"):
        paths = gb.race(landscape.valley, (-1.2, 1), {"SGD": gb.SGD(0.01), "Adam": gb.Adam(0.01)}, 50)
    found = gb.surface(landscape.valley, (-2, 2), (-1, 3), points=21)
    drawn(plot.race(found, paths))
    axes = plot.progress(landscape.valley, paths)
    assert legend(axes) == ["SGD, ends after 6 steps", "Adam"]
    bottom, top = drawn(axes).get_ylim()
    assert 0.1 < bottom < top < 1000 and axes.get_yscale() == "log"


def test_progress_is_the_value_after_each_step(axes):
    paths = gb.race(landscape.saddle, (-1, 1e-6), steps=90)
    assert plot.progress(landscape.saddle, paths, axes) is axes
    for name, points in paths.items():
        np.testing.assert_array_equal(lines(axes)[name].get_ydata(), points[:, 0] ** 2 - points[:, 1] ** 2)
        assert lines(axes)[name].get_xdata().tolist() == list(range(91))
    positive = plot.progress(lambda x, y: gb.exp(x) + 0 * y, {"a": [[0, 0], [1, 5]]})
    assert positive.lines[0].get_ydata().tolist() == pytest.approx([1, np.e]) and positive.get_yscale() == "log"
    assert axes.get_yscale() == "linear" and axes.get_ylim() == pytest.approx((-1.1, 1.1))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "value")
    drawn(axes)


@pytest.mark.parametrize("call, error, message", [
    (lambda s: plot.race(s, {}), TypeError, "race: paths is dict, expected paths by name, as gb.race returns them"),
    (lambda s: plot.race(s, np.ones((2, 2))), TypeError, "race: paths is ndarray"),
    (lambda s: plot.race(s, {"a": [[1, 2, 3]]}), ValueError, r"race: a path has shape \(1, 3\), expected \(steps \+ 1"),
    (lambda s: plot.surface(s, path=[1, 2]), ValueError, r"path: a path has shape \(2,\)"),
    (lambda s: plot.progress(landscape.saddle, {"a": []}), ValueError, "progress: a path has shape"),
    (lambda s: plot.progress(lambda x, y: x.sum() + y.sum(), {"a": [[1, 2]] * 3}), TypeError,
     r"progress: the function returned a tensor of shape \(\), expected a tensor of shape \(3,\); .* elementwise"),
    (lambda s: plot.surface(landscape.saddle), TypeError, "surface: surface is function; expected a Surface: gb.surf"),
    (lambda s: plot.race(s.values, {"a": [[1, 2]]}), TypeError, "race: surface is ndarray; expected a Surface"),
    (lambda s: plot.gradient_flow(s), TypeError, "gradient_flow: report is Surface; expected what gb.gradient_report"),
])  # fmt: skip
def test_wrong_paths(call, error, message):
    with pytest.raises(error, match=message):
        call(gb.surface(landscape.saddle, (-1, 1), (-1, 1), points=5))
    assert not pyplot.get_fignums()  # nothing is left open


# ---- training ------------------------------------------------------------------------------------------------------


HISTORY = {"loss": [2.0, 1.0, 0.5, 0.25], "val_loss": [2.5, 1.0, 0.75, 1.25], "gap": [0.5, 0.0, 0.25, 1.0],
           "accuracy": [0.2, 0.5, 0.9, 1.0], "val_accuracy": [0.1, 0.6, 0.7, 0.8]}  # fmt: skip


def test_curves_of_loss_and_gap(axes):
    assert plot.curves(HISTORY, axes=axes) is axes
    own, held = lines(axes)["loss, training"], lines(axes)["loss, validation"]
    assert (own.get_xdata().tolist(), own.get_ydata().tolist()) == ([1, 2, 3, 4], HISTORY["loss"])
    assert held.get_ydata().tolist() == HISTORY["val_loss"] and own.get_linestyle() != held.get_linestyle()
    assert legend(axes)[2:] == ["gap, 1 at the end", "best, 0.75 after epoch 3"]
    [gap] = axes.collections
    corners = {tuple(corner) for corner in gap.get_paths()[0].vertices.tolist()}
    assert {(1, 2.0), (1, 2.5), (4, 0.25), (4, 1.25)} <= corners
    assert lines(axes)["best, 0.75 after epoch 3"].get_xydata().tolist() == [[3, 0.75]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
    drawn(axes)


def test_the_best_accuracy_is_the_highest(axes):
    plot.curves(HISTORY, "accuracy", axes)
    assert legend(axes)[2:] == ["gap, −0.2 at the end", "best, 0.8 after epoch 4"]


def test_curves_of_a_trainer_without_validation():
    trainer = gb.Trainer(gb.mlp([64, 10]), seed=0, device="cpu")
    with pytest.raises(ValueError, match="curves: the history is empty; train first"):
        plot.curves(trainer)
    trainer.fit(*gb.datasets.digits(), epochs=1, progress=False)
    axes = drawn(plot.curves(trainer))
    best = f"best, {trainer.history['loss'][0]:.4g} after epoch 1"
    assert legend(axes) == ["loss, training", best] and not axes.collections
    assert [t for t in axes.get_xticks() if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]] == [1]


def test_curves_with_holes_and_over_decades(axes):
    nan = np.nan
    drawn(plot.curves({"loss": [1.0, 0.1, 1e-3], "val_loss": [nan, nan, 0.5]}, axes=axes))
    assert axes.get_yscale() == "log" and legend(axes)[-1] == "best, 0.5 after epoch 3"
    assert legend(axes)[-2] == "not finite in 2 epochs"
    assert legend(axes)[2] == "gap, 0.499 at the end"
    exploded = plot.curves({"loss": [1.0, 1e9, np.inf, nan]})
    assert "not finite in 2 epochs" in legend(drawn(exploded))
    assert legend(drawn(plot.curves({"loss": [nan]}))) == ["loss, training", "not finite in 1 epoch"]


def test_a_loss_has_logarithmic_contours_wherever_its_lowest_point_lies(axes):
    """A saddle, which goes below 0, has even ones."""
    corner = gb.surface(lambda a, b: a * a + b * b, (0, 3), (0, 3), points=41)
    bar = drawn(plot.surface(corner, axes)).get_figure().axes[1]
    levels = [float(t.get_text()) for t in bar.get_yticklabels()]
    assert levels[0] == 0 and levels[-1] / levels[1] > 100 and "lowest on the grid" in legend(axes)[0]


@pytest.mark.parametrize("history, figure, error, message", [
    (HISTORY, "r2", ValueError, "curves: unknown figure 'r2'; the history has loss, val_loss, gap"),
    ({"loss": []}, "loss", ValueError, "curves: the history is empty; train first"),
    ([1, 2], "loss", TypeError, "curves: history is list; expected what fit returns, or a trainer"),
])  # fmt: skip
def test_wrong_histories(history, figure, error, message):
    with pytest.raises(error, match=message):
        plot.curves(history, figure)


@pytest.fixture
def report():
    x, y = gb.datasets.digits()
    trainer = gb.Trainer(gb.mlp([64, 16, 16, 10], dropout=0.1), seed=0, device="cpu")
    return gb.gradient_report(trainer, x[:100], y[:100])


def test_gradient_flow_has_every_layer_and_verdict(report, axes):
    assert plot.gradient_flow(report, axes) is axes
    delta, gradient = lines(axes).values()
    assert delta.get_xdata().tolist() == [row.delta_pre for row in report.layers]
    dense = [row.gradient for row in report.layers if row.what.startswith("Dense")]
    assert [v for v in gradient.get_xdata() if not np.isnan(v)] == dense  # Dropout has none, and no NaN is written
    assert texts(axes) == [row.verdict for row in report.layers]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == 5 and labels[0].startswith("0 Dense(64, 16") and labels[1].startswith("1 Dropout")
    assert axes.get_xscale() == "log" and axes.yaxis_inverted() and len(legend(axes)) == 2
    drawn(axes)


def test_gradient_flow_writes_what_the_axis_cannot_hold(report, axes):
    wrong = {0: (0.0, "vanishing"), 2: (np.inf, "exploding"), 4: (np.nan, "exploding")}
    layers = [replace(row, delta_pre=wrong[k][0], gradient=wrong[k][0], verdict=wrong[k][1]) if k in wrong else row
              for k, row in enumerate(report.layers)]  # fmt: skip
    drawn(plot.gradient_flow(replace(report, layers=tuple(layers)), axes))
    assert sorted(texts(axes)) == sorted(["0", "∞", "NaN"] * 2 + [row.verdict for row in layers])
    bold = [t.get_text() for t in axes.texts if t.get_fontweight() == "bold" and len(t.get_text()) > 3]
    assert bold == ["vanishing", "exploding", "exploding"]
    nothing = [replace(row, delta_pre=np.nan, gradient=np.nan) for row in report.layers]
    drawn(plot.gradient_flow(replace(report, layers=tuple(nothing))))


# ---- decisions -----------------------------------------------------------------------------------------------------


def quadrants(classes=3, columns=2, seed=0):
    """A trained network and its rows: classes around a circle in the first two columns."""
    rng = np.random.default_rng(seed)
    y = np.arange(40 * classes) % classes
    angle = 2 * np.pi * y / classes
    x = np.stack([np.cos(angle), np.sin(angle)], 1) * 3 + rng.normal(size=(len(y), 2)) * 0.3
    x = np.hstack([x, rng.normal(size=(len(y), columns - 2))])
    trainer = gb.Trainer(gb.mlp([columns, 24, classes]), optimizer=gb.Adam(0.03), seed=0, device="cpu")
    trainer.fit(x, y, epochs=40, batch_size=20, progress=False)
    return trainer.model, x, y


def test_regions_carry_the_names_of_what_is_predicted_there(axes):
    model, x, y = quadrants()
    assert plot.decision_regions(model, x, y, axes, classes=["a", "b", "c"], names=["left", "up"]) is axes
    assert legend(axes) == ["a", "b", "c"] and (axes.get_xlabel(), axes.get_ylabel()) == ("left", "up")
    for k, name in enumerate("abc"):
        line = lines(axes)[name]
        assert np.array_equal(line.get_xydata(), x[y == k]) and line.get_linestyle() == "None"
    assert sorted(texts(axes)) == ["a", "b", "c"]
    for text in axes.texts:
        [found] = model.predict_classes([text.get_position()])
        assert "abc"[found] == text.get_text()
    assert len({line.get_marker() for line in axes.lines}) == len({line.get_color() for line in axes.lines}) == 3
    drawn(axes)


def test_the_line_between_regions_is_where_scores_are_equal(axes):
    model = gb.Sequential(gb.Dense(2, 2))
    model.load_state_dict({"0.weight": [[1.0, 0.0], [0.0, 1.0]], "0.bias": [0.0, 0.0]})  # class 0 where x > y
    plot.decision_regions(model, [[-1.0, -3.0], [2.0, 5.0]], [0, 1], axes)
    edges = [path.vertices for c in axes.collections if len(c.get_edgecolor()) and not len(c.get_facecolor())
             for path in c.get_paths()]  # fmt: skip
    assert edges and all(np.abs(v[:, 0] - v[:, 1]).max() < 1e-6 for v in edges)


def test_other_columns_are_held_at_their_mean(axes):
    model, x, y = quadrants(columns=4)
    model.load_state_dict({k: np.zeros_like(w) for k, w in model.state_dict().items()})
    weight = np.zeros((24, 3))
    weight[0] = [1, -1, -2]
    first = np.zeros((4, 24))
    first[3, 0] = 1  # the first class where column 3 is positive
    x[:, 3] = np.abs(x[:, 3])
    state = model.state_dict() | {"0.weight": first, "1.weight": weight}
    model.load_state_dict(state)
    plot.decision_regions(model, x, y, axes, columns=(2, 0))
    assert texts(axes) == ["0"] and (axes.get_xlabel(), axes.get_ylabel()) == ("column 2", "column 0")
    assert np.array_equal(lines(axes)["1"].get_xydata(), x[y == 1][:, [2, 0]])
    x[:, 3] *= -1
    model.load_state_dict(state | {"0.weight": -first, "1.weight": -weight})
    assert sorted(texts(plot.decision_regions(model, x, y, columns=(2, 0)))) == ["2"]


def test_a_dozen_classes_differ_in_marker_or_colour_and_by_name(axes):
    model, x, y = quadrants(classes=12)
    drawn(plot.decision_regions(model, x, y, axes))
    assert legend(axes) == [str(k) for k in range(12)] and set(texts(axes)) == set(legend(axes))
    assert len({(line.get_marker(), line.get_color()) for line in axes.lines}) == 12


def test_two_classes_of_one_output(axes):
    x = np.array([[-1.0, 0.0], [1.0, 0.5], [-2.0, 0.1], [2.0, 0.2]])
    trainer = gb.Trainer(gb.mlp([2, 1]), "bce", gb.Adam(0.1), seed=0, device="cpu")
    trainer.fit(x, [0, 1, 0, 1], epochs=60, progress=False)
    drawn(plot.decision_regions(trainer, x, [0, 1, 0, 1], axes))
    positions = {text.get_text(): text.get_position()[0] for text in axes.texts}
    assert positions["0"] < 0 < positions["1"]


def test_constant_columns_and_a_single_region(axes):
    model = gb.mlp([2, 3]).initialize(0)
    model.load_state_dict({"0.weight": np.zeros((2, 3)), "0.bias": [0, 1, 0]})
    drawn(plot.decision_regions(model, [[1.0, 2.0]], [0], axes))
    assert texts(axes) == ["1"] and axes.get_xlim() == (0.5, 1.5)


@pytest.mark.parametrize("columns, more, error, message", [
    (3, {}, ValueError, r"decision_regions: x has 3 columns, expected 2; choose two with columns=\(i, j\)"),
    (1, {}, ValueError, "decision_regions: x has 1 column, expected 2; add another"),
    (3, {"columns": (0, 3)}, ValueError, r"columns is \(0, 3\), expected two different numbers from 0 to 2"),
    (3, {"columns": (1, 1)}, ValueError, "two different numbers"),
    (3, {"columns": 1}, TypeError, "decision_regions: columns is 1; expected two numbers of columns"),
    (3, {"columns": (0, "b")}, TypeError, r"columns\[1\] must be an integer, got str 'b'"),
    (2, {"classes": ["a"]}, ValueError, "decision_regions: the model has 3 classes but classes has 1 names; give one"),
    (2, {"names": ["a"]}, ValueError, "decision_regions: x has 2 columns but names has 1 names; give one for each"),
])  # fmt: skip
def test_wrong_columns(columns, more, error, message):
    with pytest.raises(error, match=message):
        plot.decision_regions(gb.mlp([columns, 3]).initialize(0), np.ones((4, columns)), [0, 1, 2, 0], **more)


def test_wrong_models_and_labels():
    model = gb.mlp([2, 3]).initialize(0)
    with pytest.raises(TypeError, match="decision_regions: model is int; expected a layer"):
        plot.decision_regions(3, np.ones((1, 2)), [0])
    with pytest.raises(ValueError, match="decision_regions: label 3 at row 0 is out of range"):
        plot.decision_regions(model, np.ones((1, 2)), [3])
    model.output_kind = "sigmoid"
    with pytest.raises(ValueError, match="decision_regions: the model has 3 sigmoid outputs, not one class"):
        plot.decision_regions(model, np.ones((1, 2)), [0])
    model.output_kind = "identity"
    with pytest.raises(ValueError, match="was trained for regression"):
        plot.decision_regions(model, np.ones((1, 2)), [0])


# ---- plans ---------------------------------------------------------------------------------------------------------


def step(*layers, loss="cross_entropy", **settings):
    model = gb.Sequential(*layers) if len(layers) > 1 else layers[0]
    return gb.Trainer(model, loss, device="cpu", seed=0, **settings).plan(8)


def named(axes):
    """The launches' names with their places, column and row, from top to bottom."""
    found = [(t.get_text(), *t.get_position()) for t in axes.texts if t.get_weight() == "bold"]
    return [(name, "left" if x < plans.RIGHT else "right", round(y + 0.2)) for name, x, y in found]


def arrows(axes):
    """From which row on the left to which on the right results are used again."""
    return sorted((a.xyann[1], a.xy[1]) for a in axes.texts if hasattr(a, "xyann") and a.xy[0] == plans.RIGHT)


def test_a_plan_goes_down_to_the_loss_and_back_up(axes):
    found = step(gb.Dense(4, 6, "relu"), gb.Dense(6, 3), optimizer="sgd")
    assert plot.plan(found, axes) is axes
    places = named(drawn(axes))
    assert [name for name, *_ in places] == [launch.name for launch in found.launches]
    left, right = ([row for _, side, row in places if side == way] for way in ("left", "right"))
    assert left == sorted(left) == [0, 1, 2, 3, 4, 6] and right == sorted(right, reverse=True) == [5, 4, 3, 2, 1, 0]
    assert {"layer 0", "layer 1", "loss"} <= set(texts(axes))
    # the batch for dw of layer 0; h of layer 0 for its slope and for dw of layer 1; dx of the loss three times
    assert arrows(axes) == [(0, 1), (2, 2), (2, 4), (6, 3), (6, 4), (6, 5)]
    assert f"{found.flops:,} operations, {found.bytes:,} bytes moved" in axes.get_title(loc="left")
    assert "MODEL" not in axes.get_title(loc="left")


@pytest.mark.parametrize(
    "make",
    [
        lambda: step(gb.Dense(4, 1), loss="mse"),  # a model without a path
        lambda: step(gb.Dense(4, 2), gb.Activation("tanh"), loss=lambda o, t: gb.mse(gb.sigmoid(o), t)),
        lambda: step(gb.Dense(4, 6, "gelu"), gb.BatchNorm(6), gb.Residual(gb.Dense(6, 6), gb.Dropout(0.5)),
                     gb.Concatenate(gb.Dense(6, 2), gb.Sequential()), gb.Dense(8, 3), l2=0.1, clip_norm=1.0,
                     accumulate=2, optimizer=gb.SGD(0.1, momentum=0.9, nesterov="lookahead")),
    ],
)  # fmt: skip
def test_every_launch_of_a_plan_has_its_own_place(make):
    found = make()
    places = named(drawn(plot.plan(found)))
    assert [name for name, *_ in places] == [launch.name for launch in found.launches]
    assert len({place[1:] for place in places}) == len(places)


def test_bars_are_as_long_as_the_work(axes):
    found = step(gb.Dense(4, 6, "relu"), gb.Dense(6, 3))
    plot.plan(found, axes)
    widths = [bar.get_width() for bar in axes.patches if bar.get_height() == pytest.approx(0.075)]
    for key, own in (("flops", widths[::2]), ("bytes", widths[1::2])):
        values = np.array([getattr(launch, key) for launch in found.launches])
        np.testing.assert_allclose(own, plans.WIDTH * values / values.max())


def test_times_of_a_plan_are_labelled_a_model(axes):
    found = step(gb.Dense(4, 6, "relu"), gb.Dense(6, 3))
    plot.plan(found, axes, gpu="h100", precision="tf32")
    assert "roofline MODEL of one NVIDIA H100 SXM, tf32 products, not a measurement" in axes.get_title(loc="left")
    assert sum(t.endswith(" ns") for t in texts(axes)) == len(found.launches)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_roofline_has_each_launch_on_its_roof(axes, precision):
    found, gpu = step(gb.Dense(4, 6, "relu"), gb.Dense(6, 3)), GPUS["a100"]
    assert plot.roofline(found, "a100", precision, axes) is axes
    drawn(axes)
    assert "MODEL" in axes.get_title(loc="left") and "not a measurement" in axes.get_title(loc="left")
    points = {k.split(" ×")[0]: line.get_xydata() for k, line in lines(axes).items() if not k.startswith("roof")}
    for name, at in points.items():
        launches = [launch for launch in found.launches if launch.name == name]
        peak = gpu.rate(precision) if name == "gemm" else gpu.float32 * 1e12
        for launch, (intensity, rate) in zip(launches, at, strict=True):
            assert intensity == pytest.approx(launch.flops / launch.bytes)
            assert rate == pytest.approx(min(peak, intensity * gpu.bandwidth * 1e9) / 1e12)
    assert set(points) == {launch.name for launch in found.launches if launch.flops}
    assert sum(k.startswith("roof of") for k in lines(axes)) == (1 if precision == "float32" else 2)


def test_both_stand_side_by_side():
    axes = plans.with_roofline(step(gb.Dense(4, 3)), "t4")
    assert ["MODEL" in a.get_title(loc="left") for a in drawn(axes).get_figure().axes] == [True, True]


def test_bad_plans_are_named():
    found = step(gb.Dense(4, 3))
    with pytest.raises(TypeError, match=r"plan: plan is Sequential; expected what trainer\.plan\(batch_size\) returns"):
        plot.plan(gb.mlp([2, 2]))
    with pytest.raises(ValueError, match="roofline: the plan has no launches"):
        plot.roofline(gb.Plan(gb.get_backend("cpu")), "h100")
    with pytest.raises(ValueError, match="plan: unknown gpu 'gtx'; choose from 't4'"):
        plot.plan(found, gpu="gtx")
    with pytest.raises(ValueError, match="roofline: unknown precision 'int8'; choose from"):
        plot.roofline(found, "h100", "int8")
    assert pyplot.get_fignums() == []


# ---- figures and files ---------------------------------------------------------------------------------------------


def test_without_axes_there_is_a_new_figure():
    first = plot.curves(HISTORY)
    second = plot.curves(HISTORY)
    assert first.get_figure() is not second.get_figure() and len(pyplot.get_fignums()) == 2
    assert type(first.get_figure().get_layout_engine()).__name__ == "ConstrainedLayoutEngine"


@pytest.mark.parametrize("kind, begin", [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_the_same_picture_is_the_same_bytes(kind, begin, tmp_path):
    for name in "ab":
        plot.save(plot.surface(line_surface()), tmp_path / f"{name}{kind}")
    data = (tmp_path / f"a{kind}").read_bytes()
    assert data == (tmp_path / f"b{kind}").read_bytes() and data.startswith(begin)
    assert b"dc:date" not in data and b"CreationDate" not in data


def test_a_file_of_another_kind():
    with pytest.raises(ValueError, match=r"a\.jpg: is of unknown kind '\.jpg'; choose from \.svg, \.png, \.pdf"):
        plot.save(plot.curves(HISTORY), "a.jpg")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'matplotlib is not installed; pip install "gpubackprop\[plot\]"'):
        plot.curves(HISTORY)
