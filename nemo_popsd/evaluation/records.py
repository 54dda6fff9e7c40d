"""The files of an evaluation: samples, scores and summary.

    <output>/evaluation/<model>/<set>/     from `popsd evaluate`; <set> is a named set or `validation`
    <output>/validation/step-000040/       from a training run: before the first step (000000), during, and at the end

Each of these directories contains

    settings.json         everything that the samples depend on: format, model, digest of its weights, engine, seed,
                          sampling, and a digest of each problem's prompt. Samples of other settings are never added
    problems.jsonl        {"id", "question", "answer"} per problem, in the order of the set
    samples-00000.jsonl   {"problem", "sample", "text", "tokens", "truncated"} per response, in the order of generation.
                          One file per data-parallel replica; a line is on disk before the next response is
                          generated. `sample` is the index among the responses to one problem; `text` is decoded with
                          special tokens but without the stop token; `tokens` includes the stop token; `truncated`
                          means that the response ended at the length limit (older files name the key `cut`)
    scores.jsonl          one line per sample with the fields of `SampleScore`, recomputed from all samples each time
    summary.json          the fields of `nemo_popsd.evaluation.summary.EvaluationSummary`, and `model`, `set`, and
                          `scoring`, whose `comparison` is the version of the comparison rules
                          (`nemo_popsd.evaluation.equivalence.COMPARISON_RULES`)

A killed process may leave a partial last line in a samples file. It is skipped, and removed before the next write.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import remove_files, write_text
from nemo_popsd.files.json_files import as_dataclass, damaged, read_json, read_json_lines
from nemo_popsd.files.ownership import EVALUATION, MARK, read_mark, write_mark

FORMAT = 1
_SETTINGS, _PROBLEMS, _SCORES, _SUMMARY = "settings.json", "problems.jsonl", "scores.jsonl", "summary.json"
FILES = (_SETTINGS, _PROBLEMS, "samples-*.jsonl", _SCORES, _SUMMARY)
"""Patterns of the names of these files."""
_OLDER_DIGEST_KEY = "fingerprint"
"""Key under which earlier versions wrote `SampleSettings.weights_digest`; it is still read."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a set."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated response."""

    problem: str
    """Id of the problem."""
    sample: int
    """Index among the responses to it."""
    text: str
    """Decoded with special tokens, without the stop token."""
    tokens: int
    """Length, including the stop token."""
    truncated: bool
    """Whether the response ended at the length limit instead of a stop token."""


@dataclass(frozen=True, slots=True)
class SampleScore:
    """The score of one response."""

    problem: str
    """Id of the problem."""
    sample: int
    """Index among the responses to it."""
    answer: str | None
    """The extracted final answer; None if there is none."""
    correct: bool
    """Whether the answer equals the expected one."""
    decided_by: str
    """See `nemo_popsd.evaluation.equivalence.Verdict`."""
    vote: int | None
    """Number shared by the responses to a problem with the same answer; None without an answer."""
    truncated: bool
    """Whether the response ended at the length limit instead of at a stop token."""
    tokens: int
    """Response length, including the stop token."""
    markers: dict[str, int]
    """Occurrences of each marker."""
    segments: int
    """Reflection segments, see `nemo_popsd.evaluation.behaviour`."""
    closed_thinking: bool
    """Whether the response closes its thinking."""
    repeated: float
    """Share of the response's word sequences that occurred earlier in it."""
    looping: bool
    """Whether the response ends in a loop."""


@dataclass(frozen=True)
class SampleSettings:
    """Everything that the samples depend on, except for their number, since each sample has its own seed."""

    model: str
    """Name for display; not compared."""
    weights_digest: str
    """Digest of the weights, or the name under which an endpoint serves them."""
    engine: str
    """The engine that generates the samples."""
    seed: int
    """Seed of the run."""
    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]
    prompts: dict[str, str]
    """Digest of each problem's prompt, by problem id."""


