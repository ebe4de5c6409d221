"""The truth in float64 NumPy, written from the formulas; shares no code with the library.

log p_S, log p_T are log-softmaxes of s = f(z_S)/tau and t = f(z_T)/tau, f(z) = cap * tanh(scale * z / cap).
A logit of -inf is a masked-out token: p = 0, and 0 * log 0 = 0.
"""

import numpy as np


def _log_softmax(x):
    top = x.max(axis=1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(axis=1, keepdims=True))


def _transform(z, scale, softcap, inv_tau):
    """Returns (f(z)/tau, d(f(z)/tau)/dz)."""
    y = scale * z
    slope = np.full_like(z, scale * inv_tau)
    if softcap:
        finite = np.isfinite(y)
        capped = softcap * np.tanh(np.where(finite, y, 0.0) / softcap)
        slope = slope * (1.0 - (capped / softcap) ** 2)
        y = np.where(np.isneginf(y), y, np.where(finite, capped, y))
    return y * inv_tau, np.where(np.isneginf(z), 0.0, slope)


def _plogq(p, q):
    """p * q where p = 0 wins over an infinite q."""
    return np.where(p > 0, p * np.where(p > 0, q, 0.0), np.where(np.isnan(p), np.nan, 0.0))


def oracle_rows(
    student_logits,
    teacher_logits,
    *,
    beta=0.0,
    inv_tau=1.0,
    student_scale=1.0,
    student_softcap=0.0,
    teacher_scale=1.0,
    teacher_softcap=0.0,
    vocab_size=None,
):
    """Per-row divergence [N] in nats and its gradient to the raw student logits [N, Vs], both float64."""
    zs = np.asarray(student_logits, np.float64)
    zt = np.asarray(teacher_logits, np.float64)
    V = min(zs.shape[1], zt.shape[1]) if vocab_size is None else vocab_size
    with np.errstate(all="ignore"):
        s, slope = _transform(zs[:, :V], student_scale, student_softcap, inv_tau)
        t, _ = _transform(zt[:, :V], teacher_scale, teacher_softcap, inv_tau)
        log_s, log_t = _log_softmax(s), _log_softmax(t)
        p_s, p_t = np.exp(log_s), np.exp(log_t)
        if beta == 0.0:
            loss = _plogq(p_t, log_t - log_s).sum(1)
            grad = p_s - p_t
        elif beta == 1.0:
            loss = _plogq(p_s, log_s - log_t).sum(1)
            grad = _plogq(p_s, log_s - log_t - loss[:, None])
        else:
            log_m = np.log(beta * p_t + (1.0 - beta) * p_s)
            kl_student = _plogq(p_s, log_s - log_m).sum(1)
            loss = beta * _plogq(p_t, log_t - log_m).sum(1) + (1.0 - beta) * kl_student
            grad = (1.0 - beta) * _plogq(p_s, log_s - log_m - kl_student[:, None])
        full = np.zeros_like(zs)
        full[:, :V] = np.where(slope == 0.0, 0.0, grad * slope)
    return loss, full


def oracle_metrics(
    student_logits,
    labels,
    *,
    student_scale=1.0,
    student_softcap=0.0,
    label_smoothing=0.0,
    vocab_size=None,
    **_,  # options of the divergence
):
    """Of rows at temperature 1: cross-entropy, entropy, log p(label); and the cross-entropy's gradient.

    Where a label is negative, cross-entropy, log p(label) and the gradient are 0.
    """
    z, labels = np.asarray(student_logits, np.float64), np.asarray(labels)
    V = z.shape[1] if vocab_size is None else vocab_size
    with np.errstate(all="ignore"):
        y, slope = _transform(z[:, :V], student_scale, student_softcap, 1.0)
        log_p = _log_softmax(y)
        p = np.exp(log_p)
        target = np.zeros_like(log_p)
        known = np.flatnonzero(labels >= 0)
        target[known] = label_smoothing / V
        target[known, labels[known]] += 1.0 - label_smoothing
        label_logprob = np.zeros(len(z))
        label_logprob[known] = log_p[known, labels[known]]
        ce, entropy = -_plogq(target, log_p).sum(1), -_plogq(p, log_p).sum(1)
        full = np.zeros_like(z)
        full[:, :V] = np.where((labels >= 0)[:, None] & (slope != 0.0), (p - target) * slope, 0.0)
    return ce, entropy, label_logprob, full


