"""ONNX Runtime: inference."""

from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ..cases import Import, Predict
from . import Prepared, ends, repeated
from .processes import script


def _model(case: Predict) -> Any:
    nodes, constants, last = [], [], "x"
    for i, pair in enumerate(case.weights()):
        constants += [
            numpy_helper.from_array(np.ascontiguousarray(a), f"{k}{i}") for k, a in zip("wb", pair, strict=True)
        ]
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [f"a{i}"]))
        last = f"a{i}"
        if i < len(case.sizes) - 2:
            nodes.append(helper.make_node("Relu", [last], [f"y{i}"]))
            last = f"y{i}"
    outer = [
        helper.make_tensor_value_info(k, TensorProto.FLOAT, [None, n])
        for k, n in (("x", case.sizes[0]), (last, case.sizes[-1]))
    ]
    graph = helper.make_graph(nodes, "mlp", outer[:1], outer[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def predict(case: Predict, variant: str) -> Prepared:
    session, x = onnxruntime.InferenceSession(_model(case), providers=["CPUExecutionProvider"]), case.x()
    run = partial(session.run, None, {"x": x})
    return repeated(run, case.calls, lambda: ends(run()[0]))


def start(case: Import, variant: str) -> Prepared:
    return script("import onnxruntime")
