"""Streams cut tensors into new safetensors files, with several threads.

The position of every output tensor in its file is known before any is read. Threads take blocks of rows, in
the order of the positions: they read a block, cut it, and write it to its position. In memory at any time is
one block for each thread, or a whole tensor where its rows cannot be cut separately. While a block comes
straight from the disk or goes there (see `pages`), its thread only waits, so there are a few threads more
than may compute at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minitron_kernels.ops.gather.index import ChannelIndex
from minitron_kernels.pruning.checkpoint.input_file import InputFile
from minitron_kernels.pruning.checkpoint.output_file import OutputFile
from minitron_kernels.pruning.checkpoint.pages import DIRECT_FILE_BYTES, PageBuffer, copies_fast
from minitron_kernels.pruning.checkpoint.safetensors_files import (
    SINGLE_FILE,
    StoredTensor,
    make_header,
    read_at,
)
from minitron_kernels.pruning.checkpoint.staging import write_error
from minitron_kernels.pruning.cut.cuts import Cut

BLOCK_BYTES = 4 << 20  # bytes of source rows in one piece of work
_ALIGNMENT = 8  # bytes, of tensors that are cut, for torch: a file of others may align elements worse
_WAITING = 2  # threads beyond those that compute, where reading and writing is waiting


@dataclass(frozen=True)
class Output:
    """One tensor to write; `begin` is the position of its first byte in its file."""

    cut: Cut
    source: StoredTensor
    begin: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.cut.shape) * self.source.itemsize


@dataclass(frozen=True)
class Piece:
    """A block of an output: its bytes begin at `source_begin` in the source, at `begin` in the output file.

    cut: None where bytes are copied.
    """

    source: StoredTensor
    cut: Cut | None
    source_begin: int
    begin: int
    nbytes: int

    @property
    def source_bytes(self) -> int:
        """How many bytes of the source are read for it."""
        return self.nbytes if self.cut is None else math.prod(self.cut.source_shape) * self.source.itemsize


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    name: str
    header: bytes
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def size(self) -> int:
        """The bytes of the whole file."""
        return len(self.header) + self.nbytes

    def pieces(self) -> Iterator[Piece]:
        """The pieces of work that write it, in the order of their bytes."""
        for output in self.outputs:
            yield from _pieces(output)


def plan_shards(cuts: Iterable[tuple[Cut, StoredTensor]], max_shard_bytes: int) -> list[Shard]:
    """Assigns tensors to files of up to `max_shard_bytes`, in the given order; one tensor may be larger."""
    groups: list[list[tuple[Cut, StoredTensor]]] = [[]]
    filled = 0
    for cut, source in cuts:
        nbytes = Output(cut, source, 0).nbytes
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((cut, source))
        filled += nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE_FILE
        group.sort(key=lambda pair: -pair[1].itemsize)  # keeps every tensor aligned to its elements
        header, begins = make_header((cut.name, source.dtype_name, cut.shape) for cut, source in group)
        outputs = tuple(Output(*pair, begin) for pair, begin in zip(group, begins, strict=True))
        shards.append(Shard(name, header, outputs))
    return shards


def _pieces(output: Output) -> Iterator[Piece]:
    cut, source, begin = output.cut, output.source, output.begin
    itemsize = source.itemsize
    if cut.unchanged:
        for done in range(0, output.nbytes, BLOCK_BYTES):
            nbytes = min(BLOCK_BYTES, output.nbytes - done)
            yield Piece(source, None, source.begin + done, begin + done, nbytes)
    elif cut.experts is not None:
        inside = math.prod(cut.source_shape[1:]) * itemsize
        for new, (old, rows, cols) in enumerate(cut.experts):
            expert = Cut(cut.name, cut.source_shape[1:], cut.shape[1:], rows, cols)
            expert_begin = begin + new * math.prod(expert.shape) * itemsize
            yield from _row_blocks(expert, source, source.begin + old * inside, expert_begin)
    elif output.nbytes:
        yield from _row_blocks(cut, source, source.begin, begin)


def _row_blocks(cut: Cut, source: StoredTensor, source_begin: int, begin: int) -> Iterator[Piece]:
    """Pieces of the rows that one block of the source holds; all rows if they are blended or not in order."""
    itemsize = source.itemsize
    rows = None if cut.rows is None else cut.rows.values
    if len(cut.shape) != 2 or cut.blends or (rows is not None and bool((rows[1:] <= rows[:-1]).any())):
        yield Piece(source, cut, source_begin, begin, math.prod(cut.shape) * itemsize)
        return
    row_bytes, source_row_bytes = cut.shape[1] * itemsize, cut.source_shape[1] * itemsize
    step = max(1, BLOCK_BYTES // max(1, source_row_bytes))
    starts = torch.arange(0, cut.source_shape[0], step, device="cpu")
    ends = starts if rows is None else torch.searchsorted(rows, starts)
    for first, last in itertools.pairwise([*ends.tolist(), cut.shape[0]]):
        if first == last:
            continue
        low, high = (first, last) if rows is None else (int(rows[first]), int(rows[last - 1]) + 1)
        index = None
        if rows is not None and high - low != last - first:
            index = ChannelIndex(rows[first:last] - low, high - low)
        block = dataclasses.replace(
            cut,
            rows=index,
            source_shape=(high - low, cut.source_shape[1]),
            shape=(last - first, cut.shape[1]),
        )
        size = (last - first) * row_bytes
        yield Piece(source, block, source_begin + low * source_row_bytes, begin + first * row_bytes, size)


def checksum(data: memoryview) -> int:
    """The sum of the 8-byte words, modulo 2^64: as fast as memory, and any single damaged byte changes it."""
    words = torch.from_numpy(np.require(np.frombuffer(data, np.int64, len(data) // 8), requirements="A"))
    rest = int.from_bytes(data[len(data) // 8 * 8 :], "little")
    return (int(words.sum()) + rest) % 2**64


def _digest(sums: Sequence[int]) -> str:
    return hashlib.sha256(b"".join(value.to_bytes(8, "little") for value in sums)).hexdigest()


def _bytes_of(fd: int, begin: int, nbytes: int, buffer: PageBuffer) -> memoryview:
    """The bytes at this position of a file; fewer where the file ends. The next call overwrites them."""
    data = buffer.at(begin, nbytes).data
    return data[: read_at(fd, data, begin)]


def is_whole(shard: Shard, folder: Path, digest: str) -> bool:
    """Whether the shard in `folder` is as write_shards() wrote it."""
    buffer = PageBuffer()
    try:
        fd = os.open(folder / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != shard.size:
                return False
            if _bytes_of(fd, 0, len(shard.header), buffer) != shard.header:
                return False
            sums = [checksum(_bytes_of(fd, piece.begin, piece.nbytes, buffer)) for piece in shard.pieces()]
        finally:
            os.close(fd)
    except OSError:
        return False
    return _digest(sums) == digest


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, shard: Shard, folder: Path) -> None:
        self.shard, self.path = shard, folder / shard.name
        self.pieces = list(shard.pieces())
        self.taken = 0
        self.left, self.sums = len(self.pieces), [0] * len(self.pieces)
        self.file = OutputFile(self.path, shard.size)
        try:
            self.file.write(memoryview(shard.header), 0)
        except BaseException:
            self.file.close()
            raise


def _place(piece: Piece, source: PageBuffer, out: PageBuffer) -> np.ndarray:
    """Where a piece is read to: to its place if it is copied and the kernel does that at full speed."""
    begin = piece.source_begin
    if piece.cut is None and copies_fast(begin, piece.begin):
        return out.at(piece.begin, piece.nbytes)
    return source.at(begin - begin % _ALIGNMENT, piece.source_bytes)


def _read_rest(piece: Piece, file: InputFile, place: np.ndarray, source: PageBuffer) -> np.ndarray:
    """Reads a piece that is not in the cache, and waits for it."""
    begin = piece.source_begin
    if piece.cut is not None and begin % _ALIGNMENT:
        piece.source.file.read_into(place.data, begin)
        return place
    return file.read_rest(source, begin, piece.source_bytes)


def _cut(piece: Piece, read: np.ndarray, out: PageBuffer) -> memoryview:
    """The bytes of a piece, in `out`, at an address for OutputFile.write()."""
    cut, stored = piece.cut, piece.source
    result = out.at(piece.begin, piece.nbytes)
    if cut is not None:
        cut.apply(_tensor(read, cut.source_shape, stored.dtype), out=_tensor(result, cut.shape, stored.dtype))
    elif read.ctypes.data != result.ctypes.data:
        np.copyto(result, read)
    return result.data


def _tensor(data: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(data).view(dtype).view(tuple(shape))


class _Work:
    """The pieces of all shards, which several threads take one by one."""

    def __init__(
        self,
        shards: Sequence[Shard],
        folder: Path,
        on_bytes: Callable[[int], object],
        on_shard: Callable[[Shard, str], None],
        threads: int,
    ) -> None:
        self._shards, self._folder = iter(shards), folder
        self._on_bytes, self._on_shard = on_bytes, on_shard
        self._lock = threading.Lock()
        self._current: _OpenShard | None = None
        self._open: set[_OpenShard] = set()
        self._computing = threading.Semaphore(threads)
        sources = {output.source.file for shard in shards for output in shard.outputs}
        self._inputs = {file: InputFile(file) for file in sources}
        self.stop = threading.Event()

    def run(self) -> None:
        """The work of each thread, until nothing is left to do or another thread has failed."""
        torch.set_num_threads(1)  # torch must not start threads of its own in each of these threads
        source, out = PageBuffer(), PageBuffer()
        try:
            while self._one_piece(source, out):
                pass
        except BaseException:
            self.stop.set()
            raise

    def close(self) -> None:
        """Call after the threads have ended: closes the files that a failure left open.

        One that cannot be closed hides neither the failure nor the others: what it holds is not relied on.
        """
        for shard in self._open:
            with contextlib.suppress(OSError):
                shard.file.close()
        for file in self._inputs.values():
            file.close()

    def _take(self) -> tuple[_OpenShard, int] | None:
        while self._current is None or self._current.taken == len(self._current.pieces):
            shard = next(self._shards, None)
            if shard is None:
                return None
            try:
                self._current = _OpenShard(shard, self._folder)
            except OSError as error:
                raise write_error(error, self._folder / shard.name) from None
            self._open.add(self._current)
            if not self._current.pieces:
                self._finish(self._current)
        self._current.taken += 1
        return self._current, self._current.taken - 1

    def _one_piece(self, source: PageBuffer, out: PageBuffer) -> bool:
        """Reads, cuts and writes the next piece; False: there is none, or another thread has failed."""
        with self._lock:
            taken = None if self.stop.is_set() else self._take()
        if taken is None:
            return False
        shard, number = taken
        piece = shard.pieces[number]
        file = self._inputs[piece.source.file]
        with self._computing:
            read = _place(piece, source, out)
            whole = file.read_cached(read.data, piece.source_begin) == len(read)
        if not whole:
            read = _read_rest(piece, file, read, source)
        with self._computing:
            data = _cut(piece, read, out)
            shard.sums[number] = checksum(data)
            waits = shard.file.direct
            if not waits:
                self._write(shard, piece, data)
        if waits:
            self._write(shard, piece, data)
        with self._lock:
            shard.left -= 1
            last = shard.left == 0
            self._on_bytes(len(data))
        if last:
            self._finish(shard)
        return True

    @staticmethod
    def _write(shard: _OpenShard, piece: Piece, data: memoryview) -> None:
        try:
            shard.file.write(data, piece.begin)
        except OSError as error:
            raise write_error(error, shard.path) from None

    def _finish(self, shard: _OpenShard) -> None:
        try:
            shard.file.sync()
            self._open.discard(shard)
            shard.file.close()
        except OSError as error:
            raise write_error(error, shard.path) from None
        self._on_shard(shard.shard, _digest(shard.sums))


def write_shards(
    shards: Iterable[Shard],
    folder: Path,
    *,
    threads: int,
    on_bytes: Callable[[int], object],
    on_shard: Callable[[Shard, str], None],
) -> None:
    """Writes the shards into `folder`.

    Threads call on_bytes(count), one at a time, as they write bytes of tensors, and on_shard(shard, digest),
    maybe several at once, when a shard is on the disk. After the first error of a thread the others finish
    their piece and end.

    Raises:
        OSError: a file could not be written; names it.
        ValueError: a source file ends too early.
    """
    shards = list(shards)
    work = _Work(shards, folder, on_bytes, on_shard, threads)
    workers = threads + (_WAITING if any(shard.size >= DIRECT_FILE_BYTES for shard in shards) else 0)
    threads_of_torch = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, "minitron-prune") as pool:
            try:
                futures = [pool.submit(work.run) for _ in range(workers)]
                for future in as_completed(futures):
                    future.result()
            finally:
                work.stop.set()  # a keyboard interrupt is raised here, not in the threads
    finally:
        work.close()
        torch.set_num_threads(threads_of_torch)
