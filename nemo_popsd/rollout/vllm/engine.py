"""The rollout engine that uses vLLM. It is independent of Megatron: weights arrive as a stream of full tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from nemo_popsd.errors import START_AGAIN, StopRequested, TransientError, UserError
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from nemo_popsd.rollout.vllm.buckets import BucketSender
from nemo_popsd.rollout.vllm.ranks import Call, ServerRanks
from nemo_popsd.rollout.vllm.serving import popsd_wire as wire
from nemo_popsd.rollout.vllm.supervisor import ServerLost, VllmServer

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class WeightUpdate:
    """Measurements of the last transfer of weights."""

    version: int
    """Version of the weights."""
    seconds: float
    """Duration."""
    bytes: int
    """Size of the tensors."""
    tensors: int
    """Number of tensors."""
    buckets: int
    """Number of buckets; see `BucketSender`."""


@dataclass(frozen=True)
class PendingResponses:
    """Responses that a server is generating."""

    version: int
    """Version of the weights."""
    call: Call[list[wire.Response]]
    """Returns tokens and log-probabilities of each response."""


class VllmEngine:
    """Sends the student's weights to its vLLM server whenever they have changed, and generates responses there.

    There is one server per replica, started at the first use. The leader of the replica sends requests to it; the other
    ranks take part in gathering the weights and receive the responses. A lost server (dead, hung or failed) is
    restarted and receives the weights and the requests again. The seed of a request determines its response, so only
    time is lost.

    Attributes:
        server: the server; only on leaders, once it has been started.
        last_update: the last transfer; only on leaders, once weights have been sent.
    """

    def __init__(
        self,
        ranks: ServerRanks,
        *,
        start: Callable[[int], VllmServer],
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        weights_version: Callable[[], int],
        longest: Callable[[], int],
        bucket_bytes: int,
        restarts: int,
        sleep: bool,
        content: str = "weights",
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Keeps references only.

        Args:
            ranks: the ranks that use the server together.
            start: starts a server for sequences of up to the given number of tokens; called on leaders.
            weights: all tensors of the student under Hugging Face's names, or those of its adapters under PEFT's, the
                same on every rank; iterating is collective over `ranks.domain`.
            weights_version: returns the number of completed training steps.
            longest: returns the number of tokens of the longest expected sequence.
            bucket_bytes: see `BucketSender`.
            restarts: maximum number of restarts of a lost server in one call of `generate`.
            sleep: whether the server releases memory after each call.
            content: what `weights` yields, `weights` or `adapter`; see `BucketSender`.
            stop_requested: called while waiting, by all ranks of the model together; returns the same on each.
        """
        self._ranks = ranks
        self._start = start
        self._weights = weights
        self._weights_version = weights_version
        self._longest = longest
        self._bucket_bytes = bucket_bytes
        self._restarts = restarts
        self._sleep = sleep
        self._content = content
        self._stop_requested = stop_requested
        self._limit = 0
        self._has_served = False
        self._last: VllmPendingRollouts | None = None
        self.server: VllmServer | None = None
        self.last_update: WeightUpdate | None = None

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """See `nemo_popsd.rollout.engine.RolloutEngine`. Collective over the ranks that gather weights together.

        Raises:
            StopRequested: a stop of the run was requested; on all ranks.
            UserError: the server cannot be started, for a reason that the user can fix; on all ranks.
            TransientError: the server was lost more than `restarts` times, while loading or later; on all ranks.
            RuntimeError: a defect; on all ranks.
        """
        return self.submit(requests, sampling).result()

    def submit(self, requests: Sequence[Request], sampling: SamplingParams) -> VllmPendingRollouts:
        """See `nemo_popsd.rollout.engine.ConcurrentEngine`. Collective as `generate` is, and raises the same.

        A server handles one call at a time, so this first waits for responses that were requested before.
        """
        if self._last is not None and self._last.pending:
            self._last.result()
        self._last = VllmPendingRollouts(self, requests, sampling)
        return self._last

    def close(self) -> None:
        """Stops the server of this rank; the next call of `generate` starts another one."""
        if self.server is not None:
            self.server.close()
            self.server = None

    def request(self, requests: Sequence[Request], sampling: SamplingParams) -> PendingResponses:
        """Sends the live weights and the requests to the server. Collective over the domain.

        Raises:
            ServerLost: the server is lost; see also `generate`.
        """
        version = self._weights_version()
        _release_cached_memory()
        self._ranks.together(lambda: self._ensure_server(requests, sampling), stop_requested=self._stop_requested)
        if self._ranks.any(self.server is not None and self.server.version != version):
            self._send_weights(version)
        return PendingResponses(version, self._ranks.start(lambda: self._generate(requests, sampling, version)))

    def receive(self, pending: PendingResponses, sampling: SamplingParams) -> list[Rollout]:
        """Waits for the responses. Collective over the domain.

        Raises:
            ServerLost: the server is lost; see also `generate`.
        """
        answer = self._ranks.wait(pending.call, stop_requested=self._stop_requested)
        stops = sampling.stop_token_ids
        return [
            Rollout(tokens, log_probs, tokens[-1] not in stops, weights_version=pending.version)
            for tokens, log_probs in self._ranks.share(answer)
        ]

    def with_restarts(self, action: Callable[[], T], lost: list[str]) -> T:
        """Calls `action`, and repeats it at most `restarts` times if it loses the server.

        Args:
            action: raises `ServerLost` on all ranks or on none.
            lost: previous server failures for these requests; new ones are appended.

        Raises:
            TransientError: the server was lost more than `restarts` times; see also `generate`.
        """
        while True:
            try:
                return action()
            except StopRequested:
                self.close()  # It may be busy for a long time.
                raise
            except ServerLost as error:
                self._discard()
                lost.append(str(error))
                logger.warning("lost the vLLM server: %s", error)
                if len(lost) > self._restarts:
                    raise TransientError(
                        "rollouts by vLLM",
                        got=f"the server was lost {len(lost)} times (rollout.vllm.restarts={self._restarts}): {error}",
                        fix=f"{START_AGAIN}; if it happens again, set rollout.vllm.* or rollout.engine=megatron",
                        advice=[*lost, *error.advice],
                    ) from error

    def _ensure_server(self, requests: Sequence[Request], sampling: SamplingParams) -> None:
        needed = max((len(request.prompt) for request in requests), default=0) + sampling.max_response_tokens
        if self.server is not None and needed > self._limit:
            self.close()
        if self.server is None:
            self._limit = max(needed, self._longest())
            self.server = self._start_server()
        else:
            self.server.check_health()

    def _start_server(self) -> VllmServer:
        """Starts a server. Once one has loaded the model, failures count as a lost server, not as a user error."""
        try:
            server = self._start(self._limit)
        except UserError as error:
            if self._has_served:
                raise ServerLost(str(error), error.advice) from error
            raise
        self._has_served = True
        return server

    def _send_weights(self, version: int) -> None:
        """Sends the weights to the servers of the domain. Collective over the domain even if servers are lost."""
        start = time.monotonic()
        failure: Exception | None = None
        sender: BucketSender | None = None
        try:
            if self.server is not None:
                sender = BucketSender(self.server, self._bucket_bytes, content=self._content)
        except Exception as error:
            failure = error
        for name, tensor in self._weights():  # Every rank iterates to the end: it is collective.
            try:
                if sender is not None and failure is None:
                    sender.add(name, tensor)
            except Exception as error:
                failure = error

        def commit() -> None:
            if failure is not None:
                raise failure
            assert sender is not None
            sender.commit(version)
            seconds = time.monotonic() - start
            update = WeightUpdate(version, seconds, sender.bytes, sender.tensors, sender.buckets)
            self.last_update = update
            logger.info(
                "weights of step %d are in vLLM: %d MB in %d buckets, %.2f s",
                version,
                update.bytes // 2**20,
                update.buckets,
                seconds,
            )

        self._ranks.together(commit)

    def _generate(self, requests: Sequence[Request], sampling: SamplingParams, version: int) -> list[wire.Response]:
        if not requests:
            return []
        assert self.server is not None
        answer = self.server.ask(
            {
                "request": "generate",
                "requests": _with_siblings(requests, greedy=sampling.temperature == 0),
                "sampling": {
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "top_k": sampling.top_k,
                    "max_tokens": sampling.max_response_tokens,
                    "stop_token_ids": sorted(sampling.stop_token_ids),
                },
            }
        )
        responses = answer["responses"]
        if answer["version"] != version or len(responses) != len(requests):
            raise RuntimeError(
                f"{len(responses)} responses by weights of step {answer['version']}, expected {len(requests)} "
                f"by those of step {version}"
            )
        if self._sleep and self.server.sleeps:
            self.server.ask({"request": "sleep"})
        return responses

    def _discard(self) -> None:
        """Closes the server if it is lost. It may still be alive if the server of another replica was lost."""
        if self.server is not None and not self.server.alive:
            self.close()


