"""Maps tensors of a Hugging Face directory to those of a Megatron distributed checkpoint and back, one at a time.

Names come from Megatron-Bridge's mapping of the architecture. A distributed checkpoint contains unsharded tensors with
the names of Transformer Engine's layers, whatever layout wrote it: the layer index is the first dimension of a tensor,
the expert index the second. So this module needs neither a model nor a layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_popsd.checkpoint.distributed_tensors import DistributedTensors, Piece
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import VOCABULARY_MULTIPLE
from nemo_popsd.runtime.cpu import adapt_megatron

adapt_megatron()  # Without CUDA, Megatron-Bridge cannot be imported before this.
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge  # noqa: E402
from megatron.bridge.models.conversion.param_mapping import (  # noqa: E402
    AutoMapping,
    GatedMLPMapping,
    QKVMapping,
    merge_qkv_weights,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402

from nemo_popsd.compat.megatron_bridge import split_query_key_value  # noqa: E402

_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


class TensorSource(Protocol):
    """Tensors by Hugging Face names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading its data."""

    def __getitem__(self, name: str) -> Tensor:
        """Reads one tensor."""


@dataclass(frozen=True)
class MegatronTensor:
    """One parameter of one layer, and the Hugging Face tensors from which it is built."""

    name: str
    """Name of the parameter in Transformer Engine's layers."""
    parts: tuple[str, ...]
    """Hugging Face names: the tensor itself; gate and up; or query, key and value."""

    @property
    def key(self) -> str:
        """Key in a distributed checkpoint: the name without the indices of layer and expert."""
        name = _EXPERT.sub(r"mlp.experts.experts.\1.\2", self.name)
        return _LAYER.sub(r"decoder.layers.\2", name)

    @property
    def position(self) -> tuple[int, ...]:
        """Indices of layer and expert, if the parameter has them."""
        layer, expert = _LAYER.match(self.name), _EXPERT.search(self.name)
        return tuple(int(group) for match in (layer, expert) if match for group in match.groups() if group.isdigit())


