"""Servers that do not start end in one error, on every rank, and leave nothing behind. No vLLM is needed here."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.errors import StopRequested, TransientError, UserError
from nemo_popsd.rollout.engine import Request, SamplingParams
from nemo_popsd.rollout.vllm import supervisor
from nemo_popsd.rollout.vllm.config import VllmConfig
from nemo_popsd.rollout.vllm.engine import VllmEngine
from nemo_popsd.rollout.vllm.environment import SERVER, check_environment, server_environment
from nemo_popsd.rollout.vllm.ranks import ServerRanks
from nemo_popsd.rollout.vllm.supervisor import Launch, ServerLost, VllmServer
from tests.harness import run_ranks
from tests.rollout.vllm_servers import gone

REPLYING_SERVER = """
import json, os, signal, socket, sys, time
sys.path.insert(0, {folder!r})
import popsd_wire as wire
token = sys.stdin.readline().strip()
host, _, port = sys.argv[-1].rpartition(":")
connection = socket.create_connection((host, int(port)))
wire.send(connection, {{"token": token if {honest} else "guessed", "protocol": wire.PROTOCOL, "pid": os.getpid()}})
settings = wire.receive(connection)[0]
wire.send(connection, {{"event": "imported", "vllm": "0.0"}})
wire.send(connection, {{"event": "ready", "interface": "none", "sleeps": False}})
while True:
    request = wire.receive(connection)[0]
    {answer}
"""
"""A program that follows the protocol until the first request, for which it runs `answer`."""


def launch(tmp_path: Path, python: str, *, start_seconds: float = 30, answer_seconds: float = 30) -> Launch:
    return Launch(
        python=python,
        launcher=[],
        environment=server_environment(os.environ, None),
        settings={"arguments": {}, "interface": "auto", "sleep": False, "adapter": None},
        log=tmp_path / "logs" / "server-0.log",
        address="127.0.0.1",
        start_seconds=start_seconds,
        answer_seconds=answer_seconds,
    )


def program(tmp_path: Path, text: str) -> str:
    """An executable in place of vLLM's Python."""
    path = tmp_path / "python"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def replying_server(tmp_path: Path, answer: str, *, honest: bool = True) -> str:
    text = REPLYING_SERVER.format(folder=str(SERVER.parent), honest=honest, answer=answer)
    return program(tmp_path, f"#!{sys.executable}\n{text}")


def test_a_missing_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be run.*rollout\.vllm\.python.*make vllm-env"):
        VllmServer(launch(tmp_path, str(tmp_path / "nowhere")))


def test_a_python_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot import vLLM .*No module named 'vllm'") as printed:
        VllmServer(launch(tmp_path, sys.executable))
    assert any("ModuleNotFoundError" in line for line in printed.value.advice), "the end of the log"


def test_a_server_that_ends_at_once_is_lost(tmp_path: Path) -> None:
    python = program(tmp_path, "#!/bin/sh\necho no such device\nexit 7\n")
    with pytest.raises(ServerLost, match="ended at once, exit status 7") as printed:
        VllmServer(launch(tmp_path, python))
    assert "no such device" in printed.value.advice


def test_a_silent_server_is_lost(tmp_path: Path) -> None:
    python = program(tmp_path, "#!/bin/sh\necho $$ > $(dirname $0)/pid\nsleep 300\n")
    started = time.monotonic()
    with pytest.raises(ServerLost, match=r"not ready within rollout\.vllm\.start_seconds=1"):
        VllmServer(launch(tmp_path, python, start_seconds=1))
    assert time.monotonic() - started < 10
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_connection_without_the_token_is_refused(tmp_path: Path) -> None:
    python = replying_server(tmp_path, "pass", honest=False)
    with pytest.raises(ServerLost, match=r"ended at once|not ready within"):
        VllmServer(launch(tmp_path, python, start_seconds=3))


