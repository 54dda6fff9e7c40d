"""Rollouts from vLLM: a server in its own environment, which this package starts, monitors and sends weights to."""
