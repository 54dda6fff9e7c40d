"""Records how each rank of a run began and ended, in `<output>/ranks/rank-00000.jsonl`, for `popsd doctor --run`.

An attempt is one start of the run. A rank appends a line when it begins and one when it ends, with its exit status and
error. A rank without a line at its end was killed, or still runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_popsd.errors import TransientError, UserError, is_transient, user_or_transient
from nemo_popsd.files.lock_holder import Holder, this_process

FOLDER = "ranks"
"""Folder below `output`."""
FILES = ("rank-*.jsonl",)
"""Patterns of the file names in this folder."""
_LIBRARIES = ("nemo_popsd", "nemo_toolkit", "megatron-core", "megatron-bridge", "torch", "transformers")
_FRAMES = 6
_LONGEST_ERROR = 4000


class RankRecord:
    """Writes the lines of one rank. A failure to write them is ignored: the run does not depend on them.

    As a context, it records the exception that ends the block.
    """

    def __init__(self, output: str | Path, *, rank: int, ranks: int, replaces: bool = False) -> None:
        """Creates the record without writing anything.

        Args:
            output: output directory of the run.
            rank: rank of this process.
            ranks: number of processes.
            replaces: whether the run replaces an earlier one, whose lines are then removed.
        """
        self._file = Path(output) / FOLDER / f"rank-{rank:05d}.jsonl"
        self._rank = rank
        self._ranks = ranks
        self._replaces = replaces
        self._attempt = ""

    def begin(self, attempt: str = "") -> None:
        """Records the start of this rank; a second call does nothing.

        Args:
            attempt: a name that the ranks of one start share; empty for a random one.
        """
        if self._attempt:
            return
        self._attempt = attempt or secrets.token_hex(16)
        line = {
            "event": "began",
            "attempt": self._attempt,
            "time": time.time(),
            "rank": self._rank,
            "ranks": self._ranks,
            "process": asdict(this_process()),
            "logs": os.environ.get("POPSD_RUN_DIR", ""),
        }
        if self._rank == 0:
            line["versions"] = library_versions()
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if self._replaces and self._is_a_record():
                self._file.unlink()
        self._append(line)

    def end(self, status: int, text: str = "", where: str = "") -> None:
        """Records the end of this rank.

        Args:
            status: exit status.
            text: the error, or the reason for the end.
            where: the innermost frames of an unexpected error.
        """
        if not self._attempt:
            return
        line = {"event": "ended", "attempt": self._attempt, "time": time.time(), "status": status}
        if text:
            line["error"] = text[:_LONGEST_ERROR]
        if where:
            line["where"] = where
        self._append(line)
        self._attempt = ""

    def __enter__(self) -> RankRecord:
        """Does nothing: see `begin`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        """Records an exception with the status that the command line gives it."""
        if error is None:
            return
        reported = user_or_transient(error) if isinstance(error, UserError) else error
        if isinstance(reported, UserError | TransientError):
            self.end(2 if isinstance(reported, UserError) else 1, "\n".join([str(reported), *reported.advice]))
        elif isinstance(reported, KeyboardInterrupt):
            self.end(130, "KeyboardInterrupt")
        else:
            where = "" if is_transient(error) else "; ".join(_frames(frames))
            self.end(1, f"{type(error).__name__}: {error}", where)

    def _is_a_record(self) -> bool:
        """Whether the file exists and begins as this class writes it; another file is not removed."""
        with contextlib.suppress(OSError, ValueError), self._file.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
            return isinstance(first, dict) and first.get("event") == "began" and "attempt" in first
        return False

    def _append(self, line: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError), self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")  # one call of the system: complete, or absent


@dataclass(frozen=True)
class RankEnd:
    """One rank in one attempt."""

    rank: int
    file: Path
    line: int
    """Line of the end, or of the beginning if there is no end."""
    process: Holder
    began: float
    """Start time by the clock of the rank's machine, in seconds since 1970."""
    ended: float | None
    """End time by the same clock; None if no end was recorded."""
    status: int | None
    error: str
    where: str


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    token: str
    ranks: int
    """Number of ranks that were started."""
    logs: str
    """Folder of the batch job's logs; empty outside of one."""
    versions: Mapping[str, str | None]
    ends: tuple[RankEnd, ...]
    """The ends of ranks that recorded anything, by rank."""

    @property
    def began(self) -> float:
        """Time at which the first rank began."""
        return min(end.began for end in self.ends)


def read_attempts(output: str | Path) -> list[Attempt]:
    """The attempts of the run in `output` in chronological order. Damaged lines are skipped."""
    begins: dict[str, dict[int, tuple[Path, int, dict[str, Any]]]] = {}
    ends: dict[tuple[str, int], tuple[int, dict[str, Any]]] = {}
    for file in sorted((Path(output) / FOLDER).glob(FILES[0])):
        rank = int(digits) if (digits := file.stem.removeprefix("rank-")).isdigit() else -1
        for number, line in _lines(file):
            token = str(line.get("attempt", ""))
            if line.get("event") == "began":
                begins.setdefault(token, {})[rank] = (file, number, line)
            elif line.get("event") == "ended":
                ends[token, rank] = (number, line)
    attempts = []
    for token, by_rank in begins.items():
        first = by_rank[min(by_rank)][2]
        attempts.append(
            Attempt(
                token,
                int(first.get("ranks", 1)),
                str(first.get("logs", "")),
                first.get("versions", {}),
                tuple(_end(rank, *by_rank[rank], ends.get((token, rank))) for rank in sorted(by_rank)),
            )
        )
    return sorted(attempts, key=lambda attempt: attempt.began)


def _end(rank: int, file: Path, number: int, start: dict[str, Any], end: tuple[int, dict[str, Any]] | None) -> RankEnd:
    at, ended = end or (number, {})
    return RankEnd(
        rank,
        file,
        at,
        Holder.of(start.get("process")),
        float(start.get("time", 0.0)),
        float(ended["time"]) if "time" in ended else None,
        int(ended["status"]) if "status" in ended else None,
        str(ended.get("error", "")),
        str(ended.get("where", "")),
    )


def _lines(file: Path) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                found.append((number, line))
    return found


def _frames(frames: TracebackType | None) -> list[str]:
    inner = traceback.extract_tb(frames)[-_FRAMES:]
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in inner]


def library_versions() -> dict[str, str | None]:
    """Version of each library that a run depends on, by distribution; None if it is not installed."""
    return {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
