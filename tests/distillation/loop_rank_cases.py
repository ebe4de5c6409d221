"""Cases of two ranks: a loop of one's own, Lightning with DDP, and logits that are sharded over ranks."""

import contextlib
import importlib.util

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distillation.plain_loop import CE, KL, check_gradients, models, plain_step, ragged
from distillation.test_automodel import HAS_AUTOMODEL, formula, problem, theirs
from minitron_kernels.distillation import DistillationLoss, ModelTeacher, attach, step
from minitron_kernels.distillation.trainers.automodel import KDLoss
from minitron_kernels.distillation.trainers.loop import count_items


def loop(folder):
    """Four micro-batches on two ranks, one of them without a valid token, are one batch."""
    everything = ragged(4, empty=(2,))
    student, teacher = models()
    expected, (kl, _, tokens) = plain_step(student, teacher, everything)
    batches = everything[dist.get_rank() :: 2]
    loss = DistillationLoss(kl_weight=KL, ce_weight=CE)
    student = DistributedDataParallel(attach(student))
    num_items = count_items(batches)
    assert num_items == tokens / 2
    total = 0.0
    for i, batch in enumerate(batches):
        last = i + 1 == len(batches)
        with contextlib.nullcontext() if last else student.no_sync():
            record = step(student, ModelTeacher(teacher), batch, loss, num_items=num_items)
            record.loss.backward()
            total += record.kl
    check_gradients({name: p.grad for name, p in student.module.named_parameters()}, expected)
    dist.all_reduce(total)
    torch.testing.assert_close(total.item() / 2, kl, rtol=1e-5, atol=0)
    # a group of this rank alone
    groups = [dist.new_group([rank]) for rank in range(2)]
    own = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert count_items(batches, groups[dist.get_rank()]) == own


def lightning(folder):
    """Two windows of two micro-batches and a short one, on two ranks."""
    from distillation.test_lightning import check_training

    check_training(folder, ranks=2)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-7)


def sharded_logits(folder):
    """DTensors along the vocabulary, uneven and empty parts, plain parts of tp_group, gathered ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    student, teacher, labels = problem()
    student[0, 0, 5] = teacher[0, 0, 5] = teacher[0, 1, 60] = -torch.inf
    labels[0, :2] = 1
    student[1, 1] = 200 * torch.randn(61, generator=torch.Generator().manual_seed(0))
    others = [formula, theirs] if HAS_AUTOMODEL else [formula]
    for width, temperature, divisor in (
        (61, 1.0, None),
        (61, 1.7, 13),
        (61, 1.7, torch.tensor(13.0)),
        (1, 1.0, 2),
    ):
        s, t = (
            student[..., -width:],
            teacher[..., -width:].nan_to_num(neginf=-9.0 if width == 1 else -torch.inf),
        )
        for placement in (Shard(2), Shard(-1), Replicate()):
            module = KDLoss(ignore_index=-7, temperature=temperature)
            x = distribute_tensor(s, mesh, [placement]).requires_grad_()
            loss = module(x, distribute_tensor(t, mesh, [placement]), labels, divisor)
            loss.backward()
            for other in others[: 1 if width == 1 else 2]:
                y = s.clone().requires_grad_()
                if other is formula and width > 1:  # 0 · inf is NaN in kl_div, where p_T is 0
                    finite = s.nan_to_num(neginf=-1e4), t.nan_to_num(neginf=-1e4)
                    y = finite[0].clone().requires_grad_()
                    expected = other(y, finite[1], labels, divisor, ignore_index=-7, temperature=temperature)
                else:
                    expected = other(y, t, labels, divisor, ignore_index=-7, temperature=temperature)
                expected.backward()
                close(loss, expected)
                assert isinstance(x.grad, DTensor)
                close(x.grad.full_tensor(), y.grad)
    # parts that were cut by hand, 40 and 21 tokens
    s, t = (v.nan_to_num(neginf=-1e4).split([40, 21], -1)[rank].contiguous() for v in (student, teacher))
    s.requires_grad_()
    module = KDLoss(ignore_index=-7, temperature=1.3, tp_group=dist.group.WORLD)
    loss = module(s, t, labels)
    (3 * loss).backward()
    y = student.nan_to_num(neginf=-1e4).requires_grad_()
    expected = formula(y, teacher.nan_to_num(neginf=-1e4), labels, ignore_index=-7, temperature=1.3)
    (3 * expected).backward()
    close(loss, expected)
    close(s.grad, y.grad.split([40, 21], -1)[rank])
    assert len({x.item() for x in gathered(loss.detach())}) == 1
    # bf16 close to the teacher
    student, teacher, labels = problem((8, 4), close=True)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    y = student.double().requires_grad_()
    truth = formula(y, teacher.double(), labels, dtype=torch.float64, ignore_index=-7, temperature=1.5)
    truth.backward()
    x = distribute_tensor(student, mesh, [Shard(2)]).requires_grad_()
    loss = KDLoss(-7, 1.5)(x, distribute_tensor(teacher, mesh, [Shard(2)]), labels)
    loss.backward()
    assert abs(loss - truth) <= 1e-5 * truth
    assert (x.grad.full_tensor() - y.grad).norm() <= 2e-3 * y.grad.norm()
    # nothing valid: no rank waits for another
    x = distribute_tensor(student, mesh, [Shard(2)]).requires_grad_()
    loss = KDLoss(-7)(x, distribute_tensor(teacher, mesh, [Shard(2)]), torch.full_like(labels, -7), 3)
    loss.backward()
    assert loss == 0 and (x.grad.full_tensor() == 0).all()
    refusals(mesh, student, teacher, labels)


def refusals(mesh, student, teacher, labels):
    import pytest
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    sharded = distribute_tensor(student, mesh, [Shard(2)])
    with pytest.raises(ValueError, match="teacher_logits must be sharded along the vocabulary"):
        KDLoss(-7)(sharded, distribute_tensor(teacher, mesh, [Replicate()]), labels)
    with pytest.raises(ValueError, match="student_logits must be sharded along the vocabulary"):
        KDLoss(-7, tp_group=dist.group.WORLD)(distribute_tensor(student, mesh, [Shard(0)]), teacher, labels)
    with pytest.raises(ValueError, match="same shape on a rank"):
        KDLoss(-7)(sharded, teacher, labels)
    with pytest.raises(ValueError, match="one entry per token"):
        KDLoss(-7)(sharded, distribute_tensor(teacher, mesh, [Shard(2)]), labels[1:])
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    with pytest.raises(ValueError, match="must be sharded over the ranks of tp_group"):
        KDLoss(-7, tp_group=alone)(sharded, sharded, labels)


def gathered(x):
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x)
    return parts


CASES = {"loop": loop, "sharded_logits": sharded_logits}
if importlib.util.find_spec("lightning") is not None:
    CASES["lightning"] = lightning
