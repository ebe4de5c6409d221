"""Which names are public, and which of them the reference names; from the sources, without imports.

A page names them by lines "::: full.name", in an order that helps. "<!-- others of PACKAGE -->" is for
all public names of a package that no page names.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LISTED = re.compile(r"^::: (\S+)$", re.M)
OTHERS = re.compile(r"^<!-- others of (\S+) -->$", re.M)


def packages() -> list[str]:
    """The packages that say with __all__ what is public."""
    folders = sorted(path.parent for path in (ROOT / "minitron_kernels").rglob("__init__.py"))
    names = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    return [name for name in names if "__all__" in _constants(name)]


def public(package: str) -> dict[str, str]:
    """{name: where it is defined or imported} of a package: of its __all__, and of its _LAZY."""
    constants = _constants(package)
    lazy = {name: f"{module}.{name}" for name, module in constants.get("_LAZY", {}).items()}
    return {name: f"{package}.{name}" for name in constants["__all__"]} | lazy


def texts() -> dict[str, str]:
    """The pages of the reference, as they are written."""
    pages = sorted((ROOT / "docs/reference").glob("*.md"))
    return {f"reference/{page.name}": page.read_text(encoding="utf-8") for page in pages}


def without_page() -> dict[str, str]:
    """{page: text} for packages that no page of the reference names: each gets one.

    Raises: ValueError where the new page would take the place of a written one.
    """
    written = texts()
    named = {name for text in written.values() for name in OTHERS.findall(text)}
    pages = {}
    for name in packages():
        if name in named:
            continue
        page = f"reference/{name.removeprefix('minitron_kernels.')}.md"
        if page in written:
            raise ValueError(f"docs/{page}: wanted a line <!-- others of {name} -->: add it at the end")
        pages[page] = f"# `{name}`\n\n<!-- others of {name} -->\n"
    return pages


def listed() -> list[str]:
    """Full names in the pages of the reference."""
    return [name for text in texts().values() for name in LISTED.findall(text)]


def with_others(markdown: str) -> str:
    """The page with the names that its comments stand for."""
    short = {name.rpartition(".")[2] for name in listed()}

    def others(match: re.Match[str]) -> str:
        return "\n\n".join(f"::: {full}" for name, full in public(match[1]).items() if name not in short)

    return OTHERS.sub(others, markdown)


def _constants(package: str) -> dict[str, dict[str, str]]:
    """__all__ and _LAZY of a package's __init__.py."""
    path = ROOT.joinpath(*package.split("."), "__init__.py")
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in ("__all__", "_LAZY"):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found
