"""Calibration text from files: windows of tokens, drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron_kernels._command.text import drawn_windows


def calibration_windows(
    files: Sequence[Path],
    tokenizer: Any,
    *,
    length: int,
    samples: int,
    seed: int = 0,
    text_key: str | None = None,
) -> Tensor:
    """`samples` windows of `length` tokens from the files, without overlap; all if there are fewer.

    Where the tokenizer begins a text with a special token (BOS), each window begins with it too. Of a long
    text only what is drawn is tokenised.

    Args:
        files: text in UTF-8; .jsonl (.ndjson), .parquet or .arrow with a "text" or chat "messages" in each
            row; .npy with token ids; folders of those. Text may be compressed (gzip, bzip2, xz, zstd).
        tokenizer: of transformers; None where all files are .npy.
        length, samples: as above.
        seed: of the random choice of windows; they stay in the order of the text.
        text_key: the key or column with the text; None: "text", or else "messages".

    Returns:
        [windows, length] int64.

    Raises:
        ValueError, OSError: a file cannot be read as its suffix says; there are fewer tokens than one window.
    """
    return drawn_windows(files, tokenizer, length=length, samples=samples, seed=seed, text_key=text_key)
