"""The recipes that come with the package: settings of the papers, by name."""

from __future__ import annotations

from pathlib import Path

from minitron_kernels.distillation.cli.config import near, parse_toml

FOLDER = Path(__file__).parent / "configs"


def names() -> dict[str, str]:
    """{name: what it is}."""
    return {file.stem: parse_toml(file)["recipe"]["about"] for file in sorted(FOLDER.glob("*.toml"))}


def find(name: str, *, shipped_only: bool = False) -> Path:
    """The file of a recipe.

    Args:
        name: a path, or the name of one that comes with the package.
        shipped_only: a path is not meant.

    Raises:
        FileNotFoundError: there is none; names the nearest one.
    """
    path = Path(name)
    if path.is_file() and not shipped_only:
        return path
    there = sorted(file.stem for file in FOLDER.glob("*.toml"))
    if name in there:
        return FOLDER / f"{name}.toml"
    raise FileNotFoundError(2, f"is neither a file nor one of {', '.join(there)}{near(name, there)}", name)
