"""What a build says while it compiles: nvcc takes minutes.

pip shows what a build prints only with -v. So where CUDA is compiled the same lines go to the terminal too,
if there is one.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

# of one core, measured on a Xeon of 2024: a .cu file for each architecture, another source file
NVCC_SECONDS, HOST_SECONDS = 45.0, 3.0
_STATUS = "[%f/%t, %e s] "  # before each line of ninja: how many are done, and when
_FINISHED = re.compile(r"^\[[^\]]*\] \w+ (.+)$")  # that line, with the file that was made


class Progress:
    """Lines about a build.

    Args:
        outputs: the files that will be made.
        archs: architectures that each .cu is compiled for; none without CUDA.
        jobs: compilers at once.
        terminal: which also gets the lines; None: standard output alone.
    """

    def __init__(
        self, outputs: Sequence[str], archs: Sequence[int], jobs: int, terminal: TextIO | None = None
    ) -> None:
        self._cuda = {output for output in outputs if output.endswith(".cu.o")}
        self._host = sum(output.endswith(".o") for output in outputs) - len(self._cuda)
        self._archs, self._jobs, self._terminal = archs, jobs, terminal
        self._total, self._begin, self._lines = len(self._cuda), time.monotonic(), 0

    def begin(self) -> None:
        """Says what is compiled, and about how long that takes."""
        if not self._host and not self._total:
            return
        kinds = [(self._host, "C++"), (self._total, "CUDA")]
        counted = " and ".join(f"{number} {kind}" for number, kind in kinds if number)
        files = "files" if self._host + self._total > 1 else "file"
        names = ", ".join(f"sm_{arch}" for arch in self._archs) if self._total else ""
        self._say(
            f"compiling {counted} {files}{names and f', these for {names}'}, {self._jobs} at once: about "
            f"{self._minutes()} (MAX_JOBS sets how many at once"
            f"{', MINITRON_BUILD=cpu leaves CUDA out' if self._total else ''})"
        )

    def finished(self, output: str) -> None:
        """Counts a file that has been made."""
        if output in self._cuda:
            self._cuda.remove(output)
            seconds = round(time.monotonic() - self._begin)
            done = self._total - len(self._cuda)
            self._say(f"{done} of {self._total} CUDA files, after {seconds // 60}:{seconds % 60:02} min")

    def _minutes(self) -> str:
        work = self._host * HOST_SECONDS + self._total * NVCC_SECONDS * len(self._archs)
        longest = NVCC_SECONDS * len(self._archs) if self._total else HOST_SECONDS
        minutes = math.ceil(max(work / self._jobs, longest) / 60)
        return f"{minutes} minute{'s' if minutes > 1 else ''}"

    def _say(self, text: str) -> None:
        print(f"minitron-kernels: {text}", flush=True)
        if self._terminal is not None and self._total:
            # pip's spinner stands in a line that has not ended, later at the beginning of one
            before = "\r" if self._lines else "\n"
            self._lines += 1
            with contextlib.suppress(OSError):
                print(f"{before}minitron-kernels: {text}", file=self._terminal, flush=True)


@contextlib.contextmanager
def terminal() -> Iterator[TextIO | None]:
    """The terminal that this process was started in, where standard output does not go to one; else None."""
    if sys.stdout.isatty():
        yield None
        return
    try:
        stream = open("/dev/tty", "w")  # noqa: SIM115
    except OSError:
        yield None
        return
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):  # it may be gone, as after nohup
            stream.close()


def run_ninja(command: Sequence[str], root: Path, archs: Sequence[int], jobs: int) -> bool:
    """Runs ninja in `root` and says how far it is; whether it succeeded."""
    planned = subprocess.run([*command, "-n"], cwd=root, stdout=subprocess.PIPE, text=True).stdout
    environment = {"NINJA_STATUS": _STATUS, **os.environ}
    with terminal() as screen:
        progress = Progress(outputs_in(planned), archs, jobs, screen)
        progress.begin()
        if sys.stdout.isatty():  # ninja itself shows how far it is
            return subprocess.run(command, cwd=root, env=environment).returncode == 0
        with subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as ninja:
            assert ninja.stdout is not None
            for line in ninja.stdout:
                print(line, end="", flush=True)
                for output in outputs_in(line):
                    progress.finished(output)
        return ninja.returncode == 0


def outputs_in(text: str) -> list[str]:
    """The files that lines of ninja name."""
    return [found[1].strip() for line in text.splitlines() if (found := _FINISHED.match(line))]
