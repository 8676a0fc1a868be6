"""NumPy's functions keep the gradient: each gives its value with a graph beneath, or is refused."""

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.numpy_functions import FUNCTIONS, MOVES, UFUNCS, VALUES

A = np.array([[0.5, -1.25, 2.0], [1.5, 0.75, -0.625]])
B = np.array([[1.0, 0.25, -0.5], [-2.0, 3.0, 0.375]])
V = np.array([0.3, -0.7, 1.9])
P = np.abs(A)
CUBE = np.arange(24.0).reshape(2, 3, 4) / 7 - 1.3
SQUARE = np.array([[1.0, 2.0], [-0.5, 0.25]])

CASES = [  # (function, a call of it with x in place of an array, that array)
    *((u, u, A) for u in (np.negative, np.exp, np.expm1, np.sin, np.cos, np.tanh, np.absolute, np.fabs, np.positive,
                          np.square, np.tan, np.sinh, np.cosh, np.exp2, np.sign, np.reciprocal, np.isnan, np.isfinite,
                          np.isinf, np.logical_not)),
    *((u, u, P) for u in (np.log, np.log1p, np.sqrt, np.log2, np.log10)),
    *((u, lambda x, u=u: u(x, B), A) for u in (np.add, np.subtract, np.multiply, np.divide, np.maximum, np.minimum,
        np.logaddexp, np.logical_and, np.logical_or, np.logical_xor, np.equal, np.not_equal, np.less,
        np.less_equal, np.greater, np.greater_equal)),
    *((u, lambda x, u=u: u(V, x), A) for u in (np.add, np.subtract, np.multiply, np.divide, np.maximum, np.minimum,
        np.logaddexp, np.equal, np.less)),
    (np.power, lambda x: np.power(x, 1.5), P),
    (np.power, lambda x: np.power(P, x), A),
    (np.matmul, lambda x: np.matmul(x, B.T), A), (np.matmul, lambda x: B.T @ x, A), (np.matmul,
    lambda x: CUBE @ x, CUBE[0].T.copy()),
    *((f, lambda x, f=f, k=k: f(x, **k), CUBE) for f in (np.sum, np.mean, np.max, np.amax, np.min, np.amin, np.var,
        np.std, np.ptp) for k in ({}, {"axis": 0}, {"axis": (0, -1)}, {"axis": 1, "keepdims": True})),
    (np.sum, lambda x: np.sum(x, 1, None, None, True), A), (np.sum, lambda x: np.sum(a=x, out=None), A),
    (np.std, lambda x: np.std(x, 0, ddof=1), CUBE[0]), (np.var, lambda x: np.var(x, ddof=1), A),
    *((np.linalg.norm, lambda x, k=k: np.linalg.norm(x, **k), A) for k in ({}, {"ord": "fro"}, {"axis": 0},
        {"ord": 1, "axis": 1}, {"ord": np.inf, "axis": 0}, {"ord": -np.inf, "axis": 0}, {"ord": 3, "axis": 1},
        {"axis": (0, 1), "keepdims": True}, {"ord": 2, "axis": (1,)})),
    (np.linalg.norm, lambda x: np.linalg.norm(x, 1), V),
    (np.dot, lambda x: np.dot(x, V), A), (np.dot, lambda x: np.dot(A, x), V), (np.dot, lambda x: np.dot(x, V), V),
    (np.dot, lambda x: np.dot(2.0, x), V), (np.dot, lambda x: np.dot(CUBE, x), CUBE.transpose(0, 2, 1).copy()),
    (np.dot, lambda x: np.dot(x, x.T), A), (np.dot, lambda x: np.dot(CUBE, x), CUBE[0].T.copy()),
    (np.inner, lambda x: np.inner(x, B), A), (np.inner, lambda x: np.inner(CUBE, x), CUBE), (np.inner,
    lambda x: np.inner(V, x), V),
    (np.outer, lambda x: np.outer(x, V), A), (np.vdot, lambda x: np.vdot(B, x), A),
    (np.tensordot, lambda x: np.tensordot(x, B), A), (np.tensordot,
    lambda x: np.tensordot(x, CUBE, ([0, 2], [1, 2])), CUBE.transpose(1, 0, 2).copy()),
    (np.tensordot, lambda x: np.tensordot(x, V, 0), A), (np.tensordot, lambda x: np.tensordot(x, B, (-1, 1)), A),
    *((np.einsum, lambda x, s=s: np.einsum(s, x), x) for s, x in (("ij->ji", A), ("ij", A), ("ji", A), ("ii", SQUARE),
        ("ii->i", SQUARE), ("ijk->k", CUBE), ("ij->", A))),
    *((np.einsum, lambda x, s=s, y=y: np.einsum(s, x, y), A) for s, y in (("ij,kj->ik", B), ("ij,ij->j", B),
    ("ij,j", V),
        ("ij,ij->", B), ("ij,k->kji", V), ("ij,ajk->aik", CUBE), ("ij,ijk->ik", CUBE), ("ij,kl->il", B))),
    (np.einsum, lambda x: np.einsum("ij,kj,k->i", x, B, [0.5, -2.0]), A),
    (np.einsum, lambda x: np.einsum("ij,jk,kl->il", x, x.T, x), A),
    (np.where, lambda x: np.where(B > 0, x, 0.5), A), (np.where, lambda x: np.where(x > 0, x * 2, B), A),
    (np.where, lambda x: np.where(x > 0, B, V), A),
    (np.clip, lambda x: np.clip(x, -0.6, 1.0), A), (np.clip, lambda x: np.clip(x, None, B), A), (np.clip,
    lambda x: np.clip(x, a_min=0.1, a_max=None), A),
    (np.diff, np.diff, A), (np.diff, lambda x: np.diff(x, 2, 1), CUBE), (np.diff, lambda x: np.diff(x, axis=0), A),
    (np.take, lambda x: np.take(x, [[0, 2], [2, 2]], axis=1), A), (np.take, lambda x: np.take(x, 3), A),
    (np.take_along_axis, lambda x: np.take_along_axis(x, np.array([[2], [0]]), 1), A),
    (np.take_along_axis, lambda x: np.take_along_axis(x, np.argsort(B, 0), 0), A),
    (np.concatenate, lambda x: np.concatenate([x, B]), A), (np.concatenate,
    lambda x: np.concatenate((B, x), axis=1), A),
    (np.concatenate, lambda x: np.concatenate((B, x), None), A), (np.stack, lambda x: np.stack([B, x], axis=-1), A),
    *((f, lambda x, f=f: f([x, x]), V) for f in (np.vstack, np.hstack, np.dstack, np.column_stack)),
    *((f, lambda x, f=f: f((B, x)), A) for f in (np.vstack, np.hstack, np.dstack, np.column_stack)),
    (np.transpose, np.transpose, A), (np.transpose, lambda x: np.transpose(x, (2, 0, 1)), CUBE),
    (np.broadcast_to, lambda x: np.broadcast_to(x, (2, 2, 3)), A),
    (np.zeros_like, np.zeros_like, A), (np.ones_like, np.ones_like, A),
    (np.reshape, lambda x: np.reshape(x, (3, -1)), A), (np.ravel, np.ravel, A),
    (np.ravel, lambda x: np.ravel(x, order="F"), A),
    (np.reshape, lambda x: np.reshape(x, (3, 2), "F"), A), (np.squeeze, np.squeeze, A[:, None]),
    (np.expand_dims, lambda x: np.expand_dims(x, 1), A), (np.atleast_1d, np.atleast_1d, A), (np.atleast_2d,
    np.atleast_2d, V),
    (np.atleast_3d, np.atleast_3d, A), (np.swapaxes, lambda x: np.swapaxes(x, 0, 2), CUBE),
    (np.moveaxis, lambda x: np.moveaxis(x, 0, -1), CUBE), (np.rollaxis, lambda x: np.rollaxis(x, 2), CUBE),
    (np.flip, np.flip, A), (np.flip, lambda x: np.flip(x, axis=1), A), (np.fliplr, np.fliplr, A), (np.flipud,
    np.flipud, A),
    (np.rot90, np.rot90, A), (np.roll, lambda x: np.roll(x, 1, axis=1), A), (np.repeat,
    lambda x: np.repeat(x, 2, 0), A),
    (np.tile, lambda x: np.tile(x, (2, 1)), A), (np.diagonal, np.diagonal, SQUARE), (np.delete,
    lambda x: np.delete(x, 1, axis=1), A),
    (np.split, lambda x: np.split(x, 3, axis=1)[1], A), (np.array_split, lambda x: np.array_split(x, 2, 1)[1], A),
    (np.vsplit, lambda x: np.vsplit(x, 2)[0], A), (np.hsplit, lambda x: np.hsplit(x, [1])[1], A),
    (np.dsplit, lambda x: np.dsplit(x, 2)[1], CUBE),
]  # fmt: skip
NAMES = [f"{function.__name__}-{i}" for i, (function, *_) in enumerate(CASES)]


