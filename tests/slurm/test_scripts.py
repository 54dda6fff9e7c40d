"""Static checks of the scripts: shellcheck, and one file for cluster-dependent settings."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.docker.test_dockerfile import tool

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh"))
JOBS = ("train", "evaluate", "convert", "export", "doctor")


def test_shellcheck_finds_nothing() -> None:
    files = [str(path) for place in ("slurm", "docker", "tests/slurm") for path in sorted((ROOT / place).glob("*.sh"))]
    done = subprocess.run(
        # Its extended analysis repeats every sourced file for each script, and takes three times as long.
        [tool("shellcheck"), "--external-sources", "--source-path=slurm", "--extended-analysis=false", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("job", JOBS)
def test_a_job_outside_of_slurm_explains_how_to_submit_it(job: str) -> None:
    done = subprocess.run(["bash", ROOT / "slurm" / f"{job}.sh", "conf.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"submit it: sbatch slurm/{job}.sh ...\n")


def test_only_the_settings_depend_on_the_cluster() -> None:
    for name in SCRIPTS:
        text = (ROOT / "slurm" / name).read_text()
        settings = re.findall(r"^(?!\s*#(?!SBATCH)).*(?:--partition|--account|NCCL_\w+=|SOCKET_IFNAME).*$", text, re.M)
        assert name == "env.example.sh" or not settings, (name, settings)


def test_every_setting_is_in_the_example() -> None:
    example = (ROOT / "slurm" / "env.example.sh").read_text()
    text = "".join((ROOT / "slurm" / name).read_text() for name in SCRIPTS if name != "env.example.sh")
    used = set(re.findall(r'"\$\{((?:POPSD|CONTAINER)_\w+):=', text))
    used |= set(re.findall(r"\$\{((?:POPSD)_\w+):-", text)) - {"POPSD_HOME"}
    assert used >= {"POPSD_PYTHON", "POPSD_SECRETS", "CONTAINER_IMAGE", "CONTAINER_ENV", "POPSD_EVALUATE_OPTIONS"}
    assert not {name for name in used if name not in example}


@pytest.mark.parametrize("job", JOBS)
def test_jobs_can_be_requeued_and_their_output_needs_no_directory(job: str) -> None:
    directives = re.findall(r"^#SBATCH (.*)$", (ROOT / "slurm" / f"{job}.sh").read_text(), re.M)
    assert "--requeue" in directives
    assert "--open-mode=append" in directives
    assert f"--output=popsd-{job}-%j.out" in directives
    assert ("--signal=B:USR1@600" in directives) == (job == "train")
