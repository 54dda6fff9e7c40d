"""Prepared rows for training, and prompts with answers for evaluation.

All rows are read and checked before any model is loaded; rows of large files are not kept (`nemo_popsd.data.rows`). A
row is tokenised when a step visits it: the token ids of 20,000 rows with long references would take gigabytes of Python
integers on every rank, while tokenising one row takes milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from nemo_popsd.data.config import DataConfig, SourceConfig
from nemo_popsd.data.contexts import Borrowed, ContextBuilder, Contexts, FittedRow, Misfit, RejectedRow
from nemo_popsd.data.records import Record
from nemo_popsd.data.report import DataReport
from nemo_popsd.data.rows import BATCH, FittedRows
from nemo_popsd.data.sources import Located, RecordReader
from nemo_popsd.data.views import SOLUTION
from nemo_popsd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One training row with its contexts."""

    record: Record
    contexts: Contexts


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """One evaluation row: the student's prompt, and a record whose `answer` is not None."""

    record: Record
    prompt: list[int]


class PromptDataset(Dataset[PromptRow]):
    """Fitted rows by index, in file order; contexts are built on each access and are deterministic."""

    def __init__(
        self,
        rows: FittedRows,
        builder: ContextBuilder,
        borrowed: Borrowed = Borrowed.NONE,
        *,
        with_answers: bool = False,
    ) -> None:
        self._with_answers = with_answers
        self._rows = rows
        self._indices: dict[str, int] | None = None
        self.builder = builder
        self._borrowed = borrowed
        self._lent = sorted(builder.lent_views(borrowed))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ids(self) -> Sequence[str]:
        """The ids of all rows, in order."""
        return self._rows.ids

    def records(self) -> Iterator[Record]:
        """Yield the records of all rows, in order, without building contexts."""
        return (row.record for row in self._rows)

    def data_digest(self) -> str:
        """Return a SHA-256 over id, question, reference and all other texts used in training of every row, in order.

        It does not depend on the paths of the files.
        """
        digest = hashlib.sha256()
        views = [view for view in self.builder.views.texts if view != SOLUTION]
        for row in self._rows:
            record = row.record
            content = [record.id, record.question, record.reference, *(row.text(view) for view in views)]
            if self._with_answers:
                content.append(record.answer)
            digest.update(json.dumps(content).encode())
        return digest.hexdigest()

    def by_id(self, row_id: str) -> PromptRow:
        """Return the row with this id.

        Raises:
            KeyError: no row has this id.
        """
        if self._indices is None:
            self._indices = {name: index for index, name in enumerate(self._rows.ids)}
        return self[self._indices[row_id]]

    def __getitem__(self, index: int) -> PromptRow:
        row = self._rows[index]
        other = self._rows[self._lender(index)] if self._lent else None
        return PromptRow(row.record, self.builder.contexts(row, self._borrowed, other))

    def _lender(self, index: int) -> int:
        """Return the index of the row whose texts row `index` uses: deterministic, with different texts."""
        row, count = self._rows[index], len(self._rows)
        first = int.from_bytes(hashlib.sha256(row.record.id.encode()).digest()[:8], "big") % count
        for offset in range(count):
            lender = (first + offset) % count
            if all(self._rows[lender].text(view) != row.text(view) for view in self._lent):
                return lender
        raise UserError(
            "data",
            got=f"{count} rows that all have the reference of row {row.record.id}",
            need="rows with different references, since this target uses another row's reference",
            fix="set data.train or distillation.target.family",
        )

    def index(self, row_id: str) -> int | None:
        """Return the index of the row with this id; None if there is none."""
        return next((index for index, name in enumerate(self._rows.ids) if name == row_id), None)


def build_dataset(
    config: DataConfig,
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerBase,
    borrowed: Borrowed = Borrowed.NONE,
    *,
    vocab_size: int | None = None,
    need_answer: bool = False,
) -> tuple[PromptDataset, DataReport]:
    """Read and check the rows of `source`, and log the report as one line.

    Every rank calls this with the same arguments and gets the same rows in the same order; no collectives.

    Args:
        config: the section `data`.
        source: the source to read.
        tokenizer: the student's tokenizer.
        borrowed: the context of a row that contains another row's reference.
        vocab_size: number of embeddings of the student; None skips the check of token ids.
        need_answer: whether the training depends on the answers, so that every row must have one.

    Raises:
        UserError: reading fails, the templates are invalid, a misfit has the setting `error`, or no row is left.
    """
    builder = ContextBuilder(tokenizer, config, vocab_size=vocab_size)
    rows, report = _fitted_rows(config, source, builder, evaluation=False, need_answer=need_answer)
    dataset = PromptDataset(rows, builder, borrowed, with_answers=need_answer)
    # Building one row refuses a faulty chat template before the first step.
    first = dataset[0]
    if first.contexts.privileged == first.contexts.student:
        logger.warning(
            "row %s: the privileged teacher's prompt is the student's; a target that follows a frozen teacher alone "
            "then equals the base and moves nothing (data.privileged.view=%s)",
            first.record.id,
            builder.views.privileged,
        )
    return dataset, report


def build_evaluation_prompts(
    config: DataConfig, source: SourceConfig, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None
) -> tuple[list[EvaluationPrompt], DataReport]:
    """Read rows with answers and build the student's prompts; references are ignored.

    Raises:
        UserError: as `build_dataset`, and for a row without a final answer (per `malformed_rows`).
    """
    builder = ContextBuilder(tokenizer, config, vocab_size=vocab_size)
    rows, report = _fitted_rows(config, source, builder, evaluation=True)
    return [EvaluationPrompt(row.record, builder.student_prompt(row.record)) for row in rows], report


def _fitted_rows(
    config: DataConfig, source: SourceConfig, builder: ContextBuilder, *, evaluation: bool, need_answer: bool = False
) -> tuple[FittedRows, DataReport]:
    reader = RecordReader(
        source,
        setting="data.validation" if source is config.validation else "data.train",
        malformed_rows=config.malformed_rows,
        need_reference=not evaluation and builder.views.need_reference,
        need_answer=need_answer or evaluation or builder.views.need_answer,
        views=() if evaluation else builder.views.columns,
    )
    report = reader.report
    report.template_ignores_thinking = builder.template_ignores_thinking
    rows = FittedRows(reader, builder, with_reference=not evaluation)
    for located, row in _fit(reader.records(), builder, with_reference=not evaluation):
        if isinstance(row, FittedRow):
            rows.append(located, row)
            report.references_truncated += row.reference_truncated
            report.longest_prompt = max(report.longest_prompt, row.student_length)
        elif row.why is Misfit.MALFORMED:
            report.skip(row.detail)
        elif row.why is Misfit.LONG_REFERENCE:
            report.long_references_dropped += 1
        else:
            report.overlong_dropped += 1
    report.rows_kept = len(rows)
    logger.info("%s", report)
    if not rows:
        raise UserError(
            "data",
            got=str(report),
            need="at least one row that fits",
            fix="set data.max_prompt_tokens or data.max_reference_tokens higher",
        )
    return rows, report


def _fit(
    located: Iterator[Located], builder: ContextBuilder, *, with_reference: bool
) -> Iterator[tuple[Located, FittedRow | RejectedRow]]:
    """Yield each record with the result of its fit; at most `BATCH` records are in memory."""
    while batch := list(islice(located, BATCH)):
        fitted = builder.fit([one.record for one in batch], with_reference=with_reference)
        yield from zip(batch, fitted, strict=True)
