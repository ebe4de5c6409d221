"""Docstrings for the reference: sections that griffe cannot read as lists of items become plain Markdown.

Docstrings here say what is returned, raised and shown in sentences, as in "Raises: As kl_loss(); ...". griffe
expects "ValueError: when", and drops what is not like that. Args and Attributes are left to it. Names of
public functions, written as name(), become links.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import griffe

SECTION = re.compile(r"^(Returns|Raises|Warns|Yields|Example|Source):[ \t]*(.*)$")
ITEM = re.compile(r"^([A-Z]\w+(?:, [A-Z]\w+)*):\s")
DOCTEST_FLAG = re.compile(r"\s*# doctest: .*$")
NAME = re.compile(r"(?<![\w.`\[])(\w+)\(\)(?!`)")
# name -> where the reference has it
PUBLIC = {
    full.rpartition(".")[2]: full
    for full in runpy.run_path(str(Path(__file__).with_name("public.py")))["listed"]()
}


class PlainSections(griffe.Extension):
    """The extension; named in mkdocs.yml."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """The docstring with the sections of SECTION as Markdown, under a heading in bold."""
    lines, result = text.split("\n"), []
    at, in_items = 0, False
    while at < len(lines):
        match = SECTION.match(lines[at])
        if not match:
            indented = not lines[at] or lines[at].startswith("    ")
            in_items = lines[at] in ("Args:", "Attributes:") or (in_items and indented)
            # "[a][b]" would be a reference to another page; other indented lines are code
            result.append(_linked(lines[at].replace("][", "]\\[")) if in_items or not indented else lines[at])
            at += 1
            continue
        in_items = False
        name, rest = match[1], match[2]
        block, end = _block(lines, at + 1, indented=not rest)
        if name == "Source":
            result.append(f"*Source:* {rest}")
            result += block
        elif name == "Example":
            code = [DOCTEST_FLAG.sub("", line) for line in block]
            result += ["**Example**", "", "```pycon", *code, "```"]
        else:
            block = _items(block) if name in ("Raises", "Warns") else block
            result += [f"**{name}**", "", *map(_linked, block)]
        at = end
    return "\n".join(result)


def _linked(line: str) -> str:
    """The line with a link at each public name that is followed by ()."""

    def link(match: re.Match[str]) -> str:
        full = PUBLIC.get(match[1])
        return f"[`{match[0]}`][{full}]" if full else match[0]

    return NAME.sub(link, line)


def _block(lines: list[str], start: int, *, indented: bool) -> tuple[list[str], int]:
    """The lines of a section, without their indentation, and where they end."""
    end = start
    while end < len(lines) and (lines[end].startswith("    ") or (indented and not lines[end].strip())):
        end += 1
    if not indented:
        return lines[start:end], end
    while end > start and not lines[end - 1].strip():
        end -= 1
    return [line[4:] for line in lines[start:end]], end


def _items(block: list[str]) -> list[str]:
    """Exceptions as a list, where a line begins with their names; other lines as they are."""
    result: list[str] = []
    listed = False
    for line in block:
        match = ITEM.match(line)
        if match:
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            if result and not listed:
                result.append("")  # else the list would go on with the sentence before it
            listed = True
            result.append(f"- {names}: {line[match.end() :]}")
        else:
            result.append(line)
    return result
