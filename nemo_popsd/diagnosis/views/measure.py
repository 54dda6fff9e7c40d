"""Measures every answer of the student under every target, with forwards in every layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.diagnosis.config import DiagnosisSettings
from nemo_popsd.diagnosis.forwards import RowRollout, equal_counts, hidden_states, token_batches
from nemo_popsd.diagnosis.views.scores import AnswerFigures
from nemo_popsd.diagnosis.views.tokens import AnswerStates, ViewFigures, view_figures
from nemo_popsd.distillation.divergence import Divergence
from nemo_popsd.distillation.target_families import Target
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.distributed import device
from nemo_popsd.rollout.engine import Rollout
from nemo_popsd.training.trajectory import Trajectory


@dataclass(frozen=True)
class Candidate:
    """A target to score."""

    name: str
    """Name of the view, or of another property that distinguishes the candidate."""
    teacher: str
    """Name of the contexts of its teachers; candidates with the same contexts share answers and forwards."""
    target: Target
    divergence: Divergence


@dataclass(frozen=True)
class Answer:
    """One answer of the student."""

    problem: int
    """Index of its problem."""
    rollout: Rollout


@dataclass(frozen=True)
class _Part:
    """One rank's measurements of one answer under one candidate."""

    candidate: int
    answer: int
    owned: slice
    """The measured tokens."""
    sums: Tensor
    """Sums [len(SUMS)], float64, on the CPU."""
    probability: Tensor
    """Probabilities [4, tokens of `owned`], on the CPU."""


def measure(
    student: Student,
    answers: Sequence[Answer],
    teachers: Mapping[str, Sequence[PromptRow]],
    candidates: Sequence[Candidate],
    settings: DiagnosisSettings,
    *,
    markers: Sequence[int],
    ends: Sequence[int],
    horizon: int,
) -> list[list[AnswerFigures]]:
    """Measures each answer under each candidate. Collective.

    Answers are distributed over data-parallel ranks, and each rank of the last pipeline stage measures the tokens that
    it owns: one forward for the student's context, and one for the two contexts of each teacher. At any time, hidden
    states of at most `training.frozen_tokens` response tokens exist for each context, and logits of
    `diagnosis.chunk_tokens`. One gather of objects over all ranks: about 20 numbers per answer, and 4 per token.

    Args:
        student: an untrained student, whose weights equal those of the frozen branches.
        answers: answers, the same on every rank.
        teachers: the rows of the problems with the contexts of each teacher, by name of the teacher.
        candidates: candidates, the same on every rank.
        settings: settings of the diagnosis.
        markers: vocabulary ids of the markers.
        ends: vocabulary ids that end an answer.
        horizon: number of tokens to measure from the start of each answer.

    Returns:
        Results by candidate and answer, the same on every rank.
    """
    ids = {
        "markers": torch.tensor(markers, dtype=torch.long, device=device()),
        "ends": torch.tensor(ends, dtype=torch.long, device=device()),
    }
    any_teacher = next(iter(teachers.values()))
    own = [
        RowRollout(index, Trajectory(any_teacher[answer.problem], _cut(answer.rollout, horizon)))
        for index, answer in list(enumerate(answers))[student.dp_group.rank() :: student.dp_group.size()]
    ]
    parts: list[_Part] = []
    for batch in equal_counts(student, token_batches(own, settings.frozen_tokens)):
        live = hidden_states(student.chunks, [one.trajectory.student for one in batch], settings)
        for name, rows in teachers.items():
            seen = [replace(one.trajectory, row=rows[answers[one.row].problem]) for one in batch]
            with student.base.model() as base:
                states = hidden_states(base, [t.privileged for t in seen] + [t.reference for t in seen], settings)
            if not student.holds_output:
                continue
            for place, one in enumerate(batch):
                contexts = AnswerStates(live[place], states[place], states[len(batch) + place])
                owned = student.split.owned(one.trajectory.rollout.response)
                tokens = torch.tensor(one.trajectory.rollout.response[owned], dtype=torch.long, device=device())
                for index, candidate in enumerate(candidates):
                    if candidate.teacher == name:
                        figures = view_figures(
                            contexts,
                            tokens,
                            student.base_weight,
                            target=candidate.target,
                            divergence=candidate.divergence,
                            shard=student.vocab_shard,
                            chunk_tokens=settings.diagnosis.chunk_tokens,
                            **ids,
                        )
                        uncertain = settings.diagnosis.views.uncertain_entropy
                        sums = answer_sums(figures, uncertain).cpu()
                        parts.append(_Part(index, one.row, owned, sums, figures.probability.cpu()))
    # Ranks that share a vocabulary have the same results, so one of them reports; earlier pipeline stages have none.
    gathered: list[list[_Part]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, parts if student.owns_loss else [])
    return _merged([part for of_rank in gathered for part in of_rank], answers, len(candidates), horizon)


def answer_sums(figures: ViewFigures, uncertain_entropy: float) -> Tensor:
    """Sums over the tokens of one answer [len(SUMS)], float64, in the order of `scores.SUMS`."""
    defined = figures.signal.isfinite()
    uncertain = figures.entropy >= uncertain_entropy
    rows = [
        torch.ones_like(figures.entropy),
        *figures.signal.where(defined, figures.signal.new_zeros(())),
        *defined.to(figures.entropy.dtype),
        figures.distance,
        uncertain.to(figures.entropy.dtype),
        *(figures.favour * uncertain),
        figures.lift,
        *figures.markers,
        *figures.ends,
    ]
    return torch.stack(rows).sum(1, dtype=torch.float64)


def _cut(rollout: Rollout, horizon: int) -> Rollout:
    return rollout if len(rollout.response) <= horizon else replace(rollout, response=rollout.response[:horizon])


def _merged(
    parts: Sequence[_Part], answers: Sequence[Answer], candidates: int, horizon: int
) -> list[list[AnswerFigures]]:
    """Merges the results of each answer from all context-parallel ranks."""
    lengths = [min(len(answer.rollout.response), horizon) for answer in answers]
    sums = [[torch.zeros_like(parts[0].sums) for _ in answers] for _ in range(candidates)]
    probabilities = [[parts[0].probability.new_zeros(4, length) for length in lengths] for _ in range(candidates)]
    for part in parts:
        sums[part.candidate][part.answer] += part.sums
        probabilities[part.candidate][part.answer][:, part.owned] = part.probability
    return [
        [
            AnswerFigures(answer.problem, answer.rollout.response[:length], one_sums.numpy(), probability.numpy())
            for answer, length, one_sums, probability in zip(answers, lengths, of_sums, of_probability, strict=True)
        ]
        for of_sums, of_probability in zip(sums, probabilities, strict=True)
    ]
