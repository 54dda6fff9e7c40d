"""Recipes and executors of NeMo-Run, in separate processes, because its folder is not on the path of other tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = ROOT / "conf" / "tiny.yaml"
SMALL = [
    "training.steps=1",
    "training.prompts_per_step=2",
    "optimizer.warmup_steps=0",
    "rollout.max_response_tokens=8",
    "data.validation.path=''",
    "diagnosis.in_training=false",
    "observability.progress_bar=false",
]
DESCRIBE = """
import json, sys
import nemo_run as run
from nemo_popsd.errors import UserError
from nemo_popsd.launch.nemo_run import popsd_script, slurm_executor, train_recipe

output = sys.argv[1]
recipe = train_recipe("conf/tiny.yaml", output=output, overrides=["training.steps=4"])
recipe.overrides.append("seed=5")
refused = []
for words in ({"output": "runs/a"}, {"output": output, "overrides": ["training.stpes=4"]}):
    try:
        train_recipe("conf/tiny.yaml", **words)
    except UserError as error:
        refused.append(str(error))
executor = slurm_executor(
    account="me",
    partition="batch",
    time="04:00:00",
    nodes=2,
    gpus_per_node=4,
    container_image="/shared/popsd.sqsh",
    container_mounts=["/models", "/shared/me:/me"],
    retries=3,
    packager=run.Packager(),
)
with run.Experiment("described") as experiment:
    experiment.add(recipe, executor=executor, name="train")
    experiment.add(popsd_script("report", output), executor=executor.clone(), name="report")
    experiment.dryrun(log=False, delete_exp_dir=False)
    scripts = [job._dryrun_info.request.materialize() for job in experiment.jobs]
print(json.dumps({"refused": refused, "scripts": scripts}))
"""
TRAIN = """
import sys
import nemo_run as run
from nemo_popsd.launch.nemo_run import local_executor, train_recipe

if __name__ == "__main__":
    configuration, output, *overrides = sys.argv[1:]
    run.run(train_recipe(configuration, output=output, overrides=overrides), executor=local_executor(), name="train")
"""


def nemo_run() -> Path:
    """The folder that `make nemo-run-env` fills; skips the test without it."""
    folder = ROOT / os.environ.get("NEMO_RUN_ENV", ".nemo-run-site")
    if not (folder / "nemo_run").is_dir():
        pytest.skip(f"{folder} has no NeMo-Run; `make nemo-run-env` installs it")
    return folder


def run_script(text: str, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of a user of NeMo-Run, in the project's directory."""
    folder = nemo_run()
    script = place / "mine.py"
    script.write_text(text)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "MASTER"))},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "NEMORUN_HOME": str(place / "home"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-W", "ignore", str(script), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_recipes_are_checked_and_slurm_gets_a_script(tmp_path: Path) -> None:
    done = run_script(DESCRIBE, tmp_path, str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert "got output='runs/a'; need an absolute path" in said["refused"][0]
    assert "training.stpes" in said["refused"][1]
    train, report = said["scripts"]
    flags = set(re.findall(r"^#SBATCH --(\S+)$", train, re.MULTILINE))
    assert {"account=me", "partition=batch", "time=04:00:00", "nodes=2", "gpus-per-node=4", "exclusive"} <= flags
    assert "ntasks-per-node=1" in flags, "torchrun is the only task of a node"
    assert "export TORCHX_MAX_RETRIES=3" in train
    [command] = [line for line in train.splitlines() if line.startswith("srun ") and "torchrun" in line]
    assert "--container-image /shared/popsd.sqsh --container-mounts /models:/models,/shared/me:/me," in command
    assert re.search(r"torchrun .*--nnodes 2 --nproc-per-node 4 .*-m nemo_run\.core\.runners\.fdl_runner", command)
    assert re.search(rf"-m nemo_popsd report {tmp_path / 'run'}$", report, re.MULTILINE)


def test_a_training_with_the_local_executor(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run_script(TRAIN, tmp_path, str(TINY), str(output), *SMALL)
    assert (output / "DONE").is_file(), done.stdout + done.stderr
    assert (output / "DONE").read_text() == "1\n"
    assert "finished: SUCCEEDED" in done.stdout + done.stderr
