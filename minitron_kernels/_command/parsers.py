"""What the parsers of the commands have in common: examples, --version, and commands with --debug."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from minitron_kernels import __version__

P = TypeVar("P", bound=argparse.ArgumentParser)
# command -> what is called with its arguments
Runs = Mapping[str, Callable[[argparse.Namespace], int | None]]


def program(kind: type[P], name: str, about: str, examples: str, **more: Any) -> P:
    """The parser of a program.

    Args:
        kind: of argparse's.
        name: of the program.
        about: what it does, in a sentence.
        examples: shown as they are written.
        **more: as argparse takes it.
    """
    shape = argparse.RawDescriptionHelpFormatter
    parser = kind(prog=name, description=about, epilog=examples, formatter_class=shape, **more)
    parser.add_argument("--version", action="version", version=f"{name} {__version__}")
    return parser


def commands_of(parser: P, runs: Runs) -> Callable[..., P]:
    """Gives a program commands, one of which it must be called with.

    Returns:
        command(name, about, examples=""), which adds one of `runs` and returns its parser.
    """
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, examples: str = "") -> P:
        sub: P = found.add_parser(
            name,
            help=about,
            description=about,
            epilog=examples,
            formatter_class=parser.formatter_class,
            allow_abbrev=parser.allow_abbrev,
        )
        sub.set_defaults(run=runs[name])
        add_debug(sub)
        return sub

    return command


def add_debug(parser: argparse.ArgumentParser) -> None:
    """--debug."""
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
