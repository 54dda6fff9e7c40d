"""Compares the tensors that vLLM would receive, unsharded under Hugging Face's names, with those of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import LoRAConfig
from nemo_popsd.megatron.interfaces import ModelChunk

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor by name."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FIRST = "model.embed_tokens."
_MOST_NAMED = 3
_MODULES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Hugging Face linears by Megatron linear."""


@dataclass(frozen=True)
class Handover:
    """Tensors that the stage of this rank contributes to the weights of a server."""

    adapters: bool
    """Whether the tensors are those of the adapters; otherwise they are all weights, with adapters merged."""
    tensors: int
    """Number of tensors."""
    bytes: int
    """Bytes of the tensors."""


def adapter_shapes(weights: Shapes, lora: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """PEFT's names and shapes of the adapters of a dense model.

    Args:
        weights: shapes of the weights of the model in transformers.
        lora: rank and targets.
    """
    adapted = {module for target in lora.targets for module in _MODULES[target]}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.rpartition(".")[2] in adapted:
            outputs, inputs = shape
            shapes[f"base_model.model.{module}.lora_A.weight"] = (lora.rank, inputs)
            shapes[f"base_model.model.{module}.lora_B.weight"] = (outputs, lora.rank)
    return shapes


def of_stage(shapes: Shapes, chunks: Sequence[ModelChunk]) -> dict[str, tuple[int, ...]]:
    """The entries of `shapes` that belong to the layers of `chunks`, the model chunks of one rank."""
    layers = {layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers}
    embeds, ends = any(chunk.pre_process for chunk in chunks), any(chunk.post_process for chunk in chunks)

    def is_here(name: str) -> bool:
        layer = _LAYER.search(name)
        if layer is not None:
            return int(layer[1]) in layers
        return embeds if _FIRST in name else ends

    return {name: shape for name, shape in shapes.items() if is_here(name)}


@contextmanager
def lone_stage_of_model() -> Iterator[None]:
    """Context in which other pipeline stages contribute nothing to gathers over the stages."""
    stages: dist.ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
    gather = dist.all_gather_object

    def gathered(found: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
        if group != stages:
            gather(found, own, group=group)
            return
        nothing = type(own)() if isinstance(own, bool | list) else None
        found[:] = [own if stage == stages.rank() else nothing for stage in range(stages.size())]

    with mock.patch.object(dist, "all_gather_object", gathered):
        yield


def rehearse_handover(tensors: Iterable[tuple[str, Tensor]], expected: Shapes, *, adapters: bool) -> Handover:
    """Receives the tensors as a server does, and compares them with those of transformers.

    Args:
        tensors: tensors of the stage of this rank, as the run sends them.
        expected: shapes of the tensors of transformers on this stage, see `of_stage`.
        adapters: whether the tensors are those of the adapters.

    Raises:
        UserError: a name is missing, unknown or duplicate, or a shape differs.
    """
    found: dict[str, tuple[int, ...]] = {}
    twice, size = [], 0
    for name, tensor in tensors:
        if name in found:
            twice.append(name)
        found[name] = tuple(tensor.shape)
        size += tensor.numel() * tensor.element_size()
    missing = sorted(expected.keys() - found.keys())
    other = sorted(name for name, shape in found.items() if expected.get(name) != shape)
    if missing or other or twice:
        shown = [*missing[:_MOST_NAMED], *other[:_MOST_NAMED]]
        raise UserError(
            "rehearsal of the weights for vLLM",
            got="; ".join([_named(name, found) for name in shown] + [f"{name} twice" for name in twice[:_MOST_NAMED]]),
            need="; ".join(_named(name, expected) for name in shown) or "each tensor once",
            fix="set student.source to a model of a supported family",
        )
    return Handover(adapters, len(found), size)


def _named(name: str, shapes: Shapes) -> str:
    return f"{name} {list(shapes[name])}" if name in shapes else f"no {name}"
