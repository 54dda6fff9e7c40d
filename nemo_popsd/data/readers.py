"""Rows of one file, or of one directory that `datasets` saved. The content determines the format.

Each row has a number, counted from 1, and is a mapping of columns or a `MalformedError` with the reason.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

from nemo_popsd.data.files import is_saved_dataset
from nemo_popsd.errors import UserError
from nemo_popsd.files.json_files import unique_keys

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

LONGEST_LINE = 64 << 20
"""Maximum size of a JSONL line in bytes; a longer line might not fit into memory."""
_PARQUET_MAGIC = b"PAR1"
_ARROW_MAGIC = b"\xff\xff\xff\xff"  # an Arrow stream, as `datasets` caches it
_OTHER_FORMATS = {
    b"\x1f\x8b": "gzip-compressed data",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd-compressed data",
    b"BZh": "bzip2-compressed data",
    b"\xfd7zXZ": "xz-compressed data",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"ARROW1": "an Arrow file instead of a stream",
    b"version https://git-lfs": "a Git LFS pointer instead of the file",
    b"[": "one JSON array",
}


class MalformedError(Exception):
    """A row cannot be used; the message is the reason."""


class Place(NamedTuple):
    """Position of a row's line in a JSONL file."""

    offset: int
    """Bytes before the line."""
    size: int
    """Length of the line in bytes."""
    check: int
    """CRC-32 of the line."""


class Row(NamedTuple):
    """One row of a file."""

    number: int
    """Counted from 1."""
    content: Mapping[str, object] | MalformedError
    """Columns of the row, or why it cannot be used."""
    place: Place | None = None
    """Position for reading the row again; None for formats other than JSONL."""


def rows_of(path: Path, columns: Sequence[str], setting: str) -> Iterator[Row]:
    """Yield the rows of `path`, with at least the requested columns.

    Args:
        path: a regular file, or a directory that `datasets` saved.
        columns: requested columns, as in the configuration: a dot separates a column from a field in it.
        setting: dotted name of the source in the configuration, for messages.

    Raises:
        UserError: `path` cannot be read, or lacks a column.
    """
    if path.is_dir():
        return _saved_dataset_rows(path, columns, setting)
    magic = _first_bytes(path, setting)
    if magic.startswith(_PARQUET_MAGIC):
        return _parquet_rows(path, columns, setting)
    if magic.startswith(_ARROW_MAGIC):
        return _arrow_rows(path, columns, setting)
    if path.suffix == ".parquet" and not magic.startswith(b"version https://git-lfs"):
        raise _unreadable(path, "no Parquet data, although the name ends in .parquet", setting)
    for start, name in _OTHER_FORMATS.items():
        if magic.startswith(start):
            raise _unreadable(path, name, setting)
    return _jsonl_rows(path, setting)


def row_at(file: BinaryIO, place: Place, setting: str) -> Mapping[str, object]:
    """Read the row at `place` again.

    Args:
        file: an open JSONL file; its position does not change.
        place: position returned by `rows_of`.
        setting: dotted name of the source in the configuration, for messages.

    Raises:
        UserError: the content at this position has changed.
    """
    try:
        line = os.pread(file.fileno(), place.size, place.offset)
    except OSError as error:
        raise _unreadable(Path(file.name), error, setting) from None
    row = _jsonl_row(line) if zlib.crc32(line) == place.check else None
    if not isinstance(row, dict):
        raise UserError(
            str(file.name),
            got=f"different content at byte {place.offset:,} than at the start of the run",
            need="files that do not change during a run",
            fix="restore the old file and start the same command again",
        )
    return row


