"""Third-party loggers, none of which may cost a run its result: they work beside it, and one that fails is left out."""

from __future__ import annotations

import json
import logging
import queue
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from nemo_popsd.files.atomic import write_text
from nemo_popsd.observability.jsonl_logger import FILE_NAME

logger = logging.getLogger(__name__)

IDS = "trackers.json"
"""File in `output` with the names that a run has in tracking services, so that a resumed run goes on under them."""
CLOSE_SECONDS = 120.0
"""What a tracker gets for what it has not written yet, once the result of the run is saved."""

_hanging: list[str] = []


class Tracker(Logger):
    """Passes metrics on to another logger, from a thread of its own, and survives whatever becomes of that one.

    The thread begins at the first call. An error of the other logger is reported once, and it gets nothing more.
    Lightning finalises loggers when `fit` or `validate` ends; this one waits for `close`, when the result is saved.

    Args:
        label: for messages, e.g. `MLflow`.
        build: makes the other logger; called in the thread.
        finish: ends it. Its second argument tells whether the run succeeded; None: it was asked to stop and goes on.
        takes_hyperparameters: pass on what Lightning logs of the model's.
    """

    def __init__(
        self,
        label: str,
        build: Callable[[], Any],
        finish: Callable[[Any, bool | None], None],
        *,
        takes_hyperparameters: bool = False,
    ) -> None:
        super().__init__()
        self._label = label
        self._build = build
        self._finish = finish
        self._takes_hyperparameters = takes_hyperparameters
        self._calls: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
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

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Has them logged; Lightning gives the step as a number with a fraction, which some services refuse."""
        values, number = dict(metrics), None if step is None else int(step)

        def log(inner: Any) -> None:
            inner.log_metrics(values, step=number)
            inner.save()

        self._put(log)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Has them logged, if that was asked for; the resolved configuration is a file of its own."""
        if self._takes_hyperparameters:
            self._put(lambda inner: inner.log_hyperparams(params, *args, **kwargs))

    def finalize(self, status: str) -> None:
        """Nothing: see `close`."""

    def close(self, succeeded: bool | None) -> None:
        """Has everything written and the other logger ended, for which it gets `CLOSE_SECONDS`.

        Args:
            succeeded: whether the run did; None: it was asked to stop and goes on later.
        """
        if self._thread is None:
            return
        self._put(lambda inner: self._finish(inner, succeeded))
        self._calls.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() and not self._failed:
            _hanging.append(self._label)
            self._report(f"it does not end within {CLOSE_SECONDS:g} s")

    def _put(self, call: Callable[[Any], None]) -> None:
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
            "%s is left out from now on: %s; the run goes on, and %s has everything", self._label, problem, FILE_NAME
        )


def close_trackers(loggers: Iterable[Any], succeeded: bool | None) -> None:
    """Closes those of a trainer's loggers that are trackers; see `Tracker.close`."""
    for one in loggers:
        if isinstance(one, Tracker):
            one.close(succeeded)


def any_hangs() -> bool:
    """Whether a tracker hangs, whose library would also hold up the end of the process."""
    return bool(_hanging)


def read_id(output: Path, service: str) -> str | None:
    """The name of the run in `output` in a tracking service; None if it has none yet."""
    try:
        found = json.loads((output / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = found.get(service) if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def keep_id(output: Path, service: str, name: str) -> None:
    """Remembers the name of the run in `output` in a tracking service."""
    try:
        found = json.loads((output / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    known = found if isinstance(found, dict) else {}
    write_text(output / IDS, json.dumps({**known, service: name}) + "\n")
