"""Bad input: each error names the argument, what was wanted and what came."""

import pytest
import torch
from _problems import make_linear, make_rows

import minitron_kernels as mk

pytestmark = pytest.mark.native
N, H, HT, V = 6, 8, 12, 40
META = torch.device("meta")


def linear(**changes):
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    arguments = dict(zip(names, make_linear(N, H, HT, V, torch.float32), strict=True))
    return mk.linear_kl_loss(**{**arguments, **changes})


def rows(**changes):
    names = ("student_logits", "teacher_logits")
    arguments = dict(zip(names, make_rows(N, V, torch.float32), strict=True))
    return mk.kl_loss(**{**arguments, **changes})


SHARED = [
    ({"temperature": 0.0}, ValueError, r"temperature must be finite and greater than 0, got 0"),
    ({"temperature": float("nan")}, ValueError, r"temperature .* got nan"),
    ({"temperature": "2"}, TypeError, r"temperature must be a number, got str"),
    ({"divergence": "kl"}, ValueError, r"divergence must be one of forward_kl.*got 'kl'"),
    ({"divergence": 1.5}, ValueError, r"divergence .* in \[0, 1\], got 1.5"),
    ({"divergence": None}, TypeError, r"divergence must be a name or a number, got NoneType"),
    ({"reduction": "avg"}, ValueError, r"reduction must be one of mean, sum, none; got 'avg'"),
    ({"student_softcap": -1.0}, ValueError, r"student_softcap .* got -1"),
    ({"teacher_logit_scale": 0.0}, ValueError, r"teacher_logit_scale .* got 0"),
    ({"num_items": 4, "reduction": "sum"}, ValueError, r"num_items .* got reduction='sum'"),
    ({"num_items": 0}, ValueError, r"num_items must be .* greater than 0, got 0"),
    ({"num_items": torch.ones(2)}, ValueError, r"num_items must have one element, got shape \(2,\)"),
    ({"vocab_size": 41}, ValueError, r"vocab_size must be from 1 to 40.*got 41"),
    ({"vocab_size": 4.0}, TypeError, r"vocab_size must be an int, got float"),
    ({"mask": torch.ones(N)}, TypeError, r"mask must be bool .* got torch.float32"),
    ({"mask": torch.ones(N + 1, dtype=torch.bool)}, ValueError, r"mask .* shape \(6,\); got \(7,\)"),
    ({"mask": torch.ones(N, dtype=torch.bool, device=META)}, ValueError, r"mask is on meta"),
    ({"labels": torch.zeros(N)}, TypeError, r"labels must be int64 or int32, got torch.float32"),
    ({"labels": torch.tensor([0, 1, 40, 3, 4, 5])}, ValueError, r"labels .* \[0, 40\), got 40 at position 2"),
    ({"labels": torch.tensor([0, -1, 4, 3, 4, 5])}, ValueError, r"labels .*ignore_index=-100.* got -1 at"),
    ({"labels": [1, 2]}, TypeError, r"labels must be a torch.Tensor, got list"),
    ({"backend": "cuda"}, ValueError, r'backend must be "auto", .*got \'cuda\''),
    ({"backend": "triton"}, RuntimeError, r'backend="triton" cannot serve .*GPU'),
]


@pytest.mark.parametrize("changes,error,message", SHARED)
def test_options_of_both(changes, error, message):
    for loss in (linear, rows):
        with pytest.raises(error, match=message):
            loss(**changes)


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"student_logits": None}, TypeError, r"student_logits must be a torch.Tensor, got NoneType"),
        (
            {"student_logits": torch.zeros(N, V, dtype=torch.int64)},
            TypeError,
            r"student_logits .* got torch.int64",
        ),
        ({"teacher_logits": torch.zeros(N, V, device=META)}, ValueError, r"teacher_logits is on meta"),
        ({"teacher_logits": torch.zeros(N, V).double()}, TypeError, r"float64 needs float64"),
        (
            {"teacher_logits": torch.zeros(N + 1, V)},
            ValueError,
            r"leading dimensions .* \(6, 40\) and \(7, 40\)",
        ),
        (
            {"teacher_logits": torch.zeros(N, V + 8)},
            ValueError,
            r"vocabularies of 40 and 48 .* pass vocab_size=",
        ),
    ],
)
def test_kl_loss(changes, error, message):
    with pytest.raises(error, match=message):
        rows(**changes)


