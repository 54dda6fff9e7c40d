"""Configuration of the training and validation rows and of the four contexts made from each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import Bounds, Text, check_numbers
from nemo_popsd.settings.checks import one_of, pattern


@dataclass(kw_only=True)
class ColumnsConfig:
    """Which column of the file holds which field of a record.

    A dot parts a column from a field in it (`reward_model.ground_truth`) or from the place in a list
    (`messages.0.content`). A column of chat messages, each with `role` and `content`, may hold question or reference:
    then it is the only message of the user, or of the assistant.
    """

    id: str | None = None
    """Column with a unique row id; null numbers the rows by their line."""
    question: str = "question"
    """Column with the problem statement."""
    reference: str | None = "reference"
    """Column with the reference solution that the privileged teacher sees; null (evaluation only) means none."""
    answer: str | None = None
    """Column with the final answer, for evaluation; null takes it from the reference by the source's pattern."""


@dataclass(kw_only=True)
class SourceConfig:
    """One data set: JSONL or Parquet files, a saved `datasets` directory, or `nemo_popsd:NAME` for an embedded one."""

    path: Annotated[str, Text.PATH] = ""
    """File; pattern of files (`data/train-*.parquet`); directory with the files of one split, also in its `data`, or
    saved by `datasets`; `nemo_popsd:tiny_train` / `nemo_popsd:tiny_validation`; empty means none."""
    more_paths: Annotated[list[str], Text.PATH] = field(default_factory=list)
    """Further files, patterns or directories of the same columns, read after `path`."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Column mapping."""
    answer_pattern: str | None = None
    """Expression with one group; its last match in the reference is the final answer (GSM8K: `####\\s*(.+)`). For
    `data.validation` alone, and not beside `columns.answer`."""
    limit: Annotated[int | None, Bounds(1, 10**12)] = None
    """Read only the first `limit` rows."""


@dataclass(kw_only=True)
class TemplatesConfig:
    """User-turn texts. `{question}`, `{reference}` and `{question_block}` are replaced; other braces are literal.

    The privileged teacher's and the reference-only teacher's turns are the same `teacher` body; they differ by
    `question_block` alone, which is empty for the reference-only teacher.
    """

    student: Annotated[str, Text.PROSE] = (
        "Problem: {question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    """What the student (and the frozen base) sees."""
    question_block: Annotated[str, Text.PROSE] = "Problem: {question}\n\n"
    """The only difference between the two teachers' prompts."""
    teacher: Annotated[str, Text.PROSE] = (
        "{question_block}Here is a reference solution:\n"
        "=== Reference Solution Begin ===\n{reference}\n=== Reference Solution End ===\n\n"
        "After understanding the reference solution, derive the answer independently, in your own words. "
        "Please reason step by step, and put your final answer within \\boxed{}."
    )
    """Body shared by both teachers; must not refer to a problem that the reference-only teacher cannot see."""
    system: Annotated[str | None, Text.PROSE] = None
    """System turn shared by all four contexts; null means none."""


@dataclass(kw_only=True)
class DataConfig:
    """Rows, templates, limits, and what happens to rows that do not fit."""

    train: SourceConfig = field(default_factory=SourceConfig)
    """Rows to train on (question and reference)."""
    validation: SourceConfig = field(default_factory=SourceConfig)
    """Held-out rows with answers, for evaluation."""
    templates: TemplatesConfig = field(default_factory=TemplatesConfig)
    """The user turns of the contexts."""
    enable_thinking: bool = True
    """Passed to the chat template; templates that ignore it are reported."""
    max_prompt_tokens: Annotated[int, Bounds(1, 10**7)] = 2048
    """Longest student prompt, chat template included. Longer rows follow `overlong_rows`: a question is never cut."""
    max_reference_tokens: Annotated[int, Bounds(1, 10**7)] = 8192
    """Longest reference text in tokens. Longer ones follow `long_references`."""
    long_references: str = "truncate"
    """`truncate` (at the end, identically in both teacher contexts, counted), `drop`, or `error`."""
    overlong_rows: str = "drop"
    """Rows whose prompt exceeds `max_prompt_tokens`: `drop` (counted) or `error`."""
    malformed_rows: str = "error"
    """Rows that cannot be read or lack a question or reference: `error` (file, line, reason) or `skip` (counted)."""
    shuffle: bool = True
    """Visit training rows in an order drawn from the seed, anew each epoch."""

    def __post_init__(self) -> None:
        one_of("data.long_references", self.long_references, ("truncate", "drop", "error"))
        one_of("data.overlong_rows", self.overlong_rows, ("drop", "error"))
        one_of("data.malformed_rows", self.malformed_rows, ("error", "skip"))
        check_numbers(self, "data")
        for name, source in (("data.train", self.train), ("data.validation", self.validation)):
            check_numbers(source, name)
            pattern(f"{name}.answer_pattern", source.answer_pattern)
            if source.more_paths and not source.path:
                raise UserError(
                    "configuration",
                    got=f"{name}.more_paths without {name}.path",
                    need="the first path in path",
                    fix=f"set {name}.path",
                )
