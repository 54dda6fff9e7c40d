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
from nemo_popsd.megatron.alignment import SequenceSplit
from nemo_popsd.megatron.base import AdaptersOff, FrozenBase, FrozenCopy
from nemo_popsd.megatron.build import Model, build_chunks
from nemo_popsd.megatron.config import OptimizerConfig, ParallelConfig, StudentConfig
from nemo_popsd.megatron.forward import output_weight
from nemo_popsd.megatron.optimizer import wrap_for_training


class Architecture(Protocol):
    """What to build, without weights."""

    vocab_size: int
    """True vocabulary."""

    def provider(self) -> Any:
        """A fresh Megatron-Bridge ``GPTModelProvider``."""


LoadWeights = Callable[[Model], None]
"""Fills the chunks of a model with weights, this rank's shards; collective over all ranks."""


class Student:
    """π_θ and π_0 on this rank.

    Attributes:
        chunks: this rank's chunks of the live model π_θ, bare; one without virtual pipelining.
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
    ) -> None:
        """Builds the live model. Collective over all ranks.

        Args:
            architecture: what to build.
            config: precision and adaptation.
            parallel: layout.
            seed: of the adapters' initial values.
            load_initial: fills a plain model with θ₀.
            load_trained: fills the live model (with its adapters) from a checkpoint; None starts at θ₀. With LoRA a
                checkpoint holds θ₀ too, and `load_initial` is not called.
        """
        self._architecture = architecture
        self._config = config
        self._parallel = parallel
        self._load_initial = load_initial
        self._wrapped: list[DistributedDataParallel] | None = None
        self.vocab_size = architecture.vocab_size
        self.chunks: list[GPTModel] = build_chunks(architecture.provider(), config, parallel)
        self.adapters: Adapters | None = None
        if load_trained is None:
            load_initial(self.chunks)
        if config.adaptation == "lora":
            self.adapters = Adapters(self.chunks, config.lora, seed=seed)
        if load_trained is not None:
            load_trained(self.chunks)

    @cached_property
    def base(self) -> FrozenBase:
        """The frozen initial weights. Under full fine-tuning the first use loads a copy of them: collective, and
        the memory of the weights once more, on the device or the host (`student.frozen_copy`).
        """
        if self.adapters is not None:
            return AdaptersOff(self.chunks, self.adapters)
        copy = build_chunks(self._architecture.provider(), self._config, self._parallel)
        self._load_initial(copy)
        return FrozenCopy(copy, on_host=self._config.frozen_copy == "host")

    @cached_property
    def base_weight(self) -> Tensor:
        """This rank's rows of the frozen output matrix [V_pad/tp, H]; on the last pipeline stage."""
        with self.base.model() as base:
            return output_weight(base[-1]).detach()

    @cached_property
    def centre(self) -> Tensor:
        """Mean row of the frozen output matrix over the true vocabulary [H]: one all-reduce, once."""
        return mean_row(self.base_weight, self.vocab_size, self.tp_group)

    @property
    def weight(self) -> Tensor:
        """This rank's rows of the live output matrix [V_pad/tp, H]; on the last pipeline stage."""
        return output_weight(self.chunks[-1])

    @property
    def gpt(self) -> GPTModel:
        """The only chunk of the live model."""
        (only,) = self.chunks
        return only

    @property
    def split(self) -> SequenceSplit:
        """How sequences are spread over ranks."""
        return SequenceSplit.of(self.chunks[0])

    @property
    def reports(self) -> bool:
        """Whether what this rank measures on its tokens counts: one tensor-parallel rank of the last pipeline stage."""
        return parallel_state.is_pipeline_last_stage(ignore_virtual=True) and self.tp_group.rank() == 0

    @property
    def counts(self) -> bool:
        """Whether what this rank knows of its trajectories counts: one of the ranks that share them."""
        return self.reports and self.split.context_rank == 0

    @property
    def tp_group(self) -> torch.distributed.ProcessGroup:
        """The tensor-parallel group, over which the vocabulary is sharded."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def dp_group(self) -> torch.distributed.ProcessGroup:
        """The data-parallel group, over which the rows of a step are shared out."""
        return parallel_state.get_data_parallel_group()

    def wrap(self, config: OptimizerConfig) -> list[DistributedDataParallel]:
        """The chunks of the live model in Megatron's DDP; made at the first call."""
        if self._wrapped is None:
            self._wrapped = wrap_for_training(self.chunks, config)
        return self._wrapped
