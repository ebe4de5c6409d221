"""benchmarks/on_gpu.sh with commands that stand in for Python: the order of its steps, that one which fails
or hangs does not stop the next, that nothing outlives its limit; and that the GPU's tests are collected
without the packages that such a machine does not have.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/on_gpu.sh"
if not SCRIPT.is_file():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)
if missing := [tool for tool in ("bash", "timeout") if shutil.which(tool) is None]:
    pytest.skip(f"needs {missing[0]}", allow_module_level=True)

STEPS = [
    "facts",
    "install",
    "install_python",
    "self",
    "kl_xl",
    "parts_kl",
    "parts_gemm",
    "kl_triton",
    "tests",
    "parts_memory",
    "tests_largest",
    "tests_compiled",
    "kl_more",
    "importance",
    "gather",
    "sanitizer",
    "ncu",
    "kl_peers",
    "kl_errors",
]

# Writes its arguments down. Hangs or fails where they match; if it hangs, with a child, it ignores SIGTERM,
# or only a child that it leaves behind does.
FAKE_PYTHON = r"""#!/usr/bin/env bash
arguments="$*"
line="MINITRON_BUILD=${MINITRON_BUILD:-} ARCHS=${MINITRON_CUDA_ARCHS:-} ${arguments//$'\n'/ }"
echo "$line" >> "$FAKE/calls"
echo "output of $arguments"
[[ -n ${FAKE_FAIL:-} && $arguments =~ $FAKE_FAIL ]] && exit 3
[[ -n ${FAKE_NO_GPU:-} && $arguments == *is_available* ]] && exit 9
if [[ -n ${FAKE_HANG:-} && $arguments =~ $FAKE_HANG ]]; then
  trap '' TERM
  sleep 300 &
  echo "$!" >> "$FAKE/children"
  while true; do wait; done
fi
if [[ -n ${FAKE_LEAVES:-} && $arguments =~ $FAKE_LEAVES ]]; then
  (trap '' TERM && exec sleep 300) &
  echo "$!" >> "$FAKE/children"
  wait
fi
[[ $arguments == *get_device_capability* ]] && echo 90
if [[ $arguments =~ pip\ .*--target\ ([^ ]+) ]]; then
  mkdir -p "${BASH_REMATCH[1]}/minitron_kernels"
  echo "${FAKE_INSTALLS:-version = 2}" > "${BASH_REMATCH[1]}/minitron_kernels/__init__.py"
