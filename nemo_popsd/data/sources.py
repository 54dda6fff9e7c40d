"""Read records from JSONL, Parquet, or a data set saved by `datasets`; the kind is told by the path itself.

A defect of the whole source (missing file, missing column, unreadable) is always an error. A defect of
one row follows `malformed_rows`. Duplicate ids are always an error, since they would make logs ambiguous.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_popsd.data.config import ColumnsConfig, SourceConfig
from nemo_popsd.data.records import Record
from nemo_popsd.data.report import DataReport
from nemo_popsd.errors import UserError

EMBEDDED = "nemo_popsd:"
_PARQUET_MAGIC = b"PAR1"
_ARROW_MAGIC = b"\xff\xff\xff\xff"  # an Arrow stream, as `datasets` caches it


class _MalformedError(Exception):
    """One row cannot be used, for the reason given."""


# One row as the readers hand it over: its number from 1, and its columns or what is wrong with it.
_Row = tuple[int, "Mapping[str, Any] | _MalformedError"]


def read_records(
    source: SourceConfig,
    *,
    setting: str = "data.train",
    malformed_rows: str = "error",
    need_reference: bool = True,
    need_answer: bool = False,
) -> tuple[list[Record], DataReport]:
    """Read all rows of `source`, in file order.

    Args:
        source: where the rows are and which column holds what.
        setting: dotted name of `source` in the configuration, for messages.
        malformed_rows: ``error`` or ``skip``; skipped rows are counted in the report.
        need_reference: refuse a source that declares no reference column.
        need_answer: a row without a final answer is malformed.

    Raises:
        UserError: nothing usable at the path, a column or an answer is missing, a row is malformed under
            ``error``, two rows share an id, or no usable row is left.
    """
    if need_reference and source.columns.reference is None:
        raise UserError(
            "training data",
            got=f"{setting}.columns.reference=null",
            need="a reference solution for every row",
            mend=f"set {setting}.columns.reference",
        )
    if need_answer and source.columns.answer is None and source.answer_pattern is None:
        raise UserError(
            "evaluation data",
            got=f"neither {setting}.columns.answer nor {setting}.answer_pattern",
            need="a final answer for every row",
            mend="set one of them",
        )
    path = resolve_path(source.path, setting=setting)
    report = DataReport(source=source.path)
    records: list[Record] = []
    first_seen: dict[str, int] = {}
    for number, row in islice(_rows(path, source.columns, setting), source.limit):
        report.rows_read += 1
        try:
            if isinstance(row, _MalformedError):
                raise row
            record = _record(row, number, path, source, need_answer=need_answer)
        except _MalformedError as problem:
            if malformed_rows == "error":
                raise UserError(
                    f"{path}:{number}",
                    got=str(problem),
                    need="a row with every mapped column filled in",
                    mend=f"mend the row, set {setting}.columns, or set data.malformed_rows=skip",
                ) from None
            report.skip(f"row {number}: {problem}")
            continue
        if record.id in first_seen:
            raise UserError(
                f"{path}:{number}",
                got=f"id {record.id!r} again, first in row {first_seen[record.id]}",
                need="unique ids",
                mend=f"mend the rows, or set {setting}.columns.id to another column or null",
            )
        first_seen[record.id] = number
        records.append(record)
    if not records:
        got = f"{report.rows_read} rows, none usable"
        if report.first_malformed is not None:
            got += f" (first: {report.first_malformed})"
        raise UserError(str(path), got=got, need="at least one row", mend=f"set {setting}.path or {setting}.columns")
    return records, report


def column_names(path: Path) -> list[str]:
    """Names of the columns of a file or directory that `read_records` can read; of JSONL, those of its first row.

    Raises:
        UserError: it cannot be read.
    """
    if path.is_dir():
        from datasets import load_from_disk

        saved = load_from_disk(str(path))
        return list(saved["train"].column_names if isinstance(saved, dict) else saved.column_names)
    import pyarrow.ipc
    import pyarrow.parquet

    with path.open("rb") as file:
        magic = file.read(len(_PARQUET_MAGIC))
    if magic == _PARQUET_MAGIC:
        return list(pyarrow.parquet.read_schema(path).names)
    if magic == _ARROW_MAGIC:
        with pyarrow.memory_map(str(path)) as mapped:
            return list(pyarrow.ipc.open_stream(mapped).schema.names)
    row = next((row for _, row in _jsonl_rows(path)), None)
    if not isinstance(row, dict):
        raise UserError(str(path), got=str(row or "no row"), need="one JSON object a line", mend="mend the file")
    return list(row)


def resolve_path(path: str, *, setting: str) -> Path:
    """The file or directory that `path` names; ``nemo_popsd:NAME`` is an embedded asset.

    Raises:
        UserError: `path` is empty or does not exist.
    """
    if not path:
        raise UserError("data", got=f"{setting}.path=''", need="a file or a directory", mend=f"set {setting}.path")
    if path.startswith(EMBEDDED):
        from nemo_popsd.testbed import asset

        return Path(asset(path))
    resolved = Path(path).expanduser()
    if not resolved.exists():
        raise UserError(
            "data",
            got=f"{setting}.path={path!r}, which does not exist (looked in {Path.cwd()})",
            need="a JSONL file, a Parquet file, or a directory saved by `datasets`",
            mend=f"set {setting}.path",
        )
    return resolved


def _rows(path: Path, columns: ColumnsConfig, setting: str) -> Iterator[_Row]:
    if path.is_dir():
        return _saved_dataset_rows(path, columns, setting)
    try:
        with path.open("rb") as file:
            magic = file.read(len(_PARQUET_MAGIC))
    except OSError as error:
        raise _unreadable(path, error, setting) from None
    if magic == _PARQUET_MAGIC:
        return _parquet_rows(path, columns, setting)
    if magic == _ARROW_MAGIC:
        return _arrow_rows(path, columns, setting)
    if path.suffix == ".parquet":
        raise _unreadable(path, "no Parquet data, although the name ends in .parquet", setting)
    if magic.startswith(b"["):
        raise _unreadable(path, "one JSON array", setting)
    if magic.startswith(b"\x1f\x8b"):
        raise _unreadable(path, "gzip-compressed data", setting)
    return _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    """Lines are split at the newline byte alone: U+2028 and its kin may stand inside a JSON string."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row: Any
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                row = _MalformedError(f"bytes that are not UTF-8 ({error.reason} at byte {error.start})")
            except (ValueError, RecursionError) as error:
                row = _MalformedError(f"a line that is not JSON ({error})")
            else:
                if not isinstance(row, dict):
                    row = _MalformedError(f"a JSON {type(row).__name__} instead of an object")
            yield number, row


