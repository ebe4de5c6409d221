"""Describes the machine that figures were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# flags of vector and matrix units, which decide how fast a GEMM or an exp can be
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
)


def cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> tuple[str, list[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    have = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", platform.machine()), [flag for flag in FLAGS if flag in have]


def fast_dtype(device: str) -> str:
    """The dtype to measure unless another is asked for: bf16, or fp32 where torch's bf16 GEMMs take minutes.

    On x86 processors without AVX-512 they run without vectors, hundreds of times slower than those in fp32.
    """
    flags = _cpu()[1]
    return "fp32" if device == "cpu" and "avx2" in flags and "avx512f" not in flags else "bf16"


def facts(device: str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Processor, memory, software and date, with the versions of those `packages` that are installed."""
    cpu, flags = _cpu()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    versions = {"torch": torch.__version__}
    for package in sorted({*packages, "triton"}):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cpu_family_model_stepping": _family(),
        "flags": flags,
        "cores": cores(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
    }
    if torch.device(device).type == "cuda":
        result["gpu"] = torch.cuda.get_device_name(device)
        result["cuda"] = torch.version.cuda
        properties = torch.cuda.get_device_properties(device)
        result["gpu_arch"] = f"sm_{properties.major}{properties.minor}"
        result["gpu_sms"] = properties.multi_processor_count
        result["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        result["gpu_l2_mib"] = getattr(properties, "L2_cache_size", 0) // 2**20
    return result


def _family() -> str | None:
    """The CPU's family, model and stepping, since virtual machines often hide its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    parts = [fields.get(name) for name in ("cpu family", "model", "stepping")]
    return "/".join(parts) if all(parts) else None


def describe(machine: dict[str, Any]) -> str:
    """The facts in one line."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    where = machine.get("gpu") or f"{machine['cpu']} ({' '.join(machine['flags'])}), {machine['cores']} cores"
    return f"{where}; {packages}; {machine['date']}"
