"""Integers of 1 to 32 bits without gaps in bytes: pack_bits(), unpack_bits(); token ids with padding.

Value j has the bits [j b, (j + 1) b) of the data, its lowest bit first; bit i of the data is bit i mod 8 of
byte i // 8. 8 values have b bytes, on any machine. Bits behind the last value are 0.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

MAX_BITS = 32
_LANES = 8  # so many values of b bits are b whole bytes
_VIEWED = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def packed_bytes(count: int, bits: int) -> int:
    """The bytes that `count` values of `bits` bits take, ceil(count * bits / 8)."""
    return -(-_count(count) * _bits(bits) // 8)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Packs integers of `bits` bits one behind the other.

    Args:
        values: [...] int64, int32, int16, int8 or uint8, in [0, 2**bits), read in the order of reshape(-1);
            on any device.
        bits: 1 to 32.

    Returns:
        [packed_bytes(values.numel(), bits)] uint8, on the device of `values`; see the module for the layout.

    Raises:
        TypeError: `values` is not a tensor of integers, or `bits` not an int.
        ValueError: a value is negative or needs more bits, or `bits` is not in 1..32.
    """
    bits = _bits(bits)
    if not isinstance(values, Tensor) or values.dtype not in _INTEGERS:
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"values must be a tensor of integers (int64, int32, int16, int8, uint8), got {got}")
    flat = values.detach().reshape(-1)
    count = flat.numel()
    if count == 0:
        return flat.new_empty(0, dtype=torch.uint8)
    low, high = (int(x) for x in flat.aminmax())
    if low < 0 or high >= 1 << bits:
        wrong = low if low < 0 else high
        raise ValueError(f"values must be in [0, {1 << bits}) to have {bits} bits each, got {wrong}")
    if bits in _VIEWED and sys.byteorder == "little":
        return flat.to(_VIEWED[bits]).contiguous().view(torch.uint8)
    groups = -(-count // _LANES)
    lanes = flat.new_zeros((groups * _LANES,), dtype=torch.int64)
    lanes[:count] = flat
    lanes = lanes.view(groups, _LANES).t().contiguous()
    out = flat.new_zeros((bits, groups), dtype=torch.uint8)
    for lane in range(_LANES):
        first, shift = divmod(lane * bits, 8)
        shifted = lanes[lane] << shift
        for byte in range(-(-(shift + bits) // 8)):
            out[first + byte] |= ((shifted >> (8 * byte)) & 255).to(torch.uint8)
    return out.t().reshape(-1)[: packed_bytes(count, bits)]


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """The values that pack_bits() packed.

    Args:
        data: [packed_bytes(count, bits)] uint8, on any device.
        bits: 1 to 32, as they were packed.
        count: how many values there are.

    Returns:
        [count] int64, on the device of `data`.

    Raises:
        TypeError: `data` is not uint8, or `bits` or `count` not an int.
        ValueError: `data` has another length, or bits behind the last value are set: it is damaged, or was
            packed with another width.
    """
    bits, count = _bits(bits), _count(count)
    if not isinstance(data, Tensor) or data.dtype != torch.uint8:
        got = data.dtype if isinstance(data, Tensor) else type(data).__name__
        raise TypeError(f"data must be a tensor of uint8, got {got}")
    size = packed_bytes(count, bits)
    if data.shape != (size,):
        raise ValueError(f"data must be [{size}], {count} values of {bits} bits; got {list(data.shape)}")
    if count == 0:
        return data.new_empty(0, dtype=torch.int64)
    if (used := count * bits % 8) and int(data[-1]) >> used:
        raise ValueError(
            f"data has bits behind its {count} values of {bits} bits: damaged, or packed with another width"
        )
    if bits in _VIEWED and sys.byteorder == "little":
        aligned = data.contiguous()
        if aligned.storage_offset() % (bits // 8) or aligned.data_ptr() % (bits // 8):
            aligned = aligned.clone()
        return aligned.view(_VIEWED[bits]).to(torch.int64)
    groups = -(-count // _LANES)
    padded = data.new_zeros((groups * bits,))
    padded[:size] = data
    by_byte = padded.view(groups, bits).t().contiguous()
    out = data.new_empty((_LANES, groups), dtype=torch.int64)
    for lane in range(_LANES):
        first, shift = divmod(lane * bits, 8)
        value = by_byte[first].to(torch.int64)
        for byte in range(1, -(-(shift + bits) // 8)):
            value |= by_byte[first + byte].to(torch.int64) << (8 * byte)
        out[lane] = (value >> shift) & ((1 << bits) - 1)
    return out.t().reshape(-1)[:count]


def id_bits(vocab_size: int, *, padded: bool) -> int:
    """The bits of a token id in [0, vocab_size), or in [-1, vocab_size) where `padded`.

    Padding costs a bit where vocab_size is a power of 2: 131072 tokens have 17 bits, and 18 with padding.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise ValueError(f"vocab_size must be an int of at least 1, got {vocab_size!r}")
    return _bits(max(1, (vocab_size - 1 + padded).bit_length()))


def pack_ids(ids: Tensor, vocab_size: int, *, padded: bool) -> Tensor:
    """Packs token ids into id_bits() each; where `padded`, each is stored plus 1, so that -1 is 0.

    Args:
        ids: [...] integers in [0, vocab_size), or in [-1, vocab_size) where `padded`.
        vocab_size: number of tokens.
        padded: whether -1 may stand for "no id".

    Returns:
        [bytes] uint8, as pack_bits().

    Raises:
        TypeError: as pack_bits().
        ValueError: an id is out of range.
    """
    bits = id_bits(vocab_size, padded=padded)
    if isinstance(ids, Tensor) and ids.dtype in _INTEGERS and ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        least = -1 if padded else 0
        if low < least or high >= vocab_size:
            wrong = low if low < least else high
            hint = ": pass padded=True where -1 fills up" if low == -1 and not padded else ""
            raise ValueError(f"ids must be in [{least}, {vocab_size}), got {wrong}{hint}")
        ids = ids.to(torch.int64) + int(padded)
    return pack_bits(ids, bits)


def unpack_ids(data: Tensor, vocab_size: int, count: int, *, padded: bool) -> Tensor:
    """The ids that pack_ids() packed, [count] int64.

    Raises:
        TypeError: as unpack_bits().
        ValueError: as unpack_bits(); an id is none of the vocabulary: damaged data, or of another vocabulary.
    """
    ids = unpack_bits(data, id_bits(vocab_size, padded=padded), count) - int(padded)
    if count and int(ids.max()) >= vocab_size:
        raise ValueError(
            f"data has the id {int(ids.max())} where there are {vocab_size} tokens: it is damaged, or of "
            "another vocabulary"
        )
    return ids


def _bits(bits: Any) -> int:
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"bits must be an int, got {type(bits).__name__}")
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be in 1..{MAX_BITS}, got {bits}")
    return bits


def _count(count: Any) -> int:
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count must be an int, got {type(count).__name__}")
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    return count
