"""Calibration text from files: windows of tokens, drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_kernels._command.text import TokenWindows


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
    windows = TokenWindows(files, tokenizer, length=length)
    return torch.stack([windows[index] for index in windows.draw(samples, seed)])
