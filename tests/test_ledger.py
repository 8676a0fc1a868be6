"""What kernels compile to: the rules that hold for all, the ledger that none may fall behind, and that both bite."""

import re
import subprocess
from dataclasses import replace

import pytest
from click.testing import CliRunner

import benchmarks.__main__ as command
from benchmarks import ledger as ledgers
from benchmarks.audit import natural_loops
from benchmarks.cuda import ARCHITECTURES, CompileError, Instruction, compile_cuda, toolkit
from benchmarks.inventory import Entry, Unit, inventory, representative, stated_bytes, units
from benchmarks.ledger import ALLOWANCE, COLUMNS, Ledger, compiled, made_of, measured, tools, value_for, violations
from benchmarks.occupancy import MULTIPROCESSORS, occupancy
from gpubackprop.backends import codegen

# ---- the kernels ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    """A slice of the matrix: float32 for one architecture, and every kernel once more, somewhere else."""
    return list(measured(representative()))


def test_the_slice_keeps_the_rules(results):
    assert [what for m in results for what in violations(m)] == []


def test_the_slice_is_no_worse_than_the_ledger(results):
    keeps_up(results)


def test_what_the_ledger_has_of_the_same_source_is_what_compiling_it_again_gives(results):
    """All that is read from machine code: because of this, lines that are up to date need not be compiled again."""
    ledger, same = Ledger.read(), 0
    for m in results:
        line = ledger.lines.get((m.entry.name, m.entry.variant), {})
        if m.tools == ledger.tools and line["made of"] == m.made_of:
            found = {column: value_for(m.architecture, cell) for column, cell in line.items()}
            assert found == {column: text(m) for column, text in COLUMNS.items()}, str(m)
            same += 1
    assert same or results[0].tools != ledger.tools, "no line is up to date: python -m benchmarks kernels --update"


@pytest.mark.matrix
def test_every_kernel_for_every_architecture():
    """Of those that the ledger is not up to date with."""
    outdated = Ledger.read().outdated(inventory(), tools())
    results = list(measured((entry, architecture) for entry in outdated for architecture in ARCHITECTURES))
    assert len(results) == len(outdated) * len(ARCHITECTURES)
    assert [what for m in results for what in violations(m)] == []
    keeps_up(results)


def keeps_up(results):
    ledger = Ledger.read()
    if others := {m.tools for m in results} - {ledger.tools}:
        pytest.skip(f"the ledger was written with {ledger.tools}; this is {others.pop()}")
    assert [what for m in results for what in ledger.regressions(m)] == []


# ---- the ledger ----------------------------------------------------------------------------------------------------


def test_the_ledger_has_every_kernel_and_no_other():
    known = {(entry.name, entry.variant) for entry in inventory()}
    assert set(Ledger.read().lines) == known, "python -m benchmarks kernels --update"


def test_the_ledger_shows_nothing_that_is_against_the_rules():
    for (name, variant), line in Ledger.read().lines.items():
        for column in ("local", "spill stores", "spill loads", "float atomics"):
            assert line[column] == "0", f"{name} {variant}: {column} {line[column]}"
        assert line["fp64"] == "0" or variant.startswith("float64"), f"{name} {variant}: {line['fp64']}"


def test_bytes_per_element_are_the_floor():
    lines = Ledger.read().lines
    floor = {
        "relu_forward": 8, "tanh_forward": 8, "relu_backward_bias": 12, "dropout": 8, "feed": 8, "copy_flat": 8,
        "softmax_cross_entropy_labels": 8, "mse_step": 12, "layer_norm_forward": 8, "layer_norm_backward": 12,
        "sgd_update": 12, "momentum_update": 20, "adam_update": 28, "adamw_update": 28, "gradient_norm": 4,
    }  # fmt: skip
    assert {k: int(lines[k, "float32"]["bytes"]) for k in floor} == floor
    assert lines["feed", "float32 SOURCE=uint8 TARGET=int64"]["bytes"] == "5"


