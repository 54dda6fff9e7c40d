"""If a tracker fails or hangs, only its own record is lost, and the run continues."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.observability import trackers
from nemo_popsd.observability.jsonl_logger import JsonlLogger
from nemo_popsd.observability.trackers import Tracker, close_trackers, read_id, store_id
from tests.observability.one_step import fit


class Inner:
    """A logger that records its calls and fails at a selected one."""

    def __init__(self, fails: str = "", error: BaseException | None = None) -> None:
        self.seen: list[Any] = []
        self._fails = fails
        self._error = error or ConnectionError("service\nunavailable")
        self._do("build")

    def _do(self, what: str, *content: Any) -> None:
        if what == self._fails:
            raise self._error
        self.seen.append((what, *content))

    def log_metrics(self, metrics: dict[str, Any], step: int | None) -> None:
        self._do("log", metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        self._do("hyperparameters", params)

    def save(self) -> None:
        self._do("save")

    def finish(self, succeeded: bool | None) -> None:
        self._do("finish", succeeded)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(trackers, "_hanging", [])
    monkeypatch.delenv("RANK", raising=False)


def tracker(fails: str = "", error: BaseException | None = None, **options: Any) -> tuple[Tracker, list[Inner]]:
    built: list[Inner] = []

    def build() -> Inner:
        built.append(Inner(fails, error))
        return built[0]

    return Tracker("Service", build, lambda inner, succeeded: inner.finish(succeeded), **options), built


def test_all_calls_are_passed_on_in_order_with_integer_steps() -> None:
    first, built = tracker(takes_hyperparameters=True)
    first.log_hyperparams({"a": 1})
    metrics = {"loss": 0.5}
    first.log_metrics(metrics, step=3.0)  # type: ignore[arg-type]
    metrics["loss"] = 7.0
    first.log_metrics({"loss": 0.25})
    first.finalize("success")
    first.close(True)
    saved = ("save",)
    assert built[0].seen == [
        ("build",),
        ("hyperparameters", {"a": 1}),
        ("log", {"loss": 0.5}, 3),
        saved,
        ("log", {"loss": 0.25}, None),
        saved,
        ("finish", True),
    ]
    assert type(built[0].seen[2][2]) is int


def test_a_tracker_without_calls_is_not_built() -> None:
    first, built = tracker()
    first.log_hyperparams({"a": 1})
    first.close(True)
    assert built == []


@pytest.mark.parametrize("fails", ["build", "log", "save", "finish"])
@pytest.mark.parametrize("error", [ConnectionError("service\nunavailable"), SystemExit("quit")], ids=["error", "exit"])
def test_a_failure_is_reported_once_and_the_run_continues(
    fails: str, error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = tracker(fails, error)
    other, seen = tracker()
    fit(3, logger=[JsonlLogger(tmp_path), first, other])
    close_trackers([first, other], True)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (printed,) = [record.getMessage() for record in caplog.records if record.name == trackers.__name__]
    words = " ".join(f"{type(error).__name__}: {error}".split())
    assert printed == f"Service is turned off: {words}; the run continues, and metrics.jsonl has all metrics"
    assert seen[0].seen[-1] == ("finish", True)
    assert not trackers.any_hangs()


def test_a_tracker_that_hangs_is_abandoned_in_time(caplog: pytest.LogCaptureFixture) -> None:
    forever = threading.Event()
    first = Tracker("Service", Inner, lambda inner, succeeded: forever.wait())  # type: ignore[arg-type,return-value]
    first.log_metrics({"loss": 0.5}, step=1)
    started = time.monotonic()
    first.close(True)
    assert 0.4 < time.monotonic() - started < 5
    assert "Service is turned off: it did not end within 0.5 s" in caplog.text
    assert trackers.any_hangs()
    forever.set()


def test_ids_are_stored_with_the_run(tmp_path: Path) -> None:
    assert read_id(tmp_path, "wandb") is None
    store_id(tmp_path, "wandb", "a")
    store_id(tmp_path, "mlflow", "b")
    store_id(tmp_path, "wandb", "c")
    assert (read_id(tmp_path, "wandb"), read_id(tmp_path, "mlflow"), read_id(tmp_path, "x")) == ("c", "b", None)
    for damaged in ("", "{", "[1]", '{"wandb": 3}'):
        (tmp_path / trackers.IDS).write_text(damaged)
        assert read_id(tmp_path, "wandb") is None
        store_id(tmp_path, "wandb", "d")
        assert read_id(tmp_path, "wandb") == "d"
