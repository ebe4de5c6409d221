"""Compiles what the launchers would launch, for GPUs that are not here, and reads the machine code.

A driver that only names a target is made active, and JITFunction.run stops after compiling. The launchers get
meta tensors of real sizes, so that alignment and divisibility are what a real call has.
Run as a script, it compiles to_compile() of <op>/launches.py for one target and prints a JSON list of
kernels. Those of a case whose name ends in "with X" have "with X" in their names too, and so their own gates.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tools.sass import loads_together

MATRIX = {"HGMMA": r"\bHGMMA\b", "HMMA": r"\bHMMA\b", "UTCMMA": r"\bUTC\w*MMA\b"}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def target_of(name: str) -> GPUTarget:
    """sm_90 and the like, or gfx942 and the like."""
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


class Offline(GPUDriver):
    """Answers what Triton asks before it compiles; launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0
        arch = target.arch
        self.get_device_capability = lambda device: divmod(arch, 10) if isinstance(arch, int) else (9, 4)

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return self.target

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("nothing runs here")


@contextmanager
def compiling_for(target: GPUTarget):
    """Within it, launching a kernel compiles it and appends it to the list that is yielded."""
    compiled, run = [], JITFunction.run

    def warmup(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = warmup
    driver.set_active(Offline(target))
    try:
        yield compiled
    finally:
        JITFunction.run = run


@dataclass
class Artifact:
    """What the compiler made of one kernel for one target."""

    case: str
    kernel: str
    registers: int
    shared_bytes: int
    spills: int  # instructions that access local or scratch memory
    wide_loads: int  # 128 bit, from global memory
    narrow_loads: int  # less
    wide_stores: int
    narrow_stores: int
    loads_together: int  # wide loads under way in the main loops before the first is waited for; 0: not read
    matrix: dict[str, int]  # matrix instructions by kind


def artifact(case: str, kernel, target: GPUTarget) -> Artifact:
    read = _amd if target.backend == "hip" else _nvidia
    name = kernel.metadata.name + "".join(re.findall(r" with \w+$", case))
    return Artifact(case, name, shared_bytes=kernel.metadata.shared, **read(kernel))


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _nvidia(kernel) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [str(NVIDIA_TOOLS / "cuobjdump"), what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        sass, usage = dump("-sass"), dump("-res-usage")
    wide = r"\.128\b"
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E\S*", sass)
    stores = re.findall(r"\bSTG\.E\S*", sass)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": _count(r"\b(?:LDL|STL)\b", sass) + int(re.search(r"STACK:(\d+)", usage)[1]),
        "wide_loads": sum(bool(re.search(wide, x)) for x in loads),
        "narrow_loads": sum(not re.search(wide, x) for x in loads),
        "wide_stores": sum(bool(re.search(wide, x)) for x in stores),
        "narrow_stores": sum(not re.search(wide, x) for x in stores),
        "loads_together": loads_together(sass),
        "matrix": {
            name: n
            for name, pattern in (
                ("HGMMA", r"\bHGMMA\b"),
                ("HMMA", r"\bHMMA\b"),
                ("UTCMMA", r"\bUTC\w*MMA\b"),
            )
            if (n := _count(pattern, sass))
        },
    }


def _amd(kernel) -> dict:
    code = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    def accesses(kind: str, wide: bool) -> int:
        pattern = rf"\b(?:global|buffer)_{kind}_dwordx4\b" if wide else rf"\b(?:global|buffer)_{kind}_\w+"
        return _count(pattern, code)

    loads, stores = accesses("load", True), accesses("store", True)
    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + _count(r"\bscratch_\w+", code),
        "wide_loads": loads,
        "narrow_loads": accesses("load", False) - loads,
        "wide_stores": stores,
        "narrow_stores": accesses("store", False) - stores,
        "loads_together": 0,
        "matrix": {"MFMA": n} if (n := _count(r"\bv_mfma_\w+", code)) else {},
    }


def artifacts(target_name: str, op: str, only: str = "") -> list[Artifact]:
    """Of the cases of `op` whose name has `only` in it."""
    target, found = target_of(target_name), {}
    for name, call in importlib.import_module(f"{op}.launches").to_compile(target_name):
        if only not in name:
            continue
        with compiling_for(target) as compiled:
            call()
        for kernel in compiled:
            one = artifact(name, kernel, target)
            found.setdefault(
                (kernel.hash, kernel.metadata.name), one
            )  # a kernel that several cases share, once
    return list(found.values())


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    json.dump([asdict(x) for x in artifacts(*sys.argv[1:])], sys.stdout, indent=1)
