"""`python -m minitron_kernels`: shows what is built, which backends can serve each op here, and why not."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from minitron_kernels import __version__

NAME = "python -m minitron_kernels"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit code: 0, 1 after an error, 2 for a wrong command line."""
    about = "Show what is built, which backends can serve each op on this machine, and why not the others."
    parser = argparse.ArgumentParser(prog=NAME, description=about)
    parser.add_argument("--version", action="version", version=f"minitron_kernels {__version__}")
    parser.parse_args(argv)
    try:
        from minitron_kernels._report import report  # torch, which is slow

        print(report(), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail
        return 141  # the status of a program that SIGPIPE ended
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # as where torch is there and cannot be loaded
        print(f"{NAME}: error: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
