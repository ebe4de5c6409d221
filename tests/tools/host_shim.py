"""Builds the library's *.cu files for the host through cuda_shim/ and steers the result.

Each build is one shared object that registers its ops for CPU tensors in a namespace of its own, kept in a
cache folder under a hash of all that it was made from. A build may have faults planted in its sources.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tools.faults import Fault

TESTS = Path(__file__).resolve().parents[1]
SHIM = TESTS / "tools/cuda_shim"
CSRC = TESTS.parent / "csrc"
# as the build says it; the build's own folder is not on sys.path here
_BUILD = runpy.run_path(str(TESTS.parent / "build_backend/tools.py"))
TORCH_TARGET = f"-DTORCH_TARGET_VERSION={_BUILD['TORCH_TARGET_VERSION']}"
FORWARD, REVERSE = 0, 1  # orders of threads; from 2 on, the seed of a shuffle
NAMESPACE = "minitron_kernels_shim_"
SANITIZERS = "-fsanitize=address,undefined"
SANITIZE = os.environ.get("MINITRON_TEST_SHIM_SANITIZE") == "1"  # set by run_sanitized() for its child


# planted to save time in compiling
WITHOUT_HALF = Fault(
    "common/cuda/launch_torch.cuh", "    case ScalarType::Half:\n      return f(__half{});\n", ""
)
WITHOUT_BFLOAT16 = Fault(
    "common/cuda/launch_torch.cuh", "    case ScalarType::BFloat16:\n      return f(__nv_bfloat16{});\n", ""
)


def missing_tool() -> str | None:
    """Why there can be no build here, or None."""
    return None if shutil.which("g++") else "the host shim needs g++"


def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"minitron_cuda_shim_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def sources() -> dict[str, str]:
    """{path under csrc: text} of the CUDA files, the headers outside of cpu/, and each op's <op>/<op>.cpp."""
    files = [*CSRC.rglob("*.cuh"), *CSRC.rglob("*.cu"), *CSRC.glob("*/*.h")]
    files += [path for path in CSRC.glob("*/*.cpp") if path.stem == path.parent.name]
    return {str(path.relative_to(CSRC)): path.read_text() for path in sorted(files)}


def planted(texts: dict[str, str], faults: tuple[Fault, ...]) -> dict[str, str]:
    out = dict(texts)
    for fault in faults:
        out[fault.file] = fault.plant(out[fault.file])
    return out


def write_sources(texts: dict[str, str], folder: Path) -> None:
    for path, text in texts.items():
        copy = folder / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)


