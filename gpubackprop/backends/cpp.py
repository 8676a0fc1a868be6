"""Formulas as C++ statements, and the sources of kernels/ as self-contained texts; needs the standard library alone."""

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache, lru_cache
from itertools import count
from pathlib import Path

from gpubackprop import formulas

__all__ = [
    "C_TYPES", "ITEMSIZE", "Graph", "defines", "file_unit", "inlined", "signature", "sources", "statements", "written",
]  # fmt: skip

ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
C_TYPES = {
    "float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16", "uint8": "unsigned char",
    "int64": "long long",
}  # fmt: skip
LONGEST = 72  # characters of an expression whose parts need no names

Graph = Mapping[str, formulas.Expr]


# ---- expressions ---------------------------------------------------------------------------------------------------


def statements(graph: Graph) -> list[str]:
    """C++ that assigns the graph's outputs: one `const R tN` for each shared or long node, then the outputs.

    Of several outputs each is computed before any is written, because an output may be an input too.
    """
    order = formulas.walk(graph.values())
    uses = Counter(a for node in order for a in node.args)
    kept = set(graph.values()) if len(graph) > 1 else set()
    taken = {*graph, *formulas.free_names(*graph.values())}
    fresh = (t for i in count() if (t := f"t{i}") not in taken)
    text: dict[formulas.Expr, tuple[str, int]] = {}  # the text of a node and how tightly it binds
    lines = []
    for node in order:
        text[node] = _render(node, [text[a] for a in node.args])
        shared = node.args and (uses[node] > 1 or len(text[node][0]) > LONGEST)
        if shared or (node in kept and node.op != "number"):
            local = next(fresh)
            lines.append(f"const {'bool' if _compares(node) else 'R'} {local} = {text[node][0]};")
            text[node] = local, ATOM
    return [*lines, *(f"{k} = {text[e][0]};" for k, e in graph.items())]


ATOM, NEGATION, COMPARISON, CHOICE = 9, 3, 0, -1
BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}


def _compares(node: formulas.Expr) -> bool:
    return node.op in formulas.COMPARISONS.values()


def _render(node: formulas.Expr, args: list[tuple[str, int]]) -> tuple[str, int]:
    def operand(i: int, least: int) -> str:
        return args[i][0] if args[i][1] >= least else f"({args[i][0]})"

    if node.op == "name":
        return str(node.value), ATOM
    if node.op == "number":
        return _literal(float(node.value)), ATOM
    if node.op == "neg":
        return "-" + operand(0, NEGATION + 1), NEGATION  # never --x
    if node.op == "where":
        return f"{operand(0, COMPARISON)} ? {operand(1, 1)} : {operand(2, 1)}", CHOICE
    if _compares(node):
        return f"{operand(0, 1)} {node.op} {operand(1, 1)}", COMPARISON
    if (level := BINDING.get(node.op)) is not None:
        return f"{operand(0, level)} {node.op} {operand(1, level + 1)}", level
    return f"{node.op}({', '.join(a for a, _ in args)})", ATOM


def _literal(value: float) -> str:
    """The float64 value rounded once to the arithmetic type, as NumPy does it; `0.1f` would round the decimal text."""
    text = repr(value)
    return f"R({text.removesuffix('.0') if value else text})"


# ---- sources -------------------------------------------------------------------------------------------------------


def sources() -> Path:
    """The folder of the CUDA sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return packaged if (packaged := package / "_kernels").is_dir() else package.parent / "kernels"


@cache  # every bound launch asks for its source
def file_unit(file: str, dtype: str = "float32", **types: str) -> str:
    """A hand-written source of kernels/ with what it includes; `types` names the dtypes of SOURCE, OUTPUT, TARGET."""
    return defines(dtype, **types) + inlined(_read(file))


def defines(dtype: str, **types: str) -> str:
    """The lines before a unit that choose its types."""
    if dtype not in ITEMSIZE:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(ITEMSIZE)}")
    lines = [] if dtype == "float32" else [f"#define {dtype.upper()}"]
    lines += [f"#define {key} {C_TYPES[value]}" for key, value in types.items() if value != dtype]
    return "".join(line + "\n" for line in lines)


def inlined(text: str) -> str:
    """The text with each of our own includes replaced by what it includes, once."""
    seen: set[str] = set()

    def included(match: re.Match[str]) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _INCLUDE.sub(included, _read(match[1]))

    return _INCLUDE.sub(included, text)


def _read(file: str) -> str:
    return (sources() / file).read_text(encoding="utf-8")


@cache
def written() -> dict[str, str]:
    """The hand-written kernels: name -> file of kernels/."""
    files = {f.name: f.read_text(encoding="utf-8") for f in sorted(sources().glob("*.cu"))}
    return {name: file for file, text in files.items() if "$" not in text for name in _GLOBAL.findall(text)}


@lru_cache(maxsize=formulas.KEPT)
def signature(text: str, name: str) -> list[tuple[str, str]]:
    """(C++ type, name) of each argument of a kernel in a source, spaces normalised: ("const T* __restrict__", "x")."""
    match = re.search(_GLOBAL.pattern.replace(r"(\w+)", name) + r"([^)]*)\)", text)
    if match is None:
        raise ValueError(f"kernel {name!r} is not in the source")
    split = (" ".join(part.split()).rpartition(" ") for part in match[1].split(","))
    return [(kind, key) for kind, _, key in split]


_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)
_GLOBAL = re.compile(r'extern "C" __global__ void __launch_bounds__\(\w+\)\s+(\w+)\(')
