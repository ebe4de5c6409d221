"""The command minitron-prune."""
