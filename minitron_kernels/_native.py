"""Loads the compiled extension once, on import; if it cannot be loaded, keeps the reason."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# Imported first, since it loads libtorch: the extension is linked against it without a path.
import torch

_HERE = Path(__file__).resolve().parent
_IS_CHECKOUT = (_HERE.parent / "setup.py").is_file()


def _folders() -> list[str]:
    """This folder; in a checkout, which hides an installed package, also the folders of that on sys.path."""
    others = [str(Path(entry, _HERE.name)) for entry in sys.path] if _IS_CHECKOUT else []
    return [str(_HERE), *others]


def _load() -> tuple[ModuleType | None, str | None]:
    name = f"{_HERE.name}._C"
    spec = importlib.machinery.PathFinder.find_spec(name, _folders())
    if spec is None or spec.loader is None:
        return None, _why_not_built()
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:  # built for another Python, or a libtorch that lacks a symbol
        return None, f"{spec.origin} does not load under torch {torch.__version__}: {error}"
    sys.modules[name] = module
    return module, None


def _why_not_built() -> str:
    for folder in _folders():
        note = Path(folder, "_not_built.txt")
        if note.is_file():
            return f"minitron_kernels was installed without C++: {note.read_text().strip()}"
    if _IS_CHECKOUT:
        return f"nothing has been built from {_HERE.parent}: pip install . (or -e .) there"
    return f"there is no _C in {_HERE} for this Python: reinstall minitron-kernels"


_MODULE, _REASON = _load()


def available() -> bool:
    """Whether the extension is loaded, and with it the ops under torch.ops.minitron_kernels."""
    return _MODULE is not None


def reason() -> str | None:
    """Why the extension is not loaded; None where it is."""
    return _REASON


def build_info() -> dict[str, Any]:
    """What the extension was built from and what it chose on this machine; empty where it is not loaded."""
    return dict(_MODULE.build_info()) if _MODULE is not None else {}


def location() -> str | None:
    """The path of the extension's file; None where it is not loaded."""
    return _MODULE.__file__ if _MODULE is not None else None
