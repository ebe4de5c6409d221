"""The command line of minitron-distill: its parser, made of the tables of options."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from minitron_kernels._command.parsers import Runs, commands_of, program
from minitron_kernels.distillation.cli.config import near
from minitron_kernels.distillation.cli.options import Option
from minitron_kernels.distillation.cli.tables import TABLES, options_of

EXAMPLES = """\
from a pruned model to a distilled one, with the teacher running beside it:
  minitron-distill train --student Minitron-8B --teacher Mistral-NeMo-12B \\
      --data text.jsonl -o distilled --tokens 2B --seq-len 8192

with the teacher run once, into a cache:
  minitron-distill cache --teacher Mistral-NeMo-12B --data text.jsonl -o cache --seq-len 8192
  minitron-distill train --student Minitron-8B --cache cache --data text.jsonl -o distilled --seq-len 8192

  minitron-distill info distilled cache

Options can stand in a TOML file too: --print-config writes one, --config reads it, flags win over it.
"""
TRAIN_EXAMPLES = """\
examples:
  minitron-distill train --config distill.toml --dry-run
  minitron-distill train --config distill.toml --seed 1 -o other
  minitron-distill train -o distilled --resume
  torchrun --nproc-per-node 8 -m minitron_kernels.distillation train --config distill.toml

Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; a second one stops at once.
"""
CACHE_EXAMPLES = """\
examples:
  minitron-distill cache --teacher Mistral-NeMo-12B --data text.jsonl -o cache --k 128
  minitron-distill cache --teacher Mistral-NeMo-12B --data text.jsonl -o cache --tier sampled --draws 12

The same command again goes on where an interrupted one stopped.
"""


class _Parser(argparse.ArgumentParser):
    """One line for an error, with the nearest name for a flag that there is not."""

    known: tuple[str, ...] = ()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            command = getattr(found, "command", None)
            flags = [option.flag for option in options_of(command).values()] if command in TABLES else []
            flag = rest[0].split("=")[0]
            advice = near(flag, [*flags, "--config", "--resume", "--dry-run", "--verify"])
            self.error(f"there is no {'option' if flag.startswith('-') else 'argument'} {flag}{advice}")
        return found

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())
        # argparse shows both spellings of a flag
        message = re.sub(r"^argument (?:-\w/)?(--[\w-]+)(?:, --no-[\w-]+)?: ", r"\1 ", message)
        print(f"minitron-distill: error: {message} (--help shows all)", file=sys.stderr)
        raise SystemExit(2)


def parser_of(runs: Runs) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        runs: what is called for each of them.
    """
    about = "Distil a pruned language model from its teacher."
    parser = program(_Parser, "minitron-distill", about, EXAMPLES, allow_abbrev=False)
    command = commands_of(parser, runs)
    sub = command("train", "Train a student on what its teacher says.", TRAIN_EXAMPLES)
    again = _add_configured(sub, "train")
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, from its last checkpoint; its options need not be given again",
    )
    again.add_argument("--overwrite", action="store_true", help="replace a run that is in --out")
    sub = command("cache", "Run a teacher over text and keep what it says.", CACHE_EXAMPLES)
    _add_configured(sub, "cache")
    sub = command("info", "Show what a run or a cache holds.")
    sub.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder of a run or a cache")
    sub.add_argument(
        "--verify",
        action="store_true",
        help="read all files of a cache, and check their sums; of a run, that its files are complete",
    )
    return parser


def _add_configured(sub: argparse.ArgumentParser, command: str) -> Any:
    """The options of a table, and what goes with all tables."""
    how = sub.add_argument_group("configuration")
    how.add_argument("--config", type=Path, metavar="TOML", help=f"file with a table [{command}]")
    how.add_argument("--print-config", action="store_true", help="print the effective options as TOML; stop")
    how.add_argument(
        "--dry-run", action="store_true", help="print sizes, memory, steps and tokens; write nothing"
    )
    for name, about, options in TABLES[command]:
        group = sub.add_argument_group(name, about or None)
        for option in options:
            _add(group, option)
    return how


def _add(group: Any, option: Option) -> None:
    names = ([option.short] if option.short else []) + [option.flag]
    default = option.default
    shown = ("yes" if default else "no") if isinstance(default, bool) else default
    if isinstance(default, float):
        shown = f"{default:g}"
    text = option.help if default is None else f"{option.help} (default {shown})"
    common: dict[str, Any] = {"dest": option.name, "help": text, "default": argparse.SUPPRESS}
    if option.toml == (bool,):
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        return
    more = {"nargs": "+"} if option.many else {}
    group.add_argument(*names, type=option.parse, metavar=option.metavar or None, **more, **common)


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in vars(args).items() if name in options_of(args.command)}
