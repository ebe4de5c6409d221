"""The kernels of importance and gather, by backend. The bytes are those of docs/performance.md."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from common.scripts import script
from parts_rows.part import FULL, Absent, Part, Sizes, Work, near, normal

PIECE = 128  # tokens whose partial sums a block of importance_moments writes, at the shape below
SHAPE, SMALL = (4, 2048, 14336), (2, 256, 1536)
BACKENDS = ("native", "triton")
GATHERS = {"mlp": "rows and columns", "runs": "runs of 64", "rows": "rows", "embedding": "columns"}


def _backend(backend: str, op: str, device: str) -> None:
    from minitron_kernels import _backend

    if reason := _backend.why_not(op, backend, torch.device(device)):
        raise Absent(reason)


def _moments(backend: str, device: str, shape: tuple[int, int, int], flags: int, kept: int) -> Work:
    """Reads x once; the partial sums of pieces are written and read back."""
    from minitron_kernels.ops.importance.moments import moments_by

    _backend(backend, "importance", device)
    x = normal(*shape, device=device)

    def call() -> torch.Tensor:
        return moments_by(backend, x, None, None, 0, flags).values

    def check() -> None:
        near(call()[0, :, :64], x[..., :64].double().abs().sum(1), 1e-5)

    return Work(call, x.nbytes + 8 * kept * x.numel() // PIECE, 0, check)


def _rows(backend: str, device: str, shape: tuple[int, int, int], pairs: bool) -> Work:
    from minitron_kernels.ops.importance.moments import rows_by

    _backend(backend, "importance", device)
    x = normal(shape[0] * shape[1], shape[2], device=device)
    y = x + normal(shape[2], shape[0] * shape[1], device=device).view(x.shape) if pairs else None

    def check() -> None:
        found, wide = rows_by(backend, x, y)[:64], x[:64].double()
        if y is None:
            near(found, wide.norm(dim=1), 1e-5)
        else:
            near(found, 1 - torch.cosine_similarity(wide, y[:64].double()), 1e-4)

    return Work(lambda: rows_by(backend, x, y), x.nbytes * (1 + pairs), 0, check)


def _gather(backend: str, device: str, case: str) -> Work:
    """Reads and writes what is kept; no gather of columns reads as little."""
    from minitron_kernels import ChannelIndex, gather_channels

    _backend(backend, "gather", device)
    bench = script("gather").BENCH
    x = bench.make_inputs(bench.cases[case], device)
    R, C = x.weight.shape
    rows, cols = (None if k is None else ChannelIndex(k, n) for k, n in ((x.rows, R), (x.cols, C)))

    def call() -> torch.Tensor:
        return gather_channels(x.weight, rows, cols, out=x.out, backend=backend)

    def check() -> None:
        bench.poison(x)
        assert bench.error(x, call()) == 0.0, "other bits than numpy's take"

    return Work(call, 2 * x.out.nbytes, 0, check)


def parts(device: str, sizes: Sizes) -> Iterator[Part]:
    """Activations of a layer's MLP; the weights of Mistral-NeMo 12B -> Minitron 8B."""
    make = functools.partial
    shape, cases = (SHAPE, GATHERS) if sizes is FULL else (SMALL, {"small": "rows and columns"})
    for name in BACKENDS:
        yield Part(f"{name}: importance, mean", make(_moments, name, device, shape, 1, 1))
        yield Part(f"{name}: importance, all moments", make(_moments, name, device, shape, 7, 4))
        yield Part(f"{name}: norms of rows", make(_rows, name, device, shape, False))
        yield Part(f"{name}: cosine of rows", make(_rows, name, device, shape, True))
        for case, what in cases.items():
            yield Part(f"{name}: gather, {what}", make(_gather, name, device, case))
