"""The batch script of docs/launchers.md that starts ranks by srun alone, on a real Slurm."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import blocks
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import JOB_ENVIRONMENT, STAND_IN

pytestmark = pytest.mark.slow


def test_every_rank_of_srun_gets_its_variables(slurm: Cluster, tmp_path: Path) -> None:
    slurm.wait_until_idle()
    [block] = blocks("docs/launchers.md", "sh")
    text = block.body.replace("exec python ", f"exec {STAND_IN} ").replace("--ntasks-per-node=8", "--ntasks-per-node=2")
    assert text.count(STAND_IN) == text.count("--ntasks-per-node=2") == 1
    (tmp_path / "job.sh").write_text(text)
    job = slurm.submit("--output=log", "job.sh", cwd=tmp_path, **JOB_ENVIRONMENT)
    slurm.wait_for(job, "COMPLETED", seconds=60)
    log = (tmp_path / "log").read_text()
    said = {name: re.findall(rf"^{name}=(.*)$", log, re.MULTILINE) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    assert sorted(said["RANK"]) == ["0", "1", "2", "3"]
    assert sorted(said["LOCAL_RANK"]) == ["0", "0", "1", "1"]
    assert said["WORLD_SIZE"] == ["4"] * 4
    assert re.findall(r"^MASTER_ADDR=(.*)$", log, re.MULTILINE) == ["node1"] * 4
    assert set(re.findall(r"^MASTER_PORT=(.*)$", log, re.MULTILINE)) == {str(20000 + int(job) % 10000)}
    assert log.count("asked: train conf/qwen3_32b.yaml student.source=/models/Qwen3-32B\n") == 4
