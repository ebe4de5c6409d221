"""Each call by which a checkpoint meets the disk fails in turn, or does less than asked; and their order."""

import errno
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_kernels.pruning.checkpoint import input_file, output_file, prune, shards, staging
from minitron_kernels.pruning.checkpoint.pages import PAGE, copies_fast
from minitron_kernels.pruning.checkpoint.prune import prune_checkpoint
from pruning.checkpoints import plan_for, save_tiny, snapshot
from pruning.system_calls import Call, Disk, is_direct

OPTIONS = {"max_shard_bytes": 12_000, "threads": 1, "progress": False}
MADE = ("config.json", "README.md", "minitron_plan.json", "model.safetensors.index.json")
OLD = {"config.json": b"{}", "old.txt": b"the old one"}


def contents(folder):
    return {name: content for name, (content, _) in snapshot(folder).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in shards, a plan, and what the result is to be."""
    folder = tmp_path_factory.mktemp("source")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 256}
    model = save_tiny(folder / "src", "mistral", dtype=torch.bfloat16, shard_bytes="20KB", **sizes)
    plan = plan_for(model.config, hidden_size=24, intermediate_size=40, num_hidden_layers=2)
    prune_checkpoint(folder / "src", folder / "want", plan, **OPTIONS)
    assert len(list((folder / "want").glob("model-*.safetensors"))) > 1
    return folder / "src", plan, contents(folder / "want")


def make_old(dst):
    dst.mkdir()
    for name, content in OLD.items():
        (dst / name).write_bytes(content)


def two_steps(monkeypatch):
    """A file system that cannot exchange two names."""
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *args, **kwargs: None)


@pytest.fixture
def quick(monkeypatch):
    """Without the comparison with transformers' model, which does not touch the disk."""
    monkeypatch.setattr(prune, "check_result", lambda *args: None)


@pytest.fixture
def direct(monkeypatch):
    """Every shard is read and written around the page cache, where the file system lets it be."""
    for module in (input_file, output_file):
        monkeypatch.setattr(module, "DIRECT_FILE_BYTES", 0)
        monkeypatch.setattr(module, "DIRECT_BYTES", PAGE)


def only_read(before, call):
    """Whether `call` closes a file that nothing was written to since it was opened."""
    opened = max((i for i, c in enumerate(before) if (c.name, c.path) == ("open", call.path)), default=0)
    return call.name == "close" and all(c.name != "pwrite" or c.path != call.path for c in before[opened:])


def last_sync(source, place, monkeypatch, overwrite):
    """The number of the last fsync of a call that nothing disturbs: of the folder that `dst` is in."""
    place.mkdir()
    if overwrite:
        make_old(place / "dst")
    with monkeypatch.context() as patch:
        calls = Disk(place).patch(patch).calls
        prune_checkpoint(source[0], place / "dst", source[1], overwrite=overwrite, **OPTIONS)
    return max(i for i, c in enumerate(calls) if (c.name, c.path) == ("fsync", str(place)))


@pytest.mark.parametrize("kind", ["new", "overwrite", "overwrite in two steps"])
def test_each_call_fails_in_turn(source, tmp_path, monkeypatch, quick, direct, kind):
    """There is then the old state or the whole result; the error names a path; a second call completes it."""
    folder, plan, want = source
    overwrite = kind != "new"
    if kind.endswith("two steps"):
        two_steps(monkeypatch)
    descriptors = len(os.listdir("/proc/self/fd"))
    last = last_sync(source, tmp_path / "all", monkeypatch, overwrite)
    # the end, where an old checkpoint is met, differs; what follows the last sync only removes
    for failed in range(0 if kind == "new" else last - 40, last + 1):
        place = tmp_path / str(failed)
        place.mkdir()
        dst = place / "dst"
        if overwrite:
            make_old(dst)
        before = contents(place)
        with monkeypatch.context() as patch:
            disk = Disk(place, fail_at=failed, error=errno.EIO if failed % 2 else errno.ENOSPC).patch(patch)
            try:
                prune_checkpoint(folder, dst, plan, overwrite=overwrite, **OPTIONS)
            except OSError as error:
                assert error.filename and str(place) in str(error.filename), (disk.calls[-1], error)
                raised = error
            else:
                raised = None
        call = disk.calls[failed]
        assert len(os.listdir("/proc/self/fd")) == descriptors, call
        old = {name: content for name, content in before.items() if name.startswith("dst/")}
        now = {name: content for name, content in contents(place).items() if name.startswith("dst/")}
        done = now == {f"dst/{name}": content for name, content in want.items()}
        assert done or now == old, call
        if raised is None:  # a folder that is there already, a file that was only read
            assert done and (call.name == "mkdir" or only_read(disk.calls[:failed], call)), call
        elif done:
            assert "is complete" in str(raised), (call, raised)
        else:
            assert "complete" not in str(raised)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                prune_checkpoint(folder, dst, plan, overwrite=overwrite, **OPTIONS)
            assert contents(dst) == want, call
            assert [path.name for path in place.iterdir()] == ["dst"], call
        shutil.rmtree(place)
    assert last > 80


def test_reads_of_the_source_fail_in_turn(source, tmp_path, monkeypatch, quick):
    folder, plan, want = source
    for failed in range(1000):
        with monkeypatch.context() as patch:
            disk = Disk(folder, fail_at=failed).patch(patch)
            try:
                prune_checkpoint(folder, tmp_path / "dst", plan, **OPTIONS)
            except (OSError, ValueError) as error:
                assert (str(folder) in str(error) and "read" in str(error)) or "opened" in str(error), error
                assert not (tmp_path / "dst").exists()
            else:
                assert disk.calls[failed:] == [] or disk.calls[failed].name == "close"
                assert contents(tmp_path / "dst") == want
                shutil.rmtree(tmp_path / "dst")
                if len(disk.calls) <= failed:
                    break
        shutil.rmtree(tmp_path / ".dst.partial", ignore_errors=True)
    assert failed > 30


@pytest.mark.parametrize("way", ["direct", "plain"])
def test_reads_and_writes_that_come_back_short(source, tmp_path, monkeypatch, request, way):
    if way == "direct":
        request.getfixturevalue("direct")
    folder, plan, want = source
    with monkeypatch.context() as patch:
        disk = Disk(folder.parent, short=True).patch(patch)
        Disk(tmp_path, short=True).patch(patch)
        prune_checkpoint(folder, tmp_path / "dst", plan, **OPTIONS)
    assert contents(tmp_path / "dst") == want
    assert sum(call.name == "preadv" for call in disk.calls) > 50


def test_finished_files_are_known_by_short_reads_too(source, tmp_path, monkeypatch):
    folder, plan, want = source
    with monkeypatch.context() as patch:
        patch.setattr(prune, "_check_written", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune_checkpoint(folder, tmp_path / "dst", plan, **OPTIONS)
    with monkeypatch.context() as patch:
        Disk(tmp_path, short=True).patch(patch)
        done = prune_checkpoint(folder, tmp_path / "dst", plan, **OPTIONS)
    assert done.resumed_files == done.files and contents(tmp_path / "dst") == want


@pytest.mark.parametrize("kind", ["new", "overwrite in two steps"])
def test_the_order_of_what_reaches_the_disk(source, tmp_path, monkeypatch, kind):
    """What a power failure would show: bytes before their names, names before the journal's word, all before
    the rename, and the rename before the end."""
    folder, plan, _ = source
    dst = tmp_path / "dst"
    if kind != "new":
        two_steps(monkeypatch)
        make_old(dst)
    with monkeypatch.context() as patch:
        calls = Disk(tmp_path).patch(patch).calls
        done = prune_checkpoint(folder, dst, plan, overwrite=True, **OPTIONS)
    partial = tmp_path / ".dst.partial"
    inside, journal = partial / "checkpoint", str(partial / "journal.jsonl")

    def places(name, path, target=""):
        return [
            i for i, c in enumerate(calls) if (c.name, c.path, c.target) == (name, str(path), str(target))
        ]

    (renamed,) = places("rename", inside, dst)
    synced = {call.path for call in calls[:renamed] if call.name == "fsync"}
    made = {call.path for call in calls if call.name == "open" and call.flags & os.O_CREAT}
    made |= {call.path for call in calls if call.name == "mkdir"}
    assert {str(inside), *(path for path in made if Path(path).is_relative_to(inside))} <= synced
    for path in made - {str(partial / "lock"), str(partial), str(tmp_path)}:
        writes, syncs = places("pwrite", path), places("fsync", path)
        assert not writes or syncs[-1] > writes[-1], path
        names = places("fsync", Path(path).parent)
        assert path == str(inside) or any(name > max(writes, default=0) for name in names), path
    # the journal speaks of a file once it and its name are on the disk, and is itself on the disk then
    words = places("pwrite", journal)
    assert len(words) == 1 + len(done.files)
    for word, name in zip(words[1:], done.files, strict=True):
        file = places("fsync", inside / name)[0]
        assert places("pwrite", inside / name)[-1] < file
        assert any(file < place < word for place in places("fsync", inside))
    for word, following in zip(words, [*words[1:], renamed], strict=True):
        (first, *_) = [place for place in places("fsync", journal) if place > word]
        assert first < following and any(first < place < following for place in places("fsync", partial))
    assert places("fsync", tmp_path)[-1] > renamed
    removed = [i for i, c in enumerate(calls) if c.name == "unlink" and i > renamed]
    assert all(place > places("fsync", tmp_path)[-1] for place in removed)


def test_where_pages_begin(source, tmp_path, monkeypatch, direct):
    """Of each tensor's bytes: the kernel copies them at full speed, and whole pages go around the cache."""
    folder, plan, want = source
    preadv, pwrite, around = os.preadv, os.pwrite, []

    def address(data):
        return np.frombuffer(data, np.uint8).ctypes.data

    def is_tensor(fd, begin):
        return begin > 8 and os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors")

    def read(fd, buffers, begin, *flags):
        if is_tensor(fd, begin):
            assert copies_fast(begin, address(buffers[0]))
        return preadv(fd, buffers, begin, *flags)

    def write(fd, data, begin):
        if is_tensor(fd, begin) and len(data):
            assert address(data) % PAGE == begin % PAGE
            if is_direct(fd):
                around.append(len(data))
            else:
                assert len(data) < 2 * PAGE or not on_disk  # no whole page in it
        return pwrite(fd, data, begin)

    probe = output_file.OutputFile(tmp_path / "probe", PAGE)
    probe.close()
    on_disk = probe.direct
    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "pwrite", write)
    prune_checkpoint(folder, tmp_path / "dst", plan, **OPTIONS)
    assert contents(tmp_path / "dst") == want
    assert not on_disk or sum(around) >= 2 * PAGE


def test_memory_is_a_block_for_each_thread(source, tmp_path, monkeypatch, quick):
    folder, plan, _ = source
    made = []

    class Counted(shards.PageBuffer):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(shards, "PageBuffer", Counted)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(shards, "DIRECT_FILE_BYTES", 0)  # the threads that may wait for the disk
    prune_checkpoint(folder, tmp_path / "dst", plan, **{**OPTIONS, "threads": 2})
    assert len(made) == 2 * (2 + shards._WAITING)
    assert max(len(buffer._bytes) for buffer in made) < 4096 + 2 * PAGE  # KV heads are blended, in one piece


def test_a_write_goes_on_where_it_stopped(tmp_path, monkeypatch):
    data = bytes(range(256)) * 40
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path, short=True).patch(patch)
        staging.write_all(fd, memoryview(data), 5)
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == bytes(5) + data
    assert len(disk.calls) > 5 and Call("pwrite", str(tmp_path / "x")) in disk.calls


