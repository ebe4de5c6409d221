"""A teacher's cache: what goes in comes out, for any batch of the same tokens."""

import hashlib
import struct

import pytest
import torch

from distillation.cache_rows import TIERS, V, filled, payload_of, same, shards_of, spec_of, tokens_of, write
from minitron_kernels.distillation.cache.id_sets import pack_id_sets, unpack_id_sets
from minitron_kernels.distillation.cache.quantise import quantiser
from minitron_kernels.distillation.cache.reader import TeacherCache, UncachedError
from minitron_kernels.distillation.cache.sequences import digest, sequences_of
from minitron_kernels.distillation.cache.spec import CacheSpec
from minitron_kernels.distillation.cache.writer import TeacherCacheWriter


@pytest.mark.parametrize("tier", TIERS)
def test_what_goes_in_comes_out(tmp_path, tier):
    cache = filled(tmp_path / "c", tier, range(20), shard_bytes=300)
    assert len(shards_of(tmp_path / "c")) > 3
    assert len(cache) == 20 and cache.tokens == sum(len(tokens_of(n)) for n in range(20))
    for n in range(20):
        assert same(cache.row(tokens_of(n)), payload_of(tokens_of(n), tier))
    summary = cache.verify()
    assert (summary.sequences, summary.shards) == (20, len(shards_of(tmp_path / "c")))
    assert summary.nbytes == sum(path.stat().st_size for path in shards_of(tmp_path / "c"))
    assert f"{summary.tokens} tokens" in str(summary) and tier in str(summary)
    with TeacherCacheWriter(tmp_path / "c", spec_of(tier)) as writer:  # what is there is not added again
        assert write(writer, range(15, 25), tier) == 5 and tokens_of(3) in writer
    assert len(cache) == 20
    cache.refresh()
    assert len(cache) == 25


@pytest.mark.parametrize("vocab_size", [1, 2, 37, 1 << 17])
@pytest.mark.parametrize("most", [0, 1, 5, 130])
def test_sets_of_ids(vocab_size, most):
    generator = torch.Generator().manual_seed(most)
    k = torch.randint(0, min(most, vocab_size) + 1, (9,), generator=generator)
    sets = [torch.randperm(vocab_size, generator=generator)[:n].sort().values for n in k]
    sets[0][: len(sets[0])] = torch.arange(vocab_size - len(sets[0]), vocab_size)  # the last ones
    ids = torch.cat(sets)
    data = pack_id_sets(ids, k, vocab_size)
    assert torch.equal(unpack_id_sets(data, k, vocab_size), ids)
    for damaged in (data[:-1], torch.cat((data, data[:1])), data[:0]):
        with pytest.raises(ValueError, match="damaged"):
            unpack_id_sets(damaged, k, vocab_size)


