"""What a user installs: sdist, the wheel built from it, and the command line from another folder."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gpubackprop.backends import host
from gpubackprop.backends.native import why_not_native

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that an sdist of a clean copy builds (leftovers in build/ would ship deleted files)."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    done = built(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((folder / "dist").glob("*.tar.gz"))) == 1
    [path] = (folder / "dist").glob("*.whl")
    return path


def built(folder, *options, **environment):
    """A build of a clean copy, into `dist`."""
    shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "build", *options, "--no-isolation", "--outdir", folder / "dist", folder / "copy"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_wheel_holds_what_the_library_needs_and_no_more(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {n.split("/")[0] for n in names}
    assert {"gpubackprop/py.typed", "gpubackprop/data/digits.npz", "gpubackprop/data/DIGITS-LICENSE.txt",
            "gpubackprop/_kernels/prelude.cuh", "gpubackprop/_kernels/elementwise.cu",
            "gpubackprop/_benchmarks/__main__.py"} <= names  # fmt: skip
    assert tops == {"gpubackprop", next(t for t in tops if t.endswith(".dist-info"))}


@pytest.mark.skipif(why_not_native() is not None, reason=f"no library here either: {why_not_native()}")
def test_wheel_has_a_library_for_each_instruction_set(wheel):
    made = {n.split(".")[0] for n in zipfile.ZipFile(wheel).namelist() if "/_native_" in n}
    sets = ["base", *host.INSTRUCTION_SETS] if platform.machine() in ("x86_64", "AMD64") else ["base"]
    assert made == {f"gpubackprop/backends/_native_{name}" for name in sets}


def test_without_a_compiler_the_library_is_left_out_unless_it_is_required(tmp_path):
    broken = {"CC": "false", "CXX": "false"}
    for required in ("", "1"):
        (folder := tmp_path / f"required {required}").mkdir()
        done = built(folder, "--wheel", GPUBACKPROP_REQUIRE_NATIVE=required, **broken)
        assert (done.returncode != 0) == bool(required), done.stdout + done.stderr
        if not required:
            [path] = (folder / "dist").glob("*.whl")
            assert not [n for n in zipfile.ZipFile(path).namelist() if n.endswith(".so")]


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
    assert ("not in use" in run(program, "info")) == (why_not_native() is not None)
    assert "accuracy" in run(program, "train", "digits", "--epochs", "1")
    assert "__global__" in run(program, "kernels", "gelu")
    assert run(program, "--version").strip().endswith(next(iter(wheel.stem.split("-")[1:2])))