def oracle_linear(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    *,
    student_bias=None,
    teacher_bias=None,
    row_weight=None,
    labels=None,
    ce_weight=None,
    **options,
):
    """Per-row divergence [N]; gradients to student hidden, head and bias.

    They are those of sum(row_weight * divergence + ce_weight * cross-entropy); ce_weight [N] needs labels.
    """
    X, W = np.asarray(student_hidden, np.float64), np.asarray(student_head, np.float64)
    Y, U = np.asarray(teacher_hidden, np.float64), np.asarray(teacher_head, np.float64)
    zs = X @ W.T + (0.0 if student_bias is None else np.asarray(student_bias, np.float64))
    zt = Y @ U.T + (0.0 if teacher_bias is None else np.asarray(teacher_bias, np.float64))
    loss, dz = oracle_rows(zs, zt, **{k: v for k, v in options.items() if k != "label_smoothing"})
    if row_weight is not None:
        dz = dz * np.asarray(row_weight, np.float64)[:, None]
    if ce_weight is not None:
        dz = dz + oracle_metrics(zs, labels, **options)[3] * np.asarray(ce_weight, np.float64)[:, None]
    return loss, dz @ W, dz.T @ X, dz.sum(0)


def oracle_sparse(
    student_hidden,
    student_head,
    ids,
    teacher_outcomes,
    *,
    student_bias=None,
    row_weight=None,
    labels=None,
    ce_weight=None,
    **options,
):
    """As oracle_linear() with a teacher of k ids a row (-1: none), and one outcome for all other tokens.

    Returns the divergence of rows, the student's outcomes [N, k + 1], gradients to hidden, head and bias.
    """
    X, W = np.asarray(student_hidden, np.float64), np.asarray(student_head, np.float64)
    z = X @ W.T + (0.0 if student_bias is None else np.asarray(student_bias, np.float64))
    beta = options.get("beta", 0.0)
    transform = [options.get(f"student_{name}", default) for name, default in (("scale", 1), ("softcap", 0))]
    with np.errstate(all="ignore"):
        s, slope = _transform(z, *transform, options.get("inv_tau", 1.0))
        outcomes, p_in_tail = [], np.zeros_like(s)
        for n, row in enumerate(np.asarray(ids)):
            tail = np.ones(s.shape[1], bool)
            tail[row[row >= 0]] = False
            rest = s[n, tail]
            top = rest.max() if rest.size and np.isfinite(rest.max()) else 0.0
            mass = np.exp(rest - top).sum()
            p_in_tail[n, tail] = np.exp(rest - top) / mass if mass > 0 else 0.0
            of_ids = np.where(row >= 0, s[n, np.maximum(row, 0)], -np.inf)
            outcomes.append([*of_ids, top + np.log(mass)])
        outcomes = np.array(outcomes).reshape(len(s), -1)
        loss, g = oracle_rows(outcomes, teacher_outcomes, beta=beta)
        dz = p_in_tail * g[:, -1:]
        for n, row in enumerate(np.asarray(ids)):
            dz[n, row[row >= 0]] = g[n, :-1][row >= 0]
        dz = np.where(slope == 0.0, 0.0, dz * slope)
    if row_weight is not None:
        dz = dz * np.asarray(row_weight, np.float64)[:, None]
    if ce_weight is not None:
        dz = dz + oracle_metrics(z, labels, **options)[3] * np.asarray(ce_weight, np.float64)[:, None]
    return loss, outcomes, dz @ W, dz.T @ X, dz.sum(0)
