"""Batches with labels, mask and weights, and the record that the definition makes of them, in float64."""

import math

import numpy as np
import pytest
import torch

import minitron_kernels as mk
from kl_loss.oracle import oracle_linear, oracle_metrics, oracle_rows
from kl_loss.problems import BETA, GRADIENT_BOUND, relative, to_numpy

BACKENDS = ["native", "reference"]
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}  # of losses
# divergence, temperature, label smoothing, softcap
CASES = [
    ("forward_kl", 1.0, 0.0, None),
    ("forward_kl", 2.0, 0.1, None),
    ("reverse_kl", 1.0, 0.1, 6.0),
    ("reverse_kl", 0.5, 0.0, None),
    ("jsd", 1.0, 0.1, None),
    ("jsd", 2.0, 0.0, 6.0),
    ("forward_kl", 1.0, 1.0, None),
]
WEIGHTS = {"kl_weight": 0.3, "ce_weight": 0.7}


class Batch:
    """Labels, mask and token weights of N tokens, and what they make of a loss."""

    def __init__(self, N, V, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, V, (N,), generator=g)
        self.labels[::5] = -100
        self.mask = torch.rand(N, generator=g) < 0.8
        self.weights = torch.rand(N, generator=g)
        self.weights[3::7] = 0.0
        self.counted = ((self.labels >= 0) & self.mask).numpy()
        self.weights[torch.from_numpy(~self.counted)] = math.nan  # nobody may look
        self.options = {"labels": self.labels, "mask": self.mask, "token_weights": self.weights}
        self.targets = np.where(self.counted, self.labels.numpy(), -1)

    def row_weight(self):
        """Each token's factor in a mean."""
        weights = np.where(self.counted, self.weights.double().numpy(), 0.0)
        return weights / max(self.counted.sum(), 1)

    def assert_record(self, record, kl, metrics, dtype):
        """Against rows of the oracle."""
        ce, entropy, label_logprob, _ = metrics
        w, near = self.row_weight(), {"rel": BOUND[dtype], "abs": 0}
        expected = {"kl": kl, "ce": ce, "entropy": entropy, "label_logprob": label_logprob}
        for name, rows in expected.items():
            term = getattr(record, name)
            assert term.item() == pytest.approx((w * rows).sum(), **near), name
            assert not term.requires_grad and term.shape == ()
        loss = WEIGHTS["kl_weight"] * (w * kl).sum() + WEIGHTS["ce_weight"] * (w * ce).sum()
        assert record.loss.item() == pytest.approx(loss, **near)
        assert record.num_tokens.dtype == torch.int64 and record.num_tokens.item() == self.counted.sum()


def definition(case):
    divergence, temperature, smoothing, softcap = case
    return {
        "beta": BETA[divergence],
        "inv_tau": 1 / temperature,
        "student_softcap": softcap or 0.0,
        "label_smoothing": smoothing,
    }


def arguments(case):
    names = ("divergence", "temperature", "label_smoothing", "student_softcap")
    return dict(zip(names, case, strict=True))


def rows_truth(zs, zt, batch, case, **more):
    options = {**definition(case), **more}
    kl, dz = oracle_rows(zs, zt, **{k: v for k, v in options.items() if k != "label_smoothing"})
    metrics = oracle_metrics(zs, batch.targets, **options)
    grad = WEIGHTS["kl_weight"] * dz + WEIGHTS["ce_weight"] * metrics[3]
    return kl, metrics, grad * batch.row_weight()[:, None]


def linear_truth(tensors, batch, case, bias=None, weights=WEIGHTS, **more):
    """KL and metrics of rows, gradients to hidden, head and bias."""
    options, w = {**definition(case), **more}, batch.row_weight()
    arrays, b = to_numpy(*tensors), 0.0 if bias is None else to_numpy(bias)[0]
    kl, *grads = oracle_linear(
        *arrays, student_bias=None if bias is None else b, row_weight=weights["kl_weight"] * w,
        ce_weight=weights["ce_weight"] * w, labels=batch.targets, **options,
    )  # fmt: skip
    return kl, oracle_metrics(arrays[0] @ arrays[1].T + b, batch.targets, **options), grads


def run_linear(tensors, bias=None, **options):
    """The record, and the gradients to hidden, head and bias."""
    hidden, head = (x.clone().requires_grad_() for x in tensors[:2])
    bias = None if bias is None else bias.clone().requires_grad_()
    record = mk.linear_kl_loss(hidden, head, *tensors[2:], student_bias=bias, return_parts=True, **options)
    record.loss.sum().backward()
    return record, [None if x is None else x.grad for x in (hidden, head, bias)]


def assert_gradients(grads, truths, dtype):
    for name, grad, truth in zip(("hidden", "head", "bias"), grads, truths, strict=True):
        if grad is not None:
            assert relative(grad, truth) <= GRADIENT_BOUND[dtype], name


def both(backend, tensors):
    """Each loss as a function of what learns, and what learns."""

    def linear(hidden, head, **options):
        return mk.linear_kl_loss(hidden, head, *tensors[2:], backend=backend, **options)

    def rows(logits, **options):
        return mk.kl_loss(logits, tensors[2] @ tensors[3].T, backend=backend, **options)

    logits = (tensors[0] @ tensors[1].T).detach()
    return (linear, [x.clone().requires_grad_() for x in tensors[:2]]), (rows, [logits.requires_grad_()])
