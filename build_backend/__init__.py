"""Builds minitron-kernels: PEP 517 hooks, the search for tools, the ninja file."""
