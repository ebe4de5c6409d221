"""Distil a pruned student from its teacher: the loss, teachers live or cached, and trainers."""

from typing import Any

from minitron_kernels.distillation.causal_lm import CausalLM, attach, detach
from minitron_kernels.distillation.hidden_states import HiddenStatesLoss
from minitron_kernels.distillation.layer_pairs import layer_pairs, layer_pairs_of
from minitron_kernels.distillation.loss import DistillationLoss, DistillationRecord
from minitron_kernels.distillation.signals import DenseSignal, SparseSignal, TeacherSignal
from minitron_kernels.distillation.step import DistillationCall, step
from minitron_kernels.distillation.targets import count_targets, targets_of
from minitron_kernels.distillation.teacher import ModelTeacher, Teacher
from minitron_kernels.distillation.text_teacher import TextTeacher

# what needs more packages than torch, by the module that has it; imported when it is asked for
_LAZY = {
    "CachedTeacher": "minitron_kernels.distillation.cache.teacher",
    "DistillationPlan": "minitron_kernels.distillation.scale",
    "DistillationTrainer": "minitron_kernels.distillation.trainers.hf",
    "TeacherCache": "minitron_kernels.distillation.cache.reader",
    "TeacherCacheWriter": "minitron_kernels.distillation.cache.writer",
    "plan_distillation": "minitron_kernels.distillation.scale",
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


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
