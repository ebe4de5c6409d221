"""The command minitron-distill."""
