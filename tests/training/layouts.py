"""Two steps on fixed rollouts in any layout, and every gradient and weight of the full model by name."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.training.faults import FAULTS

LENGTHS = (9, 1, 4, 12, 1, 7)
"""Response tokens of the step's rows, including one-token responses."""
STEPS = 2
"""The second step starts with updated weights, moments and moving teachers."""
# An epsilon above the rounding of the gradients: Adam's first step is lr · g / (|g| + eps).
OPTIMIZER = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3, "clip_grad": 1.0, "distributed": "false"}

Settings = dict[str, dict[str, Any]]
"""Settings of a layout other than `parallel`, by section."""


@dataclass
class Variant:
    """A configuration to train in a layout."""

    kind: str = "qwen3"
    adaptation: str = "full"
    packing: bool = False
    targets: tuple[str, ...] = ()
    """Target modules of the adapters; empty means the default."""
    precision: str = "fp32"
    moving: bool = False
    """Whether the teacher is a moving average; with full fine-tuning also the anchor."""
    weighted: bool = False
    """Whether token weights and gates are set."""
    siblings: bool = False
    """Whether pairs of rows have the same prompts."""
    shared: bool = False
    """`training.share_prefixes`."""
    shares: tuple[tuple[int, ...], ...] | None = None
    """Rows of each data-parallel rank, without rebalancing; None for equal shares with rebalancing."""


def train(
    rank: int,
    world_size: int,
    folder: Path,
    parallel: dict[str, Any],
    others: Settings,
    variants: dict[str, Variant],
    fault: str = "",
) -> dict[str, Any]:
    """Losses, metrics, first gradients and last weights of each variant; `fault` names one of `FAULTS` to plant."""
    if fault:
        FAULTS[fault]()
    return {name: _train(folder, parallel, others, variant) for name, variant in variants.items()}


def _train(folder: Path, parallel: dict[str, Any], others: Settings, variant: Variant) -> dict[str, Any]:
    from nemo_popsd.distillation.config import TokensConfig, WeightsConfig
    from nemo_popsd.training import step as module
    from tests.training.runs import ScriptedEngine, response, row, settings, sibling, start

    config = settings(
        parallel=parallel,
        student={
            "adaptation": variant.adaptation,
            "precision": variant.precision,
            **others.get("student", {}),
        },
        optimizer={**OPTIMIZER, **others.get("optimizer", {})},
        training={
            "packing": variant.packing,
            "share_prefixes": "true" if variant.shared else "false",
            "frozen_cache_tokens": 11,
            "microbatch_tokens": 48,
            "frozen_tokens": 80,
            **others.get("training", {}),
        },
        distillation={"chunk_tokens": 5, "diagnosed_tokens": 100},
        megatron=others.get("megatron", {}),
    )
    config.student.lora.targets = list(variant.targets) or config.student.lora.targets
    live = folder / f"{variant.kind}_live" if variant.adaptation == "full" else None
    run = start(folder / variant.kind, config, initial=live)
    if variant.adaptation == "lora":
        randomize_adapters(run.student)
        run.optimizer.megatron.reload_model_params()  # in bf16 the optimizer has its own weights
    group = run.student.dp_group
    share = len(LENGTHS) // group.size()
    mine = list(range(group.rank() * share, (group.rank() + 1) * share))
    if variant.shares is not None:
        mine = list(variant.shares[group.rank()])
        module.rebalance = lambda trajectories, *_, **__: [list(trajectories)]  # type: ignore[attr-defined]
    run.steps = 1  # the first one includes the self-check
    if variant.moving:
        config.distillation.teacher = WeightsConfig(weights="ema", decay=0.5)
        if variant.adaptation == "full":
            config.distillation.anchor = config.distillation.teacher
    if variant.weighted:
        config.distillation.tokens = TokensConfig(
            markers=0.3, horizon=10, half_life=5.0, right=1.5, wrong=0.4, max_student_probability=0.055
        )
        run.reader = replace(run.reader, is_right=lambda record, response: response[0] % 2 == 0)
    engine = ScriptedEngine([response(number, LENGTHS[number]) for number in mine], lambda: run.steps)
    step = run.on_policy_step(engine)
    rows = [sibling(index) if variant.siblings else row(index) for index in mine]
    gradients: dict[str, Tensor] = {}

    def update() -> None:
        if not gradients:
            gradients.update(whole_tensors(run, _main_gradients(run)))
        run.update()

    metrics = [step(number + 2, rows, run.optimizer, update) for number in range(STEPS)]
    chunks = [list(chunk.named_parameters()) for chunk in run.student.chunks]
    weights = whole_tensors(run, [[(name, p, p.detach()) for name, p in named] for named in chunks])
    return {"metrics": metrics, "gradients": gradients, "weights": weights}


