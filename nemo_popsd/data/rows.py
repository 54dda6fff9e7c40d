"""The fitted rows of a source: in memory, or, for large JSONL files, the positions of lines that are read on access.

A row on disk needs memory for its id and about 40 bytes. Other formats have no cheap access to single rows; their rows
are kept in memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

from nemo_popsd.data.contexts import ContextBuilder, FittedRow
from nemo_popsd.data.readers import Place
from nemo_popsd.data.sources import Located, RecordReader

IN_MEMORY_BYTES = 1 << 30
"""Maximum total size of a source's files for which all rows are kept in memory."""
BATCH = 64
"""Number of rows that are fitted together."""


class FittedRows(Sequence[FittedRow]):
    """Rows that were read and fitted once. Rows that are not in memory are read and fitted again on access.

    Attributes:
        ids: ids of the rows, in order.
    """

    def __init__(self, reader: RecordReader, builder: ContextBuilder, *, with_reference: bool = True) -> None:
        """Start with no rows.

        Args:
            reader: reader of the source.
            builder: builder that fits the rows.
            with_reference: whether rows are fitted with their references.
        """
        self._with_reference = with_reference
        self.ids: list[str] = []
        self._reader = reader
        self._builder = builder
        self._keeps = sum(file.stat().st_size for file in reader.files if file.is_file()) <= IN_MEMORY_BYTES
        self._kept: dict[int, FittedRow] = {}
        self._files, self._numbers = array("i"), array("q")
        self._offsets, self._sizes, self._checks = array("q"), array("q"), array("Q")

    def append(self, located: Located, row: FittedRow) -> None:
        """Add a row.

        Args:
            located: record of the row, with its position.
            row: the fitted row.
        """
        place = located.place
        if self._keeps or place is None:
            self._kept[len(self.ids)] = row
            place = Place(0, 0, 0)
        self.ids.append(row.record.id)
        self._files.append(located.file)
        self._numbers.append(located.number)
        self._offsets.append(place.offset)
        self._sizes.append(place.size)
        self._checks.append(place.check)

    @property
    def in_memory(self) -> int:
        """Number of rows that are kept in memory."""
        return len(self._kept)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> FittedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[FittedRow]: ...

    def __getitem__(self, index: int | slice) -> FittedRow | list[FittedRow]:
        indices = range(len(self))[index]
        return next(self._read([indices])) if isinstance(indices, int) else list(self._read(indices))

    def __iter__(self) -> Iterator[FittedRow]:
        return self._read(range(len(self)))

    def _read(self, indices: Iterable[int]) -> Iterator[FittedRow]:
        remaining = iter(indices)
        while batch := list(islice(remaining, BATCH)):
            absent = [index for index in batch if index not in self._kept]
            places = (Place(self._offsets[i], self._sizes[i], self._checks[i]) for i in absent)
            rows = ((self._files[i], self._numbers[i], place) for i, place in zip(absent, places, strict=True))
            records = [self._reader.read(*row) for row in rows]
            again = iter(self._builder.fit(records, with_reference=self._with_reference))
            for index in batch:
                row = self._kept[index] if index in self._kept else next(again)
                assert isinstance(row, FittedRow), "a row that fitted before"
                yield row
