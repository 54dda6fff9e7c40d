"""The supported architectures, and every key that their ``config.json`` may have.

An allow-list: each key is passed to Megatron, must have a certain value, or is known to have no effect on what the
model computes. Any other key is refused, since it may request something that Megatron would silently ignore. The tests
compare the logits of every accepted configuration with those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_popsd.checkpoint.rotation import PARAMETERS, SCALING, THETA, UnsupportedError, check_rotation, with_rotation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MAX_SIZE = 1 << 24
_MAX_PARTS = 4096
"""Upper bound on layers, heads and experts, so that a damaged value is refused."""
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_EXPERTS = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
_PARTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok")
_COMPUTED = {"num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", THETA, SCALING, PARAMETERS}
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1, None),
}
_WITHOUT_EFFECT = frozenset(
    {
        # Names of the model and its classes, and the software that wrote the files.
        *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "tokenizer_class"),
        *("_name_or_path", "name_or_path", "_commit_hash", "unsloth_version", "unsloth_fixed", "model_max_length"),
        *("id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task", "prefix"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
        # Initialization and training.
        *("initializer_range", "gradient_checkpointing", "router_aux_loss_coef", "use_bfloat16"),
        # Kernels and outputs of transformers.
        *("use_cache", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
        *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict", "torchscript"),
        # Generation, which `rollout` and `evaluation` configure.
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "temperature"),
        *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        "num_return_sequences",
    }
)
_DEFAULT_THETA = 10000.0
_DTYPES = ("float32", "bfloat16", "float16", None)


@dataclass(frozen=True)
class Family:
    """One architecture."""

    architecture: str
    """Value of ``architectures``."""
    model_type: str
    """Value of ``model_type``."""
    rotations: tuple[str, ...] = ("default",)
    """Supported values of ``rope_type``."""
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Keys with the values that are supported, in addition to `_FIXED`."""
    unused: frozenset[str] = frozenset()
    """Keys that have no effect, given the values in `fixed`."""
    windows: bool = False
    """Whether layers may have sliding-window attention."""
    unrotated: bool = False
    """Whether layers may have no rotary embedding."""
    sizes: tuple[str, ...] = (*_SIZES, "num_key_value_heads")
    """Required keys with integer values."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names of transformers 5, and the corresponding names of transformers 4."""

    def read(
        self, content: Mapping[str, object], make: Callable[[dict[str, object]], PretrainedConfig]
    ) -> tuple[PretrainedConfig, dict[str, object]]:
        """Checks that Megatron computes what `content` describes, and makes the transformers configuration.

        Args:
            content: of a ``config.json``.
            make: makes the configuration from the keys that it is given.

        Returns:
            The configuration, and `content` in a form that transformers 4 and 5 read in the same way.

        Raises:
            UnsupportedError: names the first key that is not supported.
        """
        full = with_rotation(content, by_layer=self.windows)
        for newer, older in self.aliases.items():
            if newer in full and full.setdefault(older, full[newer]) != full[newer]:
                raise UnsupportedError(
                    f"{newer}={_shortened(full[newer])} contradicting {older}={_shortened(full[older])}"
                )
        self._refuse_unknown(full)
        for key in ("torch_dtype", "dtype"):
            if full.get(key) not in _DTYPES:
                raise UnsupportedError(f"{key}={full[key]!r}")
        self._check_sizes(full)
        if THETA not in full and (self.windows or self.unrotated):
            raise UnsupportedError(f"no {THETA}")  # The default is not `_DEFAULT_THETA`, or not that of transformers 4.
        theta, scaling = full.get(THETA, _DEFAULT_THETA), full.get(SCALING)
        check_rotation(theta, scaling, rope_types=self.rotations, fixed_llama3=not self.windows)
        self._check_layers(full)
        excluded = {key for key in full if key.startswith("_") or key in ("attn_implementation", PARAMETERS)}
        config = make({key: value for key, value in full.items() if key not in excluded})
        self._check_values(full, config)
        _check_heads(config)
        return config, full

    def _refuse_unknown(self, content: Mapping[str, object]) -> None:
        from transformers import PretrainedConfig

        known = {*self.sizes, *self.aliases, *_COMPUTED, *_FIXED, *self.fixed, *self.unused, *_WITHOUT_EFFECT}
        if self.windows:
            known |= {"sliding_window", "layer_types"}
        if self.unrotated:
            known |= {"no_rope_layers", "no_rope_layer_interval"}
        common_defaults = PretrainedConfig().to_dict()
        for key, value in content.items():
            if key not in known and (key not in common_defaults or common_defaults[key] != value):
                raise UnsupportedError(
                    f"{key}={_shortened(value)}, an unknown key that may change what the model computes"
                )

    def _check_sizes(self, content: Mapping[str, object]) -> None:
        optional = [key for key in ("num_key_value_heads", "head_dim") if content.get(key) is not None]
        for key in (*self.sizes, *optional):
            value = content.get(key)
            limit = _MAX_PARTS if key in _PARTS else _MAX_SIZE
            if key not in content:
                raise UnsupportedError(f"no {key}")
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise UnsupportedError(f"{key}={_shortened(value)} (not an integer from 1 to {limit})")
        eps = content.get("rms_norm_eps")
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            raise UnsupportedError(f"rms_norm_eps={eps!r}" if "rms_norm_eps" in content else "no rms_norm_eps")

    def _check_layers(self, content: Mapping[str, Any]) -> None:
        """Refuses values of which transformers 5 would report only that they are invalid."""
        tied, layers = content.get("tie_word_embeddings", False), content.get("layer_types")
        if not isinstance(tied, bool):
            raise UnsupportedError(f"tie_word_embeddings={tied!r}")
        supported = {"full_attention", "sliding_attention"} if self.windows else {"full_attention"}
        count = content["num_hidden_layers"]
        if layers is not None and (len(layers) != count or not supported.issuperset(layers)):
            raise UnsupportedError(f"layer_types={_shortened(layers)} of {count} layers")
        if self.unrotated:
            _check_rotated(content.get("no_rope_layers"), content.get("no_rope_layer_interval"), count)

    def _check_values(self, content: Mapping[str, Any], config: PretrainedConfig) -> None:
        """Refuses values that are not in `fixed`, whether from the file or transformers' defaults."""
        absent = object()
        for key, values in {**_FIXED, **self.fixed}.items():
            value = content.get(key, getattr(config, key, absent))
            if value is not absent and value not in values:
                raise UnsupportedError(f"{key}={_shortened(value)}")
        layers = content.get("layer_types", getattr(config, "layer_types", None))
        if self.windows and "sliding_attention" in layers:
            window = config.sliding_window
            if isinstance(window, bool) or not isinstance(window, int) or window < 1:
                raise UnsupportedError(f"sliding_window={window!r}")


