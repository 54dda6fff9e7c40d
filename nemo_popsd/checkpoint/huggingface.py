"""Hugging Face directories as source and destination of Megatron models, through Megatron-Bridge.

Megatron-Bridge maps names and shapes. What it leaves open is done here: vocabularies that do not divide by the
tensor-parallel size are padded on the way in and cut on the way out, a tensor that is missing or left over is an
error rather than a warning, and an export is written shard by shard under a temporary name and renamed at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig

from nemo_popsd.errors import UserError
from nemo_popsd.runtime.cpu import adapt_to_cpu

adapt_to_cpu()  # Without CUDA, Megatron-Bridge cannot be imported before this.
from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.models.conversion.param_mapping import AutoMapping  # noqa: E402
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402

# Megatron-Bridge recognises layers by their class's name.
AutoMapping.register_module_type("LocalRMSNorm", "replicated")

_TENSOR_NAMES = "tensor_names.json"
_ARTIFACTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


class HuggingFaceModel:
    """Architecture, tokenizer files and (optionally) weights of one Hugging Face directory.

    Attributes:
        directory: where it lies.
        config: its ``config.json``.
        vocab_size: true vocabulary, without Megatron's padding.
        tensor_names: names of its tensors, but for rotary frequencies, which old checkpoints hold needlessly.
    """

    def __init__(self, directory: str | Path, *, setting: str = "student.source") -> None:
        """Reads configuration and tensor names, no weights.

        Args:
            directory: holds ``config.json`` and either safetensors or ``tensor_names.json`` (as inside a NeMo
                checkpoint, whose weights lie elsewhere).
            setting: what an error asks the user to set.

        Raises:
            UserError: something is missing, or Megatron-Bridge does not know the architecture.
        """
        self.directory = Path(directory)
        if not (self.directory / "config.json").is_file():
            raise UserError(
                f"model {directory}",
                got="no config.json" if self.directory.is_dir() else "no such directory",
                need="a local Hugging Face model directory",
                mend=f"set {setting}",
            )
        try:
            self.config = AutoConfig.from_pretrained(self.directory, trust_remote_code=False)
        except ValueError as error:  # an architecture of its own, whose code lies in the directory
            raise UserError(
                f"model {directory}",
                got=str(error).splitlines()[0],
                need="an architecture that transformers knows: no code from a model's directory is ever run",
                mend=f"set {setting}",
            ) from None
        if not AutoBridge.supports(self.config):
            raise UserError(
                f"model {directory}",
                got=f"architectures={getattr(self.config, 'architectures', None)}",
                need="one that Megatron-Bridge converts: " + ", ".join(AutoBridge.list_supported_models()),
                mend=f"set {setting}",
            )
        self.vocab_size: int = self.config.vocab_size
        self.tensor_names = self._read_tensor_names()

    def _read_tensor_names(self) -> list[str]:
        listed = self.directory / _TENSOR_NAMES
        if listed.is_file():
            names: list[str] = json.loads(listed.read_text())
            return names
        if not any(self.directory.glob("*.safetensors")):
            raise UserError(
                f"model {self.directory}",
                got="no *.safetensors",
                need="weights in safetensors format",
                mend="save the model with safe_serialization=True, or set student.source",
            )
        names = SafeTensorsStateSource(self.directory).get_all_keys()
        return sorted(name for name in names if not name.endswith("rotary_emb.inv_freq"))

    @property
    def _bridge(self) -> Any:
        """A new bridge: one remembers the parameter names of the first model it saw, which adapters change."""
        return AutoBridge.from_hf_config(self.config)._model_bridge

    def provider(self) -> Any:
        """A fresh Megatron-Bridge ``GPTModelProvider`` with this architecture."""
        return self._bridge.provider_bridge(SimpleNamespace(config=self.config, generation_config=None))

    def load(self, model: GPTModel) -> None:
        """Copies the weights into `model`, this rank's shards only. Collective over all ranks.

        Raises:
            UserError: a parameter has no tensor, a tensor no parameter, or a vocabulary another size than
                ``config.json`` says.
        """
        bridge = self._bridge
        state = _VocabularyPaddedState(self, model)
        pretrained = SimpleNamespace(state=state, config=self.config, model_name_or_path=str(self.directory))
        tasks = [t for t in bridge.build_conversion_tasks(pretrained, [model]) if t is not None]
        # A parameter whose tensor is missing still has a task, one that does nothing.
        mapped = {task.param_name for task in tasks if task.megatron_module is not None}
        without = [name for name, _ in model.named_parameters() if name not in mapped]
        used = {name for task in tasks for name in _names(task.mapping.hf_param)}
        ignored = {"lm_head.weight"} if model.share_embeddings_and_output_weights else set()
        left_over = sorted(set(self.tensor_names) - used - ignored)
        if without or left_over:
            raise UserError(
                f"model {self.directory}",
                got=f"parameters without a tensor: {without[:4]}, tensors without a parameter: {left_over[:4]}",
                need="the tensors of the architecture in config.json, no more and no fewer",
                mend="check the files, or set student.source",
            )
        bridge.load_weights_hf_to_megatron(pretrained, [model])

    def export(
        self,
        model: GPTModel,
        output: str | Path,
        *,
        merge_adapters: bool = True,
        shard_bytes: int = 4 << 30,
    ) -> None:
        """Writes `model` as a Hugging Face directory, artifacts included. Collective over all ranks.

        At most one shard of the weights is in memory. Nothing stands at `output` until all is written; what
        stood there is replaced.

        Args:
            model: the student; with LoRA its adapters are merged into the weights when `merge_adapters`.
            output: directory to make.
            merge_adapters: False leaves the adapters out, which gives the base.
            shard_bytes: size at which a new file is begun.
        """
        output = Path(output)
        partial = output.with_name(output.name + ".partial")
        writes = not dist.is_initialized() or dist.get_rank() == 0
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.copy_artifacts(partial)
        names = SimpleNamespace(get_all_keys=lambda: self.tensor_names)
        stream = self._bridge.stream_weights_megatron_to_hf(
            [model],
            SimpleNamespace(state=SimpleNamespace(source=names), config=self.config),
            show_progress=False,
            merge_adapter_weights=merge_adapters,
        )
        vocabulary = self.vocabulary_tensors()
        # What is left unmerged gets PEFT's name from Megatron-Bridge (model_bridge.py:978).
        plain = ((name.replace(".base_layer.weight", ".weight"), w) for name, w in stream)
        tensors = ((name, w[: self.vocab_size] if name in vocabulary else w) for name, w in plain)
        if writes:
            written = _write_shards(tensors, partial, shard_bytes)
            if unlike := written ^ set(self.tensor_names):
                raise RuntimeError(f"{partial}: tensors missing or left over: {sorted(unlike)[:4]}")
            shutil.rmtree(output, ignore_errors=True)
            partial.rename(output)
        else:
            for _ in tensors:  # The stream gathers: every rank takes part.
                pass
        if dist.is_initialized():
            dist.barrier()

    def copy_artifacts(self, destination: Path, *, with_tensor_names: bool = False) -> None:
        """Copies configuration, tokenizer, chat template and generation configuration, not the weights."""
        for pattern in _ARTIFACTS:
            for file in self.directory.glob(pattern):
                if file.name not in (_TENSOR_NAMES, "model.safetensors.index.json"):
                    shutil.copy(file, destination / file.name)
        if with_tensor_names:
            (destination / _TENSOR_NAMES).write_text(json.dumps(self.tensor_names))

    def vocabulary_tensors(self) -> set[str]:
        """Names of the tensors with one row per vocabulary entry."""
        registry = self._bridge.mapping_registry()
        parameters = ("embedding.word_embeddings.weight", "output_layer.weight")
        mappings = [registry.megatron_to_hf_lookup(name) for name in parameters]
        return {name for mapping in mappings if mapping is not None for name in _names(mapping.hf_param)}


class _VocabularyPaddedState(Mapping[str, Tensor]):
    """The directory's tensors, read when asked for, with vocabulary rows padded with zeros to the model's size."""

    def __init__(self, owner: HuggingFaceModel, model: GPTModel) -> None:
        self.source = SafeTensorsStateSource(owner.directory)
        self._owner = owner
        self._vocabulary = owner.vocabulary_tensors()
        self._rows = model.vocab_size

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.source.load_tensors([name])[name]
        if name in self._vocabulary:
            if tensor.shape[0] != self._owner.vocab_size:
                raise UserError(
                    f"model {self._owner.directory}",
                    got=f"{tensor.shape[0]} rows in {name}",
                    need=f"vocab_size={self._owner.vocab_size} rows, as config.json says",
                    mend="check the files, or set student.source",
                )
            tensor = pad(tensor, (0, 0, 0, self._rows - tensor.shape[0]))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.get_all_keys())

    def __len__(self) -> int:
        return len(self.source.get_all_keys())


def _names(hf_param: str | Mapping[str, str]) -> Sequence[str]:
    return [hf_param] if isinstance(hf_param, str) else list(hf_param.values())


def _write_shards(tensors: Iterator[tuple[str, Tensor]], directory: Path, shard_bytes: int) -> set[str]:
    """Writes safetensors files of about `shard_bytes`, and the index when there is more than one; returns the names."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        nonlocal held
        file = directory / f"shard-{len(shards)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes it readable by its owner alone.
        shards.append(list(shard))
        shard.clear()
        held = 0

    for name, weight in tensors:
        size = weight.numel() * weight.element_size()
        if shard and held + size > shard_bytes:
            flush()
        # A clone: tensors of one gather may share storage, which safetensors refuses.
        shard[name] = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        held += size
        total += size
    flush()
    written = {name for names in shards for name in names}
    if len(shards) == 1:
        (directory / "shard-0.safetensors").rename(directory / "model.safetensors")
        return written
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}.safetensors").rename(directory / file)
        index.update(dict.fromkeys(names, file))
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    return written
