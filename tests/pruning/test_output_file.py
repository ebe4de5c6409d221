"""Files written around the page cache: every byte, wherever pages begin, whatever the file system refuses."""

import errno
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from minitron_kernels.pruning.checkpoint import output_file
from minitron_kernels.pruning.checkpoint.output_file import OutputFile
from minitron_kernels.pruning.checkpoint.pages import PAGE, PageBuffer, copies_fast
from minitron_kernels.pruning.checkpoint.shards import _Work
from pruning.system_calls import is_direct

SIZE = 40 * PAGE + 123


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every file is written directly, down to a single page."""
    monkeypatch.setattr(output_file, "DIRECT_FILE_BYTES", 0)
    monkeypatch.setattr(output_file, "DIRECT_BYTES", 1)


class Writes:
    """In the place of os.pwrite: notes calls; answer(data) of a direct one is a count, an error or None."""

    def __init__(self, monkeypatch, answer=lambda data: None):
        self.pwrite, self.answer = os.pwrite, answer
        self.direct, self.plain = [], []
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, fd, data, begin):
        if not is_direct(fd):
            self.plain.append((begin, len(data)))
            return self.pwrite(fd, data, begin)
        self.direct.append((begin, len(data)))
        answer = self.answer(data)
        if isinstance(answer, OSError):
            raise answer
        if answer is None:
            return self.pwrite(fd, data, begin)
        # a count that may end inside a page, which only a plain write can bring about
        with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as plain:
            return self.pwrite(plain.fileno(), data[:answer], begin) if answer else 0


def pieces(rng, longest):
    """(begin, end) of pieces that fill the file, in any order."""
    cuts = [0]
    while cuts[-1] < SIZE:
        cuts.append(min(SIZE, cuts[-1] + rng.randint(1, longest)))
    parts = list(itertools.pairwise(cuts))
    rng.shuffle(parts)
    return parts


def write(path, rng, longest=6 * PAGE, threads=1, off=0):
    """Writes random bytes in pieces that lie in memory as in the file, or `off` bytes beside it."""
    content = rng.randbytes(SIZE)
    file = OutputFile(path, SIZE)

    def one(part):
        begin, end = part
        data = PageBuffer().at(begin + off, end - begin).data
        data[:] = content[begin:end]
        file.write(data, begin)

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, pieces(rng, longest)))
        file.sync()
    finally:
        file.close()
    assert path.read_bytes() == content
    return file


def direct_here(folder):
    file = OutputFile(folder / "asked", PAGE)
    file.close()
    return file.direct


@pytest.mark.parametrize("longest", [PAGE // 3, 6 * PAGE, SIZE])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_byte_is_written(tmp_path, monkeypatch, longest, threads):
    writes = Writes(monkeypatch)
    write(tmp_path / "x", random.Random(longest), longest, threads)
    assert all(begin % PAGE == count % PAGE == 0 for begin, count in writes.direct)
    if direct_here(tmp_path) and longest >= 6 * PAGE:
        assert sum(count for _, count in writes.direct) > SIZE // 2
        assert all(count < 2 * PAGE for _, count in writes.plain)  # no whole page in it


def test_bytes_that_lie_elsewhere_in_memory_are_written_plainly(tmp_path, monkeypatch):
    writes = Writes(monkeypatch)
    write(tmp_path / "x", random.Random(0), off=64)
    assert writes.direct == [] and len(writes.plain) > 5


@pytest.mark.parametrize("answer", [PAGE, 512, 0])
def test_a_direct_write_that_comes_back_short(tmp_path, monkeypatch, answer):
    if not direct_here(tmp_path):
        pytest.skip("this file system knows no O_DIRECT")
    writes = Writes(monkeypatch, lambda data: answer)
    write(tmp_path / "x", random.Random(1))
    assert len(writes.direct) > 5


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("after", [0, 3])
def test_a_refused_direct_write_becomes_a_plain_one(tmp_path, monkeypatch, number, after):
    if not direct_here(tmp_path):
        pytest.skip("this file system knows no O_DIRECT")
    calls = []

    def refuse(data):
        calls.append(len(data))
        return OSError(number, os.strerror(number)) if len(calls) > after else None

    writes = Writes(monkeypatch, refuse)
    file = write(tmp_path / "x", random.Random(2))
    assert not file.direct and len(writes.direct) == after + 1  # it is not asked again


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_a_direct_write_is_raised(tmp_path, monkeypatch, number):
    if not direct_here(tmp_path):
        pytest.skip("this file system knows no O_DIRECT")
    Writes(monkeypatch, lambda data: OSError(number, os.strerror(number)))
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as caught:
        write(tmp_path / "x", random.Random(3))
    assert caught.value.errno == number
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_direct_writes(tmp_path, monkeypatch, number):
    opened = os.open

    def refuse(path, flags, *args):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(number, os.strerror(number), path)
        return opened(path, flags, *args)

    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "O_DIRECT", getattr(os, "O_DIRECT", 1 << 14), raising=False)
    monkeypatch.setattr(os, "open", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError):
            OutputFile(tmp_path / "x", SIZE)
    else:
        assert not write(tmp_path / "x", random.Random(4)).direct
    monkeypatch.delattr(os, "O_DIRECT")
    assert not write(tmp_path / "x", random.Random(5)).direct
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_both_descriptors_are_closed_whichever_fails(tmp_path, monkeypatch):
    close, closed = os.close, []

    def fail(fd):
        close(fd)
        closed.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    descriptors = len(os.listdir("/proc/self/fd"))
    file = OutputFile(tmp_path / "x", SIZE)
    monkeypatch.setattr(os, "close", fail)
    with pytest.raises(OSError):
        file.close()
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == descriptors and len(closed) == 1 + file.direct


def test_a_buffer_lies_in_its_page_as_the_bytes_in_their_file():
    buffer, rng = PageBuffer(), random.Random(6)
    for longest in [3 * PAGE] * 100 + [5 << 20] * 5 + [3 * PAGE] * 5:
        position, count = rng.randrange(1 << 40), rng.randrange(longest)
        data = buffer.at(position, count)
        assert len(data) == count and data.ctypes.data % PAGE == position % PAGE
        data[:] = 1


def test_where_copies_are_fast():
    slow = [distance for distance in range(-4096, 4096) if not copies_fast(10_000, 10_000 + distance)]
    assert slow == [*range(-4095, -4064), *range(1, 32)]


class Unclosed:
    """In the place of an open shard and its file; closing it says that the disk is full."""

    def __init__(self, failing):
        self.file, self.failing, self.closed = self, failing, 0

    def close(self):
        self.closed += 1
        if self.failing:
            raise OSError(errno.ENOSPC, "no space")


def test_every_file_is_closed_after_a_failure(tmp_path):
    work = _Work([], tmp_path, lambda count: None, lambda shard, digest: None, 1)
    opened = [Unclosed(failing) for failing in (True, False, True, False)]
    work._open = opened
    work.close()
    assert [shard.closed for shard in opened] == [1, 1, 1, 1]
