"""The lock of an output: which process is refused, which one takes over, and what the previous holder notices."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.errors import TransientError, UserError
from nemo_popsd.files import output_lock
from nemo_popsd.files.lock_holder import this_process
from nemo_popsd.files.output_lock import OutputLock

HOLD = """
import sys, time
from nemo_popsd.files import output_lock
output_lock.BEAT_SECONDS = 0.05
lock = output_lock.OutputLock(sys.argv[1])
print("held", flush=True)
while True:
    time.sleep(0.05)
    try:
        lock.hold.check()
    except Exception as error:
        print(error, flush=True)
        break
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(output_lock, "STALE_SECONDS", 0.6)
    monkeypatch.setattr(output_lock, "_POLL_SECONDS", 0.02)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def another_process(output: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `output`."""
    arguments: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": {**os.environ, **environment}}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(output)], **arguments) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def change_holder(output: Path, **facts: object) -> None:
    """Changes what the holder's file states, e.g. its machine."""
    (path,) = (output / "lock").glob("holder-*")
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_a_second_run_is_refused_at_once(tmp_path: Path) -> None:
    with another_process(tmp_path / "run") as first:
        begun = time.monotonic()
        with pytest.raises(UserError, match=rf"another run in it, host .*, process {first.pid}, since 20"):
            OutputLock(tmp_path / "run")
        assert time.monotonic() - begun < 0.5
        assert len(list((tmp_path / "run" / "lock").iterdir())) == 2, "files of the second process remain"


def test_release_leaves_no_files(tmp_path: Path) -> None:
    for _ in range(2):
        lock = OutputLock(tmp_path / "run")
        assert lock.hold.is_held()
        lock.release()
        lock.release()
        assert list((tmp_path / "run").iterdir()) == []
        assert not lock.hold.is_held()


def test_a_killed_holder_on_the_same_machine_is_replaced_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_lock, "STALE_SECONDS", 60.0)
    with another_process(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        while Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        begun = time.monotonic()
        lock = OutputLock(tmp_path)  # the killed process is a zombie
        assert time.monotonic() - begun < 2
    assert lock.hold.generation == 2
    lock.release()


def test_a_reused_process_id_is_another_process(tmp_path: Path) -> None:
    first = OutputLock(tmp_path)
    change_holder(tmp_path, start_time=this_process().start_time - 1)
    second = OutputLock(tmp_path)
    assert second.hold.is_held()
    for lock in (first, second):
        lock.release()


def test_without_a_start_time_the_process_id_decides(tmp_path: Path) -> None:
    with another_process(tmp_path) as first:
        change_holder(tmp_path, start_time=0)
        with pytest.raises(UserError, match="another run in it"):
            OutputLock(tmp_path)
        first.send_signal(signal.SIGKILL)
        first.wait()
        lock = OutputLock(tmp_path)
        assert lock.hold.generation == 2
        lock.release()


def test_a_live_holder_on_another_machine_is_recognised_by_its_heartbeat(tmp_path: Path) -> None:
    reported: list[str] = []
    with another_process(tmp_path):
        change_holder(tmp_path, machine="another", host="node7")
        with pytest.raises(UserError, match=r"another run in it, host node7.*set output to another directory"):
            OutputLock(tmp_path, report=reported.append)
    assert reported[0].startswith("checking for up to 0.6 s whether the run that holds the lock is alive: host node7")


def test_a_dead_holder_on_another_machine_is_replaced_after_the_stale_time(tmp_path: Path) -> None:
    with another_process(tmp_path) as first:
        change_holder(tmp_path, machine="another", host="node7")
        first.send_signal(signal.SIGKILL)
        first.wait()
        begun = time.monotonic()
        lock = OutputLock(tmp_path)
        assert 0.5 < time.monotonic() - begun < 5
        lock.hold.check()
        lock.release()


def test_a_suspended_holder_notices_the_takeover_before_it_writes(tmp_path: Path) -> None:
    with another_process(tmp_path) as first:
        change_holder(tmp_path, machine="another", host="node7")
        first.send_signal(signal.SIGSTOP)
        lock = OutputLock(tmp_path)
        first.send_signal(signal.SIGCONT)
        assert first.stdout is not None
        printed = first.stdout.readline()
        assert "got another run, which took over because this one had no heartbeat" in printed
        assert f"process {os.getpid()}" in printed
        assert first.wait(10) == 0
        lock.hold.check()
        lock.release()


def test_exactly_one_of_many_processes_replaces_a_dead_holder(tmp_path: Path) -> None:
    OutputLock(tmp_path).release()
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "holder-000004").write_text('{"token": "x", "host": "node7", "machine": "another"}')
    outcomes: list[object] = []

    def take() -> None:
        try:
            outcomes.append(OutputLock(tmp_path, report=lambda text: None))
        except UserError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, OutputLock)]
    assert len(outcomes) == 8
    assert winner.hold.generation == 5
    winner.hold.check()
    winner.release()


