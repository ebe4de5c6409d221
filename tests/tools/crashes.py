"""Children of this process that may be killed, and runs of a module that kills its own."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

from tools.ranks import environment


def in_child(work):
    """Runs `work` in a fork; its process id."""
    pid = os.fork()
    if pid == 0:
        os.fsync = lambda fd: None  # what a process wrote outlives it; 5 ms for each would outlive patience
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def ended(pid):
    """How a child ended: its exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def found_by(module, *arguments):
    """What `python -m module arguments` prints as JSON, with nothing in it that is "wrong"."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment(),
        cwd=Path(__file__).parents[1],  # -m looks there first: not in the checkout, whose package may lack _C
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [], found
    return found
