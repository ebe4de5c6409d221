"""The files beside the weights of a checkpoint: which are copied, left out, or refused.

Files that are valid for the smaller model too are copied: tokenizer, templates, generation settings, code,
licences. All others are left out and reported: they may describe the old weights (training state,
evaluations, another format's parameters), and a wrong file beside right weights is noticed late. Files that
change the meaning of the weights (adapters, quantisation) are refused.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_kernels._command.models import check_no_adapter

_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.tiktoken"),
    *("sentencepiece.bpe.model", "tekken.json", "chat_template.*", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py", "generation_*.py"),
    *("LICEN[SC]E*", "COPYING*", "NOTICE*", "USE_POLICY*", "CITATION*", "SECURITY.md"),
)
_COPIED_FOLDERS = {"additional_chat_templates": ("*.jinja",)}
# files of ModelOpt, AutoGPTQ and AutoAWQ
_QUANTISED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# config keys of transformers, compressed-tensors and MLX
_QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")


@dataclass(frozen=True)
class SideFiles:
    """Paths inside a checkpoint's folder; those of folders end in "/"."""

    copied: tuple[str, ...]
    left_out: tuple[str, ...]


def side_files(folder: Path, made: Set[str]) -> SideFiles:
    """Sorts the files in `folder`, except those that are `made` anew (weights, config, model card).

    Hidden files and folders (.git, .cache) are ignored.
    """
    copied, left_out = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name
        if name.startswith(".") or name in made:
            continue
        if entry.is_dir():
            inside, rest = _sort_folder(Path(entry.path), _COPIED_FOLDERS.get(name, ()))
            copied += [f"{name}/{file}" for file in inside]
            left_out += [f"{name}/{file}" for file in rest] if inside else [f"{name}/"]
        elif entry.is_file() and _matches(name, _COPIED):
            copied.append(name)
        else:
            left_out.append(name)
    return SideFiles(tuple(copied), tuple(left_out))


def _sort_folder(folder: Path, patterns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The names in a folder that match the patterns, and those that do not."""
    inside: tuple[list[str], list[str]] = ([], [])
    for path in sorted(folder.iterdir()) if patterns else ():
        inside[not (path.is_file() and _matches(path.name, patterns))].append(path.name)
    return inside


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError if something in `folder` changes the meaning of its weights; says what to do."""
    check_no_adapter(folder)
    quantised = [folder / name for name in _QUANTISED if os.path.lexists(folder / name)]
    keys = [key for key in _QUANTISED_KEYS if config.get(key) is not None]
    if quantised or keys:
        where = f"{folder / 'config.json'}: the checkpoint is quantised ({keys[0]})" if keys else ""
        raise ValueError(
            f"{where or f'{quantised[0]}: the checkpoint is quantised'}, and its scales would no longer fit; "
            "prune the checkpoint it was made from"
        )
