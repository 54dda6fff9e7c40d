"""NCCL's Flight Recorder: each rank records its last collectives and writes them when a collective times out.

This module does not need torch.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

FOLDER = "dumps"
"""Directory in `output` with files for the analysis of failures and performance."""
FLIGHT_PREFIX = "flight-rank-"
"""Prefix of the names of the Flight Recorder's files, followed by the rank."""
FILES = (f"{FLIGHT_PREFIX}*", "profile-step-*", "memory-rank-*")
"""Names of the files in `FOLDER`."""
_COLLECTIVES = "2000"
"""Number of collectives that each rank records."""


def set_up_flight_recorder(output: str | Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Enables the Flight Recorder with files in `FOLDER`. Call it before the process groups are created.

    Variables that are already set are not changed. Each is set under its names in PyTorch 2.9 and in earlier versions.
    """
    prefix = str(Path(output).resolve() / FOLDER / FLIGHT_PREFIX)
    for value, *names in (
        (_COLLECTIVES, "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
        (prefix, "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
        ("1", "TORCH_NCCL_DUMP_ON_TIMEOUT"),
    ):
        chosen = next((environment[name] for name in names if name in environment), value)
        for name in names:
            environment.setdefault(name, chosen)
