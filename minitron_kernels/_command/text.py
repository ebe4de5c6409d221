"""Text from files: its tokens, behind each other, in windows of one length."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from minitron_kernels._command import documents
from minitron_kernels._command.progress import tqdm_for
from minitron_kernels._files import reason

_PIECE_CHARACTERS = 1 << 20  # of a text, tokenised by itself
_CALL_CHARACTERS = 1 << 21  # tokenised in one call, on all cores where the tokenizer can
_IN_MEMORY = 1 << 28  # bytes of tokens; more go to a file
_PIECE_TOKENS = 1 << 22  # looked at in one call
_LEAST_CHARACTERS = 1 << 22  # of text that is not tokenised as a whole to draw some windows of it
_PER_TOKEN = 8  # characters that are looked at for each token of a drawn window


class TokenWindows:
    """The tokens of files in windows of one length, without overlap, in the order of the text.

    Where the tokenizer begins a text with a special token (BOS), each window begins with it too. Token ids
    out of a .npy stay in the file and are read as they are asked for. Text is tokenised at once, since its
    tokens must be counted, but never in memory as a whole: of its tokens more than 256 MiB are kept in a
    temporary file, 4 bytes each.

    Args:
        files: text in UTF-8; .jsonl (.ndjson), .parquet or .arrow with a "text" or chat "messages" in each
            row; .npy with token ids; folders of those. Text may be compressed (gzip, bzip2, xz, zstd).
        tokenizer: of transformers; None where all files are .npy.
        length: tokens of a window.
        text_key: the key or column with the text; None: "text", or else "messages".

    Raises:
        ValueError, OSError: a file cannot be read as its suffix says; there are fewer tokens than one window;
            there is no space for the temporary file.
    """

    def __init__(
        self, files: Sequence[Path], tokenizer: Any, *, length: int, text_key: str | None = None
    ) -> None:
        if length < 2:
            raise ValueError(f"seq-len must be at least 2, got {length}")
        self.length = length
        self._start = _first_tokens(tokenizer)
        self._body = length - len(self._start)
        self._parts = list(_parts(documents.expand(files), tokenizer, text_key))
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        self.tokens = int(self._ends[-1]) if self._parts else 0
        self._count = self.tokens // self._body
        if not self._count:
            names = ", ".join(map(str, files))
            raise ValueError(
                f"{names}: {self.tokens} tokens are fewer than one window of {length}; give more text"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """Window `index`: [length] int64."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        begin, end = index * self._body, (index + 1) * self._body
        found, part = (
            [np.array(self._start, dtype=np.int64)],
            int(np.searchsorted(self._ends, begin, "right")),
        )
        while begin < end:
            first = int(self._ends[part]) - len(self._parts[part])
            piece = self._parts[part][begin - first : end - first]
            found.append(piece.astype(np.int64))
            begin, part = begin + len(piece), part + 1
        return torch.from_numpy(np.concatenate(found))

    def draw(self, samples: int, seed: int) -> list[int]:
        """Indices of `samples` windows drawn at random, in the order of the text; all if they are fewer."""
        if self._count <= samples:
            return list(range(self._count))
        order = _shuffled(self._count, seed)
        return order[:samples].sort().values.tolist()

    def ids_range(self) -> tuple[int, int]:
        """The smallest and the greatest token id of the files."""
        low, high = zip(*(_range(part) for part in self._parts if len(part)), strict=True)
        start = self._start or [low[0]]
        return min(*low, *start), max(*high, *start)


def drawn_windows(
    files: Sequence[Path],
    tokenizer: Any,
    *,
    length: int,
    samples: int,
    seed: int,
    text_key: str | None = None,
) -> Tensor:
    """`samples` windows drawn at random, in the order of the text; all if there are fewer.

    Of a long text only the drawn stretches are tokenised: it is divided into stretches of 8 · length
    characters, some of which are drawn, and a window is the first `length` tokens behind the first space in
    its stretch. (A short text, or one of which most is wanted, is tokenised whole, as TokenWindows does.)

    Args:
        files, tokenizer, length, text_key: see TokenWindows.
        samples, seed: as above.

    Returns:
        [windows, length] int64.

    Raises:
        ValueError, OSError: see TokenWindows.
    """
    if length < 2 or samples < 1:
        raise ValueError(f"seq-len must be at least 2 and samples at least 1, got {length} and {samples}")
    found = documents.expand(files)
    if not any(documents.is_ids(file) for file in found):
        stretch = length * _PER_TOKEN
        texts = [text for file in found for text in documents.texts(file, tokenizer, text_key)]
        total = sum(map(len, texts))
        if total >= max(_LEAST_CHARACTERS, 2 * samples * stretch):
            windows = _Stretches(texts, tokenizer, length, stretch).draw(samples, seed)
            if len(windows) == samples:  # else the text has fewer tokens than its characters promise
                return torch.tensor(windows, device="cpu")
    all_windows = TokenWindows(files, tokenizer, length=length, text_key=text_key)
    return torch.stack([all_windows[index] for index in all_windows.draw(samples, seed)])


