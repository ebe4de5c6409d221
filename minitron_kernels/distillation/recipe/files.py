"""What files hold, as hashes: of models, of text, and of what stages made."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minitron_kernels._command.documents import kind_of
from minitron_kernels._files import sha256_of, write_text

KNOWN = ".hashes.json"  # in the folder of a recipe
WHOLE_BYTES = 64 << 20  # the hash of a greater file is remembered
_NEAR_SECONDS = 2.0  # a change so short before may be followed by another of the same time
# of a checkpoint's folder, what a model, its tokenizer and its settings are made of
_OF_MODEL = (
    *(".json", ".safetensors", ".bin", ".pt", ".gguf", ".py"),
    *(".model", ".txt", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe"),
)
# path -> size, times of the last change of its content and of the file, number of its inode, hash
_known: dict[str, list[Any]] = {}


def digest_of(value: Any) -> str:
    """A SHA-256 of JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """The size and a SHA-256 of all of a file.

    That of a file beyond 64 MiB is remembered, and is not computed again while the file's size, inode and
    times of its last change are the same: that of its content, which programs set as they like, and that of
    the file, which the system sets.
    """
    about, key = path.stat(), os.path.realpath(path)
    stamp = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    if _known.get(key, [])[:-1] == stamp:
        return str(_known[key][-1])
    _known.pop(key, None)
    digest = f"{about.st_size}:{sha256_of(path)[:32]}"
    if about.st_size > WHOLE_BYTES and time.time() - about.st_ctime_ns / 1e9 > _NEAR_SECONDS:
        _known[key] = [*stamp, digest]
    return digest


def recall(path: Path) -> None:
    """Takes up the hashes that keep() wrote; none where the file is not there, or is damaged."""
    _known.clear()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _known.update({key: entry for key, entry in found.items() if len(entry) == 5})
    except (OSError, ValueError, AttributeError, TypeError):
        return


def keep(path: Path) -> None:
    """Writes the hashes of great files that are there still, if they are others than those in the file."""
    for key in [key for key in _known if not os.path.isfile(key)]:
        del _known[key]
    text = json.dumps(_known, indent=1) + "\n"
    before = path.read_text(encoding="utf-8") if path.is_file() else "{}\n"
    if text != before:
        write_text(path, text)


def digest_of_files(paths: Iterable[Path], names: Iterable[str] = ()) -> str:
    """Of files in their order, with the suffixes by which they are read; and of `names`."""
    return digest_of([[[kind_of(path), digest_of_file(path)] for path in paths], list(names)])


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
