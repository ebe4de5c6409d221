"""The lists of docs/families.md: what becomes of each model type of the installed transformers.

A type "works" where tests/pruning/test_every_family.py tests it; the reasons for the others are those of the
library. In tests/: python -m tools.family_page --write ../docs/families.md
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from minitron_kernels.pruning.families.refused import REFUSALS
from minitron_kernels.pruning.families.registry import family_of, known_families
from pruning.family_configs import CASES

BEGIN, END = "<!-- families -->", "<!-- end -->"


def causal_types() -> list[str]:
    """The model types that AutoModelForCausalLM takes, and those that are tested."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *CASES})


def version() -> str:
    """Major and minor version of the installed transformers."""
    import transformers

    return ".".join(transformers.__version__.split(".")[:2])


def lists() -> str:
    """The lists, in Markdown."""
    types = causal_types()
    works = [name for name in types if name in CASES]
    exact = [name for name in works if not family_of({"model_type": name}).approximates]
    lines = [
        f"transformers {version()} has {len(types)} model types of causal language models, alone or inside. "
        f"{len(works)} work, {len(works) - len(exact)} of them approximately; {len(types) - len(works)} are "
        "refused.",
        "",
        "### Work",
        "",
        _listed(exact),
        "",
        "### Work approximately",
        "",
        "| model type | cut of | what differs |",
        "|---|---|---|",
    ]
    for name in works:
        said: dict[str, list[str]] = {}
        for axis, what in family_of({"model_type": name}).approximates.items():
            said.setdefault(what, []).append(axis)
        lines += [f"| `{name}` | {', '.join(axes)} | {what} |" for what, axes in said.items()]
    lines += ["", "### Refused", "", "| it has | what would help | model types |", "|---|---|---|"]
    for refusal in REFUSALS:
        there = [name for name in refusal.types if name in types]
        if there:
            lines.append(f"| {refusal.lacks} | {refusal.remedy} | {_listed(there)} |")
    unknown = [name for name in types if name not in CASES and not _is_refused(name)]
    assert not unknown, f"no reason in families/refused.py for {', '.join(unknown)}"
    return "\n".join(lines)


def _is_refused(name: str) -> bool:
    return any(name in refusal.types for refusal in REFUSALS)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def written(page: str) -> str:
    """A page with the lists between its marks as they are now."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(page)) == 1, f"the page must have {BEGIN} and {END}, once"
    return pattern.sub(lambda _: f"{BEGIN}\n{lists()}\n{END}", page)


def main() -> None:
    """Prints the lists, or writes them into a page."""
    parser = argparse.ArgumentParser(prog="python -m tools.family_page", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put them into this page instead")
    args = parser.parse_args()
    assert set(known_families()) == set(CASES)
    if args.write:
        args.write.write_text(written(args.write.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(lists())


if __name__ == "__main__":
    main()
