"""Metrics by name, the loggers that write them, timing of phases, progress, console."""
