"""The trained model and its frozen base, put together: architecture, adapters or copy, DDP."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_popsd.distillation import mean_row
from nemo_popsd.megatron.adapters import Adapters
from nemo_popsd.megatron.base import AdaptersOff, FrozenBase, FrozenCopy
from nemo_popsd.megatron.build import build_gpt
from nemo_popsd.megatron.config import OptimizerConfig, ParallelConfig, StudentConfig
from nemo_popsd.megatron.forward import output_weight
from nemo_popsd.megatron.optimizer import wrap_for_training


class Architecture(Protocol):
    """What to build, without weights."""

    vocab_size: int
    """True vocabulary."""

    def provider(self) -> Any:
        """A fresh Megatron-Bridge ``GPTModelProvider``."""


LoadWeights = Callable[[GPTModel], None]
"""Fills a model with weights, this rank's shards; collective over all ranks."""


class Student:
    """π_θ and π_0 on this rank.

    Attributes:
        gpt: the live model π_θ, bare.
        adapters: its adapters, or None under full fine-tuning.
        vocab_size: true vocabulary.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: StudentConfig,
        parallel: ParallelConfig,
        *,
        seed: int,
        load_initial: LoadWeights,
        load_trained: LoadWeights | None = None,
        base_first: bool = False,
    ) -> None:
        """Builds the live model. Collective over all ranks.

        Args:
            architecture: what to build.
            config: precision and adaptation.
            parallel: layout.
            seed: of the adapters' initial values.
            load_initial: fills a plain model with θ₀.
            load_trained: fills the live model (with its adapters) from a checkpoint; None starts at θ₀.
            base_first: the checkpoint holds adapters alone, so `load_initial` is called before; otherwise it holds θ₀
                too, or under full fine-tuning all of θ.
        """
        self._architecture = architecture
        self._config = config
        self._parallel = parallel
        self._load_initial = load_initial
        self._wrapped: DistributedDataParallel | None = None
        self.vocab_size = architecture.vocab_size
        self.gpt: GPTModel = build_gpt(architecture.provider(), config, parallel)
        self.adapters: Adapters | None = None
        if load_trained is None or base_first:
            load_initial(self.gpt)
        if config.adaptation == "lora":
            self.adapters = Adapters(self.gpt, config.lora, seed=seed)
        if load_trained is not None:
            load_trained(self.gpt)

    @property
    def chunks(self) -> list[GPTModel]:
        """This rank's parts of the live model, bare."""
        return [self.gpt]

    @cached_property
    def base(self) -> FrozenBase:
        """The frozen initial weights. Under full fine-tuning the first use loads a copy of them: collective, and
        the memory of the weights once more.
        """
        if self.adapters is not None:
            return AdaptersOff(self.gpt, self.adapters)
        copy = build_gpt(self._architecture.provider(), self._config, self._parallel)
        self._load_initial(copy)
        return FrozenCopy(copy)

    @cached_property
    def base_weight(self) -> Tensor:
        """This rank's rows of the frozen output matrix [V_pad/tp, H]."""
        with self.base.model() as base:
            return output_weight(base).detach()

    @cached_property
    def centre(self) -> Tensor:
        """Mean row of the frozen output matrix over the true vocabulary [H]: one all-reduce, once."""
        return mean_row(self.base_weight, self.vocab_size, self.tp_group)

    @property
    def weight(self) -> Tensor:
        """This rank's rows of the live output matrix [V_pad/tp, H]."""
        return output_weight(self.gpt)

    @property
    def tp_group(self) -> torch.distributed.ProcessGroup:
        """The tensor-parallel group, over which the vocabulary is sharded."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this rank speaks for the ranks that hold one copy of the model together."""
        return not (
            parallel_state.get_tensor_model_parallel_rank()
            or parallel_state.get_pipeline_model_parallel_rank()
            or parallel_state.get_context_parallel_rank()
        )

    @property
    def dp_group(self) -> torch.distributed.ProcessGroup:
        """The data-parallel group, over which the rows of a step are shared out."""
        return parallel_state.get_data_parallel_group()

    def wrap(self, config: OptimizerConfig) -> DistributedDataParallel:
        """The live model in Megatron's DDP; made at the first call."""
        if self._wrapped is None:
            self._wrapped = wrap_for_training(self.gpt, config)
        return self._wrapped
