"""The laboratory: every engine finds the plan's gradient, and does the work that its algorithm is known for."""

import math
from itertools import product

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import lab

FOR_NETWORKS = ["paths", "dynamic_programming", "post_activation", "pre_activation", "matrix"]
DIFFERENCES = {"finite_difference": 1e-4, "central": 1e-8}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def composition(*functions):
    """w -> functions[0] -> …, a chain."""
    graph, before = lab.Graph("w"), "w"
    for k, function in enumerate(functions):
        graph.node(f"y{k}", function, before)
        before = f"y{k}"
    return graph


def network(activation="tanh", sizes=(4, 3, 5, 2)):
    return gb.mlp(sizes, activation, dtype="float64").initialize(1)


def batch(rng, rows=3, columns=4, classes=2):
    return rng.normal(size=(rows, columns)), rng.integers(0, classes, rows)


# ---- row 10: finite differences ------------------------------------------------------------------------------------


def test_seed_10_differences_cost_a_loss_call_for_each_weight(rng):
    """784-15-10 has 11,935 weights: 11,936 calls ahead, 23,870 centred, one forward and one backward by the plan."""
    model, (x, y) = gb.mlp([784, 15, 10], "sigmoid").initialize(0), batch(rng, 1, 784, 10)
    found = {engine: lab.gradients(model, x, y, engine) for engine in ("plan", *DIFFERENCES)}
    assert found["finite_difference"].work == {"loss calls": 11_936}
    assert found["central"].work == {"loss calls": 23_870}
    assert {k: found["plan"].work[k] for k in ("forward", "backward")} == {"forward": 1, "backward": 1}
    for engine, tolerance in DIFFERENCES.items():
        assert 0 < found[engine].error(found["plan"]) < tolerance


def test_seed_10_a_central_difference_is_of_second_order():
    """f = σ(σ(w)) at 0.7, eps = 1e-6: ahead 1e-8 apart, centred 4e-11."""
    graph, exact = composition(gb.sigmoid, gb.sigmoid), 0.0496742538397346
    errors = [abs(lab.gradients(graph, 0.7, engine=e).flat[0] - exact) for e in ("finite_difference", "central")]
    assert errors[0] == pytest.approx(1.0e-8, rel=0.05) and errors[1] < 1e-10
    for engine, order in (("finite_difference", 1), ("central", 2)):
        near, far = (abs(lab.gradients(graph, 0.7, engine=engine, eps=e).flat[0] - exact) for e in (1e-3, 1e-2))
        assert math.log10(far / near) == pytest.approx(order, abs=0.05)


# ---- rows 14 and 15: paths, and dynamic programming ----------------------------------------------------------------


def test_seed_14_the_graph_of_products_has_32_paths():
    """Five layers of two units: o = w³², ∂o/∂w = 32 w³¹ as the sum over 32 paths of six local derivatives each."""
    found = lab.gradients(lab.product_graph(), 1.1, engine="paths")
    assert found.work == {"paths": 32, "products": 192}
    assert found.value == pytest.approx(1.1**32, rel=1e-14)
    assert found.gradients["w"] == pytest.approx(32 * 1.1**31, rel=1e-14)
    assert found.gradients["w"] == pytest.approx(614.2189598649, abs=1e-10)


def test_seed_14_the_cap_is_kept_and_the_count_said():
    graph = lab.product_graph()
    assert lab.gradients(graph, 1.1, engine="paths", cap=32).work["paths"] == 32
    with pytest.raises(ValueError, match=r"^gradients: there are 32 paths, more than cap=31; .* visits 20 edges"):
        lab.gradients(graph, 1.1, engine="paths", cap=31)
    with pytest.raises(ValueError, match="there are 1,073,741,824 paths, more than cap=1,000,000"):
        lab.gradients(lab.product_graph(30), 1.0, engine="paths")
    with pytest.raises(ValueError, match="there are about 1e602 paths"):
        lab.gradients(lab.product_graph(2000), 1.0, engine="paths")


@pytest.mark.parametrize("layers, units", [(1, 2), (5, 2), (3, 3), (200, 2)])
def test_seed_15_dynamic_programming_visits_each_edge_once(layers, units):
    """Linear in the edges, units + units² (layers − 1) + units, where the paths are units^layers."""
    found = lab.gradients(lab.product_graph(layers, units), 1.0, engine="dynamic_programming")
    assert found.work == {"edge visits": 2 * units + units**2 * (layers - 1)}
    assert found.gradients["w"] == units**layers


