"""Blocks that suit the caches: which are chosen for which, and that no bit of a result depends on them."""

import dataclasses

import pytest
import torch

import minitron_kernels as mk
from kl_loss.problems import force_operands, force_plan, make_linear, threads
from minitron_kernels.ops.kl_loss import blocks_cpu
from minitron_kernels.ops.kl_loss.blocks_cpu import Blocks, Caches, Work, blocks, group_of_tiles

KIB, MIB = 1 << 10, 1 << 20
CASES = [
    (torch.float64, None),
    (torch.float32, "f32"),
    (torch.bfloat16, "f32"),
    (torch.bfloat16, "bf16"),
    (torch.bfloat16, "portable_bf16"),
    (torch.float16, None),
]
# the smallest of each, sizes that divide nothing evenly, and the largest
BLOCKS = [
    Blocks(64, 64, 64, 16, False, False),
    Blocks(128, 192, 128, 48, True, True),
    Blocks(512, 512, 512, 1024, True, False),
]


def gradients(tensors, **options):
    hidden, head = (x.detach().clone().requires_grad_() for x in tensors[:2])
    bias = torch.linspace(-2, 2, head.shape[0], dtype=torch.promote_types(head.dtype, torch.float32))
    bias.requires_grad_()
    loss = mk.linear_kl_loss(hidden, head, *tensors[2:], student_bias=bias, **options)
    loss.backward()
    return loss.detach(), hidden.grad, head.grad, bias.grad


@pytest.mark.native
@pytest.mark.parametrize(("dtype", "operands"), CASES)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_no_bit_depends_on_blocks(monkeypatch, dtype, operands, divergence):
    """In both schedules, on one thread and two, in one chunk; odd sizes, so that no block is full."""
    force_operands(monkeypatch, operands)
    tensors = make_linear(203, 147, 83, 700, dtype)
    options = {"divergence": divergence, "student_softcap": 20.0}
    with monkeypatch.context() as context:
        force_plan(context, tile=128)
        expected = gradients(tensors, schedule="store", **options)
    for number, sizes in enumerate(BLOCKS):
        for schedule in ("store", "recompute"):
            with threads(1 + number % 2), monkeypatch.context() as context:
                made = force_plan(context, tile=128, tile_group=number + 1, stored_tiles=4, blocks=sizes)
                actual = gradients(tensors, schedule=schedule, **options)
                assert made[-1].numbers[-7:-1] == [*sizes]
            for a, b in zip(actual, expected, strict=True):
                assert torch.equal(a, b), (sizes, schedule)


