"""Distillation by KL divergence: kl_loss() on logits, linear_kl_loss() on hidden states and heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from minitron_kernels._backend import pick
from minitron_kernels.ops.kl_loss import reference
from minitron_kernels.ops.kl_loss.budget import check_schedule, workspace_budget
from minitron_kernels.ops.kl_loss.checks import (
    as_rows,
    as_saved,
    autocast,
    check_accumulator,
    check_bias,
    check_constant,
    check_floating,
    check_left_to_autograd,
    check_linear,
    check_transforms,
    positive,
)
from minitron_kernels.ops.kl_loss.head_buffer import check_buffer
from minitron_kernels.ops.kl_loss.linear import Teacher, linear_result
from minitron_kernels.ops.kl_loss.options import check_vocab_size, loss_options
from minitron_kernels.ops.kl_loss.record import LossRecord, TokenTerms
from minitron_kernels.ops.kl_loss.reference_parallel import gather_sides
from minitron_kernels.ops.kl_loss.rows import kl_rows, kl_rows_with_metrics
from minitron_kernels.ops.kl_loss.sharded import local_side, local_tokens
from minitron_kernels.ops.kl_loss.tokens import Tokens
from minitron_kernels.ops.kl_loss.vocab_parallel import LABELS_CHECKED_LATER, Parallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
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
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | LossRecord:
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
        labels: [...] int64, the target of the position it stands at, that is the token that follows: labels
            of a Hugging Face batch go through shift_labels() first. A token with `ignore_index` does not
            count. No cross-entropy is mixed in unless ce_weight asks for it; where neither it nor
            return_parts does, a label may lie beyond `vocab_size`.
        ignore_index: the label of tokens that do not count.
        mask: [...] bool, True where the token counts; combines with `labels`.
        token_weights: [...] float, multiplies each token's loss under every reduction. "mean" still divides
            by the number of tokens that count, or by num_items. A weight of 0 adds 0, whatever the loss is.
        kl_weight: multiplies the KL in the loss, ≥ 0.
        ce_weight: multiplies the cross-entropy with `labels` in the loss, ≥ 0: the student's at
            temperature 1, as F.cross_entropy has it, whatever `temperature` is.
        label_smoothing: of the cross-entropy, in [0, 1], as in F.cross_entropy.
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
        return_parts: return a LossRecord: the loss, and beside it KL, cross-entropy, the student's entropy,
            log p(label) and the number of tokens, out of the same look at the logits.
        backend: "auto", "native", "triton" or "reference"; a named one never falls back.

    Returns:
        The loss in nats, float32 (float64 for float64): 0-dim, or [...] for "none". A logit of −inf is a
        masked-out token: masked out in both it adds 0; in the student alone it makes forward KL +inf.
        NaN propagates.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range; the message names it.
        RuntimeError: the named backend cannot run here, and why; or a second derivative, forward-mode AD or
            a transform of torch.func is wanted, which backend="reference" has.

    Source: Minitron (arXiv 2407.14679) section 3, L = L_CE + L_logits; generalised JSD: GKD
    (arXiv 2306.13649).
    """
    student_logits = local_tokens("student_logits", student_logits)
    teacher_logits = local_tokens("teacher_logits", teacher_logits)
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
        label_smoothing=label_smoothing,
    )
    chosen = pick("kl_loss", student_logits.device, backend, student_logits.dtype)
    if chosen != "reference":
        check_transforms("kl_loss", student_logits)
    tokens = Tokens.of(
        student_logits,
        labels,
        ignore_index,
        mask,
        token_weights,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=positive("temperature", temperature) if temperature_squared else None,
        reduction=reduction,
        num_items=num_items,
        return_parts=return_parts,
        vocab_sizes=(V, student_logits.shape[-1]),
    )
    student = as_rows(student_logits)
    teacher = as_rows(teacher_logits.detach())
    computed, targets = tokens.computed, tokens.targets
    if chosen == "reference":
        terms = TokenTerms(
            *reference.rows(student, teacher, computed, targets, V, tokens.needs_metrics, **options._asdict())
        )
    elif tokens.needs_metrics:
        terms = TokenTerms(*kl_rows_with_metrics(chosen, student, teacher, computed, targets, V, options))
    else:
        terms = TokenTerms(kl_rows(chosen, student, teacher, computed, V, options))
    return tokens.result(tokens.loss(terms), terms)


