"""Text from files: its tokens, behind each other, in windows of one length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PIECE_CHARACTERS = 1 << 20  # tokenised in one call
_PIECE_TOKENS = 1 << 22  # looked at in one call
# first bytes of files that are not text -> what they are, and what to do
_OTHER_FORMATS = {
    b"PAR1": 'is Parquet: make a .jsonl by pandas.read_parquet(..).to_json(.., orient="records", lines=True)',
    b"\x1f\x8b": "is compressed by gzip: unpack it by gunzip first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it by unzstd first",
    b"\xfd7zXZ": "is compressed by xz: unpack it by unxz first",
    b"BZh": "is compressed by bzip2: unpack it by bunzip2 first",
    b"PK\x03\x04": "is a zip archive (.zip, .npz): unpack it first; token ids go into a .npy by numpy.save()",
    b"ARROW1": "is Arrow: write a .jsonl with a text on each line, by datasets' to_json()",
}


class TokenWindows:
    """The tokens of files in windows of one length, without overlap, in the order of the text.

    Where the tokenizer begins a text with a special token (BOS), each window begins with it too. Token ids
    out of a .npy stay in the file and are read as they are asked for.

    Args:
        files: text in UTF-8; .jsonl (.ndjson) with a "text" on each line; or .npy with token ids.
        tokenizer: of transformers; None where all files are .npy.
        length: tokens of a window.

    Raises:
        ValueError: a file cannot be read as its suffix says; there are fewer tokens than one window.
    """

    def __init__(self, files: Sequence[Path], tokenizer: Any, *, length: int) -> None:
        if length < 2:
            raise ValueError(f"seq-len must be at least 2, got {length}")
        self.length = length
        self._start = _first_tokens(tokenizer)
        self._body = length - len(self._start)
        self._parts = [part for file in files for part in _tokens(file, tokenizer)]
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
        order = torch.randperm(self._count, generator=torch.Generator().manual_seed(seed))
        return order[:samples].sort().values.tolist()

    def ids_range(self) -> tuple[int, int]:
        """The smallest and the greatest token id of the files."""
        low, high = zip(*(_range(part) for part in self._parts if len(part)), strict=True)
        start = self._start or [low[0]]
        return min(*low, *start), max(*high, *start)


def _range(ids: np.ndarray) -> tuple[int, int]:
    """(min, max), read piece by piece."""
    pieces = [ids[begin : begin + _PIECE_TOKENS] for begin in range(0, len(ids), _PIECE_TOKENS)]
    return min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)


def _first_tokens(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer puts it before a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _tokens(file: Path, tokenizer: Any) -> Iterator[np.ndarray]:
    if file.suffix == ".npy":
        try:
            ids = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file}: cannot be read as token ids: {error}") from None
        if ids.dtype.kind not in "iu":
            raise ValueError(f"{file}: token ids must be integers, got {ids.dtype}")
        ids = ids.reshape(-1)
        if len(ids) and ids.dtype.kind == "i" and (least := _range(ids)[0]) < 0:
            raise ValueError(f"{file}: token ids must be 0 or greater, got {least}")
        yield ids
        return
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in _texts(file):
        ids = []
        for begin in range(0, len(text), _PIECE_CHARACTERS):
            piece = text[begin : begin + _PIECE_CHARACTERS]
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        yield np.array([*ids, *end], dtype=np.int32)


def _texts(file: Path) -> Iterator[str]:
    with file.open("rb") as stream:
        head = stream.read(8)
    for magic, advice in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise ValueError(f"{file}: must be text, .jsonl or .npy, but {advice}")
    if file.suffix == ".json":
        raise ValueError(
            f'{file}: a .json is not read: write a .jsonl, with an object {{"text": ...}} on each line '
            "(if it has these lines already, rename it)"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")  # drops a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: must be text in UTF-8, but byte {error.start} is not") from None
    if file.suffix not in (".jsonl", ".ndjson"):
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split inside strings, at U+2028
        if line.strip():
            yield _text_of(line, f"{file}: line {number}")


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{where} is not a JSON object with a "text"') from None
    if not isinstance(text, str):
        raise ValueError(f'{where} must have a string as its "text", got {type(text).__name__}')
    return text
