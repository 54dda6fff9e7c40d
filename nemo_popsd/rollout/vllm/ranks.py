"""The ranks that use one vLLM server together: their leader sends requests, and all ranks see results and failures."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from threading import Thread
from typing import TypeAlias, TypeVar

import torch.distributed as dist

from nemo_popsd.errors import StopRequested, UserError
from nemo_popsd.rollout.vllm.supervisor import ServerLost

T = TypeVar("T")
Call: TypeAlias = "futures.Future[T | None]"
"""An action that runs in a thread of a leader; already done, with None, on the other ranks."""
Outcome: TypeAlias = tuple[str, Exception | None]
"""State of a call for other processes, and the exception to raise there."""

_POLL_SECONDS = 0.1
_RUNNING: Outcome = ("running", None)
_DONE: Outcome = ("done", None)
# The order in which failures are raised: one that the user can fix, a defect, a lost server.
_FAILURES = ("user", "defect", "lost")


@dataclass(frozen=True)
class ServerRanks:
    """Process groups for CPU objects (gloo), so that waiting for a server does not block an accelerator.

    A group of None contains only this rank.
    """

    replica: dist.ProcessGroup | None
    """The ranks that hold one copy of the model and have the same prompts; the first of them is the leader."""
    domain: dist.ProcessGroup | None
    """The ranks that must gather weights together: the replica, or under expert parallelism the world."""
    index: int
    """Index of the replica and of its server."""

    @property
    def is_leader(self) -> bool:
        """Whether this rank sends requests to the server."""
        return self.replica is None or dist.get_rank(self.replica) == 0

    def together(self, action: Callable[[], T], *, stop_requested: Callable[[], bool] = lambda: False) -> T | None:
        """Runs `action` in a thread of each leader and waits for all of them; see `start` and `wait`."""
        return self.wait(self.start(action), stop_requested=stop_requested)

    def start(self, action: Callable[[], T]) -> Call[T]:
        """Starts `action` in a thread of the leader. Not collective.

        Args:
            action: must not use collectives.
        """
        call: Call[T] = futures.Future()
        if self.is_leader:
            # A daemon, unlike the threads of an executor: a process that ends does not wait for a server.
            Thread(target=_run, args=(call, action), name="vLLM", daemon=True).start()
        else:
            call.set_result(None)
        return call

    def wait(self, call: Call[T], *, stop_requested: Callable[[], bool] = lambda: False) -> T | None:
        """Waits until `call` has ended on all ranks, and returns its result.

        Collective over the domain: one gather of small objects every tenth of a second, or when all have ended.

        Args:
            call: started by all ranks of the domain.
            stop_requested: called before each further wait by all ranks; returns the same on each.

        Returns:
            The result of the action; None on ranks that are not leaders.

        Raises:
            StopRequested: on all ranks; the action may still be running.
            UserError, ServerLost: an action raised it on some rank; raised on all ranks.
            RuntimeError: an action raised another exception; raised on all ranks.
        """
        while True:
            ended, _ = futures.wait([call], _POLL_SECONDS)
            outcomes = self._gather(_outcome(call) if ended else _RUNNING)
            if _RUNNING not in outcomes:
                failures = [outcome for outcome in outcomes if outcome[0] in _FAILURES]
                if not failures:
                    return call.result()
                _, failure = min(failures, key=lambda outcome: _FAILURES.index(outcome[0]))
                assert failure is not None
                own = call.exception()
                raise failure from (own if failure is not own else None)
            if stop_requested():
                raise StopRequested

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank of the domain. Collective over it: one gather of objects."""
        return any(self._gather(flag))

    def share(self, answer: T | None) -> T:
        """The leader's `answer`, on every rank of the replica: one broadcast of an object."""
        box = [answer]
        if self.replica is not None:
            dist.broadcast_object_list(box, src=dist.get_global_rank(self.replica, 0), group=self.replica)
        (shared,) = box
        assert shared is not None
        return shared

    def _gather(self, own: T) -> list[T]:
        """`own` of every rank of the domain."""
        if self.domain is None:
            return [own]
        gathered = [own] * dist.get_world_size(self.domain)
        dist.all_gather_object(gathered, own, group=self.domain)
        return gathered


def _run(call: Call[T], action: Callable[[], T]) -> None:
    try:
        call.set_result(action())
    except BaseException as error:  # The ranks wait until the call ends, whatever ended it.
        call.set_exception(error)


def _outcome(call: Call[T]) -> Outcome:
    """The outcome of a call that has ended."""
    error = call.exception()
    if error is None:
        return _DONE
    if isinstance(error, UserError):
        return "user", error
    if isinstance(error, ServerLost):
        return "lost", error
    return "defect", RuntimeError(f"vLLM engine: {type(error).__name__}: {error}")
