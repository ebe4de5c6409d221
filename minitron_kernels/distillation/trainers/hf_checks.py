"""What a DistillationTrainer refuses, because it would be ignored or come out wrong."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from minitron_kernels._tensors import is_dtensor
from minitron_kernels.distillation.loss import DistillationLoss
from minitron_kernels.distillation.teacher import ModelTeacher

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


def check_models(student: Any, teacher: Any, loss: DistillationLoss, tokenizer: Any = None) -> None:
    """Checks an attached student, against its teacher where that is a model or a cache."""
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
    if (check_student := getattr(teacher, "check_student", None)) is not None:  # as CachedTeacher has it
        shared = loss.options["vocab_size"] is not None  # then the loss compares
        check_student(None if shared else _head(student).weight.shape[0], tokenizer)
    if not isinstance(teacher, ModelTeacher):
        return
    teacher.check_apart(student)
    sizes = [_head(model).weight.shape[0] for model in (student, teacher.model)]
    if sizes[0] != sizes[1] and loss.options["vocab_size"] is None:
        raise ValueError(
            f"model has {sizes[0]} tokens and teacher {sizes[1]}: if the first ones are the same, say "
            f"how many (DistillationLoss(vocab_size={min(sizes)}))"
        )


def _head(model: nn.Module) -> Any:
    """The output layer of a language model, or of the one within a wrapper."""
    inner: Any = next(module for module in model.modules() if hasattr(module, "get_output_embeddings"))
    return inner.get_output_embeddings()


def can_be_moved(model: Any, args: TrainingArguments) -> bool:
    """Whether a teacher may go to the student's device: nobody has placed, sharded or quantised it."""
    placed = getattr(model, "hf_device_map", None) or getattr(model, "quantization_method", None)
    return (
        not placed
        and args.place_model_on_device is not False
        and not any(map(is_dtensor, model.parameters()))
    )


def check_setup(trainer: Any) -> None:
    """Checks how a trainer is going to run its model, which is known after Trainer.__init__()."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"this process sees {trainer.args.n_gpu} GPUs, for which Trainer takes DataParallel, which "
            "cannot gather the loss's parts: start one process a GPU (torchrun --nproc-per-node ...), or set "
            "CUDA_VISIBLE_DEVICES to one"
        )
    if trainer.args.fsdp and not (trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled):
        raise ValueError(
            "args.fsdp would be ignored, since accelerate leaves it aside here: start the processes by "
            "torchrun, or leave it out"
        )
    for name in ("tp", "cp", "sp"):
        if (size := getattr(trainer, f"get_{name}_size")()) > 1:
            raise ValueError(
                f"{name}_size={size}: DistillationTrainer knows data parallelism (DDP, FSDP2) alone; a "
                "vocabulary over several ranks is linear_kl_loss(tp_group=...) in a loop of one's own"
            )
    own = list(trainer.distillation_loss.parameters())
    if not own:
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
    dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    if plugin is not None and trainer.accelerator.mixed_precision == "no" and len(dtypes) > 1:
        raise ValueError(
            "FSDP2 shards trained parameters of one dtype together, and loss and model have "
            f"{', '.join(sorted(map(str, dtypes)))}: "
            "give them one (loss.to(model.dtype)), or train with bf16=True"
        )
