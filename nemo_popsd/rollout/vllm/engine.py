"""The rollout engine that draws from vLLM. Knows nothing of Megatron: weights come as a stream of full tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemo_popsd.errors import START_AGAIN, StopRequested, TransientError, UserError
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from nemo_popsd.rollout.vllm.buckets import BucketSender
from nemo_popsd.rollout.vllm.ranks import Call, ServerRanks
from nemo_popsd.rollout.vllm.supervisor import ServerLost, VllmServer

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class WeightUpdate:
    """What the last transfer of weights took."""

    version: int
    seconds: float
    bytes: int
    tensors: int
    buckets: int


@dataclass(frozen=True)
class Asked:
    """What a server is drawing."""

    version: int
    """Of the weights."""
    call: Call[list[tuple[Any, Any]]]
    """Ends when it has drawn all; with tokens and log-probabilities of each response."""


class VllmEngine:
    """Sends the student's weights to its vLLM server whenever they have changed, and has the server draw.

    One server for each replica, started at the first use. The first rank of the replica speaks to it; the others help
    to gather the weights and are told the responses. A server that is lost (it died, hung or failed) is started anew,
    gets the weights again and is asked again; a request's seed determines its response, so nothing is lost but time.

    Attributes:
        server: on ranks that speak, once it was needed.
        last_update: on ranks that speak, once weights were sent.
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
        kind: str = "weights",
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Keeps references only.

        Args:
            ranks: that use the server together.
            start: starts a server for sequences of up to so many tokens; called on ranks that speak.
            weights: all tensors of the student under Hugging Face's names, or those of its adapters under PEFT's, the
                same on every rank; iterating is collective over `ranks.domain`.
            weights_version: number of optimizer steps behind the current weights.
            longest: tokens of the longest sequence that is to be expected.
            bucket_bytes: see `BucketSender`.
            restarts: of a lost server, for one call of `generate`.
            sleep: let the server give memory back after each call.
            kind: which of the two `weights` gives; see `BucketSender`.
            stop_requested: asked while waiting, by all ranks of the model together; they are told the same.
        """
        self._ranks = ranks
        self._start = start
        self._weights = weights
        self._weights_version = weights_version
        self._longest = longest
        self._bucket_bytes = bucket_bytes
        self._restarts = restarts
        self._sleep = sleep
        self._kind = kind
        self._stop_requested = stop_requested
        self._limit = 0
        self._has_served = False
        self._last: VllmDrawing | None = None
        self.server: VllmServer | None = None
        self.last_update: WeightUpdate | None = None

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """See `nemo_popsd.rollout.engine.RolloutEngine`. Collective over the ranks that gather weights together.

        Raises:
            StopRequested: the run was asked to stop; on all ranks.
            UserError: the server cannot be started, for a reason that the user must change; on all ranks.
            TransientError: it was lost again and again, in loading or later; on all ranks.
            RuntimeError: a defect; on all ranks.
        """
        return self.submit(requests, sampling).result()

    def submit(self, requests: Sequence[Request], sampling: SamplingParams) -> VllmDrawing:
        """See `nemo_popsd.rollout.engine.ConcurrentEngine`. Collective as `generate` is, and raises the same.

        A server has one thing to do at a time: what was begun before is waited for first.
        """
        if self._last is not None and self._last.pending:
            self._last.result()
        self._last = VllmDrawing(self, requests, sampling)
        return self._last

    def close(self) -> None:
        """Ends the server of this rank; the next call of `generate` starts another."""
        if self.server is not None:
            self.server.close()
            self.server = None

    def ask(self, requests: Sequence[Request], sampling: SamplingParams) -> Asked:
        """Brings the live weights to the server, which begins to draw. Collective over the domain.

        Raises:
            ServerLost: it is gone; see also `generate`.
        """
        version = self._weights_version()
        _release_cached_memory()
        self._ranks.together(lambda: self._have_server(requests, sampling), stop_requested=self._stop_requested)
        if self._ranks.any(self.server is not None and self.server.version != version):
            self._send_weights(version)
        return Asked(version, self._ranks.start(lambda: self._ask(requests, sampling, version)))

    def answer(self, asked: Asked, sampling: SamplingParams) -> list[Rollout]:
        """Waits for what the server draws. Collective over the domain.

        Raises:
            ServerLost: it is gone; see also `generate`.
        """
        answer = self._ranks.wait(asked.call, stop_requested=self._stop_requested)
        stops = sampling.stop_token_ids
        return [
            Rollout(tokens, log_probs, tokens[-1] not in stops, weights_version=asked.version)
            for tokens, log_probs in self._ranks.share(answer)
        ]

    def until_it_lives(self, action: Callable[[], T], lost: list[str]) -> T:
        """Repeats `action` for as long as the server is lost over it, but not for ever.

        Args:
            action: raises `ServerLost` on all ranks or on none.
            lost: what befell the servers of these requests so far; grows.

        Raises:
            TransientError: more often than `restarts`; see also `generate`.
        """
        while True:
            try:
                return action()
            except StopRequested:
                self.close()  # It may be busy for long.
                raise
            except ServerLost as error:
                self._discard()
                lost.append(str(error))
                logger.warning("lost the vLLM server: %s", error)
                if len(lost) > self._restarts:
                    raise TransientError(
                        "rollouts by vLLM",
                        got=f"the server was lost {len(lost)} times (rollout.vllm.restarts={self._restarts}): {error}",
                        fix=f"{START_AGAIN}; if it stays, set rollout.vllm.* or rollout.engine=megatron",
                        advice=[*lost, *error.advice],
                    ) from error

    def _have_server(self, requests: Sequence[Request], sampling: SamplingParams) -> None:
        needed = max((len(request.prompt) for request in requests), default=0) + sampling.max_response_tokens
        if self.server is not None and needed > self._limit:
            self.close()
        if self.server is None:
            self._limit = max(needed, self._longest())
            self.server = self._started()
        else:
            self.server.check_health()

    def _started(self) -> VllmServer:
        """A server, or the reason why there is none; what a server has loaded before is no mistake of the user's."""
        try:
            server = self._start(self._limit)
        except UserError as error:
            if self._has_served:
                raise ServerLost(str(error), error.advice) from error
            raise
        self._has_served = True
        return server

    def _send_weights(self, version: int) -> None:
        """Streams the weights of all ranks of the domain; collective over it, whatever becomes of the servers."""
        begun = time.monotonic()
        failure: Exception | None = None
        sender: BucketSender | None = None
        try:
            if self.server is not None:
                sender = BucketSender(self.server, self._bucket_bytes, kind=self._kind)
        except Exception as error:
            failure = error
        for name, tensor in self._weights():  # every rank takes part to the end
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
            seconds = time.monotonic() - begun
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

    def _ask(self, requests: Sequence[Request], sampling: SamplingParams, version: int) -> list[tuple[Any, Any]]:
        if not requests:
            return []
        assert self.server is not None
        answer = self.server.ask(
            {
                "request": "generate",
                "requests": [[list(request.prompt), request.seed] for request in requests],
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
                f"{len(responses)} responses by weights of step {answer['version']}, asked for {len(requests)} "
                f"by those of step {version}"
            )
        if self._sleep and self.server.sleeps:
            self.server.ask({"request": "sleep"})
        return responses

    def _discard(self) -> None:
        """Drops a server that is gone; one that lives, beside another that is gone, stays."""
        if self.server is not None and not self.server.alive:
            self.close()


def _release_cached_memory() -> None:
    """Gives back device memory that torch keeps for later: a server on this card starts or wakes, and needs it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free, whole = torch.cuda.mem_get_info()
        logger.info("device memory for vLLM: %.1f of %.1f GiB are free", free / 2**30, whole / 2**30)


class VllmDrawing:
    """Responses that a server draws while the ranks do something else; see `VllmEngine.submit`."""

    def __init__(self, engine: VllmEngine, requests: Sequence[Request], sampling: SamplingParams) -> None:
        """Has the server begin. Collective over the domain."""
        self._engine = engine
        self._requests = requests
        self._sampling = sampling
        self._lost: list[str] = []
        self._rollouts: list[Rollout] | None = None
        self._asked: Asked | None = engine.until_it_lives(self._ask, self._lost)

    @property
    def pending(self) -> bool:
        """Whether nobody has waited for it yet."""
        return self._asked is not None

    def result(self) -> list[Rollout]:
        """The rollouts, in the order of the requests; again and again the same. Collective over the domain.

        If the server was lost, another one draws them by the weights that are live now.

        Raises:
            StopRequested, UserError, TransientError, RuntimeError: see `VllmEngine.generate`.
        """
        if self._rollouts is None:
            self._rollouts = self._engine.until_it_lives(self._answer, self._lost)
        return self._rollouts

    def _ask(self) -> Asked:
        return self._engine.ask(self._requests, self._sampling)

    def _answer(self) -> list[Rollout]:
        asked, self._asked = self._asked or self._ask(), None  # asked anew after a loss
        return self._engine.answer(asked, self._sampling)
