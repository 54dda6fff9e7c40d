"""Answers to held-out problems, drawn by any rollout engine and scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.dataset import EvaluationPrompt
from nemo_popsd.evaluation.summary import SampleOutcome, score_response
from nemo_popsd.rollout.engine import Request, RolloutEngine, SamplingParams, row_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sample_outcomes(
    prompts: Sequence[EvaluationPrompt],
    engine: RolloutEngine,
    sampling: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    config: PopsdConfig,
) -> list[SampleOutcome]:
    """Draws `evaluation.samples_per_problem` responses to each prompt and scores them.

    Random numbers depend on the run's seed, the problem and the sample, not on the step: evaluations before and
    after training differ by the weights alone.
    """
    settings = config.evaluation
    drawn = [(prompt, sample) for prompt in prompts for sample in range(settings.samples_per_problem)]
    requests = [Request(p.prompt, row_seed(config.seed, "evaluation", p.record.id, sample)) for p, sample in drawn]
    outcomes = []
    for (prompt, _), rollout in zip(drawn, engine.generate(requests, sampling), strict=True):
        assert prompt.record.answer is not None
        text = tokenizer.decode(rollout.response, skip_special_tokens=True)
        outcomes.append(
            score_response(
                prompt.record.id,
                text,
                prompt.record.answer,
                tokens=len(rollout.response),
                cut=rollout.cut,
                config=settings,
            )
        )
    return outcomes
