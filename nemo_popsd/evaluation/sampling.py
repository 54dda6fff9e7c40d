"""Responses to problems, drawn by any rollout engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_popsd.data.dataset import EvaluationPrompt
from nemo_popsd.evaluation.records import Sample
from nemo_popsd.rollout.engine import Request, RolloutEngine, SamplingParams, row_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Draw:
    """One response that is to be drawn."""

    prompt: EvaluationPrompt
    sample: int
    """Number among the responses to it, from 0."""

    def seed(self, run_seed: int) -> int:
        """Of its random numbers: they depend on run, problem and sample, not on step or layout, so that evaluations
        before and after training differ by the weights alone.
        """
        return row_seed(run_seed, "evaluation", self.prompt.record.id, self.sample)


def missing_draws(
    prompts: Sequence[EvaluationPrompt], samples_per_problem: int, drawn: Collection[tuple[str, int]] = ()
) -> list[Draw]:
    """What is left to draw, problem by problem; `drawn` holds problem and number of the samples that exist."""
    wanted = (Draw(prompt, sample) for prompt in prompts for sample in range(samples_per_problem))
    return [draw for draw in wanted if (draw.prompt.record.id, draw.sample) not in drawn]


def draw_samples(
    draws: Sequence[Draw],
    engine: RolloutEngine,
    sampling: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> list[Sample]:
    """Draws all of `draws` in one call of `engine`. Collective over the ranks that share the model."""
    requests = [Request(draw.prompt.prompt, draw.seed(seed)) for draw in draws]
    samples = []
    for draw, rollout in zip(draws, engine.generate(requests, sampling), strict=True):
        said = rollout.response if rollout.truncated else rollout.response[:-1]
        samples.append(
            Sample(
                problem=draw.prompt.record.id,
                sample=draw.sample,
                text=tokenizer.decode(said, skip_special_tokens=False),
                tokens=len(rollout.response),
                cut=rollout.truncated,
            )
        )
    return samples
