"""What the library knows of each model family, its configs and its parameters' names."""

from minitron_kernels.pruning.families import tables  # noqa: F401  registers them
