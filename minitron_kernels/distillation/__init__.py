"""Distil a pruned student from its teacher: the loss, teachers live or cached, and trainers."""

from typing import TYPE_CHECKING, Any

from minitron_kernels._lazy import load

if TYPE_CHECKING:
    from minitron_kernels.distillation.causal_lm import CausalLM, attach, detach
    from minitron_kernels.distillation.hidden_states import HiddenStatesLoss
    from minitron_kernels.distillation.loss import DistillationLoss, DistillationRecord
    from minitron_kernels.distillation.pairing import layer_pairs, layer_pairs_of
    from minitron_kernels.distillation.signals import DenseSignal, SparseSignal, TeacherSignal
    from minitron_kernels.distillation.stepping import DistillationCall, step
    from minitron_kernels.distillation.targets import count_targets, targets_of
    from minitron_kernels.distillation.teacher import ModelTeacher, Teacher
    from minitron_kernels.distillation.text_teacher import TextTeacher

# what needs more packages than torch, by the module that has it; imported when it is asked for
_LAZY = {
    "CachedTeacher": "minitron_kernels.distillation.cache.teacher",
    "DistillationPlan": "minitron_kernels.distillation.scale.distillation_plan",
    "DistillationTrainer": "minitron_kernels.distillation.trainers.hf",
    "TeacherCache": "minitron_kernels.distillation.cache.reader",
    "TeacherCacheWriter": "minitron_kernels.distillation.cache.writer",
    "plan_distillation": "minitron_kernels.distillation.scale.plan_distillation",
    "cache_teacher": "minitron_kernels.distillation.cache.fill",
}

__all__ = [
    "CausalLM",
    "DenseSignal",
    "DistillationCall",
    "DistillationLoss",
    "DistillationRecord",
    "HiddenStatesLoss",
    "ModelTeacher",
    "SparseSignal",
    "Teacher",
    "TeacherSignal",
    "TextTeacher",
    "attach",
    "count_targets",
    "detach",
    "layer_pairs",
    "layer_pairs_of",
    "step",
    "targets_of",
]
# where they are; none of them may be called as a module of this package is
_HOMES = {
    "CausalLM": "minitron_kernels.distillation.causal_lm",
    "DenseSignal": "minitron_kernels.distillation.signals",
    "DistillationCall": "minitron_kernels.distillation.stepping",
    "DistillationLoss": "minitron_kernels.distillation.loss",
    "DistillationRecord": "minitron_kernels.distillation.loss",
    "HiddenStatesLoss": "minitron_kernels.distillation.hidden_states",
    "ModelTeacher": "minitron_kernels.distillation.teacher",
    "SparseSignal": "minitron_kernels.distillation.signals",
    "Teacher": "minitron_kernels.distillation.teacher",
    "TeacherSignal": "minitron_kernels.distillation.signals",
    "TextTeacher": "minitron_kernels.distillation.text_teacher",
    "attach": "minitron_kernels.distillation.causal_lm",
    "count_targets": "minitron_kernels.distillation.targets",
    "detach": "minitron_kernels.distillation.causal_lm",
    "layer_pairs": "minitron_kernels.distillation.pairing",
    "layer_pairs_of": "minitron_kernels.distillation.pairing",
    "step": "minitron_kernels.distillation.stepping",
    "targets_of": "minitron_kernels.distillation.targets",
}


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES | _LAZY, name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
