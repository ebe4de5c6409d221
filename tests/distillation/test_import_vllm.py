"""vLLM's hidden states and prompt_logprobs, as it writes them; imports into the cache, and out of it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from distillation.foreign import V, check_payload, teacher
from distillation.test_import import PLAIN, plain_row
from minitron_kernels.distillation.cache import CachedTeacher, CacheSpec, TeacherCache, TeacherCacheWriter
from minitron_kernels.distillation.cache.import_ import (
    add_all,
    read_distillkit,
    read_vllm_hidden_states,
    read_vllm_prompt_logprobs,
    rms_norm,
)
from minitron_kernels.ops.kl_loss.sparse import sparse_kl_loss


def test_vllm_hidden_states_are_normed(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="vLLM writes safetensors")
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.RMSNorm(16, eps=1e-5)
    torch.nn.init.normal_(norm.weight, generator=generator)
    norm.weight.requires_grad_(False)
    made = []
    for i in range(3):
        hidden = torch.randn(5 + i, 3, 16, generator=generator).bfloat16() * 20
        tokens = torch.randint(0, V, (5 + i,), generator=generator)
        safetensors.save_file({"hidden_states": hidden, "token_ids": tokens}, tmp_path / f"r{i}.safetensors")
        (tmp_path / f"r{i}.safetensors.lock").touch()
        made.append((tokens, hidden))
    for given in (norm, rms_norm(norm.weight, 1e-5)):
        got = list(read_vllm_hidden_states(tmp_path, given, layer_ids=[2, 32, 5], num_layers=32))
        assert len(got) == 3
        for (tokens, payload), (its_tokens, hidden) in zip(got, made, strict=True):
            x = hidden[:, 1].double()
            truth = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
            assert torch.equal(tokens, its_tokens) and payload["hidden"].dtype == torch.bfloat16
            torch.testing.assert_close(payload["hidden"].double(), truth, rtol=2**-8, atol=1e-5)
    one = list(
        read_vllm_hidden_states(tmp_path / "r1.safetensors", norm, layer_ids=[2, 32, 5], num_layers=32)
    )
    assert torch.equal(one[0][1]["hidden"], got[1][1]["hidden"])


def test_vllm_hidden_states_refuse(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="vLLM writes safetensors")
    path, norm = tmp_path / "r.safetensors", torch.nn.RMSNorm(4)

    def refused(message, tensors=None, norm=norm, layers=(1, 2), num_layers=2, kind=ValueError):
        if tensors is not None:
            safetensors.save_file(tensors, path)
        with pytest.raises(kind, match=message):
            list(read_vllm_hidden_states([path], norm, layer_ids=layers, num_layers=num_layers))

    good = {"hidden_states": torch.ones(3, 2, 4), "token_ids": torch.tensor([1, 2, 3])}
    refused("there is no such file")
    refused("norm must be the teacher's final norm", good, norm=None, kind=TypeError)
    refused(r"layer_ids \[1, 2\] do not have 36", good, num_layers=36)
    refused("has 2 layers, and layer_ids .* are 3", good, layers=(0, 1, 2))
    refused("must have hidden_states and token_ids", {"hidden": torch.ones(2)})
    refused("must be", good | {"token_ids": torch.tensor([1, 2])})
    refused("must be", good | {"hidden_states": torch.ones(3, 4)})
    nan = torch.ones(3, 2, 4)
    nan[1, 1, 2] = math.nan
    refused("must be finite; position 1 is not", good | {"hidden_states": nan})
    refused("norm must keep the shape", good, norm=lambda x: x[:, :2])
    refused(
        "has no token",
        {"hidden_states": torch.ones(0, 2, 4), "token_ids": torch.tensor([], dtype=torch.long)},
    )
    safetensors.save_file(good, path)
    path.write_bytes(path.read_bytes()[:-8])
    refused("is damaged, or not safetensors")
    fcntl = pytest.importorskip("fcntl", reason="locks of files are those of POSIX")
    safetensors.save_file(good, path)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("is still being written")
    assert list(read_vllm_hidden_states([path], norm, layer_ids=(1, 2), num_layers=2))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        read_vllm_hidden_states(empty, norm, layer_ids=(1, 2), num_layers=2)


def prompt_logprobs(tokens, full, k, form):
    """As vLLM gives them: the k likeliest and the token itself, which may be among them."""
    entries = [None]
    for t in range(len(tokens) - 1):
        values, ids = full[t].topk(k)
        known = dict(zip(ids.tolist(), values.tolist(), strict=True))
        known.setdefault(int(tokens[t + 1]), float(full[t, tokens[t + 1]]))
        if form == "python":
            entries.append(
                {i: SimpleNamespace(logprob=p, rank=1, decoded_token="x") for i, p in known.items()}
            )
        else:
            entries.append(
                {str(i): {"logprob": p, "rank": 1, "decoded_token": "x"} for i, p in known.items()}
            )
    return entries


@pytest.mark.parametrize("form", ["python", "json"])
def test_vllm_prompt_logprobs(form):
    tokens, full, ids, _ = teacher(6, 20)
    tokens[3] = ids[2, 4]  # one that is among the likeliest
    entries = prompt_logprobs(tokens, full, 20, form)
    request = SimpleNamespace(prompt_token_ids=tokens.tolist(), prompt_logprobs=entries)
    for given in (request, (tokens.tolist(), entries)):
        ((got, payload),) = read_vllm_prompt_logprobs([given], V, tail="rest")
        assert torch.equal(got, tokens) and payload["ids"].shape == (6, 21)
        for t in range(5):
            itself = [] if t == 2 else [int(tokens[t + 1])]
            expected = ids[t].tolist() + itself
            assert payload["ids"][t].tolist() == expected + [-1] * (21 - len(expected))
        known = payload["ids"][:5].clamp_min(0)
        logprobs = torch.where(payload["ids"][:5] < 0, -math.inf, full[:5].gather(-1, known))
        check_payload(payload, payload["ids"][:5], logprobs, rows=5)
    ((_, payload),) = read_vllm_prompt_logprobs([request], V, tail="renormalise")
    assert (payload["log_tail"][:5] == -math.inf).all() and payload["log_tail"][5] == 0


def test_vllm_prompt_logprobs_refuse():
    tokens, full, _, _ = teacher(4, 5)
    entries = prompt_logprobs(tokens, full, 5, "json")
    with pytest.raises(ValueError, match=r"tail must be .*got None.*at most 20 tokens"):
        read_vllm_prompt_logprobs([(tokens, entries)], V)

    def refused(message, entries=entries, tokens=tokens, vocab_size=V):
        with pytest.raises(ValueError, match=f"request 1.*{message}"):
            list(read_vllm_prompt_logprobs([good, (tokens, entries)], vocab_size, tail="rest"))

    good = (tokens, entries)
    refused("has no prompt_logprobs", None)
    refused("of 3 tokens for 4 token ids", entries[1:])
    refused("None or nothing for the first", [entries[1], *entries[1:]])
    refused(r"token 2: must have \{token id", [*entries[:2], None, entries[3]])
    refused("token 2: must have", [*entries[:2], {"a": -1.0}, entries[3]])
    refused("token 2: must have", [*entries[:2], {"1": {}}, entries[3]])
    refused("at most 0 and not NaN; got nan at position 1", [*entries[:2], {1: math.nan}, entries[3]])
    refused("at most 0 and not NaN; got 0.5 at position 1", [*entries[:2], {1: 0.5}, entries[3]])
    refused(r"ids must be in .* got 151936 at position 2", [*entries[:3], {V: -0.5}])
    # -inf, as vLLM's server writes it, is dropped
    ((_, payload),) = read_vllm_prompt_logprobs([([1, 2], [None, {5: -0.1, 6: -9999.0}])], V, tail="rest")
    assert payload["ids"].tolist() == [[5, -1], [-1, -1]]


# into the cache


@pytest.mark.parametrize("tool", ["distillkit", "vllm_prompt_logprobs", "vllm_hidden_states"])
def test_imports_go_into_the_cache_and_come_out(tool, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="vLLM writes safetensors")
    common = {"vocab_size": V, "teacher": f"captured by {tool}"}
    made = [teacher(6 + seed, 7, seed) for seed in range(3)]
    if tool == "vllm_hidden_states":
        hidden = [torch.randn(len(tokens), 2, 16).bfloat16() for tokens, *_ in made]
        for i, (tokens, *_) in enumerate(made):
            tensors = {"hidden_states": hidden[i], "token_ids": tokens}
            safetensors.save_file(tensors, tmp_path / f"{i}.safetensors")
        norm = rms_norm(torch.full((16,), 2.0), 1e-6)
        rows = list(read_vllm_hidden_states(tmp_path, norm, layer_ids=[3, 4], num_layers=4))
        spec = CacheSpec(tier="hidden", hidden_size=16, **common)
    elif tool == "distillkit":
        rows = list(read_distillkit([plain_row(seed, T=6 + seed)[0] for seed in range(3)], PLAIN))
        spec = CacheSpec(tier="topk", k=7, **common)
    else:
        pairs = [(tokens, prompt_logprobs(tokens, full, 7, "json")) for tokens, full, *_ in made]
        rows = list(read_vllm_prompt_logprobs(pairs, V, tail="rest"))
        spec = CacheSpec(tier="topk", k=8, **common)
    with TeacherCacheWriter(tmp_path / "cache", spec) as writer:
        assert add_all(writer, rows) == 3
        assert add_all(writer, rows) == 0
    cache = TeacherCache(tmp_path / "cache")
    for tokens, payload in rows:
        found = cache.row(tokens)
        if tool == "vllm_hidden_states":
            assert torch.equal(found["hidden"], payload["hidden"])
            continue
        k = found["ids"].shape[1]
        order = found["ids"].sort(-1)
        expected = payload["ids"].sort(-1)
        assert torch.equal(order.values, expected.values[:, -k:])
        got = found["logprobs"].exp().gather(-1, order.indices)
        torch.testing.assert_close(
            got, payload["logprobs"].exp().gather(-1, expected.indices)[:, -k:], atol=0.01, rtol=0.02
        )
        signal = CachedTeacher(cache)({"input_ids": tokens[None]})
        sparse_kl_loss(torch.randn(1, len(tokens), V), signal.ids, signal.logprobs, signal.log_tail)
