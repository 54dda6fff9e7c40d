"""Reading of records from the files of a source: JSONL, Parquet, or a data set that `datasets` saved.

A defect of a file (missing file, missing column, unreadable) is always an error. `malformed_rows` applies to a defect
of one row. Duplicate ids are always an error, since they would make logs ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from nemo_popsd.data.cells import scalar_of, text_of, view_of
from nemo_popsd.data.config import ColumnsConfig, SourceConfig
from nemo_popsd.data.files import row_names, source_files
from nemo_popsd.data.readers import MalformedError, rows_of
from nemo_popsd.data.records import Record, is_blank
from nemo_popsd.data.report import DataReport
from nemo_popsd.errors import UserError


def check_source(
    source: SourceConfig, *, setting: str, need_reference: bool = True, need_answer: bool = False
) -> list[Path]:
    """Checks the settings of `source` and returns its files; no row is read.

    Args:
        source: paths and columns of the rows.
        setting: dotted name of `source` in the configuration, for messages.
        need_reference: refuse a source that declares no reference column.
        need_answer: refuse a source that declares no final answers.

    Raises:
        UserError: nothing usable at the path, or a setting is missing or has no effect.
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


def read_records(
    source: SourceConfig,
    *,
    setting: str = "data.train",
    malformed_rows: str = "error",
    need_reference: bool = True,
    need_answer: bool = False,
    views: Sequence[str] = (),
) -> tuple[list[Record], DataReport]:
    """Read all rows of `source`, in file order.

    Args:
        source: paths and columns of the rows.
        setting: dotted name of `source` in the configuration, for messages.
        malformed_rows: ``error`` or ``skip``; skipped rows are counted in the report.
        need_reference: refuse a source that declares no reference column.
        need_answer: a row without a final answer is malformed.
        views: further columns, of which every row needs a text or a number.

    Raises:
        UserError: nothing usable at the path, a column or an answer is missing, a row is malformed under
            ``error``, two rows share an id, or no usable row is left.
    """
    files = check_source(source, setting=setting, need_reference=need_reference, need_answer=need_answer)
    report = DataReport(source=source.path)
    records: list[Record] = []
    first_seen: dict[str, str] = {}
    for where, name, row in islice(_rows(files, source.columns, views, setting), source.limit):
        report.rows_read += 1
        try:
            if isinstance(row, MalformedError):
                raise row
            record = _record(row, name, source, views, need_answer=need_answer)
        except MalformedError as problem:
            if malformed_rows == "error":
                raise UserError(
                    where,
                    got=str(problem),
                    need="a row with a value in every mapped column",
                    fix=f"fix the row, set {setting}.columns, or set data.malformed_rows=skip",
                ) from None
            report.skip(f"row {where.rpartition(':')[2] if len(files) == 1 else where}: {problem}")
            continue
        if record.id in first_seen:
            raise UserError(
                where,
                got=f"id {record.id!r} again, first in {first_seen[record.id]}",
                need="unique ids",
                fix=f"fix the rows, or set {setting}.columns.id to another column or null",
            )
        first_seen[record.id] = f"row {where.rpartition(':')[2]}" if len(files) == 1 else where
        records.append(record)
    if not records:
        got = f"{report.rows_read} rows, none usable"
        if report.first_malformed is not None:
            got += f" (first: {report.first_malformed})"
        raise UserError(source.path, got=got, need="at least one row", fix=f"set {setting}.path or {setting}.columns")
    return records, report


def _rows(
    files: list[Path], columns: ColumnsConfig, views: Sequence[str], setting: str
) -> Iterator[tuple[str, str, Mapping[str, object] | MalformedError]]:
    """The rows of all files: location for messages, name for the id, and content of each."""
    mapped = (columns.id, columns.question, columns.reference, columns.answer, *views)
    wanted = list(dict.fromkeys(name for name in mapped if name is not None))
    for path, name in zip(files, row_names(files), strict=True):
        for number, row in rows_of(path, wanted, setting):
            yield f"{path}:{number}", f"{name}:{number}", row


def _refuse_unused_pattern(source: SourceConfig, setting: str) -> None:
    """Refuse a pattern for answers that would be ignored."""
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
