"""Unknown names: messages that list the known ones, the nearest of them, and what other libraries' names are here."""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from gpubackprop.formulas import cut

__all__ = ["FOREIGN", "explains_keywords", "hint", "of_pytorch", "refuse_keywords", "unknown"]

_LOGITS = "part of loss='cross_entropy', which takes logits; model.predict_proba gives probabilities"
_SIGMOID = "part of loss='bce', which takes logits; model.predict_proba gives probabilities"
_RATE = "lr of an optimizer, as in gb.Trainer(model, optimizer=gb.Adam(lr=1e-3))"
_FIT = "gb.Trainer(model, loss, optimizer).fit(x, y)"
_LAYER = "a class of gb.Layer with a forward"

# What users write, in small letters, by what it was to be; the text goes on "here it is …".
FOREIGN: Mapping[str, Mapping[str, str]] = {
    "activation": {
        "softmax": _LOGITS,
        "log_softmax": _LOGITS,
        "none": "'identity'",
        "linear": "'identity'",
        "swish": "'silu'",
        "logistic": "'sigmoid'",
        "expit": "'sigmoid'",
    },
    "loss": {
        "categorical_crossentropy": "'cross_entropy'",
        "sparse_categorical_crossentropy": "'cross_entropy'",
        "crossentropyloss": "'cross_entropy', on logits",
        "nllloss": "'cross_entropy', on logits",
        "nll": "'cross_entropy', on logits",
        "log_loss": "'cross_entropy', or 'bce' for one output, on logits",
        "softmax_cross_entropy": "'cross_entropy'",
        "binary_crossentropy": "'bce', on logits",
        "binary_cross_entropy": "'bce', on logits",
        "binary_cross_entropy_with_logits": "'bce'",
        "bce_with_logits": "'bce'",
        "bcewithlogitsloss": "'bce'",
        "bceloss": "'bce', on logits",
        "mseloss": "'mse'",
        "mse_loss": "'mse'",
        "mean_squared_error": "'mse'",
        "squared_error": "'mse'",
        "l2": "'mse'",
        "poissonnllloss": "'poisson'",
        "poisson_nll_loss": "'poisson'",
        "l1loss": "a function: lambda o, t: gb.abs(o - t).mean()",
        "mae": "a function: lambda o, t: gb.abs(o - t).mean()",
        "mean_absolute_error": "a function: lambda o, t: gb.abs(o - t).mean()",
    },
    "metric": {
        "acc": "'accuracy'",
        "r2_score": "'r2'",
        "mean_squared_error": "'mse'",
        "mean_absolute_error": "'mae'",
        "loss": "in the history anyway; leave it out",
    },
    "initializer": {
        "xavier_uniform": "'glorot_uniform'",
        "xavier_normal": "'glorot_normal'",
        "kaiming_uniform": "'he_uniform'",
        "kaiming_normal": "'he_normal'",
    },
    "precision": {"half": "'float16'", "fp16": "'float16'", "bf16": "'bfloat16'", "fp32": "'float32'",
                  "double": "'float64'", "fp64": "'float64'"},
    "device": {"gpu": "'cuda'", "mps": "'cpu'; the GPUs are NVIDIA's", "tpu": "'cpu'; the GPUs are NVIDIA's"},
    "argument": {
        "learning_rate": _RATE,
        "lr": _RATE,
        "eta": _RATE,
        "learning_rate_init": _RATE,
        "weight_decay": "an argument of the optimizer, as in gb.Adam(weight_decay=1e-4), or l2= of the Trainer",
        "momentum": "an argument of the optimizer, as in gb.SGD(lr=0.1, momentum=0.9)",
        "validation_split": "validation_data=(x_val, y_val) of fit; gb.split(x, y, test=0.1) makes the parts",
        "epochs": "an argument of fit",
        "n_epochs": "epochs= of fit",
        "num_epochs": "epochs= of fit",
        "max_iter": "epochs= of fit",
        "batch_size": "an argument of fit",
        "batch": "batch_size= of fit",
        "verbose": "progress=True or False of fit",
        "random_state": "seed",
        "shuffle": "an argument of fit",
        "callbacks": "an argument of fit",
        "early_stopping": "callbacks=[gb.EarlyStopping(patience=10)] of fit",
        "criterion": "loss= of the Trainer",
        "loss_fn": "loss= of the Trainer",
        "in_features": "inputs",
        "out_features": "units",
        "input_dim": "inputs",
        "input_shape": "inputs",
        "num_features": "columns",
        "hidden_layer_sizes": "gb.mlp([inputs, *hidden, outputs])",
        "kernel_initializer": "init",
        "use_bias": "bias",
        "betas": "beta1 and beta2",
        "amsgrad": "not available",
        "p": "rate",
        "test_size": "test",
        "train_size": "test: the share of the other rows",
        "restore_best_weights": "restore_best",
        "dim": "axis",
        "keepdim": "keepdims",
        "cv": "not available: gb.KFold(n_splits).split(x, y) gives the rows of each fold",
    },
    "gb": {
        "linear": "gb.Dense(inputs, units)",
        "lazylinear": "gb.Dense(inputs, units)",
        "input": "the first number of gb.Dense(inputs, units)",
        "relu": "gb.Dense(…, activation='relu') or gb.Activation('relu'); gb.relu is the function",
        "leakyrelu": "gb.Dense(…, activation='leaky_relu') or gb.Activation('leaky_relu')",
        "elu": "gb.Activation('elu')",
        "selu": "gb.Activation('selu')",
        "gelu": "gb.Activation('gelu')",
        "silu": "gb.Activation('silu')",
        "mish": "gb.Activation('mish')",
        "softplus": "gb.Activation('softplus')",
        "tanh": "gb.Activation('tanh'); gb.tanh is the function",
        "sigmoid": f"gb.Activation('sigmoid'); before a loss it is {_SIGMOID}",
        "softmax": _LOGITS,
        "logsoftmax": _LOGITS,
        "module": _LAYER,
        "model": _LAYER,
        "batchnorm1d": "gb.BatchNorm(columns)",
        "batchnormalization": "gb.BatchNorm(columns)",
        "layernormalization": "gb.LayerNorm(columns)",
        "gaussiannoise": "gb.InputNoise",
        "flatten": "x.reshape(len(x), -1), before the model",
        "crossentropyloss": "loss='cross_entropy' of gb.Trainer",
        "nllloss": "loss='cross_entropy' of gb.Trainer, on logits",
        "mseloss": "loss='mse' of gb.Trainer",
        "bceloss": "loss='bce' of gb.Trainer, on logits",
        "bcewithlogitsloss": "loss='bce' of gb.Trainer",
        "nn": "gb itself: gb.Dense, gb.Sequential, …",
        "functional": "gb itself: gb.relu, gb.softmax, …",
        "layers": "gb itself: gb.Dense, gb.Sequential, …",
        "optim": "gb itself: gb.Adam, gb.SGD, …",
        "variable": "gb.tensor(array, requires_grad=True)",
        "array": "gb.tensor(array)",
        "from_numpy": "gb.tensor(array)",
        "no_grad": "not needed: tensors without requires_grad keep no graph; x.detach() leaves it",
        "cat": "gb.concatenate",
        "dot": "gb.matmul",
        "pow": "gb.power",
        "absolute": "gb.abs",
        "dataloader": "arrays: fit(x, y, batch_size=…)",
        "dataset": "arrays: fit(x, y, batch_size=…)",
        "standardscaler": "gb.Scaler(columns).fit(x), a layer",
        "train_test_split": "gb.split(x, y, test=0.2)",
        "manual_seed": "seed= of gb.Trainer",
        "save": "gb.save_model(model, path)",
        "load": "gb.load_model(path)",
        "mlpclassifier": "gpubackprop.sklearn.MLPClassifier",
        "mlpregressor": "gpubackprop.sklearn.MLPRegressor",
        "conv2d": "not available: layers are dense",
        "lstm": "not available: layers are dense",
    },
    "tensor": {
        "view": "reshape",
        "flatten": "reshape(-1)",
        "ravel": "reshape(-1)",
        "squeeze": "reshape",
        "unsqueeze": "reshape, or a key with None: x[:, None]",
        "permute": "transpose(*axes)",
        "t": "T",
        "clone": "copy.copy(x), or gb.tensor(x.numpy())",
        "copy": "copy.copy(x), or gb.tensor(x.numpy())",
        "cpu": "numpy(), which copies to the host",
        "cuda": "gb.tensor(array, device='cuda')",
        "to": "astype(dtype), or gb.tensor(array, device=…)",
        "float": "astype('float32')",
        "double": "astype('float64')",
        "long": "astype('int64')",
        "tolist": "numpy().tolist()",
        "dim": "ndim",
        "numel": "size",
        "pow": "x ** p",
        "norm": "(x ** 2).sum() ** 0.5",
        "std": "x.numpy().std(); ((x - x.mean()) ** 2).mean() ** 0.5 has a gradient",
        "var": "x.numpy().var(); ((x - x.mean()) ** 2).mean() has a gradient",
        "argmax": "x.numpy().argmax()",
        "argmin": "x.numpy().argmin()",
        "requires_grad_": "gb.tensor(array, requires_grad=True)",
        "zero_grad": "not needed: backward() overwrites",
    },
    "model": {
        "fit": _FIT,
        "train": f"{_FIT}; inside `with gb.training():` layers behave as in training",
        "eval": "not needed: outside of training models infer",
        "compile": "gb.Trainer(model, loss, optimizer, metrics)",
        "evaluate": "gb.Trainer(model, loss).evaluate(x, y)",
        "score": "gb.Trainer(model, loss).evaluate(x, y)",
        "summary": "print(model)",
        "parameters": "model.named_parameters()",
        "get_weights": "model.state_dict()",
        "set_weights": "model.load_state_dict(state)",
        "zero_grad": "not needed: backward() overwrites",
        "cuda": "model.to('cuda')",
        "cpu": "model.to('cpu')",
        "save": "gb.save_model(model, path)",
        "add": "gb.Sequential(*layers)",
    },
}  # fmt: skip


