"""The fixture that fills unwritten memory with NaN is in effect."""

import pytest
import torch

from minitron_kernels import _workspace

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_tensors_are_nan(dtype):
    like = torch.zeros(3, 5)
    for x in (
        torch.empty(7, dtype=dtype),
        torch.empty_like(like, dtype=dtype),
        like.new_empty(4, dtype=dtype),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype),
        torch.ops.aten.new_empty(like, [4], dtype=dtype),  # what C++ ops call
        torch.zeros(0, dtype=dtype).resize_(3),
    ):
        assert x.numel() and x.float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_fresh_integers_are_the_largest(dtype):
    assert (torch.empty(5, dtype=dtype) == torch.iinfo(dtype).max).all()


def test_the_workspace_is_nan_every_time():
    device = torch.device("cpu")
    for _ in range(2):
        with _workspace.borrow(64, device) as buffer:
            for dtype in DTYPES[:4]:
                assert buffer[:64].view(dtype).isnan().all()
            buffer[:64].zero_()  # all that was asked for: what is kept may be larger


def test_a_write_behind_the_workspace_is_seen():
    with (
        pytest.raises(AssertionError, match="behind the workspace"),
        _workspace.borrow(64, torch.device("cpu")) as buffer,
    ):
        buffer.as_strided((65,), (1,))[64] = 0
