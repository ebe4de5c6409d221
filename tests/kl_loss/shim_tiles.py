"""linear_kl_loss's CUDA kernels, run on the host by the shim, on tiles of logits."""

import math

import pytest
import torch

from kl_loss.cases import PLAIN, Kernels, matmul_fp32, numpy_of
from kl_loss.oracle import oracle_rows
from kl_loss.problems import make_rows
from minitron_kernels.ops.kl_loss import gemm_gpu
from minitron_kernels.ops.kl_loss.epilogues import native_epilogues
from tools.host_shim import FORWARD, REVERSE, SANITIZE, load

BETAS = (0.0, 1.0, 0.3)
ORDERS = (FORWARD, REVERSE, 2, 3, 4, 5, 6)
ROWS, COLUMNS = 5, 4096


def kernels_of(shim):
    ops = shim.ops
    rows = ops.kl_loss_forward, ops.kl_loss_backward
    return Kernels("native", "cpu", *rows, native_epilogues(ops), ops.kl_loss_forward_metrics)


@pytest.fixture(autouse=True, name="poisoned_memory")
def poisoned_memory_fixture():
    """What is allocated and not written is NaN: outputs, states, logits, sums."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", name="shim")
def shim_fixture():
    return load("kl_loss", sanitize=SANITIZE)


@pytest.fixture(name="kernels")
def kernels_fixture(shim):
    return kernels_of(shim)


@pytest.fixture(autouse=True, name="without_cublas")
def without_cublas_fixture(monkeypatch):
    monkeypatch.setattr(gemm_gpu, "matmul", matmul_fp32)


def tiles(columns=COLUMNS, bias=False, seed=0):
    """Logits as kernels get them: a tile in a wider buffer of NaN, biases that are parts of longer ones."""
    wide = [torch.full((ROWS, -(-columns // 64) * 64 + 64), math.nan) for _ in range(2)]
    views = [buffer[:, :columns] for buffer in wide]
    for view, logits in zip(views, make_rows(ROWS, columns, torch.float32, seed=seed), strict=True):
        view.copy_(logits)
    biases = [torch.linspace(-3, 3, columns + 9)[5 : 5 + columns] if bias else None for _ in range(2)]
    return (*views, *biases)


def readable(logits, **others):
    """What a kernel on these logits may read, for Shim.trace()."""
    names = ("student", "teacher", "student_bias", "teacher_bias")
    tensors = dict(zip(names, logits, strict=True)) | others
    return {name: x for name, x in tensors.items() if x is not None}


def outputs(rows=ROWS):
    return torch.full((rows,), math.nan), torch.full((rows, 6), math.nan)


def run_tiles(epilogues, logits, mask, beta, size):
    """Loss and stats of whole rows, from tiles of `size` tokens."""
    options = (beta, *PLAIN)
    rows, columns = logits[0].shape
    state, sums = torch.full((1, 5, rows), math.nan), torch.full((1, 2, rows), math.nan)
    loss, stats = outputs(rows)
    cuts = [slice(begin, min(begin + size, columns)) for begin in range(0, columns, size)]

    def part(cut):
        return (*(x[:, cut] for x in logits[:2]), *(None if b is None else b[cut] for b in logits[2:]))

    for cut in cuts:
        epilogues.tile_stats(part(cut), mask, state[0], cut.start == 0, options)
    epilogues.finish_stats(state, mask, loss, stats, options)
    if 0 < beta < 1:
        for cut in cuts:
            epilogues.tile_mixture(part(cut), mask, stats, sums[0], cut.start == 0, options)
        epilogues.finish_mixture(sums, mask, loss, stats, options)
    return loss, stats


def true_loss(logits, beta):
    full = [x if b is None else x + b for x, b in zip(logits[:2], logits[2:], strict=True)]
    return oracle_rows(*map(numpy_of, full), beta=beta)[0]
