"""The guides' code: what the pages show is run, by the tests and as they are built.

A page is Markdown. Its blocks of ```python run one after another in one namespace, in a folder of their own; a block of
```text right after one is what it prints, with … for what differs from machine to machine. The built page has what was
printed in its place, and the pictures that were saved.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["PAGES", "Block", "blocks", "run", "shown"]

DOCS = Path(__file__).parent
PAGES = sorted(DOCS.glob("*.md"))

_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$(\n+(?=```text\n))?", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """Python of a page, the line it begins on, and what it is to print with its place, if the page says so."""

    code: str
    line: int
    prints: str | None
    place: slice


def blocks(page: Path) -> Iterator[Block]:
    """The page's blocks of Python, in order."""
    text = page.read_text(encoding="utf-8")
    found = list(_FENCED.finditer(text))
    for match, following in zip_longest(found, found[1:]):
        if match[1] == "python":
            line = text.count("\n", 0, match.start(2)) + 1
            if match[3] is not None:
                yield Block(match[2], line, following[2], slice(*following.span(2)))
            else:
                yield Block(match[2], line, None, slice(0))


def run(page: Path, folder: Path) -> list[str]:
    """Run the page's blocks there, and return what each printed; AssertionError, with the place, if one prints
    something else than the page says."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    with contextlib.chdir(folder), mock.patch.dict(os.environ, COLUMNS="100"):
        for block in blocks(page):
            said = io.StringIO()
            source = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with contextlib.redirect_stdout(said):
                exec(source, names)
            printed.append(
                "".join(
                    f"{line.rstrip()}\n"
                    for line in said.getvalue().strip().splitlines()
                )
            )
            if block.prints is not None and not _matches(block.prints, printed[-1]):
                raise AssertionError(f"{page.name}, line {block.line}: the page says\n{block.prints}\nbut it prints\n"
                                     f"{printed[-1]}")  # fmt: skip
    return printed


def _matches(expected: str, printed: str) -> bool:
    pattern = "".join(
        ".*?" if part == "…" else re.escape(part) for part in re.split("(…)", expected)
    )
    return re.fullmatch(pattern, printed, re.S) is not None


def shown(page: Path, folder: Path) -> str:
    """The page's text with what its blocks print, run there, in place of what they are to print."""
    text = page.read_text(encoding="utf-8")
    for block, printed in reversed(
        list(zip(blocks(page), run(page, folder), strict=True))
    ):
        if block.prints is not None:
            text = text[: block.place.start] + printed + text[block.place.stop :]
    return text


if __name__ == "__main__":
    import sys
    import tempfile

    for path in map(Path, sys.argv[1:] or map(str, PAGES)):
        with tempfile.TemporaryDirectory() as folder:
            run(path.resolve(), Path(folder))
        print(f"{path}: runs")
