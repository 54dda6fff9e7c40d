"""Repeats an error after torchrun's own report, so that it is the last line of the output.

torchrun prints a traceback and a table after its ranks have ended. A small process outlives the rank, waits for the end
of torchrun, and prints the line.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

_SECONDS = 120
"""How long the process waits for torchrun. If torchrun restarts its ranks instead of ending, nothing is printed."""

_WAITS = f"""
import os, select, sys
try:
    ended, _, _ = select.select([os.pidfd_open(int(sys.argv[1]))], [], [], {_SECONDS})
except ProcessLookupError:
    ended = True
if ended:
    os.write(2, sys.argv[2].encode() + b"\\n")
"""


def print_after_torchrun(message: str) -> None:
    """Print `message` to standard error after the parent process has ended, if the parent is torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with contextlib.suppress(OSError):
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WAITS, str(os.getppid()), message],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # torchrun kills the sessions of its ranks
        )
