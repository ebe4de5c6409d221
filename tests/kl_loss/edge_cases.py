"""Logits and probabilities at the edges, and every combination of dtypes, for the GPU backends of kl_loss and
linear_kl_loss: checks that take the backend's Kernels, called by the tests of each.
"""

import numpy as np
import torch

from kl_loss.cases import PLAIN, assert_loss, assert_near, linear, numpy_of, rows
from kl_loss.edges import Rows, assert_losses, assert_rows, bias_edges, linear_of, truth
from kl_loss.oracle import oracle_linear, oracle_rows
from kl_loss.problems import make_linear, make_rows

EDGE_BETAS = (0.0, 1.0, 0.3, 1e-9, 1 - 1e-9)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}  # of dz


def some(edges, first, step):
    """Every `step`-th of the rows."""
    return Rows(edges.names[first::step], edges.student[first::step], edges.teacher[first::step])


def at(temperature):
    return (1 / temperature, *PLAIN[1:])


def check_rows_at_edges(kernels, edges, beta, temperature):
    """Parts of the vocabulary that underflow or are masked out: losses and gradients of rows of logits."""
    student, teacher = edges.student.to(kernels.device), edges.teacher.to(kernels.device)
    loss, _, grad = rows(kernels, student, teacher, beta=beta, options=at(temperature))
    expected = truth(student, teacher, beta=beta, temperature=temperature)
    assert_rows(edges.names, loss, grad, expected, beta=beta, temperature=temperature)


def check_evaluation_at_edges(kernels, edges, beta, temperature, dtype):
    """The same from hidden states and heads, no gradient wanted. Returns stats."""
    tensors = [x.to(kernels.device) for x in linear_of(edges, dtype)]
    expected = truth(edges.student, edges.teacher, beta=beta, temperature=temperature)
    setup = {"beta": beta, "options": at(temperature), "budget": 1 << 18}
    loss, stats, *_ = linear(kernels, tensors, needs_grad=(False, False, False), **setup)
    assert_losses(edges.names, loss, expected)
    return stats


def check_training_at_edges(kernels, edges, beta, temperature, dtype, schedule, stats=None):
    """The same with gradients, in several tiles or chunks; those of a loss per token if stats are given."""
    tensors = [x.to(kernels.device) for x in linear_of(edges, dtype)]
    expected = truth(edges.student, edges.teacher, beta=beta, temperature=temperature)
    setup = {"beta": beta, "options": at(temperature), "schedule": schedule, "budget": 1 << 18}
    weight = torch.tensor(0.25, device=kernels.device)
    loss, _, _, grad_head, _ = linear(kernels, tensors, stats=stats, row_weight=weight, **setup)
    if stats is None:
        assert_losses(edges.names, loss, expected)
    if dtype == torch.float16 and beta == 1.0:  # one scale for all rows: as many digits as the range leaves
        assert_near(grad_head.T, 0.25 * expected.grad, ROUNDING[dtype])
    else:
        options = {"beta": beta, "temperature": temperature, "rounding": ROUNDING[dtype], "weight": 0.25}
        assert_rows(edges.names, None, grad_head.T, expected, **options)


def check_biases_at_edges(kernels, vocab, tile, beta, temperature):
    """Biases of -1e4, -3e4 and -inf in blocks around the borders of tiles."""
    tensors = [x.to(kernels.device) for x in make_linear(3, 40, 72, vocab, torch.bfloat16, distance=3.0)]
    logits = [tensors[i].double() @ tensors[i + 1].double().T for i in (0, 2)]
    setup = {"beta": beta, "options": at(temperature), "schedule": "recompute", "budget": 1 << 16}
    for name, *biases in bias_edges(vocab, tile):
        biases = [None if bias is None else bias.to(kernels.device) for bias in biases]
        added = [z if bias is None else z + bias for z, bias in zip(logits, biases, strict=True)]
        expected = truth(*added, beta=beta, temperature=temperature)
        names, ulp = [name] * 3, 2e-6 / temperature  # logits are sums in fp32, rounded at 1e4
        loss, *_, grad_bias = linear(kernels, tensors, biases=biases, **setup)
        assert_losses(names, loss, expected, ulp=ulp)
        evaluated = linear(kernels, tensors, biases=biases, needs_grad=(False, False, False), **setup)[0]
        assert_losses(names, evaluated, expected, ulp=ulp)
        if np.isfinite(expected.loss).all():
            reach = 1e-5 * (1.0 + expected.loss.max()) / temperature
            assert_near(grad_bias, expected.grad.sum(0), 3e-3, reach)


def check_dtypes_of_rows(kernels, beta, pairs):
    """Logits of student and teacher of any dtypes, against the same values in float64."""
    for student_dtype, teacher_dtype in pairs:
        student, teacher = (x.to(kernels.device) for x in make_rows(3, 157, torch.float32))
        student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
        loss, _, grad = rows(kernels, student, teacher, beta=beta)
        true_loss, true_grad = oracle_rows(numpy_of(student), numpy_of(teacher), beta=beta)
        assert_loss(loss, true_loss)
        assert grad.dtype == student_dtype
        assert_near(grad, true_grad, ROUNDING[student_dtype] + 4e-6)


def check_dtypes_of_linear(kernels, quadruples, setups):
    """Student hidden and head, teacher hidden and head of any dtypes: nothing is rounded that was finer.

    quadruples: dtypes of the four; setups: arguments of linear(), each run with every quadruple.
    """
    exact = make_linear(21, 40, 56, 150, torch.float32, distance=1.0)
    bias = torch.linspace(-1, 1, 150, device=kernels.device)
    for dtypes in quadruples:
        tensors = [x.to(kernels.device, dtype) for x, dtype in zip(exact, dtypes, strict=True)]
        biases = (bias.to(dtypes[3]), bias.to(dtypes[0]))
        gemm = torch.promote_types(*dtypes[:2])
        for setup in setups:
            loss, *grads = oracle_linear(
                *map(numpy_of, tensors),
                student_bias=numpy_of(biases[0]),
                teacher_bias=numpy_of(biases[1]),
                row_weight=np.full(21, 1 / 21),
                beta=setup["beta"],
            )
            weight = torch.tensor(1 / 21, device=kernels.device)
            outputs = linear(kernels, tensors, biases=biases, row_weight=weight, **setup)
            np.testing.assert_allclose(numpy_of(outputs[0]), loss, rtol=1e-5, err_msg=str(dtypes))
            for made, true in zip(outputs[2:], grads, strict=True):
                if made.numel():
                    rounding = max(ROUNDING[gemm], ROUNDING[made.dtype])
                    assert_near(made, true, rounding / 2 + 2e-5)
