"""The sizes of a model that determine memory and work, read from a config.json; needs no tokenizer and no weights."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_popsd.data.models import model_path
from nemo_popsd.embedded.names import PREFIX, asset
from nemo_popsd.errors import UserError
from nemo_popsd.files.json_files import parse_json, read_json
from nemo_popsd.settings.checks import shown

_EMBEDDED = Path(__file__).parent / "models"

# Properties of a family that `config.json` does not state: biases of q, k and v; norms of queries and keys, per head or
# over all heads together.
_FAMILIES = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    "qwen3_moe": {"qkv_bias": False, "qk_norm": True},
    "olmo3": {"qkv_bias": False, "qk_norm": True, "joint_qk_norm": True},
}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A decoder of one of the known families; the symbols are those of docs/planning.md."""

    name: str
    """Name of the model."""
    vocab: int
    """V, vocabulary size without padding."""
    hidden: int
    """H, width of the residual stream."""
    layers: int
    """L, layers."""
    heads: int
    """n, query heads."""
    groups: int
    """g, key-value heads."""
    head_dim: int
    """d, size of a head."""
    intermediate: int
    """I, width of the MLP, or of one expert."""
    tied: bool
    """Whether the output matrix is the embedding."""
    qkv_bias: bool
    """Whether q, k and v have biases."""
    output_bias: bool
    """Whether the output of attention has a bias (Llama's `attention_bias`)."""
    qk_norm: bool
    """Whether queries and keys are normalised."""
    joint_qk_norm: bool = False
    """Whether these norms are over all heads together, with weights sharded like the heads."""
    experts: int = 0
    """E, experts of each layer; 0 for a dense model."""
    experts_per_token: int = 0
    """k, experts that a token visits."""

    @property
    def query_width(self) -> int:
        """n·d."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """g·d."""
        return self.groups * self.head_dim


def embedded_models() -> list[str]:
    """Names of the models whose sizes ship with the package."""
    return sorted(file.stem for file in _EMBEDDED.glob("*.json"))


@dataclass(frozen=True)
class ModelFile:
    """The ``config.json`` of a model."""

    name: str
    """Name of the model."""
    content: Mapping[str, object]
    """Content of the file."""
    origin: str
    """Where the file was read."""


def read_model_file(source: str) -> ModelFile:
    """The ``config.json`` of the model that `student.source` names.

    Args:
        source: a Hugging Face directory, a NeMo checkpoint (directory or `.nemo`), an embedded model, or, if no such
            file exists, a path whose last part is one of `embedded_models`, case-insensitively.

    Raises:
        UserError: `source` is not one of these.
    """
    if source.startswith(PREFIX):
        return ModelFile(source, json.loads((asset(source) / "config.json").read_text()), f"config.json of {source}")
    path = model_path(source)
    for file in (path / "config.json", path / "huggingface" / "config.json"):
        if file.is_file():
            return ModelFile(Path(source).name, _object(read_json(file), str(file)), str(file))
    if path.suffix == ".nemo" and path.is_file():
        content = _object(parse_json(_from_archive(path), source), source)
        return ModelFile(path.stem, content, f"config.json in {source}")
    embedded = {name.lower(): name for name in embedded_models()}
    name = embedded.get(path.name.lower())
    if name is None or path.exists():
        raise UserError(
            "plan",
            got=f"student.source={source!r}" + (", which has no config.json" if path.exists() else ""),
            need="a model's directory, or one of " + ", ".join(embedded_models()),
            fix="set student.source",
        )
    origin = f"sizes that ship with nemo_popsd as {name}; {source} is not on this machine"
    return ModelFile(name, json.loads((_EMBEDDED / f"{name}.json").read_text()), origin)


def read_sizes(source: str) -> tuple[ModelSizes, str]:
    """Sizes of the model that `student.source` names, and a description of where they were read.

    Args:
        source: see `read_model_file`.

    Raises:
        UserError: `source` is not a model, or its architecture is not supported.
    """
    file = read_model_file(source)
    return _parse(file.content, file.name), file.origin


def _from_archive(path: Path) -> bytes:
    try:
        with tarfile.open(path) as archive:
            member = next(m for m in archive if m.name.removeprefix("./") == "huggingface/config.json")
            file = archive.extractfile(member)
            assert file is not None
            return file.read()
    except (tarfile.TarError, EOFError, OSError, StopIteration):
        raise UserError(
            "plan", got=f"{path} without huggingface/config.json", need="a NeMo checkpoint", fix="set student.source"
        ) from None


def _object(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise UserError(where, got="not an object", need="a config.json", fix="correct it, or set student.source")
    return value


def _size(config: Mapping[str, object], name: str, default: object = None) -> int:
    """The size `name` of `config`, or `default` if it is missing.

    Raises:
        ValueError: the size is not a positive integer.
    """
    value = config.get(name, default)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**9:
        raise ValueError(f"{name}={shown(value)}")
    return value


def _parse(config: Mapping[str, object], name: str) -> ModelSizes:
    model_type = config.get("model_type")
    family = _FAMILIES.get(str(model_type))
    sparse_everywhere = config.get("decoder_sparse_step", 1) == 1 and not config.get("mlp_only_layers")
    if family is None or not sparse_everywhere:
        raise UserError(
            f"model {name}",
            got=f"{model_type=}" + ("" if sparse_everywhere else " with dense layers among sparse ones"),
            need="one of " + ", ".join(_FAMILIES) + ", all layers alike",
            fix="set student.source",
        )
    try:
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        sparse = model_type == "qwen3_moe"
        return ModelSizes(
            name=name,
            vocab=_size(config, "vocab_size"),
            hidden=hidden,
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            groups=_size(config, "num_key_value_heads", heads),
            head_dim=_size(config, "head_dim", hidden // heads),
            intermediate=_size(config, "moe_intermediate_size" if sparse else "intermediate_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family["qkv_bias"] or bool(config.get("attention_bias", False)),
            output_bias=bool(config.get("attention_bias", False)),
            qk_norm=family["qk_norm"],
            joint_qk_norm=family.get("joint_qk_norm", False),
            # Transformers 5 writes the second name.
            experts=_size(config, "num_experts", config.get("num_local_experts")) if sparse else 0,
            experts_per_token=_size(config, "num_experts_per_tok") if sparse else 0,
        )
    except ValueError as error:
        raise UserError(
            f"model {name}",
            got=f"a config.json with {error}",
            need="the sizes of the model, integers above 0",
            fix="correct it, or set student.source",
        ) from None
