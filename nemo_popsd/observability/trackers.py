"""Third-party loggers. They run in separate threads; a failing logger is disabled and does not fail the run."""

from __future__ import annotations

import json
import logging
import queue
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from lightning.pytorch.loggers import Logger

from nemo_popsd.files.atomic import write_text
from nemo_popsd.observability.jsonl_logger import FILE_NAME

logger = logging.getLogger(__name__)

LoggerT = TypeVar("LoggerT", bound=Logger)

IDS = "trackers.json"
"""File in `output` with the ids of a run in tracking services, so that a resumed run continues with the same ids."""
LINK = "_link"
"""Suffix of the key in that file that stores the address of the run's page; the service is the prefix."""
CLOSE_SECONDS = 120.0
"""Seconds that a tracker has to finish writing after the result of the run is saved."""

_hanging: list[str] = []


class Tracker(Logger, Generic[LoggerT]):
    """Passes metrics to another logger in a separate thread, and tolerates its failure.

    The thread starts at the first call. The first error of the other logger is reported and disables the logger.
    Lightning finalizes loggers when `fit` or `validate` ends; a tracker ends in `close`, after the result is saved.

    Args:
        label: name for messages, e.g. `MLflow`.
        build: creates the other logger; called in the thread.
        finish: ends the other logger. The second argument is whether the run succeeded; None if it was requested to
            stop.
        takes_hyperparameters: whether to pass on the hyperparameters that Lightning logs.
    """

    def __init__(
        self,
        label: str,
        build: Callable[[], LoggerT],
        finish: Callable[[LoggerT, bool | None], None],
        *,
        takes_hyperparameters: bool = False,
    ) -> None:
        super().__init__()
        self._label = label
        self._build = build
        self._finish = finish
        self._takes_hyperparameters = takes_hyperparameters
        self._calls: queue.SimpleQueue[Callable[[LoggerT], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failed = False

    @property
    def name(self) -> str:
        """Name of the logger."""
        return self._label

    @property
    def version(self) -> str:
        """Lightning's notion of a version; a run has one."""
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs metrics in the thread, with an integer step: Lightning passes a float, which some services reject."""
        values, index = dict(metrics), None if step is None else int(step)

        def log(inner: LoggerT) -> None:
            inner.log_metrics(values, step=index)
            inner.save()

        self._put(log)

    def log_hyperparams(self, params: dict[str, object] | Namespace, *args: object, **kwargs: object) -> None:
        """Logs the hyperparameters in the thread if `takes_hyperparameters`."""
        if self._takes_hyperparameters:
            self._put(lambda inner: inner.log_hyperparams(params, *args, **kwargs))

    def finalize(self, status: str) -> None:
        """Does nothing; see `close`."""

    def close(self, succeeded: bool | None) -> None:
        """Completes the remaining calls and ends the other logger. Waits at most `CLOSE_SECONDS`.

        Args:
            succeeded: whether the run succeeded; None if it was requested to stop and will be resumed.
        """
        if self._thread is None:
            return
        self._put(lambda inner: self._finish(inner, succeeded))
        self._calls.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() and not self._failed:
            _hanging.append(self._label)
            self._report(f"it did not end within {CLOSE_SECONDS:g} s")

    def _put(self, call: Callable[[LoggerT], None]) -> None:
        if self._failed:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._label, daemon=True)
            self._thread.start()
        self._calls.put(call)

    def _work(self) -> None:
        try:
            inner = self._build()
            while (call := self._calls.get()) is not None:
                call(inner)
        except BaseException as error:
            self._report(" ".join(f"{type(error).__name__}: {error}".split()))

    def _report(self, problem: str) -> None:
        self._failed = True
        logger.warning(
            "%s is turned off: %s; the run continues, and %s has all metrics", self._label, problem, FILE_NAME
        )


def close_trackers(loggers: Iterable[Logger], succeeded: bool | None) -> None:
    """Closes the trackers among the loggers of a trainer; see `Tracker.close`."""
    for tracker in loggers:
        if isinstance(tracker, Tracker):
            tracker.close(succeeded)


def any_hangs() -> bool:
    """Whether a tracker hangs; its library would also block the exit of the process."""
    return bool(_hanging)


def read_id(output: Path, service: str) -> str | None:
    """The id in a tracking service of the run in `output`; None if it has none yet."""
    try:
        content = json.loads((output / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = content.get(service) if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def store_id(output: Path, service: str, name: str) -> None:
    """Stores the id in a tracking service of the run in `output`."""
    try:
        content = json.loads((output / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    known = content if isinstance(content, dict) else {}
    write_text(output / IDS, json.dumps({**known, service: name}) + "\n")


def store_link(output: Path, service: str, address: str | None) -> None:
    """Stores the address of the run's page in a tracking service, for the report.

    An address of None, as for an offline run, is not stored.
    """
    if address:
        store_id(output, service + LINK, address)
