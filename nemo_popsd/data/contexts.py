"""The token ids of the three distinct prompts of a record.

| context | user turn | used by |
|---|---|---|
| student | question | the live student and the frozen base, and the rollout engine |
| privileged | question and reference | the privileged teacher |
| reference | reference, no question | the reference-only teacher |

Two related targets use another row's reference in one context (`Borrowed`).

All prompts end in the same assistant prefix, so that the same response ids continue each of them
(`nemo_popsd.data.alignment`). Only the reference is ever truncated, before both teachers' turns are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from nemo_popsd.data.chat import ChatFormat
from nemo_popsd.data.config import DataConfig
from nemo_popsd.data.records import Record
from nemo_popsd.data.templates import check_templates, placeholders, student_turn, user_turns
from nemo_popsd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 64  # texts tokenised per call: enough to occupy the cores, few enough to keep the offsets in memory
_MOST_TOKENS_PER_CHARACTER = 4  # a byte-level tokenizer makes at most one token of each UTF-8 byte
_MERGE_SLACK = 16  # tokens by which a joined text may exceed the sum of its pieces


class Borrowed(StrEnum):
    """The context of a row that holds the reference of another row."""

    NONE = ""
    """The paper's contexts."""
    PRIVILEGED = "privileged"
    """The privileged teacher sees the question with another row's reference (OP²SD, arXiv 2608.09228)."""
    SECOND = "reference"
    """The reference-only context is replaced by the question with another row's reference, in the privileged teacher's
    template (wrong-reference contrast)."""


@dataclass(frozen=True)
class Contexts:
    """Token ids of one row's prompts, none of them empty, each ending in the assistant prefix."""

    student: list[int]
    """Question; shared by student and base."""
    privileged: list[int]
    """Question and reference."""
    reference: list[int]
    """Reference alone; see `Borrowed`."""
    reference_text: str
    """The row's reference as the teachers see it."""
    reference_truncated: bool
    """Whether the record's reference is longer."""


@dataclass(frozen=True, slots=True)
class FittedRow:
    """A record within the limits, with the reference text that both teachers see."""

    record: Record
    reference_text: str | None
    reference_truncated: bool
    student_length: int


