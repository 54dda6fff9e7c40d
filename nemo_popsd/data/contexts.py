"""The token ids of the three distinct prompts of a record.

| context | user turn | used by |
|---|---|---|
| student | question | the live student and the frozen base, and the rollout engine |
| privileged | question and reference | the privileged teacher |
| reference | reference, no question | the reference-only teacher |

The reference is a view of the row (`nemo_popsd.data.views`), by default its solution. Two related targets use another
row's reference in one context (`Borrowed`).

The same response ids continue each prompt (`nemo_popsd.data.alignment`). All prompts with the same `enable_thinking`
end in the same assistant prefix. Only the reference may be truncated, before both teachers' turns are built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from nemo_popsd.data.chat import ChatFormat, Encoded
from nemo_popsd.data.config import DataConfig
from nemo_popsd.data.records import Record
from nemo_popsd.data.templates import check_templates, placeholders, student_turn, teacher_turn
from nemo_popsd.data.views import ANSWER, NONE, OTHER, SOLUTION, Views
from nemo_popsd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 64  # texts tokenised per call: enough to use all cores, few enough to keep the offsets in memory
_MOST_TOKENS_PER_CHARACTER = 4  # a byte-level tokenizer produces at most one token per UTF-8 byte
_MERGE_SLACK = 16  # tokens by which a joined text may exceed the sum of its pieces


class Borrowed(StrEnum):
    """The context of a row that contains the reference of another row."""

    NONE = ""
    """The paper's contexts."""
    PRIVILEGED = "privileged"
    """The privileged teacher sees the question with another row's reference (OP²SD, arXiv 2608.09228)."""
    SECOND = "reference"
    """The reference-only context is replaced by the question with another row's reference, in the privileged teacher's
    template (wrong-reference contrast)."""


@dataclass(frozen=True)
class Contexts:
    """Token ids of one row's prompts. Each is non-empty and ends in the assistant prefix."""

    student: list[int]
    """Question; shared by student and base."""
    privileged: list[int]
    """Question and reference."""
    reference: list[int]
    """Reference alone; see `Borrowed`."""
    reference_text: str
    """The row's own text in the privileged teacher's view, as shown to the teacher; empty for the view `none`."""
    reference_truncated: bool
    """Whether a teacher sees a truncated text."""


@dataclass(frozen=True, slots=True)
class FittedRow:
    """A record within the limits, with the texts that the teachers see."""

    record: Record
    texts: Mapping[str, str]
    """Text by view (`Views.texts`), truncated to the limit; empty in an evaluation."""
    reference_truncated: bool
    """Whether a text was truncated."""
    student_length: int
    """Length of the student's prompt in tokens."""

    def text(self, view: str) -> str:
        """Return the row's own text in `view`; empty for `none`."""
        return "" if view == NONE else self.texts[SOLUTION if view == OTHER else view]


