"""Experiments that test the paper's claims on a model that a laptop can train; see README.md."""
