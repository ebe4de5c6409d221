"""The command minitron-evaluate."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from minitron_kernels._command.messages import message_of, say, show
from minitron_kernels._command.parsers import add_debug, program
from minitron_kernels._command.progress import lines_in_logs, without_bars
from minitron_kernels._command.values import DTYPES, MOST_SEED, at_least
from minitron_kernels.evaluation.benchmarks import BENCHMARKS
from minitron_kernels.evaluation.loading import Availability, check_tasks
from minitron_kernels.evaluation.results import PUBLISHED_CHOICES, Evaluation, evaluation_table

PROGRAM = "minitron-evaluate"
EXAMPLES = """\
examples:
  minitron-evaluate Minitron-8B -o minitron-8b.json --device cuda --batch-size auto --no-code
  minitron-evaluate Minitron-8B -o minitron-8b.json --tasks hellaswag arc_easy:25 --device cuda
  minitron-evaluate student -o student.json --tasks-path tasks --beside teacher.json
  minitron-evaluate --beside teacher.json student.json --published all
  minitron-evaluate --check --datasets datasets

Without --tasks it runs the nine benchmarks by which Mistral-NeMo-Minitron 8B was announced, with their shots.
Results are written after each task; the same command goes on with those that are lacking. It needs
lm-evaluation-harness: pip install 'minitron-kernels[evaluate]'.
"""
# patterns in the library's messages -> options of the command line
WORDS = (
    (r"allow it by run_code=True", "allow it by --run-code"),
    (r"leave them out by run_code=False", "leave them out by --no-code"),
    (r"run_code=False leaves", "--no-code leaves"),
    (r"^tasks(?=[: ])", "--tasks"),
    (r"^output must", "--output must"),
    (r"\btasks_path\b", "--tasks-path"),
    (r"data sets, as datasets,", "data sets, as --datasets,"),
    (r"check_tasks\(\) says", "--check says"),
    (r"take another output, or overwrite it", "take another --output, or --overwrite"),
    (r"^(batch_size|limit|max_length) must", lambda found: f"--{found[1].replace('_', '-')} must"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 after an error, 2 for a wrong command line."""
    parser = parser_of()
    args = parser.parse_args(argv)
    if args.model is None and not args.beside and not args.list and not args.check:
        parser.error("give a model's folder, or results to show by --beside")
    try:
        with warnings.catch_warnings(), lines_in_logs():
            warnings.showwarning = lambda message, *where: say(PROGRAM, "warning", _in_words(str(message)))
            return _run(args)
    except KeyboardInterrupt:
        kept = args.output is not None and args.output.exists()
        again = "without --overwrite goes on" if args.overwrite else "goes on from here"
        say(PROGRAM, "interrupted", f"the same command {again if kept else 'begins anew'}")
        return 130
    except Exception as error:
        if args.debug:
            raise
        say(PROGRAM, "error", message_of(error, _in_words))
        return 1


def _run(args: argparse.Namespace) -> int:
    if args.list:
        show("\n".join(listed()))
        return 0
    if args.check:
        return _check(args)
    beside = [Evaluation.load(path) for path in args.beside]
    results = []
    if args.model is not None:
        from minitron_kernels.evaluation.run import evaluate

        without_bars(args.quiet)
        results.append(
            evaluate(
                args.model,
                args.tasks,
                tasks_path=args.tasks_path,
                datasets=args.datasets,
                batch_size=args.batch_size,
                device=args.device,
                dtype=args.dtype,
                limit=args.limit,
                run_code=args.run_code,
                chat_template=args.chat_template,
                max_length=args.max_length,
                seed=args.seed,
                output=args.output,
                overwrite=args.overwrite,
                progress=False if args.quiet else None,
            )
        )
    show(evaluation_table([*results, *beside], args.published))
    return 0


def _check(args: argparse.Namespace) -> int:
    """Shows which tasks can be run here; 1 if one cannot."""
    without_bars(args.quiet)
    found = check_tasks(args.tasks, tasks_path=args.tasks_path, datasets=args.datasets)
    show("\n".join(checked(found)))
    return 1 if any(one.reason for one in found) else 0