@pytest.mark.parametrize(
    "changes,error,message",
    [
        (
            {"student_head": torch.zeros(V, H + 1)},
            ValueError,
            r"student_head \[V, H\] .* \(6, 8\) and \(40, 9\)",
        ),
        ({"teacher_head": torch.zeros(V)}, ValueError, r"teacher_hidden .* teacher_head .* \(40,\)"),
        (
            {"teacher_hidden": torch.zeros(N - 1, HT)},
            ValueError,
            r"leading dimensions, got \(6, 8\) and \(5, 12\)",
        ),
        ({"teacher_head": torch.zeros(V + 8, HT)}, ValueError, r"40 and 48 .* pass vocab_size="),
        ({"student_head": torch.zeros(V, H, device=META)}, ValueError, r"student_head is on meta"),
        ({"student_head": torch.zeros(V, H).double()}, TypeError, r"student_head is torch.float64"),
        (
            {"student_bias": torch.zeros(V - 1)},
            ValueError,
            r"student_bias must be \[V\] = \[40\].* got \(39,\)",
        ),
        ({"teacher_bias": torch.zeros(V).int()}, TypeError, r"teacher_bias must be float32"),
        ({"schedule": "fast"}, ValueError, r"schedule must be one of auto, store, recompute; got 'fast'"),
        ({"workspace_bytes": 1000}, ValueError, r"workspace_bytes=1000 is too small: the least .* is \d+ \("),
        (
            {"grad_head_accumulator": torch.zeros(V, H).half()},
            TypeError,
            r"torch.float32 tensor, got torch.float16",
        ),
        ({"grad_head_accumulator": 3}, TypeError, r"grad_head_accumulator .* got int"),
        ({"grad_head_accumulator": torch.zeros(H, V).T}, ValueError, r"stride 1 along H"),
        (
            {"grad_head_accumulator": torch.zeros(V, H), "backend": "reference"},
            ValueError,
            r"grad_head_accumulator needs native or triton",
        ),
    ],
)
def test_linear_kl_loss(changes, error, message):
    with pytest.raises(error, match=message):
        linear(**changes)


def test_the_least_that_would_do_does():
    for schedule in ("auto", "store", "recompute"):
        tensors = make_linear(300, 32, 32, 3000, torch.float32)
        tensors[1].requires_grad_()
        with pytest.raises(ValueError, match="too small") as caught:
            mk.linear_kl_loss(*tensors, schedule=schedule, workspace_bytes=1)
        least = int(str(caught.value).split("would do is ")[1].split()[0])
        with pytest.raises(ValueError, match="too small"):
            mk.linear_kl_loss(*tensors, schedule=schedule, workspace_bytes=least - 1)
        mk.linear_kl_loss(*tensors, schedule=schedule, workspace_bytes=least).backward()


def test_an_error_leaves_the_accumulator_alone():
    buffer = torch.ones(V, H)
    with pytest.raises(ValueError, match="labels"):
        linear(grad_head_accumulator=buffer, labels=torch.full((N,), V))
    assert (buffer == 1).all()


def test_strided_inputs():
    hidden, head, *teacher = make_linear(N, H, HT, V, torch.bfloat16)
    wide = torch.zeros(V, 3 * H, dtype=torch.bfloat16)
    wide[:, H : 2 * H] = head
    inputs = [hidden.T.contiguous().T.requires_grad_(), wide[:, H : 2 * H].requires_grad_()]
    plain = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    for x in (inputs, plain):
        mk.linear_kl_loss(*x, *teacher).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(inputs, plain, strict=True))
