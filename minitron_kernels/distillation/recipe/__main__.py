"""`python -m minitron_kernels.distillation.recipe`: the command minitron-recipe."""

from minitron_kernels.distillation.recipe.main import main

if __name__ == "__main__":
    raise SystemExit(main())
