"""What pyproject.toml cannot say: the folders that ship inside the package, and the optional native library.

The library holds the formulas compiled for the host, once for each instruction set. Without a compiler the install
succeeds and NumPy alone serves; with GPUBACKPROP_REQUIRE_NATIVE=1 that is an error.
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
    cmdclass={"build_py": Package, "build_ext": Build},
    ext_modules=[
        Extension(
            f"gpubackprop.backends._native_{name}", [], include_dirs=["kernels", "kernels/host"], language="c++",
            extra_compile_args=[*OPTIONS, *options], extra_link_args=["-pthread"],
            optional=os.environ.get("GPUBACKPROP_REQUIRE_NATIVE") != "1",
        )
        for name, options in sets.items()
    ],
)  # fmt: skip
