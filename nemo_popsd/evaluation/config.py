"""Configuration of an evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

from nemo_popsd.data.named_sets import NAMED_SETS
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.markers import DEFAULT_MARKERS
from nemo_popsd.settings.bounds import SECONDS_OF_30_DAYS, Bounds, Text, check_numbers
from nemo_popsd.settings.checks import one_of, pattern, refuse

_SET_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


@dataclass(kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible server, such as `vllm serve`, used through its completions API.

    `student.source` must still be the model's directory; only its tokenizer and chat template are read. Put a key into
    an environment variable, not into the configuration.
    """

    url: str = ""
    """Base URL up to and including `/v1`, such as `http://localhost:8000/v1`; empty evaluates with Megatron."""
    model: str = ""
    """Name of the model on the server; empty uses the only model that the server lists."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; if it is not set, no key is sent."""
    prompts: str = "token_ids"
    """`token_ids`, or `text` for servers that do not accept ids. Both send the rendered chat template."""
    dialect: str = "vllm"
    """`vllm` also sends vLLM's own parameters, which override the sampling defaults of the served model; `openai` sends
    only the standard parameters, and the server's defaults apply to the others."""
    concurrency: Annotated[int, Bounds(1, 10**4)] = 64
    """Maximum number of concurrent requests."""
    timeout_seconds: Annotated[float, Bounds(0, SECONDS_OF_30_DAYS, above=True)] = 7200.0
    """Maximum time to wait for one response."""
    retries: Annotated[int, Bounds(0, 16)] = 6
    """Retries of a request after a transient failure (connection, 408, 409, 429, 5xx), after 1, 2, 4, ... seconds or
    the time that the server requests."""

    def __post_init__(self) -> None:
        one_of("evaluation.endpoint.prompts", self.prompts, ("token_ids", "text"))
        one_of("evaluation.endpoint.dialect", self.dialect, ("vllm", "openai"))
        check_numbers(self, "evaluation.endpoint")
        parts = urlsplit(self.url)
        if self.url and (parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query):
            raise UserError(
                "configuration",
                got="an evaluation.endpoint.url that is not a plain http(s) address",  # it may contain a password
                need="http(s)://HOST[:PORT]/v1 without a user, a password or a query",
                fix="set evaluation.endpoint.url, and the key in the environment",
            )


@dataclass(kw_only=True)
class EvaluationConfig:
    """Sampling and scoring of an evaluation.

    These sampling settings are separate from those of the training rollouts and from the temperature of the loss.
    """

    sets: Annotated[dict[str, str], Text.PATH] = field(default_factory=dict)
    """Problem sets for `popsd evaluate`, each evaluated in its own directory. A list names published sets: aime24,
    aime25, hmmt25, math500, gsm8k. A mapping `{NAME: PATH}` adds your own files; an empty path refers to a published
    set. Empty means `data.validation`."""
    sets_directory: Annotated[str, Text.PATH] = ""
    """Directory with files of named sets, such as `aime24.jsonl` or `aime24.parquet`. The caches of `datasets` are
    searched next."""
    problems: Annotated[int | None, Bounds(1, 10**9)] = None
    """Evaluate only the first `problems` rows of a set; null means all."""
    samples_per_problem: Annotated[int, Bounds(1, 10**5)] = 1
    """Responses per problem, the k of avg@k and majority@k. If you raise it later, only the missing responses are
    generated."""
    pass_k: Annotated[list[int], Bounds(1, 10**5)] = field(default_factory=list)
    """The k of pass@k; empty means 2, 4, 8, ... and `samples_per_problem`."""
    temperature: Annotated[float, Bounds(1e-3, 100, or_zero=True)] = 1.0
    """Sampling temperature; 0 selects the most likely token."""
    top_p: Annotated[float, Bounds(1e-6, 1)] = 1.0
    """Sample from the smallest set of tokens with at least this probability; 1 disables it."""
    top_k: Annotated[int, Bounds(0, 10**6)] = 0
    """Sample from this number of most likely tokens; 0 disables it."""
    max_response_tokens: Annotated[int, Bounds(1, 10**7)] = 38912
    """Maximum length of a response; longer ones are truncated and counted."""
    answer_pattern: str | None = None
    """Regular expression with one group; its last match in a response is the answer. Null uses the last
    `\\boxed{...}`."""
    without_box: str = "none"
    """For responses without a match: `none` means no answer, which counts as wrong; `last_number` uses the last
    number."""
    checker: Annotated[str, Text.LINE] = ""
    """Name of an installed answer checker, an entry point of the group `nemo_popsd.answer_checkers`, that replaces the
    rules of docs/evaluation.md; empty means these rules."""
    verify_seconds: Annotated[float, Bounds(0, 3600, above=True)] = 5.0
    """Time limit of one comparison by math-verify, which compares answers that the rules of docs/evaluation.md do not
    cover. An answer that exceeds it counts as wrong and undecided."""
    markers: Annotated[list[str], Text.PROSE] = field(default_factory=lambda: list(DEFAULT_MARKERS))
    """Epistemic markers to count, as complete words, case-sensitive."""
    thinking_end: Annotated[str, Text.PROSE] = "</think>"
    """Tag with which a response closes its thinking."""
    resamples: Annotated[int, Bounds(100, 10**6)] = 2000
    """Number of bootstrap resamples of the problems for each interval."""
    confidence: Annotated[float, Bounds(0, 1, above=True, below=True)] = 0.95
    """Confidence level of the intervals."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Server that generates the samples instead of Megatron."""

    def __post_init__(self) -> None:
        check_numbers(self, "evaluation")
        pattern("evaluation.answer_pattern", self.answer_pattern)
        one_of("evaluation.without_box", self.without_box, ("none", "last_number"))
        if not self.thinking_end:
            raise refuse("evaluation.thinking_end", self.thinking_end, "the text that closes the thinking")
        if any(not marker.strip() for marker in self.markers) or len(set(self.markers)) < len(self.markers):
            raise refuse("evaluation.markers", self.markers, "words or phrases, each once")
        for name, path in self.sets.items():
            if not path and name not in NAMED_SETS:
                need = f"names among {', '.join(NAMED_SETS)}, or {{NAME: PATH}} for a file of your own"
                raise refuse("evaluation.sets", list(self.sets), need)
            if not _SET_NAME.fullmatch(name):
                raise refuse("evaluation.sets", name, "a name of letters, digits, `-`, `_` and `.`, for its directory")
