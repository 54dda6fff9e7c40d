"""An evaluation on disk: what was drawn, how it was scored, what it comes to.

    <output>/evaluation/<model>/<set>/     by `popsd evaluate`; <set> is a named set, or `validation`
    <output>/validation/step-000040/       by a training run, before its first step (000000), between, and at its end

Each of these directories holds

    settings.json         what the samples depend on: format, model, digest of its weights, engine, seed, sampling, and
                          for each problem a digest of its prompt. Samples of other settings are never added
    problems.jsonl        {"id", "question", "answer"} per problem, in the order of the set
    samples-00000.jsonl   {"problem", "sample", "text", "tokens", "cut"} per response, in the order drawn. One file per
                          data-parallel replica, appended to: a line is on the disk before the next is drawn. `sample`
                          counts the responses to one problem from 0; `text` is decoded with special tokens, but without
                          the stop token; `tokens` counts the stop token too; `cut` says that the length limit ended it
    scores.jsonl          one line per sample with the fields of `SampleScore`; made anew from the samples each time
    summary.json          the fields of `nemo_popsd.evaluation.summary.EvaluationSummary`, and `model`, `set`, and
                          `scoring`, whose `comparison` is the number of the rules by which answers were compared
                          (`nemo_popsd.evaluation.equivalence.COMPARISON_RULES`)

A kill may leave the last line of a samples file half written; it is passed over, and cut off before the next is added.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
"""Patterns of the names above."""
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
    """One response as it was drawn."""

    problem: str
    """Id of the problem."""
    sample: int
    """Number among the responses to it, from 0."""
    text: str
    """Decoded with special tokens, the stop token left out."""
    tokens: int
    """Length, stop token included."""
    cut: bool
    """It ended at the length limit and not at a stop token."""


@dataclass(frozen=True, slots=True)
class SampleScore:
    """What was read in one response."""

    problem: str
    """Id of the problem."""
    sample: int
    """Number among the responses to it, from 0."""
    answer: str | None
    """The final answer found, as written; None where there is none."""
    correct: bool
    """Whether it is the expected one."""
    decided_by: str
    """See `nemo_popsd.evaluation.equivalence.Verdict`."""
    vote: int | None
    """Responses to a problem that give the same answer share a number; None without an answer."""
    cut: bool
    """The response ended at the length limit and not at a stop token."""
    tokens: int
    """Response length, stop token included."""
    markers: dict[str, int]
    """Occurrences of each marker."""
    segments: int
    """Reflection segments, see `nemo_popsd.evaluation.behaviour`."""
    closed_thinking: bool
    """The response closes its thinking."""
    repeated: float
    """Share of its word sequences that occurred before in it."""
    looping: bool
    """It ends in a loop."""


@dataclass(frozen=True)
class SampleSettings:
    """What the samples depend on, number of samples apart: the random numbers of one do not depend on another."""

    model: str
    """Name for people; not compared."""
    weights_digest: str
    """Digest of the weights, or the name under which an endpoint serves them."""
    engine: str
    """What drew the samples."""
    seed: int
    """Of the run."""
    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]
    prompts: dict[str, str]
    """Digest of each problem's prompt, by problem id."""


