"""The trained model and its frozen base: an architecture, adapters or a frozen copy, and DDP."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_popsd.distillation import MainGradient
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.adapters import Adapters
from nemo_popsd.megatron.base import AdaptersOff, FrozenBase, FrozenCopy
from nemo_popsd.megatron.build import Model, build_chunks
from nemo_popsd.megatron.config import FP8Config, OptimizerConfig, StudentConfig
from nemo_popsd.megatron.forward import output_weight, upstream_of_loss
from nemo_popsd.megatron.interfaces import ModelChunk, ModelProvider, WrappedChunk
from nemo_popsd.megatron.optimizer import wrap_for_training
from nemo_popsd.megatron.passthrough import MegatronConfig
from nemo_popsd.megatron.response_routing import SequenceSplit
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.vocabulary import VocabShard, mean_output_vector


class Architecture(Protocol):
    """The architecture of a model, without weights."""

    vocab_size: int
    """Size of the vocabulary without padding."""

    def provider(self) -> ModelProvider:
        """A new provider of Megatron-Bridge."""


LoadWeights = Callable[[Model], None]
"""Loads this rank's shards of the weights into the chunks of a model; collective over all ranks."""


class Student:
    """π_θ and π_0 on this rank.

    Attributes:
        chunks: this rank's chunks of the live model π_θ, without DDP; a single one without virtual pipelining.
        adapters: adapters of the model, or None under full fine-tuning.
        vocab_size: size of the vocabulary without padding.
        fp8: which passes compute their linears in FP8.
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
        megatron: MegatronConfig | None = None,
        fp8: FP8Config | None = None,
    ) -> None:
        """Builds the live model. Collective over all ranks.

        Args:
            architecture: the architecture to build.
            config: precision and adaptation.
            parallel: layout.
            seed: seed of the initial values of the adapters.
            load_initial: loads θ₀ into a model without adapters.
            load_trained: loads a checkpoint into the live model with its adapters; None starts at θ₀.
            base_first: whether the checkpoint has only adapters, so that `load_initial` is called first; otherwise the
                checkpoint also has θ₀, or under full fine-tuning all of θ.
            megatron: fields of megatron-core's configuration.
            fp8: which passes compute their linears in FP8.
        """
        self.fp8 = fp8 or FP8Config()
        self._megatron = megatron or MegatronConfig()
        self._architecture = architecture
        self._config = config
        self._parallel = parallel
        self._load_initial = load_initial
        self._wrapped: list[WrappedChunk] | None = None
        self.vocab_size = architecture.vocab_size
        self.chunks: list[ModelChunk] = self._build()
        _refuse_soft_cap(self.chunks[-1])
        self.adapters: Adapters | None = None
        if load_trained is None or base_first:
            load_initial(self.chunks)
        if config.adaptation == "lora":
            self.adapters = Adapters(self.chunks, config.lora, seed=seed)
        if load_trained is not None:
            load_trained(self.chunks)

    @cached_property
    def base(self) -> FrozenBase:
        """The frozen initial weights.

        Under full fine-tuning the first use loads a copy. This is collective, and needs the memory of the weights a
        second time, on the device or the host (`student.frozen_copy`).
        """
        if self.adapters is not None:
            return AdaptersOff(self.chunks, self.adapters)
        copy = self._build()
        self._load_initial(copy)
        return FrozenCopy(copy, on_host=self._config.frozen_copy == "host")

    @cached_property
    def base_weight(self) -> Tensor:
        """This rank's shard of the frozen output matrix [V_pad/tp, H]; on the last pipeline stage."""
        with self.base.model() as base:
            return output_weight(base[-1]).detach()

    @cached_property
    def centre(self) -> Tensor:
        """Mean output vector of the frozen output matrix over the true vocabulary [H]: one all-reduce, once."""
        return mean_output_vector(self.base_weight, self.vocab_shard)

    @property
    def keeps_copies_on_host(self) -> bool:
        """Whether copies of all weights are kept in host memory between their uses."""
        return self.adapters is None and self._config.frozen_copy == "host"

    @property
    def vocab_shard(self) -> VocabShard:
        """The vocabulary entries of `weight` and `base_weight`; on the last pipeline stage."""
        return VocabShard(self.vocab_size, self.weight.shape[0], self.tp_group)

    @property
    def weight(self) -> Tensor:
        """This rank's shard of the live output matrix [V_pad/tp, H]; on the last pipeline stage."""
        return output_weight(self.chunks[-1])

    @property
    def gpt(self) -> ModelChunk:
        """The only chunk of the live model."""
        (only,) = self.chunks
        return only

    @property
    def split(self) -> SequenceSplit:
        """How sequences are split over ranks."""
        return SequenceSplit.of(self.chunks[0])

    @property
    def holds_output(self) -> bool:
        """Whether this rank has a shard of the output matrix, as on the last pipeline stage."""
        return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))

    @property
    def owns_loss(self) -> bool:
        """Whether this rank reports the loss of the tokens that it owns: tensor-parallel rank 0 of the last stage.

        Tensor-parallel ranks compute the same loss for the same tokens; context-parallel ranks own different tokens.
        """
        return self.holds_output and self.tp_group.rank() == 0

    @property
    def owns_trajectories(self) -> bool:
        """Whether this rank reports its replica's trajectories: one rank of the replica, on the last stage."""
        return self.owns_loss and self.split.context_rank == 0

    @property
    def main_gradient(self) -> MainGradient | None:
        """Megatron's fp32 gradient buffer of the live output matrix; None if it is frozen or the buffer is not fp32.

        To be used only in `forward_backward`: the loss adds to it in the forward pass.
        """
        weight, wrapped = self.weight, self._wrapped
        buffer = getattr(weight, "main_grad", None)
        if wrapped is None or not weight.requires_grad or buffer is None or buffer.dtype != torch.float32:
            return None
        return MainGradient(buffer, upstream_of_loss(), placeholder=wrapped[-1].ddp_config.overlap_grad_reduce)

    @property
    def tp_group(self) -> torch.distributed.ProcessGroup:
        """The tensor-parallel group, over which the vocabulary is sharded."""
        group: torch.distributed.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        return group

    @property
    def is_replica_leader(self) -> bool:
        """Whether this rank is the replica leader, which does the work that is done once per copy of the model."""
        return not (
            parallel_state.get_tensor_model_parallel_rank()
            or parallel_state.get_pipeline_model_parallel_rank()
            or parallel_state.get_context_parallel_rank()
        )

    @property
    def dp_group(self) -> torch.distributed.ProcessGroup:
        """The data-parallel group, over which the prompts of a step are distributed."""
        group: torch.distributed.ProcessGroup = parallel_state.get_data_parallel_group()
        return group

    def wrap(self, config: OptimizerConfig) -> list[WrappedChunk]:
        """The chunks of the live model in Megatron's DDP, which the first call creates."""
        if self._wrapped is None:
            self._wrapped = wrap_for_training(self.chunks, config, self._megatron.values("ddp"))
        return self._wrapped

    def _build(self) -> list[ModelChunk]:
        fields = self._megatron.values("model")
        return build_chunks(self._architecture.provider(), self._config, self._parallel, fields, self.fp8)


def _refuse_soft_cap(model: ModelChunk) -> None:
    """Refuses a model whose logits are not linear in the hidden state (Gemma 2), because the loss assumes W·h."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        raise UserError(
            "model",
            got=f"final_logit_softcapping={cap}",
            need="logits that are the output matrix times the hidden state",
            fix="set student.source to a model without a cap on its final logits",
        )
