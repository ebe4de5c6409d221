"""English prose that comes with Python: the language reference that help() shows."""

from __future__ import annotations

import re
from pydoc_data.topics import topics


def prose() -> str:
    """The paragraphs of the reference that are running text: no headings, code, grammar or tables."""
    paragraphs = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            lines = paragraph.strip("\n").split("\n")
            running = " ".join(" ".join(lines).split())
            indented = sum(line.startswith("   ") for line in lines)
            if (
                len(running) > 150
                and indented < len(lines) / 2
                and "::=" not in running
                and "+--" not in running
            ):
                paragraphs.append(running)
    return "\n\n".join(dict.fromkeys(paragraphs))  # a section may be shown under several topics
