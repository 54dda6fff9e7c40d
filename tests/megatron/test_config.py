"""Layouts that contradict themselves, the world, or the architecture are refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest
import torch
from omegaconf import OmegaConf

from nemo_popsd.config.loading import from_dict_config, to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import FP8Config, LoRAConfig, OptimizerConfig, StudentConfig
from nemo_popsd.megatron.limits import refuse_impossible, refuse_indivisible
from nemo_popsd.parallel.config import ParallelConfig, layers_by_stage
from tests.citations import cited_source


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor": 0}, r"parallel\.tensor=0"),
        ({"context": 0}, r"parallel\.context=0"),
        ({"sequence": "true"}, r"parallel\.sequence=true with parallel\.tensor=1.*parallel\.sequence=auto"),
        ({"tensor": 2, "sequence": "on"}, r"parallel\.sequence='on'; need one of auto, true, false"),
        ({"context_type": "a2a"}, r"context_type=a2a with parallel\.context=1"),
        ({"context": 2, "context_type": "ring"}, r"need one of auto, p2p, all_gather, a2a, a2a\+p2p"),
        (
            {"context": 8, "context_type": "a2a+p2p"},
            r"context_sizes=\[\].*two sizes whose product is parallel\.context",
        ),
        ({"context": 8, "context_type": "a2a+p2p", "context_sizes": [2, 2]}, r"context_sizes=\[2, 2\]"),
        ({"context": 8, "context_sizes": [2, 4]}, r"context_sizes=\[2, 4\] with parallel\.context_type=auto"),
        ({"expert_tensor": 2}, r"expert_tensor=2 with parallel\.tensor=1 and parallel\.expert=1"),
        (
            {"tensor": 2, "expert_tensor": 1},
            r"parallel\.expert=1; need expert parallelism.*expert_tensor=0",
        ),
        ({"tensor": 4, "expert": 2, "expert_tensor": 3}, r"expert_tensor=3 .*a divisor of parallel\.tensor"),
        ({"expert": 2, "expert_tensor": 2}, r"expert_tensor=2 with parallel\.tensor=1; need a divisor"),
        ({"first_stage_layers": 2}, r"first_stage_layers=2 with parallel\.pipeline=1.*parallel\.first_stage_layers=0"),
        ({"pipeline": 2, "overlap_transfers": True}, r"overlap_transfers=true with parallel\.virtual_pipeline=1"),
        ({"virtual_pipeline": 2}, r"parallel\.virtual_pipeline=2 with parallel\.pipeline=1.*set parallel\.pipeline"),
    ],
)
def test_contradictory_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "ranks", "message"),
    [
        ({"tensor": 2}, 1, r"parallel\.tensor=2 with 1 rank; .*multiple of 2 ranks"),
        ({"tensor": 2, "pipeline": 2, "context": 2}, 12, r"with 12 ranks; .*8 \(tensor · pipeline · context\)"),
        ({"pipeline": 2, "expert": 4}, 4, r"8 \(expert · pipeline\)"),
        (
            {"tensor": 2, "expert": 2, "expert_tensor": 2},
            2,
            r"4 \(expert_tensor · expert · pipeline\).*multiple of 4 ranks",
        ),
    ],
)
def test_worlds_that_the_layout_does_not_divide_are_refused(fields: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParallelConfig(**fields).check_world(ranks)


def test_layouts_that_divide_the_world_are_accepted() -> None:
    ParallelConfig().check_world(3)
    layout = ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, context=2, expert=2)
    layout.check_world(16)
    assert layout.replica_ranks == 8
    assert ParallelConfig().describe() == "parallel.tensor=1"
    assert ParallelConfig(pipeline=2, expert=4).describe() == "parallel.pipeline=2 parallel.expert=4"
    split = ParallelConfig(tensor=4, expert=2, expert_tensor=2)
    split.check_world(4)
    assert split.describe() == "parallel.tensor=4 parallel.expert=2 parallel.expert_tensor=2"
    shards = [ParallelConfig(tensor=4, expert=expert).expert_shards for expert in (1, 2)]
    assert [split.expert_shards, *shards] == [2, 4, 1]


@pytest.mark.parametrize("linear", ["ColumnParallelLinear", "RowParallelLinear"])
def test_whole_experts_without_expert_parallelism_are_refused_for_megatron_core_0_16(linear: str) -> None:
    """It reduces them with the other weights, over data-parallel ranks alone; 0.19 also compares the parts."""
    source = cited_source(f"megatron.core.tensor_parallel.layers.{linear}.__init__")
    assert source is not None
    assert "self.expert_parallel = config.expert_model_parallel_size > 1" in source
    old = 'setattr(self.weight, "allreduce", not (self.is_expert and self.expert_parallel))' in source
    new = "or self.config.expert_tensor_parallel_size != self.config.tensor_model_parallel_size" in source
    assert (old, new) == ((True, False) if megatron.core.__version__.startswith("0.16.") else (False, True))


def test_sequences_are_split_with_tensor_parallelism_unless_the_setting_says_otherwise() -> None:
    assert not ParallelConfig().splits_sequences
    assert ParallelConfig(tensor=2).splits_sequences
    assert ParallelConfig(tensor=2, sequence="true").splits_sequences
    assert not ParallelConfig(tensor=2, sequence="false").splits_sequences


ARCHITECTURE = {
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "num_layers": 6,
    "num_moe_experts": None,
    "ffn_hidden_size": 48,
    "moe_ffn_hidden_size": 12,
}


@pytest.mark.parametrize(
    ("fields", "architecture", "message"),
    [
        ({"tensor": 3}, {}, r"8 attention heads with parallel\.tensor=3"),
        ({"tensor": 8}, {}, r"4 key-value heads with parallel\.tensor=8"),
        ({"pipeline": 4}, {}, r"6 layers with parallel\.pipeline=4"),
        ({"pipeline": 2, "virtual_pipeline": 2}, {}, r"6 layers.*a multiple of 4 layers"),
        (
            {"pipeline": 2, "last_stage_layers": 6},
            {},
            r"pipeline=2 parallel\.last_stage_layers=6",
        ),
        ({"pipeline": 4, "first_stage_layers": 1}, {}, r"at least one layer on each stage, the same number on all"),
        (
            {"pipeline": 2, "virtual_pipeline": 2, "last_stage_layers": 3},
            {},
            r"that parallel\.virtual_pipeline=2",
        ),
        ({"expert": 2}, {}, r"0 experts with parallel\.expert=2"),
        ({"expert": 4}, {"num_moe_experts": 6}, r"6 experts with parallel\.expert=4"),
        (
            {"tensor": 4, "expert": 2, "expert_tensor": 4},
            {"num_moe_experts": 6, "moe_ffn_hidden_size": 6},
            r"6 columns of the MLP.*need a multiple of 4.*set parallel\.expert_tensor",
        ),
        ({"tensor": 4}, {"ffn_hidden_size": 6}, r"6 columns of the MLP.*set parallel\.tensor"),
        ({"tensor": 2, "sequence": "false"}, {"num_moe_experts": 6}, r"6 experts.*set parallel\.sequence=auto"),
    ],
)
def test_architectures_that_the_layout_does_not_divide_are_refused(
    fields: dict[str, Any], architecture: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        refuse_indivisible(SimpleNamespace(**{**ARCHITECTURE, **architecture}), ParallelConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "layers", "stages"),
    [
        ({}, 6, (6,)),
        ({"pipeline": 3}, 6, (2, 2, 2)),
        ({"pipeline": 3, "first_stage_layers": 1, "last_stage_layers": 2}, 6, (1, 3, 2)),
        ({"pipeline": 2, "last_stage_layers": 2}, 6, (4, 2)),
        ({"pipeline": 2, "first_stage_layers": 5, "last_stage_layers": 1}, 6, (5, 1)),
        ({"pipeline": 2, "virtual_pipeline": 2, "last_stage_layers": 2}, 6, (4, 2)),
        ({"pipeline": 2, "first_stage_layers": 5, "last_stage_layers": 2}, 6, None),
        ({"pipeline": 4}, 6, None),
    ],
)
def test_layers_of_each_stage(fields: dict[str, Any], layers: int, stages: tuple[int, ...] | None) -> None:
    assert layers_by_stage(ParallelConfig(**fields), layers) == stages


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distributed": "false", "state_dtype": "bf16"}, r"state_dtype=bf16 with optimizer\.distributed=false"),
        ({"distributed": "false", "host_share": 0.5}, r"host_share=0\.5 with optimizer\.distributed=false"),
        ({"overlap_param_gather": True}, r"with optimizer\.overlap_grad_reduce=false; need both"),
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True, "distributed": "false"},
            r"overlap_param_gather=true with optimizer\.distributed=false",
        ),
        ({"bucket_size": 5}, r"bucket_size=5 with optimizer\.overlap_grad_reduce=false"),
        ({"host_share": 0.5, "state_dtype": "bf16"}, r"host_share=0\.5 with optimizer\.state_dtype=bf16"),
        ({"distributed": "yes"}, r"optimizer\.distributed='yes'; need one of auto, true, false"),
        ({"grad_dtype": "fp16"}, r"need one of fp32, bf16"),
    ],
)
def test_contradictions_within_the_optimizer_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**fields)


def test_the_state_is_sharded_from_two_ranks_or_where_a_setting_needs_it() -> None:
    assert [OptimizerConfig().sharded(ranks) for ranks in (1, 2, 8)] == [False, True, True]
    assert [OptimizerConfig(distributed="true").sharded(ranks) for ranks in (1, 2)] == [True, True]
    assert [OptimizerConfig(distributed="false").sharded(ranks) for ranks in (1, 2)] == [False, False]
    assert OptimizerConfig(host_share=0.5).sharded(1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recompute": "selective", "recompute_modules": ["attn"]}, r"recompute_modules='attn'; need one of core_attn"),
        ({"recompute": "selective", "recompute_modules": []}, r"recompute_modules=\[\]; need a part of a layer"),
        ({"recompute": "partial"}, r"need one of none, selective, full"),
        (
            {
                "recompute": "selective",
                "recompute_modules": ["mlp"],
                "lora": LoRAConfig(targets=["linear_fc1"]),
            },
            r"need an adapter before the first MLP.*student\.recompute=full",
        ),
    ],
)
def test_impossible_recomputation_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StudentConfig(**fields)


def test_booleans_of_earlier_versions_are_understood() -> None:
    assert [StudentConfig(recompute=text).recompute for text in ("true", "false")] == ["full", "none"]
    tree = OmegaConf.to_container(to_dict_config(PopsdConfig()))
    assert isinstance(tree, dict)
    tree["student"]["recompute"], tree["optimizer"]["distributed"] = True, False
    tree["parallel"]["sequence"] = False
    config = from_dict_config(OmegaConf.create(tree))
    assert (config.student.recompute, config.optimizer.distributed) == ("full", "false")
    assert config.parallel.sequence == "false"


RECOMPUTED = {"recompute": "selective", "adaptation": "full", "layers": "local"}


@pytest.mark.parametrize(
    ("fields", "architecture", "message"),
    [
        (
            {"recompute_modules": ["moe"]},
            {},
            r"moe for a dense model with local layers; need some of core_attn, mlp;",
        ),
        (
            {"recompute_modules": ["mlp"]},
            {"num_moe_experts": 4},
            r"mlp for a mixture of 4.*some of core_attn, moe",
        ),
        (
            {"recompute_modules": ["layernorm", "moe_act"]},
            {"num_moe_experts": 4},
            r"with layernorm, moe_act for",
        ),
        ({"recompute": "full", "recompute_layers": 4}, {}, r"recompute_layers=4 with 6 layers in a model chunk"),
        ({"recompute": "none", "gradient_accumulation_fusion": "true"}, {}, r"without fused_weight_gradient_mlp_cuda"),
    ],
)
def test_recomputation_that_the_model_does_not_have_is_refused(
    fields: dict[str, Any], architecture: dict[str, Any], message: str
) -> None:
    provider = SimpleNamespace(**{**ARCHITECTURE, **architecture})
    with pytest.raises(UserError, match=message):
        refuse_impossible(provider, StudentConfig(**{**RECOMPUTED, **fields}), ParallelConfig())


def test_an_architecture_that_the_layout_divides_is_accepted() -> None:
    layout = ParallelConfig(tensor=4, pipeline=3, virtual_pipeline=2, expert=2)
    refuse_indivisible(SimpleNamespace(**{**ARCHITECTURE, "num_moe_experts": 4}), layout)


@pytest.mark.parametrize(
    ("device", "overlap", "freed"), [("cpu", True, False), ("cpu", False, True), ("cuda", True, True)]
)
def test_outputs_are_kept_where_a_transfer_would_read_freed_memory(
    monkeypatch: pytest.MonkeyPatch, device: str, overlap: bool, freed: bool
) -> None:
    """gloo reads an output after Megatron has freed it, which would cause NaN in `pp2 vpp2 overlapped transfers`."""
    from nemo_popsd.megatron import build

    monkeypatch.setattr(build, "device", lambda: torch.device(device))
    provider = SimpleNamespace(params_dtype=torch.float32, deallocate_pipeline_outputs=True)
    layout = ParallelConfig(pipeline=2, virtual_pipeline=2, overlap_transfers=overlap)
    build._set_pipeline(provider, layout)
    assert provider.overlap_p2p_comm == overlap
    assert not provider.batch_p2p_comm
    assert provider.deallocate_pipeline_outputs == freed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "current"}, r"fp8\.recipe='current'; need one of tensorwise, delayed, blockwise, mxfp8"),
        ({"format": "e5m2"}, r"need one of hybrid, e4m3"),
        ({"recipe": "delayed", "frozen": True}, r"fp8\.frozen=true with fp8\.recipe=delayed; .*only where gradients"),
        ({"recipe": "delayed", "rollouts": True}, r"fp8\.rollouts=true with fp8\.recipe=delayed"),
        (
            {"recipe": "delayed", "num_layers_at_end_in_bf16": 1},
            r"num_layers_at_end_in_bf16=1 with fp8\.recipe=delayed",
        ),
    ],
)
def test_contradictory_settings_of_fp8_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FP8Config(**fields)


def test_passes_in_fp8_are_named() -> None:
    assert FP8Config().passes == ()
    assert FP8Config(training=True, recipe="delayed").passes == ("fp8.training",)
    assert FP8Config(frozen=True, rollouts=True).passes == ("fp8.frozen", "fp8.rollouts")
