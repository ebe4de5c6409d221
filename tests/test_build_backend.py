"""What the build decides and the commands that it makes, with tools that stand in for compilers. No build."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from minitron_kernels import _backend, _native
from minitron_kernels import _report as report
from tools.toolchains import script

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "build_backend").is_dir():  # an sdist has it; an installed copy has not
    pytest.skip("no build_backend folder here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from build_backend import compile, hooks, tools  # noqa: E402
from build_backend import interface as of_sources  # noqa: E402
from build_backend.tools import Absent, Compiler, Cuda, Plan, Torch  # noqa: E402

sys.path.remove(str(ROOT))

LEVELS, ISAS = list(tools.SIMD_FLAGS), list(tools.ISA_FLAGS)
CUDA = Cuda("/cuda/bin/nvcc", "13.0", [80, 90], ["/cuda/lib64"])
PLAN = Plan(Compiler(["g++", "-m64"], LEVELS, ISAS), Torch(Path("/site/torch"), "2.13.1"), CUDA)
CPU_PLAN = Plan(PLAN.compiler, PLAN.torch, no_cuda="nvcc was not found")
SOURCES = [Path("/r/csrc") / name for name in ("module.cpp", "a/b_simd.cpp", "a/b_amx.cpp", "a/c.cu")]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (
        "MINITRON_BUILD",
        "MINITRON_CUDA_ARCHS",
        "CUDA_HOME",
        "CUDA_PATH",
        "CXX",
        "CXXFLAGS",
        "LDFLAGS",
    ):
        monkeypatch.delenv(name, raising=False)


def steps_of(plan):
    steps = compile.compile_steps(Path("/r"), Path("/b"), plan, SOURCES)
    return {str(step.output.relative_to("/b/csrc")): step for step in steps}


def test_a_file_is_compiled_as_its_name_says(monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-g -mno-avx2")
    steps = steps_of(PLAN)
    assert list(steps) == ["module.o", *(f"a/b_simd.{level}.o" for level in LEVELS), "a/b_amx.o", "a/c.cu.o"]
    for name, step in steps.items():
        assert (
            step.command[-4:-1] == ["-c", str(step.inputs[0]), "-o"] and step.command[-1] == f"/b/csrc/{name}"
        )
        assert step.depfile == Path(f"/b/csrc/{name}.d")
        assert step.command[step.command.index("-MF") + 1] == f"/b/csrc/{name}.d" and "-MD" in step.command
        assert {"-std=c++20", "-O3", "-DNDEBUG", "-I/r/csrc", "-I/b"} <= set(step.command)
        # with it, pybind11's headers are an #error in torch 2.11
        assert ("-DTORCH_TARGET_VERSION=0x020b000000000000" in step.command) == (name != "module.o")
        have = {flag for flag in step.command if flag.startswith("-DMINITRON_HAVE_")}
        known = [*(level for level in LEVELS if level != "baseline"), *ISAS]
        assert have == {f"-DMINITRON_HAVE_{name.upper()}=1" for name in known}
        systems = [b for a, b in zip(step.command, step.command[1:], strict=False) if a == "-isystem"]
        assert systems[:2] == ["/site/torch/include", "/site/torch/include/torch/csrc/api/include"]
        assert systems[2] == sysconfig.get_path("include")
        assert not [flag for flag in step.command if flag.startswith("-march")]
    host = steps["module.o"].command
    assert host[:2] == ["g++", "-m64"] and {"-fPIC", "-fvisibility=hidden", "-Wall", "-g"} <= set(host)
    for level in LEVELS:
        command = steps[f"a/b_simd.{level}.o"].command
        assert f"-DMINITRON_SIMD={level}" in command
        # after the user's own flags: the last one counts
        at = len(command) - command[::-1].index("-mno-avx2")
        assert set(tools.SIMD_FLAGS[level]) <= set(command[at:])
        assert ("-mavx512f" in command) == (level == "avx512") and ("-mfma" in command) == (
            level != "baseline"
        )
    amx = steps["a/b_amx.o"].command
    assert "-DMINITRON_SIMD=amx" in amx and amx.index("-mamx-bf16") > amx.index("-mno-avx2")
    assert all("-mamx-bf16" not in step.command for name, step in steps.items() if name != "a/b_amx.o")
    nvcc = steps["a/c.cu.o"].command
    assert nvcc[0] == "/cuda/bin/nvcc" and nvcc[nvcc.index("-ccbin") + 1] == "g++"
    assert [flag for flag in nvcc if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert "-Xcompiler=-Wall,-fPIC,-fvisibility=hidden" in nvcc and "--expt-relaxed-constexpr" in nvcc


def test_an_instruction_set_that_the_compiler_lacks_is_left_out():
    plan = dataclasses.replace(PLAN, compiler=Compiler(["g++"], LEVELS, ["avx512_bf16"]))
    steps = steps_of(plan)
    assert "a/b_amx.o" not in steps and "-DMINITRON_HAVE_AMX=1" not in steps["module.o"].command


def test_there_are_gates_for_every_arch():
    """An architecture that is built has gates for the machine code of every kernel, CUDA's and Triton's."""
    tests = Path(__file__).parent
    cuda, triton = (json.loads((tests / f"{kind}_artifacts.json").read_text()) for kind in ("cuda", "triton"))
    assert tuple(cuda["archs"]) == tools.CUDA_ARCHS
    for kernel, gates in triton.items():
        assert {f"sm_{arch}" for arch in tools.CUDA_ARCHS} <= set(gates), kernel


def test_without_cuda_nothing_of_it_is_compiled_or_linked():
    steps = steps_of(CPU_PLAN)
    assert "a/c.cu.o" not in steps
    assert not [flag for step in steps.values() for flag in step.command if "CUDA" in flag]
    link = compile.link_step(Path("/b/_C.so"), [Path("/b/x.o")], CPU_PLAN).command
    assert not [flag for flag in link if "cuda" in flag]


def test_link(monkeypatch):
    monkeypatch.setenv("LDFLAGS", "-Wl,-z,now -s")
    step = compile.link_step(Path("/b/_C.so"), [Path("/b/x.o"), Path("/b/y.o")], PLAN)
    line = " ".join(step.command)
    assert step.inputs == [Path("/b/x.o"), Path("/b/y.o")] and step.output == Path("/b/_C.so")
    assert (
        "-o /b/_C.so /b/x.o /b/y.o -L/site/torch/lib -ltorch_cpu -lc10 -L/cuda/lib64 -lcudart_static" in line
    )
    assert "-Wl,--exclude-libs,libcudart_static.a" in line and line.endswith("-Wl,-z,now -s")
    assert step.depfile is None and "rpath" not in line


def test_facts_of_the_build():
    text = compile.config_header(PLAN, "1.2.3", {"op": "12", "a/b.h": "34"})
    facts = dict(re.findall(r'#define MINITRON_BUILD_(\w+) "(.*)"', text))
    assert facts == {
        "VERSION": "1.2.3",
        "TORCH": "2.13.1",
        "INTERFACE": "op=12 a/b.h=34",
        "SIMD_COMPILED": " ".join(LEVELS),
        "CUDA_VERSION": "13.0",
        "CUDA_ARCHS": "sm_80 sm_90 compute_90",
        "CUDA_REASON": "",
    }
    odd = Plan(PLAN.compiler, PLAN.torch, no_cuda='no "nvcc" in C:\\x\nat all')
    assert r'CUDA_REASON "no \"nvcc\" in C:\\x at all"' in compile.config_header(odd, "1", {})
    assert 'CUDA_ARCHS ""' in compile.config_header(odd, "1", {})


def test_ninja_file_of_odd_paths():
    compiled = compile.Step(
        Path("/a b/$x.o"), [Path("/c:d/x.cpp")], ["cc", "-Dy=$z", "a b"], Path("/a b/$x.o.d")
    )
    linked = compile.Step(Path("/a b/_C.so"), [compiled.output], ["cc", "-shared"])
    lines = compile.ninja_file([compiled, linked], Path("/a b")).splitlines()
    assert "builddir = /a$ b" in lines
    assert "build /a$ b/$$x.o: compile /c$:d/x.cpp" in lines and "  command = cc '-Dy=$$z' 'a b'" in lines
    assert "build /a$ b/_C.so: link /a$ b/$$x.o" in lines and "  command = cc -shared" in lines
    rule = lines.index("rule compile")
    assert lines[rule + 1 : rule + 5] == [
        "  command = $command",
        "  description = compile $out",
        "  deps = gcc",
        "  depfile = $out.d",
    ]


@pytest.mark.parametrize("broken", [None, 0, 1, 2])
def test_without_ninja_all_commands_run_and_the_link_last(tmp_path, broken):
    def step(number):
        log = f"open({str(tmp_path / 'log')!r}, 'a').write('{number}')"
        code = f"import os, sys; assert os.path.isdir({str(tmp_path / str(number))!r}); {log}"
        command = [sys.executable, "-S", "-c", f"{code}; sys.exit({int(number == broken)})"]
        return compile.Step(tmp_path / str(number) / "out", [], command)

    assert compile.run_all([step(number) for number in range(3)]) == (broken is None)
    done = (tmp_path / "log").read_text()
    assert sorted(done) == (["0", "1", "2"] if broken in (None, 2) else ["0", "1"])
    assert broken not in (None, 2) or done[-1] == "2"


def test_how_many_compilers_run_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.setattr(compile, "find_ninja", lambda: "ninja")
    seen = []
    monkeypatch.setattr(compile, "run_ninja", lambda *given: seen.append(given) or True)
    compile.build_extension(ROOT, tmp_path, PLAN, "1.0")
    ((command, root, archs, jobs),) = seen
    assert command[-2:] == ["-j", "3"] and (root, archs, jobs) == (ROOT, CUDA.archs, 3)
    for text in ("0", "-1", "all"):
        monkeypatch.setenv("MAX_JOBS", text)
        with pytest.raises(SystemExit, match=f"MAX_JOBS must be a whole number from 1 on, got '{text}'"):
            compile.max_jobs()
    monkeypatch.setenv("MAX_JOBS", "")
    assert compile.max_jobs() == (os.cpu_count() or 1)


def test_an_unchanged_header_is_not_written(tmp_path):
    file = tmp_path / "x.h"
    compile._write_if_changed(file, "one")
    os.utime(file, (1, 1))
    compile._write_if_changed(file, "one")
    assert file.stat().st_mtime == 1
    compile._write_if_changed(file, "two")
    assert file.read_text() == "two"


NO_COMPILER, NO_CUDA = Absent("no compiler"), Absent("no toolkit")


@pytest.mark.parametrize(
    ("mode", "missing", "expected"),
    [
        ("python", "", Plan(no_native="it was built with MINITRON_BUILD=python")),
        ("auto", "", PLAN),
        ("cuda", "", PLAN),
        ("cpu", "", Plan(PLAN.compiler, PLAN.torch, no_cuda="it was built with MINITRON_BUILD=cpu")),
        ("auto", "compiler", Plan(no_native="no compiler", warn=True)),
        ("auto", "torch", "no torch >= 2.11 was found"),
        (
            "cpu",
            "compiler",
            "error: MINITRON_BUILD=cpu, but no compiler (MINITRON_BUILD=python needs neither)",
        ),
        ("cuda", "torch", "error: MINITRON_BUILD=cuda, but no torch >= 2.11 was found"),
        ("auto", "cuda", Plan(PLAN.compiler, PLAN.torch, no_cuda="no toolkit")),
        ("cuda", "cuda", "error: MINITRON_BUILD=cuda, but no toolkit"),
    ],
)
def test_plans(monkeypatch, mode, missing, expected):
    monkeypatch.setattr(
        tools, "find_compiler", lambda: NO_COMPILER if missing == "compiler" else PLAN.compiler
    )
    monkeypatch.setattr(tools, "find_torch", lambda: None if missing == "torch" else PLAN.torch)
    monkeypatch.setattr(tools, "find_cuda", lambda: NO_CUDA if missing == "cuda" else CUDA)
    plan = tools.make_plan(mode)
    if isinstance(expected, Plan):
        assert plan == expected
    else:
        assert expected in (plan.error or plan.no_native)
        assert bool(plan.error) == (mode != "auto") and plan.warn == (mode == "auto")


def test_modes(monkeypatch):
    assert tools.requested_mode() == "auto"
    for mode in ("auto", "python", "cpu", "cuda"):
        monkeypatch.setenv("MINITRON_BUILD", mode)
        assert tools.requested_mode() == mode
    monkeypatch.setenv("MINITRON_BUILD", "")
    assert tools.requested_mode() == "auto"


def test_what_is_asked_of_pip(monkeypatch):
    """torch only where there is none to compile against; nothing where nothing is compiled."""
    found = {"find_compiler": PLAN.compiler, "find_torch": PLAN.torch, "find_cuda": CUDA}
    for name in found:
        monkeypatch.setattr(tools, name, lambda name=name: found[name])
    assert hooks.get_requires_for_build_wheel() == hooks.get_requires_for_build_editable() == ["ninja"]
    found["find_torch"] = None
    assert hooks.get_requires_for_build_wheel() == ["ninja", "torch==2.11.0"]
    found["find_cuda"] = NO_CUDA
    assert hooks.get_requires_for_build_wheel() == ["ninja", "torch==2.11.0"]
    monkeypatch.setenv("MINITRON_BUILD", "cuda")
    with pytest.raises(SystemExit, match="MINITRON_BUILD=cuda, but no toolkit"):
        hooks.get_requires_for_build_wheel()
    found["find_compiler"] = NO_COMPILER
    assert hooks.get_requires_for_build_wheel() == []
    found["find_compiler"] = PLAN.compiler
    monkeypatch.setenv("MINITRON_BUILD", "python")
    assert hooks.get_requires_for_build_wheel() == []


def test_old_setuptools_is_named(monkeypatch):
    for call in (hooks.build_wheel, hooks.build_editable, hooks.prepare_metadata_for_build_wheel):
        monkeypatch.setattr(hooks.setuptools, "__version__", "76.9.1")
        with pytest.raises(SystemExit, match=r"needs setuptools >= 77, here is 76\.9\.1"):
            call("nowhere")
    monkeypatch.setattr(hooks.setuptools, "__version__", "77.0")
    hooks._check_setuptools()


@pytest.mark.parametrize(
    ("version", "headers", "found"),
    [
        ("2.13.0+cpu", True, True),
        ("2.9.1", True, False),
        ("2.10.9", True, False),
        ("2.11.0+cu130", True, True),
        ("3.0.0", True, True),
        ("2.20.0a0+git1", True, True),
        ("2.13.0", False, False),
    ],
)
def test_torch_to_compile_against(monkeypatch, tmp_path, version, headers, found):
    """The first that is new enough and has the headers of the stable ABI; it is not imported."""
    for folder in ("without", "with"):
        (tmp_path / folder).mkdir()
    torch_folder = tmp_path / "with/torch"
    header = torch_folder / "include/torch/csrc/stable/tensor.h"
    header.parent.mkdir(parents=True)
    header.touch() if headers else None
    (torch_folder / "version.py").write_text(f"__version__ = '{version}'\nraise ImportError\n")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "without"), str(tmp_path / "with")])
    monkeypatch.setattr(tools.sysconfig, "get_path", lambda *_, **__: str(tmp_path / "without"))
    monkeypatch.setattr(tools.site, "getusersitepackages", lambda: str(tmp_path / "without"))
    assert tools.find_torch() == (Torch(torch_folder, version) if found else None)


def test_compilers(monkeypatch, tmp_path):
    """$CXX with its options; what it does not compile, by its own words; the SIMD levels that it knows."""
    monkeypatch.setattr(tools.platform, "machine", lambda: "x86_64")
    cc = script(tmp_path / "cc", 'case "$*" in *avx512f*) echo "no such -m" >&2; exit 1;; esac')
    monkeypatch.setenv("CXX", f"{cc} -x1")
    assert tools.find_compiler() == Compiler(
        [str(cc), "-x1"], [level for level in LEVELS if level != "avx512"], []
    )
    script(cc, 'case "$*" in *amx-bf16*" -c "*) echo "no such instruction" >&2; exit 1;; esac')  # assembler's
    assert tools.find_compiler() == Compiler([str(cc), "-x1"], LEVELS, ["avx512_bf16"])
    monkeypatch.setattr(tools.platform, "machine", lambda: "aarch64")
    assert tools.find_compiler() == Compiler([str(cc), "-x1"], ["baseline"])
    script(cc, 'echo; echo "first words" >&2; echo more >&2; exit 1')
    assert "does not compile C++20 (first words): install g++ 11" in tools.find_compiler().why
    script(cc, "exit 3")
    assert "(it fails)" in tools.find_compiler().why
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert f"no C++ compiler was found ({tmp_path / 'nothing'})" in tools.find_compiler().why
    monkeypatch.setenv("CXX", str(cc))
    monkeypatch.setattr(tools.sysconfig, "get_path", lambda *_, **__: str(tmp_path))
    assert "Python.h was not found" in tools.find_compiler().why


def test_ninja_beside_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    assert tools.find_ninja() is None
    ninja = script(tmp_path / "bin/ninja", "")
    assert tools.find_ninja() == str(ninja)


# ---- what the package says of what was built


def test_an_extension_that_does_not_load_is_no_extension(monkeypatch, tmp_path):
    (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no shared object")
    monkeypatch.setattr(_native, "_folders", lambda: [str(tmp_path)])
    module, reason = _native._load()
    assert module is None and reason.startswith(f"{tmp_path}/_C")
    assert f"does not load under torch {torch.__version__}: " in reason


def test_python_and_the_sources_agree():
    """The table in _native.py is that of csrc/. Where it is not, this says what belongs there."""
    found = of_sources.interface(ROOT / "csrc")
    lines = "".join(f'    "{name}": "{digest}",\n' for name, digest in found.items())
    assert found == _native.INTERFACE, f"INTERFACE of _native.py must be {{\n{lines}}}"


@pytest.mark.native
def test_the_sources_are_read_as_torch_reads_them():
    """Every op that the extension registered, by the same arguments."""
    registered = {
        str(schema).partition("::")[2]
        for name in _native.INTERFACE
        for schema in torch._C._jit_get_schemas_for_operator(f"minitron_kernels::{name}")
    }
    read = [torch._C.parse_schema(f"minitron_kernels::{x}") for x in of_sources.schemas(ROOT / "csrc")]
    assert registered == {str(schema).partition("::")[2] for schema in read}
    assert len(registered) == len(_native.INTERFACE) - len(of_sources.NUMBERS)


def test_the_digests(tmp_path):
    """Comments and spaces do not count, all else does."""
    (tmp_path / "kl_loss/cpu").mkdir(parents=True)
    source = (
        'm.def(\n  "f(Tensor x, "  \n "int n) -> ()"); m.def("g() -> int"); module.def("h() -> int", &h);\n'
    )
    (tmp_path / "a.cu").write_text(source)
    header = tmp_path / of_sources.NUMBERS[0]
    header.write_text("enum { kA, kB };  // a comment\n")
    before = of_sources.interface(tmp_path)
    assert list(before) == ["f", "g", of_sources.NUMBERS[0]]
    assert of_sources.schemas(tmp_path) == ["f(Tensor x, int n) -> ()", "g() -> int"]
    header.write_text("// another\nenum {kA, kB};\n")
    (tmp_path / "a.cu").write_text(source.replace("  ", " "))
    assert of_sources.interface(tmp_path) == before
    header.write_text("enum { kB, kA };\n")
    (tmp_path / "a.cu").write_text(source.replace("int n", "int m"))
    after = of_sources.interface(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"f", of_sources.NUMBERS[0]}


def an_extension(folder, interface):
    """Stands in for one: with an interface, or from before there was such a thing."""
    of_it = "" if interface is None else f"def interface():\n    return {interface!r}\n"
    (folder / "_C.py").write_text(f"def build_info():\n    return {{}}\n{of_it}")


AGES = {
    "before there were digests": (None, "is older than", []),
    "older": ({"importance_add_": None}, "is older than", ["it lacks importance_add_"]),
    "newer": ({"new_": "00000000"}, "is newer than", ["Python does not know new_"]),
    "other arguments": (
        {"kl_loss_forward": "0"},
        "is of another version than",
        ["differ on kl_loss_forward"],
    ),
    "other numbers": ({"kl_loss/loss_options.h": "0"}, "is of another", ["differ on kl_loss/loss_options.h"]),
    "both": (
        {"new_": "0", "importance_add_": None, "bf16_engine": "0"},
        "is of another version than",
        ["it lacks importance_add_", "Python does not know new_", "they differ on bf16_engine"],
    ),
}


@pytest.mark.parametrize("checkout", [True, False])
@pytest.mark.parametrize("age", AGES)
def test_an_extension_of_other_sources_is_not_used(monkeypatch, tmp_path, age, checkout):
    changes, which, differences = AGES[age]
    found = None if changes is None else {k: v for k, v in (_native.INTERFACE | changes).items() if v}
    an_extension(tmp_path, found)
    monkeypatch.setattr(_native, "_folders", lambda: [str(tmp_path)])
    monkeypatch.setattr(_native, "_IS_CHECKOUT", checkout)
    with pytest.warns(RuntimeWarning, match="minitron_kernels has to do without C\\+\\+: ") as warned:
        module, reason = _native._load()
    assert module is None and reason in str(warned[0].message)
    assert reason.startswith(f"{tmp_path}/_C.py {which}")
    assert all(words in reason for words in differences) and ("(" in reason.split(": ")[0]) == bool(
        differences
    )
    remedy = (
        f"pip install . (or -e .) in {_native._HERE.parent} builds it anew"
        if checkout
        else "--force-reinstall"
    )
    assert remedy in reason


def test_the_package_goes_on_without_a_stale_extension(tmp_path):
    """As it is imported and reports: an op that the extension lacks does not stop it."""
    folder, parts = tmp_path / "minitron_kernels", ("ops", "*.py")
    for path in (path for part in parts for path in (ROOT / "minitron_kernels").glob(part)):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        folder.mkdir(exist_ok=True)
        copy(path, folder / path.name)
    an_extension(folder, {k: v for k, v in _native.INTERFACE.items() if k != "importance_add_"})
    code = """import torch, minitron_kernels as mk