def _with_siblings(requests: Sequence[Request], *, greedy: bool) -> list[tuple[list[int], int, int]]:
    """Prompts with the seed of their first response and their number of responses, in the order of `requests`.

    Consecutive requests with the same prompt and consecutive seeds are merged (`sibling_seeds`), except in greedy
    decoding, for which vLLM refuses several responses per request.
    """
    merged: list[tuple[list[int], int, int]] = []
    for request in requests:
        prompt = list(request.prompt)
        if merged and not greedy and (prompt, request.seed) == (merged[-1][0], sum(merged[-1][1:])):
            merged[-1] = (prompt, merged[-1][1], merged[-1][2] + 1)
        else:
            merged.append((prompt, request.seed, 1))
    return merged


def _release_cached_memory() -> None:
    """Releases the device memory that torch caches, for a server on this GPU that starts or wakes up."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        logger.info("device memory for vLLM: %.1f of %.1f GiB are free", free / 2**30, total / 2**30)


class VllmPendingRollouts:
    """Responses that a server generates while the ranks do other work; see `VllmEngine.submit`."""

    def __init__(self, engine: VllmEngine, requests: Sequence[Request], sampling: SamplingParams) -> None:
        """Sends the requests. Collective over the domain."""
        self._engine = engine
        self._requests = requests
        self._sampling = sampling
        self._lost: list[str] = []
        self._rollouts: list[Rollout] | None = None
        self._pending: PendingResponses | None = engine.with_restarts(self._request, self._lost)

    @property
    def pending(self) -> bool:
        """Whether `result` has not been called yet."""
        return self._pending is not None

    def result(self) -> list[Rollout]:
        """The rollouts, in the order of the requests; later calls return the same. Collective over the domain.

        If the server was lost, another one generates them with the current weights.

        Raises:
            StopRequested, UserError, TransientError, RuntimeError: see `VllmEngine.generate`.
        """
        if self._rollouts is None:
            self._rollouts = self._engine.with_restarts(self._receive, self._lost)
        return self._rollouts

    def _request(self) -> PendingResponses:
        return self._engine.request(self._requests, self._sampling)

    def _receive(self) -> list[Rollout]:
        pending, self._pending = self._pending or self._request(), None  # Requested again after a loss.
        return self._engine.receive(pending, self._sampling)