def test_the_ledger_is_small():
    assert ledgers.PATH.stat().st_size < 150_000


def test_headers_state_bytes_for_any_types():
    header = "// One.\n// Bytes per element: one T + T, two T + R +\n// O, none 0. And so on.\n#include <x>\n// two R."
    assert stated_bytes(header, "one", "float32") == 8
    assert stated_bytes(header, "two", "float16") == 2 + 4 + 2
    assert stated_bytes(header, "two", "float64", OUTPUT="float32") == 8 + 8 + 4
    assert stated_bytes(header, "none", "float64") == 0
    with pytest.raises(ValueError, match="the header of kernel three lacks"):
        stated_bytes(header, "three", "float32")


# ---- planted faults ------------------------------------------------------------------------------------------------

LOOP = "for (Index i = threadIdx.x; i < n; i += blockDim.x)"
VECTORS = """
    const float4* from = reinterpret_cast<const float4*>(x);
    for (Index i = threadIdx.x; i < n / 4; i += blockDim.x) reinterpret_cast<float4*>(out)[i] = from[i];
"""
PLANTED = Entry("planted", "float32")
SPILL = f"""
    float v[300];
    UNROLL for (int k = 0; k < 300; ++k) v[k] = x[k * n];
    {LOOP} {{
        float sum = 0;
        UNROLL for (int k = 0; k < 300; ++k) sum += v[k] *= x[i];
        out[i] = sum;
    }}
"""


def planted(body, architecture="sm_90", entry=PLANTED, parameters="T* out, const T* x, float* total, const Index n"):
    """A float32 kernel of that body, measured."""
    head = f'extern "C" __global__ void __launch_bounds__(THREADS) {entry.name}({parameters})'
    text = f"namespace gpubackprop {{\n{head} {{\n{body}\n}}\n}}\n"
    [m] = compiled([Unit(codegen.file_unit("prelude.cuh") + text, (entry,))], architecture)
    return m


def test_an_innocent_kernel_keeps_the_rules():
    assert violations(planted(VECTORS)) == []


@pytest.mark.parametrize("architecture", ["sm_75", "sm_120"])
@pytest.mark.parametrize(
    "body, broken",
    [
        (SPILL, "spills: "),
        (f"float v[64]; {LOOP} v[i % 64] = x[i]; out[0] = v[n % 64];", "bytes of local memory a thread"),
        (f"{LOOP} out[i] = x[i] * 0.1;", "instructions of 64-bit arithmetic"),
        (f"{LOOP} atomicAdd(total, x[i]);", " atomics of floats"),
        (f"{LOOP} atomicAdd(total, x[i]) > 1 ? out[i] = 0 : 0;", " atomics of floats"),
        (f"__shared__ float sum; {LOOP} atomicAdd(&sum, x[i]); __syncthreads(); out[0] = sum;", " atomics of floats"),
        (f"{LOOP} out[i] = x[i];", "a scalar main loop: loads (32"),
    ],
    ids=["spill", "array", "double", "red", "atom", "shared", "scalar"],
)
def test_planted_faults_are_caught(body, broken, architecture):
    assert any(broken in what for what in violations(planted(body, architecture)))


FENCES = {"before": "    __threadfence();\n    __syncthreads();\n", "after": "false;\n    __threadfence();\n"}


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
@pytest.mark.parametrize("name", ["mse_forward", "relu_backward_bias"])
def test_a_missing_fence_is_caught(name, architecture):
    """The one that publishes partial sums before the ticket, and the one that keeps the last block from old ones."""
    [unit] = units([Entry(name, "float32")])

    def found(old="", new=""):
        assert old in unit.source
        [m] = compiled([replace(unit, source=unit.source.replace(old, new))], architecture)
        return [what.partition(": ")[2] for what in violations(m)]

    without = {place: text.replace("    __threadfence();\n", "") for place, text in FENCES.items()}
    assert found() == []
    [before], [after] = (found(FENCES[place], without[place]) for place in FENCES)
    assert re.fullmatch(r"no fence between [1-9]\d* stores and a ticket, a ticket and 0 loads", before)
    assert re.fullmatch(r"no fence between 0 stores and a ticket, a ticket and [1-9]\d* loads", after)


