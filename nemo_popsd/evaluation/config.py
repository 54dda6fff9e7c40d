"""Configuration of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

from nemo_popsd.data.named_sets import NAMED_SETS
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.markers import DEFAULT_MARKERS
from nemo_popsd.settings.bounds import SECONDS_OF_30_DAYS, Bounds, Text, check_numbers
from nemo_popsd.settings.checks import one_of, pattern, refuse


@dataclass(kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible server (`vllm serve` is one), asked through its completions API.

    `student.source` still names the model's directory, of which only tokenizer and chat template are read. A key goes
    into an environment variable, never into the configuration.
    """

    url: str = ""
    """Base URL up to and including `/v1`, such as `http://localhost:8000/v1`; empty evaluates with Megatron."""
    model: str = ""
    """Name under which the server serves the model; empty takes the only one that it lists."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; without it, none is sent."""
    prompts: str = "token_ids"
    """`token_ids`, or `text` for servers that take no ids. Both are the rendered chat template."""
    dialect: str = "vllm"
    """`vllm` sends vLLM's own parameters too, which turn off the sampling defaults that a served model brings along;
    `openai` sends the standard ones alone, and the server's defaults hold for the rest."""
    concurrency: Annotated[int, Bounds(1, 10**4)] = 64
    """Requests under way at a time."""
    timeout_seconds: Annotated[float, Bounds(0, SECONDS_OF_30_DAYS, above=True)] = 7200.0
    """Longest wait for one response."""
    retries: Annotated[int, Bounds(0, 16)] = 6
    """Repeats of a request that failed for a reason that may pass (connection, 408, 409, 429, 5xx), after 1, 2, 4, ...
    seconds, or when the server says."""

    def __post_init__(self) -> None:
        one_of("evaluation.endpoint.prompts", self.prompts, ("token_ids", "text"))
        one_of("evaluation.endpoint.dialect", self.dialect, ("vllm", "openai"))
        check_numbers(self, "evaluation.endpoint")
        parts = urlsplit(self.url)
        if self.url and (parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query):
            raise UserError(
                "configuration",
                got="an evaluation.endpoint.url that is no plain http(s) address",  # it may hold a password
                need="http(s)://HOST[:PORT]/v1 without a user, a password or a query",
                fix="set evaluation.endpoint.url, and the key in the environment",
            )


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is sampled, and how the text is read.

    Sampling here is separate from that of the training rollouts and from the softmax temperature of the loss.
    """

    sets: list[str] = field(default_factory=list)
    """Named sets for `popsd evaluate`: aime24, aime25, hmmt25, math500, gsm8k. Empty means `data.validation`."""
    sets_directory: Annotated[str, Text.PATH] = ""
    """Where files of named sets lie, as `aime24.jsonl` or `.parquet`; the local caches of `datasets` come next."""
    problems: Annotated[int | None, Bounds(1, 10**9)] = None
    """Evaluate only the first `problems` rows of a set; null means all."""
    samples_per_problem: Annotated[int, Bounds(1, 10**5)] = 1
    """Responses per problem, the k of avg@k and majority@k. Raised later, only the missing ones are drawn."""
    pass_k: Annotated[list[int], Bounds(1, 10**5)] = field(default_factory=list)
    """The k of pass@k; empty means 2, 4, 8, ... and `samples_per_problem`."""
    temperature: Annotated[float, Bounds(1e-3, 100, or_zero=True)] = 1.0
    """Sampling temperature; 0 takes the most likely token."""
    top_p: Annotated[float, Bounds(1e-6, 1)] = 1.0
    """Sample from the smallest set of tokens with this much probability; 1 turns it off."""
    top_k: Annotated[int, Bounds(0, 10**6)] = 0
    """Sample from this many most likely tokens; 0 turns it off."""
    max_response_tokens: Annotated[int, Bounds(1, 10**7)] = 38912
    """Longest response; longer ones are cut and counted."""
    answer_pattern: str | None = None
    """Expression with one group; its last match in a response is the answer. Null reads the last `\\boxed{...}`."""
    without_box: str = "none"
    """Where that finds nothing: `none` means no answer, which is wrong; `last_number` takes the last number."""
    verify_seconds: Annotated[float, Bounds(0, 3600, above=True)] = 5.0
    """Longest comparison of two answers by math-verify, which decides what the rules of docs/evaluation.md do not read;
    one that takes longer is wrong, and counted."""
    markers: Annotated[list[str], Text.PROSE] = field(default_factory=lambda: list(DEFAULT_MARKERS))
    """Epistemic markers to count, as whole words in this very case."""
    thinking_end: Annotated[str, Text.PROSE] = "</think>"
    """Mark with which a response closes its thinking."""
    resamples: Annotated[int, Bounds(100, 10**6)] = 2000
    """Bootstrap resamples of the problems behind each interval."""
    confidence: Annotated[float, Bounds(0, 1, above=True, below=True)] = 0.95
    """Share of the resamples that an interval holds."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Server that draws the samples instead of Megatron."""

    def __post_init__(self) -> None:
        check_numbers(self, "evaluation")
        pattern("evaluation.answer_pattern", self.answer_pattern)
        one_of("evaluation.without_box", self.without_box, ("none", "last_number"))
        if not self.thinking_end:
            raise refuse("evaluation.thinking_end", self.thinking_end, "the text that closes the thinking")
        if any(not marker.strip() for marker in self.markers) or len(set(self.markers)) < len(self.markers):
            raise refuse("evaluation.markers", self.markers, "words or phrases, each once")
        unknown = [name for name in self.sets if name not in NAMED_SETS]
        if unknown or len(set(self.sets)) < len(self.sets):
            raise refuse("evaluation.sets", self.sets, f"names among {', '.join(NAMED_SETS)}, each once")
