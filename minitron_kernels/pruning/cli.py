"""The command minitron-prune: score, plan, prune, info."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
from a checkpoint and text to a smaller checkpoint:
  minitron-prune score Mistral-NeMo-12B calibration.jsonl -o scores --seq-len 4096
  minitron-prune plan scores -o plan.json --hidden-size 4096 --intermediate-size 11520
  minitron-prune prune Mistral-NeMo-12B Minitron-8B plan.json
  minitron-prune info Minitron-8B

The result is to be distilled from its source. Another plan needs no other scores.
"""
PLAN_EXAMPLES = """\
examples:
  minitron-prune plan scores -o plan.json --hidden-size 4096 --intermediate-size 11520
  minitron-prune plan scores -o plan.json --params 8.4B
  minitron-prune plan scores -o plan.json --ratio 0.75
  minitron-prune plan scores -o plan.json --ratio intermediate_size=0.5 --num-hidden-layers 32
"""
PRUNE_EXAMPLES = """\
example:
  minitron-prune prune Mistral-NeMo-12B Minitron-8B plan.json --max-shard-size 2GB

Killed or out of disk: run the same command again, it goes on from the files that were finished.
"""
SCORE_EXAMPLES = """\
examples:
  minitron-prune score SmolLM2-135M text.txt -o scores --samples 256 --seq-len 512
  minitron-prune score Mistral-NeMo-12B tokens.npy -o scores --device cuda --dtype bfloat16
"""
# option -> the names of that size in configs
SIZES = {
    "hidden-size": ("hidden_size",),
    "intermediate-size": ("intermediate_size",),
    "num-hidden-layers": ("num_hidden_layers",),
    "num-attention-heads": ("num_attention_heads",),
    "num-key-value-heads": ("num_key_value_heads",),
    "moe-intermediate-size": ("moe_intermediate_size",),
    "num-experts": ("num_experts", "num_local_experts"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 after an error, 2 for a wrong command line."""
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: _say("warning", message)
            args.run(args)
    except KeyboardInterrupt:
        again = "goes on from here" if args.command == "prune" else "begins anew"
        _say("interrupted", f"the same command {again}")
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        _say("error", _message(error))
        return 1
    return 0


def _say(kind: str, message: object) -> None:
    print(f"minitron-prune: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def score(args: argparse.Namespace) -> None:
    """Calibration text -> scores folder."""
    _check_free(args.output, args.overwrite)
    if not (args.model / "config.json").is_file():
        raise FileNotFoundError(
            2, "is not the folder of a checkpoint (it has no config.json)", str(args.model)
        )
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from minitron_kernels.pruning.calibration import calibration_windows
    from minitron_kernels.pruning.collect import collect_importance
    from minitron_kernels.pruning.families import config_value, family_of

    if args.quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(args.model)
    family_of(config)
    longest = config_value(config, "max_position_embeddings", args.seq_len)
    if args.seq_len > longest:
        raise ValueError(f"--seq-len must be at most the model's {longest} positions, got {args.seq_len}")
    text = any(file.suffix != ".npy" for file in args.text)
    tokenizer = AutoTokenizer.from_pretrained(args.model) if text else None
    windows = calibration_windows(
        args.text, tokenizer, length=args.seq_len, samples=args.samples, seed=args.seed
    )
    vocab = config_value(config, "vocab_size")
    if not 0 <= int(windows.min()) <= int(windows.max()) < vocab:
        raise ValueError(f"{args.text[0]}: token ids must be in [0, {vocab}), got up to {int(windows.max())}")
    if len(windows) < args.samples:
        _say("warning", f"the text has {len(windows)} windows of {args.seq_len} tokens, not {args.samples}")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)
    scores = collect_importance(
        model,
        list(windows.split(args.batch_size)),
        args.axes,
        seq=args.seq,
        mlp_tap=args.mlp_tap,
        head_score=args.head_score,
        expert_score=args.expert_score,
        progress=False if args.quiet else None,
    )
    scores.save(args.output)
    print(f"{args.output}: {scores.tokens:,} tokens, {', '.join(scores.axes)}")


def plan(args: argparse.Namespace) -> None:
    """Scores folder and a target -> plan.json."""
    from minitron_kernels.pruning.plan import make_plan
    from minitron_kernels.pruning.scores import ImportanceScores

    _check_free(args.output, args.overwrite)
    scores = ImportanceScores.load(args.scores)
    sizes = {}
    for option, names in SIZES.items():
        value = getattr(args, option.replace("-", "_"))
        if value is not None:
            sizes[next((name for name in names if name in scores.config), names[0])] = value
    options = {
        name: getattr(args, name) for name in ("params", "drop_layers", "num_experts_per_tok", "divisor")
    }
    if not sizes and not args.ratio and args.params is None and args.drop_layers is None:
        raise ValueError("tell a target: sizes (--hidden-size ...), --ratio, --params or --drop-layers")
    made = make_plan(
        scores,
        ratio=_ratio(args.ratio),
        kv_heads=args.kv_heads,
        merge_heads=args.merge_heads,
        order=args.order,
        rescale_norms=args.rescale_norms,
        loadable=args.loadable,
        batch=args.batch,
        seq=args.seq,
        **options,
        **sizes,
    )
    made.save(args.output)
    print(made.summary())


def prune(args: argparse.Namespace) -> None:
    """Checkpoint and plan -> smaller checkpoint."""
    from minitron_kernels.pruning.checkpoint import prune_checkpoint
    from minitron_kernels.pruning.pruning_plan import PruningPlan

    done = prune_checkpoint(
        args.src,
        args.dst,
        PruningPlan.load(args.plan),
        max_shard_bytes=args.max_shard_size,
        threads=args.threads,
        rescale_norms=args.rescale_norms,
        overwrite=args.overwrite,
        progress=False if args.quiet else None,
    )
    kept = f", {len(done.resumed_files)} of them from before" if done.resumed_files else ""
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}{kept}"
    print(
        f"{args.dst}: {done.parameters_before:,} → {done.parameters_after:,} parameters, "
        f"{done.nbytes / 1e9:.2f} GB in {files}"
    )


def info(args: argparse.Namespace) -> None:
    """Prints what each path is."""
    from minitron_kernels.pruning.about import about

    print("\n\n".join(about(path) for path in args.paths))


def _check_free(path: Path, overwrite: bool) -> None:
    """Before hours of work, not after."""
    if path.exists() and not overwrite:
        raise FileExistsError(17, "is there already; take another --output, or --overwrite", str(path))


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


def _count(text: str) -> float:
    """8.4e9, 8.4B, 500M."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    return float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)


def _byte_count(text: str) -> int:
    """2GB, 500MB, 1GiB, or bytes."""
    units = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6, "KB": 10**3}
    for unit, size in units.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * size)
    return int(text)


