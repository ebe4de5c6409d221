"""prune_checkpoint() killed, taken up again, short of disk, or two at once: dst is complete, or not there."""

import errno
import fcntl
import os
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch

from minitron_kernels.pruning.checkpoint import prune, staging
from minitron_kernels.pruning.checkpoint.prune import prune_checkpoint
from pruning.checkpoints import plan_for, save_tiny, snapshot
from tools.crashes import found_by

SHARD = {"max_shard_bytes": 10_000, "threads": 1, "progress": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    model = save_tiny(folder / "src", dtype=torch.bfloat16, shard_bytes="30KB")
    plan = plan_for(model.config)
    plan.save(folder / "plan.json")
    return folder, plan


@pytest.mark.parametrize(("kind", "runs"), [("steps", 0), ("overwrite-steps", 0), ("times", 10)])
def test_killed_at_any_moment(source, tmp_path, kind, runs):
    folder, _ = source
    arguments = [folder / "src", folder / "plan.json", tmp_path / "dst", kind, runs]
    found = found_by("pruning.crash_runs", *arguments)
    if kind == "times":
        assert found["killed"] == runs > 0, found
    else:
        # each kill was one, before and after the rename, and with finished files to go on from
        assert found["killed"] == found["steps"] > 25 and found["new"] > 0 and found["kept"] > 5


def test_all_is_on_the_disk_before_it_has_its_name(source, tmp_path, monkeypatch):
    """What a power failure would show, and a kill does not: the order of fsync and rename."""
    folder, plan = source
    events = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(fd):
        events.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def note_rename(one, other):
        partial = Path(one)
        there = {str(path) for path in [partial, *partial.rglob("*")]}
        assert there <= set(events) and len(there) > 10
        events.append("renamed")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    done = prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)
    assert events.count("renamed") == 1 and events[-1] == str(tmp_path)
    partial = tmp_path / ".dst.partial"
    journal = [place for place, name in enumerate(events) if name == str(partial / "journal.jsonl")]
    assert len(journal) == 1 + len(done.files)
    for place, name in zip(journal[1:], done.files, strict=True):
        assert events[place - 2 : place] == [str(partial / "checkpoint" / name), str(partial / "checkpoint")]


def count_written(monkeypatch):
    """Bytes that went through os.pwrite into safetensors files."""
    written = []
    pwrite = os.pwrite

    def counting(fd, data, place):
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            written.append(len(data))
        return pwrite(fd, data, place)

    monkeypatch.setattr(os, "pwrite", counting)
    return written


class Full:
    """A disk that becomes full after `calls` calls of os.<name>."""

    def __init__(self, monkeypatch, name, calls):
        self.left, self.call = calls, getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.call(*args, **kwargs)


@pytest.mark.parametrize(
    ("call", "calls"), [("pwrite", 12), ("pwrite", 0), ("posix_fallocate", 2), ("fsync", 9)]
)
def test_a_disk_that_becomes_full(source, tmp_path, monkeypatch, call, calls):
    folder, plan = source
    before = snapshot(folder / "src")
    with monkeypatch.context() as patch:
        Full(patch, call, calls)
        with pytest.raises(OSError, match="free some space; the finished files are kept") as caught:
            prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)
    assert caught.value.errno == errno.ENOSPC and "dst.partial" in caught.value.filename
    assert snapshot(folder / "src") == before and not (tmp_path / "dst").exists()
    partial = tmp_path / ".dst.partial"
    kept = len(list((partial / "checkpoint").iterdir())) if partial.exists() else 0
    assert kept == {"pwrite": 0 if calls == 0 else kept, "posix_fallocate": 2, "fsync": kept}[call]
    done = prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)
    assert len(done.resumed_files) == kept and (kept > 0) == (calls > 0)
    prune_checkpoint(folder / "src", tmp_path / "whole", plan, **SHARD)
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "whole"]


def bytes_of(folder):
    return {name: content for name, (content, _) in snapshot(folder).items()}


def interrupted(source, dst, monkeypatch, finished=3, **options):
    """A call that ends after `finished` shards, and the bytes it kept."""
    folder, plan = source
    with monkeypatch.context() as patch:
        Full(patch, "posix_fallocate", finished)
        with pytest.raises(OSError, match="free some space"):
            prune_checkpoint(folder / "src", dst, plan, **{**SHARD, **options})
    partial = staging.partial_path(dst) / "checkpoint"
    return {path.name: path for path in sorted(partial.iterdir())}


def test_a_second_call_writes_only_what_is_missing(source, tmp_path, monkeypatch):
    folder, plan = source
    kept = interrupted(source, tmp_path / "dst", monkeypatch)
    sizes = {name: path.stat().st_size for name, path in kept.items()}
    written = count_written(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)
    assert done.resumed_files == tuple(kept) and len(kept) == 3
    total = sum((tmp_path / "dst" / name).stat().st_size for name in done.files)
    assert sum(written) == total - sum(sizes.values())


