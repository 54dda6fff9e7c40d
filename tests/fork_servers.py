"""Fork servers: processes with all imports done, from which ranks, commands and workers of pytest-xdist are forked.

    with forked_by(LOCAL):
        process.start()                     # process: CONTEXT.Process(...)

A server imports torch, megatron.core, NeMo and hypothesis once (`tests/preloaded.py`), and forked processes start in
tenths of a second. A server only imports: it has a single thread and no process group, so it can be forked safely.

The import of Megatron determines the layers of models. Processes with the layers of a GPU are forked from a second
server (`tests/te/preloaded.py`), which starts when first needed.

With pytest-xdist, both servers belong to the controller. Its workers share them (`share`, `use_shared`) and are forked
from the first one (`tests/forked_worker.py`). Otherwise the servers belong to the process that needs them. A server
ends with its owner, and is restarted if it has died.

A third server forks vLLM's servers. It runs in vLLM's environment, and so does its owner
(`tests/rollout/forked_vllm.py`), which starts when a test first needs it.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, forkserver, reduction, resource_tracker
from pathlib import Path
from typing import Any

from tests.environment import environment
from tests.rollout.vllm_location import PYTHON

LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"
"""Layers of a server: those on a machine without CUDA, or those on a GPU with emulated kernels (`tests.te`)."""
VLLM = "vllm"
"""The server in vLLM's environment."""
CONTEXT = multiprocessing.get_context("forkserver")
ROOT = Path(__file__).resolve().parents[1]
_PRELOADED = {
    LOCAL: "tests.preloaded",
    TRANSFORMER_ENGINE: "tests.te.preloaded",
    VLLM: "tests.rollout.preloaded_vllm",
}


class _OwnServer(forkserver.ForkServer):
    def __init__(self, layers: str) -> None:
        super().__init__()
        self.set_forkserver_preload([_PRELOADED[layers]])

    def ensure_running(self) -> None:
        # One thread each: the server must have no thread pool when it forks.
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with environment(**variables):
            super().ensure_running()

    def address(self) -> Any:
        """Address at which the server accepts fork requests."""
        self.ensure_running()
        return self._forkserver_address


class _OwnerInVllm:
    """The process in vLLM's environment that owns the server there."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._address = ""

    def address(self) -> str:
        """The address for `use_shared`; starts the process unless it runs."""
        from nemo_popsd.rollout.vllm.environment import server_environment

        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [PYTHON, str(ROOT / "tests" / "rollout" / "forked_vllm.py")],
                env=server_environment(os.environ, devices=None),  # libraries read it when they are imported
                stdin=subprocess.PIPE,  # it ends with this process
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._process.stdout is not None
            self._address = self._process.stdout.readline().strip()
        return self._address


class _SharedServer(forkserver.ForkServer):
    """A server that belongs to another process, the owner, which starts it when the address is requested."""

    def __init__(self, layers: str, owner: str) -> None:
        super().__init__()
        self._layers, self._owner = layers, owner

    def ensure_running(self) -> None:
        resource_tracker.ensure_running()
        self._forkserver_address = ask(self._owner, self._layers)
        # A forked process receives a descriptor that keeps the server alive. Here the owner keeps it alive.
        if self._forkserver_alive_fd is None:
            self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)


_servers: dict[str, Any] = {LOCAL: _OwnServer(LOCAL), TRANSFORMER_ENGINE: _OwnServer(TRANSFORMER_ENGINE)}
_servers[VLLM] = _OwnerInVllm()
_owner = ""
"""Address of the process that answers `ask`; empty until it is needed."""


def serve_own(layers: str) -> None:
    """Makes this process the owner of that server."""
    _servers[layers] = _OwnServer(layers)


def address() -> str:
    """The address for `use_shared` and `ask`: of the owner if the servers are shared, otherwise of this process."""
    global _owner
    if not _owner:
        listener = connection.Listener(family="AF_UNIX")
        threading.Thread(target=answer, args=(listener, _servers), name="fork-servers", daemon=True).start()
        _owner = str(listener.address)
    return _owner


def ask(owner: str, layers: str) -> Any:
    """Address at which the server of `owner` accepts requests to fork; for `VLLM`, the address of its owner."""
    with connection.Client(owner) as asked:
        asked.send(layers)
        return asked.recv()


def share() -> str:
    """Lets other processes use the servers of this one; returns the address for `use_shared`.

    The first server starts immediately, the others on request.
    """
    _servers[LOCAL].address()
    return address()


def answer(listener: connection.Listener, servers: dict[str, Any]) -> None:
    """Answers each connected process, which sends the name of a server, with the address of that server."""
    while True:
        try:
            asking = listener.accept()
        except OSError:  # the listener is closed
            return
        with asking, contextlib.suppress(OSError, EOFError):  # the requesting process may be killed
            asking.send(servers[asking.recv()].address())


def use_shared(owner: str) -> None:
    """Makes this process use the servers of the process with this address."""
    global _owner
    _owner = owner
    _servers.update({layers: _SharedServer(layers, owner) for layers in _PRELOADED})


@contextlib.contextmanager
def forked_by(layers: str) -> Iterator[None]:
    """A context in which the server with `layers`, started if necessary, forks the processes of `CONTEXT`.

    multiprocessing itself supports only one server.
    """
    before = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _servers[layers].connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = before


def run_forked(layers: str, run: Callable[..., None], *args: Any) -> int:
    """Calls ``run(*args)`` in a process forked by the server with `layers`, and returns its exit code.

    The process has the standard streams, the environment and the working directory of this one, and ends with it.
    """
    here = dict(os.environ), os.getcwd(), *map(Descriptor, range(3))
    process = CONTEXT.Process(target=_run, args=(run, args, *here))
    with forked_by(layers):
        process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(run: Callable[..., None], args: Sequence[Any], variables: dict[str, str], directory: str, *_: None) -> None:
    """In the forked process, whose descriptors are in place already."""
    die_with_parent(group=False)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(directory)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    try:
        run(*args)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Descriptor:
    """An open file of this process, passed as argument to a forked process, where it gets the same number.

    A server writes to the output of its owner. With descriptors 1 and 2, a forked process writes to the output of the
    caller, which pytest captures for the test.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _adopt, (reduction.DupFd(self.number), self.number)


def _adopt(duplicate: Any, number: int) -> None:
    descriptor = duplicate.detach()
    os.dup2(descriptor, number)
    os.close(descriptor)


def die_with_parent(*, group: bool = True) -> None:
    """Ends this process, and the process group that it leads, when the process that started it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        (os.killpg if group else os.kill)(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()
