"""Imports run one way, ops do not know each other, files stay short; the same for #include in csrc/."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "minitron_kernels"
LONGEST_FILE = 400
SOURCES = (".h", ".cuh", ".cpp", ".cu")
KERNELS = ("_simd.cpp", "_amx.cpp", "_avx512_bf16.cpp", ".cuh")
TORCH = ("torch", "ATen", "c10")


# parts of the house that are a module, or a package without rooms
ALONE = ("_native", "_workspace", "_backend", "_tensors", "_modules", "_files", "_opaque", "_lazy")
ALONE += ("_command", "_report", "distillation", "evaluation")


def part_of(module: str) -> str:
    """The part of the house that a module belongs to."""
    parts = module.split(".")[1:]
    if parts in ([], ["__main__"]):
        return "top"
    if parts[0] in ALONE:
        return parts[0]
    if parts[0] == "pruning":  # a room of it, or what is around the rooms
        return ".".join(parts[:2]) if len(parts) > 1 and parts[1] != "__main__" else "pruning"
    if parts == ["ops"]:
        return "ops"
    assert parts[0] == "ops", f"{module} has no place in the layers of {__file__}: give it one"
    if len(parts) == 3 and parts[2] == "reference":
        return "reference"
    if len(parts) == 3 and parts[2] == "divergence":
        return "divergence"  # the numbers that kernels and op share
    if parts[2:3] == ["kernel_triton"]:
        return "kernel_triton"
    return "op"  # op.py and the files it is split into


ROOMS = ("families", "score", "plan", "cut", "search", "checkpoint", "cli")
# part -> what it may import of the package; `op`, `reference`, `kernel_triton` mean those of the same op
MAY_IMPORT = {
    "_native": set(),
    "_workspace": set(),
    "_tensors": set(),
    "_files": set(),
    "_opaque": set(),
    "_lazy": set(),
    "_modules": set(),
    "_command": {"_command", "_files", "top"},
    "evaluation": {"evaluation", "_command", "_files", "_modules", "top"},
    "_backend": {"_native"},
    "_report": {"_native", "_backend"},
    "ops": set(),
    "reference": set(),
    "divergence": set(),
    "kernel_triton": {"kernel_triton", "divergence"},
    "op": {
        *("op", "divergence", "reference", "kernel_triton", "_backend", "_workspace", "_native", "_tensors"),
        "_opaque",
    },
    "pruning.families": {"pruning.families"},
    "pruning.score": {"pruning.score", "pruning.families", "op", "_command", "_files", "_modules"},
    "pruning.plan": {"pruning.plan", "pruning.families", "_files"},
    "pruning.cut": {"pruning.cut", "pruning.plan", "pruning.families", "op"},
    "pruning.search": {
        *("pruning.search", "pruning.cut", "pruning.plan", "pruning.score", "pruning.families", "_tensors"),
        *("_command", "_files", "_modules"),
    },
    "pruning.checkpoint": {
        *(
            "pruning.checkpoint",
            "pruning.cut",
            "pruning.plan",
            "pruning.families",
            "op",
            "_command",
            "_files",
        ),
    },
    "pruning.cli": {"top", "_command", "pruning", *(f"pruning.{room}" for room in ROOMS)},
    "pruning": {"_lazy", *(f"pruning.{room}" for room in ROOMS)},
    "distillation": {
        "distillation",
        "evaluation",
        "pruning",
        "pruning.families",
        "pruning.checkpoint",
        "op",
        "divergence",
        "_tensors",
        "_modules",
        "_files",
        "_lazy",
        "_command",
        "top",
    },
    # not pruning nor distillation: who imports the kernels alone must not load them
    "top": {"_native", "_workspace", "_backend", "_lazy", "_report", "op"},
}


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute names of what a module imports from the package; `from x import y` is x and x.y."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[
                    : None if is_package and node.level == 1 else -node.level + is_package
                ]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] == PACKAGE}


def modules_under(root: Path) -> dict[str, Path]:
    files = sorted((root / PACKAGE).rglob("*.py"))
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def is_on_the_way(name: str) -> bool:
    """Whether a name is a package that every import of what lies in it names too."""
    return name in (PACKAGE, f"{PACKAGE}.ops", *(f"{PACKAGE}.pruning.{room}" for room in ROOMS))


def import_cycle(root: Path) -> list[str]:
    """Modules that import each other in a ring, at their top or inside a function; empty: there is none."""
    modules = modules_under(root)
    imports = {
        module: imports_of(path.read_text(), module, path.name == "__init__.py") & set(modules) - {module}
        for module, path in modules.items()
        if path.name != "__init__.py"  # a package's names are for those outside of it
    }
    done: set[str] = set()

    def ring_from(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for name in sorted(imports.get(module, ())):
                if found := ring_from(name, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in imports if (found := ring_from(module, []))), [])


def wrong_imports(root: Path) -> list[str]:
    modules = modules_under(root)
    wrong = []
    for module, path in modules.items():
        for name in sorted(imports_of(path.read_text(), module, path.name == "__init__.py")):
            # a name that is no module (a function), or a package on the way to the module that is meant
            if name not in modules or name == module or is_on_the_way(name):
                continue
            source, target = part_of(module), part_of(name)
            of_other_op = source in ("op", "reference", "kernel_triton") and (
                target in ("op", "reference", "kernel_triton") and module.split(".")[2] != name.split(".")[2]
            )
            if target not in MAY_IMPORT[source] or of_other_op:
                wrong.append(f"{module} ({source}) imports {name} ({target})")
    return wrong


def includes_of(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def wrong_includes(root: Path) -> list[str]:
    """common/ knows no op, an op no other op, cpu/ and cuda/ not each other; kernels, module.cpp no torch."""
    csrc = root / "csrc"
    files = {str(p.relative_to(csrc)): includes_of(p) for p in sorted(csrc.rglob("*")) if p.suffix in SOURCES}

    def reached(name: str, seen: set[str]) -> set[str]:
        """All that a file includes, by way of others too."""
        for inner in files.get(name, []):
            if inner not in seen:
                seen.add(inner)
                reached(inner, seen)
        return seen

    wrong = []
    for here, names in files.items():
        parts = here.split("/")
        kernels = here.endswith(KERNELS) and not here.endswith("_torch.cuh")
        if kernels or here == "module.cpp":  # *_torch.cuh and the launchers may know torch
            torch = sorted(name for name in reached(here, set()) if name.split("/")[0] in TORCH)
            wrong += [f"{here} reaches {name}: it must know no torch" for name in torch[:1]]
        for name in names:
            folders = name.split("/")
            if len(folders) > 1 and (csrc / folders[0]).is_dir() and folders[0] not in ("common", parts[0]):
                wrong.append(f"{here} includes {name}: that is another op's")
            other = {"cpu": "cuda", "cuda": "cpu"}
            if any(part in other and other[part] in folders[:-1] for part in parts[:-1]):
                wrong.append(f"{here} includes {name}: that is the other kind of device's")
    return wrong


def test_imports_run_one_way():
    assert len(modules_under(ROOT)) > 5
    assert wrong_imports(ROOT) == []


def test_no_modules_import_each_other():
    assert import_cycle(ROOT) == []


def test_the_kernels_alone_load_no_pruning():
    code = "import sys, torch, minitron_kernels; print([m for m in sys.modules if 'minitron_kernels.' in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "minitron_kernels.ops.gather.optimizer" in loaded and "pruning" not in loaded


def test_includes_run_one_way():
    assert wrong_includes(ROOT) == []


def test_ops_init_is_empty():
    # a function kl_loss imported there would hide the package kl_loss beside it
    assert (ROOT / PACKAGE / "ops" / "__init__.py").read_text().strip() == ""


def test_no_file_is_long():
    files = [p for top in (PACKAGE, "csrc") for p in (ROOT / top).rglob("*") if p.suffix in (".py", *SOURCES)]
    assert files
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


PLANTED = [
    ("_native.py", "from minitron_kernels import _backend"),
    ("_native.py", "from . import _backend"),
    ("_backend.py", "def f():\n    import minitron_kernels.ops.kl_loss.op"),
    ("ops/kl_loss/reference.py", "from .op import kl_loss"),
    ("ops/kl_loss/reference.py", "from ..._backend import pick"),
    ("ops/kl_loss/kernel_triton/launch.py", "from minitron_kernels.ops.kl_loss import reference"),
    ("ops/gather/op.py", "from minitron_kernels.ops.kl_loss.op import kl_loss"),
    ("ops/gather/op.py", "from ..kl_loss import op"),
    ("ops/kl_loss/op.py", "from minitron_kernels.pruning import plan"),
    ("__init__.py", "from minitron_kernels.pruning.plan import sizes"),
    ("pruning/plan/sizes.py", "from minitron_kernels.ops.kl_loss import reference"),
    ("pruning/plan/sizes.py", "from ...distillation import losses"),
    ("pruning/plan/sizes.py", "from ..cut import cuts"),
    ("pruning/plan/sizes.py", "from minitron_kernels.pruning import plan"),
    ("pruning/families/family.py", "def f():\n    from minitron_kernels.pruning.plan.sizes import g"),
]


@pytest.mark.parametrize(("file", "line"), PLANTED)
def test_a_planted_import_is_found(tmp_path, file, line):
    house = """__init__ __main__ _native _backend ops/__init__ ops/kl_loss/__init__ ops/kl_loss/op
        ops/kl_loss/plan_cpu ops/kl_loss/reference ops/kl_loss/kernel_triton/__init__
        ops/kl_loss/kernel_triton/launch ops/gather/__init__ ops/gather/op
        pruning/__init__ pruning/families/__init__ pruning/families/family pruning/plan/__init__
        pruning/plan/sizes pruning/cut/__init__ pruning/cut/cuts distillation/__init__ distillation/losses"""
    for name in house.split():
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    good = "import torch\nfrom minitron_kernels import _backend\nfrom . import reference\n"
    good += "from .plan_cpu import f\n"
    (tmp_path / PACKAGE / "ops/kl_loss/op.py").write_text(good)
    assert wrong_imports(tmp_path) == []
    with (tmp_path / PACKAGE / file).open("a") as stream:
        stream.write(line)
    importer = f"{PACKAGE}.{file.removesuffix('.py').replace('/', '.')} ".replace(".__init__ ", " ")
    assert [found for found in wrong_imports(tmp_path) if found.startswith(importer)]


def test_a_planted_cycle_is_found(tmp_path):
    for name, text in {
        "__init__": "",
        "a": "from . import b",
        "b": "def f():\n    from .c import g",
        "c": "",
    }.items():
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert import_cycle(tmp_path) == []
    (tmp_path / PACKAGE / "c.py").write_text("import minitron_kernels.a")
    assert import_cycle(tmp_path) == [f"{PACKAGE}.{name}" for name in "abca"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("common/cpu/a.h", '#include "kl_loss/cpu/b.h"'),
        ("gather/cuda/a.cu", '#include "kl_loss/cpu/b.h"'),
        ("kl_loss/cuda/a.cuh", "#include <torch/csrc/stable/tensor.h>"),
        ("kl_loss/cuda/a.cuh", '#include "kl_loss/with_torch.h"'),
        ("kl_loss/cpu/a_simd.cpp", '#include "kl_loss/with_torch.h"'),
        ("kl_loss/cpu/b.h", '#include "kl_loss/cuda/a.cuh"'),
        ("gather/cuda/a.cu", '#include "common/cpu/a.h"'),
        ("module.cpp", "#  include <ATen/ATen.h>"),
    ],
)
def test_a_planted_include_is_found(tmp_path, file, line):
    good = "#include <cmath>\n"
    house = {
        "common/types.h": good,
        "common/cpu/a.h": good + '#include "common/types.h"\n',
        "gather/cuda/a.cu": good + "#include <torch/csrc/stable/tensor.h>\n",
        "kl_loss/with_torch.h": good + "#include <torch/csrc/stable/tensor.h>\n",
        "kl_loss/cpu/b.h": good + '#include "common/cpu/a.h"\n',
        "kl_loss/cpu/a_simd.cpp": good + '#include "common/cpu/a.h"\n',
        "kl_loss/cuda/a.cuh": good + '#include "common/types.h"\n',
        "kl_loss/cuda/launch_torch.cuh": '#include "kl_loss/with_torch.h"\n#include "kl_loss/cuda/a.cuh"\n',
        "module.cpp": good + '#include "common/types.h"\n',
    }
    for name, text in house.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert wrong_includes(tmp_path) == []
    with (tmp_path / "csrc" / file).open("a") as stream:
        stream.write(line)
    assert [found for found in wrong_includes(tmp_path) if found.startswith(f"{file} ")]
