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
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection, forkserver, reduction, resource_tracker
from pathlib import Path
from typing import Any

from tests.environment import environment

LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"
"""Layers of a server: those on a machine without CUDA, or those on a GPU with emulated kernels (`tests.te`)."""
CONTEXT = multiprocessing.get_context("forkserver")
ROOT = Path(__file__).resolve().parents[1]
_PRELOADED = {LOCAL: "tests.preloaded", TRANSFORMER_ENGINE: "tests.te.preloaded"}


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


class _SharedServer(forkserver.ForkServer):
    """A server that belongs to another process, the owner, which starts it when the address is requested."""

    def __init__(self, layers: str, owner: str) -> None:
        super().__init__()
        self._layers, self._owner = layers, owner

    def ensure_running(self) -> None:
        resource_tracker.ensure_running()
        with connection.Client(self._owner) as owner:
            owner.send(self._layers)
            self._forkserver_address = owner.recv()
        # A forked process receives a descriptor that keeps the server alive. Here the owner keeps it alive.
        if self._forkserver_alive_fd is None:
            self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)


_servers: dict[str, Any] = {layers: _OwnServer(layers) for layers in _PRELOADED}


def share() -> str:
    """Lets other processes use the servers of this one; returns the address for `use_shared`.

    The first server starts immediately, the second on request.
    """
    listener = connection.Listener(family="AF_UNIX")
    _servers[LOCAL].address()
    threading.Thread(target=answer, args=(listener, _servers), name="fork-servers", daemon=True).start()
    return str(listener.address)


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
    """Makes this process use the servers of the process that called `share`."""
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
