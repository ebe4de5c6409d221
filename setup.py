"""Builds minitron_kernels._C where that is possible; all other settings are in pyproject.toml.

MINITRON_BUILD=auto    (default) C++ if there is a compiler, CUDA if there is nvcc
MINITRON_BUILD=python  no extension
MINITRON_BUILD=cpu     C++ without CUDA, or an error
MINITRON_BUILD=cuda    C++ and CUDA, or an error
MINITRON_CUDA_ARCHS=90 (or 80,90, ...) CUDA kernels for these architectures alone, in a third of the time each
MAX_JOBS=4             compilers at once; default: one for each core
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # for `python setup.py ...` from elsewhere

from build_backend import compile, tools  # noqa: E402

PLAN = tools.make_plan(tools.requested_mode())
NOTE = "_not_built.txt"  # says why there is no extension; minitron_kernels/_native.py reads it


class Build(build):
    def run(self) -> None:
        if PLAN.error:
            raise SystemExit(PLAN.error)
        if PLAN.warn:
            line = "*" * 100
            text = f"WARNING: building minitron-kernels WITHOUT its C++ kernels: {PLAN.no_native}"
            print(line, text, line, sep="\n", file=sys.stderr)
        # else modules that were deleted since the last build would be packed
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        note = folder / "minitron_kernels" / NOTE
        if PLAN.no_native:
            note.write_text(PLAN.no_native + "\n")
        else:
            note.unlink(missing_ok=True)


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if PLAN.error:
            raise SystemExit(PLAN.error)
        # not build_temp, which is temporary in editable installs: builds would not be incremental
        folder = ROOT / "build" / f"native-{self.plat_name}-{sys.implementation.cache_tag}"
        built = compile.build_extension(ROOT, folder, PLAN, self.distribution.get_version())
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)


setup(
    ext_modules=[] if PLAN.no_native else [Extension("minitron_kernels._C", sources=["csrc/module.cpp"])],
    cmdclass={"build": Build, "build_py": BuildPy, "build_ext": BuildExt},
)