@pytest.mark.parametrize("_, call, x", CASES, ids=NAMES)
def test_a_numpy_function_of_a_tensor_has_numpys_value_and_the_gradient_of_differences(_, call, x):
    result, expected = call(gb.tensor(x, requires_grad=True)), np.asarray(call(x))
    assert isinstance(result, gb.Tensor) and result.shape == expected.shape
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-13, atol=1e-14)
    gb.gradcheck(call, [x])


def test_every_function_in_the_tables_has_a_case():
    assert {f for f, *_ in CASES} | {np.shape, np.ndim, np.size} == {*UFUNCS, *FUNCTIONS, *MOVES}


@pytest.mark.parametrize("ufunc", [u for u in UFUNCS if u is not np.matmul], ids=lambda u: u.__name__)
def test_special_values_are_numpys(ufunc):
    special = np.array([0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan])
    arrays = [special] if ufunc.nin == 1 else [special[:, None], special]
    with np.errstate(all="ignore"):
        expected = ufunc(*arrays)
    np.testing.assert_allclose(ufunc(gb.tensor(arrays[0]), *arrays[1:]).numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("call", [np.shape, np.ndim, np.size, lambda a: np.size(a, 1)])
def test_shapes_are_numpys(call):
    assert call(gb.tensor(A, requires_grad=True)) == call(A)


def test_questions_about_values_are_answered_by_numpy():
    x = gb.tensor(A, requires_grad=True)
    assert np.allclose(x, A) and np.array_equal(x, A) and not np.any(x == 7) and np.all(x == A)
    assert np.isclose(x, A).tolist() == [[True] * 3] * 2
    assert {np.all, np.any, np.allclose, np.isclose, np.array_equal} == VALUES


# ---- gradients that were cut --------------------------------------------------------------------------------------


def test_the_gradient_passes_through_dot_and_norm():
    a, b = (gb.tensor(v, requires_grad=True) for v in ([1.0, 2.0], [3.0, 4.0]))
    (np.dot(a, np.array([1.0, 2.0])) * b).sum().backward()
    assert a.grad.numpy().tolist() == [7, 14]
    _, slope = gb.value_and_grad(lambda w: w.sum() + np.dot(np.eye(2) * 3, w).sum())(np.array([1.0, 2.0]))
    assert slope.tolist() == [4, 4]
    _, slope = gb.value_and_grad(lambda w: np.linalg.norm(w) + 0 * w.sum())(np.array([3.0, 4.0]))
    np.testing.assert_allclose(slope, [0.6, 0.8])


@pytest.mark.parametrize("function", [np.linalg.norm, lambda x: np.std(x), lambda x: np.linalg.norm(x, 3)])
def test_a_root_has_slope_0_at_0(function):
    value, slope = gb.value_and_grad(function)(np.zeros(3))
    assert value == 0 and slope.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions_run_in_a_recorded_loss(dtype, rng):
    def loss(o, t):
        return np.mean(np.square(np.subtract(o, t))) + 0.1 * np.linalg.norm(np.concatenate([o, t]), axis=0).sum()

    def same(o, t):
        both = gb.concatenate([o, t])
        return ((o - t) ** 2).mean() + 0.1 * gb.sqrt((both * both).sum(0)).sum()

    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 2))
    fits = [
        gb.Trainer(gb.mlp([3, 2], dtype=dtype), f, seed=0).fit(x, y, epochs=2, batch_size=16)["loss"]
        for f in (loss, same)
    ]
    np.testing.assert_allclose(*fits, rtol=1e-6)


