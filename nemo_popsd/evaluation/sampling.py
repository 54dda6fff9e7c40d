"""Generation of samples by a rollout engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_popsd.data.dataset import EvaluationPrompt
from nemo_popsd.evaluation.records import Sample
from nemo_popsd.rollout.engine import Request, Rollout, RolloutEngine, SamplingParams, row_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One sample to generate."""

    prompt: EvaluationPrompt
    sample: int
    """Index among the responses to the problem."""

    def seed(self, run_seed: int) -> int:
        """The seed of the sample.

        It depends on run, problem and index, but not on step or layout, so that evaluations before and after training
        differ only by the weights.
        """
        return row_seed(run_seed, "evaluation", self.prompt.record.id, self.sample)


def missing_samples(
    prompts: Sequence[EvaluationPrompt], samples_per_problem: int, existing: Collection[tuple[str, int]] = ()
) -> list[SampleRequest]:
    """The samples to generate, problem by problem; `existing` contains problem and index of existing samples."""
    wanted = (SampleRequest(prompt, sample) for prompt in prompts for sample in range(samples_per_problem))
    return [request for request in wanted if (request.prompt.record.id, request.sample) not in existing]


def generate_samples(
    sample_requests: Sequence[SampleRequest],
    engine: RolloutEngine,
    sampling: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> list[Sample]:
    """Generates all of `sample_requests` with one call of `engine`. Collective over the ranks that share the model."""
    requests = [Request(sample_request.prompt.prompt, sample_request.seed(seed)) for sample_request in sample_requests]
    return [
        sample_of(sample_request.prompt.record.id, sample_request.sample, rollout, tokenizer)
        for sample_request, rollout in zip(sample_requests, engine.generate(requests, sampling), strict=True)
    ]


def sample_of(problem: str, sample: int, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """Converts a rollout to the sample with index `sample` among the responses to `problem`."""
    content = rollout.response if rollout.truncated else rollout.response[:-1]
    return Sample(
        problem=problem,
        sample=sample,
        text=tokenizer.decode(content, skip_special_tokens=False),
        tokens=len(rollout.response),
        truncated=rollout.truncated,
    )
