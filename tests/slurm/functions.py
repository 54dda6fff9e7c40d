"""The scripts' functions without Slurm: bash sources them, and small programs replace srun and scontrol."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

_JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NAME": "popsd-train",
    "SLURM_JOB_NODELIST": "node1",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_ON_NODE": "4",
    "SLURMD_NODENAME": "node1",
}
"""Slurm's variables for a job of two ranks on one node."""


class Job:
    """The shell of a simulated batch job.

    Attributes:
        place: directory of the submission.
        start: directory of the logs of its first start; created at the first access.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._programs = place / "programs"
        self._programs.mkdir()
        self.program("scontrol", 'echo "asked: scontrol $*"; echo "   JobState=RUNNING Reason=None"')

    def program(self, name: str, script: str) -> None:
        """Put a program of that name first in PATH."""
        file = self._programs / name
        file.write_text(f"#!/usr/bin/env bash\n{script}\n")
        file.chmod(0o755)

    @property
    def start(self) -> Path:
        directory = self.place / "logs" / "popsd-train-12" / "start-0"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run lines of bash after slurm/common.sh; `arguments` are the positional parameters.

        Args:
            script: the lines.
            arguments: ``$1`` and so on.
            variables: of the environment, besides those that Slurm sets.
        """
        environment = {
            "PATH": f"{self._programs}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(self.place),
            "LANG": "C.UTF-8",
            **_JOB,
            "SLURM_SUBMIT_DIR": str(self.place),
            "POPSD_HOME": str(ROOT),
            "POPSD_ENV": str(ROOT / "slurm" / "env.example.sh"),
            **variables,
        }
        lines = f'source "{ROOT}/slurm/common.sh"\n{script}\n'
        return subprocess.run(
            ["bash", "-c", lines, "job", *arguments],
            cwd=self.place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def refusal(self, script: str, *arguments: str, **variables: str) -> str:
        """The line that a refused job prints; its status is 2 and it prints nothing else."""
        done = self.run(script, *arguments, **variables)
        assert done.returncode == 2, done
        (line,) = done.stderr.splitlines()
        assert done.stdout == ""
        assert "error: " in line
        return line.partition("error: ")[2]
