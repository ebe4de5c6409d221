"""Files read from the page cache or around it: every byte, whatever is cached and whatever is refused."""

import errno
import os
import random
import resource

import pytest
import torch
from safetensors.torch import save_file

from minitron_kernels.pruning.checkpoint import input_file, output_file, shards
from minitron_kernels.pruning.checkpoint.input_file import InputFile
from minitron_kernels.pruning.checkpoint.pages import PAGE, REFUSED, PageBuffer
from minitron_kernels.pruning.checkpoint.prune import prune_checkpoint
from minitron_kernels.pruning.checkpoint.safetensors_files import SafetensorsFile
from pruning.checkpoints import plan_for, save_tiny, snapshot
from pruning.system_calls import is_direct

SIZE = 9 * PAGE + 77

needs_nowait = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system has no RWF_NOWAIT")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Everything may be read around the cache, down to a byte."""
    for module in (input_file, output_file, shards):
        monkeypatch.setattr(module, "DIRECT_FILE_BYTES", 0)
    monkeypatch.setattr(input_file, "DIRECT_BYTES", 1)


@pytest.fixture
def file(tmp_path):
    save_file({"x": torch.arange(SIZE, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    opened = SafetensorsFile(tmp_path / "x.safetensors")
    yield opened
    opened.close()


class Cache:
    """In the place of os.preadv: a page cache that holds the first `held` bytes; notes what comes which way.

    answer(count): of a direct read of so many bytes, a count that it comes short at, an error, or None.
    """

    def __init__(self, monkeypatch, held, answer=lambda count: None):
        self.preadv, self.held, self.answer = os.preadv, held, answer
        self.cached, self.direct, self.plain = [], [], []
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, fd, buffers, begin, flags=0):
        (data,) = buffers
        if flags:
            assert flags == os.RWF_NOWAIT
            if begin >= self.held:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            data = data[: self.held - begin]
            self.cached.append((begin, len(data)))
            return self.preadv(fd, [data], begin)
        if not is_direct(fd):
            self.plain.append((begin, len(data)))
            return self.preadv(fd, buffers, begin)
        self.direct.append((begin, len(data)))
        answer = self.answer(len(data))
        if isinstance(answer, OSError):
            raise answer
        if answer is None:
            return self.preadv(fd, buffers, begin)
        # a count that may end inside a page, which only a plain read can bring about
        with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as plain:
            return self.preadv(plain.fileno(), [data[:answer]], begin)


def read(file, begin, nbytes):
    """Bytes by both ways of an InputFile, from memory that held others."""
    reader, buffer = InputFile(file), PageBuffer()
    try:
        buffer.pages(nbytes + 2 * PAGE)[:] = 0xA5
        place = buffer.at(begin, nbytes)
        if reader.read_cached(place.data, begin) < nbytes:
            place = reader.read_rest(buffer, begin, nbytes)
        assert place.ctypes.data % PAGE == begin % PAGE and len(place) == nbytes
        return bytes(place)
    finally:
        reader.close()


def direct_here(file):
    reader = InputFile(file)
    has = reader._direct is not None
    reader.close()
    return has


@needs_nowait
@pytest.mark.parametrize("held", [0, 1, PAGE, 3 * PAGE + 5, SIZE + 1000])
def test_every_byte_whatever_is_cached(file, monkeypatch, held):
    content, rng = file.path.read_bytes(), random.Random(held)
    here, cache = direct_here(file), Cache(monkeypatch, held)
    for _ in range(60):
        begin = rng.randrange(len(content))
        nbytes = rng.randint(1, len(content) - begin)
        del cache.direct[:], cache.plain[:]
        assert read(file, begin, nbytes) == content[begin : begin + nbytes]
        if here:
            # all of it was there, or all of it came from the disk in whole pages
            assert cache.plain == [] and bool(cache.direct) == (begin + nbytes > held)
            assert all(at % PAGE == count % PAGE == 0 for at, count in cache.direct)


def short_once(count):
    """Answers of a direct read: `count` bytes at first, then as many as asked."""
    answers = iter([count])
    return lambda _: next(answers, None)


@needs_nowait
@pytest.mark.parametrize("answer", [PAGE, 512, 3 * PAGE + 1, 0, *REFUSED])
def test_a_direct_read_that_comes_short_or_is_refused(file, monkeypatch, answer):
    content, here = file.path.read_bytes(), direct_here(file)
    if answer in REFUSED:
        answer = OSError(answer, os.strerror(answer))
    cache = Cache(monkeypatch, 0, short_once(answer))
    assert read(file, 100, len(content) - 100) == content[100:]
    assert not here or len(cache.direct) + len(cache.plain) == 2


@needs_nowait
def test_an_error_of_a_direct_read_names_the_file(file, monkeypatch):
    if not direct_here(file):
        pytest.skip("this file system knows no O_DIRECT")
    Cache(monkeypatch, 0, lambda count: OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(OSError, match="could not be read") as caught:
        read(file, 8, 5 * PAGE)
    assert caught.value.filename == str(file.path) and caught.value.errno == errno.EIO


@pytest.mark.parametrize("held", [0, SIZE])
def test_a_file_that_ends_too_early(file, monkeypatch, held):
    if hasattr(os, "RWF_NOWAIT"):
        Cache(monkeypatch, held)
    os.truncate(file.path, 2 * PAGE + 9)
    with pytest.raises(ValueError, match=f"ends at byte {2 * PAGE + 9}, inside a tensor"):
        read(file, 50, 5 * PAGE)


@needs_nowait
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_system_that_cannot_tell_what_is_cached(file, monkeypatch, number):
    """Then all is read the plain way: what is in the cache is not read from the disk."""
    content, preadv = file.path.read_bytes(), os.preadv

    def refuse(fd, buffers, begin, flags=0):
        assert flags or not is_direct(fd)
        if flags:
            raise OSError(number, os.strerror(number))
        return preadv(fd, buffers, begin)

    monkeypatch.setattr(os, "preadv", refuse)
    assert read(file, 3, 4 * PAGE) == content[3 : 3 + 4 * PAGE]


def test_another_file_under_the_name_is_not_read(file, monkeypatch):
    content = file.path.read_bytes()
    other = file.path.with_name("other")
    other.write_bytes(bytes(len(content)))
    os.replace(other, file.path)
    if hasattr(os, "RWF_NOWAIT"):
        Cache(monkeypatch, 0)
    assert read(file, 0, len(content)) == content


def test_small_files_are_read_plainly(file, monkeypatch):
    monkeypatch.setattr(input_file, "DIRECT_FILE_BYTES", SIZE * 2)
    assert not direct_here(file)


def test_many_files_leave_descriptors_for_others(file):
    """A checkpoint may consist of hundreds of files, each of which is open already."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    readers = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * highest + 40, before[1]))
    try:
        readers = [InputFile(file) for _ in range(2 * highest + 40)]
        os.close(os.open(file.path, os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for reader in readers:
            reader.close()


@needs_nowait
@pytest.mark.parametrize("pad", [0, 1, 2, 6])
@pytest.mark.parametrize("held", [0, 3 * PAGE, 1 << 30])
def test_a_checkpoint_is_the_same_whatever_is_cached(tmp_path, monkeypatch, held, pad):
    """Also a file of others, whose tensors lie at any address, and cuts in depth alone, which copy bytes."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 128}
    model = save_tiny(tmp_path / "src", "mistral", dtype=torch.bfloat16, **sizes)
    path = tmp_path / "src/model.safetensors"
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes((begin - 8 + pad).to_bytes(8, "little") + raw[8:begin] + b" " * pad + raw[begin:])

    def prune(name, plan):
        prune_checkpoint(tmp_path / "src", tmp_path / name, plan, threads=2, progress=False)
        return snapshot(tmp_path / name)["model.safetensors"][0]

    for name, cut in (("width", {"hidden_size": 32}), ("depth", {"num_hidden_layers": 1})):
        plan = plan_for(model.config, **cut)
        with monkeypatch.context() as patch:
            patch.setattr(input_file, "DIRECT_FILE_BYTES", 1 << 40)
            wanted = prune(f"{name}, plainly", plan)
        with monkeypatch.context() as patch:
            cache = Cache(patch, held)
            assert prune(name, plan) == wanted
        if held == 0:
            assert cache.cached == []
        elif held > len(raw) + pad:
            assert cache.cached and not cache.direct
