"""A Lightning logger that appends one JSON object per call to a file."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from nemo_popsd.errors import system_error
from nemo_popsd.files.atomic import write_text
from nemo_popsd.observability.rank import is_rank_zero

_ROOM = {"need": "room and the right to write it", "fix": "free space, or set output to another file system"}
FILE_NAME = "metrics.jsonl"
"""Name of the metrics file in a run's output directory."""


class JsonlLogger(Logger):
    """Writes `<directory>/metrics.jsonl` on rank 0: ``{"step": 3, "train/loss": 0.12, ...}``, one line per call.

    Every line is on its way to the disk when the call returns. A resumed run appends, once `keep_until` has taken out
    the steps that are trained again. What JSON cannot say (NaN, infinities) is written as the strings
    "nan", "inf" and "-inf", which ``float`` reads back.

    Args:
        directory: output directory of the run; made at the first call.
        may_write: whether the directory is still this run's. If not, nothing is written; the run is about to end.
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

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line; values are numbers or one-element tensors.

        Raises:
            UserError, TransientError: it cannot be written. The run ends: it goes nowhere without its record.
        """
        if not is_rank_zero() or not self._may_write():
            return
        line: dict[str, Any] = {} if step is None else {"step": int(step)}
        line |= {name: _plain(value) for name, value in metrics.items()}
        text = json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            self._prepare()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise system_error(f"metrics {self._path}", error, **_ROOM) from None

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration is a file of its own."""

    def _prepare(self) -> None:
        """Make the directory; cut a last line that a kill left half written, so that all lines stay JSON."""
        if self._opened:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            whole = self._path.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end != len(whole):
                with self._path.open("r+b") as file:
                    file.truncate(end)
        self._opened = True


def read_metric(directory: str | Path, name: str) -> dict[int, float]:
    """Values of a metric by step; of a step with several the last."""
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in _whole_lines(path)]
    return {line["step"]: float(line[name]) for line in lines if name in line}


def keep_until(directory: str | Path, step: int) -> None:
    """Takes the lines of later steps, and half a line at the end, out of the metrics file; atomically."""
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line).get("step", 0) <= step]
    write_text(path, "".join(kept))


def _whole_lines(path: Path) -> list[str]:
    """Lines with their ends; a kill may have left half a line at the end."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line + "\n" for line in text.split("\n")[:-1]]


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
