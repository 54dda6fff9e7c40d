"""Generation of samples by a rollout engine."""

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
    """One sample to generate."""

    prompt: EvaluationPrompt
    sample: int
    """Index among the responses to it."""

    def seed(self, run_seed: int) -> int:
        """The seed of the sample, which depends on run, problem and index, not on step or layout, so that evaluations
        before and after training differ only by the weights.
        """
        return row_seed(run_seed, "evaluation", self.prompt.record.id, self.sample)


def missing_draws(
    prompts: Sequence[EvaluationPrompt], samples_per_problem: int, drawn: Collection[tuple[str, int]] = ()
) -> list[Draw]:
    """The samples to generate, problem by problem; `drawn` holds problem and index of the existing samples."""
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
    """Generates all of `draws` with one call of `engine`. Collective over the ranks that share the model."""
    requests = [Request(draw.prompt.prompt, draw.seed(seed)) for draw in draws]
    samples = []
    for draw, rollout in zip(draws, engine.generate(requests, sampling), strict=True):
        content = rollout.response if rollout.truncated else rollout.response[:-1]
        samples.append(
            Sample(
                problem=draw.prompt.record.id,
                sample=draw.sample,
                text=tokenizer.decode(content, skip_special_tokens=False),
                tokens=len(rollout.response),
                truncated=rollout.truncated,
            )
        )
    return samples
