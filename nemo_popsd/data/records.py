"""One row of a data set, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One problem with its reference solution.

    Attributes:
        id: unique within its source; the id column, or ``FILE:ROW`` with the row counted from 1.
        question: problem statement, verbatim, never blank.
        reference: reference solution, verbatim, never blank. None only when the source declares that it
            has none (``columns.reference: null``), which serves evaluation but not training.
        answer: final answer for scoring, stripped; None when the source gives none.
    """

    id: str
    question: str
    reference: str | None
    answer: str | None = None

    def __post_init__(self) -> None:
        # The readers refuse these with file and row; this guards records that are made in code.
        if not self.question.strip():
            raise ValueError(f"record {self.id!r}: blank question")
        if self.reference is not None and not self.reference.strip():
            raise ValueError(f"record {self.id!r}: blank reference")
