"""Windows of text for training and for a cache: which ones, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from minitron_kernels._command.documents import check_files, has_text
from minitron_kernels._command.models import load_config, load_tokenizer
from minitron_kernels._command.text import TokenWindows


class Chosen(Dataset[dict[str, Tensor]]):
    """Windows of files, drawn by a seed, each as input_ids and labels [seq_len].

    Labels are the window's own tokens, as Hugging Face has them; the trainer shifts them. Texts follow each
    other in a window, with an end-of-text token between them, and attend to each other, as in pretraining.
    """

    def __init__(self, windows: TokenWindows, chosen: list[int]) -> None:
        self.windows, self.chosen = windows, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.windows[self.chosen[index]]
        return {"input_ids": ids, "labels": ids}


class Shuffled(Dataset[dict[str, Tensor]]):
    """`total` samples of a dataset: passes over it, each in an order of its own.

    Sample i depends on the dataset, the seed and i alone: not on batches, processes or where a run began.
    """

    def __init__(self, data: Dataset[dict[str, Tensor]], total: int, seed: int) -> None:
        self.data, self.total, self.seed = data, total, seed
        self._size = len(data)  # type: ignore[arg-type]
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        lap, at = divmod(index, self._size)
        if self._order[0] != lap:
            generator = torch.Generator().manual_seed((self.seed + lap * 0x9E3779B97F4A7C15) % 2**63)
            self._order = lap, torch.randperm(self._size, generator=generator, device="cpu")
        return self.data[int(self._order[1][at])]


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples of one length as a batch."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def read_windows(
    files: Sequence[str],
    folder: str,
    *,
    seq_len: int,
    samples: int | None,
    seed: int,
    option: str = "--data",
    text_key: str | None = None,
) -> Chosen:
    """The windows of files, in the tokens of the tokenizer in a checkpoint's folder.

    Raises:
        ValueError, OSError: a file cannot be read; there is no tokenizer; a token that the model lacks.
    """
    from minitron_kernels.pruning.families.configs import config_value

    check_files(files, option)
    paths = [Path(file) for file in files]
    tokenizer: Any = load_tokenizer(Path(folder)) if has_text(paths) else None
    config = load_config(Path(folder))
    longest = config_value(config, "max_position_embeddings", seq_len)
    if seq_len > longest:
        raise ValueError(f"--seq-len must be at most {folder}'s {longest} positions, got {seq_len}")
    windows = TokenWindows(paths, tokenizer, length=seq_len, text_key=text_key)
    low, high = windows.ids_range()
    vocab = config_value(config, "vocab_size")
    if not 0 <= low <= high < vocab:
        raise ValueError(
            f"{files[0]}: token ids must be in [0, {vocab}) of {folder}, got {low} to {high} ({option})"
        )
    return Chosen(windows, windows.draw(len(windows) if samples is None else samples, seed))
