"""The section `megatron`: fields of megatron-core's configuration that are passed through unchanged.

Every field of the installed version that a configuration file can represent is allowed, except for those that another
setting or the method determines; this module refuses them with a reason.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.installed_fields import SOURCES, MegatronField, installed_fields
from nemo_popsd.megatron.plain_fields import DEFAULT_ONLY, IMPLEMENTED
from nemo_popsd.settings.checks import shown

_FSDP = "Megatron-FSDP is not supported: the frozen copy, the loss and checkpoints read the buffers of Megatron's DDP"
_LOW_PRECISION = "weights, attention and output matrix stay bf16; fp8.* has FP8 in the linears of the layers"

_REASONS: Mapping[str, Mapping[str, str]] = {
    "model": {
        "set parallel.* instead": """
            cp_comm_type hierarchical_context_parallel_sizes
            tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size num_layers_in_first_pipeline_stage
            virtual_pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
            num_layers_in_last_pipeline_stage overlap_p2p_comm *gtp_weight_remat_size
            *tensor_parallel_num_weight_shards expert_tensor_parallel_size
        """,
        "set student.recompute* instead": """
            recompute_granularity recompute_method recompute_num_layers recompute_modules moe_layer_recompute
        """,
        "set student.precision instead": "bf16 fp16 params_dtype pipeline_dtype autocast_dtype enable_autocast",
        "set student.gradient_accumulation_fusion instead": "gradient_accumulation_fusion",
        "student and frozen passes must compute the same, so no dropout": "hidden_dropout attention_dropout",
        "only the divergence is minimised, and a token's experts must not depend on its batch": """
            moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps mtp_*
            moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_dropping moe_token_drop_policy
            moe_router_force_* moe_router_bias_update_rate
        """,
        "the loss weights its tokens itself": "calculate_per_token_loss",
        "the micro-batches of this schedule determine it": """
            variable_seq_lengths batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs
            overlap_p2p_comm_warmup_flush hybrid_context_parallel max_seqlen_per_dp_cp_rank
            pipeline_model_parallel_layout account_for_embedding_in_pipeline_split microbatch_group_size_per_vp_stage
            account_for_loss_in_pipeline_split num_microbatches_with_partial_activation_checkpoints
        """,
        "weights come from a checkpoint": """
            perform_initialization use_cpu_initialization init_method_std embedding_init_method_std
            init_model_with_meta_device hetereogenous_dist_checkpoint
        """,
        "the output layer computes no logits: the loss reads hidden states": """
            cross_entropy_loss_fusion cross_entropy_fusion_impl defer_embedding_wgrad_compute wgrad_deferral_limit
        """,
        "set student.layers instead": "transformer_impl use_te_activation_func",
        "process groups are made without it": "pipeline_model_parallel_comm_backend",
        "micro-batches of unequal lengths need the all-to-all dispatcher": """
            moe_token_dispatcher_type moe_flex_* moe_enable_deepep moe_deepep_* moe_hybridep_* moe_ncclep_*
        """,
        "the model is not cut into the parts that its schedule needs": """
            overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release
        """,
        "Transformer Engine's user buffers have one number of tokens, and passes have several (docs/gpu.md)": """
            tp_comm_*
        """,
        "set fp8.* instead": """
            fp8 fp8_recipe first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
        """,
        "data-parallel ranks have different numbers of micro-batches": "tp_only_amax_red",
        _LOW_PRECISION: """
            fp8_param fp8_dot_product_attention fp8_multi_head_attention fp8_output_proj fp8_quantizer_factory
            fp8_interval fp8_wgrad fp4* quant_recipe activation_func_fp8_input_store
        """,
        "rollouts decode with their own cache": """
            flash_decode inference_* use_inference_optimized_layers mlp_chunks_for_prefill
        """,
        "hidden states are read without CUDA graphs": """
            enable_cuda_graph external_cuda_graph cuda_graph_*
        """,
        "no supported architecture has it": """
            dsa_* linear_* mamba_* use_mamba_* qk_clip_* mup_* use_mup kitchen_*
        """,
    },
    "ddp": {
        "set optimizer.* instead": """
            grad_reduce_in_fp32 overlap_grad_reduce overlap_param_gather use_distributed_optimizer bucket_size
            num_buckets
        """,
        "gathers begin in the forward pass that needs the weights": "align_param_gather",
        "process groups are made for one instance": "num_distributed_optimizer_instances",
        "the model is not cut into the parts that it needs": "delay_wgrad_compute",
        "the run's own guard stops at such gradients and names the rows": "check_for_nan_in_grad check_for_large_grads",
        _LOW_PRECISION: "fp8_* fp4_* reuse_grad_buf_for_mxfp8_param_ag keep_fp8_transpose_cache",
        _FSDP: """
            use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy suggested_communication_unit_size
            preserve_fp32_weights outer_dp_sharding_strategy fsdp_* megatron_fsdp_*
        """,
    },
    "optimizer": {
        "set optimizer.* instead": """
            lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad use_distributed_optimizer exp_avg_dtype
            overlap_param_gather use_precision_aware_optimizer store_param_remainders main_grads_dtype exp_avg_sq_dtype
            main_params_dtype optimizer_cpu_offload optimizer_offload_fraction
        """,
        "set student.precision instead": "bf16 fp16 params_dtype",
        "there is no loss scaling: gradients are bf16 or fp32": """
            loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis
        """,
        "one learning rate for all weights, of optimizer.decay": "decoupled_lr decoupled_min_lr",
        "rollouts, which read all weights, follow the update": "overlap_param_gather_with_optimizer_step",
        _LOW_PRECISION: "fp8_recipe reuse_grad_buf_for_mxfp8_param_ag",
        "the optimizer is AdamW": """
            optimizer decoupled_weight_decay sgd_* muon_* adaptive_muon_* lion_* soap_*
            use_layer_wise_distributed_optimizer
        """,
    },
}
"""For each section: reasons, and patterns of the names of fields that are refused for each reason."""

_HOW = """
    apply_rope_fusion attention_backend attention_softmax_in_fp32 batch_invariant_mode bias_activation_fusion
    bias_dropout_fusion cpu_offloading deterministic_mode fine_grained_activation_offloading fused_single_qkv_rope
    masked_softmax_fusion memory_efficient_layer_norm moe_grouped_gemm moe_per_layer_logging moe_permute_fusion
    moe_router_dtype moe_router_fusion moe_shared_expert_overlap moe_use_legacy_grouped_gemm persist_layer_norm
    symmetric_ar_type
