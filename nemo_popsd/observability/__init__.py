"""Declaration of metrics, loggers, timing of phases, progress, and console output."""
