"""Profiles, settings of the Flight Recorder, and the memory dump at out-of-memory."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from nemo_popsd.errors import UserError
from nemo_popsd.observability.config import ProfileConfig
from nemo_popsd.observability.dumps import recorded
from nemo_popsd.observability.flight_recorder import FILES, set_up_flight_recorder
from nemo_popsd.observability.stopwatch import Stopwatch


def one_step(output: Path, settings: ProfileConfig, step: int) -> None:
    watch = Stopwatch()
    with recorded(settings, output, step=step, rank=3):
        for phase in ("rollout", "frozen", "train"):
            with watch.phase(phase):
                torch.ones(4, 4) @ torch.ones(4, 4)


def test_only_the_selected_steps_have_a_trace_with_named_phases(tmp_path: Path) -> None:
    settings = ProfileConfig(steps=[2])
    for step in (1, 2, 3):
        one_step(tmp_path, settings, step)
    (file,) = (tmp_path / "dumps").iterdir()
    assert file.name == "profile-step-000002-rank-0003.json.gz"
    assert file.match(FILES[1]), "overwrite=true must remove it"
    names = {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert {"popsd.rollout", "popsd.frozen", "popsd.train"} <= names
    assert "aten::mm" in names


def test_steps_begin_at_one() -> None:
    with pytest.raises(UserError, match=r"observability\.profile\.steps"):
        ProfileConfig(steps=[0])


def test_phases_are_ranges_for_nsight(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: ranges.append("end"))
    with pytest.raises(KeyError), Stopwatch().phase("train"):
        raise KeyError
    assert ranges == ["popsd.train", "end"]


@pytest.mark.parametrize("profiled", [True, False])
def test_the_memory_is_dumped_when_it_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, profiled: bool
) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: Path(file).write_text("state"))
    monkeypatch.setattr(logging.getLogger("nemo_popsd"), "propagate", True)
    settings = ProfileConfig(steps=[5] if profiled else [])
    with pytest.raises(torch.OutOfMemoryError), recorded(settings, tmp_path, step=5, rank=0):
        raise torch.OutOfMemoryError("CUDA out of memory")
    file = tmp_path / "dumps" / "memory-rank-0000.pickle"
    assert file.read_text() == "state"
    assert any(str(file) in record.getMessage() for record in caplog.records if record.name.endswith(".dumps"))


def test_a_dump_that_fails_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: str) -> None:
        raise OSError("no space")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fail)
    with pytest.raises(torch.OutOfMemoryError), recorded(ProfileConfig(), tmp_path, step=5, rank=0):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_flight_recorder_writes_into_the_run_unless_the_user_set_it(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    set_up_flight_recorder(tmp_path, environment)
    prefix = f"{tmp_path}/dumps/flight-rank-"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == environment["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == prefix
    assert environment["TORCH_FR_BUFFER_SIZE"] == environment["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "2000"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    own = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    set_up_flight_recorder(tmp_path, own)
    assert own["TORCH_FR_BUFFER_SIZE"] == "0", "under both names"
    assert own["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
