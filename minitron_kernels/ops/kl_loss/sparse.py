"""Distillation from a teacher of few tokens a position: sparse_kl_loss(), linear_sparse_kl_loss()."""

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
from minitron_kernels.ops.kl_loss.sharded import local_side, local_tokens
from minitron_kernels.ops.kl_loss.sparse_rows import sparse_rows
from minitron_kernels.ops.kl_loss.sparse_teacher import LogTail, sparse_teacher
from minitron_kernels.ops.kl_loss.tokens import Tokens
from minitron_kernels.ops.kl_loss.vocab_parallel import LABELS_CHECKED_LATER, Parallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_sparse_kl_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    log_tail: LogTail,
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
    divergence: str | float = "forward_kl",
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    grad_head_accumulator: Tensor | None = None,
    grad_head_buffer: Tensor | None = None,
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_range: tuple[int, int] | None = None,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | LossRecord:
    """linear_kl_loss() with a teacher of which k tokens a position are known, and the rest as one outcome.

    Student and teacher are compared on k + 1 outcomes, the ids and "any other token" with the tail's mass:

        KL = Σᵢ pᵢ (log pᵢ − log qᵢ) + t_T (log t_T − log t_S),   t_T = exp(log_tail),  t_S = Σ q elsewhere

    with q the student's softmax over the whole vocabulary. It is a lower bound of the whole KL, and exact
    where both divide the tail alike; with k = V it is the whole. The gradient to the student's logits is
    qᵢ − pᵢ at the ids and q (1 − t_T / t_S) elsewhere. t_S is summed over the tail and not subtracted from 1,
    and nothing is clamped, so that it holds close to the teacher too. Neither the teacher's head nor anything
    of the size [tokens, V] is needed: 3 GEMMs (schedule "store") or 4 ("recompute").

    With log_tail=None the ids are a sample: exp(logprobs) are their importance weights, which are normalised
    for each token; the loss is KL(weights ‖ q), whose gradient q − weights is that of the whole KL on average
    (random-sampling knowledge distillation, arXiv 2503.16870: a dozen of ids are enough).

    Args:
        student_hidden: [..., H], see linear_kl_loss().
        student_head: [V, H], see linear_kl_loss().
        ids: [..., k] int64 or int32, tokens in any order, each once; −1 where a token has fewer than k.
        logprobs: [..., k] log-probabilities of the ids in the teacher's softmax over the vocabulary, at
            temperature 1. Not looked at where the id is −1. A constant, as log_tail is: if it
            requires grad, it is refused.
        log_tail: [...] logarithm of the other tokens' probability, log(1 − Σ exp(logprobs)), −inf for none;
            or a mapping {temperature: [...]} of log Σ p^(1/temperature) over the other tokens, one of which
            is `temperature`; or None for sampled ids, with divergence="forward_kl" at temperature 1.
        labels: see linear_kl_loss(), as all that follow.
        ignore_index: as above.
        mask: as above. Entries of tokens that do not count are not looked at.
        token_weights: as above.
        kl_weight: as above.
        ce_weight: as above.
        label_smoothing: as above.
        temperature: as above; divides the student's logits, and the teacher's log-probabilities.
        temperature_squared: as above.
        reduction: as above.
        num_items: as above.
        student_bias: as above.
        divergence: as above, on the k + 1 outcomes.
        vocab_size: as above; the number of tokens, by default all rows of the head.
        student_softcap: as above.
        student_logit_scale: as above.
        grad_head_accumulator: as above.
        grad_head_buffer: as above.
        tp_group: as above; ids are those of the whole vocabulary, and vocab_size must be given. A chunk has
            an all-reduce of its k logits a token, too.
        sequence_parallel: as above; ids, logprobs and log_tail are those of all tokens.
        vocab_range: as above.
        schedule: as above.
        workspace_bytes: as above.
        return_parts: as above; `kl` is that of the k + 1 outcomes.
        backend: as above.

    Returns:
        As linear_kl_loss().

    Raises:
        As linear_kl_loss(); ValueError too for a token's entries, naming its row: an id that is no token or
        stands twice, a log-probability above 0 or NaN, probabilities that do not sum to 1 with the tail
        (within 1 %). On a GPU that is an assertion on the device.

    Source: the k + 1 outcomes as in distillation from cached top-k logits; sampled ids: arXiv 2503.16870.
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
    check_floating(student_hidden=student_hidden, student_head=student_head)
    check_linear("student", student_hidden, student_head)
    shape, rows = student_hidden.shape[:-1], student_head.shape[0]
    if tp_group is None:
        V = check_vocab_size(vocab_size, rows, rows)
        labels_below = V, rows
    else:
        V, shape = parallel.sizes(tp_group, sequence_parallel, vocab_size, shape)
        if V == 0:
            raise ValueError("vocab_size must be given with tp_group: a rank's head does not say it")
        labels_below = LABELS_CHECKED_LATER
    check_bias("student_bias", student_bias, student_head)
    check_accumulator(grad_head_accumulator, student_head)
    check_schedule(schedule)
    options = loss_options(
        divergence=divergence,
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=None,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=1.0,
        label_smoothing=label_smoothing,
    )
    device = student_hidden.device
    chosen = pick("linear_sparse_kl_loss", device, backend, student_hidden.dtype)
    if chosen != "reference":
        check_transforms("linear_sparse_kl_loss", student_hidden, student_head, student_bias)
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
    teacher = sparse_teacher(
        ids,
        logprobs,
        log_tail,
        student=student_hidden,
        shape=tokens.shape,
        valid=tokens.computed,
        vocab_size=V,
        temperature=temperature,
        beta=options.beta,
    )
    student_hidden, student_head = autocast(student_hidden, student_head)
    operands = (student_hidden, student_head, student_bias, teacher.outcomes)
    if chosen == "reference":
        check_left_to_autograd(
            grad_head_accumulator=grad_head_accumulator,
            grad_head_buffer=grad_head_buffer,
            tp_group=tp_group,
        )
    check_buffer(grad_head_buffer, grad_head_accumulator, student_head, parameter, *operands)
    student = (as_rows(student_hidden), student_head, student_bias)
    if chosen == "reference":
        side = (as_saved(student[0]), as_saved(student[1]), as_saved(student[2]))
        of_tokens = as_saved(tokens.computed), as_saved(tokens.targets)
        terms = TokenTerms(
            *reference.linear_sparse_rows(
                side, *teacher, *of_tokens, V, tokens.needs_metrics, **options._asdict()
            )
        )
        return tokens.result(tokens.loss(terms), terms)
    of_teacher = Teacher(ids=teacher.ids, outcomes=teacher.outcomes)
    budget = workspace_budget(workspace_bytes, device)
    rest = (grad_head_accumulator, V, options, chosen, schedule, budget, parallel, grad_head_buffer)
    return linear_result(tokens, student, of_teacher, *rest)


def sparse_kl_loss(
    student_logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    log_tail: LogTail,
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
    student_logit_scale: float = 1.0,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | LossRecord:
    """linear_sparse_kl_loss() from logits: kl_loss() with a teacher of which k tokens a position are known.

    Some rows at a time are copied in fp32; forward and backward keep nothing of the size [tokens, V] but the
    gradient.

    Args:
        student_logits: [..., V] float32, bfloat16, float16 or float64.
        ids: [..., k], see linear_sparse_kl_loss().
        logprobs: [..., k], likewise.
        log_tail: [...], a mapping, or None, likewise.
        labels: see kl_loss(), as all that follow.
        ignore_index: as above.
        mask: as above.
        token_weights: as above.
        kl_weight: as above.
        ce_weight: as above.
        label_smoothing: as above.
        temperature: as above.
        temperature_squared: as above.
        reduction: as above.
        num_items: as above.
        divergence: as above, on the k + 1 outcomes.
        vocab_size: as above.
        student_softcap: as above.
        student_logit_scale: as above.
        return_parts: as above.
        backend: as above.

    Returns:
        As kl_loss().

    Raises:
        As linear_sparse_kl_loss().

    Source: as linear_sparse_kl_loss().
    """
    student_logits = local_tokens("student_logits", student_logits)
    check_floating(student_logits=student_logits)
    if student_logits.dim() < 1:
        raise ValueError("student_logits must be [..., V], got a tensor without dimensions")
    columns = student_logits.shape[-1]
    V = check_vocab_size(vocab_size, columns, columns)
    options = loss_options(
        divergence=divergence,
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=None,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=1.0,
        label_smoothing=label_smoothing,
    )
    chosen = pick("sparse_kl_loss", student_logits.device, backend, student_logits.dtype)
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
        vocab_sizes=(V, columns),
    )
    teacher = sparse_teacher(
        ids,
        logprobs,
        log_tail,
        student=student_logits,
        shape=tokens.shape,
        valid=tokens.computed,
        vocab_size=V,
        temperature=temperature,
        beta=options.beta,
    )
    rows = as_rows(student_logits)
    of_tokens = tokens.computed, tokens.targets
    if chosen == "reference":
        terms = TokenTerms(
            *reference.sparse_rows(rows, *teacher, *of_tokens, V, tokens.needs_metrics, **options._asdict())
        )
    else:
        check_transforms("sparse_kl_loss", student_logits)
        terms = sparse_rows(chosen, rows, teacher, *of_tokens, V, options, tokens.needs_metrics)
    return tokens.result(tokens.loss(terms), terms)
