"""Distillation by KL divergence: kl_loss() on logits, linear_kl_loss() on hidden states and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_kernels._backend import pick
from minitron_kernels.ops.kl_loss import reference
from minitron_kernels.ops.kl_loss.budget import CPU_WORKSPACE_BYTES, GPU_WORKSPACE_BYTES, SCHEDULES
from minitron_kernels.ops.kl_loss.checks import (
    as_saved,
    byte_count,
    check_constant,
    check_floating,
    check_tensor,
    check_transforms,
    positive,
)
from minitron_kernels.ops.kl_loss.linear import linear_kl_rows
from minitron_kernels.ops.kl_loss.options import (
    as_scalar,
    check_vocab_size,
    loss_options,
    row_factor,
    rows_mask,
)
from minitron_kernels.ops.kl_loss.rows import kl_rows
from minitron_kernels.ops.kl_loss.sums import sum_rows


def kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    divergence: str | float = "forward_kl",
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """KL(softmax(teacher/τ) ‖ softmax(student/τ)) over the vocabulary, from logits.

    With S and T the two distributions after f(z) = cap·tanh(scale·z/cap) and division by τ:

        forward_kl   Σ T (log T − log S)        gradient to the student's f(z): (S − T)/τ
        reverse_kl   Σ S (log S − log T)        S (log S − log T − KL)/τ
        β in (0, 1)  β KL(T‖M) + (1−β) KL(S‖M), M = βT + (1−β)S     (1−β) S (log S − log M − KL(S‖M))/τ

    The loss is summed from terms that are all ≥ 0, so that it keeps its digits when the student is close to
    its teacher. The teacher is a constant: no gradient flows to it, and logits that require grad are refused.

    Args:
        student_logits: [..., V] float32, bfloat16, float16 or float64, any strides.
        teacher_logits: [..., V], the same leading dimensions; its dtype may differ (but for float64). Made
            under torch.no_grad() or torch.inference_mode() (the former for torch.compile).
        labels: [...] int64, shifted: the label of a position is the token that follows it, so that a Hugging
            Face batch has to be shifted first. Only tells which tokens count, those that are not
            `ignore_index`; no cross-entropy is mixed in, and a label may lie beyond `vocab_size`.
        ignore_index: the label of tokens that do not count.
        mask: [...] bool, True where the token counts; combines with `labels`.
        temperature: τ > 0, divides the logits of both.
        temperature_squared: multiply the loss by τ², which keeps the gradient's size when τ changes (Hinton
            et al., arXiv 1503.02531). Off by default, as in Liger, TRL and Megatron; NeMo and ModelOpt have
            it on.
        reduction: "mean" over the valid tokens (0 if there are none), "sum", or "none" for [...] with 0 at
            masked tokens.
        num_items: with "mean", what to divide by instead, such as the tokens of all micro-batches of a step.
            Where no token counts the loss is 0 whatever it is. 0 while tokens count is an error; in a tensor
            on a GPU, or compiled, where looking would mean waiting, it makes a loss that is not finite.
        divergence: "forward_kl", "reverse_kl", "jsd" (β = ½), or β in [0, 1], where 0 is forward and 1 is
            reverse KL.
        vocab_size: tokens shared by both; columns beyond it are padding. Needed where the two differ.
        student_softcap: logit softcap c of c·tanh(z/c), as in Gemma 2; likewise `teacher_softcap`.
        teacher_softcap: see `student_softcap`.
        student_logit_scale: multiplies the logits before the softcap; likewise `teacher_logit_scale`.
        teacher_logit_scale: see `student_logit_scale`.
        backend: "auto", "native", "triton" or "reference"; a named one never falls back.

    Returns:
        The loss in nats, float32 (float64 for float64): 0-dim, or [...] for "none". A logit of −inf is a
        masked-out token: masked out in both it adds 0; in the student alone it makes forward KL +inf.
        NaN propagates.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range; the message names it.
        RuntimeError: the named backend cannot run here, and why; or a second derivative, forward-mode AD or
            a transform of torch.func is wanted, which backend="reference" has.

    Source: Minitron (arXiv 2407.14679) section 3; generalised JSD: GKD (arXiv 2306.13649).
    """
    check_floating(student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.dim() < 1 or student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits must have the same leading dimensions [..., V], got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    V = check_vocab_size(vocab_size, student_logits.shape[-1], teacher_logits.shape[-1])
    check_constant("teacher_logits", teacher_logits)
    options = loss_options(
        divergence=divergence,
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
    )
    shape = student_logits.shape[:-1]
    chosen = pick("kl_loss", student_logits.device, backend, student_logits.dtype)
    if chosen != "reference":
        check_transforms("kl_loss", student_logits)
    tokens = student_logits.shape[-1]
    rows_mask_ = rows_mask(labels, ignore_index, mask, shape, tokens, student_logits.device)
    squared = positive("temperature", temperature) if temperature_squared else None
    scale, divisor = row_factor(reduction, num_items, shape.numel(), rows_mask_, squared)
    student = _as_rows(student_logits)
    teacher = _as_rows(teacher_logits.detach())
    if chosen == "reference":
        rows = reference.rows(student, teacher, rows_mask_, V, **options._asdict())
    else:
        rows = kl_rows(chosen, student, teacher, rows_mask_, V, options)
    if reduction == "none":
        return (rows if squared is None else rows * scale).reshape(shape)
    total = sum_rows(rows)
    return total * scale if divisor is None else total * (divisor * scale).to(total.dtype)


def linear_kl_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str | float = "forward_kl",
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    grad_head_accumulator: Tensor | None = None,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """kl_loss() of student_hidden·student_headᵀ and teacher_hidden·teacher_headᵀ, logits that never exist.

    Both logits are made a tile at a time, in fp32 out of bf16 operands, and turned into sums and gradients
    while they are in cache. Rounding logits to bf16, as a plain bf16 matmul does, costs the gradient up to
    half of its value once the student is close to its teacher; here it is exact to what bf16 operands allow
    (0.2 %).

    Gradients are made in the forward and scaled in the backward. (With reduction="none" or
    grad_head_accumulator they are made in the backward, from logits made again: 6 GEMMs instead of 4.)
    Only those that are wanted are made: a frozen head skips its GEMM. Under torch.no_grad() only sums are
    kept.

    Args:
        student_hidden: [..., H] float32, bfloat16, float16 or float64.
        student_head: [V, H], the output projection, as in nn.Linear(H, V).weight. May be tied to the
            embedding.
        teacher_hidden: [..., Ht], the same leading dimensions; Ht may differ from H. A constant: if it
            requires grad, it is refused.
        teacher_head: [V, Ht]. No gradient flows to it either, whether or not it requires grad.
        labels: shifted, see kl_loss(). Tokens that do not count are skipped before any GEMM.
        ignore_index: see kl_loss().
        mask: see kl_loss().
        temperature: see kl_loss().
        temperature_squared: see kl_loss().
        reduction: see kl_loss().
        num_items: see kl_loss().
        student_bias: [V], added to the student's logits before scale and softcap; −inf makes a token
            masked out.
        teacher_bias: [V], likewise.
        divergence: see kl_loss().
        vocab_size: see kl_loss(); rows of the heads beyond it are padding.
        student_softcap: see kl_loss().
        teacher_softcap: see kl_loss().
        student_logit_scale: see kl_loss().
        teacher_logit_scale: see kl_loss().
        grad_head_accumulator: [V, H] float32 (float64 for float64), contiguous rows. The backward adds the
            gradient to student_head to it, with the factor that comes in, and student_head gets none: once
            per backward, whether or not a checkpoint runs the forward again.
        schedule: "auto", "store" (4 GEMMs, keeps the logits of a chunk of tokens; on a GPU the dz
            of all tokens, or of as many as the budget allows), or "recompute" (6 GEMMs,
            keeps a part of the vocabulary); see plan_linear_kl_loss().
        workspace_bytes: budget in bytes for scratch memory, by default 512 MiB on the CPU, where it is kept
            between calls (see release_workspaces()), and 4 GiB of torch's own on a GPU, of
            which a call takes what its plan needs.
        backend: see kl_loss().

    Returns:
        As kl_loss(). Bitwise the same from run to run and for any number of threads.

    Raises:
        As kl_loss(); ValueError too for a workspace too small (says the least that would do).

    Source: Minitron (arXiv 2407.14679) section 3, (arXiv 2408.11796) section 3.
    """
    check_floating(
        student_hidden=student_hidden,
        student_head=student_head,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
    )
    check_constant("teacher_hidden", teacher_hidden)
    for side, hidden, head in (
        ("student", student_hidden, student_head),
        ("teacher", teacher_hidden, teacher_head),
    ):
        if hidden.dim() < 1 or head.dim() != 2 or hidden.shape[-1] != head.shape[1]:
            raise ValueError(
                f"{side}_hidden [..., H] and {side}_head [V, H] must have the same H, got "
                f"{tuple(hidden.shape)} and {tuple(head.shape)}"
            )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "student_hidden and teacher_hidden must have the same leading dimensions, got "
            f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    V = check_vocab_size(vocab_size, student_head.shape[0], teacher_head.shape[0])
    _check_bias("student_bias", student_bias, student_head)
    _check_bias("teacher_bias", teacher_bias, teacher_head)
    _check_accumulator(grad_head_accumulator, student_head)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    options = loss_options(
        divergence=divergence,
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
    )
    shape, device = student_hidden.shape[:-1], student_hidden.device
    chosen = pick("linear_kl_loss", device, backend, student_hidden.dtype)
    if chosen != "reference":
        check_transforms("linear_kl_loss", student_hidden, student_head, student_bias)
    rows_mask_ = rows_mask(labels, ignore_index, mask, shape, student_head.shape[0], device)
    squared = positive("temperature", temperature) if temperature_squared else None
    scale, divisor = row_factor(reduction, num_items, shape.numel(), rows_mask_, squared)

    student_hidden, student_head = _autocast(student_hidden, student_head)
    teacher_hidden, teacher_head = _autocast(teacher_hidden.detach(), teacher_head.detach())
    student = (_as_rows(student_hidden), student_head, student_bias)
    teacher = (
        _as_rows(teacher_hidden),
        teacher_head,
        None if teacher_bias is None else teacher_bias.detach(),
    )
    row_weight = None
    if reduction != "none":
        row_weight = as_scalar(scale, device)
        row_weight = row_weight if divisor is None else row_weight * divisor
    if chosen == "reference":
        if grad_head_accumulator is not None:
            raise ValueError(
                "grad_head_accumulator needs native or triton; the reference leaves gradients to autograd"
            )
        s, t = ((as_saved(x), as_saved(w), as_saved(b)) for x, w, b in (student, teacher))
        rows = reference.linear_rows(s, t, as_saved(rows_mask_), V, **options._asdict())
        result = rows if row_weight is None else sum_rows(rows * row_weight.to(rows.dtype))
    else:
        default = CPU_WORKSPACE_BYTES if device.type == "cpu" else GPU_WORKSPACE_BYTES
        budget = default if workspace_bytes is None else byte_count("workspace_bytes", workspace_bytes)
        result = linear_kl_rows(
            student,
            teacher,
            rows_mask_,
            row_weight,
            grad_head_accumulator,
            V,
            options,
            chosen,
            schedule,
            budget,
        )
    if reduction == "none":
        return (result if squared is None else result * scale).reshape(shape)
    return result


def _as_rows(x: Tensor) -> Tensor:
    """[..., C] -> [N, C] with stride 1 along C, a view where possible."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast the operands take its dtype, as those of any linear layer do."""
    kind = tensors[0].device.type
    # meta has no autocast; torch.amp.is_autocast_available(), which knows, is not compiled by torch 2.11
    if kind == "meta" or not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]


def _check_bias(name: str, bias: Tensor | None, head: Tensor) -> None:
    if bias is None:
        return
    check_floating(**{name: bias})
    if bias.shape != head.shape[:1] or bias.device != head.device:
        raise ValueError(
            f"{name} must be [V] = [{head.shape[0]}] on {head.device}, got {tuple(bias.shape)} on "
            f"{bias.device}"
        )


def _check_accumulator(buffer: Tensor | None, head: Tensor) -> None:
    if buffer is None:
        return
    dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
    check_tensor("grad_head_accumulator", buffer)
    if buffer.dtype != dtype:
        raise TypeError(f"grad_head_accumulator must be a {dtype} tensor, got {buffer.dtype}")
    fits = buffer.shape == head.shape and buffer.device == head.device
    if not fits or buffer.stride(1) != 1 or buffer.stride(0) < head.shape[1]:
        raise ValueError(
            f"grad_head_accumulator must have student_head's shape {tuple(head.shape)} on {head.device} with "
            "stride 1 along H and rows that do not overlap, got "
            f"{tuple(buffer.shape)} on {buffer.device} with strides {buffer.stride()}"
        )
