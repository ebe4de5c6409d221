"""The matrix products of linear_kl_loss on GPUs: the switches of the process that they do not follow, and
what stands in where a GEMM cannot write fp32. No GPU is needed.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

from kl_loss.cases import linear, problem
from kl_loss.shim_tiles import kernels_fixture, shim_fixture  # noqa: F401
from minitron_kernels.distillation import HiddenStatesLoss, hidden_rows
from minitron_kernels.ops.kl_loss import gemm_gpu
from tools.host_shim import missing_tool

# what a trainer may have set, and how it reads before and after
STATES = {
    "nothing": "",
    "legacy": "torch.set_float32_matmul_precision('high')",
    "legacy medium": "torch.set_float32_matmul_precision('medium')",
    "allow_tf32": "flags.allow_tf32 = True",
    "of matmul": "flags.fp32_precision = 'tf32'",
    "of all": "torch.backends.fp32_precision = 'tf32'",
    "reduced": "flags.allow_fp16_accumulation = True; flags.allow_fp16_reduced_precision_reduction = False",
}
PROGRAM = """
import torch
from minitron_kernels.ops.kl_loss.gemm_gpu import summed_in_fp32
flags = torch.backends.cuda.matmul
{setting}

def read(get):
    try:
        return get()
    except RuntimeError:  # torch's: the old and the new switch differ
        return "mixed"

def state():
    names = ("fp32_precision", "allow_tf32", "allow_fp16_accumulation", *(
        f"allow_{{kind}}_reduced_precision_reduction{{more}}" for kind in ("bf16", "fp16")
        for more in ("", "_split_k")))
    names = [name for name in names if not name.endswith("_split_k") or hasattr(flags, name)]
    return [read(lambda: getattr(flags, name)) for name in names] + [
        read(torch.get_float32_matmul_precision), torch.backends.fp32_precision]

before = state()
for error in (False, True):
    try:
        with summed_in_fp32():
            assert flags.fp32_precision != "tf32"
            assert not flags.allow_bf16_reduced_precision_reduction
            assert not flags.allow_fp16_reduced_precision_reduction
            assert not flags.allow_fp16_accumulation
            if error:
                raise KeyError
    except KeyError:
        pass
    assert state() == before, (before, state())
torch.backends.fp32_precision = "ieee"
print(flags.fp32_precision)
"""


@pytest.mark.parametrize("name", STATES)
def test_switches_are_pinned_and_put_back(name):
    program = PROGRAM.format(setting=STATES[name])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # what was inherited still is
    assert done.stdout.strip() == ("ieee" if name in ("of all", "nothing", "reduced") else "tf32")


@pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))
def test_all_products_of_a_call_are_pinned(kernels, monkeypatch):
    """Of statistics, dz and gradients, by either schedule."""
    flags, seen = torch.backends.cuda.matmul, []

    def matmul(a, b, out, accumulate):
        seen.append((flags.fp32_precision == "tf32", flags.allow_bf16_reduced_precision_reduction))
        product = a.float() @ b.float()
        out.copy_(out + product if accumulate else product)

    monkeypatch.setattr(gemm_gpu, "matmul", matmul)
    before = flags.allow_bf16_reduced_precision_reduction
    for schedule, needs_grad in (("store", True), ("recompute", True), ("auto", False)):
        linear(kernels, problem(kernels, torch.bfloat16), schedule=schedule, needs_grad=(needs_grad,) * 3)
    assert len(seen) > 10 and set(seen) == {(False, False)}
    assert flags.allow_bf16_reduced_precision_reduction == before


def test_products_of_the_hidden_states_are_pinned(monkeypatch):
    """Those with the map, of loss and gradients."""
    flags, seen, product = torch.backends.cuda.matmul, [], hidden_rows.matmul

    def matmul(*arguments):
        seen.append((flags.fp32_precision == "tf32", flags.allow_bf16_reduced_precision_reduction))
        product(*arguments)

    monkeypatch.setattr(hidden_rows, "matmul", matmul)
    loss = HiddenStatesLoss({0: 1}, student_width=6, teacher_width=9)
    before = flags.allow_tf32
    flags.allow_tf32 = True
    try:
        student = torch.randn(5, 6, requires_grad=True)
        loss({0: student}, {1: torch.randn(5, 9)}, None).backward()
        assert flags.allow_tf32
    finally:
        flags.allow_tf32 = before
    assert len(seen) >= 3 and set(seen) == {(False, False)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 64])
def test_stand_in_for_a_gemm_that_writes_fp32(monkeypatch, dtype, accumulate, columns):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    gemm_gpu._writes_fp32.cache_clear()
    monkeypatch.setattr(gemm_gpu, "_COPY_BYTES", 4 * 40 * 3)  # three columns at a time
    try:
        assert not gemm_gpu._writes_fp32("cpu", dtype)  # torch's products on the CPU cannot either
        a, b = torch.randn(5, 40).to(dtype), torch.randn(columns, 40).to(dtype).t()
        wide = torch.full((5, 70), 3.0)
        out = wide[:, :columns]
        gemm_gpu.matmul(a, b, out, accumulate)
    finally:
        gemm_gpu._writes_fp32.cache_clear()
    truth = a.double().numpy() @ b.double().numpy() + 3.0 * accumulate
    np.testing.assert_allclose(out.double().numpy(), truth, rtol=1e-5, atol=1e-5)
    assert (wide[:, columns:] == 3.0).all()
