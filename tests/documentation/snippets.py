"""The Python and the commands in the pages of the documentation."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# in the line before a block
NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
COMMAND = re.compile(r"^\s*(?:\$ )?(minitron-(?:(?:prune|distill|recipe) [a-z]|evaluate [\w-]).*)$")
# run by torchrun, whose own options end with the module's name
MODULE = re.compile(r"^(\s*)torchrun .*? -m minitron_kernels\.distillation (?=[a-z])")


class Block(NamedTuple):
    """A fenced block: its language, how many lines stand before it, its lines, and why it is not run."""

    language: str
    before: int
    lines: list[str]
    not_run: str | None


def pages() -> dict[str, str]:
    """The text of README and of all pages of docs/, by their paths in the checkout."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    lines, at, above = text.split("\n"), 0, ""
    while at < len(lines):
        if lines[at].startswith("```"):
            language, start = lines[at][3:].strip(), at + 1
            at = lines.index("```", start)
            reason = NOT_RUN.match(above)
            yield Block(language, start, lines[start:at], reason and reason[1])
        above = lines[at] if lines[at].strip() else above
        at += 1


def numbers_in(text: str) -> set[float]:
    """All numbers in a page's Python."""
    python = [block.lines for block in blocks(text) if block.language == "python"]
    code = "\n".join(line.removeprefix(">>> ") for lines in python for line in lines)
    found = (node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant))
    return {value for value in found if isinstance(value, (int, float))}


class _Smaller(ast.NodeTransformer):
    """Replaces numbers, so that sizes of models with billions of parameters become those of tiny ones."""

    def __init__(self, numbers: Mapping[float, float]) -> None:
        self.numbers = numbers

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            return ast.copy_location(ast.Constant(self.numbers.get(node.value, node.value)), node)
        return node


def run(
    page: str,
    text: str,
    given: Callable[[], Mapping[str, Any]] = dict,
    numbers: Mapping[float, float] | None = None,
) -> dict[str, Any]:
    """Runs a page's Python from top to bottom; returns the names that it leaves.

    Args:
        page: its path, for tracebacks, which have the page's lines.
        text: what it says.
        given: what it takes for given, asked for anew before each block.
        numbers: {a number in the page: the one to run}.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(text):
        if block.language == "python" and not block.not_run:
            code = "\n".join(line.removeprefix(">>> ") for line in block.lines)
            tree = _Smaller(numbers or {}).visit(ast.parse("\n" * block.before + code, page))
            namespace.update(given())
            exec(compile(tree, page, "exec"), namespace)
    return namespace


def commands(text: str) -> Iterator[list[str]]:
    """The calls of this library's commands in blocks without a language, as words."""
    for block in blocks(text):
        if not block.language:
            yield from calls("\n".join(block.lines))


def calls(text: str) -> Iterator[list[str]]:
    """The calls of this library's commands that are lines of a text, as words."""
    for line in text.replace("\\\n", " ").split("\n"):
        if match := COMMAND.match(MODULE.sub(r"\1minitron-distill ", line)):
            words = shlex.split(match[1], comments=True)
            yield words[: words.index(">")] if ">" in words else words
