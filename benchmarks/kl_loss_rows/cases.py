"""The cases of kl_loss.py: shapes, inputs (far from the teacher, close to it, real), and float64 truth.

N rows (tokens), H and Ht the hidden sizes of student and teacher, V the vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from common.dtypes import DTYPES

LOGIT_STD = 2.0  # of the logits: the KL of two independent draws is then about 4
CLOSE_STD = 0.085  # of the logits' difference: a KL of CLOSE_STD**2 / 2 = 0.0036
SPARSE_K = 128  # ids of a sparse teacher


class Target(NamedTuple):
    """The loss that a row computes: kl times the KL, and ce times the cross-entropy of the labels."""

    kl: float = 1.0
    ce: float = 0.0
    sparse: bool = False  # the KL of the teacher's SPARSE_K likeliest tokens, and of all others as one


KL, CE, SPARSE = Target(), Target(kl=0.0, ce=1.0), Target(sparse=True)


@dataclass(frozen=True)
class Case:
    """A shape. `file` holds its inputs; None: they are random."""

    name: str
    N: int
    H: int
    Ht: int
    V: int
    file: str | None = None

    def describe(self) -> str:
        return f"{self.name}: N {self.N}, H {self.H}, Ht {self.Ht}, V {self.V}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SHAPES = {
    case.name: case
    for case in (
        Case("XS", 128, 128, 160, 4096),
        Case("S", 512, 1024, 1280, 32768),
        Case("M512", 512, 2048, 2560, 131072),
        Case("M", 1024, 2048, 2560, 131072),
        Case("M2048", 2048, 2048, 2560, 131072),
        Case("L", 512, 4096, 5120, 131072),
        Case("XL", 8192, 4096, 5120, 131072),  # Mistral-NeMo 12B teaches Minitron 8B
    )
}
GATE = Case("gate", 67, 96, 120, 3001)
WARM_UP = Case("warm-up", 8, 16, 24, 64)


def parse_shape(text: str) -> Case:
    """A name in SHAPES, or N,H,Ht,V."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        N, H, Ht, V = (int(part) for part in text.split(","))
    except ValueError:
        names = ", ".join(SHAPES)
        raise ValueError(f"shape must be one of {names}, real, or N,H,Ht,V; got {text!r}") from None
    if min(N, H, Ht, V) < 1:
        raise ValueError(f"N, H, Ht and V must be positive, got {text!r}")
    return Case(text, N, H, Ht, V)


@dataclass
class Inputs:
    """Operands of the loss: hidden states [N, H] and [N, Ht], heads [V, H] and [V, Ht]; labels [N], any."""

    student_hidden: torch.Tensor
    student_head: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, operands: list[torch.Tensor], dtype: torch.dtype, device: str) -> Inputs:
        operands = [operand.to(device, dtype).contiguous() for operand in operands]
        for operand in operands[:2]:  # the teacher gets no gradient
            operand.requires_grad_()
        labels = torch.arange(len(operands[0]), device=device) * 7919 % len(operands[1])
        return cls(*operands, labels=labels)

    @property
    def operands(self) -> list[torch.Tensor]:
        return [self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head]

    @functools.cached_property
    def sparse(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A teacher's likeliest ids [N, k], their log-probabilities, log of the rest [N], as in a cache."""
        parts = []
        for rows in self.teacher_hidden.split(64):
            log_p = (rows.float() @ self.teacher_head.float().T).log_softmax(-1)
            logprobs, ids = log_p.topk(min(SPARSE_K, log_p.shape[1]), -1)
            parts.append((ids, logprobs, log_p.scatter(1, ids, -torch.inf).logsumexp(1)))
        ids, logprobs, tail = (torch.cat(part) for part in zip(*parts, strict=True))
        return ids, logprobs, tail

    @property
    def gradient_bytes(self) -> int:
        return sum(operand.nbytes for operand in self.operands[:2])


def make_inputs(case: Case, dtype: str, kind: str = "far", device: str = "cpu", seed: int = 0) -> Inputs:
    """The operands of `case`: random, of the kind "far" or "close"; or those in its file, for any `kind`."""
    wanted = DTYPES[dtype]
    if case.file is not None:
        stored = torch.load(case.file, weights_only=True)
        X, W, Y, U = (
            stored[name] for name in ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
        )
        return Inputs.of([X[: case.N], W[: case.V], Y[: case.N], U[: case.V]], wanted, device)
    gen = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, cols: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, cols, generator=gen, dtype=wanted, device=device).mul_(std)

    N, H, Ht, V = case.N, case.H, case.Ht, case.V
    if kind == "far":
        operands = [draw(N, H), draw(V, H, LOGIT_STD / H**0.5), draw(N, Ht), draw(V, Ht, LOGIT_STD / Ht**0.5)]
        return Inputs.of(operands, wanted, device)
    # "close": both share the first k channels; the wider one has more, which add little to the logits
    k = min(H, Ht)
    hidden, head = draw(N, k), draw(V, k, LOGIT_STD / k**0.5)

    def widen(width: int) -> list[torch.Tensor]:
        if width == k:
            return [hidden, head]
        extra = width - k
        return [
            torch.cat([hidden, draw(N, extra)], 1),
            torch.cat([head, draw(V, extra, CLOSE_STD / extra**0.5)], 1),
        ]

    student, teacher = widen(H), widen(Ht)
    if Ht == H:
        teacher = [hidden.clone(), head + draw(V, k, CLOSE_STD / k**0.5)]
    return Inputs.of(student + teacher, wanted, device)


