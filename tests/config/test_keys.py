"""The suggestion of a known key for an unknown one; a wrong suggestion is worse than none."""

from __future__ import annotations

import pytest

from nemo_popsd.config.keys import known_keys, nearest, unknown_key
from nemo_popsd.planning.config import PlanConfig


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("steps", ["training.steps", "observability.profile.steps"]),
        ("step", ["training.steps", "observability.profile.steps"]),
        ("training.step", ["training.steps"]),
        ("traning.steps", ["training.steps"]),
        ("training.steps.x", ["training.steps"]),
        ("trainin", ["training"]),
        ("student.lora.rnak", ["student.lora.rank"]),
        ("distillation.beta", ["distillation.target.beta"]),
        ("optimizer.weight", ["optimizer.weight_decay"]),
        ("learning_rate", []),
        # Equally similar keys are all named.
        ("temperature", ["rollout.temperature", "distillation.target.temperature", "evaluation.temperature"]),
        ("tensor", ["parallel.tensor", "rollout.vllm.tensor"]),
        # No suggestion of W&B's mode or of another key with a different first letter.
        ("node", []),
        ("observability.wandb.node", ["observability.wandb.mode"]),
        ("zzz", []),
        ("", []),
    ],
)
def test_nearest(key: str, meant: list[str]) -> None:
    assert nearest(key, known_keys()) == meant


def test_a_plan_has_its_own_keys() -> None:
    known = {**known_keys(PlanConfig), **known_keys()}
    assert nearest("node", known) == ["nodes"]
    assert nearest("gpus", known) == []
    assert nearest("gpu_per_node", known) == ["gpus_per_node"]
    assert nearest("prompts_per_step", known) == ["training.prompts_per_step"]


def test_without_a_similar_key_the_keys_of_the_section_are_listed() -> None:
    assert "a key of rollout: engine, per_prompt, temperature" in str(unknown_key("f", "rollout.zzz"))
    assert "sections are student, parallel" in str(unknown_key("f", "node"))
    assert len(str(unknown_key("f", "k" * 10**6))) < 800