LOADER = """
import os, signal, socket, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import popsd_wire as wire
token = sys.stdin.readline().strip()
host, _, port = sys.argv[-1].rpartition(":")
connection = socket.create_connection((host, int(port)))
wire.send(connection, {{"token": token, "protocol": wire.PROTOCOL, "pid": os.getpid()}})
settings = wire.receive(connection)[0]
wire.send(connection, {{"event": "imported", "vllm": "0.0"}})
starts = Path(__file__).with_name("starts")
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
event = {events!r}[min(number, len({events!r}) - 1)]
if event == "die":
    print("loading half of it", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if event != "ready":
    wire.send(connection, {{"event": "failed", "stage": "load", "error": event}})
    wire.receive(connection)
wire.send(connection, {{"event": "ready", "interface": "none", "sleeps": False}})
version = None
while True:
    request = wire.receive(connection)[0]
    version = request.get("version", version)
    if request["request"] == "generate" and number < {lost_at_requests}:
        os.kill(os.getpid(), signal.SIGKILL)
    responses = [[[5], [-0.5]] for _ in request.get("requests", [])]
    wire.send(connection, {{"version": version, "responses": responses}})
"""
"""A program whose start number n ends with event n, and which then generates."""


def loader(tmp_path: Path, *events: str, restarts: int = 2, lost_at_requests: int = 0) -> VllmEngine:
    """The engine of one rank whose servers run `LOADER`."""
    text = LOADER.format(folder=str(SERVER.parent), events=events, lost_at_requests=lost_at_requests)
    python = program(tmp_path, f"#!{sys.executable}\n{text}")
    return VllmEngine(
        ServerRanks(replica=None, domain=None, index=0),
        start=lambda limit: VllmServer(launch(tmp_path, python)),
        weights=list,
        weights_version=lambda: 3,
        longest=lambda: 8,
        bucket_bytes=1024,
        restarts=restarts,
        sleep=False,
    )


def generate(engine: VllmEngine) -> list[list[int]]:
    rollouts = engine.generate([Request([1, 2], 1)], SamplingParams(0.0, 1.0, 0, 4, frozenset()))
    engine.close()
    return [rollout.response for rollout in rollouts]


OUT_OF_MEMORY = "OutOfMemoryError: CUDA out of memory"


@pytest.mark.parametrize("event", ["die", OUT_OF_MEMORY])
def test_a_server_that_fails_while_it_loads_is_started_again(tmp_path: Path, event: str) -> None:
    assert generate(loader(tmp_path, event, "ready")) == [[5]]
    assert (tmp_path / "starts").read_text() == "xx"


def test_a_server_that_never_loads_is_a_transient_error(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"lost 3 times \(rollout\.vllm\.restarts=2\): it ended while") as printed:
        generate(loader(tmp_path, "die"))
    assert (tmp_path / "starts").read_text() == "xxx"
    assert "loading half of it" in printed.value.advice, "the end of the log"


def test_a_student_that_vllm_refuses_is_a_user_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load the student .ValueError: no such architecture"):
        generate(loader(tmp_path, "ValueError: no such architecture"))
    assert (tmp_path / "starts").read_text() == "x"


def test_a_failure_after_a_server_has_loaded_is_not_a_user_error(tmp_path: Path) -> None:
    events = ("ready", "ValueError: Free memory on device is less than desired", "ready")
    assert generate(loader(tmp_path, *events, lost_at_requests=1)) == [[5]]
    assert (tmp_path / "starts").read_text() == "xxx"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "printed"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "generate: .*exit status -9"),
        ("time.sleep(300)", "generate: TimeoutError"),
        ("wire.send(connection, {'error': 'ValueError: too long'})", "generate: ValueError: too long"),
        ("connection.sendall(b'x' * 64)", "generate: ValueError"),
    ],
    ids=["dies", "hangs", "fails", "sends garbage"],
)
def test_a_server_that_fails_at_a_request_is_lost_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, printed: str
) -> None:
    monkeypatch.setattr(supervisor, "_EXIT_SECONDS", 1.5)  # one of them never exits by itself
    server = VllmServer(launch(tmp_path, replying_server(tmp_path, answer), answer_seconds=1))
    with pytest.raises(ServerLost, match=printed):
        server.ask({"request": "generate"})
    assert not server.alive
    assert gone(server.pid)
    with pytest.raises(ServerLost):
        server.check_health()


def test_a_server_ends_with_its_trainer_and_its_object(tmp_path: Path) -> None:
    answer = "wire.send(connection, {'version': None})"
    server = VllmServer(launch(tmp_path, replying_server(tmp_path, answer)))
    server.check_health()
    pid = server.pid
    del server
    assert gone(pid)


