"""English prose for calibration, training and evaluation: the user's files, or Python's documentation.

Only running text is kept: no headings, code, tables or directives, and each paragraph once.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

SUFFIXES = (".txt", ".md", ".rst")
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
SHORTEST = 150  # characters of a paragraph


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of running text in a document, each on one line."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip("\n").split("\n")
        running = " ".join(" ".join(lines).split())
        indented = sum(line.startswith("   ") for line in lines)
        if (
            len(running) >= SHORTEST
            and indented < len(lines) / 2
            and not running.startswith("..")
            and not any(mark in running for mark in ("::=", "+--", ">>>", "==="))
        ):
            yield running


def help_topics() -> dict[str, str]:
    """{topic: text} of the language reference that help() shows."""
    return {name: topics[name] for name in sorted(topics)}


def docstrings() -> dict[str, str]:
    """{module: its docstrings} of the standard library."""
    found = {}
    root = Path(sysconfig.get_path("stdlib"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts):
            try:
                nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                texts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
            except (SyntaxError, UnicodeDecodeError):  # templates, other encodings
                continue
            found[str(name)] = "\n\n".join(filter(None, texts))
    return found


def documents(paths: Sequence[Path] = ()) -> dict[str, list[str]]:
    """{document: its paragraphs} of the files under `paths`, by default of Python's own documentation.

    Raises:
        FileNotFoundError: a path does not exist or has no text under it; says what is looked for.
    """
    if not paths:
        texts = help_topics() | docstrings()
    else:
        texts = {}
        for path in paths:
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
            if not files:
                raise FileNotFoundError(f"no text in {path}: neither a file nor a folder with {SUFFIXES}")
            texts |= {str(file): file.read_text(encoding="utf-8", errors="replace") for file in files}
    seen: set[str] = set()
    result = {}
    for name, text in texts.items():
        fresh = list(dict.fromkeys(p for p in paragraphs(text) if p not in seen))
        seen.update(fresh)
        if fresh:
            result[name] = fresh
    return result


def split(found: dict[str, list[str]], one_in: int = 8) -> tuple[list[str], list[str]]:
    """(paragraphs to learn from, to evaluate on): whole documents, chosen by their names alone."""

    def held_out(name: str) -> bool:
        return zlib.crc32(Path(name).name.encode()) % one_in == 0

    learn = [p for name, text in found.items() if not held_out(name) for p in text]
    return learn, [p for name, text in found.items() if held_out(name) for p in text]


def windows(tokenizer: Any, texts: Iterable[str], count: int, length: int) -> torch.Tensor:
    """[count, length] token ids of the paragraphs, one after another.

    Raises:
        ValueError: the text is too short; says how long it is.
    """
    ids: list[int] = []
    for text in texts:
        if len(ids) >= count * length:
            break
        ids += tokenizer(text + "\n\n")["input_ids"]
    if len(ids) < count * length:
        raise ValueError(f"{count} windows of {length} tokens are wanted, the text has {len(ids)} tokens")
    return torch.tensor(ids[: count * length]).view(count, length)
