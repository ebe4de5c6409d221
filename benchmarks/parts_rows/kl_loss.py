"""The kernels of kl_loss and of linear_kl_loss's tiles, by backend. The bytes: docs/performance.md.

Rows of logits are fp32 in linear_kl_loss (8 bytes a pair), bf16 in kl_loss (4); dz is bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parts_rows.part import Absent, Part, Sizes, Work, near, normal

PLAIN = (1.0, 1.0, 0.0, 1.0, 0.0, 0.0)  # 1/temperature, then scale and softcap of student and teacher
SOME = 4  # rows that are checked
NUM_STATE, NUM_STATS, NUM_SUMS = 5, 6, 2


def _backend(backend: str, op: str, device: str) -> None:
    from minitron_kernels import _backend

    if reason := _backend.why_not(op, backend, torch.device(device)):
        raise Absent(reason)


def _epilogues(backend: str, device: str) -> Any:
    from minitron_kernels.ops.kl_loss.epilogues import EPILOGUES

    if torch.device(device).type == "cpu":
        raise Absent("kernels on tiles of logits are for GPUs")
    return EPILOGUES[backend]()


class _Tiles:
    """fp32 logits of `rows` x `columns`, what the kernels write, and the truth of the first rows."""

    def __init__(self, backend: str, device: str, rows: int, columns: int, beta: float) -> None:
        _backend(backend, "linear_kl_loss", device)
        self.epilogues, self.columns = _epilogues(backend, device), columns
        self.pairs = rows * columns
        self.options = (beta, *PLAIN)
        student = normal(rows, columns, device=device, dtype=torch.float32, scale=2.0)
        teacher = normal(columns, rows, device=device, dtype=torch.float32, scale=2.0).view(rows, columns)
        self.logits = (student, teacher, None, None)
        self.loss = student.new_empty(rows)
        self.stats = student.new_empty(rows, NUM_STATS)
        self.dz = student.new_empty(rows, columns, dtype=torch.bfloat16)
        self.weight = torch.full_like(self.loss, 1.0 / rows)
        self.state = student.new_empty(NUM_STATE, rows)
        self.sums = student.new_empty(NUM_SUMS, rows)

    def forward(self) -> None:
        self.epilogues.forward(self.logits, None, self.loss, self.stats, self.columns, self.options)

    def check_loss(self) -> None:
        from minitron_kernels.ops.kl_loss.reference import kl_divergence_rows

        student, teacher = (x[:SOME].double() for x in self.logits[:2])
        near(self.loss[:SOME], kl_divergence_rows(student, teacher, beta=self.options[0]), 1e-4)

    def check_dz(self) -> None:
        student, teacher = (x[:SOME].double() for x in self.logits[:2])
        wanted = (student.softmax(1) - teacher.softmax(1)) * float(self.weight[0])
        near(self.dz[:SOME], wanted, 1e-2)


def _forward(backend: str, device: str, rows: int, columns: int, beta: float) -> Work:
    t = _Tiles(backend, device, rows, columns, beta)
    return Work(t.forward, 8 * t.pairs, 0, lambda: (t.forward(), t.check_loss())[1])


def _grad(backend: str, device: str, rows: int, columns: int) -> Work:
    t = _Tiles(backend, device, rows, columns, 0.0)
    t.forward()

    def call() -> None:
        t.epilogues.grad(t.logits, None, t.weight, t.stats, t.dz, t.columns, t.options)

    return Work(call, 10 * t.pairs, 0, lambda: (call(), t.check_dz())[1])


def _forward_grad(backend: str, device: str, rows: int, columns: int) -> Work:
    """At least: both logits read once, dz written once. Two kernels in turn read the logits twice."""
    t = _Tiles(backend, device, rows, columns, 0.0)

    def call() -> None:
        t.epilogues.forward_grad(t.logits, None, t.weight, t.loss, t.stats, t.dz, t.columns, t.options)

    return Work(call, 10 * t.pairs, 0, lambda: (call(), t.check_loss(), t.check_dz())[2])


def _tile_stats(backend: str, device: str, rows: int, columns: int) -> Work:
    t = _Tiles(backend, device, rows, columns, 0.0)

    def call(first: bool = False) -> None:
        t.epilogues.tile_stats(t.logits, None, t.state, first, t.options)

    def check() -> None:
        call(True)
        t.epilogues.finish_stats(t.state[None], None, t.loss, t.stats, t.options)
        t.check_loss()

    call(True)
    return Work(call, 8 * t.pairs + 2 * t.state.nbytes, 0, check)


def _tile_mixture(backend: str, device: str, rows: int, columns: int) -> Work:
    t = _Tiles(backend, device, rows, columns, 0.5)
    t.epilogues.tile_stats(t.logits, None, t.state, True, t.options)
    t.epilogues.finish_stats(t.state[None], None, t.loss, t.stats, t.options)

    def call(first: bool = False) -> None:
        t.epilogues.tile_mixture(t.logits, None, t.stats, t.sums, first, t.options)

    def check() -> None:
        call(True)
        t.epilogues.finish_mixture(t.sums[None], None, t.loss, t.stats, t.options)
        t.check_loss()

    call(True)
    return Work(call, 8 * t.pairs + 2 * t.sums.nbytes, 0, check)


def _linear_stats(backend: str, device: str, sizes: Sizes) -> Work:
    """Statistics without logits in memory: bound by its matrix products."""
    t = _Tiles(backend, device, SOME, 128, 0.0)
    kernel = t.epilogues.linear_stats
    if kernel is None:
        raise Absent("only Triton has such a kernel")
    N, H, Ht, V = sizes[:4]
    sides = [
        (normal(N, width, device=device), normal(V, width, device=device, scale=width**-0.5), None)
        for width in (H, Ht)
    ]
    loss, stats = t.loss.new_empty(N), t.loss.new_empty(N, NUM_STATS)

    def call() -> None:
        kernel(*sides, None, loss, stats, V, t.options)

    def check() -> None:
        from minitron_kernels.ops.kl_loss.reference import kl_divergence_rows

        call()
        logits = [hidden[:SOME].double() @ head.double().t() for hidden, head, _ in sides]
        near(loss[:SOME], kl_divergence_rows(*logits, beta=0.0), 1e-3)

    return Work(call, 0, 2 * N * V * (H + Ht), check)


def _rows(backend: str, device: str, rows: int, columns: int, backward: bool) -> Work:
    """kl_loss itself, on logits in bf16."""
    _backend(backend, "kl_loss", device)
    if backend == "native":
        ops: Any = torch.ops.minitron_kernels
        forward, gradient = ops.kl_loss_forward, ops.kl_loss_backward
    else:
        from minitron_kernels.ops.kl_loss.kernel_triton import launch

        forward, gradient = launch.kl_loss_forward, launch.kl_loss_backward
    student = normal(rows, columns, device=device, scale=2.0)
    teacher = normal(columns, rows, device=device, scale=2.0).view(rows, columns)
    options, weight = (0.0, *PLAIN), torch.full((rows,), 1.0 / rows, device=device)
    stats = forward(student, teacher, None, columns, options)[1]
    wide = [x[:SOME].double() for x in (student, teacher)]

    def call_forward() -> Tensor:
        return forward(student, teacher, None, columns, options)[0]

    def call_backward() -> Tensor:
        return gradient(weight, stats, student, teacher, None, columns, options)

    def check() -> None:
        if backward:
            near(call_backward()[:SOME], (wide[0].softmax(1) - wide[1].softmax(1)) / rows, 1e-2)
        else:
            from minitron_kernels.ops.kl_loss.reference import kl_divergence_rows

            near(call_forward()[:SOME], kl_divergence_rows(*wide, beta=0.0), 1e-4)

    return Work(
        call_backward if backward else call_forward, (6 if backward else 4) * student.numel(), 0, check
    )


def _scale(device: str, rows: int, columns: int, factor: float) -> Work:
    _backend("native", "linear_kl_loss", device)
    op = torch.ops.minitron_kernels.kl_scale_grad_
    grad = normal(rows, columns, device=device)
    number = torch.tensor(factor, device=device)

    def check() -> None:
        before = grad.clone()
        op(grad, number)
        near(grad, before.double() * factor, 1e-2)

    check()
    # a factor of 1 moves no bytes: only its time says something
    return Work(lambda: op(grad, number), 2 * grad.nbytes if factor != 1 else 0, 0, check)


def parts(device: str, sizes: Sizes) -> Iterator[Part]:
    """A chunk of whole rows for the store schedule; all rows by a tile of the vocabulary for recompute."""
    make = functools.partial
    rows, N, V, tile = sizes.chunks[0], sizes.N, sizes.V, sizes.tile
    for name in ("native", "triton"):
        chunk, narrow = (name, device, rows, V), (name, device, N, tile)
        yield Part(f"{name}: forward", make(_forward, *chunk, 0.0))
        yield Part(f"{name}: grad", make(_grad, *chunk))
        yield Part(f"{name}: forward_grad", make(_forward_grad, *chunk))
        yield Part(f"{name}: forward, JSD", make(_forward, *chunk, 0.5))
        yield Part(f"{name}: tile_stats", make(_tile_stats, *narrow))
        yield Part(f"{name}: tile_mixture", make(_tile_mixture, *narrow))
        yield Part(f"{name}: kl_loss forward, bf16", make(_rows, *chunk, False))
        yield Part(f"{name}: kl_loss backward, bf16", make(_rows, *chunk, True))
        yield Part(f"{name}: linear_stats", make(_linear_stats, name, device, sizes))
    for factor in (0.5, 1.0):
        yield Part(f"native: scale by {factor}", make(_scale, device, V, sizes.H, factor))