def digest_of(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_to(command: list[str], target: Path) -> Path:
    """`command -o target`, unless that exists. Appears whole or not at all, made by one process for all."""
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests side by side want the same: the others wait for the first
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
                output = Path(folder) / target.name
                done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
                if done.returncode != 0:
                    raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
                os.replace(output, target)
    return target


def compile_shim(op: str, faults: tuple[Fault, ...] = (), sanitize: bool = False) -> tuple[Path, str]:
    """The shared object of an op's files, its path and the namespace of its ops."""
    mine = {path: text for path, text in sources().items() if path.split("/")[0] in ("common", op)}
    texts = planted(mine, faults)
    shim = {path.name: path.read_text() for path in sorted(SHIM.iterdir())}
    torch_folder = Path(torch.__file__).parent
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    flags = ["g++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall"]
    flags += ["-Wno-unknown-pragmas", "-DMINITRON_CUDA_SHIM", "-DMINITRON_CUDA_KEY=CPU"]
    flags += [TORCH_TARGET, "-isystem", str(torch_folder / "include")]
    flags += [SANITIZERS, "-fno-sanitize-recover=all", "-g1"] if sanitize else ["-g0"]
    flags += [] if faults else ["-Werror"]
    tools = (flags, version, torch.__version__)
    digest = digest_of(texts, shim, *tools)
    namespace = f"{NAMESPACE}{digest}"
    cache = cache_folder()

    # Units are compiled under a namespace that is the same in all builds, and kept by what they include: most
    # faults touch few of them. Then the build's own, of the same length, is written over it.
    anyone = NAMESPACE + "0" * len(digest)
    texts = {path: text.replace("(minitron_kernels, m)", f"({anyone}, m)") for path, text in texts.items()}
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        csrc = Path(folder) / "csrc"
        write_sources(texts, csrc)
        include = [f"-I{SHIM}", f"-I{csrc}", f"-DMINITRON_CUDA_LIBRARY={anyone}"]
        units = {
            csrc / path: cache
            / f"{digest_of(included(path, texts), shim, *tools)}_{path.replace('/', '_')}.o"
            for path in texts
            if path.endswith((".cu", ".cpp"))
        }
        units[SHIM / "cuda_shim.cpp"] = cache / f"{digest_of(shim, *tools)}_shim.o"
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            commands = [[*flags, *include, "-x", "c++", "-c", str(unit)] for unit in units]
            compiled = list(pool.map(compile_to, commands, units.values()))
        objects = [Path(folder) / path.name for path in compiled]
        for path, own in zip(compiled, objects, strict=True):
            own.write_bytes(path.read_bytes().replace(anyone.encode(), namespace.encode()))
        return _linked(objects, cache / f"{namespace}.so", torch_folder, sanitize), namespace


def included(path: str, texts: dict[str, str]) -> dict[str, str]:
    """A file and all those of `texts` that it includes, and these in turn."""
    found: dict[str, str] = {}
    waiting = [path]
    while waiting:
        name = waiting.pop()
        if name in texts and name not in found:
            found[name] = texts[name]
            waiting += re.findall(r'#include "([^"]+)"', texts[name])
    return found


def _linked(objects: list[Path], target: Path, torch_folder: Path, sanitize: bool) -> Path:
    link = [
        "g++",
        "-shared",
        "-Wl,-Bsymbolic",
        *map(str, objects),
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    return compile_to([*link, *([SANITIZERS] if sanitize else [])], target)


@dataclass
class Loads:
    bytes: int
    narrow: int  # accesses of less than 16 bytes


@dataclass
class Stores:
    bytes: int
    narrow: int
    never: int  # bytes not written
    twice: int  # bytes written more than once
    elsewhere: int  # stores to no output taken so far


class Shim:
    """One loaded build; `ops` are torch ops on CPU tensors."""

    def __init__(self, path: Path, namespace: str):
        torch.ops.load_library(str(path))
        self.ops = getattr(torch.ops, namespace)
        self._lib = ctypes.CDLL(str(path))
        self._lib.cuda_shim_most_shared_bytes.restype = ctypes.c_int64
        self._lib.cuda_shim_scratch_loaded.restype = ctypes.c_int64

    @contextmanager
    def order(self, order: int):
        self._lib.cuda_shim_set_order(ctypes.c_int(order))
        try:
            yield
        finally:
            self._lib.cuda_shim_set_order(ctypes.c_int(FORWARD))

    @contextmanager
    def without_clusters(self):
        """As on a GPU that has none."""
        self._lib.cuda_shim_set_clusters(0)
        try:
            yield
        finally:
            self._lib.cuda_shim_set_clusters(1)

    @contextmanager
    def trace(self, **readable: torch.Tensor):
        """Only the elements of these tensors, and what an earlier launch has stored, may be loaded; what is
        loaded and stored is counted.
        """
        self._lib.cuda_shim_trace(1)
        try:
            regions = {n: self._lib.cuda_shim_allow_loads(*_extent(x)) for n, x in readable.items()}
            yield _Trace(self._lib, regions)
        finally:
            self._lib.cuda_shim_trace(0)


class _Trace:
    def __init__(self, lib, regions):
        self._lib, self._regions = lib, regions

    def loads(self, name: str) -> Loads:
        out = (ctypes.c_int64 * 2)()
        self._lib.cuda_shim_loads(self._regions[name], out)
        return Loads(*out)

    def take_stores(self, output: torch.Tensor) -> Stores:
        out = (ctypes.c_int64 * 5)()
        self._lib.cuda_shim_take_stores(*_extent(output), out)
        return Stores(*out)

    def scratch_loaded(self) -> int:
        """Bytes loaded of what an earlier launch has stored."""
        return self._lib.cuda_shim_scratch_loaded()

    def most_shared_bytes(self) -> int:
        return self._lib.cuda_shim_most_shared_bytes()


def _extent(x: torch.Tensor):
    """Rows of bytes of a matrix or vector whose last dimension is dense."""
    matrix = x if x.dim() == 2 else x[None]
    rows, columns = matrix.shape
    size = x.element_size()
    if x.dim() == 1 and x.stride(0) != 1:
        rows, columns, stride = x.shape[0], 1, x.stride(0)
    else:
        stride = matrix.stride(0)
    return (
        ctypes.c_uint64(x.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns * size),
        ctypes.c_int64(stride * size),
    )


@functools.cache
def load(op: str, *faults: Fault, sanitize: bool = False) -> Shim:
    return Shim(*compile_shim(op, faults, sanitize))


def assert_fault_is_found(check: Callable[[Shim], None], whole: Shim, broken: Shim, message: str) -> None:
    """The check passes as the kernels are, and fails by this message with the fault in them."""
    check(whole)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check(broken)


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python arguments` under AddressSanitizer and UndefinedBehaviorSanitizer, with SANITIZE set in it."""
    # libstdc++ too: libasan looks for its functions when it starts, before Python loads the extension
    names = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    libraries = [subprocess.run(name, capture_output=True, text=True).stdout.strip() for name in names]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ has no libasan")
    environment = dict(os.environ, LD_PRELOAD=":".join(libraries), MINITRON_TEST_SHIM_SANITIZE="1")
    environment["ASAN_OPTIONS"] = "detect_leaks=0:verify_asan_link_order=0"
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=TESTS.parent
    )


def assert_clean_under_sanitizers(file: str, only: str) -> None:
    """The tests of `file` whose name matches pass in a process that preloads the sanitizers."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--noconftest", "-k", only]
    done = run_sanitized("-m", "pytest", *options, file)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def assert_overrun_is_found(script: str) -> None:
    """A script that reads or writes beyond a tensor ends by AddressSanitizer's report."""
    done = run_sanitized("-c", script)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-4000:]
