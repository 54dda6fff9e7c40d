"""The leader's side of one vLLM server: starts it, sends requests, monitors it and ends it."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from nemo_popsd.errors import UserError, describe_error, is_transient
from nemo_popsd.rollout.vllm.environment import SERVER
from nemo_popsd.rollout.vllm.serving import popsd_wire as wire

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_PING_SECONDS = 60.0
_EXIT_SECONDS = 5.0
_STATUS_SECONDS = 1.0
_TAIL_LINES = 15


_DETERMINATE = frozenset(
    (
        "AssertionError",
        "AttributeError",
        "FileNotFoundError",
        "ImportError",
        "KeyError",
        "ModuleNotFoundError",
        "NotImplementedError",
        "PermissionError",
        "TypeError",
        "ValidationError",
        "ValueError",
    )
)
"""Types of errors that a restarted server would raise again while loading the student; others may not recur."""


class ServerLost(Exception):  # noqa: N818 not an error of the caller, which starts another server
    """The server died while loading or later, did not answer in time, or failed at a request. It has been stopped.

    Args:
        what: the failure.
        advice: the end of the server's log, if useful.
    """

    def __init__(self, what: str, advice: Sequence[str] = ()) -> None:
        super().__init__(what, tuple(advice))
        self.advice = tuple(advice)

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Launch:
    """How to start a server."""

    python: str
    """Python of vLLM's environment."""
    launcher: Sequence[str]
    """Command prefix."""
    environment: Mapping[str, str]
    """Environment variables of the server."""
    settings: wire.Settings
    """First message to the server; see `popsd_server.Server`."""
    log: Path
    """File to which its output is appended."""
    address: str
    """Address of the trainer, as seen from the server."""
    start_seconds: float
    """Seconds until it must be ready."""
    answer_seconds: float
    """Seconds until it must have answered a request."""

    @property
    def same_machine(self) -> bool:
        """Whether the server can open files in memory of this process."""
        return not self.launcher


