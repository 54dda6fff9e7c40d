"""The parts of `python -m benchmarks.gpu` are independent of each other, and all run on a CPU."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import journal
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.runner import Part, run_parts
from benchmarks.gpu.switches import SWITCHES_OF_SEVERAL, _because

ROOT = Path(__file__).parents[2]


def part(what: str, seconds: float = 60) -> Part:
    return Part(what, f"The part that is to {what}", "tests.benchmarks.parts", seconds, {"POPSD_TEST_PART": what})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_part_that_crashes_hangs_or_is_killed_does_not_affect_others(tmp_path: Path) -> None:
    parts = [part("crash"), part("hang", 8), part("killed"), part("pass")]
    statuses = run_parts(parts, tmp_path, head="# Results", total_seconds=300)
    assert statuses == {"crash": "failed", "hang": "time limit", "killed": "failed", "pass": "ok"}
    rows = journal.read(tmp_path / "results.jsonl")
    assert [row["part"] for row in rows if row.get("table") == "found"] == list(statuses), "found before the end"
    ends = {row["part"]: row for row in rows if "status" in row}
    assert "ValueError: the kernel is missing" in ends["crash"]["tail"]
    assert 7 < ends["hang"]["seconds"] < 30
    deadline = time.monotonic() + 10
    while alive(child := int((tmp_path / "work" / "child").read_text())):
        assert time.monotonic() < deadline, f"{child} outlives its part"
        time.sleep(0.1)
    written = (tmp_path / "results.md").read_text()
    assert written.startswith("# Results\n\n## The part that is to crash")
    assert "| rehearse | value |\n| --- | --- |\n| False | 1.5 |" in written
    assert "*time limit* after" in written


def test_parts_without_time_are_reported(tmp_path: Path) -> None:
    assert run_parts([part("pass")], tmp_path, head="#", total_seconds=1) == {"pass": "no time left"}
    assert "*no time left*" in (tmp_path / "results.md").read_text()


def test_partial_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    journal.append(file, {"part": "a", "table": "t", "x": None, "y": 12345.0})
    file.write_text(file.read_text() + '{"part": "a", "ta')
    assert journal.read(file) == [{"part": "a", "table": "t", "x": None, "y": 12345.0}]
    assert "| - | 12,345 |" in journal.as_markdown(journal.read(file), {"a": "A"}, "#")


def test_the_sum_of_the_limits_is_within_the_promised_time() -> None:
    assert len({p.name for p in PARTS}) == len(PARTS)
    assert sum(p.seconds for p in PARTS[:3]) < 8 * 60, "the most valuable ones in any case"


def test_switches_of_several_gpus_are_settings_of_a_run_except_for_user_buffers() -> None:
    reasons = {
        name: _because(gpus, overrides) for name, (gpus, overrides, expected) in SWITCHES_OF_SEVERAL.items() if expected
    }
    assert len(reasons) == len(SWITCHES_OF_SEVERAL)
    assert "tp_comm_overlap" in reasons.pop("user buffers")
    assert {re.sub(r"\d", "N", reason) for reason in reasons.values()} == {"needs N GPUs"}
    kinds = {item for _, overrides, _ in SWITCHES_OF_SEVERAL.values() for item in overrides if "context_type" in item}
    assert len(kinds) == 4


@pytest.mark.slow(seconds=150)
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--output", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "POPSD_VLLM_PYTHON"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    statuses = {row["part"]: row["status"] for row in rows if "status" in row}
    assert statuses == {p.name: "ok" for p in PARTS}, (tmp_path / "log.txt").read_text()[-4000:]
    assert done.returncode == 0
    # CPU time, which does not depend on other load of the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    assert {row["part"] for row in rows if row.get("table")} == set(statuses)
    assert {row["verdict"] for row in rows if "verdict" in row} == {"right", "passed"}
    assert len([row for row in rows if row.get("table") == "steps"]) == 3
    assert not (tmp_path / "work").exists()
    written = (tmp_path / "results.md").read_text()
    assert all(f"## {p.title}\n" in written for p in PARTS)
