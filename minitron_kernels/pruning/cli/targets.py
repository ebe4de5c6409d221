"""What the commands of minitron-prune share: the target of a plan, and windows of text."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minitron_kernels._command.documents import has_text
from minitron_kernels._command.messages import say
from minitron_kernels._command.models import load_config, load_tokenizer
from minitron_kernels._command.progress import without_bars
from minitron_kernels.pruning.cli.arguments import SIZES

if TYPE_CHECKING:
    from torch import Tensor

BUDGETS = ("params", "active_params", "memory_bytes")
OPTIONS = (
    *("memory_dtype", "kv_tokens", "kv_sequences", "search", "drop_layers", "num_experts_per_tok", "divisor"),
    *("kv_heads", "merge_heads", "order", "rescale_norms", "loadable", "batch", "seq"),
)


def target_of(args: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of make_plan() on a command line, but for the scores.

    Raises:
        ValueError: there is no target.
    """
    from minitron_kernels.pruning.families.registry import family_of

    sizes, config = {}, family_of(config).text(config)
    for option, names in SIZES.items():
        value = getattr(args, option.replace("-", "_"))
        if value is not None:
            sizes[next((name for name in names if name in config), names[0])] = value
    budgets = {name: getattr(args, name) for name in BUDGETS}
    if not sizes and not args.ratio and args.drop_layers is None and not any(budgets.values()):
        raise ValueError(
            "give a target: sizes (--hidden-size ...), --ratio, --drop-layers, or a budget (--params, "
            "--active-params, --memory)"
        )
    options = {name: getattr(args, name) for name in OPTIONS}
    return {"ratio": _ratio(args.ratio), **budgets, **options, **sizes}


def windows_of(args: argparse.Namespace) -> Tensor:
    """Windows of the text on a command line, [windows, seq-len], as the model can read them.

    Raises:
        ValueError: the text cannot be read, or not by this model.
    """
    from minitron_kernels.pruning.families.configs import config_value
    from minitron_kernels.pruning.families.registry import family_in
    from minitron_kernels.pruning.score.calibration import calibration_windows

    without_bars(args.quiet)
    config = load_config(args.model)
    config = family_in(args.model / "config.json", config).text(config)
    longest = config_value(config, "max_position_embeddings", args.seq_len)
    if args.seq_len > longest:
        raise ValueError(f"--seq-len must be at most the model's {longest} positions, got {args.seq_len}")
    tokenizer = load_tokenizer(args.model) if has_text(args.text) else None
    windows = calibration_windows(
        args.text,
        tokenizer,
        length=args.seq_len,
        samples=args.samples,
        seed=args.seed,
        text_key=args.text_key,
    )
    vocab = config_value(config, "vocab_size")
    if not 0 <= int(windows.min()) <= int(windows.max()) < vocab:
        raise ValueError(
            f"{args.text[0]}: token ids must be in [0, {vocab}) of {args.model}, "
            f"got {int(windows.min())} to {int(windows.max())}"
        )
    if len(windows) < args.samples:
        say(
            "minitron-prune",
            "warning",
            f"the text has {len(windows)} windows of {args.seq_len} tokens, not {args.samples}",
        )
    return windows


def models_of_search(args: argparse.Namespace, scores: Any, target: dict[str, Any]) -> int:
    """How many smaller models a search scores, at most.

    Raises:
        ValueError: there is neither a budget nor a number of layers; a budget cannot be met, which is then
            said before the model is loaded.
    """
    from minitron_kernels.pruning.families.registry import family_of
    from minitron_kernels.pruning.plan.make_plan import make_plan
    from minitron_kernels.pruning.search.search_layers import models_for

    depth, layers = target.get("num_hidden_layers"), family_of(scores.config).sizes(scores.config)["layers"]
    blocks = 0 if depth is None else models_for(layers, layers - depth, True)
    if any(target[name] for name in BUDGETS):
        if not args.layers_by_loss:  # else scores need not tell which layers go
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the search says them
                make_plan(scores, **target)
        return args.k + (blocks if args.layers_by_loss else 0)
    if depth is None or target["drop_layers"] is not None:
        raise ValueError(
            "give what to search: sizes for a budget (--params, --active-params, --memory), or the layers "
            "that go (--num-hidden-layers)"
        )
    return blocks


def searched(
    args: argparse.Namespace, model: Any, scores: Any, loss: Any, target: dict[str, Any]
) -> tuple[Any, Any]:
    """(the result of the search, the best plan): of sizes where there is a budget, else of layers."""
    from minitron_kernels.pruning.plan.make_plan import make_plan
    from minitron_kernels.pruning.search.search_layers import search_layers
    from minitron_kernels.pruning.search.search_plan import search_plan

    how = {"progress_file": args.progress_file, "progress": False if args.quiet else None}
    if any(target[name] for name in BUDGETS):
        found = search_plan(
            model, scores, loss, k=args.k, layers_by_score=args.layers_by_loss, **how, **target
        )
        return found, found.plan
    by_loss = search_layers(model, target["num_hidden_layers"], loss, scores=scores, **how)
    return by_loss, make_plan(scores, **{**target, "drop_layers": by_loss.drop_layers})


def _ratio(given: list[str] | None) -> float | dict[str, float] | None:
    """["0.75"] or ["hidden_size=0.8", ...]"""
    if not given:
        return None
    try:
        if len(given) == 1 and "=" not in given[0]:
            return float(given[0])
        pairs = [entry.split("=") for entry in given]
        return {name: float(value) for name, value in pairs}
    except ValueError:
        raise ValueError(f"--ratio must be a number, or NAME=NUMBER, got {' '.join(given)}") from None