def _check_heads(config: PretrainedConfig) -> None:
    """Refuses inconsistent numbers of heads, head widths and experts."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None)
    if width is None and config.hidden_size % heads:
        raise UnsupportedError(f"hidden_size={config.hidden_size} with num_attention_heads={heads} and no head_dim")
    if heads % groups:
        raise UnsupportedError(f"num_attention_heads={heads} with num_key_value_heads={groups}")
    if (width or config.hidden_size // heads) % 2:
        raise UnsupportedError(f"heads of the odd width {width or config.hidden_size // heads}")
    if getattr(config, "num_experts_per_tok", 0) > getattr(config, "num_experts", 0):
        raise UnsupportedError(f"num_experts_per_tok={config.num_experts_per_tok} of num_experts={config.num_experts}")


def _check_rotated(rotated: object, interval: object, layers: int) -> None:
    """Refuses values that do not state for each layer whether it has a rotary embedding (1 in `rotated`)."""
    if rotated is not None:
        values = rotated if isinstance(rotated, list) else []
        if len(values) != layers or any(isinstance(value, bool) or value not in (0, 1) for value in values):
            raise UnsupportedError(f"no_rope_layers={_shortened(rotated)} of {layers} layers")
    elif isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise UnsupportedError(f"no no_rope_layers, and no_rope_layer_interval={_shortened(interval)}")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_NO_WINDOW: dict[str, tuple[object, ...]] = {"use_sliding_window": (False,), "use_mrope": (False,)}
_QWEN_UNUSED = frozenset({"sliding_window", "max_window_layers", "layer_types"})
_QK_NORM: dict[str, tuple[object, ...]] = {"attention_bias": (False,), "qkv_bias": (False,), "use_qk_norm": (True,)}

FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "Qwen2ForCausalLM",
            "qwen2",
            fixed={**_NO_WINDOW, "attention_bias": (True,), "qkv_bias": (True,)},
            unused=_QWEN_UNUSED,
        ),
        Family("Qwen3ForCausalLM", "qwen3", fixed={**_NO_WINDOW, **_QK_NORM}, unused=_QWEN_UNUSED),
        Family(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            fixed={
                **_NO_WINDOW,
                **_QK_NORM,
                "norm_topk_prob": (True,),
                "decoder_sparse_step": (1,),
                "mlp_only_layers": ([], None),
                "shared_expert_intermediate_size": (0, None),
            },
            unused=_QWEN_UNUSED,
            sizes=(*_SIZES, "num_key_value_heads", *_EXPERTS),
            aliases={"num_local_experts": "num_experts"},
        ),
        Family(
            "LlamaForCausalLM",
            "llama",
            rotations=("default", "llama3"),
            fixed={
                "attention_bias": (False,),
                "mlp_bias": (False,),
                "pretraining_tp": (1,),
                "sliding_window": (None,),
            },
            unused=frozenset({"layer_types"}),
            sizes=_SIZES,
        ),
        Family(
            "SmolLM3ForCausalLM",
            "smollm3",
            fixed={"use_sliding_window": (False,), "attention_bias": (False,), "mlp_bias": (False,)},
            unused=_QWEN_UNUSED | {"pretraining_tp"},
            unrotated=True,
        ),
        Family(
            "MistralForCausalLM",
            "mistral",
            fixed={"sliding_window": (None,)},
            unused=frozenset({"layer_types"}),
        ),
        Family(
            "Olmo3ForCausalLM",
            "olmo3",
            rotations=("default", "linear", "llama3", "yarn"),
            fixed={"attention_bias": (False,)},
            windows=True,
            sizes=_SIZES,
        ),
    )
}
"""Supported families, by architecture."""