def test_integer_atomics_are_no_fault():
    m = planted(VECTORS + "atomicInc(reinterpret_cast<Word*>(total), 3u);")
    assert violations(m) == [] and m.facts.integer_atomics == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_is_the_kernels_own(architecture):
    m = planted(
        "__shared__ T v[THREADS];" + VECTORS + "v[threadIdx.x] = 0, __syncthreads(), *out = v[n];", architecture
    )
    assert m.facts.shared == 1024 and m.block == 256


def test_a_vector_that_the_compiler_splits_is_caught():
    split = VECTORS.replace("= from[i]", "= from[i], total[4 * i] = x[4 * i], total[4 * i + 1] = x[4 * i + 1]")
    assert any("which could be vectors" in what for what in violations(planted(split)))


def test_a_generated_kernel_moves_what_its_header_states():
    assert any(
        "a scalar main loop" in what for what in violations(planted(VECTORS, entry=Entry("relu_backward", "float32")))
    )


def test_parameters_that_differ_from_the_signature_are_caught():
    m = planted("out[0] = T(s);", entry=Entry("advance", "float64"), parameters="T* out, const R s, const int n")
    assert violations(m) == ["advance float64 sm_90: parameters u64, f32, u32 for u64, f64, u32"]


def test_a_warning_is_an_error():
    with pytest.raises(CompileError, match=r"^planted float32 sm_90 and its unit:\nunit\.cu\(\d+\): warning .*unused"):
        planted("int unused = 1;" + VECTORS)


# ---- regressions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one():
    """A kernel, and the ledger of it alone."""
    m = next(m for m in measured([(Entry("relu_forward", "float32"), "sm_90")]))
    return m, Ledger.of([replace(m, architecture=architecture) for architecture in ARCHITECTURES])


@pytest.mark.parametrize(
    "change, column",
    [
        ({"occupancy": 37}, "occupancy %"),
        ({"spills": (1, 0)}, "spill stores"),
        ({"spills": (0, 1)}, "spill loads"),
        ({"local": 8}, "local"),
        ({"double": 1}, "fp64"),
        ({"float_atomics": 1}, "float atomics"),
        ({"integer_atomics": 1}, "integer atomics"),
        ({"shared": 1024}, "shared"),
        ({"loop_loads": (64, 64)}, "loop loads"),
        ({"loop_stores": (128, 32)}, "loop stores"),
        ({"loop_stores": ()}, "loop stores"),
        ({"loads": (64, 32)}, "loads"),
        ({"stores": (128, 16)}, "stores"),
    ],
)
def test_what_is_worse_than_the_ledger_is_caught(one, change, column):
    m, ledger = one
    [what] = ledger.regressions(replace(m, facts=replace(m.facts, **change)))
    assert what.startswith(f"relu_forward float32 sm_90: {column} ")


def test_a_few_more_registers_are_no_regression(one):
    m, ledger = one

    def with_more(n):
        return ledger.regressions(replace(m, facts=replace(m.facts, registers=m.facts.registers + n)))

    assert with_more(0) == with_more(ALLOWANCE) == []
    assert with_more(ALLOWANCE + 1)[0].startswith("relu_forward float32 sm_90: registers ")


def test_what_is_better_is_no_regression(one):
    m, ledger = one
    assert ledger.regressions(replace(m, facts=replace(m.facts, registers=8, occupancy=100))) == []


def test_a_kernel_that_the_ledger_lacks_is_caught(one):
    m, ledger = one
    assert ledger.regressions(replace(m, entry=Entry("new", "float32"))) == ["new float32 sm_90: is not in the ledger"]


def test_another_compiler_or_disassembler_has_only_the_absolute_rules(one):
    m, ledger = one
    worse = replace(m, facts=replace(m.facts, registers=255, spills=(3, 3)))
    other = replace(worse, tools=m.tools.replace("NVRTC V", "NVRTC V1"))
    assert ledger.regressions(worse) != [] and ledger.regressions(other) == []
    assert violations(worse) == violations(other) != []


