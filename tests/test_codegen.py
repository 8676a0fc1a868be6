"""The generated C++: what it says, that NVRTC takes all of it, and what the prelude computes beside the formulas.

What the kernels compute is tested in tests/kernels/, where a host compiler builds them.
"""

import re
import subprocess
import sys

import numpy as np
import pytest
from emulator import build

from benchmarks.cuda import compile_cuda
from gpubackprop import formulas
from gpubackprop.backends import codegen, cpp, skeletons
from gpubackprop.backends.codegen import Columns, Kernel, Sum
from gpubackprop.formulas import apply, name, number, parse

KERNELS = {k.name: k for row in codegen.names() for k in codegen.kernels(row)}
DTYPES = list(codegen.ITEMSIZE)


# ---- the text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", codegen.names())
def test_every_name_renders(row, dtype):
    text = codegen.source(row, dtype)
    assert "$" not in text and skeletons.GLUE not in text and '#include "' not in text
    assert [k.name for k in codegen.kernels(row)] == re.findall(r"__launch_bounds__\(BOUNDS\) (\w+)\(", text)
    assert max(map(len, text.splitlines())) <= skeletons.WIDTH
    assert text.startswith("//" if dtype == "float32" else f"#define {dtype.upper()}\n")
    for kernel in codegen.kernels(row):
        assert codegen.signature(text, kernel.name) == kernel.parameters


def test_a_name_prints_all_its_kernels():
    parts = {row: [k.name.removeprefix(f"{row}_") for k in codegen.kernels(row)] for row in codegen.names()}
    assert parts["exp"] == ["forward", "backward"] and parts["power"] == ["forward", "backward", "broadcast"]
    assert parts["gelu"] == ["forward", "backward", "backward_bias"]
    assert parts["mse"] == ["forward", "backward", "step", "step_weighted"]
    assert parts["nesterov"] == ["before", "before_half", "update", "update_half"]
    assert parts["adam"] == ["update", "update_half"]


def test_a_unit_has_each_part_once():
    text = codegen.unit(KERNELS.values())
    for part in ("#define GPUBACKPROP_PRELUDE", "#define GPUBACKPROP_REDUCE", "void add_rows(", "bool across_grid("):
        assert text.count(part) == 1
    assert "last_block" not in codegen.source("exp") and "Angle" not in codegen.source("exp")  # which needs none
    assert "Angle" in codegen.source("sin")


def test_the_arguments_of_an_update():
    graph, table = parse("p = p - s0 * g\nq = p"), {"s0": name("lr")}
    lean = Kernel("lean", graph, "", table=table, row=1)
    assert [k for _, k in lean.parameters] == [
        "p", "q", "g", "table", "state", "width", "s0_at", "rows", "columns", "members"
    ]  # fmt: skip
    full = Kernel("full", graph, "", table=table, row=1, wide=("p", "g"), groups=True, advance=True)
    types = {k: t for t, k in full.parameters}
    assert types["p"] == "R* __restrict__" and types["q"] == "T* __restrict__" and types["g"] == "const R* __restrict__"
    assert types["state"] == "Index* __restrict__" and types["ticket"] == "Word*"
    assert set(types) - {k for _, k in lean.parameters} == {"ticket", "control", "groups", "stride"}
    assert "table + state[1] * width" in full.source("float16") and "state[0] * width" not in full.source("float16")


def test_hand_written_kernels_are_found_by_their_files():
    for kernel, file in codegen.written().items():
        assert codegen.signature(codegen.source(kernel), kernel) and codegen.source(kernel) == codegen.source(file)
    assert not set(codegen.written()) & set(KERNELS)


def test_a_registered_activation_has_a_kernel(monkeypatch):
    monkeypatch.setattr(formulas, "ACTIVATIONS", dict(formulas.ACTIVATIONS))
    formulas.register_activation("bent", "(sqrt(x * x + 1) - 1) / 2 + x", "x / (2 * sqrt(x * x + 1)) + 1")
    assert "bent_backward" in codegen.source("bent")


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"^unknown kernel 'rleu'; choose from abs, adadelta, adagrad, adam, adamax, "):
        codegen.source("rleu")
    with pytest.raises(ValueError, match=r"^unknown dtype 'int8'; choose from float32, float64, float16, bfloat16$"):
        codegen.source("relu", "int8")