def test_seed_15_twenty_edge_visits_give_what_192_products_give():
    by_paths, swept = (lab.gradients(lab.product_graph(), 1.1, engine=e) for e in ("paths", "dynamic_programming"))
    assert (by_paths.work["products"], swept.work["edge visits"]) == (192, 20)
    assert swept.gradients["w"] == pytest.approx(by_paths.gradients["w"], rel=1e-14)


# ---- row 16: two recursions, one gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "gelu", "identity"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_seed_16_both_recursions_give_one_gradient(activation, loss, rng):
    """δ = ∂L/∂a, Δ = ∂L/∂h: δ = Φ′(a) Δ unit for unit, and dW agree to 1e-12."""
    model, (x, y) = network(activation), batch(rng)
    y = y if loss == "cross_entropy" else rng.normal(size=(3, 2))
    post, pre, mixed, plan = (
        lab.gradients(model, x, y, e, loss=loss)
        for e in ("post_activation", "pre_activation", "dynamic_programming", "plan")
    )
    for found in (post, pre, mixed):
        assert found.error(plan) <= 1e-12
    assert not post.delta_pre and not pre.delta_post
    h = x
    for name, layer in model.children().items():
        a = gb.tensor(h @ layer.weight.numpy() + layer.bias.numpy(), requires_grad=True)
        out = gb.Activation(layer.activation)(a)
        out.backward(np.ones(a.shape))
        np.testing.assert_allclose(pre.delta_pre[name], a.grad.numpy() * post.delta_post[name], rtol=1e-12, atol=1e-16)
        np.testing.assert_allclose(mixed.delta_pre[name], pre.delta_pre[name], rtol=1e-12, atol=1e-16)
        np.testing.assert_allclose(mixed.delta_post[name], post.delta_post[name], rtol=1e-12, atol=1e-16)
        h = out.numpy()


def test_seed_16_the_deltas_are_what_backward_leaves_at_the_units(rng):
    """Δ and δ of the unrolled network are the gradients at its post- and pre-activations (erratum E10)."""
    model, (x, y) = network(), batch(rng)
    trainer = gb.Trainer(model, seed=0)
    found = lab.gradients(model, x, y, "dynamic_programming")
    for name in "012":
        np.testing.assert_allclose(found.delta_pre[name], gb.sensitivity(trainer, x, y, name), rtol=1e-12)


def test_seed_16_what_the_recursion_begins_with_is_a_choice(rng):
    """S(o, o) = 1 gives ∂o/∂w, and ∂L/∂o in its place ∂L/∂w: one recursion, two cotangents (erratum E14)."""
    graph = lab.product_graph(3)
    for engine in ("plan", "central", "paths", "dynamic_programming"):
        one, seeded = (lab.gradients(graph, 1.1, engine=engine, cotangent=c).flat for c in (1.0, -2.5))
        np.testing.assert_allclose(seeded, -2.5 * one, rtol=1e-12)
    model, (x, y) = network(), batch(rng)
    for engine in FOR_NETWORKS:
        one, seeded = (lab.gradients(model, x, y, engine, cotangent=c).flat for c in (1.0, -2.5))
        np.testing.assert_allclose(seeded, -2.5 * one, rtol=1e-12)