class Misfit(StrEnum):
    """Why a row is dropped or skipped."""

    MALFORMED = "malformed"
    LONG_REFERENCE = "long reference"
    OVERLONG = "overlong prompt"


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A record that the settings drop or skip."""

    record: Record
    why: Misfit
    detail: str


class ContextBuilder:
    """Makes the contexts of records, for one tokenizer and one data configuration.

    Attributes:
        assistant_prefix: the text in which every prompt ends.
        template_ignores_thinking: `enable_thinking` has no effect (also logged once, as a warning).
        longest_context: a bound on the length in tokens of any prompt, reference included. Adding the response limit
            gives the longest sequence of the training.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, vocab_size: int | None = None
    ) -> None:
        """Check the templates and the chat template, with probe texts only.

        Args:
            tokenizer: of the student.
            config: the section `data`.
            vocab_size: number of embeddings of the student; None skips the check of token ids.

        Raises:
            UserError: from `check_templates` and `ChatFormat`, or the templates use a token without an embedding.
        """
        check_templates(config.templates)
        self._config = config
        self._chat = ChatFormat(tokenizer, system=config.templates.system, enable_thinking=config.enable_thinking)
        self.assistant_prefix = self._chat.assistant_prefix
        self.template_ignores_thinking = self._chat.ignores_thinking
        self._vocab_size = vocab_size
        self._beyond = self._chat.beyond(vocab_size) if vocab_size is not None else {}
        if self._beyond:
            turns = user_turns(config.templates, question="", reference="")
            for text in (turns.student, turns.privileged):
                self._refuse_beyond("the prompt around a row", "templates", self._chat.render(text))
        self.longest_context = self._longest_context()

    def fit(self, records: Sequence[Record], *, with_reference: bool = True) -> list[FittedRow | RejectedRow]:
        """Check the length of `records` and truncate their references, in order.

        Args:
            records: rows as read.
            with_reference: False ignores references, as evaluation does.

        Raises:
            UserError: naming the row, for a misfit whose setting is `error`, a missing reference, a token without an
                embedding, or a student prompt that does not end in the assistant prefix.
        """
        rows: list[FittedRow | RejectedRow] = []
        for start in range(0, len(records), _BATCH):
            batch = records[start : start + _BATCH]
            prompts = self._chat.encode([self._student_text(record) for record in batch])
            if self._beyond:
                for record in batch:
                    self._refuse_beyond(f"row {record.id}", "question", self._student_text(record))
                    self._refuse_beyond(f"row {record.id}", "reference", (with_reference and record.reference) or "")
            references: list[tuple[str | None, int]] = [(None, 0)] * len(batch)
            if with_reference:
                references[:] = self._truncate([_reference_of(record) for record in batch])
            for record, prompt, (reference, tokens) in zip(batch, prompts, references, strict=True):
                rows.append(self._judge(record, len(prompt.ids), reference, tokens))
        return rows

    def contexts(self, row: FittedRow, borrowed: Borrowed = Borrowed.NONE, other: FittedRow | None = None) -> Contexts:
        """Token ids of one fitted row.

        Args:
            row: the row.
            borrowed: the context that holds the reference of `other`.
            other: another row; required unless `borrowed` is `NONE`.

        Raises:
            UserError: naming the row, if the prompts do not end in the same assistant prefix, the chat template altered
                the question or the reference, or a prompt is longer than `longest_context`.
        """
        record, reference = row.record, row.reference_text
        if reference is None:
            raise _missing_reference(record)
        own = user_turns(self._config.templates, question=record.question, reference=reference)
        privileged, second, seen = own.privileged, own.reference, [reference, reference]
        if borrowed:
            assert other is not None
            assert other.reference_text is not None
            lent = user_turns(self._config.templates, question=record.question, reference=other.reference_text)
            if borrowed is Borrowed.PRIVILEGED:
                privileged, seen[0] = lent.privileged, other.reference_text
            else:
                second, seen[1] = lent.privileged, other.reference_text
        texts = [self._chat.render(turn) for turn in (own.student, privileged, second)]
        _require_verbatim(record, "question", record.question, texts[:2])
        for text, part in zip(texts[1:], seen, strict=True):
            _require_verbatim(record, "reference", part, [text])
        encoded = self._chat.encode(texts)
        tails = [self._chat.prefix_ids(text, prompt) for text, prompt in zip(texts, encoded, strict=True)]
        if not tails[0] or any(tail != tails[0] for tail in tails):
            raise self._prefix_mismatch(record, texts, tails)
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
            reference_text=reference,
            reference_truncated=row.reference_truncated,
        )

    def build(self, record: Record) -> Contexts:
        """Contexts of one record: `fit`, then `contexts`.

        Raises:
            UserError: as those two, and for a row that the settings drop or skip.
        """
        row = self.fit([record])[0]
        if isinstance(row, RejectedRow):
            raise UserError(f"row {record.id}", got=row.detail, need="a row within the limits", fix="remove it")
        return self.contexts(row)

    def student_prompt(self, record: Record) -> list[int]:
        """Token ids of the student's prompt only, for evaluation; limits are not checked (see `fit`)."""
        return self._chat.encode([self._student_text(record)])[0].ids

    def _student_text(self, record: Record) -> str:
        text = self._chat.render(student_turn(self._config.templates, question=record.question))
        _require_verbatim(record, "question", record.question, [text])
        if not text.endswith(self.assistant_prefix):
            raise self._prefix_mismatch(record, [text], [])
        return text

    def _truncate(self, references: Sequence[str]) -> list[tuple[str, int]]:
        """For each text: the text truncated to the limit, and its original number of tokens (0: certainly within)."""
        limit = self._config.max_reference_tokens
        long = [i for i, text in enumerate(references) if len(text) * _MOST_TOKENS_PER_CHARACTER > limit]
        truncated = [(text, 0) for text in references]
        for index, encoded in zip(long, self._chat.encode([references[i] for i in long]), strict=True):
            text = references[index]
            tokens = len(encoded.ids)
            while len(encoded.ids) > limit:
                # The first removed token may start inside the last character, which is then removed too. In rare
                # cases the remaining text tokenises into more than `limit` tokens again.
                text = text[: min(encoded.starts[limit], len(text) - 1)]
                encoded = self._chat.encode([text])[0]
            truncated[index] = (text, tokens)
        return truncated

    def _judge(self, record: Record, length: int, reference: str | None, tokens: int) -> FittedRow | RejectedRow:
        config = self._config
        for column, text in (("question", record.question), ("reference", reference or "")):
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
        truncated = tokens > config.max_reference_tokens
        if truncated and not (reference or "").strip():
            raise UserError(
                f"row {record.id}",
                got=f"nothing left of the reference at data.max_reference_tokens={config.max_reference_tokens}",
                need="space for at least a few words",
                fix="set data.max_reference_tokens higher",
            )
        return FittedRow(record, reference, truncated, length)

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

    def _longest_context(self) -> int:
        """The tokens of the empty templates plus the maximum that question and reference can add."""
        templates, config = self._config.templates, self._config
        turns = user_turns(templates, question="", reference="")
        empty = self._chat.encode([self._chat.render(text) for text in (turns.student, turns.privileged)])
        empty_student, empty_privileged = (len(encoded.ids) for encoded in empty)
        body = placeholders(templates.teacher)
        questions = body.count("question_block") * placeholders(templates.question_block).count("question")
        longest_question = max(0, config.max_prompt_tokens - empty_student)
        added = questions * longest_question + body.count("reference") * config.max_reference_tokens
        return max(config.max_prompt_tokens, empty_privileged + added) + _MERGE_SLACK

    def _prefix_mismatch(self, record: Record, texts: Sequence[str], tails: Sequence[list[int] | None]) -> UserError:
        shown = len(self.assistant_prefix) + 20
        names = ("student", "privileged", "reference")
        ends = "; ".join(f"{name} prompt ends in {text[-shown:]!r}" for name, text in zip(names, texts, strict=False))
        if tails and all(tail is not None for tail in tails):
            ends += f" (token ids {', '.join(map(str, tails))})"
        return UserError(
            f"row {record.id}",
            got=ends,
            need=f"the same assistant prefix {self.assistant_prefix!r} in every prompt",
            fix="fix the chat template, or end data.templates.student and data.templates.teacher alike",
        )


def _reference_of(record: Record) -> str:
    if record.reference is None:
        raise _missing_reference(record)
    return record.reference


def _missing_reference(record: Record) -> UserError:
    return UserError(
        f"row {record.id}", got="no reference", need="a reference solution", fix="fix the row or columns.reference"
    )


def _require_verbatim(record: Record, what: str, part: str, texts: Sequence[str]) -> None:
    if any(part.strip() not in text for text in texts):
        raise UserError(
            f"row {record.id}",
            got=f"a rendered prompt without the unchanged {what} of the row",
            need=f"a chat template that does not change the user's text, so that all contexts share the {what}",
            fix="fix the chat template",
        )
