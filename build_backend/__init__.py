"""How minitron-kernels is built: PEP 517 hooks, the search for tools, the ninja file."""
