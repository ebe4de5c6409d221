"""What a build says while it compiles, with a script that stands in for ninja. No build."""

import io
import sys
from pathlib import Path

import pytest

from tools.toolchains import script

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "build_backend").is_dir():  # an sdist has it; an installed copy has not
    pytest.skip("no build_backend folder here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from build_backend import compile, progress  # noqa: E402

sys.path.remove(str(ROOT))

OUTPUTS = ["/b/csrc/a b.o", "/b/csrc/c.avx2.o", "/b/csrc/d.cu.o", "/b/csrc/e.cu.o", "/b/_C.so"]


def test_how_many_files_and_how_long(capsys):
    progress.Progress(OUTPUTS, (80, 90), 2).begin()
    said = capsys.readouterr().out
    # 2 files of 3 s, 2 of 2 x 45 s, two at once
    assert said.startswith(
        "minitron-kernels: compiling 2 C++ and 2 CUDA files, these for sm_80, sm_90, 2 at once: "
    )
    assert "about 2 minutes (MAX_JOBS sets how many at once, MINITRON_BUILD=cpu leaves CUDA out)\n" in said
    progress.Progress(OUTPUTS[:1], (), 8).begin()
    assert "compiling 1 C++ file, 8 at once: about 1 minute (MAX_JOBS sets" in capsys.readouterr().out
    # no more than one file is left: no number of cores makes it faster
    progress.Progress([f"{n}.cu.o" for n in range(9)], (80, 90, 100), 64).begin()
    assert "about 3 minutes" in capsys.readouterr().out
    progress.Progress(OUTPUTS[-1:], (), 8).begin()
    assert capsys.readouterr().out == ""


def test_each_cuda_file_is_counted_in_the_terminal_too(capsys):
    screen = io.StringIO()
    said = progress.Progress(OUTPUTS, (90,), 2, screen)
    said.begin()
    for output in (OUTPUTS[0], OUTPUTS[2], OUTPUTS[2], OUTPUTS[3]):
        said.finished(output)
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2][:20] for line in printed[1:]] == [
        "1 of 2 CUDA files, a",
        "2 of 2 CUDA files, a",
    ]
    # behind pip's spinner in a line of its own, later in its place
    assert screen.getvalue() == "\n" + "\n\r".join(printed) + "\n"
    without = io.StringIO()
    said = progress.Progress(OUTPUTS[:2], (), 2, without)
    said.begin()
    said.finished(OUTPUTS[0])
    assert without.getvalue() == ""  # two minutes, which need no words


def test_a_terminal_that_is_gone_stops_nothing(capsys):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    progress.Progress(OUTPUTS, (90,), 2, Gone()).begin()
    assert "2 CUDA files" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_terminal_that_goes_while_it_compiles_stops_nothing(monkeypatch, capsys):
    """What could not be written is written once more when it is closed."""
    full = Path("/dev/full").open
    monkeypatch.setattr(progress, "open", lambda name, mode: full(mode), raising=False)
    with progress.terminal() as screen:
        progress.Progress(OUTPUTS, (90,), 2, screen).begin()
    assert screen.closed and "2 CUDA files" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 1])
def test_ninja_is_followed(tmp_path, capfd, monkeypatch, code):
    lines = "\n".join(f'echo "[{n}/3, 0.1 s] compile {name}"' for n, name in enumerate(OUTPUTS[1:4], 1))
    ninja = script(
        tmp_path / "ninja",
        f'case "$*" in *-n) {lines.splitlines()[0]}; {lines.splitlines()[1]}; exit 0;; esac\n'
        f'echo "status $NINJA_STATUS"\n{lines}\necho "a warning" >&2\nexit {code}\n',
    )
    screen = io.StringIO()

    class Screen:
        def __enter__(self):
            return screen

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(progress, "terminal", Screen)
    assert progress.run_ninja([str(ninja), "-j", "2"], tmp_path, (90,), 2) == (code == 0)
    out = capfd.readouterr().out
    assert "compiling 1 C++ and 1 CUDA files" in out and "status [%f/%t, %e s] " in out
    assert "a warning" in out and "1 of 1 CUDA files, after 0:00 min" in out
    assert "1 of 1 CUDA files" in screen.getvalue()


def test_without_ninja_it_is_said_too(tmp_path, capfd):
    steps = [
        compile.Step(tmp_path / name, [], [sys.executable, "-S", "-c", "pass"])
        for name in ("a.o", "b.cu.o", "c")
    ]
    assert compile.run_all(steps, (90,))
    out = capfd.readouterr().out
    assert "compiling 1 C++ and 1 CUDA files" in out and "1 of 1 CUDA files" in out


def test_where_there_is_no_terminal(monkeypatch):
    asked = []

    def no_such_device(name, mode):
        asked.append(name)
        raise OSError(6, "No such device or address", name)

    monkeypatch.setattr(progress, "open", no_such_device, raising=False)
    for output, looked_for in ((io.StringIO(), ["/dev/tty"]), (Terminal(), [])):
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            with progress.terminal() as screen:
                assert screen is None and asked == looked_for


class Terminal(io.StringIO):
    def isatty(self):
        return True
