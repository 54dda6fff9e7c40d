"""Evaluating the model that these processes hold: on problem sets by command, and on held-out rows during a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from nemo_popsd.data.dataset import EvaluationPrompt
from nemo_popsd.evaluation.comparison import Evaluation, comparison_table
from nemo_popsd.evaluation.equivalence import AnswerVerifier, require_math_verify
from nemo_popsd.evaluation.records import EvaluationDirectory, Sample, SampleSettings
from nemo_popsd.evaluation.run import (
    VALIDATION,
    PlannedSet,
    begin,
    conclude_samples,
    problems_of,
    sample_settings,
)
from nemo_popsd.evaluation.sampling import draw_samples, missing_draws
from nemo_popsd.evaluation.summary import EvaluationSummary
from nemo_popsd.model.engines import engine_name
from nemo_popsd.parallel.agreement import from_rank_zero
from nemo_popsd.parallel.waiting import wait_for_all

if TYPE_CHECKING:
    from nemo_popsd.model.purified_opsd import PurifiedOPSDModel

logger = logging.getLogger(__name__)

_ROOM = {"need": "room and the right to write it", "fix": "free space, or set output elsewhere"}
_STEP = re.compile(r"step-(\d+)")


def draw_missing(model: PurifiedOPSDModel, planned: Sequence[PlannedSet], *, name: str, weights_digest: str) -> None:
    """Draws what the sets miss, data-parallel replicas sharing it out; each appends to a file of its own.

    Samples go to the disk whenever a replica has drawn `rollout.batch_rows` of them. Collective over all ranks: one
    gather and a broadcast of objects per set, and a barrier at the end.

    Args:
        model: what is evaluated.
        planned: the sets, the same on every rank.
        name: of the model, for people.
        weights_digest: of its weights.

    Raises:
        UserError: samples of other settings are there, or contexts exceed the model's positions.
    """
    settings = model.settings
    sampling = model.sampling(settings.evaluation)
    engine = engine_name(settings)
    replica, replicas, rows = model.student.dp_group.rank(), model.student.dp_group.size(), settings.rollout.batch_rows
    for one in planned:
        model.refuse_long_evaluation(one.prompts)
        wanted = sample_settings(
            one.prompts, settings, sampling, model=name, weights_digest=weights_digest, engine=engine
        )
        drawn = from_rank_zero(f"evaluation {one.directory.path}", partial(_samples_on_disk, one, wanted), **_ROOM)
        missing = missing_draws(one.prompts, settings.evaluation.samples_per_problem, drawn)
        mine = missing[replica::replicas]
        asked = mine
        if settings.parallel.expert > 1:
            # Ranks that share experts ask equally often: who has fewer draws one again, and keeps it to itself.
            asked = mine + missing[: len(missing[::replicas]) - len(mine)]
        with one.directory.append_to(replica) if model.student.is_replica_leader else nullcontext() as file:
            for start in range(0, len(asked), rows):
                chunk = asked[start : start + rows]
                samples = draw_samples(chunk, model.engine, sampling, model.tokenizer, seed=settings.seed)
                if file is not None:
                    file.add(samples[: len(mine) - start])
                logger.info("%s: %d of %d samples of this replica", one.name, min(start + rows, len(mine)), len(mine))
    wait_for_all()


class HeldOut:
    """The evaluation of held-out rows that a training run makes now and then: collected batch by batch, then concluded.

    Written to `<output>/validation/step-NNNNNN`, as `nemo_popsd.evaluation.records` says.
    """

    def __init__(self, model: PurifiedOPSDModel) -> None:
        self._model = model
        self._samples: list[Sample] = []
        self._prompts: list[EvaluationPrompt] = []

    def answer(self, prompts: Sequence[EvaluationPrompt]) -> None:
        """Draws responses to some of this replica's problems. Collective over the ranks that share the model."""
        require_math_verify()
        model = self._model
        draws = missing_draws(prompts, model.settings.evaluation.samples_per_problem)
        sampling = model.sampling(model.settings.evaluation)
        self._samples += draw_samples(draws, model.engine, sampling, model.tokenizer, seed=model.settings.seed)
        self._prompts += prompts

    def conclude(self) -> EvaluationSummary:
        """Scores what all replicas drew, on rank 0, and tells every rank what it comes to.

        Collective over all ranks: a barrier that waits for the slowest replica, a gather of objects over the
        data-parallel group, a gather and a broadcast over all.
        """
        wait_for_all()
        model = self._model
        mine, self._samples, self._prompts = (self._samples, self._prompts), [], []
        gathered: list[tuple[list[Sample], list[EvaluationPrompt]]] = [mine] * model.student.dp_group.size()
        dist.all_gather_object(gathered, mine, group=model.student.dp_group)
        # Replicas take turns in the rows of the set: back to its order, whatever the layout.
        turns = zip_longest(*(part for _, part in gathered))
        prompts = [prompt for turn in turns for prompt in turn if prompt is not None]
        place = {prompt.record.id: number for number, prompt in enumerate(prompts)}
        samples = sorted((s for part, _ in gathered for s in part), key=lambda s: (place[s.problem], s.sample))
        what = f"evaluation of step {model.completed_steps}"
        return from_rank_zero(what, lambda: self._conclude(samples, prompts), **_ROOM)

    def _conclude(self, samples: Sequence[Sample], prompts: Sequence[EvaluationPrompt]) -> EvaluationSummary:
        model, config = self._model, self._model.settings
        model.checkpoints.check_lock()
        directory = validation_directory(config.output, model.completed_steps)
        directory.replace(self._settings(prompts), problems_of(prompts), samples)
        labels = {"model": f"step {model.completed_steps}", "set": VALIDATION}
        with AnswerVerifier(config.evaluation.verify_seconds) as verifier:
            return conclude_samples(directory, samples, prompts, config, verifier, labels=labels).summary

    def _settings(self, prompts: Sequence[EvaluationPrompt]) -> SampleSettings:
        model, config = self._model, self._model.settings
        step = f"step {model.completed_steps}"
        sampling, engine = model.sampling(config.evaluation), engine_name(config)
        return sample_settings(prompts, config, sampling, model=step, weights_digest=step, engine=engine)


def _samples_on_disk(planned: PlannedSet, wanted: SampleSettings) -> set[tuple[str, int]]:
    begin(planned, wanted)
    return set(planned.directory.samples())


def validation_directory(output: str, step: int) -> EvaluationDirectory:
    """Where a run keeps its evaluation of the weights after `step` steps."""
    return EvaluationDirectory(Path(output) / "validation" / f"step-{step:06d}")


def remove_validations_after(output: Path, step: int) -> None:
    """Removes a run's evaluations of weights after more than `step` steps; on one rank."""
    for found in (output / "validation").glob("step-*"):
        match = _STEP.fullmatch(found.name)
        if match and int(match[1]) > step:
            EvaluationDirectory(found).remove()


def before_and_after(output: str, steps: int, *, resamples: int) -> str:
    """The table of a run's evaluations before its first and after its last step; on one rank, from the disk."""
    found = {"before": validation_directory(output, 0), "after": validation_directory(output, steps)}
    # A run that was given held-out rows only when it was resumed has nothing from before its first step.
    present = {name: Evaluation.read(directory) for name, directory in found.items() if directory.concluded}
    return comparison_table(present, resamples=resamples)
