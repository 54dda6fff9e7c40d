"""Hugging Face directories as source and destination of Megatron models, through Megatron-Bridge.

Megatron-Bridge maps names and shapes. What it leaves open is done here: vocabularies that do not divide by the
tensor-parallel size are padded on the way in and cut on the way out, a tensor that is missing or left over is an
error rather than a warning, and an export is written shard by shard under a temporary name and renamed at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from nemo_popsd.checkpoint.architecture import CONFIG, read_architecture
from nemo_popsd.checkpoint.model_files import TENSOR_NAMES, read_artifacts, read_tensor_names
from nemo_popsd.checkpoint.rotation import PARAMETERS, SCALING, THETA
from nemo_popsd.checkpoint.safetensors_files import SafetensorsFiles, write_shards
from nemo_popsd.checkpoint.tensor_map import TensorMap
from nemo_popsd.data.tokenizer import TOKENIZER_FILES
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import new_directory
from nemo_popsd.files.ownership import EXPORT
from nemo_popsd.megatron.build import Model, chunks_of
from nemo_popsd.runtime.cpu import adapt_megatron

adapt_megatron()  # Without CUDA, Megatron-Bridge cannot be imported before this.
from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.models.conversion.param_mapping import AutoMapping  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402

# Megatron-Bridge recognises layers by their class's name.
AutoMapping.register_module_type("LocalRMSNorm", "replicated")

SHARD_BYTES = 4 << 30
"""Size at which an export begins a new file."""


class HuggingFaceModel:
    """Architecture, tokenizer files and (optionally) weights of one Hugging Face directory.

    Attributes:
        directory: where it lies.
        config: its ``config.json``.
        vocab_size: true vocabulary, without Megatron's padding.
        tensor_names: names of its tensors, but for rotary frequencies, which old checkpoints hold needlessly.
        artifacts: content of its configuration, tokenizer and chat template files by name, read when it is opened: a
            run writes them into checkpoints long after `directory` may have been removed. What only transformers 5
            reads is in the form that both versions read.
        overrides: keys of ``config.json`` for a reader that may know the form of transformers 4 alone; empty where the
            file has no other.
    """

    def __init__(
        self, directory: str | Path, *, setting: str = "student.source", trust_remote_code: bool = False
    ) -> None:
        """Reads configuration and tensor names, no weights.

        Args:
            directory: holds ``config.json`` and either safetensors or ``tensor_names.json`` (as inside a NeMo
                checkpoint, whose weights lie elsewhere).
            setting: what an error asks the user to set.
            trust_remote_code: whether Python files in `directory` may be run; without it none is.

        Raises:
            UserError: it is no architecture that is converted (see `read_architecture`), the tensors are not those of
                the architecture (see `require_complete`), or a file cannot be read.
        """
        self.directory = Path(directory)
        self.overrides: dict[str, Any] = {}
        architecture = read_architecture(self.directory, setting=setting, trust_remote_code=trust_remote_code)
        self.config = architecture.config
        self.vocab_size: int = self.config.vocab_size
        self.tensor_names = read_tensor_names(self.directory, self.config, lambda: self._files, setting=setting)
        self.artifacts = read_artifacts(self.directory, setting=setting)
        if architecture.changed:
            self.artifacts[CONFIG] = (json.dumps(architecture.content, indent=2) + "\n").encode()
        if PARAMETERS in architecture.content:
            self.overrides = {name: architecture.content[name] for name in (THETA, SCALING)}

    def tensors(self) -> SafetensorsFiles:
        """The weights in the directory's files, whose headers have been read; the numbers are when asked for.

        Raises:
            UserError: there are none, or damaged ones.
        """
        return self._files

    @cached_property
    def _files(self) -> SafetensorsFiles:
        return SafetensorsFiles(self.directory)

    def precision(self) -> str:
        """The one that holds every number of the files: `bf16` where all are bf16, otherwise `fp32`.

        Raises:
            UserError: there are no weights.
        """
        return "bf16" if self.tensors().dtypes() <= {torch.bfloat16} else "fp32"

    def tensor_map(self) -> TensorMap:
        """How its tensors lie in a Megatron distributed checkpoint.

        Raises:
            UserError: a tensor has no place in the architecture, or one is missing.
        """
        return TensorMap(
            self._bridge,
            self.provider(),
            self.tensor_names,
            vocab_size=self.vocab_size,
            vocabulary=self.vocabulary_tensors(),
        )

    @property
    def _bridge(self) -> Any:
        """A new bridge: one remembers the parameter names of the first model it saw, which adapters change."""
        return AutoBridge.from_hf_config(self.config)._model_bridge

    def provider(self) -> Any:
        """A fresh Megatron-Bridge ``GPTModelProvider`` with this architecture."""
        return self._bridge.provider_bridge(SimpleNamespace(config=self.config, generation_config=None))

    def load(self, model: Model, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Copies the weights into `model`, this rank's shards only. Collective over all ranks.

        Args:
            model: a plain model of this architecture.
            tensors: by their Hugging Face names; None reads the files of the directory.

        Raises:
            UserError: a parameter has no tensor, a tensor no parameter, or a vocabulary another size than
                ``config.json`` says.
        """
        bridge, chunks = self._bridge, chunks_of(model)
        state = _VocabularyPaddedState(self, chunks[0], self.tensors() if tensors is None else tensors)
        pretrained = SimpleNamespace(state=state, config=self.config, model_name_or_path=str(self.directory))
        tasks = [t for t in bridge.build_conversion_tasks(pretrained, chunks) if t is not None]
        # A parameter whose tensor is missing still has a task, one that does nothing.
        mapped = {id(task.param_weight) for task in tasks if task.megatron_module is not None}
        tied = chunks[0].share_embeddings_and_output_weights
        without = [
            name
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            # A tied output matrix on a stage of its own is filled from the first stage's embedding.
            if id(parameter) not in mapped and not (tied and name == "output_layer.weight")
        ]
        used = {name for task in tasks for name in _names(task.mapping.hf_param)}
        ignored = {"lm_head.weight"} if tied else set()
        if chunks[0].config.expert_model_parallel_size > 1:  # other ranks have the other experts
            group = parallel_state.get_expert_model_parallel_group()
            by_rank: list[set[str]] = [set()] * group.size()
            dist.all_gather_object(by_rank, used, group=group)
            used = set().union(*by_rank)
        left_over = sorted(set(self.tensor_names) - used - ignored)
        if without or left_over:
            raise UserError(
                f"model {self.directory}",
                got=f"parameters without a tensor: {without[:4]}, tensors without a parameter: {left_over[:4]}",
                need="the tensors of the architecture in config.json, no more and no fewer",
                fix="check the files, or set student.source",
            )
        # Its own looks for the last stage's output matrix in that stage's first chunk (model_bridge.py:1165).
        bridge._broadcast_shared_embeddings = _copy_tied_embedding
        bridge.load_weights_hf_to_megatron(pretrained, chunks)

    def stream(self, model: Model, *, merge_adapters: bool = True) -> Iterator[tuple[str, Tensor]]:
        """All tensors under their Hugging Face names, one after the other, whole on every rank, on the model's device.

        Iterating is collective over the ranks that share the model (tensor, pipeline, expert): all go to the end.

        Args:
            model: the student, or its chunks; with LoRA its adapters are merged into the weights when `merge_adapters`.
            merge_adapters: False leaves the adapters out, which gives the base.
        """
        names = SimpleNamespace(get_all_keys=lambda: self.tensor_names)
        stream = self._bridge.stream_weights_megatron_to_hf(
            chunks_of(model),
            SimpleNamespace(state=SimpleNamespace(source=names), config=self.config),
            cpu=False,  # the one rank that writes copies them to its host
            show_progress=False,
            merge_adapter_weights=merge_adapters,
        )
        vocabulary = self.vocabulary_tensors()
        for name, weight in stream:
            # What is left unmerged gets PEFT's name from Megatron-Bridge (model_bridge.py:978).
            plain = name.replace(".base_layer.weight", ".weight")
            yield plain, weight[: self.vocab_size] if plain in vocabulary else weight

    def stream_adapters(self, model: Model) -> Iterator[tuple[str, Tensor]]:
        """The factors of all adapters of a dense student under PEFT's names, whole on every rank.

        Linears that Megatron keeps as one share their A; each is given with it. Iterating is collective over the
        ranks that share the model: all go to the end.

        Args:
            model: the student with its adapters, or its chunks.
        """
        chunks = chunks_of(model)
        for name, factor in self._bridge.stream_adapter_weights_megatron_to_hf(chunks, cpu=False, show_progress=False):
            yield f"base_model.model.{name}", factor

    def export(
        self,
        model: Model,
        output: str | Path,
        *,
        merge_adapters: bool = True,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Writes `model` as a Hugging Face directory, artifacts included. Collective over all ranks.

        At most one shard of the weights is in memory. Nothing stands at `output` until all is written; an earlier
        export there is replaced, and anything else is refused.

        Args:
            model: the student, or its chunks; with LoRA its adapters are merged into the weights when `merge_adapters`.
            output: directory to make.
            merge_adapters: False leaves the adapters out, which gives the base.
            shard_bytes: size at which a new file is begun.
        """
        tensors = self.stream(model, merge_adapters=merge_adapters)
        if not dist.is_initialized() or dist.get_rank() == 0:
            on_host = ((name, tensor.cpu()) for name, tensor in tensors)
            self.write(output, on_host, dtype=chunks_of(model)[0].config.params_dtype, shard_bytes=shard_bytes)
        else:
            for _ in tensors:  # The stream gathers: every rank takes part.
                pass
        if dist.is_initialized():
            dist.barrier()

    def write(
        self,
        output: str | Path,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Writes a Hugging Face directory with these tensors and this directory's artifacts, from this process alone.

        At most one shard of the weights is in memory. Nothing stands at `output` until all is written; an earlier
        export there is replaced, and anything else is refused.

        Args:
            output: directory to make.
            tensors: one for each of `tensor_names`.
            dtype: of the tensors, which ``config.json`` is made to say.
            shard_bytes: size at which a new file is begun.
        """
        with new_directory(Path(output), EXPORT) as partial:
            self.copy_artifacts(partial)
            _declare_dtype(partial / "config.json", dtype)
            written = write_shards(tensors, partial, shard_bytes)
            if unlike := written ^ set(self.tensor_names):
                raise RuntimeError(f"{partial}: tensors missing or left over: {sorted(unlike)[:4]}")

    def copy_artifacts(self, destination: Path, *, with_tensor_names: bool = False) -> None:
        """Writes configuration, tokenizer, chat template and generation configuration, not the weights."""
        for name, content in self.artifacts.items():
            (destination / name).write_bytes(content)
        if with_tensor_names:
            (destination / TENSOR_NAMES).write_text(json.dumps(self.tensor_names))

    def copy_tokenizer(self, destination: Path) -> None:
        """Writes tokenizer and chat template alone."""
        for name, content in self.artifacts.items():
            if name in TOKENIZER_FILES:
                (destination / name).write_bytes(content)

    def vocabulary_tensors(self) -> set[str]:
        """Names of the tensors with one row per vocabulary entry."""
        registry = self._bridge.mapping_registry()
        parameters = ("embedding.word_embeddings.weight", "output_layer.weight")
        mappings = [registry.megatron_to_hf_lookup(name) for name in parameters]
        return {name for mapping in mappings if mapping is not None for name in _names(mapping.hf_param)}


class _VocabularyPaddedState(Mapping[str, Tensor]):
    """The directory's tensors, read when asked for, with vocabulary rows padded with zeros to the model's size."""

    def __init__(self, owner: HuggingFaceModel, model: GPTModel, tensors: Mapping[str, Tensor]) -> None:
        # What Megatron-Bridge asks for the names.
        self.source = SimpleNamespace(get_all_keys=lambda: list(tensors))
        self._tensors = tensors
        self._vocabulary = owner.vocabulary_tensors()
        self._rows = model.vocab_size

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name in self._vocabulary:
            tensor = pad(tensor, (0, 0, 0, self._rows - tensor.shape[0]))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _copy_tied_embedding(chunks: Sequence[GPTModel]) -> None:
    """Gives the last pipeline stage the first one's embedding, where it is the output matrix too: one broadcast."""
    if not chunks[0].share_embeddings_and_output_weights or chunks[0].config.pipeline_model_parallel_size == 1:
        return
    group = parallel_state.get_embedding_group(check_initialized=False)
    if dist.get_rank() in dist.get_process_group_ranks(group):
        chunk = chunks[0 if chunks[0].pre_process else -1]
        weight = chunk.shared_embedding_or_output_weight().data
        dist.broadcast(weight, src=dist.get_process_group_ranks(group)[0], group=group)


def _names(hf_param: str | Mapping[str, str]) -> Sequence[str]:
    return [hf_param] if isinstance(hf_param, str) else list(hf_param.values())


def _declare_dtype(file: Path, dtype: torch.dtype) -> None:
    """Makes a ``config.json`` say `dtype`; one that says it already stays as it is, byte for byte."""
    content = json.loads(file.read_text())
    key = "torch_dtype" if "torch_dtype" in content else "dtype"
    name = str(dtype).removeprefix("torch.")
    if content.get(key) != name:
        content[key] = name
        file.write_text(json.dumps(content, indent=2) + "\n")