fi
exit 0
"""


FAILING = ("install", "kl_xl", "kl_errors")  # the first, since it installs other files than the checkout's


@pytest.fixture
def run(tmp_path):
    """Starts the script with arguments and settings; returns its steps once it has ended."""
    fake = tmp_path / "fake"
    fake.mkdir()
    python = fake / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    for tool in ("nvidia-smi", "compute-sanitizer", "ncu"):
        (fake / tool).write_text('#!/bin/sh\necho "$@"\n')
        (fake / tool).chmod(0o755)
    started = []

    def start(*arguments, script=SCRIPT, wait=True, **settings):
        env = os.environ | {"PATH": f"{fake}:{os.environ['PATH']}", "FAKE": str(fake), "PYTHON": str(python)}
        env |= {"MINITRON_ON_GPU_GRACE": "1", "TMPDIR": str(tmp_path / "tmp")} | settings
        (tmp_path / "tmp").mkdir(exist_ok=True)
        command = ["bash", str(script), str(tmp_path / "out"), *arguments]
        # what ignores SIGINT when it begins, as jobs in the background do, cannot catch it
        process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        if not wait:
            return process
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
        return steps(tmp_path / "out")

    yield start
    for process in started:
        process.kill()


def steps(out):
    with (out / "steps.tsv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}


def calls(tmp_path):
    return (tmp_path / "fake/calls").read_text().splitlines()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(tmp_path):
    file = tmp_path / "fake/children"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_every_step_is_started_in_order(run, tmp_path):
    """Steps that fail and two that hang do not stop the next; what hangs is stopped, and its children too."""
    settings = {"FAKE_HANG": "parts.py.*gemm", "FAKE_LEAVES": "gather.py", "MINITRON_ON_GPU_LIMIT": "2"}
    got = run(FAKE_FAIL="kl_loss.py.*naive-float", **settings)
    assert list(got) == STEPS
    for name, row in got.items():
        hung = name in ("parts_gemm", "gather")
        wanted = "stopped after 2 s" if hung else "failed" if name in FAILING else "ok"
        if name != "install_python":
            assert row["note"] == wanted, (name, row)
        assert int(row["seconds"]) <= 2 + 1 + 2
        log = tmp_path / "out" / f"{row['step']}_{name}.log"
        assert log.read_text().startswith("$ ")
    assert len(children(tmp_path)) == 2 and not any(map(alive, children(tmp_path)))
    xl = next(line for line in calls(tmp_path) if "kl_xl.json" in line)
    assert "--device cuda" in xl and "--shape XL" in xl and "--impl native-store naive" in xl
    tests = [line for line in calls(tmp_path) if "-m pytest" in line]
    assert "gpu and (not largest and not compiled)" in tests[0] and "-n " in tests[0]
    assert "gpu and (largest)" in tests[1] and "-n " not in tests[1]
    assert all(
        f"tests/{op}/test_gpu.py" in line for op in ("kl_loss", "importance", "gather") for line in tests
    )
    summary = (tmp_path / "out/summary.txt").read_text()
    assert "stopped after 2 s" in summary and "output of" in summary
    assert list((tmp_path / "tmp").iterdir()) == []


def test_without_a_gpu_nothing_is_started(run, tmp_path):
    """One line says how to try it on a CPU; there --device cpu asks for none."""
    process = run(wait=False, FAKE_NO_GPU="1")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and text.count("\n") == 1, text
    assert "no GPU here" in text and "--device cpu --quick" in text
    assert not (tmp_path / "out").exists() and len(calls(tmp_path)) == 1
    assert run("--device", "cpu", "--quick", "--only", "self", FAKE_NO_GPU="1")["self"]["note"] == "ok"


def test_all_steps_together_are_bounded(run):
    """The first step takes all the time there is: the others are written down as not started."""
    begin = time.monotonic()
    got = run("--no-install", FAKE_HANG="-$", MINITRON_ON_GPU_SECONDS="9")
    assert time.monotonic() - begin < 9 + 2
    assert got["facts"]["note"].startswith("stopped after")
    notes = {row["note"] for name, row in got.items() if name != "facts"}
    assert notes == {"not started: no time left"} and set(got) == set(STEPS[:1] + STEPS[3:])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_is_stopped_leaves_what_it_has(run, tmp_path, number):
    process = run("--no-install", wait=False, FAKE_HANG="parts.py.*kl")
    deadline = time.monotonic() + 60
    while not children(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    got = steps(tmp_path / "out")
    assert got["kl_xl"]["note"] == "ok" and got["parts_kl"]["note"] == "this script was stopped"
    assert "this script was stopped" in (tmp_path / "out/summary.txt").read_text()
    time.sleep(0.2)
    assert children(tmp_path) and not any(map(alive, children(tmp_path)))


def test_some_steps(run):
    assert list(run("--no-install", "--only", "self", "gather")) == ["self", "gather"]


def test_tools_that_are_absent_are_said(run, tmp_path):
    for tool in ("compute-sanitizer", "ncu"):
        (tmp_path / "fake" / tool).unlink()
    if shutil.which("ncu") or shutil.which("compute-sanitizer"):
        pytest.skip("this machine has them")
    got = run("--no-install", "--only", "sanitizer", "ncu")
    assert [row["note"] for row in got.values()] == [
        "left out: no compute-sanitizer here",
        "left out: no ncu here",
    ]


@pytest.mark.parametrize("arguments", [[], ["OUT", "--device", "tpu"], ["OUT", "--devise", "cpu"]])
def test_wrong_arguments(arguments):
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a wheel beside it."""
    root = tmp_path / "checkout"
    (root / "benchmarks").mkdir(parents=True)
    (root / "minitron_kernels").mkdir()
    (root / "dist").mkdir()
    (root / "dist/minitron_kernels-1-py3-none-any.whl").touch()
    (root / "minitron_kernels/__init__.py").write_text("version = 2\n")
    return Path(shutil.copy(SCRIPT, root / "benchmarks")), tmp_path / "site"


def test_a_wheel_is_installed_beside_the_image(run, tmp_path, checkout):
    """And once only, where the folder for it is kept."""
    script, site = checkout
    for _ in range(2):
        got = run("--only", "self", script=script, MINITRON_ON_GPU_SITE=str(site))
        assert got["install"]["note"] == "ok"
        (pip,) = [line for line in calls(tmp_path) if "-m pip" in line]
        assert (
            "--no-index" in pip and "--no-deps" in pip and f"--target {site}" in pip and pip.endswith(".whl")
        )