def test_bytes_per_element_are_the_floor():
    floor = {"relu_forward": 8, "relu_backward": 12, "sgd_update": 12, "momentum_update": 20, "adam_update": 28}
    floor |= {
        "relu_backward_bias": 12,
        "identity_backward_bias": 4,
        "mse_forward": 8,
        "mse_step": 12,
        "mse_step_weighted": 12,
    }
    assert {k: KERNELS[k].bytes("float32") for k in floor} == floor
    assert KERNELS["gelu_forward"].bytes("float32") == 12  # it keeps the pre-activation too
    assert KERNELS["adam_update"].bytes("float16") == 14
    assert [KERNELS["adam_update_half"].bytes(d) for d in DTYPES] == [32, 64, 30, 30]


@pytest.mark.parametrize(
    "text, lines",
    [
        ("x + (y - 2)", ["out = x + (y - R(2));"]),
        ("x - y - 2 * (x + y)", ["out = x - y - R(2) * (x + y);"]),
        ("x / (y * 3) / 0.1", ["out = x / (y * R(3)) / R(0.1);"]),
        ("-(-x) - -y", ["out = -(-x) - -y;"]),
        ("-(x + y) * exp(-x)", ["out = -(x + y) * exp(-x);"]),
        ("1 + where(x > 0, x, -1) * 2", ["out = R(1) + (x > R(0.0) ? x : R(-1)) * R(2);"]),
        ("where(x < y, where(y < 1, x, y), 0)", ["out = x < y ? (y < R(1) ? x : y) : R(0.0);"]),
        ("e = exp(x)\ne * e + 1e-12", ["const R t0 = exp(x);", "out = t0 * t0 + R(1e-12);"]),
    ],
)
def test_statements(text, lines):
    assert codegen.statements({"out": parse(text)[formulas.RESULT]}) == lines


def test_outputs_that_are_inputs_are_written_last():
    swap = {"a": name("b"), "b": name("a")}
    assert codegen.statements(swap) == ["const R t0 = b;", "const R t1 = a;", "a = t0;", "b = t1;"]


def test_locals_avoid_the_names_of_operands():
    square = apply("+", name("t0"), number(1))
    assert codegen.statements({"t1": apply("*", square, square)}) == ["const R t2 = t0 + R(1);", "t1 = t2 * t2;"]


def test_long_expressions_are_broken_up():
    total = name("x")
    for i in range(200):
        total = apply("+", apply("*", total, name("x")), number(i + 0.123456789))
    assert max(map(len, codegen.statements({"y": total}))) <= skeletons.WIDTH


def test_runs_by_path_with_the_standard_library_alone():
    command = [sys.executable, "-I", "-S", codegen.__file__, "gelu", "bfloat16"]
    printed = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
    assert printed.stdout == codegen.source("gelu", "bfloat16") and not printed.stderr


# ---- NVRTC ---------------------------------------------------------------------------------------------------------


def stored(kernel, keys, dtype):
    """The vectors of 16 bytes in one step over these arrays."""
    return sum(2 if k in kernel.wide and codegen.ITEMSIZE[dtype] == 2 else 1 for k in keys)