class VllmServer:
    """A server that is ready. It ends with this object, with this process, or by `close`.

    Attributes:
        launch: how it was started.
        vllm: version of vLLM.
        interface: by which it receives weights.
        sleeps: whether it can release memory.
        pid: of the server's process, on its own machine.
        version: of its weights; None before the first update.
    """

    def __init__(self, launch: Launch) -> None:
        """Starts the server and waits until its model is loaded, with random weights.

        Raises:
            UserError: there is no such Python, it has no vLLM, or vLLM refuses the student or a setting.
            ServerLost: it died or was not ready in time; another one may succeed. The advice of both exceptions is the
                end of the log.
        """
        self.launch = launch
        self.version: int | None = None
        started = time.monotonic()
        deadline = started + launch.start_seconds
        token = secrets.token_hex(32)
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        host = launch.address if launch.launcher else "127.0.0.1"
        with (
            socket.create_server(("" if launch.launcher else host, 0)) as listener,
            launch.log.open("a", encoding="utf-8") as log,
        ):
            command = [*launch.launcher, launch.python, str(SERVER), "--connect", f"{host}:{listener.getsockname()[1]}"]
            self._process = _start(command, launch, token, log)
            self._end = weakref.finalize(self, _end, self._process, None)
            try:
                self._connection = self._accept(listener, token, deadline)
                self._end.detach()
                self._end = weakref.finalize(self, _end, self._process, self._connection)
                wire.send(self._connection, launch.settings)
                self.vllm = self._event("imported", deadline)["vllm"]
                ready = self._event("ready", deadline)
            except BaseException:
                self._end()
                raise
        self.interface, self.sleeps = ready["interface"], ready["sleeps"]
        logger.info(
            "vLLM %s is ready after %.0f s (weights by %s, log %s)",
            self.vllm,
            time.monotonic() - started,
            self.interface,
            launch.log,
        )

    @property
    def alive(self) -> bool:
        """Whether it is neither closed nor lost."""
        return self._end.alive

    def check_health(self) -> None:
        """Checks that the server answers.

        Raises:
            ServerLost: it did not answer within a minute.
        """
        self.ask({"request": "ping"}, seconds=_PING_SECONDS)

    def ask(
        self, request: wire.Request, payload: bytes | bytearray | memoryview = b"", *, seconds: float | None = None
    ) -> wire.Answer:
        """Sends a request and waits for its answer. Another thread may `close` meanwhile.

        Args:
            request: see `popsd_server`.
            payload: bytes that follow the request.
            seconds: time limit; None uses `launch.answer_seconds`.

        Raises:
            ServerLost: there is no answer, or the answer is an error, after which the server's state is unknown.
        """
        try:
            self._connection.settimeout(seconds or self.launch.answer_seconds)
            wire.send(self._connection, request, payload)
            answer = cast(wire.Answer, wire.receive(self._connection)[0])
        except (OSError, ValueError) as error:
            if not isinstance(error, TimeoutError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_STATUS_SECONDS)
            raise self._lost(f"{request['request']}: {type(error).__name__}: {error}{self._status()}") from error
        if "error" in answer:
            raise self._lost(f"{request['request']}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the server. Has no effect when it has ended already."""
        self._end()

    def _lost(self, what: str) -> ServerLost:
        self._end()
        return ServerLost(f"{what}; its log is {self.launch.log}")

    def _accept(self, listener: socket.socket, token: str, deadline: float) -> socket.socket:
        listener.settimeout(_POLL_SECONDS)
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                self._still_starting(deadline)
                continue
            connection.settimeout(_PING_SECONDS)
            with contextlib.suppress(OSError, ValueError):
                hello = cast(wire.Hello, wire.receive(connection)[0])
                if hmac.compare_digest(str(hello.get("token")), token) and hello.get("protocol") == wire.PROTOCOL:
                    self.pid = int(hello["pid"])
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return connection
            connection.close()  # not the server

    def _event(self, name: str, deadline: float) -> wire.Event:
        self._connection.settimeout(max(_POLL_SECONDS, deadline - time.monotonic()))
        try:
            event = cast(wire.Event, wire.receive(self._connection)[0])
        except TimeoutError:
            self._still_starting(deadline)
            raise self._not_ready() from None
        except (OSError, ValueError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_SECONDS)
            raise self._lost_at_start(f"it ended while it was loading{self._status()}") from None
        if event.get("event") == name:
            return event
        error = str(event.get("error", event))
        if event.get("stage") == "import":
            raise self._cannot_start(f"a Python that cannot import vLLM ({error})")
        if error.partition(":")[0] in _DETERMINATE:
            raise self._cannot_start(f"a vLLM that cannot load the student ({error})")
        raise self._lost_at_start(f"it failed while it was loading: {error}")

    def _still_starting(self, deadline: float) -> None:
        if self._process.poll() is not None:
            raise self._lost_at_start(f"it ended at once{self._status()}")
        if time.monotonic() >= deadline:
            raise self._not_ready()

    def _not_ready(self) -> ServerLost:
        seconds = self.launch.start_seconds
        return self._lost_at_start(f"it was not ready within rollout.vllm.start_seconds={seconds:g}")

    def _status(self) -> str:
        return "" if self._process.returncode is None else f", exit status {self._process.returncode}"

    def _cannot_start(self, got: str) -> UserError:
        return UserError(
            f"vLLM server of {self.launch.python}",
            got=got,
            need="a vLLM server that loads the student and answers",
            fix="see the end of its log below; set rollout.vllm.* or rollout.engine=megatron",
            advice=self._end_of_log(),
        )

    def _lost_at_start(self, what: str) -> ServerLost:
        return ServerLost(f"{what}; its log is {self.launch.log}", self._end_of_log())

    def _end_of_log(self) -> list[str]:
        return [f"{self.launch.log}:", *self.launch.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]]


def _start(command: list[str], launch: Launch, token: str, log: IO[str]) -> subprocess.Popen[str]:
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}", file=log, flush=True)
    try:
        process = subprocess.Popen(
            command,
            env=dict(launch.environment),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Signals from a terminal or a batch system are for the trainer only.
        )
    except OSError as error:
        if is_transient(error):
            raise ServerLost(f"{command[0]!r} cannot be run: {describe_error(error)}") from error
        raise UserError(
            "vLLM server",
            got=f"{command[0]!r}, which cannot be run ({error.strerror})",
            need="the Python of an environment with vLLM",
            fix="set rollout.vllm.python or rollout.vllm.launcher, or create an environment with `make vllm-env`",
        ) from None
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # It has ended already; this is reported later.
        process.stdin.write(token + "\n")  # not an argument, which other users can see
        process.stdin.close()
    return process


def _end(process: subprocess.Popen[str], connection: socket.socket | None) -> None:
    """Ends a server and its workers: closes the connection, at which the server exits, then kills what is left."""
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    if process.poll() is None and connection is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_EXIT_SECONDS)