def test_a_ledger_reads_as_it_was_written(one, tmp_path):
    m, ledger = one
    uneven = replace(m, architecture="sm_75", facts=replace(m.facts, registers=m.facts.registers + 9))
    mixed = Ledger.of([replace(m, architecture=a) if a != "sm_75" else uneven for a in ARCHITECTURES])
    mixed.write(tmp_path / "ledger.csv")
    again = Ledger.read(tmp_path / "ledger.csv")
    assert again == mixed and ledger.regressions(uneven) != [] and again.regressions(uneven) == []
    assert len((tmp_path / "ledger.csv").read_text().splitlines()) == 3


# ---- what is up to date --------------------------------------------------------------------------------------------


def test_lines_of_other_sources_rules_or_tools_are_outdated(one, monkeypatch):
    m, ledger = one[0], Ledger(one[1].tools, {key: dict(line) for key, line in one[1].lines.items()})
    assert ledger.outdated([m.entry], m.tools) == []
    new = Entry("tanh_forward", "float32")
    assert ledger.outdated([m.entry, new], m.tools) == [new]
    assert ledger.outdated([m.entry], m.tools.replace("NVRTC V", "NVRTC V1")) == [m.entry]
    for change in (
        lambda: monkeypatch.setattr(ledgers, "units", lambda e: [replace(u, source=u.source + " ") for u in units(e)]),
        lambda: monkeypatch.setattr(ledgers, "_looked_at_by", lambda: [b"other rules"]),
        lambda: ledger.lines["relu_forward", "float32"].pop("made of"),  # written before there were digests
    ):
        change()
        assert ledger.outdated([m.entry], m.tools) == [m.entry]
        monkeypatch.undo()


def test_the_digest_is_of_all_that_decides():
    [unit] = units([Entry("relu_forward", "float32")])
    assert unit.source == codegen.source("relu") and len(made_of(unit)) == 12
    assert b"--fmad=false" in ledgers._looked_at_by() and any(b"def violations" in t for t in ledgers._looked_at_by())


def test_what_is_against_the_rules_is_not_written(one):
    m, _ = one
    spilled = [replace(m, architecture=a, facts=replace(m.facts, spills=(a == "sm_75", 0))) for a in ARCHITECTURES]
    assert Ledger.of(spilled).lines == {}


# ---- occupancy -----------------------------------------------------------------------------------------------------

HEADER = """
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
    int major, minor, warps, shared, step, reserved, threads, registers, statics;
    while (std::scanf("%d %d %d %d %d %d %d %d", &major, &minor, &warps, &shared, &reserved, &threads, &registers,
                      &statics) == 8) {
        cudaOccDeviceProp device;
        device.computeMajor = major, device.computeMinor = minor, device.maxThreadsPerBlock = 1024;
        device.maxThreadsPerMultiprocessor = warps * 32, device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.warpSize = 32, device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = shared;
        device.numSms = 1, device.sharedMemPerBlockOptin = shared - reserved;
        device.reservedSharedMemPerBlock = reserved;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = statics;
        kernel.numBlockBarriers = 1;
        cudaOccDeviceState state;
        cudaOccResult result;
        const int status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0);
        std::printf("%d\\n", status ? -status : result.activeBlocksPerMultiprocessor);
    }
}
"""


