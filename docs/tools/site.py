"""Hooks of mkdocs: files outside docs/ become part of the site, and links to them work there too.

Pages link as in a checkout, to "../benchmarks/results/kl_loss.png", so that they work there. README is the
first page of the site. A link that leads nowhere is left as it is, and `mkdocs build --strict` refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# file of the checkout -> page of the site
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# files that pages link to, at the same place in the site
LINKED = (
    *("benchmarks/results/*", "benchmarks/*.py", "benchmarks/*.sh", "examples/*.py", "examples/*.ipynb"),
    *("CITATION.cff", "LICENSE"),
)
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```|~~~)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside docs/."""
    found = {name: ROOT / name for name in PAGES}
    for pattern in LINKED:
        found |= {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob(pattern) if path.is_file()}
    for name, path in sorted(found.items()):
        files.append(File.generated(config, PAGES.get(name, name), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links of the checkout into links of the site, but in code."""
    uris = {file.src_uri for file in files}
    lines, in_code = [], False
    for line in markdown.split("\n"):
        if FENCE.match(line.lstrip()):
            in_code = not in_code
        lines.append(line if in_code else LINK.sub(lambda m: _link(m, page.file.src_uri, uris), line))
    return "\n".join(lines)


def _link(match: re.Match[str], page_uri: str, uris: set[str]) -> str:
    target, anchor = match[1], match[2] or ""
    if ":" in target or target.startswith("/"):
        return match[0]
    at = posixpath.dirname(in_checkout(page_uri))
    name = posixpath.normpath(posixpath.join(at, target))
    uri = PAGES.get(name) or name.removeprefix("docs/")
    if uri not in uris and f"{uri}/README.md" in uris:
        uri = f"{uri}/README.md"  # as a folder is shown on the web
    if uri not in uris:
        return match[0]
    return posixpath.relpath(uri, posixpath.dirname(page_uri) or ".") + anchor


def in_checkout(page_uri: str) -> str:
    """The path in the checkout of a page of the site."""
    for name, uri in PAGES.items():
        if uri == page_uri:
            return name
    return page_uri if page_uri.startswith("benchmarks/") else f"docs/{page_uri}"
