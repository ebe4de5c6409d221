"""The reference has every public name, and every name in it exists. Read from the sources, as the site is."""

import ast
import re

from documentation.snippets import ROOT

PAGES = sorted((ROOT / "docs/reference").glob("*.md"))
LISTED = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
# packages whose names users import; for trainers, each module's that users name
PACKAGES = ["", "pruning", "distillation", "distillation.cache", "distillation.cache.import_"]


def source_of(module: str) -> ast.Module:
    base = ROOT / "minitron_kernels" / module.replace(".", "/")
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def assigned(tree: ast.Module, name: str):
    """The value of a constant of a module, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    return None


def names_in(tree: ast.Module) -> set[str]:
    """What a module defines or imports."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_public_name_is_there():
    short = {name.rpartition(".")[2] for name in LISTED}
    for package in PACKAGES:
        tree = source_of(package)
        public = {*assigned(tree, "__all__"), *(assigned(tree, "_LAZY") or ())}
        assert len(public) > 5
        assert public <= short, f"docs/reference lacks {sorted(public - short)} of minitron_kernels.{package}"


def test_no_name_stands_twice():
    assert len(LISTED) == len(set(LISTED)) > 90


def test_every_name_exists():
    for full in LISTED:
        module, _, name = full.removeprefix("minitron_kernels.").rpartition(".")
        assert name in names_in(source_of(module)), full
