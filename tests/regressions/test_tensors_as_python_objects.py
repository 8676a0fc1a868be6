"""Operators and protocols of Python on tensors mean what they say, or are refused."""

import copy
import operator
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpubackprop as gb

DEVICES = ["cpu", "cpu:reference", "cuda"]
COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]
X = np.array([[0.0, 1.0, 2.0], [-1.0, 1.0, np.nan]])


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return request.param


# ---- comparisons ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compare", COMPARISONS)
@pytest.mark.parametrize(
    "other", [1, 1.0, np.float64(1), X[::-1].copy(), X[0], [0, 1, 2], np.array([[True], [False]])], ids=str
)
def test_a_comparison_is_numpys_elementwise(compare, other, device):
    x = gb.tensor(X, device=device)
    for y, expected in ((compare(x, other), compare(X, other)), (compare(other, x), compare(other, X))):
        assert isinstance(y, gb.Tensor) and not y.requires_grad and y.numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("compare", COMPARISONS)
def test_tensors_compare_elementwise_with_tensors(compare, device):
    a, b = (gb.tensor(v, device=device) for v in (X, X[0]))
    assert compare(a, b).numpy().tolist() == compare(X, X[0]).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=6), st.integers(-2, 2), st.sampled_from(["float32", "float64"])
)
def test_membership_and_selection_are_numpys(values, wanted, dtype):
    a = np.array(values, dtype)
    x = gb.tensor(a)
    assert (wanted in x) == (wanted in a) and (x == wanted).numpy().tolist() == (a == wanted).tolist()
    assert gb.where(x == wanted, 9.0, x).numpy().tolist() == np.where(a == wanted, 9, a).tolist()
    assert x[x != wanted].numpy().tolist() == a[a != wanted].tolist()


def test_equality_chooses_in_a_loss(rng):
    """As with rows picked beforehand."""

    def loss(o, t):
        return gb.where(t == 1.0, (o - 3) ** 2, gb.abs(o)).mean()

    def weighed(o, t):
        return (t * (o - 3) ** 2 + (1 - t) * gb.abs(o)).mean()

    x, t = rng.normal(size=(60, 3)), rng.integers(0, 2, (60, 1)).astype(float)
    fits = [gb.Trainer(gb.mlp([3, 1]), f, seed=0).fit(x, t, epochs=3, batch_size=16)["loss"] for f in (loss, weighed)]
    np.testing.assert_allclose(*fits, rtol=1e-5)


def test_a_tensor_is_equal_to_no_text_and_not_none():
    x = gb.tensor([1.0, 2.0])
    assert (x == None) is False and (x != None) is True  # noqa: E711
    assert operator.eq(None, x) is False and operator.ne("auto", x) is True
    assert (x == "auto") is False and x not in ("auto", None) and (x != "auto") is True
    with pytest.raises(TypeError, match="tensor expected, got object"):
        x == object()  # noqa: B015


def test_tensors_are_keys_by_identity():
    x, y = gb.tensor([1.0, 2.0]), gb.tensor([1.0, 2.0])
    model = gb.mlp([2, 2]).initialize(0)
    weight, bias = model.layers[0].weight, model.layers[0].bias
    table = {x: "x", y: "y", weight: "w", bias: "b"}
    assert [table[k] for k in (x, y, weight, bias)] == ["x", "y", "w", "b"] and len({x, y, x}) == 2
    assert [x, y].index(x) == 0 and x in [x, y]
    for same in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert (same.predict(np.eye(2)) == model.predict(np.eye(2))).all()


@pytest.mark.parametrize("call", [
    bool, lambda x: x in [gb.tensor([1.0, 2.0]), x], lambda x: [1.0, x].index(x * 1), lambda x: [x].count(x * 1),
    lambda x: not x, lambda x: [x].remove(x * 1),
])  # fmt: skip
def test_the_truth_of_several_elements_is_refused(call):
    with pytest.raises(ValueError, match=r"bool: the truth of a tensor of shape \(2,\) is ambiguous; .*gb\.where"):
        call(gb.tensor([1.0, 2.0]))


def test_the_truth_of_one_element_is_its_value():
    assert bool(gb.tensor([[2.0]])) and not gb.tensor(0.0) and gb.tensor(3.0) in [gb.tensor(3.0)]
    with pytest.raises(ValueError, match="ambiguous"):
        bool(gb.tensor([]))


# ---- iteration and text --------------------------------------------------------------------------------------------


def test_rows_are_iterated_with_their_gradients(device):
    x = gb.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True, device=device)
    a, b = x
    assert [row.numpy().tolist() for row in x] == [[1, 2], [3, 4]] and len(list(x)) == 2
    (a * b).sum().backward()
    assert x.grad.numpy().tolist() == [[3, 4], [1, 2]]
    assert list(gb.tensor([])) == []
    with pytest.raises(TypeError, match=r"iter: a tensor of shape \(\) has no rows"):
        list(gb.tensor(1.0))


def test_one_element_is_formatted_as_its_number():
    assert f"{gb.tensor(1.5):.3f} {gb.tensor([[2.0]], requires_grad=True):>6.1e}" == "1.500 2.0e+00"
    x = gb.tensor([1.0, 2.0])
    assert f"{x}" == str(x)
    with pytest.raises(TypeError, match=r"format '\.3f': one element expected, got shape \(2,\)"):
        f"{x:.3f}"


