"""The reference has every public name, and every name in it exists. Read from the sources, as the site is."""

import ast
import re
import runpy

import pytest

from documentation.snippets import ROOT

TOOL = runpy.run_path(str(ROOT / "docs/tools/public.py"))
PAGES = TOOL["texts"]() | TOOL["without_page"]()
# as the site has them
LISTED = [
    name for text in PAGES.values() for name in re.findall(r"^::: (\S+)$", TOOL["with_others"](text), re.M)
]


def names_in(module: str) -> set[str]:
    """What a module defines or imports."""
    base = ROOT / module.replace(".", "/")
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    found = set()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    body += [inner for node in body if isinstance(node, ast.If) for inner in node.body]  # TYPE_CHECKING
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_public_name_is_there():
    import minitron_kernels
    from minitron_kernels import distillation, pruning

    found = TOOL["packages"]()
    assert {"minitron_kernels", "minitron_kernels.pruning", "minitron_kernels.distillation.cache"} <= set(
        found
    )
    short = {name.rpartition(".")[2] for name in LISTED}
    for package in found:
        public = set(TOOL["public"](package))
        assert len(public) > 2 and public <= short, (
            f"docs/reference lacks {sorted(public - short)}: name them in a page, or write "
            f"<!-- others of {package} --> in one"
        )
    # what the sources say is what an import gives
    for module in (minitron_kernels, pruning, distillation):
        public = set(TOOL["public"](module.__name__))
        assert public >= set(module.__all__) and all(hasattr(module, name) for name in public)


def test_what_no_page_names_is_added(monkeypatch):
    page, package = "::: a.b\n\n<!-- others of minitron_kernels.pruning -->\n", "minitron_kernels.pruning"
    names = TOOL["with_others"].__globals__
    monkeypatch.setitem(names, "listed", lambda: [f"{package}.{name}" for name in TOOL["public"](package)])
    assert TOOL["with_others"](page) == "::: a.b\n\n\n"
    monkeypatch.setitem(names, "listed", lambda: [f"{package}.Cut"])
    added = set(re.findall(r"^::: (\S+)$", TOOL["with_others"](page), re.M))
    assert added == {"a.b"} | {full for name, full in TOOL["public"](package).items() if name != "Cut"}


def test_a_package_that_no_page_names_gets_one(monkeypatch):
    names = TOOL["without_page"].__globals__
    monkeypatch.setitem(names, "texts", lambda: {"page": "<!-- others of minitron_kernels -->\n"})
    assert TOOL["without_page"]()["reference/pruning.md"] == (
        "# `minitron_kernels.pruning`\n\n<!-- others of minitron_kernels.pruning -->\n"
    )
    assert len(TOOL["without_page"]()) == len(TOOL["packages"]()) - 1


def test_no_page_takes_the_place_of_a_written_one(monkeypatch):
    monkeypatch.setitem(
        TOOL["without_page"].__globals__, "texts", lambda: {"reference/pruning.md": "# Pruning\n"}
    )
    with pytest.raises(ValueError, match=r"docs/reference/pruning\.md.*others of minitron_kernels\.pruning"):
        TOOL["without_page"]()


def test_no_name_stands_twice():
    assert len(LISTED) == len(set(LISTED)) > 90


def test_every_name_exists():
    for full in LISTED:
        module, _, name = full.rpartition(".")
        assert name in names_in(module), full
