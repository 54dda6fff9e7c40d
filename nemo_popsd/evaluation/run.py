"""The steps of an evaluation from problem sets to tables: missing samples, directories, and scores.

The caller owns the engine that generates the samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_popsd.data.config import DataConfig
from nemo_popsd.data.dataset import EvaluationPrompt, build_evaluation_prompts
from nemo_popsd.data.named_sets import NAMED_SETS, refuse_another_size
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.checkers import checker_version
from nemo_popsd.evaluation.comparison import Evaluation, tables_of_sets
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import COMPARISON_RULES, AnswerVerifier, require_math_verify
from nemo_popsd.evaluation.problem_sets import sources_of
from nemo_popsd.evaluation.records import (
    EvaluationDirectory,
    Problem,
    Sample,
    SampleSettings,
    prompt_digest,
)
from nemo_popsd.evaluation.sampling import SampleRequest, missing_samples
from nemo_popsd.evaluation.scoring import score_samples
from nemo_popsd.rollout.engine import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class ProblemSet:
    """One set of problems and the directory of its evaluation."""

    name: str
    prompts: list[EvaluationPrompt]
    """The problems to evaluate."""
    directory: EvaluationDirectory
    """Directory of the evaluation of one model on this set."""
    ids: frozenset[str]
    """Ids of all problems of the set."""

    def missing(self, samples_per_problem: int) -> list[SampleRequest]:
        """The samples that the directory does not have yet."""
        return missing_samples(self.prompts, samples_per_problem, self.directory.samples())


def prepare_sets(
    settings: EvaluationConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    output: str | Path,
    vocab_size: int | None = None,
) -> list[ProblemSet]:
    """Reads all problem sets, the same on every rank. Does not write files.

    Args:
        settings: problem sets, and the number of problems of each.
        data: how rows become prompts; `data.validation` is the problem set if `settings` names none.
        tokenizer: tokenizer of the model.
        model: path or name of the model; names the directory of the evaluation.
        output: directory of the run; sets are evaluated in `<output>/evaluation/<model>/<set>`.
        vocab_size: vocabulary size of the model, if known.

    Raises:
        UserError: the rows cannot be read, a published set has an unexpected size, or math-verify is missing.
    """
    require_math_verify()
    root = Path(output) / "evaluation" / as_file_name(model)
    sets = []
    for name, source in sources_of(settings, data).items():
        prompts, _ = build_evaluation_prompts(
            replace(data, validation=source), source, tokenizer, vocab_size=vocab_size
        )
        if name in NAMED_SETS:
            refuse_another_size(name, len(prompts))
        ids = frozenset(prompt.record.id for prompt in prompts)
        sets.append(ProblemSet(name, prompts[: settings.problems], EvaluationDirectory(root / name), ids))
    return sets


def as_file_name(model: str) -> str:
    """Converts the path or name of a model to a directory name."""
    return model.replace(":", "/").strip("/").replace("/", "_")


def sample_settings(
    prompts: Iterable[EvaluationPrompt],
    sampling: SamplingParams,
    *,
    seed: int,
    model: str,
    weights_digest: str,
    engine: str,
) -> SampleSettings:
    """Everything that samples of `prompts` depend on."""
    return SampleSettings(
        model=model,
        weights_digest=weights_digest,
        engine=engine,
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_response_tokens=sampling.max_response_tokens,
        stop_token_ids=tuple(sorted(sampling.stop_token_ids)),
        prompts={prompt.record.id: prompt_digest(prompt.prompt) for prompt in prompts},
    )


def begin(problem_set: ProblemSet, settings: SampleSettings) -> None:
    """Creates or checks the directory of a set. Call it on one rank.

    Raises:
        UserError: it contains samples of another set or samples generated with other settings.
    """
    problem_set.directory.begin(settings, problems_of(problem_set.prompts), whole=problem_set.ids)


def problems_of(prompts: Iterable[EvaluationPrompt]) -> list[Problem]:
    """The problems in the form that is recorded on disk."""
    return [Problem(p.record.id, p.record.question, _expected(p)) for p in prompts]


def conclude(
    problem_set: ProblemSet, settings: EvaluationConfig, verifier: AnswerVerifier, *, model: str
) -> Evaluation:
    """Scores the samples of a set that `settings` requests, and writes scores and summary. Call it on one rank.

    Raises:
        UserError: samples are missing, because ranks do not share a file system.
    """
    on_disk = problem_set.directory.samples()
    wanted = missing_samples(problem_set.prompts, settings.samples_per_problem)
    keys = [(request.prompt.record.id, request.sample) for request in wanted]
    absent = sum(key not in on_disk for key in keys)
    if absent:
        raise UserError(
            f"samples in {problem_set.directory.path}",
            got=f"{absent} of {len(keys)} missing",
            need="the samples of all ranks, on a file system that all of them share",
            fix="set output to a directory on such a file system",
        )
    samples = [on_disk[key] for key in keys]
    return conclude_samples(
        problem_set.directory,
        samples,
        problem_set.prompts,
        settings,
        verifier,
        labels={"model": model, "set": problem_set.name},
    )


def conclude_samples(
    directory: EvaluationDirectory,
    samples: Sequence[Sample],
    prompts: Iterable[EvaluationPrompt],
    settings: EvaluationConfig,
    verifier: AnswerVerifier,
    *,
    labels: Mapping[str, str],
) -> Evaluation:
    """Scores `samples`, which must be all samples of each problem, and writes scores and summary."""
    answers = {prompt.record.id: _expected(prompt) for prompt in prompts}
    evaluation = Evaluation.of(score_samples(samples, answers, settings, verifier), settings)
    scoring = {
        "comparison": COMPARISON_RULES,
        "checker": settings.checker,
        "checker_version": checker_version(settings.checker) if settings.checker else "",
        "markers": settings.markers,
        "answer_pattern": settings.answer_pattern,
        "without_box": settings.without_box,
        "verify_seconds": settings.verify_seconds,
        "thinking_end": settings.thinking_end,
    }
    directory.conclude(evaluation.scores, {**labels, "scoring": scoring, **evaluation.summary.as_dict()})
    return evaluation


def conclude_all(problem_sets: Sequence[ProblemSet], settings: EvaluationConfig, *, model: str) -> str:
    """Concludes every set; returns the tables and the paths of the files."""
    with AnswerVerifier(settings.verify_seconds, settings.checker) as verifier:
        evaluations = {one.name: {model: conclude(one, settings, verifier, model=model)} for one in problem_sets}
    places = "\n".join(f"written to {one.directory.path}" for one in problem_sets)
    return f"{tables_of_sets(evaluations, resamples=settings.resamples)}\n{places}"


def weights_digest(path: str | Path) -> str:
    """16 hexadecimal digits that identify the weights at `path`, a file or a directory.

    A SHA-256 over each file's name, size, and up to 64 evenly spaced blocks of 64 KiB; an 8-billion-parameter model
    takes milliseconds. Training changes weights everywhere, but a change of a few bytes may go undetected.
    """
    path = Path(path)
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        size = file.stat().st_size
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as content:
            for block in range(_BLOCKS):
                content.seek(block * size // _BLOCKS)
                digest.update(content.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _expected(prompt: EvaluationPrompt) -> str:
    assert prompt.record.answer is not None
    return prompt.record.answer
