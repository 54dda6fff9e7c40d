"""Repeated questions: duplicates within a data set, and overlap between data sets.

Two questions are the same if they differ only in white space and case. A paraphrase is not detected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from nemo_popsd.data.records import Record


@dataclass(frozen=True)
class Repetition:
    """A row that repeats the question of an earlier row."""

    row: str
    """Id of the row."""
    earlier: str
    """Id of the earlier row."""
    same_answer: bool
    """Whether both have the same reference and the same answer."""


@dataclass
class Questions:
    """The questions of one data set. Stores two hashes of 16 bytes and an id per question, not its text."""

    repetitions: list[Repetition] = field(default_factory=list)
    """Rows that repeat a question, in order."""
    _rows: dict[bytes, tuple[str, bytes]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Questions:
        """Collect the questions of `records`."""
        questions = cls()
        for record in records:
            key, answer = _key(record.question), _key(f"{record.reference}\0{record.answer}")
            if key in questions._rows:
                earlier, other = questions._rows[key]
                questions.repetitions.append(Repetition(record.id, earlier, answer == other))
            else:
                questions._rows[key] = record.id, answer
        return questions

    def shared_with(self, other: Questions) -> list[tuple[str, str]]:
        """Return pairs of ids (here, in `other`) of rows with the same question, in the order of `other`."""
        return [(self._rows[key][0], row) for key, (row, _) in other._rows.items() if key in self._rows]


def _key(text: str) -> bytes:
    return hashlib.blake2b("".join(text.casefold().split()).encode(), digest_size=16).digest()