@pytest.mark.parametrize(
    "dtype, kernels", [("float32", list(KERNELS)), ("float16", list(KERNELS)[::4])], ids=["all-float32", "some-float16"]
)
def test_kernels_as_optimised(dtype, kernels):
    """Vectors of 16 bytes, no double arithmetic, no contraction, no float atomics, and the declared parameters."""
    text = codegen.unit([KERNELS[k] for k in kernels], dtype)
    ptx = compile_cuda(text, "compute_75", headers=dtype != "float32").ptx
    entries = {part.split("(")[0]: part for part in ptx.split(".visible .entry ")[1:]}
    assert list(entries) == kernels
    vector = r"v4\.[fu]32"
    for kernel, code in ((KERNELS[k], entries[k]) for k in kernels):
        streams = {*kernel.reads, *kernel.updates, *getattr(kernel, "per_column", ())}
        loads = len(re.findall(rf"ld\.global\.(?:nc\.)?{vector}", code))
        assert loads >= stored(kernel, streams, dtype), kernel.name
        assert len(re.findall(rf"st\.global\.{vector}", code)) == stored(kernel, kernel.writes, dtype), kernel.name
        tickets = isinstance(kernel, Columns | Sum) or getattr(kernel, "advance", False)
        assert set(re.findall(r"\b(?:atom|red)\.\S+", code)) == ({"atom.global.inc.u32"} if tickets else set())
        assert not (formulas.exact(kernel.graph.values()) and "fma." in code), kernel.name
        assert ".f64" not in code and ".local" not in code, kernel.name
        assert re.findall(r"\.param (?:\.align \d+ )?\.(\w+)", code.split(")")[0]) == [
            "b8" if "Layout" in t else "u64" if "*" in t or t.endswith("Index") else "u32" for t, _ in kernel.parameters
        ], kernel.name


# ---- what the prelude computes beside the formulas -----------------------------------------------------------------

RANDOM123 = """
#include "prelude.cuh"

namespace gpubackprop {

extern "C" __global__ void __launch_bounds__(1) words(Word* out, const Long seed, const Word site, const Word step,
        const Long place) {
    const Block drawn = draw(seed, site, step, place);
    for (int i = 0; i < 4; ++i) out[i] = drawn.word[i];
}

}  // namespace gpubackprop
"""


def test_philox_is_random123s():
    out = np.empty(4, np.uint32)
    given = {"seed": 0x299F31D0A4093822, "site": 0x03707344, "step": 0x13198A2E, "place": 0x85A308D3243F6A88}
    build(cpp.inlined(RANDOM123)).launch("words", 1, 1, out=out, **given)
    assert [f"{word:08x}" for word in out] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


TRIGONOMETRY = [Kernel(f"only_{f}", {"y": apply(f, name("x"))}, f) for f in ("sin", "cos")]


def trigonometry(f, x):
    y = np.empty_like(x)
    given = {"y": y, "x": x, "rows": 1, "columns": x.size, "members": 1}
    build(codegen.unit(TRIGONOMETRY, x.dtype.name)).launch(f"only_{f}", 1, 32, **given)
    return y


@pytest.mark.parametrize("f", ["sin", "cos"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sine_and_cosine_of_every_magnitude_are_within_2_ulp(dtype, f, rng):
    """Of numbers with bits at random, and of those next to multiples of π/2, where the reduction cancels."""
    wider = np.longdouble if dtype == np.float64 else np.float64
    if np.finfo(wider).eps == np.finfo(dtype).eps:
        pytest.skip("needs an extended type as the oracle")
    integer = {np.float32: np.uint32, np.float64: np.uint64}[dtype]
    any_number = rng.integers(0, np.array(np.inf, dtype).view(integer), 200_000, dtype=integer).view(dtype)
    hardest = [6381956970095103 * 2.0**797] if dtype == np.float64 else []  # 2^-61 off a multiple
    multiples = (np.arange(1, 100_000) * (np.pi / 2)).astype(dtype)
    x = np.concatenate([any_number, multiples, np.nextafter(multiples, dtype(0)), hardest]).astype(dtype)
    x *= rng.choice([-1, 1], x.size).astype(dtype)
    expected = getattr(np, f)(x.astype(wider))
    assert np.max(np.abs(trigonometry(f, x) - expected) / np.spacing(np.abs(expected).astype(dtype))) <= 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sine_and_cosine_of_what_is_no_angle(dtype):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], dtype)
    sine, cosine = trigonometry("sin", x), trigonometry("cos", x)
    assert sine[:2].tolist() == [0, 0] and np.signbit(sine[:2]).tolist() == [False, True]
    assert cosine[:2].tolist() == [1, 1] and np.isnan([sine[2:], cosine[2:]]).all()
