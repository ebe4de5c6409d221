"""The command minitron-distill: train, cache, info."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence

from minitron_kernels._command.messages import message_of, say, show_each
from minitron_kernels.distillation.cli.arguments import parser_of
from minitron_kernels.distillation.cli.job import rank, world_size
from minitron_kernels.distillation.cli.tables import TABLES, options_of

# patterns in the library's messages -> options of the command line
WORDS = (
    (r"\btext_key\b", "--text-key"),
    (r"\bDistillationLoss\(vocab_size=(\d+)\)", r"--vocab-size \1"),
    (r"cache it by cache_teacher\(\), or give fallback=", "cache it by minitron-distill cache"),
    (r"^head must be given", "--teacher must be given"),
    (r"^model has", "--student has"),
    (r"\bteacher (\d+): if", r"--teacher \1: if"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    0, 1 after an error, 2 for a wrong command line, 130 or 143 after SIGINT or SIGTERM.
    """
    args = parser_of({"train": train, "cache": cache, "info": info}).parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: _tell("warning", message)
            return args.run(args) or 0
    except KeyboardInterrupt:
        # a training that has begun says itself how to go on
        begins = args.command == "train" and not args.resume
        again = "begins anew" if begins else "goes on, or begins where nothing was made yet"
        _tell("interrupted", f"the same command {again}")
        return 130
    except Exception as error:
        if args.debug:
            raise
        _say("error", message_of(error, lambda text: _in_words(text, args.command)))
        return 1


def train(args: argparse.Namespace) -> int:
    """Student, teacher or cache, and text -> a distilled model."""
    from minitron_kernels.distillation.cli.train import train

    return train(args)


def cache(args: argparse.Namespace) -> int:
    """Teacher and text -> a cache."""
    from minitron_kernels.distillation.cli.cache import cache

    return cache(args)


def info(args: argparse.Namespace) -> int:
    """Prints what each path is."""
    from minitron_kernels.distillation.cli.info import describe

    show_each(describe(path, verify=args.verify) for path in args.paths)
    return 0


def _say(kind: str, message: object) -> None:
    """A line of this process; others than the first say who they are."""
    say("minitron-distill", f"rank {rank()}: {kind}" if rank() else kind, message)


def _tell(kind: str, message: object) -> None:
    if rank() == 0 or world_size() == 1:
        _say(kind, message)


def _in_words(message: str, command: str) -> str:
    """A message of the library, with options instead of arguments."""
    for pattern, words in WORDS:
        message = re.sub(pattern, words, message)
    if command in TABLES:
        options = options_of(command)
        found = re.match(r"([a-z0-9_]+)(?=[ =])", message)
        if found and found[1] in options:
            return options[found[1]].flag + message[found.end() :]
    return message
