"""What files hold, as hashes: of models, of text, and of what stages made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WHOLE_BYTES = 64 << 20  # a file of no more is hashed whole
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # of a greater one these, evenly spaced, the first and the last with them
# of a checkpoint's folder, what a model, its tokenizer and its settings are made of
_OF_MODEL = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")


def digest_of(value: Any) -> str:
    """A SHA-256 of JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """The size and a SHA-256 of a file: of all of it up to 64 MiB, of 64 blocks of 64 KiB beyond.

    A change of a greater file that keeps its size and leaves all blocks is not seen.
    """
    size = path.stat().st_size
    found = hashlib.sha256()
    with path.open("rb") as stream:
        if size <= WHOLE_BYTES:
            while piece := stream.read(1 << 20):
                found.update(piece)
        else:
            for number in range(_BLOCKS):
                stream.seek((size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
                found.update(stream.read(_BLOCK_BYTES))
    return f"{size}:{found.hexdigest()[:32]}"


def digest_of_files(paths: Iterable[Path]) -> str:
    """Of files in their order; their names do not count."""
    return digest_of([digest_of_file(path) for path in paths])


def digest_of_model(folder: Path) -> str:
    """Of the config, weights, tokenizer and settings in a checkpoint's folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _OF_MODEL)
    return digest_of({path.name: digest_of_file(path) for path in files})


def listing(path: Path) -> dict[str, str]:
    """{file below it: its hash} of what a stage made; checkpoints of training are left out."""
    if path.is_file():
        return {path.name: digest_of_file(path)}
    found = {}
    for root, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("checkpoint-"))
        for name in sorted(names):
            file = Path(root, name)
            found[file.relative_to(path).as_posix()] = digest_of_file(file)
    return found


def changed(path: Path, listed: dict[str, str]) -> str | None:
    """What of a stage's files is not as it was made; None: nothing."""
    for name, digest in listed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if digest_of_file(file) != digest:
            return f"{name} has changed"
    return None