def _layers(text: str) -> list[int]:
    """16-20,23 -> [16, ..., 20, 23]."""
    from minitron_kernels.pruning.keep import parse_runs

    return list(parse_runs(text))


def _typed(name: str, parse: Any) -> Any:
    """`parse` under the name that argparse shows in errors."""

    def typed(text: str) -> Any:
        return parse(text)

    typed.__name__ = name
    return typed


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "minitron-prune",
        description="Cut the least useful channels, heads, experts and layers of a language model.",
        epilog=EXAMPLES,
        formatter_class=shape,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, epilog=epilog, formatter_class=shape)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
        return sub

    _add_score(command("score", score, "Score a model's channels on calibration text.", SCORE_EXAMPLES))
    _add_plan(command("plan", plan, "Choose what stays, from scores and a target.", PLAN_EXAMPLES))
    _add_prune(command("prune", prune, "Cut a checkpoint on disk by a plan.", PRUNE_EXAMPLES))
    sub = command("info", info, "Tell what a checkpoint, a plan or scores hold.")
    sub.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder, or plan.json")
    return parser


def _add_score(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", type=Path, help="folder of the checkpoint, with its tokenizer")
    sub.add_argument(
        "text",
        nargs="+",
        type=Path,
        help='text in UTF-8; .jsonl with a "text" on each line; or .npy with token ids',
    )
    sub.add_argument("-o", "--output", type=Path, required=True, help="folder for the scores")
    sub.add_argument("--overwrite", action="store_true", help="replace scores that are there")
    sub.add_argument("--samples", type=int, default=1024, help="windows, drawn at random (default 1024)")
    sub.add_argument("--seq-len", type=int, default=2048, help="tokens of a window (default 2048)")
    sub.add_argument("--batch-size", type=int, default=1, help="windows of a forward pass (default 1)")
    sub.add_argument("--seed", type=int, default=0, help="of the drawing (default 0)")
    sub.add_argument("--axes", nargs="+", help="hidden, mlp, heads, ...; default: all that the model has")
    sub.add_argument(
        "--seq", nargs="+", default=["mean"], help="sums over tokens: mean, L2, var (default mean)"
    )
    sub.add_argument("--mlp-tap", default="down_proj_input", choices=["down_proj_input", "up_proj_output"])
    sub.add_argument("--head-score", default="norm", choices=["norm", "channels"])
    sub.add_argument("--expert-score", default="norm", choices=["norm", "reap"])
    sub.add_argument("--dtype", default="auto", help="of the model; default: the checkpoint's")
    sub.add_argument("--device", default="cpu", help="default: cpu")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("scores", type=Path, help="folder of scores")
    sub.add_argument("-o", "--output", type=Path, required=True, help="the plan's JSON file")
    sub.add_argument("--overwrite", action="store_true", help="replace a plan that is there")
    target = sub.add_argument_group("target", "what is not told keeps its size")
    for option in SIZES:
        target.add_argument(f"--{option}", type=int, metavar="N")
    target.add_argument("--ratio", nargs="+", metavar="[NAME=]X", help="of hidden and MLP sizes, or by name")
    target.add_argument(
        "--params", type=_typed("number", _count), metavar="N", help="parameter budget: 8.4e9 or 8.4B"
    )
    target.add_argument(
        "--drop-layers", type=_typed("layers", _layers), metavar="LAYERS", help="these go, as 16-20,23"
    )
    target.add_argument("--num-experts-per-tok", type=int, metavar="N", help="for the new config")
    how = sub.add_argument_group("how")
    how.add_argument("--kv-heads", default="prune", choices=["prune", "merge"], help="how they become fewer")
    how.add_argument(
        "--merge-heads", action="store_true", help="kept query heads take over what dropped lack"
    )
    how.add_argument("--order", default="original", choices=["original", "importance"])
    how.add_argument("--divisor", type=int, help="of hidden and MLP sizes (default 64; for a budget 128)")
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
        help="take sizes that transformers refuses to load (loadable=False)",
    )
    how.add_argument("--batch", default="L2", help="aggregation over sequences (default L2)")
    how.add_argument("--seq", default="mean", help="aggregation over tokens (default mean)")


def _add_prune(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("src", type=Path, help="folder of the checkpoint")
    sub.add_argument("dst", type=Path, help="folder to be made")
    sub.add_argument("plan", type=Path, help="plan.json")
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is at dst")
    sub.add_argument(
        "--max-shard-size",
        type=_typed("size", _byte_count),
        default=5_000_000_000,
        metavar="SIZE",
        help="of one file: 5GB (default), 500MB, 1GiB",
    )
    sub.add_argument("--threads", type=int, help="default: one for each core, at most 8")
    sub.add_argument(
        "--no-rescale-norms",
        dest="rescale_norms",
        action="store_false",
        help="leave norms' gains as they are",
    )
    sub.add_argument("--quiet", action="store_true", help="no progress bar")
