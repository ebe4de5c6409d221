"""Scores on disk: importance.json names the file of tensors that belongs to it.

The new tensors go to a file with a new name. Then the JSON is replaced, in one step, and older tensors are
deleted. So a writer that is killed at any moment leaves a complete pair of files, the old or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_kernels._files import reason
from minitron_kernels.pruning.families.registry import family_in

if TYPE_CHECKING:
    from torch import Tensor

ABOUT = "importance.json"
TENSORS = "importance-{digest}.safetensors"
FORMAT = "minitron_kernels.importance"
VERSION = 1


def write(folder: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files, tensors first. Where that fails nothing new is left, and what was there stays."""
    from safetensors.torch import save

    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    data = save(dict(tensors))
    name = TENSORS.format(digest=hashlib.sha256(data).hexdigest()[:16])
    was_there = (folder / name).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / name, data)
        whole = {"format": FORMAT, "version": VERSION, "tensors": name, **about}
        _replace(folder / ABOUT, (json.dumps(whole, indent=1) + "\n").encode())
    except OSError:
        with contextlib.suppress(OSError):
            if not was_there:
                (folder / name).unlink()
        _remove_empty(folder.absolute(), above)
        raise
    for old in folder.glob(TENSORS.format(digest="*")):
        if old.name != name:
            old.unlink(missing_ok=True)


def _remove_empty(folder: Path, above: Path) -> None:
    """Removes a folder and those around it, below `above`, as far as they are empty."""
    with contextlib.suppress(OSError):
        while folder != above:
            folder.rmdir()
            folder = folder.parent


def read(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The path of the JSON, its content, and the tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    about, file = read_about(folder)
    try:
        tensors = load(file.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: is not a whole safetensors file: {error}") from None
    return folder / ABOUT, about, tensors


def read_about(folder: Path) -> tuple[dict[str, Any], Path]:
    """(content of the JSON, path of the file of tensors), without the tensors and without torch.

    Raises:
        FileNotFoundError: the folder holds no scores; the tensors are not there.
        ValueError: the JSON is damaged or something else; names it.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; ImportanceScores.save() writes it")
    try:
        about = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
        found = {key: about.get(key) for key in ("format", "version")} if isinstance(about, dict) else about
        raise ValueError(f"{path}: must be {FORMAT} version {VERSION}, got {found!r}")
    name = about.get("tensors")
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{path}: tensors must name a file beside it, got {name!r}")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder / name}: there is no such file, but {path} names it")
    return about, folder / name


def config_of(folder: Path) -> dict[str, Any]:
    """The config of the model that the scores in a folder are of, without the tensors and without torch.

    Raises:
        FileNotFoundError, ValueError: as read_about() does; it is not in the JSON, or of no model.
    """
    return config_in(folder, read_about(folder)[0])


def config_in(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """config_of() a folder whose JSON has been read."""
    config = about.get("config")
    if not isinstance(config, dict):
        raise not_scores(folder / ABOUT, KeyError("config"))
    family_in(folder / ABOUT, config)
    return config


def not_scores(path: Path, error: Exception) -> ValueError:
    """What is said of a JSON whose content is not that of scores."""
    what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(f"{path}: not the scores that ImportanceScores.save() writes: {what}")


def _replace(path: Path, data: bytes) -> None:
    """Writes a file beside `path`, then renames it to `path`."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:  # the part's name says nothing to a reader
        raise OSError(error.errno, reason(error), str(path)) from None
    finally:
        part.unlink(missing_ok=True)
