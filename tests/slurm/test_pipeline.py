"""One configuration, four jobs, all real: a Hugging Face directory is converted, trained, exported and evaluated."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_popsd.embedded.names import asset
from tests.slurm.cluster import Cluster
from tests.tiny_models import load_dense

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STAGES = ["convert", "train", "export", "evaluate"]
PYTHON = """#!/bin/sh
# Before the conversion and the export, whose checks have the same arguments as parts of the training's, the command of
# the check is only parsed: all packages need not be imported.
case "$3-$POPSD_RUN_DIR" in
doctor-*/popsd-convert-* | doctor-*/popsd-export-*)
  shift 2
  exec EXECUTABLE -c "import sys; from nemo_popsd.cli.main import parse; parse(sys.argv[1:])" "$@"
  ;;
esac
exec EXECUTABLE "$@"
"""


def test_a_hugging_face_model_goes_through_all_stages(slurm: Cluster, tmp_path: Path) -> None:
    slurm.wait_until_idle()
    model, output = tmp_path / "model", tmp_path / "run"
    shutil.copytree(asset("nemo_popsd:tiny_reasoner"), model)
    settings = [
        f"student.source={model}",
        f"output={output}",
        "training.steps=2",
        "training.prompts_per_step=4",
        "rollout.max_response_tokens=24",
        "evaluation.problems=4",
        "evaluation.max_response_tokens=24",
        "diagnosis.rows=2",
        "observability.progress_bar=false",
    ]
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("EXECUTABLE", sys.executable))
    python.chmod(0o755)
    environment = {
        "POPSD_PYTHON": str(python),
        "POPSD_ENV": str(ROOT / "slurm" / "env.example.sh"),
        "POPSD_MIN_FREE_GIB": "1",
        "POPSD_EVALUATE_OPTIONS": "--ntasks-per-node=2 --gpus-per-node=0",
        "SBATCH_TIMELIMIT": "60",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    one = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0")
    words = [str(ROOT / "slurm" / "pipeline.sh"), *one, str(ROOT / "conf" / "tiny.yaml"), *settings]
    jobs = dict(line.split() for line in slurm.command(*words, cwd=tmp_path, **environment).splitlines())
    assert list(jobs) == STAGES
    for job in jobs.values():
        slurm.wait_for(job, "COMPLETED", seconds=400)

    assert json.loads((output / "student" / "manifest.json").read_text())["step"] == 0
    assert (output / "DONE").read_text() == "2\n"
    before, after = (load_file(folder / "model.safetensors") for folder in (model, output / "huggingface"))
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    load_dense(output / "huggingface")
    (summary,) = (output / "evaluation").glob("*/validation/summary.json")
    assert json.loads(summary.read_text())["problems"] == 4
