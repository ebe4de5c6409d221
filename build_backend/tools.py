"""Finds what a build needs: torch's headers, a C++20 compiler, nvcc. What is missing is an Absent, which says
what to do.

MINITRON_BUILD=auto leaves out what needs a missing tool. A tool that exists but fails is an error.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

MODES = ("auto", "python", "cpu", "cuda")
OLDEST_TORCH = (2, 11)
# the stable ABI that the sources may use, whatever the version of the headers: that of the oldest torch
TORCH_TARGET_VERSION = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
NO_TORCH = "no torch >= {}.{} was found".format(*OLDEST_TORCH)
CUDA_ARCHS = (80, 90, 100)  # built for those that nvcc knows; the newest also as PTX, for later GPUs

# level -> flags; each *_simd.cpp is compiled once per level, and the CPU decides at run time which is used
SIMD_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    # used by tests only: the code for 64-byte vectors on CPUs with registers of 32 bytes
    "wide": ["-mavx2", "-mfma", "-mf16c", "-DMINITRON_VECTOR_BYTES=64", "-Wno-psabi", "-O1"],
    "baseline": [],
}
_AVX512_BF16 = [*SIMD_FLAGS["avx512"], "-mavx512bf16"]
# name -> flags; each *_<name>.cpp is compiled once, where compiler and assembler know the instructions, and
# called where the CPU does
ISA_FLAGS = {
    "amx": [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
    "avx512_bf16": _AVX512_BF16,
}
_ISA_EXAMPLES = {"amx": "tdpbf16ps %tmm0, %tmm1, %tmm2", "avx512_bf16": "vdpbf16ps %zmm0, %zmm1, %zmm2"}


@dataclass(frozen=True)
class Absent:
    """A missing tool. `why` says what is missing and what to do about it."""

    why: str


@dataclass(frozen=True)
class Torch:
    """A folder named torch in some site-packages."""

    folder: Path
    version: str


@dataclass(frozen=True)
class Compiler:
    """The host C++ compiler; `command` is the beginning of its command lines."""

    command: list[str]
    simd_levels: list[str]
    isas: list[str] = field(default_factory=list)  # instruction sets of ISA_FLAGS


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit that has nvcc, cuda_runtime.h and libcudart_static.a."""

    nvcc: str
    version: str
    archs: list[int]
    library_folders: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What is built. Without a compiler it is pure Python, for the reason `no_native`."""

    compiler: Compiler | None = None
    torch: Torch | None = None
    cuda: Cuda | None = None
    no_native: str = ""
    no_cuda: str = ""
    error: str = ""
    warn: bool = False  # whether to warn: with the usual tools installed, more would be built


def requested_mode() -> str:
    """The value of MINITRON_BUILD; auto where it is not set."""
    mode = os.environ.get("MINITRON_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"error: MINITRON_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def requested_archs() -> tuple[int, ...]:
    """The value of MINITRON_CUDA_ARCHS, like 90 or 80,90; CUDA_ARCHS where it is not set."""
    names = os.environ.get("MINITRON_CUDA_ARCHS", "").replace(",", " ").split()
    if not names:
        return CUDA_ARCHS
    if not all(re.fullmatch(r"\d+", name) and int(name) >= CUDA_ARCHS[0] for name in names):
        raise SystemExit(
            f"error: MINITRON_CUDA_ARCHS must be architectures from {CUDA_ARCHS[0]} on, like 90 or 80,90; "
            f"got {' '.join(names)!r}"
        )
    return tuple(sorted({int(name) for name in names}))


def cuda_required(cuda: Absent) -> str:
    """The message for MINITRON_BUILD=cuda where there is no CUDA."""
    return f"error: MINITRON_BUILD=cuda, but {cuda.why} (MINITRON_BUILD=auto builds without CUDA then)"


def make_plan(mode: str) -> Plan:
    """Decides what is built here. If something that was asked for cannot be built, Plan.error says why."""
    if mode == "python":
        return Plan(no_native="it was built with MINITRON_BUILD=python")
    compiler = find_compiler()
    torch = find_torch() or Absent(
        f"{NO_TORCH} to compile against: install torch first, or build without --no-build-isolation"
    )
    missing = next((tool for tool in (compiler, torch) if isinstance(tool, Absent)), None)
    if missing and mode == "auto":
        return Plan(no_native=missing.why, warn=True)
    if missing:
        return Plan(
            error=f"error: MINITRON_BUILD={mode}, but {missing.why} (MINITRON_BUILD=python needs neither)"
        )
    assert isinstance(compiler, Compiler) and isinstance(torch, Torch)
    if mode == "cpu":
        return Plan(compiler, torch, no_cuda="it was built with MINITRON_BUILD=cpu")
    cuda = find_cuda()
    if isinstance(cuda, Cuda):
        return Plan(compiler, torch, cuda)
    return Plan(compiler, torch, no_cuda=cuda.why, error=cuda_required(cuda) if mode == "cuda" else "")


def find_torch() -> Torch | None:
    """The first torch >= OLDEST_TORCH on sys.path, or in the environment that pip installs into.

    pip runs an isolated build with that environment's interpreter, but without its packages on sys.path.
    """
    folders = [Path(p) for p in sys.path if p]
    folders += [Path(sysconfig.get_path(name)) for name in ("platlib", "purelib")]
    if sys.prefix != sys.base_prefix and _venv_sees_base():
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        folders += [Path(sysconfig.get_path(name, vars=base)) for name in ("platlib", "purelib")]
    elif sys.prefix == sys.base_prefix and site.ENABLE_USER_SITE:
        folders.append(Path(site.getusersitepackages()))
    for folder in folders:
        torch = folder / "torch"
        if (torch / "version.py").is_file() and (torch / "include/torch/csrc/stable/tensor.h").is_file():
            found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (torch / "version.py").read_text())
            if found and (int(found[2]), int(found[3])) >= OLDEST_TORCH:
                return Torch(torch, found[1])
    return None


def _venv_sees_base() -> bool:
    config = Path(sys.prefix, "pyvenv.cfg")
    return config.is_file() and bool(
        re.search(r"include-system-site-packages\s*=\s*true", config.read_text())
    )


def find_compiler() -> Compiler | Absent:
    """$CXX, c++, g++ or clang++, if it compiles C++20 and there are Python's headers."""
    if platform.system() == "Windows":
        return Absent("the C++ extension is not built on Windows in this version")
    asked = shlex.split(os.environ.get("CXX", ""))
    command = asked or next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])
    if not command or not shutil.which(command[0]):
        tried = asked[0] if asked else "c++, g++, clang++"
        return Absent(f"no C++ compiler was found ({tried}): install g++ 11 or newer")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return Absent("Python.h was not found: install Python's development headers (Debian: python3-dev)")
    if error := _compile_error([*command, "-std=c++20"], "#include <concepts>\n#include <span>\n"):
        return Absent(f"{' '.join(command)} does not compile C++20 ({error}): install g++ 11 or newer")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    levels = list(SIMD_FLAGS) if x86 else ["baseline"]
    isas = list(ISA_FLAGS) if x86 else []
    return Compiler(
        command,
        [level for level in levels if not _compile_error([*command, *SIMD_FLAGS[level]], "")],
        [isa for isa in isas if not _assembly_error([*command, *ISA_FLAGS[isa]], _ISA_EXAMPLES[isa])],
    )


