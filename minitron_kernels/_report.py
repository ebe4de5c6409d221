"""What is built, which backends can serve each op here, and why not: for `python -m minitron_kernels`."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from minitron_kernels import _backend, _native


def report() -> str:
    """The facts and the tables."""
    if torch.cuda.is_available():
        torch.cuda.init()  # else nobody asks the GPU whether the kernels run on it
    picked = [(op, *(_auto(op, device) for device in ("cpu", "cuda"))) for op in _backend.OPS]
    lines = [f"{name:<14}{value}" for name, value in facts()]
    lines += ["", *table([("op", "backend", "device", "usable here"), *rows()])]
    lines += ["", 'backend="auto" takes']
    lines += [f"  {line}" for line in table([("op", "on cpu", "on cuda"), *picked])]
    return "\n".join(lines)


def facts() -> list[tuple[str, str]]:
    """(name, value) of each line above the tables."""
    info = _native.build_info()
    out = [
        ("version", info.get("version") or _installed_version()),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {_gpus()}"),
    ]
    if not _native.available():
        return [*out, ("extension", f"not loaded: {_native.reason()}")]
    cuda = " ".join(info["cuda_archs"])
    return [
        *out,
        ("extension", f"{_native.location()}{_changed_since()}"),
        ("compiled by", f"{info['compiler']}, against torch {info['torch']}"),
        ("SIMD", f"{info['simd_chosen']} chosen, of {' '.join(info['simd_compiled'])}"),
        ("GEMM", info["gemm"]),
        ("CUDA", f"{cuda}, by nvcc {info['cuda_version']}" if cuda else f"not built: {info['cuda_reason']}"),
    ]


def rows() -> list[tuple[str, str, str, str]]:
    """One row for each op, backend and kind of device; xpu only where there is one."""
    out = []
    for op in _backend.OPS:
        for backend in _backend.BACKENDS:
            for device in _backend.DEVICES:
                if device != "xpu" or _present("xpu"):  # xpu is rare: left out where it is absent
                    out.append((op, backend, device, _verdict(op, backend, device)))
    return out


def table(lines: list[tuple[str, ...]]) -> list[str]:
    """The lines, with aligned columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _changed_since() -> str:
    """In a checkout: which source is newer than the extension, if one is."""
    location, sources = _native.location(), Path(__file__).resolve().parents[1] / "csrc"
    if location is None or not sources.is_dir():
        return ""
    newest = max(
        (path for path in sources.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime
    )
    if newest.stat().st_mtime <= Path(location).stat().st_mtime:
        return ""
    return f", older than {newest}: pip install . (or -e .) in {sources.parent} builds it anew"


def _verdict(op: str, backend: str, device: str) -> str:
    reason = _backend.why_not(op, backend, torch.device(device))
    if reason is not None:
        return f"no: {reason}"
    return "yes" if _present(device) else f"no: there is no {device} device here"


def _auto(op: str, device: str) -> str:
    name = _backend.pick(op, torch.device(device), "auto")
    return name if _present(device) else f"{name} (no such device here)"


def _present(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_available()
    return device == "cpu" or torch.xpu.is_available()


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _installed_version() -> str:
    try:
        return importlib.metadata.version("minitron-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