Named = list[list[tuple[str, Any, Tensor]]]
"""By model chunk: name of a parameter, the parameter, and a tensor of its shape."""


def _main_gradients(run: Any) -> Named:
    for chunk in run.optimizer.chunks:
        for buffer in chunk.buffers:
            if not chunk.ddp_config.use_distributed_optimizer:
                continue
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:  # with the distributed optimizer, a rank has the sum of its part only
                parts = list(bucket.grad_data.chunk(group.size()))
                gathered = [torch.empty_like(part) for part in parts]
                dist.all_gather(gathered, parts[group.rank()].clone(), group=group)
                bucket.grad_data.copy_(torch.cat(gathered))
    return [
        [(name, p, p.main_grad) for name, p in chunk.named_parameters() if p.requires_grad]
        for chunk in run.student.chunks
    ]


def whole_tensors(run: Any, named: Named) -> dict[str, Tensor]:
    """Full tensors of this rank's stage, by their names in a full model of local layers.

    Collective over the tensor-parallel group: one all-gather for each sharded tensor.
    """
    from nemo_popsd.megatron.adapters import full_model_name

    result = {}
    for chunk, tensors in zip(run.student.chunks, named, strict=True):
        for name, parameter, tensor in tensors:
            expert = not getattr(parameter, "allreduce", True)
            group = chunk.pg_collection.expt_tp if expert else run.student.tp_group
            result[full_model_name(chunk, local_name(name))] = _whole(name, parameter, tensor, group)
    return result


def local_name(name: str) -> str:
    """The name in local layers, which do not fuse the norms, of a parameter of Transformer Engine's layers."""
    name = re.sub(r"self_attention\.linear_qkv\.(to_wrap\.)?layer_norm_weight", "input_layernorm.weight", name)
    name = re.sub(r"mlp\.linear_fc1\.(to_wrap\.)?layer_norm_weight", "pre_mlp_layernorm.weight", name)
    return re.sub(r"experts\.(linear_fc\d)\.weight(\d+)$", r"experts.local_experts.\2.\1.weight", name)


def _whole(name: str, parameter: Any, tensor: Tensor, group: Any) -> Tensor:
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return tensor.clone().float()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    # Transformer Engine always marks the weights of grouped experts as split along the first dimension.
    dimension = 1 if re.search(r"experts\.linear_fc2\.weight\d", name) else parameter.partition_dim
    gate_and_up = "linear_fc1" in name and dimension == 0 and "linear_in" not in name
    if gate_and_up:  # each rank has its part of the gate above its part of the up projection
        halves = [part.chunk(2) for part in parts]
        parts = [gate for gate, _ in halves] + [up for _, up in halves]
    return torch.cat(parts, dim=dimension).float()


@torch.no_grad()
def randomize_adapters(student: Any) -> None:
    """Sets the B matrices to the same nonzero values in every layout, so that the A matrices have gradients too."""
    from nemo_popsd.megatron.adapters import full_model_name

    for chunk in student.chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("adapter.linear_out.weight"):
                group = chunk.pg_collection.expt_tp if ".experts." in name else student.tp_group
                rows, columns = parameter.shape[0] * group.size(), parameter.shape[1]
                seed = zlib.crc32(full_model_name(chunk, name).encode())
                whole = 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
                parts: list[Tensor] = list(whole.chunk(group.size()))
                if "linear_fc1" in name:
                    gates, ups = (half.chunk(group.size()) for half in whole.chunk(2))
                    parts = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
                parameter.copy_(parts[group.rank()])


def deviations(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Largest deviation of each tensor, relative to its largest expected entry."""
    for name, value in actual.items():
        # A tied output matrix is a separate parameter if it is on a different stage than the embedding.
        tied = name == "output_layer.weight" and name not in expected
        wanted = expected["embedding.word_embeddings.weight" if tied else name]
        assert wanted.abs().max() > 0, f"{name}: nothing to compare"
        yield name, float((value - wanted).abs().max() / wanted.abs().max())
