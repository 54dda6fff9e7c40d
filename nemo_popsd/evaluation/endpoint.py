"""Samples from an OpenAI-compatible server, such as `vllm serve`, through its completions API."""

from __future__ import annotations

import http.client
import json
import logging
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_popsd.errors import TransientError, UserError
from nemo_popsd.evaluation.config import EndpointConfig
from nemo_popsd.evaluation.records import Sample
from nemo_popsd.evaluation.sampling import SampleRequest
from nemo_popsd.rollout.engine import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE = 60.0
_LONGEST_COMPLAINT = 500
_SEEDS = 2**31
"""vLLM accepts 64-bit seeds, other servers signed 32-bit ones."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another host."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


class Endpoint:
    """One served model.

    The key is read from the environment for each request; messages and logs do not contain it.

    Attributes:
        model: name of the model on the server.
        identity: that name and, if the server reports it, the origin of the weights (vLLM: the directory).
    """

    def __init__(self, config: EndpointConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Queries the models of the server.

        Raises:
            UserError: the server does not answer, or does not serve the model.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._has_answered = False
        # Proxies come from the environment (`http_proxy`, `no_proxy`).
        self._opener = urllib.request.build_opener(_NoRedirect())
        entries = {str(entry["id"]): entry for entry in self._answer("models", None).get("data", [])}
        served = list(entries)
        if config.model not in served and (config.model or len(served) != 1):
            raise UserError(
                f"endpoint {config.url}",
                got=f"models {', '.join(served) or '(none)'}",
                need=f"the model {config.model!r}" if config.model else "exactly one model, or a name",
                fix="set evaluation.endpoint.model",
            )
        self.model = config.model or served[0]
        root = entries[self.model].get("root")
        self.identity = f"{self.model} from {root}" if root else self.model

    def generate(
        self, sample_requests: Sequence[SampleRequest], sampling: SamplingParams, *, seed: int
    ) -> Iterator[Sample]:
        """Generates a sample for each of `sample_requests`, `concurrency` at a time, and yields each on arrival.

        Raises:
            UserError: the server refuses a request.
            TransientError: the server has answered before but keeps failing. Both errors are raised after the requests
                in progress have completed and their samples have been yielded.
        """
        left, taking, stop = iter(sample_requests), threading.Lock(), threading.Event()
        results: queue.SimpleQueue[Sample | Exception | None] = queue.SimpleQueue()

        def work() -> None:
            while not stop.is_set():
                with taking:
                    sample_request = next(left, None)
                if sample_request is None:
                    break
                try:
                    results.put(self._sample(sample_request, sampling, seed))
                except Exception as error:  # raised again by `generate`
                    stop.set()
                    results.put(error)
            results.put(None)

        working = min(self._config.concurrency, len(sample_requests))
        for _ in range(working):
            # Daemon threads, so that an interrupted command does not wait for answers that take an hour.
            threading.Thread(target=work, daemon=True).start()
        failure: Exception | None = None
        try:
            while working:
                result = results.get()
                if isinstance(result, Sample):
                    yield result
                elif result is None:
                    working -= 1
                else:
                    failure = failure or result
        finally:
            stop.set()
        if failure is not None:
            raise failure

    def _sample(self, sample_request: SampleRequest, sampling: SamplingParams, seed: int) -> Sample:
        answer = self._answer("completions", self._request(sample_request, sampling, seed))
        try:
            (choice,) = answer["choices"]
            # JSON can contain an unpaired surrogate, which a UTF-8 file cannot.
            text = str(choice["text"]).encode("utf-8", "replace").decode("utf-8")
            truncated = choice["finish_reason"] == "length"
            tokens = int(answer["usage"]["completion_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"endpoint {self._config.url}",
                got=f"an answer without {error}",
                need="choices with text and finish_reason, and usage, as in the completions API",
                fix="set evaluation.endpoint.url to a server that supports it",
            ) from None
        return Sample(
            sample_request.prompt.record.id, sample_request.sample, text=text, tokens=tokens, truncated=truncated
        )

    def _request(self, sample_request: SampleRequest, sampling: SamplingParams, seed: int) -> dict[str, object]:
        ids = list(sample_request.prompt.prompt)
        as_text = self._config.prompts == "text"
        request: dict[str, object] = {
            "model": self.model,
            "prompt": self._tokenizer.decode(ids, skip_special_tokens=False) if as_text else ids,
            "max_tokens": sampling.max_response_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sample_request.seed(seed) % _SEEDS,
            "n": 1,
            "stream": False,
        }
        if self._config.dialect == "vllm":
            request |= {
                "top_k": sampling.top_k or -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": sorted(sampling.stop_token_ids),
                "skip_special_tokens": False,
                "add_special_tokens": False,  # the chat template contains them
            }
        return request

    def _answer(self, path: str, body: Mapping[str, object] | None) -> dict[str, Any]:
        """The server's answer, after up to `retries` retries.

        Raises:
            UserError: the server refused the request, or has never answered and failed `retries` + 1 times.
            TransientError: the server has answered before and failed `retries` + 1 times.
        """
        for attempt in range(self._config.retries + 1):
            try:
                return self._ask_once(path, body)
            except urllib.error.HTTPError as error:
                complaint = f"status {error.code}: {self._text_of(error)}"
                pause = _requested_pause(error)
                if error.code not in _TRANSIENT_STATUS:
                    raise self._failed(complaint) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                complaint, pause = self._redacted(f"{type(error).__name__}: {error}"), None
            if attempt < self._config.retries:
                seconds = min(_LONGEST_PAUSE, pause if pause is not None else 2.0**attempt * random.uniform(0.5, 1.0))
                logger.warning("endpoint: %s; retrying in %.1f s", complaint, seconds)
                time.sleep(seconds)
        failed = self._failed(f"{complaint}, {self._config.retries + 1} times")
        if not self._has_answered:
            raise failed
        fix = "check the server, and start the same command again, which generates the missing samples"
        raise TransientError(failed.what, got=failed.got, fix=fix)

    def _ask_once(self, path: str, body: Mapping[str, object] | None) -> dict[str, Any]:
        headers = {"Accept": "application/json"}
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self._config.url.rstrip('/')}/{path}", data=data, headers=headers)
        with self._opener.open(request, timeout=self._config.timeout_seconds) as response:
            answer = json.loads(response.read())
        if not isinstance(answer, dict):
            raise ValueError("an answer that is not a JSON object")
        self._has_answered = True
        return answer

    def _key(self) -> str:
        return os.environ.get(self._config.key_variable, "")

    def _text_of(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read(4 * _LONGEST_COMPLAINT).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = str(error.reason)
        return self._redacted(" ".join(text.split()))[:_LONGEST_COMPLAINT]

    def _redacted(self, text: str) -> str:
        """`text` without the key, which a server may repeat in its error message."""
        key = self._key()
        return text.replace(key, "***") if key else text

    def _failed(self, complaint: str) -> UserError:
        key = "is set" if self._key() else "is not set"
        return UserError(
            f"endpoint {self._config.url}",
            got=complaint,
            need="an OpenAI-compatible server that answers",
            fix=f"start it, or set evaluation.endpoint.url (the key's variable {self._config.key_variable} {key})",
        )


def _requested_pause(error: urllib.error.HTTPError) -> float | None:
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return None