class TensorMap:
    """The map for all tensors of one architecture.

    Attributes:
        names: names of the Hugging Face tensors.
        tensors: the parameters that are built from them.
        vocabulary: names of the tensors of shape [V, H] with one vector per vocabulary entry.
    """

    def __init__(
        self,
        bridge: MegatronModelBridge,
        provider: GPTModelProvider,
        names: Sequence[str],
        *,
        vocab_size: int,
        vocabulary: set[str],
    ):
        """Looks up every name.

        Args:
            bridge: Megatron-Bridge's bridge of the architecture.
            provider: its provider, for the numbers of layers, experts and heads.
            names: names of the Hugging Face tensors.
            vocab_size: size of the vocabulary without padding.
            vocabulary: names of the tensors of shape [V, H].

        Raises:
            UserError: a tensor does not belong to the architecture, or one is missing.
        """
        self.names = list(names)
        self._provider = provider
        self._vocab_size = vocab_size
        self.vocabulary = vocabulary
        registry = bridge.mapping_registry()
        self._tied = provider.share_embeddings_and_output_weights
        self._embedding = str(registry.megatron_to_hf_lookup("embedding.word_embeddings.weight").hf_param)
        self.tensors: list[MegatronTensor] = []
        self._owner: dict[str, tuple[MegatronTensor, int]] = {}
        for name in names:
            if name in self._owner or (self._tied and name in vocabulary and name != self._embedding):
                continue
            mapping = registry.hf_to_megatron_lookup(name)
            if not isinstance(mapping, AutoMapping | GatedMLPMapping | QKVMapping):
                raise UserError(
                    "model",
                    got=f"a tensor {name}" + (f" with a {type(mapping).__name__}" if mapping else ""),
                    need=f"the tensors that {type(bridge).__name__} maps",
                    fix="check the files, or use another model",
                )
            tensor = MegatronTensor(mapping.megatron_param, _parts(mapping.hf_param))
            self.tensors.append(tensor)
            self._owner.update({part: (tensor, index) for index, part in enumerate(tensor.parts)})
        if missing := sorted(self._owner.keys() - set(names)):
            raise UserError(
                "model",
                got=f"no tensor {missing[0]}",
                need="the tensors of the architecture in config.json",
                fix="check the files, or use another model",
            )

    def owner(self, name: str) -> MegatronTensor:
        """The parameter that contains the Hugging Face tensor `name`; for a tied output matrix, the embedding."""
        return self._owner[name if name in self._owner else self._embedding][0]

    def join(self, tensor: MegatronTensor, parts: Sequence[Tensor]) -> Tensor:
        """Builds Megatron's tensor from the Hugging Face tensors; the vocabulary is padded with zeros."""
        if len(parts) == 3:
            merged: Tensor = merge_qkv_weights(self._provider, *parts)
            return merged
        joined = torch.cat(list(parts)) if len(parts) == 2 else parts[0]
        if tensor.parts[0] in self.vocabulary:
            joined = pad(joined, (0, 0, 0, self._padded_vocabulary - joined.shape[0]))
        return joined

    def split(self, tensor: MegatronTensor, joined: Tensor) -> tuple[Tensor, ...]:
        """Splits Megatron's tensor into the Hugging Face tensors, in the order of `tensor.parts`.

        Also splits the matrix B of an adapter, which has the same output dimension.
        """
        if len(tensor.parts) == 3:
            return split_query_key_value(self._provider, joined)
        if len(tensor.parts) == 2:
            return joined.chunk(2)
        return (joined[: self._vocab_size] if tensor.parts[0] in self.vocabulary else joined,)

    @property
    def _padded_vocabulary(self) -> int:
        return math.ceil(self._vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def pieces(self, source: TensorSource, dtype: torch.dtype) -> Iterator[Piece]:
        """Yields the pieces of a distributed checkpoint with the tensors of `source`, which are read on writing."""
        counts = (self._provider.num_layers, self._provider.num_moe_experts)
        for tensor in self.tensors:
            shapes = [source.shape(part) for part in tensor.parts]
            length = sum(shape[0] for shape in shapes)
            if tensor.parts[0] in self.vocabulary:
                length = self._padded_vocabulary
            outer = counts[: len(tensor.position)]
            yield Piece(
                key=tensor.key,
                position=tensor.position,
                shape=(*outer, length, *shapes[0][1:]),
                dtype=dtype,
                make=self._maker(tensor, source),
            )

    def _maker(self, tensor: MegatronTensor, source: TensorSource) -> Callable[[], Tensor]:
        return lambda: self.join(tensor, [source[part] for part in tensor.parts])


class MegatronWeights(Mapping[str, Tensor]):
    """The tensors of a distributed checkpoint by Hugging Face names, without adapters."""

    def __init__(self, stored: DistributedTensors, tensor_map: TensorMap, *, prefix: str = "") -> None:
        """Keeps references only.

        Args:
            stored: the checkpoint.
            tensor_map: map of its architecture.
            prefix: prefix of every key in the checkpoint.
        """
        self._stored, self._map, self._prefix = stored, tensor_map, prefix
        self._last_read: tuple[MegatronTensor, tuple[Tensor, ...]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Reads one tensor.

        Raises:
            UserError: the tensor is missing, or the checkpoint is damaged.
        """
        tensor = self._map.owner(name)
        # The names of one parameter are requested in sequence: the parameter is read once for all of them.
        if self._last_read is None or self._last_read[0] is not tensor:
            self._last_read = None
            self._last_read = (tensor, self._map.split(tensor, self._read(tensor.key, tensor)))
        return self._last_read[1][tensor.parts.index(name) if name in tensor.parts else 0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._map.names)

    def __len__(self) -> int:
        return len(self._map.names)

    def require_complete(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the index lists all tensors of the architecture, each with its shape. Reads no tensor.

        Args:
            shapes: shapes of the Hugging Face tensors by name.

        Raises:
            UserError: names the first tensor that is missing or has the wrong shape or type.
        """
        for tensor in self._map.tensors:
            key, position = self._require(tensor.key, tensor)
            stored = self._stored.shapes[key]
            length, inner = sum(shapes[part][0] for part in tensor.parts), shapes[tensor.parts[0]][1:]
            padded = tensor.parts[0] in self._map.vocabulary and tuple(stored[:1]) >= (length,)
            expected = (stored[0] if padded else length, *inner)
            if tuple(stored[len(position) :]) != expected or any(
                index >= count for index, count in zip(position, stored, strict=False)
            ):
                raise self._refused(f"{key} of shape {list(stored)}, where {tensor.name} has shape {list(expected)}")
            if self._stored.dtype(key) not in _DTYPES:
                raise self._refused(f"{key} of type {self._stored.dtype(key)}")

    def require_adapters(self, targets: Sequence[str]) -> None:
        """Checks that the index lists both factors of an adapter on every linear layer of `targets`.

        Raises:
            UserError: names the first factor that is missing.
        """
        for tensor in self._map.tensors:
            linear = tensor.key.removesuffix(".weight")
            if linear.rpartition(".")[2] in targets and linear != tensor.key and not _EXPERT.search(tensor.name):
                for factor in ("linear_in", "linear_out"):
                    self._require(f"{linear}.adapter.{factor}.weight", tensor)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] of the adapter on the tensor `name`, or None if it has no adapter.

        Tensors that Megatron fuses (query, key and value; gate and up) share one A; each has its part of B.
        """
        tensor = self._map.owner(name)
        linear = tensor.key.removesuffix(".weight")
        a, b = (f"{linear}.adapter.{factor}.weight" for factor in ("linear_in", "linear_out"))
        if name not in tensor.parts or linear == tensor.key or self._locate(a, tensor) is None:
            return None
        return self._read(a, tensor), self._map.split(tensor, self._read(b, tensor))[tensor.parts.index(name)]

    def _locate(self, key: str, tensor: MegatronTensor) -> tuple[str, tuple[int, ...]] | None:
        """Stored key and position of `key` in the layer of `tensor`: stacked over layers, or one key per layer."""
        stacked = self._prefix + key
        if stacked in self._stored.shapes:
            return stacked, tensor.position
        if not tensor.position:
            return None
        layer, *expert = tensor.position
        single = self._prefix + key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
        return (single, tuple(expert)) if single in self._stored.shapes else None

    def _read(self, key: str, tensor: MegatronTensor) -> Tensor:
        stored_key, position = self._require(key, tensor)
        return self._stored.read(stored_key, *position)

    def _require(self, key: str, tensor: MegatronTensor) -> tuple[str, tuple[int, ...]]:
        location = self._locate(key, tensor)
        if location is None:
            raise self._refused(f"no tensor {self._prefix}{key}")
        return location

    def _refused(self, got: str) -> UserError:
        return UserError(
            f"checkpoint {self._stored.directory}",
            got=got,
            need="weights of the architecture in its configuration",
            fix="use another checkpoint",
        )


class MergedWeights(Mapping[str, Tensor]):
    """Weights with merged adapters: W + s·B·A, computed in fp32 and rounded once to the type of W."""

    def __init__(self, base: Mapping[str, Tensor], adapters: MegatronWeights, *, scale: float) -> None:
        """Keeps references only.

        Args:
            base: W by Hugging Face names.
            adapters: contains A and B.
            scale: s = alpha / rank.
        """
        self._base, self._adapters, self._scale = base, adapters, scale

    def __getitem__(self, name: str) -> Tensor:
        weight, factors = self._base[name], self._adapters.factors(name)
        if factors is None:
            return weight
        a, b = factors
        return (weight.float() + (b.float() @ a.float()) * self._scale).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def _parts(hf_param: str | Mapping[str, str]) -> tuple[str, ...]:
    if isinstance(hf_param, str):
        return (hf_param,)
    order = ("q", "k", "v") if len(hf_param) == 3 else ("gate", "up")
    return tuple(hf_param[name] for name in order)
