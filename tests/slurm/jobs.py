"""Jobs with a stand-in for Python, submitted to a real Slurm, and their logs."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
STAND_IN = str(ROOT / "tests" / "slurm" / "stand_in.sh")
TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=8")
"""Four ranks on two nodes."""
JOB_ENVIRONMENT = {
    "POPSD_PYTHON": STAND_IN,
    "POPSD_ENV": str(ROOT / "slurm" / "env.example.sh"),
    "OMP_NUM_THREADS": "1",
    "STAND_IN_PYTHON": sys.executable,
}
"""Variables with which a script is submitted."""


def submit(slurm: Cluster, place: Path, *words: str, script: str = "train", **variables: str) -> str:
    """A job submitted in `place`, outside of the project's directory; its logs are also there."""
    flags = [word for word in words if word.startswith("--")]
    arguments = [word for word in words if not word.startswith("--")]
    path = str(ROOT / "slurm" / f"{script}.sh")
    return slurm.submit(*flags, path, *arguments, cwd=place, **{**JOB_ENVIRONMENT, **variables})


def logs(place: Path, pattern: str) -> str:
    """The concatenated logs of one name."""
    return "\n".join(path.read_text() for path in sorted(place.glob(f"logs/*/{pattern}")))


def until_ranks_wait(slurm: Cluster, place: Path, job: str, start: int = 0) -> None:
    """Returns once all four ranks of `job` run."""

    def all_run() -> bool:
        assert slurm.record(job)["JobState"] != "FAILED", slurm.output(job)
        return logs(place, f"start-{start}/node-*.log").count("beginning at step 1") == 4

    slurm.until(all_run, 120, f"ranks of job {job}")
