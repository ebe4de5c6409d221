"""Which sequences a shard had, in a small file beside it: what says so when a shard is deleted.

rows-<writer>-<number>.json appears by one rename after its shard. A writer that is killed in between leaves a
shard without a list, whose loss is not noticed; a list without its shard is that of one that was deleted.
Without torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from minitron_kernels.distillation.cache.files import publish
from minitron_kernels.distillation.cache.shard_index import DIGEST_BYTES, SHARD_NAME, ShardIndex
from minitron_kernels.pruning.checkpoint.safetensors_files import read_json

_DIGESTS = "sequences"  # SHA-256 of their token ids, in hexadecimal


def list_of(shard: Path) -> Path:
    """Where the list of a shard is."""
    return shard.with_suffix(".json")


def write_list(shard: Path, digests: Sequence[bytes]) -> None:
    """Writes the list of a shard that is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps({"shard": shard.name, _DIGESTS: [digest.hex() for digest in digests]})
    publish(list_of(shard), [text.encode() + b"\n"], replace=True)


def lost_shards(folder: Path, shards: Sequence[ShardIndex]) -> tuple[str, ...]:
    """The shards that a list names and that are gone, each in a line with what to do; by name.

    A shard whose sequences are all in `shards`, as after they were cached again, is not lost.

    Raises:
        ValueError: the list of a shard that is gone is damaged; names it.
    """
    gone = [
        path
        for path in sorted(folder.iterdir())
        if SHARD_NAME.fullmatch(f"{path.stem}.safetensors")
        and path.suffix == ".json"
        and not path.with_suffix(".safetensors").exists()
    ]
    if not gone:
        return ()
    there = {row.tobytes() for shard in shards for row in shard.digests}
    lost = []
    for path in gone:
        if count := len(_read_list(path) - there):
            what = f"{count} sequence{'s' * (count > 1)} that no other shard has"
            lost.append(
                f"{path.with_suffix('.safetensors')}: is gone, with {what}: bring it back, or cache them "
                f"again; delete {path.name} if they are not wanted"
            )
    return tuple(lost)


def _read_list(path: Path) -> set[bytes]:
    try:
        digests = {bytes.fromhex(text) for text in read_json(path)[_DIGESTS]}
    except (KeyError, TypeError, ValueError):
        digests = {b""}
    if any(len(digest) != DIGEST_BYTES for digest in digests):
        shard = path.with_suffix(".safetensors").name
        raise ValueError(f"{path}: is damaged, and its shard {shard} is gone: delete it and cache again")
    return digests
