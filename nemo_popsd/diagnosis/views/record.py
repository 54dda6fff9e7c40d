"""The file of scored views, `views.json`.

    format          1
    name            name of the student
    settings        source, problems, samples, teacher_samples, uncertain_entropy, horizon, seed, markers, confidence
    answers, right  number of answers of the student, and of right answers among them
    compared        number of problems with right and wrong answers
    student         scores of the student itself
    candidates      for each view: name, family, scores, kind and verdict (see `nemo_popsd.diagnosis.views.verdicts`)
    best            one sentence about the best candidate
    sum             checksum of the rest of the file

A score is {value, low, high}, or null if it is undefined (see `nemo_popsd.diagnosis.views.scores`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict, cast

from nemo_popsd.diagnosis.ownership import refuse_other_files
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import write_text
from nemo_popsd.files.json_files import checksum, damaged, read_json
from nemo_popsd.files.ownership import DIAGNOSIS, write_mark

FILE = "views.json"
FORMAT = 1


class Score(TypedDict):
    """A score with its interval."""

    value: float
    low: float
    high: float


class CandidateRecord(TypedDict):
    """The scores of one target."""

    name: str
    family: str
    scores: dict[str, Score | None]
    kind: str
    verdict: str


class ViewScores(TypedDict):
    """Content of `views.json`, without its checksum."""

    format: int
    name: str
    settings: dict[str, Any]
    answers: int
    right: int
    compared: int
    student: dict[str, Score | None]
    candidates: list[CandidateRecord]
    best: str


def write_views(scores: ViewScores, directory: Path) -> None:
    """Atomically writes `views.json` into `directory`, which is created if needed.

    Raises:
        UserError: a file of this name exists that was not written by a diagnosis.
    """
    refuse_other_files(directory, (FILE,))
    directory.mkdir(parents=True, exist_ok=True)
    write_mark(directory, DIAGNOSIS)
    content = json.dumps({**scores, "sum": checksum(cast(dict[str, object], scores))}, ensure_ascii=False, indent=1)
    write_text(directory / FILE, content + "\n")


def read_views(directory: Path) -> ViewScores | None:
    """The scores in `directory`; None if there are none.

    Raises:
        UserError: the file was changed after the diagnosis, or has another format.
    """
    file = directory / FILE
    if not file.exists():
        return None
    content = read_json(file)
    if not isinstance(content, dict) or content.pop("sum", None) != checksum(content):
        raise damaged(file, "it was changed after it was written")
    if content["format"] != FORMAT:
        raise UserError(
            str(file),
            got=f"format {content['format']!r}",
            need=f"{FORMAT}, which this version reads",
            fix="run `popsd diagnose --views` again",
        )
    return cast(ViewScores, content)
