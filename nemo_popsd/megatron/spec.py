"""Selects the layers: Transformer Engine's on a GPU if it is installed, otherwise local norm and core attention."""

from __future__ import annotations

import logging

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch.nn.functional import silu

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.interfaces import ModelProvider
from nemo_popsd.megatron.layers import LocalCoreAttention, LocalRMSNorm
from nemo_popsd.megatron.olmo3 import Olmo3Provider, olmo3_layer_spec
from nemo_popsd.runtime.local_layers import transformer_engine_imports

logger = logging.getLogger(__name__)


def chosen_layers(setting: str) -> str:
    """`transformer_engine` or `local`: the layers that `student.layers=setting` selects on this machine.

    Raises:
        UserError: Transformer Engine is requested but cannot be imported on this machine.
    """
    if setting == "auto":
        return "transformer_engine" if torch.cuda.is_available() and transformer_engine_imports() else "local"
    if setting == "transformer_engine" and not transformer_engine_imports():
        raise UserError(
            "layers",
            got="student.layers=transformer_engine on a machine where Transformer Engine does not import",
            need="Transformer Engine, as in the NGC NeMo container",
            fix="install it, or set student.layers=local (or auto)",
        )
    return setting


def on_transformer_engine(setting: str) -> bool:
    """Whether `student.layers=setting` selects Transformer Engine's layers on this machine; see `chosen_layers`."""
    return chosen_layers(setting) == "transformer_engine"


def choose_layer_spec(provider: ModelProvider, setting: str) -> None:
    """Sets the provider's layer spec and compatible fusions, and logs the choice.

    With Transformer Engine the spec does not change, because Megatron-Bridge's providers select it. They enable fusions
    for some architectures only; here every architecture uses those that do not change the result. Parameter names in a
    distributed checkpoint are the same for both: the local spec maps its separate norms (``input_layernorm.weight``) to
    Transformer Engine's fused ones (``linear_qkv.layer_norm_weight``). The other fusions are kernels of Transformer
    Engine, apex and grouped_gemm, which local layers do not use on any device.

    Args:
        provider: changed in place.
        setting: `student.layers`.

    Raises:
        UserError: see `chosen_layers`.
    """
    fused = on_transformer_engine(setting)
    logger.info("layers: %s (student.layers=%s)", "transformer_engine" if fused else "local", setting)
    if fused:
        provider.bias_dropout_fusion = True
        provider.bias_activation_fusion = _has_swiglu(provider)
        # For packed sequences `megatron.core.models.common.embeddings.rope_utils.apply_rotary_pos_emb` ignores YaRN's
        # factor of sines and cosines when fused. The fused rotation does not support interleaved pairs.
        provider.apply_rope_fusion = provider.position_embedding_type == "rope" and not provider.rotary_interleaved
        # Megatron-Bridge 0.6 checks only for Transformer Engine. The output matrix and adapters are Megatron's own
        # linears (`megatron.core.tensor_parallel.layers.ColumnParallelLinear`), which need Apex's kernel.
        provider.gradient_accumulation_fusion &= layers._grad_accum_fusion_available
        return
    provider.transformer_layer_spec = local_layer_spec
    for fusion in (
        "apply_rope_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "cross_entropy_loss_fusion",
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "persist_layer_norm",
    ):
        setattr(provider, fusion, False)


def _has_swiglu(provider: ModelProvider) -> bool:
    """Whether the activation of the model's MLP is silu(gate)·up, which the fused kernel computes."""
    plain = provider.gated_linear_unit and not provider.use_te_activation_func and not provider.glu_linear_offset
    return bool(plain and provider.activation_func is silu)


def local_layer_spec(provider: ModelProvider, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """megatron-core's local decoder layers of this pipeline stage with `LocalRMSNorm` and `LocalCoreAttention`."""
    layers = get_num_layers_to_build(provider, vp_stage=vp_stage)
    if isinstance(provider, Olmo3Provider):
        spec = olmo3_layer_spec(LocalSpecProvider(), norm=LocalRMSNorm, core_attention=LocalCoreAttention)
        return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=LocalRMSNorm)
    spec = get_gpt_layer_local_spec(
        num_experts=provider.num_moe_experts,
        moe_grouped_gemm=provider.moe_grouped_gemm,
        qk_layernorm=provider.qk_layernorm,
        normalization=provider.normalization,
    )
    layer = spec.submodules
    if provider.num_moe_experts is not None:
        # Transformer Engine does not fuse the norm before experts, so its name is unchanged.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.self_attention.submodules
    attention.core_attention = LocalCoreAttention
    for owner, names in (
        (layer, ("input_layernorm", "pre_mlp_layernorm")),
        (attention, ("q_layernorm", "k_layernorm")),
    ):
        for name in names:
            if getattr(owner, name) not in (None, IdentityOp):
                setattr(owner, name, LocalRMSNorm)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=LocalRMSNorm)
