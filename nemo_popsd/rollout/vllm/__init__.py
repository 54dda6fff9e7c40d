"""Rollouts from a vLLM server in its own environment; this package starts and monitors it and sends it weights."""
