"""Builds the library's *_cuda.cu files for the host through tests/cuda_shim and steers the result.

Each build is one shared object that registers its ops for CPU tensors in a namespace of its own, kept in a
cache folder under a hash of all that it was made from. A build may have faults planted in its sources.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
FORWARD, REVERSE = 0, 1  # orders of threads; from 2 on, the seed of a shuffle
SANITIZERS = "-fsanitize=address,undefined"


@dataclass(frozen=True)
class Fault:
    """In `file` (under csrc), the one occurrence of `old` becomes `new`."""

    file: str
    old: str
    new: str


# planted to save time in compiling
WITHOUT_HALF = Fault("common/cuda_torch.cuh", "    case ScalarType::Half:\n      return f(__half{});\n", "")
WITHOUT_BFLOAT16 = Fault(
    "common/cuda_torch.cuh", "    case ScalarType::BFloat16:\n      return f(__nv_bfloat16{});\n", ""
)


def missing_tool() -> str | None:
    """Why there can be no build here, or None."""
    return None if shutil.which("g++") else "the host shim needs g++"


def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"minitron_cuda_shim_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def sources() -> dict[str, str]:
    """{path under csrc: text} of the CUDA files and of each op's schemas, <op>/<op>.cpp."""
    files = [*CSRC.rglob("*.cuh"), *CSRC.rglob("*_cuda.cu")]
    files += [path for path in CSRC.glob("*/*.cpp") if path.stem == path.parent.name]
    return {str(path.relative_to(CSRC)): path.read_text() for path in sorted(files)}


def planted(texts: dict[str, str], faults: tuple[Fault, ...]) -> dict[str, str]:
    out = dict(texts)
    for fault in faults:
        count = out[fault.file].count(fault.old)
        if count != 1:
            raise ValueError(f"{fault.file} has {count} times, wanted once: {fault.old!r}")
        out[fault.file] = out[fault.file].replace(fault.old, fault.new)
    return out


def write_sources(texts: dict[str, str], folder: Path) -> None:
    for path, text in texts.items():
        copy = folder / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)


def digest_of(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_to(command: list[str], target: Path) -> Path:
    """`command -o target`, unless that exists. Appears whole or not at all, whoever else is building it."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            output = Path(folder) / target.name
            done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            os.replace(output, target)
    return target


def compile_shim(faults: tuple[Fault, ...] = (), sanitize: bool = False) -> tuple[Path, str]:
    """The shared object's path and the namespace of its ops."""
    texts = planted(sources(), faults)
    shim = {path.name: path.read_text() for path in sorted((TESTS / "cuda_shim").iterdir())}
    torch_folder = Path(torch.__file__).parent
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    flags = ["g++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall"]
    flags += ["-Wno-unknown-pragmas", "-DMINITRON_CUDA_SHIM", "-DMINITRON_CUDA_KEY=CPU"]
    flags += ["-DTORCH_TARGET_VERSION=0x020d000000000000", "-isystem", str(torch_folder / "include")]
    flags += [SANITIZERS, "-fno-sanitize-recover=all", "-g1"] if sanitize else ["-g0"]
    flags += [] if faults else ["-Werror"]
    tools = (flags, version, torch.__version__)
    digest = digest_of(texts, shim, *tools)
    namespace = f"minitron_kernels_shim_{digest}"
    cache = cache_folder()

    with tempfile.TemporaryDirectory(dir=cache) as folder:
        csrc = Path(folder) / "csrc"
        # the schemas, under the build's own namespace
        texts = {
            path: text.replace("(minitron_kernels, m)", f"({namespace}, m)") for path, text in texts.items()
        }
        write_sources(texts, csrc)
        include = [f"-I{TESTS / 'cuda_shim'}", f"-I{csrc}", f"-DMINITRON_CUDA_LIBRARY={namespace}"]
        units = {csrc / p: cache / f"{digest}_{Path(p).stem}.o" for p in texts if p.endswith((".cu", ".cpp"))}
        scheduler = cache / f"{digest_of(shim, *tools)}_shim.o"  # in all builds the same
        units[TESTS / "cuda_shim/cuda_shim.cpp"] = scheduler
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            commands = [[*flags, *include, "-x", "c++", "-c", str(unit)] for unit in units]
            objects = list(pool.map(compile_to, commands, units.values()))
    link = [
        "g++",
        "-shared",
        "-Wl,-Bsymbolic",
        *map(str, objects),
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    return compile_to([*link, *([SANITIZERS] if sanitize else [])], cache / f"{namespace}.so"), namespace


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

    @contextmanager
    def order(self, order: int):
        self._lib.cuda_shim_set_order(ctypes.c_int(order))
        try:
            yield
        finally:
            self._lib.cuda_shim_set_order(ctypes.c_int(FORWARD))

    @contextmanager
    def trace(self, **readable: torch.Tensor):
        """Only the elements of these tensors may be loaded; what is loaded and stored is counted."""
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
def load(*faults: Fault, sanitize: bool = False) -> Shim:
    return Shim(*compile_shim(faults, sanitize))
