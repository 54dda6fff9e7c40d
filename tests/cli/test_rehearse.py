"""`popsd rehearse`: what it refuses and prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONF = str(ROOT / "conf" / "qwen3_8b.yaml")
TINY = str(ROOT / "conf" / "tiny.yaml")


def popsd(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_popsd", "rehearse", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_impossible_rehearsals_are_refused() -> None:
    from nemo_popsd.errors import UserError
    from nemo_popsd.rehearsal.command import rehearsal_text

    for words, message in (
        (["nodes=1,2"], "one number of nodes"),
        (["parallel.tensor=3"], "a layout that divides"),
        (["parallel.expert=2"], "a layout that divides"),
        (["student.adaptation=full"], r"got \d+\.\d GiB per GPU of"),
    ):
        with pytest.raises(UserError, match=message):
            rehearsal_text(CONF, ["student.source=Qwen3-8B", *words])
    for rank in ("8", "-1", "first"):
        with pytest.raises(UserError, match="0 to 7, or last"):
            rehearsal_text(CONF, ["student.source=Qwen3-8B"], ranks=[rank])


@pytest.mark.slow
def test_two_ranks_are_rehearsed_and_printed() -> None:
    from nemo_popsd.compat.megatron_core import FILES_PER_RANK

    done = popsd(TINY, "gpus_per_node=4", "parallel.tensor=2", "--ranks", "0,last")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("4 GPUs: TP2·SP·DP2" in line for line in lines)
    assert [line.split(",")[0] for line in lines if line.startswith("rank")] == ["rank 0", "rank 3"]
    assert sum(line.startswith("training, work, TFLOP") for line in lines) == 2
    assert any("tensor_model_parallel_group of 2" in line for line in lines)
    assert sum(line.startswith("training, tensor all-reduce, MiB") for line in lines) == 2
    weights = ", ".join(f"weights/__3_{number}.distcp" for number in range(FILES_PER_RANK))
    assert f"checkpoint: {weights}, training_state/rank-00003.safetensors" in lines
    assert sum(line.startswith("weights for vLLM, GiB") and line.endswith("   1.000") for line in lines) == 2
    done = popsd(TINY, "gpus_per_node=4", "--json")
    [rank] = json.loads(done.stdout)
    assert {item["name"] for item in rank["quantities"]} >= {"weights", "optimizer", "frozen, peak"}
    assert all(entry["bytes"] >= 0 for entry in rank["collectives"])