def test_functions_run_on_a_device(cuda):
    x = gb.tensor(A, requires_grad=True, device="cuda")
    y = np.sum(np.exp(np.flip(x, 1)) @ B.T, axis=0)
    y.sum().backward()
    np.testing.assert_allclose(y.numpy(), np.sum(np.exp(np.flip(A, 1)) @ B.T, axis=0))
    np.testing.assert_allclose(x.grad.numpy(), np.exp(A) * np.flip(B.sum(0)))


# ---- refusals ------------------------------------------------------------------------------------------------------

ELSEWHERE = [
    np.sort, np.cumsum, np.cumprod, np.prod, np.argmax, np.argsort, np.median, np.unique, np.histogram, np.nansum,
    np.nanmean, np.trace, np.triu, np.diag, np.copy, np.gradient, np.nan_to_num, np.real, np.angle, np.round, np.fix,
    np.average, np.cov, np.corrcoef, np.count_nonzero, np.nonzero, np.array2string, lambda x: np.full_like(x, 2),
    np.empty_like,
    np.linalg.inv, np.linalg.det, np.linalg.svd, np.linalg.eigh, np.linalg.qr, np.linalg.pinv, np.linalg.cholesky,
    np.fft.fft, np.fft.rfft, np.fft.ifft2, np.ediff1d, np.vander, np.sinc, np.i0, np.unwrap, np.trim_zeros,
    lambda x: np.interp(x, [0, 1], [1, 2]), lambda x: np.quantile(x, 0.5), lambda x: np.percentile(x, 50),
    lambda x: np.kron(x, x), lambda x: np.cross(x, x), lambda x: np.convolve(x, x), lambda x: np.correlate(x, x),
    lambda x: np.linalg.solve(x, x), lambda x: np.linalg.matrix_power(x, 2), lambda x: np.pad(x, 1),
    lambda x: np.searchsorted([0, 1], x), lambda x: np.digitize(x, [0, 1]), lambda x: np.partition(x, 1),
    lambda x: np.append(x, 1), lambda x: np.insert(x, 0, 1), lambda x: np.select([x > 0], [x]),
    lambda x: np.choose([0], x), lambda x: np.piecewise(x, [x > 0], [1]), lambda x: np.polyfit(x, x, 1),
    lambda x: np.polyval([1, 2], x), lambda x: np.apply_along_axis(sum, 0, x), lambda x: np.savetxt("x", x),
    lambda x: np.copyto(np.zeros_like(A), x), lambda x: np.where(x > 0), lambda x: np.fill_diagonal(x, 0),
    np.floor, np.ceil, np.rint, np.trunc, np.arctan, np.arcsin, np.cbrt, np.invert, np.signbit, np.conjugate,
    lambda x: np.arctan2(x, 1), lambda x: np.floor_divide(x, 2), lambda x: np.mod(x, 2), lambda x: np.fmax(x, 0),
    lambda x: np.heaviside(x, 0), lambda x: A // x, lambda x: A % x, lambda x: np.frexp(x), lambda x: np.modf(x),
    lambda x: np.add.reduce(x), lambda x: np.add.accumulate(x), lambda x: np.multiply.outer(x, x),
    lambda x: np.add.at(A.copy(), 0, x), lambda x: np.linalg.norm(x, "nuc"), lambda x: np.einsum("...i->i", x),
]  # fmt: skip


