"""The results of all runs, one line per run, in the repository: experiments/runs.jsonl and tables/*.jsonl.

A run with a line is not executed again. A run directory is needed only until its line is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_popsd.evaluation.records import EvaluationDirectory, SampleScore
from nemo_popsd.training.drift import PREFIX

FILE = Path(__file__).with_name("runs.jsonl")
CURVES = ("norm_ratio", "cosine_reference", "cosine_question", "marker_rate", "response_tokens")
"""Training metrics of a record, one value per step."""


@dataclass(frozen=True)
class Answers:
    """The held-out answers of one evaluation."""

    correct: str
    """1 or 0 for each answer, in the order of the file; answers to the same problem are consecutive."""
    markers: int
    """Epistemic markers in all answers."""
    tokens: int
    """Tokens of all answers."""

    @classmethod
    def of(cls, scores: Iterable[SampleScore]) -> Answers:
        """All answers of an evaluation."""
        found = list(scores)
        return cls(
            "".join(str(int(score.correct)) for score in found),
            sum(sum(score.markers.values()) for score in found),
            sum(score.tokens for score in found),
        )

    @property
    def accuracy(self) -> float:
        """Accuracy in per cent."""
        return 100 * self.correct.count("1") / len(self.correct)

    @property
    def marker_rate(self) -> float:
        """Markers per 1,000 tokens."""
        return 1000 * self.markers / self.tokens

    @property
    def length(self) -> float:
        """Tokens per answer."""
        return self.tokens / len(self.correct)


@dataclass(frozen=True)
class Record:
    """One finished run."""

    phase: str
    """"tuning" or "training"."""
    arm: str
    """Name of the arm."""
    rate: str
    """Learning rate, as in `experiments.arms.RATES`."""
    seed: int
    before: Answers
    after: Answers
    seconds: float
    """Time of the run, two at a time with one thread each."""
    commit: str
    """Commit of the checkout that ran it."""
    machine: str
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Training metrics by name, one value per step; empty for tuning, which does not measure them."""
    between: dict[str, Answers] = field(default_factory=dict)
    """Evaluations between the first and the last, by step."""
    alarms: dict[str, int] | None = None
    """Step of the first alarm (`guard.drift`) by quantity, negative if the quantity fell; None if not recorded."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """The key that identifies the run."""
        return self.phase, self.arm, self.rate, self.seed

    @classmethod
    def of_line(cls, line: str) -> Record:
        """Reads a line of the file."""
        found: dict[str, Any] = json.loads(line)
        found["before"], found["after"] = Answers(**found["before"]), Answers(**found["after"])
        found["between"] = {step: Answers(**one) for step, one in found.get("between", {}).items()}
        return cls(**found)

    def line(self) -> str:
        """A line of the file."""
        return json.dumps(asdict(self), separators=(",", ":")) + "\n"


def load(file: Path = FILE) -> list[Record]:
    """All records of a file, in the order in which the runs finished; none if there is no file."""
    return [Record.of_line(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(record: Record, file: Path = FILE) -> None:
    """Appends a record to a file, which is created if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(record.line())


def answers(output: Path) -> dict[int, Answers]:
    """The evaluations of a run directory by step, ascending."""
    steps = sorted((output / "validation").glob("step-*"))
    return {int(step.name.removeprefix("step-")): Answers.of(EvaluationDirectory(step).scores()) for step in steps}


def alarms(output: Path) -> dict[str, int]:
    """The first alarm of each quantity in a run directory; see `Record.alarms`."""
    found: dict[str, int] = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        for name in step:
            if name.startswith(PREFIX):
                fell = step[name] < 0
                found.setdefault(name.removeprefix(PREFIX), -step["step"] if fell else step["step"])
    return found


def curves(output: Path, names: Sequence[str] = CURVES) -> dict[str, list[float]]:
    """Training metrics of a run directory."""
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        name: [round(float(step[f"train/{name}"]), 4) for step in steps if f"train/{name}" in step] for name in names
    }
