"""Loads Megatron models from Hugging Face directories and exports them, through Megatron-Bridge.

Megatron-Bridge maps names and shapes. This module adds: vocabularies are padded to Megatron's size on loading and
truncated on export; a missing or unexpected tensor is an error rather than a warning; an export is written shard by
shard in a temporary directory that is renamed at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from nemo_popsd.checkpoint.architecture import CONFIG, read_architecture
from nemo_popsd.checkpoint.model_card import CARD
from nemo_popsd.checkpoint.model_files import TENSOR_NAMES, read_artifacts, read_tensor_names
from nemo_popsd.checkpoint.rotation import PARAMETERS, SCALING, THETA
from nemo_popsd.checkpoint.safetensors_files import SafetensorsFiles, write_shards
from nemo_popsd.checkpoint.tensor_map import TensorMap
from nemo_popsd.data.tokenizer import TOKENIZER_FILES
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import new_directory
from nemo_popsd.files.ownership import EXPORT
from nemo_popsd.megatron.build import Model, chunks_of
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.runtime.cpu import adapt_megatron

adapt_megatron()  # Without CUDA, Megatron-Bridge cannot be imported before this.
from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge  # noqa: E402
from megatron.bridge.models.conversion.param_mapping import AutoMapping  # noqa: E402
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

# Megatron-Bridge looks up the parallelism of a layer by the name of its class.
AutoMapping.register_module_type("LocalRMSNorm", "replicated")

SHARD_BYTES = 4 << 30
"""Size at which an export starts a new file."""


class HuggingFaceModel:
    """Architecture, tokenizer files and optionally weights of one Hugging Face directory.

    Attributes:
        directory: the directory.
        config: the transformers configuration.
        vocab_size: size of the vocabulary without Megatron's padding.
        tensor_names: names of its tensors, without the rotary frequencies that old checkpoints contain.
        artifacts: content of the configuration, tokenizer and chat template files by name. They are read at the start,
            since a run writes them into checkpoints after `directory` may have been removed, and translated to a form
            that transformers 4 and 5 both read.
        overrides: keys of ``config.json`` in the form of transformers 4, for a reader that supports only this form;
            empty if the file has them already.
    """

    def __init__(
        self, directory: str | Path, *, setting: str = "student.source", trust_remote_code: bool = False
    ) -> None:
        """Reads configuration and tensor names, no weights.

        Args:
            directory: contains ``config.json`` and either safetensors files or ``tensor_names.json`` (inside a NeMo
                checkpoint, which stores the weights in another folder).
            setting: the setting that an error message names.
            trust_remote_code: whether Python files in `directory` may be run.

        Raises:
            UserError: the architecture is not supported (see `read_architecture`), the tensors are not those of the
                architecture (see `require_complete`), or a file cannot be read.
        """
        self.directory = Path(directory)
        self.overrides: dict[str, object] = {}
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
        """The weights. Reads the headers of the files; each tensor is read on access.

        Raises:
            UserError: the files are missing or damaged.
        """
        return self._files

    @cached_property
    def _files(self) -> SafetensorsFiles:
        return SafetensorsFiles(self.directory)

    def precision(self) -> str:
        """The precision that represents all weights exactly: `bf16` if all tensors are bf16, otherwise `fp32`.

        Raises:
            UserError: there are no weights.
        """
        return "bf16" if self.tensors().dtypes() <= {torch.bfloat16} else "fp32"

    def tensor_map(self) -> TensorMap:
        """The map from its tensors to those of a Megatron distributed checkpoint.

        Raises:
            UserError: a tensor does not belong to the architecture, or one is missing.
        """
        return TensorMap(
            self._bridge,
            self.provider(),
            self.tensor_names,
            vocab_size=self.vocab_size,
            vocabulary=self.vocabulary_tensors(),
        )

    @property
    def _bridge(self) -> MegatronModelBridge:
        """A new bridge: a bridge caches the parameter names of its first model, and adapters change the names."""
        return AutoBridge.from_hf_config(self.config)._model_bridge

    def provider(self) -> GPTModelProvider:
        """A new ``GPTModelProvider`` of Megatron-Bridge for this architecture."""
        return self._bridge.provider_bridge(SimpleNamespace(config=self.config, generation_config=None))

    def load(self, model: Model, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Copies this rank's shards of the weights into `model`. Collective over all ranks.

        Args:
            model: of this architecture, without adapters.
            tensors: by Hugging Face names; None reads the files of the directory.

        Raises:
            UserError: a parameter has no tensor, or a tensor has no parameter.
        """
        bridge, chunks = self._bridge, chunks_of(model)
        state = _VocabularyPaddedState(self, chunks[0], self.tensors() if tensors is None else tensors)
        pretrained = SimpleNamespace(state=state, config=self.config, model_name_or_path=str(self.directory))
        tasks = [t for t in bridge.build_conversion_tasks(pretrained, chunks) if t is not None]
        # A parameter without a tensor has a task too, without a module.
        mapped = {id(task.param_weight) for task in tasks if task.megatron_module is not None}
        tied = chunks[0].share_embeddings_and_output_weights
        unfilled = [
            name
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            # A tied output matrix on another stage is copied from the first stage's embedding.
            if id(parameter) not in mapped and not (tied and name == "output_layer.weight")
        ]
        used = {name for task in tasks for name in _names(task.mapping.hf_param)}
        ignored = {"lm_head.weight"} if tied else set()
        if chunks[0].config.expert_model_parallel_size > 1:  # the other ranks load the other experts
            group = parallel_state.get_expert_model_parallel_group()
            by_rank: list[set[str]] = [set()] * group.size()
            dist.all_gather_object(by_rank, used, group=group)
            used = set().union(*by_rank)
        unused = sorted(set(self.tensor_names) - used - ignored)
        if unfilled or unused:
            raise UserError(
                f"model {self.directory}",
                got=f"parameters without a tensor: {unfilled[:4]}, tensors without a parameter: {unused[:4]}",
                need="exactly the tensors of the architecture in config.json",
                fix="check the files, or set student.source",
            )
        # Megatron-Bridge's own method looks for the last stage's output matrix in that stage's first chunk.
        bridge._broadcast_shared_embeddings = _copy_tied_embedding
        bridge.load_weights_hf_to_megatron(pretrained, chunks)

    def stream(self, model: Model, *, merge_adapters: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yields all tensors with their Hugging Face names, unsharded on every rank, on the model's device.

        Iterating is collective over the ranks that share the model (tensor, pipeline, expert); all must iterate to the
        end.

        Args:
            model: the student, or its chunks.
            merge_adapters: whether LoRA adapters are merged into the weights; False yields the weights of the base.
        """
        stream = self._bridge.stream_weights_megatron_to_hf(
            chunks_of(model),
            SimpleNamespace(state=_NamesWithoutTensors(self.tensor_names), config=self.config),
            cpu=False,  # only the rank that writes copies the tensors to the host
            show_progress=False,
            merge_adapter_weights=merge_adapters,
        )
        vocabulary = self.vocabulary_tensors()
        for name, weight in stream:
            # `stream_weights_megatron_to_hf` gives unmerged weights PEFT's names.
            plain = name.replace(".base_layer.weight", ".weight")
            yield plain, weight[: self.vocab_size] if plain in vocabulary else weight

    def stream_adapters(self, model: Model) -> Iterator[tuple[str, Tensor]]:
        """Yields the factors A and B of all adapters of a dense student with PEFT's names, unsharded on every rank.

        Linear layers that Megatron fuses share one A, which is yielded once for each of them. Iterating is collective
        over the ranks that share the model; all must iterate to the end.

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
        card: str | None = None,
    ) -> None:
        """Writes `model` as a Hugging Face directory with its artifacts. Collective over all ranks.

        Holds one shard in memory. `output` appears when all files are complete; an earlier export there is replaced,
        any other file or directory is refused.

        Args:
            model: the student, or its chunks.
            output: directory to write.
            merge_adapters: whether LoRA adapters are merged into the weights; False writes the base.
            shard_bytes: size at which a new file starts.
            card: text of the model card; None writes none.
        """
        tensors = self.stream(model, merge_adapters=merge_adapters)
        if not dist.is_initialized() or dist.get_rank() == 0:
            on_host = ((name, tensor.cpu()) for name, tensor in tensors)
            dtype = chunks_of(model)[0].config.params_dtype
            self.write(output, on_host, dtype=dtype, shard_bytes=shard_bytes, card=card)
        else:
            for _ in tensors:  # The iteration is collective.
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
        card: str | None = None,
    ) -> None:
        """Writes a Hugging Face directory with `tensors` and this directory's artifacts. Runs on this process only.

        Holds one shard in memory. `output` appears when all files are complete; an earlier export there is replaced,
        any other file or directory is refused.

        Args:
            output: directory to write.
            tensors: one for each of `tensor_names`.
            dtype: data type of the tensors, which is written to ``config.json``.
            shard_bytes: size at which a new file starts.
            card: text of the model card; None writes none.
        """
        with new_directory(Path(output), EXPORT) as partial:
            self.copy_artifacts(partial)
            if card is not None:
                (partial / CARD).write_text(card, encoding="utf-8")
            _declare_dtype(partial / "config.json", dtype)
            written = write_shards(tensors, partial, shard_bytes)
            if different := written ^ set(self.tensor_names):
                raise RuntimeError(f"{partial}: tensors missing or unexpected: {sorted(different)[:4]}")

    def copy_artifacts(self, destination: Path, *, with_tensor_names: bool = False) -> None:
        """Writes the configuration, tokenizer, chat template and generation configuration."""
        for name, content in self.artifacts.items():
            (destination / name).write_bytes(content)
        if with_tensor_names:
            (destination / TENSOR_NAMES).write_text(json.dumps(self.tensor_names))

    def copy_tokenizer(self, destination: Path) -> None:
        """Writes the tokenizer and the chat template."""
        for name, content in self.artifacts.items():
            if name in TOKENIZER_FILES:
                (destination / name).write_bytes(content)

    def vocabulary_tensors(self) -> set[str]:
        """Names of the tensors of shape [V, H] with one vector per vocabulary entry."""
        registry = self._bridge.mapping_registry()
        parameters = ("embedding.word_embeddings.weight", "output_layer.weight")
        mappings = [registry.megatron_to_hf_lookup(name) for name in parameters]
        return {name for mapping in mappings if mapping is not None for name in _names(mapping.hf_param)}


