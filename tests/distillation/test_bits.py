"""pack_bits() against bits that Python writes one by one; what is refused."""

from __future__ import annotations

import pytest
import torch

from minitron_kernels.distillation.cache.bits import (
    id_bits,
    pack_bits,
    pack_ids,
    packed_bytes,
    unpack_bits,
    unpack_ids,
)


def bit_by_bit(values: list[int], bits: int) -> bytes:
    whole = sum(value << (j * bits) for j, value in enumerate(values))
    return whole.to_bytes(-(-len(values) * bits // 8), "little")


@pytest.mark.parametrize("bits", range(1, 33))
def test_layout_and_back(bits):
    generator = torch.Generator().manual_seed(bits)
    for count in (0, 1, 2, 7, 8, 9, 16, 61):
        values = torch.randint(0, 1 << bits, (count,), generator=generator)
        values[: count // 3] = (1 << bits) - 1  # all bits set next to others
        packed = pack_bits(values, bits)
        assert packed.dtype == torch.uint8 and bytes(packed.tolist()) == bit_by_bit(values.tolist(), bits)
        assert packed_bytes(count, bits) == packed.numel()
        assert torch.equal(unpack_bits(packed, bits, count), values)
        # from the middle of another tensor, at an odd address
        around = torch.cat((packed.new_ones(1), packed, packed.new_ones(1)))
        assert torch.equal(unpack_bits(around[1:-1], bits, count), values)
        strided = torch.stack((packed, ~packed), -1)[:, 0]
        assert torch.equal(unpack_bits(strided, bits, count), values)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("bits", [7, 8, 16, 18])
def test_dtypes_and_order(dtype, bits):
    values = torch.arange(6 * 7, dtype=dtype).view(6, 7).t()  # not contiguous
    packed = pack_bits(values, bits)
    assert bytes(packed.tolist()) == bit_by_bit(values.reshape(-1).tolist(), bits)


@pytest.mark.parametrize("bits", [1, 5, 8, 16, 17, 32])
def test_values_out_of_range_are_refused(bits):
    for wrong in (-1, 1 << bits):
        with pytest.raises(ValueError, match=rf"values must be in \[0, {1 << bits}\).*got {wrong}"):
            pack_bits(torch.tensor([0, wrong, 1]), bits)


def test_what_does_not_fit_is_refused():
    one = torch.tensor([1])
    for wrong in (0, 33, -1):
        with pytest.raises(ValueError, match=r"bits must be in 1\.\.32"):
            pack_bits(one, wrong)
    for wrong in (8.0, True, "8"):
        with pytest.raises(TypeError, match="bits must be an int"):
            pack_bits(one, wrong)
    for wrong in (one.float(), one.bool(), [1]):
        with pytest.raises(TypeError, match="values must be a tensor of integers"):
            pack_bits(wrong, 8)
    packed = pack_bits(torch.arange(5), 5)
    with pytest.raises(TypeError, match="data must be a tensor of uint8"):
        unpack_bits(packed.long(), 5, 5)
    for data, count in ((packed, 7), (packed, 3), (packed[:-1], 5), (packed[None], 5)):
        with pytest.raises(ValueError, match="data must be"):
            unpack_bits(data, 5, count)
    with pytest.raises(ValueError, match="count must be at least 0"):
        unpack_bits(packed, 5, -1)
    packed[-1] |= 128  # behind the 25th bit
    with pytest.raises(ValueError, match="bits behind"):
        unpack_bits(packed, 5, 5)


@pytest.mark.parametrize(
    ("vocab_size", "padded", "bits"),
    [
        (1, False, 1),
        (2, False, 1),
        (2, True, 2),
        (131072, False, 17),
        (131072, True, 18),
        (131071, True, 17),
        (151936, False, 18),
        (262144, False, 18),
        (262144, True, 19),
    ],
)
def test_ids(vocab_size, padded, bits):
    assert id_bits(vocab_size, padded=padded) == bits
    least = -1 if padded else 0
    ids = torch.tensor([[least, vocab_size - 1, 0], [vocab_size // 2, vocab_size - 1, least]])
    packed = pack_ids(ids, vocab_size, padded=padded)
    assert packed.numel() == packed_bytes(6, bits)
    assert torch.equal(unpack_ids(packed, vocab_size, 6, padded=padded), ids.reshape(-1))
    for wrong in (least - 1, vocab_size):
        with pytest.raises(ValueError, match=f"ids must be in .* got {wrong}"):
            pack_ids(torch.tensor([0, wrong]), vocab_size, padded=padded)
    with pytest.raises(TypeError, match="values must be"):
        pack_ids(ids.double(), vocab_size, padded=padded)


def test_an_id_of_no_token_is_damage():
    packed = pack_bits(torch.tensor([1, 6]), 3)
    assert unpack_ids(packed, 7, 2, padded=False).tolist() == [1, 6]
    with pytest.raises(ValueError, match="has the id 6 where there are 5 tokens"):
        unpack_ids(packed, 5, 2, padded=False)
    with pytest.raises(ValueError, match="vocab_size must be"):
        id_bits(0, padded=False)