@pytest.mark.native
@pytest.mark.parametrize("operands", ["f32", "portable_bf16"])
def test_several_chunks_of_any_blocks(monkeypatch, operands):
    """The head of a group is packed once for all chunks of recompute, and for each chunk of store."""
    force_operands(monkeypatch, operands)
    tensors = make_linear(203, 147, 83, 700, torch.bfloat16)
    results = []
    for schedule in ("store", "recompute"):
        for sizes in BLOCKS:
            with monkeypatch.context() as context:
                made = force_plan(context, chunk_rows=64, tile_group=2, stored_tiles=3, blocks=sizes)
                results.append(gradients(tensors, schedule=schedule))
                assert made[-1].num_chunks == 4
    for actual in results[1:]:
        for a, b in zip(actual, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.native
@pytest.mark.parametrize("place", range(7, 11))
@pytest.mark.parametrize("size", [0, -64, 96 + 1])
def test_the_kernel_refuses_other_blocks(place, size):
    plan = mk.plan_linear_kl_loss(64, 700, 32, 32)
    numbers = list(plan.numbers)
    numbers[place] = size
    with pytest.raises(Exception, match="plan out of range"):
        torch.ops.minitron_kernels.linear_kl_loss_layout(64, 700, 32, 32, 4, True, True, True, numbers)


WORK = Work(
    tokens=512, tile=256, hidden_size=1024, sides=2, operand_bytes=4, accumulate_bytes=4, grad_head_bytes=4,
    converts_head=False, kept_bytes=64 * MIB, lent_bytes=0, threads=2,
)  # fmt: skip
SMALL = Caches(32 * KIB, 512 * KIB, 32 * MIB)


def test_blocks_fit_the_caches():
    for work in (WORK, WORK._replace(operand_bytes=2, grad_head_bytes=2), WORK._replace(tile=64, threads=16)):
        seen = set()
        for l2 in (256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB):
            chosen = blocks(work, SMALL._replace(l2=l2))
            logits = 2 * work.tile * chosen.token_block * 4
            operand = (work.tile + chosen.token_block) * 256 * work.operand_bytes
            assert logits + operand <= l2 or chosen.token_block == 64
            dz = chosen.hidden_tokens * (work.tile * work.operand_bytes + 256) + work.tile * 256
            assert dz <= l2 or chosen.hidden_tokens == 64
            assert all(size % 64 == 0 for size in chosen[:3]) and chosen.head_rows % 16 == 0
            assert chosen.head_rows <= work.tile
            seen.add(chosen[:4])
        assert len(seen) > 1


def test_a_head_that_is_converted_has_larger_blocks():
    assert blocks(WORK, SMALL).token_block < blocks(WORK._replace(converts_head=True), SMALL).token_block


def test_what_goes_around_the_caches():
    """Kept logits and lent gradients of more than half of the L3; nothing that is not there."""
    for kept, lent in ((1, 0), (0, 1), (0, 0), (1, 1)):
        work = WORK._replace(kept_bytes=kept * 17 * MIB, lent_bytes=lent * 17 * MIB)
        assert blocks(work, SMALL)[-2:] == (bool(kept), bool(lent))
        assert blocks(work, SMALL._replace(l3=64 * MIB))[-2:] == (False, False)
    assert blocks(WORK._replace(kept_bytes=0), Caches(l3=0))[-2:] == (False, False)


def test_every_thread_has_a_tile_and_a_block():
    for count in (1, 2, 16, 64):
        work = WORK._replace(threads=count)
        assert group_of_tiles(work, SMALL) >= count
        chosen = blocks(work, SMALL)
        tasks = -(-512 // chosen.hidden_tokens) * -(-1024 // chosen.hidden_columns)
        assert tasks >= 2 * count or chosen.hidden_columns == 64


def test_caches_of_this_machine():
    found = Caches.of_this_cpu()
    assert 0 < found.l1 <= found.l2 and found.l3 >= 0


def test_caches_from_files(tmp_path):
    def level(index, **values):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in values.items():
            (folder / name).write_text(f"{value}\n")

    assert blocks_cpu._from_sysfs(tmp_path) == {}  # nothing said: nothing found, and not zeros
    level(0, level=1, type="Data", size="48K")
    level(1, level=1, type="Instruction", size="64K")
    assert blocks_cpu._from_sysfs(tmp_path) == {}
    level(2, level=2, type="Unified", size="2048K")
    assert blocks_cpu._from_sysfs(tmp_path) == {"l1": 48 * KIB, "l2": 2 * MIB, "l3": 0}
    level(3, level=3, type="Unified", size="many")
    level(4, level=4, type="Unified", size="8192K")
    assert blocks_cpu._from_sysfs(tmp_path) == {"l1": 48 * KIB, "l2": 2 * MIB, "l3": 0}
    (tmp_path / "index3/size").write_text("307200K")
    assert blocks_cpu._from_sysfs(tmp_path)["l3"] == 300 * MIB


@pytest.mark.native
def test_a_plan_says_what_it_chose():
    plan = mk.plan_linear_kl_loss(512, 32768, 1024, 1280, workspace_bytes=1 << 30, schedule="store")
    text = plan.explain()
    assert f"logits of {plan.blocks.token_block} tokens" in text and f"{plan.caches.l2 >> 10} KiB" in text
    around = dataclasses.replace(plan, blocks=plan.blocks._replace(stream_logits=True)).explain()
    within = dataclasses.replace(plan, blocks=plan.blocks._replace(stream_logits=False)).explain()
    assert "around the caches" in around and "around the caches" not in within
