"""The Triton kernels on the CPU: _triton_cases.py, written for device="cuda", under ttsem.

ttsem runs Triton's real frontend with true bf16, and reports accesses out of bounds, races between programs
and reads of memory that was never written.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("_triton_cases.py")
MISSING = [name for name in ("triton", "ttsem") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: see CONTRIBUTING.md")
def test_kernels_under_ttsem():
    run = subprocess.run(
        [sys.executable, "-m", "ttsem.sanitize", "pytest", "-q", "--no-header", str(CASES)],
        cwd=CASES.parent.parent,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 50, run.stdout[-2000:]
