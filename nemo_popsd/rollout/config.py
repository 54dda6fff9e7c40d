"""Configuration of on-policy rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.errors import UserError
from nemo_popsd.rollout.vllm.config import VllmConfig
from nemo_popsd.settings.bounds import Bounds, check_numbers
from nemo_popsd.settings.checks import one_of


@dataclass(kw_only=True)
class RolloutConfig:
    """How the student generates responses to the training questions. Defaults are those of OPSD."""

    engine: str = "megatron"
    """Engine that generates the responses: `megatron`, in the training processes, or `vllm`, a separate server."""
    per_prompt: Annotated[int, Bounds(1, 4096)] = 1
    """Number of responses to each question. Each has its own seed, which depends on the row and the index of the
    response. A step trains on `training.prompts_per_step` times this number of responses; the frozen branches compute
    shared prefixes once (`training.share_prefixes`)."""
    temperature: Annotated[float, Bounds(1e-3, 100, or_zero=True)] = 1.1
    """Sampling temperature; 0 is greedy. Independent of `distillation.target.temperature`."""
    top_p: Annotated[float, Bounds(1e-6, 1)] = 0.95
    """Sample from the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: Annotated[int, Bounds(0, 10**6)] = 20
    """Sample from the k most likely tokens; 0 keeps all."""
    max_response_tokens: Annotated[int, Bounds(1, 10**7)] = 1024
    """Longer responses are truncated here (the paper's limit)."""
    batch_rows: Annotated[int, Bounds(1, 10**6)] = 64
    """Maximum number of responses decoded together on each data-parallel rank, also in evaluation."""
    cache_tokens: Annotated[int, Bounds(1, 10**12)] = 262144
    """Maximum number of tokens in the key-value cache of the engine `megatron`; with long prompts and limits fewer
    responses are decoded together. One token of Qwen3-8B takes 147 KB in bf16, split over the tensor-parallel ranks."""
    tokens_per_step: Annotated[int, Bounds(0, 10**12)] = 0
    """Number of response tokens after which a step leaves its responses unfinished; the next step continues them with
    newer weights. It is divided equally among the data-parallel replicas. Some responses always finish: the first
    response of each replica, responses that would become older than `max_age` or wait a second time before their first
    token, and all responses of the last step. Layout and `batch_rows` determine which responses are left unfinished.
    0 disables this: every response ends in its own step. Needs `save`, which stores partial responses."""
    overlap: bool = False
    """Generate the responses of the next step while this step trains, with the weights at the start of this step. From
    step 2 on, these weights are one step old. Needs the engine `vllm`, which generates in other processes."""
    max_age: Annotated[int, Bounds(0, 10**6)] = 1
    """With `overlap` or `tokens_per_step`: maximum age of a token, in steps between the weights that generate it and
    the weights that are trained on it. Stored responses that are older are generated again."""
    save: bool = True
    """Write the rollouts of a step to `<output>/rollouts` before training on them; see `popsd rollouts show`. A step
    that is repeated after a kill reads them from there."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """The server of the engine `vllm`."""

    def __post_init__(self) -> None:
        one_of("rollout.engine", self.engine, ("megatron", "vllm"))
        check_numbers(self, "rollout")
        if self.overlap and self.engine != "vllm":
            raise UserError(
                "configuration",
                got=f"rollout.overlap=true with rollout.engine={self.engine}",
                need="the engine that generates in other processes",
                fix="set rollout.engine=vllm or rollout.overlap=false",
            )
        if self.max_age == 0 and (self.overlap or self.tokens_per_step):
            other = "rollout.overlap=true" if self.overlap else f"rollout.tokens_per_step={self.tokens_per_step}"
            raise UserError(
                "configuration",
                got=f"rollout.max_age=0 with {other}",
                need="an age of at least 1: such responses are trained on a step after the one that generated them",
                fix=f"set rollout.max_age=1, or rollout.{'overlap=false' if self.overlap else 'tokens_per_step=0'}",
            )
        if self.tokens_per_step and self.engine != "megatron":
            raise UserError(
                "configuration",
                got=f"rollout.tokens_per_step={self.tokens_per_step} with rollout.engine={self.engine}",
                need="the engine that can leave a response unfinished and continue it",
                fix="set rollout.engine=megatron or rollout.tokens_per_step=0",
            )
        if self.tokens_per_step and not self.save:
            raise UserError(
                "configuration",
                got=f"rollout.tokens_per_step={self.tokens_per_step} with rollout.save=false",
                need="the rollouts on disk, where unfinished responses wait for the next step",
                fix="set rollout.save=true or rollout.tokens_per_step=0",
            )

    @property
    def age_bound(self) -> int:
        """Maximum age of a response in training; 0 if every step generates its own responses to the end."""
        return self.max_age if self.overlap or self.tokens_per_step else 0
