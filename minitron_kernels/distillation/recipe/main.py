"""The command minitron-recipe: run, list, show."""

from __future__ import annotations

import argparse
import re
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_kernels._command.messages import message_of, say, show
from minitron_kernels._command.parsers import commands_of, program
from minitron_kernels._command.progress import without_bars
from minitron_kernels.distillation.cli.interrupt import Stopped, exit_code
from minitron_kernels.distillation.cli.tables import options_of
from minitron_kernels.distillation.recipe import shipped

EXAMPLES = """\
from a checkpoint to a smaller one, and a report:
  minitron-recipe run recipe.toml --dry-run
  minitron-recipe run recipe.toml

published settings, as a beginning:
  minitron-recipe list
  minitron-recipe show mistral-nemo-8b > recipe.toml
  minitron-recipe run mistral-nemo-8b --dry-run

The same command again goes on where it was stopped: what is done is not done again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    0, 1 after an error, 2 for a wrong command line, 130 or 143 after SIGINT or SIGTERM.
    """
    args = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: _say("warning", message)
            code: int = args.run(args)
            return code
    except (KeyboardInterrupt, Stopped) as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        _say("interrupted", f"by {signal.Signals(number).name}; the same command goes on")
        return exit_code(number)
    except Exception as error:
        if args.debug:
            raise
        _say("error", message_of(error, _in_words))
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "Make a language model smaller: score, cut, distil, evaluate, compare, by one TOML."
    top = program(argparse.ArgumentParser, "minitron-recipe", about, EXAMPLES, allow_abbrev=False)
    command = commands_of(top, {"run": run, "list": _list, "show": _show})
    sub = command("run", "Run a recipe, or go on with it.")
    sub.add_argument("recipe", metavar="RECIPE", help="a TOML file, or one of `minitron-recipe list`")
    sub.add_argument("--dry-run", action="store_true", help="print stages, sizes, memory, time; do nothing")
    sub.add_argument("-o", "--out", metavar="DIR", help="in place of out of [recipe]")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="in place of what the file says, as distill.steps=100; may be given several times",
    )
    sub.add_argument("--redo", action="store_true", help="throw away models that were trained differently")
    sub.add_argument("--quiet", action="store_true", help="no progress")
    command("list", "List the recipes with published settings.")
    sub = command("show", "Print such a recipe.")
    sub.add_argument("name", metavar="NAME")
    return top


def run(args: argparse.Namespace) -> int:
    """Runs a recipe, or says what it would do."""
    from minitron_kernels.distillation.recipe import files
    from minitron_kernels.distillation.recipe.config import load
    from minitron_kernels.distillation.recipe.graph import check_out, graph_of

    settings = [*args.set, *([f"recipe.out={_quoted(args.out)}"] if args.out else [])]
    recipe = load(shipped.find(args.recipe), settings)
    check_out(recipe)
    files.recall(recipe.out / files.KNOWN)
    graph = graph_of(recipe, dry=args.dry_run)
    from minitron_kernels.distillation.recipe.dry_run import check_targets, describe
    from minitron_kernels.distillation.recipe.run import check_free, verdicts_of
    from minitron_kernels.distillation.recipe.run import run as run_stages
    from minitron_kernels.distillation.recipe.stages import Context, harness
    from minitron_kernels.distillation.recipe.state import State

    teachers = check_targets(recipe, graph)
    if args.dry_run:
        state = State(recipe.out)
        show(describe(recipe, graph, verdicts_of(graph, state), teachers))
        return 0
    without_bars(args.quiet)
    state = State(recipe.out)
    with (lock := state).locked(), _terminated():
        state = State(recipe.out)  # as the run before left it
        verdicts = verdicts_of(graph, state)
        check_free(graph, state, verdicts, redo=args.redo)
        files.keep(recipe.out / files.KNOWN)
        if any(node.config.get("tasks") for node in graph.nodes):
            harness().check_installed()
        context = Context(recipe.out, _say, args.quiet, lock.lock)
        code = run_stages(graph, state, context, verdicts, redo=args.redo)
        if code:
            _say("interrupted", "the same command goes on")
            return code
        from minitron_kernels.distillation.recipe.report import write_report

        show(write_report(recipe, graph, state))
    return 0


def _list(args: argparse.Namespace) -> int:
    show("\n".join(f"{name:<24}{about}" for name, about in shipped.names().items()))
    return 0


def _show(args: argparse.Namespace) -> int:
    show(shipped.find(args.name, shipped_only=True).read_text(encoding="utf-8").rstrip("\n"))
    return 0


def _quoted(path: str) -> str:
    """A path as a TOML string."""
    import json

    return json.dumps(str(Path(path)), ensure_ascii=False)


class _terminated:
    """SIGTERM ends a stage as Ctrl-C does."""

    def __enter__(self) -> None:
        def stop(number: int, frame: Any) -> None:
            raise Stopped(number)

        self._before = signal.signal(signal.SIGTERM, stop)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


def _say(kind: str, message: object) -> None:
    say("minitron-recipe", kind, message)


def _in_words(message: str) -> str:
    """A message of `minitron-distill train`, with keys instead of flags."""
    flags = {option.flag: name for name, option in options_of("train").items()}
    return re.sub(r"--[a-z][a-z0-9-]*", lambda found: flags.get(found[0], found[0]), message)
