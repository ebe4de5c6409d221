"""Cutting weights after a plan, and whole models in memory."""
