"""The time of an evaluation: number of problems, concurrent responses, and scaling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.planning.command import plan_text

ROOT = Path(__file__).parents[2]
VLLM = ["rollout.engine=vllm", "rollout.vllm.memory_share=0.8"]


def planned(*words: str, conf: str = "paper_evaluation") -> dict[str, float]:
    path = ROOT / "conf" / f"{conf}.yaml"
    found: dict[str, float] = json.loads(plan_text(path, ["nodes=1", *words], evaluation=True, as_json=True))
    return found


def test_the_cache_of_a_server_decides_how_many_responses_it_generates_at_a_time() -> None:
    found = planned(*VLLM, "workload.prompt_tokens=200", "workload.evaluation_tokens=18000")
    assert (found["problems"], found["samples"], found["replicas"]) == (90, 12, 8)
    cache = (
        0.8 * 79.6 * 2**30 - 2 * 8.19e9
    )  # bytes; a token of Qwen3-8B has 36 layers of 8 heads of 128, twice, in bf16
    assert found["together"] == pytest.approx(cache / (2 * 36 * 8 * 128 * 2) / (200 + 9000), abs=1)
    # Reading weights and cache: bytes over the bandwidth that decoding reaches.
    step = (2 * 7.57e9 + found["together"] * 9200 * 2 * 36 * 8 * 128 * 2) / (3350e9 * 0.6)
    assert found["seconds"] == pytest.approx(135 / found["together"] * 18000 * step, rel=0.05)
    more = planned(
        *VLLM, "workload.prompt_tokens=200", "workload.evaluation_tokens=18000", "evaluation.samples_per_problem=24"
    )
    assert 1.9 < more["seconds"] / found["seconds"] < 2.1


def test_the_engine_in_the_training_process_has_batches() -> None:
    found = planned("workload.evaluation_tokens=18000")
    assert found["together"] == 327680 // (2048 + 38912)
    assert found["seconds"] > planned(*VLLM, "workload.evaluation_tokens=18000")["seconds"]


def test_problems_of_files_must_be_given() -> None:
    with pytest.raises(UserError, match=r"set workload\.evaluation_problems"):
        planned("evaluation.sets={mine: rows.jsonl}")
    assert planned("evaluation.sets={mine: rows.jsonl}", "workload.evaluation_problems=50")["problems"] == 50
    # An override adds to the three contests of the recipe.
    assert planned("evaluation.sets={mine: rows.jsonl}", "evaluation.problems=40")["problems"] == 3 * 30 + 40


def test_refusals_and_the_table() -> None:
    with pytest.raises(UserError, match=r"workload\.evaluation_tokens=50000"):
        planned("workload.evaluation_tokens=50000")
    with pytest.raises(UserError, match=r"raise rollout\.vllm\.memory_share"):
        planned("rollout.engine=vllm", "rollout.vllm.memory_share=0.1")
    with pytest.raises(UserError, match="divides"):
        planned("parallel.tensor=3")
    text = plan_text(ROOT / "conf" / "paper_evaluation.yaml", ["nodes=1,2", *VLLM], evaluation=True)
    assert [line.split(" | ")[0:2] for line in text.splitlines() if " | " in line] == [
        ["| nodes", "GPUs"],
        ["| 1", "8"],
        ["| 2", "16"],
    ]