def error_case(case: Case) -> Case:
    """The part of `case` for which errors are computed: small enough for float64 in NumPy."""
    return replace(case, N=min(case.N, 256), V=case.V if case.file else min(case.V, 16384))


@dataclass
class Truth:
    """Mean loss and its gradients, float64."""

    loss: float
    dX: np.ndarray
    dW: np.ndarray


def truth(inputs: Inputs, target: Target = KL) -> Truth:
    """The loss of `target`, KL(teacher ‖ student) and the cross-entropy of the labels, mean over the rows.

    Of exactly these operands, in float64 NumPy.
    """
    X, W, Y, U = (operand.detach().cpu().double().numpy() for operand in inputs.operands)
    rows, labels = np.arange(len(X))[:, None], inputs.labels.cpu().numpy()[:, None]

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits

    log_s = log_softmax(X @ W.T)
    p_s = np.exp(log_s)
    loss, dz = 0.0, np.zeros_like(p_s)
    if target.ce:
        onehot = np.zeros_like(p_s)
        onehot[rows, labels] = 1.0
        loss += target.ce * float(-log_s[rows, labels].sum() / len(X))
        dz += target.ce * (p_s - onehot)
    if target.kl and not target.sparse:
        log_t = log_softmax(Y @ U.T)
        p_t = np.exp(log_t)
        loss += target.kl * float((p_t * (log_t - log_s)).sum() / len(X))
        dz += target.kl * (p_s - p_t)
    elif target.kl:
        ids, logprobs, tail = (x.cpu().double().numpy() for x in inputs.sparse)
        ids = ids.astype(int)
        named = np.zeros(p_s.shape, bool)
        named[rows, ids] = True
        tail_s = np.where(named, 0.0, p_s).sum(1)
        at_ids = np.exp(logprobs) * (logprobs - log_s[rows, ids])
        loss += target.kl * float((at_ids.sum(1) + np.exp(tail) * (tail - np.log(tail_s))).mean())
        of_kl = p_s * (1.0 - np.exp(tail) / tail_s)[:, None]
        of_kl[rows, ids] = p_s[rows, ids] - np.exp(logprobs)
        dz += target.kl * of_kl
    dz /= len(X)
    return Truth(loss, dz @ W, dz.T @ X)


def relative_error(value: torch.Tensor, reference: np.ndarray) -> float:
    """‖value − reference‖ / ‖reference‖ in the Frobenius norm, in float64."""
    difference = value.detach().cpu().double().numpy() - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))