print(mk.accumulate_importance_(mk.ImportanceState(3), torch.ones(1, 2, 3)).scores().tolist())"""
    for command, expected in (
        (["-c", code], "[1.0, 1.0, 1.0]"),
        (["-m", "minitron_kernels"], "not loaded: "),
    ):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
        assert "RuntimeWarning" in done.stderr and "it lacks importance_add_" in done.stderr
    assert f"not loaded: {folder}/_C.py is older than" in done.stdout and "--force-reinstall" in done.stdout


@pytest.mark.native
def test_the_report_names_sources_that_are_newer(monkeypatch, tmp_path):
    extension, source = tmp_path / "_C.so", tmp_path / "csrc/a/b.cpp"
    source.parent.mkdir(parents=True)
    extension.touch(), source.touch()
    monkeypatch.setattr(_native, "location", lambda: str(extension))
    monkeypatch.setattr(report, "__file__", str(tmp_path / "minitron_kernels/_report.py"))
    for age, expected in ((0, f"{extension}"), (60, f"{extension}, older than {source}: pip install")):
        os.utime(source, (1e9 + age, 1e9 + age)), os.utime(extension, (1e9, 1e9))
        assert dict(report.facts())["extension"].startswith(expected)
        assert ("older" in dict(report.facts())["extension"]) == (age > 0)


def test_why_nothing_was_built(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "_folders", lambda: [str(tmp_path)])
    for checkout, expected in ((True, "nothing has been built from"), (False, "there is no _C in")):
        monkeypatch.setattr(_native, "_IS_CHECKOUT", checkout)
        module, reason = _native._load()
        assert module is None and reason.startswith(expected)
    (tmp_path / "_not_built.txt").write_text("no compiler\n")
    assert _native._load() == (None, "minitron_kernels was installed without C++: no compiler")


def test_the_report(monkeypatch):
    """Every verdict is that of pick(); a device that is absent is said to be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = [re.split(r"  +", line.strip()) for line in report.report().splitlines()]
    for op in _backend.OPS:
        for backend in _backend.BACKENDS:
            for device in ("cpu", "cuda"):
                reason = _backend.why_not(op, backend, torch.device(device))
                there = "yes" if device == "cpu" else "no: there is no cuda device here"
                assert [op, backend, device, f"no: {reason}" if reason else there] in lines
        on_cuda = _backend.pick(op, torch.device("cuda"), "auto")
        on_cpu = _backend.pick(op, torch.device("cpu"), "auto")
        assert [op, on_cpu, f"{on_cuda} (no such device here)"] in lines
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "build_info", dict)
    monkeypatch.setattr(_native, "reason", lambda: "of the weather")
    assert ("extension", "not loaded: of the weather") in report.facts()
