"""The README holds: its Python runs, its tables are complete, its two commands stand each on one line."""

import re
from pathlib import Path

import gpubackprop as gb
from gpubackprop import layers, losses
from gpubackprop.formulas import ACTIVATIONS
from gpubackprop.initializers import INITIALIZERS

README = (Path(__file__).parent.parent / "README.md").read_text()


def listed(row: str) -> set[str]:
    [cells] = re.findall(rf"^\| {row} \| (.*) \|$", README, re.M)
    return set(re.findall(r"\w+", cells))


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) >= 4
    try:
        exec("\n".join(blocks), {})
    finally:
        ACTIVATIONS.pop("swoosh", None)


def test_tables_are_complete():
    assert set(ACTIVATIONS) <= listed("activations")
    assert set(losses.LOSSES) <= listed("losses")
    assert set(INITIALIZERS) <= listed("initializers")
    assert {n for n in layers.__all__ if isinstance(getattr(layers, n), type)} - {"Layer"} <= listed("layers")


def test_set_up_is_two_commands_of_one_line():
    commands = re.findall(r"^    (python3 -m venv .*)$", README, re.M)
    assert [c.split(" && ")[-1] for c in commands] == [
        ".venv/bin/gpubackprop train digits",
        ".venv/bin/python -m pytest",
    ]


def test_public_names_are_there_and_documented():
    for name in gb.__all__:
        assert getattr(gb, name).__doc__, name
