"""gather_channels for torch.compile: shapes without data, the op's schema and its own checks, one graph."""

import pytest
import torch

import minitron_kernels as mk
from gather.problems import BACKENDS, assert_gathered, keep_some


def test_meta():
    result = mk.gather_channels(torch.empty(3, 4, 6, device="meta"), torch.tensor([3, 1]), torch.tensor([0]))
    assert result.device.type == "meta" and result.shape == (3, 2, 1)


@pytest.mark.native
def test_opcheck():
    ops = torch.ops.minitron_kernels
    out, weight = torch.zeros(2, 3), torch.randn(4, 6)
    rows, cols = torch.tensor([3, 1]), torch.tensor([0, 5, 5])
    torch.library.opcheck(ops.gather_channels_.default, (out, weight, rows, cols))
    torch.library.opcheck(ops.gather_channels_.default, (torch.zeros(4, 6), weight, None, None))


@pytest.mark.native
def test_native_op_guards_itself():
    """What torch.compile calls without the checks of Python."""
    op = torch.ops.minitron_kernels.gather_channels_
    out, weight = torch.zeros(2, 6), torch.randn(4, 6)
    for arguments, message in (
        ((out, weight, torch.tensor([0, 4]), None), r"rows\[1\] is 4"),
        ((out, weight, torch.tensor([-1, 0]), None), r"rows\[0\] is -1"),
        ((out, weight, None, None), "out must have weight's shape"),
        ((out.double(), weight, torch.tensor([0, 1]), None), "and its dtype"),
        ((out, weight, torch.tensor([0, 1]).int(), None), "int64"),
        ((out[0], weight[0], torch.tensor([0]), None), "weight must be a vector without rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    assert (out == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    """No graph break, from tensors and from a ChannelIndex; a bad index is found where the op runs."""
    weight = torch.randn(40, 90)
    rows, cols = keep_some(40, 20), keep_some(90, 70)
    index = mk.ChannelIndex(rows, 40)

    def from_tensors(weight, rows, cols):
        return mk.gather_channels(weight, rows, cols, backend=backend) * 1.0

    def from_index(weight, out):
        return mk.gather_channels(weight, index, out=out, backend=backend)

    compiled = torch.compile(from_tensors, fullgraph=True, backend="aot_eager")
    assert_gathered(compiled(weight, rows, cols), weight, rows, cols)
    with pytest.raises((RuntimeError, IndexError)):
        compiled(weight, rows + 30, cols)
    into = torch.compile(from_index, fullgraph=True, backend="aot_eager", dynamic=True)
    for width in (90, 33, 7):
        out = torch.zeros(20, width)
        into(weight[:, :width].contiguous(), out)
        assert_gathered(out, weight[:, :width], rows)
