"""Reads NeMo 2 checkpoints (`context/`, `weights/`), which NeMo's LLM collection up to 2.7 writes. Runs no code.

`context/model.yaml` describes the model as a tree of Python calls. It is read as plain data and never called: the
name of the model's class determines the Hugging Face architecture, and the values of its configuration are copied.
Weights are read by `nemo_popsd.checkpoint.distributed_tensors`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from nemo_popsd.checkpoint.architecture import read_architecture
from nemo_popsd.checkpoint.completeness import expected_shapes
from nemo_popsd.checkpoint.distributed_tensors import DistributedTensors
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.model_files import GENERATION, TENSOR_NAMES
from nemo_popsd.checkpoint.tensor_map import MegatronWeights
from nemo_popsd.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILES, load_tokenizer
from nemo_popsd.errors import UserError
from nemo_popsd.files.reading import YAML_BYTES, check_yaml, foreign_entry, read_text
from nemo_popsd.megatron.build import Model

_PREFIX = "module."
_FIX = "convert it with NeMo's own export_ckpt"
_ARCHITECTURES = {
    "Qwen3Model": ("Qwen3ForCausalLM", "qwen3"),
    "Qwen2Model": ("Qwen2ForCausalLM", "qwen2"),
    "LlamaModel": ("LlamaForCausalLM", "llama"),
}
"""Hugging Face architecture and model type by NeMo 2's model class. A model with experts has the same class."""
_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "seq_length": "max_position_embeddings",
    "init_method_std": "initializer_range",
}
_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "rope_theta",
    "rms_norm_eps",
)
_EXPERT_KEYS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
"""Keys of the Hugging Face configuration by keys of NeMo 2; `_EXPERT_KEYS` are added for a model with experts."""


def is_nemo2_checkpoint(path: str | Path) -> bool:
    """Whether `path` looks like a NeMo 2 checkpoint."""
    return (Path(path) / "context").is_dir() and (Path(path) / "weights").is_dir()


class Nemo2Checkpoint:
    """An open NeMo 2 checkpoint.

    Attributes:
        directory: the checkpoint.
        architecture: configuration and tokenizer of the model, as a temporary Hugging Face directory.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads `context/` and the index of `weights/`. Reads no weights.

        Raises:
            UserError: the checkpoint is damaged, or its model is not supported.
        """
        self.directory = Path(path)
        if reason := foreign_entry(self.directory):
            raise self._refused(reason, "a directory of plain files")
        self._stored = DistributedTensors(self.directory / "weights")
        self._temporary = tempfile.TemporaryDirectory(prefix="nemo_popsd_")
        folder = Path(self._temporary.name)
        self._copy_tokenizer(folder)
        content = self._huggingface_config()
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        config = read_architecture(folder, setting="student.source", trust_remote_code=False).config
        shapes = expected_shapes(config)
        (folder / TENSOR_NAMES).write_text(json.dumps(sorted(shapes)))
        self.architecture = HuggingFaceModel(folder)
        self._weights().require_complete(shapes)

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights by Hugging Face names; each tensor is read on access."""
        return self._weights()

    def _weights(self) -> MegatronWeights:
        return MegatronWeights(self._stored, self.architecture.tensor_map(), prefix=_PREFIX)

    def load(self, model: Model) -> None:
        """Loads the weights into a model without adapters. Collective over all ranks."""
        self.architecture.load(model, self.tensors())

    def precision(self) -> str:
        """Precision of its weights: `bf16` or `fp32`."""
        return "bf16" if self._stored.dtypes(_PREFIX) <= {torch.bfloat16} else "fp32"

    def _copy_tokenizer(self, folder: Path) -> None:
        configs = sorted(self.directory.glob("context/**/tokenizer_config.json"))
        for name in (GENERATION, *TOKENIZER_FILES) if configs else ():
            if (configs[0].parent / name).is_file():
                shutil.copy(configs[0].parent / name, folder / name)

    def _huggingface_config(self) -> dict[str, object]:
        tree = self._model_tree()
        name = str(tree.get("_target_", "")).rpartition(".")[2]
        config = tree.get("config")
        if name not in _ARCHITECTURES or not isinstance(config, dict):
            raise self._refused(f"a model of the class {name!r}", f"one of {', '.join(_ARCHITECTURES)}")
        architecture, model_type = _ARCHITECTURES[name]
        keys = _KEYS
        if config.get("num_moe_experts") is not None:
            if name != "Qwen3Model":
                raise self._refused(f"experts in {name}", "experts only in Qwen3Model")
            architecture, model_type, keys = "Qwen3MoeForCausalLM", "qwen3_moe", {**_KEYS, **_EXPERT_KEYS}
        content = {key: config[nemo] for nemo, key in keys.items() if config.get(nemo) is not None}
        if missing := sorted(key for key in _REQUIRED if key not in content):
            raise self._refused(f"a configuration without {missing[0]}", "all sizes of the architecture")
        if config.get("seq_len_interpolation_factor") is not None:
            raise self._refused("seq_len_interpolation_factor", "a model without interpolated positions")
        if model_type == "qwen3_moe":
            content["norm_topk_prob"] = not config.get("moe_router_pre_softmax", False)
        if "scale_factor" in config:
            content["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": config["scale_factor"],
                "low_freq_factor": config.get("low_freq_factor", 1),
                "high_freq_factor": config.get("high_freq_factor", 4),
                "original_max_position_embeddings": config.get("old_context_len", 8192),
            }
        dtype = "bfloat16" if self.precision() == "bf16" else "float32"
        vocabulary = self._vocab_size(config, Path(self._temporary.name))
        return {
            "architectures": [architecture],
            "model_type": model_type,
            **content,
            "vocab_size": vocabulary,
            "torch_dtype": dtype,
        }

    def _model_tree(self) -> dict[str, object]:
        file = self.directory / "context" / "model.yaml"
        try:
            text = read_text(file, f"NeMo 2 checkpoint {self.directory}", fix=_FIX, limit=YAML_BYTES)
            check_yaml(text)
            # `safe_load` makes plain data only; a tag that requests an object is an error.
            tree = yaml.safe_load(text)
        except UserError:
            raise
        except (ValueError, yaml.YAMLError) as error:
            raise self._refused(
                f"an unreadable context/model.yaml ({' '.join(str(error).split())})", "a YAML file of plain data"
            ) from None
        if not isinstance(tree, dict):
            raise self._refused("a context/model.yaml without keys", "a file that describes a model")
        return tree

    def _vocab_size(self, config: dict[str, Any], folder: Path) -> int:
        """Size of the vocabulary: from the configuration, else from the tokenizer, else of the stored embedding, which
        includes Megatron's padding.
        """
        if config.get("vocab_size") is not None:
            return int(config["vocab_size"])
        if (folder / TOKENIZER_CONFIG).is_file():
            return len(load_tokenizer(folder, setting="SRC"))
        key = f"{_PREFIX}embedding.word_embeddings.weight"
        if key not in self._stored.shapes:
            raise self._refused(f"no tensor {key}", "weights of a GPT model")
        return int(self._stored.shapes[key][0])

    def _refused(self, got: str, need: str) -> UserError:
        return UserError(f"NeMo 2 checkpoint {self.directory}", got=got, need=need, fix=_FIX)