def hint(kind: str, given: Any, known: Iterable[Any] = ()) -> str:
    """The end of a message: what the name is called here, or which known one is near; "" if nothing is.

    What is no text is named by its `__name__`, or else by that of its class.
    """
    name = given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
    name = name[:100]  # longer ones are near nothing
    if (text := FOREIGN.get(kind, {}).get(name.lower())) is not None:
        return f"; it is {text}" if text.startswith("not ") else f"; here it is {text}"
    if not (by_letters := {str(k).lower(): str(k) for k in known}):
        return ""
    import difflib  # costs a millisecond

    swapped = [k for k in by_letters if sorted(k) == sorted(name.lower())]
    near = swapped or difflib.get_close_matches(name.lower(), by_letters, 1)
    return f"; did you mean {by_letters[near[0]]!r}?" if near else ""


def unknown(kind: str, given: Any, known: Iterable[Any], where: str = "") -> str:
    """The message about a name that is none of those known."""
    known = list(known)
    listed = ", ".join(map(str, known))
    return (
        f"{where}{': ' * bool(where)}unknown {kind} {cut(repr(given))}; choose from {listed}{hint(kind, given, known)}"
    )


def refuse_keywords(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """TypeError if a keyword is none of the arguments known, with what it is called here."""
    known = list(known)
    for key in given:
        if key not in known:
            meant = hint("argument", key, known) or f"; choose from {', '.join(known)}"
            raise TypeError(f"{where}: unknown argument {key!r}{meant}")


P = ParamSpec("P")
R = TypeVar("R")


def explains_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function or a class so that an unknown keyword is an error that says what it is called here."""
    if isinstance(function, type):
        function.__init__ = explains_keywords(function.__init__)  # type: ignore[misc]
        return function
    code = function.__code__
    known = [k for k in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if k != "self"]
    where = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        refuse_keywords(where, keywords, known)
        return function(*arguments, **keywords)

    return call


def of_pytorch(thing: Any) -> str:
    """\"PyTorch's Linear" for what is, "" for all else; PyTorch is not imported."""
    kind = thing if hasattr(thing, "__module__") and hasattr(thing, "__name__") else type(thing)
    return f"PyTorch's {kind.__name__}" if kind.__module__.partition(".")[0] == "torch" else ""
