"""Evaluating the model in these processes: problem sets by command, and validation during a training run."""

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
    """The objects that generate the samples of an evaluation."""

    engine: RolloutEngine
    """Generates from the current weights."""
    engine_name: str
    """Name of the engine that samples record."""
    sampling: SamplingParams
    """How tokens are sampled."""
    tokenizer: PreTrainedTokenizerBase
    """The model's."""
    student: Student
    """The student, for the position of this rank among the ranks."""
    settings: EvaluationConfig
    """The section `evaluation`."""
    seed: int
    """Seed of the run."""
    batch_rows: int
    """`rollout.batch_rows`: samples that are generated, and then written, together."""
    expert_parallel: bool
    """Whether data-parallel ranks share experts, so that they must generate equally often."""

    @classmethod
    def of(
        cls,
        config: PopsdConfig,
        student: Student,
        engine: RolloutEngine,
        sampling: SamplingParams,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Sampler:
        """The sampler of a run, with the settings of `config`."""
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
        """Settings that determine the samples of `prompts` by the weights with this digest."""
        return sample_settings(
            prompts, self.sampling, seed=self.seed, model=model, weights_digest=digest, engine=self.engine_name
        )


def generate_missing(sampler: Sampler, problem_sets: Sequence[ProblemSet], *, model: str, digest: str) -> None:
    """Generates the samples that the sets lack, split over data-parallel replicas; each appends to its own file.

    Samples are written whenever a replica has generated `rollout.batch_rows` of them. Collective over all ranks: one
    gather and a broadcast of objects per set, and a barrier at the end.

    Args:
        sampler: generates them.
        problem_sets: the same on every rank.
        model: path or name of the model, as samples record it.
        digest: of its weights.

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
            # Ranks that share experts generate equally often: one with fewer samples repeats one and discards it.
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
    """The evaluation of `data.validation` during a training run: generated batch by batch, then concluded.

    Written to `<output>/validation/step-NNNNNN` in the format of `nemo_popsd.evaluation.records`.
    """

    def __init__(self, sampler: Sampler, output: str | Path, *, check_lock: Callable[[], None]) -> None:
        """Keeps references only.

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
        """Generates responses to some of this replica's problems. Collective over the ranks that share the model."""
        require_math_verify()
        sampler = self._sampler
        requests = missing_samples(prompts, sampler.settings.samples_per_problem)
        self._samples += generate_samples(
            requests, sampler.engine, sampler.sampling, sampler.tokenizer, seed=sampler.seed
        )
        self._prompts += prompts

    def conclude(self, step: int) -> EvaluationSummary:
        """Scores the samples of all replicas on rank 0 and returns their summary on every rank.

        Collective over all ranks: a barrier that waits for the slowest replica, a gather of objects over the
        data-parallel group, a gather and a broadcast over all.

        Args:
            step: number of completed training steps.

        Raises:
            UserError, TransientError: on every rank; the output belongs to another run or cannot be written.
        """
        wait_for_all()
        group = self._sampler.student.dp_group
        own, self._samples, self._prompts = (self._samples, self._prompts), [], []
        gathered: list[tuple[list[Sample], list[EvaluationPrompt]]] = [own] * group.size()
        dist.all_gather_object(gathered, own, group=group)
        # Problems are dealt to the replicas in turn: interleaving restores their order in any layout.
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
    """Removes a run's evaluations of weights after more than `step` steps; on one rank."""
    for path in (output / "validation").glob("step-*"):
        match = _STEP.fullmatch(path.name)
        if match and int(match[1]) > step:
            EvaluationDirectory(path).remove()


def before_and_after(output: str, steps: int, *, resamples: int) -> str:
    """The table of a run's evaluations before its first and after its last step; on one rank, from the disk."""
    directories = {"before": validation_directory(output, 0), "after": validation_directory(output, steps)}
    # A run that got validation problems only when it was resumed has no evaluation from before its first step.
    present = {name: Evaluation.read(directory) for name, directory in directories.items() if directory.concluded}
    return comparison_table(present, resamples=resamples)
