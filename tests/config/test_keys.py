"""The known key that an unknown one is taken for: a wrong suggestion is worse than none."""

from __future__ import annotations

import pytest

from nemo_popsd.config.keys import known_keys, nearest, unknown_key
from nemo_popsd.planning.config import PlanConfig


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("steps", ["training.steps"]),
        ("step", ["training.steps"]),
        ("training.step", ["training.steps"]),
        ("traning.steps", ["training.steps"]),
        ("training.steps.x", ["training.steps"]),
        ("trainin", ["training"]),
        ("student.lora.rnak", ["student.lora.rank"]),
        ("distillation.beta", ["distillation.target.beta"]),
        ("optimizer.weight", ["optimizer.weight_decay"]),
        ("learning_rate", []),
        # Equally likely: all are named.
        ("temperature", ["rollout.temperature", "distillation.target.temperature", "evaluation.temperature"]),
        ("tensor", ["parallel.tensor", "rollout.vllm.tensor"]),
        # Not to be mistaken for the mode of W&B, nor for anything else that differs in its first letter.
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
    assert nearest("steps", known) == ["training.steps"]


def test_without_a_near_key_those_of_the_section_are_listed() -> None:
    assert "a key of rollout: engine, temperature" in str(unknown_key("f", "rollout.zzz"))
    assert "sections are student, parallel" in str(unknown_key("f", "node"))
    assert len(str(unknown_key("f", "k" * 10**6))) < 800
