"""`python -m minitron_kernels.pruning`: the command minitron-prune."""

from minitron_kernels.pruning.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
