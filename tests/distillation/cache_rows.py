"""Sequences and payloads for caches, made of a seed; what several tests of the cache share."""

import torch

from minitron_kernels.distillation.cache.reader import TeacherCache
from minitron_kernels.distillation.cache.spec import CacheSpec
from minitron_kernels.distillation.cache.writer import TeacherCacheWriter

V = 96
TIERS = ("sampled", "topk", "hidden")


def spec_of(tier, **changes):
    """A small cache's spec."""
    of_tier = {
        "sampled": {"k": 6, "samples": 60},
        "topk": {"k": 5, "temperatures": (1.0, 2.0), "quantiser": "fp32"},
        "hidden": {"hidden_size": 8, "num_layers": 3},
    }[tier]
    return CacheSpec(**{"tier": tier, "vocab_size": V, "teacher": "a teacher", **of_tier, **changes})


def tokens_of(number, length=None):
    """The sequence of this number; its first token alone makes it different from others."""
    generator = torch.Generator().manual_seed(number)
    length = 1 + number % 9 if length is None else length
    tokens = torch.randint(0, V, (length,), generator=generator)
    return torch.cat((torch.tensor([number // V, number % V]), tokens))


def payload_of(tokens, tier):
    """A payload that only the tokens decide."""
    generator = torch.Generator().manual_seed(int((tokens * torch.arange(1, len(tokens) + 1)).sum()))
    T = len(tokens)
    if tier == "hidden":
        return {"hidden": torch.randn(T, 8, generator=generator).bfloat16()}
    logits = torch.randn(T, V, generator=generator) * 2
    log_p = logits.log_softmax(-1)
    if tier == "sampled":
        ids = log_p.topk(6).indices
        counts = torch.randint(1, 9, (T, 6), generator=generator)
        ids[::2, 4:], counts[::2, 4:] = -1, 0  # fewer ids at some positions
        return {"ids": ids, "counts": counts}
    logprobs, ids = log_p.topk(5)
    ids[::3, 3:] = -1
    logprobs[::3, 3:] = -torch.inf
    rest = log_p.clone()
    for row in range(T):
        rest[row, ids[row][ids[row] >= 0]] = -torch.inf
    tail = torch.stack([(rest / t).logsumexp(-1) for t in (1.0, 2.0)], 1)
    return {"ids": ids, "logprobs": logprobs, "log_tail": tail}


def write(writer, numbers, tier):
    """Adds sequences; how many were new."""
    return sum(writer.add(tokens_of(n), payload_of(tokens_of(n), tier)) for n in numbers)


def same(got, want):
    """Whether a payload that was read is what was written; a position's ids come back ascending."""
    if set(got) != set(want):
        return False
    if "ids" not in want:
        return all(torch.equal(got[name], x) for name, x in want.items())
    ids, order = torch.where(want["ids"] >= 0, want["ids"], V).sort(dim=1)
    shown, wide = ids < V, got["ids"].shape[1]
    if bool(shown[:, wide:].any()) or bool((got["ids"][:, shown.shape[1] :] != -1).any()):
        return False
    shown = shown[:, :wide]
    if not torch.equal(got["ids"][:, : shown.shape[1]] >= 0, shown):
        return False
    for name, x in want.items():
        if name == "log_tail":
            equal = torch.equal(got[name], x)
        else:
            y = got[name][:, : shown.shape[1]]
            equal = torch.equal(x.gather(1, order)[:, :wide][shown].to(y.dtype), y[shown])
        if not equal:
            return False
    return True


def filled(folder, tier="topk", numbers=range(6), shard_bytes=1 << 20):
    """A cache of these sequences."""
    with TeacherCacheWriter(folder, spec_of(tier), shard_bytes=shard_bytes) as writer:
        write(writer, numbers, tier)
    return TeacherCache(folder)


def shards_of(folder):
    return sorted(folder.glob("*.safetensors"))
