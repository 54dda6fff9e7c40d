"""The ranks that use one server together: one speaks to it, all learn what came of it, none waits for the dead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from nemo_popsd.errors import StopRequested, UserError
from nemo_popsd.rollout.vllm.supervisor import ServerLost

T = TypeVar("T")

_LOOK_SECONDS = 0.1
_RUNNING = ("running", None)
_DONE = ("done", None)
# Told first: what a user can fix, then a defect, then a server that another one replaces.
_ORDER = ("user", "defect", "lost")


@dataclass(frozen=True)
class ServerRanks:
    """Process groups of CPU objects (gloo), so that waiting for a server holds up no accelerator.

    A group that is None has this rank alone.
    """

    replica: Any
    """The ranks that hold one copy of the model and have the same rows; the first of them speaks to the server."""
    domain: Any
    """The ranks that must gather weights together: the replica, or under expert parallelism the world."""
    number: int
    """Of the replica, which is that of its server."""

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks to the server."""
        return self.replica is None or dist.get_rank(self.replica) == 0

    def together(self, action: Callable[[], T], *, stop_requested: Callable[[], bool] = lambda: False) -> T | None:
        """Has the speaking ranks call `action`, in a thread, and waits for them; see `start` and `wait`."""
        return self.wait(self.start(action), stop_requested=stop_requested)

    def start(self, action: Callable[[], T]) -> Call[T]:
        """Begins `action` on the speaking ranks, in a thread. Not collective.

        Args:
            action: without collectives.
        """
        return Call(action if self.is_leader else None)

    def wait(self, call: Call[T], *, stop_requested: Callable[[], bool] = lambda: False) -> T | None:
        """What came of `call`, for which all ranks wait while they look after each other.

        Collective over the domain: one gather of small objects every tenth of a second, or when all have finished.

        Args:
            call: begun by all ranks of the domain.
            stop_requested: asked at every look by all ranks, which are told the same.

        Returns:
            What the action returned here; None on ranks that do not speak.

        Raises:
            StopRequested: on all ranks; the action may still be running.
            UserError, ServerLost: some rank's action raised it; on all ranks.
            RuntimeError: something else was raised; on all ranks.
        """
        while True:
            finished = call.wait(_LOOK_SECONDS)
            outcomes = self._gather(call.outcome if finished else _RUNNING)
            failures = [outcome for outcome in outcomes if outcome[0] in _ORDER]
            running = _RUNNING in outcomes
            if failures and not running:
                _, told = min(failures, key=lambda outcome: _ORDER.index(outcome[0]))
                raise told from (call.error if told is not call.error else None)
            if not running:
                return call.result
            if stop_requested():
                raise StopRequested

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank of the domain. Collective over it: one gather of objects."""
        return any(self._gather(flag))

    def share(self, answer: T | None) -> T:
        """What the speaking rank has, on every rank of the replica: one broadcast of an object."""
        box = [answer]
        if self.replica is not None:
            dist.broadcast_object_list(box, src=dist.get_global_rank(self.replica, 0), group=self.replica)
        (shared,) = box
        assert shared is not None
        return shared

    def _gather(self, mine: Any) -> list[Any]:
        if self.domain is None:
            return [mine]
        told: list[Any] = [None] * dist.get_world_size(self.domain)
        dist.all_gather_object(told, mine, group=self.domain)
        return told


class Call(Generic[T]):
    """An action in a thread of its own, and what came of it.

    Attributes:
        result: what it returned; None before that, and where there is no action.
        error: what it raised.
    """

    def __init__(self, action: Callable[[], T] | None) -> None:
        """Begins `action`, if there is one."""
        self.result: T | None = None
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None
        if action is not None:
            self._thread = threading.Thread(target=self._run, args=(action,), name="vLLM", daemon=True)
            self._thread.start()

    def _run(self, action: Callable[[], T]) -> None:
        try:
            self.result = action()
        except Exception as error:
            self.error = error

    def wait(self, seconds: float) -> bool:
        """Whether it has finished, which is waited for so long."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    @property
    def outcome(self) -> tuple[str, Exception | None]:
        """What another process may learn: a kind, and what is to be raised there."""
        if self.error is None:
            return _DONE
        if isinstance(self.error, UserError):
            return "user", self.error
        if isinstance(self.error, ServerLost):
            return "lost", self.error
        return "defect", RuntimeError(f"vLLM engine: {type(self.error).__name__}: {self.error}")
