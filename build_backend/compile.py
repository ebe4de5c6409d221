"""Compiles csrc/ to one shared object: one command per object file, run by ninja.

How a source file is compiled follows from its name:
  *.cu         by nvcc, for every CUDA arch of the plan; only where there is CUDA
  *_simd.cpp   once per SIMD level, with the level's -m flags and -DMINITRON_SIMD=<level>
  *_<isa>.cpp  once for an instruction set of ISA_FLAGS, the same way, where the compiler knows it
  *.cpp        once
  module.cpp   once, without TORCH_TARGET_VERSION
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_backend.interface import interface
from build_backend.progress import Progress, run_ninja, terminal
from build_backend.tools import (
    ISA_FLAGS,
    SIMD_FLAGS,
    TORCH_TARGET_VERSION,
    Compiler,
    Cuda,
    Plan,
    Torch,
    find_ninja,
)


@dataclass(frozen=True)
class Step:
    """One command. `depfile` is where the compiler lists the headers that it read; None for a link."""

    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: Path | None = None


def build_extension(root: Path, folder: Path, plan: Plan, version: str) -> Path:
    """Compiles and links what the plan says into `folder`; returns the path of the shared object."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((root / "csrc").rglob("*.cpp")) + sorted((root / "csrc").rglob("*.cu"))
    _write_if_changed(folder / "build_config.h", config_header(plan, version, interface(root / "csrc")))
    steps = compile_steps(root, folder, plan, sources)
    steps.append(
        link_step(folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", [s.output for s in steps], plan)
    )
    if ninja := find_ninja():
        _write_if_changed(folder / "build.ninja", ninja_file(steps, folder))
        command = [ninja, "-f", str(folder / "build.ninja"), "-j", str(max_jobs())]
        ok = run_ninja(command, root, plan.cuda.archs if plan.cuda else (), max_jobs())
    else:
        print("ninja was not found: everything is compiled anew (pip install ninja for incremental builds)")
        ok = run_all(steps, plan.cuda.archs if plan.cuda else ())
    if not ok:
        hint = "; MINITRON_BUILD=cpu builds without CUDA" if plan.cuda else ""
        raise SystemExit(
            "error: compiling minitron_kernels._C failed, see above "
            f"(MINITRON_BUILD=python builds without it{hint})"
        )
    return steps[-1].output


def compile_steps(root: Path, folder: Path, plan: Plan, sources: list[Path]) -> list[Step]:
    """The commands that make the object files."""
    assert plan.compiler is not None and plan.torch is not None
    plain = common_flags(root, folder, plan.compiler, plan.torch)
    common = [*plain, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    steps = []
    for source in sources:
        stem = folder / source.relative_to(root)
        if source.suffix == ".cu":
            if plan.cuda:
                flags = cuda_flags(plan.cuda, plan.compiler) + common
                steps.append(_compile(plan.cuda.nvcc, flags, source, stem.with_suffix(".cu.o")))
        elif source.stem.endswith("_simd"):
            for level in plan.compiler.simd_levels:
                flags = [*host_flags(), *common, f"-DMINITRON_SIMD={level}", *SIMD_FLAGS[level]]
                steps.append(_compile(plan.compiler.command, flags, source, stem.with_suffix(f".{level}.o")))
        elif isa := next((isa for isa in ISA_FLAGS if source.stem.endswith(f"_{isa}")), None):
            if isa in plan.compiler.isas:
                flags = [*host_flags(), *common, f"-DMINITRON_SIMD={isa}", *ISA_FLAGS[isa]]
                steps.append(_compile(plan.compiler.command, flags, source, stem.with_suffix(".o")))
        else:
            # under the macro all of torch's headers outside of its stable ABI are errors, in torch 2.11 also
            # those of pybind11, which are no part of torch
            flags = host_flags() + (plain if source.name == "module.cpp" else common)
            steps.append(_compile(plan.compiler.command, flags, source, stem.with_suffix(".o")))
    return steps


def common_flags(root: Path, folder: Path, compiler: Compiler, torch: Torch) -> list[str]:
    """The flags of every file: optimisation, macros and include folders."""
    include = torch.folder / "include"
    systems = [include, include / "torch/csrc/api/include", Path(sysconfig.get_path("include"))]
    return [
        "-std=c++20",
        "-O3",
        "-DNDEBUG",
        *(f"-DMINITRON_HAVE_{level.upper()}=1" for level in compiler.simd_levels if SIMD_FLAGS[level]),
        *(f"-DMINITRON_HAVE_{isa.upper()}=1" for isa in compiler.isas),
        f"-I{root / 'csrc'}",
        f"-I{folder}",
        *(flag for path in systems for flag in ("-isystem", str(path))),  # no warnings about others' headers
    ]


def host_flags() -> list[str]:
    """The C++ compiler's flags. Without -march=native, since the result may run on another machine; a switch
    without a case for each enumerator is an error.
    """
    return [
        "-Wall",
        "-Werror=switch",
        "-fPIC",
        "-fvisibility=hidden",
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]


def cuda_flags(cuda: Cuda, compiler: Compiler) -> list[str]:
    """nvcc's flags: machine code for each arch, and PTX of the newest."""
    newest = cuda.archs[-1]
    return [
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda.archs),
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
        "-ccbin",
        compiler.command[0],
        "--expt-relaxed-constexpr",
        "-Xcompiler=-Wall,-fPIC,-fvisibility=hidden",
    ]


def link_step(output: Path, objects: list[Path], plan: Plan) -> Step:
    """The link command. It sets no rpath: `import torch` comes first and loads the libraries."""
    assert plan.compiler is not None and plan.torch is not None
    mac = sys.platform == "darwin"
    command = [
        *plan.compiler.command,
        *(["-bundle", "-undefined", "dynamic_lookup"] if mac else ["-shared"]),
        "-o",
        str(output),
        *map(str, objects),
        f"-L{plan.torch.folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    if plan.cuda:
        # static and not exported, so that it does not clash with the runtime that a CUDA torch brings
        command += [f"-L{folder}" for folder in plan.cuda.library_folders]
        command += ["-lcudart_static", "-ldl", "-lpthread", "-lrt", "-Wl,--exclude-libs,libcudart_static.a"]
    return Step(output, objects, command + shlex.split(os.environ.get("LDFLAGS", "")))


def config_header(plan: Plan, version: str, agreed: dict[str, str]) -> str:
    """A header with the facts that module.cpp reports: as -D flags, they would need quoting for a shell.

    agreed: see interface.py.
    """
    assert plan.compiler is not None and plan.torch is not None
    archs = (
        [f"sm_{arch}" for arch in plan.cuda.archs] + [f"compute_{plan.cuda.archs[-1]}"] if plan.cuda else []
    )
    facts = {
        "VERSION": version,
        "TORCH": plan.torch.version,
        "INTERFACE": " ".join(f"{name}={digest}" for name, digest in agreed.items()),
        "SIMD_COMPILED": " ".join(plan.compiler.simd_levels),
        "CUDA_VERSION": plan.cuda.version if plan.cuda else "",
        "CUDA_ARCHS": " ".join(archs),
        "CUDA_REASON": plan.no_cuda,
    }
    lines = [f'#define MINITRON_BUILD_{name} "{_c_string(value)}"' for name, value in facts.items()]
    return "\n".join(["#pragma once", *lines, ""])


def ninja_file(steps: list[Step], folder: Path) -> str:
    """The ninja file. Each step has its own command, so that it is run again when the command changes."""
    # builddir: the folder of ninja's logs, by default the one it runs in, which is the checkout
    lines = ["ninja_required_version = 1.5", f"builddir = {_ninja_path(folder)}", ""]
    for kind, extra in (("compile", ["  deps = gcc", "  depfile = $out.d"]), ("link", [])):
        lines += [f"rule {kind}", "  command = $command", f"  description = {kind} $out", *extra, ""]
    for step in steps:
        inputs = " ".join(_ninja_path(path) for path in step.inputs)
        lines += [f"build {_ninja_path(step.output)}: {'compile' if step.depfile else 'link'} {inputs}"]
        lines += [f"  command = {shlex.join(step.command).replace('$', '$$')}", ""]
    return "\n".join(lines)


def max_jobs() -> int:
    """How many commands run at once: MAX_JOBS, as for torch's own extensions, or one for each core."""
    text = os.environ.get("MAX_JOBS", "").strip()
    if not text:
        return os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise SystemExit(f"error: MAX_JOBS must be a whole number from 1 on, got {text!r}")
    return int(text)


def run_all(steps: list[Step], archs: Sequence[int] = ()) -> bool:
    """Runs all commands, for lack of ninja: the last one, the link, after the others."""

    def run(step: Step) -> bool:
        step.output.parent.mkdir(parents=True, exist_ok=True)
        print(shlex.join(step.command), flush=True)
        ok = subprocess.run(step.command).returncode == 0
        progress.finished(str(step.output))
        return ok

    with terminal() as screen, ThreadPoolExecutor(max_jobs()) as pool:
        progress = Progress([str(step.output) for step in steps], archs, max_jobs(), screen)
        progress.begin()
        return all(list(pool.map(run, steps[:-1]))) and run(steps[-1])


def _compile(compiler: str | list[str], flags: list[str], source: Path, output: Path) -> Step:
    depfile = Path(f"{output}.d")
    start = [compiler] if isinstance(compiler, str) else compiler
    dependencies = ["-MD", "-MF", str(depfile)]
    return Step(
        output, [source], [*start, *flags, *dependencies, "-c", str(source), "-o", str(output)], depfile
    )


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _c_string(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
