"""Configuration of the training and validation rows and of the four contexts of each row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import Bounds, Text, check_numbers
from nemo_popsd.settings.checks import one_of, pattern


@dataclass(kw_only=True)
class ColumnsConfig:
    """The column of the file for each field of a record.

    A dot separates a column from a field in it (`reward_model.ground_truth`) or from a list index
    (`messages.0.content`). Question and reference may be columns of chat messages, each with `role` and `content`: the
    question is then the only user message, the reference the only assistant message.
    """

    id: str | None = None
    """Column with a unique row id; null uses the line number."""
    question: str = "question"
    """Column with the problem statement."""
    reference: str | None = "reference"
    """Column with the reference solution that the teachers see; null (only for evaluation) means no reference."""
    answer: str | None = None
    """Column with the final answer, for evaluation, the view `answer` and `train/accuracy`; null extracts it from the
    reference by `answer_pattern`."""


@dataclass(kw_only=True)
class SourceConfig:
    """One data set: JSONL or Parquet files, a saved `datasets` directory, or `nemo_popsd:NAME` for an embedded one."""

    path: Annotated[str, Text.PATH] = ""
    """A file; a pattern of files (`data/train-*.parquet`); a directory that contains the files of one split, directly
    or in `data`, or that `datasets` saved; `nemo_popsd:tiny_train` or `nemo_popsd:tiny_validation`; empty means no
    data."""
    more_paths: Annotated[list[str], Text.PATH] = field(default_factory=list)
    """Further files, patterns or directories with the same columns, read after `path`."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Column mapping."""
    answer_pattern: str | None = None
    """Regular expression with one group; its last match in the reference is the final answer (GSM8K: `####\\s*(.+)`).
    Requires `columns.answer=null`."""
    limit: Annotated[int | None, Bounds(1, 10**12)] = None
    """Read only the first `limit` rows."""


_REFERENCE = (
    "Here is a reference solution:\n=== Reference Solution Begin ===\n{reference}\n=== Reference Solution End ===\n\n"
)
_TASK = (
    "After understanding the reference solution, derive the answer independently, in your own words. "
    "Please reason step by step, and put your final answer within \\boxed{}."
)
DEFAULT_TEACHERS = {
    "question_first": "{question_block}" + _REFERENCE + _TASK,
    "reference_first": _REFERENCE + "{question_block}" + _TASK,
}
"""Default of `data.templates.teacher` by `data.templates.order`: the same text with the question block moved."""


@dataclass(kw_only=True)
class TemplatesConfig:
    """User-turn texts. `{question}`, `{reference}` and `{question_block}` are replaced; other braces are literal.

    The privileged and the reference-only teacher share the `teacher` body; their turns differ only in `question_block`,
    which is empty for the reference-only teacher.
    """

    student: Annotated[str, Text.PROSE] = (
        "Problem: {question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    """User turn of the student and the frozen base."""
    question_block: Annotated[str, Text.PROSE] = "Problem: {question}\n\n"
    """The only difference between the two teachers' prompts."""
    order: str = "question_first"
    """The first part of `teacher`. `question_first`: the question block, as in OPSD (the paper does not state its
    order). `reference_first`: the reference, so that both teachers' prompts begin with the same tokens and
    `training.share_prefixes` computes the reference once. The default `teacher` follows this setting; a custom
    `teacher` must have the same order."""
    teacher: Annotated[str, Text.PROSE] = DEFAULT_TEACHERS["question_first"]
    """Body shared by both teachers. It must not refer to the problem, which the reference-only teacher does not see."""
    without_reference: Annotated[str, Text.PROSE] = (
        "{question_block}Please reason step by step, and put your final answer within \\boxed{}."
    )
    """Body of a teacher whose view is `none`. With the default, the privileged teacher's turn equals the student's."""
    system: Annotated[str | None, Text.PROSE] = None
    """System turn shared by all four contexts; null means none."""

    def __post_init__(self) -> None:
        one_of("data.templates.order", self.order, tuple(DEFAULT_TEACHERS))
        if self.teacher in DEFAULT_TEACHERS.values():
            self.teacher = DEFAULT_TEACHERS[self.order]


@dataclass(kw_only=True)
class TeacherConfig:
    """The part of a row that a teacher sees in addition to the question, and whether its prompt enables thinking."""

    view: Annotated[str | None, Text.NAME] = None
    """`solution`, `answer` (only the final answer: `columns.answer`, or `answer_pattern` in the reference), `other`
    (another row's solution), `none` (nothing), or the name of a column of the file. null: the privileged teacher sees
    `solution`, and the reference-only teacher has the privileged teacher's view."""
    enable_thinking: bool | None = None
    """Passed to the chat template. null: the privileged teacher uses `data.enable_thinking`, and the reference-only
    teacher uses the privileged teacher's value. The families `purified` and `student_pmi` need one value for all
    contexts."""


@dataclass(kw_only=True)
class DataConfig:
    """Rows, templates, limits, and the treatment of rows that exceed the limits."""

    train: SourceConfig = field(default_factory=SourceConfig)
    """Rows to train on (question and reference)."""
    validation: SourceConfig = field(default_factory=SourceConfig)
    """Held-out rows with answers, for evaluation."""
    templates: TemplatesConfig = field(default_factory=TemplatesConfig)
    """The user turns of the contexts."""
    enable_thinking: bool = True
    """Whether the prompt of student and base enables thinking, also in rollouts and evaluation. Passed to the chat
    template; templates that ignore it are reported."""
    privileged: TeacherConfig = field(default_factory=TeacherConfig)
    """The privileged teacher."""
    reference_only: TeacherConfig = field(default_factory=TeacherConfig)
    """The reference-only teacher, or the second context of the family."""
    max_prompt_tokens: Annotated[int, Bounds(1, 10**7)] = 2048
    """Maximum length of the student prompt in tokens, chat template included. `overlong_rows` applies to longer
    prompts: a question is never truncated."""
    max_reference_tokens: Annotated[int, Bounds(1, 10**7)] = 8192
    """Maximum length of the reference text in tokens. `long_references` applies to longer references."""
    long_references: str = "truncate"
    """References above `max_reference_tokens`: `truncate` (at the end, identically in both teacher contexts, counted),
    `drop` (the row, counted), or `error`."""
    overlong_rows: str = "drop"
    """Rows whose prompt exceeds `max_prompt_tokens`: `drop` (counted) or `error`."""
    malformed_rows: str = "error"
    """Rows that cannot be read or lack a question or reference: `error` (file, line, reason) or `skip` (counted)."""
    shuffle: bool = True
    """Shuffle the training rows in each epoch, with an order that depends on the seed."""

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