def test_another_thread_can_end_a_server_during_a_request(tmp_path: Path) -> None:
    server = VllmServer(launch(tmp_path, replying_server(tmp_path, "time.sleep(300)")))
    threading.Timer(0.3, server.close).start()
    started = time.monotonic()
    with pytest.raises(ServerLost):
        server.ask({"request": "generate"})
    assert time.monotonic() - started < 15


def test_servers_do_not_inherit_rank_and_module_path() -> None:
    own = {
        "PATH": "/bin",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "here",
        "PYTHONPATH": "/trainer",
        "VIRTUAL_ENV": "/venv",
        "TORCHELASTIC_RUN_ID": "x",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # a server that sleeps refuses it
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    }
    server = server_environment(own, "2,3")
    assert server["PATH"] == "/bin"
    assert server["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert server["PYTHONPATH"] == str(SERVER.parent)
    withheld = own.keys() - {"PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES"}
    assert not withheld & server.keys()
    assert server_environment(own, None)["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


@pytest.mark.parametrize(
    ("version", "printed"),
    [
        ("0.14.1", None),
        ("0.32.0+cpu", None),
        ("1.0", None),
        ("0.14.0", "vLLM 0.14.0"),
        ("0.9.2", "0.9.2"),
        ("", "no vLLM"),
    ],
)
def test_versions_of_vllm_are_accepted_or_refused(tmp_path: Path, version: str, printed: str | None) -> None:
    config = VllmConfig(python=program(tmp_path, f"#!/bin/sh\necho {version}\n"))
    if printed is None:
        assert check_environment(config) == version
        return
    with pytest.raises(UserError, match=f"{printed}.*0.14.1 or newer.*make vllm-env"):
        check_environment(config)


def test_the_environment_of_another_machine_is_not_checked() -> None:
    assert check_environment(VllmConfig(python="/not/here", launcher=["srun"])) is None


# Ranks


def together(rank: int, world_size: int, case: str) -> Any:
    """What a rank gets from an action that only the leader runs."""
    import torch.distributed as dist

    group = dist.group.WORLD
    ranks = ServerRanks(replica=group, domain=group, index=0)
    actions: dict[str, Callable[[], Any]] = {
        "answer": lambda: [rank, "first"],
        "user": lambda: (_ for _ in ()).throw(UserError("x", got="1", need="2", fix="3", advice=["look"])),
        "lost": lambda: (_ for _ in ()).throw(ServerLost("gone", ["its log"])),
        "defect": lambda: {}["missing"],
        "slow": lambda: time.sleep(20),
    }
    checks = [0]

    def stop() -> bool:
        checks[0] += 1
        return case == "slow" and checks[0] > 3

    try:
        return ranks.share(ranks.together(actions[case], stop_requested=stop)), ranks.any(rank == 1)
    except (UserError, ServerLost, RuntimeError, StopRequested) as error:
        return type(error).__name__, str(error), getattr(error, "advice", ())


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("answer", ([0, "first"], True)),
        ("user", ("UserError", "x: got 1; need 2; 3", ("look",))),
        ("lost", ("ServerLost", "gone", ("its log",))),
        ("defect", ("RuntimeError", "vLLM engine: KeyError: 'missing'", ())),
        ("slow", ("StopRequested", "", ())),
    ],
)
def test_every_rank_gets_the_outcome(case: str, expected: Any) -> None:
    assert run_ranks(together, 2, case, timeout=90) == [expected, expected]


def cannot_start(rank: int, world_size: int, output: Path) -> Any:
    from nemo_popsd.embedded.names import asset
    from tests.rollout.vllm_servers import engine, settings
    from tests.tiny_models import build_student

    student = build_student(asset("nemo_popsd:tiny_reasoner"), tensor=2)
    vllm = engine(settings(output, f"rollout.vllm.python={sys.executable}"), student)
    try:
        vllm.generate([Request([1, 2, 3], 1)], SamplingParams(0.0, 1.0, 0, 4, frozenset()))
    except UserError as error:
        return str(error), error.advice
    return None


@pytest.mark.slow
def test_no_rank_waits_for_a_server_that_cannot_start(tmp_path: Path) -> None:
    printed = run_ranks(cannot_start, 2, tmp_path, timeout=90)
    assert printed[0] == printed[1]
    assert "cannot import vLLM" in printed[0][0]
    assert (tmp_path / "vllm" / "server-0.log").is_file()
