"""An evaluation from its sets to its tables: what is drawn where, and what becomes of it. Engines are the caller's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.data.dataset import EvaluationPrompt, build_evaluation_prompts
from nemo_popsd.data.named_sets import named_source, refuse_another_size
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.comparison import Evaluation, tables_of_sets
from nemo_popsd.evaluation.equivalence import COMPARISON_RULES, AnswerVerifier, require_math_verify
from nemo_popsd.evaluation.records import (
    EvaluationDirectory,
    Problem,
    Sample,
    SampleSettings,
    prompt_digest,
)
from nemo_popsd.evaluation.sampling import Draw, missing_draws
from nemo_popsd.evaluation.scoring import score_samples
from nemo_popsd.rollout.engine import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION = "validation"
"""Name of the set that `data.validation` holds."""
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class PlannedSet:
    """One set of problems and where its evaluation lies."""

    name: str
    prompts: list[EvaluationPrompt]
    directory: EvaluationDirectory

    def missing(self, samples_per_problem: int) -> list[Draw]:
        """What is left to draw."""
        return missing_draws(self.prompts, samples_per_problem, self.directory.samples())


def sources_of(config: PopsdConfig) -> dict[str, SourceConfig]:
    """What is evaluated, by the name of the set.

    Raises:
        UserError: a named set is not on this machine.
    """
    settings = config.evaluation
    if settings.sets:
        return {name: named_source(name, settings.sets_directory) for name in settings.sets}
    return {VALIDATION: config.data.validation}


def plan(
    config: PopsdConfig, model: str, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None
) -> list[PlannedSet]:
    """Reads all sets. Every rank gets the same ones; nothing is written. `vocab_size` is the model's, if it is known.

    Raises:
        UserError: from reading the rows, a named set has another size than it should, or math-verify is missing.
    """
    require_math_verify()
    root = Path(config.output) / "evaluation" / as_file_name(model)
    planned = []
    for name, source in sources_of(config).items():
        data = replace(config.data, validation=source)
        prompts, _ = build_evaluation_prompts(data, source, tokenizer, vocab_size=vocab_size)
        if config.evaluation.sets:
            refuse_another_size(name, len(prompts))
        planned.append(PlannedSet(name, prompts[: config.evaluation.problems], EvaluationDirectory(root / name)))
    return planned


def as_file_name(model: str) -> str:
    """The path or name of a model as the name of a directory."""
    return model.replace(":", "/").strip("/").replace("/", "_")


def sample_settings(
    prompts: Iterable[EvaluationPrompt],
    config: PopsdConfig,
    sampling: SamplingParams,
    *,
    model: str,
    weights_digest: str,
    engine: str,
) -> SampleSettings:
    """What samples of `prompts` depend on."""
    return SampleSettings(
        model=model,
        weights_digest=weights_digest,
        engine=engine,
        seed=config.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_response_tokens=sampling.max_response_tokens,
        stop_token_ids=tuple(sorted(sampling.stop_token_ids)),
        prompts={prompt.record.id: prompt_digest(prompt.prompt) for prompt in prompts},
    )


def begin(planned: PlannedSet, settings: SampleSettings) -> None:
    """Makes or checks the directory of a set; on one rank.

    Raises:
        UserError: samples of other settings are there.
    """
    planned.directory.begin(settings, problems_of(planned.prompts))


def problems_of(prompts: Iterable[EvaluationPrompt]) -> list[Problem]:
    """What is kept of the prompts' rows."""
    return [Problem(p.record.id, p.record.question, _expected(p)) for p in prompts]


def conclude(planned: PlannedSet, config: PopsdConfig, verifier: AnswerVerifier, *, model: str) -> Evaluation:
    """Scores the samples of a set that the configuration asks for, and writes scores and summary; on one rank.

    Raises:
        UserError: samples are missing, because ranks do not share a file system.
    """
    drawn = planned.directory.samples()
    wanted = missing_draws(planned.prompts, config.evaluation.samples_per_problem)
    keys = [(draw.prompt.record.id, draw.sample) for draw in wanted]
    absent = sum(key not in drawn for key in keys)
    if absent:
        raise UserError(
            f"samples in {planned.directory.path}",
            got=f"{absent} of {len(keys)} missing",
            need="what all ranks have drawn, on a file system that all of them share",
            fix="set output to such a place",
        )
    samples = [drawn[key] for key in keys]
    return conclude_samples(
        planned.directory, samples, planned.prompts, config, verifier, labels={"model": model, "set": planned.name}
    )


def conclude_samples(
    directory: EvaluationDirectory,
    samples: Sequence[Sample],
    prompts: Iterable[EvaluationPrompt],
    config: PopsdConfig,
    verifier: AnswerVerifier,
    *,
    labels: Mapping[str, str],
) -> Evaluation:
    """Scores `samples`, all that there are to each problem, and writes scores and summary."""
    settings = config.evaluation
    answers = {prompt.record.id: _expected(prompt) for prompt in prompts}
    evaluation = Evaluation.of(score_samples(samples, answers, settings, verifier), settings)
    scoring = {
        "comparison": COMPARISON_RULES,
        "markers": settings.markers,
        "answer_pattern": settings.answer_pattern,
        "without_box": settings.without_box,
        "verify_seconds": settings.verify_seconds,
        "thinking_end": settings.thinking_end,
    }
    directory.conclude(evaluation.scores, {**labels, "scoring": scoring, **evaluation.summary.as_dict()})
    return evaluation


def conclude_all(planned: Sequence[PlannedSet], config: PopsdConfig, *, model: str) -> str:
    """Concludes every set; the tables, and where the files are."""
    with AnswerVerifier(config.evaluation.verify_seconds) as verifier:
        found = {one.name: {model: conclude(one, config, verifier, model=model)} for one in planned}
    places = "\n".join(f"written to {one.directory.path}" for one in planned)
    return f"{tables_of_sets(found, resamples=config.evaluation.resamples)}\n{places}"


def weights_digest(path: str | Path) -> str:
    """16 hexadecimal digits that stand for the weights at `path`, a file or a directory.

    Of every file: name, size, and up to 64 blocks of 64 KiB evenly spaced over it, so an 8-billion-parameter model
    takes milliseconds. Training moves weights everywhere; a change of a few bytes may go unseen.
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
