"""The hidden-state loss of pairs of layers and its gradients, one chunk of tokens at a time.

Two opaque ops, so that torch.compile keeps the chunks too, and autograd around them. The forward keeps sums
only; the backward makes u = M·norm(x) again, when the incoming factor is known (a weight that depends on the
loss, a gradient scaler). Nothing of [tokens, width] is made but the gradients that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.checks import as_rows, as_saved
from minitron_kernels.ops.kl_loss.gemm_gpu import matmul, summed_in_fp32
from minitron_kernels.ops.kl_loss.operands import slices
from minitron_kernels.ops.kl_loss.rows import no_second_derivative


class Options(NamedTuple):
    """What the ops are given beside tensors."""

    kind: str  # "cosine" or "mse"
    norm: str  # "rms", "layer" or "none"
    operands: torch.dtype  # of the products with the map
    chunk_tokens: int


def chunk_tokens(workspace_bytes: int, student_width: int, teacher_width: int, element_size: int) -> int:
    """Tokens of a chunk, at least one; at a time it has 5 tensors of the student's width and 8 of Ht."""
    return max(1, workspace_bytes // ((5 * student_width + 8 * teacher_width) * element_size))


def hidden_states_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | None,
    channel_weights: Tensor | None,
    token_weights: Tensor,
    valid: Tensor | None,
    options: Options,
) -> Tensor:
    """Σ over pairs and rows of token_weights · loss: 0-dim, float32 or float64.

    Args:
        student: of each pair [..., H].
        teacher: of each pair [..., Ht], constants.
        weight: [Ht, H] the map, or None, where H = Ht.
        channel_weights: [Ht] or None.
        token_weights: [N], 0 at rows that do not count.
        valid: [N] bool, or None for all; other rows are not looked at.
        options: see Options.
    """
    rest = (weight, channel_weights, token_weights, valid)
    student, teacher = [as_rows(x) for x in student], [as_rows(z.detach()) for z in teacher]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*student, weight)):
        total: Tensor = _Loss.apply(options, len(student), *rest, *student, *teacher)
        return total
    return _loss_op(student, teacher, *rest, *options)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        pairs: int,
        weight: Tensor | None,
        channel_weights: Tensor | None,
        token_weights: Tensor,
        valid: Tensor | None,
        *states: Tensor,
    ) -> Tensor:
        rest = (weight, channel_weights, token_weights, valid)
        ctx.save_for_backward(*map(as_saved, (*rest, *states)))
        ctx.options, ctx.pairs = options, pairs
        return _loss_op(list(states[:pairs]), list(states[pairs:]), *rest, *options)

    @staticmethod
    @no_second_derivative("the hidden-state loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *rest, valid = ctx.saved_tensors[:4]
        weight, states = rest[0], ctx.saved_tensors[4:]
        student, teacher = list(states[: ctx.pairs]), list(states[ctx.pairs :])
        wanted = list(ctx.needs_input_grad[6 : 6 + ctx.pairs])
        of_weight = ctx.needs_input_grad[2]
        grads = _grad_op(grad_loss, student, teacher, *rest, valid, *ctx.options, wanted, of_weight)
        grad_weight = grads[-1].to(weight.dtype) if of_weight else None
        of_states = [grads[sum(wanted[:i])] if needed else None for i, needed in enumerate(wanted)]
        return (None, None, grad_weight, None, None, None, *of_states, *(None,) * ctx.pairs)


@torch.library.custom_op("minitron_kernels::hidden_states_loss", mutates_args=())
def _loss_op(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | None,
    channel_weights: Tensor | None,
    token_weights: Tensor,
    valid: Tensor | None,
    kind: str,
    norm: str,
    operands: torch.dtype,
    chunk_tokens: int,
) -> Tensor:
    return loss_of_chunks(
        student,
        teacher,
        weight,
        channel_weights,
        token_weights,
        valid,
        Options(kind, norm, operands, chunk_tokens),
    )


@_loss_op.register_fake
def _(student: Sequence[Tensor], *_: Any) -> Tensor:
    return student[0].new_empty((), dtype=_sum_dtype(student[0]))


@torch.library.custom_op("minitron_kernels::hidden_states_loss_backward", mutates_args=())
def _grad_op(
    grad_loss: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | None,
    channel_weights: Tensor | None,
    token_weights: Tensor,
    valid: Tensor | None,
    kind: str,
    norm: str,
    operands: torch.dtype,
    chunk_tokens: int,
    needs_grad: Sequence[bool],
    needs_weight_grad: bool,
) -> list[Tensor]:
    return grads_of_chunks(
        grad_loss,
        student,
        teacher,
        weight,
        channel_weights,
        token_weights,
        valid,
        Options(kind, norm, operands, chunk_tokens),
        needs_grad,
        needs_weight_grad,
    )


@_grad_op.register_fake
def _(
    grad_loss: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], weight: Tensor | None, *rest: Any
) -> list[Tensor]:
    *_, needs_grad, needs_weight_grad = rest
    grads = [x.new_empty(x.shape) for x, needed in zip(student, needs_grad, strict=True) if needed]
    if needs_weight_grad and weight is not None:
        grads.append(weight.new_empty(weight.shape, dtype=_sum_dtype(student[0])))
    return grads


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Chunk(NamedTuple):
    """What the loss of a chunk is made of."""

    x: Tensor  # [C, H] norm(student), in the dtype of sums
    inv_scale: Tensor | None  # [C, 1] that x was multiplied by
    operand: Tensor | None  # [C, H] x as the map's operand
    u: Tensor  # [C, Ht] what is compared
    t: Tensor  # [C, Ht] with this


