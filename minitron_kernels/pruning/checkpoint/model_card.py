"""The README.md of a pruned checkpoint: the source's model card, with a note on the pruning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from minitron_kernels.pruning.families.configs import Config
from minitron_kernels.pruning.families.registry import family_of

PLAN_FILE = "minitron_plan.json"


def source_name(folder: Path) -> str:
    """The name of a checkpoint: that of its folder, or owner/name for one in the hub's cache."""
    for part in folder.resolve().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def changed_sizes(before: Config, after: Config) -> dict[str, tuple[int, int]]:
    """{axis: (before, after)} for sizes that differ between two configs of a family."""
    family = family_of(before)
    old, new = family.sizes(before), family.sizes(after)
    return {axis: (old[axis], new[axis]) for axis in old if new.get(axis, old[axis]) != old[axis]}


def model_card(source: str, source_card: str, before: Config, after: Config) -> str:
    """The text of README.md.

    Args:
        source: the source's name.
        source_card: its README.md; "" where there is none. Its front matter (license, ...) stays at the top,
            without the results of evaluations.
        before, after: configs of the source and of the pruned model.
    """
    family = family_of(before)
    front = re.match(r"---\r?\n.*?\n---[ \t]*(\r?\n|$)", source_card, re.S)
    head = _without_results(front[0]).rstrip() + "\n\n" if front else ""
    body = source_card[front.end() if front else 0 :].strip()
    rows = {axis: pair for axis, pair in changed_sizes(before, after).items()}
    rows["parameters"] = (family.count_parameters(before), family.count_parameters(after))
    note = f"""# {source}, pruned

Channels, heads, experts or layers of **{source}** were cut by `minitron_kernels` (the Minitron recipe,
[arXiv 2407.14679](https://arxiv.org/abs/2407.14679)). The weights that are left are the source's: the model
has not been trained since, and should be distilled from its source before use.

{_table(rows)}

What was kept is recorded index by index in `{PLAN_FILE}`.
"""
    return head + note + (f"\n## Card of {source}\n\n{body}\n" if body else "")


def _without_results(front: str) -> str:
    """Front matter without model-index: hubs would show these results of the old weights as the new ones'."""
    kept, inside = [], False
    for line in front.splitlines(keepends=True):
        continued = inside and line[0] in " \t\r\n-" and not line.startswith("---")
        inside = continued or line.startswith("model-index:")
        if not inside:
            kept.append(line)
    return "".join(kept)


def _table(rows: Mapping[str, tuple[int, int]]) -> str:
    lines = [f"| {name} | {old:,} | {new:,} |" for name, (old, new) in rows.items()]
    return "\n".join(["| | before | after |", "|---|---:|---:|", *lines])