"""
"""Fields that `plain_fields` lists because they may affect a layer, but that change only how it computes."""
_UNHELD = "a configuration cannot hold its value"


@dataclass(kw_only=True)
class MegatronConfig:
    """Fields of megatron-core's configuration that are passed through unchanged.

    Fields of the installed version are allowed unless another setting or the method determines them. The error for any
    other field states the reason, and `popsd config --describe megatron.model` lists all fields.
    """

    model: dict[str, str] = field(default_factory=dict)
    """Fields of `TransformerConfig` and `ModelParallelConfig`, such as `megatron.model.moe_router_dtype=fp32`."""
    ddp: dict[str, str] = field(default_factory=dict)
    """Fields of `DistributedDataParallelConfig`, such as `megatron.ddp.average_in_collective=true`."""
    optimizer: dict[str, str] = field(default_factory=dict)
    """Fields of megatron-core's `OptimizerConfig`, such as `megatron.optimizer.apply_wd_to_qk_layernorm=true`."""

    def __post_init__(self) -> None:
        for section in SOURCES:
            self.values(section)

    def values(self, section: str) -> dict[str, object]:
        """The values of `model`, `ddp` or `optimizer` in the types of their fields.

        Raises:
            UserError: a field is unknown (the message suggests the nearest one) or refused, or its value has a wrong
                type.
        """
        given: dict[str, str] = getattr(self, section)
        return {name: _value(section, name, text) for name, text in given.items()}


def refusal(section: str, name: str, kind: MegatronField) -> str:
    """Why the installed field `name` cannot be set; "" for an allowed one."""
    for reason, patterns in _REASONS[section].items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return reason
    if section == "model" and name not in _HOW.split():
        if name in IMPLEMENTED:
            return "the checkpoint's architecture decides what a layer computes"
        if name in DEFAULT_ONLY:
            return "it changes what a layer computes, and no supported architecture has it"
    return "" if kind.settable else f"{_UNHELD} ({kind.annotation})"


def listing(section: str) -> str:
    """The installed fields of `model`, `ddp` or `optimizer` as text for the terminal: allowed fields with their types,
    then refused fields by reason.
    """
    refused: dict[str, list[str]] = {}
    allowed = []
    for name, kind in sorted(installed_fields(section).items()):
        reason = refusal(section, name, kind)
        if not reason:
            allowed.append(f"    {name}: {kind.annotation}")
        else:
            refused.setdefault(_UNHELD if reason.startswith(_UNHELD) else reason, []).append(name)
    lines = [f"megatron.{section} takes", *allowed, "", "and refuses"]
    for reason, names in refused.items():
        lines += [f"    {reason}:", textwrap.indent(textwrap.fill(", ".join(names), 92), "        ")]
    return "\n".join(lines)


def _value(section: str, name: str, text: str) -> object:
    fields = installed_fields(section)
    key = f"megatron.{section}.{name}"
    if not fields:
        raise UserError("configuration", got=key, need="megatron-core, which is not installed", fix="install it")
    kind = fields.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
        elsewhere = [other for other in SOURCES if other != section and name in installed_fields(other)]
        need = f"a field of the installed megatron-core's {SOURCES[section][-1][1]}"
        if elsewhere:
            need += f"; megatron.{elsewhere[0]} has this one"
        elif near:
            need += f"; the nearest is {near[0]}"
        raise UserError("configuration", got=f"unknown key {key}", need=need, fix="rename or remove it")
    reason = refusal(section, name, kind)
    if reason:
        raise UserError("configuration", got=key, need=f"a field that may be set: {reason}", fix=f"remove {key}")
    try:
        return kind.value(text)
    except ValueError as error:
        raise UserError("configuration", got=f"{key}={shown(text)}", need=str(error), fix=f"set {key}") from None
