"""The optional native library: formulas compiled for the host, once for each instruction set.

Without a compiler the install succeeds and NumPy alone serves; with GPUBACKPROP_REQUIRE_NATIVE=1 that is an error.
"""

import hashlib
import os
import platform
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


class Build(build_ext):
    """Writes the sources, then compiles them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

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
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # a plain library, not a module


machine = platform.machine()
sets = {"base": []} | (GENERATOR.INSTRUCTION_SETS if machine in ("x86_64", "AMD64") else {})
setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            f"gpubackprop.backends._native_{name}", [], include_dirs=["kernels", "kernels/host"], language="c++",
            extra_compile_args=[*OPTIONS, *options], extra_link_args=["-pthread"],
            optional=os.environ.get("GPUBACKPROP_REQUIRE_NATIVE") != "1",
        )
        for name, options in sets.items()
    ],
)  # fmt: skip
