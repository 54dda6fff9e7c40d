"""Errors of communication libraries after the loss of a rank."""

import pytest
import torch.distributed as dist

from nemo_popsd.cli.failures import as_lost_peer
from nemo_popsd.config.schema import PopsdConfig

GLOO = "[../third_party/gloo/gloo/transport/tcp/"


@pytest.fixture(autouse=True)
def _second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "h", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{GLOO}pair.cc:534] Connection closed by peer [127.0.0.1]:31337"),
        RuntimeError(f"{GLOO}pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"),
        RuntimeError(f"{GLOO}buffer.cc:1] Application timeout caused pair closure".replace("timeout", "end")),
        dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited or there was a network error"),
        dist.DistNetworkError("Connection was likely closed. Did the remote server shutdown or crash?"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
    ],
    ids=lambda error: str(error)[-30:],
)
def test_the_error_after_a_peer_has_ended(error: Exception) -> None:
    printed = as_lost_peer(error, command="train", config=PopsdConfig())
    assert str(printed).startswith(
        "collective on rank 1 of 2: another rank has ended, or the connection to it is lost; "
    )
    assert printed is not None
    assert str(error)[:40] in printed.advice[0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"),
        dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"),
        dist.DistStoreError("wait timeout after 8000ms, keys: /default_pg/0//cuda/0"),
    ],
    ids=lambda error: str(error)[-30:],
)
def test_the_error_after_a_time_out_names_the_setting(error: Exception) -> None:
    config = PopsdConfig()
    config.training.collective_timeout = 8
    assert "waited longer than training.collective_timeout=8 s" in str(
        as_lost_peer(error, command="train", config=config)
    )
    assert "collective_timeout=8" not in str(as_lost_peer(error, command="evaluate", config=config))
    assert "longer than its time limit" in str(as_lost_peer(error, command="export", config="checkpoint"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ValueError("gloo: Connection closed by peer"),
        dist.DistBackendError(
            "NCCL error: invalid usage. Duplicate GPU detected : rank 1 and rank 0 both on CUDA device"
        ),
        KeyError("timeout"),
    ],
    ids=lambda error: str(error)[-30:],
)
def test_defects_are_not_converted(error: Exception) -> None:
    assert as_lost_peer(error, command="train", config=PopsdConfig()) is None


def test_a_time_out_of_nccl_names_the_flight_recorders_files() -> None:
    config = PopsdConfig(output="runs/x")
    nccl = dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)")
    printed = as_lost_peer(nccl, command="train", config=config)
    assert printed is not None
    [line] = [line for line in printed.advice if "torchfrtrace" in line]
    assert "runs/x/dumps/flight-rank-*" in line
    gloo = as_lost_peer(RuntimeError(f"{GLOO}x.cc:78] Timed out waiting"), command="train", config=config)
    assert gloo is not None
    assert not any("torchfrtrace" in line for line in gloo.advice)
