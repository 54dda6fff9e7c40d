"""Under torchrun, repeats an error after torchrun's own report, so that it is the last line of the output.

torchrun prints a traceback and a table after its ranks have ended. A small process that outlives the rank waits until
torchrun ends and prints the line.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

_SECONDS = 120
"""Seconds to wait for torchrun. If torchrun restarts its ranks within this time, the line is not printed."""

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
    """Prints `message` to standard error once this process's parent has ended, if that is torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with contextlib.suppress(OSError):
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WAITS, str(os.getppid()), message],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # torchrun ends the sessions of its ranks
        )
