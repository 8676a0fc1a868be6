"""`python -m benchmarks compare` and `plot` read any file of figures, or say in one line that it is none."""

import copy
import json

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.__main__ import main
from benchmarks.report import circumstances
from benchmarks.rounds import Figures

VALID = json.loads(json.dumps(circumstances() | {"figures": [
    Figures("train 784-128-10 (64)", "train", "step", name, 100, 200, "1", [1e-3, 2e-3, 1.5e-3]).record()
    for name in ("gpubackprop cpu", "numpy")
]}))  # fmt: skip
JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(
    [[], {}, [None], [0.0], ["a"], [-1.0], [1e400], "../x", "$\\frac", "a\0b", 10**400])  # fmt: skip


def places(data, at=()):
    yield at
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*at, key))


def outcome(folder, text, commands=("compare", "plot")):
    path = folder / "a.json"
    path.write_text(text)
    for command in commands:
        arguments = [str(path), str(path)] if command == "compare" else [str(path), "--out", str(folder / "out")]
        done = CliRunner().invoke(main, [command, *arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), (text, done.exc_info)
        assert done.exit_code == 0 or len(done.output.strip().splitlines()[-1]) < 400
        yield done


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "3", "null", '{"figures": 3}', '{"figures": [3]}', "\x00", "9" * 5000]
)
def test_what_is_no_file_of_figures_is_said(text, tmp_path):
    for done in outcome(tmp_path, text):
        assert done.exit_code == 1 and "not figures of `python -m benchmarks run --json`" in done.output


@pytest.mark.filterwarnings("ignore:Glyph")  # a name that no font can show is drawn all the same
@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_file_is_compared_or_refused_in_a_line(tmp_path, data):
    changed = copy.deepcopy(VALID)
    *way, last = data.draw(st.sampled_from([at for at in places(changed) if at]))
    part = changed
    for key in way:
        part = part[key]
    if data.draw(st.booleans()):
        part[last] = data.draw(JSON)
    else:
        del part[last]
    draws = last in ("group", "case", "contender", "unit", "seconds", 0)  # which pictures show; each takes a second
    list(outcome(tmp_path, json.dumps(changed), ("compare", "plot")[: 1 + (draws and data.draw(st.booleans()))]))
    assert {p.name for p in tmp_path.iterdir()} <= {"a.json", "out"}  # nothing above the folder
