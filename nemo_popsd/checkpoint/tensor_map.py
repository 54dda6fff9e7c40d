"""Between the tensors of a Hugging Face directory and those of a Megatron distributed checkpoint, one at a time.

Names come from Megatron-Bridge's mapping of the architecture. A distributed checkpoint holds whole tensors, whatever
layout wrote it, under the names of Transformer Engine's layers: the layers of the model are the first dimension of
one tensor, the experts of a layer the second. So nothing here needs a model or a layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_popsd.checkpoint.distributed_tensors import DistributedTensors, Piece
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import VOCABULARY_MULTIPLE
from nemo_popsd.runtime.cpu import adapt_megatron

adapt_megatron()  # Without CUDA, Megatron-Bridge cannot be imported before this.
from megatron.bridge.models.conversion.param_mapping import (  # noqa: E402
    AutoMapping,
    GatedMLPMapping,
    QKVMapping,
    merge_qkv_weights,
    split_qkv_weights,
)

_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


class TensorSource(Protocol):
    """Tensors by their Hugging Face names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the numbers."""

    def __getitem__(self, name: str) -> Tensor:
        """Reads one."""


@dataclass(frozen=True)
class MegatronTensor:
    """One parameter of one layer, and the Hugging Face tensors that it is made of."""

    name: str
    """The parameter's, as Transformer Engine's layers have it."""
    parts: tuple[str, ...]
    """Hugging Face names, in the order of `join`: the tensor itself; gate and up; or query, key and value."""

    @property
    def key(self) -> str:
        """Name in a distributed checkpoint: that of the parameter, without the layer and the expert."""
        name = _EXPERT.sub(r"mlp.experts.experts.\1.\2", self.name)
        return _LAYER.sub(r"decoder.layers.\2", name)

    @property
    def position(self) -> tuple[int, ...]:
        """Layer and expert, as far as it has them."""
        layer, expert = _LAYER.match(self.name), _EXPERT.search(self.name)
        return tuple(int(number) for match in (layer, expert) if match for number in match.groups() if number.isdigit())


class TensorMap:
    """All tensors of one architecture.

    Attributes:
        names: of the Hugging Face tensors.
        tensors: the parameters they make up.
        vocabulary: names of the tensors with one row per vocabulary entry.
    """

    def __init__(self, bridge: Any, provider: Any, names: Sequence[str], *, vocab_size: int, vocabulary: set[str]):
        """Looks every name up.

        Args:
            bridge: Megatron-Bridge's for the architecture.
            provider: its provider, for numbers of layers, experts and heads.
            names: of the Hugging Face tensors.
            vocab_size: true vocabulary.
            vocabulary: names of the tensors with one row per vocabulary entry.

        Raises:
            UserError: a tensor has no place in the architecture.
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
                    got=f"a tensor {name}" + (f" of the kind {type(mapping).__name__}" if mapping else ""),
                    need=f"the tensors that {type(bridge).__name__} knows",
                    fix="check the files, or give another model",
                )
            tensor = MegatronTensor(mapping.megatron_param, _parts(mapping.hf_param))
            self.tensors.append(tensor)
            self._owner.update({part: (tensor, number) for number, part in enumerate(tensor.parts)})
        if missing := sorted(self._owner.keys() - set(names)):
            raise UserError(
                "model",
                got=f"no tensor {missing[0]}",
                need="the tensors of the architecture in config.json",
                fix="check the files, or give another model",
            )

    def owner(self, name: str) -> MegatronTensor:
        """The parameter that holds the Hugging Face tensor `name`; of a tied output matrix, the embedding."""
        return self._owner[name if name in self._owner else self._embedding][0]

    def join(self, tensor: MegatronTensor, parts: Sequence[Tensor]) -> Tensor:
        """Megatron's tensor of the Hugging Face ones; vocabularies are padded with zeros."""
        if len(parts) == 3:
            return merge_qkv_weights(self._provider, *parts)
        joined = torch.cat(list(parts)) if len(parts) == 2 else parts[0]
        if tensor.parts[0] in self.vocabulary:
            joined = pad(joined, (0, 0, 0, self._padded_vocabulary - joined.shape[0]))
        return joined

    def split(self, tensor: MegatronTensor, joined: Tensor) -> tuple[Tensor, ...]:
        """The Hugging Face tensors of Megatron's, in the order of `tensor.parts`; also of the rows of an adapter."""
        if len(tensor.parts) == 3:
            return tuple(split_qkv_weights(self._provider, joined))
        if len(tensor.parts) == 2:
            return joined.chunk(2)
        return (joined[: self._vocab_size] if tensor.parts[0] in self.vocabulary else joined,)

    @property
    def _padded_vocabulary(self) -> int:
        return math.ceil(self._vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def pieces(self, source: TensorSource, dtype: torch.dtype) -> Iterator[Piece]:
        """What a distributed checkpoint with the tensors of `source` consists of; they are read when it is written."""
        counts = (self._provider.num_layers, self._provider.num_moe_experts)
        for tensor in self.tensors:
            shapes = [source.shape(part) for part in tensor.parts]
            rows = sum(shape[0] for shape in shapes)
            if tensor.parts[0] in self.vocabulary:
                rows = self._padded_vocabulary
            outer = counts[: len(tensor.position)]
            yield Piece(
                key=tensor.key,
                position=tensor.position,
                shape=(*outer, rows, *shapes[0][1:]),
                dtype=dtype,
                make=self._maker(tensor, source),
            )

    def _maker(self, tensor: MegatronTensor, source: TensorSource) -> Callable[[], Tensor]:
        return lambda: self.join(tensor, [source[part] for part in tensor.parts])


class MegatronWeights(Mapping[str, Tensor]):
    """The tensors of a distributed checkpoint by their Hugging Face names, adapters left aside."""

    def __init__(self, stored: DistributedTensors, tensor_map: TensorMap, *, prefix: str = "") -> None:
        """Keeps references only.

        Args:
            stored: the checkpoint.
            tensor_map: of its architecture.
            prefix: before every key of the checkpoint.
        """
        self._stored, self._map, self._prefix = stored, tensor_map, prefix
        self._held: tuple[MegatronTensor, tuple[Tensor, ...]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Reads one.

        Raises:
            UserError: the checkpoint lacks it, or is damaged.
        """
        tensor = self._map.owner(name)
        # Names of one parameter come one after the other: it is read once for all of them.
        if self._held is None or self._held[0] is not tensor:
            self._held = None
            self._held = (tensor, self._map.split(tensor, self._read(tensor.key, tensor)))
        return self._held[1][tensor.parts.index(name) if name in tensor.parts else 0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._map.names)

    def __len__(self) -> int:
        return len(self._map.names)

    def require_complete(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint without all tensors of the architecture, each of its shape, from its index alone.

        Args:
            shapes: of the Hugging Face tensors, by name.

        Raises:
            UserError: names the first that is missing or another.
        """
        for tensor in self._map.tensors:
            key, position = self._require(tensor.key, tensor)
            stored = self._stored.shapes[key]
            rows, inner = sum(shapes[part][0] for part in tensor.parts), shapes[tensor.parts[0]][1:]
            padded = tensor.parts[0] in self._map.vocabulary and tuple(stored[:1]) >= (rows,)
            whole = (stored[0] if padded else rows, *inner)
            if tuple(stored[len(position) :]) != whole or any(
                place >= count for place, count in zip(position, stored, strict=False)
            ):
                raise self._refused(f"{key} of the shape {list(stored)}, in which {tensor.name} is not {list(whole)}")
            if self._stored.dtype(key) not in _DTYPES:
                raise self._refused(f"{key} in {self._stored.dtype(key)}")

    def require_adapters(self, targets: Sequence[str]) -> None:
        """Refuse a checkpoint without both factors on every linear of `targets`.

        Raises:
            UserError: names the first that is missing.
        """
        for tensor in self._map.tensors:
            linear = tensor.key.removesuffix(".weight")
            if linear.rpartition(".")[2] in targets and linear != tensor.key and not _EXPERT.search(tensor.name):
                for factor in ("linear_in", "linear_out"):
                    self._require(f"{linear}.adapter.{factor}.weight", tensor)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] of the adapter on the tensor `name`, or None when it has none.

        Tensors that Megatron keeps as one (query, key and value; gate and up) share one A, and each has its rows of B.
        """
        tensor = self._map.owner(name)
        linear = tensor.key.removesuffix(".weight")
        a, b = (f"{linear}.adapter.{factor}.weight" for factor in ("linear_in", "linear_out"))
        if name not in tensor.parts or linear == tensor.key or self._place(a, tensor) is None:
            return None
        return self._read(a, tensor), self._map.split(tensor, self._read(b, tensor))[tensor.parts.index(name)]

    def _place(self, key: str, tensor: MegatronTensor) -> tuple[str, tuple[int, ...]] | None:
        """Where the checkpoint has `key` of the layer of `tensor`: with the layers as a dimension, or one by one."""
        stacked = self._prefix + key
        if stacked in self._stored.shapes:
            return stacked, tensor.position
        if not tensor.position:
            return None
        layer, *expert = tensor.position
        single = self._prefix + key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
        return (single, tuple(expert)) if single in self._stored.shapes else None

    def _read(self, key: str, tensor: MegatronTensor) -> Tensor:
        place = self._require(key, tensor)
        return self._stored.read(place[0], *place[1])

    def _require(self, key: str, tensor: MegatronTensor) -> tuple[str, tuple[int, ...]]:
        place = self._place(key, tensor)
        if place is None:
            raise self._refused(f"no tensor {self._prefix}{key}")
        return place

    def _refused(self, got: str) -> UserError:
        return UserError(
            f"checkpoint {self._stored.directory}",
            got=got,
            need="weights of the architecture in its configuration",
            fix="give another checkpoint",
        )


class MergedWeights(Mapping[str, Tensor]):
    """Weights W with the adapters of a checkpoint in them: W + s·B·A, computed in fp32 and rounded once."""

    def __init__(self, base: Mapping[str, Tensor], adapters: MegatronWeights, *, scale: float) -> None:
        """Keeps references only.

        Args:
            base: W, by Hugging Face names.
            adapters: holds A and B.
            scale: s, alpha over rank.
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
