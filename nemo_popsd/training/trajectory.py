"""One training row with the response that the student gave to it."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.megatron.microbatches import ContextSequence
from nemo_popsd.rollout.engine import Rollout


@dataclass(frozen=True)
class Trajectory:
    """A row and its rollout: the same response ids continue each of the row's contexts."""

    row: PromptRow
    rollout: Rollout

    @property
    def row_id(self) -> str:
        """Id of the row, for messages."""
        return self.row.record.id

    @property
    def cost(self) -> int:
        """Work that it makes, in tokens of one forward: three frozen ones, and the student's forward and backward."""
        return 4 * len(self.student) + len(self.privileged) + len(self.reference)

    @property
    def student(self) -> ContextSequence:
        """Question and response; also the frozen base's context."""
        return ContextSequence(self.row.contexts.student, self.rollout.response)

    @property
    def privileged(self) -> ContextSequence:
        """Question, reference and response."""
        return ContextSequence(self.row.contexts.privileged, self.rollout.response)

    @property
    def reference(self) -> ContextSequence:
        """Reference and response, without the question."""
        return ContextSequence(self.row.contexts.reference, self.rollout.response)
