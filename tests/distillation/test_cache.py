"""A teacher's cache: what goes in comes out, for any batch of the same tokens; what is damaged is refused."""

import errno
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch

from distillation.cache_rows import TIERS, V, payload_of, same, spec_of, tokens_of, write
from minitron_kernels.distillation.cache.id_sets import pack_id_sets, unpack_id_sets
from minitron_kernels.distillation.cache.quantise import quantiser
from minitron_kernels.distillation.cache.reader import TeacherCache, UncachedError
from minitron_kernels.distillation.cache.sequences import digest, sequences_of
from minitron_kernels.distillation.cache.spec import CacheSpec
from minitron_kernels.distillation.cache.writer import TeacherCacheWriter
from pruning.system_calls import Disk
from tools.crashes import found_by


def filled(folder, tier="topk", numbers=range(6), shard_bytes=1 << 20):
    """A cache of these sequences."""
    with TeacherCacheWriter(folder, spec_of(tier), shard_bytes=shard_bytes) as writer:
        write(writer, numbers, tier)
    return TeacherCache(folder)


def shards_of(folder):
    return sorted(folder.glob("*.safetensors"))


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


@pytest.mark.parametrize("tier", TIERS)
def test_every_changed_byte_is_found(tmp_path, tier):
    folder = tmp_path / "c"
    cache = filled(folder, tier, range(3))
    (path,) = shards_of(folder)
    whole = path.read_bytes()
    for at in [*range(0, 8), *range(8, len(whole), 5), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name):
            cache.verify()
        with pytest.raises(ValueError, match=path.name):  # and without verify(), by those who read all
            fresh = TeacherCache(folder)
            for n in range(3):
                fresh.row(tokens_of(n))
    path.write_bytes(whole)
    cache.verify()


def test_what_is_not_a_whole_shard_of_this_cache_is_refused(tmp_path):
    folder = tmp_path / "c"
    cache = filled(folder)
    filled(folder, numbers=range(6, 9))
    filled(tmp_path / "topk", numbers=range(3))
    with TeacherCacheWriter(tmp_path / "other", spec_of("topk", teacher="another")) as writer:
        write(writer, range(3), "topk")
    first, second = shards_of(folder)
    (alike,), (other,) = shards_of(tmp_path / "topk"), shards_of(tmp_path / "other")
    whole = first.read_bytes()

    def refused(path, message):
        with pytest.raises(ValueError, match=message) as caught:
            TeacherCache(folder).verify()
        assert path.name in str(caught.value)
        with pytest.raises(ValueError, match=message):  # nor does a writer go on behind it
            TeacherCacheWriter(folder, spec_of("topk"))

    for size in (0, 5, 8, 300, len(whole) - 1):
        first.write_bytes(whole[:size])
        refused(first, "few|header|bytes")
    first.write_bytes(whole + b"x")
    refused(first, "bytes")
    first.write_bytes(second.read_bytes())
    refused(first, f"is the shard {second.name} under another name")
    first.write_bytes(other.read_bytes())
    refused(first, "belongs to a cache of another spec")
    first.write_bytes(whole)
    shutil.copy(alike, folder)  # a shard of a cache of the same spec may be moved here
    cache.verify()
    copy = folder / "copy.safetensors"
    shutil.copy(first, copy)
    with pytest.raises(ValueError, match=r"copy\.safetensors: is not a shard"):
        TeacherCache(folder).verify()
    copy.unlink()
    foreign = folder / "rows-0123456789ab-000000.safetensors"
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, foreign)
    refused(foreign, "is not a shard of a teacher's cache")
    foreign.unlink()
    (folder / "README.md").write_text("other files are left alone")
    cache.verify()


def test_a_shard_that_changes_under_a_reader(tmp_path):
    cache = filled(tmp_path / "c")
    cache.row(tokens_of(1))
    (path,) = shards_of(tmp_path / "c")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{path.name}.*changed"):
        cache.row(tokens_of(1))
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}.*cannot be read"):
        cache.row(tokens_of(1))


def test_readers_read_the_files_that_safetensors_reads(tmp_path):
    """The format is safetensors' own: their package reads the same tensors."""
    from safetensors import safe_open

    filled(tmp_path / "c", "hidden")
    (path,) = shards_of(tmp_path / "c")
    with safe_open(path, "pt") as file:
        assert file.get_tensor("index.digest")[0].numpy().tobytes() == digest(tokens_of(0))
        assert torch.equal(
            file.get_tensor("hidden")[: len(tokens_of(0))], payload_of(tokens_of(0), "hidden")["hidden"]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "another"}, "teacher 'a teacher' and not 'another'"),
        ({"vocab_size": 97}, "vocab_size 96 and not 97"),
        ({"temperatures": (1.0,)}, "temperatures"),
        ({"k": 6}, "k 5 and not 6"),
    ],
)
def test_writing_with_another_spec_is_refused(tmp_path, change, message):
    filled(tmp_path / "c")
    with pytest.raises(ValueError, match=message):
        TeacherCacheWriter(tmp_path / "c", spec_of("topk", **change))