# ---- every engine on every subject ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [e for e in lab.ENGINES if e != "plan"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce", lambda o, t: gb.mse(gb.sigmoid(o), t)])
def test_engines_agree_on_a_network(engine, loss, rng):
    model, x = network("sigmoid"), rng.normal(size=(3, 4))
    y = rng.integers(0, 2, 3) if loss == "cross_entropy" else rng.integers(0, 2, (3, 2)).astype(float)
    found, plan = (lab.gradients(model, x, y, e, loss=loss) for e in (engine, "plan"))
    assert found.error(plan) <= DIFFERENCES.get(engine, 1e-12)
    assert found.value == plan.value and found.engine == engine
    assert {k: g.shape for k, g in found.gradients.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_the_plan_is_the_trainers_gradient(rng):
    model, (x, y) = network(), batch(rng)
    found = lab.gradients(model, x, y)
    loss = gb.softmax_cross_entropy(model(x), y)
    loss.backward()
    assert found.value == pytest.approx(loss.item(), rel=1e-15)
    for name, p in model.named_parameters().items():
        np.testing.assert_allclose(found.gradients[name], p.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("engine", FOR_NETWORKS)
def test_masks_missing_biases_frozen_and_shared_weights(engine, rng):
    mask = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    shared = gb.Dense(3, 3, "tanh")
    model = gb.Sequential(
        gb.Sequential(gb.Dense(4, 3, "tanh", mask=mask)), shared, shared, gb.Dense(3, 2, bias=False), dtype="float64"
    ).initialize(3)
    model.layers[0].layers[0].bias.requires_grad = False
    x, y = batch(rng)
    found, plan = (lab.gradients(model, x, y, e) for e in (engine, "plan"))
    assert set(found.gradients) == set(plan.gradients) == {"0.0.weight", "1.weight", "1.bias", "3.weight"}
    assert found.error(plan) <= 1e-12
    assert (found.gradients["0.0.weight"][mask == 0] == 0).all()


@pytest.mark.parametrize("engine", ["plan", "finite_difference", "central", "paths", "dynamic_programming"])
def test_engines_agree_on_a_graph_of_several_inputs(engine):
    """o = p(y) q(y) + y b with y = a², p = exp, q = sin: the paths through p, q and y add up."""
    graph = lab.Graph("a", "b")
    graph.node("y", lambda a, again: a * again, "a", "a")
    graph.node("p", gb.exp, "y")
    graph.node("q", gb.sin, "y")
    graph.node("o", lambda p, q, y, b: p * q + y * b, "p", "q", "y", "b")
    a, b = 0.6, -1.3
    y = a * a
    found = lab.gradients(graph, {"b": b, "a": a} if engine == "plan" else (a, b), engine=engine)
    exact = [2 * a * (math.exp(y) * (math.sin(y) + math.cos(y)) + b), y]
    np.testing.assert_allclose(found.flat, exact, rtol=DIFFERENCES.get(engine, 1e-13) * 10)
    assert found.value == pytest.approx(math.exp(y) * math.sin(y) + y * b, rel=1e-15)
    if engine == "paths":  # twice to y, from there three ways on; and b by itself
        assert found.work == {"paths": 7, "products": 2 * (3 + 3 + 2) + 1}


@pytest.mark.parametrize("engine", [e for e in lab.ENGINES if e != "plan"])
def test_weights_without_an_edge_are_not_moved(engine, rng):
    """Their gradient is 0 by every engine, and differences make no calls for them."""
    model, (x, y) = network(sizes=(4, 6, 2)), batch(rng)
    gb.prune(model, 0.5)
    found, plan = (lab.gradients(model, x, y, e) for e in (engine, "plan"))
    assert found.error(plan) <= DIFFERENCES.get(engine, 1e-12)
    if engine in DIFFERENCES:
        left = 18 + 8  # weights and biases
        assert found.work == {"loss calls": left + 1 if engine == "finite_difference" else 2 * left}


@pytest.mark.parametrize("engine", FOR_NETWORKS)
def test_dropout_passes_on_and_activations_may_stand_behind(engine, rng):
    model = gb.Sequential(gb.Dense(4, 3), gb.Activation("tanh"), gb.Dropout(0.5), gb.Dense(3, 2), dtype="float64")
    x, y = batch(rng)
    found, plan = (lab.gradients(model.initialize(0), x, y, e) for e in (engine, "plan"))
    assert found.error(plan) <= 1e-12 and plan.value > 0


def test_a_trainer_brings_its_loss(rng):
    model, x, y = network(), rng.normal(size=(3, 4)), rng.normal(size=(3, 2))
    for loss in ("mse", lambda o, t: gb.mse(gb.tanh(o), t)):
        trainer = gb.Trainer(model, loss, seed=0)
        for engine in ("plan", "matrix"):
            by_trainer, by_model = lab.gradients(trainer, x, y, engine), lab.gradients(model, x, y, engine, loss=loss)
            np.testing.assert_array_equal(by_trainer.flat, by_model.flat)
    assert lab.gradients(trainer, x, y, loss="sse").value == pytest.approx(lab.gradients(model, x, y, loss="sse").value)


def test_a_model_without_trained_weights_is_named(rng):
    model = network()
    for p in model.named_parameters().values():
        p.requires_grad = False
    with pytest.raises(ValueError, match="gradients: every weight is frozen"):
        lab.gradients(model, *batch(rng))


def test_seed_17_the_matrix_form_is_what_a_training_step_computes(rng):
    """Δ(r) = (Δ(r+1) W(r+1)ᵀ) ⊙ f′(A(r)), dW(r) = Z(r−1)ᵀ Δ(r), in two products and one of two for the first layer."""
    model, (x, y) = network("sigmoid"), batch(rng)
    found = lab.gradients(model, x, y, "matrix")
    gb.softmax_cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters().items():
        np.testing.assert_allclose(found.gradients[name], p.grad.numpy(), rtol=1e-12, atol=1e-16)
    a = x @ model.layers[0].weight.numpy() + model.layers[0].bias.numpy()
    back = found.delta_pre["1"] @ model.layers[1].weight.numpy().T
    np.testing.assert_allclose(found.delta_pre["0"], sigmoid(a) * (1 - sigmoid(a)) * back, rtol=1e-12)
    assert found.work == {"forward": 1, "backward": 1, "matrix products": 3 * 3 - 1}


def test_a_graph_is_a_function_of_numbers_too():
    assert lab.product_graph(2)(1.5).item() == 1.5**4


def test_inputs_that_reach_nothing_and_nodes_that_ignore_them():
    graph = lab.Graph("a", "unused")
    graph.node("dead end", gb.exp, "unused")
    graph.node("o", lambda a: a, "a")
    for engine in ("plan", "finite_difference", "central", "paths", "dynamic_programming"):
        assert lab.gradients(graph, (2.0, 3.0), engine=engine).flat == pytest.approx([1, 0], abs=1e-9)
    graph.node("constant", lambda o: gb.tensor(4.0), "o")
    for engine in ("plan", "finite_difference", "paths", "dynamic_programming"):
        found = lab.gradients(graph, (2.0, 3.0), engine=engine)
        assert found.value == 4 and not found.flat.any()


def test_dead_ends_are_neither_counted_nor_walked():
    graph = lab.product_graph(40)
    graph.node("aside", lambda w: 3 * w, "w")
    found = lab.gradients(graph, 2.0, engine="paths")
    assert found.work == {"paths": 1, "products": 1} and found.flat == [3]


def test_neither_the_model_nor_the_data_changes(rng):
    model, (x, y) = gb.mlp([4, 3, 2]).initialize(0), batch(rng)
    before, rows = model.state_dict(), x.copy()
    lab.compare(model, x, y)
    after = model.state_dict()
    assert all((before[k] == after[k]).all() and before[k].dtype == after[k].dtype == np.float32 for k in before)
    assert (x == rows).all() and model.output_kind is None


def test_a_model_that_was_never_drawn_is_drawn_as_its_first_call_draws_it(rng):
    x, y = batch(rng)
    a, b = gb.mlp([4, 3, 2]), gb.mlp([4, 3, 2])
    np.testing.assert_array_equal(lab.gradients(a, x, y).flat, lab.gradients(b.initialize(0), x, y).flat)


def test_a_plan_and_differences_take_any_layer(rng):
    model = gb.Sequential(gb.Dense(4, 3), gb.LayerNorm(3), gb.Dropout(0.5), gb.Dense(3, 2), dtype="float64").initialize(
        0
    )
    x, y = batch(rng)
    comparison = lab.compare(model, x, y)
    assert [g.engine for g in comparison.found] == ["plan", "finite_difference", "central"]
    assert comparison["central"].error(comparison["plan"]) < 1e-8
    assert list(comparison.refused) == FOR_NETWORKS
    with pytest.raises(ValueError, match=r"layer '1' is LayerNorm\(3\); this engine takes Dense layers"):
        lab.gradients(model, x, y, "matrix")


# ---- the table -----------------------------------------------------------------------------------------------------


def test_a_comparison_prints_value_error_work_and_time():
    lines = str(lab.compare(lab.product_graph(), 1.1)).splitlines()
    assert lines[0].startswith("value 21.1137767454; its gradient;")
    assert lines[1].split() == ["engine", "work", "gradient", "error", "time"]
    rows = {line.split()[0]: line for line in lines[3:]}
    assert list(rows) == ["plan", "finite_difference", "central", "paths", "dynamic_programming"]
    assert "32 paths, 192 products" in rows["paths"] and "20 edge visits" in rows["dynamic_programming"]
    assert "1 forward, 1 backward, 27 launches" in rows["plan"] and "2 loss calls" in rows["central"]
    for name in ("plan", "paths", "dynamic_programming"):
        assert "614.218959865" in rows[name]
    assert all(line.endswith(("µs", "ms", " s")) for line in rows.values())


def test_a_comparison_lists_who_refuses(rng):
    model, (x, y) = gb.mlp([4] * 8 + [2], "tanh").initialize(0), batch(rng, 2)
    text = str(lab.compare(model, x, y, cap=1000))
    assert "paths" in text and "refused" in text.splitlines()[-2]
    assert text.splitlines()[-1].startswith("paths: there are ") and "numbers, by their norm" in text
    chosen = lab.compare(model, x, y, ["matrix", "matrix"])
    assert [g.engine for g in chosen.found] == ["plan", "matrix"]
    assert list(lab.compare(model, x, y, ["paths"], cap=1000).refused) == ["paths"]
    with pytest.raises(ValueError, match="compare: unknown engine 'path'"):
        lab.compare(model, x, y, ["path"])


def test_an_engine_that_cannot_record_a_branch_is_listed():
    graph = lab.Graph("w")
    graph.node("y", lambda w: w * 2 if w > 0 else w, "w")
    comparison = lab.compare(graph, 3.0)
    assert [g.engine for g in comparison.found] == ["paths", "dynamic_programming"]
    assert set(comparison.refused) == {"plan", "finite_difference", "central"} and "g of paths" in str(comparison)
    graph.node("o", lambda y: gb.stack([y, y]).sum() if y > 0 else 3.0, "y")
    with pytest.raises(TypeError, match="node 'o' returned float"):
        lab.compare(graph, -1.0)


def test_one_of_a_kind_is_said_in_the_singular():
    text = str(lab.compare(composition(lambda w: -w), 2.0))
    assert "1 path, 1 product " in text and "1 edge visit " in text and "2 loss calls" in text


# ---- bad input -----------------------------------------------------------------------------------------------------


BAD_GRAPHS = [
    (lambda: lab.Graph(), "Graph: got the inputs \\(\\), expected one or more distinct names"),
    (lambda: lab.Graph("a", "a"), "distinct names"),
    (lambda: lab.Graph("w").node("w", gb.exp, "w"), "there is a node 'w' already"),
    (lambda: lab.Graph("w").node("y", gb.exp), "Graph: node 'y' has no parents; choose from w"),
    (lambda: lab.Graph("w").node("y", gb.exp, "v"), "Graph: node 'y' has the unknown parent 'v'; choose from w"),
    (lambda: lab.gradients(lab.Graph("w"), 1.0), "there is no node; add one"),
    (lambda: lab.gradients(lab.product_graph(), (1.0, 2.0)), "x has 2 values, expected one for each of the inputs w"),
    (lambda: lab.gradients(lab.product_graph(), {"v": 1.0}), "x has values for v, expected them for w"),
    (lambda: lab.gradients(lab.product_graph(), math.nan), "gradients: w must be finite"),
    (lambda: lab.gradients(lab.product_graph(), 1.0, engine="matrix"), "'matrix' is for networks; .* from plan,"),
    (lambda: lab.gradients(lab.product_graph(), 1.0, engine="tape"), "gradients: unknown engine 'tape'; choose from"),
    (lambda: lab.gradients(lab.product_graph(), 1.0, eps=0.0), "gradients: eps must be > 0, got 0"),
    (lambda: lab.gradients(lab.product_graph(), 1.0, cap=0), "gradients: cap must be at least 1, got 0"),
    (lambda: lab.gradients(gb.mlp([4, 2]), [[1, 2, 3]], [0]), "gradients: x has 3 columns but the model expects 4"),
    (lambda: lab.gradients(gb.mlp([2, 2]), [[1, 2]], [0, 1]), "gradients: x has 1 rows? but y has 2"),
    (lambda: lab.product_graph(0), "product_graph: layers must be at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", BAD_GRAPHS, ids=[m for _, m in BAD_GRAPHS])
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


BAD_KINDS = [
    (lambda: lab.gradients(lab.product_graph(), 1.0, [1]), "got targets y, but .* leave y out"),
    (lambda: lab.gradients("net", [[1]], [0]), "gradients: model is str; expected a layer"),
    (lambda: lab.gradients(composition(lambda w: 3.0), 1.0), "Graph: node 'y0' returned float; expected a tensor"),
    (lambda: lab.gradients(composition(lambda w: gb.stack([w, w])), 1.0), "node 'y0' returned shape \\(2,\\)"),
]


@pytest.mark.parametrize("call, message", BAD_KINDS, ids=[m for _, m in BAD_KINDS])
def test_wrong_kinds_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("rows, columns", list(product((1, 4), (1, 3))))
def test_the_work_of_a_network_is_its_edges(rows, columns, rng):
    """Per row: a weight's edge and a unit's for each connection after the first layer, a bias's, a unit's to L."""
    model = gb.mlp([columns, 3, 2], "tanh", dtype="float64").initialize(0)
    x, y = batch(rng, rows, columns)
    edges = columns * 3 + 3 + 2 * 3 * 2 + 2 + 2
    assert lab.gradients(model, x, y, "pre_activation").work == {"edge visits": rows * edges}
    assert lab.gradients(model, x, y, "post_activation").work == {"edge visits": rows * edges}
    assert lab.gradients(model, x, y, "dynamic_programming").work == {"edge visits": rows * (edges + 5)}
    paths = (columns * 3 + 3) * 2 + 3 * 2 + 2
    assert lab.gradients(model, x, y, "paths").work["paths"] == rows * paths
