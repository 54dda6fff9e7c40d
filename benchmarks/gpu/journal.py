"""The results of the parts: JSON lines that are written as soon as a result is known, and Markdown tables of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks.tables import table

Row = dict[str, Any]


class Report(Protocol):
    """The function with which a part reports its results."""

    def __call__(self, table_name: str, **fields: Any) -> None:
        """Writes one row of the part's table of that name."""


def append(journal: Path, row: Mapping[str, Any]) -> None:
    """Appends one line and waits until it is on disk."""
    with journal.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(journal: Path) -> list[Row]:
    """All complete lines; a partial line that a kill left is skipped."""
    rows = []
    for line in journal.read_text().splitlines() if journal.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def reporter(journal: Path, part: str) -> Report:
    """A function that appends rows of `part` and prints them."""

    def report(table_name: str, **fields: Any) -> None:
        append(journal, {"part": part, "table": table_name, **fields})
        print(f"{table_name}: " + ", ".join(f"{name}={_cell(value)}" for name, value in fields.items()), flush=True)

    return report


def as_markdown(rows: Iterable[Row], titles: Mapping[str, str], head: str) -> str:
    """One section for each part that was started, with its status and its tables.

    Args:
        rows: the rows of the journal.
        titles: titles of the parts, in order.
        head: text above the sections.
    """
    rows = list(rows)
    sections = [head]
    for part, title in titles.items():
        own = [row for row in rows if row["part"] == part]
        if not own:
            continue
        sections.append(f"## {title}")
        names = dict.fromkeys(row["table"] for row in own if row.get("table"))
        for name in names:
            members = [{k: v for k, v in row.items() if k not in ("part", "table")} for row in own]
            members = [m for m, row in zip(members, own, strict=True) if row.get("table") == name]
            columns = list(dict.fromkeys(key for member in members for key in member))
            cells = [[_cell(member.get(column)) for column in columns] for member in members]
            sections.append(f"{name}:\n\n" + table(columns, cells))
        for row in own:
            if "status" in row:
                status = f"*{row['status']}* after {row['seconds']:.0f} s."
                sections.append(status + (f"\n\n```\n{row['tail']}\n```" if row.get("tail") else ""))
    return "\n\n".join(sections) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return " ".join(str(value).split()).replace("|", "\\|")
