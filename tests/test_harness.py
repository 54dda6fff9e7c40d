"""The harness: results, failures, time-outs, and termination of all ranks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from multiprocessing import connection
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests import fork_servers
from tests.harness import run_ranks


def _facts(rank: int, world_size: int, offset: torch.Tensor) -> dict:
    total = offset + rank
    dist.all_reduce(total)
    return {
        "rank": dist.get_rank(),
        "size": dist.get_world_size(),
        "backend": dist.get_backend(),
        "total": total,
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")},
        "port": int(os.environ["MASTER_PORT"]),
        "caller": os.environ["HARNESS_TEST"],
        "directory": os.getcwd(),
        "megatron": "megatron.core" in sys.modules,
        "cuda": torch.cuda.is_initialized(),
    }


def _fork_server(rank: int, world_size: int) -> tuple[int, float]:
    """Number of threads of the server, and share of this rank's objects that garbage collection skips."""
    threads = len(os.listdir(f"/proc/{os.getppid()}/task"))
    return threads, gc.get_freeze_count() / (gc.get_freeze_count() + len(gc.get_objects()))


def _parent(rank: int, world_size: int) -> int:
    return os.getppid()


def _print(rank: int, world_size: int) -> None:
    print("printed by a rank")


def _large(rank: int, world_size: int) -> torch.Tensor:
    return torch.full((1 << 20,), float(rank))


def _one_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise RuntimeError("planted on rank 1")
    dist.all_reduce(torch.zeros(1))


def _one_dies(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.all_reduce(torch.zeros(1))


def _one_hangs(rank: int, world_size: int, pid_folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    for pid in (os.getpid(), child.pid):
        open(os.path.join(pid_folder, str(pid)), "w").close()
    if rank == 1:
        _sleep_here()


def _sleep_here() -> None:
    time.sleep(600)


def _uneven(rank: int, world_size: int) -> int:
    total = torch.ones(1)
    dist.all_reduce(total)
    if rank == 1:
        time.sleep(0.5)
    return rank


def _unpicklable(rank: int, world_size: int) -> object:
    return lambda: None


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_back_by_rank_from_an_environment_like_torchrun(monkeypatch, tmp_path):
    monkeypatch.setenv("HARNESS_TEST", "seen")
    monkeypatch.chdir(tmp_path)
    results = run_ranks(_facts, 3, torch.tensor([10.0]))
    for rank, facts in enumerate(results):
        assert facts["rank"] == rank
        assert facts["size"] == 3
        assert facts["backend"] == "gloo"
        torch.testing.assert_close(facts["total"], torch.tensor([33.0]))
        assert facts["threads"] == 1
        assert facts["environment"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
        }
        assert facts["port"] > 0
        assert facts["caller"] == "seen"
        assert facts["directory"] == str(tmp_path)
        assert not facts["cuda"]


def test_the_fork_server_has_one_thread_and_garbage_collection_skips_its_objects():
    """A second thread could hold a lock during a fork. The garbage collector copies the page of an object it visits."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc")
    [(threads, unvisited)] = run_ranks(_fork_server, 1)
    assert threads == 1
    assert unvisited > 0.9


def test_workers_and_their_ranks_are_forked_by_one_process():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("needs pytest-xdist")
    assert run_ranks(_parent, 2) == [os.getppid()] * 2


def test_the_owner_of_a_server_answers_after_a_requesting_process_was_killed():
    with connection.Listener(family="AF_UNIX") as listener:
        servers = {"some": SimpleNamespace(address=lambda: "place")}
        threading.Thread(target=fork_servers.answer, args=(listener, servers), daemon=True).start()
        connection.Client(listener.address).close()
        with connection.Client(listener.address) as asking:
            asking.send("some")
            assert asking.recv() == "place"


def test_output_of_a_rank_is_captured_with_the_test(capfd):
    run_ranks(_print, 1)
    assert capfd.readouterr().out == "printed by a rank\n"


def test_results_larger_than_a_pipe_and_ranks_of_uneven_length():
    large = run_ranks(_large, 2)
    assert [tensor[-1].item() for tensor in large] == [0.0, 1.0]
    assert run_ranks(_uneven, 2) == [0, 1]


def test_the_first_failing_rank_is_named_with_its_traceback():
    started = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        run_ranks(_one_fails, 2)
    message = str(caught.value)
    assert "rank 1 of 2 failed first" in message
    assert "planted on rank 1" in message
    assert "in _one_fails" in message
    assert time.monotonic() - started < 60


def test_a_rank_that_dies_without_a_message_is_named():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed first.*exit code 7"):
        run_ranks(_one_dies, 2)


def test_a_result_that_cannot_be_pickled_is_a_failure_of_its_rank():
    with pytest.raises(AssertionError, match=r"rank 0 of 1 failed first"):
        run_ranks(_unpicklable, 1)


@pytest.mark.slow
def test_a_time_out_names_the_ranks_shows_their_stack_and_leaves_no_process(tmp_path):
    with pytest.raises(AssertionError) as caught:
        run_ranks(_one_hangs, 2, str(tmp_path), timeout=8.0)
    message = str(caught.value)
    assert "ranks still running: [1]" in message
    assert "_sleep_here" in message
    pids = [int(name) for name in os.listdir(tmp_path)]
    assert len(pids) == 4
    patience = time.monotonic() + 5
    while any(_alive(pid) for pid in pids) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not [pid for pid in pids if _alive(pid)]


@pytest.mark.slow
def test_no_rank_outlives_a_killed_test_process(tmp_path):
    """After SIGKILL of the caller no `finally` block runs, so the ranks must end by themselves."""
    script = (
        "from tests.harness import run_ranks\n"
        "from tests.test_harness import _note_pid_and_sleep\n"
        f"run_ranks(_note_pid_and_sleep, 2, {str(tmp_path)!r})\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=root)
    patience = time.monotonic() + 60
    while len(os.listdir(tmp_path)) < 2 and time.monotonic() < patience:
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    pids = [int(name) for name in os.listdir(tmp_path)]
    assert len(pids) == 2
    patience = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not [pid for pid in pids if _alive(pid)]


def _note_pid_and_sleep(rank: int, world_size: int, pid_folder: str) -> None:
    open(os.path.join(pid_folder, str(os.getpid())), "w").close()
    time.sleep(600)
