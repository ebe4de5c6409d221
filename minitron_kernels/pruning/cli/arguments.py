"""The arguments of minitron-prune: the options of each command, and how their values are parsed."""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron_kernels._command.parsers import Runs, commands_of, program
from minitron_kernels._command.values import DTYPES, MOST_SEED, at_least, byte_count, count, typed

EXAMPLES = """\
from a checkpoint and text to a smaller checkpoint:
  minitron-prune score Mistral-NeMo-12B calibration.jsonl -o scores --seq-len 4096
  minitron-prune plan scores -o plan.json --hidden-size 4096 --intermediate-size 11520
  minitron-prune prune Mistral-NeMo-12B Minitron-8B plan.json
  minitron-prune info Minitron-8B

Distil the result from its source before use. Another plan can be made from the same scores.
"""
PLAN_EXAMPLES = """\
examples:
  minitron-prune plan scores -o plan.json --hidden-size 4096 --intermediate-size 11520
  minitron-prune plan scores -o plan.json --params 8.5B
  minitron-prune plan scores -o plan.json --ratio 0.75
  minitron-prune plan scores -o plan.json --ratio intermediate_size=0.5 --num-hidden-layers 32
"""
SEARCH_EXAMPLES = """\
examples:
  minitron-prune search SmolLM2-135M scores held_out.txt -o plan.json --params 100M -k 8
  minitron-prune search SmolLM2-135M scores held_out.txt -o plan.json --num-hidden-layers 24

The second chooses the layers that go by the loss without them. With --progress-file a search that was killed
goes on where it stopped. The text should be none that the scores were made from.
"""
PRUNE_EXAMPLES = """\
example:
  minitron-prune prune Mistral-NeMo-12B Minitron-8B plan.json --max-shard-size 2GB

If it was killed or ran out of disk, run the same command again: it goes on from the finished files.
"""
SCORE_EXAMPLES = """\
examples:
  minitron-prune score SmolLM2-135M text.txt -o scores --samples 256 --seq-len 512
  minitron-prune score Mistral-NeMo-12B tokens.npy -o scores --device auto --dtype bfloat16

It keeps what it has once a minute: if it was killed, run the same command again.
"""
# option -> names of that size in configs
SIZES = {
    "hidden-size": ("hidden_size",),
    "intermediate-size": ("intermediate_size",),
    "num-hidden-layers": ("num_hidden_layers",),
    "num-attention-heads": ("num_attention_heads",),
    "num-key-value-heads": ("num_key_value_heads",),
    "moe-intermediate-size": ("moe_intermediate_size",),
    "num-experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "mamba-num-heads": ("mamba_num_heads", "mamba_n_heads"),
    "mamba-head-dim": ("mamba_head_dim", "mamba_d_head"),
    "linear-num-value-heads": ("linear_num_value_heads",),
    "linear-num-key-heads": ("linear_num_key_heads",),
}


def _layers(text: str) -> list[int]:
    """16-20,23 -> [16, ..., 20, 23]."""
    from minitron_kernels.pruning.plan.selection import parse_runs

    if any(len(number) > 6 for number in text.replace(",", "-").split("-")):
        raise ValueError(text)  # before a range with billions of entries is made a list
    if not (layers := list(parse_runs(text))):
        raise ValueError(text)
    return layers


_NUMBER = typed("a number such as 8.4e9 or 8.4B", count)
_BYTES = typed("a size such as 16GB, 500MB or 1GiB", byte_count)
_LAYERS = typed("layers such as 16-20,23", _layers)


