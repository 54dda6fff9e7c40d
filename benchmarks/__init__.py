"""Benchmarks, each a separate command: `python -m benchmarks.loss`."""
