"""Cuts a checkpoint on disk. The result appears complete, or not at all."""
