"""Operations and bytes of a recipe's stages, from configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from minitron_kernels.distillation.cli.estimate import (
    Sized,
    checkpoint_bytes,
    memory_of_training,
    size_text,
)
from minitron_kernels.distillation.cli.job import device_for
from minitron_kernels.distillation.recipe.graph import Node, needs_teacher
from minitron_kernels.pruning import count_usage
from minitron_kernels.pruning.families.configs import completed, full_config
from minitron_kernels.pruning.families.registry import family_of

Facts = list[tuple[str, str]]


def described(config: Mapping[str, Any]) -> str:
    """A model in a line."""
    family, config = family_of(config), completed(config)
    sizes = family.sizes(config)
    wide = f", MLP {sizes['mlp']:,}" if "mlp" in sizes else ""
    return (
        f"{family.count_parameters(config):,} parameters, {config['model_type']}, "
        f"{sizes['layers']} layers of {sizes['hidden']:,}{wide}, {sizes['heads']} heads, "
        f"vocabulary {sizes['vocab']:,}"
    )


def parameters_of(config: Mapping[str, Any]) -> int:
    """Parameters, a tied head once."""
    return family_of(config).count_parameters(completed(config))


def dtype_of(config: Mapping[str, Any], name: str) -> torch.dtype:
    """A dtype by its name; "auto" is the checkpoint's."""
    if name == "auto":
        name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    found: torch.dtype = getattr(torch, name)
    return found


def weight_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """Bytes of a model's weights."""
    return parameters_of(config) * dtype_of(config, dtype).itemsize


def forward_operations(config: Mapping[str, Any], tokens: int, seq_len: int) -> float:
    """Multiplications and additions of a forward pass over so many tokens.

        tokens · (2 parameters + 2 layers · S · heads · head_dim)

    parameters are those that serve a token, without the embedding's look-up; the second part is causal
    attention over S tokens: queries by keys, and weights by values, half of each.

    Source: Kaplan et al. 2020 (arXiv 2001.08361) section 2.1; Korthikanti et al. 2022 (arXiv 2205.05198).
    """
    family, config = family_of(config), completed(config)
    sizes = family.sizes(config)
    serving = count_usage(config).active_parameters
    if not family.tied(config):
        serving -= sizes["vocab"] * sizes["hidden"]
    attention = 2 * sizes["layers"] * seq_len * sizes["heads"] * sizes["head_dim"]
    return float(tokens) * (2 * serving + attention)


def training_operations(
    config: Mapping[str, Any], student: Mapping[str, Any], teacher: Mapping[str, Any] | None, tokens: int
) -> float:
    """Of training on so many tokens: the student's forward three times, or four with gradient checkpointing
    (the backward takes twice the forward), and the teacher's once."""
    times = 4 if config["gradient_checkpointing"] else 3
    total = times * forward_operations(student, tokens, config["seq_len"])
    return total + (forward_operations(teacher, tokens, config["seq_len"]) if teacher is not None else 0.0)


def loss_text(node: Node) -> str:
    """The loss of a training stage, in words."""
    config = node.config
    if node.stage == "correct" or not needs_teacher(config):
        return "cross-entropy with the text"
    parts = [f"{config['kl_weight']:g} × {config['divergence']} at temperature {config['temperature']:g}"]
    if config["ce_weight"]:
        parts.append(f"{config['ce_weight']:g} × cross-entropy")
    if config["hidden_layers"]:
        parts.append(f"hidden states of {len(config['hidden_layers'])} layers")
    return " + ".join(parts)


def training_memory(
    node: Node, student: Mapping[str, Any], teacher: Mapping[str, Any] | None, estimate: Mapping[str, Any]
) -> Facts:
    """Memory of a process, and where there are several GPUs of one of them with FSDP2."""
    config: dict[str, Any] = {**LOSS_OF_TEXT, **node.config, "cache": None, "teacher": teacher}
    device = "cuda" if estimate["gpus"] > 1 else device_for(config["device"])
    own = _sized(student, config["dtype"])
    other = None if teacher is None else _sized(teacher, config.get("teacher_dtype", "auto"))
    parts = memory_of_training(config, own, other, device, config["processes"])
    most = ", ".join(f"{name} {size_text(nbytes)}" for name, nbytes in parts.items())
    which = "each" if config["processes"] > 1 else "the"
    facts = [("memory", f"{size_text(sum(parts.values()))} in {which} process: {most}")]
    checkpoint = checkpoint_bytes(config, own)
    facts.append(("disk", f"{size_text(checkpoint)} a checkpoint, {config['keep']} are kept while it trains"))
    if estimate["gpus"] > 1 and teacher is not None:
        facts += _sharded(node, student, teacher, estimate)
    return facts


# keys of train that [correct] does not have
LOSS_OF_TEXT = {
    "vocab_size": None,
    "divergence": "forward_kl",
    "loss_schedule": "auto",
    "loss_workspace": None,
    "teacher_dtype": "auto",
}


def _sized(config: Mapping[str, Any], dtype: str) -> Sized:
    return Sized(full_config(config), parameters_of(config), dtype_of(config, dtype))


def _sharded(
    node: Node, student: Mapping[str, Any], teacher: Mapping[str, Any], estimate: Mapping[str, Any]
) -> Facts:
    """What plan_distillation() says of TP × FSDP2; nothing where it does not know the family."""
    from minitron_kernels.distillation.scale.plan_distillation import plan_distillation

    config, tp = node.config, estimate["tp"]
    fsdp = max(1, estimate["gpus"] // tp)
    try:
        plan = plan_distillation(
            student,
            teacher,
            sequence_length=config["seq_len"],
            global_batch=config["batch_size"] * config["accumulation"] * config["processes"],
            micro_batch=config["batch_size"],
            tp=tp,
            fsdp=fsdp,
            checkpointing=config["gradient_checkpointing"],
        )
    except ValueError as error:
        return [("sharded", f"not planned: {error}")]
    return [
        (
            "sharded",
            f"{size_text(plan.ours.peak_bytes)} a GPU with TP {tp} × FSDP2 {fsdp} (plan_distillation); with "
            f"full logits {size_text(plan.stock.peak_bytes)}",
        )
    ]
