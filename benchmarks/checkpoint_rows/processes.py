"""A process for each row of the benchmark, which answers one call after another: it imports only once."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from common.harness import WorkerError, worker_environment

_processes: dict[tuple[str, int], tuple[subprocess.Popen[str], IO[str]]] = {}


def run_worker(script: Path, spec: dict[str, Any], *, threads: int) -> dict[str, Any]:
    """Has the process of this row and number of threads do one call; starts it at the first one.

    Raises:
        WorkerError: the process ended; the message is the last line that it said.
    """
    key = (spec["work"], threads)
    if key not in _processes:
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=worker_environment(threads),
        )
        _processes[key] = process, said
    process, said = _processes[key]
    assert process.stdin and process.stdout
    try:
        print(json.dumps(spec), file=process.stdin, flush=True)
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if line:
        return json.loads(line)
    status = process.wait()
    del _processes[key]
    said.seek(0)
    lines = [line for line in said.read().splitlines() if line.strip()]
    raise WorkerError(lines[-1].strip() if lines else f"exit status {status}")
