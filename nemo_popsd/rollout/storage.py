"""Rollouts of a step on disk, one JSON object per row, so that what cost GPU hours outlives the process.

    rollouts/step-000012/part-0000-of-0002.jsonl    rows of data-parallel rank 0 of 2

A file is complete or absent. Its first line tells step, weights version and number of rows; a step is complete when all
its parts are there. JSON keeps every bit of a log-probability: a float32 is written as the shortest decimal that reads
back as the same double.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import flush_directory, remove_files, write_text
from nemo_popsd.files.json_files import read_json_lines
from nemo_popsd.rollout.engine import Rollout

FOLDER = "rollouts"
FILES = ("part-*.jsonl",)
"""Patterns of the names of a step's files."""
_PART = re.compile(r"part-(\d+)-of-(\d+)\.jsonl")
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class StoredRollout:
    """One row of a step."""

    row_id: str
    seed: int
    """Of the row's random numbers, see `nemo_popsd.rollout.engine.row_seed`."""
    prompt: list[int]
    """Token ids."""
    rollout: Rollout

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`, as inference servers say it, or `unfinished`."""
        if self.rollout.unfinished:
            return "unfinished"
        return "length" if self.rollout.cut else "stop"


class RolloutStore:
    """Rollouts of one run below `<output>/rollouts`."""

    def __init__(self, output: str | Path, *, check_lock: Callable[[], None] = lambda: None) -> None:
        """Keeps references only.

        Args:
            output: of the run.
            check_lock: raises if the output is another run's by now; asked before anything is written.
        """
        self.folder = Path(output) / FOLDER
        self._check_lock = check_lock

    def write(self, step: int, rows: Sequence[StoredRollout], *, part: int, parts: int) -> None:
        """Writes one data-parallel rank's rows; they are on the disk when this returns.

        Args:
            step: from 1.
            rows: of this part, all drawn by the same weights.
            part: index of the data-parallel rank.
            parts: number of them.

        Raises:
            OSError: from the file system.
            UserError, TransientError: from `check_lock`.
        """
        self._check_lock()
        path = self._step(step) / f"part-{part:04d}-of-{parts:04d}.jsonl"
        versions = {row.rollout.weights_version for row in rows}
        assert len(versions) == 1, versions
        head = {"step": step, "weights_version": versions.pop(), "rows": len(rows)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(line) + "\n" for line in (head, *map(_line, rows))))
        flush_directory(path.parent.parent)

    def complete(self, step: int, versions: Container[int]) -> dict[tuple[str, int], StoredRollout] | None:
        """All rows of a step by id and seed, if all parts are there and drawn by weights of `versions`; else None."""
        parts: dict[int, set[int]] = {}
        for path in self._step(step).glob("part-*.jsonl"):
            if match := _PART.fullmatch(path.name):
                parts.setdefault(int(match[2]), set()).add(int(match[1]))
        for total, present in parts.items():
            if len(present) == total:
                found = [
                    _read_part(self._step(step) / f"part-{part:04d}-of-{total:04d}.jsonl") for part in range(total)
                ]
                if all(head["weights_version"] in versions for head, _ in found):
                    return {(row.row_id, row.seed): row for _, rows in found for row in rows}
        return None

    def unfinished(self, step: int) -> list[StoredRollout] | None:
        """Rows that a step left to the next, in an order that no layout changes; None if not all parts are there."""
        rows = self.complete(step, {step - 1})
        return None if rows is None else [row for _, row in sorted(rows.items()) if row.rollout.unfinished]

    def steps(self) -> list[int]:
        """Steps of which anything is there."""
        names = (_STEP.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def read(self, step: int) -> Iterator[StoredRollout]:
        """Rows of a step, in the order of its parts."""
        for path in sorted(self._step(step).glob("part-*.jsonl")):
            yield from _read_part(path)[1]

    def remove_after(self, step: int) -> None:
        """Removes what later steps left: a run that goes on from `step` makes them again."""
        for later in self.steps():
            if later > step:
                remove_files(self._step(later), FILES)

    def _step(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"


def _line(row: StoredRollout) -> dict[str, Any]:
    line = {
        "id": row.row_id,
        "seed": row.seed,
        "finish_reason": row.finish_reason,
        "prompt": row.prompt,
        "response": row.rollout.response,
        "log_probs": row.rollout.log_probs,
    }
    return line | ({"segments": row.rollout.segments} if row.rollout.segments else {})


def _read_part(path: Path) -> tuple[dict[str, Any], list[StoredRollout]]:
    try:
        lines = [line for _, line in read_json_lines(path)]
        head, rows = lines[0], lines[1:]
        if len(rows) != head["rows"]:
            raise ValueError(f"{len(rows)} rows instead of {head['rows']}")
        version = head["weights_version"]
        return head, [_row(row, version) for row in rows]
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"rollouts {path}", got=str(error), need="a file as a run writes it", fix="remove it") from None


def _row(line: dict[str, Any], version: int) -> StoredRollout:
    lists = ((name, [*line[name]]) for name in ("prompt", "response", "log_probs"))
    if odd := [name for name, values in lists if not all(type(value) in (int, float) for value in values)]:
        raise ValueError(f"{odd[0]} without numbers")
    reason, segments = line["finish_reason"], line.get("segments", ())
    parts = tuple((by, tokens) for by, tokens in segments)
    rollout = Rollout(line["response"], line["log_probs"], reason == "length", version, reason == "unfinished", parts)
    return StoredRollout(line["id"], line["seed"], line["prompt"], rollout)
