"""The scripts in benchmarks/ as modules."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[1]


@functools.cache
def script(name: str) -> ModuleType:
    """benchmarks/<name>.py; not by `import`, for a module of its name may be another's."""
    found = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where dataclasses look for the names in annotations
    found.loader.exec_module(module)
    return module
