"""Scoring of targets before training: rows, answers of student and teachers, statistics and verdicts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import data_settings, diagnosis_settings
from nemo_popsd.data.contexts import Borrowed
from nemo_popsd.data.dataset import EvaluationPrompt, PromptDataset, PromptRow, build_dataset
from nemo_popsd.data.models import model_path
from nemo_popsd.diagnosis.pieces import marker_entries
from nemo_popsd.diagnosis.views import verdicts
from nemo_popsd.diagnosis.views.measure import Answer, Candidate, measure
from nemo_popsd.diagnosis.views.record import FORMAT, CandidateRecord, ViewScores
from nemo_popsd.diagnosis.views.sampling import student_answers
from nemo_popsd.diagnosis.views.scores import (
    AnswerFigures,
    Resampling,
    gain,
    gain_over,
    problems_needed,
    problems_with_both,
    score_student,
    score_target,
)
from nemo_popsd.distillation.divergence import build_divergence
from nemo_popsd.distillation.target_families import build_target
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.equivalence import AnswerVerifier
from nemo_popsd.evaluation.records import EvaluationDirectory
from nemo_popsd.evaluation.run import ProblemSet, as_file_name, conclude, weights_digest
from nemo_popsd.evaluation.sampling import sample_of
from nemo_popsd.evaluation.scoring import score_samples
from nemo_popsd.evaluation.summary import RESAMPLING_SEED
from nemo_popsd.model.evaluation import generate_missing
from nemo_popsd.model.purified_opsd import PurifiedOPSDModel
from nemo_popsd.parallel.agreement import from_rank_zero

logger = logging.getLogger(__name__)

_FEWEST = 2
"""Minimum number of problems with both right and wrong answers for a comparison."""
_WANTED = 30
"""Recommended number of problems with both right and wrong answers, for the error message."""


@dataclass(frozen=True)
class Rows:
    """The problems, with the contexts of every teacher."""

    teachers: Mapping[str, Sequence[PromptRow]]
    """Rows of each teacher, by the name of the first candidate with this teacher."""
    teacher_of: Mapping[str, str]
    """Name of the teacher of each candidate."""

    @property
    def student(self) -> list[EvaluationPrompt]:
        """The student's prompts."""
        rows = next(iter(self.teachers.values()))
        return [EvaluationPrompt(row.record, row.contexts.student) for row in rows]

    def prompts(self, teacher: str) -> list[EvaluationPrompt]:
        """The prompts of a teacher."""
        return [EvaluationPrompt(row.record, row.contexts.privileged) for row in self.teachers[teacher]]


def score_candidates(
    model: PurifiedOPSDModel, config: PopsdConfig, candidates: Mapping[str, PopsdConfig], directory: Path
) -> ViewScores:
    """Score the target of each of `candidates` before training. Collective over all ranks.

    Answers of the student and of the teachers are stored in `directory`, and a repeated call reuses them.

    Args:
        model: untrained model, built from `config`.
        config: sampling, seed and number of problems.
        candidates: configurations by name, each `config` with another view, family or divergence.
        directory: directory of the answers.

    Raises:
        UserError: a row lacks a view or an answer, no row fits all views, too few problems have both right and wrong
            answers, or answers on disk have other settings; on every rank.
    """
    views = config.diagnosis.views
    rows = read_rows(model, config, candidates)
    prompts = rows.student
    # Refuses contexts that are too long for the model, and passes their length to the engine.
    for teacher in rows.teachers:
        model.refuse_long_evaluation([*prompts, *rows.prompts(teacher)])
    logger.info("%s", cost(rows, config))
    sampler, name = model.sampler, config.student.source
    digest = weights_digest(model_path(name))
    depends_on = sampler.sample_settings(prompts, model=name, digest=digest)
    known = student_answers(
        model.student,
        model.engine,
        sampler.sampling,
        prompts,
        views.samples,
        depends_on,
        directory,
        seed=sampler.seed,
        batch_rows=sampler.batch_rows,
        expert_parallel=sampler.expert_parallel,
    )
    place = {prompt.record.id: index for index, prompt in enumerate(prompts)}
    answers = [Answer(place[problem], rollout) for (problem, _), rollout in known.items()]
    texts = [sample_of(problem, sample, rollout, model.tokenizer) for (problem, sample), rollout in known.items()]
    expected = {prompt.record.id: prompt.record.answer or "" for prompt in prompts}

    def verify() -> list[bool]:
        with AnswerVerifier(config.evaluation.verify_seconds, config.evaluation.checker) as verifier:
            return [score.correct for score in score_samples(texts, expected, config.evaluation, verifier)]

    right = from_rank_zero("answers", verify, need="an answer checker that works", fix="set evaluation.checker")
    compared = problems_with_both([answer.problem for answer in answers], right)
    if len(compared) < _FEWEST:
        raise _nothing_to_compare(right, len(compared), len(prompts), views.samples)
    taught = _teachers_answers(model, config, rows, directory, digest)
    scored = [
        Candidate(
            one,
            rows.teacher_of[one],
            build_target(settings.distillation.target),
            build_divergence(settings.distillation.divergence),
        )
        for one, settings in candidates.items()
    ]
    settings = diagnosis_settings(config)
    entries = marker_entries(model.tokenizer, settings.markers, model.student.vocab_size)
    figures = measure(
        model.student,
        answers,
        rows.teachers,
        scored,
        settings,
        markers=sorted({token for tokens in entries.values() for token in tokens}),
        ends=_ends(model, config),
        horizon=config.rollout.max_response_tokens,
    )
    return _conclude(config, candidates, rows, figures, right, taught, len(compared))


