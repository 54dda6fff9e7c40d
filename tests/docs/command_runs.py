"""Which commands of the documents a test runs, with what in place of a reader's models and data; why not the others.

A command is run as it is written (`AS_WRITTEN`, and blocks marked `run`), run with the embedded model and a few rows in
place of what the page names (`with_stand_ins`), or not run, for a reason in `NOT_RUN`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_popsd.embedded.names import asset

AS_WRITTEN = re.compile(r"popsd (plan|doctor(?! --run)|config|init)( .*)?")
"""Commands that need no model."""
_WITH_STAND_INS = re.compile(r"popsd (train|evaluate|diagnose|export|convert|rollouts|data) .*")
NOT_RUN = {
    r"make (venv|venv-dev|vllm-env|docs|container-check)": "installs gigabytes; tests/cli/test_make.py runs make -n",
    r"make (check|test)( STACK=current)?|\.venv/bin/python -m pytest .*": "these tests",
    r"docker (build|push) .*": "a container engine; tests/docker runs the image's script on declared packages",
    r"make compare": "trains for minutes; tests/cli/test_make.py runs make -n",
    r"make train.*": "trains for minutes; docs/tour.md has the same command with fewer steps",
    r"hf (download|upload) .*": "the network",
    r"vllm serve .*|popsd evaluate .* evaluation\.endpoint\.url=.*": "a server; tests/commands/test_vllm_run.py loads "
    "exports in vLLM, tests/evaluation/test_endpoint.py evaluates at one",
    r"source .*|cp .*|cd .*|git .*|tail .*|enroot .*": "programs of the system and files of the reader",
    r"torchrun --nproc-per-node 8 .*": "eight GPUs; docs/tour.md starts two processes in the same way",
    r"sbatch .*|(POPSD_REHEARSE=1 )?slurm/(train|pipeline|sweep)\.sh .*": "a cluster; tests/slurm submits the scripts "
    "to a Slurm on this machine",
    r"popsd train .* --seeds .*|popsd report runs/rates/.*": "several trainings; tests/cli/test_sweep.py has two",
    r".*--compare .*": "evaluations of another page's models; docs/tour.md compares two",
    r"(python -m benchmarks\.bundle|python3 -m pip) .*": "downloads wheels, and installs what was downloaded",
    r"python -m pip .*": "downloads gigabytes; tests/packaging builds the wheel and runs it in a fresh environment",
    r"(PYTHONPATH=SITE python3|python) -m benchmarks\.gpu.*": "a GPU; tests/benchmarks/test_gpu.py runs the rehearsal",
    r"popsd diagnose .* --views .*": "minutes; tests/model/test_views.py scores views of the embedded model",
    r"popsd doctor --run .*": "a run that has ended; tests/commands/test_post_mortem.py has such runs",
    r"popsd rehearse .*": "minutes; tests/cli/test_rehearse.py rehearses the embedded model",
    r"python -m nemo_popsd\.testbed\..*": "hours; tests/testbed pre-trains smaller models for a few steps",
    r"python -m experiments\..*": "hours; tests/experiments runs the same functions on a few rows",
}
"""Pattern of a command to the reason why no test runs it."""
_SMALL = {
    "train": [
        "training.steps=2",
        "training.prompts_per_step=4",
        "evaluation.problems=2",
        "rollout.max_response_tokens=8",
    ],
    "evaluate": ["evaluation.problems=2", "evaluation.max_response_tokens=8"],
    "diagnose": ["diagnosis.rows=2", "rollout.max_response_tokens=8"],
}
"""Settings that make a command a matter of seconds."""
_ROWS = [{"id": str(n), "question": f"What is {n}+2?", "answer": f"It is {n + 2}.\n#### {n + 2}"} for n in range(4)]
_HELD_OUT = [{"id": str(n), "question": f"What is {n}+3?", "answer": f"#### {n + 3}"} for n in range(4)]
_DASD = [
    {"uuid": row["id"], "input": row["question"], "output": row["answer"], "domain": "math", "meta": ""}
    for row in _ROWS
]
_THOUGHTS = [
    {"domain": "math", "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "It is 2."}]}
]
_DATA: dict[str, list[dict[str, Any]]] = {
    "gsm8k/train.jsonl": _ROWS,
    "gsm8k/test.jsonl": _HELD_OUT,
    "dasd/stage1.jsonl": _DASD,
    "OpenThoughts3-1.2M/data/train-00000-of-00001.jsonl": _THOUGHTS,
}


def is_run_with_stand_ins(words: Sequence[str]) -> bool:
    """Whether `with_stand_ins` makes a command that runs anywhere."""
    return bool(_WITH_STAND_INS.fullmatch(shlex.join(words))) and reason(words) is None


def reason(words: Sequence[str]) -> str | None:
    """Why no test runs a command; None for a command that is run."""
    command = " ".join(words)
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


def prepare(folder: Path) -> None:
    """Put the models, data and configuration that `with_stand_ins` names into `folder`."""
    shutil.copytree(Path(__file__).parents[2] / "conf", folder / "conf")
    shutil.copytree(asset("nemo_popsd:tiny_reasoner"), folder / "models" / "Qwen3-8B")
    for name, rows in _DATA.items():
        file = folder / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def with_stand_ins(words: Sequence[str], output: str) -> list[str]:
    """The command on the embedded model and a few rows, relative to the folder of `prepare`.

    Args:
        words: a command of `popsd`.
        output: directory of the run, for a training; others write where the page says.
    """
    result = [re.sub(r"conf/\w+\.yaml", "conf/tiny.yaml", word) for word in words]
    result = [re.sub(r"(^|=)/(models|data)/", r"\1\2/", word) for word in result]
    result = [re.sub(r"^--step=?\d+$", "--step=1", word) for word in result]
    if "--step" in result:
        result[result.index("--step") + 1] = "1"
    if words[1] == "train":
        result.append(f"output={output}")
    return [*result, *_SMALL.get(words[1], [])]
