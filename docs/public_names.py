"""What the API page lists: every public name, once, by what it is for."""

from notes import resolve

__all__ = ["GROUPS", "page"]

# Names under gpubackprop; of one with + the methods stand there too.
GROUPS = {
    "Layers and models": "mlp Sequential Dense Activation BatchNorm LayerNorm Dropout InputNoise Scaler Residual "
                         "Concatenate Layer+ Parameter training lsuv register_activation",
    "Initializers": "initializers.Constant initializers.Orthogonal initializers.draw",
    "Training": "Trainer+ Plan+ EarlyStopping TrainingDiverged lr_range_test random_search grid_search grid_points",
    "Optimizers": "Optimizer SGD Adagrad Adadelta RMSprop Adam AdamW Nadam Adamax RAdam Lion LBFGS",
    "Schedules": "schedules.Schedule+ schedules.Constant schedules.Step schedules.Exponential schedules.Polynomial "
                 "schedules.Cosine schedules.OneCycle schedules.Plateau",
    "Data": "split KFold+ learning_curve datasets.digits datasets.regression7 datasets.load",
    "Why it does not learn": "gradient_report layer_stats explain_weight sensitivity find_nan loss_of_weights",
    "Gradients of functions": "value_and_grad gradcheck hessian_vector_product",
    "The laboratory": "lab.gradients lab.compare lab.Gradient lab.Comparison lab.Graph+ lab.product_graph",
    "Pruning": "prune rewind shrink",
    "Landscapes": "landscape.descend landscape.race landscape.surface landscape.Surface+ landscape.plane "
                  "landscape.racers landscape.steps_until landscape.line_loss landscape.saddle landscape.valley",
    "Pictures": "plot.curves plot.gradient_flow plot.decision_regions plot.surface plot.path plot.race plot.progress "
                "plot.plan plot.roofline plot.save",
    "Tensors": "tensor Tensor+",
    "Operations": "add subtract multiply divide power neg abs maximum minimum clip where exp expm1 log log1p sqrt sin "
                  "cos tanh sigmoid relu softmax log_softmax logsumexp sum mean max min matmul dense dropout noise "
                  "batch_norm layer_norm reshape transpose broadcast_to concatenate stack gather",
    "Losses": "softmax_cross_entropy bce_with_logits bce_with_logits_sum mse half_mse sse half_sse poisson poisson_sum",
    "Files and devices": "save_model load_model get_backend get_threads set_threads threads",
    "Estimators for scikit-learn": "sklearn.MLPClassifier+ sklearn.MLPRegressor+",
}  # fmt: skip


def page() -> str:
    """The groups as directives of autodoc, for a Markdown page."""
    lines = []
    for title, names in GROUPS.items():
        lines += [f"## {title}\n", "```{eval-rst}"]
        for name in names.split():
            thing = resolve(name.removesuffix("+"))
            kind = (
                "function"
                if not isinstance(thing, type)
                else "exception"
                if issubclass(thing, Exception)
                else "class"
            )
            lines += [f".. auto{kind}:: gpubackprop.{name.removesuffix('+')}"]
            lines += (
                [] if name.endswith("+") or kind == "function" else ["   :no-members:"]
            )
        lines += ["```\n"]
    return "\n".join(lines)
