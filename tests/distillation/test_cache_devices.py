"""A cache is on the CPU, wherever new tensors are made by default: with "meta" those show that do not ask."""

from types import SimpleNamespace

import pytest
import torch

from distillation.cache_rows import TIERS, payload_of, same, spec_of, tokens_of
from distillation.foreign import check_payload, teacher
from distillation.test_import import PLAIN, plain_row
from minitron_kernels.distillation.cache import quantise
from minitron_kernels.distillation.cache.import_ import read_distillkit, read_vllm_prompt_logprobs
from minitron_kernels.distillation.cache.outputs import run_teacher
from minitron_kernels.distillation.cache.reader import TeacherCache
from minitron_kernels.distillation.cache.sequences import sequences_of
from minitron_kernels.distillation.cache.writer import TeacherCacheWriter
from minitron_kernels.distillation.signals import DenseSignal

META = torch.device("meta")


@pytest.mark.parametrize("tier", TIERS)
def test_what_goes_in_comes_out(tmp_path, tier):
    sequences = [tokens_of(n) for n in (4, 0, 3)]
    payloads = [payload_of(tokens, tier) for tokens in sequences]
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    batch = {
        "input_ids": torch.cat(sequences)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int())),
        "seq_idx": torch.arange(3).repeat_interleave(lengths)[None],
    }
    with META:
        with TeacherCacheWriter(tmp_path / "c", spec_of(tier)) as writer:
            for tokens, payload in zip(sequences, payloads, strict=True):
                writer.add(tokens, payload)
        cache = TeacherCache(tmp_path / "c")
        assert cache.verify().sequences == 3
        rows, found = cache.lookup(**batch), sequences_of(batch)
    assert len(found) == 3
    for one, payload in zip(found, payloads, strict=True):
        assert same({name: x[0, one.begin : one.end] for name, x in rows.items()}, payload)


@pytest.mark.parametrize("name", ["fp32", "fp16", "log8", "log12"])
def test_quantisers(name):
    x = torch.tensor([[-0.5, -2.0], [-1.0, -torch.inf]])
    tail = (1 - x.exp().sum(1)).log()
    want = quantise.quantiser(name)
    rows = want.sum_to_one(want.decode(want.encode(x)), tail) if name == "fp32" else None
    for cached in (quantise._levels, quantise._made):
        cached.cache_clear()
    with META:  # what is kept from here serves later calls, too
        got = quantise.quantiser(name)
        decoded = got.decode(got.encode(x))
        again = got.sum_to_one(decoded, tail) if name == "fp32" else None
    assert got == want and torch.equal(decoded, want.decode(want.encode(x)))
    assert name != "fp32" or torch.equal(again, rows)


def test_a_teacher_gets_its_ids_where_it_is():
    seen = []

    def run(batch):
        seen.append(batch)
        return DenseSignal(torch.zeros(2, 7, 4, device="cpu"), torch.zeros(9, 4, device="cpu"))

    tokens = [tokens_of(3, 5), tokens_of(4, 3)]
    sequences = [*sequences_of({"input_ids": tokens[0][None]}), *sequences_of({"input_ids": tokens[1][None]})]
    with META:
        run_teacher(run, sequences, torch.device("cpu"))
    (batch,) = seen
    assert batch["input_ids"][1, :5].tolist() == tokens[1].tolist()
    assert batch["attention_mask"].sum(1).tolist() == [7, 5]


def test_captures_of_other_tools():
    row, tokens, ids, logprobs = plain_row()
    its_tokens, _, its_ids, its_logprobs = teacher(6, 3)
    entries = [None] + [
        {int(i): float(x) for i, x in zip(*at, strict=True)}
        for at in zip(its_ids[:5].tolist(), its_logprobs[:5].tolist(), strict=True)
    ]
    request = SimpleNamespace(prompt_token_ids=its_tokens.tolist(), prompt_logprobs=entries)
    with META:
        ((got, payload),) = read_distillkit([row], PLAIN)
        ((its_got, its_payload),) = read_vllm_prompt_logprobs([request], vocab_size=PLAIN["d"], tail="rest")
    assert torch.equal(got, tokens) and torch.equal(its_got, its_tokens)
    check_payload(payload, ids, logprobs, rows=5)
    assert its_payload["ids"].device.type == its_payload["logprobs"].device.type == "cpu"
    order = its_ids[:5].sort(1)
    assert torch.equal(its_payload["ids"][:5].sort(1).values, order.values)
