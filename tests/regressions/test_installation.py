"""A clone named like the package does not hide it, and tests find their helpers whatever else is installed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "*.pyd")
NO_COMPILER = {"CC": "false", "CXX": "false", "GPUBACKPROP_REQUIRE_NATIVE": "", "PYTHONPATH": ""}


def run(command, cwd):
    done = subprocess.run(command, cwd=cwd, env=os.environ | NO_COMPILER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """(a clone, the Python of a virtual environment inside it that has the clone installed twice for editing)."""
    clone = tmp_path_factory.mktemp("a folder with spaces") / "gpubackprop"
    shutil.copytree(ROOT, clone, ignore=LEFT_OUT)
    run([sys.executable, "-m", "venv", "--without-pip", ".venv"], clone)
    folder = "Scripts" if os.name == "nt" else "bin"
    python = clone / ".venv" / folder / Path(sys.executable).name
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], clone).strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # NumPy and setuptools, but nothing's .pth file
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    for _ in range(2):
        run([*pip, "--no-deps", "--no-build-isolation", "--editable", clone], clone)
    return clone, python


def test_from_the_folder_that_holds_the_clone_the_package_is_imported(clone):
    path, python = clone
    code = "import gpubackprop as gb; gb.mlp; print(gb.__file__)"
    assert Path(run([python, "-c", code], path.parent).strip()) == path / "gpubackprop" / "__init__.py"


def test_an_editable_install_uses_kernels_and_benchmarks_where_they_are(clone, tmp_path):
    path, python = clone
    program = next(python.parent.glob("gpubackprop*"))
    assert "__global__" in run([program, "kernels", "gelu"], tmp_path)
    assert "usage" in run([python, "-m", "benchmarks", "--help"], path).lower()
    assert not [p for name in ("_kernels", "_benchmarks") for p in path.rglob(name) if "build" not in p.parts]


def test_tests_import_their_helpers_by_names_that_no_other_package_has():
    """`tests` may be another project's package."""
    found = [(p.name, line) for p in (ROOT / "tests").rglob("*.py") for line in p.read_text("utf-8").splitlines()
             if re.match(r"\s*(from|import) tests\b", line)]  # fmt: skip
    assert found == []
