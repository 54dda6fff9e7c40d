"""Parts of a benchmark that succeed, crash, hang or are killed, depending on the environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.journal import Report


def run(report: Report, *, rehearse: bool, work: Path) -> None:
    """Behaves as POPSD_TEST_PART requests."""
    report("found", rehearse=rehearse, value=1.5)
    what = os.environ["POPSD_TEST_PART"]
    if what == "crash":
        raise ValueError("the kernel is missing")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (work / "child").write_text(str(child.pid))
        time.sleep(600)
