"""Activations for the importance tests, and the comparison with the oracle on any backend or device."""

import numpy as np
import pytest
import torch

from importance import oracle

BACKENDS = [pytest.param("native", marks=pytest.mark.native), "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums in fp32 chains of at most 8 + 64 additions, totals in float64: a few roundings, 72 at worst.
BOUND = 16 * 2.0**-24


def activations(*shape, dtype=torch.float32, seed=0):
    """Channels of different size and mean, so that no two are alike."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * torch.rand(shape[-1], generator=g).add(0.1)
    return (x + torch.randn(shape[-1], generator=g)).to(dtype)


def numpy_of(x):
    return None if x is None else (x.double() if x.is_floating_point() else x).cpu().numpy()


def check_moments(run, x, *, mask=None, cu_seqlens=None, num_heads=0, bound=BOUND, kinds_of_sums=range(1, 8)):
    """run(x, mask, cu_seqlens, num_heads, kinds) -> (moments, counts), every plane within `bound` of its
    scale.
    """
    borders = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=x.device)
    truth, counts = oracle.moments(
        numpy_of(x), mask=numpy_of(mask), cu_seqlens=cu_seqlens, num_heads=num_heads
    )
    for kinds in kinds_of_sums:
        values, found = run(x, mask, borders, num_heads, kinds)
        assert found.dtype == torch.int64
        assert np.array_equal(numpy_of(found), counts), f"counts {found.tolist()}, wanted {counts.tolist()}"
        planes = [p for bit, p in ((1, 0), (2, 1), (4, 2), (4, 3)) if kinds & bit]
        assert values.shape == (len(planes), *truth.shape[1:])
        for value, plane in zip(numpy_of(values), planes, strict=True):
            # of Σ|v| for the signed sum too; of Σv² for M2, eight times: a group of eight tokens is summed
            # around one of them, which may be the outlier
            scale = {2: truth[0], 3: 8 * truth[1]}.get(plane, truth[plane])
            error = np.abs(value - truth[plane])
            assert (error <= bound * scale).all(), f"plane {plane}: {(error / scale).max():.3g}"


def close_rows(dtype, width=1000):
    """Rows x and y, and 1 − cos(x, y) in float64: a block that turns its input little, or a lot, that
    scales it, or hides it in a much larger output.
    """
    x, turn = activations(6, width, dtype=dtype), activations(6, width, dtype=torch.float32, seed=1)
    steps = torch.tensor([1e-4, 1e-3, 1e-2, 0.1, -3.0, 1e4])[:, None]
    y = (x.float() + steps * turn).to(dtype)
    # whatever rounding to `dtype` made of it is what the kernels are given
    return x, y, oracle.cosine_distance(x.double().numpy(), y.double().numpy())


def check_close_rows(run, dtype, width=1000):
    """run(x, y) -> 1 − cos: to 1e-5 of itself, also where it is 1e-9; both ways round."""
    x, y, truth = close_rows(dtype, width)
    for a, b in ((x, y), (y, x)):
        actual = numpy_of(run(a, b))
        np.testing.assert_allclose(actual, truth, rtol=1e-5, atol=1e-12)
    assert numpy_of(run(x, x)).max() == 0


def sinks(tokens=3000):
    """[1, tokens, 40] with a huge first token, as an attention sink has, and the same with far means."""
    x = activations(1, tokens, 40)
    x[0, 0] = 3000.0
    return x, x + torch.linspace(-500, 500, 40)
