"""Views: the part of a row that the two teachers see in addition to the question.

| view | text | read from | |---|---|---| | `solution` | the reference solution | `columns.reference` | | `answer` |
only the final answer | `columns.answer`, or `answer_pattern` in the reference | | `other` | the reference solution of
another row, chosen by the row's id | `columns.reference` | | `none` | nothing: the template `without_reference` | | |
any other name | the text or number of the column with this name | that column |
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_popsd.data.config import DataConfig

SOLUTION = "solution"
ANSWER = "answer"
OTHER = "other"
NONE = "none"
_WITHOUT_COLUMN = (SOLUTION, ANSWER, OTHER, NONE)


@dataclass(frozen=True, slots=True)
class Views:
    """The views of the two teachers."""

    privileged: str = SOLUTION
    """View of the privileged teacher."""
    reference: str = SOLUTION
    """View of the reference-only teacher."""

    @classmethod
    def of(cls, config: DataConfig) -> Views:
        """Return the views of the section `data`; the reference-only teacher defaults to the privileged one's view."""
        privileged = config.privileged.view or SOLUTION
        return cls(privileged, config.reference_only.view or privileged)

    @property
    def texts(self) -> tuple[str, ...]:
        """The views for which every row needs its own text, in order; `other` requires the row's solution."""
        used = (SOLUTION if view == OTHER else view for view in (self.privileged, self.reference) if view != NONE)
        return tuple(dict.fromkeys(used))

    @property
    def columns(self) -> tuple[str, ...]:
        """The views that are columns of the file."""
        return tuple(view for view in self.texts if view not in _WITHOUT_COLUMN)

    @property
    def need_reference(self) -> bool:
        """Whether a row without a reference solution is unusable."""
        return SOLUTION in self.texts

    @property
    def need_answer(self) -> bool:
        """Whether a row without a final answer is unusable."""
        return ANSWER in self.texts