def _parquet_rows(path: Path, columns: ColumnsConfig, setting: str) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            wanted = _wanted_columns(columns)
            _require_columns(path, file.schema_arrow.names, wanted, setting)
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024, columns=wanted))
            yield from enumerate((row for batch in batches for row in batch), start=1)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error, setting) from None


def _arrow_rows(path: Path, columns: ColumnsConfig, setting: str) -> Iterator[_Row]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            wanted = _wanted_columns(columns)
            _require_columns(path, stream.schema.names, wanted, setting)
            batches = (batch.select(wanted).to_pylist() for batch in stream)
            yield from enumerate((row for batch in batches for row in batch), start=1)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error, setting) from None


def _saved_dataset_rows(path: Path, columns: ColumnsConfig, setting: str) -> Iterator[_Row]:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise _unreadable(path, "a directory without the files that `datasets` saves", setting)
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:
        # pyarrow, json and datasets raise unrelated types here; all mean that the directory is damaged.
        raise _unreadable(path, error, setting) from None
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise UserError(
                str(path),
                got=f"splits {', '.join(sorted(map(str, dataset)))}",
                need="a split named train",
                mend=f"set {setting}.path to one split's directory",
            )
        dataset = dataset["train"]
    wanted = _wanted_columns(columns)
    _require_columns(path, dataset.column_names, wanted, setting)
    yield from enumerate(dataset.select_columns(wanted), start=1)


def _wanted_columns(columns: ColumnsConfig) -> list[str]:
    wanted = (columns.id, columns.question, columns.reference, columns.answer)
    return list(dict.fromkeys(name for name in wanted if name is not None))


def _require_columns(path: Path, found: Iterable[str], wanted: list[str], setting: str) -> None:
    names = list(found)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(
            str(path),
            got=f"columns {', '.join(names) or '(none)'}",
            need=f"the mapped columns, {', '.join(missing)} among them",
            mend=f"set {setting}.columns",
        )


def _unreadable(path: Path, problem: object, setting: str) -> UserError:
    return UserError(
        str(path),
        got=str(problem),
        need="JSONL (one object a line), Parquet, or a directory saved by `datasets`",
        mend=f"mend the file or set {setting}.path",
    )


def _record(row: Mapping[str, Any], number: int, path: Path, source: SourceConfig, *, need_answer: bool) -> Record:
    columns = source.columns
    identity = f"{path.name}:{number}" if columns.id is None else _scalar(row, columns.id)
    question = _text(row, columns.question)
    reference = None if columns.reference is None else _text(row, columns.reference)
    answer: str | None = None
    if columns.answer is not None:
        answer = _scalar(row, columns.answer)
    elif source.answer_pattern is not None and reference is not None:
        matches = list(re.finditer(source.answer_pattern, reference))
        answer = (matches[-1].group(1) or "").strip() or None if matches else None
    if need_answer and answer is None:
        raise _MalformedError("no final answer: the answer pattern matches nothing in the reference")
    return Record(id=identity, question=question, reference=reference, answer=answer)


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise _MalformedError(f"no column {column!r}, only {', '.join(row) or '(none)'}")
    value = row[column]
    if value is None:
        raise _MalformedError(f"column {column!r} is null")
    return value


def _text(row: Mapping[str, Any], column: str) -> str:
    value = _cell(row, column)
    if not isinstance(value, str):
        raise _MalformedError(f"column {column!r} holds {type(value).__name__}, not text")
    if not value.strip():
        raise _MalformedError(f"column {column!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _MalformedError(f"column {column!r} holds half a surrogate pair") from None
    return value


def _scalar(row: Mapping[str, Any], column: str) -> str:
    value = _cell(row, column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _text(row, column).strip()
