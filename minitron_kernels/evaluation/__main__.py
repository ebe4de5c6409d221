"""`python -m minitron_kernels.evaluation`: the command minitron-evaluate."""

from minitron_kernels.evaluation.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
