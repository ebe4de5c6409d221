"""Hidden states of a real pair: SmolLM2-135M, and as student a copy with a quarter of its MLP neurons cut.

The cut neurons are those with the least mean |x| at down_proj's input on a calibration text; nothing is
trained. All results are cached.
"""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import torch
import torch.nn.functional as F

from common.models import (
    TINY,
    WHEEL,
    Say,
    cache_dir,
    mlp_scores,
    reference_text,
    smollm2_or_tiny,
    token_windows,
)
from kl_loss_rows.cases import Case

WINDOW = 512  # tokens in a sequence
CALIBRATION_WINDOWS = 4
KEEP = 0.75  # share of the MLP neurons that stay


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