def _assembly_error(command: list[str], instruction: str) -> str:
    """The first line of the errors for an instruction, of the compiler or of its assembler; "" for none."""
    with tempfile.TemporaryDirectory() as folder:
        output = ["-c", "-o", str(Path(folder, "example.o"))]
        return _compile_error(command, f'void f() {{ asm volatile("{instruction}"); }}', output)


def _compile_error(command: list[str], source: str, output: Sequence[str] = ("-fsyntax-only",)) -> str:
    """The first line of the compiler's errors for `source`; "" where there are none."""
    command = [*command, *output, "-x", "c++", "-"]
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it fails"])[0]


def find_cuda() -> Cuda | Absent:
    """The toolkit at $CUDA_HOME or $CUDA_PATH, else that of the nvcc on PATH, else /usr/local/cuda."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
            if nvcc is None:
                return Absent(
                    f"there is no bin/nvcc under {name}={home}: point it at a CUDA toolkit, or unset it"
                )
            break
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            return Absent(
                "nvcc was not found: install the CUDA toolkit and put nvcc on PATH, or set CUDA_HOME"
            )
    try:
        version = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
        known = {int(arch) for arch in re.findall(r"compute_(\d+)$", _output(nvcc, "--list-gpu-arch"), re.M)}
        # nvcc on PATH may be a wrapper script, so it is asked for the path of its toolkit
        dry_run = _output(nvcc, "--dryrun", "none.cu")
    except (OSError, subprocess.CalledProcessError) as error:
        return Absent(f"{nvcc} does not run ({error})")
    if version is None or int(version[1]) < 12:
        return Absent(f"{nvcc} is of CUDA {version[0] if version else '?'}: 12.0 is the first with C++20")
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.M)
    home = (Path(top[1]) if top else Path(nvcc).resolve().parent.parent).resolve()
    flags = [
        flag
        for line in re.findall(r"^#\$ (?:INCLUDES|LIBRARIES)=(.*)$", dry_run, re.M)
        for flag in shlex.split(line)
    ]
    includes = [home / "include", *(Path(flag[2:]) for flag in flags if flag.startswith("-I"))]
    libraries = [*(Path(flag[2:]) for flag in flags if flag.startswith("-L")), home / "lib64", home / "lib"]
    if not any((folder / "cuda_runtime.h").is_file() for folder in includes):
        return Absent(
            f"the toolkit of {nvcc}, {home}, has no include/cuda_runtime.h: install CUDA's runtime headers"
        )
    library = next(
        (folder.resolve() for folder in libraries if (folder / "libcudart_static.a").is_file()), None
    )
    if library is None:
        return Absent(
            f"the toolkit of {nvcc}, {home}, has no libcudart_static.a: install CUDA's static runtime"
        )
    wanted = requested_archs()
    archs = [arch for arch in wanted if arch in known]
    unknown = f"{nvcc} (CUDA {version[1]}.{version[2]}) knows {{}} of sm_{', sm_'.join(map(str, wanted))}"
    if len(archs) < len(wanted) and wanted is not CUDA_ARCHS:
        raise SystemExit(f"error: {unknown.format('not all')}, which MINITRON_CUDA_ARCHS names")
    if not archs:
        return Absent(unknown.format("none"))
    return Cuda(nvcc, f"{version[1]}.{version[2]}", archs, [str(library)])


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def find_ninja() -> str | None:
    """The ninja executable on PATH, or beside this Python, where its package installs it."""
    scripts = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    return shutil.which("ninja", path=scripts)
