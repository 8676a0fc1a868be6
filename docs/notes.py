"""The lecture notes that the library comes from, section by section: its API for them, the tests that show it."""

import ast
import re
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["errata", "notes", "resolve", "rows", "said", "sections", "tests"]

DOCS = Path(__file__).parent
TESTS = DOCS.parent / "tests"


@cache
def notes() -> dict[str, Any]:
    """`notes.toml`."""
    return tomllib.loads((DOCS / "notes.toml").read_text(encoding="utf-8"))


@cache
def tests() -> dict[int, list[tuple[str, str]]]:
    """Of each row the tests that name it: file and function."""
    found = defaultdict[int, list[tuple[str, str]]](list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (
                match := re.match(r"test_seed_(\d\d)_", node.name)
            ):
                found[int(match[1])].append((path.name, node.name))
    return found


def resolve(name: str) -> Any:
    """What a dotted name under gpubackprop stands for."""
    import importlib

    import gpubackprop

    if name.startswith("sklearn."):
        importlib.import_module("gpubackprop.sklearn")
    value: Any = gpubackprop
    for part in name.split("."):
        value = getattr(value, part)
    return value


def sections() -> str:
    """A table for each document: section, and its rows."""
    lines = []
    for document in notes()["document"]:
        lines += [f"### {document['title']}\n", "| section | rows |", "|---|---|"]
        lines += [
            f"| {title} | {', '.join(f'[{n}](#row-{n})' for n in own)} |"
            for title, own in document["sections"]
        ]
        lines.append("")
    return "\n".join(lines)


def rows() -> str:
    """The table row → API → tests, whose names are sentences."""
    lines = ["| row | what | API | tests |", "|---|---|---|---|"]
    for number, (what, names) in notes()["rows"].items():
        linked = ", ".join(f"{{any}}`{name} <gpubackprop.{name}>`" for name in names)
        shown = "<br>".join(
            f"`{path}`: {said(name)}" for path, name in tests()[int(number)]
        )
        lines.append(f"| [{number}]{{#row-{number}}} | {what} | {linked} | {shown} |")
    return "\n".join(lines)


def said(test: str) -> str:
    """What a test says: test_seed_12_fan_out_adds_up is "fan out adds up"."""
    return re.sub(r"test_seed_\d\d_", "", test).replace("_", " ")


def errata() -> str:
    """The table of what is wrong in the notes."""
    lines = ["| | the notes say | it is |", "|---|---|---|"]
    lines += [
        f"| E{number} | {said} | {true} |"
        for number, (said, true) in notes()["errata"].items()
    ]
    return "\n".join(lines)
