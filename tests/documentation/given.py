"""What the pages take for given: a teacher, a student, batches, ... all tiny; and smaller numbers.

A page that defines everything itself, as quickstart.md does, needs nothing from here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from distillation.cli_runs import WORDS, save_tokenizer
from pruning.tiny_models import tiny_model

V, H, HT = 96, 32, 48
WIDE = {"hidden_size": 256, "intermediate_size": 512}  # of which 64 and 128 are divisors


def tokenizer(folder: Path) -> Any:
    """Of a hundred words."""
    from transformers import AutoTokenizer

    save_tokenizer(folder / "tokenizer")
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def models() -> dict[str, Any]:
    """A teacher of 3 layers and a student of 2."""
    student = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return {"teacher": tiny_model("llama", seed=1), "student": tiny_model("llama", seed=0, **student)}


def batch(seed: int = 0, rows: int = 2, tokens: int = 12) -> dict[str, torch.Tensor]:
    """As Hugging Face collates it."""
    ids = torch.randint(4, V, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def group() -> Any:
    """The group of this process alone."""
    import torch.distributed as dist

    return dist.group.WORLD


def of_readme(folder: Path) -> dict[str, Any]:
    teacher = tiny_model("llama", seed=1, **WIDE)
    return {"teacher": teacher, "batches": [batch()], "training": [batch(1), batch(2)]}


def of_distillation(folder: Path) -> dict[str, Any]:
    import minitron_kernels

    torch.manual_seed(0)
    head, teacher_head = torch.randn(V, H) / 4, torch.randn(V, HT) / 4
    return {
        **{name: getattr(minitron_kernels, name) for name in minitron_kernels.__all__},
        **{"torch": torch, "batch": batch(), "labels": batch()["labels"], "group": group()},
        "student_hidden": torch.randn(2, 12, H, requires_grad=True),
        "teacher_hidden": torch.randn(2, 12, HT),
        **{"student_head": head.requires_grad_(), "teacher_head": teacher_head},
        **{"student_head_shard": head, "teacher_head_shard": teacher_head},
        "teacher_logits": torch.randn(2, 12, V),
        "student": models()["student"],
        "log": lambda *values: None,
    }


def of_pruning(folder: Path) -> dict[str, Any]:
    held_out = [batch(3)]
    texts = [[" ".join(WORDS[i : i + 9]), " ".join(WORDS[i : i + 5])] for i in (0, 20)]
    return {
        "model": tiny_model("llama", seed=1, **WIDE),
        "tokenizer": tokenizer(folder),
        "calibration_texts": texts,
        "held_out_batches": held_out,
        "train": lambda model, steps: None,
    }


def of_training(folder: Path) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    from minitron_kernels import distillation
    from minitron_kernels.pruning import collect_importance, make_plan

    teacher = models()["teacher"]
    scores = collect_importance(teacher, [batch()], axes=("hidden", "mlp", "layers"))
    plan = make_plan(scores, hidden_size=32, intermediate_size=64, divisor=32)
    names = (*distillation.__all__, "CachedTeacher", "DistillationTrainer", "cache_teacher")
    return {
        **{name: getattr(distillation, name) for name in names},
        **{"torch": torch, "fully_shard": fully_shard, "plan": plan, "tokenizer": tokenizer(folder)},
        **models(),
        "micro_batches": [batch(1), batch(2)],
        "dataset": [{"input_ids": row.tolist()} for row in batch(4, rows=8)["input_ids"]],
    }


def of_caching(folder: Path) -> dict[str, Any]:
    from minitron_kernels.distillation import attach

    both = models()
    both["student"] = attach(both["student"].train())
    return {**both, "loader": [batch(1), batch(2)], "batch": batch(1), "tokenizer": tokenizer(folder)}


def of_scale(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    from pruning.paper_models import NEMO

    teacher = AutoConfig.for_model(**NEMO)
    student = AutoConfig.for_model(**{**NEMO, "hidden_size": 4096, "intermediate_size": 11520})
    return {"teacher": SimpleNamespace(config=teacher), "student": SimpleNamespace(config=student)}


# pages whose Python is parsed and not run, and why
PARSED = {"docs/evaluation.md": "runs lm-eval on a large model"}
# page -> what it takes for given
GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "README.md": of_readme,
    "docs/caching.md": of_caching,
    "docs/distillation.md": of_distillation,
    "docs/pruning.md": of_pruning,
    "docs/scale.md": of_scale,
    "docs/training.md": of_training,
}
# page -> {a number in it: the one that is run}
NUMBERS: dict[str, dict[float, float]] = {
    "README.md": {4096: 192, 11520: 384},
    "docs/caching.md": {128: 8},
    "docs/distillation.md": {131072: V, 128: 8},
    "docs/pruning.md": {4096: 192, 11520: 384, 8.5e9: 1.1e6},
}
