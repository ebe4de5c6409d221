"""What is built, from what, what is packed, and what is said where something is missing. No network."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import minitron_kernels
from minitron_kernels import _backend, _native

ROOT = Path(__file__).resolve().parents[1]

# stands in for csrc/: every kind of source that needs no CUDA toolkit, compiled in a second
TOY_MODULE = """
#include <Python.h>
namespace avx512 { long twice(long x); }
namespace avx2 { long twice(long x); }
namespace baseline { long twice(long x); }
#include "toy/toy.h"
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() {
  long sum = baseline::twice(kOne);
#ifdef MINITRON_HAVE_AVX512
  sum += avx512::twice(10);
#endif
#ifdef MINITRON_HAVE_AVX2
  sum += avx2::twice(100);
#endif
  return sum >= 2 ? PyModule_Create(&module) : nullptr;
}
"""
TOY_SIMD = "namespace MINITRON_SIMD { long twice(long x) { return 2 * x; } }\n"


def copy_checkout(to: Path, *, toy: bool) -> Path:
    for name in ("build_backend", "csrc", "minitron_kernels", "tests", "benchmarks", "docs", "examples"):
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "_not_built.txt", "results")
            shutil.copytree(ROOT / name, to / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, to)
    if toy:
        shutil.rmtree(to / "csrc")
        (to / "csrc/toy").mkdir(parents=True)
        (to / "csrc/module.cpp").write_text(TOY_MODULE)
        (to / "csrc/toy/toy.h").write_text("constexpr long kOne = 1;\n")
        (to / "csrc/toy/toy_simd.cpp").write_text(TOY_SIMD)
    return to


def hook(
    folder: Path, call: str, *, before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Call a PEP 517 hook as pip does without isolation; the result's repr is the last line printed."""
    code = f"from build_backend import hooks, tools; {before}\nprint(repr({call}))"
    cleared = {
        k: v for k, v in os.environ.items() if k not in ("MINITRON_BUILD", "CUDA_HOME", "CUDA_PATH", "CXX")
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**cleared, **environment},
        capture_output=True,
        text=True,
    )