def column_names(path: Path, setting: str) -> list[str]:
    """Return the column names of a file or directory that `rows_of` can read; for JSONL, the columns of the first row.

    Raises:
        UserError: `path` cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet

    if path.is_dir():
        return list(_saved_dataset(path, setting).column_names)
    magic = _first_bytes(path, setting)
    try:
        if magic.startswith(_PARQUET_MAGIC):
            return list(pyarrow.parquet.read_schema(path).names)
        if magic.startswith(_ARROW_MAGIC):
            with pa.memory_map(str(path)) as mapped:
                return list(pa.ipc.open_stream(mapped).schema.names)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error, setting) from None
    row = next((row.content for row in rows_of(path, (), setting)), None)
    if not isinstance(row, dict):
        raise UserError(str(path), got=str(row or "no row"), need="one JSON object per line", fix="fix the file")
    return list(row)


def _first_bytes(path: Path, setting: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(24)
    except OSError as error:
        raise _unreadable(path, error, setting) from None


def _jsonl_rows(path: Path, setting: str) -> Iterator[Row]:
    """Yield one row per line. Only the newline byte separates lines: a JSON string may contain U+2028 and the like."""
    try:
        with path.open("rb") as file:
            number = offset = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise _unreadable(path, f"line {number} of more than {LONGEST_LINE >> 20} MiB", setting)
                if line.strip():
                    yield Row(number, _jsonl_row(line), Place(offset, len(line), zlib.crc32(line)))
                offset += len(line)
    except OSError as error:
        raise _unreadable(path, error, setting) from None


def _jsonl_row(line: bytes) -> Mapping[str, object] | MalformedError:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        return MalformedError(f"bytes that are not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return MalformedError(f"a line that is not valid JSON ({error})")
    return row if isinstance(row, dict) else MalformedError(f"a JSON {type(row).__name__} instead of an object")


def _parquet_rows(path: Path, columns: Sequence[str], setting: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            wanted = _present(path, file.schema_arrow.names, columns, setting)
            yield from _numbered(file.iter_batches(batch_size=1024, columns=wanted), lambda batch: batch.to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error, setting) from None


def _arrow_rows(path: Path, columns: Sequence[str], setting: str) -> Iterator[Row]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            wanted = _present(path, stream.schema.names, columns, setting)
            yield from _numbered(stream, lambda batch: batch.select(wanted).to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error, setting) from None


def _numbered(batches: Iterable[T], rows: Callable[[T], Iterable[Mapping[str, object]]]) -> Iterator[Row]:
    contents = (row for batch in batches for row in rows(batch))
    return (Row(number, content) for number, content in enumerate(contents, start=1))


def _saved_dataset_rows(path: Path, columns: Sequence[str], setting: str) -> Iterator[Row]:
    dataset = _saved_dataset(path, setting)
    wanted = _present(path, dataset.column_names, columns, setting)
    for number, content in enumerate(dataset.select_columns(wanted), start=1):
        yield Row(number, content)


def _saved_dataset(path: Path, setting: str) -> Dataset:
    """Load the data set that `datasets` saved at `path`; the split `train` if there are splits."""
    if not is_saved_dataset(path):
        raise _unreadable(path, "a directory without the files that `datasets` saves", setting)
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:
        # For a damaged directory, pyarrow, json and datasets raise unrelated exception types.
        raise _unreadable(path, error, setting) from None
    if not isinstance(dataset, DatasetDict):
        return dataset
    if "train" not in dataset:
        raise UserError(
            str(path),
            got=f"splits {', '.join(sorted(map(str, dataset)))}",
            need="a split named train",
            fix=f"set {setting}.path to one split's directory",
        )
    return dataset["train"]


def _present(path: Path, present: Iterable[str], columns: Sequence[str], setting: str) -> list[str]:
    """Return the columns of the file that contain the requested columns.

    Raises:
        UserError: a requested column is missing.
    """
    names = list(present)
    sources = {name: name if name in names else name.partition(".")[0] for name in columns}
    missing = [name for name, column in sources.items() if column not in names]
    if missing:
        raise UserError(
            str(path),
            got=f"columns {', '.join(names) or '(none)'}",
            need=f"the mapped columns, including {', '.join(missing)}",
            fix=f"set {setting}.columns",
        )
    return list(dict.fromkeys(sources.values()))


def _unreadable(path: Path, problem: object, setting: str) -> UserError:
    return UserError(
        str(path),
        got=" ".join(str(problem).split()),
        need="JSONL (one object per line), Parquet, or a directory that `datasets` saved",
        fix=f"fix the file or set {setting}.path",
    )
