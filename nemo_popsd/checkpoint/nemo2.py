"""NeMo 2 checkpoints (`context/`, `weights/`), as NeMo's LLM collection up to 2.7 writes them. Reading runs no code.

`context/model.yaml` describes the model as a tree of Python calls. It is read as plain data: the name of the model's
class chooses the Hugging Face architecture, and the numbers of its configuration are carried over. What the tree would
call is never called. Weights are read as in `nemo_popsd.checkpoint.distributed_tensors`.
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
_MEND = "convert it with NeMo's own export_ckpt"
_ARCHITECTURES = {
    "Qwen3Model": ("Qwen3ForCausalLM", "qwen3"),
    "Qwen2Model": ("Qwen2ForCausalLM", "qwen2"),
    "LlamaModel": ("LlamaForCausalLM", "llama"),
}
"""Hugging Face architecture and model type of NeMo 2's model classes. Experts show in the configuration alone."""
_NUMBERS = {
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
_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "rope_theta", "rms_norm_eps")
_EXPERTS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}


def is_nemo2_checkpoint(path: str | Path) -> bool:
    """Whether `path` is to be read as a NeMo 2 checkpoint."""
    return (Path(path) / "context").is_dir() and (Path(path) / "weights").is_dir()


class Nemo2Checkpoint:
    """A NeMo 2 checkpoint to read.

    Attributes:
        directory: where it lies.
        architecture: model and tokenizer, as a Hugging Face directory in a temporary place.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads `context/` and the index of `weights/`, no weights.

        Raises:
            UserError: it is damaged, or a model that is not converted.
        """
        self.directory = Path(path)
        if reason := foreign_entry(self.directory):
            raise self._refused(reason, "a directory of plain files")
        self._stored = DistributedTensors(self.directory / "weights")
        self._place = tempfile.TemporaryDirectory(prefix="nemo_popsd_")
        place = Path(self._place.name)
        self._copy_tokenizer(place)
        content = self._huggingface_config()
        (place / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        config = read_architecture(place, setting="student.source", trust_remote_code=False).config
        shapes = expected_shapes(config)
        (place / TENSOR_NAMES).write_text(json.dumps(sorted(shapes)))
        self.architecture = HuggingFaceModel(place)
        self._weights().require_complete(shapes)

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights by their Hugging Face names, each read when asked for."""
        return self._weights()

    def _weights(self) -> MegatronWeights:
        return MegatronWeights(self._stored, self.architecture.tensor_map(), prefix=_PREFIX)

    def load(self, model: Model) -> None:
        """Fills a plain model. Collective over all ranks."""
        self.architecture.load(model, self.tensors())

    def precision(self) -> str:
        """Of its weights: `bf16` or `fp32`."""
        return "bf16" if self._stored.dtypes(_PREFIX) <= {torch.bfloat16} else "fp32"

    def _copy_tokenizer(self, place: Path) -> None:
        found = sorted(self.directory.glob("context/**/tokenizer_config.json"))
        for name in (GENERATION, *TOKENIZER_FILES) if found else ():
            if (found[0].parent / name).is_file():
                shutil.copy(found[0].parent / name, place / name)

    def _huggingface_config(self) -> dict[str, Any]:
        tree = self._model_tree()
        name = str(tree.get("_target_", "")).rpartition(".")[2]
        config = tree.get("config")
        if name not in _ARCHITECTURES or not isinstance(config, dict):
            raise self._refused(f"a model of the class {name!r}", f"one of {', '.join(_ARCHITECTURES)}")
        architecture, kind = _ARCHITECTURES[name]
        names = _NUMBERS
        if config.get("num_moe_experts") is not None:
            if name != "Qwen3Model":
                raise self._refused(f"experts in {name}", "experts in Qwen3Model alone")
            architecture, kind, names = "Qwen3MoeForCausalLM", "qwen3_moe", {**_NUMBERS, **_EXPERTS}
        content = {theirs: config[ours] for ours, theirs in names.items() if config.get(ours) is not None}
        if missing := sorted(theirs for theirs in _NEEDED if theirs not in content):
            raise self._refused(f"a configuration without {missing[0]}", "the numbers of the architecture")
        if config.get("seq_len_interpolation_factor") is not None:
            raise self._refused("seq_len_interpolation_factor", "positions that are not interpolated")
        if kind == "qwen3_moe":
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
        vocabulary = self._vocab_size(config, Path(self._place.name))
        return {
            "architectures": [architecture],
            "model_type": kind,
            **content,
            "vocab_size": vocabulary,
            "torch_dtype": dtype,
        }

    def _model_tree(self) -> dict[str, Any]:
        file = self.directory / "context" / "model.yaml"
        try:
            text = read_text(file, f"NeMo 2 checkpoint {self.directory}", fix=_MEND, limit=YAML_BYTES)
            check_yaml(text)
            # `safe_load` makes plain data only; a tag that asks for an object is an error.
            tree = yaml.safe_load(text)
        except UserError:
            raise
        except (ValueError, yaml.YAMLError) as error:
            raise self._refused(f"context/model.yaml that is refused: {' '.join(str(error).split())}", "one") from None
        if not isinstance(tree, dict):
            raise self._refused("context/model.yaml that describes no model", "one that does")
        return tree

    def _vocab_size(self, config: dict[str, Any], place: Path) -> int:
        """The true vocabulary: the configuration's, else the tokenizer's, else the rows there are, padding and all."""
        if config.get("vocab_size") is not None:
            return int(config["vocab_size"])
        if (place / TOKENIZER_CONFIG).is_file():
            return len(load_tokenizer(place, setting="SRC"))
        key = f"{_PREFIX}embedding.word_embeddings.weight"
        if key not in self._stored.shapes:
            raise self._refused(f"no tensor {key}", "weights of a GPT model")
        return int(self._stored.shapes[key][0])

    def _refused(self, got: str, need: str) -> UserError:
        return UserError(f"NeMo 2 checkpoint {self.directory}", got=got, need=need, fix=_MEND)
