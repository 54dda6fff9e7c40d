"""What the parts found, on disk the moment it is known: JSON lines, and the same as Markdown tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks.tables import table

Row = dict[str, Any]


class Report(Protocol):
    """How a part says what it found."""

    def __call__(self, table_name: str, **fields: Any) -> None:
        """Writes one row of the part's table of that name."""


def append(journal: Path, row: Mapping[str, Any]) -> None:
    """Appends one line and waits until it is on disk."""
    with journal.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(journal: Path) -> list[Row]:
    """All whole lines; a line that a kill cut off is left out."""
    rows = []
    for line in journal.read_text().splitlines() if journal.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def reporter(journal: Path, part: str) -> Report:
    """Writes rows of `part`, and prints them."""

    def report(table_name: str, **fields: Any) -> None:
        append(journal, {"part": part, "table": table_name, **fields})
        print(f"{table_name}: " + ", ".join(f"{name}={_cell(value)}" for name, value in fields.items()), flush=True)

    return report


def as_markdown(rows: Iterable[Row], titles: Mapping[str, str], head: str) -> str:
    """One section for each part that began, with its status and its tables.

    Args:
        rows: of the journal.
        titles: of the parts, in order.
        head: what stands above.
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
                said = f"*{row['status']}* after {row['seconds']:.0f} s."
                sections.append(said + (f"\n\n```\n{row['tail']}\n```" if row.get("tail") else ""))
    return "\n\n".join(sections) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return " ".join(str(value).split()).replace("|", "\\|")