class _Call:
    """What all chunks of all pairs share."""

    def __init__(
        self,
        student: Sequence[Tensor],
        weight: Tensor | None,
        channel_weights: Tensor | None,
        token_weights: Tensor,
        valid: Tensor | None,
        options: Options,
    ) -> None:
        self.dtype, self.device = _sum_dtype(student[0]), student[0].device
        self.weight = None if weight is None else weight.to(options.operands)
        self.channel_weights = None if channel_weights is None else channel_weights.to(self.dtype)
        self.token_weights, self.valid, self.options = token_weights, valid, options
        self.of_rows = _KINDS[options.kind]

    def chunks(self, x: Tensor) -> Iterator[slice]:
        return slices(0, x.shape[0], self.options.chunk_tokens)

    def loss(self, x: Tensor, z: Tensor, rows: slice) -> Tensor:
        """Of a chunk, 0-dim float64."""
        chunk = self._chunk(x, z, rows)
        loss, _ = self.of_rows(chunk.u, chunk.t, None)
        return (loss * self.token_weights[rows]).sum(dtype=torch.float64)

    def grad(
        self,
        grad_loss: Tensor,
        x: Tensor,
        z: Tensor,
        rows: slice,
        grad_x: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        """Writes a chunk's rows of grad_x, and adds to grad_weight."""
        chunk = self._chunk(x, z, rows)
        factor = (self.token_weights[rows] * grad_loss).to(self.dtype)[:, None]
        _, grad = self.of_rows(chunk.u, chunk.t, factor)
        assert grad is not None
        if self.channel_weights is not None:
            grad.mul_(self.channel_weights)
        if self.weight is not None:
            assert chunk.operand is not None
            grad_u, grad = grad.to(self.options.operands), torch.empty_like(chunk.x)
            if grad_weight is not None:
                matmul(grad_u.t(), chunk.operand, grad_weight, True)
            if grad_x is not None:
                matmul(grad_u, self.weight, grad, False)
        if grad_x is not None:
            grad_x[rows] = _norm_backward(grad, chunk, self.options.norm)

    def _chunk(self, x: Tensor, z: Tensor, rows: slice) -> _Chunk:
        counts = None if self.valid is None else self.valid[rows, None]
        x, inv_scale = _normed(_rows(x, rows, counts, self.dtype), self.options.norm)
        t, _ = _normed(_rows(z, rows, counts, self.dtype), self.options.norm)
        operand, u = None, x
        if self.weight is not None:
            operand, u = x.to(self.options.operands), torch.empty_like(t)
            matmul(operand, self.weight.t(), u, False)
        if self.channel_weights is not None:
            u, t = u * self.channel_weights, t * self.channel_weights
        return _Chunk(x, inv_scale, operand, u, t)


def _rows(x: Tensor, rows: slice, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows in the dtype of sums, zeros where they do not count, whatever stood there."""
    part = x[rows]
    return (part if counts is None else torch.where(counts, part, 0)).to(dtype)


def _normed(x: Tensor, norm: str) -> tuple[Tensor, Tensor | None]:
    """RMSNorm or LayerNorm without gain, and the factor; a row of zeros stays one."""
    if norm == "none":
        return x, None
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    # sqrt(mean(x²)), without a product of the row's size
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    inv_scale = torch.where(rms == 0, 0.0, 1 / rms)
    return x * inv_scale, inv_scale


def _norm_backward(grad: Tensor, chunk: _Chunk, norm: str) -> Tensor:
    if chunk.inv_scale is None:
        return grad
    projection = (grad * chunk.x).mean(-1, keepdim=True)
    grad = torch.addcmul(grad, chunk.x, projection, value=-1).mul_(chunk.inv_scale)
    return grad - grad.mean(-1, keepdim=True) if norm == "layer" else grad


def _cosine(u: Tensor, t: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """1 - cos(u, t) of each row as ½‖û - t̂‖², which keeps its digits near 0; and its gradient times factor.

    The gradient is (û - t̂ - loss·û) / ‖u‖. A row of zeros has no direction: its loss is 1, its gradient 0.
    """
    size_u, size_t = (torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (u, t))
    without = (size_u == 0) | (size_t == 0)
    unit = u / size_u
    diff = torch.addcdiv(unit, t, size_t, value=-1)
    loss = torch.linalg.vector_norm(diff, dim=-1, keepdim=True).square_().mul_(0.5)
    grad = None
    if factor is not None:
        grad = torch.addcmul(diff, unit, loss, value=-1).mul_(factor / size_u)
        grad.masked_fill_(without, 0)
    return loss.masked_fill_(without, 1)[:, 0], grad


def _mse(u: Tensor, t: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """mean((u - t)²) of each row, and its gradient times factor."""
    diff = u - t
    loss = torch.linalg.vector_norm(diff, dim=-1).square_().div_(diff.shape[-1])
    return loss, None if factor is None else diff.mul_(factor * (2 / diff.shape[-1]))


_KINDS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {"cosine": _cosine, "mse": _mse}


@summed_in_fp32()
def loss_of_chunks(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | None,
    channel_weights: Tensor | None,
    token_weights: Tensor,
    valid: Tensor | None,
    options: Options,
) -> Tensor:
    """What hidden_states_loss() returns, without autograd."""
    call = _Call(student, weight, channel_weights, token_weights, valid, options)
    total = torch.zeros((), dtype=torch.float64, device=call.device)
    for x, z in zip(student, teacher, strict=True):
        for rows in call.chunks(x):
            total += call.loss(x, z, rows)
    return total.to(call.dtype)


@summed_in_fp32()
def grads_of_chunks(
    grad_loss: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | None,
    channel_weights: Tensor | None,
    token_weights: Tensor,
    valid: Tensor | None,
    options: Options,
    needs_grad: Sequence[bool],
    needs_weight_grad: bool,
) -> list[Tensor]:
    """Gradients to the states that need one, [N, H] in their dtype, then the map's, in that of sums."""
    call = _Call(student, weight, channel_weights, token_weights, valid, options)
    grads = []
    grad_weight = None
    if needs_weight_grad and weight is not None:
        grad_weight = torch.zeros(weight.shape, dtype=call.dtype, device=call.device)
    for x, z, needed in zip(student, teacher, needs_grad, strict=True):
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else None
        if needed or grad_weight is not None:
            for rows in call.chunks(x):
                call.grad(grad_loss, x, z, rows, grad_x, grad_weight)
        if grad_x is not None:
            grads.append(grad_x)
    return grads if grad_weight is None else [*grads, grad_weight]
