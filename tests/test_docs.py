"""The guides' code runs and prints what they say; the lecture notes' table and the API page leave nothing out."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from click.testing import CliRunner

import gpubackprop as gb
from gpubackprop.cli import main
from gpubackprop.formulas import ACTIVATIONS

matplotlib.use("Agg")

DOCS = Path(__file__).parent.parent / "docs"
sys.path.append(str(DOCS))

import matplotlib.pyplot  # noqa: E402
import notes  # noqa: E402
import pages  # noqa: E402
import public_names  # noqa: E402

GUIDES = [page for page in pages.PAGES if any(True for _ in pages.blocks(page))]


# ---- guides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_code_of_a_guide_runs(page, tmp_path):
    known = set(ACTIVATIONS)
    try:
        pages.run(page, tmp_path)
    finally:
        matplotlib.pyplot.close("all")
        for name in set(ACTIVATIONS) - known:
            del ACTIVATIONS[name]
    pictures = re.findall(r"\]\(_made/([\w-]+\.svg)\)", page.read_text())
    assert [name for name in pictures if not (tmp_path / name).stat().st_size] == []


@pytest.mark.parametrize("page", [p for p in GUIDES if p.stem != "index"], ids=lambda page: page.stem)
def test_a_guide_is_short_and_ends_in_commands_that_run(page, tmp_path, monkeypatch):
    text = page.read_text()
    assert len(text.splitlines()) <= 220
    commands = re.findall(r"^    (gpubackprop|python) (.*)$", text.split("\n## Run it\n")[1], re.M)
    assert commands
    monkeypatch.chdir(tmp_path)
    for program, line in commands:
        if line == "doctor":
            continue  # three quarters of a minute; tests/test_doctor.py runs it
        if program == "gpubackprop":
            done = CliRunner().invoke(main, shlex.split(line))
            assert done.exit_code == 0, done.output
        else:
            root = {"PYTHONPATH": str(DOCS.parent)}
            place = DOCS.parent if "tests" in line else tmp_path
            subprocess.run([sys.executable, *shlex.split(line)], cwd=place, env=os.environ | root, check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip


def test_every_page_is_in_the_contents():
    listed = re.findall(
        r"^[\w-]+$", "".join(re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.S)), re.M
    )
    assert sorted(listed) == sorted(p.stem for p in pages.PAGES if p.stem != "index")


def test_what_a_page_says_is_compared(tmp_path):
    page = tmp_path / "page.md"

    def run(code, prints):
        page.write_text(f"Text.\n\n```python\n{code}\n```\n\n```text\n{prints}\n```\n")
        pages.run(page, tmp_path)

    run("print(1, 2.345)", "1 2.3…")
    with pytest.raises(AssertionError, match=r"page\.md, line 4: the page says"):
        run("print(1)", "2")
    with pytest.raises(ZeroDivisionError) as failed:
        run("1 / 0", "")
    assert failed.traceback[-1].lineno == 3 and str(failed.traceback[-1].path) == str(page)


# ---- the lecture notes ---------------------------------------------------------------------------------------------

ROWS = range(1, 49)


def test_every_row_has_a_test_that_names_it():
    assert {row: notes.tests().get(row) for row in ROWS if row not in notes.tests()} == {}
    assert set(notes.tests()) == set(ROWS)


def test_every_row_has_its_api_and_belongs_to_a_section():
    assert [int(row) for row in notes.notes()["rows"]] == list(ROWS)
    for _, names in notes.notes()["rows"].values():
        assert all(notes.resolve(name).__doc__ for name in names) and names
    documents = notes.notes()["document"]
    assert len(documents) == 5
    assert {row for d in documents for _, rows in d["sections"] for row in rows} == set(ROWS)
    assert [title for d in documents for title, rows in d["sections"] if not rows] == []
    assert list(map(int, notes.notes()["errata"])) == list(range(1, 18))


def test_the_tables_hold_all_of_it():
    table = notes.rows()
    for row in ROWS:
        [line] = re.findall(rf"^\| \[{row}\]\{{#row-{row}\}} \| (.*)$", table, re.M)
        assert all(f"`{path}`: {notes.said(name)}" in line for path, name in notes.tests()[row])
    assert len(re.findall(r"\(#row-\d+\)", notes.sections())) >= len(ROWS)
    assert notes.errata().count("\n| E") == 17


# ---- the API page --------------------------------------------------------------------------------------------------


def test_the_api_page_lists_every_public_name_once():
    listed = [name.removesuffix("+") for names in public_names.GROUPS.values() for name in names.split()]
    assert len(listed) == len(set(listed))
    modules = {name for name in gb.__all__ if type(getattr(gb, name)).__name__ == "module"}
    public, found = {name: getattr(gb, name) for name in gb.__all__}, [notes.resolve(name) for name in listed]
    assert [name for name in public if name not in modules and not any(public[name] is f for f in found)] == []
    assert {name for name in listed if "." not in name} <= set(public)
    for module in ("schedules", "plot", "sklearn"):
        own = notes.resolve(f"{module}.__name__") and sys.modules[f"gpubackprop.{module}"].__all__
        assert {f"{module}.{name}" for name in own} == {n for n in listed if n.startswith(f"{module}.")}
    assert all(f"gpubackprop.{name}" in public_names.page() for name in listed)
