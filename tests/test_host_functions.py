"""The CPU's elementary functions: errors in ulp, special values, bits equal on every instruction set."""

import numpy as np
import pytest

from gpubackprop.backends import host
from gpubackprop.backends.native import Library, NativeBackend, available, why_not_native
from gpubackprop.formulas import apply
from gpubackprop.formulas import name as named

DTYPES = ["float32", "float64"]
BOUNDS = {"exp": 1, "expm1": 1.25, "log": 1, "log1p": 1, "tanh": 1.25, "sin": 1, "cos": 1}  # in ulp

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=f"no library: {why_not_native()}")


@pytest.fixture(scope="module")
def evaluate():
    """evaluate(name, x, instructions): the function of every element of x; by the least of those that are here."""

    def evaluate(name, x, instructions=None):
        instructions = instructions or available()[0]
        back, x = NativeBackend(Library(instructions)), np.ascontiguousarray(x)
        y = np.empty_like(x)
        launch = back.elementwise(name, {"y": apply(name, named("x"))}, {"x": x}, {"y": y})
        launch.run()
        return y

    return evaluate


def bits(x):
    """As integers, but for what a NaN carries."""
    return np.where(np.isnan(x), x.dtype.type(np.nan), x).view(f"u{x.itemsize}")


def sample(dtype, rng, n=20_000):
    """Numbers of every magnitude and sign, most of them where some function is hard."""
    info = np.finfo(dtype)
    integer = np.dtype(f"u{info.dtype.itemsize}")
    sign = rng.choice([-1.0, 1.0], n)
    digits = info.nmant + 5
    least, most = np.log(info.smallest_subnormal), np.log(info.max)
    with np.errstate(over="ignore", under="ignore"):
        return np.concatenate(
            [
                rng.integers(0, np.iinfo(integer).max, n, dtype=integer).view(dtype),
                rng.integers(0, 1 << info.nmant, n, dtype=integer).view(dtype) * sign,  # denormal
                sign * rng.uniform(0.5, 1, n) * 2.0 ** -rng.integers(0, 2 * digits, n),  # towards 0
                1 + sign * 2.0 ** -rng.uniform(1, digits, n),
                -1 + 2.0 ** -rng.uniform(1, digits, n),
                rng.uniform(-4, 4, n),
                rng.uniform(0, 2, n),
                rng.uniform(1.01 * least, 1.01 * most, n),
                rng.uniform(least, np.log(info.tiny), n),  # exp is denormal
                rng.uniform(most - 1, most, n),
                np.log(2) / 2 * rng.integers(-200, 200, n) * (1 + info.eps * rng.integers(-4, 4, n)),
                np.pi / 2 * rng.integers(-n, n, n),
                [16367173 * 2.0**72],  # of all floats, the nearest to a multiple of π/2
            ],
            dtype=dtype,
            casting="unsafe",
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BOUNDS)
def test_errors_in_ulp(name, dtype, evaluate, rng):
    wider = {"float32": np.float64, "float64": np.longdouble}[dtype]
    if np.finfo(wider).nmant < np.finfo(dtype).nmant + 11:
        pytest.skip("needs an extended type as the oracle")
    x = sample(dtype, rng)
    y = evaluate(name, x)
    with np.errstate(all="ignore"):
        true = getattr(np, name)(x.astype(wider))
        rounded = true.astype(dtype)
        finite = np.isfinite(rounded)
        error = np.abs(y - true)[finite] / np.spacing(np.abs(rounded[finite]))
    np.testing.assert_array_equal(y[~finite], rounded[~finite])
    assert error.max() <= BOUNDS[name], f"{error.max()} ulp at {x[finite][error.argmax()]!r}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instructions", list(host.INSTRUCTION_SETS))
@pytest.mark.parametrize("name", [*BOUNDS, "sqrt", "abs"])
def test_equal_bits_on_every_instruction_set(name, instructions, dtype, evaluate, rng):
    if instructions not in available():
        pytest.skip(f"{instructions} does not run on this machine, or was not built")
    x = sample(dtype, rng, 10_000)
    np.testing.assert_array_equal(bits(evaluate(name, x, instructions)), bits(evaluate(name, x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BOUNDS)
def test_equal_bits_at_every_place_of_a_vector(name, dtype, evaluate, rng):
    """Whether in a whole vector of the loop or in what is left over."""
    x = rng.choice(sample(dtype, rng, 100), 67)
    y = evaluate(name, x)
    for start, stop in [(0, 1), (1, 4), (1, 67), (5, 36), (66, 67)]:
        np.testing.assert_array_equal(bits(evaluate(name, x[start:stop])), bits(y[start:stop]))


inf, nan = np.inf, np.nan
SPECIAL = {
    "exp": [(nan, nan), (inf, inf), (-inf, 0.0), (0.0, 1.0), (-0.0, 1.0), (1e4, inf), (-1e4, 0.0)],
    "expm1": [(nan, nan), (inf, inf), (-inf, -1.0), (0.0, 0.0), (-0.0, -0.0), (1e4, inf), (-1e4, -1.0)],
    "log": [(nan, nan), (inf, inf), (-inf, nan), (0.0, -inf), (-0.0, -inf), (1.0, 0.0), (-1.0, nan), (-1e-40, nan)],
    "log1p": [(nan, nan), (inf, inf), (-inf, nan), (0.0, 0.0), (-0.0, -0.0), (-1.0, -inf), (-1.5, nan), (-1e30, nan)],
    "tanh": [(nan, nan), (inf, 1.0), (-inf, -1.0), (0.0, 0.0), (-0.0, -0.0), (1e30, 1.0), (-1e30, -1.0)],
    "sin": [(nan, nan), (inf, nan), (-inf, nan), (0.0, 0.0), (-0.0, -0.0)],
    "cos": [(nan, nan), (inf, nan), (-inf, nan), (0.0, 1.0), (-0.0, 1.0)],
    "sqrt": [(nan, nan), (inf, inf), (0.0, 0.0), (-0.0, -0.0), (-1.0, nan), (2.25, 1.5)],
    "abs": [(nan, nan), (inf, inf), (-inf, inf), (-0.0, 0.0), (-1.5, 1.5)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, x, y", [(name, x, y) for name, rows in SPECIAL.items() for x, y in rows])
def test_special_values(name, x, y, dtype, evaluate):
    result = evaluate(name, np.full(33, x, dtype))
    np.testing.assert_array_equal(bits(result), bits(np.full(33, y, dtype)))


@pytest.mark.parametrize("name", ["exp", "expm1"])
@pytest.mark.parametrize("largest", [np.float32(88.72283), np.float64(709.782712893384)])
def test_overflow_begins_after_the_largest_argument(name, largest, evaluate):
    x = np.array([largest, np.nextafter(largest, largest.dtype.type(np.inf))])
    assert np.isfinite(evaluate(name, x)).tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["expm1", "log1p", "tanh", "sin"])
def test_the_smallest_numbers_are_their_own_image(name, dtype, evaluate):
    info = np.finfo(dtype)
    x = np.array([info.smallest_subnormal, 3 * info.smallest_subnormal, info.tiny, info.eps**2], dtype)
    np.testing.assert_array_equal(evaluate(name, np.append(x, -x)), np.append(x, -x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_is_odd_and_at_most_1(dtype, evaluate, rng):
    x = sample(dtype, rng, 1000)
    y = evaluate("tanh", x)
    np.testing.assert_array_equal(evaluate("tanh", -x), -y)
    assert np.nanmax(np.abs(y)) == 1