@pytest.mark.parametrize("size", range(1, 18))
def test_a_checksum_sees_each_byte(size):
    data = bytearray(range(1, size + 1))
    whole = shards.checksum(memoryview(data))
    for place in range(size):
        damaged = bytearray(data)
        damaged[place] ^= 64
        assert shards.checksum(memoryview(damaged)) != whole


def test_space_is_needed_for_all_that_is_written(source, tmp_path, monkeypatch, quick):
    folder, plan, want = source
    needed = sum(len(content) for name, content in want.items() if name not in MADE)
    needed += prune._SPARE_BYTES
    for free, enough in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if enough:
            prune_checkpoint(folder, tmp_path / "dst", plan, **OPTIONS)
        else:
            with pytest.raises(OSError, match="free some"):
                prune_checkpoint(folder, tmp_path / "dst", plan, **OPTIONS)


def test_a_checkpoint_that_was_being_replaced_is_put_back(source, tmp_path, monkeypatch, quick):
    """Killed between two renames, and then called for something that fails: the old one is not lost."""
    folder, plan, want = source
    dst, partial = tmp_path / "dst", tmp_path / ".dst.partial"
    partial.mkdir()
    (partial / "lock").touch()
    make_old(partial / "replaced")
    with pytest.raises(FileExistsError, match="is there already"):
        prune_checkpoint(folder, dst, plan, **OPTIONS)
    assert contents(dst) == OLD
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: os.statvfs_result)  # fails
        with pytest.raises(AttributeError):
            prune_checkpoint(folder, dst, plan, overwrite=True, **OPTIONS)
    assert contents(dst) == OLD
    partial.mkdir(exist_ok=True)
    (partial / "lock").touch()
    make_old(partial / "replaced")  # killed after the second rename
    two_steps(monkeypatch)
    prune_checkpoint(folder, dst, plan, overwrite=True, **OPTIONS)
    assert contents(dst) == want and [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_line_of_the_journal_that_was_cut_off_costs_no_other(source, tmp_path, monkeypatch, quick):
    folder, plan, want = source

    def stop(*args):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(prune, "_check_written", stop)
        with pytest.raises(ZeroDivisionError):
            prune_checkpoint(folder, tmp_path / "dst", plan, **OPTIONS)
        journal = tmp_path / ".dst.partial" / "journal.jsonl"
        journal.write_text(journal.read_text()[:-30])  # the last line
        with pytest.raises(ZeroDivisionError):
            prune_checkpoint(folder, tmp_path / "dst", plan, **OPTIONS)
    journal.write_text(journal.read_text() + '[]\n7\n{"file": 3}\n')
    done = prune_checkpoint(folder, tmp_path / "dst", plan, **OPTIONS)
    assert done.resumed_files == done.files and contents(tmp_path / "dst") == want
