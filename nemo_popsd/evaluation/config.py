"""Configuration of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_popsd.config.checks import at_least, fraction, pattern
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.markers import DEFAULT_MARKERS


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is sampled from the validation rows, and how the text is read.

    Sampling here is separate from that of the training rollouts and from the softmax temperature of the loss.
    """

    problems: int | None = None
    """Evaluate only the first `problems` rows; null means all."""
    samples_per_problem: int = 1
    """Responses per problem; accuracy is averaged over them before it is averaged over problems."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability; 1 turns it off."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 turns it off."""
    max_response_tokens: int = 38912
    """Longest response; longer ones are cut and counted."""
    answer_pattern: str | None = None
    """Expression with one group; its last match in a response is the answer. Null reads the last `\\boxed{...}`."""
    markers: list[str] = field(default_factory=lambda: list(DEFAULT_MARKERS))
    """Epistemic markers to count, as whole words in this very case."""

    def __post_init__(self) -> None:
        at_least("evaluation.problems", self.problems, 1)
        at_least("evaluation.samples_per_problem", self.samples_per_problem, 1)
        at_least("evaluation.temperature", self.temperature, 0)
        fraction("evaluation.top_p", self.top_p, allow_zero=False)
        at_least("evaluation.top_k", self.top_k, 0)
        at_least("evaluation.max_response_tokens", self.max_response_tokens, 1)
        pattern("evaluation.answer_pattern", self.answer_pattern)
        if any(not marker.strip() for marker in self.markers) or len(set(self.markers)) < len(self.markers):
            raise UserError(
                "configuration",
                got=f"evaluation.markers={self.markers!r}",
                need="words or phrases, each once",
                mend="set evaluation.markers",
            )
