"""How the pages are built: `python -m sphinx -nW docs docs/_build`, with the extra `docs`."""

import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import gpubackprop  # noqa: E402
import notes  # noqa: E402
import pages  # noqa: E402
import public_names  # noqa: E402

# Browsers set large operators by a font's table for mathematics; this free one has it, and matplotlib ships it.
MATH_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSerif.ttf")

project, author = "gpubackprop", "The gpubackprop developers"
release = version = gpubackprop.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_made/*.md"]
myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"gpubackprop {version}"
html_static_path = ["static", str(MATH_FONT)]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_show_copyright = html_show_sourcelink = False
pygments_style, pygments_dark_style = "friendly", "monokai"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the text says what goes in
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True


# ---- mathematics as MathML, which browsers set without a script -----------------------------------------------------


def _math(writer: Any, node: nodes.math) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _math_block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(
        f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>'
    )
    raise nodes.SkipNode


# ---- what is made before the pages are read --------------------------------------------------------------------------


_shown: dict[str, str] = {}  # the pages by name


def _show(_: Any, name: str, source: list[str]) -> None:
    source[0] = _shown.get(name, source[0])


def _make(_: Any) -> None:
    """What the guides' code prints and the pictures it saves, the tables of the lecture notes, the list of the API."""
    made = DOCS / "_made"
    made.mkdir(exist_ok=True)
    _shown.update({page.stem: pages.shown(page, made) for page in pages.PAGES})
    (made / "sections.md").write_text(notes.sections(), encoding="utf-8")
    (made / "rows.md").write_text(notes.rows(), encoding="utf-8")
    (made / "api.md").write_text(public_names.page(), encoding="utf-8")
    (made / "errata.md").write_text(notes.errata(), encoding="utf-8")


# ---- docstrings, which are plain text --------------------------------------------------------------------------------


def _plain(
    _: Any, kind: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Names in backticks are code; bars, stars and the _ at the end of a name are themselves."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"`+([^`]+)`+", line)
            parts[::2] = (re.sub(r"([|*]|_\b)", r"\\\1", part) for part in parts[::2])
            parts[1::2] = (f"``{part}``" for part in parts[1::2])
            lines[i] = "".join(parts)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_math, None), (_math_block, None))
    app.connect("builder-inited", _make)
    app.connect("source-read", _show)
    app.connect("autodoc-process-docstring", _plain)
