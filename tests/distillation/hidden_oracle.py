"""The hidden-state term and the whole loss in plain PyTorch, on full tensors, and a model of two layers."""

import torch
import torch.nn.functional as F

from minitron_kernels.distillation import DenseSignal


def norm_rows(x, norm):
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x if norm == "none" else x / x.pow(2).mean(-1, keepdim=True).sqrt()


def hidden_rows(x, z, *, kind="cosine", norm="rms", weight=None, channel_weights=None):
    """[..., H], [..., Ht] -> [...]."""
    u, t = norm_rows(x, norm), norm_rows(z, norm)
    if weight is not None:
        u = F.linear(u, weight)
    if channel_weights is not None:
        u, t = u * channel_weights, t * channel_weights
    if kind == "cosine":
        return 1 - F.cosine_similarity(u, t, dim=-1)
    return F.mse_loss(u, t, reduction="none").mean(-1)


def hidden_loss(pairs, *, valid=None, token_weights=None, num_items=None, **how):
    """The mean over pairs [(x, z), ...]."""
    total, count = 0, None
    for x, z in pairs:
        if valid is None:
            valid = torch.ones(x.shape[:-1], dtype=torch.bool)
        rows = hidden_rows(x[valid], z[valid], **how)
        if token_weights is not None:
            rows = rows * token_weights[valid]
        count = valid.sum().clamp(min=1) if num_items is None else num_items
        total = total + rows.sum() / count
    return total / len(pairs)


def kl_loss(student_logits, teacher_logits, valid, count):
    rows = F.kl_div(
        student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    return rows[valid].sum() / count


class Toy(torch.nn.Module):
    """Layers and a head, that hands its signal to the loss as attached models do."""

    def __init__(self, vocab, width, layers=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(vocab, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.head = torch.nn.Linear(width, vocab, bias=False)

    def forward(self, ids, distillation=lambda signal: signal):
        x, states = self.embed(ids), {}
        for i, layer in enumerate(self.layers):
            states[i] = x = x + layer(x).tanh()
        return distillation(DenseSignal(x, self.head.weight, layers=states))