@pytest.mark.parametrize(("tier", "most"), [("sampled", 36), ("topk", 330), ("hidden", 2 * 64 + 3)])
def test_bytes_a_token(tmp_path, tier, most):
    """Of a vocabulary of 131072, as documented: 12 draws, 128 ids with their tail, 2 H of hidden states."""
    big, T = 1 << 17, 256
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, big, (T,), generator=generator)
    ids = torch.randint(0, big // 128, (T, 128), generator=generator) + torch.arange(128) * (big // 128)
    log_p = (torch.randn(T, 129, generator=generator) * 3).log_softmax(-1)
    options, payload = {
        "sampled": (
            {"k": 12, "samples": 12},
            {"ids": ids[:, :12], "counts": torch.ones(T, 12, dtype=torch.int64)},
        ),
        "topk": ({"k": 128}, {"ids": ids, "logprobs": log_p[:, :128], "log_tail": log_p[:, 128]}),
        "hidden": ({"hidden_size": 64}, {"hidden": torch.randn(T, 64, generator=generator)}),
    }[tier]
    spec = CacheSpec(tier, big, "a teacher", **options)
    with TeacherCacheWriter(tmp_path / "c", spec) as writer:
        for n in range(16):
            tokens[0] = n
            writer.add(tokens, payload)
    summary = TeacherCache(tmp_path / "c").verify()
    assert summary.tokens == 16 * T and most * 0.85 < summary.bytes_per_token < most


@pytest.mark.parametrize("name", ["log8", "log12", "fp16"])
def test_log_probabilities_are_as_near_as_the_quantiser_says(tmp_path, name):
    spec, tokens = spec_of("topk", quantiser=name), tokens_of(3)
    payload = payload_of(tokens, "topk")
    with TeacherCacheWriter(tmp_path / "c", spec) as writer:
        writer.add(tokens, payload)
    got = TeacherCache(tmp_path / "c").row(tokens)
    order = torch.where(payload["ids"] >= 0, payload["ids"], V).argsort(dim=1)
    want = payload["logprobs"].gather(1, order)[:, : got["ids"].shape[1]]
    off = torch.where(got["ids"] >= 0, (got["logprobs"] - want).abs(), 0)
    assert bool((off <= 2 * quantiser(name).error_at(want.clamp(-40, 0)) + 1e-6).all()) and off.max() > 0
    total = got["logprobs"].exp().sum(1) + got["log_tail"][:, 0].exp()
    assert torch.allclose(total, torch.ones(len(tokens)), atol=1e-6)
    assert torch.equal(got["log_tail"], payload["log_tail"])


def test_the_key_is_sha256_of_the_ids():
    tokens = torch.tensor([3, 1 << 40, 70000])
    assert digest(tokens) == hashlib.sha256(struct.pack("<3q", *tokens.tolist())).digest()
    assert digest(tokens[:2].int() * 0) == hashlib.sha256(bytes(16)).digest()


def packed(sequences):
    return {
        "input_ids": torch.cat(sequences)[None],
        "position_ids": torch.cat([torch.arange(len(s)) for s in sequences])[None],
    }


def padded(sequences, side, pad=7):
    T = max(map(len, sequences)) + 2
    ids, mask = torch.full((len(sequences), T), pad), torch.zeros(len(sequences), T, dtype=torch.int64)
    for row, s in enumerate(sequences):
        at = slice(0, len(s)) if side == "right" else slice(T - len(s), T)
        ids[row, at], mask[row, at] = s, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("tier", TIERS)
def test_any_batch_of_the_same_tokens_finds_the_same_rows(tmp_path, tier):
    cache = filled(tmp_path / "c", tier)
    sequences = [tokens_of(n) for n in (4, 0, 3)]
    want = [payload_of(s, tier) for s in sequences]
    for batch in (
        padded(sequences, "right"),
        padded(sequences, "left"),
        packed(sequences),
        {**packed(sequences), "cu_seq_lens_q": torch.tensor([0, *map(len, sequences)]).cumsum(0).int()},
        {
            **packed(sequences),
            "seq_idx": torch.arange(3).repeat_interleave(torch.tensor([*map(len, sequences)]))[None],
        },
    ):
        got = cache.lookup(**batch)
        assert all(x.shape[:2] == batch["input_ids"].shape for x in got.values())
        seen = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        for found, payload in zip(sequences_of(batch), want, strict=True):
            at = found.row, slice(found.begin, found.end)
            assert same({name: x[at] for name, x in got.items()}, payload)
            seen[at] = True
        if "ids" in got:
            assert bool((got["ids"][~seen] == -1).all())
        assert cache.missing(batch) == []


def test_left_padding_with_its_positions():
    batch = padded([tokens_of(5), tokens_of(2)], "left")
    T = batch["input_ids"].shape[1]
    for positions in ((batch["attention_mask"].cumsum(1) - 1).clamp(min=1), torch.arange(T)[None]):
        if positions.shape[0] == 2:  # as generate() makes them: 1 at padding
            positions = torch.where(batch["attention_mask"] == 1, batch["attention_mask"].cumsum(1) - 1, 1)
        found = sequences_of({**batch, "position_ids": positions})
        assert [s.tokens.tolist() for s in found] == [tokens_of(5).tolist(), tokens_of(2).tolist()]


def test_other_tokens_find_nothing(tmp_path):
    cache = filled(tmp_path / "c")
    whole = tokens_of(5)
    assert whole in cache
    for other in (whole[:-1], torch.cat((whole, torch.tensor([0]))), whole.flip(0)):
        with pytest.raises(
            UncachedError, match=rf"row 0 .*{len(other)} tokens \[.*{digest(other).hex()[:16]}"
        ):
            cache.lookup(other[None])
    assert [s.row for s in cache.missing({"input_ids": torch.stack((whole, whole + 1))})] == [1]
    with pytest.raises(UncachedError, match="attention_mask"):  # padding that is not marked
        cache.lookup(padded([whole], "right")["input_ids"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(1)}, "pixel_values"),
        ({"token_type_ids": torch.zeros(2, 4)}, "token_type_ids"),
        ({"input_ids": torch.zeros(2, 4)}, "input_ids must be int64"),
        ({"input_ids": [[1, 2]]}, "input_ids must be a tensor"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, "hole in row 0"),
        ({"attention_mask": torch.tensor([[1, 1, 2, 2], [1, 1, 1, 1]])}, "must be 0 or 1"),
        ({"attention_mask": torch.ones(2, 3)}, "must be .2, 4."),
        ({"position_ids": torch.tensor([[0, 1, 3, 4]])}, "slot 2 of row 0 with position 3"),
        ({"position_ids": torch.tensor([[5, 6, 7, 8]])}, "slot 0 of row 0 with position 5"),
        ({"position_ids": torch.zeros(3, 2, 4).long()}, "position_ids must be"),
        (
            {"position_ids": torch.tensor([[0, 1, 0, 1]]), "attention_mask": torch.ones(2, 4)},
            "Leave attention_mask",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 8])}, "without position_ids"),
        (
            {"position_ids": torch.tensor([[0, 1, 0, 1]]), "cu_seq_lens_q": torch.tensor([0, 3, 4, 8])},
            "the same",
        ),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]]), "seq_idx": torch.tensor([[0, 0, 0, 1]])}, "the same"),
    ],
)
def test_a_batch_that_cannot_be_read_by_its_tokens(change, message):
    batch = {"input_ids": torch.arange(8).reshape(2, 4), "labels": None, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        sequences_of(batch)


def test_a_row_of_padding_is_no_sequence():
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]])
    (found,) = sequences_of({"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": mask})
    assert (found.row, found.tokens.tolist()) == (1, [3, 4])
    assert sequences_of({"input_ids": torch.zeros(0, 4, dtype=torch.int64)}) == []


