"""Token ids of positions as sets: about 12 bits an id where 128 of 131072 tokens are kept, instead of 17.

A position's ids, ascending, are cut in two: the low bits of each are packed as they are, and the high parts
h_1 <= ... <= h_k are kept as k ones among zeros, the j-th at bit h_j + j - 1 of the position's field of
k + (V - 1 >> low) + 1 bits. The fields of all positions lie behind each other. These k (low + 1) + (V >> low)
bits are less than a bit an id more than sets of k of V ids need (P. Elias, Efficient storage and retrieval by
content and address of static files, 1974; R. Fano, 1971). `low` is chosen for each sequence.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minitron_kernels.distillation.cache.bits import pack_bits, packed_bytes, unpack_bits


def pack_id_sets(ids: Tensor, k: Tensor, vocab_size: int) -> Tensor:
    """Packs the ids of positions.

    Args:
        ids: [E] int64 in [0, vocab_size), a position's behind those of the one before, ascending in each.
        k: [T] int64, how many are each position's; E together.
        vocab_size: number of tokens.

    Returns:
        [bytes] uint8, the first of which is `low`.
    """
    low = _best_low(ids.numel(), k.numel(), vocab_size)
    starts, size = _fields(k, vocab_size, low)
    ranks = _ranks(k)
    ones = np.zeros(size, np.uint8)
    ones[((ids >> low) + ranks + starts.repeat_interleave(k)).numpy()] = 1
    high = torch.from_numpy(np.packbits(ones, bitorder="little"))
    lows = pack_bits(ids & ((1 << low) - 1), low) if low else ids.new_empty(0, dtype=torch.uint8)
    return torch.cat((torch.tensor([low], dtype=torch.uint8, device="cpu"), lows, high))


def unpack_id_sets(data: Tensor, k: Tensor, vocab_size: int) -> Tensor:
    """The ids [E] int64 that pack_id_sets() packed.

    Raises:
        ValueError: the data are not those of so many ids of such a vocabulary.
    """
    count = int(k.sum())
    low = int(data[0]) if len(data) else 64
    starts, size = _fields(k, vocab_size, min(low, 63))
    split = 1 + (packed_bytes(count, low) if 0 < low <= 32 else 0)
    if low > 32 or len(data) != split + -(-size // 8):
        raise ValueError(f"data are not the ids of {count} tokens at {len(k)} positions: they are damaged")
    bits = np.unpackbits(data[split:].numpy(), bitorder="little", count=size)
    places = torch.from_numpy(bits.nonzero()[0])
    if len(places) != count:
        raise ValueError(f"data have {len(places)} ids, but the positions have {count}: they are damaged")
    ids = (places - _ranks(k) - starts.repeat_interleave(k)) << low
    if low:
        ids += unpack_bits(data[1:split], low, count)
    if count and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"data have ids out of [0, {vocab_size}): they are damaged")
    return ids


def _best_low(count: int, positions: int, vocab_size: int) -> int:
    most = max(vocab_size - 1, 1).bit_length()
    return min(range(most + 1), key=lambda low: count * low + positions * ((vocab_size - 1 >> low) + 1))


def _fields(k: Tensor, vocab_size: int, low: int) -> tuple[Tensor, int]:
    """(the bit where each position's field begins [T], bits of all)."""
    widths = k + ((vocab_size - 1 >> low) + 1)
    ends = widths.cumsum(0)
    return ends - widths, int(ends[-1]) if len(ends) else 0


def _ranks(k: Tensor) -> Tensor:
    """[E]: 0, 1, ... within each position."""
    ends = k.cumsum(0)
    return torch.arange(int(k.sum()), device="cpu") - (ends - k).repeat_interleave(k)
