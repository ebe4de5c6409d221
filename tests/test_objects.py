"""What is compiled with the flags of an instruction set stays in its namespace.

Of an inline function that several object files have, the linker keeps one. If that of an AVX-512 object were
kept for all, a CPU without AVX-512 would die in code that has nothing to do with the choice of kernels.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "build_backend").is_dir():  # an sdist has it; an installed copy has not
    pytest.skip("no build_backend folder here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from build_backend import tools  # noqa: E402

sys.path.remove(str(ROOT))

FOLDER = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
LEVELS = [level for level, flags in tools.SIMD_FLAGS.items() if flags]
SHARED = set("WwVvu")  # nm: weak, or unique in the process; "i" and "T" are not merged


def of_instruction_set(folder: Path) -> dict[Path, str]:
    """The object files of a build that have flags of their own, and whose namespace they are in."""
    found = {}
    for path in sorted(folder.rglob("*.o")):
        name = path.name.removesuffix(".o")
        level = next((level for level in LEVELS if name.endswith(f"_simd.{level}")), None)
        # the longest: gemm_avx512_bf16 is not of "bf16"
        isa = max((isa for isa in tools.ISA_FLAGS if name.endswith(f"_{isa}")), key=len, default=None)
        source = ROOT / path.relative_to(folder).with_name(f"{name.removesuffix(f'.{level}')}.cpp")
        if (level or isa) and source.is_file():  # else left of a file that is gone
            found[path] = level or isa
    return found


def shared_functions(path: Path, namespace: str) -> list[str]:
    """Symbols of an object that the linker may merge with another's and that do not name the namespace."""
    command = ["nm", "--demangle", "--defined-only", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split(maxsplit=2)[1:] for line in lines if len(line.split(maxsplit=2)) == 3]
    shared = [name for kind, name in symbols if kind in SHARED and f"minitron::{namespace}::" not in name]
    return [name for name in shared if not name.startswith("DW.ref.")]  # a pointer, which has no code


@pytest.mark.native
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not here; it comes with binutils")
def test_no_function_of_an_instruction_set_is_shared(request):
    objects = of_instruction_set(FOLDER)
    if not objects and not request.config.getoption("--require-native"):
        pytest.skip(f"no object files in {FOLDER}: the extension was not built here")
    assert objects, f"the build left no object files in {FOLDER}"
    assert {path.name.split("_simd.")[0] for path in objects if "_simd." in path.name}
    wrong = {str(path.relative_to(FOLDER)): shared_functions(path, name) for path, name in objects.items()}
    assert not any(wrong.values()), {path: names for path, names in wrong.items() if names}


@pytest.mark.skipif(not (shutil.which("nm") and shutil.which("g++")), reason="needs nm and g++")
def test_a_shared_function_is_found(tmp_path):
    """One inline function outside of the namespace, which the compiler does not inline, beside one inside."""
    (tmp_path / "x_simd.cpp").write_text(
        "namespace minitron {\n"
        "template <typename T> [[gnu::noinline]] T half(T x) { return x / 2; }\n"
        "namespace avx2 {\n"
        "struct Own {};\n"
        "template <typename T> [[gnu::noinline]] float third(float x) { return x / 3; }\n"
        "float f(float x) { return half(x) + third<Own>(x); }\n"
        "}\n}\n"
    )
    target = tmp_path / "x_simd.avx2.o"
    subprocess.run(["g++", "-O1", "-c", str(tmp_path / "x_simd.cpp"), "-o", str(target)], check=True)
    assert shared_functions(target, "avx2") == ["float minitron::half<float>(float)"]