# ---- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["float32", np.float64, float, "f4"])
def test_astype_passes_the_gradient_on(to, device):
    x = gb.tensor(np.array([1.5, -2.0], "f"), requires_grad=True, device=device)
    y = x.astype(to)
    assert y.dtype == np.dtype(to) and y.numpy().tolist() == [1.5, -2]
    (y * gb.tensor(np.array([2.0, 3.0], to), device=device)).sum().backward()
    assert x.grad.dtype == np.float32 and x.grad.numpy().tolist() == [2, 3]


def test_mixed_types_name_astype(rng):
    single, double = gb.tensor(np.ones(2, "f")), gb.tensor(np.ones(2))
    with pytest.raises(
        TypeError, match=r"add: dtypes differ \(float32 and float64\); convert one, as with \.astype\('float64'\)"
    ):
        single + double
    with pytest.raises(TypeError, match=r"dense: dtypes differ \(float64 and float32\); .*\.astype\('float32'\)"):
        gb.mlp([2, 2]).initialize(0)(double.reshape(1, 2))
    with pytest.raises(
        TypeError, match=r"backward: gradient is float64 but the tensor float32; use \.astype\('float32'\)"
    ):
        gb.tensor(np.ones(2, "f"), requires_grad=True).backward(double)
    assert (single + double.astype("float32")).dtype == np.float32


def test_masks_stand_beside_floats_of_any_type():
    single, mask = gb.tensor(np.array([1.0, 2.0], "f")), gb.tensor([1.0, -1.0]) > 0
    for y in (single * mask, gb.where(mask, single, 0.0), gb.where(mask.reshape(2, 1), single, single)):
        assert y.dtype == np.float32
    assert gb.where(gb.tensor([1e-300, -1.0]) > 0, single, 0.0).numpy().tolist() == [1, 0]


# ---- second derivatives --------------------------------------------------------------------------------------------


def test_a_gradient_of_a_gradient_names_hessian_vector_product():
    x = gb.tensor([1.0, 2.0], requires_grad=True)
    (x**3).sum().backward()
    with pytest.raises(RuntimeError, match=r"no second derivatives here; use gb\.hessian_vector_product"):
        x.grad.sum().backward()
    inner = gb.value_and_grad(lambda v: (v**3).sum())
    for outer in (lambda w: inner(w)[1].sum(), lambda w: (w * inner(w)[1]).sum(), lambda w: inner(w * 1)[0] * w.sum()):
        with pytest.raises(RuntimeError, match=r"value_and_grad: .*gb\.hessian_vector_product"):
            gb.value_and_grad(outer)([1.0, 2.0])


def test_leaves_may_be_given_to_gradcheck():
    x = gb.tensor([1.0, 2.0], requires_grad=True)
    assert gb.gradcheck(lambda v: (v**3).sum(), [x]) < 1e-8
    assert gb.hessian_vector_product(lambda v: (v**3).sum(), x, [1.0, 0.0]) == pytest.approx([6, 0])


# ---- DLPack --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_tensor_is_given_by_dlpack_without_a_copy(dtype):
    t = gb.tensor(np.arange(6, dtype=dtype).reshape(2, 3))
    a = np.from_dlpack(t)
    assert a.dtype == dtype and a.tolist() == [[0, 1, 2], [3, 4, 5]] and np.shares_memory(a, t.data)
    assert t.__dlpack_device__() == np.zeros(1).__dlpack_device__()


def test_dlpack_would_cut_the_graph():
    for t in (gb.tensor([1.0], requires_grad=True), gb.tensor([1.0], requires_grad=True) * 2):
        with pytest.raises(BufferError, match=r"requires a gradient would lose it; pass its \.detach\(\)"):
            np.from_dlpack(t)
        assert np.from_dlpack(t.detach()).size == 1


def test_a_device_tensor_is_no_device_array(cuda):
    """It offers DLPack, but what reads rows copies it from the device, as before."""

    class Buffer:
        def __dlpack_device__(self):
            return 2, 0

    from gpubackprop.backends.base import is_on_device

    t = gb.tensor([[1.0, 2.0]], device="cuda")
    assert not is_on_device(t) and is_on_device(t.data) and is_on_device(Buffer())
    assert gb.mlp([2, 2]).initialize(0).predict(t).shape == (1, 2)


@pytest.mark.parametrize("read", [lambda t: np.from_dlpack(t), lambda t: 1.0 in t, lambda t: f"{t.sum():.2f}", np.all,
                                  gb.tensor, lambda t: np.allclose(t, 0), lambda t: gb.tensor([t, t])])  # fmt: skip
def test_values_are_refused_while_a_plan_records(read):
    def loss(o, t):
        read(t)
        return ((o - t) ** 2).mean()

    x = np.ones((4, 1))
    with pytest.raises(RuntimeError, match="a tensor's value was asked for while a plan records"):
        gb.Trainer(gb.mlp([1, 1]), loss, seed=0).fit(x, x, epochs=1)


def test_masked_values_never_come_in():
    masked, t = np.ma.masked_array([1.0, 99.0], [0, 1]), gb.tensor([1.0, 2.0], requires_grad=True)
    for use in (gb.tensor, t.__mul__, lambda a: gb.mse(t, a), lambda a: gb.where(t > 0, t, a)):
        with pytest.raises(ValueError, match="array has masked values, expected none"):
            use(masked)
    assert (t * np.ma.masked_array([1.0, 99.0])).numpy().tolist() == [1, 198]


def test_what_is_no_number_is_in_no_tensor():
    assert None not in gb.tensor([1.0]) and "a" not in gb.tensor([1.0]) and 1 in gb.tensor([1.0])