class EvaluationDirectory:
    """The directory of one evaluation, described in the module docstring."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(
        self, settings: SampleSettings, problems: Sequence[Problem], *, whole: Collection[str] | None = None
    ) -> None:
        """Writes settings and problems, and checks that existing samples match them. Call it on one rank.

        The problems may differ from the existing ones; problems in both must have the same prompt.

        Args:
            settings: settings of the samples.
            problems: problems to evaluate.
            whole: ids of all problems of the set, a superset or a subset of the existing problems; None skips this
                check.

        Raises:
            UserError: the directory contains samples of another set or with other settings, or files that were not
                written by an evaluation.
        """
        new = {"format": FORMAT, **asdict(settings), "stop_token_ids": list(settings.stop_token_ids)}
        present = _read_json(self.path / _SETTINGS)
        if present is not None and _OLDER_DIGEST_KEY in present:
            present["weights_digest"] = present.pop(_OLDER_DIGEST_KEY)
        self._refuse_other_files(present)
        if present is not None and any(self.path.glob("samples-*.jsonl")):
            self._refuse_other_settings(present, new)
            if whole is not None:
                self._refuse_another_set(present["prompts"], whole)
            new["prompts"] = {**present["prompts"], **new["prompts"]}
        self.path.mkdir(parents=True, exist_ok=True)
        write_mark(self.path, EVALUATION)
        known = {problem.id: problem for problem in self.problems()} if present is not None else {}
        known.update((problem.id, problem) for problem in problems)
        write_text(self.path / _PROBLEMS, _lines(asdict(problem) for problem in known.values()))
        write_text(self.path / _SETTINGS, json.dumps(new, indent=2, ensure_ascii=False) + "\n")

    def replace(self, settings: SampleSettings, problems: Sequence[Problem], samples: Iterable[Sample]) -> None:
        """Replaces all samples of the directory. Call it on one rank."""
        self.remove()
        self.begin(settings, problems)
        with self.append_to(0) as file:
            file.add(samples)

    def remove(self) -> None:
        """Removes the files of the evaluation, and the directory if it is then empty. Call it on one rank."""
        remove_files(self.path, (*FILES, MARK))

    def append_to(self, part: int) -> SampleWriter:
        """Opens the samples file of data-parallel replica `part` for writing."""
        return SampleWriter(self.path / f"samples-{part:05d}.jsonl")

    @property
    def concluded(self) -> bool:
        """Whether the summary, which is written last, exists."""
        return (self.path / _SUMMARY).is_file()

    def settings(self) -> dict[str, Any]:
        """Content of settings.json.

        Raises:
            UserError: it is missing.
        """
        return self._required(_SETTINGS)

    def problems(self) -> list[Problem]:
        """The problems in the order of the set; empty if the file is missing."""
        if not (self.path / _PROBLEMS).is_file():
            return []
        return [as_dataclass(Problem, line, where) for where, line in _read_lines(self.path / _PROBLEMS)]

    def samples(self) -> dict[tuple[str, int], Sample]:
        """All complete samples by problem and index.

        Raises:
            UserError: a line is damaged, or a sample occurs twice.
        """
        samples: dict[tuple[str, int], Sample] = {}
        for file in sorted(self.path.glob("samples-*.jsonl")):
            for where, line in _read_lines(file):
                sample = as_dataclass(Sample, _renamed(line), where)
                if (sample.problem, sample.sample) in samples:
                    raise UserError(
                        str(file),
                        got=f"sample {sample.sample} of problem {sample.problem!r} twice",
                        need="each sample once",
                        fix="remove the directory and evaluate again",
                    )
                samples[sample.problem, sample.sample] = sample
        return samples

    def conclude(self, scores: Sequence[SampleScore], summary: Mapping[str, object]) -> None:
        """Writes scores and summary, each atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / _SCORES, _lines(asdict(score) for score in scores))
        write_text(self.path / _SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def scores(self) -> list[SampleScore]:
        """The scores that `conclude` wrote.

        Raises:
            UserError: the evaluation has not been concluded.
        """
        if not (self.path / _SCORES).is_file():
            raise self._incomplete(_SCORES)
        return [as_dataclass(SampleScore, _renamed(line), where) for where, line in _read_lines(self.path / _SCORES)]

    def summary(self) -> dict[str, Any]:
        """The summary that `conclude` wrote.

        Raises:
            UserError: the evaluation has not been concluded.
        """
        return self._required(_SUMMARY)

    def _required(self, name: str) -> dict[str, Any]:
        content = _read_json(self.path / name)
        if content is None:
            raise self._incomplete(name)
        return content

    def _refuse_other_files(self, settings: Mapping[str, object] | None) -> None:
        mark = read_mark(self.path)
        if (mark is not None and mark.kind == EVALUATION) or (settings is not None and "prompts" in settings):
            return
        if present := [name for name in (_SETTINGS, _PROBLEMS, _SCORES, _SUMMARY) if os.path.lexists(self.path / name)]:
            raise UserError(
                f"evaluation {self.path}",
                got=f"{', '.join(present)} without the mark {MARK} of an evaluation of nemo_popsd",
                need="a directory without such files, or the directory of an evaluation; nothing was changed",
                fix=f"set output to another directory, or move {self.path} away",
            )

    def _refuse_other_settings(self, present: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        compared = [key for key in new if key not in ("model", "prompts")]
        differing = [key for key in compared if present.get(key) != new[key]]
        differences = [f"{key}={new[key]!r} where the samples have {present.get(key)!r}" for key in differing]
        prompts = present.get("prompts", {})
        others = [problem for problem, digest in new["prompts"].items() if prompts.get(problem, digest) != digest]
        if others:
            differences.append(f"other prompts for {len(others)} problems, including {others[0]!r}")
        if differences:
            raise UserError(
                f"samples in {self.path}",
                got="; ".join(differences),
                need="the settings with which they were generated: samples of different settings are not mixed",
                fix="set output to another directory, or remove this one",
            )

    def _refuse_another_set(self, present: Collection[str], whole: Collection[str]) -> None:
        foreign = [name for name in present if name not in whole]
        if foreign and not set(whole) <= set(present):
            raise UserError(
                f"samples in {self.path}",
                got=f"problems of another set ({len(foreign)}, including {foreign[0]!r})",
                need="one problem set in a directory",
                fix="name the sets, evaluation.sets={NAME: PATH}, set output to another directory, or remove this one",
            )

    def _incomplete(self, name: str) -> UserError:
        return UserError(
            "evaluation",
            got=f"no {name} in {str(self.path)!r}",
            need="the directory of a finished evaluation, such as OUTPUT/evaluation/MODEL/SET",
            fix="correct the path, or run `popsd evaluate` to its end",
        )


def validation_directory(output: str | Path, step: int) -> EvaluationDirectory:
    """The directory to which a run writes the evaluation of its weights after `step` steps."""
    return EvaluationDirectory(Path(output) / "validation" / f"step-{step:06d}")


class SampleWriter:
    """Appends samples to one file. A context manager; a file has at most one writer at a time."""

    def __init__(self, path: Path) -> None:
        """Opens `path` and removes a partial last line that a killed process left.

        Raises:
            UserError: another process is writing to it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                str(path),
                got="another process that writes samples into it",
                need="one evaluation at a time in a directory",
                fix="wait for it, or set output to another directory",
            ) from None
        except OSError:
            pass  # a file system without locks
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, samples: Iterable[Sample]) -> None:
        """Appends `samples`; they are on disk when this returns."""
        self._file.write(_lines(map(asdict, samples)).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def prompt_digest(prompt: Sequence[int]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a prompt's token ids."""
    return hashlib.sha256(",".join(map(str, prompt)).encode()).hexdigest()[:16]


def _lines(objects: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in objects)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise damaged(path, "not an object")
    return content


def _read_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Location and object of each complete line of `path`."""
    return read_json_lines(path, skip_partial=True)


def _renamed(line: object) -> object:
    """`line` with the current name of `truncated`, which older files name `cut`."""
    if not isinstance(line, dict) or "cut" not in line:
        return line
    return {("truncated" if key == "cut" else key): value for key, value in line.items()}
