"""What every kernel of kl_scale_grad_ is tested with: scale(grad, factor) on tensors of one device."""

import math

import torch

FACTORS = (0.5, -1 / 3, 1.0, 1.0 + 2**-23, 0.0, 1e-30, 65504.0, math.inf, -math.inf, math.nan)
SIZES = (*range(20), 31, 32, 33, 64, 65, 100, 255, 256, 257, 1000)


def values(n, dtype, seed=0):
    """Normal numbers, and among them what a product may turn into something else."""
    out = torch.randn(n, generator=torch.Generator().manual_seed(seed + n), dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, torch.finfo(dtype).max])
    at = torch.arange(n) % 11 == 3
    out[at] = special.double()[torch.arange(int(at.sum())) % len(special)]
    return out.to(dtype)


def assert_scaled(actual, grad, factor):
    """The float64 product, off by one rounding to grad's dtype and, where that is another, one to fp32."""
    if factor == 1.0:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[grad.element_size()]
        assert torch.equal(actual.view(bits), grad.view(bits))
        return
    truth, got = grad.double() * factor.double(), actual.double()
    special = ~truth.isfinite() | (truth.abs() > torch.finfo(grad.dtype).max)
    wrong = special & ~((got == truth.to(grad.dtype).double()) | (got.isnan() & truth.isnan()))
    assert not wrong.any(), f"not what {truth[wrong][:3]} rounds to: {got[wrong][:3]}"
    info, same = torch.finfo(grad.dtype), grad.dtype == factor.dtype
    eps = info.eps if same else info.eps + torch.finfo(factor.dtype).eps
    bound = truth.abs() * (eps / 2) + info.smallest_normal * info.eps
    off = (got - truth).abs()[~special] > bound[~special]
    assert not off.any(), f"{truth[~special][off][:3]} became {got[~special][off][:3]}"


def check(scale, dtype, device="cpu", sizes=SIZES, factors=FACTORS, starts=(0, 1, 3)):
    """Every size at several alignments, by every factor; nothing beside it changes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for i, n in enumerate(sizes):
        for start in starts:
            factor = torch.tensor(factors[(i + start) % len(factors)], dtype=wide)
            whole = values(start + n + 40, dtype)
            given = whole.clone().to(device)
            scale(given[start : start + n], factor.to(device))
            after = given.cpu()
            assert_scaled(after[start : start + n], whole[start : start + n], factor)
            assert_scaled(after[:start], whole[:start], torch.ones(()))
            assert_scaled(after[start + n :], whole[start + n :], torch.ones(()))
