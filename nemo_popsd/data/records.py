"""One row of a data set, independent of the file format."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field

_INVISIBLE = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and symbols without a visible glyph."""


def is_blank(text: str) -> bool:
    """Whether `text` is empty or consists of white space, control characters and invisible characters."""
    return all(unicodedata.category(character) in _INVISIBLE or character in _FILLERS for character in text)


@dataclass(frozen=True, slots=True)
class Record:
    """One problem with its reference solution.

    Attributes:
        id: unique within its source; the id column, or ``FILE:ROW`` with the row counted from 1.
        question: problem statement, verbatim, never blank.
        reference: reference solution, verbatim, never blank. None only if the source declares that it has none
            (``columns.reference: null``), which is valid for evaluation but not for training.
        answer: final answer for scoring, stripped; None if the source has none.
        columns: texts of the columns that are views of a teacher, never blank.
    """

    id: str
    question: str
    reference: str | None
    answer: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # The readers refuse blank texts with file and row; this check is for records made in code.
        if is_blank(self.question):
            raise ValueError(f"record {self.id!r}: blank question")
        if self.reference is not None and is_blank(self.reference):
            raise ValueError(f"record {self.id!r}: blank reference")
