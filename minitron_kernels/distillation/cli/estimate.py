"""`--dry-run`: sizes, memory, steps and tokens of a run; the bytes of a cache. No weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minitron_kernels._command.models import load_config
from minitron_kernels.distillation.cli.job import Job, own_device

_ACTIVATIONS = "activations of the student"


class Sized(NamedTuple):
    """What a model takes: its config, how many parameters it has (tied ones once), and their dtype.

    `shapes` are those of the parameters, where they are known.
    """

    config: Any
    parameters: int
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...] = ()

    def shard(self, processes: int) -> int:
        """Elements of the first process, which has most: FSDP2 cuts the rows of each parameter."""
        if not self.shapes:
            return -(-self.parameters // processes)
        return sum(-(-rows // processes) * math.prod(row) for rows, *row in self.shapes)


def of_training(config: Mapping[str, Any], job: Job, device: str, held_out: int) -> str:
    """What a run of train would do and need."""
    student = _meta(config["student"], config["dtype"])
    lines = [f"train, on {device}; nothing is written", f"  run       {job}"]
    if held_out:
        lines.append(f"  held out  {held_out:,} windows, every {config['eval_every'] or job.steps:,} steps")
    lines.append(f"  student   {_described(student)}")
    teacher = None
    if config["teacher"] is not None and config["cache"] is None:
        teacher = _meta(config["teacher"], config["teacher_dtype"])
        lines.append(f"  teacher   {_described(teacher)}")
    if config["cache"] is not None:
        from minitron_kernels.distillation.cache import TeacherCache

        summary = TeacherCache(config["cache"]).summary()
        lines.append(f"  cache     {summary}".replace("\n", "\n          "))
    parts = memory_of_training(config, student, teacher, device, job.processes)
    lines.append(f"  memory of {'each' if job.processes > 1 else 'the'} process, estimated:")
    lines += [f"    {size_text(nbytes):>12}  {name}" for name, nbytes in parts.items()]
    unknown = _ACTIVATIONS not in parts
    note = ", without activations, which are not known for this family" if unknown else ""
    lines.append(f"    {size_text(sum(parts.values())):>12}  in all{note}")
    if device == "cuda":
        lines.append(f"    {size_text(torch.cuda.mem_get_info(own_device(device))[1]):>12}  the GPU has")
    if config["fsdp"]:
        lines.append(_loading("student", config["student"], config["dtype"], job.processes))
    if config["fsdp"] and teacher is not None:
        lines.append(_loading("teacher", config["teacher"], config["teacher_dtype"], job.processes))
    checkpoint = checkpoint_bytes(config, student)
    lines.append(
        f"  disk      {size_text(checkpoint)} a checkpoint, {config['keep']} are kept; and the model"
    )
    lines.append(
        f"  lr        0 → {config['lr']:g} in {config['warmup']:,} steps, {config['lr_schedule']} to "
        f"{config['lr'] if config['lr_schedule'] == 'constant' else config['lr_min']:g} at {job.steps:,}"
    )
    return "\n".join(lines)


def memory_of_training(
    config: Mapping[str, Any], student: Sized, teacher: Sized | None, device: str, processes: int
) -> dict[str, int]:
    """{part: bytes} of a process that trains; a part that is not known is left out.

    Args:
        config: of train.
        student: the model that is trained.
        teacher: a live one; None with a cache, or the text alone.
        device: "cpu" or "cuda".
        processes: that train together; with config["fsdp"] each holds a shard of both models.
    """
    computed = torch.bfloat16 if _autocasts(config, device) else student.dtype
    shards, note = (processes, ", its shard") if config["fsdp"] else (1, "")
    weights = student.shard(shards) * student.dtype.itemsize
    parts = {f"student's weights{note}": weights, f"its gradients{note}": weights}
    parts[f"AdamW's moments{note}"] = 2 * weights
    if teacher is not None:
        parts[f"teacher's weights{note}"] = teacher.shard(shards) * teacher.dtype.itemsize
    if config["fsdp"]:
        parts |= _gathered(student, teacher, computed)
    tokens = config["batch_size"] * config["seq_len"]
    activations = _activations(student.config, tokens, computed, config["gradient_checkpointing"])
    if activations is not None:
        parts[_ACTIVATIONS] = activations
    loss = _loss_bytes(config, student, teacher, tokens, computed, device)
    if loss is not None:
        parts["scratch memory of the loss"] = loss
    return parts


def _gathered(student: Sized, teacher: Sized | None, computed: torch.dtype) -> dict[str, int]:
    """What of sharded models is whole at the loss and in the backward of the first layer.

    The head stays from the forward on, and the teacher's embedding too; of layers two are there at once.
    """
    head = student.config.vocab_size * student.config.hidden_size
    parts = {
        "student's head and two layers, gathered": computed.itemsize * (head + 2 * _layer(student)),
        "gradient of the head, and its sum in float32": (computed.itemsize + 4) * head,
    }
    if teacher is not None:
        whole = _around(teacher) + 2 * _layer(teacher)
        parts["teacher's embedding, head and two layers, gathered"] = teacher.dtype.itemsize * whole
    return parts


def _around(model: Sized) -> int:
    """Elements of embedding and head."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    elements: int = model.config.vocab_size * model.config.hidden_size * (1 if tied else 2)
    return elements


