"""The formulas of importance in numpy float64, a loop at a time; shares no code with the package."""

import itertools

import numpy as np


def sequences_of(x, mask=None, cu_seqlens=None):
    """The counted tokens [n, C] of each sequence, float64."""
    x = np.asarray(x, dtype=np.float64)
    if cu_seqlens is None:
        pieces = [(x[b], None if mask is None else np.asarray(mask)[b]) for b in range(x.shape[0])]
    else:
        pairs = itertools.pairwise(cu_seqlens)
        pieces = [(x[i:j], None if mask is None else np.asarray(mask)[i:j]) for i, j in pairs]
    return [tokens if keep is None else tokens[keep.astype(bool)] for tokens, keep in pieces]


def head_norms(tokens, num_heads):
    return np.sqrt((tokens.reshape(len(tokens), num_heads, tokens.shape[1] // num_heads) ** 2).sum(-1))


def moments(x, *, mask=None, cu_seqlens=None, num_heads=0):
    """Per sequence: Σ|v|, Σv², Σv and Σ(v − v̄)² [4, B, M], and the counts [B]."""
    planes, counts = [], []
    for tokens in sequences_of(x, mask, cu_seqlens):
        v = head_norms(tokens, num_heads) if num_heads else tokens
        centre = v.mean(0) if len(v) else 0.0
        planes.append([np.abs(v).sum(0), (v**2).sum(0), v.sum(0), ((v - centre) ** 2).sum(0)])
        counts.append(len(v))
    return np.array(planes).reshape(len(counts), 4, num_heads or np.shape(x)[-1]).swapaxes(0, 1), np.array(
        counts
    )


def scores(x, *, batch="L2", seq="mean", **options):
    """The (batch, seq) importance over the sequences that have a token, [M]."""
    sums, counts = moments(x, **options)
    keep = counts > 0
    n = counts[keep][:, None]
    a = {"mean": sums[0][keep] / n, "L2": np.sqrt(sums[1][keep]), "var": sums[3][keep] / n}[seq]
    if batch == "L2":
        return np.sqrt((a**2).sum(0))
    if batch == "mean":
        return np.abs(a).mean(0)
    return ((a - a.mean(0)) ** 2).mean(0)


def cosine_distance(x, y):
    """1 − cos of each row; 1 where a row is zero."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    norms = np.sqrt((x**2).sum(-1)) * np.sqrt((y**2).sum(-1))
    return 1 - np.divide((x * y).sum(-1), norms, out=np.zeros_like(norms), where=norms > 0)