def read_rows(model: PurifiedOPSDModel, config: PopsdConfig, candidates: Mapping[str, PopsdConfig]) -> Rows:
    """Read the first rows that fit every candidate. Every rank reads the same rows; no collective.

    Raises:
        UserError: a row lacks a view or an answer (the message names it), or too few rows are left.
    """
    views = config.diagnosis.views
    datasets: dict[str, PromptDataset] = {}
    teacher_of: dict[str, str] = {}
    known: dict[str, str] = {}
    for name, settings in candidates.items():
        data, borrowed = data_settings(settings), settings.distillation.target.borrowed
        teacher = known.setdefault(f"{data}{borrowed}", name)
        teacher_of[name] = teacher
        if teacher == name:
            source = data.train if views.source == "train" else data.validation
            datasets[name], _ = build_dataset(
                data,
                source,
                model.tokenizer,
                Borrowed(borrowed),
                vocab_size=model.architecture.vocab_size,
                need_answer=True,
            )
    first, *others = datasets.values()
    shared = set(first.ids).intersection(*(dataset.ids for dataset in others))
    ids = [one for one in first.ids if one in shared][: views.problems]
    if len(ids) < _FEWEST:
        raise UserError(
            "diagnosis",
            got=f"{len(ids)} rows of data.{views.source} that fit all of {', '.join(candidates)}",
            need=f"at least {_FEWEST}",
            fix="set data.max_reference_tokens higher, or name fewer views",
        )
    return Rows({name: [dataset.by_id(one) for one in ids] for name, dataset in datasets.items()}, teacher_of)


def cost(rows: Rows, config: PopsdConfig) -> str:
    """Describe in one line what the scoring will generate and compute."""
    views, teachers = config.diagnosis.views, len(rows.teachers)
    problems = len(rows.student)
    of_student, of_teachers = problems * views.samples, problems * views.teacher_samples * teachers
    return (
        f"scoring on {problems} problems of data.{views.source}: {of_student:,} answers of the student and "
        f"{of_teachers:,} of {teachers} teachers, of at most {config.evaluation.max_response_tokens:,} tokens each; "
        f"then {1 + 2 * teachers} forward passes over the first {config.rollout.max_response_tokens:,} tokens of each "
        "answer of the student"
    )


