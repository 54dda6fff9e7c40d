"""A Lightning logger that appends one JSON object per call to a file."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from lightning.pytorch.loggers import Logger

from nemo_popsd.errors import system_error
from nemo_popsd.files.atomic import write_text
from nemo_popsd.observability.rank import is_rank_zero

_SPACE = {"need": "space and write permission", "fix": "free space, or set output to another file system"}
FILE_NAME = "metrics.jsonl"
"""Name of the metrics file in a run's output directory."""


class JsonlLogger(Logger):
    """Writes `<directory>/metrics.jsonl` on rank 0: ``{"step": 3, "train/loss": 0.12, ...}``, one line per call.

    Every line has been passed to the operating system when the call returns. A resumed run appends, after `keep_until`
    has removed the steps that will be trained again. NaN and infinities, which JSON does not support, are written as
    the strings "nan", "inf" and "-inf", which ``float`` accepts.

    Args:
        directory: output directory of the run; created at the first call.
        may_write: returns whether the directory still belongs to this run. If not, the logger does not write, since the
            run is about to end.
    """

    def __init__(self, directory: str | Path, *, may_write: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self._may_write = may_write
        self._path = Path(directory) / FILE_NAME
        self._opened = False

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Lightning's notion of a version; a run has one file."""
        return ""

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def log_metrics(self, metrics: Mapping[str, object], step: int | None = None) -> None:
        """Appends one line; values are numbers or one-element tensors.

        Raises:
            UserError, TransientError: the line cannot be written. The run ends, since it must not continue without
                metrics.
        """
        if not is_rank_zero() or not self._may_write():
            return
        line: dict[str, object] = {} if step is None else {"step": int(step)}
        line |= {name: _plain(value) for name, value in metrics.items()}
        text = json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            self._prepare()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise system_error(f"metrics {self._path}", error, **_SPACE) from None

    def log_hyperparams(self, params: dict[str, object] | Namespace, *args: object, **kwargs: object) -> None:
        """Does nothing: the resolved configuration has its own file."""

    def _prepare(self) -> None:
        """Creates the directory and removes an incomplete last line of a killed process, so that all lines are JSON."""
        if self._opened:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            content = self._path.read_bytes()
            end = content.rfind(b"\n") + 1
            if end != len(content):
                with self._path.open("r+b") as file:
                    file.truncate(end)
        self._opened = True


def read_metric(directory: str | Path, name: str) -> dict[int, float]:
    """Values of a metric by step; if a step has several values, the last one."""
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in _complete_lines(path)]
    return {line["step"]: float(line[name]) for line in lines if name in line}


def read_steps(directory: str | Path, names: Collection[str], prefix: str) -> list[tuple[int, dict[str, float]]]:
    """Step and values of each line with one of the metrics `names` or a metric that starts with `prefix`."""
    path = Path(directory) / FILE_NAME
    lines = [json.loads(line) for line in _complete_lines(path)] if path.is_file() else []
    found = []
    for line in lines:
        values = {name: float(line[name]) for name in line if name in names or name.startswith(prefix)}
        if values:
            found.append((int(line["step"]), values))
    return found


def keep_until(directory: str | Path, step: int) -> None:
    """Atomically removes the lines of later steps and an incomplete last line from the metrics file."""
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        return
    kept = [line for line in _complete_lines(path) if json.loads(line).get("step", 0) <= step]
    write_text(path, "".join(kept))


def _complete_lines(path: Path) -> list[str]:
    """Lines with their line ends, without an incomplete last line that a killed process may leave."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line + "\n" for line in text.split("\n")[:-1]]


def _plain(value: object) -> object:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
