"""Benchmarks, each a command of its own: `python -m benchmarks.loss`."""