def test_folders_that_are_not_a_cache(tmp_path):
    with pytest.raises(ValueError, match="is not a folder; it is not a teacher's cache"):
        TeacherCache(tmp_path / "none")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no cache\.json"):
        TeacherCache(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no cache\.json but 'config\.json'"):
        TeacherCacheWriter(tmp_path / "model", spec_of("topk"))
    filled(tmp_path / "c")
    path = tmp_path / "c" / "cache.json"
    good = json.loads(path.read_text())
    for change, message in [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "is not that of"),
        ({"spec": {**good["spec"], "colour": 1}}, "colour"),
        ({"spec": {**good["spec"], "k": 0}}, "damaged: k must be"),
        ({"spec": {"tier": "topk"}}, "damaged"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            TeacherCache(tmp_path / "c")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"cache\.json"):
        TeacherCache(tmp_path / "c")


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


def test_the_disk_fails_at_any_call(tmp_path, monkeypatch):
    """Whatever call of the system fails: an error that names the cache, and nothing half-written in it."""
    at = 0
    while True:
        folder = tmp_path / str(at) / "c"
        with monkeypatch.context() as patch:
            disk = Disk(tmp_path, fail_at=at, error=errno.ENOSPC if at % 2 else errno.EACCES).patch(patch)
            failed = None
            try:
                with TeacherCacheWriter(folder, spec_of("topk"), shard_bytes=600) as writer:
                    write(writer, range(4), "topk")
            except (OSError, ValueError) as error:
                failed = error
        if at >= len(disk.calls):
            break
        if isinstance(failed, ValueError):  # of a file that cannot be read
            assert str(folder) in str(failed) and disk.calls[at].name in ("open", "preadv", "close"), (
                disk.calls[at]
            )
        elif failed is not None:
            assert str(tmp_path) in str(failed.filename), disk.calls[at]
            assert "could not be written" in str(failed) or disk.calls[at].name == "preadv", disk.calls[at]
        if (folder / "cache.json").exists():
            TeacherCache(folder).verify()
        with TeacherCacheWriter(folder, spec_of("topk")) as writer:  # the same call goes on from there
            write(writer, range(4), "topk")
        assert TeacherCache(folder).verify().sequences == 4
        assert all(path.suffix in (".json", ".safetensors") for path in folder.iterdir())
        at += 1
    assert at > 20


def test_flush_tries_again_after_a_full_disk(tmp_path, monkeypatch):
    writer = TeacherCacheWriter(tmp_path / "c", spec_of("topk"))
    write(writer, range(4), "topk")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
        with pytest.raises(OSError, match="free some space") as caught:
            writer.flush()
    assert caught.value.errno == errno.ENOSPC and caught.value.filename.endswith(".safetensors")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["cache.json"]
    writer.flush()
    assert TeacherCache(tmp_path / "c").verify().sequences == 4


def test_an_error_in_the_loop_keeps_what_was_added(tmp_path):
    with (
        pytest.raises(RuntimeError, match="mine"),
        TeacherCacheWriter(tmp_path / "c", spec_of("topk")) as writer,
    ):
        write(writer, range(3), "topk")
        raise RuntimeError("mine")
    assert len(TeacherCache(tmp_path / "c")) == 3


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    disk = Disk(tmp_path).patch(monkeypatch)
    filled(tmp_path / "c")
    names = [(call.name, Path(call.path).name) for call in disk.calls]
    at = next(i for i, call in enumerate(disk.calls) if call.name == "rename")
    temporary = names[at][1]
    assert disk.calls[at].target.endswith(".safetensors")
    assert names[at - 1] == ("fsync", temporary)
    assert max(i for i, name in enumerate(names[:at]) if name == ("pwrite", temporary)) < at - 1
    assert ("fsync", "c") in names[at:]


def test_only_what_a_dead_writer_left_is_removed(tmp_path):
    folder = tmp_path / "c"
    filled(folder)
    dead, live = (folder / f".minitron-cache-{i:016x}.tmp" for i in range(2))
    other = folder / ".minitron-cache-thesis.tmp"
    for path in (dead, live, other):
        path.write_text("x")
    with open(live) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        TeacherCacheWriter(folder, spec_of("topk"))
        assert not dead.exists() and live.exists() and other.exists()
    TeacherCacheWriter(folder, spec_of("topk"))
    assert not live.exists() and other.exists()


class Rows(torch.utils.data.Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return 12

    def __getitem__(self, n):
        return n, self.cache.lookup(tokens_of(n)[None])


def test_many_readers(tmp_path):
    cache = filled(tmp_path / "c", "topk", range(12), shard_bytes=1500)
    again = pickle.loads(pickle.dumps(cache))  # as a spawned worker gets it
    assert same(again.row(tokens_of(3)), payload_of(tokens_of(3), "topk"))
    cache.row(tokens_of(0))  # opened before the fork
    loader = torch.utils.data.DataLoader(
        Rows(cache), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    seen = [
        (n, same({k: x[0] for k, x in rows.items()}, payload_of(tokens_of(n), "topk"))) for n, rows in loader
    ]
    assert sorted(seen) == [(n, True) for n in range(12)]


def test_killed_at_any_moment_and_many_writers(tmp_path):
    found = found_by("distillation.cache_crash_runs", tmp_path)
    assert found["killed"] >= 100 and found["temporaries"] > 20 and found["at a shard"] > 2, found
    assert found["writers"] == 3 and found["reads"] > 3, found
