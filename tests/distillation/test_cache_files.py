"""The files of a cache: damaged ones are refused, faults of disks and kills lose nothing that is whole."""

import errno
import fcntl
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from distillation.cache_rows import TIERS, filled, payload_of, same, shards_of, spec_of, tokens_of, write
from minitron_kernels.distillation.cache.reader import TeacherCache
from minitron_kernels.distillation.cache.sequences import digest
from minitron_kernels.distillation.cache.writer import TeacherCacheWriter
from pruning.system_calls import Disk
from tools.crashes import found_by


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


def test_a_shard_that_was_deleted_is_missed(tmp_path):
    """Whichever of a writer's shards it is, the last too, until its sequences are in another shard."""
    folder = tmp_path / "c"
    cache = filled(folder, numbers=range(6), shard_bytes=1)
    assert not cache.verify().lost
    assert len(shards_of(folder)) == 6
    for path in shards_of(folder):
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=f"{path.name}: is gone, with 1 sequence that"):
            TeacherCache(folder).verify()
        (line,) = TeacherCache(folder).summary().lost
        assert path.name in line and f"  not whole: {line}" in str(TeacherCache(folder).summary())
        path.write_bytes(whole)
    path.unlink()
    filled(folder, numbers=range(6))
    assert TeacherCache(folder).verify().sequences == 6
    listed = path.with_suffix(".json")
    listed.write_text("{}")
    with pytest.raises(ValueError, match=f"{listed.name}: is damaged"):
        TeacherCache(folder).verify()


def test_the_list_of_a_shard_is_written_after_a_full_disk(tmp_path, monkeypatch):
    """The shard is there, and is not written twice."""
    writer = TeacherCacheWriter(tmp_path / "c", spec_of("topk"))
    write(writer, range(4), "topk")
    rename, left = os.rename, [1]

    def once(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space")
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", once)
        with pytest.raises(OSError, match="free some space"):
            writer.flush()
    (path,) = shards_of(tmp_path / "c")
    assert TeacherCache(tmp_path / "c").verify().sequences == 4  # a shard without a list is whole
    assert not path.with_suffix(".json").exists()
    writer.flush()
    assert shards_of(tmp_path / "c") == [path] and path.with_suffix(".json").exists()


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