@pytest.mark.parametrize(
    ("listed", "arch"), [("75 80 89 90 100", 90), ("75 80 86", 86), ("100", 90), ("", 90)]
)
def test_a_compiler_that_does_not_know_the_gpu_builds_for_an_older_one(run, tmp_path, checkout, listed, arch):
    """Its PTX serves a newer GPU."""
    script, site = checkout
    lines = "".join(f"echo compute_{number}; " for number in listed.split())
    nvcc = tmp_path / "fake/nvcc"
    nvcc.write_text(f"#!/bin/sh\n{lines or 'exit 1'}\n")
    nvcc.chmod(0o755)
    run("--only", "self", script=script, MINITRON_ON_GPU_SITE=str(site), FAKE_FAIL=r"\.whl")
    (built,) = [line for line in calls(tmp_path) if "--no-build-isolation" in line]
    assert built.startswith(f"MINITRON_BUILD=cuda ARCHS={arch} ")


@pytest.mark.parametrize("wrong", ["cannot be installed", "other files", "nor CUDA"])
def test_without_a_wheel_that_serves_it_is_built(run, tmp_path, checkout, wrong):
    """For this GPU's architecture; without its kernels where these cannot be compiled."""
    script, site = checkout
    settings = {
        "cannot be installed": {"FAKE_FAIL": r"\.whl"},
        "other files": {"FAKE_INSTALLS": "version = 1"},
        "nor CUDA": {"FAKE_FAIL": r"\.whl|no-build-isolation"},
    }[wrong]
    got = run("--only", "self", script=script, MINITRON_ON_GPU_SITE=str(site), **settings)
    assert got["self"]["note"] == "ok"  # whatever came before it
    built = [line for line in calls(tmp_path) if "--no-build-isolation" in line]
    assert built[0].startswith("MINITRON_BUILD=cuda ARCHS=90 ") and built[0].endswith(str(script.parents[1]))
    assert len(built) == (2 if wrong == "nor CUDA" else 1)
    if wrong == "nor CUDA":
        assert built[1].startswith("MINITRON_BUILD=python ") and got["install"]["note"] == "failed"
    else:
        assert got["install_python"]["note"] == "left out: something is installed"
    log = (tmp_path / "out/02_install.log").read_text()
    assert ("it is not of this checkout" in log) == (wrong == "other files")


SLOW = """
import time
from pathlib import Path

def test_wrong():
    assert "what was found" == "what was wanted"

def test_slow():
    Path({began!r}).touch()
    time.sleep(300)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_tests_that_are_stopped_say_what_failed(tmp_path, workers):
    """As gpu_tests runs them, by `timeout`: with a traceback of what went wrong before."""
    if workers:
        pytest.importorskip("xdist")
    began = tmp_path / "began"
    (tmp_path / "test_slow.py").write_text(SLOW.format(began=str(began)))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    # the lines of gpu_tests that start pytest
    lines = SCRIPT.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("  trap : TERM"))
    start = lines[first : first + 2]
    assert '-m pytest "${options[@]}" "${files[@]}"' in start[1]
    options = f"-q -rfE -p conftest -p no:cacheprovider {f'-n {workers}' * bool(workers)}"
    setup = f"root={tmp_path} python={sys.executable} options=({options}) files=(test_slow.py)"
    command = "\n".join((setup, *start, "exit $?"))
    process = subprocess.Popen(
        ["timeout", "--kill-after=20", "300", "bash", "-c", command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not began.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # the other worker's failure is on its way
        process.terminate()  # passed on, as where the time is up
        text, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "what was wanted" in text and "FAILED test_slow.py::test_wrong" in text, text[-3000:]
    assert process.returncode != -signal.SIGKILL


BLOCKED = [
    "accelerate",
    "gguf",
    "hypothesis",
    "liger_kernel",
    "matplotlib",
    "peft",
    "pytest_benchmark",
    "torchtune",
    "tqdm",
    "transformers",
    "trl",
    "ttsem",
]
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}} on this machine", name=name)

sys.meta_path.insert(0, Blocker())
"""


def test_tests_of_the_gpu_are_collected_where_there_is_little_more_than_torch(run, tmp_path):
    """All of them but those that other steps run, and no errors."""
    pytest.importorskip("triton", reason="triton is not installed")
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(names=set(BLOCKED)))
    settings = {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    row = run("--no-install", "--device", "cpu", "--only", "tests", **settings)["tests"]
    text = (tmp_path / f"out/{row['step']}_tests.log").read_text()
    assert row["note"] == "ok" and "error" not in text.lower(), text[-2000:]
    for op in ("kl_loss", "importance", "gather"):
        assert f"tests/{op}/test_gpu.py::" in text
    (last,) = [line for line in text.splitlines() if "tests collected" in line]
    collected, of = last.split()[0].split("/")
    assert int(of) > int(collected) > 100
    tests = [line.split("::")[1] for line in text.splitlines() if "::" in line]
    assert not [name for name in tests if "2_to_the_31" in name or "compiled" in name]
