"""What a part of the benchmark is: one kernel or GEMM at one size, with the bytes or flops that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class Absent(Exception):
    """Why a part cannot be measured here."""


class Sizes(NamedTuple):
    """Of the distillation loss, and what beside them depends on how long a run may take."""

    N: int  # tokens
    H: int  # hidden sizes of student and teacher
    Ht: int
    V: int
    chunks: tuple[int, ...]  # rows of a chunk
    tile: int  # entries of a tile of the vocabulary
    copy_bytes: int  # of the yardstick
    square: int  # side of the yardstick's matrices


FULL = Sizes(8192, 4096, 5120, 131072, (1024, 1408, 2048), 8192, 1 << 30, 8192)
QUICK = Sizes(96, 64, 80, 3000, (32, 48), 512, 1 << 24, 256)


class Work(NamedTuple):
    """One part, ready to be timed.

    Attributes:
        call: what is timed.
        bytes: that it reads and writes, each once, 0 for a GEMM.
        flops: of a GEMM, else 0.
        check: raises AssertionError if the results of a call are wrong.
    """

    call: Callable[[], object]
    bytes: int = 0
    flops: int = 0
    check: Callable[[], None] = lambda: None


class Part(NamedTuple):
    """`build` allocates what the part needs, and raises Absent where it cannot run."""

    key: str
    build: Callable[[], Work]


Parts = Callable[[str, Sizes], Iterator[Part]]  # of (device, sizes)


def normal(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    """Random numbers, others for each shape: constants draw less power and run faster."""
    generator = torch.Generator(device).manual_seed(sum(i * size for i, size in enumerate(shape, 1)))
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)


def near(found: torch.Tensor, wanted: torch.Tensor, rel: float) -> None:
    """Checks a result against a truth in the Frobenius norm; NaN fails."""
    wanted = wanted.double()
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error <= rel, f"relative error {error:.2g}, allowed {rel:.0e}"