@pytest.mark.parametrize("damage", ["bit", "header", "short", "gone"])
def test_a_finished_file_that_was_damaged_is_written_again(source, tmp_path, monkeypatch, damage):
    folder, plan = source
    kept = interrupted(source, tmp_path / "dst", monkeypatch)
    name, path = list(kept.items())[1]
    content = bytearray(path.read_bytes())
    if damage in ("bit", "header"):
        content[-5 if damage == "bit" else 20] ^= 64
        path.write_bytes(content)
    elif damage == "short":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    done = prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)
    assert name not in done.resumed_files and len(done.resumed_files) == 2
    prune_checkpoint(folder / "src", tmp_path / "whole", plan, **SHARD)
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("change", ["plan", "shards", "weights", "tokenizer", "gains"])
def test_what_another_job_left_is_cleared(source, tmp_path, monkeypatch, change):
    folder, plan = source
    shutil.copytree(folder, tmp_path / "in")
    source = (tmp_path / "in", plan)
    interrupted(source, tmp_path / "dst", monkeypatch)
    options = dict(SHARD)
    if change == "plan":
        plan = plan_for(save_tiny(tmp_path / "other", dtype=torch.bfloat16).config, seed=1)
    elif change == "shards":
        options["max_shard_bytes"] = 12_000
    elif change == "gains":
        options["rescale_norms"] = False
    else:
        name = "tokenizer.json" if change == "tokenizer" else "model-00002-of-*.safetensors"
        (path,) = (tmp_path / "in" / "src").glob(name)
        os.utime(path, ns=(1, 1))
    with pytest.warns(UserWarning, match=r"dst\.partial was left by another job .* cleared"):
        done = prune_checkpoint(tmp_path / "in" / "src", tmp_path / "dst", plan, **options)
    assert done.resumed_files == ()
    prune_checkpoint(tmp_path / "in" / "src", tmp_path / "whole", plan, **options)
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")


def test_a_source_that_changes_meanwhile(source, tmp_path, monkeypatch):
    folder, plan = source
    shutil.copytree(folder / "src", tmp_path / "src")
    write = prune.write_shards

    def write_and_touch(*args, **kwargs):
        write(*args, **kwargs)
        os.utime(next((tmp_path / "src").glob("model-00001*")), ns=(1, 1))

    monkeypatch.setattr(prune, "write_shards", write_and_touch)
    with pytest.raises(ValueError, match=r"model-00001.*changed while it was read"):
        prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan, **SHARD)
    assert not (tmp_path / "dst").exists()


def test_an_error_in_one_thread_ends_all(source, tmp_path, monkeypatch):
    folder, plan = source
    preadv, calls = os.preadv, []

    def failing(fd, buffers, place):
        calls.append(place)
        if len(calls) == 15:
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.002)
        return preadv(fd, buffers, place)

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(OSError, match="could not be read") as caught:
            prune_checkpoint(folder / "src", tmp_path / "dst", plan, **{**SHARD, "threads": 4})
    assert caught.value.filename.endswith(".safetensors") and len(calls) < 20
    assert len(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / "dst").exists()


def test_two_at_once(source, tmp_path):
    folder, plan = source
    (tmp_path / ".dst.partial").mkdir()
    with open(tmp_path / ".dst.partial" / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process is working there"):
            prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)
        assert (tmp_path / ".dst.partial" / "lock").exists()
    prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)


def test_a_folder_of_that_name_that_is_not_ours(source, tmp_path):
    folder, plan = source
    (tmp_path / ".dst.partial").mkdir()
    (tmp_path / ".dst.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="was not made here"):
        prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)
    assert (tmp_path / ".dst.partial" / "thesis.tex").read_text() == "years of work"


def test_a_lock_that_is_gone_when_it_is_got(source, tmp_path, monkeypatch):
    """The other process ended, and took its folder away, between the opening of the lock and the locking."""
    folder, plan = source
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: shutil.rmtree(tmp_path / ".dst.partial"))
    with pytest.raises(BlockingIOError):
        prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)


@pytest.mark.parametrize("swap", ["one step", "two steps"])
def test_overwrite_takes_the_place_of_a_checkpoint(source, tmp_path, monkeypatch, swap):
    folder, plan = source
    if swap == "two steps":
        monkeypatch.setattr(staging.ctypes, "CDLL", lambda *args, **kwargs: None)
    save_tiny(tmp_path / "dst", "mistral")
    with pytest.raises(FileExistsError, match="is there already"):
        prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)
    prune_checkpoint(folder / "src", tmp_path / "dst", plan, overwrite=True, **SHARD)
    prune_checkpoint(folder / "src", tmp_path / "whole", plan, overwrite=True, **SHARD)
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "whole"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_overwrite_replaces_nothing_but_a_checkpoint(source, tmp_path, kind):
    folder, plan = source
    dst = tmp_path / "dst"
    if kind == "folder":
        dst.mkdir()
        (dst / "thesis.tex").write_text("years of work")
    elif kind == "file":
        dst.write_text("years of work")
    else:
        save_tiny(tmp_path / "real")
        dst.symlink_to(tmp_path / "real")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="is not the folder of a checkpoint"):
        prune_checkpoint(folder / "src", dst, plan, overwrite=True, **SHARD)
    assert snapshot(tmp_path) == before


def test_a_dst_that_appears_meanwhile_is_left_alone(source, tmp_path, monkeypatch):
    folder, plan = source
    write = prune.write_shards

    def write_and_appear(*args, **kwargs):
        write(*args, **kwargs)
        (tmp_path / "dst").mkdir()

    monkeypatch.setattr(prune, "write_shards", write_and_appear)
    with pytest.raises(FileExistsError, match="is there already"):
        prune_checkpoint(folder / "src", tmp_path / "dst", plan, **SHARD)
    assert not list((tmp_path / "dst").iterdir())
