"""Logits and probabilities at the edges, for every backend of kl_loss and linear_kl_loss, and their truth.

What floats make of them is exact: finite logits are multiples of 1/16 with 8 bits at most, the same in fp32,
bf16 and fp16, and stay exact at temperatures of 0.005 and 1.

    finite_rows, masked_out_rows   rows of logits, each with a name; the latter hold −inf
    linear_of                      hidden states and heads whose logits those are: hidden states are the unit
                                   vectors, so that the head's gradient is that of the logits, transposed
    bias_edges                     the same blocks in a bias, −inf too, which no head can hold beside 0s
    truth, assert_rows             losses and gradients against the definition in float64

Rows whose logits lie 9984 apart from model to model ask for log-ratios taken from each model's own maximum:
a log-sum-exp rounded to fp32 is off by 5e-4 there.
"""

from dataclasses import dataclass

import numpy as np
import torch

TEMPERATURES = (0.005, 1.0, 100.0)
FAR = (-9984.0, -29952.0)  # about -1e4 and -3e4, in 8 bits
INF = float("inf")


@dataclass(frozen=True)
class Rows:
    """Rows of logits [N, V] in fp32, each with a name."""

    names: list
    student: torch.Tensor
    teacher: torch.Tensor


def blocks(V, tile):
    """Stretches of the vocabulary that begin and end before, at and after the borders of tiles."""
    ends = [
        (tile, 2 * tile),
        (tile - 1, 2 * tile + 1),
        (tile + 1, 2 * tile - 1),
        (0, tile),
        (0, tile + 1),
        (V - V % tile, V) if V % tile else (V - tile, V),
        (tile, V),
        (0, 1),
    ]
    return [(first, last) for first, last in ends if 0 <= first < last <= V and last - first < V]


def _logits(V, seed, spread=2.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(V, generator=g) * spread * 16).round().clamp(-127, 127) / 16


def _sides(seed, V, spread):
    student = _logits(V, seed, spread)
    return student, ((student + _logits(V, seed + 1, 1.0)) * 16).clamp(-127, 127) / 16


def finite_rows(V, tile, spread=2.0):
    """Blocks that underflow in one model or both, one token with all the mass, every value equal."""
    rows = {}
    for first, last in blocks(V, tile):
        for far in FAR:
            for who in ("student", "teacher", "both"):
                student, teacher = _sides(len(rows), V, spread)
                if who != "teacher":
                    student[first:last] = far
                if who != "student":
                    teacher[first:last] = far
                rows[f"{far:g} in [{first}, {last}) of {who}"] = student, teacher
    for token in sorted({0, tile - 1, tile, tile + 1, V - 1} & set(range(V))):
        for height in (60.0, 9984.0):
            for who in ("student", "teacher", "both", "each its own"):
                student, teacher = _sides(len(rows), V, spread)
                if who != "teacher":
                    student[token] = height
                if who != "student":
                    teacher[V - 1 - token if who == "each its own" else token] = height
                rows[f"{height:g} at {token} of {who}"] = student, teacher
    for level in (0.0, -5.0, 9984.0):
        equal = torch.full((V,), level)
        student, teacher = _sides(len(rows), V, spread)
        rows[f"all {level:g} in student"] = equal, teacher
        rows[f"all {level:g} in teacher"] = student, equal
        rows[f"all {level:g} in both"] = equal, equal
        rows[f"all {level:g} in student, 0 in teacher"] = equal, torch.zeros(V)
    return _stacked(rows)


def masked_out_rows(V, tile, spread=2.0):
    """−inf in one model, where the other has mass or has none, or in both; at last in a whole row."""
    rows = {}
    for first, last in blocks(V, tile):
        for who in ("student", "teacher", "both"):
            for other in ("has mass", "underflows"):
                student, teacher = _sides(len(rows), V, spread)
                if other == "has mass":  # no doubt whether it has: its largest logit lies there
                    student[first], teacher[first] = 8.0, 8.0
                else:
                    student[first:last] = teacher[first:last] = FAR[1]
                if who != "teacher":
                    student[first:last] = -INF
                if who != "student":
                    teacher[first:last] = -INF
                rows[f"-inf in [{first}, {last}) of {who}, the other {other}"] = student, teacher
    student, teacher = _sides(len(rows), V, spread)
    student[: tile + 1], teacher[tile + 1 :] = -INF, -INF
    if tile + 1 < V:
        rows["no token in common"] = student, teacher
    for who in ("student", "teacher", "both"):
        student, teacher = _sides(len(rows), V, spread)
        if who != "teacher":
            student[:] = -INF
        if who != "student":
            teacher[:] = -INF
        rows[f"-inf in all of {who}"] = student, teacher
    return _stacked(rows)


def _stacked(rows):
    student, teacher = (torch.stack(side) for side in zip(*rows.values(), strict=True))
    return Rows(list(rows), student, teacher)


def linear_of(rows, dtype=torch.float32):
    """Student hidden [N, N] and head [V, N], teacher hidden and head, whose logits are those of `rows`."""
    unit = torch.eye(len(rows.names), dtype=dtype)
    student, teacher = (x.T.to(dtype).contiguous() for x in (rows.student, rows.teacher))
    return [unit, student, unit.clone(), teacher]