def _teachers_answers(
    model: PurifiedOPSDModel, config: PopsdConfig, rows: Rows, directory: Path, digest: str
) -> dict[str, dict[int, list[bool]]]:
    """Return whether each answer of each teacher is right, by teacher and problem. Reuses samples on disk."""
    settings = replace(config.evaluation, samples_per_problem=config.diagnosis.views.teacher_samples)
    name = config.student.source
    sets = []
    for teacher in rows.teachers:
        prompts = rows.prompts(teacher)
        ids = frozenset(prompt.record.id for prompt in prompts)
        sets.append(
            ProblemSet(teacher, prompts, EvaluationDirectory(directory / "teachers" / as_file_name(teacher)), ids)
        )
    generate_missing(replace(model.sampler, settings=settings), sets, model=name, digest=digest)

    def verify(problem_set: ProblemSet) -> dict[int, list[bool]]:
        place = {prompt.record.id: index for index, prompt in enumerate(problem_set.prompts)}
        found: dict[int, list[bool]] = {}
        with AnswerVerifier(settings.verify_seconds, settings.checker) as verifier:
            for score in conclude(problem_set, settings, verifier, model=name).scores:
                found.setdefault(place[score.problem], []).append(score.correct)
        return found

    space = {"need": "space and write permission", "fix": "free space, or set output elsewhere"}
    return {one.name: from_rank_zero(f"answers {one.directory.path}", partial(verify, one), **space) for one in sets}


def _conclude(
    config: PopsdConfig,
    candidates: Mapping[str, PopsdConfig],
    rows: Rows,
    figures: Sequence[Sequence[AnswerFigures]],
    right: Sequence[bool],
    taught: Mapping[str, Mapping[int, Sequence[bool]]],
    compared: int,
) -> ViewScores:
    views, problems = config.diagnosis.views, len(rows.student)
    how = Resampling(
        resamples=config.evaluation.resamples, confidence=config.evaluation.confidence, seed=RESAMPLING_SEED
    )
    records: list[CandidateRecord] = []
    judged = {}
    for (name, settings), of_candidate in zip(candidates.items(), figures, strict=True):
        scores = score_target(of_candidate, right, taught[rows.teacher_of[name]], problems, how)
        judged[name] = verdicts.verdict(name, scores)
        records.append(
            {
                "name": name,
                "family": settings.distillation.target.family,
                "scores": scores,
                "kind": judged[name].kind,
                "verdict": judged[name].sentence,
            }
        )
    ordered = verdicts.ranking(list(judged.values()))
    of_name = dict(zip(candidates, figures, strict=True))
    lead = None
    if len(ordered) > 1:
        one, other = (gain(of_name[verdict.name], right, problems) for verdict in ordered[:2])
        lead = gain_over(one, other, how)
    return {
        "format": FORMAT,
        "name": config.student.source,
        "settings": {
            "source": views.source,
            "problems": problems,
            "samples": views.samples,
            "teacher_samples": views.teacher_samples,
            "uncertain_entropy": views.uncertain_entropy,
            "horizon": config.rollout.max_response_tokens,
            "seed": config.seed,
            "markers": list(config.evaluation.markers),
            "confidence": config.evaluation.confidence,
        },
        "answers": len(right),
        "right": sum(right),
        "compared": compared,
        "student": score_student(figures[0], right, problems, how),
        "candidates": records,
        "best": verdicts.best(ordered, lead),
    }


def _ends(model: PurifiedOPSDModel, config: PopsdConfig) -> list[int]:
    """Return the vocabulary entries that end an answer: the stop tokens, and the end-of-thinking if it is one token."""
    closing = model.tokenizer.encode(config.evaluation.thinking_end, add_special_tokens=False)
    return sorted({*model.sampler.sampling.stop_token_ids, *(closing if len(closing) == 1 else ())})


def _nothing_to_compare(right: Sequence[bool], compared: int, problems: int, samples: int) -> UserError:
    share = 100 * sum(right) / len(right)
    more = 2 * samples
    return UserError(
        "diagnosis",
        got=f"{compared} of {problems} problems with right and wrong answers among {samples} (accuracy {share:.1f} %)",
        need=f"at least {_FEWEST}, better {_WANTED}: at this accuracy about "
        f"{problems_needed(right, samples, _WANTED):,} problems with {samples} answers each, or "
        f"{problems_needed(right, more, _WANTED):,} with {more}",
        fix="set diagnosis.views.problems or diagnosis.views.samples, or data with problems that the student solves "
        "sometimes",
    )
