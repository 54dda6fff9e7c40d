"""Published scores of full-size models: averages over AIME24, AIME25 and HMMT25 in per cent. None of them is ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Scores of one model by one source."""

    source: str
    protocol: str
    """Name of the configuration in conf/ with the evaluation protocol of the source."""
    base: float
    arms: dict[str, float]
    """Score after training, by arm."""


_PAPER = "arXiv 2607.02234"
_REPLICATION = "github.com/coldsakrua/OPSD_Analysis"

PUBLISHED = {
    ("paper", "Qwen3-8B"): Published(_PAPER, "paper_evaluation", 61.8, {"OPSD": 60.9, "Purified": 66.0}),
    ("paper", "Qwen3-4B"): Published(_PAPER, "paper_evaluation", 61.2, {"OPSD": 60.5, "Purified": 63.7}),
    ("paper", "R1-Distill-Qwen-7B"): Published(_PAPER, "paper_evaluation", 38.7, {"OPSD": 38.5, "Purified": 40.8}),
    ("paper", "OLMo-7B-Thinking"): Published(_PAPER, "paper_evaluation", 61.3, {"OPSD": 59.8, "Purified": 63.2}),
    ("replication", "Qwen3-1.7B"): Published(
        _REPLICATION, "replication_evaluation", 33.6, {"Purified": 37.8, "Purified, answer": 39.3}
    ),
    ("replication", "Qwen3-4B"): Published(
        _REPLICATION, "replication_evaluation", 60.6, {"Purified": 60.3, "Purified, answer": 62.2}
    ),
    ("replication", "Qwen3-4B-Thinking-2507"): Published(
        _REPLICATION, "replication_evaluation", 73.5, {"OPSD": 66.3, "Purified": 73.3, "Purified, answer": 74.0}
    ),
    ("replication", "Olmo-3-7B-Think"): Published(
        _REPLICATION, "replication_evaluation", 61.0, {"OPSD": 60.3, "Purified": 61.3, "Purified, answer": 62.5}
    ),
}
"""Scores by source and model. The replication's OPSD has 100 steps, everything else at most 200."""
