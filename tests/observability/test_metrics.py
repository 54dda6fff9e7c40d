import time
from dataclasses import fields
from typing import Any

import pytest
import torch

from nemo_popsd.observability.metrics import DECLARED, GROUPS, MismatchMetrics, StepMetrics
from nemo_popsd.observability.stopwatch import Stopwatch


def test_metrics_that_were_not_measured_are_not_logged() -> None:
    nested = ("statistics", *GROUPS)
    other: dict[str, Any] = {item.name: 1.0 for item in fields(StepMetrics) if item.name not in nested}
    logged = StepMetrics(statistics={"forward_kl": 2.0, "norm_ratio": None}, **other).as_dict()
    assert logged == {"train/forward_kl": 2.0, **{f"train/{name}": 1.0 for name in other}}
    complete = StepMetrics(statistics={statistic.name: 2.0 for statistic in DECLARED}, **other).as_dict()
    first, *rest = other
    assert list(complete) == [f"train/{name}" for name in (first, *(s.name for s in DECLARED), *rest)]


def test_a_group_is_logged_under_its_own_prefix() -> None:
    other: dict[str, Any] = {item.name: 1.0 for item in fields(StepMetrics) if item.name not in GROUPS}
    mismatch = MismatchMetrics(kl=0.5, start_kl=0.75, mean_ratio=1.0, max=2.0, share=0.25)
    logged = StepMetrics(**{**other, "statistics": {}}, mismatch=mismatch).as_dict()
    assert logged["rollout/mismatch_kl"] == 0.5
    assert logged["rollout/mismatch_start_kl"] == 0.75
    assert not [name for name in logged if name.startswith("train/mismatch")]


def test_stopwatch_accumulates_and_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch.phase("rollout"):
            pass
    with pytest.raises(KeyError), stopwatch.phase("train"):
        raise KeyError
    assert (stopwatch.seconds("rollout"), stopwatch.seconds("train"), stopwatch.seconds("frozen")) == (3.5, 0.25, 0.0)
    stopwatch.reset()
    assert stopwatch.seconds("rollout") == 0.0


def test_stopwatch_waits_for_the_device_inside_the_measured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    stopwatch = Stopwatch()

    def synchronize() -> None:
        clock[0] += 1.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    with stopwatch.phase("cpu"):
        pass
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with stopwatch.phase("cuda"):
        pass
    assert (stopwatch.seconds("cpu"), stopwatch.seconds("cuda"), clock[0]) == (0.0, 1.0, 2.0)


def test_stopwatch_has_the_peak_device_memory_of_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    stopwatch = Stopwatch()
    for phase, most in (("rollout", 7), ("train", 5), ("rollout", 3)):
        with stopwatch.phase(phase):
            peak[0] = max(peak[0], most)
    assert [stopwatch.peak_bytes(name) for name in ("rollout", "train", "frozen")] == [7, 5, 0]
    stopwatch.reset()
    assert stopwatch.peak_bytes("rollout") == 0
