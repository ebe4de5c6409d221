"""Tensors that end, or begin, exactly at a page without access: a byte beyond, read or written, is SIGSEGV.

    with GuardPages(at_end=True) as pages:
        x = pages.copy(x)               # the last byte of x is the last of its page
        with pages.results():           # so is what torch allocates in here, called from Python
            result = op(x)

A workspace that is borrowed in there is exactly as large as was asked for. What C++ allocates for itself is
not guarded.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minitron_kernels import _workspace

PAGE = mmap.PAGESIZE
NO_ACCESS, READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
BYTE = 0xFF  # of what nobody has written: a NaN of every float type
# calls of torch whose result is memory of its own
FRESH = {
    *(torch.empty, torch.zeros, torch.empty_like, torch.zeros_like, torch.full),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.long),
}


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class GuardPages:
    """Gives tensors such memory until it is left; then nothing may use them any more."""

    def __init__(self, *, at_end: bool) -> None:
        self.at_end, self._libc, self._mapped = at_end, _libc(), []

    def __enter__(self) -> GuardPages:
        return self

    def __exit__(self, *_: object) -> None:
        for address, size in self._mapped:
            self._libc.munmap(address, size)
        self._mapped.clear()

    def empty(self, elements: int, dtype: torch.dtype, beyond: int = 0) -> Tensor:
        """A vector at a guard page, full of NaN. For tests of the guard it has `beyond` elements too many."""
        if elements == 0:
            return torch.empty(0, dtype=dtype)
        nbytes, reach = elements * dtype.itemsize, (elements + beyond) * dtype.itemsize
        inside = -(-nbytes // PAGE) * PAGE
        size = inside + 2 * PAGE
        address = self._libc.mmap(None, size, NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert address not in (None, ctypes.c_void_p(-1).value), "no memory"
        self._mapped.append((address, size))
        assert self._libc.mprotect(address + PAGE, inside, READ_WRITE) == 0
        ctypes.memset(address + PAGE, BYTE, inside)
        start = address + PAGE + (inside - nbytes if self.at_end else 0)
        buffer = (ctypes.c_char * reach).from_address(start)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype)

    def copy(self, x: Tensor) -> Tensor:
        """x with its shape, strides and values; what its strides leave out is NaN."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        flat = self.empty(span if x.numel() else 0, x.dtype)
        out = flat.as_strided(x.shape, x.stride()).copy_(x.detach())
        return out.requires_grad_(x.requires_grad)

    def rows(self, x: Tensor, gap: int = 3) -> Tensor:
        """x with `gap` elements between its rows, none behind the last."""
        wide = x.new_empty(*x.shape[:-1], x.shape[-1] + gap)[..., : x.shape[-1]]
        return self.copy(wide.copy_(x.detach()).requires_grad_(x.requires_grad))

    @contextmanager
    def results(self) -> Iterator[None]:
        """What torch allocates in here, and workspaces, lie at guard pages."""
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(_workspace, "borrow", self._borrow))
            stack.enter_context(_Guarded(self))
            yield

    @contextmanager
    def _borrow(self, nbytes: int, device: torch.device) -> Iterator[Tensor]:
        yield self.empty(nbytes, torch.uint8)


class _Guarded(TorchFunctionMode):
    def __init__(self, pages: GuardPages) -> None:
        super().__init__()
        self._pages = pages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in FRESH or not isinstance(out, Tensor) or out.requires_grad or out.device.type != "cpu":
            return out
        memory = out.untyped_storage().data_ptr()
        if any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == memory for x in args):
            return out  # as it was
        return self._pages.copy(out)
