"""The command minitron-prune: score, plan, search, prune, info."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from minitron_kernels._command.documents import expand
from minitron_kernels._command.messages import few, message_of, say, show, show_each
from minitron_kernels._command.models import check_free, check_model, device_of, load_model
from minitron_kernels._command.progress import lines_in_logs
from minitron_kernels.pruning.cli.arguments import SIZES, parser_of
from minitron_kernels.pruning.cli.estimate import say_estimate
from minitron_kernels.pruning.cli.scoring import kept_folder, score
from minitron_kernels.pruning.cli.targets import models_of_search, searched, target_of, windows_of
from minitron_kernels.pruning.score.score_files import config_of

WHY_FILES = "they may describe the old weights; copy those that you know to be valid still"
WHY_TENSORS = "tensors that are not part of the model"
ARGUMENTS = (
    "params",
    "kv_tokens",
    "kv_sequences",
    "memory_dtype",
    "divisor",
    "drop_layers",
    "seq",
    "batch",
    "ratio",
    "num_experts_per_tok",
)
LISTED = "docs/families.md lists those that are"
# patterns in the library's messages -> options of the command line; None: see _as_option()
_KNOWN = r"[\w-]+(?:, [\w-]+){20,}"
WORDS = (
    (
        rf"config\.model_type must be one of {_KNOWN}, got (.+?)\. Describe .*",
        rf"model_type \1 is not known: {LISTED}",
    ),
    (rf"\. Known are {_KNOWN}", f"; {LISTED}"),
    (r"(,? or )loadable=False", r"\1--allow-unloadable"),
    (r'kv_heads="merge"', "--kv-heads merge"),
    (r"rescale_norms=False", "--no-rescale-norms"),
    (r"ImportanceScores\.save\(\) writes", "minitron-prune score writes"),
    (r"make_plan\(\.\.\.\)\.save\(\) writes it", "minitron-prune plan SCORES -o FILE writes it"),
    (r"\bleave_out\b", "--leave-out"),
    (r"choose another dst, or overwrite it", "choose another dst, or --overwrite"),
    (r"and overwrite replaces nothing else", "and --overwrite replaces nothing else"),
    (r"\banother divisor\b", "another --divisor"),
    (r"\bgreater divisor\b", "greater --divisor"),
    (r"^axes must", "--axes must"),
    (r"\bmemory_bytes\b", "--memory"),
    (r"\bactive_params\b", "--active-params"),
    (r"\bprogress_file\b", "--progress-file"),
    (r"\btext_key\b", "--text-key"),
    (r"^search (?=would|finds|cannot|must|chooses)", "--search "),
    (rf"^({'|'.join(ARGUMENTS)}) (must|of|drops|gives|has|belong|are|and)\b", None),
    (r"^(\w+)(?= (?:must be|gives the size|is not a size))", None),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 after an error, 2 for a wrong command line."""
    args = parser_of(
        {"score": score, "plan": plan, "search": search, "prune": prune, "info": info}
    ).parse_args(argv)
    try:
        with warnings.catch_warnings(), lines_in_logs():
            warnings.showwarning = lambda message, *where: _say("warning", message)
            args.run(args)
    except KeyboardInterrupt:
        kept = args.command == "prune" or (args.command == "search" and args.progress_file)
        kept = kept or (args.command == "score" and kept_folder(args.output).is_dir())
        again = "goes on from here" if kept else "begins anew"
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


def plan(args: argparse.Namespace) -> None:
    """Scores folder and a target -> plan.json."""
    check_free(args.output, args.overwrite, folder=False)
    target = target_of(args, config_of(args.scores))
    from minitron_kernels.pruning.plan.make_plan import make_plan
    from minitron_kernels.pruning.score.scores import ImportanceScores

    made = make_plan(ImportanceScores.load(args.scores), **target)
    made.save(args.output)
    show(made.summary())


def search(args: argparse.Namespace) -> None:
    """Checkpoint, scores, held-out text and a target -> the plan with the best loss."""
    check_free(args.output, args.overwrite, folder=False)
    if args.table is not None:
        check_free(args.table, args.overwrite, folder=False, option="--table")
    if args.progress_file is not None:
        check_free(args.progress_file, True, folder=False, option="--progress-file")
    _check_different(args)
    check_model(args.model)
    target = target_of(args, config_of(args.scores))
    expand(args.text)
    device = device_of(args.device)
    from minitron_kernels.pruning.score.scores import ImportanceScores
    from minitron_kernels.pruning.search.lm_loss import LMLoss

    scores = ImportanceScores.load(args.scores)
    models = models_of_search(args, scores, target)
    windows = windows_of(args)
    say_estimate(args.model, args.dtype, args.device, windows.numel(), models)
    loss = LMLoss(list(windows.split(args.batch_size)))
    model = load_model(args.model, args.dtype, with_head=True).to(device)
    found, made = searched(args, model, scores, loss, target)
    made.save(args.output)
    if args.table is not None:
        found.save(args.table)
    show(found.summary())


def _check_different(args: argparse.Namespace) -> None:
    """Raises ValueError if two of the files that search writes are one."""
    written = {"--output": args.output, "--table": args.table, "--progress-file": args.progress_file}
    options: dict[Path, str] = {}
    for option, path in written.items():
        if path is not None:
            other = options.setdefault(path.resolve(), option)
            if other != option:
                raise ValueError(f"{option} must be another file than {other}, got {path} for both")


def prune(args: argparse.Namespace) -> None:
    """Checkpoint and plan -> smaller checkpoint."""
    from minitron_kernels.pruning.checkpoint.staging import check_paths
    from minitron_kernels.pruning.plan.pruning_plan import PruningPlan

    check_paths(args.src, args.dst, args.overwrite)
    plan = PruningPlan.load(args.plan)
    from minitron_kernels.pruning.checkpoint.prune import prune_checkpoint  # torch, which is slow

    done = prune_checkpoint(
        args.src,
        args.dst,
        plan,
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
    if done.head:
        _say("head", done.head)
    kept = f", {len(done.resumed_files)} of them from before" if done.resumed_files else ""
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}{kept}"
    show(
        f"{args.dst}: {done.parameters_before:,} → {done.parameters_after:,} parameters, "
        f"{done.nbytes / 1e9:.3g} GB in {files}"
    )


def info(args: argparse.Namespace) -> None:
    """Prints what each path is."""
    from minitron_kernels.pruning.cli.info import describe

    show_each(describe(path) for path in args.paths)
