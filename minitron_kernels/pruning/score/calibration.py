"""Calibration text from files: windows of tokens, drawn at random."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PIECE_CHARACTERS = 1 << 20  # tokenised in one call
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


def calibration_windows(
    files: Sequence[Path], tokenizer: Any, *, length: int, samples: int, seed: int = 0
) -> Tensor:
    """`samples` windows of `length` tokens from the files, without overlap; all if there are fewer.

    Where the tokenizer begins a text with a special token (BOS), each window begins with it too.

    Args:
        files: text in UTF-8; .jsonl (.ndjson) with a "text" on each line; or .npy with token ids.
        tokenizer: of transformers; None where all files are .npy.
        length, samples: as above.
        seed: of the random choice of windows; they stay in the order of the text.

    Returns:
        [windows, length] int64.

    Raises:
        ValueError: a file cannot be read as its suffix says; there are fewer tokens than one window.
    """
    if length < 2 or samples < 1:
        raise ValueError(f"seq-len must be at least 2 and samples at least 1, got {length} and {samples}")
    start = _first_tokens(tokenizer)
    body = length - len(start)
    tokens = np.concatenate(
        [part for file in files for part in _tokens(file, tokenizer)] or [np.zeros(0, int)]
    )
    count = len(tokens) // body
    if not count:
        names = ", ".join(map(str, files))
        raise ValueError(
            f"{names}: {len(tokens)} tokens are fewer than one window of {length}; give more text"
        )
    windows = torch.from_numpy(tokens[: count * body].astype(np.int64)).view(count, body)
    if count > samples:
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
        windows = windows[chosen.sort().values]
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(windows), -1), windows], 1)


def _first_tokens(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer puts it before a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _tokens(file: Path, tokenizer: Any) -> Iterator[np.ndarray]:
    if file.suffix == ".npy":
        try:
            ids = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file}: cannot be read as token ids: {error}") from None
        if ids.dtype.kind not in "iu":
            raise ValueError(f"{file}: token ids must be integers, got {ids.dtype}")
        if ids.size and int(ids.min()) < 0:
            raise ValueError(f"{file}: token ids must be 0 or greater, got {int(ids.min())}")
        yield ids.reshape(-1)
        return
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in _texts(file):
        ids = []
        for begin in range(0, len(text), _PIECE_CHARACTERS):
            piece = text[begin : begin + _PIECE_CHARACTERS]
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        yield np.array([*ids, *end], dtype=np.int64)


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
