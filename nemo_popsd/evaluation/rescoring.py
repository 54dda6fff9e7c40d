"""Rescores the samples of an evaluation that was scored by other comparison rules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import AnswerVerifier
from nemo_popsd.evaluation.records import EvaluationDirectory, SampleScore
from nemo_popsd.evaluation.scoring import score_samples

logger = logging.getLogger(__name__)

_SETTINGS = ("markers", "answer_pattern", "without_box", "verify_seconds", "thinking_end")


def rescored(directory: EvaluationDirectory) -> tuple[list[SampleScore], EvaluationConfig]:
    """Scores of an evaluation's samples by the current rules, and the settings of the evaluation.

    Does not write files: `popsd evaluate` replaces the scores on disk.

    Raises:
        UserError: the evaluation has not been concluded, or its samples or problems are missing.
    """
    config = _config(directory.summary())
    scored = [(score.problem, score.sample) for score in directory.scores()]
    samples = directory.samples()
    answers = {problem.id: problem.answer for problem in directory.problems()}
    missing = sum(key not in samples or key[0] not in answers for key in scored)
    if missing:
        raise UserError(
            f"evaluation in {directory.path}",
            got=f"scores by other rules of comparison, and {missing} of {len(scored)} samples missing",
            need="scores by one set of rules",
            fix="run `popsd evaluate` again for it",
        )
    logger.warning("%s was scored by other rules of comparison: scored again from its samples", directory.path)
    with AnswerVerifier(config.verify_seconds) as verifier:
        return score_samples([samples[key] for key in scored], answers, config, verifier), config


def _config(summary: Mapping[str, Any]) -> EvaluationConfig:
    """The settings with which an evaluation was scored, to the extent that its summary contains them."""
    scoring = summary.get("scoring", {})
    known = {name: scoring[name] for name in _SETTINGS if name in scoring}
    return EvaluationConfig(**known, confidence=summary["confidence"], pass_k=[int(k) for k in summary["pass_at"]])
