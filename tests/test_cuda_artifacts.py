"""Every *.cu compiled by nvcc for the archs of tools/archs.py, and what the compiler made of the kernels: no
spills, registers, shared memory, occupancy, narrow and 128-bit accesses and how many loads overlap within
cuda_artifacts.json. No GPU is needed.

Compiling is slow: the machine code is that of the installed extension, where that was built with CUDA after
the last change of a source.
"""

import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from minitron_kernels import _native
from tools import sass
from tools.archs import chosen_archs
from tools.faults import some
from tools.host_shim import (
    CSRC,
    TESTS,
    TORCH_TARGET,
    WITHOUT_BFLOAT16,
    WITHOUT_HALF,
    cache_folder,
    compile_to,
    digest_of,
    planted,
    sources,
    write_sources,
)
from tools.triton_runs import faults_of, ops_with

GATES = json.loads((TESTS / "cuda_artifacts.json").read_text())
ALL_ARCHS = [int(arch) for arch in GATES["archs"]]
ARCHS = chosen_archs(ALL_ARCHS)
# per SM, the same on sm_80, sm_90 and sm_100
REGISTERS, THREADS, WARP, REGISTERS_PER_UNIT = 65536, 2048, 32, 256


def find_tool(name):
    """In the CUDA toolkit, on the PATH, or in the wheels that bring it."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / name] if home else []
    if found := shutil.which(name):
        candidates.append(Path(found))
    for package, inside in (
        ("triton", "backends/nvidia/bin"),
        ("nvidia", "cu13/bin"),
        ("nvidia", "cuda_cuobjdump/bin"),
    ):
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

    name: str
    symbol: str
    registers: int
    stack: int
    local: int
    shared: int  # from sm_90 on with the driver's own 1024 bytes where there is any
    spills: int  # instructions that access local memory
    loads_128: int
    narrow_loads: int  # from global memory
    stores_128: int
    narrow_stores: int
    loads_together: int  # 128-bit loads under way at once in the main loops; see tools/sass.py

    def blocks_per_sm(self, threads):
        per_warp = -(-self.registers * WARP // REGISTERS_PER_UNIT) * REGISTERS_PER_UNIT
        return min(REGISTERS // per_warp // (threads // WARP), THREADS // threads)


def cubin(unit, arch, faults=(), flags=()):
    """Machine code of one .cu file, kept under a hash of all that it was made from."""
    texts = planted(sources(), faults)
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    command = [
        NVCC,
        "-cubin",
        f"-arch=sm_{arch}",
        "-std=c++20",
        "-O3",
        "-DNDEBUG",
        "--expt-relaxed-constexpr",
    ]
    command += [TORCH_TARGET, *flags]
    command += ["-isystem", str(Path(torch.__file__).parent / "include")]
    target = cache_folder() / f"{digest_of(texts, unit, command, version)}_{unit.replace('/', '_')}.cubin"
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        write_sources(texts, Path(folder))
        return compile_to([*command, f"-I{folder}", str(Path(folder) / unit)], target)


def plain_name(symbol):
    """The last part of a mangled nested name: _ZN8minitron4cuda9my_kernelI... -> my_kernel."""
    name, rest = symbol, symbol.removeprefix("_ZN")
    while found := re.match(r"\d+", rest):
        end = found.end() + int(found.group())
        name, rest = rest[found.end() : end], rest[end:]
    return name


def gate_of(symbol):
    """The name of its gate: kernels with metrics have their own."""
    name = plain_name(symbol)
    return f"{name} with metrics" if re.search("Metrics|CrossEntropy", symbol.split(name)[1]) else name


@functools.cache
def kernels_of(path):
    def dump(what):
        return subprocess.run([CUOBJDUMP, what, str(path)], capture_output=True, text=True, check=True).stdout

    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", dump("-sass"), re.S))
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump("-res-usage")
    )
    return [
        Kernel(
            gate_of(symbol),
            symbol,
            *map(int, (registers, stack, local, shared)),
            len(re.findall(r"\b(?:LDL|STL)\b", code[symbol])),
            **sass.accesses(code[symbol]),
            loads_together=sass.loads_together(code[symbol]),
        )
        for symbol, registers, stack, shared, local in usage
    ]


def violations(kernels, arch):
    """What the gates forbid, one line each."""
    lines = []
    for kernel in kernels:
        gate = GATES["kernels"].get(kernel.name)
        if gate is None:
            lines.append(f"{kernel.symbol}: has no gate in cuda_artifacts.json")
            continue
        if arch not in gate.get("archs", ALL_ARCHS):  # empty there
            if kernel.registers > 8 or kernel.shared > 0 or kernel.loads_128 > 0:
                lines.append(f"{kernel.symbol}: is not empty")
            continue
        blocks = kernel.blocks_per_sm(gate["threads"])
        for wrong, what in (
            (
                kernel.stack or kernel.local or kernel.spills,
                f"spills: stack {kernel.stack}, local {kernel.local}",
            ),
            (
                kernel.registers > gate["registers"],
                f"{kernel.registers} registers, at most {gate['registers']}",
            ),
            (kernel.shared > gate["shared_bytes"][str(arch)], f"{kernel.shared} bytes of shared memory"),
            (blocks < gate["blocks_per_sm"], f"{blocks} blocks per SM, at least {gate['blocks_per_sm']}"),
            (kernel.loads_128 < gate["loads_128"], f"{kernel.loads_128} 128-bit loads"),
            (kernel.stores_128 < gate["stores_128"], f"{kernel.stores_128} 128-bit stores"),
            (
                kernel.loads_together < gate["loads_together"],
                f"{kernel.loads_together} loads together, at least {gate['loads_together']}",
            ),
            (
                kernel.narrow_loads > gate["narrow_loads"],
                f"{kernel.narrow_loads} narrow loads, at most {gate['narrow_loads']}",
            ),
            (
                kernel.narrow_stores > gate["narrow_stores"],
                f"{kernel.narrow_stores} narrow stores, at most {gate['narrow_stores']}",
            ),
        ):
            if wrong:
                lines.append(f"{kernel.symbol}: {what}")
    return lines


def built():
    """The installed extension, if it holds the kernels of the sources as they are for every arch; or None."""
    archs = [int(re.sub(r"\D", "", arch)) for arch in _native.build_info().get("cuda_archs", [])]
    if not set(ARCHS) <= set(archs):
        return None
    extension = Path(sys.modules["minitron_kernels._C"].__file__)
    changed = max(source.stat().st_mtime for source in CSRC.rglob("*") if source.is_file())
    return extension if extension.stat().st_mtime > changed else None


def extracted(extension, folder):
    """{arch: files} of the extension's machine code."""
    subprocess.run([CUOBJDUMP, "-xelf", "all", str(extension)], cwd=folder, capture_output=True, check=True)
    found = defaultdict(list)
    for path in sorted(folder.glob("*.cubin")):
        found[int(re.search(r"sm_(\d+)", path.name)[1])].append(path)
    return found


