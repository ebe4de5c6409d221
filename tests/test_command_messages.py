"""What the commands print, where standard output is closed or its disk is full; numbers out of all bounds."""

import argparse
import errno
import os
import subprocess
import sys

import pytest

from minitron_kernels import __main__ as report
from minitron_kernels import __version__
from minitron_kernels._command.messages import message_of
from minitron_kernels._command.values import MOST_SEED, at_least, byte_count, count
from minitron_kernels._files import full_disk

SHOW = "from minitron_kernels._command.messages import message_of, show\n"


def python(code, **more):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment, **more
    )


def test_a_reader_that_has_seen_enough():
    reading, writing = os.pipe()
    os.close(reading)
    done = python(f"{SHOW}show('x' * 100)\nraise SystemExit(5)", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output():
    code = f"{SHOW}try: show('x')\nexcept OSError as error: raise SystemExit(message_of(error))"
    with open("/dev/full", "w") as full:
        done = python(code, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "standard output: cannot be written to (No space left on device)\n"


def test_what_to_do_follows_the_words_of_the_system():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b")
    assert message_of(full) == "a/b: No space left on device: free some space, or take another disk"
    assert message_of(IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "a")).endswith(
        "not a folder"
    )
    assert message_of(OSError(errno.ENOSPC, "needs 5 GB", "a")) == "a: needs 5 GB"
    assert message_of(MemoryError()) == "there is not enough memory"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EACCES, "x"), False),
        (ValueError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("out of memory"), False),
    ],
)
def test_a_full_disk_is_known_by_what_libraries_say(tmp_path, error, full):
    assert bool(full_disk(error, tmp_path)) == full
    other = KeyError("x")
    other.__context__ = error
    assert bool(full_disk(other, tmp_path)) == full


@pytest.mark.parametrize(
    "text", ["0", "-1", "nan", "inf", "1e400", "infGB", "nanMB", "1e300GB", "9" * 30, "x"]
)
def test_amounts_out_of_bounds(text):
    """Each is a ValueError, which argparse makes a line of; an OverflowError would be a traceback."""
    with pytest.raises(ValueError):
        count(text)
    with pytest.raises(ValueError):
        byte_count(text)


def test_whole_numbers_out_of_bounds():
    assert at_least(2)("2") == 2 and at_least(0, MOST_SEED)(str(MOST_SEED)) == MOST_SEED
    for parse, text, said in (
        (at_least(2), "1", "from 2 on, got '1'"),
        (at_least(2), "1.5", "from 2 on"),
        (at_least(2), "9" * 30, f"from 2 to {2**53}"),
        (at_least(0, MOST_SEED), str(MOST_SEED + 1), "from 0 to 4294967295"),
        (at_least(0, MOST_SEED), "-1", "from 0 to 4294967295"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            parse(text)


def test_the_report_takes_no_nonsense(capsys, monkeypatch):
    for arguments, code in ((["nonsense"], 2), (["--nonsense"], 2), (["--version"], 0), (["--help"], 0)):
        with pytest.raises(SystemExit) as caught:
            report.main(arguments)
        out, err = capsys.readouterr()
        assert caught.value.code == code and bool(err) == bool(code)
        assert arguments != ["--version"] or out == f"minitron_kernels {__version__}\n"
    for error, code, said in (
        (KeyboardInterrupt(), 130, ": interrupted\n"),
        (OSError("a\nb"), 1, "OSError: a b\n"),
    ):

        def fail(error=error):
            raise error

        monkeypatch.setattr("minitron_kernels._report.report", fail)
        assert report.main([]) == code
        assert capsys.readouterr().err.endswith(said)