def bias_edges(V, tile):
    """(name, student bias, teacher bias) to be added to ordinary logits; at least one is no None."""
    cases = []
    for first, last in blocks(V, tile):
        for level in (*FAR, -INF):
            bias = torch.zeros(V)
            bias[first:last] = level
            name = f"{level:g} in [{first}, {last})"
            cases += [(f"{name} of student", bias, None), (f"{name} of teacher", None, bias)]
            cases.append((f"{name} of both", bias, bias))
    return cases


@dataclass(frozen=True)
class Truth:
    """Float64: losses [N], gradients to the raw student logits [N, V], and both probabilities [N, V]."""

    loss: np.ndarray
    grad: np.ndarray
    student: np.ndarray
    teacher: np.ndarray


# The smallest normal number of fp32: a probability below it is 0 in an fp32 kernel, and 0 · ∞ is 0.
SMALLEST = 2.0**-126


def _log_probabilities(z):
    below = z - z.max(1, keepdims=True)
    return below - np.log(np.exp(below).sum(1, keepdims=True))


def _times(p, log_ratio):
    return np.where(p == 0.0, 0.0, p * np.where(p == 0.0, 0.0, log_ratio))


def truth(student, teacher, *, beta, temperature, smallest=SMALLEST):
    """The definition of the divergence, with probabilities below `smallest` read as 0."""
    z_s, z_t = (np.asarray(x.detach().double().cpu()) / temperature for x in (student, teacher))
    with np.errstate(all="ignore"):
        log_s, log_t = _log_probabilities(z_s), _log_probabilities(z_t)
        p_s, p_t = (np.where(np.exp(x) < smallest, 0.0, np.exp(x)) for x in (log_s, log_t))
        if beta == 0.0:
            loss, grad = _times(p_t, log_t - log_s).sum(1), p_s - p_t
        elif beta == 1.0:
            loss = _times(p_s, log_s - log_t).sum(1)
            grad = _times(p_s, log_s - log_t - loss[:, None])
        else:
            log_m = np.logaddexp(np.log(beta) + log_t, np.log1p(-beta) + log_s)
            kl_s = _times(p_s, log_s - log_m).sum(1)
            loss = beta * _times(p_t, log_t - log_m).sum(1) + (1 - beta) * kl_s
            grad = (1 - beta) * _times(p_s, log_s - log_m - kl_s[:, None])
    nowhere = np.isneginf(z_s).all(1) | np.isneginf(z_t).all(1)
    loss[nowhere] = np.nan
    return Truth(loss, np.where(np.isneginf(z_s), 0.0, grad) / temperature, p_s, p_t)


def grad_bound(expected, *, beta, temperature, ulp=2.0**-23, rounding=0.0):
    """[N]: the error allowed to a row of the logits' gradient, as a Euclidean norm.

    A few ulps of what is subtracted to make it: probabilities, for reverse KL times their log-ratios; and
    `rounding`, of the gradient itself, where it is stored in fewer bits.
    """
    reach = 1.0 + (np.where(np.isfinite(expected.loss), expected.loss, 0.0) if beta == 1.0 else 0.0)
    norms = np.linalg.norm(expected.student, axis=1) + np.linalg.norm(expected.teacher, axis=1)
    own = np.linalg.norm(expected.grad, axis=1)
    return (80 * ulp + rounding) * own + 8 * ulp * reach * norms / temperature


def grad_is_defined(expected, beta):
    """[N] bool: reverse KL has a gradient only where it is finite; none has one without a possible token."""
    return np.isfinite(expected.loss) if beta == 1.0 else ~np.isnan(expected.loss)


def assert_losses(names, loss, expected, *, ulp=2.0**-23):
    """Row losses: NaN and infinite exactly where the truth is, else within a few ulps of its terms."""
    loss = loss.detach().double().cpu().numpy()
    for name, value, true in zip(names, loss, expected.loss, strict=True):
        if np.isfinite(true):
            allowed = 80 * ulp * true + ulp * np.sqrt(max(true, 0.0)) + 2 * ulp
            assert abs(value - true) <= allowed, f"{name}: loss {value}, expected {true}"
        else:
            assert str(value) == str(true), f"{name}: loss {value}, expected {true}"


def assert_rows(names, loss, grad, expected, *, beta, temperature, ulp=2.0**-23, rounding=0.0, weight=1.0):
    """Losses [N] and gradients [N, V] of sum(weight · loss) to the raw student logits, or None for either."""
    if loss is not None:
        assert_losses(names, loss, expected, ulp=ulp)
    if grad is None:
        return
    with np.errstate(invalid="ignore"):
        errors = np.linalg.norm(grad.detach().double().cpu().numpy() - weight * expected.grad, axis=1)
    bound = grad_bound(expected, beta=beta, temperature=temperature, ulp=ulp, rounding=rounding)
    defined = grad_is_defined(expected, beta)
    for name, error, allowed, wanted in zip(names, errors, abs(weight) * bound, defined, strict=True):
        assert not wanted or error <= allowed, f"{name}: gradient off by {error:.3g}, allowed {allowed:.3g}"
