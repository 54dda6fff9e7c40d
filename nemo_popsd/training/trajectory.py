"""A training row with the student's response."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.megatron.microbatches import ContextSequence
from nemo_popsd.rollout.engine import Rollout


@dataclass(frozen=True)
class Trajectory:
    """A row and its rollout: the same response tokens follow each of the row's contexts."""

    row: PromptRow
    rollout: Rollout
    right: bool | None = None
    """Whether the final answer of the response matches that of the row; None if rows have no answers."""

    @property
    def row_id(self) -> str:
        """Id of the row, for messages."""
        return self.row.record.id

    @property
    def cost(self) -> int:
        """Cost in tokens of one forward pass: three frozen passes, and forward and backward of the student."""
        return 4 * len(self.student) + len(self.privileged) + len(self.reference)

    @property
    def student(self) -> ContextSequence:
        """Question and response: the sequence of the student and of the frozen base."""
        return ContextSequence(self.row.contexts.student, self.rollout.response)

    @property
    def privileged(self) -> ContextSequence:
        """Question, reference and response: the sequence of the privileged teacher."""
        return ContextSequence(self.row.contexts.privileged, self.rollout.response)

    @property
    def reference(self) -> ContextSequence:
        """Reference and response without the question: the sequence of the reference-only teacher."""
        return ContextSequence(self.row.contexts.reference, self.rollout.response)
