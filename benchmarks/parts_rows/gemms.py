"""The GEMMs of each phase of linear_kl_loss, by chunk of rows and whole, into fp32 where it needs that."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from parts_rows.part import Part, Sizes, Work, normal

OUT = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Out (+)= a·b in bf16, summed in fp32, as the loss calls it; the CPU has no such GEMM into fp32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif a.device.type == "cpu":
        out.add_(a @ b) if accumulate else out.copy_(a @ b)
    elif accumulate:
        torch.addmm(out, a, b, out.dtype, out=out)
    else:
        torch.mm(a, b, out.dtype, out=out)


def _work(
    device: str, kind: str, rows: int, width: int, vocab: int, dtype: torch.dtype, accumulate: bool
) -> Work:
    head = normal(vocab, width, device=device, scale=width**-0.5)
    hidden = normal(rows, width, device=device)
    shape = {"logits": (rows, vocab), "dX": (rows, width), "dW": (vocab, width)}[kind]
    out = torch.zeros(shape, device=device, dtype=dtype)
    if kind == "logits":
        a, b = hidden, head.t()
    else:
        dz = normal(rows, vocab, device=device)
        a, b = (dz, head) if kind == "dX" else (dz.t(), hidden)
    some = slice(0, 8)

    def check() -> None:
        out.zero_()
        product(a, b, out, accumulate)
        wanted, found = a[some].double() @ b.double()[:, :64], out[some, :64]
        error = float((found.double() - wanted).norm() / wanted.norm())
        assert error <= 1e-2, f"relative error {error:.2g}, allowed 1e-02"

    return Work(lambda: product(a, b, out, accumulate), 0, 2 * rows * width * vocab, check)


def parts(device: str, sizes: Sizes) -> Iterator[Part]:
    """logits = X Wᵀ in fp32 for student and teacher; dX = dz W; dW = dzᵀ X, first and added to."""
    bf16, fp32 = torch.bfloat16, torch.float32
    N, H, Ht, V = sizes[:4]

    def part(key: str, *rest: object) -> Part:
        return Part(key, functools.partial(_work, device, *rest))

    for rows in sizes.chunks:
        yield part(f"student's logits, {rows} rows", "logits", rows, H, V, fp32, False)
        yield part(f"teacher's logits, {rows} rows", "logits", rows, Ht, V, fp32, False)
    for rows in (*sizes.chunks, N):
        yield part(f"dX in bf16, {rows} rows", "dX", rows, H, V, bf16, False)
    yield part(f"dX in fp32, {N} rows", "dX", N, H, V, fp32, False)
    for rows in sizes.chunks:
        for beta in (0, 1):
            yield part(f"dW in fp32, {rows} rows, beta {beta}", "dW", rows, H, V, fp32, bool(beta))
    yield part(f"dW in fp32, {N} rows, beta 0", "dW", N, H, V, fp32, False)
    yield part(f"dW in bf16, {N} rows, beta 0", "dW", N, H, V, bf16, False)