class Misfit(StrEnum):
    """Why a row is dropped or skipped."""

    MALFORMED = "malformed"
    LONG_REFERENCE = "long reference"
    OVERLONG = "overlong prompt"


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A record that is dropped or skipped because of the settings."""

    record: Record
    why: Misfit
    detail: str


class ContextBuilder:
    """Builds the contexts of records for one tokenizer and one data configuration.

    Attributes:
        assistant_prefix: the text with which the student's prompt ends, and every other prompt with the same thinking.
        views: the views of the teachers.
        template_ignores_thinking: whether `enable_thinking` has no effect (also logged once, as a warning).
        longest_context: upper bound of the length of any prompt in tokens, reference included. Adding the response
            limit gives the longest training sequence.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, vocab_size: int | None = None
    ) -> None:
        """Check the templates and the chat template with probe texts.

        Args:
            tokenizer: the student's tokenizer.
            config: the section `data`.
            vocab_size: number of embeddings of the student; None skips the check of token ids.

        Raises:
            UserError: from `check_templates` and `ChatFormat`, or the templates use a token without an embedding.
        """
        check_templates(config.templates)
        self._config = config
        self.views = Views.of(config)
        thinking = [config.enable_thinking]
        for teacher in (config.privileged, config.reference_only):
            thinking.append(thinking[-1] if teacher.enable_thinking is None else teacher.enable_thinking)
        system = config.templates.system
        formats = {on: ChatFormat(tokenizer, system=system, enable_thinking=on) for on in dict.fromkeys(thinking)}
        self._formats = [formats[on] for on in thinking]
        self._chat = self._formats[0]
        self.assistant_prefix = self._chat.assistant_prefix
        self.template_ignores_thinking = self._chat.ignores_thinking
        self._vocab_size = vocab_size
        self._beyond = self._chat.beyond(vocab_size) if vocab_size is not None else {}
        if self._beyond:
            for text in self._empty_prompts():
                self._refuse_beyond("the prompt around a row", "templates", text)
        self.longest_context = self._longest_context()

    def fit(self, records: Sequence[Record], *, with_reference: bool = True) -> list[FittedRow | RejectedRow]:
        """Check the length of `records` and truncate their references, in order.

        Args:
            records: rows as read.
            with_reference: False ignores references, as evaluation does.

        Raises:
            UserError: names the row; for a misfit whose setting is `error`, a missing reference, a token without an
                embedding, or a student prompt that does not end in the assistant prefix.
        """
        rows: list[FittedRow | RejectedRow] = []
        for start in range(0, len(records), _BATCH):
            batch = records[start : start + _BATCH]
            prompts = self._chat.encode([self._student_text(record) for record in batch])
            if self._beyond:
                for record in batch:
                    self._refuse_beyond(f"row {record.id}", "question", self._student_text(record))
                    for view in self.views.texts if with_reference else ():
                        self._refuse_beyond(f"row {record.id}", _column(view), _text_of(record, view))
            views = self.views.texts if with_reference else ()
            texts = {view: self._truncate([_text_of(record, view) for record in batch]) for view in views}
            for index, (record, prompt) in enumerate(zip(batch, prompts, strict=True)):
                rows.append(self._judge(record, len(prompt.ids), {view: texts[view][index] for view in views}))
        return rows

    def lent_views(self, borrowed: Borrowed = Borrowed.NONE) -> set[str]:
        """Return the views whose text comes from another row."""
        views = {Borrowed.PRIVILEGED: self.views.privileged, Borrowed.SECOND: self.views.reference}
        return {view for name, view in views.items() if view == OTHER or (borrowed is name and view != NONE)}

    def contexts(self, row: FittedRow, borrowed: Borrowed = Borrowed.NONE, other: FittedRow | None = None) -> Contexts:
        """Return the token ids of one fitted row.

        Args:
            row: the row.
            borrowed: the context that contains the reference of `other`.
            other: another row; required if `lent_views` is not empty.

        Raises:
            UserError: names the row, if prompts with the same thinking do not end in the same assistant prefix, both
                teachers have the same prompt, the chat template altered the question or the reference, or a prompt is
                longer than `longest_context`.
        """
        record, views = row.record, self.views
        texts = [self._student_text(record)]
        for chat, view, name, with_question in (
            (self._formats[1], views.privileged, Borrowed.PRIVILEGED, True),
            (self._formats[2], views.reference, Borrowed.SECOND, borrowed is Borrowed.SECOND),
        ):
            lender = row
            if view == OTHER or (borrowed is name and view != NONE):
                assert other is not None
                lender = other
            seen = None if view == NONE else lender.text(view)
            question = record.question if with_question else None
            text = chat.render(teacher_turn(self._config.templates, question=question, reference=seen))
            if with_question:
                _require_verbatim(record, "question", record.question, text)
            if seen is not None:
                _require_verbatim(record, "reference", seen, text)
            texts.append(text)
        if texts[1] == texts[2]:
            raise _equal_teachers(record)
        encoded = self._chat.encode(texts)
        self._require_prefixes(record, texts, encoded)
        longest = max(len(prompt.ids) for prompt in encoded)
        if longest > self.longest_context:
            raise UserError(
                f"row {record.id}",
                got=f"a context of {longest} tokens",
                need=f"at most {self.longest_context}, the bound for these templates and limits",
                fix="remove the row",
            )
        return Contexts(
            student=encoded[0].ids,
            privileged=encoded[1].ids,
            reference=encoded[2].ids,
            reference_text=row.text(views.privileged),
            reference_truncated=row.reference_truncated,
        )

    def build(self, record: Record) -> Contexts:
        """Return the contexts of one record: `fit`, then `contexts`.

        Raises:
            UserError: as `fit` and `contexts`, and for a row that is dropped or skipped.
        """
        row = self.fit([record])[0]
        if isinstance(row, RejectedRow):
            raise UserError(f"row {record.id}", got=row.detail, need="a row within the limits", fix="remove it")
        return self.contexts(row)

    def student_prompt(self, record: Record) -> list[int]:
        """Return the token ids of the student's prompt, for evaluation; limits are not checked (see `fit`)."""
        return self._chat.encode([self._student_text(record)])[0].ids

    def _student_text(self, record: Record) -> str:
        text = self._chat.render(student_turn(self._config.templates, question=record.question))
        _require_verbatim(record, "question", record.question, text)
        if not text.endswith(self.assistant_prefix):
            raise self._prefix_mismatch(record, [text], [])
        return text

    def _require_prefixes(self, record: Record, texts: Sequence[str], encoded: Sequence[Encoded]) -> None:
        """Require every prompt to end in its format's assistant prefix, with equal tokens for prompts of one format."""
        tails = [
            chat.prefix_ids(text, prompt) for chat, text, prompt in zip(self._formats, texts, encoded, strict=True)
        ]
        firsts = [tails[self._formats.index(chat)] for chat in self._formats]
        if not all(tails) or tails != firsts:
            raise self._prefix_mismatch(record, texts, tails)

    def _truncate(self, references: Sequence[str]) -> list[tuple[str, int]]:
        """Return each text, truncated to the limit, with its original number of tokens (0: surely within the limit)."""
        limit = self._config.max_reference_tokens
        long = [i for i, text in enumerate(references) if len(text) * _MOST_TOKENS_PER_CHARACTER > limit]
        truncated = [(text, 0) for text in references]
        for index, encoded in zip(long, self._chat.encode([references[i] for i in long]), strict=True):
            text = references[index]
            tokens = len(encoded.ids)
            while len(encoded.ids) > limit:
                # The first removed token may start inside the last character, which is then also removed. In rare cases
                # the remaining text again has more than `limit` tokens.
                text = text[: min(encoded.starts[limit], len(text) - 1)]
                encoded = self._chat.encode([text])[0]
            truncated[index] = (text, tokens)
        return truncated

    def _judge(self, record: Record, length: int, seen: Mapping[str, tuple[str, int]]) -> FittedRow | RejectedRow:
        """Accept or reject a record. `seen` has the truncated text of each view and its original number of tokens."""
        config = self._config
        texts = {view: text for view, (text, _) in seen.items()}
        tokens = max((count for _, count in seen.values()), default=0)
        for column, text in (("question", record.question), *((_column(view), text) for view, text in texts.items())):
            if (mark := self._chat.mark_in(text)) is not None:
                detail = f"the token {mark} in its {column}, which marks a turn or the end of a text"
                return self._reject(record, Misfit.MALFORMED, detail, "malformed_rows", config.malformed_rows)
        if tokens > config.max_reference_tokens and config.long_references != "truncate":
            detail = (
                f"a reference of {tokens} tokens, more than data.max_reference_tokens={config.max_reference_tokens}"
            )
            return self._reject(record, Misfit.LONG_REFERENCE, detail, "long_references", config.long_references)
        if length > config.max_prompt_tokens:
            detail = f"a prompt of {length} tokens, more than data.max_prompt_tokens={config.max_prompt_tokens}"
            return self._reject(record, Misfit.OVERLONG, detail, "overlong_rows", config.overlong_rows)
        if not all(text.strip() for text in texts.values()):
            raise UserError(
                f"row {record.id}",
                got=f"nothing left of the reference at data.max_reference_tokens={config.max_reference_tokens}",
                need="space for at least a few words",
                fix="set data.max_reference_tokens higher",
            )
        return FittedRow(record, texts, tokens > config.max_reference_tokens, length)

    def _refuse_beyond(self, what: str, where: str, text: str) -> None:
        """Refuse text with a token for which the model has no embedding."""
        for token in self._chat.encode([text])[0].ids:
            if token in self._beyond:
                raise UserError(
                    what,
                    got=f"the token {self._beyond[token]!r} with id {token} in its {where}",
                    need=f"ids below the model's vocab_size={self._vocab_size} (config.json)",
                    fix="remove the token from tokenizer.json, or add an embedding for it to the model",
                )

    def _reject(self, record: Record, why: Misfit, detail: str, setting: str, policy: str) -> RejectedRow:
        if policy == "error":
            other = "skip" if why is Misfit.MALFORMED else "drop"
            raise UserError(
                f"row {record.id}",
                got=detail,
                need="a row within the limits, without tokens of the chat template",
                fix=f"fix the row, raise the limit, or set data.{setting}={other}",
            )
        return RejectedRow(record, why, f"row {record.id}: {detail}")

    def _empty_prompts(self) -> list[str]:
        """Return the three prompts of a row without text; the second context includes the question block."""
        templates, views = self._config.templates, (self.views.privileged, self.views.reference)
        turns = [student_turn(templates, question="")]
        turns += [teacher_turn(templates, question="", reference=None if view == NONE else "") for view in views]
        return [chat.render(turn) for chat, turn in zip(self._formats, turns, strict=True)]

    def _longest_context(self) -> int:
        """Return the tokens of the empty templates plus the maximum that question and reference can add."""
        templates, config = self._config.templates, self._config
        student, *teachers = (len(encoded.ids) for encoded in self._chat.encode(self._empty_prompts()))
        longest = [config.max_prompt_tokens]
        for empty, view in zip(teachers, (self.views.privileged, self.views.reference), strict=True):
            body = placeholders(templates.without_reference if view == NONE else templates.teacher)
            questions = body.count("question_block") * placeholders(templates.question_block).count("question")
            added = questions * max(0, config.max_prompt_tokens - student)
            longest.append(empty + added + body.count("reference") * config.max_reference_tokens)
        return max(longest) + _MERGE_SLACK

    def _prefix_mismatch(self, record: Record, texts: Sequence[str], tails: Sequence[list[int] | None]) -> UserError:
        shown = len(self.assistant_prefix) + 20
        names = ("student", "privileged", "reference")
        ends = "; ".join(f"{name} prompt ends in {text[-shown:]!r}" for name, text in zip(names, texts, strict=False))
        if tails and all(tail is not None for tail in tails):
            ends += f" (token ids {', '.join(map(str, tails))})"
        return UserError(
            f"row {record.id}",
            got=ends,
            need=f"the same assistant prefix {self.assistant_prefix!r} in every prompt of the same thinking",
            fix="fix the chat template, or end data.templates.student and data.templates.teacher alike",
        )


def _column(view: str) -> str:
    """Return the name of the text of `view` in messages."""
    return {SOLUTION: "reference", ANSWER: "answer"}.get(view, f"column {view}")


def _text_of(record: Record, view: str) -> str:
    """Return the text of `record` in one of `Views.texts`."""
    text = {SOLUTION: record.reference, ANSWER: record.answer}.get(view, record.columns.get(view))
    if text is None:
        raise UserError(
            f"row {record.id}",
            got=f"no {_column(view)}",
            need=f"one, since a teacher sees the view {view}",
            fix="fix the row or data.train.columns, or set data.privileged.view and data.reference_only.view",
        )
    return text


def _equal_teachers(record: Record) -> UserError:
    return UserError(
        f"row {record.id}",
        got="the same prompt for both teachers: their difference is 0 at every token",
        need="contexts that differ",
        fix="set data.privileged.view or data.reference_only.view",
    )


def _require_verbatim(record: Record, what: str, part: str, text: str) -> None:
    if part.strip() not in text:
        raise UserError(
            f"row {record.id}",
            got=f"a rendered prompt without the unchanged {what} of the row",
            need=f"a chat template that does not change the user's text, so that all contexts share the {what}",
            fix="fix the chat template",
        )
