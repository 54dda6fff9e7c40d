"""Megatron-Bridge's LoRA on Megatron's linears, with the same initial values in every layout."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import LoRAConfig
from nemo_popsd.megatron.interfaces import ModelChunk, ShardedParameter
from nemo_popsd.runtime.cpu import adapt_megatron

adapt_megatron()  # Without CUDA, Megatron-Bridge cannot be imported before this.
from megatron.bridge.peft.lora import LoRA  # noqa: E402
from megatron.bridge.peft.lora_layers import LoRALinear  # noqa: E402
from megatron.core.tensor_parallel.layers import (  # noqa: E402
    set_defaults_if_not_set_tensor_model_parallel_attributes,
)


class Adapters:
    """The adapters on the chunks of one model; they are added once, and disabled for the frozen branches."""

    def __init__(self, chunks: Sequence[ModelChunk], config: LoRAConfig, *, seed: int) -> None:
        """Freezes `chunks`, wraps their target linears and samples the A matrices; the B matrices are 0.

        Megatron-Bridge samples each rank's shard from that rank's generator, so the initial adapters would depend on
        the layout. Here each full matrix is sampled (Xavier normal) from a generator seeded by `seed` and the
        parameter's name in the full model, and each rank keeps its shard.
        """
        self._chunks = list(chunks)
        self._lora = LoRA(
            target_modules=list(config.targets), dim=config.rank, alpha=config.alpha, dropout=config.dropout
        )
        modules = [name for chunk in chunks for name, _ in chunk.decoder.named_modules()]
        possible = {name.rsplit(".", 1)[-1] for name in modules if "linear_" in name}
        if not config.targets or not possible.issuperset(config.targets):
            raise UserError(
                "adapters",
                got=f"student.lora.targets={list(config.targets)}",
                need=f"some of {', '.join(sorted(possible))}",
                fix="set student.lora.targets",
            )
        self._lora(self._chunks, training=True)
        gather_in_adapters(self._chunks)
        for chunk in chunks:
            for parameter in chunk.parameters():
                set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            for name, module in chunk.named_modules():
                if name.endswith("adapter.linear_in"):
                    _sample_full(module, f"{full_model_name(chunk, name)}.weight", seed)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context in which the model is bit-identical to the frozen base."""
        self._lora.disable_adapter_layers(self._chunks)
        try:
            yield
        finally:
            self._lora.enable_adapter_layers(self._chunks)


def gather_in_adapters(chunks: Sequence[ModelChunk]) -> None:
    """Under sequence parallelism, makes each adapter gather its own input instead of using the layer's gathered input.

    `megatron.bridge.peft.utils.get_adapter_attributes_from_linear` makes Transformer Engine's fused norm and linear
    return the gathered output of the norm. Transformer Engine, up to at least 2.20, drops the gradient of that output
    (`transformer_engine.pytorch.module.layernorm_linear._LayerNormLinear.backward`): every gradient below the adapter
    would be wrong although the loss is right.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, LoRALinear) and getattr(module.to_wrap, "return_layernorm_output_gathered", False):
            module.to_wrap.return_layernorm_output_gathered = False
            module.adapter.disable_sequence_parallel_comm = False


def full_model_name(chunk: ModelChunk, name: str) -> str:
    """The full model's name for the module or parameter `name` of `chunk`.

    In `name`, layers are indexed from the first one of the chunk, and experts from the first one of the rank.
    """
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
    if "local_experts" in parts[:-1]:
        group = chunk.pg_collection.ep
        place = parts.index("local_experts") + 1
        parts[place] = str(int(parts[place]) + chunk.config.num_moe_experts // group.size() * group.rank())
    return ".".join(parts)


@torch.no_grad()
def merged_state(model: ModelChunk, config: LoRAConfig) -> dict[str, Tensor]:
    """State of a model without adapters that computes the same as `model` with its adapters, as shards of this rank.

    Collective: one all-gather over the tensor-parallel group for each adapted linear, of the factor that is split along
    its rank dimension or along the outputs.
    """
    state = {name: value for name, value in model.state_dict().items() if ".adapter." not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            a, b = module.adapter.linear_in.weight, module.adapter.linear_out.weight
            if module.adapter.input_is_parallel:
                b = _all_gather_first_dimension(b, module.adapter.linear_out.tp_group)
            else:
                a = _all_gather_first_dimension(a, module.adapter.linear_in.tp_group)
            update = (b.float() @ a.float()) * (config.alpha / config.rank)
            key = f"{name}.weight"
            state[key] = (state[key].float() + update).to(state[key].dtype)
    return state


def _all_gather_first_dimension(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[r/tp, c] of every rank, concatenated along the first dimension: [r, c]."""
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts)


@torch.no_grad()
def _sample_full(linear: nn.Module, name: str, seed: int) -> None:
    """Fills the weight of `linear` with this rank's shard of a matrix that depends on `name` and `seed` only."""
    weight = cast(ShardedParameter, linear.weight)
    group = cast(dist.ProcessGroup, linear.tp_group)
    size, rank = group.size(), group.rank()
    shape = list(weight.shape)
    dimension = weight.partition_dim
    shape[dimension] *= size
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    std = math.sqrt(2.0 / (shape[0] + shape[1]))
    full = torch.randn(shape, generator=generator) * std
    weight.copy_(full.chunk(size, dim=dimension)[rank])
