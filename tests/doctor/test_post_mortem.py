"""What `popsd doctor --run` concludes from the files of a run. Complete runs: `tests/commands/test_post_mortem.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nemo_popsd.cli.main import main
from nemo_popsd.doctor.post_mortem import PostMortem, examine_remains
from nemo_popsd.doctor.remains import read_remains
from nemo_popsd.errors import TransientError, UserError
from nemo_popsd.files.attempts import RankRecord
from nemo_popsd.files.output_lock import OutputLock


def begin(output: Path, ranks: int = 1, attempt: str = "one") -> list[RankRecord]:
    """The records of an attempt that has begun on all ranks, with a step of metrics and a checkpoint."""
    records = [RankRecord(output, rank=rank, ranks=ranks) for rank in range(ranks)]
    for record in records:
        record.begin(attempt)
    (output / "config.yaml").write_text("training: {steps: 20}\n")
    (output / "metrics.jsonl").write_text('{"step": 7, "train/loss": 0.5, "train/seconds_train": 2.0}\n')
    for name, content in (("step-000005", '{"step": 5}'), ("step-000007", None)):
        (output / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        if content:
            (output / "checkpoints" / name / "manifest.json").write_text(content)
    return records


def fail(record: RankRecord, error: BaseException) -> None:
    """Ends a rank with an exception, as `popsd train` does."""
    with pytest.raises(type(error)), record:
        raise error


def examine(output: Path, *logs: Path) -> PostMortem:
    return examine_remains(read_remains(output, logs))


def names(output: Path, *logs: Path) -> list[str]:
    return [cause.name for cause in examine(output, *logs).causes]


@pytest.mark.parametrize(
    ("text", "name", "command"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "device_memory", "popsd plan "),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=17.0.", "host_memory", "dmesg "),
        ("[1.2] Out of memory: Killed process 4711 (python) total-vm:1kB", "host_memory", "dmesg "),
        ("slurmstepd: error: *** STEP 17.0 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT ***", "time_limit", "sacct -j "),
        ("slurmstepd: error: *** JOB 17 ON n1 CANCELLED AT 2026-11-28T10:00:00 ***", "cancelled", "sacct -j "),
        ("OSError: [Errno 28] No space left on device: 'x'", "disk_full", "df -h "),
        ("step 12: got a loss or gradient that is NaN or Inf", "not_finite", "popsd rollouts show "),
        ("Some NCCL operations: Watchdog caught collective operation timeout: Work", "timeout", "popsd doctor --run "),
        ("Bus error (core dumped)", "shared_memory", "df -h /dev/shm"),
        ("NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.", "hardware", "nvidia-smi "),
        ("exitcode : -11 (pid: 12)", "segfault", "popsd doctor --imports"),
    ],
)
def test_texts_of_logs(tmp_path: Path, text: str, name: str, command: str) -> None:
    (record,) = begin(tmp_path)
    log = tmp_path / "run.log"
    log.write_text(f"beginning at step 1\nstep 7/20  loss 0.5\n{text}\n")
    first, second = examine(tmp_path).causes[:2]
    assert (first.name, first.likelihood) == (name, "likely" if name in ("timeout", "segfault") else "very likely")
    assert [(line.file, line.number, line.text) for line in first.evidence] == [(log, 3, text)]
    assert first.next.startswith(command)
    assert second.name == "killed", "the rank recorded no end"
    record.end(0)
    log.write_text(f"{text}\nresuming after step 7 from x\nstep 8/20\n")
    assert names(tmp_path) == ["unknown"], "a text of an earlier attempt"


@pytest.mark.parametrize(
    "text",
    ["  ok  /dev/shm  15.9 GiB  need 1 GiB", "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."],
)
def test_texts_of_logs_that_mean_nothing(tmp_path: Path, text: str) -> None:
    begin(tmp_path)
    (tmp_path / "run.log").write_text(text)
    assert names(tmp_path) == ["killed"]


def test_the_rank_that_ended_first_has_the_cause(tmp_path: Path) -> None:
    records = begin(tmp_path, ranks=3)
    fail(records[2], UserError("metrics m", got="No space left on device: m", need="space", fix="free space"))
    fail(records[0], RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"))
    fail(
        records[1], TransientError("collective on rank 1 of 3", got="another rank has ended, or the connection", fix="")
    )
    first, second = examine(tmp_path).causes
    assert (first.name, second.name) == ("disk_full", "peer")
    (line,) = first.evidence
    assert (line.file.name, line.number) == ("rank-00002.jsonl", 2)
    assert line.text.startswith("rank 2 ended with 2: metrics m: got No space left on device: m; need space")
    assert len(second.evidence) == 2


def test_a_killed_rank_explains_the_lost_connection_of_its_peer(tmp_path: Path) -> None:
    records = begin(tmp_path, ranks=2)
    fail(records[0], RuntimeError("Connection closed by peer"))
    killed, peer = examine(tmp_path).causes
    assert (killed.name, peer.name) == ("killed", "peer")
    assert killed.what.startswith("rank 1 ended without a report")
    assert killed.evidence[0].file.name == "rank-00001.jsonl"


def test_the_statuses_of_a_batch_job_and_its_logs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = tmp_path / "logs" / "start-0"
    start.mkdir(parents=True)
    monkeypatch.setenv("POPSD_RUN_DIR", str(start))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    begin(tmp_path / "run", ranks=2)
    (start / "rank-1.exit").write_text("137 0 node1\n")
    (start / "node-0.log").write_text("0: beginning at step 1\n1: slurmstepd: error: Detected 1 oom_kill event\n")
    host, killed = examine(tmp_path / "run").causes
    assert (host.name, killed.name) == ("host_memory", "killed")
    assert killed.what.startswith("all ranks ")
    assert (killed.evidence[-1].file, killed.evidence[-1].text) == (start / "rank-1.exit", "137 0 node1")
    assert killed.next == "sacct -j 17 --format=JobID,State,ExitCode,MaxRSS,NodeList"


def test_a_rank_that_never_began(tmp_path: Path) -> None:
    RankRecord(tmp_path, rank=0, ranks=2).begin("one")
    assert names(tmp_path) == ["killed", "absent"]


def test_dumps_of_the_last_attempt_count(tmp_path: Path) -> None:
    records = begin(tmp_path, ranks=3)
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    for name in ("flight-rank-0", "flight-rank-2", "memory-rank-0001.pickle"):
        (dumps / name).touch()
    for record in records:
        record.end(1, "RuntimeError: Connection closed by peer")
    memory, timeout, peer = examine(tmp_path).causes
    assert (memory.name, timeout.name, peer.name) == ("device_memory", "timeout", "peer")
    assert "no dump of rank 1, which may be the one that hung" in timeout.evidence[0].text
    assert timeout.next == f"torchfrtrace --prefix flight-rank- {dumps}"
    for file in dumps.iterdir():
        os.utime(file, (1, 1))
    assert names(tmp_path) == ["peer"]


def test_a_lost_vllm_server_is_explained_by_its_own_log(tmp_path: Path) -> None:
    (record,) = begin(tmp_path)
    (tmp_path / "vllm").mkdir()
    log = tmp_path / "vllm" / "server-0.log"
    log.write_text("--- start\nINFO ready\ntorch.OutOfMemoryError: CUDA out of memory.\n")
    fail(
        record, TransientError("rollouts by vLLM", got="the server was lost 3 times (rollout.vllm.restarts=2)", fix="x")
    )
    server, lost = examine(tmp_path).causes
    assert (server.name, server.evidence[0].number) == ("vllm_device_memory", 3)
    assert (lost.name, lost.next) == ("vllm", f"tail -n 60 {log}")
    record.begin("two")
    record.end(1, "RuntimeError: shapes differ", "a.py:1 in f")
    assert names(tmp_path) == ["defect", "vllm_device_memory"], "the server was started again"


def test_a_defect_has_its_frames_and_changed_libraries_are_named(tmp_path: Path) -> None:
    begin(tmp_path)[0].end(85)
    file = tmp_path / "ranks" / "rank-00000.jsonl"
    old = json.loads(file.read_text().splitlines()[0])["versions"]["torch"]
    file.write_text(file.read_text().replace(old, "2.0.0"))
    (record,) = begin(tmp_path, attempt="two")
    fail(record, KeyError("weights"))
    defect, versions = examine(tmp_path).causes
    assert defect.name == "defect"
    assert defect.evidence[0].text.startswith("rank 0 ended with 1: KeyError: 'weights' (at ")
    assert "test_post_mortem.py" in defect.evidence[0].text
    assert versions.evidence[0].text == f"torch 2.0.0 → {old}"


def test_a_run_that_goes_on_and_one_that_is_silent(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path)
    try:
        begin(tmp_path)
        assert (examine(tmp_path).state, names(tmp_path)) == ("running", ["running"])
        os.utime(tmp_path / "metrics.jsonl", (1e9, 1e9))
        (cause,) = examine(tmp_path).causes
        assert (cause.name, cause.next.split("  ")[0]) == ("silent", f"py-spy dump --pid {os.getpid()}")
    finally:
        lock.release()
    assert examine(tmp_path).state == "dead"


def test_finished_and_stopped_runs(tmp_path: Path) -> None:
    (record,) = begin(tmp_path)
    record.end(85)
    (tmp_path / "REQUEUE").write_text("7\n")
    (cause,) = examine(tmp_path).causes
    assert (cause.name, cause.next) == ("stopped", f"popsd train {tmp_path}/config.yaml overwrite=false")
    (tmp_path / "REQUEUE").rename(tmp_path / "DONE")
    (record,) = begin(tmp_path, attempt="two")
    record.end(0)
    assert names(tmp_path) == ["finished"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = begin(tmp_path)
    fail(record, UserError("step 9", got="x", need="a change within guard.drift.slack=0.05", fix="y"))
    assert main(["doctor", "--run", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert text.splitlines()[0] == f"{tmp_path}: ended without finishing"
    for part in (
        "steps        7 of 20 with metrics",
        "complete: step-000005; incomplete: step-000007",
        "1. very likely: an alarm ended the run (guard.drift)",
        "ranks/rank-00000.jsonl:2  rank 0 ended with 2: step 9: got x",
        f"next: popsd report {tmp_path}",
        f"popsd train {tmp_path}/config.yaml overwrite=false  # after step 5, from step-000005",
    ):
        assert part in text
    assert main(["doctor", "--run", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["state"], report["causes"][0]["name"]) == ("dead", "drift")
    assert report["causes"][0]["evidence"][0]["line"] == 2
    for words, message in (
        (["--run", str(tmp_path / "no")], "is empty or missing"),
        (["--run", str(tmp_path), "--logs", "no"], "which does not exist"),
        (["conf/tiny.yaml", "--run", str(tmp_path)], "omit one of them"),
    ):
        assert main(["doctor", *words]) == 2
        assert message in capsys.readouterr().err


def test_damaged_files_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    begin(tmp_path)
    for name in ("config.yaml", "metrics.jsonl", "ranks/rank-00000.jsonl", "checkpoints/step-000005/manifest.json"):
        file = tmp_path / name
        file.write_bytes(file.read_bytes() + b"\n{\xff[")
    result = examine(tmp_path)
    assert (result.state, result.causes[0].name, result.remains.last_step) == ("dead", "killed", 7)
    assert result.remains.checkpoints == {"step-000005": None, "step-000007": None}
