"""Scores: calibration batches through a hooked model, and what is kept of its activations."""
