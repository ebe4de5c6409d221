"""Tests of gather by Triton, written for device="cuda". Not collected by name: gather/test_triton.py runs
them on the CPU under ttsem (values, bounds, races), gather/test_gpu.py on a GPU.

Blocks are shrunk, so that small shapes have several blocks and ragged ends.
"""

import pytest
import torch

import minitron_kernels as mk
from gather.problems import DTYPES, KINDS, WIDTHS, assert_gathered, keep_some, make_weight
from minitron_kernels.ops.gather import kernel_triton

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel_triton, "BLOCK_BYTES", 128)
    monkeypatch.setattr(kernel_triton, "BLOCK_R", 4)


def check(weight, rows=None, cols=None, out=None):
    weight = weight.to(DEVICE)
    result = mk.gather_channels(weight, rows, cols, out=out, backend="triton")
    assert out is None or result is out
    assert_gathered(result, weight, rows, cols)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype):
    weight = make_weight(2, 9, 48, dtype=dtype)
    rows, cols = keep_some(9, 6), keep_some(48, 30)
    for keep in ((rows, cols), (None, None)):
        check(weight, *keep)


LENGTHS = [(kind, dtype) for kind in KINDS for dtype in (WIDTHS if kind == "sorted" else WIDTHS[:2])]


@pytest.mark.parametrize(("kind", "dtype"), LENGTHS)
def test_lengths(kind, dtype):
    """Rows of whole and of broken words, indices that are and are not blocks."""
    weight = make_weight(7, 176, dtype=dtype)
    for count in (1, 63, 64, 128):
        check(weight, keep_some(7, 5, kind), keep_some(176, count, kind, seed=count))
    check(make_weight(3, 177, dtype=dtype), cols=keep_some(177, 100, kind))


# blocks up to 16 bytes are moved as one, and one more that is not
BLOCKS = [(block, dtype) for dtype in WIDTHS for block in (1, 2, 4, 8, 16) if block * dtype.itemsize <= 32]


@pytest.mark.parametrize(("block", "dtype"), BLOCKS)
def test_blocks(block, dtype):
    """Whole blocks, by rows that begin anywhere."""
    cols = (keep_some(160 // block, 96 // block)[:, None] * block + torch.arange(block)).flatten()
    index = mk.ChannelIndex(cols, 160)
    assert index.block >= block
    for width, start, to in ((192, 0, 0), (192, 1, 0), (192, 0, 1), (192, 2, 4), (192, 16, 16), (193, 0, 0)):
        base, room = (make_weight(5, width, dtype=dtype, seed=i).to(DEVICE) for i in range(2))
        weight, out = base[:, start : start + 160], room[:, to : to + 96]
        before = room.clone()
        assert mk.gather_channels(weight, cols=index, out=out, backend="triton") is out
        assert_gathered(out, weight, None, cols)
        before[:, to : to + 96] = out
        assert_gathered(room, before)  # nothing else was written


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128])  # complex128: words of two
def test_strides(dtype):
    x = make_weight(4, 10, 24, dtype=dtype).to(DEVICE)
    for weight in (
        x[..., ::3],
        x.mT.contiguous().mT,
        x.transpose(0, 1),
        x.permute(1, 2, 0),
        x[:, :1].expand(4, 6, 24),
        x.view(2, 2, 1, 5, 2, 24).transpose(0, 3),
        x[2],
        x[1, 2],
    ):
        cols = keep_some(weight.shape[-1], weight.shape[-1] // 2 + 1)
        rows = keep_some(weight.shape[-2], weight.shape[-2] // 2 + 1) if weight.dim() > 1 else None
        for keep in ((rows, cols), (rows, None), (None, cols)):
            out = check(weight, *keep)
            if weight.dim() > 1:
                check(weight, *keep, out=torch.zeros_like(out).mT.contiguous().mT)
            check(weight, *keep, out=torch.stack([out, out], -1)[..., 0].zero_())
    swapped = torch.zeros(2, 2, 10, 24, dtype=dtype, device=DEVICE).transpose(0, 1)
    check(x.view(2, 2, 10, 24), out=swapped)
    many = torch.zeros(2, 3, 2, 3, 2, 1, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match="at most 3: make them contiguous"):
        mk.gather_channels(many.permute(3, 2, 1, 0, 4, 5), backend="triton")


def test_empty_and_one():
    none, one = torch.empty(0, dtype=torch.int64), torch.tensor([0])
    weight = make_weight(3, 5, 7)
    for w, rows, cols in ((weight, none, one), (weight, one, none), (weight[:0], one, one)):
        check(w, rows, cols)
    check(weight[:1, :1, :1], one, one)
    check(make_weight(240).as_strided((1, 10, 24), (241, 24, 1)))  # a dimension of 1, with whatever stride


def test_indices_on_the_device():
    """Tensors that live there, and an index that is used on both devices."""
    weight = make_weight(20, 64)
    rows = keep_some(20, 12, "shuffled")
    index = mk.ChannelIndex(rows.to(DEVICE), 20)
    for keep in (rows.to(DEVICE), rows.to(DEVICE).int(), index, index):
        result = mk.gather_channels(weight.to(DEVICE), keep, backend="triton")
        assert_gathered(result, weight, rows)
    assert_gathered(mk.gather_channels(weight, index), weight, rows)
    with pytest.raises(ValueError, match=r"rows\[1\] is 20"):
        mk.gather_channels(weight.to(DEVICE), torch.tensor([0, 20], device=DEVICE), backend="triton")