def test_occupancy_is_that_of_nvidias_header(tmp_path):
    (tmp_path / "header.cpp").write_text(HEADER)
    build = ["g++", f"-isystem{toolkit()}/include", "header.cpp", "-o", "header"]
    subprocess.run(build, cwd=tmp_path, check=True)
    cases = [
        (a, threads, registers, shared)
        for a in ARCHITECTURES
        for threads in (32, 96, 128, 256, 1000, 1024)
        for registers in (0, 16, 24, 31, 32, 33, 40, 48, 56, 63, 64, 65, 96, 128, 168, 255)
        for shared in (0, 1, 128, 1000, 5248, 20_000, 33_924, 49_152)
    ]
    lines = []
    for a, *kernel in cases:
        sm, version = MULTIPROCESSORS[a], int(a[3:])
        lines.append(" ".join(map(str, (*divmod(version, 10), sm.warps, sm.shared, sm.shared_reserved, *kernel))))
    done = subprocess.run(tmp_path / "header", input="\n".join(lines), capture_output=True, text=True, check=True)
    blocks = [int(line) for line in done.stdout.split()]
    for (a, threads, *rest), n in zip(cases, blocks, strict=True):
        expected = n * -(-threads // 32) / MULTIPROCESSORS[a].warps
        assert occupancy(a, threads, *rest) == expected, (a, threads, *rest)


# ---- loops ---------------------------------------------------------------------------------------------------------


def code(*lines):
    """Instructions from `@P0 BRA 3`, the targets being places."""
    parts = (re.fullmatch(r"(@\w+ )?(\w+) ?(.*)", line).groups("") for line in lines)
    return [Instruction(predicate.strip(), opcode, operands) for predicate, opcode, operands in parts]


def test_nested_loops_are_found():
    nest = code("MOV", "MOV", "LDG", "@P0 BRA 2", "BRA.U UP1,1", "EXIT")
    assert sorted(map(sorted, natural_loops(nest))) == [[1, 2, 3, 4], [2, 3]]


def test_a_slow_path_behind_the_code_is_no_loop():
    assert natural_loops(code("@P0 BRA 3", "MOV", "EXIT", "MUFU", "BRA 1")) == []


def test_a_slow_path_in_a_loop_belongs_to_it():
    [loop] = natural_loops(code("LDG", "@P0 BRA 4", "@P1 BRA 0", "EXIT", "MUFU", "BRA 2"))
    assert sorted(loop) == [0, 1, 2, 4, 5]


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_the_ledger():
    printed = CliRunner().invoke(command.main, ["kernels", "relu_forward", "--arch", "sm_90", "--dtype", "float32"])
    assert printed.exit_code == 0, printed.output
    tools, _, _, heads, line = printed.output.splitlines()
    assert tools.startswith("NVRTC V") and "registers" in heads and line.startswith("relu_forward")
    everything = CliRunner().invoke(command.main, ["kernels"]).output
    assert all(name in everything for name in codegen.written())


def test_the_command_names_what_is_wrong():
    failed = CliRunner().invoke(command.main, ["kernels", "rleu"])
    assert failed.exit_code == 1 and "no kernel 'rleu' in the ledger; all: " in failed.output
    failed = CliRunner().invoke(command.main, ["kernels", "relu_forward", "relu_fowrard", "top1"])
    assert failed.exit_code == 1 and "no kernel 'relu_fowrard' in the ledger; near: relu_forward" in failed.output
    failed = CliRunner().invoke(command.main, ["kernels", "relu_forward", "--dtype", "int8"])
    assert (
        failed.exit_code == 1
        and "no types 'int8' in the ledger; choose from " in failed.output
        and ", float32" in failed.output
    )


def test_the_command_writes_the_ledger(one, tmp_path, monkeypatch):
    m, _ = one
    monkeypatch.setattr(command, "PATH", path := tmp_path / "ledger.csv")
    monkeypatch.setattr(command, "inventory", lambda: [m.entry])
    written = CliRunner().invoke(command.main, ["kernels", "--update"])
    assert written.exit_code == 0, written.output
    assert list(Ledger.read(path).lines) == [("relu_forward", "float32")]
    before = path.read_text()
    monkeypatch.setattr(command, "measured", lambda jobs: [] if not jobs else pytest.fail("nothing is outdated"))
    assert CliRunner().invoke(command.main, ["kernels", "--update"]).exit_code == 0 and path.read_text() == before


def test_the_toolkit_needs_no_header_for_float32():
    assert compile_cuda(codegen.source("relu"), "compute_75", headers=False).ptx
