"""Reading records from the files of a source: JSONL, Parquet, or a data set that `datasets` saved.

A defect of a file (missing, unreadable, without a column) is always an error. `malformed_rows` applies to a defect of a
single row. Duplicate ids are always an error, because they would make logs ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nemo_popsd.data.cells import scalar_of, text_of, view_of
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.data.files import row_names, source_files
from nemo_popsd.data.readers import MalformedError, Place, Row, row_at, rows_of
from nemo_popsd.data.records import Record, is_blank
from nemo_popsd.data.report import DataReport
from nemo_popsd.errors import UserError


def check_source(
    source: SourceConfig, *, setting: str, need_reference: bool = True, need_answer: bool = False
) -> list[Path]:
    """Check the settings of `source` and return its files, without reading rows.

    Args:
        source: paths and columns of the rows.
        setting: dotted name of `source` in the configuration, for messages.
        need_reference: refuse a source that declares no reference column.
        need_answer: refuse a source that declares no final answers.

    Raises:
        UserError: the path has no usable file, or a setting is missing or has no effect.
    """
    files = source_files([source.path, *source.more_paths], setting=setting)
    if need_reference and source.columns.reference is None:
        raise UserError(
            "training data",
            got=f"{setting}.columns.reference=null",
            need="a reference solution for every row",
            fix=f"set {setting}.columns.reference",
        )
    if need_answer and source.columns.answer is None and source.answer_pattern is None:
        raise UserError(
            "data",
            got=f"neither {setting}.columns.answer nor {setting}.answer_pattern",
            need="a final answer for every row",
            fix="set one of them",
        )
    if source.answer_pattern is not None:
        _refuse_unused_pattern(source, setting)
    return files


class Located(NamedTuple):
    """A record with the position of its row."""

    record: Record
    file: int
    """Index of the file."""
    number: int
    """Number of the row in its file, counted from 1."""
    place: Place | None
    """Position for reading the row again; None for formats other than JSONL."""


class RecordReader:
    """Reads the records of one source: all in order, or a single one again at its position.

    Files from which single records were read stay open, so they may be removed during the run.
    """

    def __init__(
        self,
        source: SourceConfig,
        *,
        setting: str = "data.train",
        malformed_rows: str = "error",
        need_reference: bool = True,
        need_answer: bool = False,
        views: Sequence[str] = (),
    ) -> None:
        """Check the settings of `source`, without reading rows.

        Args:
            source: paths and columns of the rows.
            setting: dotted name of `source` in the configuration, for messages.
            malformed_rows: ``error`` or ``skip``; skipped rows are counted in the report.
            need_reference: refuse a source that declares no reference column.
            need_answer: a row without a final answer is malformed.
            views: further columns; every row needs a text or a number in each.

        Raises:
            UserError: as `check_source`.
        """
        self.files = check_source(source, setting=setting, need_reference=need_reference, need_answer=need_answer)
        self.report = DataReport(source=source.path)
        """Counts of the rows that `records` has read."""
        self._source = source
        self._setting = setting
        self._malformed_rows = malformed_rows
        self._need_answer = need_answer
        self._views = views
        self._names = row_names(self.files)
        self._open: dict[int, BinaryIO] = {}

    def records(self) -> Iterator[Located]:
        """Yield all records, in file order.

        Raises:
            UserError: a column or an answer is missing, a row is malformed under ``error``, two rows share an id, or no
                row is usable.
        """
        source, setting, report = self._source, self._setting, self.report
        first_seen: dict[str, str] = {}
        for file, row in islice(self._rows(), source.limit):
            where, single = f"{self.files[file]}:{row.number}", len(self.files) == 1
            report.rows_read += 1
            try:
                if isinstance(row.content, MalformedError):
                    raise row.content
                record = self._record(row.content, file, row.number)
            except MalformedError as problem:
                if self._malformed_rows == "error":
                    raise UserError(
                        where,
                        got=str(problem),
                        need="a row with a value in every mapped column",
                        fix=f"fix the row, set {setting}.columns, or set data.malformed_rows=skip",
                    ) from None
                report.skip(f"row {row.number if single else where}: {problem}")
                continue
            if record.id in first_seen:
                raise UserError(
                    where,
                    got=f"id {record.id!r} again, first in {first_seen[record.id]}",
                    need="unique ids",
                    fix=f"fix the rows, or set {setting}.columns.id to another column or null",
                )
            first_seen[record.id] = f"row {row.number}" if single else where
            yield Located(record, file, row.number, row.place)
        if not first_seen:
            got = f"{report.rows_read} rows, none usable"
            if report.first_malformed is not None:
                got += f" (first: {report.first_malformed})"
            fix = f"set {setting}.path or {setting}.columns"
            raise UserError(source.path, got=got, need="at least one row", fix=fix)

    def read(self, file: int, number: int, place: Place) -> Record:
        """Read the record of a row again, at the position that `records` returned.

        Raises:
            UserError: the content at this position has changed.
        """
        if file not in self._open:
            self._open[file] = self.files[file].open("rb", buffering=0)
        return self._record(row_at(self._open[file], place, self._setting), file, number)

    def _rows(self) -> Iterator[tuple[int, Row]]:
        columns = self._source.columns
        mapped = (columns.id, columns.question, columns.reference, columns.answer, *self._views)
        wanted = list(dict.fromkeys(name for name in mapped if name is not None))
        for file, path in enumerate(self.files):
            for row in rows_of(path, wanted, self._setting):
                yield file, row

    def _record(self, row: Mapping[str, object], file: int, number: int) -> Record:
        name = f"{self._names[file]}:{number}"
        return _record(row, name, self._source, self._views, need_answer=self._need_answer)


def read_records(
    source: SourceConfig,
    *,
    setting: str = "data.train",
    malformed_rows: str = "error",
    need_reference: bool = True,
    need_answer: bool = False,
    views: Sequence[str] = (),
) -> tuple[list[Record], DataReport]:
    """Return all records of `source`, in file order, and the report; see `RecordReader`."""
    reader = RecordReader(
        source,
        setting=setting,
        malformed_rows=malformed_rows,
        need_reference=need_reference,
        need_answer=need_answer,
        views=views,
    )
    return [located.record for located in reader.records()], reader.report


def _refuse_unused_pattern(source: SourceConfig, setting: str) -> None:
    """Refuse an answer pattern that would be ignored."""
    name = f"{setting}.answer_pattern"
    if source.columns.answer is not None:
        got = f"{name} together with {setting}.columns.answer={source.columns.answer!r}, which overrides it"
        fix = f"remove {name}, or set {setting}.columns.answer=null"
    elif source.columns.reference is None:
        got = f"{name} without {setting}.columns.reference, which it searches"
        fix = f"set {setting}.columns.reference, or {setting}.columns.answer instead of the pattern"
    else:
        return
    raise UserError("configuration", got=got, need="settings that have an effect", fix=fix)


def _record(
    row: Mapping[str, object], name: str, source: SourceConfig, views: Sequence[str], *, need_answer: bool
) -> Record:
    columns = source.columns
    identity = name if columns.id is None else scalar_of(row, columns.id)
    question = text_of(row, columns.question, field="question")
    reference = None if columns.reference is None else text_of(row, columns.reference, field="reference")
    answer: str | None = None
    if columns.answer is not None:
        answer = scalar_of(row, columns.answer)
    elif source.answer_pattern is not None and reference is not None:
        matches = list(re.finditer(source.answer_pattern, reference))
        last = matches[-1].group(1) if matches else None
        answer = None if last is None or is_blank(last) else last.strip()
    if need_answer and answer is None:
        raise MalformedError("no final answer: the answer pattern matches nothing in the reference")
    seen = {view: view_of(row, view) for view in views}
    return Record(id=identity, question=question, reference=reference, answer=answer, columns=seen)
