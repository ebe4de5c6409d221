"""linear_sparse_kl_loss with a vocabulary over several ranks: cases for ranks.py."""

import torch
import torch.distributed as dist

import minitron_kernels as mk
from kl_loss.problems import GRADIENT_BOUND
from kl_loss.vocab_parallel_cases import SHAPE, H, N, Problem, even

K = 9


def sparse_cases(world):
    """Name -> options of check_sparse()."""
    uneven = [*even(world - 1, 150), 119]
    return {
        "sparse": {},
        "sparse_reverse_double": {
            "dtype": torch.float64,
            "divergence": "reverse_kl",
            "temperature": 2.0,
            "widths": uneven,
        },
        "sparse_jsd_recompute": {"divergence": "jsd", "schedule": "recompute", "workspace_bytes": 60000},
        "sparse_store_chunks": {
            "schedule": "store",
            "workspace_bytes": 90000,
            "student_softcap": 6.0,
        },
        "sparse_none": {"reduction": "none", "schedule": "recompute", "workspace_bytes": 60000},
        "sparse_padding_only": {
            "widths": [*even(world - 1), 0],
            "padding": [*[(0, 0)] * (world - 1), (6, 4)],
        },
        "sparse_masked": {"masked": 2.0},
        "sparse_sequence_bf16": {"dtype": torch.bfloat16, "sequence_parallel": True, "label_smoothing": 0.2},
    }


def check_sparse(
    group,
    widths=None,
    dtype=torch.float32,
    padding=None,
    masked=0.2,
    reduction="mean",
    sequence_parallel=False,
    temperature=1.0,
    **options,
):
    """Record and gradients are those of one process, and the loss is the same to the bit on all ranks."""
    widths = widths or even(group.size())
    p = Problem(group, widths, dtype, padding, masked=masked)
    log_p = (p.teacher_hidden.double() @ p.teacher_head.double().T).log_softmax(-1)
    logprobs, ids = log_p.topk(K, -1)
    ids[3, 4:] = -1
    named = torch.zeros(N, p.total + 1, dtype=torch.bool).scatter(1, ids.where(ids >= 0, p.total), True)
    tail = (log_p / temperature).masked_fill(named[:, : p.total], -torch.inf).logsumexp(-1)
    given = {
        "labels": p.labels.view(SHAPE),
        "mask": p.mask.view(SHAPE),
        "ce_weight": 0.5,
        "return_parts": True,
        "reduction": reduction,
        "temperature": temperature,
        "vocab_size": p.total,
    }
    teacher = [x.view(*SHAPE, *x.shape[1:]) for x in (ids, logprobs)] + [{temperature: tail.view(SHAPE)}]
    factor = torch.linspace(0.5, 2, N).view(SHAPE) if reduction == "none" else 1.0

    alone = [x.clone().double().requires_grad_() for x in (p.hidden.view(*SHAPE, H), p.head)]
    keep = {k: v for k, v in options.items() if k not in ("schedule", "workspace_bytes")}
    truth = mk.linear_sparse_kl_loss(*alone, *teacher, backend="reference", **given, **keep)
    true_grads = torch.autograd.grad((truth.loss * factor).sum(), alone)

    own = slice(*p.range)
    own_tokens = torch.arange(SHAPE[0])
    if sequence_parallel:
        own_tokens = own_tokens.chunk(group.size())[group.rank()]
    hidden = p.hidden.view(*SHAPE, H)[own_tokens].clone().requires_grad_()
    head = p.shard(p.head, 0).clone().requires_grad_()
    record = mk.linear_sparse_kl_loss(
        hidden,
        head,
        *teacher,
        tp_group=group,
        sequence_parallel=sequence_parallel,
        vocab_range=p.range,
        **given,
        **options,
    )
    grads = torch.autograd.grad((record.loss * factor).sum(), (hidden, head))
    bound = {torch.float64: 1e-11, torch.float32: 2e-5}.get(dtype, 1e-4)
    for x, y in zip(record, truth, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=bound, atol=bound)
    width = p.range[1] - p.range[0]
    for actual, expected in (
        (grads[0], true_grads[0][own_tokens]),
        (grads[1][:width], true_grads[1][own]),
    ):
        error = (actual.double() - expected).norm()
        assert error <= 2 * GRADIENT_BOUND[dtype] * expected.norm() + 1e-12, (error, expected.norm())
    assert not grads[1][width:].any()
    everyone = [torch.empty_like(record.loss.detach()) for _ in range(group.size())]
    dist.all_gather(everyone, record.loss.detach(), group=group)
    assert all(torch.equal(everyone[0], other) for other in everyone[1:])
