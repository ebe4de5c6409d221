"""Teachers' outputs that other tools wrote, as (token_ids [T], payload) for TeacherCacheWriter.add().

    spec = CacheSpec(tier="topk", vocab_size=151936, k=128, teacher="Qwen/Qwen3-8B, captured by DistillKit")
    with TeacherCacheWriter("cache", spec) as writer:
        add_all(writer, read_distillkit("capture"))

Payloads have one row a position, as a model of these token_ids makes them: row t is about token t + 1. What
foreign captures lack (mostly a row at the last token) has no id and all probability in the tail: its loss and
gradient are 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from minitron_kernels.distillation.cache.import_.distillkit import read_distillkit
from minitron_kernels.distillation.cache.import_.megatron import read_megatron
from minitron_kernels.distillation.cache.import_.vllm import (
    read_vllm_hidden_states,
    read_vllm_prompt_logprobs,
    rms_norm,
)

__all__ = [
    "add_all",
    "read_distillkit",
    "read_megatron",
    "read_vllm_hidden_states",
    "read_vllm_prompt_logprobs",
    "rms_norm",
]


def add_all(writer: Any, sequences: Iterable[tuple[Tensor, dict[str, Any]]]) -> int:
    """Adds all sequences to a TeacherCacheWriter; returns how many were new."""
    return sum(bool(writer.add(token_ids, payload)) for token_ids, payload in sequences)
