"""Megatron-LM's cache of a teacher's top-k log-probabilities, written by its LogitsSaverHooks.

Files cp{C}_dp{D}__{last iteration}.tar, of one context-parallel and one data-parallel rank. The first member
is _meta.json (hash and identifiers of the data, k, p, dtype), each other one is {iteration}.pt.zst: a
zstd-compressed torch.save() of {"values", "indices_low", "bit_17"}, lists of one tensor [S, B, k] a
micro-batch: log-probabilities in fp16, bf16 or fp32; the lower 16 bits of the ids; their 17th bit. Ids that
top-p left out have the log-probability -1000. The format keeps no token ids, and 131072 tokens at most.

Source: NVIDIA/Megatron-LM, megatron/training/distillation (read at its revision d98e8a6 of August 2026).
"""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.distillation.cache.import_.tails import (
    check_tail,
    check_vocab_size,
    refuse,
    topk_payload,
)

_TAR = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar")
_MEMBER = re.compile(r"(\d+)\.pt\.zst")
_META = "_meta.json"
_LEFT_OUT = -1000.0
_KEYS = ("values", "indices_low", "bit_17")
MAX_VOCAB = 1 << 17

TokenIds = Callable[[int, int, int], Tensor]


def read_megatron(
    folder: str | Path,
    token_ids: TokenIds,
    vocab_size: int,
    *,
    data_hash: str | None = None,
    tail: str = "rest",
    slack: float = 0.02,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Sequences of a Megatron-LM cache.

    Args:
        folder: that of --logits-save, with the tar files of all ranks.
        token_ids: called as token_ids(iteration, dp_rank, micro_batch), gives the `tokens` [B, S] of that
            micro-batch as the teacher's data loader made them: S whole, before context parallelism divides
            it. The cache finds its rows by iteration and rank alone, so that nothing but their shape can be
            checked: data in another order are not noticed. Give data_hash, to have that checked as well.
        vocab_size: the tokenizer's; ids of Megatron's padding behind it are refused.
        data_hash: the "hash" of _meta.json, of seed, sequence length, samples and blend, that is expected.
        tail: "rest": what the k probabilities leave of 1, as in Megatron's own loss; or "renormalise", see
            tails.py.
        slack: how far above 1 a position's sum may be for the rounding of fp16 or bf16.

    Yields:
        (token_ids [S] int64, payload of tier "topk"), iteration by iteration and rank by rank.

    Raises:
        ModuleNotFoundError: there is neither zstandard nor Python's own (3.14).
        ValueError: a rank's file or iteration is missing, a file is damaged or of another format or data, or
            shapes differ from the token ids'; names file and member.
    """
    check_tail(tail, "Megatron-LM's format")
    check_vocab_size(vocab_size)
    if not callable(token_ids):
        raise TypeError("token_ids must be callable: token_ids(iteration, dp_rank, micro_batch) -> [B, S]")
    groups = _groups(Path(folder))
    decompress = _zstd()
    options = {"tail": tail, "vocab_size": vocab_size, "slack": slack}
    return _sequences(groups, token_ids, decompress, data_hash, options)


def _groups(folder: Path) -> list[tuple[int, list[Path]]]:
    """(data-parallel rank, its files by context-parallel rank) for each time that files were written."""
    found: dict[tuple[int, int], dict[int, Path]] = {}
    for path in folder.glob("*.tar"):
        if match := _TAR.fullmatch(path.name):
            cp, dp, last = map(int, match.groups())
            found.setdefault((last, dp), {})[cp] = path
    if not found:
        raise ValueError(f"{folder}: has no cp0_dp0__*.tar: it is not a cache of Megatron-LM")
    ranks = 1 + max(cp for by_rank in found.values() for cp in by_rank)
    replicas = 1 + max(dp for _, dp in found)
    for last in {last for last, _ in found}:
        for dp in range(replicas):
            for cp in range(ranks):
                if cp not in found.get((last, dp), {}):
                    raise ValueError(f"{folder}: has no cp{cp}_dp{dp}__{last}.tar, which other ranks have")
    return [(dp, [found[last, dp][cp] for cp in range(ranks)]) for last, dp in sorted(found)]


def _sequences(
    groups: list[tuple[int, list[Path]]],
    token_ids: TokenIds,
    decompress: Callable[[bytes], bytes],
    data_hash: str | None,
    options: dict[str, Any],
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for dp, paths in groups:
        members = [_members(path, data_hash) for path in paths]
        while True:
            read = [next(part, None) for part in members]
            if all(part is None for part in read):
                break
            iterations = {None if part is None else part[0] for part in read}
            if len(iterations) > 1:
                refuse(
                    str(paths[0].parent), f"context-parallel ranks have iterations {iterations} in {paths}"
                )
            (iteration,) = iterations
            assert iteration is not None
            where = f"{paths[0]}: {iteration}.pt.zst"
            parts = [
                _micro_batches(part[1], f"{path}: {part[0]}.pt.zst", decompress, options["vocab_size"])
                for part, path in zip(read, paths, strict=True)
                if part is not None
            ]
            if len({len(part) for part in parts}) > 1:
                refuse(where, "context-parallel ranks have different numbers of micro-batches")
            for number, of_ranks in enumerate(zip(*parts, strict=True)):
                place = f"{where}: micro-batch {number}"
                ids, logprobs = (
                    _whole([r[0] for r in of_ranks], -1),
                    _whole([r[1] for r in of_ranks], -math.inf),
                )
                tokens = token_ids(iteration, dp, number)
                if not isinstance(tokens, Tensor) or tokens.shape != (ids.shape[1], ids.shape[0]):
                    got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
                    refuse(place, f"is [B, S] {[ids.shape[1], ids.shape[0]]}, and token_ids gave {got}")
                for b, of_sequence in enumerate(tokens.detach().cpu().to(torch.int64)):
                    about = f"{place}: sequence {b}"
                    payload = topk_payload(
                        about, ids[:, b], logprobs[:, b], length=len(of_sequence), **options
                    )
                    yield of_sequence, payload


def _members(path: Path, data_hash: str | None) -> Iterator[tuple[int, bytes]]:
    """(iteration, compressed bytes), after the check of what the first member says."""
    seen = False
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                if member.name == _META:
                    _check_meta(_content(tar, member), data_hash, path)
                    seen = True
                elif match := _MEMBER.fullmatch(member.name):
                    if not seen:
                        refuse(str(path), f"has no {_META} before {member.name}")
                    yield int(match.group(1)), _content(tar, member)
                else:
                    refuse(str(path), f"has {member.name!r}, which is not of Megatron-LM's cache")
    except (tarfile.TarError, EOFError) as error:
        refuse(str(path), f"is damaged, or not a tar file: {error}")
    if not seen:
        refuse(str(path), f"has no {_META}: damaged, or not of Megatron-LM's cache")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} ends after {len(data)} of {member.size} bytes")
    return data


def _check_meta(data: bytes, data_hash: str | None, path: Path) -> None:
    try:
        found = json.loads(data)["hash"]
    except (ValueError, KeyError, TypeError):
        refuse(str(path), f"{_META} is damaged: it has no hash")
    if data_hash is not None and found != data_hash:
        refuse(str(path), f"is of the data with hash {found}, and data_hash is {data_hash}")


def _micro_batches(
    data: bytes, where: str, decompress: Callable[[bytes], bytes], vocab_size: int
) -> list[tuple[Tensor, Tensor]]:
    """(ids [S, B, k] int64, logprobs [S, B, k] float32) for each."""
    try:
        tensors = torch.load(io.BytesIO(decompress(data)), weights_only=True, map_location="cpu")
    except Exception as error:  # of damaged bytes torch.load raises almost anything
        refuse(where, f"is damaged: {type(error).__name__}: {error}")
    if not isinstance(tensors, dict) or set(tensors) != set(_KEYS):
        refuse(where, f"must hold {', '.join(_KEYS)}: it is not of Megatron-LM's cache")
    parts = [tensors[key] for key in _KEYS]
    if any(not isinstance(part, list) for part in parts) or len({len(part) for part in parts}) != 1:
        refuse(where, f"{', '.join(_KEYS)} must be lists of one length")
    out = []
    for number, (values, low, high) in enumerate(zip(*parts, strict=True)):
        if values.dim() != 3 or not values.is_floating_point() or {low.shape, high.shape} != {values.shape}:
            got = list(values.shape), list(low.shape), list(high.shape)
            refuse(where, f"micro-batch {number} must have tensors [S, B, k], got {got}")
        if high.dtype == torch.bool and vocab_size > MAX_VOCAB:
            refuse(
                where,
                f"has ids of 17 bits, which cannot be those of {vocab_size} tokens: ids from {MAX_VOCAB} on "
                "would be wrong without a sign",
            )
        logprobs = values.to(torch.float32)
        ids = (high.to(torch.int64) << 16) | low.to(torch.int64)
        out.append((ids, torch.where(logprobs <= _LEFT_OUT, -math.inf, logprobs)))
    return out


def _whole(parts: list[Tensor], fill: float) -> Tensor:
    """[S, B, k] from context-parallel ranks, of which rank r has the chunks r and 2 n - 1 - r of 2 n."""
    n = len(parts)
    if n == 1:
        return parts[0]
    if len({part.shape[:2] for part in parts}) > 1 or parts[0].shape[0] % 2:
        refuse("context-parallel ranks", f"have shapes {[list(part.shape) for part in parts]}")
    k = max(part.shape[2] for part in parts)  # top-p cuts each rank's by itself
    chunks: list[Tensor] = [parts[0]] * (2 * n)
    for rank, part in enumerate(parts):
        part = torch.nn.functional.pad(part, (0, k - part.shape[2]), value=fill)
        chunks[rank], chunks[2 * n - 1 - rank] = part.chunk(2)
    return torch.cat(chunks)


def _zstd() -> Callable[[bytes], bytes]:
    for name in ("compression.zstd", "zstandard"):
        try:
            module: Any = importlib.import_module(name)
        except ModuleNotFoundError:
            continue

        def decompress(data: bytes, module: Any = module) -> bytes:
            try:
                return bytes(module.decompress(data))
            except getattr(module, "ZstdError", OSError) as error:
                raise ValueError(f"not zstd, or cut off: {error}") from None

        return decompress
    raise ModuleNotFoundError("reading Megatron-LM's cache needs zstandard: pip install zstandard")