class _Stretches:
    """Texts behind each other, divided into stretches of equally many characters."""

    def __init__(self, texts: list[str], tokenizer: Any, length: int, stretch: int) -> None:
        self._texts, self._tokenizer = texts, tokenizer
        self._length, self._stretch = length, stretch
        self._ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._start, self._end = _first_tokens(tokenizer), _last_tokens(tokenizer)

    def draw(self, samples: int, seed: int) -> list[list[int]]:
        """Windows of drawn stretches, in the order of the text."""
        count = int(self._ends[-1]) // self._stretch
        order = _shuffled(count, seed).tolist()
        found: dict[int, list[int]] = {}
        for index in order:
            window = self._window(index)
            if window is not None:
                found[index] = window
            if len(found) == samples:
                break
        return [found[index] for index in sorted(found)]

    def _window(self, index: int) -> list[int] | None:
        """The first tokens of a stretch, and of those behind it where it has too few; None at the end."""
        at, ids = index * self._stretch, list(self._start)
        first = True
        while len(ids) < self._length and at < int(self._ends[-1]):
            number = int(np.searchsorted(self._ends, at, "right"))
            text, end = self._texts[number], int(self._ends[number])
            begin = at - (end - len(text))
            piece = text[begin : begin + self._stretch]
            half = self._stretch // 2  # spaces are looked for so far; there are scripts without
            if begin + len(piece) < len(text) and (last := piece.rfind(" ", half)) > 0:
                piece = piece[:last]  # the next one begins with the space, not within a word
            at += len(piece)
            if first and begin:  # inside a text: it goes on behind a space, so as not to begin within a word
                piece = piece[piece.find(" ", 0, half) + 1 :]
            first = False
            ids += _encoded(self._tokenizer, piece)
            if at == end:
                ids += self._end
        return ids[: self._length] if len(ids) >= self._length else None


def _shuffled(count: int, seed: int) -> Tensor:
    # on the CPU, as its generator is, wherever new tensors are made
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")


def _range(ids: np.ndarray) -> tuple[int, int]:
    """(min, max), read piece by piece."""
    pieces = [ids[begin : begin + _PIECE_TOKENS] for begin in range(0, len(ids), _PIECE_TOKENS)]
    return min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)


def _first_tokens(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer puts it before a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _last_tokens(tokenizer: Any) -> list[int]:
    """[EOS] if there is one: it stands behind each text."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _encoded(tokenizer: Any, text: Any) -> Any:
    """The tokens of a text, or of each of several."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _parts(files: Sequence[Path], tokenizer: Any, text_key: str | None) -> Iterator[np.ndarray]:
    """The token ids of the texts, and of each .npy; with progress where it takes long."""
    bar = tqdm_for(None)
    shown = None if bar is None else bar(desc="tokenising", total=None, unit="text", delay=5)
    store: _Store | None = None
    for file in files:
        if documents.is_ids(file):
            ids = documents.ids(file)
            if len(ids) and ids.dtype.kind == "i" and (least := _range(ids)[0]) < 0:
                raise ValueError(f"{file}: token ids must be 0 or greater, got {least}")
            if store is not None:
                yield store.tokens()
                store = None
            yield ids
            continue
        store, end = store or _Store(), _last_tokens(tokenizer)
        for pieces in _calls(documents.pieces(file, tokenizer, text_key, _PIECE_CHARACTERS)):
            ids_of_call: list[int] = []
            for (_, last), found in zip(pieces, _encoded_all(tokenizer, pieces), strict=True):
                ids_of_call += found
                ids_of_call += end if last else []
            store.add(ids_of_call)
            if shown is not None:
                shown.update(sum(last for _, last in pieces))
    if store is not None:
        yield store.tokens()
    if shown is not None:
        shown.close()


def _calls(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """As many pieces at a time as are tokenised in one call."""
    held: list[tuple[str, bool]] = []
    characters = 0
    for piece in pieces:
        held.append(piece)
        characters += len(piece[0])
        if characters >= _CALL_CHARACTERS:
            yield held
            held, characters = [], 0
    if held:
        yield held


def _encoded_all(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> list[list[int]]:
    """The tokens of each piece: on all cores by a tokenizer in Rust, which alone can."""
    texts = [text for text, _ in pieces]
    if getattr(tokenizer, "is_fast", False):
        return _encoded(tokenizer, texts)
    return [_encoded(tokenizer, text) for text in texts]


class _Store:
    """Token ids behind each other: in memory, and from _IN_MEMORY bytes on in a file that has no name."""

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def add(self, ids: Sequence[int]) -> None:
        """More of them.

        Raises:
            OSError: there is no space for the file; says where.
        """
        self._held.append(np.array(ids, dtype=np.int32))
        self._bytes += self._held[-1].nbytes
        if self._bytes >= _IN_MEMORY:
            self._write()

    def tokens(self) -> np.ndarray:
        """All of them, int32."""
        if self._file is None:
            return np.concatenate(self._held) if self._held else np.empty(0, np.int32)
        self._write()
        return np.memmap(self._file, dtype=np.int32, mode="r")

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="minitron-tokens-")  # noqa: SIM115
            for part in self._held:
                self._file.write(part.data)
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{reason(error)}: the tokens of the text are kept there, 4 bytes each; set TMPDIR to a "
                "folder with more space, or give token ids, as .npy",
                tempfile.gettempdir(),
            ) from None
        self._held, self._bytes = [], 0
