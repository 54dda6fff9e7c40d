"""Evaluation of the model in these processes: problem sets of `popsd evaluate`, and validation during training."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.dataset import EvaluationPrompt
from nemo_popsd.evaluation.comparison import Evaluation, comparison_table
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import AnswerVerifier, require_math_verify
from nemo_popsd.evaluation.problem_sets import VALIDATION
from nemo_popsd.evaluation.records import EvaluationDirectory, Sample, SampleSettings, validation_directory
from nemo_popsd.evaluation.run import (
    ProblemSet,
    begin,
    conclude_samples,
    problems_of,
    sample_settings,
)
from nemo_popsd.evaluation.sampling import generate_samples, missing_samples
from nemo_popsd.evaluation.summary import EvaluationSummary
from nemo_popsd.megatron.student import Student
from nemo_popsd.model.engines import engine_name
from nemo_popsd.parallel.agreement import from_rank_zero
from nemo_popsd.parallel.waiting import wait_for_all
from nemo_popsd.rollout.engine import RolloutEngine, SamplingParams
from nemo_popsd.runtime.pace import Pace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SPACE = {"need": "space and write permission", "fix": "free space, or set output elsewhere"}
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Generates the samples of an evaluation."""

    engine: RolloutEngine
    """Engine that generates from the current weights."""
    engine_name: str
    """Name of the engine in the records of samples."""
    sampling: SamplingParams
    """Sampling parameters."""
    tokenizer: PreTrainedTokenizerBase
    """Tokenizer of the model."""
    student: Student
    """The model, for this rank's position among the ranks."""
    settings: EvaluationConfig
    """The section `evaluation`."""
    seed: int
    """Seed of the run."""
    batch_rows: int
    """`rollout.batch_rows`: samples that are generated and then written together."""
    expert_parallel: bool
    """Whether data-parallel ranks share experts and must therefore generate the same number of times."""

    @classmethod
    def of(
        cls,
        config: PopsdConfig,
        student: Student,
        engine: RolloutEngine,
        sampling: SamplingParams,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Sampler:
        """Build the sampler of a run from `config`."""
        return cls(
            engine=engine,
            engine_name=engine_name(config),
            sampling=sampling,
            tokenizer=tokenizer,
            student=student,
            settings=config.evaluation,
            seed=config.seed,
            batch_rows=config.rollout.batch_rows,
            expert_parallel=config.parallel.expert > 1,
        )

    def sample_settings(self, prompts: Sequence[EvaluationPrompt], *, model: str, digest: str) -> SampleSettings:
        """Return all settings on which samples of `prompts` from the weights with this digest depend."""
        return sample_settings(
            prompts, self.sampling, seed=self.seed, model=model, weights_digest=digest, engine=self.engine_name
        )


def generate_missing(sampler: Sampler, problem_sets: Sequence[ProblemSet], *, model: str, digest: str) -> None:
    """Generate the missing samples of the sets, split over data-parallel replicas; each appends to its own file.

    A replica writes samples in batches of `rollout.batch_rows`. Collective over all ranks: one gather and a broadcast
    of objects per set, and a barrier at the end.

    Args:
        sampler: generates the samples.
        problem_sets: problem sets, equal on all ranks.
        model: path or name of the model, for the records of samples.
        digest: digest of its weights.

    Raises:
        UserError: a set has samples that were generated with other settings.
    """
    student, rows = sampler.student, sampler.batch_rows
    replica, replicas = student.dp_group.rank(), student.dp_group.size()
    for problem_set in problem_sets:
        wanted = sampler.sample_settings(problem_set.prompts, model=model, digest=digest)
        on_disk = from_rank_zero(
            f"evaluation {problem_set.directory.path}", partial(_samples_on_disk, problem_set, wanted), **_SPACE
        )
        missing = missing_samples(problem_set.prompts, sampler.settings.samples_per_problem, on_disk)
        own = missing[replica::replicas]
        requested = own
        if sampler.expert_parallel:
            # Ranks that share experts generate the same number of times: with fewer samples, one is repeated and
            # discarded.
            requested = own + missing[: len(missing[::replicas]) - len(own)]
        with problem_set.directory.append_to(replica) if student.is_replica_leader else nullcontext() as file:
            pace = Pace(len(own))
            for start in range(0, len(requested), rows):
                batch = requested[start : start + rows]
                samples = generate_samples(
                    batch, sampler.engine, sampler.sampling, sampler.tokenizer, seed=sampler.seed
                )
                if file is not None:
                    file.add(samples[: len(own) - start])
                count = min(start + rows, len(own))
                times = pace.after(count)
                logger.info("%s: %d of %d samples of this replica  %s", problem_set.name, count, len(own), times)
    wait_for_all()


class Validation:
    """The evaluation of `data.validation` during training: samples are generated in batches, then scored.

    The result is written to `<output>/validation/step-NNNNNN` in the format of `nemo_popsd.evaluation.records`.
    """

    def __init__(self, sampler: Sampler, output: str | Path, *, check_lock: Callable[[], None]) -> None:
        """Store the references.

        Args:
            sampler: generates the samples.
            output: directory of the run.
            check_lock: raises if the output belongs to another run; called before anything is written.
        """
        self._sampler = sampler
        self._output = output
        self._check_lock = check_lock
        self._samples: list[Sample] = []
        self._prompts: list[EvaluationPrompt] = []

    def answer(self, prompts: Sequence[EvaluationPrompt]) -> None:
        """Generate responses to some of this replica's problems. Collective over the ranks that share the model."""
        require_math_verify()
        sampler = self._sampler
        requests = missing_samples(prompts, sampler.settings.samples_per_problem)
        self._samples += generate_samples(
            requests, sampler.engine, sampler.sampling, sampler.tokenizer, seed=sampler.seed
        )
        self._prompts += prompts

    def conclude(self, step: int) -> EvaluationSummary:
        """Score the samples of all replicas on rank 0 and return their summary on every rank.

        Collective over all ranks: a barrier that waits for the slowest replica, a gather of objects over the
        data-parallel group, and a gather and a broadcast over all ranks.

        Args:
            step: number of completed training steps.

        Raises:
            UserError, TransientError: the output belongs to another run or cannot be written; on every rank.
        """
        wait_for_all()
        group = self._sampler.student.dp_group
        own, self._samples, self._prompts = (self._samples, self._prompts), [], []
        gathered: list[tuple[list[Sample], list[EvaluationPrompt]]] = [own] * group.size()
        dist.all_gather_object(gathered, own, group=group)
        # Problems are assigned to the replicas round-robin: interleaving restores their order in any layout.
        turns = zip_longest(*(part for _, part in gathered))
        prompts = [prompt for turn in turns for prompt in turn if prompt is not None]
        place = {prompt.record.id: index for index, prompt in enumerate(prompts)}
        samples = sorted((s for part, _ in gathered for s in part), key=lambda s: (place[s.problem], s.sample))
        what = f"evaluation of step {step}"
        summary = from_rank_zero(what, lambda: self._conclude(step, samples, prompts), **_SPACE)
        logger.info(
            "step %d: accuracy %.1f %% on %d validation problems, %.0f tokens per response, "
            "%.1f markers per 1,000 tokens",
            step,
            100 * summary.accuracy,
            summary.problems,
            summary.mean_tokens,
            summary.markers_per_1000_tokens,
        )
        return summary

    def _conclude(self, step: int, samples: Sequence[Sample], prompts: Sequence[EvaluationPrompt]) -> EvaluationSummary:
        self._check_lock()
        settings, name = self._sampler.settings, f"step {step}"
        directory = validation_directory(self._output, step)
        directory.replace(
            self._sampler.sample_settings(prompts, model=name, digest=name), problems_of(prompts), samples
        )
        labels = {"model": name, "set": VALIDATION}
        with AnswerVerifier(settings.verify_seconds, settings.checker) as verifier:
            return conclude_samples(directory, samples, prompts, settings, verifier, labels=labels).summary


def _samples_on_disk(problem_set: ProblemSet, wanted: SampleSettings) -> set[tuple[str, int]]:
    begin(problem_set, wanted)
    return set(problem_set.directory.samples())


def remove_validations_after(output: Path, step: int) -> None:
    """Remove a run's evaluations of weights after more than `step` steps. Called on one rank."""
    for path in (output / "validation").glob("step-*"):
        match = _STEP.fullmatch(path.name)
        if match and int(match[1]) > step:
            EvaluationDirectory(path).remove()


def before_and_after(output: str, steps: int, *, resamples: int) -> str:
    """Return the table of a run's evaluations before the first and after the last step, read from disk on one rank."""
    directories = {"before": validation_directory(output, 0), "after": validation_directory(output, steps)}
    # A run whose validation problems were added when it was resumed has no evaluation before the first step.
    present = {name: Evaluation.read(directory) for name, directory in directories.items() if directory.concluded}
    return comparison_table(present, resamples=resamples)