def test_a_replaced_holder_does_not_remove_the_lock_of_the_next(tmp_path: Path) -> None:
    first = OutputLock(tmp_path)
    change_holder(tmp_path, start_time=1)
    second = OutputLock(tmp_path)
    with pytest.raises(UserError, match="another run, which took over"):
        first.hold.check()
    first.release()
    second.hold.check()
    second.release()


def test_a_removed_lock_is_not_held(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path)
    for path in (tmp_path / "lock").iterdir():
        path.unlink()
    with pytest.raises(TransientError, match=r"the lock of this run, .*lock, was removed"):
        lock.hold.check()
    lock.release()


# Batch jobs


def test_an_earlier_start_of_the_job_is_asked_to_save_and_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = OutputLock(tmp_path)
    asked = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *args: asked.set())
    try:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        threading.Thread(target=lambda: (asked.wait(10), time.sleep(0.9), first.release())).start()
        second = OutputLock(tmp_path)  # the first one saves for longer than STALE_SECONDS
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asked.is_set()
    assert "asking an earlier start of this job to save and stop: host" in capfd.readouterr().err
    second.hold.check()
    second.release()


def test_a_hanging_holder_gives_up_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "LEAVE_SECONDS", 0.3)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = OutputLock(tmp_path)
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # without a handler the process must not be killed
    try:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        second = OutputLock(tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(TransientError, match="a later start of the same job has taken over"):
        first.hold.check()
    first.release()
    second.hold.check()
    second.release()


def test_tasks_of_an_array_need_separate_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = OutputLock(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(UserError, match=r"job 7, start 0, .*each task of a job array needs its own output"):
        OutputLock(tmp_path)
    first.release()


def test_a_folder_removed_by_an_ending_run_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir, removed = Path.mkdir, []

    def make(self: Path, *args: Any, **options: Any) -> None:
        mkdir(self, *args, **options)
        if self.name == "lock" and not removed:
            removed.append(self)
            self.rmdir()  # by a run that has just ended

    monkeypatch.setattr(Path, "mkdir", make)
    lock = OutputLock(tmp_path)
    assert removed
    lock.release()


# Unusual file systems and files


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    lock = OutputLock(tmp_path)
    with pytest.raises(UserError, match="another run in it"):
        OutputLock(tmp_path)
    lock.release()


def test_an_unreadable_holder_counts_as_one_on_another_machine(tmp_path: Path) -> None:
    def seconds(content: str) -> float:
        output = tmp_path / str(zlib.crc32(content.encode()))
        (output / "lock").mkdir(parents=True)
        (output / "lock" / "holder-000001").write_text(content)
        begun = time.monotonic()
        OutputLock(output).release()
        return time.monotonic() - begun

    contents = ["", "{", "[]", '{"pid": "x"}', '{"token": "a", "pid": null}']
    with ThreadPoolExecutor(len(contents)) as threads:  # each waits
        assert min(threads.map(seconds, contents)) > 0.5


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Not a directory.*set output"):
        OutputLock(tmp_path / "file" / "run")


def test_a_transient_fault_of_the_file_system_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = OutputLock(tmp_path)
    listdir, failures = os.listdir, [OSError(errno.ESTALE, "Stale file handle")] * 2

    def fail(path: object) -> list[str]:
        if failures:
            raise failures.pop()
        return listdir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "listdir", fail)
    lock.hold.check()
    assert failures == []
    monkeypatch.undo()
    lock.release()
