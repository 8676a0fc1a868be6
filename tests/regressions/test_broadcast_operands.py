"""Operands of an elementwise launch keep their own strides, in whatever order they are named."""

from itertools import permutations

import numpy as np
import pytest

from gpubackprop.backends import get_backend
from gpubackprop.operands import graph


@pytest.mark.parametrize("device", ["cpu", "cpu:reference", "cuda"])
def test_the_order_of_the_operands_does_not_matter(device, request, rng):
    if device == "cuda":
        request.getfixturevalue("cuda")
    back = get_backend(device)
    arrays = {"x": rng.normal(size=(2, 3)), "w": rng.normal(size=(2, 1)), "b": rng.normal(size=(1, 3))}
    expected = arrays["w"] * arrays["x"] + arrays["b"]
    for order in permutations(arrays):
        out = back.empty((2, 3), np.float64)
        back.elementwise("line", graph("w * x + b"), {k: back.asarray(arrays[k]) for k in order}, {"result": out}).run()
        np.testing.assert_allclose(back.to_numpy(out), expected, rtol=1e-15)