class EvaluationDirectory:
    """One of the directories described above."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(self, settings: SampleSettings, problems: Sequence[Problem]) -> None:
        """Writes settings and problems, or checks that the samples present belong to them. On one rank.

        Problems may be added to those present, or be fewer; those in both must have the same prompt.

        Raises:
            UserError: samples of other settings, or files that no evaluation wrote, are there.
        """
        new = {"format": FORMAT, **asdict(settings), "stop_token_ids": list(settings.stop_token_ids)}
        present = _read_json(self.path / _SETTINGS)
        if present is not None and _OLDER_DIGEST_KEY in present:
            present["weights_digest"] = present.pop(_OLDER_DIGEST_KEY)
        self._refuse_other_files(present)
        if present is not None and any(self.path.glob("samples-*.jsonl")):
            self._refuse_other_settings(present, new)
            new["prompts"] = {**present["prompts"], **new["prompts"]}
        self.path.mkdir(parents=True, exist_ok=True)
        write_mark(self.path, EVALUATION)
        known = {problem.id: problem for problem in self.problems()} if present is not None else {}
        known.update((problem.id, problem) for problem in problems)
        write_text(self.path / _PROBLEMS, _lines(asdict(problem) for problem in known.values()))
        write_text(self.path / _SETTINGS, json.dumps(new, indent=2, ensure_ascii=False) + "\n")

    def replace(self, settings: SampleSettings, problems: Sequence[Problem], samples: Iterable[Sample]) -> None:
        """Makes the directory hold these samples and no others. On one rank."""
        self.remove()
        self.begin(settings, problems)
        with self.append_to(0) as file:
            file.add(samples)

    def remove(self) -> None:
        """Removes the files of the evaluation, and the directory if nothing else is in it. On one rank."""
        remove_files(self.path, (*FILES, MARK))

    def append_to(self, part: int) -> SampleWriter:
        """Opens the samples file of data-parallel replica `part` for writing."""
        return SampleWriter(self.path / f"samples-{part:05d}.jsonl")

    @property
    def concluded(self) -> bool:
        """Whether the summary is there; it is written last."""
        return (self.path / _SUMMARY).is_file()

    def settings(self) -> dict[str, Any]:
        """Content of settings.json.

        Raises:
            UserError: there is none.
        """
        found = _read_json(self.path / _SETTINGS)
        if found is None:
            raise self._incomplete(_SETTINGS)
        return found

    def problems(self) -> list[Problem]:
        """The problems, in the order of the set; none where there is no such file."""
        if not (self.path / _PROBLEMS).is_file():
            return []
        return [as_dataclass(Problem, line, where) for where, line in _read_lines(self.path / _PROBLEMS)]

    def samples(self) -> dict[tuple[str, int], Sample]:
        """All whole samples by problem and number.

        Raises:
            UserError: a line is damaged, or a sample occurs twice.
        """
        found: dict[tuple[str, int], Sample] = {}
        for file in sorted(self.path.glob("samples-*.jsonl")):
            for where, line in _read_lines(file):
                sample = as_dataclass(Sample, line, where)
                if (sample.problem, sample.sample) in found:
                    raise UserError(
                        str(file),
                        got=f"sample {sample.sample} of problem {sample.problem!r} a second time",
                        need="each sample once",
                        fix="remove the directory and evaluate again",
                    )
                found[sample.problem, sample.sample] = sample
        return found

    def conclude(self, scores: Sequence[SampleScore], summary: Mapping[str, Any]) -> None:
        """Writes scores and summary; each file is the old or the new one at any moment."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / _SCORES, _lines(asdict(score) for score in scores))
        write_text(self.path / _SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def scores(self) -> list[SampleScore]:
        """What `conclude` wrote.

        Raises:
            UserError: the evaluation has not been concluded.
        """
        if not (self.path / _SCORES).is_file():
            raise self._incomplete(_SCORES)
        return [as_dataclass(SampleScore, line, where) for where, line in _read_lines(self.path / _SCORES)]

    def summary(self) -> dict[str, Any]:
        """What `conclude` wrote.

        Raises:
            UserError: the evaluation has not been concluded.
        """
        found = _read_json(self.path / _SUMMARY)
        if found is None:
            raise self._incomplete(_SUMMARY)
        return found

    def _refuse_other_files(self, settings: Mapping[str, Any] | None) -> None:
        mark = read_mark(self.path)
        if (mark is not None and mark.kind == EVALUATION) or (settings is not None and "prompts" in settings):
            return
        if present := [name for name in (_SETTINGS, _PROBLEMS, _SCORES, _SUMMARY) if os.path.lexists(self.path / name)]:
            raise UserError(
                f"evaluation {self.path}",
                got=f"{', '.join(present)} and no {MARK} that says that an evaluation of nemo_popsd wrote them",
                need="a directory without such files, or an earlier evaluation; nothing was changed",
                fix=f"set output to another directory, or move {self.path} away",
            )

    def _refuse_other_settings(self, present: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        compared = [key for key in new if key not in ("model", "prompts")]
        differing = [key for key in compared if present.get(key) != new[key]]
        told = [f"{key}={new[key]!r} where the samples have {present.get(key)!r}" for key in differing]
        prompts = present.get("prompts", {})
        others = [problem for problem, digest in new["prompts"].items() if prompts.get(problem, digest) != digest]
        if others:
            told.append(f"another prompt for {len(others)} problems, {others[0]!r} among them")
        if told:
            raise UserError(
                f"samples in {self.path}",
                got="; ".join(told),
                need="the settings that they were drawn with: samples of two settings are never mixed",
                fix="set output to another directory, or remove this one",
            )

    def _incomplete(self, name: str) -> UserError:
        return UserError(
            "evaluation",
            got=f"no {name} in {str(self.path)!r}",
            need="the directory of an evaluation that has ended",
            fix="name one, such as OUTPUT/evaluation/MODEL/SET, or run `popsd evaluate` to its end",
        )


class SampleWriter:
    """Appends samples to one file; a context manager, one writer per file at a time."""

    def __init__(self, path: Path) -> None:
        """Opens `path` and cuts off what a kill left half written.

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
                got="another process that draws samples into it",
                need="one evaluation at a time in a directory",
                fix="wait for it, or set output to another directory",
            ) from None
        except OSError:
            pass  # a file system without locks
        self._file.seek(0)
        whole = self._file.read()
        self._file.truncate(whole.rfind(b"\n") + 1)

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, samples: Iterable[Sample]) -> None:
        """Appends `samples`; they are on the disk when this returns."""
        self._file.write(_lines(map(asdict, samples)).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def prompt_digest(prompt: Sequence[int]) -> str:
    """16 hexadecimal digits that stand for a prompt's token ids."""
    return hashlib.sha256(",".join(map(str, prompt)).encode()).hexdigest()[:16]


def _lines(objects: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in objects)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise damaged(path, "no object")
    return content


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and object of each whole line of `path`."""
    return read_json_lines(path, skip_partial=True)
