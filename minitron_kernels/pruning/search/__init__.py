"""Searches that score smaller models: which sizes within a budget, and which layers go."""
