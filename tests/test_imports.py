"""The package's shape: imports point one way only, and importing it loads NumPy and nothing else heavy."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gpubackprop"

# A module may import from its own level or a lower one.
LEVELS = [
    {"names", "formulas", "checks", "columns", "spread", "claims"},
    {"files"},
    {"backends"},
    {"plan", "observe"},
    {"backprop"},
    {"tensor", "operands", "shapes", "ops", "numpy_functions"},
    {"data", "fused", "gradients", "arena", "initializers", "rates"},
    {"datasets", "device_data", "holdout", "schedules"},
    {"predictor"},
    {"model"},
    {"layers", "losses", "metrics", "optimizers", "precision", "tables"},
    {"moments", "penalty", "rerun"},
    {"step", "progress", "checkpoint", "scaling", "pruning"},
    {"room", "callbacks", "lbfgs", "row_weights", "evaluation"},
    {"trainer"},
    {"range_test", "guessing", "diagnostics"},
    {"nan_search", "report", "lab", "landscape"},
    {"__init__"},
    {"runs", "installation", "parity", "roofline", "solvers"},
    {"perceptron", "plot"},
    {"doctor", "sklearn"},
    {"console"},
    {"cli_plot"},
    {"cli"},
    {"__main__"},
]


def level(module: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if module in names)


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, at the top or in a function; not those for the type checker alone."""
    tree = ast.parse(path.read_text())
    typing_only = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {n for block in typing_only for n in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in skipped and (node.module or "").startswith("gpubackprop"):
            _, *parts = node.module.split(".")
            found |= {parts[0]} if parts else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("gpubackprop.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    known = set().union(*LEVELS)
    assert own in known, "a new module: give it a level"
    assert {m for m in imported(path) & known if level(m) > level(own)} == set(), f"{own} imports from above itself"


def test_one_module_imports_cupy():
    """The rest reaches CuPy through it, so that what is asked of CuPy can be checked in one place."""
    pattern = re.compile(r"^\s*(?:import|from) (?:cupy|cupyx|cupy_backends)\b", re.MULTILINE)
    found = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if pattern.search(p.read_text())}
    assert found == {str(Path("backends", "cupy.py"))}


def test_nothing_imports_the_laboratory():
    others = [p for p in PACKAGE.rglob("*.py") if "lab" not in p.relative_to(PACKAGE).parts]
    assert [p for p in others if "lab" in imported(p)] == []


def run_python(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def test_importing_loads_nothing_heavy():
    code = "import sys, gpubackprop; print([m for m in {} if m in sys.modules])".format(
        (
            "tqdm",
            "click",
            "safetensors",
            "importlib.metadata",
            "cupy",
            "csv",
            "json",
            "numpy.testing",
            "sklearn",
            "scipy",
            "matplotlib",
        )
    )
    assert run_python(code) == "[]"


def test_importing_costs_less_than_importing_numpy():
    """In processor time, within one process: machines and hours differ."""
    code = """
import time
start = time.process_time()
import numpy
between = time.process_time()
import gpubackprop
print((time.process_time() - between) / (between - start))
"""
    assert min(float(run_python(code)) for _ in range(6)) <= 0.9  # the first run compiles


def test_names_loaded_later_are_listed():
    code = "import gpubackprop as gb; print({'plot', 'prune', 'lab', 'Trainer'} <= set(dir(gb)), 'Any' in dir(gb))"
    assert run_python(code) == "True False"
