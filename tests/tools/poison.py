"""Memory that nobody has written holds NaN: what is read before it is written shows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic

from minitron_kernels import _workspace

BYTE = 0xFF  # repeated, a NaN of every float type, and no size or index that anyone expects
GUARD = 1 << 16  # bytes behind what was asked for, which nobody may write
UNGUARDED = _workspace.borrow


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors, of Python and of C++ ops, hold NaN (integers their largest value), workspaces 0xFF."""
    borrow = _workspace.borrow

    @contextmanager
    def borrow_poisoned(nbytes: int, device: torch.device) -> Iterator[torch.Tensor]:
        with borrow(nbytes + GUARD, device) as buffer:
            yield buffer.fill_(BYTE)[:-GUARD]
            assert (buffer[nbytes : nbytes + GUARD] == BYTE).all(), "written behind the workspace"

    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # what fill_uninitialized_memory is bound to
    deterministic.fill_uninitialized_memory = True
    _workspace.borrow = borrow_poisoned
    try:
        yield
    finally:
        _workspace.borrow = borrow
        deterministic.fill_uninitialized_memory = before[2]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