def compiled():
    """{arch: files}; every unit for every arch, side by side."""
    jobs = [(path, arch) for path in sources() if path.endswith(".cu") for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        paths = list(pool.map(lambda job: cubin(*job), jobs))
    found = defaultdict(list)
    for (_, arch), path in zip(jobs, paths, strict=True):
        found[arch].append(path)
    return found


@pytest.fixture(scope="session")
def kernels_by_arch(tmp_path_factory):
    """{arch: what is known of its kernels}."""
    extension = built()
    found = extracted(extension, tmp_path_factory.mktemp("cubins")) if extension else compiled()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = [(arch, path) for arch in ARCHS for path in found[arch]]
        known = list(pool.map(lambda job: kernels_of(job[1]), jobs))
    out = {arch: [] for arch in ARCHS}
    for (arch, _), kernels in zip(jobs, known, strict=True):
        out[arch] += kernels
    return out


@pytest.mark.parametrize("arch", ARCHS)
def test_gates(kernels_by_arch, arch):
    kernels = kernels_by_arch[arch]
    assert violations(kernels, arch) == []
    found = Counter(kernel.name for kernel in kernels)
    assert found == {name: gate["instances"] for name, gate in GATES["kernels"].items()}


FAULTS = {
    (op.UNIT, name): fault
    for op in map(faults_of, ops_with("CUDA_ARTIFACTS"))
    for name, fault in op.CUDA_ARTIFACTS.items()
}


@pytest.mark.parametrize(("unit", "name"), some(FAULTS))
def test_planted_fault_is_found(unit, name):
    faults, flags, message = FAULTS[unit, name]
    fp32_only = (*faults, WITHOUT_HALF, WITHOUT_BFLOAT16)
    lines = violations(kernels_of(cubin(unit, 90, fp32_only, flags)), 90)
    assert any(re.search(message, line) for line in lines), lines


def test_plain_name():
    assert (
        plain_name("_ZN8minitron4cuda17kl_forward_kernelILNS_10DivergenceE0EffEEvPf") == "kl_forward_kernel"
    )
    with_metrics = "_ZN8minitron4cuda17kl_forward_kernelILNS_10DivergenceE0EffJNS0_10MetricsOutEEEEvPf"
    assert gate_of(with_metrics) == "kl_forward_kernel with metrics"
