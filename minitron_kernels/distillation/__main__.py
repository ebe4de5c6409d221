"""`python -m minitron_kernels.distillation`: the command minitron-distill."""

from minitron_kernels.distillation.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