def linear_kl_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
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
    grad_head_buffer: Tensor | None = None,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    return_parts: bool = False,
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_range: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor | LossRecord:
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
            embedding. head_of() has it of a layer with adapters. A DTensor is gathered, but over tp_group;
            its gradient is averaged over the other mesh dimensions, as FSDP2 averages, and scattered.
        teacher_hidden: [..., Ht], the same leading dimensions; Ht may differ from H. A constant: if it
            requires grad, it is refused.
        teacher_head: [V, Ht]. No gradient flows to it either, whether or not it requires grad.
        labels: the target of the position it stands at, see kl_loss() and shift_labels(). Tokens that do not
            count are skipped before any GEMM.
        ignore_index: see kl_loss().
        mask: see kl_loss().
        token_weights: see kl_loss().
        kl_weight: see kl_loss().
        ce_weight: see kl_loss(). The gradients of the KL and of the cross-entropy are one: neither GEMMs nor
            memory are added.
        label_smoothing: see kl_loss().
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
        grad_head_accumulator: [V, H] float32 (float64 for float64), contiguous rows, in memory of no input.
            The backward adds the gradient to student_head to it, with the factor that comes in, and
            student_head gets none: once per backward, whether or not a checkpoint runs the forward again.
        grad_head_buffer: [V, H] in student_head's dtype (not float16), contiguous: memory in which its
            gradient is made, instead of new memory, whose pages cost more than what is written to them. After
            the backward student_head.grad, if it was None, is this memory: a loop with
            zero_grad(set_to_none=True) lends the same buffer at every step. A call writes over it in its
            forward already, so the memory of student_head.grad is refused, and a backward raises if another
            call wrote since. Left alone where student_head, which must be a leaf, needs no gradient. Not for
            compiled calls.
        schedule: "auto", "store" (4 GEMMs, keeps the logits of a chunk of tokens; on a GPU the dz
            of all tokens, or of as many as the budget allows), or "recompute" (6 GEMMs,
            keeps a part of the vocabulary); see plan_linear_kl_loss().
        workspace_bytes: budget in bytes for scratch memory, by default 576 MiB on the CPU, where it is kept
            between calls (see release_workspaces()), and 4 GiB of torch's own on a GPU, of
            which a call takes what its plan needs.
        return_parts: see kl_loss().
        tp_group: the ranks that share the vocabulary (tensor parallelism): heads, biases and accumulator are
            this rank's rows, contiguous in the order of the group's ranks; all else is the same on all ranks,
            and so is the incoming gradient. vocab_size is that of the whole vocabulary. All ranks call.
        sequence_parallel: with tp_group, hidden states are this rank's part of the tokens, cut along their
            first dimension into equal parts, as Megatron-LM does; labels, mask and token_weights are those
            of all tokens. The result is of all tokens, the gradient of this rank's.
        vocab_range: (start, end), the tokens of this rank, where its shards have padding behind them: rows
            beyond end - start are not read. By default padding is behind the last token of the vocabulary.
        backend: see kl_loss().

    Returns:
        As kl_loss(). Bitwise the same from run to run, on all ranks, and for any number of threads.

    Raises:
        As kl_loss(); ValueError too for a workspace too small (says the least that would do), or if ranks
        call differently. A rank that raises alone lets the others wait for the timeout of the group.

    With tp_group a call sends, in bytes that each rank contributes: 64, then for each chunk of tokens 20 a
    token (36 with cross-entropy or parts; JSD 8 more) in one all-gather (JSD: two), which a GPU does while it
    makes the next chunk's logits, then 4 H a token of the hidden gradient in one all-reduce or, with sequence
    parallelism, reduce-scatter; there the hidden states are gathered before. On the CPU a call is one chunk,
    and logits are made twice: 6 GEMMs. float64 doubles the numbers' bytes. backend="reference" gathers the
    heads instead.

    Source: Minitron (arXiv 2407.14679) section 3, (arXiv 2408.11796) section 3.
    """
    parallel = Parallel.of(tp_group, sequence_parallel, vocab_range)
    student_hidden, student_head, student_bias = local_side(
        "student",
        student_hidden,
        student_head,
        student_bias,
        tp_group,
        sequence_parallel,
        grad_head_accumulator,
        grad_head_buffer,
    )
    parameter = student_head
    teacher_hidden, teacher_head, teacher_bias = local_side(
        "teacher", teacher_hidden, teacher_head, teacher_bias, tp_group, sequence_parallel
    )
    check_floating(
        student_hidden=student_hidden,
        student_head=student_head,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
    )
    check_constant("teacher_hidden", teacher_hidden)
    check_linear("student", student_hidden, student_head)
    check_linear("teacher", teacher_hidden, teacher_head)
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "student_hidden and teacher_hidden must have the same leading dimensions, got "
            f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    shape, vocab_sizes = student_hidden.shape[:-1], (student_head.shape[0], teacher_head.shape[0])
    if tp_group is None:
        V = check_vocab_size(vocab_size, *vocab_sizes)
        labels_below = V, vocab_sizes[0]
    else:
        V, shape = parallel.sizes(tp_group, sequence_parallel, vocab_size, shape)
        labels_below = LABELS_CHECKED_LATER
    check_bias("student_bias", student_bias, student_head)
    check_bias("teacher_bias", teacher_bias, teacher_head)
    check_accumulator(grad_head_accumulator, student_head)
    check_schedule(schedule)
    options = loss_options(
        divergence=divergence,
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        label_smoothing=label_smoothing,
    )
    device = student_hidden.device
    chosen = pick("linear_kl_loss", device, backend, student_hidden.dtype)
    if chosen != "reference":
        check_transforms("linear_kl_loss", student_hidden, student_head, student_bias)
    tokens = Tokens.of(
        student_hidden,
        labels,
        ignore_index,
        mask,
        token_weights,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=positive("temperature", temperature) if temperature_squared else None,
        reduction=reduction,
        num_items=num_items,
        return_parts=return_parts,
        vocab_sizes=labels_below,
        shape=shape,
    )

    student_hidden, student_head = autocast(student_hidden, student_head)
    teacher_hidden, teacher_head = autocast(teacher_hidden.detach(), teacher_head.detach())
    operands = (student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias)
    if chosen == "reference":
        check_left_to_autograd(grad_head_accumulator=grad_head_accumulator, grad_head_buffer=grad_head_buffer)
    check_buffer(grad_head_buffer, grad_head_accumulator, student_head, parameter, *operands)
    student = (as_rows(student_hidden), student_head, student_bias)
    bias = None if teacher_bias is None else teacher_bias.detach()
    teacher = Teacher(as_rows(teacher_hidden), teacher_head, bias)
    if chosen == "reference":
        s = (as_saved(student[0]), as_saved(student[1]), as_saved(student[2]))
        t = (as_saved(as_rows(teacher_hidden)), as_saved(teacher_head), as_saved(teacher.bias))
        of_tokens = as_saved(tokens.computed), as_saved(tokens.targets)
        if tp_group is not None:
            s, t, V = gather_sides(parallel, s, t, tokens.targets, V)
        terms = TokenTerms(
            *reference.linear_rows(s, t, *of_tokens, V, tokens.needs_metrics, **options._asdict())
        )
        return tokens.result(tokens.loss(terms), terms)
    budget = workspace_budget(workspace_bytes, device)
    rest = (grad_head_accumulator, V, options, chosen, schedule, budget, parallel, grad_head_buffer)
    return linear_result(tokens, student, teacher, *rest)