def _layer(model: Sized) -> int:
    """Elements of a layer, all alike."""
    return -(-(model.parameters - _around(model)) // int(model.config.num_hidden_layers))


def checkpoint_bytes(config: Mapping[str, Any], student: Sized) -> int:
    """Of a checkpoint: weights and AdamW's moments; under FSDP2 accelerate writes the weights once more."""
    return (4 if config["fsdp"] else 3) * student.parameters * student.dtype.itemsize


def of_cache(config: Mapping[str, Any], windows: int, device: str) -> str:
    """What a run of cache would need, and the bytes it would write."""
    teacher = _meta(config["teacher"], config["dtype"])
    tokens = windows * config["seq_len"]
    each, spec = _bytes_a_token(config, teacher)
    kept = {
        "topk": f"up to {spec.k} ids a position, log-probabilities as {spec.quantiser}",
        "sampled": f"{spec.samples} draws a position",
        "hidden": f"hidden states of {spec.hidden_size} in bfloat16",
    }[spec.tier]
    about = "at most " if spec.tier == "sampled" or spec.mass is not None else "about "
    return "\n".join(
        [
            f"cache, on {device}; nothing is written",
            f"  teacher   {_described(teacher)}",
            f"  text      {windows:,} windows of {config['seq_len']:,} = {tokens:,} tokens, in "
            f"{-(-windows // config['batch_size']):,} batches",
            f"  tier      {spec.tier}: {kept}",
            f"  disk      {about}{each:,.1f} bytes a token, {size_text(each * tokens)} in all",
        ]
    )


def size_text(nbytes: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes:.0f} B"


def _meta(folder: str, dtype: str) -> Sized:
    """What the model in a checkpoint's folder takes; its weights are not read."""
    from transformers import AutoModelForCausalLM

    config = load_config(Path(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kind = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    shapes = tuple(tuple(p.shape) or (1,) for p in model.parameters())  # tied ones once
    return Sized(model.config, sum(map(math.prod, shapes)), kind, shapes)


def _loading(which: str, folder: str, dtype: str, processes: int) -> str:
    """How much of a checkpoint a process reads to have its shards."""
    from minitron_kernels.distillation.trainers.hf_loading import NotByShardsError, empty_model

    begin = f"  loading   {which}: each process "
    try:
        _, weights = empty_model(Path(folder), dtype, otherwise="used")
    except NotByShardsError as why:
        return f"{begin}reads all of it into its memory, since {why}"
    share, whole = weights.bytes_of_share(processes)
    return f"{begin}reads {size_text(share)} of {size_text(whole)}"


def _described(model: Sized) -> str:
    config = model.config
    return (
        f"{model.parameters:,} parameters in {str(model.dtype).removeprefix('torch.')}, "
        f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size:,}"
    )


def _autocasts(config: Mapping[str, Any], device: str) -> bool:
    return config["autocast"] == "bfloat16" or (config["autocast"] == "auto" and device == "cuda")


def _activations(config: Any, tokens: int, dtype: torch.dtype, checkpointing: bool) -> int | None:
    """What the student keeps for its backward; None where its family is not known."""
    from minitron_kernels.distillation.scale.activations import kept_bytes
    from minitron_kernels.distillation.scale.shape import shape_of

    try:
        shape = shape_of("student", config, 1)
    except ValueError:
        return None
    return kept_bytes(shape, tokens, dtype.itemsize, fused_norms=False, checkpointing=checkpointing)


def _loss_bytes(
    config: Mapping[str, Any],
    student: Sized,
    teacher: Sized | None,
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> int | None:
    """What linear_kl_loss() or linear_sparse_kl_loss() allocates; None where it cannot be planned here."""
    from minitron_kernels.ops.kl_loss.op_plan import plan_linear_kl_loss

    sparse, width = None, student.config.hidden_size
    if config["cache"] is not None:
        from minitron_kernels.distillation.cache import TeacherCache

        spec = TeacherCache(config["cache"]).spec
        sparse, width = (spec.k, 0) if spec.tier != "hidden" else (None, spec.hidden_size)
    elif teacher is not None:
        width = teacher.config.hidden_size
    else:  # the next token of the text
        sparse, width = 1, 0
    try:
        plan = plan_linear_kl_loss(
            tokens,
            config["vocab_size"] or student.config.vocab_size,
            student.config.hidden_size,
            width,
            dtype=dtype,
            divergence_needs_kl=config["divergence"] not in ("forward_kl", "reverse_kl", 0.0, 1.0),
            schedule=config["loss_schedule"],
            workspace_bytes=config["loss_workspace"],
            device=device,
            sparse_ids=sparse,
        )
    except (ValueError, TypeError, RuntimeError):
        return None
    return plan.total_bytes


def _bytes_a_token(config: Mapping[str, Any], teacher: Sized) -> tuple[float, Any]:
    """Bytes of a token in a shard, of a window that has all ids that it may; and the cache's spec."""
    from minitron_kernels.distillation.cache import CacheSpec
    from minitron_kernels.distillation.cache.payload import encode

    vocab = config["vocab_size"] or teacher.config.vocab_size
    tier, length = config["tier"], min(config["seq_len"], 64)
    of_tier: dict[str, Any] = {"hidden_size": teacher.config.hidden_size}
    if tier == "topk":
        temperatures = tuple(config["temperatures"] or ())
        of_tier = {"k": min(config["k"] or 128, vocab), "mass": config["mass"], "temperatures": temperatures}
        of_tier["quantiser"] = config["quantiser"]
    elif tier == "sampled":
        draws = config["draws"] or 12
        of_tier = {"k": min(draws, vocab), "samples": draws}
    spec = CacheSpec(tier, vocab_size=vocab, teacher="estimate", **of_tier)
    if tier == "hidden":
        payload: dict[str, Any] = {"hidden": torch.zeros(length, spec.hidden_size or 0, dtype=torch.bfloat16)}
    else:
        # sets of ids are packed by their gaps: evenly drawn ones take most
        drawn = torch.rand(length, vocab, generator=torch.Generator().manual_seed(0))
        ids = drawn.topk(spec.k or 0).indices
        payload = {"ids": ids, "counts": torch.ones_like(ids)}
        if tier == "topk":
            logprobs = torch.full(ids.shape, math.log(0.5 / ids.shape[1]))
            tail = {temperature: torch.full((length,), math.log(0.5)) for temperature in spec.temperatures}
            payload = {"ids": ids, "logprobs": logprobs, "log_tail": tail}
    fields = encode(torch.zeros(length, dtype=torch.int64), payload, spec)
    return sum(x.numel() * x.element_size() for x in fields.values()) / length, spec
