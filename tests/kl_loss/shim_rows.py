"""kl_loss's CUDA kernels of whole rows, run on the host by the shim, and their results against the oracle."""

import numpy as np
import pytest
import torch

from kl_loss.cases import assert_loss
from kl_loss.oracle import oracle_rows
from tools.host_shim import SANITIZE, WITHOUT_HALF, load

BETAS = (0.0, 0.3, 0.5, 1.0)
DTYPES = (torch.float32, torch.bfloat16) if SANITIZE else (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, name="poisoned_memory")
def poisoned_memory_fixture():
    """What is allocated and not written is NaN: outputs, states, logits, sums."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", name="shim")
def shim_fixture():
    return load("kl_loss", WITHOUT_HALF, sanitize=True) if SANITIZE else load("kl_loss")


def run(
    shim, student, teacher, *, beta=0.0, mask=None, vocab_size=None, inv_tau=1.0, grad_loss=None, **options
):
    """(loss, stats, gradient) of the shim's two ops."""
    V = min(student.shape[1], teacher.shape[1]) if vocab_size is None else vocab_size
    keys = ("student_scale", "student_softcap", "teacher_scale", "teacher_softcap")
    rest = [V, [beta, inv_tau, *(options.get(k, float(k.endswith("scale"))) for k in keys), 0.0]]
    loss, stats = shim.ops.kl_loss_forward(student, teacher, mask, *rest)
    if grad_loss is None:
        grad_loss = torch.ones(student.shape[0])
    grad = shim.ops.kl_loss_backward(grad_loss, stats, student, teacher, mask, *rest)
    return loss, stats, grad


def assert_gradient(grad, truth, near=1.0, weight=1.0):
    """No worse than the truth rounded to the gradient's dtype, beyond fp32's own error. p_S - p_T carries
    1e-6 of p, however small the difference is: `near` loosens the bound where the two all but agree.
    """
    rounded = torch.from_numpy(truth).to(grad.dtype).double().numpy()
    size, unavoidable = np.linalg.norm(truth), np.linalg.norm(rounded - truth)
    error = np.linalg.norm(grad.double().numpy() - truth)
    bound = 1.1 * unavoidable + 4e-6 * near * size + 1e-6 * weight
    assert error <= bound, f"gradient off by {error / size:.1e}, {unavoidable / size:.1e} by rounding alone"


def check(shim, student, teacher, *, near=1.0, **options):
    """Loss and gradient against the oracle."""
    loss, _, grad = run(shim, student, teacher, **options)
    weight = options.pop("grad_loss", torch.ones(student.shape[0])).double().numpy()
    true_loss, true_grad = oracle_rows(student.double().numpy(), teacher.double().numpy(), **options)
    assert_loss(loss, true_loss)
    assert grad.dtype == student.dtype and grad.shape == student.shape
    assert_gradient(grad, true_grad * weight[:, None], near, np.abs(weight).max())


def normal(*shape, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)
