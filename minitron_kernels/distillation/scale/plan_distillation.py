"""Memory and communication of a distillation step on many ranks, without making a model.

What is planned, and confirmed by runs at 2 and 4 ranks (tests/distillation/test_scale.py): student and
teacher under tensor parallelism, one input of each block prepared for all of its linear layers; FSDP2 around
each decoder layer and around the whole model, with its defaults; the loss inside the student's forward, by
linear_kl_loss(tp_group=); the teacher without gradients. A norm of gradients for clipping and a loss to be
logged are a few bytes, and left out. tables.py makes the tables of docs/scale.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from minitron_kernels.distillation.scale import loss as scale_loss
from minitron_kernels.distillation.scale.activations import kept_bytes, layer_bytes
from minitron_kernels.distillation.scale.distillation_plan import DistillationPlan
from minitron_kernels.distillation.scale.parts import (
    ALWAYS,
    BACKWARD,
    END,
    LOSS,
    TEACHER,
    Collective,
    Part,
    Way,
)
from minitron_kernels.distillation.scale.shape import ModelShape, elements, shape_of, shard_elements
from minitron_kernels.ops.kl_loss.checks import integer, refuse

__all__ = ["DistillationPlan", "plan_distillation"]


def plan_distillation(
    student: Any,
    teacher: Any = None,
    *,
    sequence_length: int,
    global_batch: int,
    micro_batch: int = 1,
    tp: int = 1,
    fsdp: int = 1,
    checkpointing: bool = True,
    fused_norms: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    master_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype = torch.bfloat16,
    optimizer_bytes: int = 8,
    return_parts: bool = True,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    device: str | torch.device = "cuda",
    gpu: str | None = None,
) -> DistillationPlan:
    """Plans a training step of a student and its teacher on tp × fsdp ranks; print(plan.explain()).

    All bytes are those of one rank, the first, which has most. Nothing is allocated and no model is made.

    Args:
        student: its config: the dict of a config.json, or a config of transformers. Or a PruningPlan, which
            has both configs.
        teacher: its config; None with a PruningPlan.
        sequence_length: tokens of a sequence.
        global_batch: sequences of a step, of all ranks.
        micro_batch: sequences of a rank in one forward and backward; fsdp × micro_batch must divide
            global_batch.
        tp: ranks that share each layer and the vocabulary; must divide query heads, key/value heads and MLP
            widths of both models.
        fsdp: ranks over which FSDP2 shards what is left of student and teacher.
        checkpointing: whether each layer of the student is made again in the backward.
        fused_norms: whether norms keep their input alone (Liger, Apex), or what those of transformers keep.
        dtype: in which the student computes, and FSDP2 gathers its parameters (MixedPrecisionPolicy's
            param_dtype).
        master_dtype: of the student's shards and of their gradients.
        reduce_dtype: in which FSDP2 sums gradients.
        teacher_dtype: of the teacher's parameters, which have no other.
        optimizer_bytes: for each parameter of a shard: 8 for AdamW's two moments in fp32.
        return_parts: of the loss, which DistillationLoss asks for: cross-entropy, entropy, labels.
        schedule: of the loss, see plan_linear_kl_loss().
        workspace_bytes: of the loss, see there.
        device: "cuda", or "cpu", where the loss is planned by the C++ extension.
        gpu: of the predicted time of the loss, see there.

    Returns:
        The plan, with the stock way beside ours: both models' logits of the whole vocabulary on every rank,
        F.log_softmax, F.softmax and F.kl_div of them in fp32.

    Raises:
        TypeError: a size that is not an int, a dtype of another width than 2 or 4 bytes.
        ValueError: an unknown or unplanned model, vocabularies that differ, a size that is not divided.

    Example:
        >>> plan = plan_distillation(student, teacher, sequence_length=8192, global_batch=768,
        ...                          tp=8, fsdp=64)                                     # doctest: +SKIP
        >>> print(plan.explain())                                                      # doctest: +SKIP

    Source: memory of activations Korthikanti et al. 2022 (arXiv 2205.05198), tensor parallelism Shoeybi et
    al. 2019 (arXiv 1909.08053), sharding Rajbhandari et al. 2020 (arXiv 1910.02054) and torch's FSDP2.
    """
    for name, value in (
        ("sequence_length", sequence_length),
        ("global_batch", global_batch),
        ("micro_batch", micro_batch),
        ("tp", tp),
        ("fsdp", fsdp),
    ):
        if integer(name, value) < 1:
            refuse(name, "at least 1", value)
    if integer("optimizer_bytes", optimizer_bytes) < 0:
        refuse("optimizer_bytes", "at least 0", optimizer_bytes)
    for name, kind in (
        ("dtype", dtype),
        ("master_dtype", master_dtype),
        ("reduce_dtype", reduce_dtype),
        ("teacher_dtype", teacher_dtype),
    ):
        if kind not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {kind}")
    at_once = fsdp * micro_batch
    micro_steps, rest = divmod(global_batch, at_once)
    if rest:
        raise ValueError(
            f"global_batch must be a multiple of fsdp × micro_batch = {at_once}, got {global_batch}: take "
            f"{f'{global_batch - rest} or ' if micro_steps else ''}{global_batch - rest + at_once}"
        )
    shapes = _shapes(student, teacher, tp)
    tokens, dtypes = micro_batch * sequence_length, (dtype, teacher_dtype)
    how: dict[str, Any] = {
        "schedule": schedule,
        "workspace_bytes": workspace_bytes,
        "device": device,
        "gpu": gpu,
        "return_parts": return_parts,
    }
    loss = scale_loss.loss_plan(*shapes, tokens, dtypes, **how)
    on_cpu = torch.device(device).type == "cpu"
    # what both ways have in common
    parts = [
        *_sharded(*shapes, fsdp, dtypes, master_dtype, optimizer_bytes),
        *_working(*shapes, fsdp, tokens, dtypes, reduce_dtype, fused_norms, checkpointing),
    ]
    collectives = [
        *_fsdp_collectives(*shapes, fsdp, dtypes, reduce_dtype, micro_steps),
        *_tp_collectives(*shapes, tokens, dtypes, checkpointing, micro_steps),
    ]
    ours = Way(
        "with linear_kl_loss",
        (*parts, *scale_loss.loss_parts(loss, dtype, tp, return_parts, on_cpu)),
        _of_many((*collectives, *scale_loss.loss_collectives(loss, tp, return_parts, micro_steps))),
    )
    stock = Way(
        "with full logits",
        (*parts, *scale_loss.stock_parts(loss, shapes[0].vocab, dtype)),
        _of_many((*collectives, *scale_loss.stock_collectives(loss, dtypes, tp, micro_steps))),
    )
    return DistillationPlan(
        student=shapes[0],
        teacher=shapes[1],
        tp=tp,
        fsdp=fsdp,
        tokens=tokens,
        micro_steps=micro_steps,
        global_tokens=global_batch * sequence_length,
        checkpointing=checkpointing,
        loss=loss,
        ours=ours,
        stock=stock,
    )


def _shapes(student: Any, teacher: Any, tp: int) -> tuple[ModelShape, ModelShape]:
    """Those of student and teacher, whose vocabularies are the same."""
    from minitron_kernels.pruning import PruningPlan

    if isinstance(student, PruningPlan):
        if teacher is not None:
            raise ValueError("teacher must be None with a PruningPlan, which has the teacher's config")
        student, teacher = student.target_config, student.source_config
    for name, config in (("student", student), ("teacher", teacher)):
        if not (isinstance(config, Mapping) or hasattr(config, "model_type")):
            raise TypeError(
                f"{name} must be a config of transformers or the dict of a config.json, got "
                f"{type(config).__name__}: pass model.config"
            )
    shapes = shape_of("student", student, tp), shape_of("teacher", teacher, tp)
    if shapes[0].vocab != shapes[1].vocab:
        raise ValueError(
            f"student and teacher must have the same vocabulary, got {shapes[0].vocab} and {shapes[1].vocab}"
        )
    return shapes


def _of_many(collectives: tuple[Collective, ...]) -> tuple[Collective, ...]:
    """Those that are of more than one rank."""
    return tuple(one for one in collectives if one.ranks > 1)


def _shards(shape: ModelShape, fsdp: int) -> int:
    return sum(shard_elements(group, fsdp) for group in shape.groups)


def _sharded(
    student: ModelShape,
    teacher: ModelShape,
    fsdp: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    master_dtype: torch.dtype,
    optimizer_bytes: int,
) -> list[Part]:
    """What is there between two steps."""
    own, of_teacher = _shards(student, fsdp), _shards(teacher, fsdp)
    return [
        Part("student: shards of the weights", master_dtype.itemsize * own),
        Part("student: shards of the gradients", master_dtype.itemsize * own),
        Part("student: shards of the optimizer's states", optimizer_bytes * own),
        Part("teacher: shards of the weights", dtypes[1].itemsize * of_teacher),
    ]


def _gathered(groups: list[tuple[tuple[int, int], ...]], fsdp: int, kind: torch.dtype) -> int:
    return sum(kind.itemsize * fsdp * shard_elements(group, fsdp) for group in groups)


def _working(
    student: ModelShape,
    teacher: ModelShape,
    fsdp: int,
    tokens: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    reduce_dtype: torch.dtype,
    fused_norms: bool,
    checkpointing: bool,
) -> list[Part]:
    """What is there during a micro-step, but for the loss."""
    (dtype, teacher_dtype), layer, root = dtypes, student.largest_layer, student.root
    two, two_of_teacher = ([x.largest_layer] * min(2, x.layers) for x in (student, teacher))
    summed = reduce_dtype.itemsize * fsdp
    at_work = layer_bytes(student, tokens, dtype.itemsize, fused_norms)
    kept = kept_bytes(student, tokens, dtype.itemsize, fused_norms, checkpointing)
    of_teacher = layer_bytes(teacher, tokens, teacher_dtype.itemsize, fused_norms)
    parts = [
        Part("student: activations", kept, (LOSS, BACKWARD)),
        Part("student: hidden states behind the last norm", dtype.itemsize * tokens * student.hidden,
             (LOSS,)),
        Part("teacher: a layer at work, at most", of_teacher, (TEACHER,)),
        Part("teacher: hidden states behind the last norm", teacher_dtype.itemsize * tokens * teacher.hidden,
             (TEACHER, LOSS)),
        Part("student: gradients of a layer, and their copy to be summed",
             dtype.itemsize * elements(layer) + summed * shard_elements(layer, fsdp), (BACKWARD,)),
        Part("student: gradients of embedding, head and norm, and their copy",
             dtype.itemsize * elements(root) + summed * shard_elements(root, fsdp), (END,)),
    ]  # fmt: skip
    if checkpointing:
        parts.append(Part("student: a layer made again", at_work, (BACKWARD,)))
    # FSDP2 leaves the outermost group gathered behind the forward, until a backward, which a teacher has not
    parts += [
        Part("student: embedding, norm and head, gathered", _gathered([root], fsdp, dtype),
             (LOSS, BACKWARD, END)),
        Part("student: two layers, gathered", _gathered(two, fsdp, dtype), (BACKWARD,)),
        Part("teacher: embedding, norm and head, gathered once",
             _gathered([teacher.root], fsdp, teacher_dtype), ALWAYS),
        Part("teacher: two layers, gathered", _gathered(two_of_teacher, fsdp, teacher_dtype), (TEACHER,)),
    ]  # fmt: skip
    return parts


def _fsdp_collectives(
    student: ModelShape,
    teacher: ModelShape,
    fsdp: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    reduce_dtype: torch.dtype,
    micro_steps: int,
) -> list[Collective]:
    """What FSDP2 sends in a step: every micro-step gathers, and sums its gradients."""
    root, layers = student.root, student.layers
    of_layers = sum(shard_elements(group, fsdp) for group in student.layer_groups)
    # the outermost group stays gathered from the forward to the backward
    gathered = shard_elements(root, fsdp) + 2 * of_layers
    of_teacher = sum(shard_elements(group, fsdp) for group in teacher.layer_groups)
    summed = fsdp * _shards(student, fsdp)

    def one(name: str, kind: str, count: int, nbytes: int) -> Collective:
        return Collective(name, kind, "fsdp", fsdp, micro_steps * count, micro_steps * nbytes)

    return [
        one(
            "student: weights, forward and backward",
            "all-gather",
            1 + 2 * layers,
            dtypes[0].itemsize * gathered,
        ),
        one("student: gradients", "reduce-scatter", 1 + layers, reduce_dtype.itemsize * summed),
        one("teacher: weights", "all-gather", teacher.layers, dtypes[1].itemsize * of_teacher),
    ]


def _tp_collectives(
    student: ModelShape,
    teacher: ModelShape,
    tokens: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    checkpointing: bool,
    micro_steps: int,
) -> list[Collective]:
    """What layers send in a step: two sums of [tokens, hidden] each way, one of the embedding."""

    def one(name: str, shape: ModelShape, kind: torch.dtype, count: int) -> Collective:
        nbytes = count * kind.itemsize * tokens * shape.hidden
        return Collective(name, "all-reduce", "tp", shape.tp, micro_steps * count, micro_steps * nbytes)

    again = student.layers * checkpointing  # the second sum of a layer is not made again: nothing keeps it
    return [
        one("student: layers, forward", student, dtypes[0], 1 + 2 * student.layers),
        one("student: layers, backward", student, dtypes[0], 2 * student.layers + again),
        one("teacher: layers", teacher, dtypes[1], 1 + 2 * teacher.layers),
    ]
