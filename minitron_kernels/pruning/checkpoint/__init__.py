"""Cutting a checkpoint on disk, safely: whole or not at all."""
