"""Rollouts from vLLM: a server process in an environment of its own, started, watched and fed with weights from here."""
