"""Runs parts one after the other, each in a separate process with a time limit, so that none affects the others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.journal import append, as_markdown, read
from nemo_popsd.files.atomic import write_text

_SHORTEST = 5.0
_TAIL_LINES = 15


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name: name of the part.
        title: title of its section.
        module: module with a function `run(report, *, rehearse, work)`.
        seconds: time limit.
        environment: additional environment variables of its process.
    """

    name: str
    title: str
    module: str
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


def run_parts(
    parts: Sequence[Part], output: Path, *, head: str, total_seconds: float, rehearse: bool = False
) -> dict[str, str]:
    """Runs `parts` in order, and writes the tables after each.

    Args:
        parts: most valuable first.
        output: directory for `results.jsonl`, `results.md`, `log.txt` and, during the run, the files that parts share.
        head: text above the tables.
        total_seconds: time limit of all parts; a part that would have only a few seconds is not started.
        rehearse: whether to use tiny sizes.

    Returns:
        By part: `ok`, `failed`, `time limit` or `no time left`.
    """
    output.mkdir(parents=True, exist_ok=True)
    journal, tables = output / "results.jsonl", output / "results.md"
    journal.unlink(missing_ok=True)
    titles = {part.name: part.title for part in parts}
    deadline = time.monotonic() + total_seconds
    statuses: dict[str, str] = {}
    with (output / "log.txt").open("wb") as log:
        for part in parts:
            begin, place = time.monotonic(), log.tell()
            left = min(part.seconds, deadline - begin)
            status = "no time left"
            if left >= _SHORTEST:
                print(f"{part.name} (at most {left:.0f} s)", flush=True)
                status = _run(part, output, log.fileno(), left, rehearse)
            log.seek(0, os.SEEK_END)
            tail = "" if status in ("ok", "no time left") else _tail(output / "log.txt", place)
            seconds = time.monotonic() - begin
            append(journal, {"part": part.name, "status": status, "seconds": round(seconds, 1), "tail": tail})
            statuses[part.name] = status
            print(f"  {status} after {seconds:.0f} s", flush=True)
            write_text(tables, as_markdown(read(journal), titles, head))
    return statuses


def _run(part: Part, output: Path, log: int, seconds: float, rehearse: bool) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu.part", part.name, part.module, str(output)]
    process = subprocess.Popen(
        [*command, "--rehearse"] if rehearse else command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
        start_new_session=True,  # so that its child processes end with it
    )
    try:
        return "ok" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "time limit"
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the part's process and everything in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])
