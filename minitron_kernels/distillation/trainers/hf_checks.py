"""What a DistillationTrainer refuses, because it would be ignored or come out wrong."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from minitron_kernels.distillation.loss import DistillationLoss

_TRAINER_OPTIONS = frozenset(inspect.signature(Trainer.__init__).parameters) - {"self", "model", "args"}
_NO_LOGITS = "compute_metrics", "preprocess_logits_for_metrics"


def check_options(model: Any, teacher: Any, loss: Any, options: dict[str, Any]) -> None:
    """Checks the arguments of DistillationTrainer(), but for `args`."""
    if not isinstance(loss, DistillationLoss):
        raise TypeError(f"loss must be a DistillationLoss, got {type(loss).__name__}")
    if not callable(teacher):
        raise TypeError(
            "teacher must be a causal language model or a Teacher (CachedTeacher, ...), got "
            f"{type(teacher).__name__}: load it first (AutoModelForCausalLM.from_pretrained)"
        )
    if unknown := sorted(set(options) - _TRAINER_OPTIONS):
        raise TypeError(f"DistillationTrainer() got unknown arguments: {', '.join(unknown)}")
    for name in _NO_LOGITS:
        if options.get(name) is not None:
            raise ValueError(
                f"{name} needs logits, which DistillationTrainer does not make: leave it out; evaluate() "
                "gives the loss, KL, cross-entropy and perplexity"
            )
    if options.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would be ignored: the loss is `loss`, a DistillationLoss")
    if options.get("model_init") is not None and any(True for _ in loss.parameters()):
        raise ValueError(
            "model_init makes students anew, but not the parameters of the loss: pass model, or a loss "
            "without parameters"
        )


def check_arguments(args: TrainingArguments) -> None:
    """Checks the options of TrainingArguments that change the loss."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"args.label_smoothing_factor={args.label_smoothing_factor} would be ignored: pass "
            f"DistillationLoss(ce_weight=..., label_smoothing={args.label_smoothing_factor})"
        )
    if args.use_liger_kernel:
        config = args.liger_kernel_config or {}
        if config.get("fused_linear_cross_entropy", True) or config.get("cross_entropy", False):
            raise ValueError(
                "args.use_liger_kernel replaces the student's forward() by one with a cross-entropy of "
                "its own: pass liger_kernel_config="
                '{"fused_linear_cross_entropy": False, "cross_entropy": False}, '
                "which leaves Liger's other kernels"
            )
    if args.label_names not in (None, ["labels"]):
        raise ValueError(f"args.label_names must be ['labels'] or left out, got {args.label_names}")


def check_models(student: Any, teacher: Any, loss: DistillationLoss) -> None:
    """Checks a student, against its teacher where that is a model."""
    _check_causal_lm("model", student)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "model has no parameter that requires grad: a student that was pruned from a frozen teacher is "
            "frozen too; call model.requires_grad_(True)"
        )
    if getattr(student.config, "output_router_logits", False):
        raise ValueError(
            "model.config.output_router_logits asks for the router's auxiliary loss, which would be ignored: "
            "set it to False"
        )
    other = teacher if isinstance(teacher, nn.Module) else getattr(teacher, "model", None)
    if not isinstance(other, nn.Module):
        return
    _check_causal_lm("teacher", other)
    own = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if shared := [name for name, parameter in other.named_parameters() if id(parameter) in own]:
        raise ValueError(
            f"teacher shares {len(shared)} parameters that are to be trained with model ({shared[0]}, ...): "
            "it is frozen; give it weights of its own (copy.deepcopy, or load it again)"
        )
    models: tuple[Any, Any] = student, other
    sizes = [model.get_output_embeddings().weight.shape[0] for model in models]
    if sizes[0] != sizes[1] and loss.options["vocab_size"] is None:
        raise ValueError(
            f"model has {sizes[0]} tokens and teacher {sizes[1]}: if the first ones are the same, say "
            f"how many (DistillationLoss(vocab_size={min(sizes)}))"
        )


def _check_causal_lm(name: str, model: Any) -> None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(model, nn.Module) or head is None:
        raise TypeError(
            f"{name} must be a causal language model of transformers with an output layer, got "
            f"{type(model).__name__}: load it by AutoModelForCausalLM"
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{name} must be a causal language model, got an encoder-decoder: {type(model).__name__}"
        )


def check_setup(trainer: Any) -> None:
    """Checks how a trainer is going to run its model, which is known after Trainer.__init__()."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"this process sees {trainer.args.n_gpu} GPUs, for which Trainer takes DataParallel, which "
            "cannot gather the loss's parts: start one process a GPU (torchrun --nproc-per-node ...), or set "
            "CUDA_VISIBLE_DEVICES to one"
        )
    for name in ("tp", "cp", "sp"):
        if (size := getattr(trainer, f"get_{name}_size")()) > 1:
            raise ValueError(
                f"{name}_size={size}: DistillationTrainer knows data parallelism (DDP, FSDP2) alone; a "
                "vocabulary over several ranks is linear_kl_loss(tp_group=...) in a loop of one's own"
            )
    if not any(True for _ in trainer.distillation_loss.parameters()):
        return
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "a loss with parameters is not resumed under DeepSpeed: take DDP or FSDP2, or a loss without them"
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "cpu_ram_efficient_loading", False):
        raise ValueError(
            "fsdp_config's cpu_ram_efficient_loading does not load a loss with parameters: set it to False"
        )
