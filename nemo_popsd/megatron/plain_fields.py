"""The fields of Megatron's TransformerConfig, in three lists by what `nemo_popsd.megatron.plain_layers` does with them.

`unsupported_fields` returns a field that is in no list, such as one that a newer megatron-core adds, whatever its
value: tokens then pass through the forward of Megatron's layers, until the field has been reviewed and added to a list.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


IMPLEMENTED = _names(
    """
    activation_func add_bias_linear add_qkv_bias apply_rope_fusion attention_backend attention_softmax_in_fp32
    bf16 bias_activation_fusion bias_dropout_fusion context_parallel_size expert_model_parallel_size
    expert_tensor_parallel_size ffn_hidden_size fused_single_qkv_rope gated_linear_unit glu_linear_offset
    hidden_size kv_channels layernorm_epsilon layernorm_zero_centered_gamma masked_softmax_fusion
    memory_efficient_layer_norm moe_apply_probs_on_input moe_aux_loss_coeff moe_deepep_num_sms moe_enable_deepep
    moe_enable_routing_replay moe_expert_capacity_factor moe_ffn_hidden_size moe_flex_dispatcher_backend
    moe_grouped_gemm moe_hybridep_num_sms moe_input_jitter_eps moe_latent_size moe_layer_freq moe_layer_recompute
    moe_pad_expert_input_to_capacity moe_per_layer_logging moe_permute_fusion moe_router_bias_update_rate
    moe_router_dtype moe_router_enable_expert_bias moe_router_force_load_balancing moe_router_fusion
    moe_router_group_topk moe_router_load_balancing_type moe_router_num_groups moe_router_padding_for_fp8
    moe_router_padding_for_quantization moe_router_pre_softmax moe_router_score_function moe_router_topk
    moe_router_topk_limited_devices moe_router_topk_scaling_factor moe_shared_expert_gate
    moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_token_dispatcher_type moe_token_drop_policy
    moe_token_dropping moe_use_legacy_grouped_gemm moe_z_loss_coeff no_rope_freq normalization num_attention_heads
    num_layers num_moe_experts num_query_groups params_dtype persist_layer_norm qk_layernorm sequence_parallel
    softmax_scale
    tensor_model_parallel_size use_fused_weighted_squared_relu use_te_activation_func window_attn_skip_freq
    window_size
    """
)
"""Any value is accepted: `PlainLayers`, or the cache, norm, linear or experts that it calls, implement it."""

IRRELEVANT = _names(
    """
    _cpu_offloading_context account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    activation_offload_fraction async_tensor_model_parallel_allreduce attention_dropout autocast_dtype
    barrier_with_L1_time batch_p2p_comm batch_p2p_sync calculate_per_token_loss clone_scatter_output_in_embedding
    config_logger_dir cp_comm_type cpu_offloading_activations cpu_offloading_double_buffering
    cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers cpu_offloading_weights
    cross_entropy_fusion_impl cross_entropy_loss_fusion cuda_graph_modules cuda_graph_retain_backward_graph
    cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_warmup_steps deallocate_pipeline_outputs
    defer_embedding_wgrad_compute delay_offload_until_cuda_graph delay_wgrad_compute
    delta_offload_bytes_across_pp_ranks disable_bf16_reduced_precision_matmul disable_parameter_transpose_cache
    distribute_saved_activations dsa_indexer_head_dim dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32
    dsa_indexer_loss_coeff dsa_indexer_n_heads dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
    dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk dsa_indexer_topk_freq
    dsa_indexer_use_sparse_loss dsa_kernel_backend embedding_init_method embedding_init_method_std
    ep_overlap_early_attn_memory_release experimental_attention_variant_loss_scale_func
    expert_tensor_parallel_num_weight_shards finalize_model_grads_func
    fine_grained_offloading_max_inflight_offloads first_last_layers_bf16 flash_attention_version fp4_param
    fp4_quantizer_factory fp4_recipe fp8_amax_compute_algo fp8_amax_history_len fp8_dot_product_attention
    fp8_interval fp8_margin fp8_multi_head_attention fp8_param fp8_quantizer_factory fp8_recipe fp8_wgrad
    grad_scale_func grad_sync_func gradient_accumulation_fusion hetereogenous_dist_checkpoint hidden_dropout
    hierarchical_context_parallel_sizes high_priority_a2a_comm_stream inference_cuda_graph_scope
    inference_disable_triton_nvls_kernels inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
    inference_moe_token_dispatcher_type inference_rng_tracker inference_sampling_seed init_method init_method_std
    init_model_with_meta_device kitchen_attention_backend linear_conv_kernel_dim linear_key_head_dim
    linear_num_key_heads linear_num_value_heads linear_value_head_dim mamba_head_dim mamba_num_groups
    mamba_num_heads mamba_state_dim mamba_training_ssm_states_dtype max_seqlen_per_dp_cp_rank
    microbatch_group_size_per_vp_stage min_offloaded_tensor_size moe_flex_dispatcher_num_sms moe_grad_scale_func
    moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
    moe_hybridep_pad_uneven_dispatch_inputs moe_ncclep_static_shape moe_ncclep_zero_copy
    moe_pad_experts_for_cuda_graph_inference moe_paged_stash_buffer_size_factor_cpu
    moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_permute_fusion_into_hybridep
    moe_router_quantile_balancing_ema mtp_detach_heads mtp_grad_scale_func mtp_hybrid_override_pattern
    mtp_loss_scaling_factor mtp_use_repeated_layer mup_attn_scale_power mup_base_head_dim mup_base_hidden_size
    mup_embedding_mult mup_output_mult mup_width_mult nccl_all_reduce_for_prefill no_sync_func
    num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage
    num_layers_in_last_pipeline_stage num_microbatches_with_partial_activation_checkpoints offload_modules
    output_layer_init_method overlap_dispatch_backward_with_experts_wgrad overlap_p2p_comm
    overlap_p2p_comm_warmup_flush param_sync_func perform_initialization pipeline_dtype
    pipeline_model_parallel_comm_backend pipeline_model_parallel_layout pipeline_model_parallel_size qk_clip_alpha
    qk_clip_threshold recompute_granularity recompute_method recompute_modules recompute_num_layers
    tensor_parallel_num_weight_shards timers tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_bootstrap_backend
    tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap_ag tp_comm_overlap_disable_fc1
    tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs
    tp_only_amax_red use_cpu_initialization use_mamba_mem_eff_path use_ring_exchange_p2p use_te_rng_tracker
    variable_seq_lengths virtual_pipeline_model_parallel_size wgrad_deferral_limit
    """
)
"""No effect on the output of a layer in evaluation mode: training, transfers between stages, initial values,
recomputation, checkpoints, and the details of features that `DEFAULT_ONLY` excludes."""

DEFAULT_ONLY = _names(
    """
    activation_func_clamp_value activation_func_fp8_input_store apply_query_key_layer_scaling
    apply_residual_connection_post_layernorm attention_output_gate batch_invariant_mode cpu_offloading
    cuda_graph_impl deterministic_mode enable_autocast enable_cuda_graph experimental_attention_variant
    expert_gtp_weight_remat_size external_cuda_graph fine_grained_activation_offloading flash_decode fp16
    fp32_residual_connection fp4 fp8 fp8_output_proj fused_residual_rmsnorm gtp_weight_remat_size
    heterogeneous_block_specs hybrid_context_parallel inference_fuse_tp_communication is_hybrid_model
    linear_attention_freq log_max_attention_logit mlp_chunks_for_prefill mlp_chunks_for_training
    moe_expert_rank_capacity_factor moe_extended_tp moe_mlp_glu_interleave_size moe_paged_stash
    moe_router_force_biased moe_shared_expert_glu_interleave_size moe_single_grouped_bias moe_single_grouped_weight
    mrope_section mtp_num_layers mtp_standalone multi_latent_attention
    overlap_moe_expert_parallel_comm qk_clip qk_l2_norm quant_recipe rotary_interleaved softmax_type
    symmetric_ar_type test_mode tp_comm_overlap transformer_impl use_grouped_gemm_for_dense_mlp
    use_grouped_gemm_for_shared_expert use_inference_optimized_layers use_kitchen use_kitchen_attention use_mup
    use_transformer_engine_op_fuser
    """
)
"""Only the default of `TransformerConfig` is accepted: another value changes, or may change, what a layer computes."""


def unsupported_fields(config: TransformerConfig) -> list[str]:
    """Names of the fields of `config` with which `PlainLayers` may not compute what Megatron's layers do.

    Covers the fields that `TransformerConfig` declares. Those that a subclass adds are read by layers of other classes,
    which `are_plain` refuses by their type.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    return [
        field.name
        for field in fields(TransformerConfig)
        if field.name not in IMPLEMENTED
        and field.name not in IRRELEVANT
        and not (field.name in DEFAULT_ONLY and getattr(config, field.name) == _default(field))
    ]


def _default(field: Field[object]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default
