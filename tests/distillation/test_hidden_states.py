"""HiddenStatesLoss against plain PyTorch on full tensors."""

import pytest
import torch

from distillation.hidden_oracle import hidden_loss
from minitron_kernels.distillation import HiddenStatesLoss

LAYERS = {0: 1, 2: 4}
SMALL = 2000  # bytes: a chunk of one or two tokens


def states(H, Ht, dtype, shape=(2, 7), close=False, seed=0):
    """{layer: states} of both; `close`: the teacher's are almost the student's, of another size."""
    torch.manual_seed(seed)
    student = {i: torch.randn(*shape, H, dtype=torch.float64) for i in LAYERS}
    teacher = {j: torch.randn(*shape, Ht, dtype=torch.float64) + 0.3 for j in LAYERS.values()}
    if close:
        teacher = {j: 3 * student[i] + 1e-3 * torch.randn(*shape, Ht).double() for i, j in LAYERS.items()}
    return (
        {i: x.to(dtype).requires_grad_() for i, x in student.items()},
        {j: z.to(dtype) for j, z in teacher.items()},
    )


def grads_of(loss, leaves):
    return torch.autograd.grad(loss * 3, leaves)


def compare(module, student, teacher, *, rtol, atol, autocast=None, labels=None, mask=None, **options):
    """Loss and gradients of a module and of the oracle in float64."""
    learned = [] if module.map is None else [module.map.weight]
    actual = module(student, teacher, labels, mask=mask, **options)
    assert actual.dtype == (torch.float64 if rtol < 1e-9 else torch.float32) and actual.shape == ()
    grads = grads_of(actual, [*student.values(), *learned])
    xs = {i: x.detach().double().requires_grad_() for i, x in student.items()}
    weight = module.map.weight.detach().double().requires_grad_() if learned else None
    valid = torch.ones(next(iter(student.values())).shape[:-1], dtype=torch.bool)
    if labels is not None:
        valid &= labels != -100
    if mask is not None:
        valid &= mask
    channels = module.channel_weights
    truth = hidden_loss(
        [(xs[i], teacher[j].double()) for i, j in module.layers.items()],
        valid=valid,
        kind=module.kind,
        norm=module.norm,
        weight=weight,
        channel_weights=None if channels is None else channels.double(),
        **options,
    )
    torch.testing.assert_close(actual.double(), truth, rtol=rtol, atol=1e-14)
    wanted = grads_of(truth, [*xs.values(), *([weight] if learned else [])])
    for grad, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=rtol, atol=atol * float(right.abs().max()))


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize(("H", "Ht"), [(6, 9), (9, 6), (8, 8)])
def test_loss_and_gradients(kind, norm, H, Ht):
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        student, teacher = states(H, Ht, dtype)
        for how in ("plain", "weighted", "channels"):
            module = HiddenStatesLoss(
                LAYERS,
                kind=kind,
                norm=norm,
                student_width=H,
                teacher_width=Ht,
                channel_weights=torch.rand(Ht, dtype=torch.float64) + 0.1 if how == "channels" else None,
                workspace_bytes=SMALL if how != "plain" else None,
            ).to(dtype)
            assert (module.map is None) == (Ht == H)
            options = {}
            if how == "weighted":
                labels = torch.arange(14).view(2, 7)
                labels[0, :3] = -100
                options = {"labels": labels, "mask": labels != 9, "num_items": 5.5}
                options["token_weights"] = torch.rand(2, 7, dtype=dtype)
            compare(module, student, teacher, rtol=rtol, atol=rtol, **options)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_digits_are_kept_close_to_the_teacher(kind):
    student, teacher = states(16, 16, torch.float32, close=True)
    compare(HiddenStatesLoss(LAYERS, kind=kind), student, teacher, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_what_does_not_count_may_be_nan(kind):
    student, teacher = states(6, 9, torch.float32)
    module = HiddenStatesLoss(LAYERS, kind=kind, student_width=6, teacher_width=9, workspace_bytes=SMALL)
    leaves = [*student.values(), module.map.weight]
    mask = torch.tensor([[False, True] * 3 + [False], [True] * 7])
    weights = torch.rand(2, 7)
    weights[1, 0] = 0
    wanted = module(student, teacher, mask=mask, token_weights=weights)
    right = grads_of(wanted, leaves)
    with torch.no_grad():
        for x in (*student.values(), *teacher.values()):
            x[~mask] = float("nan")
            x[1, 0] = float("inf")
    actual = module(student, teacher, mask=mask, token_weights=weights)
    assert torch.equal(actual, wanted)
    assert all(map(torch.equal, grads_of(actual, leaves), right))
    assert not module(student, teacher, mask=mask).isfinite()  # where it counts it is seen
    assert module(student, teacher, mask=mask & False, num_items=3) == 0
