import errno
import socket
import time

import pytest

from nemo_popsd.errors import TransientError, UserError
from nemo_popsd.parallel.launcher import Launch, check_rendezvous, rank, read_launch, restarts

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_process_without_a_launcher() -> None:
    assert read_launch({}) == Launch()
    assert read_launch({"MASTER_ADDR": "node7", "MASTER_PORT": "x"}) == Launch(), "of a batch job's shell"


def test_the_variables_of_torchrun_are_read() -> None:
    expected = Launch(rank=3, world_size=4, local_rank=1, address="127.0.0.1", port=29500)
    assert read_launch(TORCHRUN) == expected
    agent = read_launch(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert agent.agent_listens


@pytest.mark.parametrize(("text", "count"), [(None, 0), ("0", 0), ("2", 2), ("x", 0)])
def test_starts_again_are_counted(monkeypatch: pytest.MonkeyPatch, text: str | None, count: int) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if text is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", text)
    assert restarts() == count


def test_a_single_process_needs_no_rendezvous() -> None:
    assert read_launch({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "2"}) == Launch(local_rank=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": None, "LOCAL_RANK": None, "MASTER_ADDR": None}, "RANK='3' without WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": None, "LOCAL_RANK": None}, "WORLD_SIZE='4' without RANK, LOCAL_RANK"),
        ({"MASTER_PORT": None}, "without MASTER_PORT"),
        ({"MASTER_ADDR": ""}, "without MASTER_ADDR"),
        ({"RANK": ""}, "without RANK"),
        ({"RANK": "4"}, "RANK='4', WORLD_SIZE='4'; need a RANK below WORLD_SIZE"),
        ({"RANK": "-1"}, "RANK='-1'; need an integer of at least 0"),
        ({"RANK": "one"}, "RANK='one'"),
        ({"RANK": "\u0663"}, "need an integer"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'; need an integer of at least 1"),
        ({"WORLD_SIZE": "1e3"}, "WORLD_SIZE='1e3'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE="),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK='2', LOCAL_WORLD_SIZE='2'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536'; need an integer of at least 1 and at most 65535"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_contradictory_variables_are_refused_in_one_line(changes: dict[str, str | None], words: str) -> None:
    environment = {name: value for name, value in (TORCHRUN | changes).items() if value is not None}
    with pytest.raises(UserError) as error:
        read_launch(environment)
    assert words in str(error.value)
    assert "unset RANK WORLD_SIZE LOCAL_RANK" in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("text", "expected"), [("2", 2), ("x", 0), ("-1", 0), ("", 0)])
def test_the_rank_is_known_whatever_the_variable_contains(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: int
) -> None:
    monkeypatch.setenv("RANK", text)
    assert rank() == expected


def launch(**changes: object) -> Launch:
    return Launch(**({"rank": 0, "world_size": 2, "address": "127.0.0.1", "port": 29500} | changes))  # type: ignore[arg-type]


def test_a_port_in_use_is_reported_at_once() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(
            TransientError, match=f"MASTER_PORT={port}: another process uses this port; set MASTER_PORT"
        ):
            check_rendezvous(launch(port=port))
        assert time.monotonic() - start < 2
        check_rendezvous(launch(port=port, rank=1))
        check_rendezvous(launch(port=port, agent_listens=True))
        check_rendezvous(Launch())
    check_rendezvous(launch(port=port))


@pytest.mark.parametrize(
    ("number", "kind"), [(socket.EAI_NONAME, UserError), (socket.EAI_AGAIN, TransientError)], ids=["unknown", "passing"]
)
def test_an_unknown_host_is_reported_at_once(monkeypatch: pytest.MonkeyPatch, number: int, kind: type) -> None:
    def fail(*args: object, **options: object) -> None:
        raise socket.gaierror(number, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(
        kind, match=r"MASTER_ADDR=nowhere MASTER_PORT=29500.*Name or service not known.*set MASTER_ADDR"
    ):
        check_rendezvous(launch(address="nowhere", rank=1))


def test_a_port_at_which_this_user_cannot_listen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_server", fail)
    with pytest.raises(UserError, match=r"cannot listen \(Permission denied\).*set MASTER_PORT"):
        check_rendezvous(launch(port=80))
