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
    """How the student answers the training questions. Defaults are official OPSD's."""

    engine: str = "megatron"
    """What draws the responses: `megatron`, the training processes themselves, or `vllm`, a server beside them."""
    temperature: Annotated[float, Bounds(1e-3, 100, or_zero=True)] = 1.1
    """Sampling temperature; 0 is greedy. Has nothing to do with `distillation.target.temperature`."""
    top_p: Annotated[float, Bounds(1e-6, 1)] = 0.95
    """Sample from the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: Annotated[int, Bounds(0, 10**6)] = 20
    """Sample from the k most likely tokens; 0 keeps all."""
    max_response_tokens: Annotated[int, Bounds(1, 10**7)] = 1024
    """Responses are cut here (the paper's limit)."""
    batch_rows: Annotated[int, Bounds(1, 10**6)] = 64
    """Most rows decoded together on each data-parallel rank, in evaluation too."""
    cache_tokens: Annotated[int, Bounds(1, 10**12)] = 262144
    """Tokens that the key-value cache of the engine `megatron` may hold; fewer rows are decoded together where prompt
    and limit are long. One token of Qwen3-8B takes 147 KB in bf16, shared out over the tensor-parallel ranks."""
    tokens_per_step: Annotated[int, Bounds(0, 10**12)] = 0
    """Response tokens after which a step leaves its rows: those that have not ended go on in the next step, by then
    with newer weights. Each data-parallel replica has an equal share. Finished in any case are the first row of each
    replica, rows that would otherwise become older than `max_age` or wait a second time without having been begun, and
    in the last step all. Which rows are left depends on layout and `batch_rows`. 0: every row ends in its own step.
    Needs `save`, which keeps what was begun."""
    overlap: bool = False
    """Draw the responses of the next step while this one is trained on, by the weights that this one begins with: from
    step 2 on they are one step old. Needs the engine `vllm`, which draws in other processes."""
    max_age: Annotated[int, Bounds(0, 10**6)] = 1
    """With `overlap` or `tokens_per_step`: how many steps the weights that drew any token may be behind those that are
    trained on it. Stored responses that are older are drawn anew."""
    save: bool = True
    """Write the rollouts of a step to `<output>/rollouts` before they are trained on; see `popsd rollouts show`. A
    step that is taken up again after a kill takes them from there."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """The server of the engine `vllm`."""

    def __post_init__(self) -> None:
        one_of("rollout.engine", self.engine, ("megatron", "vllm"))
        check_numbers(self, "rollout")
        if self.overlap and self.engine != "vllm":
            raise UserError(
                "configuration",
                got=f"rollout.overlap=true with rollout.engine={self.engine}",
                need="the engine that draws beside the training processes, not in them",
                fix="set rollout.engine=vllm or rollout.overlap=false",
            )
        if self.max_age == 0 and (self.overlap or self.tokens_per_step):
            other = "rollout.overlap=true" if self.overlap else f"rollout.tokens_per_step={self.tokens_per_step}"
            raise UserError(
                "configuration",
                got=f"rollout.max_age=0 with {other}",
                need="an age of at least 1: such responses are trained on a step after the one that drew them",
                fix=f"set rollout.max_age=1, or rollout.{'overlap=false' if self.overlap else 'tokens_per_step=0'}",
            )
        if self.tokens_per_step and self.engine != "megatron":
            raise UserError(
                "configuration",
                got=f"rollout.tokens_per_step={self.tokens_per_step} with rollout.engine={self.engine}",
                need="the engine that can leave a response and go on with it",
                fix="set rollout.engine=megatron or rollout.tokens_per_step=0",
            )
        if self.tokens_per_step and not self.save:
            raise UserError(
                "configuration",
                got=f"rollout.tokens_per_step={self.tokens_per_step} with rollout.save=false",
                need="the rollouts on disk, where rows wait for the next step",
                fix="set rollout.save=true or rollout.tokens_per_step=0",
            )

    @property
    def age_bound(self) -> int:
        """Greatest age of a response that is trained on; 0 where every step draws its own to the end."""
        return self.max_age if self.overlap or self.tokens_per_step else 0
