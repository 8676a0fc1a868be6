"""What pyproject.toml cannot say: the folders that ship inside the package, and the optional native library.

The library holds the formulas compiled for the host: for this machine's instruction set, or for each, as wheels for
others need, with GPUBACKPROP_INSTRUCTION_SETS=all. Without a compiler the install succeeds and NumPy alone serves; with
GPUBACKPROP_REQUIRE_NATIVE=1 that is an error.
"""

import hashlib
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
OPTIONS = [
    "-std=c++17", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fvisibility=hidden", "-pthread", "-g0", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas", "-Wno-psabi",
]  # fmt: skip


def host() -> ModuleType:
    """The code generator, without the package itself, which would ask for NumPy."""
    for name in ("gpubackprop", "gpubackprop.backends"):
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = [str(ROOT.joinpath(*name.split(".")))]
    from gpubackprop.backends import host

    return host


GENERATOR = host()
DIGEST = GENERATOR.digest()
SHIPPED = {  # by the name that they have inside the package; a checkout uses them where they are
    "_kernels": ("kernels", ["*.cu", "*.cuh", "*.csv", "host/*.cpp", "host/*.h"]),
    "_benchmarks": ("benchmarks", ["*.py", "peers/*.py"]),
}


class Package(build_py):
    """Ships kernels/ and benchmarks/ inside the package."""

    def shipped(self) -> dict[str, str]:
        """Files of the build folder, and what each is a copy of."""
        found = {}
        for name, (folder, patterns) in SHIPPED.items() if not self.editable_mode else ():
            target = Path(self.build_lib, "gpubackprop", name)
            for path in sorted(path for pattern in patterns for path in Path(folder).glob(pattern)):
                found[str(target / path.relative_to(folder))] = str(path)
        return found

    def run(self) -> None:
        super().run()
        for target, source in self.shipped().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target, preserve_mode=False)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self.shipped().values()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self.shipped()]

    def get_output_mapping(self) -> dict[str, str]:
        return super().get_output_mapping() | self.shipped()


def instruction_sets() -> dict[str, list[str]]:
    """By name the options of the compiler."""
    known = {"base": []} | (GENERATOR.INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {})
    info = Path("/proc/cpuinfo")
    if os.environ.get("GPUBACKPROP_INSTRUCTION_SETS") == "all" or not info.exists():
        return known
    best = GENERATOR.instruction_sets(info.read_text().split())[-1]
    return {best: known[best]}


class Build(build_ext):
    """Writes the sources, then compiles them, as many at a time as there are cores."""

    def build_extensions(self) -> None:
        one = self.compiler.compile

        def compile(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor() as pool:
                return [o for made in pool.map(lambda source: one([source], **options), sources) for o in made]

        self.compiler.compile = compile
        for left in ROOT.glob("gpubackprop/backends/_native_*"):
            if DIGEST.encode() not in left.read_bytes():  # of other sources, for a set that is not compiled now
                left.unlink()
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        there = ROOT.joinpath(*ext.name.split(".")[:-1], target.name)
        mark = f"{DIGEST} by {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
        if there != target and there.exists() and mark.encode() in there.read_bytes():  # an editable install, again
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(there, target)
            return
        folder = Path(self.build_temp) / ext.name.rpartition(".")[2]
        folder.mkdir(parents=True, exist_ok=True)
        texts = {dtype: GENERATOR.unit(dtype) for dtype in GENERATOR.DTYPES}
        texts["pool"] = f'#define DIGEST "{DIGEST}" "\\0" "{mark}"\n#include <pool.cpp>\n'
        for name, text in texts.items():
            (source := folder / f"{name}.cpp").write_text(text, encoding="utf-8")
            ext.sources.append(str(source))
        begin, what = time.monotonic(), f"gpubackprop: the CPU kernels for {ext.name.rpartition('_')[2]}"
        print(f"{what} are compiled, once", file=sys.stderr)
        super().build_extension(ext)
        print(f"{what} took {time.monotonic() - begin:.0f} s", file=sys.stderr)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # a plain library, not a module


setup(
    cmdclass={"build_py": Package, "build_ext": Build},
    ext_modules=[
        Extension(
            f"gpubackprop.backends._native_{name}", [], include_dirs=["kernels", "kernels/host"], language="c++",
            extra_compile_args=[*OPTIONS, *options], extra_link_args=["-pthread"],
            optional=os.environ.get("GPUBACKPROP_REQUIRE_NATIVE") != "1",
        )
        for name, options in instruction_sets().items()
    ],
)  # fmt: skip
