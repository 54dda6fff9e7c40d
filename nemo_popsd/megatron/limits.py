"""Refuses architectures and settings that a layout or its layers cannot compute, before a model is built."""

from __future__ import annotations

import logging
import os

from megatron.core.tensor_parallel import layers

from nemo_popsd.errors import UserError
from nemo_popsd.megatron import spec
from nemo_popsd.megatron.config import OptimizerConfig, StudentConfig
from nemo_popsd.megatron.context_limits import refuse_context
from nemo_popsd.megatron.interfaces import ModelProvider
from nemo_popsd.parallel.config import ParallelConfig, layers_by_stage
from nemo_popsd.parallel.distributed import device
from nemo_popsd.runtime.local_layers import transformer_engine_imports

logger = logging.getLogger(__name__)


def refuse_impossible(provider: ModelProvider, student: StudentConfig, parallel: ParallelConfig) -> None:
    """Refuses an architecture that the layout does not divide, or that its layers cannot compute in this layout.

    Args:
        provider: the architecture.
        student: precision and adaptation.
        parallel: the layout.

    Raises:
        UserError: the message names the settings.
    """
    refuse_indivisible(provider, parallel)
    _refuse_recomputation(provider, student, parallel)
    _refuse_fused_accumulation(student)
    fused = spec.on_transformer_engine(student.layers)
    if fused:
        _refuse_for_transformer_engine(student)
    _refuse_adapters_of_experts(provider, student, parallel, fused=fused)
    refuse_context(provider, student, parallel, fused=fused)


def refuse_indivisible(provider: ModelProvider, parallel: ParallelConfig) -> None:
    """Refuses heads, groups, layers or experts that the layout does not divide.

    Raises:
        UserError: the message names both numbers and the setting.
    """
    groups = provider.num_query_groups or provider.num_attention_heads
    experts = provider.num_moe_experts
    width = provider.moe_ffn_hidden_size if experts else provider.ffn_hidden_size
    split = "parallel.expert_tensor" if parallel.expert_tensor else "parallel.tensor"
    uneven = parallel.first_stage_layers or parallel.last_stage_layers
    stages = 1 if uneven else parallel.pipeline * parallel.virtual_pipeline
    for what, count, size, setting in (
        ("attention heads", provider.num_attention_heads, parallel.tensor, "parallel.tensor"),
        ("key-value heads", groups, parallel.tensor, "parallel.tensor"),
        ("layers", provider.num_layers, stages, "parallel.pipeline or parallel.virtual_pipeline"),
        ("experts", experts or 0, parallel.expert, "parallel.expert"),
        ("columns of the MLP", width or 0, parallel.expert_shards, split),
    ):
        if count % size or (what == "experts" and size > 1 and not count):
            raise UserError(
                "layout",
                got=f"{count} {what} with {parallel.describe()}",
                need=f"a multiple of {size} {what}",
                fix=f"set {setting}",
            )
    if uneven and layers_by_stage(parallel, provider.num_layers) is None:
        raise UserError(
            "layout",
            got=f"{provider.num_layers} layers with {parallel.describe()}",
            need="at least one layer on each stage, the same number on all stages set to 0, and numbers that "
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} divides",
            fix="set parallel.first_stage_layers or parallel.last_stage_layers",
        )
    if experts and parallel.tensor > 1 and not parallel.splits_sequences:
        raise UserError(
            "layout",
            got=f"a mixture of {experts} experts with {parallel.describe()} and parallel.sequence=false",
            need="sequence parallelism together with tensor parallelism, so that no token is dispatched twice",
            fix="set parallel.sequence=auto",
        )