@pytest.mark.parametrize(
    ("tier", "change", "message"),
    [
        ("topk", {"ids": None}, "ids must be a tensor"),
        ("topk", {"ids": torch.full((4, 5), V)}, r"ids must be -1 or in \[0, 96\); got 96 at position 0"),
        ("topk", {"ids": torch.tensor([[0, 1, 2, 3, 3]] * 4)}, "must differ within a position; got 3"),
        ("topk", {"logprobs": torch.full((4, 5), torch.nan)}, "not NaN"),
        ("topk", {"logprobs": torch.zeros(4, 4)}, "differ in shape"),
        ("topk", {"log_tail": torch.zeros(4, 2)}, "must sum to 1"),
        ("topk", {"log_tail": torch.zeros(4)}, "one at each temperature"),
        ("topk", {"log_tail": {1.0: torch.zeros(4)}}, "must have temperatures"),
        ("topk", {"extra": torch.zeros(4)}, "must have ids, logprobs, log_tail"),
        ("sampled", {"counts": torch.zeros(4, 6, dtype=torch.int64)}, "counts must be at least 1"),
        ("sampled", {"ids": torch.full((4, 6), -1)}, "must have sampled ids"),
        ("sampled", {"counts": torch.ones(4, 6)}, "counts must be integers"),
        ("hidden", {"hidden": torch.zeros(4, 9)}, r"must be \[T, 8\]"),
        ("hidden", {"hidden": torch.full((4, 8), torch.inf)}, "must be finite"),
        ("hidden", {"hidden": torch.zeros(3, 8)}, "for the 4 token_ids"),
    ],
)
def test_a_payload_that_is_wrong_is_not_added(tmp_path, tier, change, message):
    tokens = tokens_of(1, 2)
    good = payload_of(tokens, tier)
    with TeacherCacheWriter(tmp_path / "c", spec_of(tier)) as writer:
        with pytest.raises((ValueError, TypeError), match=message):
            writer.add(tokens, {**good, **change})
        with pytest.raises(ValueError, match=r"in \[0, 96\)"):
            writer.add(tokens + 95, good)
        with pytest.raises(TypeError, match="integer"):
            writer.add(tokens.float(), good)
        assert writer.add(tokens, good)
    assert len(TeacherCache(tmp_path / "c")) == 1
