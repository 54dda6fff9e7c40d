"""Configuration of on-policy rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_popsd.config.checks import above, at_least, fraction, one_of
from nemo_popsd.rollout.vllm.config import VllmConfig


@dataclass(kw_only=True)
class RolloutConfig:
    """How the student answers the training questions. Defaults are official OPSD's."""

    engine: str = "megatron"
    """What draws the responses: `megatron`, the training processes themselves, or `vllm`, a server beside them."""
    temperature: float = 1.1
    """Sampling temperature; 0 is greedy. Has nothing to do with `distillation.target.temperature`."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: int = 20
    """Sample from the k most likely tokens; 0 keeps all."""
    max_response_tokens: int = 1024
    """Responses are cut here (the paper's limit)."""
    batch_rows: int = 64
    """Most rows decoded together on each data-parallel rank, in evaluation too."""
    cache_tokens: int = 262144
    """Tokens that the key-value cache of the engine `megatron` may hold; fewer rows are decoded together where prompt
    and limit are long. One token of Qwen3-8B takes 147 KB in bf16, shared out over the tensor-parallel ranks."""
    save: bool = True
    """Write the rollouts of a step to `<output>/rollouts` before they are trained on; see `popsd rollouts show`. A
    step that is taken up again after a kill takes them from there."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """The server of the engine `vllm`."""

    def __post_init__(self) -> None:
        one_of("rollout.engine", self.engine, ("megatron", "vllm"))
        at_least("rollout.temperature", self.temperature, 0)
        fraction("rollout.top_p", self.top_p, allow_zero=False)
        at_least("rollout.top_k", self.top_k, 0)
        above("rollout.max_response_tokens", self.max_response_tokens, 0)
        above("rollout.batch_rows", self.batch_rows, 0)
        above("rollout.cache_tokens", self.cache_tokens, 0)
