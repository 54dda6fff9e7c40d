"""Measurements of this package on a GPU in eight minutes: `python -m benchmarks.gpu`; see `benchmarks.gpu.__main__`."""
