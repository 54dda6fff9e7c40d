"""Counts of the rows of one source that were kept, dropped and skipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class DataReport:
    """Counts for one source; ``str()`` is one line for the log.

    Every row read is kept, or counted by exactly one of `malformed`, `long_references_dropped` and
    `overlong_dropped`. A row with a truncated reference is kept.
    """

    source: str
    """File, directory or embedded name."""
    rows_read: int = 0
    """Rows seen, up to the source's `limit`; blank lines are not rows."""
    malformed: int = 0
    """Rows skipped because they cannot be read, lack a field, or contain a token of the chat template."""
    first_malformed: str | None = None
    """Why the first malformed row was skipped."""
    references_truncated: int = 0
    """Kept rows whose reference text was truncated to `max_reference_tokens`."""
    long_references_dropped: int = 0
    """Rows dropped because the reference exceeds `max_reference_tokens`."""
    overlong_dropped: int = 0
    """Rows dropped because the student prompt exceeds `max_prompt_tokens`."""
    rows_kept: int = 0
    """Rows of the resulting data set."""
    longest_prompt: int = 0
    """Longest student prompt that was kept, in tokens."""
    template_ignores_thinking: bool = False
    """Whether the chat template renders the same text with `enable_thinking` on and off."""

    def skip(self, reason: str) -> None:
        """Count one malformed row and remember the first reason."""
        self.malformed += 1
        if self.first_malformed is None:
            self.first_malformed = reason

    def as_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [
            f"{self.source}: {self.rows_kept} of {self.rows_read} rows kept",
            f"longest prompt {self.longest_prompt} tokens",
            f"{self.references_truncated} references truncated",
            f"{self.long_references_dropped} dropped for a long reference",
            f"{self.overlong_dropped} dropped for a long prompt",
            f"{self.malformed} malformed skipped" + (f" (first: {self.first_malformed})" if self.malformed else ""),
        ]
        if self.template_ignores_thinking:
            parts.append("chat template ignores enable_thinking")
        return ", ".join(parts)
