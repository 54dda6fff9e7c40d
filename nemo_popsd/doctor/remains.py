"""Reads what a run left on disk: attempts of its ranks, logs, metrics, checkpoints, marks, dumps. Writes nothing."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_popsd.config.resuming import DONE, REQUEUE
from nemo_popsd.errors import UserError
from nemo_popsd.files.attempts import Attempt, read_attempts
from nemo_popsd.files.lock_holder import Holder
from nemo_popsd.files.output_lock import living_holder
from nemo_popsd.files.ownership import MANIFEST
from nemo_popsd.observability.flight_recorder import FLIGHT_PREFIX, FOLDER
from nemo_popsd.observability.jsonl_logger import FILE_NAME

_LOGS = ("*.log", "*.out", "*.err", "**/stderr.log", "**/stdout.log")
_NEW_ATTEMPT = re.compile(r"beginning at step 1\b|resuming after step \d+ from|, start \d+: \d+ nodes")
"""Lines with which an attempt begins, in the output of a run and in that of `slurm/train.sh`."""
_MOST_LINES = 20000
"""Number of lines that are read from the end of one log."""


@dataclass(frozen=True)
class Line:
    """A line of a file: evidence."""

    file: Path
    number: int
    """Line number from 1; 0 stands for the entire file."""
    text: str


@dataclass(frozen=True)
class ExitFile:
    """The exit status of a rank that `slurm/rank.sh` recorded."""

    rank: int
    status: int
    line: Line


@dataclass(frozen=True)
class Remains:
    """Files of a run on disk. Everything except the directory may be missing."""

    output: Path
    config: Mapping[str, Any]
    attempts: Sequence[Attempt]
    holder: tuple[Holder, float] | None
    """The process that holds the lock, if it is alive, and the seconds since its last heartbeat."""
    done: bool
    stopped: bool
    """Whether the run stopped on a signal and saved."""
    metrics: Sequence[tuple[int, Mapping[str, Any]]]
    """Line number and content of each line of metrics.jsonl."""
    checkpoints: Mapping[str, int | None]
    """Step of each checkpoint by name; None for one without a manifest, which is incomplete."""
    logs: Mapping[Path, Sequence[Line]]
    """Lines of the last attempt, if the log distinguishes attempts."""
    servers: Mapping[Path, Sequence[Line]]
    """Lines of the logs of vLLM servers, likewise."""
    exits: Sequence[ExitFile]
    dumps: Sequence[Path]

    @property
    def attempt(self) -> Attempt | None:
        """The last attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def job(self) -> str:
        """Id of the batch job of the last attempt; empty outside of one."""
        jobs = [end.process.job for end in self.attempt.ends] if self.attempt else []
        return next((job.split(" ")[0] for job in jobs if job), "")

    @property
    def last_step(self) -> int:
        """The last step with training metrics; 0 if there is none."""
        return max((int(line.get("step", 0)) for _, line in self.metrics if "train/loss" in line), default=0)

    @property
    def resumable(self) -> tuple[str, int] | None:
        """Name and step of the newest complete checkpoint."""
        complete = [(step, name) for name, step in self.checkpoints.items() if step is not None]
        return (max(complete)[1], max(complete)[0]) if complete else None

    @property
    def silent_flights(self) -> list[int]:
        """Ranks without a dump of the Flight Recorder, if others have one."""
        names = [path.name.removeprefix(FLIGHT_PREFIX) for path in self.dumps if path.name.startswith(FLIGHT_PREFIX)]
        dumped = {int(name) for name in names if name.isdigit()}
        ranks = self.attempt.ranks if self.attempt else max(dumped, default=-1) + 1
        return sorted(set(range(ranks)) - dumped) if dumped else []


def read_remains(output: Path, logs: Sequence[Path] = ()) -> Remains:
    """Reads the directory of a run.

    Args:
        output: output directory of the run.
        logs: additional logs or folders of logs, such as those of a batch job that the run did not record.

    Raises:
        UserError: `output` is not a directory or contains no files of a run, or one of `logs` does not exist.
    """
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if not names & {"config.yaml", FILE_NAME, "ranks", "checkpoints", "lock"}:
        raise UserError(
            "popsd doctor",
            got=f"--run {output}, which " + ("has nothing that a run writes" if names else "is empty or missing"),
            need="the output directory of a training run",
            fix="correct the path: it is the setting `output`, by default runs/NAME",
        )
    for path in logs:
        if not path.exists():
            raise UserError("popsd doctor", got=f"--logs {path}, which does not exist", need="a log", fix="correct it")
    attempts = read_attempts(output)
    start = Path(attempts[-1].logs) if attempts and attempts[-1].logs else None
    folders = [output, *(path for path in logs if path.is_dir())] + ([start] if start and start.is_dir() else [])
    files = [path for path in logs if path.is_file()]
    files += [file for folder in folders for pattern in _LOGS for file in sorted(folder.glob(pattern))]
    servers = sorted((output / "vllm").glob("server-*.log"))
    dumps = output / FOLDER
    return Remains(
        output=output,
        config=_config(output / "config.yaml"),
        attempts=attempts,
        holder=living_holder(output),
        done=(output / DONE).exists(),
        stopped=(output / REQUEUE).exists(),
        metrics=_metrics(output / FILE_NAME),
        checkpoints=_checkpoints(output / "checkpoints"),
        logs={file: _last_attempt(file) for file in dict.fromkeys(files) if file not in servers},
        servers={file: _tail(file) for file in servers},
        exits=[exit_file for folder in folders for exit_file in _exits(folder)],
        dumps=sorted(dumps.iterdir()) if dumps.is_dir() else [],
    )


def _config(file: Path) -> Mapping[str, Any]:
    try:
        import yaml

        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except Exception:  # absent, damaged, or no yaml: the rest is read all the same
        return {}
    return content if isinstance(content, dict) else {}


def _metrics(file: Path) -> list[tuple[int, Mapping[str, Any]]]:
    found: list[tuple[int, Mapping[str, Any]]] = []
    for line in _tail(file):
        with contextlib.suppress(ValueError):
            content = json.loads(line.text)
            if isinstance(content, dict):
                found.append((line.number, content))
    return found


def _checkpoints(folder: Path) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and (path.name == "final" or path.name.startswith("step-")):
            found[path.name] = None
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found[path.name] = int(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"])
    return found


def _exits(folder: Path) -> Iterator[ExitFile]:
    for file in sorted(folder.glob("rank-*.exit")):
        words = file.read_text(errors="replace").split()
        rank = file.stem.removeprefix("rank-")
        if words and words[0].isdigit() and rank.isdigit():
            yield ExitFile(int(rank), int(words[0]), Line(file, 1, " ".join(words)))


def _last_attempt(file: Path) -> list[Line]:
    lines = _tail(file)
    begins = [index for index, line in enumerate(lines) if _NEW_ATTEMPT.search(line.text)]
    return lines[begins[-1] :] if begins else lines


def _tail(file: Path) -> list[Line]:
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            texts = opened.read().splitlines()
    except OSError:
        return []
    first = max(0, len(texts) - _MOST_LINES)
    return [Line(file, first + index, text) for index, text in enumerate(texts[first:], start=1)]
