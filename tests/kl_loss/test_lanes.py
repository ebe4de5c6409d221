"""A last panel of tokens is as wide as its tokens need, and no token's bits depend on those beside it."""

import pytest
import torch

import minitron_kernels as mk
from kl_loss.problems import force_operands, force_plan, make_linear

pytestmark = pytest.mark.native
PANEL, STEP = 64, 16
H, HT, V = 40, 72, 200
# this library's own GEMMs; libtorch's may choose their instructions by a matrix' size
ENGINES = [
    (torch.float64, None, STEP),
    (torch.float32, "f32", STEP),
    (torch.bfloat16, "portable_bf16", STEP),
    (torch.bfloat16, "portable_amx", 32),
    (torch.bfloat16, "portable_avx512_bf16", 32),
]


def rows(tensors, count, **options):
    """Loss of the first `count` tokens, and gradients to their hidden states."""
    hidden, head, teacher, teacher_head = tensors
    hidden = hidden[:count].clone().requires_grad_()
    loss = mk.linear_kl_loss(hidden, head, teacher[:count], teacher_head, reduction="none", **options)
    loss.sum().backward()
    return loss.detach(), hidden.grad


@pytest.mark.parametrize(("dtype", "engine", "step"), ENGINES)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_tokens_beside_change_no_bit(monkeypatch, dtype, engine, step, divergence):
    force_operands(monkeypatch, engine)
    tensors = make_linear(2 * PANEL + 1, H, HT, V, dtype)
    whole = rows(tensors, 2 * PANEL + 1, divergence=divergence)
    for count in (1, 2, STEP, STEP + 1, 33, 48, 49, PANEL, PANEL + 1, 2 * PANEL - 15):
        for part, expected in zip(rows(tensors, count, divergence=divergence), whole, strict=True):
            assert torch.equal(part, expected[:count]), count


@pytest.mark.parametrize(("dtype", "engine", "step"), [*ENGINES, (torch.float32, "f32", STEP)])
@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("width", [128, 70])
def test_flops_of_few_tokens(monkeypatch, dtype, engine, step, schedule, width):
    """Whole steps of tokens, and not whole panels; nor are those of columns of the gradients."""
    force_operands(monkeypatch, engine)
    made = force_plan(monkeypatch, tile=PANEL)
    count, depth = torch.ops.minitron_kernels.count_gemm_flops, 32 if step == 32 else 2
    for tokens in (1, step, step + 1, PANEL + 1):
        hidden, head, *teacher = make_linear(tokens, width, width, 4 * PANEL, dtype)
        hidden.requires_grad_(), head.requires_grad_()
        count(True)
        mk.linear_kl_loss(hidden, head, *teacher, schedule=schedule).backward()
        lanes = -(-tokens // step) * step
        of_logits = -(-width // depth) * depth * (made[-1].num_gemms - 2)
        assert count(False) == 2 * lanes * 4 * PANEL * (of_logits + 2 * width), tokens
