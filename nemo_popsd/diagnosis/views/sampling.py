"""Generates the student's answers in every layout, and stores their token ids on disk for later scoring."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_popsd.data.dataset import EvaluationPrompt
from nemo_popsd.diagnosis.ownership import refuse_other_files
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.records import SampleSettings
from nemo_popsd.evaluation.sampling import missing_samples
from nemo_popsd.files.atomic import write_lines
from nemo_popsd.files.json_files import damaged, read_json_lines
from nemo_popsd.files.ownership import DIAGNOSIS, write_mark
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.agreement import from_rank_zero
from nemo_popsd.rollout.engine import Request, Rollout, RolloutEngine, SamplingParams

logger = logging.getLogger(__name__)

FILE = "answers.jsonl"
"""The first line has the settings of the answers; each further line has problem, sample, tokens, truncated."""
_SPACE = {"need": "space and write permission", "fix": "free space, or set output elsewhere"}
Answers = Mapping[tuple[str, int], Rollout]
"""Answers by id of the problem and index of the sample."""


def student_answers(
    student: Student,
    engine: RolloutEngine,
    sampling: SamplingParams,
    prompts: Sequence[EvaluationPrompt],
    samples: int,
    depends_on: SampleSettings,
    directory: Path,
    *,
    seed: int,
    batch_rows: int,
    expert_parallel: bool,
) -> Answers:
    """Returns `samples` answers to each prompt, read from disk or generated. Collective.

    Missing answers are distributed over data-parallel ranks and generated `batch_rows` at a time, with the seeds of an
    evaluation, so that they do not depend on the layout. Finally, all answers are written to `directory` atomically.
    One gather of objects over the data-parallel group; two gathers and broadcasts over all ranks.

    Args:
        student: determines the position of this rank among the others.
        engine: generates the answers.
        sampling: sampling parameters.
        prompts: prompts, the same on every rank.
        samples: number of answers per prompt.
        depends_on: everything that the answers depend on, including the digests of `prompts`.
        directory: directory of the file.
        seed: seed of the run.
        batch_rows: number of answers to generate together.
        expert_parallel: whether data-parallel ranks share experts, and must generate equal numbers of batches.

    Raises:
        UserError: the file has answers with other settings, or was not written by a diagnosis. Raised on every rank.
    """
    what = f"answers {directory}"
    known = from_rank_zero(what, partial(_read, directory, depends_on), **_SPACE)
    missing = missing_samples(prompts, samples, known)
    if missing:
        replica, replicas = student.dp_group.rank(), student.dp_group.size()
        own = missing[replica::replicas]
        # Ranks that share experts generate equal numbers: a rank with fewer answers repeats some and discards them.
        requested = own + missing[: len(missing[::replicas]) - len(own)] if expert_parallel else own
        generated: dict[tuple[str, int], Rollout] = {}
        for start in range(0, len(requested), batch_rows):
            batch = requested[start : start + batch_rows]
            requests = [Request(one.prompt.prompt, one.seed(seed)) for one in batch]
            for one, rollout in zip(batch, engine.generate(requests, sampling), strict=True):
                generated[one.prompt.record.id, one.sample] = rollout
            logger.info("student: %d of %d answers of this replica", min(start + batch_rows, len(own)), len(own))
        gathered: list[dict[tuple[str, int], Rollout]] = [{}] * replicas
        dist.all_gather_object(gathered, generated, group=student.dp_group)
        known = {**known, **{key: rollout for of_rank in gathered for key, rollout in of_rank.items()}}
        from_rank_zero(what, partial(_write, directory, depends_on, known), **_SPACE)
    return {(p.record.id, index): known[p.record.id, index] for p in prompts for index in range(samples)}


def _read(directory: Path, depends_on: SampleSettings) -> dict[tuple[str, int], Rollout]:
    """The answers on disk to prompts of `depends_on`; empty if there is no file."""
    refuse_other_files(directory, (FILE,))
    file = directory / FILE
    if not file.exists():
        return {}
    lines = read_json_lines(file)
    present: dict[str, Any] = next(lines, ("", None))[1] or {}
    wanted = _settings(depends_on)
    differing = [key for key in wanted if key not in ("model", "prompts") and present.get(key) != wanted[key]]
    prompts = present.get("prompts", {})
    changed = [problem for problem, digest in depends_on.prompts.items() if prompts.get(problem, digest) != digest]
    if differing or changed:
        differences = [f"{key}={wanted[key]!r} where the answers have {present.get(key)!r}" for key in differing]
        differences += [f"another prompt for problem {changed[0]!r}"] if changed else []
        raise UserError(
            f"answers in {file}",
            got="; ".join(differences),
            need="the settings with which they were generated",
            fix="set output to another directory, or remove this file",
        )
    try:
        return {
            (str(line["problem"]), int(line["sample"])): Rollout(
                response=[int(token) for token in line["tokens"]],
                log_probs=[],
                truncated=bool(line["truncated"]),
                weights_version=0,
            )
            for _, line in lines
        }
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(file, str(error)) from None


def _write(directory: Path, depends_on: SampleSettings, answers: Answers) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_mark(directory, DIAGNOSIS)
    lines = [_settings(depends_on)]
    lines += [
        {"problem": problem, "sample": sample, "tokens": rollout.response, "truncated": rollout.truncated}
        for (problem, sample), rollout in sorted(answers.items())
    ]
    write_lines(directory / FILE, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _settings(depends_on: SampleSettings) -> dict[str, Any]:
    return {**asdict(depends_on), "stop_token_ids": list(depends_on.stop_token_ids)}
