"""Rollouts from vLLM: a server in an environment of its own, started, watched and fed with weights from here."""
