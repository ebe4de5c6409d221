"""pick(): chooses the backend of an op, from tables made once on import.

CPU tensor: native C++ if built, else the reference. CUDA tensor: native CUDA if built, else Triton. ROCm
tensor: Triton. Any other: the reference. A backend that the caller names never falls back to another; only
"auto" does. pick() and why_not() are look-ups in tables, so that torch.compile traces through them; but the
first time that a GPU is met, a native kernel is launched on it, to see that it can be.
"""

from __future__ import annotations

import importlib.util

import torch

from minitron_kernels import _native

BACKENDS = ("native", "triton", "reference")
DEVICES = ("cpu", "cuda", "xpu")  # a ROCm tensor's device is called cuda

# (op, backend) -> kinds of device that it has kernels for; the reference runs on any. Add new ops here.
_KERNELS: dict[tuple[str, str], tuple[str, ...]] = {
    ("kl_loss", "native"): ("cpu", "cuda"),
    ("kl_loss", "triton"): ("cuda",),
    ("linear_kl_loss", "native"): ("cpu", "cuda"),
    ("linear_kl_loss", "triton"): ("cuda",),
    ("linear_sparse_kl_loss", "native"): ("cpu", "cuda"),
    ("linear_sparse_kl_loss", "triton"): ("cuda",),
    ("sparse_kl_loss", "native"): ("cpu", "cuda"),
    ("sparse_kl_loss", "triton"): ("cuda",),
    ("importance", "native"): ("cpu", "cuda"),
    ("importance", "triton"): ("cuda",),
    ("gather", "native"): ("cpu", "cuda"),
    ("gather", "triton"): ("cuda",),
}
OPS = tuple(dict.fromkeys(op for op, _ in _KERNELS))


def _find_reason(op: str, backend: str, device: str) -> str | None:
    """Why `backend` cannot serve `op` for tensors on `device`; None where it can. Called once, on import."""
    if backend == "reference":
        return None
    kernels = _KERNELS[op, backend]
    if device not in kernels:
        kind = {"native": "C++" if device == "cpu" else "CUDA", "triton": "Triton"}[backend]
        if backend == "triton" and device == "cpu":
            return "Triton kernels need a GPU"
        if backend == "native" and device not in ("cpu", "cuda"):
            return f"there are no native kernels for {device}"
        return f"no {kind} kernel for {op} in this version"
    if backend == "triton":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if not _native.available():
        return _native.reason()
    if device == "cuda":
        if torch.version.hip is not None:
            return "native GPU kernels are CUDA only, and this torch is for ROCm"
        info = _native.build_info()
        if not info["cuda_archs"]:
            return f"minitron_kernels was built without CUDA: {info['cuda_reason']}"
    return None


_WHY_NOT: dict[tuple[str, str, str], str | None] = {
    (op, backend, device): _find_reason(op, backend, device)
    for op in OPS
    for backend in BACKENDS
    for device in DEVICES
}
_AUTO: dict[tuple[str, str], str] = {
    (op, device): next(backend for backend in BACKENDS if _WHY_NOT[op, backend, device] is None)
    for op in OPS
    for device in DEVICES
}


# index of a GPU -> why the native kernels do not run on it, or None
_ON_GPU: dict[int, str | None] = {}


def why_not(op: str, backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot serve `op` for tensors on `device`; None where it can."""
    if device.type not in DEVICES:
        return None if backend == "reference" else f"there are no {backend} kernels for {device.type}"
    reason = _WHY_NOT[op, backend, device.type]
    if reason is None and backend == "native" and device.type == "cuda":
        return _why_not_on_gpu(device.index)
    return reason


def _why_not_on_gpu(index: int | None) -> str | None:
    """Found out once, where that can be: not by who only traces, nor for a tensor without memory."""
    if index in _ON_GPU:
        return _ON_GPU[index]
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    if index is None:
        return _why_not_on_gpu(torch.cuda.current_device())
    _ON_GPU[index] = _native.why_not_on_gpu(index)
    return _ON_GPU[index]


def pick(op: str, device: torch.device, backend: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that serves `op` for tensors on `device`: "native", "triton" or "reference".

    Args:
        op: a name in OPS.
        device: of the tensors.
        backend: one of BACKENDS, or "auto" for the first of them that can.
        dtype: of the tensors. GPU kernels do not take float64; "auto" is the reference for it.

    Raises:
        ValueError: `backend` is not one of these names.
        RuntimeError: the named backend cannot serve the op here; says why.
    """
    if backend == "auto" and dtype == torch.float64 and device.type != "cpu":
        return "reference"
    if backend == "auto":
        chosen = _AUTO.get((op, device.type), "reference")
        if chosen == "native" and device.type == "cuda" and _why_not_on_gpu(device.index) is not None:
            return "triton" if _WHY_NOT[op, "triton", "cuda"] is None else "reference"
        return chosen
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto", "native", "triton" or "reference", got {backend!r}')
    reason = why_not(op, backend, device)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" cannot serve {op} on {device.type}: {reason}')
    return backend