def build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    done = hook(folder, "hooks.build_wheel('dist')", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist" / done.stdout.splitlines()[-1].strip("'"), done.stdout + done.stderr


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


needs_compiler = pytest.mark.skipif(
    "Compiler(" not in hook(ROOT, "tools.find_compiler()").stdout, reason="no C++20 compiler here"
)


@pytest.mark.native
def test_build_info():
    info = _native.build_info()
    keys = "version compiler torch simd_compiled simd_chosen gemm bf16_microkernel"
    assert list(info) == [*keys.split(), "cuda_version", "cuda_archs", "cuda_reason"]
    assert info["version"] == minitron_kernels.__version__ == importlib.metadata.version("minitron-kernels")
    assert info["simd_chosen"] in info["simd_compiled"] and "baseline" in info["simd_compiled"]
    assert bool(info["cuda_archs"]) == (info["cuda_reason"] is None)


def test_the_report_names_every_op_and_backend(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "minitron_kernels"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {tuple(line.split()[:3]) for line in done.stdout.splitlines()}
    for op in _backend.OPS:
        for backend in _backend.BACKENDS:
            assert {(op, backend, "cpu"), (op, backend, "cuda")} <= rows
    assert ("not loaded" in done.stdout) == (not _native.available())


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_the_report_ends_quietly_where_its_reader_has_seen_enough(tmp_path):
    """As `python -m minitron_kernels | head -1` does: no traceback."""
    command = f'"{sys.executable}" -m minitron_kernels | true'
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.native
def test_a_checkout_uses_the_extension_that_is_installed():
    code = "import minitron_kernels._native as n; print(n.__file__, n.location())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    module, extension = done.stdout.split()
    assert Path(module).parent == ROOT / "minitron_kernels"
    assert extension == _native.location()


def test_pure_wheel_and_what_it_says(tmp_path):
    wheel, _ = build_wheel(copy_checkout(tmp_path, toy=True), MINITRON_BUILD="python")
    names = names_in(wheel)
    assert wheel.name.endswith("-py3-none-any.whl")
    expected = [str(path.relative_to(ROOT)) for path in (ROOT / "minitron_kernels").rglob("*.py")]
    assert {*expected, "minitron_kernels/py.typed", "minitron_kernels/_not_built.txt"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"minitron_kernels"}
    assert not [name for name in names if name.endswith(".so")]

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import minitron_kernels._native as n; print(n.available(), n.build_info(), n.reason())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True)
    assert done.stdout.strip() == (
        "False {} minitron_kernels was installed without C++: it was built with MINITRON_BUILD=python"
    )


def test_sdist_has_what_a_build_needs(tmp_path):
    copy_checkout(tmp_path, toy=False)
    done = hook(tmp_path, "hooks.build_sdist('dist')")
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [
        p
        for top in ("build_backend", "csrc", "minitron_kernels")
        for p in (tmp_path / top).rglob("*")
        if p.is_file()
    ]
    wanted = {str(p.relative_to(tmp_path)) for p in sources if "__pycache__" not in p.parts}
    assert len([name for name in wanted if name.startswith("csrc/")]) > 5
    assert {*wanted, "setup.py", "pyproject.toml", "LICENSE", "README.md", "tests/conftest.py"} <= names
    if (ROOT / "docs").is_dir():
        assert {"mkdocs.yml", "CITATION.cff", "docs/quickstart.md", "docs/tools/site.py"} <= names
        assert {"docs/pictures/recipe.svg", "docs/ops/index.md", "examples/prune.ipynb"} <= names


@needs_compiler
def test_build_rules_and_incremental_build(tmp_path):
    copy_checkout(tmp_path, toy=True)
    wheel, log = build_wheel(tmp_path, MINITRON_BUILD="cpu")
    names = names_in(wheel)
    (extension,) = [name for name in names if name.endswith(".so")]
    assert extension.startswith("minitron_kernels/_C.") and "none-any" not in wheel.name
    assert not [name for name in names if name.startswith("csrc") or "_not_built" in name]
    objects = {path.name for path in (tmp_path / "build").rglob("*.o")}
    levels = ["avx512", "avx2", "wide", "baseline"] if "toy_simd.avx2.o" in objects else ["baseline"]
    assert objects == {"module.o", *(f"toy_simd.{level}.o" for level in levels)}
    assert "-march=native" not in log

    if "ninja: " not in build_wheel(tmp_path, MINITRON_BUILD="cpu")[1]:
        return  # no ninja here: everything was compiled again
    (tmp_path / "csrc/toy/toy.h").write_text("constexpr long kOne = 2;\n")
    _, log = build_wheel(tmp_path, MINITRON_BUILD="cpu")
    assert (
        "module.o" in log and "toy_simd" not in log
    )  # the header's readers, by their depfiles, and no other


@needs_compiler
def test_a_compile_error_is_an_error_in_auto(tmp_path):
    copy_checkout(tmp_path, toy=True)
    (tmp_path / "csrc/toy/toy_simd.cpp").write_text("this is no C++\n")
    done = hook(tmp_path, "hooks.build_wheel('dist')", MINITRON_BUILD="auto")
    assert done.returncode != 0
    assert "compiling minitron_kernels._C failed" in done.stderr


def test_without_a_compiler_auto_builds_python_and_records_why(tmp_path):
    copy_checkout(tmp_path, toy=True)
    wheel, log = build_wheel(tmp_path, CXX="/nowhere/c++")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "WITHOUT its C++ kernels: no C++ compiler was found (/nowhere/c++)" in log
    with zipfile.ZipFile(wheel) as archive:
        assert b"no C++ compiler was found" in archive.read("minitron_kernels/_not_built.txt")
    assert hook(tmp_path, "hooks.get_requires_for_build_wheel()", CXX="/nowhere/c++").stdout.strip() == "[]"

    done = hook(tmp_path, "hooks.build_wheel('dist')", CXX="/nowhere/c++", MINITRON_BUILD="cpu")
    assert done.returncode != 0 and "MINITRON_BUILD=cpu, but no C++ compiler was found" in done.stderr


@needs_compiler
@pytest.mark.parametrize("call", ["hooks.get_requires_for_build_wheel()", "hooks.build_wheel('dist')"])
def test_cuda_that_is_not_there(tmp_path, call):
    copy_checkout(tmp_path, toy=True)
    done = hook(tmp_path, call, MINITRON_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert f"error: MINITRON_BUILD=cuda, but there is no bin/nvcc under CUDA_HOME={tmp_path}" in done.stderr

    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.0'\necho compute_90\n")
    nvcc.chmod(0o755)
    done = hook(tmp_path, call, MINITRON_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert f"{tmp_path}, has no include/cuda_runtime.h" in done.stderr

    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda_runtime.h").touch()
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libcudart_static.a").touch()
    found = hook(tmp_path, "tools.find_cuda()", CUDA_HOME=str(tmp_path)).stdout
    assert "version='12.8', archs=[90]" in found  # those that this nvcc does not know are left out


def test_unknown_mode():
    done = hook(ROOT, "hooks.get_requires_for_build_wheel()", MINITRON_BUILD="gpu")
    assert done.returncode != 0
    assert "MINITRON_BUILD must be one of auto, python, cpu, cuda, got 'gpu'" in done.stderr


@needs_compiler
def test_an_installed_torch_is_found_without_importing_it():
    # an isolated build has the interpreter of the environment but not its site-packages on sys.path
    hide = "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    call = "(tools.find_torch(), hooks.get_requires_for_build_wheel())"
    out = hook(ROOT, call, before=f"import sys; {hide}").stdout
    assert "Torch(folder=" in out and out.strip().endswith("['ninja'])")
