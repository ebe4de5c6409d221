"""Weights of random bits in every dtype, ways to keep channels, and numpy's take as the oracle."""

import numpy as np
import pytest
import torch

BACKENDS = [pytest.param("native", marks=pytest.mark.native), "reference"]
# one dtype of each kind: floats, integers, bool, and what numpy has no name for
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
# one for each width
WIDTHS = (torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128)


def make_weight(*shape, dtype=torch.bfloat16, seed=0, device="cpu"):
    """Random bits, NaNs of every kind among them."""
    g = torch.Generator().manual_seed(seed)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=g).bool().to(device)
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * width), generator=g, dtype=torch.uint8)
    return raw.view(dtype).to(device)


def bytes_of(x):
    """[..., C] -> numpy bytes [..., C, width], whatever the strides."""
    x = x.detach().cpu().contiguous()
    return x.view(torch.uint8).numpy().reshape(*x.shape, x.element_size())


def oracle(weight, rows=None, cols=None):
    """The bytes of weight[..., rows, :][..., cols], by numpy."""
    out = bytes_of(weight)
    if rows is not None:
        out = np.take(out, rows.cpu().numpy(), axis=weight.dim() - 2)
    return out if cols is None else np.take(out, cols.cpu().numpy(), axis=weight.dim() - 1)


def assert_gathered(actual, weight, rows=None, cols=None):
    expected = oracle(weight, rows, cols)
    assert actual.dtype == weight.dtype and tuple(actual.shape) == expected.shape[:-1]
    wrong = np.argwhere((bytes_of(actual) != expected).any(-1))
    assert len(wrong) == 0, f"{len(wrong)} elements differ, the first at {wrong[0]}"


def keep_some(size, count, kind="sorted", seed=0):
    """`count` of `size` channels: sorted, shuffled, repeated, or in runs of 8."""
    g = torch.Generator().manual_seed(seed)
    if kind == "repeated":
        return torch.randint(0, size, (count,), generator=g)
    if kind == "runs":
        start = torch.randperm(size // 8, generator=g)[: -(-count // 8)].sort()[0]
        return (start[:, None] * 8 + torch.arange(8)).flatten()[:count]
    keep = torch.randperm(size, generator=g)[:count]
    return keep if kind == "shuffled" else keep.sort()[0]


KINDS = ("sorted", "shuffled", "repeated", "runs")