def parser_of(runs: Runs) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        runs: what is called for each of them.
    """
    about = "Cut the least useful channels, heads, experts and layers of a language model."
    parser = program(argparse.ArgumentParser, "minitron-prune", about, EXAMPLES)
    command = commands_of(parser, runs)
    _add_score(command("score", "Score a model's channels on calibration text.", SCORE_EXAMPLES))
    _add_plan(command("plan", "Choose what stays, from scores and a target.", PLAN_EXAMPLES))
    _add_search(command("search", "Choose what stays by the loss of pruned models.", SEARCH_EXAMPLES))
    _add_prune(command("prune", "Cut a checkpoint on disk by a plan.", PRUNE_EXAMPLES))
    sub = command("info", "Show what a checkpoint, a plan or scores hold.")
    sub.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder, or plan.json")
    return parser


def _add_score(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", type=Path, help="folder of the checkpoint, with its tokenizer")
    _add_text(sub)
    sub.add_argument("-o", "--output", type=Path, required=True, help="folder for the scores")
    sub.add_argument("--overwrite", action="store_true", help="replace scores that exist")
    _add_windows(sub, samples=1024)
    sub.add_argument("--axes", nargs="+", help="hidden, mlp, heads, ...; default: all that the model has")
    sub.add_argument(
        "--seq", nargs="+", default=["mean"], help="sums over tokens: mean, L2, var (default mean)"
    )
    sub.add_argument("--mlp-tap", default="down_proj_input", choices=["down_proj_input", "up_proj_output"])
    sub.add_argument("--head-score", default="norm", choices=["norm", "channels"])
    sub.add_argument("--expert-score", default="norm", choices=["norm", "reap"])
    _add_where(sub, 'default: cpu; "auto": over GPUs, memory and disk')


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("scores", type=Path, help="folder of scores")
    sub.add_argument("-o", "--output", type=Path, required=True, help="the plan's JSON file")
    sub.add_argument("--overwrite", action="store_true", help="replace a plan that exists")
    _add_target(sub)


def _add_search(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", type=Path, help="folder of the checkpoint, with its tokenizer")
    sub.add_argument("scores", type=Path, help="folder of scores")
    _add_text(sub)
    sub.add_argument("-o", "--output", type=Path, required=True, help="the JSON file of the best plan")
    sub.add_argument("--overwrite", action="store_true", help="replace a plan or table that exists")
    sub.add_argument("--table", type=Path, help="JSON file for the scores of all candidates")
    sub.add_argument("--progress-file", type=Path, help="JSON file for the scores so far, to go on from")
    sub.add_argument("-k", type=at_least(1), default=8, help="candidates for a budget (default 8)")
    sub.add_argument(
        "--layers-by-loss",
        action="store_true",
        help="choose the layers that go by the loss without them (always so without a budget)",
    )
    _add_windows(sub, samples=64)
    _add_where(sub)
    _add_target(sub)


def _add_text(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "text",
        nargs="+",
        type=Path,
        help='text in UTF-8; .jsonl, .parquet or .arrow with a "text" or chat "messages"; .npy with token '
        "ids; folders of these; text may be compressed",
    )
    sub.add_argument("--text-key", metavar="KEY", help='with the text; default: "text", or else "messages"')


def _add_windows(sub: argparse.ArgumentParser, samples: int) -> None:
    sub.add_argument(
        "--samples",
        type=at_least(1),
        default=samples,
        help=f"windows, drawn at random (default {samples})",
    )
    sub.add_argument("--seq-len", type=at_least(2), default=2048, help="tokens of a window (default 2048)")
    sub.add_argument(
        "--batch-size", type=at_least(1), default=1, help="windows of a forward pass (default 1)"
    )
    sub.add_argument(
        "--seed", type=at_least(0, MOST_SEED), default=0, help="of the random choice (default 0)"
    )


def _add_where(sub: argparse.ArgumentParser, device: str = "default: cpu") -> None:
    sub.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of the model; default: auto, the checkpoint's"
    )
    sub.add_argument("--device", default="cpu", help=device)
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_target(sub: argparse.ArgumentParser) -> None:
    target = sub.add_argument_group("target", "sizes that are not given stay as they are")
    for option in SIZES:
        target.add_argument(f"--{option}", type=at_least(1), metavar="N")
    target.add_argument("--ratio", nargs="+", metavar="[NAME=]X", help="of hidden and MLP sizes, or by name")
    target.add_argument(
        "--params",
        type=_NUMBER,
        metavar="N",
        help="parameter budget: 8.4e9 or 8.4B",
    )
    target.add_argument(
        "--active-params",
        type=_NUMBER,
        metavar="N",
        help="budget of parameters that serve a token, for models with experts",
    )
    target.add_argument(
        "--memory",
        dest="memory_bytes",
        type=_BYTES,
        metavar="SIZE",
        help="budget of memory for weights and cache: 16GB, 16GiB",
    )
    target.add_argument(
        "--memory-dtype",
        default="bfloat16",
        metavar="DTYPE",
        help="of weights and cache there, by torch's name (default bfloat16)",
    )
    target.add_argument(
        "--kv-tokens", type=at_least(0), default=0, metavar="N", help="tokens in that cache (default 0)"
    )
    target.add_argument(
        "--kv-sequences",
        type=at_least(1),
        default=1,
        metavar="N",
        help="sequences that these tokens are of, each with states where layers have any (default 1)",
    )
    target.add_argument(
        "--search", nargs="+", metavar="NAME", help="sizes that a budget may choose; default: hidden and MLP"
    )
    target.add_argument(
        "--drop-layers",
        type=_LAYERS,
        metavar="LAYERS",
        help="layers to drop, as 16-20,23",
    )
    target.add_argument("--num-experts-per-tok", type=at_least(1), metavar="N", help="for the new config")
    how = sub.add_argument_group("how")
    how.add_argument("--kv-heads", default="prune", choices=["prune", "merge"], help="how they become fewer")
    how.add_argument(
        "--merge-heads", action="store_true", help="let kept query heads stand for dropped ones too"
    )
    how.add_argument("--order", default="original", choices=["original", "importance"])
    how.add_argument(
        "--divisor", type=at_least(1), help="of hidden and MLP sizes (default 64; for a budget 128)"
    )
    how.add_argument(
        "--no-rescale-norms",
        dest="rescale_norms",
        action="store_false",
        help="leave norms' gains as they are",
    )
    how.add_argument(
        "--allow-unloadable",
        dest="loadable",
        action="store_false",
        help="allow sizes that transformers refuses to load",
    )
    how.add_argument("--batch", default="L2", help="aggregation over sequences (default L2)")
    how.add_argument("--seq", default="mean", help="aggregation over tokens (default mean)")


def _add_prune(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("src", type=Path, help="folder of the checkpoint")
    sub.add_argument("dst", type=Path, help="folder to create")
    sub.add_argument("plan", type=Path, help="plan.json")
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is at dst")
    sub.add_argument(
        "--max-shard-size",
        type=_BYTES,
        default=5_000_000_000,
        metavar="SIZE",
        help="of one file: 5GB (default), 500MB, 1GiB",
    )
    sub.add_argument("--threads", type=at_least(1), help="default: one for each core, at most 8")
    sub.add_argument(
        "--leave-out",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="tensors of src that are not part of the model, as '*.k_scale'",
    )
    sub.add_argument(
        "--no-rescale-norms",
        dest="rescale_norms",
        action="store_false",
        help="leave norms' gains as they are",
    )
    sub.add_argument("--quiet", action="store_true", help="no progress bar")