def checked(found: Sequence[Availability]) -> list[str]:
    """A line for each task, what is wrong with those that cannot be run, and how to get what they lack."""
    lines = [f"{'task':<15}{'shots':>5}{'documents':>11}"]
    for one in found:
        shots = "" if one.shots is None else str(one.shots)
        if one.reason is not None:
            lines.append(f"{one.name:<15}{shots:>5}{'none':>11}  {_in_words(one.reason)}")
            continue
        other = one.expected not in (None, one.documents)
        note = f"  not the benchmark's {one.expected:,}: not comparable" if other else ""
        lines.append(f"{one.name:<15}{shots:>5}{one.documents:>11,}{note}")
    commands = dict.fromkeys(command for one in found for command in one.commands)
    if commands:
        lines += ["", "where there is a network, for --datasets DIR:", *commands]
    return lines


def listed() -> list[str]:
    """The benchmarks, one a line."""
    lines = [f"{'name':<15}{'shots':>5}  {'metric':<12}{'':<11}task of lm-eval"]
    for one in BENCHMARKS.values():
        code = "runs code" if one.runs_code else ""
        lines.append(f"{one.name:<15}{one.shots:>5}  {one.label:<12}{code:<11}{one.task}")
    return lines


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else at_least(1)(text)


def _in_words(message: str) -> str:
    for pattern, words in WORDS:
        message = re.sub(pattern, words, message)
    return message


def parser_of() -> argparse.ArgumentParser:
    """The parser of the command line."""
    about = "Evaluate a model on benchmarks, beside what was published of Minitron's models."
    parser = program(argparse.ArgumentParser, PROGRAM, about, EXAMPLES)
    parser.add_argument("model", type=Path, nargs="?", help="folder of the checkpoint, with its tokenizer")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of the results; a table beside it (.md)")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    parser.add_argument("--list", action="store_true", help="show the benchmarks, and stop")
    parser.add_argument(
        "--check",
        action="store_true",
        help="show which tasks can be run here and what the others lack, without a model, and stop",
    )
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME[:SHOTS]",
        help="benchmarks, tasks and groups of lm-eval; default: the nine benchmarks, or all of --tasks-path",
    )
    what.add_argument(
        "--tasks-path",
        type=Path,
        metavar="DIR",
        help="folder of tasks as YAML files, with their data; needs no network",
    )
    what.add_argument(
        "--datasets",
        type=Path,
        metavar="DIR",
        help="folder of data sets, OWNER/NAME as the hub calls them, instead of the hub's",
    )
    code = what.add_mutually_exclusive_group()
    code.add_argument(
        "--run-code",
        action="store_true",
        default=None,
        help="run code that the model wrote (mbpp, humaneval): in a container, since it may do anything",
    )
    code.add_argument(
        "--no-code", dest="run_code", action="store_false", help="leave out tasks that run code"
    )
    what.add_argument(
        "--limit", type=at_least(1), metavar="N", help="the first N documents of each task alone"
    )
    what.add_argument(
        "--seed",
        type=at_least(0, MOST_SEED),
        default=1234,
        help="of few-shot examples and sampling (default 1234)",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--batch-size", type=_batch_size, default=1, help='sequences, or "auto" (default 1)')
    how.add_argument("--device", default="cpu", help='default: cpu; "auto": over GPUs, memory and disk')
    how.add_argument("--dtype", default="auto", choices=DTYPES, help="of the model; auto: the checkpoint's")
    how.add_argument(
        "--max-length", type=at_least(2), metavar="N", help="tokens; default: the model's positions"
    )
    how.add_argument(
        "--chat-template", action="store_true", help="prompts as chats, for instruction-tuned models"
    )
    shown = parser.add_argument_group("the table")
    shown.add_argument(
        "--beside", type=Path, nargs="+", default=[], metavar="JSON", help="other results to show"
    )
    shown.add_argument(
        "--published",
        default="announcement",
        choices=PUBLISHED_CHOICES,
        help="which rows (default announcement)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_debug(parser)
    return parser
