"""What a user installs: sdist, the wheel built from it, and the command line from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that an sdist of a clean copy builds (leftovers in build/ would ship deleted files)."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "copy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((folder / "dist").glob("*.tar.gz"))) == 1
    [path] = (folder / "dist").glob("*.whl")
    return path


def test_wheel_holds_what_the_library_needs_and_no_more(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {n.split("/")[0] for n in names}
    assert {"gpubackprop/py.typed", "gpubackprop/data/digits.npz", "gpubackprop/data/DIGITS-LICENSE.txt",
            "gpubackprop/_kernels/prelude.cuh", "gpubackprop/_kernels/elementwise.cu",
            "gpubackprop/_benchmarks/__main__.py"} <= names  # fmt: skip
    assert tops == {"gpubackprop", next(t for t in tops if t.endswith(".dist-info"))}


def test_installed_wheel_runs_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", site, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(sys.executable, "-c", "import gpubackprop; print(gpubackprop.__file__)").strip()
    assert Path(where).is_relative_to(site)
    program = str(next((site / "bin").glob("gpubackprop*")))
    assert "CUDA" in run(program, "info")
    assert "accuracy" in run(program, "train", "digits", "--epochs", "1")
    assert "__global__" in run(program, "kernels", "gelu")
    assert run(program, "--version").strip().endswith(next(iter(wheel.stem.split("-")[1:2])))