class _NamesWithoutTensors(dict[str, Tensor]):
    """State of a checkpoint with names but no tensors; Megatron-Bridge uses the names to select what it exports."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.source = SimpleNamespace(get_all_keys=lambda: names)


class _VocabularyPaddedState(Mapping[str, Tensor]):
    """The directory's tensors, read on access; [V, H] tensors are padded with zeros to the model's vocabulary."""

    def __init__(self, owner: HuggingFaceModel, model: ModelChunk, tensors: Mapping[str, Tensor]) -> None:
        # Megatron-Bridge reads the names from `source`.
        self.source = SimpleNamespace(get_all_keys=lambda: list(tensors))
        self._tensors = tensors
        self._vocabulary = owner.vocabulary_tensors()
        self._padded_vocabulary = model.vocab_size

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name in self._vocabulary:
            tensor = pad(tensor, (0, 0, 0, self._padded_vocabulary - tensor.shape[0]))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _copy_tied_embedding(chunks: Sequence[ModelChunk]) -> None:
    """Copies a tied embedding from the first pipeline stage to the last, with one broadcast between the two."""
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
    """Writes `dtype` into a ``config.json``; a file that has this value already is left unchanged."""
    content = json.loads(file.read_text())
    key = "torch_dtype" if "torch_dtype" in content else "dtype"
    name = str(dtype).removeprefix("torch.")
    if content.get(key) != name:
        content[key] = name
        file.write_text(json.dumps(content, indent=2) + "\n")
