"""NCCL's Flight Recorder: each rank keeps its last collectives and writes them when one times out. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

FOLDER = "dumps"
"""Directory in `output` of everything that is written for the analysis of a failure or of speed."""
FLIGHT_PREFIX = "flight-rank-"
"""Beginning of the names of the Flight Recorder's files; the rank follows."""
FILES = (f"{FLIGHT_PREFIX}*", "profile-step-*", "memory-rank-*")
"""Names of the files in `FOLDER`."""
_COLLECTIVES = "2000"
"""Collectives that each rank keeps."""


def set_up_flight_recorder(output: str | Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Turns the Flight Recorder on with files in `FOLDER`; call it before the process groups are created.

    Variables that are set already stay. Each is set under its names in PyTorch 2.9 and in earlier versions.
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
