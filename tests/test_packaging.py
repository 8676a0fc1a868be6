"""What a user installs: sdist, the wheel built from it, and the command line from another folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from gpubackprop.backends import native
from gpubackprop.backends.native import available

ROOT = Path(__file__).parent.parent
LEFT_OUT = (".*", "build", "dist", "*.egg-info", "__pycache__")
LIBRARIES = ("*.so", "*.pyd")
NO_COMPILER = {"CC": "false", "CXX": "false", "GPUBACKPROP_REQUIRE_NATIVE": ""}


def built(folder, *options, left_out=(*LEFT_OUT, *LIBRARIES), **environment):
    """(the run, the wheels) of an sdist of a clean copy, and its wheel: leftovers in build/ would ship too."""
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*left_out))
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", folder / "dist", folder / "copy"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return done, list((folder / "dist").glob("*.whl"))


def available_here():
    return os.environ.get("GPUBACKPROP_REQUIRE_NATIVE") == "1" or native.why_not_native() is None


def libraries(wheel):
    return {n.split(".")[0] for n in zipfile.ZipFile(wheel).namelist() if "/_native_" in n}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a compiler: the native library is left out."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    done, wheels = built(folder, **NO_COMPILER)
    assert done.returncode == 0, done.stdout + done.stderr
    [source] = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(source) as archive:  # which must have all that a compiler asks for
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    needed = [p for f in ("kernels", "gpubackprop") for p in (folder / "copy" / f).rglob("*") if p.is_file()]
    assert {"setup.py", *(str(p.relative_to(folder / "copy")) for p in needed)} <= shipped
    [path] = wheels
    return path


def test_wheel_holds_what_the_library_needs_and_no_more(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {n.split("/")[0] for n in names}
    assert {"gpubackprop/py.typed", "gpubackprop/data/digits.npz", "gpubackprop/data/DIGITS-LICENSE.txt",
            "gpubackprop/_kernels/prelude.cuh", "gpubackprop/_kernels/elementwise.cu",
            "gpubackprop/_kernels/host/pool.cpp", "gpubackprop/_benchmarks/__main__.py"} <= names  # fmt: skip
    assert tops == {"gpubackprop", next(t for t in tops if t.endswith(".dist-info"))}
    assert not libraries(wheel)


def test_without_a_compiler_a_library_that_is_required_is_an_error(tmp_path):
    done, wheels = built(tmp_path, **NO_COMPILER | {"GPUBACKPROP_REQUIRE_NATIVE": "1"})
    assert done.returncode != 0 and not wheels, done.stdout + done.stderr


@pytest.mark.skipif(not available_here(), reason="no native library was built here")
def test_wheel_has_a_library_for_this_machine(tmp_path):
    """That which is here is of these sources, so it is taken as it is."""
    done, wheels = built(tmp_path, "--wheel", left_out=LEFT_OUT, **NO_COMPILER | {"GPUBACKPROP_REQUIRE_NATIVE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    sets = available() if os.environ.get("GPUBACKPROP_INSTRUCTION_SETS") == "all" else available()[-1:]
    assert libraries(*wheels) == {f"gpubackprop/backends/_native_{name}" for name in sets}


def test_installed_wheel_runs_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", site, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(site), "GPUBACKPROP_REQUIRE_NATIVE": ""}

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(sys.executable, "-c", "import gpubackprop; print(gpubackprop.__file__)").strip()
    assert Path(where).is_relative_to(site)
    program = str(next((site / "bin").glob("gpubackprop*")))
    assert "was not built; build it with a C++ compiler" in run(program, "info")
    assert "accuracy" in run(program, "train", "digits", "--epochs", "1")
    assert "__global__" in run(program, "kernels", "gelu")
    case = ("--smoke", "--repeats", "2", "--peers", "none", "--case", "train 64-64-64-10 (32)")
    assert "products cpu" in run(sys.executable, "-m", "gpubackprop._benchmarks", "run", *case)
    assert run(program, "--version").strip().endswith(next(iter(wheel.stem.split("-")[1:2])))
