"""Distil a pruned student from its teacher: the loss, teachers live or cached, and trainers."""

from minitron_kernels.distillation.causal_lm import CausalLM, attach
from minitron_kernels.distillation.hidden_states import HiddenStatesLoss
from minitron_kernels.distillation.layer_pairs import layer_pairs, layer_pairs_of
from minitron_kernels.distillation.loss import DistillationLoss, DistillationRecord
from minitron_kernels.distillation.signals import DenseSignal, SparseSignal, TeacherSignal
from minitron_kernels.distillation.step import DistillationCall, step
from minitron_kernels.distillation.teacher import ModelTeacher, Teacher

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
    "attach",
    "layer_pairs",
    "layer_pairs_of",
    "step",
]
