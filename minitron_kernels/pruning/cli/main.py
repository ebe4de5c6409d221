"""The command minitron-prune: score, plan, prune, info."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence

from minitron_kernels._command.messages import few, message_of, say, show
from minitron_kernels._command.models import check_free, check_model, device_of, load_model, load_tokenizer
from minitron_kernels.pruning.cli.arguments import SIZES, parser_of

WHY_FILES = "they may describe the old weights; copy those that you know to be valid still"
WHY_TENSORS = "tensors that are not part of the model"
ARGUMENTS = ("params", "divisor", "drop_layers", "seq", "batch", "ratio", "num_experts_per_tok")
# patterns in the library's messages -> options of the command line; None: see _as_option()
WORDS = (
    (r"(,? or )loadable=False", r"\1--allow-unloadable"),
    (r'kv_heads="merge"', "--kv-heads merge"),
    (r"rescale_norms=False", "--no-rescale-norms"),
    (r"ImportanceScores\.save\(\) writes", "minitron-prune score writes"),
    (r"\bleave_out\b", "--leave-out"),
    (r"choose another dst, or overwrite it", "choose another dst, or --overwrite"),
    (r"and overwrite replaces nothing else", "and --overwrite replaces nothing else"),
    (r"\banother divisor\b", "another --divisor"),
    (r"\bgreater divisor\b", "greater --divisor"),
    (r"^axes must", "--axes must"),
    (r"^(params|divisor|drop_layers|seq|batch|ratio|num_experts_per_tok) (must|of|drops|gives|has)\b", None),
    (r"^(\w+)(?= (?:must be|gives the size|is not a size))", None),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 after an error, 2 for a wrong command line."""
    args = parser_of({"score": score, "plan": plan, "prune": prune, "info": info}).parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: _say("warning", message)
            args.run(args)
    except KeyboardInterrupt:
        again = "goes on from here" if args.command == "prune" else "begins anew"
        _say("interrupted", f"the same command {again}")
        return 130
    except Exception as error:
        if args.debug:
            raise
        _say("error", message_of(error, _in_words))
        return 1
    return 0


def _say(kind: str, message: object) -> None:
    say("minitron-prune", kind, message)


def _in_words(message: str) -> str:
    """A message of the library, with options instead of arguments."""
    for pattern, words in WORDS:
        message = re.sub(pattern, _as_option if words is None else words, message)
    return message


def _as_option(found: re.Match[str]) -> str:
    """The match, with the argument that it begins with replaced by its option, if it has one."""
    names = {name: option for option, keys in SIZES.items() for name in keys}
    option = names.get(found[1], found[1].replace("_", "-"))
    known = found[1] in names or found[1] in ARGUMENTS
    return found[0].replace(found[1], f"--{option}", 1) if known else found[0]


def score(args: argparse.Namespace) -> None:
    """Calibration text -> scores folder."""
    check_free(args.output, args.overwrite, folder=True)
    check_model(args.model)
    device = device_of(args.device)
    from transformers import AutoConfig
    from transformers.utils import logging

    from minitron_kernels.pruning.families.configs import config_value
    from minitron_kernels.pruning.families.registry import family_of
    from minitron_kernels.pruning.score.calibration import calibration_windows
    from minitron_kernels.pruning.score.collect import collect_importance

    if args.quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(args.model)
    config = family_of(config).text(config)
    longest = config_value(config, "max_position_embeddings", args.seq_len)
    if args.seq_len > longest:
        raise ValueError(f"--seq-len must be at most the model's {longest} positions, got {args.seq_len}")
    text = any(file.suffix != ".npy" for file in args.text)
    tokenizer = load_tokenizer(args.model) if text else None
    windows = calibration_windows(
        args.text, tokenizer, length=args.seq_len, samples=args.samples, seed=args.seed
    )
    vocab = config_value(config, "vocab_size")
    if not 0 <= int(windows.min()) <= int(windows.max()) < vocab:
        raise ValueError(
            f"{args.text[0]}: token ids must be in [0, {vocab}), "
            f"got {int(windows.min())} to {int(windows.max())}"
        )
    if len(windows) < args.samples:
        _say("warning", f"the text has {len(windows)} windows of {args.seq_len} tokens, not {args.samples}")
    model = load_model(args.model, args.dtype).to(device)
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
    show(f"{args.output}: {scores.tokens:,} tokens, {', '.join(scores.axes)}")


def plan(args: argparse.Namespace) -> None:
    """Scores folder and a target -> plan.json."""
    from minitron_kernels.pruning.families.registry import family_of
    from minitron_kernels.pruning.plan.make_plan import make_plan
    from minitron_kernels.pruning.score.scores import ImportanceScores

    check_free(args.output, args.overwrite, folder=False)
    scores = ImportanceScores.load(args.scores)
    config = family_of(scores.config).text(scores.config)
    sizes = {}
    for option, names in SIZES.items():
        value = getattr(args, option.replace("-", "_"))
        if value is not None:
            sizes[next((name for name in names if name in config), names[0])] = value
    options = {
        name: getattr(args, name) for name in ("params", "drop_layers", "num_experts_per_tok", "divisor")
    }
    if not sizes and not args.ratio and args.params is None and args.drop_layers is None:
        raise ValueError("give a target: sizes (--hidden-size ...), --ratio, --params or --drop-layers")
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
    show(made.summary())


def prune(args: argparse.Namespace) -> None:
    """Checkpoint and plan -> smaller checkpoint."""
    from minitron_kernels.pruning.checkpoint.prune import prune_checkpoint
    from minitron_kernels.pruning.plan.pruning_plan import PruningPlan

    done = prune_checkpoint(
        args.src,
        args.dst,
        PruningPlan.load(args.plan),
        max_shard_bytes=args.max_shard_size,
        threads=args.threads,
        rescale_norms=args.rescale_norms,
        leave_out=args.leave_out,
        overwrite=args.overwrite,
        progress=False if args.quiet else None,
    )
    for what in (done.left_out_files, done.left_out_tensors):
        if what:
            _say("left out", f"{few(what)}: {WHY_FILES if what is done.left_out_files else WHY_TENSORS}")
    kept = f", {len(done.resumed_files)} of them from before" if done.resumed_files else ""
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}{kept}"
    show(
        f"{args.dst}: {done.parameters_before:,} → {done.parameters_after:,} parameters, "
        f"{done.nbytes / 1e9:.2f} GB in {files}"
    )


def info(args: argparse.Namespace) -> None:
    """Prints what each path is."""
    from minitron_kernels.pruning.cli.info import describe

    show("\n\n".join(describe(path) for path in args.paths))


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
