"""Process groups and seeds, with and without a launcher."""

from __future__ import annotations

import random
import socket
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nemo_popsd.errors import TransientError, UserError
from nemo_popsd.parallel.config import ParallelConfig
from tests.harness import run_ranks


@pytest.fixture
def distributed(monkeypatch):
    """The module, with no process group before and after."""
    from nemo_popsd.parallel import distributed as module

    assert not dist.is_initialized()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield module
    module.shutdown()
    assert not dist.is_initialized()


def _random_numbers() -> tuple[float, ...]:
    return (random.random(), float(np.random.rand()), torch.rand(1).item())


def test_one_process_needs_no_launcher(distributed):
    from megatron.core import parallel_state

    distributed.initialize(ParallelConfig(), seed=4)
    assert dist.get_world_size() == 1
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    assert parallel_state.get_data_parallel_world_size() == 1
    assert distributed.device() == torch.device("cpu")
    assert distributed.on_any_rank(True) is True
    assert distributed.on_any_rank(False) is False
    first = _random_numbers()
    distributed.initialize(ParallelConfig(), seed=4)
    assert _random_numbers() == first
    distributed.initialize(ParallelConfig(), seed=5)
    assert all(a != b for a, b in zip(_random_numbers(), first, strict=True))
    with pytest.raises(UserError, match=r"parallel\.tensor=2 with 1 rank;.*--nproc-per-node"):
        distributed.initialize(ParallelConfig(tensor=2), seed=4)


@pytest.mark.parametrize("cuda", [False, True])
def test_nccl_gets_the_device_of_its_rank(distributed, monkeypatch, cuda):
    """Without it, NCCL guesses a device at the first barrier, and several ranks may guess the same."""
    given: dict[str, Any] = {}

    class StopError(Exception):
        pass

    def init_process_group(backend: str, **options: Any) -> None:
        given.update(options, backend=backend)
        raise StopError

    monkeypatch.setattr(distributed, "adapt_megatron", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(distributed, "_store", lambda *_: None)
    monkeypatch.setattr(distributed.dist, "init_process_group", init_process_group)
    for name, value in (("RANK", "11"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "3"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(StopError):
        distributed.initialize(ParallelConfig(), seed=4)
    assert given["backend"] == ("nccl" if cuda else "gloo")
    assert given["device_id"] == (torch.device("cuda", 3) if cuda else None)


def test_groups_can_be_created_again_after_shutdown(distributed):
    from megatron.core import parallel_state

    for _ in range(2):
        distributed.initialize(ParallelConfig(), seed=4)
        distributed.shutdown()
        assert not dist.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()
    distributed.shutdown()


def test_the_variables_of_a_launcher_are_used(distributed, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    distributed.initialize(ParallelConfig(), seed=4)
    assert dist.get_backend() == "gloo"
    monkeypatch.setenv("WORLD_SIZE", "none")  # not read again
    distributed.initialize(ParallelConfig(), seed=4)


def _layouts(rank: int, world_size: int) -> dict[str, Any]:
    from megatron.core import parallel_state

    from nemo_popsd.parallel.distributed import initialize, on_any_rank

    result: dict[str, Any] = {}
    try:
        initialize(ParallelConfig(tensor=3), seed=4)
    except UserError as error:
        result["refusal"] = str(error)
    result["no groups"] = not parallel_state.model_parallel_is_initialized()
    for tensor in (2, 1):
        initialize(ParallelConfig(tensor=tensor), seed=4)
        result[f"tensor {tensor}"] = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_data_parallel_rank(),
        )
        result[f"random numbers {tensor}"] = _random_numbers()
        parallel_state.destroy_model_parallel()
    result["any"] = [on_any_rank(rank == 1), on_any_rank(rank == 0), on_any_rank(False), on_any_rank(True)]
    return result


def test_two_processes_get_the_groups_and_seeds_of_each_layout():
    results = run_ranks(_layouts, 2)
    for rank, result in enumerate(results):
        assert "parallel.tensor=3 with 2 ranks" in result["refusal"]
        assert result["no groups"]
        assert result["tensor 2"] == (2, rank, 1, 0)
        assert result["tensor 1"] == (1, 0, 2, rank)
        assert result["any"] == [True, True, False, True]
        assert result["random numbers 2"] == result["random numbers 1"] == results[0]["random numbers 1"]


def _wait_too_long(rank: int, world_size: int, group: str) -> float:
    """Rank 1 hangs; the seconds after which the collective of rank 0 fails."""
    import os
    import time
    from datetime import timedelta

    from megatron.core import parallel_state

    from nemo_popsd.parallel.distributed import initialize

    dist.destroy_process_group()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is the test's
    initialize(ParallelConfig(), seed=1, timeout=timedelta(seconds=3))
    chosen = parallel_state.get_data_parallel_group() if group == "data" else dist.group.WORLD
    dist.all_reduce(torch.ones(1), group=chosen)
    start = time.monotonic()
    if rank == 1:
        time.sleep(9)
        return 0.0
    with pytest.raises(RuntimeError, match=r"[Tt]imed out|Timeout|timeout"):
        dist.all_reduce(torch.ones(1), group=chosen)
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("group", ["world", "data"])
def test_a_rank_that_hangs_fails_the_others_in_time(group):
    waited, _ = run_ranks(_wait_too_long, 2, group)
    assert 2 < waited < 9


@pytest.mark.slow
def test_the_address_of_missing_ranks_is_logged_and_the_wait_ends(distributed, monkeypatch):
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    logged: list[str] = []
    monkeypatch.setattr(distributed.logger, "error", lambda text, *values: logged.append(text % values))
    monkeypatch.setattr(distributed, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(distributed, "_LONGEST_START", timedelta(seconds=1))
    with pytest.raises(
        TransientError, match=rf"rank 0 of 2: not all ranks of the run connected to MASTER_ADDR=127\.0\.0\.1.*{port}"
    ):
        distributed.initialize(ParallelConfig(), seed=4)
    assert logged == [
        f"rank 0 waits for the other ranks of WORLD_SIZE=2 at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}; for a single "
        "process `unset RANK WORLD_SIZE LOCAL_RANK`"
    ]
