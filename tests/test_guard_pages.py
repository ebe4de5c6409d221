"""No CPU op reads or writes a byte beyond its operands, results and workspace: these end, or begin, at pages
without access, in a process of its own (tools/guarded_calls.py).
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.ranks import environment

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's mmap flags"),
]


def run(what):
    """(how it ended, the name of the last call, what it said at the end)."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tools.guarded_calls", what],
        env=environment(),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = done.stdout.splitlines()
    names = [line for line in lines if not line.startswith("#")]
    return done.returncode, names, lines[-1] if lines else "", done.stderr[-3000:]


def test_nothing_beyond_is_touched():
    status, names, end, errors = run("all")
    assert status == 0, f"{names[-1] if names else 'nothing'} ended with {status}: {errors}"
    assert end == "# all calls came back" and len(names) > 500


@pytest.mark.skipif(not hasattr(os, "waitstatus_to_exitcode"), reason="needs signals")
def test_one_element_beyond_is_seen():
    """An op that is given less memory than it is said to have."""
    status, names, end, _ = run("beyond")
    assert status == -signal.SIGSEGV and names[-1].endswith(": one beyond")
    assert end == "# all that there is was read"
