"""Cuts single weights and whole models in memory, as a plan says."""
