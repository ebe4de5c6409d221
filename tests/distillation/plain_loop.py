"""Ragged micro-batches of a tiny model, and what training on them as one batch is in plain PyTorch."""

import copy

import torch
import torch.nn.functional as F

from pruning.tiny_models import tiny_model

KL, CE = 0.8, 0.3


def models(dtype=torch.float32):
    """(student, teacher) of the same vocabulary and other widths."""
    student = tiny_model("llama", seed=1, num_hidden_layers=1, dtype=dtype)
    return student, tiny_model("llama", seed=2, num_hidden_layers=1, hidden_size=32, dtype=dtype)


def ragged(count, *, seed=0, empty=()):
    """Micro-batches [2, T] of other lengths, padded, with other shares of labels; those of `empty` none."""
    g = torch.Generator().manual_seed(seed)
    batches = []
    for i in range(count):
        T = 5 + 4 * (i % 3)
        ids = torch.randint(3, 96, (2, T), generator=g)
        mask = torch.ones_like(ids)
        mask[1, T - 1 - i % 2 :] = 0
        labels = ids.masked_fill((torch.rand(ids.shape, generator=g) < 0.2 * i) | (mask == 0), -100)
        labels[0, 2] = ids[0, 2]
        if i in empty:
            labels[:] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def plain_step(student, teacher, batches):
    """Gradients of the mean over all tokens of all batches by name, and the means (kl, ce, tokens)."""
    student = copy.deepcopy(student)
    student.zero_grad()
    kl = ce = count = 0
    for batch in batches:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        s = student(**inputs).logits[:, :-1].log_softmax(-1)
        with torch.no_grad():
            t = teacher(**inputs).logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        valid = labels != -100
        kl = kl + F.kl_div(s, t, reduction="none", log_target=True).sum(-1)[valid].sum()
        ce = ce + F.nll_loss(s[valid], labels[valid], reduction="sum")
        count += int(valid.sum())
    ((KL * kl + CE * ce) / count).backward()
    grads = {name: p.grad for name, p in student.named_parameters()}
    return grads, (kl.item() / count, ce.item() / count, count)


def check_gradients(actual, expected, rtol=2e-5):
    """By name; each tensor's error within rtol of its norm."""
    assert set(actual) == set(expected)
    for name, grad in expected.items():
        error = (actual[name] - grad).norm() / grad.norm()
        assert error <= rtol, f"{name}: {error}"
