"""The findings of an examination, as a table, as JSON and as an exit status."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "optional", "outside", "missing", "failed"]
"""``ok``; ``optional``: absent or not testable on this machine, and not needed; ``outside`` the declared range;
``missing`` or ``failed``: needed by a run."""

SECTIONS = ("packages", "machine", "imports", "run")
"""The sections in order."""

_PROBLEMS = ("missing", "failed")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        section: one of `SECTIONS`.
        name: a distribution, a device, a module or a check.
        state: see `State`.
        found: version, count or error; empty if nothing was found.
        need: declared range or condition; empty if there is none.
        note: its purpose, or how to fix it.
    """

    section: str
    name: str
    state: State
    found: str = ""
    need: str = ""
    note: str = ""


def exit_status(findings: Sequence[Finding], *, strict: bool) -> int:
    """1 if something needed is missing or fails, or (`strict`) a version is outside its range; else 0."""
    bad = (*_PROBLEMS, "outside") if strict else _PROBLEMS
    return int(any(finding.state in bad for finding in findings))


def as_json(findings: Sequence[Finding], *, strict: bool) -> str:
    """A JSON object with ``ok`` (whether the exit status is 0) and ``findings``, each with the fields of `Finding`."""
    ok = exit_status(findings, strict=strict) == 0
    return json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=2)


def as_table(findings: Sequence[Finding]) -> str:
    """One line per finding, grouped by section, and a verdict that names every problem."""
    rows = [(f.state, f.name, f.found or "-", f.need and f"need {f.need}", f.note) for f in findings]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines: list[str] = []
    for section in SECTIONS:
        members = [row for row, finding in zip(rows, findings, strict=True) if finding.section == section]
        lines += [section] if members else []
        for row in members:
            cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
            lines.append("  " + "  ".join([*cells, "; ".join(filter(None, row[3:]))]).rstrip())
    return "\n".join([*lines, _verdict(findings)])


def _verdict(findings: Sequence[Finding]) -> str:
    problems = [
        f"{label}: {', '.join(names)}"
        for label, state in (("missing", "missing"), ("failed", "failed"), ("outside the declared range", "outside"))
        if (names := [finding.name for finding in findings if finding.state == state])
    ]
    return "; ".join(problems) if problems else "everything that a run needs is present"
