"""Runs a function on several ranks, each a separate process in a gloo group, and collects the results.

    def worker(rank, world_size, scale):          # module level, so that it can be pickled by name
        total = torch.full((1,), scale * rank)
        torch.distributed.all_reduce(total)
        return total

    results = run_ranks(worker, 2, 10.0)          # [tensor([10.]), tensor([10.])]

How it works
    * Ranks are forked from a process that imports torch, megatron.core and hypothesis once per test session
      (`tests/fork_servers.py`), so a rank starts in tenths of a second.
    * The parent hosts the TCPStore on a port chosen by the kernel, so there is no race for a port.
    * Arguments and results are pickled through a pipe; there is no shared memory that must outlive the rank.
    * A rank that has returned stays alive until all ranks have, so that no connection closes during a collective.
    * Every rank is a separate session and is killed with all processes that it started; a rank also watches the test
      process and ends with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tests.fork_servers import CONTEXT, LOCAL, TRANSFORMER_ENGINE, Descriptor, die_with_parent, forked_by

__all__ = ["LOCAL", "TRANSFORMER_ENGINE", "run_ranks"]

_HOST = "127.0.0.1"
_EXIT_GRACE_SECONDS = 10.0
_STACK_DUMP_SECONDS = 0.5
_FAILURE_GRACE_SECONDS = 0.3


def run_ranks(
    worker: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0, layers: str = LOCAL
) -> list[Any]:
    """Calls ``worker(rank, world_size, *args)`` on every rank and returns the results by rank.

    Each rank has an initialized default process group (gloo), one torch thread, the caller's working directory, and the
    caller's environment plus RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        worker: a module-level function. Callables among `args` must also be module-level functions.
        world_size: number of ranks.
        args: picklable arguments; CPU tensors are supported.
        timeout: time limit of the complete run in seconds.
        layers: `LOCAL` or `TRANSFORMER_ENGINE`; see `tests.layers` for tests that run on both.

    Raises:
        AssertionError: a rank failed (the message contains the first failing rank and its traceback) or the run timed
            out (the message contains the ranks still running and their stacks). All ranks have been killed.
    """
    import torch.distributed as dist

    store = dist.TCPStore(_HOST, 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    payload = pickle.dumps((worker, args))
    deadline = time.monotonic() + timeout
    processes: list[Any] = []
    pipes: list[connection.Connection] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        stack_files = [os.path.join(folder, f"rank{rank}.txt") for rank in range(world_size)]
        try:
            for rank in range(world_size):
                pipe, pipe_of_rank = CONTEXT.Pipe()
                variables = {
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": _HOST,
                    "MASTER_PORT": str(store.port),
                }
                arguments = (payload, rank, world_size, variables, timeout, stack_files[rank], layers, pipe_of_rank)
                output = (Descriptor(1), Descriptor(2))
                process = CONTEXT.Process(target=_rank_main, args=(*arguments, *output), name=f"rank{rank}")
                with forked_by(layers):
                    process.start()
                pipe_of_rank.close()
                processes.append(process)
                pipes.append(pipe)
            results = _collect(processes, pipes, deadline, timeout, stack_files)
            for pipe in pipes:
                with contextlib.suppress(OSError):
                    pipe.send_bytes(b"done")
            for process in processes:
                process.join(_EXIT_GRACE_SECONDS)
            return results
        finally:
            for process in processes:
                _kill(process)
            for pipe in pipes:
                pipe.close()


def _collect(
    processes: list[Any],
    pipes: list[connection.Connection],
    deadline: float,
    timeout: float,
    stack_files: list[str],
) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [rank for rank in range(len(pipes)) if rank not in results]
        ready = connection.wait([pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = _dump_stacks(processes, stack_files, waiting)
            raise AssertionError(f"timed out after {timeout:g} s; ranks still running: {waiting}\n{stacks}")
        failed = _receive(processes, pipes, [rank for rank in waiting if pipes[rank] in ready], results)
        if failed:
            time.sleep(_FAILURE_GRACE_SECONDS)  # a peer may report the effect of a failure before its cause
            rest = [rank for rank in waiting if rank not in results and pipes[rank] not in ready]
            late = connection.wait([pipes[rank] for rank in rest], 0.0)
            failed += _receive(processes, pipes, [rank for rank in rest if pipes[rank] in late], results)
            _, rank, text = min(failed)
            raise AssertionError(f"rank {rank} of {len(pipes)} failed first:\n{text}")
    return [results[rank] for rank in range(len(pipes))]


def _receive(
    processes: list[Any], pipes: list[connection.Connection], ranks: list[int], results: dict[int, Any]
) -> list[tuple[float, int, str]]:
    """Adds the results that `ranks` sent to `results`; returns failures as (time, rank, text)."""
    failures: list[tuple[float, int, str]] = []
    for rank in ranks:
        try:
            succeeded, moment, content = pickle.loads(pipes[rank].recv_bytes())
        except (EOFError, OSError):  # died without a message: more likely the cause than the effect of a peer's error
            processes[rank].join(_EXIT_GRACE_SECONDS)
            failures.append((0.0, rank, f"the process died with exit code {processes[rank].exitcode}"))
            continue
        if succeeded:
            results[rank] = content
        else:
            failures.append((moment, rank, content))
    return failures


def _dump_stacks(processes: list[Any], stack_files: list[str], ranks: list[int]) -> str:
    for rank in ranks:
        with contextlib.suppress(OSError):  # the file exists as soon as the rank can handle the signal
            if os.path.exists(stack_files[rank]):
                os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(_STACK_DUMP_SECONDS)
    parts = []
    for rank in ranks:
        path = Path(stack_files[rank])
        parts.append(f"--- rank {rank}\n{path.read_text() if path.exists() else 'still starting'}")
    return "\n".join(parts)


def _kill(process: Any) -> None:
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # includes processes that the rank started, even after its exit
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.join(_EXIT_GRACE_SECONDS)


def _rank_main(
    payload: bytes,
    rank: int,
    world_size: int,
    environment: dict[str, str],
    timeout: float,
    stack_file: str,
    layers: str,
    pipe: connection.Connection,
    *output: None,
) -> None:
    os.setsid()
    die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        try:
            # The server ignores exceptions of its imports.
            assert (layers == LOCAL) == ("transformer_engine" not in sys.modules), f"the server has no {layers} layers"
            content = _call_worker(payload, rank, world_size, timeout)
            message = pickle.dumps((True, time.monotonic(), content))
        except BaseException:
            message = pickle.dumps((False, time.monotonic(), traceback.format_exc()))
        pipe.send_bytes(message)
        with contextlib.suppress(EOFError, OSError):
            pipe.recv_bytes()  # all ranks have returned, or the parent is gone
        faulthandler.unregister(signal.SIGUSR1)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _call_worker(payload: bytes, rank: int, world_size: int, timeout: float) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    store = dist.TCPStore(
        _HOST, int(os.environ["MASTER_PORT"]), None, is_master=False, wait_for_workers=False, timeout=limit
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    dist.barrier()  # a worker that destroys the group immediately would close connections that peers still open
    worker, args = pickle.loads(payload)
    return worker(rank, world_size, *args)
