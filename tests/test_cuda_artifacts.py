"""Every *_cuda.cu compiled by nvcc for every arch, and what the compiler made of the kernels: no spills, registers,
shared memory, occupancy and 128-bit accesses within tests/cuda_artifacts.json. No GPU is needed.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from _cuda_shim import (
    CSRC,
    WITHOUT_BFLOAT16,
    WITHOUT_HALF,
    Fault,
    cache_folder,
    compile_to,
    digest_of,
    planted,
    sources,
    write_sources,
)

GATES = json.loads((Path(__file__).parent / "cuda_artifacts.json").read_text())
ARCHS = [int(arch) for arch in GATES["archs"]]
# per SM, the same on sm_80, sm_90 and sm_100
REGISTERS, THREADS, WARP, REGISTERS_PER_UNIT = 65536, 2048, 32, 256


def find_tool(name):
    """In the CUDA toolkit, on the PATH, or in the wheels that bring it."""
    if home := os.environ.get("CUDA_HOME"):
        candidates = [Path(home) / "bin" / name]
    else:
        candidates = []
    if found := shutil.which(name):
        candidates.append(Path(found))
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin"), ("nvidia", "cuda_cuobjdump/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            candidates.append(Path(folder) / inside / name)
    return next((str(path) for path in candidates if path.is_file()), None)


NVCC, CUOBJDUMP = find_tool("nvcc"), find_tool("cuobjdump")
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is neither on the PATH nor under CUDA_HOME"),
    pytest.mark.skipif(
        CUOBJDUMP is None, reason="cuobjdump is not here; it comes with triton, CUDA or nvidia-cuda-cuobjdump"
    ),
]


@dataclass
class Kernel:
    """One instance of a kernel in one arch's machine code."""

    family: str
    symbol: str
    registers: int
    stack: int
    local: int
    shared: int
    loads_128: int
    stores_128: int
    spills: int  # instructions that access local memory

    def blocks_per_sm(self, threads):
        per_warp = -(-self.registers * WARP // REGISTERS_PER_UNIT) * REGISTERS_PER_UNIT
        return min(REGISTERS // per_warp * WARP // threads, THREADS // threads)


def cubin(unit, arch, faults=(), flags=()):
    """Machine code of one .cu file, kept under a hash of all that it was made from."""
    texts = planted(sources(), faults)
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    command = [NVCC, "-cubin", f"-arch=sm_{arch}", "-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr"]
    command += ["-DTORCH_TARGET_VERSION=0x020d000000000000", "-DMINITRON_WITH_CUDA=1", *flags]
    command += ["-isystem", str(Path(torch.__file__).parent / "include")]
    target = cache_folder() / f"{digest_of(texts, unit, command, version)}_{Path(unit).stem}.cubin"
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        write_sources(texts, Path(folder))
        return compile_to([*command, f"-I{folder}", str(Path(folder) / unit)], target)


def kernels_of(path):
    def dump(what):
        return subprocess.run([CUOBJDUMP, what, str(path)], capture_output=True, text=True, check=True).stdout

    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", dump("-sass"), re.S))
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump("-res-usage"))
    kernels = []
    for symbol, registers, stack, shared, local in usage:
        text = sass[symbol]
        family = re.search(r"\d([a-z]\w*?_kernel)", symbol)
        kernels.append(
            Kernel(
                family.group(1) if family else symbol,
                symbol,
                int(registers),
                int(stack),
                int(local),
                # what the driver keeps for itself in each block is not the kernel's
                int(shared) - GATES["reserved_shared_bytes"].get(re.search(r"sm_\d+", dump("-elf") if False else text + "sm_0").group(), 0),
                len(re.findall(r"\bLDG\.E\S*\.128", text)),
                len(re.findall(r"\bSTG\.E\S*\.128", text)),
                len(re.findall(r"\b(?:LDL|STL)\b", text)),
            )
        )
    return kernels