def _refuse_recomputation(provider: ModelProvider, student: StudentConfig, parallel: ParallelConfig) -> None:
    """Refuses units that do not divide a model chunk, and parts of a layer that the model lacks or that only
    Transformer Engine can recompute.
    """
    stages = layers_by_stage(parallel, provider.num_layers) or ()
    chunks = sorted({layers // parallel.virtual_pipeline for layers in stages})
    units = student.recompute == "full" and student.recompute_method == "uniform"
    if units and any(layers % student.recompute_layers for layers in chunks):
        raise UserError(
            "model",
            got=f"student.recompute_layers={student.recompute_layers} with {' and '.join(map(str, chunks))} layers in "
            f"a model chunk ({parallel.describe()})",
            need="units that divide them",
            fix="set student.recompute_layers, or student.recompute_method=block",
        )
    if student.recompute != "selective":
        return
    experts, fused = bool(provider.num_moe_experts), spec.on_transformer_engine(student.layers)
    parts = {"core_attn": True, "mlp": not experts, "moe": experts, "moe_act": experts and fused}
    parts["layernorm"] = experts and fused
    impossible = [name for name in student.recompute_modules if not parts[name]]
    if impossible:
        model = f"a mixture of {provider.num_moe_experts} experts" if experts else "a dense model"
        raise UserError(
            "model",
            got=f"student.recompute_modules with {', '.join(impossible)} for {model} with "
            f"{spec.chosen_layers(student.layers)} layers",
            need=f"some of {', '.join(name for name, possible in parts.items() if possible)}",
            fix="set student.recompute_modules",
        )


def _refuse_fused_accumulation(student: StudentConfig) -> None:
    """Refuses `student.gradient_accumulation_fusion=true` if its kernel cannot be imported."""
    if student.gradient_accumulation_fusion == "true" and not layers._grad_accum_fusion_available:
        raise UserError(
            "environment",
            got="student.gradient_accumulation_fusion=true without fused_weight_gradient_mlp_cuda",
            need="NVIDIA's apex, built with --cuda_ext",
            fix="install it, or set student.gradient_accumulation_fusion=auto",
        )


def refuse_optimizer(config: OptimizerConfig) -> None:
    """Refuses an optimizer whose library or device is missing.

    Raises:
        UserError: the message names the setting.
    """
    if config.state_dtype != "fp32" and not transformer_engine_imports():
        raise UserError(
            "environment",
            got=f"optimizer.state_dtype={config.state_dtype} on a machine where Transformer Engine does not import",
            need="Transformer Engine's FusedAdam",
            fix="install it, or set optimizer.state_dtype=fp32",
        )
    # megatron-core 0.16.1 compares the version of Transformer Engine for it, and fails without one.
    if config.host_share and not (transformer_engine_imports() and device().type == "cuda"):
        raise UserError(
            "environment",
            got=f"optimizer.host_share={config.host_share} on a machine without a GPU or Transformer Engine",
            need="both",
            fix="set optimizer.host_share=0",
        )


ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""Variables that select Transformer Engine's attention. Megatron sets all to 1 and fails for any other value."""
_EXPERT_LINEARS = ("linear_fc1", "linear_fc2")


def _refuse_for_transformer_engine(student: StudentConfig) -> None:
    """Refuses variables that conflict with Megatron's choice of attention; warns about TF32."""
    for name in ATTENTION_VARIABLES:
        if os.environ.get(name, "1") != "1":
            raise UserError(
                "environment",
                got=f"{name}={os.environ[name]}",
                need="it unset: Transformer Engine chooses the attention by precision and layout",
                fix=f"unset {name}",
            )
    if student.precision == "fp32" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        logger.warning(
            "student.precision=fp32: Transformer Engine multiplies fp32 matrices in TF32 (10 bits of mantissa instead "
            "of 23); set NVIDIA_TF32_OVERRIDE=0 in the environment for full fp32"
        )


def _refuse_adapters_of_experts(
    provider: ModelProvider, student: StudentConfig, parallel: ParallelConfig, *, fused: bool
) -> None:
    """Refuses adapters of experts that Megatron-Bridge's LoRA computes wrongly."""
    targets = [name for name in student.lora.targets if name in _EXPERT_LINEARS]
    if not provider.num_moe_experts or student.adaptation != "lora" or not targets:
        return
    if fused:
        # The experts of a rank are one module and would share one adapter. Expert-parallel ranks would have different
        # adapters under the same name in a checkpoint.
        raise UserError(
            "adapters",
            got=f"student.lora.targets with {', '.join(targets)} for a mixture of {provider.num_moe_experts} experts",
            need="adapters of attention only: on a GPU all experts of a rank would share one adapter",
            fix="set student.lora.targets=[linear_qkv,linear_proj], or student.adaptation=full",
        )
    if parallel.expert_shards > 1:
        # `megatron.core.tensor_parallel.layers.RowParallelLinear` of an expert leaves the sum over its parts to the
        # dispatcher, and the adapter's second matrix would multiply one rank's part of it.
        raise UserError(
            "adapters",
            got=f"student.lora.targets with {', '.join(targets)} for experts that are split over "
            f"{parallel.expert_shards} ranks ({parallel.describe()})",
            need="adapters of attention only, or experts that are complete on a rank",
            fix="set student.lora.targets=[linear_qkv,linear_proj], or parallel.expert above 1 without "
            "parallel.expert_tensor",
        )