@pytest.mark.parametrize("call", ELSEWHERE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_any_other_function_is_refused_and_none_returns_an_array(call, requires_grad):
    with pytest.raises(TypeError, match=r"np\.|NumPy"):
        call(gb.tensor(A, requires_grad=requires_grad))


@pytest.mark.parametrize("call", [
    np.asarray, np.array, lambda x: np.asarray([x, x]), lambda x: np.array([x[0, 0], 1.0]), np.vectorize(float),
    lambda x: np.random.default_rng(0).permutation(x), lambda x: np.polynomial.polynomial.polyval(2.0, x),
    lambda x: gb.tensor([x, x]), lambda x: gb.tensor([x[0, 0], 1.0], requires_grad=True),
    lambda x: gb.tensor([[x[0, 0]]]),
    lambda x: gb.tensor(x * 2), lambda x: gb.tensor(x * 2, requires_grad=True),
    lambda x: gb.ops.add(gb.tensor(A), [x, x]),
])  # fmt: skip
def test_what_would_cut_the_graph_names_detach(call):
    with pytest.raises(RuntimeError, match=r"detach\(\)"):
        call(gb.tensor(A, requires_grad=True))


def test_constants_convert():
    t = gb.tensor(A, requires_grad=True)
    t.sum().backward()
    assert np.asarray(t.grad).tolist() == np.ones_like(A).tolist()
    assert gb.tensor([t.detach(), t.detach()]).shape == (2, 2, 3) and np.asarray(t.detach(), "f4").dtype == np.float32
    assert gb.tensor(t.detach(), requires_grad=True).requires_grad


@pytest.mark.parametrize("call, message", [
    (lambda x: np.add(A, x, out=A.copy()), "np.add: the result is a tensor .* write a = a \\+ t"),
    (lambda x: A.copy().__iadd__(x), "write a = a \\+ t"),
    (lambda x: A.copy().__imul__(x), "np.multiply: the result is a tensor"),
    (lambda x: np.sum(x, out=np.zeros(())), "np.sum: the result is a tensor"),
    (lambda x: np.sum(x, dtype=np.float32), "np.sum: tensors do not take dtype"),
    (lambda x: np.sum(x, 0, np.float32), "np.sum: tensors do not take dtype"),
    (lambda x: np.exp(x, where=A > 0), "np.exp: tensors do not take where"),
    (lambda x: np.add(x, 1, dtype="f4"), "np.add: tensors do not take dtype"),
    (lambda x: np.max(x, initial=0), "np.max: tensors do not take initial"),
    (lambda x: np.ones_like(x, order="F"), "np.ones_like: tensors do not take order='F'"),
    (lambda x: np.var(x, mean=0), "np.var: got an unexpected keyword argument 'mean'; of tensors it takes a, axis"),
    (lambda x: np.repeat(x, x), "np.repeat: one tensor expected, got 2"),
    (np.cumsum, r"np.cumsum: there is no such operation of tensors; .*\.detach\(\)\.numpy\(\)"),
    (np.add.reduce, "np.add.reduce: tensors have no such operation; use np.sum"),
])  # fmt: skip
def test_refusals_say_what_to_do(call, message):
    with pytest.raises(TypeError, match=message):
        call(gb.tensor(A, requires_grad=True))
