"""Hooks of mkdocs: files outside docs/ become part of the site, and links to them work there too.

Pages link as in a checkout, to "../benchmarks/results/kl_loss.png", so that they work there. README is the
first page of the site. A link that leads nowhere is left as it is, and `mkdocs build --strict` refuses it.
"""

from __future__ import annotations

import posixpath
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# file of the checkout -> page of the site
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PUBLIC = runpy.run_path(str(ROOT / "docs/tools/public.py"))
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
# x[rows][:, cols], which would be a reference to another page; not in code
INDEXED_TWICE = re.compile(r"(`[^`]*`)|\]\[(?=[^\]]*[:, ])")
FENCE = re.compile(r"^(```|~~~)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds pages that nav does not name to its guides and its reference, under their own titles."""
    assert config.nav
    named = set(_leaves(config.nav))
    (guides,) = [item["Guides"] for item in config.nav if "Guides" in item]
    guides += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in named]
    (reference,) = [item["Reference"] for item in config.nav if "Reference" in item]
    reference += list(PUBLIC["without_page"]())
    return config


def _leaves(nav: Any) -> Iterator[str]:
    for item in nav.values() if isinstance(nav, dict) else nav:
        if isinstance(item, str):
            yield item
        else:
            yield from _leaves(item)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds PAGES, and every file outside docs/ that a page links to, at its own place."""
    found, unread = (
        set(PAGES),
        [*PAGES, *(f"docs/{file.src_uri}" for file in files if file.is_documentation_page())],
    )
    while unread:
        page = unread.pop()
        for match in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
            name = _target(match[1], posixpath.dirname(page))
            if name and not name.startswith("docs/") and name not in found and (ROOT / name).is_file():
                found.add(name)
                unread += [name] if name.endswith(".md") else []
    for name in sorted(found):
        files.append(File.generated(config, PAGES.get(name, name), abs_src_path=str(ROOT / name)))
    for uri, text in PUBLIC["without_page"]().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Completes the reference, and turns links of the checkout into links of the site, but in code."""
    markdown = PUBLIC["with_others"](markdown)
    uris = {file.src_uri for file in files}
    lines, in_code = [], False
    for line in markdown.split("\n"):
        if FENCE.match(line.lstrip()):
            in_code = not in_code
        if not in_code:
            line = LINK.sub(lambda m: _link(m, page.file.src_uri, uris), line)
            line = INDEXED_TWICE.sub(lambda m: m[1] or "]\\[", line)
        lines.append(line)
    return "\n".join(lines)


def _link(match: re.Match[str], page_uri: str, uris: set[str]) -> str:
    name = _target(match[1], posixpath.dirname(in_checkout(page_uri)))
    uri = PAGES.get(name) or name.removeprefix("docs/")
    if uri not in uris:
        return match[0]
    return posixpath.relpath(uri, posixpath.dirname(page_uri) or ".") + (match[2] or "")


def _target(link: str, folder: str) -> str:
    """The path in the checkout that a link in a page of this folder names; of a folder, its README."""
    if ":" in link or link.startswith("/"):
        return ""
    name = posixpath.normpath(posixpath.join(folder, link))
    return f"{name}/README.md" if (ROOT / name / "README.md").is_file() else name


def in_checkout(page_uri: str) -> str:
    """The path in the checkout of a page of the site."""
    names = {uri: name for name, uri in PAGES.items()}
    if page_uri in names or (ROOT / "docs" / page_uri).is_file():
        return names.get(page_uri, f"docs/{page_uri}")
    return page_uri
