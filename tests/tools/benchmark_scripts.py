"""The scripts in benchmarks/ as modules; what they import from the folders beside them is found too."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(FOLDER))  # last: gather, importance and kl_loss are the tests' folders too


@functools.cache
def script(name: str) -> ModuleType:
    """benchmarks/<name>.py; not by `import`, for the tests have folders of these names."""
    found = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where dataclasses look for the names in annotations
    found.loader.exec_module(module)
    return module
