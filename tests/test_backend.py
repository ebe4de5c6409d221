"""pick(): names are checked, a named backend never falls back, "auto" does, torch.compile traces it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minitron_kernels import _backend, _native

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", _backend.OPS)
def test_auto_takes_native_where_it_is_built(op):
    assert _backend.pick(op, CPU, "auto") == ("native" if _native.available() else "reference")


@pytest.mark.parametrize("op", _backend.OPS)
def test_auto_takes_the_reference_where_there_is_nothing_else(op):
    assert _backend.pick(op, torch.device("meta"), "auto") == "reference"


@pytest.mark.parametrize("backend", ["Native", "cpu", "", None])
def test_unknown_name(backend):
    with pytest.raises(ValueError, match='backend must be "auto", "native", "triton" or "reference", got'):
        _backend.pick("kl_loss", CPU, backend)


def test_named_backend_is_taken_or_refused_never_replaced():
    devices = [*_backend.DEVICES, "meta"]
    for op, backend, kind in itertools.product(_backend.OPS, _backend.BACKENDS, devices):
        device = torch.device(kind)
        reason = _backend.why_not(op, backend, device)
        if reason is None:
            assert _backend.pick(op, device, backend) == backend
        else:
            assert len(reason) > 10
            with pytest.raises(RuntimeError, match=f'backend="{backend}" cannot serve {op} on {kind}: '):
                _backend.pick(op, device, backend)


@pytest.mark.parametrize("op", _backend.OPS)
def test_missing_extension(op, monkeypatch):
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "reason", lambda: "because of the weather")
    assert _backend._find_reason(op, "native", "cpu") == "because of the weather"


def test_extension_without_cuda(monkeypatch):
    monkeypatch.setattr(_native, "available", lambda: True)
    monkeypatch.setattr(
        _native, "build_info", lambda: {"cuda_archs": [], "cuda_reason": "nvcc was not found"}
    )
    reason = _backend._find_reason("kl_loss", "native", "cuda")
    assert reason == "minitron_kernels was built without CUDA: nvcc was not found"


def test_rocm_does_not_take_the_cuda_kernels(monkeypatch):
    monkeypatch.setattr(_native, "available", lambda: True)
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda_archs": ["sm_80"], "cuda_reason": None})
    assert _backend._find_reason("kl_loss", "native", "cuda") is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in _backend._find_reason("kl_loss", "native", "cuda")


def test_compiles_without_a_graph_break():
    def f(x):
        return x + 1 if _backend.pick("kl_loss", x.device, "auto") == "reference" else x + 2

    x = torch.zeros(3)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="eager")(x), f(x))


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, the kernels run on the first; gives which of them were asked, one after the other."""
    asked, why = [], {0: None, 1: "no kernel image is available"}
    monkeypatch.setattr(_native, "why_not_on_gpu", lambda index: (asked.append(index), why[index])[1])
    monkeypatch.setattr(_backend, "_ON_GPU", {})
    for op in _backend.OPS:
        for backend in ("native", "triton"):
            monkeypatch.setitem(_backend._WHY_NOT, (op, backend, "cuda"), None)
        monkeypatch.setitem(_backend._AUTO, (op, "cuda"), "native")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return asked


def test_a_gpu_that_the_native_kernels_do_not_run_on(gpus, monkeypatch):
    """Older than what was compiled, or with a driver older than the toolkit: asked once for each GPU."""
    first, second = (torch.device("cuda", i) for i in range(2))
    for op in _backend.OPS:
        assert _backend.pick(op, first, "auto") == _backend.pick(op, first, "native") == "native"
        assert _backend.pick(op, second, "auto") == "triton"
        with pytest.raises(RuntimeError, match=f"cannot serve {op} on cuda: no kernel image is available"):
            _backend.pick(op, second, "native")
        assert _backend.why_not(op, "native", torch.device("cuda")) == "no kernel image is available"
        assert _backend.pick(op, torch.device("cuda"), "auto") == "triton"
        assert _backend.pick(op, second, "triton") == "triton"
    assert gpus == [0, 1]
    monkeypatch.setitem(_backend._WHY_NOT, ("gather", "triton", "cuda"), "triton is not installed")
    assert _backend.pick("gather", second, "auto") == "reference"


def test_nothing_is_launched_by_who_only_traces(gpus, monkeypatch):
    """Nor in a capture, nor before there is CUDA; later it is."""
    gpu = torch.device("cuda", 1)

    def f(x):
        return x + 1 if _backend.pick("kl_loss", gpu, "auto") == "native" else x + 2

    compiled, x = torch.compile(f, fullgraph=True, backend="eager"), torch.zeros(3)
    assert torch.equal(compiled(x), x + 1)
    with FakeTensorMode():
        assert _backend.pick("kl_loss", gpu, "auto") == "native"
    assert torch.equal(torch.func.vmap(f)(x), x + 1)
    for name, value in (("is_current_stream_capturing", True), ("is_initialized", False)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, name, lambda value=value: value)
            assert _backend.pick("kl_loss", gpu, "auto") == "native"
    assert gpus == []
    assert torch.equal(f(x), x + 2) and torch.equal(compiled(x), x + 2)
    assert gpus == [1]


@pytest.mark.native
def test_the_trial_launch(monkeypatch):
    """It changes nothing, whatever the default dtype is; its error is the reason."""
    ones, made = torch.ones, []

    def on_cpu(*size, device, **options):
        assert device == torch.device("cuda", 3)
        made.append(ones(*size, **options))
        return made[-1]

    monkeypatch.setattr(torch, "ones", on_cpu)
    torch.set_default_dtype(torch.float64)
    try:
        assert _native.why_not_on_gpu(3) is None
    finally:
        torch.set_default_dtype(torch.float32)
    assert (made[0] == 1).all()

    def refused(grad, factor):
        raise RuntimeError("kl_scale_grad_: launch failed on device 3: no kernel image\nand a stack")

    monkeypatch.setattr(torch.ops.minitron_kernels, "kl_scale_grad_", refused)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda_archs": ["sm_80", "sm_90"]})
    assert _native.why_not_on_gpu(3) == (
        "the kernels, built for sm_80 sm_90, do not run on GPU 3: kl_scale_grad_: launch failed on device 3: "
        "no kernel image"
    )


def test_no_gpu_kernel_takes_float64():
    for op in _backend.OPS:
        assert _backend.pick(op, torch.device("cuda"), "auto", torch.float64) == "reference"
        assert _backend.pick(op, CPU, "auto", torch.float64) == _backend.pick(op, CPU, "auto")


WITHOUT_TRITON = """
import functools, importlib.machinery
find = importlib.machinery.PathFinder.find_spec

def find_spec(name, *rest):
    return None if name.split(".")[0] in ("triton", "ttsem") else find(name, *rest)

importlib.machinery.PathFinder.find_spec = functools.partial(find_spec)  # binds to no class
"""


def test_nothing_needs_triton_to_be_imported_or_collected(tmp_path):
    """The package works without it, and pytest skips what needs it rather than stop."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TRITON)
    tests = Path(__file__).parent
    files = [path for kind in ("gpu", "triton", "cuda") for path in tests.rglob(f"test_*{kind}*.py")]
    assert len(files) > 10
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *map(str, sorted(files))],
        env=environment,
        cwd=tests.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    code = """import torch; from minitron_kernels import _backend
print(_backend.why_not("gather", "triton", torch.device("cuda")))"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "triton is not installed", done.stderr[-2000:]
