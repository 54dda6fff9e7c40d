"""The stand-in for vLLM's Python: a script that it forks behaves as one that vLLM's Python runs."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.rollout.vllm_location import PYTHON
from tests.rollout.vllm_servers import FORKING_PYTHON, needs_vllm

pytestmark = [pytest.mark.slow, needs_vllm]

SCRIPT = """
import os, signal, sys
import beside
print("vllm" in sys.modules, sys.argv[1:], os.environ["SEEN"], os.getcwd(), __name__, flush=True)
print(sys.stdin.readline().strip(), file=sys.stderr)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("word", "status"), [("0", 0), ("3", 3), ("killed", -signal.SIGKILL)])
def test_streams_environment_directory_and_status_are_passed_on(tmp_path: Path, word: str, status: int) -> None:
    (tmp_path / "beside.py").touch()
    script = tmp_path / "popsd_server.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [FORKING_PYTHON, str(script), word],
        cwd=tmp_path,
        env={**os.environ, "SEEN": "yes"},
        input="token\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    printed = f"True [{word!r}] yes {tmp_path} __main__\n"
    assert (done.returncode, done.stdout, done.stderr) == (status, printed, "token\n")


def test_anything_else_runs_in_vllms_python() -> None:
    words = ["-c", "import sys; print(sys.prefix, 'vllm' in sys.modules)"]
    first, second = (
        subprocess.run([python, *words], capture_output=True, text=True).stdout for python in (FORKING_PYTHON, PYTHON)
    )
    assert first == second
    assert first.endswith("False\n")
